//! The request fields that the origin, the cache key, variants and identity see: connection fields,
//! names with `_` and fields of untrusted peers are removed before anything reads them.

mod support;

use support::{Client, Gateway, Origin, ReceivedRequest, Script, one_route};

const CACHED: &str = "cache = { mode = \"standard\" }";

/// An origin that stores for a minute and answers with the value that it received in `name`.
fn echo(name: &'static str, vary: &'static str) -> Origin {
    Origin::start(move |request| {
        let value = request.field(name).unwrap_or("none").to_owned();
        let fields = [("Cache-Control", "max-age=60"), ("Vary", vary)];
        Script::ok(&fields[..if vary.is_empty() { 1 } else { 2 }], value)
    })
}

/// Names and values as the origin received them, from the last request.
fn received(origin: &Origin) -> ReceivedRequest {
    origin.last()
}

#[test]
fn a_field_named_in_connection_reaches_neither_key_nor_variant() {
    for name in ["x-tenant", "origin", "accept", "accept-language", "accept-encoding", "user-agent"] {
        for (vary, rest) in [(name, String::new()), ("", format!("[cache]\nkey_fields = [\"{name}\"]"))] {
            let origin = echo(name, vary);
            let gateway = Gateway::start(&one_route(origin.address, CACHED, &rest));
            let attack = gateway.get("/a", &[(name, "victim"), ("Connection", name)]);
            assert_eq!((attack.status, attack.text()), (200, "none".to_owned()), "{name}");
            let victim = gateway.get("/a", &[(name, "victim")]);
            assert_eq!((victim.text(), victim.is_hit()), ("victim".to_owned(), false), "{name}: {vary}{rest}");
            let without = gateway.get("/a", &[]);
            assert_eq!((without.text(), without.is_hit()), ("none".to_owned(), true), "{name}");
        }
    }
}

#[test]
fn variants_by_address_are_those_of_the_forwarded_address() {
    let origin = echo("x-forwarded-for", "X-Forwarded-For");
    let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
    let from = |last: u8, fields: &[(&str, &str)]| {
        Client::connect_from([127, 0, 0, last].into(), gateway.address).get("/a", fields)
    };
    for round in 0..2 {
        for last in [1, 2] {
            let response = from(last, &[]);
            assert_eq!((response.text(), response.is_hit()), (format!("127.0.0.{last}"), round == 1));
        }
    }
    assert_eq!(from(2, &[("X-Forwarded-For", "127.0.0.1")]).text(), "127.0.0.2");
}

#[test]
fn scheme_and_host_of_a_trusted_proxy_are_part_of_the_key() {
    for (field, one, two) in [
        ("X-Forwarded-Proto", "http", "https"),
        ("X-Forwarded-Host", "one.test", "two.test"),
        ("X-Forwarded-Prefix", "/one", "/two"),
        ("X-Forwarded-Port", "80", "81"),
        ("X-Original-URL", "/one", "/two"),
        ("X-HTTP-Method-Override", "GET", "DELETE"),
    ] {
        let origin = echo(field, "");
        let trusted = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]";
        let gateway = Gateway::start(&one_route(origin.address, CACHED, trusted));
        for round in 0..2 {
            for value in [one, two] {
                let response = gateway.get("/a", &[(field, value), ("X-Forwarded-For", "192.0.2.1")]);
                assert_eq!((response.text(), response.is_hit()), (value.to_owned(), round == 1), "{field}");
            }
        }
        // The same field from others changes nothing.
        let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
        let plain = gateway.get("/b", &[]).text();
        let claimed = gateway.get("/b", &[(field, two)]);
        assert_eq!((claimed.text(), claimed.is_hit()), (plain, true), "{field}");
    }
}

#[test]
fn the_scheme_of_forwarded_is_part_of_the_key() {
    let origin = echo("x-forwarded-proto", "");
    let trusted = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, trusted));
    for round in 0..2 {
        for proto in ["http", "https"] {
            let response = gateway.get("/a", &[("Forwarded", &format!("for=192.0.2.1;proto={proto}"))]);
            assert_eq!((response.text(), response.is_hit()), (proto.to_owned(), round == 1));
        }
    }
}

/// Other names of the client's address, and of the scheme, host, path and method of the request.
const ALIASES: [&str; 48] = [
    "X-Forwarded-Scheme",
    "X-Forwarded-Prefix",
    "X-Forwarded-Server",
    "X-Forwarded-Ssl",
    "X-Forwarded-Path",
    "X-Forwarded-Uri",
    "X-Forwarded-Port",
    "X-Forwarded-Method",
    "X-Forwarded-Protocol",
    "X-Forwarded-By",
    "X-Forwarded",
    "Forwarded",
    "X-Host",
    "X-Original-Host",
    "X-Original-URL",
    "X-Original-URI",
    "X-Rewrite-URL",
    "X-HTTP-Host-Override",
    "X-HTTP-Method-Override",
    "X-HTTP-Method",
    "X-Method-Override",
    "X-Script-Name",
    "X-Url-Scheme",
    "Front-End-Https",
    "X-Real-IP",
    "X-Client-IP",
    "X-Cluster-Client-IP",
    "True-Client-IP",
    "CF-Connecting-IP",
    "Fastly-Client-IP",
    "Client-IP",
    "Proxy-Client-IP",
    "WL-Proxy-Client-IP",
    "CF-Connecting-IPv6",
    "Fly-Client-IP",
    "Forwarded-For",
    "X-Azure-ClientIP",
    "X-Envoy-External-Address",
    "X-Original-Forwarded-For",
    "CloudFront-Forwarded-Proto",
    "X-Scheme",
    "X-Envoy-Original-Path",
    "X-Original-Method",
    "Remote-User",
    "X-Remote-User",
    "X-Forwarded-User",
    "X-FORWARDED-Unknown",
    "Proxy",
];

#[test]
fn untrusted_peers_send_no_other_name_of_address_host_path_or_method() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
    let all: Vec<(&str, &str)> = ALIASES.iter().map(|name| (*name, "evil")).collect();
    gateway.get("/a", &all);
    let request = received(&origin);
    for name in ALIASES {
        assert_eq!(request.field(&name.to_lowercase()), None, "{name}");
    }
    assert_eq!(request.field("x-forwarded-for"), Some("127.0.0.1"));

    // An operator may allow some of them, and add others.
    let rest = "[identity]\nuntrusted_fields = [\"X-Internal\", \"X-Host\", \"X-Team-*\"]";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    gateway.get(
        "/b",
        &[
            ("X-Internal", "1"),
            ("X-Host", "evil"),
            ("X-Team-Role", "1"),
            ("X-Team", "2"),
            ("X-HTTP-Method-Override", "PUT"),
        ],
    );
    let request = received(&origin);
    assert_eq!(
        (request.field("x-internal"), request.field("x-host"), request.field("x-team-role")),
        (None, None, None)
    );
    assert_eq!(request.field("x-team"), Some("2"));
    assert_eq!(request.field("x-http-method-override"), Some("PUT"));
}

#[test]
fn an_origin_is_told_no_other_region_than_that_of_the_key() {
    let origin = Origin::start(|request| {
        let values: Vec<&str> = request
            .fields
            .iter()
            .filter(|(name, _)| name.eq_ignore_ascii_case("x-region"))
            .map(|(_, value)| &**value)
            .collect();
        Script::ok(&[("Cache-Control", "max-age=60")], values.join("+"))
    });
    let rest = "[identity]\nregion = [\"header:x-region\", \"header:x-area\"]\nregions = [\"north\", \"south\"]";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    for (target, sent, seen) in [
        ("/a", &[("X-Region", "north")][..], "north"),
        ("/b", &[("X-Region", "invented")], ""),
        ("/c", &[("X-Region", "North")], ""),
        ("/d", &[("X-Region", "south"), ("X-Region", "north")], ""),
        ("/e", &[("X-Region", "south"), ("X-Region", "invented")], ""),
        ("/f", &[("X-Region", "")], ""),
    ] {
        assert_eq!(gateway.get(target, sent).text(), seen, "{target}");
        assert!(gateway.get(target, sent).is_hit(), "{target}");
    }
    assert_eq!(gateway.get("/b", &[]).text(), "");
    gateway.get("/g", &[("X-Region", "north"), ("X-Area", "south")]);
    assert_eq!((received(&origin).field("x-region"), received(&origin).field("x-area")), (Some("north"), None));
}

#[test]
fn names_with_underscores_are_dropped_unless_allowed() {
    let names = ["X_User_Id", "X_Forwarded_For", "Transfer_Encoding", "X_Tenant", "_", "Content_Length"];
    let origin = Origin::start(|_| Script::ok(&[], ""));
    for (rest, passes) in [("", false), ("[limits_http]\nunderscores = \"forward\"", true)] {
        let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
        let fields: Vec<(&str, &str)> = names.iter().map(|name| (*name, "1")).collect();
        assert_eq!(gateway.get("/a", &fields).status, 200);
        let request = received(&origin);
        for name in names {
            assert_eq!(request.field(&name.to_lowercase()).is_some(), passes, "{name}");
        }
    }
}

#[test]
fn ignored_parameters_do_not_reach_the_origin_of_a_shared_response() {
    let origin = Origin::start(|request| Script::ok(&[("Cache-Control", "max-age=60")], &request.target));
    let rest = "[cache]\nkey_ignore_query = [\"utm_*\", \"q\"]";
    let gateway = Gateway::start(&one_route(origin.address, CACHED, rest));
    for (sent, seen) in [
        ("/a?utm_source=<script>&x=1".replace('<', "%3C").replace('>', "%3E"), "/a?x=1"),
        ("/b?utm_source=1".to_owned(), "/b"),
        ("/c?q=1;admin=1&y=2".to_owned(), "/c?y=2"),
        ("/d?y=2;q=1".to_owned(), "/d?y=2;q=1"),
    ] {
        assert_eq!(gateway.get(&sent, &[]).text(), seen, "{sent}");
        assert!(gateway.get(seen, &[]).is_hit(), "{seen}");
    }
    // A range is fetched as requested.
    let range = gateway.get("/e?q=1", &[("Range", "bytes=0-1")]);
    assert_eq!(range.status, 200);
    assert_eq!(received(&origin).target, "/e");
}

#[test]
fn repeated_heads_on_a_connection_are_reduced_each_time() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", ""));
    let mut client = gateway.connect();
    let fields = [("Connection", "keep-alive, x-tenant"), ("X-Tenant", "1"), ("TE", "trailers"), ("X-Kept", "2")];
    for target in ["/a", "/a", "/b", "/b"] {
        assert_eq!(client.get(target, &fields).status, 200);
        let request = received(&origin);
        assert_eq!(request.target, target);
        assert_eq!((request.field("x-tenant"), request.field("te"), request.field("x-kept")), (None, None, Some("2")));
    }
    assert_eq!(client.get("/a", &[("X-Tenant", "3")]).status, 200);
    assert_eq!(received(&origin).field("x-tenant"), Some("3"));
    let last = client.get("/a", &[("Connection", "close, x-tenant"), ("X-Tenant", "1")]);
    assert_eq!(last.field("connection"), Some("close"));
}
