//! Lesson `clock-drift`: two gateways share Redis, and the wall clock of one jumps by an hour, there and back.
//!
//! `faketime` turns the wall clock of a real process; its monotonic clock goes on, as it does on a machine.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::process::Command;
use std::time::Duration;

use server::Redis;
use support::{Answer, Dir, Gateway, Origin, Script, one_route, wait_for};

const SECOND: Duration = Duration::from_secs(1);

/// A gateway whose wall clock a test turns.
struct Turned {
    gateway: Gateway,
    file: std::path::PathBuf,
}

impl Turned {
    fn start(config: &str) -> Self {
        let dir = Dir::new();
        let file = dir.write("offset", "+0");
        let library = library();
        let gateway = Gateway::start_with(dir, config, |command| {
            command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &file);
            command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        });
        Turned { gateway, file }
    }

    /// By so many seconds from the true time.
    fn turn(&self, seconds: i32) {
        // Renamed into place: a half-written file would be no offset at all.
        let new = self.file.with_extension("new");
        std::fs::write(&new, format!("{seconds:+}")).and_then(|()| std::fs::rename(&new, &self.file)).expect("a file");
    }

    fn offset(&self) -> f64 {
        self.gateway.metric("tidegate_clock_offset_seconds")
    }
}

fn library() -> String {
    let listed = Command::new("dpkg").args(["-L", "libfaketime"]).output().expect("dpkg runs");
    let files = String::from_utf8_lossy(&listed.stdout).into_owned();
    files.lines().find(|file| file.ends_with("libfaketime.so.1")).expect("install faketime").to_owned()
}

/// Answers with the target as the body, dated by the true time.
fn origin(cache_control: &'static str) -> Origin {
    Origin::start(move |request| {
        let now = httpdate::fmt_http_date(std::time::SystemTime::now());
        Script::ok(&[("Cache-Control", cache_control), ("Date", &now)], &request.target)
    })
}

fn config(origin: &Origin, redis: Option<&Redis>) -> String {
    let mut rest = "[log]\naccess = \"off\"\n".to_owned();
    if let Some(redis) = redis {
        rest.push_str(&format!(
            "[redis]\ndeadline = \"1s\"\nsecret = \"clock\"\n[redis.regions.default]\nendpoints = [\"{}\"]\n",
            redis.url()
        ));
    }
    one_route(origin.address, "cache = { mode = \"standard\" }", &rest)
}

fn is_remote(answer: &Answer) -> bool {
    answer.cache_status().contains("detail=\"remote")
}

#[test]
fn an_hour_ahead_or_behind_neither_ages_nor_rejuvenates_what_nodes_share() {
    let (redis, origin) = (Redis::start(), origin("max-age=8"));
    let config = config(&origin, Some(&redis));
    let (steady, turned) = (Gateway::start(&config), Turned::start(&config));
    for (round, seconds) in [3_600, -3_600, 0].into_iter().enumerate() {
        turned.turn(seconds);
        wait_for(|| (turned.offset() - f64::from(seconds)).abs() < 1.5, 5 * SECOND);
        let before = (origin.count(), redis.entries().len());
        let (one, two) = (format!("/{round}/by-steady"), format!("/{round}/by-turned"));
        assert!(!steady.get(&one, &[]).is_hit() && !turned.gateway.get(&two, &[]).is_hit());
        wait_for(|| redis.entries().len() == before.1 + 2, 5 * SECOND);
        // What each has stored is fresh for the other, and no older than it is.
        for answer in [turned.gateway.get(&one, &[]), steady.get(&two, &[])] {
            assert!(is_remote(&answer), "{seconds}: {}", answer.cache_status());
            let age: u64 = answer.field("age").and_then(|age| age.parse().ok()).expect("an age");
            assert!(age <= 6, "{seconds}: {age}");
        }
        // And stale, for both, when its time is over.
        std::thread::sleep(9 * SECOND);
        assert_eq!(origin.count(), before.0 + 2);
        for (n, target) in [&one, &two].into_iter().enumerate() {
            let answer = turned.gateway.get(target, &[]);
            assert_eq!((answer.status, answer.text()), (200, target.clone()));
            assert_eq!(origin.count(), before.0 + 3 + n, "{seconds}: what is over was served as if it were fresh");
        }
    }
    // From an hour ahead to an hour behind it stays off.
    let events = turned.gateway.process.stderr.events("clock_off");
    assert_eq!(events.len(), 1, "{events:?}");
    wait_for(|| turned.gateway.process.stderr.events("clock_back").len() == 1, 2 * SECOND);
}

#[test]
fn alone_a_jump_ends_nothing_that_is_stored_and_hinders_no_storing() {
    let origin = origin("max-age=60");
    let turned = Turned::start(&config(&origin, None));
    turned.gateway.get("/before", &[]);
    for seconds in [3_600, -3_600] {
        turned.turn(seconds);
        wait_for(|| (turned.offset() - f64::from(seconds)).abs() < 1.5, 5 * SECOND);
        let before = origin.count();
        assert!(turned.gateway.get("/before", &[]).is_hit());
        let during = format!("/{seconds}");
        turned.gateway.get(&during, &[]);
        let again = turned.gateway.get(&during, &[]);
        assert!(again.is_hit(), "{}", again.cache_status());
        assert!(
            again.field("age").is_some_and(|age| age.parse().is_ok_and(|age: u64| age < 5)),
            "{:?}",
            again.field("age")
        );
        assert_eq!(origin.count(), before + 1);
    }
}
