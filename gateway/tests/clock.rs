//! Two gateways share Redis, and the wall clock of one jumps by an hour in both directions.
//!
//! `faketime` shifts the wall clock of a real process. Its monotonic clock is unchanged, as on a
//! machine whose wall clock is set.

mod support;

#[path = "support/redis.rs"]
mod server;

use std::process::Command;
use std::time::Duration;

use server::Redis;
use support::{ClientResponse, Gateway, Origin, Script, TempDir, one_route, wait_for};

const SECOND: Duration = Duration::from_secs(1);

/// A gateway whose wall clock a test shifts.
struct SkewedGateway {
    gateway: Gateway,
    file: std::path::PathBuf,
}

impl SkewedGateway {
    fn start(config: &str) -> Self {
        let dir = TempDir::new();
        let file = dir.write("offset", "+0");
        let library = library();
        let gateway = Gateway::start_with(dir, config, |command| {
            command.env("LD_PRELOAD", &library).env("FAKETIME_TIMESTAMP_FILE", &file);
            command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        });
        SkewedGateway { gateway, file }
    }

    /// Sets the wall clock to this many seconds from the true time.
    fn set_offset(&self, seconds: i32) {
        // Renamed into place: a partly written file has no valid offset.
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

/// Responds with the target as the body and the true time as `Date`.
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

fn is_remote_hit(response: &ClientResponse) -> bool {
    response.cache_status().contains("detail=\"remote")
}

#[test]
fn clock_skew_of_an_hour_does_not_change_the_age_of_shared_entries() {
    let (redis, origin) = (Redis::start(), origin("max-age=8"));
    let config = config(&origin, Some(&redis));
    let (steady, skewed) = (Gateway::start(&config), SkewedGateway::start(&config));
    for (round, seconds) in [3_600, -3_600, 0].into_iter().enumerate() {
        skewed.set_offset(seconds);
        wait_for(|| (skewed.offset() - f64::from(seconds)).abs() < 1.5, 5 * SECOND);
        let before = (origin.count(), redis.entries().len());
        let (one, two) = (format!("/{round}/by-steady"), format!("/{round}/by-skewed"));
        assert!(!steady.get(&one, &[]).is_hit() && !skewed.gateway.get(&two, &[]).is_hit());
        wait_for(|| redis.entries().len() == before.1 + 2, 5 * SECOND);
        // An entry stored by either gateway is fresh for the other, with its true age.
        for response in [skewed.gateway.get(&one, &[]), steady.get(&two, &[])] {
            assert!(is_remote_hit(&response), "{seconds}: {}", response.cache_status());
            let age: u64 = response.field("age").and_then(|age| age.parse().ok()).expect("an age");
            assert!(age <= 6, "{seconds}: {age}");
        }
        // It is stale for both after its lifetime.
        std::thread::sleep(9 * SECOND);
        assert_eq!(origin.count(), before.0 + 2);
        for (n, target) in [&one, &two].into_iter().enumerate() {
            let response = skewed.gateway.get(target, &[]);
            assert_eq!((response.status, response.text()), (200, target.clone()));
            assert_eq!(origin.count(), before.0 + 3 + n, "{seconds}: a stale entry was served as fresh");
        }
    }
    // The clock stays wrong from an hour ahead to an hour behind: one event.
    let events = skewed.gateway.process.stderr.events("clock_skewed");
    assert_eq!(events.len(), 1, "{events:?}");
    wait_for(|| skewed.gateway.process.stderr.events("clock_recovered").len() == 1, 2 * SECOND);
}

#[test]
fn clock_jump_without_redis_expires_nothing_and_storing_continues() {
    let origin = origin("max-age=60");
    let skewed = SkewedGateway::start(&config(&origin, None));
    skewed.gateway.get("/before", &[]);
    for seconds in [3_600, -3_600] {
        skewed.set_offset(seconds);
        wait_for(|| (skewed.offset() - f64::from(seconds)).abs() < 1.5, 5 * SECOND);
        let before = origin.count();
        assert!(skewed.gateway.get("/before", &[]).is_hit());
        let during = format!("/{seconds}");
        skewed.gateway.get(&during, &[]);
        let again = skewed.gateway.get(&during, &[]);
        assert!(again.is_hit(), "{}", again.cache_status());
        assert!(
            again.field("age").is_some_and(|age| age.parse().is_ok_and(|age: u64| age < 5)),
            "{:?}",
            again.field("age")
        );
        assert_eq!(origin.count(), before + 1);
    }
}
