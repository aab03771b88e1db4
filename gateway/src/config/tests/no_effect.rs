//! Lists that have an item twice, names that are equal but for their case, statuses that make no
//! sense, and settings without effect because nothing that they refer to is configured.

use super::super::fault::FaultSeverity;
use super::{MINIMAL, faults, parse_toml};

/// The only fault of the smallest document with `addition`, and whether it rejects the document.
fn only_fault(addition: &str) -> (bool, String) {
    let text = format!("{MINIMAL}{addition}\n");
    let found = faults(&text);
    assert_eq!(found.len(), 1, "{addition}: {found:#?}");
    assert!(found[0].ends_with(')'), "it has a hint: {found:#?}");
    (parse_toml(&text).is_err(), found[0].clone())
}

fn assert_warned(addition: &str, part: &str) {
    let (is_rejected, fault) = only_fault(addition);
    assert!(!is_rejected && fault.contains(part), "{addition}: {fault}");
}

fn assert_refused(addition: &str, part: &str) {
    let (is_rejected, fault) = only_fault(addition);
    assert!(is_rejected && fault.contains(part), "{addition}: {fault}");
}

fn assert_accepted(addition: &str) {
    let text = format!("{MINIMAL}{addition}\n");
    assert_eq!(faults(&text), [""; 0], "{addition}");
}

const LIMIT: &str = "limits = [\"a\"]\n[limits.a]\ntier = \"node\"\nrate = \"1/s\"\nburst = 9\n";

fn route(keys: &str) -> String {
    format!("[[routes]]\nname = \"b\"\nmatch = {{ path = \"/b/*\" }}\n{keys}")
}

#[test]
fn items_that_a_list_has_already_are_reported_where_they_stand() {
    for (addition, path) in [
        ("cache = { languages = [\"en\", \"de\", \"en\"] }", "routes[0].cache.languages[2]: this is the same as"),
        ("headers.response.remove = [\"Server\", \"server\"]", "routes[0].headers.response.remove[1]"),
        ("compress = [\"br\", \"gzip\", \"br\"]", "routes[0].compress[2]"),
        ("compress = { types = [\"text/html\", \"TEXT/HTML\"] }", "routes[0].compress.types[1]"),
        ("allow = [\"10.1.2.3/8\", \"10.0.0.0/8\"]", "routes[0].allow[1]: this is the same as `routes[0].allow[0]`"),
        ("cors = { origins = [\"https://a.test\", \"https://A.test:443\"] }", "routes[0].cors.origins[1]"),
        ("cors = { origins = [\"*\"], methods = [\"GET\", \"GET\"] }", "routes[0].cors.methods[1]"),
        ("[cache]\nkey_fields = [\"x-a\", \"X-A\"]", "cache.key_fields[1]"),
        ("[dns]\nservers = [\"10.0.0.2\", \"10.0.0.2:53\"]", "dns.servers[1]"),
        ("[identity]\ntrusted_proxies = [\"::1\", \"::1/128\"]", "identity.trusted_proxies[1]"),
    ] {
        assert_warned(addition, path);
    }
    assert_warned("cache = { languages = [\"en\", \"EN\"] }", "`EN` and `en` are the same language");
    let retries = "[upstreams.b]\nendpoints = [\"http://127.0.0.1:1\"]\nretries = 1\n";
    let used = route("upstream = \"b\"");
    assert_warned(&format!("{retries}retry_on = [\"5xx\", \"503\"]\n{used}"), "`503` has no effect beside `5xx`");
    // Values of cookies have a case, and so has a language with its region.
    assert_accepted("[identity]\ndevice = [\"cookie:a\", \"cookie:A\"]");
    assert_accepted("cache = { languages = [\"pt\", \"pt-BR\"] }");
    // A JSON object has each member once.
    assert_refused(
        "[log]\nfields = [\"status\", \"path\", \"status\"]",
        "log.fields[2]: this is the same as `log.fields[0]`",
    );
    assert_refused("[log]\nfields = []", "log.fields: the array needs at least one item");
}

#[test]
fn names_of_fields_have_no_case() {
    let twice = "{ X-A = \"1\", x-a = \"2\" }";
    for direction in ["request", "response"] {
        let (same, sent) = ("`x-a` and `X-A` name the same field", "the field would be sent twice");
        assert_refused(&format!("headers.{direction}.set = {twice}"), same);
        assert_refused(&format!("headers.{direction}.set = {twice}"), sent);
        assert_warned(&format!("headers.{direction}.add = {twice}"), same);
        let both = format!("headers.{direction} = {{ set = {{ x-a = \"1\" }}, remove = [\"X-A\"] }}");
        assert_warned(&both, "`remove` has no effect on `x-a`, which `set` replaces");
    }
    assert_refused("headers.request.set = { Host = \"a.test\", host = \"b.test\" }", "`host` and `Host` name");
    let matched = "[[routes]]\nname = \"b\"\nupstream = \"shop\"\nmatch = { path = \"/b\", headers = { X-A = \"1\", x-a = \"2\" } }";
    assert_refused(matched, "routes[1].match.headers.x-a: `x-a` and `X-A` name the same field");
    assert_refused(&format!("[tracing]\notlp = \"http://127.0.0.1:1\"\nheaders = {twice}"), "tracing.headers.x-a");
    let canary = format!(
        "canary = {{ upstream = \"b\", header = {twice} }}\n[upstreams.b]\nendpoints = [\"http://127.0.0.1:1\"]"
    );
    assert_refused(&canary, "routes[0].canary.header.x-a");
}

#[test]
fn conditions_are_compared_without_their_order() {
    let matched = |headers: &str| {
        format!(
            "[[routes]]\nname = \"{}\"\nupstream = \"shop\"\nmatch = {{ path = \"/b\", headers = {{ {headers} }} }}\n",
            headers.len()
        )
    };
    let text = format!("{MINIMAL}{}{}", matched("x-a = \"1\", x-b = \"2\""), matched("x-b = \"2\",  x-a = \"1\""));
    let found = faults(&text);
    assert!(found.len() == 1 && found[0].contains("matches the same host, path and methods"), "{found:#?}");
}

#[test]
fn statuses_that_make_no_sense_are_errors() {
    let upstream = |keys: &str| {
        format!("[upstreams.b]\nendpoints = [\"http://127.0.0.1:1\"]\n{keys}\n{}", route("upstream = \"b\""))
    };
    for status in ["200", "2xx", "304", "1xx", "101"] {
        let keys = format!("retries = 1\nretry_on = [\"{status}\"]");
        assert_refused(&upstream(&keys), &format!("`{status}` is not the status of an error (a request is sent again"));
    }
    for status in ["+503", "0503", "503 "] {
        let keys = format!("retries = 1\nretry_on = [\"{status}\"]");
        assert_refused(&upstream(&keys), "is not a status");
    }
    let health = |expect: &str| upstream(&format!("health = {{ path = \"/\", expect = {expect} }}"));
    assert_refused(&health("[\"100\"]"), "`100` does not end a response");
    assert_refused(&health("[]"), "upstreams.b.health.expect: the array needs at least one item");
    assert_accepted(&health("[\"404\"]"));
    assert_refused(&format!("cost_by_status = {{ \"+401\" = 2 }}\n{LIMIT}"), "`+401` is not a status");
    assert_refused("compress = { types = [] }", "routes[0].compress.types: the array needs at least one item");
    assert_refused("cors = { origins = [\"*\"], methods = [\"*\"] }", "`*` is the name of a method");
    let literal = "browsers take `*` for the name of a field";
    assert_refused("cors = { origins = [\"https://a.test\"], credentials = true, headers = [\"*\"] }", literal);
    assert_refused("cors = { origins = [\"https://a.test\"], credentials = true, expose = [\"*\"] }", literal);
    assert_accepted("cors = { origins = [\"*\"], expose = [\"*\"] }");
    for (status, field) in [(206, "content-range"), (307, "location"), (401, "www-authenticate"), (405, "allow")] {
        let respond = |more: &str| route(&format!("respond = {{ status = {status} }}\n{more}"));
        assert_warned(&respond(""), &format!("a response with status {status} says nothing without `{field}`"));
        assert_accepted(&respond(&format!("headers.response.set = {{ {field} = \"x\" }}")));
    }
}

#[test]
fn settings_without_what_they_refer_to_are_warned_of() {
    let spare = "[upstreams.b]\nendpoints = [\"http://127.0.0.1:1\"]\n";
    let used = route("upstream = \"b\"");
    for (addition, part) in [
        ("cost = 2".to_owned(), "routes[0].cost: `cost` has no effect: the route has no limits"),
        ("cost_by_status = { 401 = 5 }".to_owned(), "routes[0].cost_by_status: `cost_by_status` has no effect"),
        (format!("{spare}retry_on = [\"502\"]\n{used}"), "upstreams.b.retry_on: `retry_on` has no effect"),
        ("[server]\nzone = \"a\"".to_owned(), "server.zone: `zone` has no effect: no endpoint has a zone"),
        (
            format!("[upstreams.b]\nendpoints = [{{ url = \"http://127.0.0.1:1\", zone = \"a\" }}]\n{used}"),
            "upstreams.b: the zones of the endpoints have no effect",
        ),
        ("[tiers]\ngold = 2".to_owned(), "tiers: no caller has the class `gold`"),
        (
            "[access]\nexempt = [\"10.0.0.0/8\"]".to_owned(),
            "access.exempt: `exempt` has no effect: there are no limits",
        ),
        ("[cache]\nremote_object_bytes = \"2MiB\"".to_owned(), "nothing is stored remotely"),
        (
            "canary = { upstream = \"shop\", percent = 5 }".to_owned(),
            "`canary` names the upstream of the route, `shop`",
        ),
        ("mirror = { upstream = \"shop\" }".to_owned(), "`mirror` names the upstream of the route"),
        ("hedge = true".to_owned(), "routes[0].hedge: `hedge` has no effect: `shop` has one endpoint"),
        (
            "[[routes]]\nname = \"b\"\nmatch = { path = \"/b\", scheme = \"https\" }\nupstream = \"shop\"".to_owned(),
            "routes[1].match: this route matches no request: no listener is reached by https",
        ),
    ] {
        assert_warned(&addition, part);
    }
    assert_accepted(&format!("cost = 2\ncost_by_status = {{ 401 = 5 }}\n{LIMIT}"));
    assert_accepted("cost = 1");
    assert_accepted("[tiers]\nstandard = 2");
    assert_accepted("[identity]\ntrusted_proxies = [\"::1\"]\ntier = \"header:x-tier\"\n[tiers]\ngold = 2");
    let redis = "[redis]\nsecret = \"0123456789abcdef\"\n[redis.regions.default]\nendpoints = [\"redis://a\"]\n[redis.regions.eu]\nendpoints = [\"redis://b\"]\n";
    assert_warned(redis, "redis.regions.eu: no request is in the region `eu`");
    assert_accepted(&format!("{redis}[identity]\nregion = [\"header:x-region\"]"));
    assert_accepted(&redis.replace("[redis.regions.eu]", "fallback = [\"eu\"]\n[redis.regions.eu]"));
}

/// Beyond the capacity of the counters, routes would share them and show wrong values.
#[test]
fn routes_beyond_the_capacity_of_metrics_are_reported() {
    let with = |count: usize| {
        let route =
            |index| format!("[[routes]]\nname = \"r{index}\"\nmatch = {{ path = \"/{index}\" }}\nrespond = {{}}\n");
        let routes: String = (1..count).map(route).collect();
        let document = format!("{MINIMAL}{routes}");
        let base = std::path::Path::new("/nonexistent");
        super::super::load::parse_for_purposes(base, &document, super::DocumentFormat::Toml)
    };
    for report in with(6_000) {
        let lines = super::lines(&report);
        assert!(!report.has_errors() && lines.len() == 1, "{lines:?}");
        assert!(lines[0].contains("would leave some without metrics (a path such as"), "{lines:?}");
    }
    for report in with(10_000) {
        let lines = super::lines(&report);
        assert!(report.has_errors() && lines.len() == 1, "{lines:?}");
        assert!(
            lines[0].contains("the metrics of 10000 routes do not fit beside those of the upstreams (1) (at most 8"),
            "{lines:?}"
        );
    }
}

#[test]
fn redirects_to_themselves_are_warned_of() {
    let redirect = |matched: &str, to: &str| {
        format!("[[routes]]\nname = \"b\"\nmatch = {{ {matched} }}\nredirect = {{ to = \"{to}\" }}\n")
    };
    let proxied = "[identity]\ntrusted_proxies = [\"::1\"]\n";
    for (matched, to) in [
        ("path = \"/b/*\"", "/b/c/{rest}"),
        ("path = \"/b\"", "/b"),
        ("path = \"/b/*\"", "{scheme}://{host}{uri}"),
        ("path = \"/b/*\"", "https://{host}{uri}"),
    ] {
        assert_warned(
            &format!("{}{proxied}", redirect(matched, to)),
            "routes[1].redirect.to: this redirect leads to the route",
        );
    }
    for (matched, to) in [
        ("path = \"/b/*\"", "/c/{rest}"),
        ("path = \"/b/*\", scheme = \"http\"", "https://{host}{uri}"),
        ("path = \"/b/*\"", "https://www.b.test{uri}"),
        ("path = \"/b/*\", query = { old = \"*\" }", "/b/c"),
    ] {
        assert_accepted(&format!("{}{proxied}", redirect(matched, to)));
    }
    // Another route takes it, or clients of this gateway cannot come back by `https`.
    assert_accepted(&redirect("path = \"/b/*\"", "https://{host}{uri}"));
    assert_accepted(&format!(
        "{}[[routes]]\nname = \"c\"\nmatch = {{ path = \"/b/c\" }}\nrespond = {{}}\n",
        redirect("path = \"/b/*\"", "/b/c")
    ));
}

/// The words of the schema are those of the code.
#[test]
fn words_and_numbers_are_listed_in_the_schema() {
    let schema = super::super::schema();
    let at = |pointer: &str| schema.pointer(pointer).unwrap_or_else(|| panic!("{pointer}")).clone();
    let words = at("/properties/log/properties/fields/items/anyOf/0/enum");
    for word in ["time", "status", "referer", "config"] {
        assert!(words.as_array().is_some_and(|words| words.contains(&word.into())), "{words}");
    }
    let statuses = at("/properties/routes/items/properties/redirect/properties/status/enum");
    assert_eq!(statuses, serde_json::json!([301, 302, 303, 307, 308]));
    let text = format!(
        "{MINIMAL}[[routes]]\nname = \"b\"\nmatch = {{ path = \"/b\" }}\nredirect = {{ to = \"/c\", status = 305 }}\n"
    );
    let report = parse_toml(&text).expect_err("not a redirect");
    assert_eq!(report.count(FaultSeverity::Error), 1);
    assert!(super::schema::schema_fault(&text, super::DocumentFormat::Toml).is_some());
    let log = format!("{MINIMAL}[log]\nfields = [\"stauts\"]\n");
    assert!(super::schema::schema_fault(&log, super::DocumentFormat::Toml).is_some());
    assert!(faults(&log)[0].contains("`stauts` is not a member of access log lines (did you mean `status`?)"));
}
