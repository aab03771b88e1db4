//! Case `clock-drift`: two gateways whose wall clocks differ, and one whose clock jumps, under
//! shared entries and a cluster limit.

use std::time::{Duration, SystemTime};

use crate::case::fake_clock::FakeClock;
use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::load::{CaseLoad, run_all};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::servers::free_address::free_addresses;
use crate::servers::redis_server::RedisServer;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

const WAIT: Duration = Duration::from_secs(15);
/// The clocks of the two data centres differed by this much.
const FIELD_OFFSET: f64 = 1.2;
const LIFETIME: Duration = Duration::from_secs(8);
const RATE: f64 = 50.0;
const BURST: f64 = 20.0;

const CONFIG: &str = r#"
[log]
access = "off"
[redis]
deadline = "500ms"
secret = "field-case-secret"
nodes = 2
[redis.regions.default]
endpoints = ["@REDIS@"]
[limits.cluster]
tier = "cluster"
rate = "50/s"
burst = 20
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "limited"
match = { path = "/limited/*" }
upstream = "origin"
limits = ["cluster"]
cache = { mode = "off" }
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "origin"
"#;

/// Two gateways and what they share.
struct Clocks {
    _redis: RedisServer,
    origin: ScriptedOrigin,
    steady: CaseGateway,
    skewed: CaseGateway,
    clock: FakeClock,
}

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let keys = context.pick(100, 2_000);
    let clocks = Clocks::start(context)?;
    let mut report = CaseReport::new(format!(
        "Two gateways share Redis; libfaketime shifts the wall clock of one by {FIELD_OFFSET} s and by an hour, both ways. {keys} \
         entries with a lifetime of {} s, stored by either gateway, are read by the other before and after it. A cluster limit of \
         {RATE:.0}/s is loaded on both while the clock jumps.",
        LIFETIME.as_secs()
    ));
    clocks.shared_entries(keys, &mut report)?;
    clocks.jumps(&mut report)?;
    clocks.limit(&mut report)?;
    Ok(report)
}

impl Clocks {
    fn start(context: &CaseContext<'_>) -> Result<Self> {
        let redis = RedisServer::start("redis-clock-drift", context.tools, context.scratch)?;
        let origin = ScriptedOrigin::start(|_| {
            let now = httpdate::fmt_http_date(SystemTime::now());
            OriginAnswer::ok("ok\n")
                .field(&format!("Cache-Control: max-age={}", LIFETIME.as_secs()))
                .field(&format!("Date: {now}"))
        });
        let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
        let config = CONFIG.replace("@REDIS@", &redis.url()).replace("@ORIGIN@", &origin.address.to_string());
        let clock = FakeClock::new(context.scratch, "clock-drift", context.tidegate)?;
        let environment = clock.environment();
        let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        let steady = CaseGateway::start(context, "clock-steady", &config)?;
        let skewed = CaseGateway::start_at(context, ("clock-skewed", free_addresses()?), (&config, &environment))?;
        for gateway in [&steady, &skewed] {
            gateway.await_whole(WAIT)?;
        }
        Ok(Clocks { _redis: redis, origin, steady, skewed, clock })
    }

    /// Shifts the clock and waits until the gateway knows it.
    fn shift(&self, seconds: f64) -> Result<bool> {
        self.clock.set(seconds)?;
        let is_known = || {
            let offset = self.skewed.metric("tidegate_clock_offset_seconds")?;
            Ok(((offset - seconds).abs() < 0.5).then_some(()))
        };
        Ok(wait_for(WAIT, is_known)?.is_some())
    }

    fn get(&self, gateway: &CaseGateway, target: &str) -> Result<()> {
        let request = format!("GET {target} HTTP/1.1\r\nHost: shop.example\r\n\r\n");
        let response =
            gateway.client().send(request.as_bytes()).map_err(LoadtestError::io("a gateway does not respond"))?;
        if response.status == 200 {
            Ok(())
        } else {
            Err(LoadtestError::Load(format!("status {} of {target}", response.status)))
        }
    }

    /// Entries of either gateway are fresh for the other within their lifetime, and not after it.
    fn shared_entries(&self, keys: usize, report: &mut CaseReport) -> Result<()> {
        let known = self.shift(FIELD_OFFSET)?;
        report
            .check("the gateway measures the offset of its clock against Redis", (format!("{FIELD_OFFSET} s"), known));
        let sides = [(&self.steady, &self.skewed), (&self.skewed, &self.steady)];
        let target = |key: usize| format!("/drift/{key}");
        for key in 0..keys {
            self.get(sides[key % 2].0, &target(key))?;
        }
        // Writes to Redis are queued.
        std::thread::sleep(Duration::from_millis(500));
        let before = self.origin.requests();
        for key in 0..keys {
            self.get(sides[key % 2].1, &target(key))?;
        }
        let early = self.origin.requests() - before;
        std::thread::sleep(LIFETIME + Duration::from_millis(1_600));
        let before = self.origin.requests();
        for key in 0..keys {
            self.get(sides[key % 2].1, &target(key))?;
        }
        let late = keys as u64 - (self.origin.requests() - before);
        let share = 100.0 * (early + late) as f64 / (2 * keys) as f64;
        report.check(
            "with clocks 1.2 s apart, no entry expires early and none is served late",
            (format!("{early} early and {late} late of {keys}: {share:.1} % disagree"), early + late == 0),
        );
        Ok(())
    }

    /// A jump of an hour neither expires a stored response nor keeps one.
    fn jumps(&self, report: &mut CaseReport) -> Result<()> {
        let mut expired = 0;
        for (round, seconds) in [3_600.0, -3_600.0].into_iter().enumerate() {
            self.shift(0.0)?;
            let target = format!("/jump/{round}");
            self.get(&self.skewed, &target)?;
            self.clock.set(seconds)?;
            let before = self.origin.requests();
            for _ in 0..10 {
                self.get(&self.skewed, &target)?;
            }
            expired += self.origin.requests() - before;
        }
        report.check(
            "a jump of an hour, forward and back, expires nothing",
            (format!("{expired} of 20 requests reached the origin"), expired == 0),
        );
        self.shift(0.0)?;
        Ok(())
    }

    /// The clock jumps while both gateways are loaded above the limit of the cluster.
    fn limit(&self, report: &mut CaseReport) -> Result<()> {
        let time = Duration::from_secs(4);
        let load = |gateway: &CaseGateway| CaseLoad::new(gateway.address, "/limited/a", (2.0 * RATE, time));
        let jumps = std::thread::scope(|scope| {
            let jumps = scope.spawn(|| {
                [3_600.0, -3_600.0, 0.0].into_iter().try_for_each(|seconds| {
                    std::thread::sleep(time / 4);
                    self.clock.set(seconds)
                })
            });
            let reports = run_all(&[load(&self.steady), load(&self.skewed)]);
            jumps.join().map_err(|_| LoadtestError::Load("the jumps panicked".to_owned()))??;
            reports
        })?;
        let admitted: u64 = jumps.iter().map(|report| report.good).sum();
        let most = (RATE * (time.as_secs_f64() + 0.5) + BURST) as u64;
        report.check(
            "the clock's jumps do not open the limit: both admit rate * t + burst at most",
            (
                format!("{admitted} of {:.0} offered, at most {most}", 4.0 * RATE * time.as_secs_f64()),
                admitted <= most && admitted >= most / 2,
            ),
        );
        Ok(())
    }
}
