//! Partial content piece by piece: an origin that serves ranges sends each byte once, and bytes of
//! two versions are never joined.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::{
    BodyEnd, ClientResponse, Gate, Gateway, Origin, ReceivedRequest, STEP_TIMEOUT, Script, one_route, wait_for,
};

const LENGTH: usize = 10_000;

/// The content of a version.
fn content(version: usize) -> Vec<u8> {
    (0..LENGTH).map(|at| (at * 31 + version * 7) as u8).collect()
}

/// Serves the current version: a range of it, unless `If-Range` names another one.
fn serve(request: &ReceivedRequest, version: usize, tag: &str) -> Script {
    let etag = format!("{tag}\"v{version}\"");
    let is_current = request.field("if-range").is_none_or(|condition| condition == etag && tag.is_empty());
    let fields = [("ETag", &*etag), ("Cache-Control", "max-age=60"), ("Content-Type", "video/mp4")];
    reply(request.field("range").filter(|_| is_current), &fields, &content(version))
}

/// A response with a range of `all`, or with all of it.
fn reply(range: Option<&str>, fields: &[(&str, &str)], all: &[u8]) -> Script {
    let Some(range) = range else { return Script::ok(fields, all) };
    let (first, last) = range.trim_start_matches("bytes=").split_once('-').expect("one range");
    let first: usize = first.parse().expect("no suffix");
    let last = last.parse().map_or(all.len() - 1, |last: usize| last.min(all.len() - 1));
    let range = format!("bytes {first}-{last}/{}", all.len());
    Script::reply(206, &[fields, &[("Content-Range", &*range)]].concat(), &all[first..=last])
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
        assert!(response.body == content(version)[first..=last], "{range}: other bytes, {}", response.status);
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

/// A part in the middle leaves two gaps: each is requested, the smaller one first.
#[test]
fn both_gaps_around_a_part_are_requested() {
    for (range, asked_for, rest) in [
        ("", (0, 9_999), ["bytes=0-2999", "bytes=4000-9999"]),
        ("bytes=100-8999", (100, 8_999), ["bytes=100-2999", "bytes=4000-8999"]),
        ("bytes=0-4999", (0, 4_999), ["bytes=4000-4999", "bytes=0-2999"]),
    ] {
        let server = start("", "");
        server.get("bytes=3000-3999", (3_000, 3_999), 1);
        let completed = server.get(range, asked_for, 1);
        assert_eq!(completed.status, if range.is_empty() { 200 } else { 206 });
        assert!(completed.cache_status().contains("fwd=partial"), "{completed:?}");
        assert!(server.get(range, asked_for, 1).is_hit(), "{range}");
        let asked = ["bytes=3000-3999 -".to_owned(), format!("{} \"v1\"", rest[0]), format!("{} \"v1\"", rest[1])];
        assert_eq!(server.asked(), asked);
    }
}

/// The object changes before the first gap is requested, or between the two: no bytes of two
/// versions are joined.
#[test]
fn gaps_of_another_version_are_not_joined() {
    let server = start("", "");
    server.get("bytes=3000-3999", (3_000, 3_999), 1);
    server.version.store(2, Ordering::SeqCst);
    assert_eq!(server.get("", (0, 9_999), 2).status, 200);
    assert!(server.get("", (0, 9_999), 2).is_hit());

    let origin = Origin::start(|request| serve(request, if request.number < 2 { 1 } else { 2 }, ""));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let server = Server { gateway, origin, version: Arc::default() };
    server.get("bytes=3000-3999", (3_000, 3_999), 1);
    assert_eq!(server.get("", (0, 9_999), 2).status, 200);
    let asked = ["bytes=3000-3999 -", "bytes=0-2999 \"v1\"", "bytes=4000-9999 \"v1\""];
    assert_eq!(server.asked(), asked);
    assert!(server.get("", (0, 9_999), 2).is_hit());
}

/// A gap whose body is cut off is not stored; the response is fetched as a whole.
#[test]
fn a_gap_that_is_cut_off_is_not_joined() {
    let origin = Origin::start(|request| {
        if request.field("range") == Some("bytes=0-2999") {
            let fields = [("ETag", "\"v1\""), ("Content-Range", "bytes 0-2999/10000"), ("Content-Length", "3000")];
            return Script::new().head(206, &fields).send([0; 1_000]).close();
        }
        serve(request, 1, "")
    });
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let server = Server { gateway, origin, version: Arc::default() };
    server.get("bytes=3000-3999", (3_000, 3_999), 1);
    assert_eq!(server.get("", (0, 9_999), 1).status, 200);
    assert_eq!(server.asked(), ["bytes=3000-3999 -", "bytes=0-2999 \"v1\"", "- -"]);
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

/// A client that asks for a range of media may refuse a 200.
#[test]
fn range_that_covers_the_whole_object_is_answered_as_a_range() {
    for range in ["bytes=0-", "bytes=0-9999", "bytes=-10000"] {
        let server = start("", "");
        server.get("bytes=0-1", (0, 1), 1);
        assert_eq!(server.get(range, (0, 9_999), 1).status, 206, "{range}");
        assert_eq!(server.get(range, (0, 9_999), 1).status, 206, "{range}");
        let whole = server.get("", (0, 9_999), 1);
        assert!(whole.status == 200 && whole.is_hit(), "{whole:?}");
        assert_eq!(server.asked(), ["bytes=0-1 -", "bytes=2-9999 \"v1\""]);
    }
}

/// A range of a new version that is too large to store is no reason to send all of it.
#[test]
fn range_of_a_changed_large_object_is_forwarded() {
    let server = start("", "[cache]\nobject_bytes = \"4KiB\"\n");
    server.get("bytes=0-999", (0, 999), 1);
    server.version.store(2, Ordering::SeqCst);
    assert_eq!(server.get("bytes=500-1999", (500, 1_999), 2).status, 206);
    assert_eq!(server.get("bytes=1500-2999", (1_500, 2_999), 2).status, 206);
    let asked = ["bytes=0-999 -", "bytes=1000-1999 \"v1\"", "bytes=500-1999 -", "bytes=2000-2999 \"v2\""];
    assert_eq!(server.asked(), asked);
}

/// Requests of an object that will not be stored do not wait for each other, whatever part of it is
/// stored.
#[test]
fn requests_of_an_object_too_large_to_store_do_not_queue() {
    const CLIENTS: usize = 8;
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| {
        if request.number > 0 {
            opened.wait();
        }
        serve(request, 1, "")
    });
    let gateway = Gateway::start(&one_route(origin.address, "", "[cache]\nobject_bytes = \"4KiB\"\n"));
    gateway.get("/video", &[("Range", "bytes=0-999")]);
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| gateway.connect()).collect();
    clients.iter_mut().for_each(|client| client.send_get("/video", &[]));
    // None of them has an answer yet.
    origin.wait_for_requests(1 + CLIENTS);
    gate.open();
    for client in &mut clients {
        assert!(client.read_response().body == content(1));
    }
    assert!(gateway.get("/video", &[("Range", "bytes=5-99")]).is_hit(), "the part is still stored");
}

const MIB: usize = 1 << 20;

/// A gateway with 1 MiB for bodies of fetches, of an object of 10 MiB, the first 7 MiB of which are
/// stored, and of small pages.
fn start_with_large_part() -> (Gateway, Origin) {
    let video = vec![b'v'; 10 * MIB];
    let origin = Origin::start(move |request| {
        let fields = [("ETag", "\"v1\""), ("Cache-Control", "max-age=60")];
        if request.target == "/video" {
            reply(request.field("range"), &fields, &video)
        } else {
            Script::ok(&fields, "page")
        }
    });
    // The part is stored by a gateway with enough room.
    let config = |fetches: &str| {
        one_route(
            origin.address,
            "",
            &format!("[cache]\nobject_bytes = \"8MiB\"\ninflight_fetch_bytes = \"{fetches}\"\n"),
        )
    };
    let gateway = Gateway::start(&config("16MiB"));
    gateway.get("/video", &[("Range", &format!("bytes=0-{}", 7 * MIB - 1))]);
    assert!(gateway.get("/video", &[("Range", "bytes=0-9")]).is_hit());
    gateway.rewrite(&config("1MiB"));
    gateway.process.signal("HUP");
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    (gateway, origin)
}

/// A range of the part and one byte more.
fn one_byte_more() -> String {
    format!("bytes=0-{}", 7 * MIB)
}

/// Clients that do not read hold a window each, not a copy of the stored part.
#[test]
fn stored_part_is_not_copied_for_clients_that_do_not_read() {
    const CLIENTS: usize = 32;
    let (gateway, _origin) = start_with_large_part();
    for cache_control in ["max-age=60", "no-store"] {
        let before = gateway.process.memory();
        let mut clients: Vec<_> = (0..CLIENTS).map(|_| gateway.connect()).collect();
        for client in &mut clients {
            client.send_get("/video", &[("Range", &one_byte_more()), ("Cache-Control", cache_control)]);
            assert_eq!(client.read_head().status, 206);
        }
        let grown = gateway.process.memory().saturating_sub(before);
        assert!(grown < CLIENTS * 2 * MIB, "{grown} bytes for {CLIENTS} clients, {cache_control}");
    }
}

/// A response that is not stored is not cut off to make room for one that is.
#[test]
fn completed_response_is_not_cut_off_for_other_fetches() {
    let (gateway, _origin) = start_with_large_part();
    let mut slow = gateway.connect();
    slow.send_get("/video", &[("Range", &one_byte_more()), ("Cache-Control", "no-store")]);
    let head = slow.read_head();
    assert_eq!(head.status, 206);
    gateway.get("/page", &[]);
    let response = slow.read_body(head, "GET");
    assert_eq!((response.body.len(), response.end), (7 * MIB + 1, BodyEnd::Complete));
    assert!(gateway.get("/page", &[]).is_hit());
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

#[test]
fn range_responses_describe_their_own_content() {
    let origin = Origin::start(|request| {
        let fresh = [
            ("Cache-Control", "max-age=60"),
            ("CDN-Cache-Control", "max-age=600"),
            ("Surrogate-Control", "max-age=600"),
            ("Expires", "Thu, 01 Jan 2099 00:00:00 GMT"),
            ("Age", "3"),
            ("ETag", "\"v1\""),
            ("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"),
            ("Content-Type", "text/plain"),
            ("Content-Language", "en"),
            ("Content-Digest", "sha-256=:AAAA:"),
        ];
        let coded: &[(&str, &str)] = &[("Content-Encoding", "gzip")];
        match (request.target.as_str(), request.field("Range")) {
            ("/coded", _) => Script::ok(&[&fresh, coded].concat(), "0123456789"),
            ("/part", Some("bytes=2-5")) => {
                let part = [("Content-Range", "bytes 2-5/10"), ("Content-Length", "4")];
                Script::new().head(206, &[&fresh[..], &part].concat()).send("2345")
            }
            _ => Script::ok(&fresh, "0123456789"),
        }
    });
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    for target in ["/whole", "/coded"] {
        assert_eq!(gateway.get(target, &[]).status, 200);
    }
    assert_eq!(gateway.get("/part", &[("Range", "bytes=2-5")]).status, 206);
    for target in ["/whole", "/coded", "/part"] {
        let response = gateway.get(target, &[("Range", "bytes=10-")]);
        assert!(response.is_hit(), "{target}");
        assert_eq!((response.status, response.field("content-range")), (416, Some("bytes */10")));
        assert_eq!(response.all("cache-control"), ["no-store"]);
        for name in ["cdn-cache-control", "surrogate-control", "expires", "age", "etag", "last-modified"] {
            assert_eq!(response.field(name), None, "{target}: {name}");
        }
        for name in ["content-type", "content-language", "content-encoding", "content-digest"] {
            assert_eq!(response.field(name), None, "{target}: {name}");
        }
    }
    let part = gateway.get("/whole", &[("Range", "bytes=1-2")]);
    assert_eq!((part.status, part.text(), part.field("content-digest")), (206, "12".to_owned(), None));
    // Ranges of the coded bytes: one keeps the coding, several would be labelled with it as a
    // whole, unless the client has the head of the object already.
    let one = gateway.get("/coded", &[("Range", "bytes=1-2")]);
    assert_eq!((one.status, one.field("content-encoding")), (206, Some("gzip")));
    let several = gateway.get("/coded", &[("Range", "bytes=1-2,4-5")]);
    assert_eq!((several.status, several.field("content-encoding"), several.body.len()), (200, Some("gzip"), 10));
    let parts = gateway.get("/coded", &[("Range", "bytes=1-2,4-5"), ("If-Range", "\"v1\"")]);
    assert_eq!((parts.status, parts.field("content-encoding"), parts.is_hit()), (206, None, true));
    let content_type = parts.field("content-type").expect("a type");
    let boundary = content_type.strip_prefix("multipart/byteranges; boundary=").expect("parts").to_owned();
    let part = |range: &str, bytes: &str| {
        format!("\r\n--{boundary}\r\nContent-Type: text/plain\r\nContent-Range: bytes {range}/10\r\n\r\n{bytes}")
    };
    assert_eq!(parts.text(), format!("{}{}\r\n--{boundary}--\r\n", part("1-2", "12"), part("4-5", "45")));
    let outdated = gateway.get("/coded", &[("Range", "bytes=1-2,4-5"), ("If-Range", "\"v0\"")]);
    assert_eq!(
        (outdated.status, outdated.field("content-encoding"), outdated.text()),
        (200, Some("gzip"), "0123456789".to_owned())
    );
}
