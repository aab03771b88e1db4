//! The metrics of a live gateway: both text formats, `promtool`, and what they say of the process,
//! its certificates and its reloads.

mod support;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use support::tls::{LISTEN_TLS, write_certificate};
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

fn gateway() -> (Gateway, Origin) {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "body"));
    let dir = TempDir::new();
    write_certificate(&dir);
    let rest = format!(
        "[upstreams.origin.concurrency]\nmin = 4\n[[listen]]\naddress = \"127.0.0.1:0\"\n\
         [limits.device]\ntier = \"device\"\nrate = \"100/s\"\nburst = 200\n\
         [limits.cluster]\ntier = \"cluster\"\nrate = \"1000/s\"\nburst = 200\n{LISTEN_TLS}"
    );
    let route = "limits = [\"device\", \"cluster\"]\ncompress = [\"gzip\"]\nmirror = { upstream = \"origin\" }";
    (Gateway::start_in(dir, &one_route(origin.address, route, &rest)), origin)
}

fn scrape(gateway: &Gateway, accept: &str) -> (String, String) {
    let response =
        Client::connect(gateway.admin).get("/metrics", &[("host", "localhost"), ("accept", accept), ("a", "b")]);
    (response.field("content-type").unwrap_or_default().to_owned(), response.text())
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs_f64()
}

/// `promtool`, whose absence is reported: CI installs the package `prometheus`.
fn promtool() -> Option<Command> {
    let found = Command::new("promtool").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        eprintln!("SKIPPED: promtool is not installed (Debian: prometheus)");
    }
    found.then(|| Command::new("promtool"))
}

fn monitoring(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/monitoring").join(file)
}

#[test]
fn format_follows_accept() {
    let (gateway, _origin) = gateway();
    let (kind, text) = scrape(&gateway, "application/openmetrics-text;version=1.0.0,text/plain;q=0.5,*/*;q=0.1");
    assert_eq!(kind, OPEN_METRICS);
    assert!(text.ends_with("# EOF\n") && text.contains("# TYPE tidegate_requests counter\n"));
    for accept in ["*/*", "text/plain", "text/plain;version=0.0.4;q=0.9, application/openmetrics-text;q=0.1"] {
        let (kind, text) = scrape(&gateway, accept);
        assert_eq!(kind, "text/plain; version=0.0.4; charset=utf-8");
        assert!(!text.contains("# EOF") && text.contains("# TYPE tidegate_requests_total counter\n"));
    }
}

#[test]
fn promtool_finds_no_fault_in_the_metrics() {
    let Some(mut promtool) = promtool() else { return };
    let (gateway, _origin) = gateway();
    gateway.get("/", &[]);
    let (_, text) = scrape(&gateway, "text/plain");
    let piped = promtool.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().expect("promtool runs");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("promtool reads");
    let output = child.wait_with_output().expect("promtool ends");
    let said = [output.stdout, output.stderr].map(|out| String::from_utf8_lossy(&out).into_owned()).concat();
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn promtool_accepts_the_alert_rules_and_their_tests_pass() {
    let Some(mut check) = promtool() else { return };
    for arguments in [["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]] {
        let directory = monitoring("");
        let output = check.args(arguments).current_dir(directory).output().expect("promtool runs");
        let said = [output.stdout, output.stderr].map(|out| String::from_utf8_lossy(&out).into_owned()).concat();
        assert!(output.status.success(), "{arguments:?}: {said}");
        check = Command::new("promtool");
    }
    // Every alert has a test in which it fires.
    let read = |file| std::fs::read_to_string(monitoring(file)).expect("a file");
    let (rules, tests) = (read("alerts.yaml"), read("alerts_test.yaml"));
    for alert in rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")) {
        assert!(tests.contains(&format!("alertname: {alert}\n")), "no test of {alert}");
    }
}

/// The names in a text that belong to metrics, without the suffixes of histograms.
fn metric_names(text: &str) -> Vec<String> {
    let is_name = |character: char| character.is_ascii_lowercase() || character.is_ascii_digit() || character == '_';
    let words = text.split(|character| !is_name(character));
    let own =
        words.filter(|word| ["tidegate_", "process_", "http_server_"].iter().any(|start| word.starts_with(start)));
    let mut names: Vec<String> = own.map(|word| word.trim_end_matches("_bucket").to_owned()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[test]
fn dashboard_and_alerts_name_metrics_of_a_live_gateway() {
    let (gateway, _origin) = gateway();
    gateway.get("/", &[]);
    let (_, text) = scrape(&gateway, "text/plain");
    let exposed: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    for file in ["grafana.json", "alerts.yaml"] {
        let named = metric_names(&std::fs::read_to_string(monitoring(file)).expect("a file"));
        assert!(named.len() > 10, "{file}");
        for name in named {
            assert!(exposed.contains(&&*name), "{file} names {name}, which the gateway does not have");
        }
    }
}

/// The samples that ten more routes or upstreams add are those that docs/metrics.md states.
#[test]
fn cardinality_is_as_documented() {
    let samples = |routes: usize, upstreams: usize| {
        let mut config = "[server]\nworkers = 1\n".to_owned();
        for at in 0..upstreams {
            config += &format!("[upstreams.u{at}]\nendpoints = [\"http://127.0.0.1:1\", \"http://127.0.0.1:2\"]\n");
        }
        for at in 0..routes {
            config += &format!("[[routes]]\nname = \"r{at}\"\nmatch = {{ path = \"/{at}/*\" }}\nupstream = \"u0\"\n");
        }
        let (_, text) = scrape(&Gateway::start(&config), "text/plain");
        text.lines().filter(|line| !line.starts_with('#')).count()
    };
    let one = samples(1, 1);
    let docs = std::fs::read_to_string(monitoring("../metrics.md")).expect("the document");
    for (added, what) in [(samples(11, 1) - one, "route"), (samples(1, 11) - one, "upstream")] {
        assert!(docs.contains(&format!("{} for each {what}", added / 10)), "{added} samples of ten more: {what}");
    }
}

/// The labels of each metric are in the column of docs/metrics.md.
#[test]
fn labels_are_as_documented() {
    let (gateway, _origin) = gateway();
    gateway.get("/", &[]);
    let (_, text) = scrape(&gateway, "text/plain");
    let docs = std::fs::read_to_string(monitoring("../metrics.md")).expect("the document");
    let documented = |name: &str| {
        let row = docs.lines().find(|line| line.starts_with(&format!("| `{name}` | ")))?;
        row.split(" | ").nth(2)
    };
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let Some((name, labels)) = line.split_once('{') else { continue };
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
        let column = documented(name).or_else(|| documented(family)).unwrap_or_else(|| panic!("{name} is documented"));
        for label in labels.split("\",").filter_map(|label| Some(label.split_once("=\"")?.0)) {
            assert!(label == "le" || column.contains(&format!("`{label}`")), "{name}: {label} is not in {column}");
        }
    }
}

#[test]
fn process_and_certificate_are_told() {
    let (gateway, _origin) = gateway();
    let (_, text) = scrape(&gateway, "text/plain");
    let info = text.lines().find(|line| line.starts_with("tidegate_info{")).expect("build info");
    assert!(info.contains("commit=\"") && info.contains("version=\""), "{info}");
    let started = gateway.metric("process_start_time_seconds");
    assert!(started <= now() && started > now() - 600.0, "{started}");
    assert!(gateway.metric("process_open_fds") > 5.0);
    let cpu = gateway.metric("process_cpu_seconds_total");
    assert!(cpu > 0.0 && gateway.metric("process_cpu_seconds_total") >= cpu);
    let expiry = text.lines().find(|line| line.starts_with("tidegate_certificate_not_after_timestamp_seconds{"));
    let expiry = expiry.expect("a certificate");
    assert!(expiry.contains("name=\"gate.test\"") && expiry.contains("tls.crt\""), "{expiry}");
    let seconds: f64 = expiry.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a number");
    assert!(seconds > now() + 86_400.0, "{expiry}");
}

#[test]
fn result_of_the_last_reload_is_told() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let config = one_route(origin.address, "", "");
    let gateway = Gateway::start(&config);
    let successful = || gateway.metric("tidegate_config_last_reload_successful");
    let loaded_at = || gateway.metric("tidegate_config_last_reload_success_timestamp_seconds");
    let first = loaded_at();
    assert!(successful() == 1.0 && first <= now() && first > now() - 600.0);
    let degraded = || {
        let ready = gateway.admin("/ready");
        let report: serde_json::Value = serde_json::from_str(&ready.text()).expect("JSON");
        (ready.status, report["degraded"].clone())
    };
    assert_eq!(degraded(), (200, serde_json::json!([])));
    gateway.rewrite(&format!("{config}[cach]\n"));
    wait_for(|| successful() == 0.0, STEP_TIMEOUT);
    assert_eq!(loaded_at(), first);
    assert_eq!(degraded(), (200, serde_json::json!(["configuration: the last reload was refused"])));
    gateway.rewrite(&format!("{config}# mended\n"));
    wait_for(|| successful() == 1.0, STEP_TIMEOUT);
    assert!(loaded_at() > first && degraded().1 == serde_json::json!([]));
}

/// The build script, in a repository and outside of one.
#[test]
fn build_script_names_the_commit() {
    let dir = TempDir::new();
    let program = dir.path().join("build-script");
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("build.rs");
    let rustc = Command::new("rustc").args(["--edition", "2024", "-o"]).arg(&program).arg(source).status();
    assert!(rustc.is_ok_and(|status| status.success()));
    let repository = dir.path().join("repository");
    std::fs::create_dir(&repository).expect("a directory");
    let output = |command: &mut Command| {
        let output = command.current_dir(&repository).output().expect("a command");
        String::from_utf8(output.stdout).expect("text")
    };
    let run = |profile: &str, given: &str| {
        let mut command = Command::new(&program);
        command.env_remove("TIDEGATE_COMMIT").env("PROFILE", profile).env("GIT_CEILING_DIRECTORIES", dir.path());
        if !given.is_empty() {
            command.env("TIDEGATE_COMMIT", given);
        }
        output(&mut command)
    };
    assert!(run("release", "").contains("TIDEGATE_COMMIT=unknown\n"), "no repository");
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=a", "-c", "user.email=a@b.test", "-c", "commit.gpgsign=false"];
        output(Command::new("git").args(identity).args(arguments))
    };
    git(&["init", "-q"]);
    git(&["commit", "-q", "--allow-empty", "-m", "a"]);
    let commit = git(&["rev-parse", "--short=12", "HEAD"]);
    let said = run("release", "");
    assert!(commit.len() > 12 && said.contains(&format!("TIDEGATE_COMMIT={commit}")), "{said}");
    // Each file that is watched exists: else every build would be dirty.
    let watched = said.lines().filter_map(|line| line.strip_prefix("cargo:rerun-if-changed="));
    let watched: Vec<&str> = watched.filter(|path| *path != "build.rs").collect();
    assert!(watched.len() >= 2 && watched.iter().all(|path| repository.join(path).exists()), "{watched:?}");
    assert!(run("debug", "").contains("TIDEGATE_COMMIT=unknown\n"));
    assert!(run("debug", "abc").contains("TIDEGATE_COMMIT=abc\n"));
}
