//! Rejected documents: faults of single keys, with line, column and hint.

use proptest::prelude::*;

use super::super::DocumentFormat;
use super::{MINIMAL, faults, parse, parse_toml};

/// Line 9 is the first after [`MINIMAL`], which begins with an empty line.
fn faults_after_minimal(text: &str) -> Vec<String> {
    faults(&format!("{MINIMAL}{text}"))
}

#[test]
fn all_unknown_keys_are_reported_at_once() {
    let text = "versoin = 1
[server]
worker = 2
drain_timeout = \"5s\"
[upstreams.shop]
endpoints = [\"http://127.0.0.1:3000\"]
timout = \"3s\"
breaker = { error_rate = 0.5, slow = \"2s\" }
[[routes]]
name = \"everything\"
match = { path = \"/*\", verbs = [] }
upstream = \"shop\"
  weight = 7
[sever]
";
    let found = faults(text);
    let starts = [
        "1:1 version: `version` is missing",
        "1:1 versoin: unknown key `versoin` (did you mean `version`?)",
        "3:1 server.worker: unknown key `worker` (did you mean `workers`?)",
        "7:1 upstreams.shop.timout: unknown key `timout` (did you mean `timeout`?)",
        "8:13 upstreams.shop.breaker.error_rate: unknown key `error_rate` (did you mean `error_ratio`?)",
        "11:24 routes[0].match.verbs: unknown key `verbs` (expected one of `host`, `path`, `methods`, `scheme`, `headers`, `query`)",
        "13:3 routes[0].weight: unknown key `weight` (expected one of",
        "14:2 sever: unknown key `sever` (did you mean `server`?)",
    ];
    assert_eq!(found.len(), starts.len(), "{found:#?}");
    for (found, start) in found.iter().zip(starts) {
        assert!(found.starts_with(start), "{found}");
    }
}

#[test]
fn upgrade_socket_needs_a_short_path_of_a_file() {
    let found = |path: &str| faults_after_minimal(&format!("[server]\nupgrade_socket = \"{path}\"")).join("\n");
    assert!(found("/").starts_with("10:18 server.upgrade_socket: the path names no file (write"), "{}", found("/"));
    let long = |bytes: usize| found(&format!("/{}", "a".repeat(bytes - 1)));
    let expected = "10:18 server.upgrade_socket: the path has 99 bytes; a socket may have 98 (choose";
    assert!(long(99).starts_with(expected), "{}", long(99));
    assert_eq!(long(98), "");
}

#[test]
fn wrong_types_are_errors() {
    for (text, want) in [
        ("server = 1", "1:10 server: expected a table, found an integer"),
        ("[server]\nworkers = \"4\"", "10:11 server.workers: expected an integer, 0 to 1024, found a string"),
        ("[server]\nworkers = true", "10:11 server.workers: expected an integer, 0 to 1024, found a boolean"),
        (
            "[server]\nnode = 1979-05-27",
            "10:8 server.node: expected a name of letters, digits, `.`, `-` or `_`, found a date",
        ),
        (
            "[server]\ndrain_timeout = 30",
            "10:17 server.drain_timeout: expected a duration, 0s to 1h, found an integer (write \"30s\" for seconds)",
        ),
        (
            "[cache]\nmemory = 4096",
            "10:10 cache.memory: expected a size, 1MiB to 1024GiB, found an integer (write \"4096B\" for bytes)",
        ),
        (
            "[identity]\ndevice = \"host:\"",
            "10:10 identity.device: expected an array; each item: \"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\", \
             found a string (enclose it in `[` and `]`)",
        ),
        (
            "[identity]\nuser = 3",
            "10:8 identity.user: expected \"header:NAME\", \"certificate:subject\", \"certificate:san\" or { jwt = { ... } }, found an integer",
        ),
        (
            "[identity]\ntier = [\"header:x\"]",
            "10:8 identity.tier: expected \"header:NAME\" or { jwt_claim = \"NAME\" }, found an array",
        ),
        ("listen = {}", "1:10 listen: expected an array of tables, found a table (write `[[listen]]`)"),
        ("listen = [1]", "1:11 listen[0]: expected a table, found an integer"),
        ("limits = 3", "1:10 limits: expected a table, found an integer"),
        ("tiers.gold = \"2\"", "1:14 tiers.gold: expected a number from 0.000001 to 10000, found a string"),
    ] {
        // A top-level key must precede the first table.
        let document = if text.starts_with('[') { format!("{MINIMAL}{text}") } else { format!("{text}\n{MINIMAL}") };
        let found = faults(&document);
        assert!(found.iter().any(|found| found == want), "{found:#?}\n{want}");
    }
}

#[test]
fn malformed_or_out_of_range_values_are_explained() {
    for (text, want) in [
        ("[server]\nworkers = 4000", "10:11 server.workers: out of range: expected an integer, 0 to 1024"),
        ("[server]\nworkers = -1", "10:11 server.workers: out of range: expected an integer, 0 to 1024"),
        (
            "[server]\nworkers = 99999999999999999999",
            "10:11 server.workers: expected an integer, 0 to 1024, found a number out of range",
        ),
        (
            "[server]\ndrain_timeout = \"30\"",
            "10:17 server.drain_timeout: `30` is not a duration: the unit is missing (did you mean \"30s\"?)",
        ),
        (
            "[limits_http]\nheader_timeout = \"0s\"",
            "10:18 limits_http.header_timeout: out of range: expected a duration, 1ms to 1h",
        ),
        (
            "[limits_http]\nbody_bytes = \"16MB\"",
            "10:14 limits_http.body_bytes: `16MB` is not a size: `MB` is not a unit (units are powers of 1024: write \"16MiB\")",
        ),
        ("[log]\nlevel = \"inof\"", "10:9 log.level: unknown value \"inof\" (did you mean `info`?)"),
        ("[tiers]\ngold = 0", "10:8 tiers.gold: out of range: expected a number from 0.000001 to 10000"),
        ("[tiers]\ngold = inf", "10:8 tiers.gold: out of range: expected a number from 0.000001 to 10000"),
        ("[tiers]\ngold = nan", "10:8 tiers.gold: out of range: expected a number from 0.000001 to 10000"),
        (
            "[identity]\ntrusted_proxies = [\"10.0.0.0/8\", \"10.0.0.0/40\"]",
            "10:34 identity.trusted_proxies[1]: `10.0.0.0/40` is not a network (write \"10.0.0.0/8\", \"fd00::/8\" or a single address)",
        ),
        (
            "[identity]\nuser = \"cookie:user\"",
            "10:8 identity.user: a client could set this source itself (write \"header:NAME\" with a field that the trusted proxies set)",
        ),
        (
            "[identity]\nuser = \"claim:sub\"",
            "10:8 identity.user: `claim:sub` is not a source (write \"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\")",
        ),
        (
            "[identity]\ndevice = [\"claim:sub\"]",
            "10:11 identity.device[0]: `claim:sub` is not a source (write \"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\")",
        ),
        (
            "[identity]\nregion_default = \"EU\"",
            "10:18 identity.region_default: `EU`: a region's name is 1 to 32 of a-z, 0-9, '_' and '-'",
        ),
        (
            "[admin]\ntoken = \"${TOKEN}\"",
            "10:10 admin.token: environment variable `TOKEN` is not set (set it, or write a default: `${TOKEN:-value}`)",
        ),
        (
            "[admin]\ntoken = \"a ${file:no}\"",
            "10:12 admin.token: cannot read /nonexistent/no: No such file or directory (os error 2)",
        ),
    ] {
        let found = faults_after_minimal(text);
        assert!(found.iter().any(|found| found == want), "{found:#?}\n{want}");
    }
}

#[test]
fn unavailable_features_are_rejected_only_if_used() {
    assert!(parse_toml(MINIMAL).is_ok());
    let report = parse_toml(&format!("{MINIMAL}[journal]\nstore = \"x\"")).expect_err("no journal yet");
    let errors: Vec<_> =
        report.faults().iter().filter(|fault| fault.severity == super::super::FaultSeverity::Error).collect();
    assert_eq!(errors.len(), 1, "{report}");
    assert_eq!((&*errors[0].path, errors[0].code), ("journal", super::super::FaultCode::Unavailable), "{report}");
}

/// An exporter of spans is named by its URL, and its fields are those of HTTP.
#[test]
fn collectors_are_urls_without_credentials() {
    let tracing = |keys: &str| faults(&format!("{MINIMAL}[tracing]\n{keys}\n"));
    for (otlp, part) in [
        ("localhost:4318", "this is not the URL of a collector"),
        ("grpc://a:4317", "OTLP is sent over HTTP"),
        ("http://user:pw@a", "credentials belong in `tracing.headers`"),
        ("http://:s3cret@a", "credentials belong in `tracing.headers`"),
        ("http://user:s3cret@a:port", "OTLP is sent over HTTP"),
        ("http://a/?key=1", "leave out query"),
    ] {
        let found = tracing(&format!("otlp = \"{otlp}\""));
        assert!(found.len() == 1 && found[0].contains(part), "{otlp}: {found:?}");
        // Faults are in the log and on the dashboard.
        assert!(["pw", "s3cret", "key=1"].iter().all(|secret| !found[0].contains(secret)), "{otlp}: {found:?}");
    }
    assert_eq!(tracing("otlp = \"${X:-}\"\nratio = 0"), [""; 0]);
    assert_eq!(tracing("otlp = \"\"\nratio = 1.5").len(), 1);
    for key in ["ratio = 0.1", "service_name = \"a\"", "query = true", "headers = { a = \"s3cret\" }"] {
        let found = tracing(key);
        assert!(found.len() == 1 && found[0].contains("has no effect"), "{key}: {found:?}");
    }
    let found = tracing("otlp = \"\"\nheaders = { \"a b\" = \"secret\" }");
    assert!(found.len() == 1 && !found[0].contains("secret"), "{found:?}");
}

#[test]
fn syntax_errors_have_a_location() {
    assert_eq!(faults("version = 1\n[server\n").len(), 1);
    assert!(faults("version = 1\na = = 2\n")[0].starts_with("2:5 : "));
    let json = |text: &str| super::lines(&parse(text, DocumentFormat::Json).expect_err(text));
    for (text, want) in [
        ("", "1:1 : expected a value"),
        ("[]", "1:1 : expected an object"),
        ("{\"version\": 1,}", "1:15 : expected a name in double quotes"),
        ("{\"version\": 01}", "1:13 : malformed number"),
        ("{\"a\": 1,\n \"a\": 2}", "2:2 : duplicate key"),
        ("{\"a\": \"\\x\"}", "1:7 : malformed string: unknown escape or control character"),
        ("{} {}", "1:4 : unexpected text after the document"),
        ("{\"a\" 1}", "1:6 : expected `:`"),
        ("{\"a\": [1 2]}", "1:10 : expected `,` or `]`"),
        ("{\"a\": \"b", "1:7 : unterminated string"),
    ] {
        assert_eq!(json(text), [want], "{text}");
    }
    assert_eq!(json(&"[".repeat(100_000)), ["1:66 : values are nested too deeply"]);
}

#[test]
fn rendered_report_shows_the_source_line() {
    let report = parse_toml(&format!("{MINIMAL}timout = \"3s\"")).expect_err("an unknown key");
    let rendered = report.to_string();
    for part in ["error[unknown-key]: unknown key `timout`", "--> test.toml:9:1", "^^^^^^ routes[0].timout"] {
        assert!(rendered.contains(part), "{rendered}");
    }
    let json = report.to_json();
    assert_eq!(json[0]["severity"], "error");
    assert_eq!((&json[0]["line"], &json[0]["column"]), (&9.into(), &1.into()));
    assert_eq!(json[0]["path"], "routes[0].timout");
}

proptest! {
    #[test]
    fn any_text_is_accepted_or_rejected_without_panic(text in "\\PC{0,200}") {
        for format in [DocumentFormat::Toml, DocumentFormat::Json] {
            if let Err(report) = parse(&text, format) {
                prop_assert!(report.has_errors());
                prop_assert!(!report.to_string().is_empty());
            }
        }
    }

    /// Arbitrary text is rarely a document: this test cuts and duplicates parts of a valid one.
    #[test]
    fn damaged_documents_are_accepted_or_rejected_without_panic(start in 0usize..6_000, end in 0usize..6_000, noise in "[\\[\\]{}=\".,$a0\n ]{0,6}") {
        let contract = include_str!("../../../tests/data/contract.toml");
        let (start, end) = (contract.floor_char_boundary(start), contract.floor_char_boundary(end));
        let damaged = format!("{}{noise}{}", &contract[..start], &contract[end..]);
        if let Err(report) = parse_toml(&damaged) {
            prop_assert!(!report.to_string().is_empty());
        }
    }
}
