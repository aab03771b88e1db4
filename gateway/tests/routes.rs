//! Routes that act: redirects, fixed responses, header fields, CORS, paths for the origin, and
//! conditions on scheme, fields and query.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use support::{ClientResponse, Gateway, Origin, Script, one_route, wait_for};

/// An origin that reports what it received: target, `Host` and some fields.
fn reporting_origin() -> Origin {
    Origin::start(|request| {
        let fields = ["host", "x-region", "x-tier", "x-remove", "x-both", "cookie", "x-client"];
        let report: Vec<String> = fields.iter().map(|name| format!("{name}={}", request.all(name).join("|"))).collect();
        Script::ok(
            &[("Cache-Control", "max-age=60"), ("Server", "origin")],
            format!("{} {}", request.target, report.join(" ")),
        )
    })
}

fn routes(origin: SocketAddr, routes: &str) -> Gateway {
    Gateway::start(&one_route(origin, "", routes))
}

fn location(response: &ClientResponse) -> (u16, Option<&str>) {
    (response.status, response.field("location"))
}

#[test]
fn redirects_keep_host_path_and_query() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[[routes]]\nname = \"to-https\"\nmatch = { host = \"www.example\", path = \"/*\", scheme = \"http\" }\n\
         redirect = { to = \"https://{host}{uri}\" }\n\
         [[routes]]\nname = \"moved\"\nmatch = { path = \"/old/*\" }\nredirect = { to = \"/new/{rest}?{query}\", status = 301 }\n\
         [[routes]]\nname = \"bounce\"\nmatch = { path = \"/bounce/*\" }\nredirect = { to = \"/{rest}\", status = 302 }\n",
    );
    let secure = gateway.get("/a/b?c=%2F", &[("Host", "www.example:8080")]);
    assert_eq!(location(&secure), (308, Some("https://www.example/a/b?c=%2F")));
    assert!(secure.field("date").is_some() && secure.body.is_empty());
    let post = gateway.request("POST", "/x", &[("Host", "www.example")], b"body");
    assert_eq!(location(&post), (308, Some("https://www.example/x")));
    assert_eq!(location(&gateway.get("/old/a/b?q=1", &[])), (301, Some("/new/a/b?q=1")));
    // No path of a client names another host.
    for target in ["/bounce//evil.example", "/bounce/%2f/evil.example", "/bounce/\\evil.example"] {
        let response = gateway.get(target, &[]);
        let to = response.field("location").unwrap_or("/");
        assert!(!to.starts_with("//") && !to.starts_with("/\\"), "{target}: {to}");
    }
    assert_eq!(origin.count(), 0);
    assert_eq!(gateway.metric("tidegate_route_responses_total{route=\"moved\",status_class=\"3xx\"}"), 1.0);
}

#[test]
fn fixed_responses_have_limits_and_need_no_upstream() {
    let gateway = Gateway::start(
        "[limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 4\n\
         [[routes]]\nname = \"robots\"\nmatch = { path = \"/robots.txt\" }\nlimits = [\"node\"]\n\
         respond = { body = \"User-agent: *\\nDisallow: /\\n\" }\n\
         [[routes]]\nname = \"reset\"\nmatch = { path = \"/reset\" }\nrespond = { status = 205 }\n\
         [[routes]]\nname = \"down\"\nmatch = { path = \"/*\" }\n\
         respond = { status = 503, body = \"{\\\"down\\\":true}\", content_type = \"application/json\" }\n",
    );
    let robots = gateway.get("/robots.txt", &[]);
    assert_eq!((robots.status, robots.text()), (200, "User-agent: *\nDisallow: /\n".to_owned()));
    assert_eq!(robots.field("content-type"), Some("text/plain; charset=utf-8"));
    let mut client = gateway.connect();
    client.send(support::client::request("HEAD", "/robots.txt", &[], b""));
    let head = client.read_response_to("HEAD");
    assert_eq!((head.status, head.field("content-length"), head.body.len()), (200, Some("26"), 0));
    let upload = client.request("PUT", "/any", &[], b"some bytes");
    assert_eq!((upload.status, upload.text()), (503, "{\"down\":true}".to_owned()));
    let reset = client.get("/reset", &[]);
    assert_eq!((reset.status, reset.field("content-length"), reset.field("content-type")), (205, Some("0"), None));
    assert_eq!(client.get("/robots.txt", &[]).status, 200, "the connection continues");
    assert_eq!(client.get("/robots.txt", &[]).status, 200);
    assert_eq!(client.get("/robots.txt", &[]).status, 429);
}

#[test]
fn header_fields_of_requests_change_for_the_origin_alone() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[identity]\nregion = [\"header:x-where\"]\nregions = [\"north\", \"south\"]\nregion_default = \"north\"\n\
         [[routes]]\nname = \"edited\"\nmatch = { path = \"/edited/*\" }\nupstream = \"origin\"\n\
         headers.request.set = { host = \"shop.internal\", x-region = \"{region}\", x-client = \"{client_ip}\", x-tier = \"{tier}\" }\n\
         headers.request.add = { x-both = \"ours\" }\n\
         headers.request.remove = [\"x-remove\", \"Cookie\"]\n\
         cache = { mode = \"off\" }\n",
    );
    let fields = [
        ("X-Where", "south"),
        ("X-Region", "forged"),
        ("X-Remove", "1"),
        ("Cookie", "a=b"),
        ("X-Both", "theirs"),
        ("X-Tier", "gold"),
    ];
    let text = gateway.get("/edited/x?y", &fields).text();
    assert_eq!(
        text,
        "/edited/x?y host=shop.internal x-region=south x-tier=anonymous x-remove= x-both=theirs|ours cookie= x-client=127.0.0.1"
    );
    let plain = gateway.get("/plain", &[("Cookie", "a=b")]).text();
    assert!(plain.contains("host=gate.test") && plain.contains("cookie=a=b"), "{plain}");
}

#[test]
fn requests_are_counted_by_route() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[upstreams.dead]\nendpoints = [\"http://127.0.0.1:1\"]\n\
         [[routes]]\nname = \"dead\"\nmatch = { path = \"/dead\" }\nupstream = \"dead\"\n",
    );
    let body = gateway.get("/a", &[]).body.len() + gateway.get("/a", &[]).body.len();
    let page = gateway.get("/dead", &[]).body.len();
    let metric = |name: &str, labels: &str| gateway.metric(&format!("tidegate_route_{name}{{{labels}}}"));
    wait_for(|| metric("request_duration_seconds_count", "route=\"dead\"") >= 1.0, Duration::from_secs(5));
    assert_eq!(metric("request_duration_seconds_count", "route=\"all\""), 2.0);
    assert_eq!(metric("cache_results_total", "route=\"all\",cache=\"hit\""), 1.0);
    assert_eq!(metric("response_bytes_total", "route=\"all\"") as usize, body);
    assert_eq!(metric("response_bytes_total", "route=\"dead\"") as usize, page);
    assert_eq!(metric("failures_total", "route=\"dead\",kind=\"connect\""), 1.0);
    assert_eq!(metric("failures_total", "route=\"all\",kind=\"connect\""), 0.0);
}

#[test]
fn presets_for_browsers_complete_responses_whatever_their_source() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 2\n\
         [[routes]]\nname = \"strict\"\nmatch = { path = \"/strict\" }\nupstream = \"origin\"\nlimits = [\"node\"]\n\
         security_headers = \"strict\"\nheaders.response.set = { referrer-policy = \"origin\" }\n",
    );
    for status in [200, 200, 429] {
        let response = gateway.get("/strict", &[("Accept", "text/html")]);
        assert_eq!(response.status, status);
        let fields = ["x-frame-options", "referrer-policy", "x-content-type-options", "server"];
        let expected = [Some("DENY"), Some("origin"), Some("nosniff"), None];
        assert_eq!(fields.map(|name| response.field(name)), expected);
        let policy = response.field("content-security-policy").expect("a policy");
        assert!(policy.contains("style-src 'self' 'unsafe-inline'"), "{policy}");
        assert_eq!(response.field("strict-transport-security"), None, "no TLS");
    }
    assert_eq!(gateway.get("/plain", &[]).field("server"), Some("origin"));
}

/// Variants compare what the origin received, not what the client sent.
#[test]
fn variants_follow_the_fields_that_the_route_sets() {
    let origin = Origin::start(|request| {
        let seen = request.field("x-seen").unwrap_or("-").to_owned();
        Script::ok(&[("Cache-Control", "max-age=60"), ("Vary", "X-Seen, Cookie")], seen)
    });
    let gateway = routes(
        origin.address,
        "[identity]\nregion = [\"header:x-where\"]\nregions = [\"north\", \"south\"]\nregion_default = \"north\"\n\
         [[routes]]\nname = \"edited\"\nmatch = { path = \"/edited\" }\nupstream = \"origin\"\n\
         headers.request = { set = { x-seen = \"fixed\" }, remove = [\"cookie\"] }\n",
    );
    assert_eq!(gateway.get("/edited", &[("X-Seen", "one"), ("Cookie", "a=1")]).text(), "fixed");
    let second = gateway.get("/edited", &[("X-Seen", "two"), ("Cookie", "a=2")]);
    assert!(second.is_hit(), "{}", second.cache_status());
    assert_eq!(origin.count(), 1);
}

#[test]
fn header_fields_of_responses_change_whatever_their_source() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 2\n\
         [upstreams.dead]\nendpoints = [\"http://127.0.0.1:1\"]\n\
         [[routes]]\nname = \"edited\"\nmatch = { path = \"/edited/*\" }\nupstream = \"origin\"\nlimits = [\"node\"]\n\
         headers.response = { set = { strict-transport-security = \"max-age=60\" }, add = { vary = \"accept\" }, remove = [\"server\"] }\n\
         [[routes]]\nname = \"dead\"\nmatch = { path = \"/dead\" }\nupstream = \"dead\"\n\
         headers.response.set = { x-route = \"{path}\" }\n",
    );
    let of = |response: &ClientResponse| {
        let text = |name: &str| response.all(name).join("|");
        (response.status, text("strict-transport-security"), text("vary"), text("server"))
    };
    let expected = |status: u16| (status, "max-age=60".to_owned(), "accept".to_owned(), String::new());
    assert_eq!(of(&gateway.get("/edited/a", &[])), expected(200));
    let hit = gateway.get("/edited/a", &[]);
    assert!(hit.is_hit());
    assert_eq!(of(&hit), expected(200));
    let denied = gateway.get("/edited/a", &[]);
    // A page is chosen by these fields.
    let paged = (429, "max-age=60".to_owned(), "Accept, Accept-Language|accept".to_owned(), String::new());
    assert_eq!(of(&denied), paged);
    assert!(denied.field("retry-after").is_some() && !denied.body.is_empty());
    let page = gateway.get("/dead", &[]);
    assert_eq!((page.status >= 500, page.field("x-route")), (true, Some("/dead")));
}

#[test]
fn paths_for_the_origin_keep_the_public_url_as_the_key() {
    let origin = reporting_origin();
    let gateway = routes(
        origin.address,
        "[[routes]]\nname = \"stripped\"\nmatch = { path = \"/v1/*\" }\nupstream = \"origin\"\nstrip_prefix = \"/v1\"\n\
         [[routes]]\nname = \"rewritten\"\nmatch = { path = \"/v2/*\" }\nupstream = \"origin\"\nrewrite = \"/api/{rest}\"\n\
         [[routes]]\nname = \"one\"\nmatch = { path = \"/health\" }\nupstream = \"origin\"\nrewrite = \"/status\"\n",
    );
    let target = |path: &str| gateway.get(path, &[]).text().split(' ').next().unwrap_or_default().to_owned();
    assert_eq!(target("/v1/a/b?c=d"), "/a/b?c=d");
    assert_eq!(target("/v1/"), "/");
    assert_eq!(target("/v1//evil.example/x"), "/evil.example/x");
    assert_eq!(target("/v2/a?b"), "/api/a?b");
    assert_eq!(target("/health?deep=1"), "/status?deep=1");
    // The same path at the origin, two public URLs: two entries.
    let count = origin.count();
    assert_eq!(target("/a/b?c=d"), "/a/b?c=d");
    assert_eq!(origin.count(), count + 1);
    assert!(gateway.get("/v1/a/b?c=d", &[]).is_hit());
    let admin = gateway.admin.to_string();
    let url = "http://gate.test/v1/a/b?c=d";
    let purged = support::tidegate().args(["purge", "--url", url, "--admin", &admin]).output().expect("tidegate runs");
    assert!(purged.status.success(), "{purged:?}");
    assert!(!gateway.get("/v1/a/b?c=d", &[]).is_hit());
    assert!(gateway.get("/a/b?c=d", &[]).is_hit());
}

#[test]
fn conditions_choose_between_routes_of_one_path() {
    let stable = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "stable"));
    let canary = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "canary"));
    let rest = format!(
        "[upstreams.canary]\nendpoints = [\"http://{}\"]\n\
         [[routes]]\nname = \"canary\"\nmatch = {{ path = \"/*\", headers = {{ x-canary = \"1\" }} }}\nupstream = \"canary\"\n\
         [[routes]]\nname = \"beta\"\nmatch = {{ path = \"/*\", query = {{ beta = \"*\", kind = \"a*\" }} }}\nupstream = \"canary\"\n",
        canary.address
    );
    let gateway = routes(stable.address, &rest);
    let text = |target: &str, fields: &[(&str, &str)]| gateway.get(target, fields).text();
    for _ in 0..2 {
        assert_eq!(text("/", &[]), "stable");
        assert_eq!(text("/", &[("X-Canary", "1")]), "canary");
        assert_eq!(text("/", &[("X-Canary", "11")]), "stable");
    }
    // Responses of one route are never served for the other.
    assert_eq!((stable.count(), canary.count()), (1, 1));
    assert_eq!(text("/?beta&kind=apple", &[]), "canary");
    assert_eq!(text("/?beta=&kind=b", &[]), "stable");
    assert_eq!(text("/?kind=apple", &[]), "stable");
}

#[test]
fn cors_is_answered_by_the_gateway() {
    let origin = Origin::start(|_| {
        Script::ok(&[("Cache-Control", "max-age=60"), ("Access-Control-Allow-Origin", "*"), ("Vary", "Accept")], "data")
    });
    let gateway = routes(
        origin.address,
        "[[routes]]\nname = \"api\"\nmatch = { path = \"/api/*\" }\nupstream = \"origin\"\n\
         cors = { origins = [\"https://app.example\", \"https://*.dev.example\"], methods = [\"GET\", \"PUT\"], expose = [\"x-total\"], credentials = true, max_age = \"10m\" }\n\
         [[routes]]\nname = \"open\"\nmatch = { path = \"/open\" }\nupstream = \"origin\"\ncors = { origins = [\"*\"] }\n",
    );
    let preflight = |from: &str, method: &str| {
        let fields = [
            ("Origin", from),
            ("Access-Control-Request-Method", method),
            ("Access-Control-Request-Headers", "x-token,content-type"),
        ];
        gateway.request("OPTIONS", "/api/x", &fields, b"")
    };
    let allowed = preflight("https://app.example", "PUT");
    let field = |response: &ClientResponse, name: &str| response.field(name).unwrap_or_default().to_owned();
    assert_eq!(
        (allowed.status, field(&allowed, "access-control-allow-origin")),
        (204, "https://app.example".to_owned())
    );
    assert_eq!(field(&allowed, "access-control-allow-methods"), "GET, PUT");
    assert_eq!(field(&allowed, "access-control-allow-headers"), "x-token,content-type");
    assert_eq!(field(&allowed, "access-control-max-age"), "600");
    assert_eq!(field(&allowed, "access-control-allow-credentials"), "true");
    for (from, method) in [("https://evil.example", "PUT"), ("https://app.example", "DELETE"), ("null", "GET")] {
        let refused = preflight(from, method);
        assert_eq!((refused.status, refused.field("access-control-allow-origin")), (204, None), "{from} {method}");
        assert!(field(&refused, "vary").contains("Origin"));
    }
    assert_eq!(origin.count(), 0, "preflights end at the gateway");
    // One stored response serves all origins, each with its own permission.
    for (from, permission) in [
        ("https://app.example", Some("https://app.example")),
        ("https://a.dev.example", Some("https://a.dev.example")),
        ("https://evil.example", None),
    ] {
        let response = gateway.get("/api/x", &[("Origin", from)]);
        assert_eq!(response.field("access-control-allow-origin"), permission, "{from}");
        assert_eq!(response.all("access-control-allow-origin").len(), usize::from(permission.is_some()));
        assert_eq!(response.all("vary"), ["Accept", "Origin"], "{from}");
    }
    assert_eq!(gateway.get("/api/x", &[]).all("vary"), ["Accept", "Origin"], "also without an origin");
    assert_eq!(origin.count(), 1);
    let open = gateway.get("/open", &[("Origin", "https://any.example")]);
    assert_eq!((open.field("access-control-allow-origin"), open.all("vary")), (Some("*"), vec!["Accept"]));
    // OPTIONS that is no preflight belongs to the origin.
    let count = origin.count();
    assert_eq!(gateway.request("OPTIONS", "/api/x", &[("Origin", "https://app.example")], b"").status, 200);
    assert_eq!(origin.count(), count + 1);
}

/// An announced body above the limit of every route gets the response of one above its route's.
#[test]
fn both_forms_of_413_are_alike() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let gateway = routes(
        origin.address,
        "[limits_http]\nbody_bytes = \"1KiB\"\n[[routes]]\nname = \"big\"\nmatch = { path = \"/big\" }\n\
         upstream = \"origin\"\nbody_bytes = \"64KiB\"\n[[routes]]\nname = \"own\"\nmatch = { path = \"/own\" }\n\
         upstream = \"origin\"\nbody_bytes = \"10B\"\nheaders = { response = { set = { x-own = \"1\" } } }\n\
         [[routes]]\nname = \"closed\"\nmatch = { path = \"/closed\" }\nupstream = \"origin\"\nbody_bytes = \"10B\"\n\
         deny = [\"127.0.0.0/8\"]\n[[routes]]\nname = \"limited\"\nmatch = { path = \"/limited\" }\nupstream = \"origin\"\n\
         body_bytes = \"10B\"\nlimits = [\"once\"]\n[limits.once]\ntier = \"node\"\nrate = \"1/h\"\nburst = 1\n",
    );
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let traceparent = format!("00-{trace}-b7ad6b7169203331-01");
    let refused = |length: &str, accept: &str| {
        let fields = [("Content-Length", length), ("Accept", accept), ("traceparent", &traceparent)];
        let mut client = gateway.connect();
        let mut head = "POST /own HTTP/1.1\r\nHost: gate.test\r\n".to_owned();
        fields.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        client.send(format!("{head}\r\n"));
        client.read_response()
    };
    for accept in ["text/html", "application/json"] {
        let [route, all] = ["11", "99999999999"].map(|length| refused(length, accept));
        assert_eq!((route.status, all.status), (413, 413));
        assert_eq!((route.field("x-own"), all.field("x-own")), (Some("1"), Some("1")));
        let names = |response: &ClientResponse| {
            let mut names: Vec<_> = response.fields.iter().map(|(name, _)| name.to_lowercase()).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(names(&route), names(&all));
        let id = |response: &ClientResponse| response.field("x-request-id").unwrap_or_default().to_owned();
        assert!(!id(&all).is_empty());
        assert_eq!(route.text().replace(&id(&route), "ID"), all.text().replace(&id(&all), "ID"));
    }
    let lines = gateway.access_log(4);
    for line in &lines {
        let facts = ["route", "refused", "failure", "trace_id"].map(|name| line[name].as_str().unwrap_or_default());
        assert_eq!(facts, ["own", "body_too_large", "client_body", trace], "{line}");
    }
    // Lists and limits come first.
    let status = |target: &str, length: &str| {
        let mut client = gateway.connect();
        client.send(format!("POST {target} HTTP/1.1\r\nHost: gate.test\r\nContent-Length: {length}\r\n\r\n"));
        client.read_response().status
    };
    for length in ["11", "99999999999"] {
        assert_eq!(status("/closed", length), 403, "{length}");
    }
    assert_eq!([status("/limited", "99999999999"), status("/limited", "99999999999")], [413, 429]);
}

#[test]
fn routes_have_their_own_clients_and_body_sizes() {
    let origin = Origin::start(|request| Script::ok(&[], format!("{}", request.body.len())));
    let gateway = routes(
        origin.address,
        "[limits_http]\nbody_bytes = \"1KiB\"\n[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\n\
         [[routes]]\nname = \"upload\"\nmatch = { path = \"/upload\" }\nupstream = \"origin\"\nbody_bytes = \"64KiB\"\n\
         [[routes]]\nname = \"small\"\nmatch = { path = \"/small\" }\nupstream = \"origin\"\nbody_bytes = \"10B\"\n\
         [[routes]]\nname = \"inside\"\nmatch = { path = \"/inside\" }\nupstream = \"origin\"\nallow = [\"10.0.0.0/8\", \"fd00::/8\"]\ndeny = [\"10.6.6.6\"]\n",
    );
    let chunks = |body: &[u8]| support::client::chunked(body, 1_000);
    for (target, size, status) in [
        ("/upload", 64 << 10, 200),
        ("/upload", (64 << 10) + 1, 413),
        ("/other", 1 << 10, 200),
        ("/other", (1 << 10) + 1, 413),
        ("/small", 10, 200),
        ("/small", 11, 413),
    ] {
        let body = vec![b'x'; size];
        let known = gateway.request("POST", target, &[], &body);
        assert_eq!(known.status, status, "{target} {size}");
        let chunked = gateway.request("POST", target, &[("Transfer-Encoding", "chunked")], &chunks(&body));
        assert_eq!(chunked.status, status, "{target} {size} chunked");
    }
    // The limit of one request is not that of the next one on the connection.
    let mut client = gateway.connect();
    assert_eq!(client.request("POST", "/small", &[], &[b'x'; 10]).status, 200);
    assert_eq!(
        client.request("POST", "/upload", &[("Transfer-Encoding", "chunked")], &chunks(&[b'x'; 5_000])).text(),
        "5000"
    );
    for (from, status) in [("10.1.2.3", 200), ("fd00::1", 200), ("10.6.6.6", 403), ("192.0.2.1", 403)] {
        assert_eq!(gateway.get("/inside", &[("X-Forwarded-For", from)]).status, status, "{from}");
    }
    assert_eq!(gateway.get("/inside", &[]).status, 403);
    assert_eq!(gateway.metric("tidegate_failures_total{kind=\"forbidden\"}"), 3.0);
}

#[test]
fn pages_replace_the_gateways_own_responses_for_clients_that_accept_html() {
    let origin = Origin::start(|_| Script::reply(404, &[], "the origin's own page"));
    let dir = support::TempDir::new();
    dir.write("limited.html", "<h1>{{ title }}</h1><p>{{ route }}, again in {{ retry_after }} s");
    dir.write("any.html", "<h1>{{ status }} {{ reason }}</h1><p>{{ message }}<p>{{ request_id }}");
    let config = one_route(
        origin.address,
        "limits = [\"node\"]\npages = { 429 = \"limited.html\" }",
        "[pages]\n4xx = \"any.html\"\n5xx = \"any.html\"\n[log]\naccess = \"stdout\"\n\
         [limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 1\n[upstreams.dead]\nendpoints = [\"http://127.0.0.1:1\"]\n\
         [[routes]]\nname = \"dead\"\nmatch = { path = \"/dead\" }\nupstream = \"dead\"\n\
         [[routes]]\nname = \"inside\"\nmatch = { path = \"/inside\" }\nupstream = \"origin\"\ndeny = [\"127.0.0.1\"]\n",
    );
    let gateway = Gateway::start_in(dir, &config);
    let html = [("Accept", "text/html,*/*;q=0.1")];
    let own = gateway.get("/", &html);
    assert_eq!((own.status, own.text()), (404, "the origin's own page".to_owned()), "the origin's pages pass");
    let limited = gateway.get("/", &html);
    assert_eq!(limited.status, 429);
    let wait = limited.field("retry-after").expect("a time").to_owned();
    assert_eq!(limited.text(), format!("<h1>Too Many Requests</h1><p>all, again in {wait} s"));
    assert_eq!(limited.field("content-type"), Some("text/html; charset=utf-8"));
    assert_eq!(limited.field("cache-control"), Some("no-store"));
    let json = gateway.get("/", &[("Accept", "application/json")]);
    assert_eq!((json.status, json.text().starts_with('{')), (429, true));
    let denied = gateway.get("/inside", &html);
    assert!(denied.text().starts_with("<h1>403 forbidden</h1><p>Access is denied.<p>"), "{}", denied.text());
    let failed = gateway.get("/dead", &html);
    let text = failed.text();
    assert!(text.starts_with("<h1>503 connect</h1>"), "{text}");
    let id = text.rsplit("<p>").next().unwrap_or_default().to_owned();
    let line = gateway.access_log(5).into_iter().find(|line| line["route"] == "dead").expect("a line");
    assert_eq!(line["request_id"].as_str(), Some(&*id));
    // A page with a fault is refused with its line, and a reload keeps the old one.
    gateway.dir.write("any.html", "<p>\n{{ sttus }}");
    let check = support::tidegate().arg("check").arg(gateway.dir.path().join("tidegate.toml")).output().expect("runs");
    let report = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(!check.status.success() && report.contains("any.html: line 2"), "{report}");
}

/// HEAD is answered from what GET has stored, unless the two have different routes.
#[test]
fn methods_of_different_routes_share_no_entry() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60"), ("X-From", "one")], "body"));
    let other = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60"), ("X-From", "two")], "body"));
    let rest = format!(
        "[upstreams.other]\nendpoints = [\"http://{}\"]\n\
         [[routes]]\nname = \"head\"\nmatch = {{ path = \"/x\", methods = [\"HEAD\"] }}\nupstream = \"other\"\n\
         [[routes]]\nname = \"get\"\nmatch = {{ path = \"/x\", methods = [\"GET\"] }}\nupstream = \"origin\"\n",
        other.address
    );
    let gateway = routes(origin.address, &rest);
    assert_eq!(gateway.get("/x", &[]).field("x-from"), Some("one"));
    let mut client = gateway.connect();
    client.send(support::client::request("HEAD", "/x", &[], b""));
    assert_eq!(client.read_response_to("HEAD").field("x-from"), Some("two"));
    assert_eq!(client.get("/y", &[]).field("x-from"), Some("one"));
    client.send(support::client::request("HEAD", "/y", &[], b""));
    assert!(client.read_response_to("HEAD").is_hit(), "one route for both methods");
}

/// An origin gets the same from all requests that one response answers.
#[test]
fn parameters_outside_the_key_neither_choose_a_stored_response_nor_reach_its_origin() {
    let origin = Origin::start(|request| {
        let seen = request.field("x-uri").unwrap_or("-").to_owned();
        Script::ok(&[("Cache-Control", "max-age=60")], format!("{} {seen}", request.target))
    });
    let staging = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "staging"));
    let gateway = routes(
        origin.address,
        &format!(
            "[cache]\nkey_ignore_query = [\"utm_*\", \"debug\"]\n[upstreams.staging]\nendpoints = [\"http://{}\"]\n\
             [[routes]]\nname = \"told\"\nmatch = {{ path = \"/told\" }}\nupstream = \"origin\"\nheaders.request.set = {{ x-uri = \"{{uri}}\" }}\n\
             [[routes]]\nname = \"debug\"\nmatch = {{ path = \"/*\", query = {{ debug = \"1\" }} }}\nupstream = \"staging\"\n",
            staging.address
        ),
    );
    assert_eq!(gateway.get("/told?a=1&utm_x=PAYLOAD", &[]).text(), "/told?a=1 /told?a=1");
    assert!(gateway.get("/told?a=1", &[]).is_hit());
    assert_eq!(gateway.get("/page?debug=1", &[]).text(), "staging");
    assert_eq!(gateway.get("/page", &[]).text(), "/page -");
    assert_eq!(gateway.get("/page?debug=1", &[]).text(), "staging");
    // A request that is not cached has all of its parameters.
    let posted = gateway.request("POST", "/told?a=1&utm_x=1", &[], b"x").text();
    assert_eq!(posted, "/told?a=1&utm_x=1 /told?a=1&utm_x=1");
}

/// The gateway itself goes by the request of the client, whatever the origin gets.
#[test]
fn fields_for_the_origin_do_not_change_the_decisions_of_the_gateway() {
    let origin = Origin::start(|request| {
        let origin = request.field("origin").unwrap_or("none").to_owned();
        Script::ok(&[("Cache-Control", "max-age=60")], origin)
    });
    let gateway = routes(
        origin.address,
        "[[routes]]\nname = \"api\"\nmatch = { path = \"/api\", methods = [\"GET\", \"POST\", \"PUT\"] }\nupstream = \"origin\"\n\
         headers.request.remove = [\"origin\"]\n\
         cors = { origins = [\"https://app.example\"], methods = [\"GET\", \"POST\", \"PUT\"] }\n",
    );
    for method in ["GET", "POST", "PUT"] {
        let response = gateway.request(method, "/api", &[("Origin", "https://app.example")], b"");
        assert_eq!(response.field("access-control-allow-origin"), Some("https://app.example"), "{method}");
        assert_eq!(response.text(), "none", "{method}");
    }
    // A preflight belongs to the route of the request that it announces.
    let fields = [("Origin", "https://app.example"), ("Access-Control-Request-Method", "PUT")];
    let preflight = gateway.request("OPTIONS", "/api", &fields, b"");
    assert_eq!((preflight.status, preflight.field("access-control-allow-methods")), (204, Some("GET, POST, PUT")));
    assert_eq!(origin.count(), 3);
}

/// A fault in what a route does names its place and what to write instead.
#[test]
fn faults_of_actions_are_explained() {
    let faults = |route: &str| {
        let dir = support::TempDir::new();
        let config = format!(
            "[upstreams.origin]\nendpoints = [\"http://127.0.0.1:1\"]\n[[routes]]\nname = \"r\"\nmatch = {{ path = \"/v1/*\" }}\n{route}\n"
        );
        let path = dir.write("tidegate.toml", &config);
        let output = support::tidegate().arg("check").arg(path).output().expect("tidegate runs");
        assert!(!output.status.success() || route.contains("x-t = "), "{route}");
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    for (route, expected) in [
        ("redirect = { to = \"https://{hots}\" }", "unknown variable `{hots}`"),
        ("redirect = { to = \"/x\", status = 304 }", "304 is not a redirect"),
        ("redirect = { to = \"/x\" }\nupstream = \"origin\"", "`upstream` has no effect on a route with `redirect`"),
        ("redirect = { to = \"/x\" }\nrespond = { }", "either `redirect` or `respond`"),
        ("upstream = \"origin\"\nstrip_prefix = \"/v2\"", "do not begin with `/v2`"),
        ("upstream = \"origin\"\nstrip_prefix = \"/v1\"\nrewrite = \"/x\"", "either `strip_prefix` or `rewrite`"),
        ("upstream = \"origin\"\nrewrite = \"x\"", "`rewrite` is a path"),
        (
            "upstream = \"origin\"\nheaders.request.set = { connection = \"close\" }",
            "`connection` belongs to the connection",
        ),
        ("upstream = \"origin\"\nheaders.request.remove = [\"host\"]", "neither added nor removed"),
        ("upstream = \"origin\"\nheaders.response.set = { \"a b\" = \"c\" }", "`a b` is not a field name"),
        ("upstream = \"origin\"\ncors = { origins = [\"app.example\"] }", "`app.example` is not an origin"),
        ("upstream = \"origin\"\ncors = { origins = [\"*\"], credentials = true }", "name the origins"),
        ("upstream = \"origin\"\nheaders.request.set = { x-t = \"{tier}\" }", "not part of the cache key"),
        ("upstream = \"origin\"\nrewrite = \"/{tier}{path}\"", "no response says that it varies"),
        (
            "upstream = \"origin\"\nheaders.request.set = { host = \"{tier}.inside\" }",
            "no response says that it varies",
        ),
        ("upstream = \"origin\"\nheaders.request.remove = [\"traceparent\"]", "the framing or the trace"),
        ("redirect = { to = \"{rest}\" }", "a redirect goes to a URL"),
        ("redirect = { to = \"{uri}\" }", "a redirect goes to a URL"),
        ("redirect = { to = \"https://www.example{rest}\" }", "a redirect goes to a URL"),
        ("redirect = { to = \"https://{query}/x\" }", "a redirect goes to a URL"),
        ("redirect = { to = \"//{host}/x\" }", "a redirect goes to a URL"),
        ("upstream = \"origin\"\nrewrite = \"/x/{query}\"", "are no parts of a path"),
        ("upstream = \"origin\"\nauth = { api_keys = \"k\", header = \"x_key\" }", "`x_key` cannot carry a key"),
        (
            "upstream = \"origin\"\ncors = { origins = [\"*\"] }\nheaders.response.set = { access-control-allow-origin = \"*\" }",
            "is written by `cors`",
        ),
        ("", "`upstream` is missing"),
    ] {
        let text = faults(route);
        assert!(text.contains(expected), "{route}: {text}");
    }
}

#[test]
fn responses_of_the_gateway_have_a_date_and_name_what_chose_them() {
    let origin = reporting_origin();
    // A verification service that denies without a `Date`.
    let service = Origin::start(|_| Script::new().head(403, &[("Content-Length", "0")]));
    let gateway = routes(
        origin.address,
        &format!(
            "[limits.few]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\n\
             [[routes]]\nname = \"cors\"\nmatch = {{ path = \"/cors\" }}\nupstream = \"origin\"\n\
             cors = {{ origins = [\"https://a.example\"], methods = [\"GET\"] }}\n\
             [[routes]]\nname = \"to\"\nmatch = {{ path = \"/to\" }}\nredirect = {{ to = \"/\" }}\n\
             [[routes]]\nname = \"fixed\"\nmatch = {{ path = \"/fixed\" }}\nrespond = {{ body = \"x\" }}\n\
             [[routes]]\nname = \"limited\"\nmatch = {{ path = \"/limited\" }}\nrespond = {{ body = \"x\" }}\nlimits = [\"few\"]\n\
             [[routes]]\nname = \"denied\"\nmatch = {{ path = \"/denied\" }}\nupstream = \"origin\"\n\
             auth = {{ forward = \"http://{}/verify\" }}\n\
             [[routes]]\nname = \"closed\"\nmatch = {{ path = \"/closed\" }}\nupstream = \"origin\"\ndeny = [\"127.0.0.1\"]\n\
             [upstreams.dead]\nendpoints = [\"http://127.0.0.1:1\"]\n\
             [[routes]]\nname = \"dead\"\nmatch = {{ path = \"/dead\" }}\nupstream = \"dead\"\n",
            service.address
        ),
    );
    let preflight = [("Origin", "https://a.example"), ("Access-Control-Request-Method", "GET")];
    gateway.get("/limited", &[]);
    for (method, target, fields, status, vary) in [
        (
            "OPTIONS",
            "/cors",
            &preflight[..],
            204,
            "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        ),
        (
            "OPTIONS",
            "/cors",
            &[("Origin", "https://b.example"), preflight[1]],
            204,
            "Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        ),
        ("GET", "/to", &[], 308, ""),
        ("GET", "/fixed", &[], 200, ""),
        ("GET", "/limited", &[], 429, "Accept, Accept-Language"),
        ("GET", "/limited", &[("Accept", "text/html")], 429, "Accept, Accept-Language"),
        ("GET", "/denied", &[], 403, ""),
        ("GET", "/closed", &[], 403, "Accept, Accept-Language"),
        ("GET", "/dead", &[], 503, "Accept, Accept-Language"),
        ("OPTIONS", "/any", &[("Max-Forwards", "0")], 200, ""),
        ("GET", "/bad", &[("Content-Length", "x")], 400, ""),
    ] {
        let response = gateway.request(method, target, fields, b"");
        assert_eq!((response.status, response.all("date").len()), (status, 1), "{method} {target}");
        assert_eq!(response.all("vary").join(", "), vary, "{method} {target}");
    }
}
