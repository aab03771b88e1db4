//! The published contract, and the example in the documentation.

use std::path::Path;

use super::super::{Code, Config, Format, Source};
use super::lines;

fn parse(file: &str) -> Result<(Config, super::Report), super::Report> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&path).expect("the file belongs to the tree");
    let base = path.parent().expect("a file has a directory");
    Config::parse(&Source { name: file, text: &text, format: Format::Toml, base, env: &|_| None })
}

#[test]
fn only_what_is_not_available_yet_or_not_there_is_refused_in_the_contract() {
    let report = parse("tests/data/contract.toml").expect_err("it asks for features of later versions");
    let found: Vec<(Code, &str)> = report.faults().iter().map(|fault| (fault.code, fault.path.as_str())).collect();
    let expected = [
        (Code::File, "listen[1].tls.certificates[0].cert"),
        (Code::File, "listen[1].tls.certificates[0].key"),
        (Code::Unavailable, "upstreams.shop.retries"),
        (Code::Unavailable, "upstreams.shop.health"),
        (Code::Unavailable, "upstreams.shop.concurrency"),
        (Code::File, "routes[0].degrade.html"),
        (Code::File, "routes[0].degrade.json"),
        (Code::Unavailable, "routes[0].journal"),
        (Code::Unavailable, "journal"),
    ];
    assert_eq!(found, expected, "{report}");
}

#[test]
fn the_example_of_the_documentation_passes() {
    let (config, warnings) = parse("../docs/tidegate.example.toml").unwrap_or_else(|report| panic!("{report}"));
    assert_eq!(lines(&warnings), [] as [&str; 0]);
    assert_eq!(config.routes[0].limits, [0, 1, 2, 3]);
    assert_eq!(config.limit.weights[3], ("platinum".to_owned(), 3.2));
    assert_eq!(config.server.node, "node-1");
    assert_eq!(config.admin.token, None);
    let remote = config.remote.expect("the example has Redis");
    assert_eq!(remote.regions.len(), 1);
}
