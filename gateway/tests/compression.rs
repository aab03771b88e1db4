//! Compression of responses for clients: negotiation, stored forms, streams, ranges, validators,
//! and what is never compressed.

mod support;

use std::io::Read;
use std::time::Duration;

use support::{ClientResponse, Gate, Gateway, Origin, Script, one_route};

const ROUTE: &str = "compress = [\"zstd\", \"br\", \"gzip\"]\n";

fn text() -> String {
    (0..2_000).map(|number| format!("line {number} of a page that repeats itself\n")).collect()
}

fn decoded(response: &ClientResponse) -> String {
    let (mut out, bytes) = (String::new(), &response.body[..]);
    match response.field("content-encoding") {
        None => return response.text(),
        Some("gzip") => flate2::read::GzDecoder::new(bytes).read_to_string(&mut out),
        Some("br") => brotli::Decompressor::new(bytes, 4096).read_to_string(&mut out),
        Some("zstd") => zstd::stream::read::Decoder::new(bytes).expect("a frame").read_to_string(&mut out),
        Some(other) => panic!("{other}"),
    }
    .expect("valid");
    out
}

/// The coding, and whether the body is the text.
fn coding(response: &ClientResponse) -> Option<&str> {
    assert_eq!((response.status, decoded(response) == text()), (200, true));
    let coding = response.field("content-encoding");
    if coding.is_some() {
        assert!(response.body.len() * 4 < text().len(), "{} bytes", response.body.len());
    }
    coding
}

fn page(more: &'static [(&str, &str)]) -> Origin {
    Origin::start(move |_| {
        let fields = [&[("Content-Type", "text/html"), ("ETag", "\"v1\""), ("Accept-Ranges", "bytes")], more].concat();
        Script::ok(&fields, text())
    })
}

#[test]
fn stored_bodies_are_compressed_once_for_each_coding() {
    let origin = page(&[("Cache-Control", "max-age=60")]);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    let get = |accepted: &str| gateway.get("/", &[("Accept-Encoding", accepted)]);
    assert_eq!(coding(&get("gzip")), Some("gzip"), "while it is stored");
    let input = || gateway.metric("tidegate_compression_input_bytes_total");
    for (accepted, expected) in [
        ("gzip, deflate, br, zstd", Some("zstd")),
        ("gzip, br", Some("br")),
        ("gzip", Some("gzip")),
        ("gzip;q=0.5, br;q=0.4", Some("gzip")),
        ("identity", None),
        ("deflate", None),
    ] {
        let response = get(accepted);
        assert_eq!((coding(&response), response.is_hit()), (expected, true), "{accepted}");
        assert_eq!(response.field("vary"), Some("Accept-Encoding"), "{accepted}");
        let tag = if expected.is_some() { "W/\"v1\"" } else { "\"v1\"" };
        assert_eq!(response.field("etag"), Some(tag));
        assert_eq!(response.field("content-length"), Some(&*response.body.len().to_string()));
        assert_eq!(response.field("accept-ranges").is_some(), expected.is_none());
    }
    let before = input();
    for _ in 0..20 {
        assert!(["zstd", "br", "gzip"].iter().all(|accepted| coding(&get(accepted)) == Some(accepted)));
    }
    assert_eq!(input(), before, "each form is made once");
    assert_eq!(origin.count(), 1);
    assert!(gateway.metric("tidegate_compression_kept_bytes") > 100.0);
    assert_eq!(gateway.metric("tidegate_compression_streams"), 0.0);
}

#[test]
fn head_conditions_and_ranges_fit_the_forms() {
    const FIELDS: [(&str, &str); 3] =
        [("Cache-Control", "max-age=60"), ("Content-Digest", "sha-256=:x:"), ("Content-MD5", "x")];
    let origin = page(&FIELDS);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    let gzip = ("Accept-Encoding", "gzip");
    gateway.get("/", &[gzip]);
    let full = gateway.get("/", &[gzip]);
    let head = gateway.request("HEAD", "/", &[gzip], b"");
    for name in ["content-encoding", "content-length", "etag", "vary"] {
        assert_eq!(head.field(name), full.field(name), "{name}");
    }
    let not_modified = |tag: &str| gateway.get("/", &[gzip, ("If-None-Match", tag)]);
    for tag in ["W/\"v1\"", "\"v1\""] {
        let response = not_modified(tag);
        let fields = (response.field("etag"), response.field("vary"), response.field("content-encoding"));
        assert_eq!((response.status, fields), (304, (Some(tag), Some("Accept-Encoding"), None)));
        // They are those of the plain body.
        for name in ["content-digest", "content-md5", "accept-ranges"] {
            assert_eq!(response.field(name).is_some(), !tag.starts_with("W/"), "{name} {tag}");
        }
    }
    assert_eq!(not_modified("\"v2\"").status, 200);
    let part = gateway.get("/", &[gzip, ("Range", "bytes=5-9")]);
    assert_eq!((part.status, part.field("content-encoding"), part.text()), (206, None, text()[5..10].to_owned()));
    // The weak validator of a compressed form does not select a part of the plain body.
    let part = gateway.get("/", &[gzip, ("Range", "bytes=5-9"), ("If-Range", "W/\"v1\"")]);
    assert_eq!(coding(&part), Some("gzip"));
}

#[test]
fn unstored_bodies_are_compressed_in_pieces_and_flushed() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| {
        let stream = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store")];
        if request.target == "/page" {
            return Script::ok(&[("Content-Type", "text/plain"), ("Cache-Control", "no-store")], text());
        }
        Script::new().head(200, &stream).send("data: one\n\n").wait(&opened).send("data: two\n\n").close()
    });
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    for accepted in ["zstd", "br", "gzip"] {
        let response = gateway.get("/page", &[("Accept-Encoding", accepted)]);
        assert_eq!(coding(&response), Some(accepted));
        assert_eq!(response.field("content-length"), None);
    }
    let mut client = gateway.connect();
    client.send_get("/events", &[("Accept-Encoding", "gzip")]);
    let head = client.read_head();
    assert_eq!(head.field("content-encoding"), Some("gzip"));
    // The first event arrives while the origin holds the second one.
    let mut received = Vec::new();
    while !String::from_utf8_lossy(&inflated(&received)).contains("data: one\n\n") {
        // The line end of a chunk may follow with the next one.
        let line = read_line(&mut client);
        let line = if line == "\r\n" { read_line(&mut client) } else { line };
        let size = usize::from_str_radix(line.trim(), 16).expect("a size");
        received.extend(client.read_bytes(size));
    }
    assert_eq!(gateway.metric("tidegate_compression_streams"), 1.0);
    gate.open();
    read_line(&mut client);
    support::wait_for(|| gateway.metric("tidegate_compression_streams") == 0.0, Duration::from_secs(5));
}

fn read_line(client: &mut support::Client) -> String {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.extend(client.read_bytes(1));
    }
    String::from_utf8(line).expect("ASCII")
}

/// The text that an unfinished gzip stream has so far.
fn inflated(bytes: &[u8]) -> Vec<u8> {
    let (mut out, mut buffer) = (Vec::new(), [0; 256]);
    let mut decoder = flate2::read::GzDecoder::new(bytes);
    while let Ok(count @ 1..) = decoder.read(&mut buffer) {
        out.extend(&buffer[..count]);
    }
    out
}

#[test]
fn one_client_holds_few_encoders() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        let fields = [("Content-Type", "text/plain"), ("Cache-Control", "no-store")];
        Script::new().head(200, &fields).send("begin\n").wait(&opened).close()
    });
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, "[server]\nworkers = 1\n"));
    let mut clients: Vec<_> = (0..12).map(|_| gateway.connect()).collect();
    let coded = clients.iter_mut().filter_map(|client| {
        client.send_get("/", &[("Accept-Encoding", "gzip")]);
        client.read_head().field("content-encoding").map(str::to_owned)
    });
    assert_eq!(coded.count(), 8);
    assert_eq!(gateway.metric("tidegate_compression_skipped_total{reason=\"busy\"}"), 4.0);
    gate.open();
    drop(clients);
    support::wait_for(|| gateway.metric("tidegate_compression_streams") == 0.0, Duration::from_secs(5));
}

#[test]
fn secrets_coded_and_unsuitable_bodies_stay_as_they_are() {
    let origin = Origin::start(|request| {
        let html = ("Content-Type", "text/html");
        let private = ("Cache-Control", "private");
        match request.target.as_str() {
            "/shared" => Script::ok(&[html, ("Cache-Control", "max-age=60")], text()),
            "/for-users" => Script::ok(&[html, ("Cache-Control", "max-age=60"), ("Vary", "Cookie")], text()),
            "/set-cookie" => Script::ok(&[html, private, ("Set-Cookie", "a=b")], text()),
            "/coded" => Script::ok(&[html, private, ("Content-Encoding", "x-own")], text()),
            "/image" => Script::ok(&[("Content-Type", "image/png"), private], text()),
            "/short" => Script::ok(&[html, private], "short"),
            "/no-transform" => Script::ok(&[html, ("Cache-Control", "private, no-transform")], text()),
            _ => Script::ok(&[html, private], text()),
        }
    });
    let more = "[[routes]]\nname = \"credentials\"\nmatch = { path = \"/all/*\" }\nupstream = \"origin\"\n\
                compress = { codings = [\"gzip\"], credentials = true }\n";
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, more));
    let encoding = |target: &str, fields: &[(&str, &str)]| {
        let response = gateway.get(target, &[&[("Accept-Encoding", "gzip")], fields].concat());
        assert_eq!(response.status, 200);
        response.field("content-encoding").map(str::to_owned)
    };
    let (gzip, cookie) = (Some("gzip".to_owned()), ("Cookie", "session=1"));
    assert_eq!(encoding("/private", &[]), gzip, "no credentials");
    assert_eq!(encoding("/private", &[cookie]), None);
    assert_eq!(encoding("/private", &[("Authorization", "Basic YTpi")]), None);
    assert_eq!(encoding("/set-cookie", &[]), None);
    assert_eq!(encoding("/shared", &[cookie]), gzip, "others get it too");
    assert_eq!(encoding("/shared", &[cookie]), gzip);
    assert_eq!(encoding("/for-users", &[cookie]), None, "stored for those with this cookie");
    assert_eq!(encoding("/for-users", &[cookie]), None);
    assert_eq!(encoding("/all/private", &[cookie]), gzip, "the route says so");
    assert_eq!(encoding("/coded", &[]), Some("x-own".to_owned()));
    for target in ["/image", "/short", "/no-transform"] {
        assert_eq!(encoding(target, &[]), None, "{target}");
    }
    assert_eq!(gateway.metric("tidegate_compression_skipped_total{reason=\"credentials\"}"), 5.0);
}

#[test]
fn fixed_responses_and_error_pages_have_their_own_forms() {
    let origin = page(&[("Cache-Control", "max-age=1, stale-if-error=0")]);
    let body = "a fixed text that repeats itself. ".repeat(100);
    let more = format!(
        "[[routes]]\nname = \"fixed\"\nmatch = {{ path = \"/fixed\" }}\nrespond = {{ body = \"{body}\" }}\n{ROUTE}"
    );
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, &more));
    let fields = [("Accept-Encoding", "gzip"), ("Accept", "text/html")];
    let input = || gateway.metric("tidegate_compression_input_bytes_total") as usize;
    let mut client = gateway.connect();
    for _ in 0..3 {
        let fixed = client.get("/fixed", &fields);
        assert_eq!((fixed.field("content-encoding"), decoded(&fixed)), (Some("gzip"), body.clone()));
    }
    assert_eq!(input(), body.len(), "it is compressed once");
    for _ in 0..2 {
        assert_eq!(coding(&client.get("/", &fields)), Some("gzip"));
    }
    // The page that replaces the object on the same connection is not the form of the object.
    origin.stop();
    support::wait_for(
        || {
            let response = client.get("/", &fields);
            let is_page = response.status == 503;
            assert!(!is_page || decoded(&response).contains("Service Unavailable"), "{}", decoded(&response));
            is_page
        },
        Duration::from_secs(5),
    );
}

#[test]
fn every_response_of_a_compressed_uri_varies() {
    let origin = Origin::start(|request| {
        let html = ("Content-Type", "text/html");
        let stored = [("Cache-Control", "max-age=60"), ("ETag", "\"v1\"")];
        let unstored = [("Cache-Control", "no-store"), ("ETag", "\"v1\"")];
        let range = request.field("Range").is_some();
        match (request.target.as_str(), range) {
            ("/image", _) => Script::ok(&[&[("Content-Type", "image/png")], &stored[..]].concat(), text()),
            ("/short", _) => Script::ok(&[&[html], &stored[..]].concat(), "short"),
            ("/coded", _) => Script::ok(&[&[html, ("Content-Encoding", "x-own")], &stored[..]].concat(), text()),
            ("/passed", true) => {
                let of_part = [html, ("Content-Range", "bytes 5-9/78890"), ("Content-Length", "5")];
                Script::new().head(206, &[&of_part, &unstored[..]].concat()).send(&text()[5..10])
            }
            ("/passed-parts", true) => {
                let parts = [("Content-Type", "multipart/byteranges; boundary=x"), ("Content-Length", "5")];
                Script::new().head(206, &[&parts, &unstored[..]].concat()).send("--x--")
            }
            ("/chunked", _) if request.method == "HEAD" => {
                Script::new().head(200, &[&[html, ("Transfer-Encoding", "chunked")], &unstored[..]].concat())
            }
            _ => Script::ok(&[&[html], &stored[..]].concat(), text()),
        }
    });
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    for target in ["/stored", "/image", "/short", "/coded"] {
        assert_eq!(gateway.get(target, &[]).status, 200);
    }
    let varies = |method: &str, target: &str, fields: &[(&str, &str)]| {
        let response = gateway.request(method, target, fields, b"");
        (response.status, response.all("vary").join(",") == "Accept-Encoding")
    };
    let (one, several) = (("Range", "bytes=5-9"), ("Range", "bytes=0-1,5-9"));
    for accepted in ["gzip", "identity"] {
        let accepted = ("Accept-Encoding", accepted);
        for target in ["/stored", "/passed"] {
            assert_eq!(varies("GET", target, &[accepted, one]), (206, true), "{target}");
        }
        assert_eq!(varies("GET", "/stored", &[accepted, several]), (206, true));
        assert_eq!(varies("GET", "/passed-parts", &[accepted, several]), (206, true));
        assert_eq!(varies("GET", "/stored", &[accepted, ("If-None-Match", "\"v1\"")]), (304, true));
        assert_eq!(varies("HEAD", "/stored", &[accepted]), (200, true));
        assert_eq!(varies("HEAD", "/chunked", &[accepted]), (200, true));
        for target in ["/image", "/short", "/coded"] {
            assert_eq!(varies("GET", target, &[accepted]), (200, false), "{target}");
        }
        assert_eq!(varies("GET", "/image", &[accepted, one]), (206, false));
        // A 304 and parts have the fields of the 200, although they do not tell its type.
        for target in ["/image", "/short", "/coded"] {
            assert_eq!(varies("GET", target, &[accepted, ("If-None-Match", "\"v1\"")]), (304, false), "{target}");
        }
        assert_eq!(varies("GET", "/image", &[accepted, several]), (206, false));
        let conditional = [accepted, several, ("If-Range", "\"v1\"")];
        assert_eq!(varies("GET", "/coded", &conditional), (206, false), "coded by the origin");
        assert_eq!(varies("GET", "/stored", &conditional), (206, true));
    }
}
