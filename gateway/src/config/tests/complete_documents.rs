//! Two complete documents, the one of tests/data/contract.toml and the example of docs/, have only
//! the expected faults.

use std::path::Path;

use super::super::{Config, ConfigDocument, DocumentFormat, FaultCode, PrintOptions, print};
use super::{debug_text, lines};

fn parse_file(file: &str) -> Result<(Config, super::ConfigReport), super::ConfigReport> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).expect("the file belongs to the tree");
    let base = path.parent().expect("a file has a directory");
    let env = |name: &str| (name == "REDIS_SECRET").then(|| "0123456789abcdef".to_owned());
    Config::parse(&ConfigDocument { name: file, text: &text, format: DocumentFormat::Toml, base, env: &env })
}

#[test]
fn contract_has_only_unavailable_features_and_missing_files_as_faults() {
    let report = parse_file("tests/data/contract.toml").expect_err("the contract has features of later versions");
    let found: Vec<(FaultCode, &str)> = report.faults().iter().map(|fault| (fault.code, fault.path.as_str())).collect();
    let expected = [
        (FaultCode::File, "listen[1].tls.certificates[0].cert"),
        (FaultCode::File, "listen[1].tls.certificates[0].key"),
        (FaultCode::Risk, "limits.device"),
        (FaultCode::File, "routes[0].degrade.html"),
        (FaultCode::File, "routes[0].degrade.json"),
        (FaultCode::Unavailable, "routes[0].journal"),
        (FaultCode::Unavailable, "journal"),
    ];
    assert_eq!(found, expected, "{report}");
}

#[test]
fn example_of_the_documentation_is_valid() {
    let (config, warnings) = parse_file("../docs/tidegate.example.toml").unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(lines(&warnings), [] as [&str; 0]);
    assert_eq!(config.routes[0].limits, [0, 1, 2, 3]);
    assert_eq!(config.limit.weights[3], ("platinum".to_owned(), 3.2));
    assert_eq!(config.server.node, "node-1");
    assert_eq!(config.admin.token, None);
    let remote = config.remote.expect("the example has `[redis]`");
    assert_eq!(remote.regions.len(), 1);
}

/// A document that uses what the others do not: quoted names, escapes, empty tables, references.
const UNUSUAL: &str = r#"version = 1
[[listen]]
address = "127.0.0.1:9442"
[[listen]]
address = "127.0.0.1:9443"
[admin]
token = "${TOKEN}"
[tiers]
"a.b" = 2
[identity]
secret = "${SECRET:-}"
user = "header:x-user"
tier = "header:x-tier"
trusted_proxies = []
[tracing]
otlp = "http://127.0.0.1:4318"
headers = { authorization = "Bearer ${TOKEN}" }
[upstreams."shop"]
endpoints = ["http://${HOST:-127.0.0.1}:3000"]
concurrency = {}
health = { path = "/healthz?key=${TOKEN}&full=1" }
breaker = {}
[[routes]]
name = "fixed"
match = { path = "/fixed", headers = { "x.y" = "a*", x-key = "${TOKEN}" }, query = { "a b" = "*" } }
respond = { body = "$$${HOST:-h} $${x} \"\u0001\u007f\u00e9\\ {{x}}" }
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "shop"
compress = {}
cache = {}
auth = { forward = "http://127.0.0.1:4000/verify?key=${TOKEN}" }
headers.request.set = { x-a = "$5 {{}} {host}" }
"#;

fn document<'a>(text: &'a str, base: &'a Path, env: &'a dyn Fn(&str) -> Option<String>) -> ConfigDocument<'a> {
    ConfigDocument { name: "d", text, format: DocumentFormat::Toml, base, env }
}

#[test]
fn printed_configurations_are_read_back() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = manifest.join("../docs");
    let mut documents = vec![(docs.clone(), UNUSUAL.to_owned())];
    let files =
        std::fs::read_dir(docs.join("cookbook")).expect("a directory").map(|entry| entry.expect("an entry").path());
    for file in files.chain([docs.join("tidegate.example.toml")]) {
        if file.extension().is_some_and(|extension| extension == "toml") {
            let base = file.parent().expect("a file has a directory");
            documents.push((base.to_owned(), std::fs::read_to_string(&file).expect("a document")));
        }
    }
    let env = |name: &str| (!name.starts_with("HOST")).then(|| "0123456789abcdef0123456789abcdef".to_owned());
    let mut read = 0;
    for (base, text) in &documents {
        // Some need files that a test of their own makes.
        let (config, warnings) = match Config::parse(&document(text, base, &env)) {
            Ok(parsed) => parsed,
            Err(report) => {
                assert_ne!(text, UNUSUAL, "{report}");
                continue;
            }
        };
        read += 1;
        for defaults in [false, true] {
            let printed =
                print::print(&document(text, base, &env), PrintOptions { defaults, origin: true }).expect("valid");
            let (again, further) =
                Config::parse(&document(&printed, base, &env)).unwrap_or_else(|report| panic!("{report}\n{printed}"));
            assert_eq!(debug_text(&again), debug_text(&config), "{printed}");
            // `Debug` does not show these.
            assert!(again.admin.token == config.admin.token && again.tracing == config.tracing, "{printed}");
            let messages = |report: &super::ConfigReport| -> Vec<String> {
                report.faults().iter().map(|fault| fault.message.clone()).collect()
            };
            assert_eq!(messages(&further), messages(&warnings), "{printed}");
        }
    }
    assert!(read >= 10, "{read} of {}", documents.len());
}
