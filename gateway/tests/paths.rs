//! Paths in several forms: one normal form for route, limit, key, purge and origin, over HTTP/1.1
//! and HTTP/2. docs/paths.md is generated from the same targets.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use gateway::testing::target::{self, EncodedSlashPolicy, PathRules};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use support::tls::write_certificate;
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route};

/// One line of `data/paths.txt`.
struct TargetCase {
    target: String,
    nginx: String,
    envoy: String,
    traefik: String,
}

fn cases() -> Vec<TargetCase> {
    let lines = include_str!("data/paths.txt").lines().filter(|line| !line.starts_with("# "));
    let case = |line: &str| {
        let fields: Vec<String> = line.split('\t').map(str::to_owned).collect();
        let [target, nginx, envoy, traefik] = fields.try_into().expect("four fields");
        TargetCase { target, nginx, envoy, traefik }
    };
    lines.map(case).collect()
}

/// Answers with the target. Everything may be stored.
fn echo() -> Origin {
    Origin::start(|request| Script::ok(&[("Cache-Control", "max-age=60")], &request.target))
}

const ROUTES: [(&str, &str); 4] = [("login", "/login/*"), ("at", "/@login/*"), ("account", "/account"), ("rest", "/*")];

/// Routes with an origin each, so that the origin tells the route.
fn routes(origins: &[Origin], server: &str) -> String {
    let mut config = format!("{server}\n[cache]\nstatus_key = \"tell\"\n");
    for ((name, path), origin) in ROUTES.iter().zip(origins) {
        write!(
            config,
            "[upstreams.{name}]\nendpoints = [\"http://{}\"]\n[[routes]]\nname = \"{name}\"\nupstream = \"{name}\"\nmatch = {{ path = \"{path}\" }}\n",
            origin.address
        )
        .expect("a string");
    }
    config
}

/// The index in `ROUTES` of the route for a normal target.
fn route_of(normal: &str) -> usize {
    let path = target::matched_path(normal.split('?').next().unwrap_or_default());
    let matches = |pattern: &str| pattern.strip_suffix('*').map_or(pattern == path, |prefix| path.starts_with(prefix));
    ROUTES.iter().position(|(_, pattern)| matches(pattern)).expect("the last one matches all")
}

fn rules(encoded_slash: &str) -> (String, PathRules) {
    let server = format!("[server]\npaths = {{ encoded_slash = \"{encoded_slash}\" }}");
    let encoded_slash = match encoded_slash {
        "keep" => EncodedSlashPolicy::Keep,
        "decode" => EncodedSlashPolicy::Decode,
        _ => EncodedSlashPolicy::Refuse,
    };
    (server, PathRules { encoded_slash, ..PathRules::default() })
}

#[test]
fn route_key_and_origin_see_the_normal_form() {
    for policy in ["refuse", "keep", "decode"] {
        let (server, rules) = rules(policy);
        let origins = [(); 4].map(|()| echo());
        let gateway = Gateway::start(&routes(&origins, &server));
        let mut by_form: BTreeMap<String, usize> = BTreeMap::new();
        for case in cases() {
            let request = format!("GET {} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", case.target);
            let response = String::from_utf8_lossy(&gateway.raw(request.as_bytes())).into_owned();
            let context = format!("{policy} {}: {response}", case.target);
            match target::normal(&case.target, rules) {
                Err(refusal) => {
                    assert!(response.starts_with("HTTP/1.1 400 "), "{context}");
                    assert!(response.contains(refusal.reason()), "{context}");
                }
                Ok(normal) => {
                    assert!(response.starts_with("HTTP/1.1 200 "), "{context}");
                    assert!(response.ends_with(&format!("\r\n\r\n{normal}")), "the origin got {normal}: {context}");
                    // All forms of one target are one cache entry.
                    let earlier = by_form.entry(normal.clone()).or_default();
                    assert_eq!(response.contains("tidegate; hit"), *earlier > 0, "{context}");
                    *earlier += 1;
                    if *earlier == 1 {
                        let route = &origins[route_of(&normal)];
                        assert_eq!(route.last().target, normal, "{context}");
                    }
                }
            }
        }
        let received: usize = origins.iter().map(Origin::count).sum();
        assert_eq!(received, by_form.len(), "each form once");
        assert!(by_form.values().any(|count| *count > 20), "many targets have one form");
    }
}

#[test]
fn limit_of_a_route_counts_every_form_of_its_paths() {
    let origin = echo();
    let config = format!(
        "[limits.login]\ntier = \"node\"\nrate = \"1/d\"\nburst = 1\n[upstreams.o]\nendpoints = [\"http://{}\"]\n\
         [[routes]]\nname = \"login\"\nmatch = {{ path = \"/login/*\" }}\nupstream = \"o\"\nlimits = [\"login\"]\n\
         [[routes]]\nname = \"rest\"\nmatch = {{ path = \"/*\" }}\nupstream = \"o\"\n",
        origin.address
    );
    let gateway = Gateway::start(&config);
    assert_eq!(gateway.get("/login/x", &[]).status, 200);
    for target in
        ["/a/../login/x", "/./login/x", "//login/x", "/%6cogin/x", "/login;a/x", "/;a/login/x", "/a/%2e%2e/login/y"]
    {
        assert_eq!(gateway.get(target, &[]).status, 429, "{target}");
    }
    assert_eq!(gateway.get("/login", &[]).status, 200, "another route");
    assert_eq!(origin.count(), 2);
}

#[test]
fn purge_and_invalidation_reach_every_form() {
    let origin = Origin::start(|request| match request.method.as_str() {
        "POST" => Script::reply(201, &[("Location", "//a/x/../%70age")], ""),
        _ => Script::ok(&[("Cache-Control", "max-age=60")], &request.target),
    });
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let get = |target: &str| gateway.get(target, &[("Host", "a")]);
    assert!(!get("//page").is_hit() && get("/page").is_hit());
    let purge = |url: &str| {
        let mut client = Client::connect(gateway.admin);
        client.request("POST", &format!("/api/v1/purge?url={url}"), &[("Host", "localhost")], b"").status
    };
    assert_eq!(purge("http://A.:80/b/../%2570age"), 200);
    assert!(!get("/page").is_hit(), "purged");
    assert!(get("/./page").is_hit());
    assert_eq!(purge("http://a/x%252fy"), 400, "no request has this path");
    assert_eq!(gateway.request("POST", "/new", &[("Host", "a")], b"x").status, 201);
    assert!(!get("/page").is_hit(), "invalidated by Location");
}

#[test]
fn origin_gets_the_received_path_where_its_route_asks_for_it() {
    let origin = echo();
    let gateway =
        Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }\nforward_path = \"received\"", ""));
    let mut client = gateway.connect();
    for (sent, received) in [
        ("/a//b/%7e?q=`", "/a//b/%7e?q=%60"),
        ("/a/b/~?q", "/a/b/~?q"),
        ("/a//b/~?q", "/a//b/~?q"),
        ("/a/b/~?q", "/a/b/~?q"),
        ("/x/../a", "/x/../a"),
        ("/x", "/x"),
    ] {
        assert_eq!(client.get(sent, &[]).text(), received);
    }
    assert_eq!(gateway.get("/a%2fb", &[]).status, 400);
}

#[test]
fn paths_stay_as_received_without_normalisation() {
    let origin = echo();
    let gateway = Gateway::start(&one_route(origin.address, "", "[server]\npaths = { normalise = \"off\" }\n"));
    for target in ["//a", "/a/../b", "/%7e", "/a%2fb", "/a\\b", "/a%5cb", "/%", "/a|b", "/..;/x"] {
        let response = gateway.get(target, &[]);
        assert_eq!((response.status, response.is_hit(), response.text()), (200, false, target.to_owned()));
    }
    for target in ["/a%00", "/a%0d%0ab", "/`"] {
        assert_eq!(gateway.get(target, &[]).status, 400, "{target}");
    }
}

/// A private page under the name of a static file.
#[test]
fn private_page_is_never_stored_under_a_public_key() {
    const NAMES: [&str; 9] = [
        "/account.php/x.css",
        "/account%2Fx.css",
        "/account;x.css",
        "/account%00.css",
        "/account%3Fx.css",
        "/account%23x.css",
        "/account/..%2fx.css",
        "/static/../account/x.css",
        "/account/x.css?a=%00",
    ];
    type Fields = &'static [(&'static str, &'static str)];
    const PRIVATE: [(Fields, Fields); 5] = [
        (&[("Cookie", "session=1")], &[("Set-Cookie", "session=2")]),
        (&[("Cookie", "session=1")], &[("Cache-Control", "private")]),
        (&[("Cookie", "session=1")], &[("Cache-Control", "no-store")]),
        (&[("Cookie", "session=1")], &[("Vary", "Cookie")]),
        (&[("Authorization", "Basic eDp5")], &[]),
    ];
    for (request_fields, response_fields) in PRIVATE {
        let origin = Origin::start(move |request| {
            let is_owner = request_fields.iter().all(|(name, value)| request.field(name) == Some(value));
            Script::ok(if is_owner { response_fields } else { &[] }, if is_owner { "secret" } else { "public" })
        });
        // The configured lifetime applies to responses without one of their own.
        let route = "cache = { default_ttl = \"1h\" }";
        for policy in ["refuse", "keep", "decode"] {
            let gateway = Gateway::start(&one_route(origin.address, route, &rules(policy).0));
            for name in NAMES {
                let owner = gateway.get(name, request_fields);
                let other = gateway.get(name, &[]);
                assert!(matches!((owner.status, other.status), (200, 200) | (400, 400)), "{name}");
                assert!(
                    !other.text().contains("secret"),
                    "{policy} {name} {response_fields:?}: {}",
                    other.cache_status()
                );
            }
        }
    }
}

/// Sends one GET over HTTP/2 with the target as it is. `None`: the stream was reset.
fn http_2_response(gateway: &Gateway, trusted: &CertificateDer<'static>, fields: &[(&str, &str)]) -> Option<Vec<u8>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a usable certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    let socket = TcpStream::connect(gateway.address).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a socket");
    let mut stream = StreamOwned::new(connection, socket);
    // Literal fields without indexing and without Huffman coding (RFC 7541 section 6.2.2).
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).ok().filter(|length| *length < 127).expect("a short text"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    bytes.extend_from_slice(&u32::try_from(block.len()).expect("a small block").to_be_bytes()[1..]);
    bytes.extend_from_slice(b"\x01\x05\0\0\0\x01");
    bytes.extend_from_slice(&block);
    stream.write_all(&bytes).expect("a connection");
    let mut response = Vec::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).ok()?;
        let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        stream.read_exact(&mut payload).ok()?;
        match (head[3], head[8]) {
            (3, 1) | (7, _) => return None,
            (0 | 1, 1) => response.extend_from_slice(&payload),
            _ => continue,
        }
        if head[4] & 1 == 1 {
            return Some(response);
        }
    }
}

#[test]
fn http_2_refuses_and_forwards_the_same_targets() {
    let (origin, dir) = (echo(), TempDir::new());
    let trusted = write_certificate(&dir);
    let listen = "[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]\n";
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "cache = { mode = \"off\" }", listen));
    let send = |method: &str, path: &str, more: &[(&str, &str)]| {
        let head = [(":method", method), (":scheme", "https"), (":path", path), (":authority", "gate.test")];
        let response = http_2_response(&gateway, &trusted, &[&head[..], more].concat());
        // The first head of a connection begins with the size of the table.
        response.map(|bytes| bytes.strip_prefix(&[0x20]).map(<[u8]>::to_vec).unwrap_or(bytes))
    };
    // The first byte of a response with status 200 is its index in the static table.
    let is_ok = |response: &Option<Vec<u8>>| response.as_ref().is_some_and(|bytes| bytes[0] == 0x88);
    for case in &cases() {
        let response = send("GET", &case.target, &[]);
        match target::normal(&case.target, PathRules::default()) {
            Err(_) => assert!(!is_ok(&response), "{}", case.target),
            Ok(normal) => {
                let response = response.unwrap_or_else(|| panic!("{}: no response", case.target));
                assert!(response[0] == 0x88 && response.ends_with(normal.as_bytes()), "{}: {normal}", case.target);
            }
        }
    }
    for (method, path, more) in [
        ("GET", "*", &[][..]),
        ("TRACE", "/", &[]),
        ("A-METHOD-OF-FORTY-LETTERS-THAT-NOBODY-HAS", "/", &[]),
        ("GET", "/", &[("expect", "magic")]),
        ("GET", "/", &[("host", "other.test")]),
    ] {
        let before = origin.count();
        assert!(!is_ok(&send(method, path, more)), "{method} {path} {more:?}");
        assert_eq!(origin.count(), before);
    }
    assert!(is_ok(&send("OPTIONS", "*", &[])));
    assert!(is_ok(&send("GET", "/", &[("host", "GATE.test.:")])));
}

const BEGIN: &str = "<!-- targets: generated by the tests of gateway with UPDATE_DOCS=1 -->\n";
const END: &str = "<!-- end of targets -->\n";

fn table() -> String {
    let code = |text: &str| match text {
        "-" => "-".to_owned(),
        text if text.len() == 3 && text.parse::<u16>().is_ok() => text.to_owned(),
        text if text.contains('`') => format!("`` {} ``", text.replace('|', "\\|")),
        text => format!("`{}`", text.replace('|', "\\|")),
    };
    let mut table = String::from(
        "| target | route | key and origin | with `keep` | with `decode` | nginx | Envoy | Traefik |\n|---|---|---|---|---|---|---|---|\n",
    );
    for case in cases() {
        let of = |policy: &str| target::normal(&case.target, rules(policy).1);
        let shown = |policy: &str| match of(policy) {
            Ok(normal) => code(&normal),
            Err(refusal) => format!("400 {}", refusal.reason()),
        };
        let default = of("refuse");
        let route = default.as_ref().map_or("-".to_owned(), |normal| code(ROUTES[route_of(normal)].1));
        let or_same = |policy: &str| if of(policy) == default { String::new() } else { shown(policy) };
        let peer = |text: &str| if default.as_deref() == Ok(text) { "same".to_owned() } else { code(text) };
        writeln!(
            table,
            "| {} | {route} | {} | {} | {} | {} | {} | {} |",
            code(&case.target),
            shown("refuse"),
            or_same("keep"),
            or_same("decode"),
            peer(&case.nginx),
            peer(&case.envoy),
            peer(&case.traefik)
        )
        .expect("a string");
    }
    table
}

#[test]
fn page_of_paths_is_up_to_date() {
    assert!(cases().len() >= 150);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/paths.md");
    let page = std::fs::read_to_string(path).expect("docs/paths.md exists");
    let (before, rest) = page.split_once(BEGIN).expect("the page marks where the targets begin");
    let (_, after) = rest.split_once(END).expect("the page marks where the targets end");
    let expected = format!("{before}{BEGIN}{}{END}{after}", table());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path, expected).expect("docs/paths.md is writable");
    } else {
        assert!(page == expected, "docs/paths.md is out of date: run the tests with UPDATE_DOCS=1");
    }
}
