//! Documents agree with the code: metrics, events, make targets, no path of one machine.

use std::collections::BTreeSet;
use std::process::Command;

use super::source::{SourceFile, assert_none, quoted, read, root, sources, word};

/// Names that only one of the two sets has.
fn differences(what: &str, documented: &BTreeSet<String>, real: &BTreeSet<String>) -> Vec<String> {
    let say = |name: &String, why: &str| format!("docs/metrics.md: {what} `{name}`; {why}");
    let missing = real.difference(documented).map(|name| say(name, "the code has it, the table does not"));
    missing.chain(documented.difference(real).map(|name| say(name, "the code does not have it"))).collect()
}

/// Name and type, from the table of all metrics.
fn documented_metrics(docs: &str) -> BTreeSet<String> {
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let is_type = |text: &str| matches!(word(text), "counter" | "gauge" | "histogram");
    rows.filter(|(_, rest)| is_type(rest)).map(|(name, rest)| format!("{name} {}", word(rest))).collect()
}

/// Likewise, from the calls that expose them.
fn exposed_metrics(file: &SourceFile) -> BTreeSet<String> {
    let code = file.product();
    let calls = code.match_indices("expose_").filter_map(|(at, start)| {
        let call = word(&code[at..]);
        let kind = word(call.strip_prefix(start)?).trim_end_matches("_with").trim_end_matches('s');
        let name = file.text[at + call.len()..].strip_prefix('(')?.trim_start().strip_prefix('"')?;
        Some(format!("{}{} {kind}", word(name), if kind == "counter" { "_total" } else { "" }))
    });
    calls.collect()
}

/// The names of `VARIANT = "NAME"` in the macro call that defines all events.
fn event_names(text: &str) -> BTreeSet<String> {
    let call = text.split_once("\nevents! {").and_then(|(_, rest)| rest.split_once("\n}")).map_or("", |(call, _)| call);
    call.split(" = \"").skip(1).filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())).collect()
}

#[test]
fn documented_metrics_match_the_code() {
    let set = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<BTreeSet<String>>();
    assert_eq!(differences("event", &set(&["a", "b"]), &set(&["b", "c"])).len(), 2);
    assert_eq!(documented_metrics("| `a_total` | counter | `x` |\n| `b` | list |\n"), set(&["a_total counter"]));
    let code = "expose_counters(\n \"a\", h); m::expose_gauge_with(\"b\", h); // expose_histogram(\"c\")";
    assert_eq!(exposed_metrics(&SourceFile::new("a.rs", code)), set(&["a_total counter", "b gauge"]));
    assert_eq!(quoted("x\n`r`: 400 `a`,\n`b`. And `c`.", "\n`r`:", ".", '`'), set(&["a", "b"]));
    let events = "\nevents! {\n    A = \"a\" => info \"c\";\n    B = \"b\" { d: E = f(d) }\n        => warn \"g\";\n}\nH = \"h\"";
    assert_eq!(event_names(events), set(&["a", "b"]));
    let docs = read("docs/metrics.md").text;
    let exposed: BTreeSet<String> = sources("gateway/src").iter().flat_map(exposed_metrics).collect();
    let events = event_names(&read("gateway/src/event.rs").text);
    let reasons = quoted(&read("gateway/src/http/refusal.rs").text, "\nrefusals! {", "}", '"');
    assert!([&exposed, &events, &reasons].iter().all(|it| it.len() > 20), "a list moved: adjust this test");
    let mut offences = differences("metric", &documented_metrics(&docs), &exposed);
    offences.extend(differences("event", &quoted(&docs, "\n`event`: ", ".", '`'), &events));
    offences.extend(differences("reason", &quoted(&docs, "\n`reason` of refused requests", ".", '`'), &reasons));
    assert_none(offences);
}

/// The names of metrics in `text` that `documented` does not have. A histogram's samples count as
/// the histogram.
fn unknown_metrics(file: &SourceFile, documented: &BTreeSet<String>) -> Vec<String> {
    let names: BTreeSet<&str> = documented.iter().filter_map(|entry| entry.split(' ').next()).collect();
    let is_name = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'_';
    let starts = ["tidegate_", "http_server_", "process_"].into_iter().flat_map(|start| file.text.match_indices(start));
    let used = starts.map(|(at, _)| {
        let length = file.text.as_bytes()[at..].iter().take_while(|byte| is_name(byte)).count();
        (at, &file.text[at..at + length])
    });
    let unknown = used.filter(|(_, name)| {
        !names.contains(name) && !name.strip_suffix("_bucket").is_some_and(|histogram| names.contains(histogram))
    });
    unknown
        .map(|(at, name)| file.offence(at, &format!("metric `{name}`"), "docs/metrics.md has no such metric"))
        .collect()
}

#[test]
fn dashboard_and_alerts_name_existing_metrics() {
    let documented = documented_metrics(&read("docs/metrics.md").text);
    let text =
        "rate(tidegate_requests_total[5m]) + tidegate_absent{a=\"b\"} + http_server_request_duration_seconds_bucket";
    assert_eq!(unknown_metrics(&SourceFile::new("a.json", text), &documented).len(), 1);
    let files = ["docs/monitoring/grafana.json", "docs/monitoring/alerts.yaml"].map(read);
    assert!(files.iter().all(|file| file.text.matches("tidegate_").count() > 10));
    assert_none(files.iter().flat_map(|file| unknown_metrics(file, &documented)).collect());
    let dashboard: Result<serde_json::Value, _> = serde_json::from_str(&files[0].text);
    assert!(dashboard.is_ok_and(|dashboard| dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 20)));
    let page = read("docs/monitoring.md").text;
    let alerts = files[1].text.lines().filter_map(|line| line.trim().strip_prefix("- alert: "));
    let undocumented: Vec<String> =
        alerts.filter(|alert| !page.contains(&format!("`{alert}`"))).map(str::to_owned).collect();
    assert_none(undocumented);
}

/// Commands `make X`, in backquotes or at the start of a line in a fence, without a target X.
fn unknown_targets(file: &SourceFile, makefile: &str) -> Vec<String> {
    let starts = ["\nmake ", "\n$ make ", "`make "].into_iter().flat_map(|start| file.text.match_indices(start));
    let is_fenced = |at: usize| file.text[..=at].matches("```").count() % 2 == 1;
    let commands = starts.filter(|(at, start)| start.starts_with('`') || is_fenced(*at));
    let names = commands.map(|(at, start)| (at + 1, word(&file.text[at + start.len()..])));
    let unknown = names.filter(|(_, name)| !makefile.contains(&format!("\n{name}:")));
    unknown.map(|(at, name)| file.offence(at, &format!("`make {name}`"), "the Makefile has no such target")).collect()
}

#[test]
fn readme_names_existing_make_targets() {
    let text = "`make x` and\n```\nmake test # y\n$ make z\n```\nmake sure";
    assert_eq!(unknown_targets(&SourceFile::new("README.md", text), ".PHONY: x\ntest: ## e\n").len(), 2);
    assert_none(unknown_targets(&read("README.md"), &read("Makefile").text));
}

/// Directories of development machines.
const MACHINE: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];

fn machine_paths(file: &SourceFile) -> Vec<String> {
    let is_start = |at: usize| !file.text[..at].ends_with(|it: char| it.is_alphanumeric() || "._-~}".contains(it));
    let found = MACHINE.iter().flat_map(|path| file.text.match_indices(path)).filter(|(at, _)| is_start(*at));
    found.map(|(at, path)| file.offence(at, &format!("`{path}`"), "other machines have no such directory")).collect()
}

#[test]
fn no_file_contains_a_path_of_one_machine() {
    assert_eq!(machine_paths(&SourceFile::new("a", format!("b {}c\nhttps://d{0}", MACHINE[0]))).len(), 1);
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(listed.status.success() || !root().join(".git").exists(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).expect("paths in UTF-8");
    // A listed file may be deleted in the tree, or not be text.
    let read = |path: &str| Some(SourceFile::new(path, std::fs::read_to_string(root().join(path)).ok()?));
    assert_none(names.split('\0').filter_map(read).flat_map(|file| machine_paths(&file)).collect());
}
