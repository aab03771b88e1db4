//! Invariants of the cache's decisions for arbitrary fields, and of objects read from a store. Used
//! by the fuzz targets and by their replay on the stable toolchain.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use gateway::testing::CacheControl;
use gateway::testing::Extent;
use gateway::testing::{BodyLength, Request, Response, StatusCode};
use gateway::testing::{CacheConfig, CachePolicy, key, policy};
use gateway::testing::{CacheMeta, CachedObject};
use gateway::testing::{Fields, KnownField, is_token};
use shard::{KeyBuilder, Region};

const BODY: &[u8] = b"0123456789";

/// `data` holds field lines: `>` marks those of the request, `<` those of the response, `~` those
/// of a later response.
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
    let response_with = |fields: Fields| {
        let mut response = Response::new(StatusCode::OK);
        (response.fields, response.length) = (fields, BodyLength::Known(10));
        response
    };
    let (response, later) = (response_with(fields(b'<')), response_with(fields(b'~')));
    let (received_at, delay) = (SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000), Duration::from_millis(7));
    let directives = CacheControl::parse(&request.fields);
    let evaluate = |response: &Response| {
        let candidate =
            policy::StoreCandidate { request: &request, directives: &directives, response, received_at, delay };
        candidate.evaluate(&CachePolicy::default(), &CacheConfig::default())
    };

    let evaluated = evaluate(&response);
    if has_directive(&response.fields, b"no-store") || has_directive(&response.fields, b"private") {
        assert!(evaluated.is_err(), "a response that must not be stored was stored");
    }
    if let Ok((object, retention)) = evaluated {
        check_object(&object, retention, &response);
        let freshened = policy::freshen(&object, &later);
        for field in later.fields.iter().filter(|field| field.known != Some(KnownField::ContentLength)) {
            let is_preserved = matches!(field.known, Some(KnownField::ContentEncoding | KnownField::ContentRange));
            assert!(is_preserved || freshened.fields.named(field.name).any(|value| value == field.value));
        }
        let _ = (evaluate(&freshened), policy::matches_head(&object, 10, &later), policy::is_selected(&object, &later));
        let mut conditional = request.fields.clone();
        policy::make_conditional(&object, &mut conditional);
        assert_eq!(conditional.has(KnownField::IfNoneMatch), object.fields.has(KnownField::ETag));
        if let (Some(tag), None) = (object.fields.get(KnownField::ETag), object.fields.all(KnownField::ETag).nth(1)) {
            let is_one =
                tag.starts_with(b"\"") && tag.len() > 1 && tag.iter().position(|byte| *byte == b'"') == Some(0);
            let whole = is_one && tag[1..].iter().position(|byte| *byte == b'"') == Some(tag.len() - 2);
            assert!(!whole || policy::is_not_modified(&conditional, &object), "the object does not match its own tag");
        }
    }
    let _ = policy::is_not_modified(
        &request.fields,
        &CachedObject { fields: response.fields.clone(), ..CachedObject::default() },
    );

    check_parts(&request, &response);
    if let Some(names) = key::vary_names(&response.fields) {
        assert!(names.len() <= key::VARY_MAX && names.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(names.iter().all(|name| is_token(name.as_bytes()) && name != "*"));
        let of = || {
            let mut builder = KeyBuilder::new();
            key::write_primary(&mut builder, &CacheConfig::default(), &request, &Region::DEFAULT);
            let primary = builder.key().to_owned();
            let variant = key::write_variant(&mut builder, &names, 7, &request, std::net::Ipv4Addr::LOCALHOST.into());
            assert!(variant.as_bytes().starts_with(primary.as_key().as_bytes()));
            let _ = key::display(&variant);
            variant.to_owned()
        };
        assert_eq!(of().as_key().as_bytes(), of().as_key().as_bytes());
    }
}

/// Whether an unquoted directive is present, and no targeted field takes precedence.
fn has_directive(fields: &Fields, name: &[u8]) -> bool {
    let mut lines = fields.all(KnownField::CacheControl);
    let text: Vec<u8> = lines.by_ref().collect::<Vec<_>>().join(&b","[..]);
    let lower = text.to_ascii_lowercase();
    let is_plain =
        !lower.contains(&b'"') && !lower.contains(&b'\\') && fields.named(b"cdn-cache-control").next().is_none();
    let understood = lower.windows(15).any(|part| part == b"must-understand");
    is_plain && !understood && lower.split(|byte| *byte == b',').any(|member| member.trim_ascii() == name)
}

fn check_object(object: &CachedObject, retention: Duration, response: &Response) {
    let fresh_for = object.lifetime.saturating_sub(object.initial_age);
    assert!(retention >= fresh_for);
    assert!(!fresh_for.is_zero() || object.has_validator());
    assert!(!object.forbids_stale || (object.stale_if_error + object.stale_while_revalidate).is_zero());
    assert!(object.fields.len() <= response.fields.len());
    let freshness = object.freshness_after(fresh_for);
    assert!(!freshness.is_fresh() && object.freshness_after(Duration::MAX).ttl() <= 0);
}

fn check_parts(request: &Request, response: &Response) {
    let mut cut = response.clone();
    let body = policy::apply_range(request, Bytes::from_static(BODY), &mut cut);
    match cut.status.as_u16() {
        200 => assert_eq!(body, BODY),
        206 => assert!(!body.is_empty() && cut.length == BodyLength::Known(body.len() as u64)),
        416 => assert!(body.is_empty() && cut.length == BodyLength::Known(0)),
        status => panic!("{status}"),
    }
    let extent = Extent { first: 3, length: 4, total: 10 };
    let mut part = response.clone();
    let own = policy::apply_range_to_partial(request, extent, &Bytes::from_static(&BODY[3..7]), &mut part);
    if let Some(own) = own {
        assert_eq!(
            (own, part.status),
            (body, cut.status),
            "the range of a partial object equals the range of the whole object"
        );
    }
    let mut partial = response.clone();
    partial.status = StatusCode::PARTIAL_CONTENT;
    if let Some(extent) = Extent::from_content_range(&partial) {
        assert!(extent.length == 10 && extent.first + extent.length <= extent.total);
    }
}

/// Bytes from a store: metadata that deserializes survives a round trip and can be used.
pub(crate) fn stored_form(data: &[u8]) {
    let Ok(meta) = postcard::from_bytes::<CacheMeta>(data) else { return };
    let again = postcard::to_stdvec(&meta).expect("deserialized before");
    let back: CacheMeta = postcard::from_bytes(&again).expect("serialized before");
    assert_eq!(postcard::to_stdvec(&back).expect("deserialized before"), again);
    if let Some(object) = policy::object(&meta) {
        let freshness = object.freshness_after(Duration::from_secs(1));
        let _ = (freshness.ttl(), freshness.staleness(), policy::is_not_modified(&Fields::default(), object));
        let _ = policy::is_usable(object, freshness, &CacheControl::default());
    }
    if let CacheMeta::Partial(object, extent) = &meta {
        let mut request = Request::default();
        request.fields.push(b"Range", b"bytes=1-2");
        let mut response = Response::new(StatusCode::OK);
        response.fields = object.fields.clone();
        let _ = policy::apply_range_to_partial(&request, *extent, &Bytes::from_static(BODY), &mut response);
    }
}
