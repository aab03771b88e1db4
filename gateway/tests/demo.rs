//! The tour that `tidegate demo` prints: each of its five steps does what it promises.

mod support;

use std::net::SocketAddr;
use std::process::Command;

use support::{Answer, Client, PATIENCE, Process, tidegate};

struct Demo {
    process: Process,
    gate: SocketAddr,
    admin: SocketAddr,
}

impl Demo {
    /// Starts the demo and reads the addresses off its tour, as a person does.
    fn start() -> Self {
        let process = Process::start(tidegate().args(["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]));
        let last = process.stdout.find(PATIENCE, |line| line.contains("/metrics"));
        let admin = address(&last.unwrap_or_else(|| panic!("no tour; errors: {:?}", process.stderr.all())));
        let step = process.stdout.find(PATIENCE, |line| line.contains("/fast")).expect("the first step");
        Demo { gate: address(&step), admin, process }
    }

    fn get(&self, target: &str, fields: &[(&str, &str)]) -> Answer {
        Client::connect(self.gate).get(target, fields)
    }

    /// Runs the commands of one step as they are printed.
    fn follow(&self, step: usize) -> String {
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

/// The statuses of answers whose heads were printed.
fn statuses(output: &str) -> Vec<u16> {
    let lines = output.lines().filter_map(|line| line.strip_prefix("HTTP/1.1 "));
    lines.map(|rest| rest[..3].parse().expect("a status")).collect()
}

/// The first address in a line of the tour.
fn address(line: &str) -> SocketAddr {
    let after = line.split("http://").nth(1).unwrap_or_default();
    let text = after.split('/').next().unwrap_or_default();
    text.parse().unwrap_or_else(|_| panic!("no address in {line:?}"))
}

#[test]
fn the_tour_has_five_numbered_steps() {
    let demo = Demo::start();
    let lines = demo.process.stdout.all();
    for step in 1..=5 {
        assert!(lines.iter().any(|line| line.starts_with(&format!("{step}. "))), "step {step}: {lines:#?}");
    }
    assert_eq!(Client::connect(demo.admin).get("/live", &[]).status, 200);
}

#[test]
fn step_1_a_hit() {
    let output = Demo::start().follow(1);
    assert_eq!(count(&output, "HTTP/1.1 200"), 2, "{output}");
    assert!(output.contains("fwd=uri-miss") && output.contains("tidegate; hit"), "{output}");
    assert_eq!(count(&output, "fast: request 1 at the origin"), 2, "the request's number stays: {output}");
}

#[test]
fn step_2_a_limit() {
    let output = Demo::start().follow(2);
    let statuses = statuses(&output);
    assert_eq!((&statuses[..5], statuses.last()), (&[200; 5][..], Some(&429)), "{output}");
    assert!(output.to_lowercase().contains("retry-after: "), "{output}");
}

#[test]
fn step_3_a_regions_shard() {
    let output = Demo::start().follow(3);
    for region in ["eu", "us"] {
        assert_eq!(count(&output, &format!("region {region}: request ")), 2, "{output}");
        let place = format!(" {region}:");
        let mut after = output.split(&place).skip(1);
        assert!(after.any(|rest| rest.starts_with(|c: char| c.is_ascii_digit())), "no slot of {region}: {output}");
    }
    assert_eq!(count(&output, "tidegate; hit"), 2, "each region keeps its own copy: {output}");
}

#[test]
fn steps_4_and_5_a_breaker_and_its_page() {
    let demo = Demo::start();
    let output = demo.follow(4);
    // The first line answers the switch.
    let statuses = statuses(&output);
    assert_eq!((statuses.first(), statuses.last()), (Some(&500), Some(&503)), "{output}");
    assert!(statuses.is_sorted(), "first its own 500s, then 503: {statuses:?}");
    let output = demo.follow(5);
    assert!(output.contains("<!doctype html>") && output.contains("HTTP/1.1 200"), "{output}");
    assert!(output.trim_end().ends_with("flaky: works"), "{output}");
}

#[test]
fn an_interrupt_ends_the_demo_cleanly() {
    let mut demo = Demo::start();
    demo.get("/fast", &[]);
    demo.process.signal("INT");
    assert_eq!(demo.process.wait(PATIENCE).and_then(|status| status.code()), Some(0));
}
