//! Two complete documents, the one of tests/data/contract.toml and the example of docs/, have only
//! the expected faults.

use std::path::Path;

use super::super::{Config, ConfigDocument, DocumentFormat, FaultCode};
use super::lines;

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
