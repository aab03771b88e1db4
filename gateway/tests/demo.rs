//! The tour that `tidegate demo` prints: each of its five steps does what it promises.

mod support;

use std::net::SocketAddr;
use std::time::Duration;

use support::{Answer, Client, PATIENCE, Process, tidegate, wait_for};

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

    fn post(&self, target: &str) -> Answer {
        Client::connect(self.gate).request("POST", target, &[], b"")
    }
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
    let demo = Demo::start();
    let (first, second) = (demo.get("/fast", &[]), demo.get("/fast", &[]));
    assert!(first.cache_status().contains("fwd="), "{}", first.cache_status());
    assert!(second.is_hit());
    assert_eq!(first.text(), second.text(), "the request's number stays");
}

#[test]
fn step_2_a_limit() {
    let demo = Demo::start();
    let answers: Vec<Answer> = (0..8).map(|_| demo.get("/limited", &[])).collect();
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses[..5], [200; 5]);
    assert_eq!(statuses.last(), Some(&429), "{statuses:?}");
    let denied = answers.last().expect("eight answers");
    assert!(denied.field("retry-after").is_some_and(|wait| wait.parse::<u32>().is_ok_and(|wait| wait >= 1)));
}

#[test]
fn step_3_a_regions_shard() {
    let demo = Demo::start();
    let ask = |region| demo.get("/region", &[("x-region", region)]);
    let firsts = [ask("eu"), ask("us")];
    let again = [ask("eu"), ask("us")];
    for (region, (first, again)) in ["eu", "us"].into_iter().zip(firsts.iter().zip(&again)) {
        assert!(first.text().contains(&format!("region {region}:")), "{}", first.text());
        assert!(again.is_hit() && again.text() == first.text(), "each region keeps its own copy");
        assert!(again.cache_status().contains(&format!("{region}:")), "{}", again.cache_status());
    }
    assert_ne!(firsts[0].text(), firsts[1].text());
}

#[test]
fn steps_4_and_5_a_breaker_and_its_page() {
    let demo = Demo::start();
    assert_eq!(demo.get("/flaky", &[]).status, 200);
    assert_eq!(demo.post("/demo/break").status, 200);
    let statuses: Vec<u16> = (0..8).map(|_| demo.get("/flaky", &[]).status).collect();
    assert_eq!((statuses.first(), statuses.last()), (Some(&500), Some(&503)), "{statuses:?}");
    assert!(statuses.is_sorted(), "first its own 500s, then 503: {statuses:?}");
    let page = demo.get("/flaky", &[("accept", "text/html")]);
    assert_eq!((page.status, page.field("content-type")), (503, Some("text/html; charset=utf-8")));
    assert!(page.field("retry-after").is_some() && page.text().starts_with("<!doctype html>"));
    assert_eq!(demo.post("/demo/mend").status, 200);
    wait_for(|| demo.get("/flaky", &[]).status == 200, Duration::from_secs(6));
    (0..3).for_each(|_| assert_eq!(demo.get("/flaky", &[]).status, 200));
}

#[test]
fn an_interrupt_ends_the_demo_cleanly() {
    let mut demo = Demo::start();
    demo.get("/fast", &[]);
    demo.process.signal("INT");
    assert_eq!(demo.process.wait(PATIENCE).and_then(|status| status.code()), Some(0));
}
