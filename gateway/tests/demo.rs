//! The steps that `tidegate demo` prints: each of the five has the described result.

mod support;

use std::net::SocketAddr;
use std::process::Command;

use support::{Client, ClientResponse, Process, STEP_TIMEOUT, tidegate};

struct Demo {
    process: Process,
    gateway: SocketAddr,
    admin: SocketAddr,
}

impl Demo {
    /// Starts the demo and reads the addresses from the printed steps.
    fn start() -> Self {
        Self::start_with(&[])
    }

    fn start_with(arguments: &[&str]) -> Self {
        let addresses = ["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"];
        let process = Process::start(tidegate().args(addresses).args(arguments));
        let last = process.stdout.find(STEP_TIMEOUT, |line| line.contains("Metrics: "));
        let admin = address(&last.unwrap_or_else(|| panic!("no steps; errors: {:?}", process.stderr.all())));
        let step = process.stdout.find(STEP_TIMEOUT, |line| line.contains("/fast")).expect("the first step");
        Demo { gateway: address(&step), admin, process }
    }

    fn get(&self, target: &str, fields: &[(&str, &str)]) -> ClientResponse {
        Client::connect(self.gateway).get(target, fields)
    }

    /// Runs the printed commands of one step.
    fn run_step(&self, step: usize) -> String {
        let lines = self.process.stdout.all();
        let from = lines.iter().position(|line| line.starts_with(&format!("{step}. "))).expect("a step of this number");
        let commands = lines[from + 1..].iter().take_while(|line| line.starts_with("     "));
        let script = commands.map(String::as_str).collect::<Vec<_>>().join("\n");
        let output = Command::new("sh").args(["-c", &script]).output().expect("a shell");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

fn count(text: &str, part: &str) -> usize {
    text.matches(part).count()
}

/// The statuses of the printed response heads.
fn statuses(output: &str) -> Vec<u16> {
    let lines = output.lines().filter_map(|line| line.strip_prefix("HTTP/1.1 "));
    lines.map(|rest| rest[..3].parse().expect("a status")).collect()
}

/// The first address in a printed line.
fn address(line: &str) -> SocketAddr {
    let after = line.split("http://").nth(1).unwrap_or_default();
    let text = after.split('/').next().unwrap_or_default();
    text.parse().unwrap_or_else(|_| panic!("no address in {line:?}"))
}

#[test]
fn readme_shows_the_printed_commands() {
    let demo = Demo::start();
    let readme =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("a readable file");
    let lines = demo.process.stdout.all();
    let commands: Vec<String> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("     "))
        .map(|command| command.replace(&demo.gateway.to_string(), "127.0.0.1:8080"))
        .map(|command| command.replace(&demo.admin.to_string(), "127.0.0.1:9900"))
        .collect();
    assert!(commands.len() > 5, "{lines:#?}");
    for command in commands {
        assert!(readme.contains(&format!("$ {command}\n")), "{command}");
    }
}

#[test]
fn demo_prints_five_numbered_steps() {
    let demo = Demo::start();
    let lines = demo.process.stdout.all();
    for step in 1..=5 {
        assert!(lines.iter().any(|line| line.starts_with(&format!("{step}. "))), "step {step}: {lines:#?}");
    }
    assert_eq!(Client::connect(demo.admin).get("/live", &[]).status, 200);
}

#[test]
fn step_1_is_a_hit() {
    let output = Demo::start().run_step(1);
    assert_eq!(count(&output, "HTTP/1.1 200"), 2, "{output}");
    assert!(output.contains("fwd=uri-miss") && output.contains("tidegate; hit"), "{output}");
    assert_eq!(count(&output, "fast: request 1 at the origin"), 2, "the second response is the stored one: {output}");
}

#[test]
fn step_2_is_limited() {
    let output = Demo::start().run_step(2);
    let statuses = statuses(&output);
    assert_eq!((&statuses[..5], statuses.last()), (&[200; 5][..], Some(&429)), "{output}");
    assert!(output.to_lowercase().contains("retry-after: "), "{output}");
}

#[test]
fn step_3_uses_the_shard_of_each_region() {
    let output = Demo::start().run_step(3);
    for region in ["eu", "us"] {
        assert_eq!(count(&output, &format!("region {region}: request ")), 2, "{output}");
        let slot = format!(" {region}:");
        let mut after = output.split(&slot).skip(1);
        assert!(after.any(|rest| rest.starts_with(|c: char| c.is_ascii_digit())), "no slot of {region}: {output}");
    }
    assert_eq!(count(&output, "tidegate; hit"), 2, "each region keeps its own copy: {output}");
}

#[test]
fn step_4_shows_the_whole_life_of_the_breaker() {
    let demo = Demo::start();
    let output = demo.run_step(4);
    let statuses = statuses(&output);
    assert_eq!((statuses.first(), statuses.last()), (Some(&500), Some(&503)), "{output}");
    assert!(statuses.is_sorted(), "the origin's 500s, then 503: {statuses:?}");
    let states = output.lines().filter_map(|line| line.strip_prefix("\"state\":\"")?.split('"').next());
    let mut states: Vec<&str> = states.collect();
    states.dedup();
    assert_eq!(states, ["open", "half-open", "ramp", "closed"], "{output}");
}

#[test]
fn step_5_serves_the_degrade_page() {
    let demo = Demo::start();
    let output = demo.run_step(5);
    assert!(output.contains("<!doctype html>") && output.contains("HTTP/1.1 503"), "{output}");
    assert!(output.contains("detail=breaker_open"), "{output}");
    assert!(output.trim_end().ends_with("repaired: /flaky works again"), "{output}");
    // It also opens the breaker right after step 4 has closed it.
    let demo = Demo::start();
    demo.run_step(4);
    assert!(demo.run_step(5).contains("detail=breaker_open"));
}

/// A failure names the option that avoids it.
#[test]
fn busy_address_names_the_option() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| Ok((socket.local_addr()?, socket)));
    let (address, _socket) = taken.expect("a free port");
    let address = address.to_string();
    let cases = [
        (["--listen", &address, "--admin", "127.0.0.1:0"], "--listen 127"),
        (["--admin", &address, "--listen", "127.0.0.1:0"], "--admin 127"),
    ];
    for command in [&["demo"][..], &["run", "--upstream", "http://127.0.0.1:1"]] {
        for (arguments, expected) in &cases {
            let output = tidegate().args(command).args(arguments).output().expect("it runs");
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_named = error.contains(&address) && error.contains("in use") && error.contains(expected);
            assert!(output.status.code() == Some(1) && is_named, "{error}");
        }
    }
}

/// The banner names the option.
#[test]
fn access_log_can_be_watched() {
    let demo = Demo::start_with(&["--access-log"]);
    demo.get("/fast", &[]);
    let is_logged = |line: &str| line.starts_with('{') && line.contains("\"/fast\"");
    assert!(demo.process.stdout.find(STEP_TIMEOUT, is_logged).is_some(), "{:?}", demo.process.stdout.all());
    assert!(demo.process.stdout.all().iter().any(|line| line.contains("--access-log")));
    let quiet = Demo::start();
    quiet.get("/fast", &[]);
    assert!(!quiet.process.stdout.all().iter().any(|line| is_logged(line)));
}

#[test]
fn sigint_stops_the_demo_with_status_0() {
    let mut demo = Demo::start();
    demo.get("/fast", &[]);
    demo.process.signal("INT");
    assert_eq!(demo.process.wait(STEP_TIMEOUT).and_then(|status| status.code()), Some(0));
}
