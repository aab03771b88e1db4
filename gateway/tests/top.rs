//! `tidegate top`, manual pages, and the address of the dashboard.

mod support;

use std::process::{Command, Output, Stdio};

use support::{Gateway, Origin, Process, STEP_TIMEOUT, Script, free_address, one_route, tidegate, wait_for};

fn top(arguments: &[&str]) -> Output {
    tidegate().arg("top").args(arguments).env_remove("ADMIN_TOKEN").stdin(Stdio::null()).output().expect("it ran")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn one_snapshot_has_routes_and_endpoints() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    gateway.get("/a", &[]);
    let admin = gateway.admin.to_string();
    for arguments in [&["--once", "--admin", &admin][..], &["--admin", &admin]] {
        let output = top(arguments);
        let text = text(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(text.lines().any(|line| line.starts_with("all ") && line.ends_with("closed")), "{text}");
        let endpoint = origin.address.to_string();
        assert!(text.lines().any(|line| line.starts_with(&endpoint) && line.ends_with("available")), "{text}");
        assert!(!text.contains('\x1b'), "{text:?}");
    }
}

#[test]
fn faults_of_the_admin_api_are_one_line() {
    let nowhere = free_address().to_string();
    let output = top(&["--admin", &nowhere]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains(&format!("cannot reach a gateway at {nowhere}")), "{output:?}");
    let (origin, admin) = (Origin::start(|_| Script::ok(&[], "ok")), free_address());
    let config = one_route(origin.address, "", &format!("[admin]\naddress = \"{admin}\"\ntoken = \"right\"\n"));
    let _gateway = Gateway::start(&config);
    let admin = admin.to_string();
    let output = top(&["--admin", &admin]);
    assert!(!output.status.success() && text(&output.stderr).contains("requires a token"), "{output:?}");
    assert!(top(&["--admin", &admin, "--token", "right"]).status.success());
    let wrong = top(&["--admin", &admin, "--token", "wrong"]);
    assert!(!wrong.status.success() && text(&wrong.stderr).contains("is not that of the gateway"), "{wrong:?}");
    let purge = tidegate().args(["purge", "--all", "--admin", &admin, "--token", "wrong"]).output().expect("it ran");
    assert!(!purge.status.success() && text(&purge.stderr).contains("is not that of the gateway"), "{purge:?}");
    let other = origin.address.to_string();
    let output = top(&["--admin", &other]);
    assert!(!output.status.success() && text(&output.stderr).contains("not a gateway"), "{output:?}");
}

/// In a terminal, made by `script`: another screen, and `q` ends it.
#[test]
fn terminal_shows_the_routes_until_q() {
    if Command::new("script").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: `tidegate top` was not run in a terminal: `script` is not installed");
    }
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    // A key that arrives before the first screen counts as well.
    let program = env!("CARGO_BIN_EXE_tidegate");
    let inner = format!("{program} top --admin {}; echo status=$?", gateway.admin);
    let mut command = Command::new("sh");
    command.args(["-c", "{ sleep 0.5; printf q; sleep 9; } | script -qfec \"$0\" /dev/null", &inner]);
    let terminal = Process::start(&mut command);
    let ended = terminal.stdout.find(STEP_TIMEOUT, |line| line.contains("status=0"));
    let all = terminal.stdout.all().join("\n");
    assert!(ended.is_some(), "{all:?}");
    assert!(all.contains("\x1b[?1049h") && all.contains("\x1b[?1049l") && all.contains("q: quit"), "{all:?}");
}

#[test]
fn manual_pages_are_troff() {
    for (arguments, name) in [(&["man"][..], "tidegate"), (&["man", "top"], "tidegate\\-top")] {
        let output = tidegate().args(arguments).output().expect("it ran");
        let text = text(&output.stdout);
        assert!(output.status.success() && text.contains(".TH") && text.contains(name), "{text}");
    }
    assert!(!tidegate().args(["man", "nothing"]).output().expect("it ran").status.success());
}

#[test]
fn run_says_where_the_dashboard_is() {
    let (listen, admin) = (free_address().to_string(), free_address().to_string());
    let upstream = format!("http://{}", free_address());
    let mut command = tidegate();
    command.args(["run", "--upstream", &upstream, "--listen", &listen, "--admin", &admin]);
    let process = Process::start(&mut command);
    wait_for(|| !process.stderr.events("ready").is_empty(), STEP_TIMEOUT);
    let url = process.stderr.event("dashboard_ready")["url"].clone();
    assert_eq!(url, format!("http://{admin}/"));
}

#[test]
fn version_names_the_commit_where_it_is_known() {
    let output = tidegate().arg("--version").output().expect("it ran");
    let commit = match env!("TIDEGATE_COMMIT") {
        "unknown" => String::new(),
        commit => format!(" ({commit})"),
    };
    assert_eq!(text(&output.stdout), format!("tidegate {}{commit}\n", env!("CARGO_PKG_VERSION")));
}
