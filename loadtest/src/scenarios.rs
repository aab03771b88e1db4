//! The scenarios: each starts its processes, measures its cases in interleaved rounds, and reports
//! a table.
//!
//! `testbed` has the processes of the scenarios with Redis; `knee`, `features` and `floods` (with
//! the frames of `h2_frames`) are scenarios with processes of their own.

mod testbed;
mod knee;
mod h2_frames;
mod floods;
mod features;

use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum;

use crate::bench::client::CheckConnection;
use crate::error::Result;
use crate::load::wrk::{LoadProfile, WrkRun};
use crate::process::child::ScratchDirectory;
use crate::process::tools::Tools;
use crate::scenarios::floods::FloodScenario;
use crate::scenarios::testbed::{GatewayProcess, GatewaySetup, Measurement, OriginProcess, as_f64};
use crate::servers::redis_server::RedisServer;
use crate::spread::Spread;

const CONNECTIONS: usize = 64;

/// A scenario of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// 90 % of the load on one key of a region, compared with the same load spread evenly
    HotRegion,
    /// Hits from Redis with 1 and with 16 servers, compared with pass-through to a static origin
    Remote,
    /// Small hits from Redis while bodies of 8 MiB are read from it
    LargeBodies,
    /// Loads up to three times the capacity of a pool of workers, with and without the concurrency
    /// limit
    Knee,
    /// A client's times while others flood the gateway with HTTP/2 frames
    Floods,
    /// Instructions of a request with features off, on for other routes, and on
    Features,
}

/// Runs scenarios with the same programs, number of rounds, and seconds of load per round.
pub(crate) struct ScenarioRunner<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) tidegate: &'a Path,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

/// One measured case of a scenario.
struct ScenarioCase<'a> {
    name: &'a str,
    gateway: &'a GatewayProcess,
    profile: LoadProfile,
    /// Large bodies that are read during the load, about ten per second.
    background_targets: Option<&'a [String]>,
}

/// Processes behind the gateways of a scenario.
struct ScenarioBackends<'a> {
    servers: &'a [RedisServer],
    origin: &'a mut OriginProcess,
    scratch: &'a ScratchDirectory,
}

/// Figures of all rounds of a case.
struct CaseResult {
    name: String,
    rate: Spread,
    cpu_us: Spread,
    cpu_share: Spread,
    p50_us: Spread,
    p99_us: Spread,
    requests: u64,
    origin_requests: u64,
    /// Reads of each Redis server over all rounds.
    reads: Vec<u64>,
}

impl ScenarioRunner<'_> {
    pub(crate) fn run(&self, scenario: Scenario) -> Result<String> {
        match scenario {
            Scenario::HotRegion => self.hot_region(),
            Scenario::Remote => self.remote(),
            Scenario::LargeBodies => self.large_bodies(),
            Scenario::Knee => knee::run(self.tools, self.tidegate, self.seconds),
            Scenario::Floods => {
                let ScenarioRunner { tools, tidegate, rounds, seconds } = *self;
                FloodScenario { tools, tidegate, rounds, seconds }.run()
            }
            Scenario::Features => features::run(self.tools, self.tidegate),
        }
    }

    /// Lesson `hot-region`: small bodies, which fit into memory once they are hot, and large ones,
    /// which do not.
    fn hot_region(&self) -> Result<String> {
        let scratch = ScratchDirectory::named("hot-region")?;
        let mut out = String::from("## hot-region\n\nFour Redis servers, 64 connections, a memory of 1 MiB.\n\n");
        for (what, bytes, keys) in [("1 KiB", 1 << 10, 10_000), ("900 KiB, larger than the memory", 900 << 10, 40)] {
            let servers = self.servers(4, what, &scratch)?;
            let mut origin = OriginProcess::start(&format!("origin-{bytes}"), bytes, self.tools, &scratch)?;
            let large = OriginProcess::start(&format!("unused-{bytes}"), 1, self.tools, &scratch)?;
            let setup = GatewaySetup {
                tidegate: self.tidegate,
                name: &format!("gateway-{bytes}"),
                memory: "1MiB",
                servers: &servers,
                large: &large,
            };
            let gateway = GatewayProcess::start(&setup, &origin, self.tools, &scratch)?;
            let even = LoadProfile { connections: CONNECTIONS, base: "/hit/key", keys, hot_percent: 0 };
            gateway.fill(&even.targets(), &mut origin)?;
            let cases = [
                ScenarioCase {
                    name: &format!("{what}: even"),
                    gateway: &gateway,
                    profile: even,
                    background_targets: None,
                },
                ScenarioCase {
                    name: &format!("{what}: 90 % one key"),
                    gateway: &gateway,
                    profile: LoadProfile { hot_percent: 90, ..even },
                    background_targets: None,
                },
            ];
            let results =
                self.measure(&cases, ScenarioBackends { servers: &servers, origin: &mut origin, scratch: &scratch })?;
            out.push_str(&table(&results, &servers));
            let ratio = results[1].p99_us.median / results[0].p99_us.median;
            writeln!(out, "\np99 with one hot key, as a ratio to that of the even load: {ratio:.2}\n")
                .expect("writing to a string does not fail");
        }
        Ok(out)
    }

    fn remote(&self) -> Result<String> {
        let scratch = ScratchDirectory::named("remote")?;
        let servers = self.servers(16, "redis", &scratch)?;
        let mut out = String::from("## remote\n\nHits from Redis over 64 connections, a memory of 1 MiB.\n\n");
        for (what, bytes, keys) in [("1 KiB", 1 << 10, 10_000), ("64 KiB", 64 << 10, 2_000)] {
            let mut origin = OriginProcess::start(&format!("origin-{bytes}"), bytes, self.tools, &scratch)?;
            let large = OriginProcess::start(&format!("unused-{bytes}"), 1, self.tools, &scratch)?;
            let start = |name: &str, servers: &[RedisServer], origin: &OriginProcess| {
                let setup = GatewaySetup {
                    tidegate: self.tidegate,
                    name: &format!("{name}-{bytes}"),
                    memory: "1MiB",
                    servers,
                    large: &large,
                };
                GatewayProcess::start(&setup, origin, self.tools, &scratch)
            };
            let (one, all) = (start("one", &servers[..1], &origin)?, start("all", &servers, &origin)?);
            let hit = LoadProfile { connections: CONNECTIONS, base: "/hit/key", keys, hot_percent: 0 };
            one.fill(&hit.targets(), &mut origin)?;
            all.fill(&hit.targets(), &mut origin)?;
            let case = |name, gateway, base| ScenarioCase {
                name,
                gateway,
                profile: LoadProfile { base, ..hit },
                background_targets: None,
            };
            let names = ["pass-through", "1 server", "16 servers"].map(|name| format!("{what}: {name}"));
            let cases = [
                case(&names[0], &one, "/pass/key"),
                case(&names[1], &one, "/hit/key"),
                case(&names[2], &all, "/hit/key"),
            ];
            let results =
                self.measure(&cases, ScenarioBackends { servers: &servers, origin: &mut origin, scratch: &scratch })?;
            out.push_str(&table(&results, &[]));
            for hits in &results[1..] {
                let (rate, cpu) =
                    (hits.rate.median / results[0].rate.median, results[0].cpu_us.median / hits.cpu_us.median);
                writeln!(
                    out,
                    "\n{}, to pass-through: {rate:.2} of the rate, {cpu:.2} by CPU time per request",
                    hits.name
                )
                .expect("writing to a string does not fail");
            }
            out.push('\n');
        }
        Ok(out)
    }

    fn large_bodies(&self) -> Result<String> {
        let scratch = ScratchDirectory::named("large-bodies")?;
        let servers = self.servers(1, "redis", &scratch)?;
        let mut origin = OriginProcess::start("origin", 1 << 10, self.tools, &scratch)?;
        let mut large = OriginProcess::start("large", 8 << 20, self.tools, &scratch)?;
        let setup =
            GatewaySetup { tidegate: self.tidegate, name: "gateway", memory: "8MiB", servers: &servers, large: &large };
        let gateway = GatewayProcess::start(&setup, &origin, self.tools, &scratch)?;
        // Memory holds a few of the small keys and none of the large ones.
        let small = LoadProfile { connections: CONNECTIONS, base: "/hit/key", keys: 40_000, hot_percent: 0 };
        gateway.fill(&small.targets(), &mut origin)?;
        let bodies: Vec<String> = (0..4).map(|n| format!("/large/{n}")).collect();
        gateway.fill(&bodies, &mut large)?;
        let cases = [
            ScenarioCase { name: "1 KiB alone", gateway: &gateway, profile: small, background_targets: None },
            ScenarioCase {
                name: "with concurrent bodies of 8 MiB",
                gateway: &gateway,
                profile: small,
                background_targets: Some(&bodies),
            },
        ];
        let results =
            self.measure(&cases, ScenarioBackends { servers: &servers, origin: &mut origin, scratch: &scratch })?;
        let ratio = results[1].p50_us.median / results[0].p50_us.median;
        Ok(format!(
            "## large-bodies\n\nHits of 1 KiB from one Redis server, 64 connections; concurrently one body of 8 MiB at a time, about ten \
             per second.\n\n{}\np50 with large bodies, as a ratio to that without: {ratio:.2}\n",
            table(&results, &servers)
        ))
    }

    fn servers(&self, count: usize, name: &str, scratch: &ScratchDirectory) -> Result<Vec<RedisServer>> {
        let name = name.split(|letter: char| !letter.is_ascii_alphanumeric()).next().unwrap_or_default();
        (0..count).map(|number| RedisServer::start(&format!("redis-{name}-{number}"), self.tools, scratch)).collect()
    }

    fn measure(&self, cases: &[ScenarioCase<'_>], backends: ScenarioBackends<'_>) -> Result<Vec<CaseResult>> {
        let ScenarioBackends { servers, origin, scratch } = backends;
        let mut measurements: Vec<Vec<Measurement>> = cases.iter().map(|_| Vec::new()).collect();
        let mut reads = vec![vec![0; servers.len()]; cases.len()];
        for round in 0..=self.rounds {
            for position in 0..cases.len() {
                // Rotates the order, so that no case always follows the same one.
                let index = (position + round) % cases.len();
                let case = &cases[index];
                let before = read_counts(servers)?;
                // Round 0 warms up.
                let seconds = if round == 0 { 1 } else { self.seconds };
                let wrk = WrkRun { tools: self.tools, scratch, profile: case.profile, seconds, counter: None };
                let mut reader = LargeBodyReader::new(case);
                let measurement = case.gateway.measure(wrk, origin, || reader.tick())?;
                if round == 0 {
                    continue;
                }
                for (sum, (after, before)) in reads[index].iter_mut().zip(read_counts(servers)?.iter().zip(&before)) {
                    *sum += after - before;
                }
                eprintln!(
                    "{}: round {round}/{}, {:.0}/s, {:.1} us CPU a request, p50 {:?}, p99 {:?}",
                    case.name,
                    self.rounds,
                    measurement.rate(),
                    measurement.cpu_us,
                    measurement.report.p50,
                    measurement.report.p99
                );
                measurements[index].push(measurement);
            }
        }
        let results = cases.iter().zip(measurements).zip(reads);
        Ok(results.map(|((case, measurements), reads)| CaseResult::of(case.name, &measurements, reads)).collect())
    }
}

/// Requests a large body on every tenth tick of the load, on the measuring thread.
struct LargeBodyReader<'a> {
    targets: &'a [String],
    client: Option<CheckConnection>,
    next: usize,
}

impl<'a> LargeBodyReader<'a> {
    fn new(case: &ScenarioCase<'a>) -> Self {
        let client = case.background_targets.and_then(|_| CheckConnection::open(case.gateway.address).ok());
        LargeBodyReader { targets: case.background_targets.unwrap_or_default(), client, next: 0 }
    }

    /// Called every 10 ms; sends a request on every tenth call.
    fn tick(&mut self) {
        self.next += 1;
        if self.next.is_multiple_of(10)
            && let Some(client) = &mut self.client
            && let Err(error) = client.get(&self.targets[self.next / 10 % self.targets.len()])
        {
            eprintln!("a large body: {error}");
            self.client = None;
        }
    }
}

impl CaseResult {
    fn of(name: &str, measurements: &[Measurement], reads: Vec<u64>) -> Self {
        let spread = |of: fn(&Measurement) -> f64| Spread::of(measurements.iter().map(of)).unwrap_or_default();
        CaseResult {
            name: name.to_owned(),
            rate: spread(Measurement::rate),
            cpu_us: spread(|measurement| measurement.cpu_us),
            cpu_share: spread(|measurement| measurement.cpu_share),
            p50_us: spread(|measurement| measurement.report.p50.as_secs_f64() * 1e6),
            p99_us: spread(|measurement| measurement.report.p99.as_secs_f64() * 1e6),
            requests: measurements.iter().map(|measurement| measurement.report.requests).sum(),
            origin_requests: measurements.iter().map(|measurement| measurement.origin_requests).sum(),
            reads,
        }
    }

    /// Reads from Redis per request.
    fn reads_per_request(&self) -> f64 {
        as_f64(self.reads.iter().sum::<u64>()) / as_f64(self.requests)
    }
}

fn read_counts(servers: &[RedisServer]) -> Result<Vec<u64>> {
    servers.iter().map(RedisServer::reads).collect()
}

/// Table of medians with their spread; with several `servers`, also the distribution of reads.
fn table(results: &[CaseResult], servers: &[RedisServer]) -> String {
    let mut out = String::from(
        "| case | requests/s | CPU us/request | gateway CPU share of its core | p50 us | p99 us | Redis reads per request | origin requests |",
    );
    out.push_str(if servers.len() > 1 { " busiest server relative to the mean |\n" } else { "\n" });
    let columns = if servers.len() > 1 { 9 } else { 8 };
    writeln!(out, "|{}", "---|".repeat(columns)).expect("writing to a string does not fail");
    for case in results {
        let integer = |spread: Spread| format!("{:.0} ({:.0} to {:.0})", spread.median, spread.min, spread.max);
        let decimal = |spread: Spread| format!("{:.1} ({:.1} to {:.1})", spread.median, spread.min, spread.max);
        write!(
            out,
            "| {} | {} | {} | {:.2} | {} | {} | {:.2} | {} |",
            case.name,
            integer(case.rate),
            decimal(case.cpu_us),
            case.cpu_share.median,
            integer(case.p50_us),
            integer(case.p99_us),
            case.reads_per_request(),
            case.origin_requests
        )
        .expect("writing to a string does not fail");
        if servers.len() > 1 {
            let (all, most) = (case.reads.iter().sum::<u64>(), case.reads.iter().max().copied().unwrap_or_default());
            let ratio = as_f64(most) * as_f64(case.reads.len() as u64) / as_f64(all.max(1));
            write!(out, " {ratio:.2} |").expect("writing to a string does not fail");
        }
        out.push('\n');
    }
    out
}
