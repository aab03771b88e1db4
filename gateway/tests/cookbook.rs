//! Each configuration of the cookbook, in front of an application with real sockets: what its page
//! promises.
//!
//! Addresses and certificates are those of the test; all else is the file that readers copy.

mod support;
#[path = "support/issuer.rs"]
mod issuer;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use issuer::{Issuer, set};
use jsonwebtoken::Algorithm;
use serde_json::json;
use support::frames::{DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, WINDOW, body, head_block, status};
use support::h2_origin::{H2Origin, H2OriginOptions};
use support::tls::write_certificate;
use support::{
    BodyEnd, Client, Gate, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, free_address, tidegate, wait_for,
};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cookbook")
}

fn read(name: &str) -> String {
    let path = directory().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The configuration of a recipe on a free port. Each text is replaced by another one, and has to
/// be in the file.
fn recipe(name: &str, replaced: &[(&str, String)]) -> String {
    let listen = [("\"0.0.0.0:", "\"127.0.0.1:0\" # ".to_owned())];
    let text = read(&format!("{name}.toml"));
    replaced.iter().chain(&listen).fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{name}.toml has no {from}");
        text.replace(from, to)
    })
}

/// The address of an application, as a replacement for port 3000.
fn app(origin: &Origin) -> (&'static str, String) {
    ("127.0.0.1:3000", origin.address.to_string())
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(directory()).expect("the cookbook");
    let names = entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned());
    let mut names: Vec<_> = names.filter_map(|name| name.strip_suffix(".toml").map(str::to_owned)).collect();
    names.sort();
    names
}

/// Each file is shown on its page, whole, and the list names it; each has a test here.
#[test]
fn pages_show_the_files() {
    let (list, tests) = (read("README.md"), include_str!("cookbook.rs"));
    assert_eq!(names().len(), 12);
    for name in names() {
        let page = read(&format!("{name}.md"));
        let shown = page.split_once("```toml\n").and_then(|(_, rest)| rest.split_once("```")).map(|(shown, _)| shown);
        assert_eq!(shown, Some(&*read(&format!("{name}.toml"))), "{name}.md");
        assert!(list.contains(&format!("({name}.md)")), "README.md does not list {name}");
        assert!(tests.contains(&format!("recipe(\"{name}\"")), "no test runs {name}");
    }
}

/// A reader who copies a file gets no warning.
#[test]
fn files_pass_the_check_without_warnings() {
    let dir = TempDir::new();
    write_certificate(&dir);
    dir.write("jwks.json", &set(&[&Issuer::new(Algorithm::ES256, "a")]));
    for name in names() {
        let file = dir.write(&format!("{name}.toml"), &read(&format!("{name}.toml")));
        let output = tidegate().args(["check", "--deny-warnings"]).arg(file).env("ADMIN_TOKEN", "right").output();
        let output = output.expect("it ran");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn single_page_app_serves_files_and_limits_the_api() {
    let files = Origin::start(|request| match request.target.as_str() {
        "/index.html" => Script::ok(&[("Content-Type", "text/html")], "<title>app</title>"),
        _ => Script::ok(&[("Content-Type", "text/javascript"), ("Cache-Control", "max-age=600")], "x".repeat(5_000)),
    });
    let api = Origin::start(|request| Script::ok(&[("Cache-Control", "max-age=600")], request.target.clone()));
    let replaced = [app(&files), ("127.0.0.1:4000", api.address.to_string())];
    let gateway = Gateway::start(&recipe("single-page-app", &replaced));
    let page = gateway.get("/orders/7", &[]);
    assert_eq!((page.text().as_str(), page.field("x-content-type-options")), ("<title>app</title>", Some("nosniff")));
    assert_eq!(files.last().target, "/index.html");
    let asset = || gateway.get("/assets/app.1.js", &[("accept-encoding", "br")]);
    asset();
    wait_for(|| asset().field("content-encoding") == Some("br"), STEP_TIMEOUT);
    assert!(asset().is_hit() && files.requests().iter().filter(|seen| seen.target == "/assets/app.1.js").count() == 1);
    for _ in 0..2 {
        assert_eq!(gateway.get("/api/orders?a=1", &[]).text(), "/orders?a=1");
    }
    assert_eq!(api.count(), 2, "the API is not cached");
    let large = gateway.request("POST", "/api/orders", &[("content-length", "1048577")], b"");
    assert_eq!(large.status, 413);
    files.stop();
    assert_eq!(gateway.get("/assets/app.1.js", &[]).status, 200);
    let mut client = gateway.connect();
    let denied = (0..1_000).map(|_| client.get("/api/orders", &[])).find(|response| response.status == 429);
    assert!(denied.expect("a denial").field("retry-after").is_some());
}

#[test]
fn events_arrive_at_once_and_end_with_the_browser() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/events" => Script::new()
            .head(200, &[("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")])
            .send("9\r\ndata: 1\n\n\r\n")
            .wait(&opened)
            .send("9\r\ndata: 2\n\n\r\n")
            .hang(),
        _ => Script::ok(&[], "page"),
    });
    let gateway = Gateway::start(&recipe("events", &[app(&origin)]));
    let mut client = gateway.connect();
    client.send_get("/events", &[]);
    assert_eq!(client.read_head().status, 200);
    let mut read_event = || {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\n\n") {
            bytes.extend(client.read_bytes(1));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    // The application has not sent more than this.
    assert!(read_event().ends_with("data: 1\n\n"));
    gate.open();
    assert!(read_event().ends_with("data: 2\n\n"));
    assert!(origin.ends().is_empty());
    drop(client);
    wait_for(|| origin.ends().len() == 1, STEP_TIMEOUT);
    assert_eq!(gateway.get("/", &[]).text(), "page");
}

#[test]
fn uploads_are_streamed_where_they_are_allowed() {
    let origin = Origin::start(|request| Script::ok(&[], format!("{} bytes", request.body.len())));
    let gateway = Gateway::start(&recipe("uploads", &[app(&origin)]));
    let large = vec![b'x'; 20 << 20];
    let mut client = gateway.connect();
    client.send(format!("PUT /uploads/a HTTP/1.1\r\nHost: gate.test\r\nContent-Length: {}\r\n\r\n", large.len()));
    client.send(&large[..10 << 20]);
    // The application gets bytes before the upload is complete.
    wait_for(|| origin.bytes() > 5 << 20, STEP_TIMEOUT);
    client.send(&large[10 << 20..]);
    assert_eq!(client.read_response().text(), "20971520 bytes");
    let refused = gateway.request("POST", "/comments", &[("content-length", "1048577")], b"");
    assert_eq!((refused.status, origin.count()), (413, 1));
    let too_large = gateway.request("PUT", "/uploads/a", &[("content-length", "2147483649")], b"");
    assert_eq!((too_large.status, origin.count()), (413, 1));
    assert_eq!(gateway.request("POST", "/comments", &[], b"short").text(), "5 bytes");
}

#[test]
fn behind_a_cdn_each_browser_counts_for_itself() {
    let fields =
        [("Surrogate-Control", "max-age=600"), ("CDN-Cache-Control", "no-store"), ("Cache-Control", "no-cache")];
    let origin = Origin::start(move |request| match request.target.as_str() {
        "/page" => Script::ok(&fields, "page"),
        _ => Script::ok(&[("Cache-Control", "no-store")], "own"),
    });
    let trusted = |network: &str| ("203.0.113.0/24", network.to_owned());
    let gateway = Gateway::start(&recipe("behind-a-cdn", &[app(&origin), trusted("127.0.0.1/32")]));
    let get = |target: &str, client: &str| {
        gateway.get(target, &[("x-forwarded-for", client), ("x-forwarded-proto", "https"), ("host", "shop.example")])
    };
    let until_denied = |client: &str| (0..1_000).any(|_| get("/own", client).status == 429);
    assert!(until_denied("198.51.100.1"));
    assert_eq!(get("/own", "198.51.100.2").status, 200, "another browser");
    assert_eq!(origin.last().field("x-forwarded-for"), Some("198.51.100.2, 127.0.0.1"));
    get("/page", "198.51.100.2");
    let page = get("/page", "198.51.100.3");
    assert!(page.is_hit(), "Surrogate-Control is for this gateway");
    assert_eq!(page.field("cdn-cache-control"), Some("no-store"), "the CDN gets its own field");
    let plain = gateway.get("/a?b=1", &[("x-forwarded-proto", "http"), ("host", "shop.example")]);
    assert_eq!((plain.status, plain.field("location")), (308, Some("https://shop.example/a?b=1")));
    // Without trust, the client is the peer: the fields say nothing.
    let stranger = Gateway::start(&recipe("behind-a-cdn", &[app(&origin), trusted("203.0.113.0/24")]));
    let claimed = stranger.get("/own", &[("x-forwarded-proto", "https"), ("host", "shop.example")]);
    assert_eq!(claimed.status, 308);
}

#[test]
fn tokens_have_the_limits_of_their_plan() {
    let origin = Origin::start(|_| Script::ok(&[], "order"));
    let (issuer, dir) = (Issuer::new(Algorithm::ES256, "a"), TempDir::new());
    dir.write("jwks.json", &set(&[&issuer]));
    let replaced = [("127.0.0.1:4000", origin.address.to_string())];
    let gateway = Gateway::start_in(dir, &recipe("tokens", &replaced));
    let token = |user: &str, plan: &str| {
        issuer.token(json!({ "sub": user, "iss": "https://id.example", "aud": "api", "plan": plan }))
    };
    let mut address = 1;
    let mut passed = |token: &str| {
        // Another address each time: the limit of a device is not the subject here.
        address += 1;
        let mut client = Client::connect_from(std::net::Ipv4Addr::new(127, 0, 0, address).into(), gateway.address);
        let authorization = format!("Bearer {token}");
        let fields = [("authorization", &*authorization)];
        (0..1_000).take_while(|_| client.get("/", &fields).status == 200).count()
    };
    let free = passed(&token("ann", "free"));
    assert!((20..100).contains(&free), "{free}");
    assert!(passed(&token("bob", "pro")) >= 100);
    assert!(passed(&token("ann", "free")) < 20, "the same customer at another address");
    let forged =
        Issuer::new(Algorithm::ES256, "a").token(json!({ "sub": "cy", "iss": "https://id.example", "aud": "api" }));
    assert!(passed(&forged) >= 200, "anonymous: the limit of a device alone");
    assert_eq!(origin.last().field("authorization"), Some(&*format!("Bearer {forged}")));
}

#[test]
fn maintenance_begins_and_ends_with_the_file() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "no-store")], "application"));
    let config = recipe("maintenance", &[app(&origin)]);
    let gateway = Gateway::start(&config);
    let mut browser = gateway.connect();
    let page = browser.get("/", &[("accept", "text/html")]);
    assert_eq!((page.status, page.field("retry-after")), (503, Some("900")));
    assert!(page.text().contains("<h1>Back soon</h1>") && origin.count() == 0);
    assert_eq!(gateway.get("/", &[("x-staff", "open sesame")]).text(), "application");
    let (before, _page) = config.split_once("headers.response").expect("the page");
    gateway.rewrite(&before.replace("# upstream", "upstream"));
    // The connection stays open.
    wait_for(|| browser.get("/", &[]).status == 200, STEP_TIMEOUT);
}

#[test]
fn canary_gets_its_part_and_is_left_while_it_fails() {
    let old = Origin::start(|_| Script::ok(&[("Cache-Control", "no-store")], "old"));
    let new = Origin::start(|request| match request.target.as_str() {
        "/broken" => Script::reply(500, &[], "broken"),
        _ => Script::ok(&[("Cache-Control", "no-store")], "new"),
    });
    let replaced = [app(&old), ("127.0.0.1:3001", new.address.to_string())];
    let gateway = Gateway::start(&recipe("canary", &replaced));
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[("x-canary", "1")]).text(), "new");
    let mut version = |device: &str| client.get("/", &[("x-device-id", device)]).text();
    let devices: Vec<String> = (0..300).map(|number| format!("device-{number}")).collect();
    let versions: Vec<String> = devices.iter().map(|device| version(device)).collect();
    let on_new = versions.iter().filter(|version| *version == "new").count();
    assert!((5..75).contains(&on_new), "{on_new} of 300");
    let again: Vec<String> = devices.iter().map(|device| version(device)).collect();
    assert_eq!(versions, again, "each caller stays");
    let broken = |gateway: &Gateway| gateway.get("/broken", &[("x-canary", "1")]).text();
    wait_for(|| broken(&gateway) == "old", STEP_TIMEOUT);
}

#[test]
fn static_site_stays_up_without_its_server() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/stale" => Script::ok(&[("Cache-Control", "max-age=1"), ("Content-Type", "text/html")], "stale page"),
        _ => Script::ok(&[("Content-Type", "text/html")], "page ".repeat(1_000)),
    });
    let gateway = Gateway::start(&recipe("static-site", &[app(&origin)]));
    let get = |target: &str| gateway.get(target, &[("host", "example.org"), ("accept-encoding", "gzip")]);
    get("/");
    assert!(get("/").is_hit());
    wait_for(|| get("/").field("content-encoding") == Some("gzip"), STEP_TIMEOUT);
    get("/stale");
    assert_eq!(origin.requests().iter().filter(|request| request.target == "/").count(), 1);
    origin.stop();
    wait_for(|| get("/stale").cache_status().contains("ttl=-"), STEP_TIMEOUT);
    assert_eq!((get("/").status, get("/stale").text().as_str()), (200, "stale page"));
    let missing = get("/never-read");
    assert_eq!((missing.status, missing.field("retry-after").is_some()), (503, true));
    let moved = gateway.get("/a?b=1", &[("host", "www.example.org")]);
    assert_eq!((moved.status, moved.field("location")), (301, Some("https://example.org/a?b=1")));
    let posted = gateway.request("POST", "/", &[("host", "example.org")], b"x");
    assert_eq!((posted.status, posted.field("allow")), (405, Some("GET, HEAD")));
}

#[test]
fn grpc_passes_messages_and_statuses() {
    let origin = H2Origin::start(H2OriginOptions::default(), |mut stream| async move {
        let message = stream.body().await.unwrap_or_default();
        let head = http::Response::builder().header("content-type", "application/grpc").body(()).expect("a head");
        let mut body = stream.respond.send_response(head, false).expect("an open stream");
        body.send_data(Bytes::from(message), false).expect("an open stream");
        let status = (http::HeaderName::from_static("grpc-status"), http::HeaderValue::from_static("0"));
        body.send_trailers([status].into_iter().collect()).expect("an open stream");
    });
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let replaced = [("127.0.0.1:50051", origin.address.to_string())];
    let gateway = Gateway::start_in(dir, &recipe("grpc", &replaced));
    let mut client = FrameClient::connect(&gateway, &trusted, WINDOW);
    let mut call = |stream: u32, path: &str| {
        let fields = [(":method", "POST"), (":scheme", "https"), (":path", path), (":authority", "gate.test")];
        let fields = [&fields[..], &[("te", "trailers"), ("content-type", "application/grpc")]].concat();
        client.send(&Frame::new(HEADERS, END_HEADERS, stream).with(head_block(&fields)));
        client.send(&Frame::new(DATA, END_STREAM, stream).with(b"\0\0\0\0\x02hi"));
        client.response(stream)
    };
    let has = |frames: &[Frame], text: &str| {
        frames.iter().any(|frame| frame.payload.windows(text.len()).any(|window| window == text.as_bytes()))
    };
    for (stream, path) in [(1, "/shop.Orders/List"), (3, "/shop.Orders/Watch")] {
        let frames = call(stream, path);
        assert_eq!((status(&frames), body(&frames).as_slice()), (200, &b"\0\0\0\0\x02hi"[..]), "{path}");
        assert_eq!(frames.iter().filter(|frame| frame.kind == HEADERS).count(), 2, "{path}: trailers");
    }
    assert_eq!(origin.seen().len(), 2);
    origin.stop();
    let frames = call(5, "/shop.Orders/List");
    assert!(status(&frames) == 200 && has(&frames, "14"), "UNAVAILABLE: {frames:?}");
}

#[test]
fn kubernetes_probes_follow_the_drain() {
    let gate = Gate::default();
    let opened = gate.clone();
    let origin =
        Origin::start(move |_| Script::new().wait(&opened).send("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"));
    let admin = free_address();
    let replaced = [
        ("shop.default.svc.cluster.local:80", origin.address.to_string()),
        ("0.0.0.0:9900", admin.to_string()),
        ("10.0.0.0/8", "127.0.0.0/8".to_owned()),
    ];
    let prepare = |command: &mut Command| {
        command.env("ADMIN_TOKEN", "right").env("HOSTNAME", "gate-7f9c");
    };
    let mut gateway = Gateway::start_with(TempDir::new(), &recipe("kubernetes", &replaced), prepare);
    // A kubelet asks for the address of the pod, without a token.
    let probe = |path: &str| Client::connect(admin).get(path, &[("host", "10.1.2.3:9900")]).status;
    assert_eq!((probe("/live"), probe("/ready"), probe("/metrics"), probe("/api/v1/status")), (200, 200, 200, 401));
    let fields = [("host", "10.1.2.3:9900"), ("authorization", "Bearer right")];
    assert!(Client::connect(admin).get("/api/v1/status", &fields).text().contains("\"gate-7f9c\""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    origin.wait_for_requests(1);
    gateway.process.signal("TERM");
    wait_for(|| probe("/ready") == 503, STEP_TIMEOUT);
    gate.open();
    let response = client.read_response();
    assert_eq!((response.text().as_str(), response.end), ("done", BodyEnd::Complete));
    assert_eq!(gateway.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
}

#[test]
fn nginx_directives_have_their_keys() {
    let backend = || {
        Origin::start(|request| match request.target.as_str() {
            "/missing" => Script::reply(404, &[], "missing"),
            "/orders" => Script::ok(&[("Cache-Control", "no-store")], "orders"),
            _ => Script::ok(&[("Content-Type", "text/html")], "page ".repeat(1_000)),
        })
    };
    let (first, second) = (backend(), backend());
    let replaced = [app(&first), ("127.0.0.1:3001", second.address.to_string())];
    let gateway = Gateway::start(&recipe("from-nginx", &replaced));
    let seen = |target: &str| {
        let all = [first.requests(), second.requests()].concat();
        all.into_iter().filter(|request| request.target == target).collect::<Vec<_>>()
    };
    for target in ["/page", "/missing"] {
        gateway.get(target, &[]);
        assert!(gateway.get(target, &[]).is_hit(), "{target}");
        assert_eq!(seen(target).len(), 1);
    }
    wait_for(
        || gateway.get("/page", &[("accept-encoding", "gzip")]).field("content-encoding") == Some("gzip"),
        STEP_TIMEOUT,
    );
    let mut client = gateway.connect();
    let statuses: Vec<u16> = (0..4).map(|_| client.get("/api/orders", &[("host", "new.example")]).status).collect();
    assert_eq!(statuses, [200; 4]);
    assert!(first.count() > 1 && second.count() > 1, "both servers are used");
    assert_eq!(seen("/orders")[0].field("host"), Some("new.example"));
    assert!((0..1_000).any(|_| client.get("/api/orders", &[]).status == 429), "limit_req");
    let moved = gateway.get("/a?b", &[("host", "old.example")]);
    assert_eq!((moved.status, moved.field("location")), (301, Some("https://new.example/a?b")));
    assert_eq!(gateway.get("/robots.txt", &[]).text(), "User-agent: *\nDisallow:\n");
    assert_eq!(gateway.request("POST", "/page", &[("content-length", "10485761")], b"").status, 413);
}

#[test]
fn varnish_rules_have_their_keys() {
    let origin = Origin::start(|request| match request.target.split('?').next() {
        Some("/shoes") => Script::ok(&[("xkey", "shoes all"), ("Content-Type", "text/html")], "shoes"),
        Some("/grace") => Script::ok(&[("Cache-Control", "max-age=1")], "grace"),
        _ => Script::ok(&[("Cache-Control", "max-age=600")], "own"),
    });
    let gateway = Gateway::start(&recipe("from-varnish", &[app(&origin)]));
    let count = |path: &str| origin.requests().iter().filter(|request| request.target.starts_with(path)).count();
    // Pages that show who is logged in are anywhere, and the first cookie is any.
    for cookie in ["session=1", "a=1; session=2"] {
        assert_eq!(gateway.get("/shoes?a=1&b=2", &[("cookie", cookie)]).status, 200);
    }
    assert!(!gateway.get("/shoes?a=1&b=2", &[]).is_hit() && count("/shoes") == 3, "pass");
    assert!(!gateway.get("/shoes?a=1&b=2", &[("cookie", "session=1")]).is_hit());
    let same = gateway.get("/shoes?utm_source=x&b=2&a=1&gclid=3", &[]);
    assert!(same.is_hit() && count("/shoes") == 4, "{same:?}");
    let purge = tidegate().args(["purge", "--tag", "shoes", "--admin", &gateway.admin.to_string()]).output();
    assert!(purge.expect("it ran").status.success());
    gateway.get("/shoes?a=1&b=2", &[]);
    assert_eq!(count("/shoes"), 5, "purged by xkey");
    gateway.get("/grace", &[]);
    let is_renewed = || {
        assert!(gateway.get("/grace", &[]).is_hit(), "grace: no request waits for the backend");
        count("/grace") == 2
    };
    wait_for(is_renewed, STEP_TIMEOUT);
    origin.stop();
    wait_for(|| gateway.get("/grace", &[]).cache_status().contains("ttl=-"), STEP_TIMEOUT);
    assert_eq!(gateway.get("/grace", &[]).text(), "grace", "a sick backend");
}
