//! The programs that tests run: `make test` installs each of them, unless its test says that it was
//! skipped.

use std::collections::BTreeSet;

use super::source::{SourceFile, assert_none, read, sources};

/// Any Debian on which Rust builds has them.
const OF_THE_SYSTEM: [&str; 5] = ["/bin/sh", "dpkg", "rustc", "script", "sh"];
/// Large ones, whose tests are skipped loudly without them.
const SKIPPED: [&str; 4] = ["chromium", "go", "node", "npm"];
/// Installed with a program of another name.
const TOGETHER: [(&str, &str); 2] = [("h2load", "nghttp"), ("redis-cli", "redis-server")];

/// The programs that the Makefile's target `test` needs.
fn needed(makefile: &str) -> BTreeSet<&str> {
    let target = makefile.split_once("\ntest:").map_or("", |(_, rest)| rest);
    let lines = target.split_once("@.ci/need ").and_then(|(_, rest)| rest.split_once("\n\t@")).map_or("", |(it, _)| it);
    lines.split_whitespace().filter_map(|pair| Some(pair.split_once(':')?.0)).collect()
}

/// The programs that a test runs and that `make test` does not install.
fn missing(file: &SourceFile, needed: &BTreeSet<&str>) -> Vec<String> {
    let calls = file.text.match_indices("Command::new(\"").filter_map(|(at, start)| {
        let program = file.text[at + start.len()..].split_once('"')?.0;
        let package = TOGETHER.iter().find(|(name, _)| *name == program).map_or(program, |(_, package)| package);
        let is_known = needed.contains(package) || OF_THE_SYSTEM.contains(&program) || SKIPPED.contains(&program);
        (!is_known).then(|| file.offence(at, &format!("`{program}`"), "name it in `.ci/need` of the target `test`"))
    });
    calls.collect()
}

#[test]
fn make_test_installs_what_tests_run() {
    let makefile = "\ntest: ## x\n\t@echo y\n\t@.ci/need a:b \\\n\t    c:d\n\t@echo z\n";
    assert_eq!(needed(makefile), BTreeSet::from(["a", "c"]));
    let text = "Command::new(\"a\") Command::new(\"sh\") Command::new(\"e\")";
    assert_eq!(missing(&SourceFile::new("a.rs", text), &needed(makefile)).len(), 1);
    let makefile = read("Makefile").text;
    let needed = needed(&makefile);
    assert!(needed.len() > 5, "the target moved: adjust this test");
    let directories = ["gateway/tests", "shard/tests", "limiter/tests", "shard/src", "limiter/src", "gateway/src"];
    let files = directories.into_iter().flat_map(sources).filter(|file| !file.path.ends_with("tidy/programs.rs"));
    assert_none(files.flat_map(|file| missing(&file, &needed)).collect());
}
