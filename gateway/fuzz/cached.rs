//! What must hold of the cache's decisions, whatever fields say, and of what comes back from a store. Used by fuzz targets and by
//! their replay on the stable toolchain.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use gateway::cache::control::Control;
use gateway::cache::part::Extent;
use gateway::cache::stored::{Meta, Object};
use gateway::cache::{RoutePolicy, Settings, key, policy};
use gateway::http::fields::{Fields, Known, is_token};
use gateway::http::message::{Length, Request, Response, StatusCode};
use shard::{KeyBuilder, Region};

const BODY: &[u8] = b"0123456789";

/// Lines of fields: `>` before one of the request, `<` before one of the answer, `~` before one of a later answer.
pub(crate) fn cache_fields(data: &[u8]) {
    let fields = |mark: u8| {
        let mut fields = Fields::default();
        for line in data.split(|byte| *byte == b'\n').filter(|line| line.first() == Some(&mark)) {
            let (name, value) = line[1..].split_at(line[1..].iter().position(|byte| *byte == b':').unwrap_or(0));
            let value = value.get(1..).unwrap_or_default().trim_ascii();
            let is_text = |byte: &u8| matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
            if is_token(name) && value.iter().all(is_text) {
                fields.push(name, value);
            }
        }
        fields
    };
    let mut request = Request { fields: fields(b'>'), authority: "a".into(), ..Request::default() };
    request.set_target("/?q");
    let answer = |fields: Fields| Response { status: StatusCode::OK, fields, length: Length::Known(10) };
    let (response, later) = (answer(fields(b'<')), answer(fields(b'~')));
    let (now, delay) = (SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000), Duration::from_millis(7));
    let judge = |response: &Response| {
        let asked = Control::of(&request.fields);
        policy::judge(&request, &asked, response, &RoutePolicy::default(), &Settings::default(), now, delay)
    };

    let judged = judge(&response);
    if has_directive(&response.fields, b"no-store") || has_directive(&response.fields, b"private") {
        assert!(judged.is_err(), "what must not be stored is");
    }
    if let Ok((object, keep)) = judged {
        check_object(&object, keep, &response);
        let freshened = policy::freshen(&object, &later);
        for field in later.fields.iter().filter(|field| field.known != Some(Known::ContentLength)) {
            let is_kept = matches!(field.known, Some(Known::ContentEncoding | Known::ContentRange));
            assert!(is_kept || freshened.fields.named(field.name).any(|value| value == field.value));
        }
        let _ = (judge(&freshened), policy::agrees(&object, 10, &later), policy::is_selected(&object, &later));
        let mut conditional = request.fields.clone();
        policy::make_conditional(&object, &mut conditional);
        assert_eq!(conditional.has(Known::IfNoneMatch), object.fields.has(Known::ETag));
        if let (Some(tag), None) = (object.fields.get(Known::ETag), object.fields.all(Known::ETag).nth(1)) {
            let is_one =
                tag.starts_with(b"\"") && tag.len() > 1 && tag.iter().position(|byte| *byte == b'"') == Some(0);
            let whole = is_one && tag[1..].iter().position(|byte| *byte == b'"') == Some(tag.len() - 2);
            assert!(!whole || policy::is_not_modified(&conditional, &object), "its own tag");
        }
    }
    let _ = policy::is_not_modified(&request.fields, &Object { fields: response.fields.clone(), ..Object::default() });

    check_parts(&request, &response);
    if let Some(names) = key::vary(&response.fields) {
        assert!(names.len() <= key::VARY_MAX && names.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(names.iter().all(|name| is_token(name.as_bytes()) && name != "*"));
        let of = || {
            let mut builder = KeyBuilder::new();
            key::primary(&mut builder, &Settings::default(), &request, &Region::DEFAULT);
            let primary = builder.key().to_owned();
            let variant = key::variant(&mut builder, &names, 7, &request.fields);
            assert!(variant.as_bytes().starts_with(primary.as_key().as_bytes()));
            let _ = key::told(&variant);
            variant.to_owned()
        };
        assert_eq!(of().as_key().as_bytes(), of().as_key().as_bytes());
    }
}

/// A directive by itself between commas, where no quotes could hide it and no targeted field speaks before it.
fn has_directive(fields: &Fields, name: &[u8]) -> bool {
    let mut lines = fields.all(Known::CacheControl);
    let text: Vec<u8> = lines.by_ref().collect::<Vec<_>>().join(&b","[..]);
    let lower = text.to_ascii_lowercase();
    let is_plain =
        !lower.contains(&b'"') && !lower.contains(&b'\\') && fields.named(b"cdn-cache-control").next().is_none();
    let understood = lower.windows(15).any(|part| part == b"must-understand");
    is_plain && !understood && lower.split(|byte| *byte == b',').any(|member| member.trim_ascii() == name)
}

fn check_object(object: &Object, keep: Duration, response: &Response) {
    let fresh_for = object.lifetime.saturating_sub(object.initial_age);
    assert!(keep >= fresh_for);
    assert!(!fresh_for.is_zero() || object.has_validator());
    assert!(!object.forbids_stale || (object.stale_if_error + object.stale_while_revalidate).is_zero());
    assert!(object.fields.len() <= response.fields.len());
    let standing = object.standing(fresh_for);
    assert!(!standing.is_fresh() && object.standing(Duration::MAX).ttl() <= 0);
}

fn check_parts(request: &Request, response: &Response) {
    let mut cut = response.clone();
    let body = policy::cut(request, Bytes::from_static(BODY), &mut cut);
    match cut.status.as_u16() {
        200 => assert_eq!(body, BODY),
        206 => assert!(!body.is_empty() && cut.length == Length::Known(body.len() as u64)),
        416 => assert!(body.is_empty() && cut.length == Length::Known(0)),
        status => panic!("{status}"),
    }
    let extent = Extent { first: 3, length: 4, total: 10 };
    let mut part = response.clone();
    let own = policy::cut_part(request, extent, &Bytes::from_static(&BODY[3..7]), &mut part);
    if let Some(own) = own {
        assert_eq!((own, part.status), (body, cut.status), "the same part of a part as of the whole");
    }
    if let Some(extent) = Extent::of(&Response { status: StatusCode::PARTIAL_CONTENT, ..response.clone() }) {
        assert!(extent.length == 10 && extent.first + extent.length <= extent.total);
    }
}

/// Bytes from a store: what is read as something stored is that, written again or not, and may be used.
pub(crate) fn stored_form(data: &[u8]) {
    let Ok(meta) = postcard::from_bytes::<Meta>(data) else { return };
    let again = postcard::to_stdvec(&meta).expect("it was read");
    let back: Meta = postcard::from_bytes(&again).expect("it was written");
    assert_eq!(postcard::to_stdvec(&back).expect("it was read"), again);
    if let Some(object) = policy::object(&meta) {
        let standing = object.standing(Duration::from_secs(1));
        let _ = (standing.ttl(), standing.staleness(), policy::is_not_modified(&Fields::default(), object));
        let _ = policy::may_use(object, standing, &Control::default());
    }
    if let Meta::Part(object, extent) = &meta {
        let mut request = Request::default();
        request.fields.push(b"Range", b"bytes=1-2");
        let mut response = Response { status: StatusCode::OK, fields: object.fields.clone(), length: Length::Empty };
        let _ = policy::cut_part(&request, *extent, &Bytes::from_static(BODY), &mut response);
    }
}
