//! Partial content piece by piece: an origin that serves ranges sends each byte once, and bytes of
//! two versions are never joined.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{ClientResponse, Gateway, Origin, ReceivedRequest, Script, one_route};

const LENGTH: usize = 10_000;

/// The content of a version.
fn content(version: usize) -> Vec<u8> {
    (0..LENGTH).map(|at| (at * 31 + version * 7) as u8).collect()
}

/// Serves the current version: a range of it, unless `If-Range` names another one.
fn serve(request: &ReceivedRequest, version: usize, tag: &str) -> Script {
    let all = content(version);
    let etag = format!("{tag}\"v{version}\"");
    let fields = [("ETag", &*etag), ("Cache-Control", "max-age=60"), ("Content-Type", "video/mp4")];
    let is_current = request.field("if-range").is_none_or(|condition| condition == etag && tag.is_empty());
    let Some(range) = request.field("range").filter(|_| is_current) else { return Script::ok(&fields, all) };
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').expect("one range");
    let first: usize = first.parse().expect("no suffix");
    let last = last.parse().map_or(LENGTH - 1, |last: usize| last.min(LENGTH - 1));
    let range = format!("bytes {first}-{last}/{LENGTH}");
    Script::reply(206, &[&fields[..], &[("Content-Range", &*range)]].concat(), &all[first..=last])
}

struct Server {
    gateway: Gateway,
    origin: Origin,
    version: Arc<AtomicUsize>,
}

fn start(tag: &'static str, keys: &str) -> Server {
    let version = Arc::new(AtomicUsize::new(1));
    let current = Arc::clone(&version);
    let origin = Origin::start(move |request| serve(request, current.load(Ordering::SeqCst), tag));
    let gateway = Gateway::start(&one_route(origin.address, "", keys));
    Server { gateway, origin, version }
}

impl Server {
    #[track_caller]
    fn get(&self, range: &str, (first, last): (usize, usize), version: usize) -> ClientResponse {
        let fields = [("Range", range)];
        let response = self.gateway.get("/video", if range.is_empty() { &[] } else { &fields });
        assert_eq!(response.body, &content(version)[first..=last], "{range}");
        let expected = format!("bytes {first}-{last}/{LENGTH}");
        match response.status {
            206 => assert_eq!(response.field("content-range"), Some(&*expected)),
            status => assert_eq!((status, response.field("content-range")), (200, None)),
        }
        assert_eq!(response.field("content-type"), Some("video/mp4"));
        response
    }

    /// `Range` and `If-Range` of the requests at the origin.
    fn asked(&self) -> Vec<String> {
        let requests = self.origin.requests();
        let shown = requests.iter().map(|request| {
            let field = |name| request.field(name).unwrap_or("-");
            format!("{} {}", field("range"), field("if-range"))
        });
        shown.collect()
    }
}

#[test]
fn missing_piece_is_requested_and_joined() {
    let server = start("", "");
    server.get("bytes=0-999", (0, 999), 1);
    assert_eq!(server.get("bytes=500-1999", (500, 1_999), 1).status, 206);
    assert!(server.get("bytes=100-1999", (100, 1_999), 1).is_hit());
    server.get("bytes=2000-", (2_000, 9_999), 1);
    assert!(server.get("", (0, 9_999), 1).is_hit());
    assert_eq!(server.asked(), ["bytes=0-999 -", "bytes=1000-1999 \"v1\"", "bytes=2000- -"]);
}

#[test]
fn whole_response_is_completed_from_either_end() {
    for (range, stored, rest) in
        [("bytes=0-999", (0, 999), "bytes=1000-9999"), ("bytes=9000-", (9_000, 9_999), "bytes=0-8999")]
    {
        let server = start("", "");
        server.get(range, stored, 1);
        let whole = server.get("", (0, 9_999), 1);
        assert_eq!((whole.status, whole.field("content-length")), (200, Some("10000")));
        assert!(whole.cache_status().contains("fwd=partial") && whole.cache_status().contains("stored"), "{whole:?}");
        assert!(server.get("", (0, 9_999), 1).is_hit() && server.get("bytes=5-6", (5, 6), 1).is_hit());
        assert_eq!(server.asked(), [format!("{range} -"), format!("{rest} \"v1\"")]);
    }
}

#[test]
fn another_version_replaces_the_part() {
    let server = start("", "");
    server.get("bytes=0-999", (0, 999), 1);
    server.version.store(2, Ordering::SeqCst);
    // The origin sends the new version as a whole, because `If-Range` names the old one.
    assert_eq!(server.get("", (0, 9_999), 2).status, 200);
    assert!(server.get("bytes=0-999", (0, 999), 2).is_hit());
    assert_eq!(server.asked(), ["bytes=0-999 -", "bytes=1000-9999 \"v1\""]);

    let server = start("", "");
    server.get("bytes=0-999", (0, 999), 1);
    server.version.store(2, Ordering::SeqCst);
    assert_eq!(server.get("bytes=500-1999", (0, 9_999), 2).status, 200);
    assert!(server.get("bytes=500-1999", (500, 1_999), 2).is_hit());
}

/// An origin that ignores `If-Range`: the 206 of another version is not joined.
#[test]
fn piece_of_another_version_is_not_joined() {
    let version = Arc::new(AtomicUsize::new(1));
    let current = Arc::clone(&version);
    let origin = Origin::start(move |request| {
        let request = ReceivedRequest {
            fields: request.fields.iter().filter(|(name, _)| !name.eq_ignore_ascii_case("if-range")).cloned().collect(),
            ..request.clone()
        };
        serve(&request, current.load(Ordering::SeqCst), "")
    });
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let server = Server { gateway, origin, version };
    server.get("bytes=0-999", (0, 999), 1);
    server.version.store(2, Ordering::SeqCst);
    server.get("", (0, 9_999), 2);
    assert_eq!(server.asked(), ["bytes=0-999 -", "bytes=1000-9999 \"v1\"", "- -"]);
    let server = Server { gateway: Gateway::start(&one_route(server.origin.address, "", "")), ..server };
    server.version.store(1, Ordering::SeqCst);
    server.get("bytes=0-999", (0, 999), 1);
    server.version.store(2, Ordering::SeqCst);
    assert_eq!(server.get("bytes=500-1999", (500, 1_999), 2).status, 206);
    assert_eq!(server.asked()[4..], ["bytes=1000-1999 \"v1\"", "bytes=500-1999 -"]);
}

#[test]
fn weak_validators_complete_nothing() {
    let server = start("W/", "");
    server.get("bytes=0-999", (0, 999), 1);
    server.get("bytes=500-1999", (500, 1_999), 1);
    server.get("", (0, 9_999), 1);
    assert_eq!(server.asked(), ["bytes=0-999 -", "bytes=500-1999 -", "- -"]);
}

/// A whole object above the limit of stored ones passes, and its parts stay.
#[test]
fn completion_is_bounded_by_the_size_of_stored_objects() {
    let server = start("", "[cache]\nobject_bytes = \"4KiB\"\n");
    server.get("bytes=0-999", (0, 999), 1);
    server.get("", (0, 9_999), 1);
    server.get("bytes=500-1999", (500, 1_999), 1);
    assert!(server.get("bytes=0-1999", (0, 1_999), 1).is_hit());
    let sent: usize = server.asked().len();
    assert_eq!(sent, 3);
}

/// A reader that goes through the object, as players of videos do, gets each byte from the origin
/// once.
#[test]
fn a_player_gets_each_byte_once() {
    let server = start("", "");
    for first in (0..LENGTH).step_by(700) {
        // Each request repeats the end of the one before.
        let (from, last) = (first.saturating_sub(100), (first + 699).min(LENGTH - 1));
        server.get(&format!("bytes={from}-{last}"), (from, last), 1);
    }
    assert!(server.get("", (0, 9_999), 1).is_hit());
    let mut bytes = 0;
    for asked in server.asked() {
        let (first, last) =
            asked.split(' ').next().expect("a range").trim_start_matches("bytes=").split_once('-').expect("one");
        bytes += last.parse::<usize>().expect("a number") - first.parse::<usize>().expect("a number") + 1;
    }
    assert_eq!(bytes, LENGTH);
}

#[test]
fn languages_of_a_route_make_one_variant_each() {
    let origin = Origin::start(|request| {
        let language = request.field("accept-language").unwrap_or("default").to_owned();
        Script::ok(&[("Cache-Control", "max-age=60"), ("Vary", "Accept-Language")], language)
    });
    let gateway = Gateway::start(&one_route(origin.address, "cache = { languages = [\"en\", \"zh\"] }", ""));
    let get = |value: &str| gateway.get("/page", &[("Accept-Language", value)]);
    for (value, expected, is_hit) in [
        ("en-GB,en;q=0.9", "en", false),
        ("en-US,en;q=0.8,de;q=0.5", "en", true),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh", false),
        ("de,zh-TW;q=0.5", "zh", true),
        ("fr", "default", false),
        ("it, de", "default", true),
    ] {
        let response = get(value);
        assert_eq!((response.text(), response.is_hit()), (expected.to_owned(), is_hit), "{value}");
    }
    assert_eq!(origin.count(), 3);
}
