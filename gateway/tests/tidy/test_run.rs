//! `.ci/tests` ends a test program together with the processes that it has started, `.ci/tools`
//! reports a tool that could not be built, and `.ci/need` one that is absent.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Above all waits of this file.
const TIMEOUT: Duration = Duration::from_secs(20);

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A directory with a cargo that names one test program, a shell script.
struct Workspace(PathBuf);

impl Workspace {
    fn new(name: &str, program: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tidegate-test-run-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let it = Workspace(path);
        let path = it.0.display();
        let artifact = format!(
            "{{\"reason\":\"compiler-artifact\",\"manifest_path\":\"{path}/Cargo.toml\",\"profile\":{{\"test\":true}},\
             \"target\":{{\"kind\":[\"test\"],\"name\":\"it\"}},\"executable\":\"{path}/program\"}}"
        );
        let start = format!("sleep 300 &\necho $! >{path}/started.new\nmv {path}/started.new {path}/started\n");
        it.script("cargo", &format!("echo '{artifact}'"));
        it.script("program", &(start + program));
        it
    }

    fn script(&self, name: &str, text: &str) {
        let file = self.0.join(name);
        fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn start(&self, seconds: &str) -> Child {
        let name = format!("{}/it", self.0.file_name().unwrap().to_str().unwrap());
        let mut command = Command::new("python3");
        command
            .arg(repository().join(".ci/tests"))
            .args(["--seconds", seconds, &name])
            .env("CARGO", self.0.join("cargo"));
        command.stdout(Stdio::piped()).spawn().unwrap()
    }

    /// The process that the program has started.
    fn started(&self) -> String {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Ok(text) = fs::read_to_string(self.0.join("started")) {
                return text.trim().to_owned();
            }
            assert!(Instant::now() < deadline, "the program does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn assert_started_has_ended(&self) {
        let file = PathBuf::from(format!("/proc/{}/stat", self.started()));
        let deadline = Instant::now() + TIMEOUT;
        // Its new parent may not have read its end yet.
        while let Ok(text) = fs::read_to_string(&file) {
            if text.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) {
                break;
            }
            assert!(Instant::now() < deadline, "still there: {text}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if let Ok(started) = fs::read_to_string(self.0.join("started")) {
            let _ended = Command::new("kill").args(["-9", started.trim()]).stderr(Stdio::null()).status();
        }
        let _directory = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn program_over_its_time_ends_with_what_it_started() {
    let workspace = Workspace::new("hangs", "sleep 300");
    let began = Instant::now();
    let output = workspace.start("1").wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.code() == Some(101) && text.contains("ended after 1 s"), "{text}");
    assert!(began.elapsed() < TIMEOUT);
    workspace.assert_started_has_ended();
}

#[test]
fn processes_left_running_neither_delay_nor_outlive_a_program() {
    let workspace = Workspace::new("leaves", "echo 'test result: ok. 1 passed; 0 failed'");
    let began = Instant::now();
    let output = workspace.start("120").wait_with_output().unwrap();
    assert!(output.status.success() && began.elapsed() < TIMEOUT, "{:?}: {output:?}", began.elapsed());
    workspace.assert_started_has_ended();
}

// Not by SIGINT, which a test that runs in the background ignores.
#[test]
fn termination_ends_the_programs() {
    let workspace = Workspace::new("terminated", "sleep 300");
    let mut run = workspace.start("120");
    workspace.started();
    let pid = run.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let deadline = Instant::now() + TIMEOUT;
    let ended = loop {
        if let Some(status) = run.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _killed = run.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(ended.code(), Some(143));
    workspace.assert_started_has_ended();
}

#[test]
fn program_that_only_the_shell_has_is_missing() {
    let mut command = Command::new("/bin/sh");
    command.args([".ci/need", "kill:procps"]).current_dir(repository()).env_clear().env("PATH", "/nonexistent");
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("missing: procps"), "{output:?}");
}

#[test]
fn tool_that_cannot_be_built_fails_the_step_that_waits_for_it() {
    let workspace = Workspace::new("tools", "");
    let go = "case $1 in env) echo go1.99.0 ;; *) echo 'no such module'; exit 1 ;; esac";
    workspace.script("go", go);
    let tools = |what: &str| {
        let mut command = Command::new("sh");
        command.args(["-c", &format!(".ci/tools {what}")]).current_dir(repository());
        command.env("PATH", format!("{}:/usr/bin:/bin", workspace.0.display()));
        command.env("HOME", &workspace.0).env("CARGO_TARGET_DIR", &workspace.0).output().unwrap()
    };
    assert!(tools("start").status.success());
    let output = tools("wait");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && text.contains("FAILED   install helm"), "{output:?}");
    assert!(text.contains("go install go.k6.io/k6"), "{text}");
    // Nothing was started: there is nothing to wait for.
    assert!(tools("wait").status.success());
}
