//! The scenarios: each stands its stage up, measures its cases in interleaved rounds, and says in a table what was seen.

use std::fmt::Write as _;
use std::path::Path;

use clap::ValueEnum;

use crate::client::Connection;
use crate::failure::Result;
use crate::load::Aim;
use crate::process::Scratch;
use crate::redis::Redis;
use crate::spread::Spread;
use crate::stage::{Form, Gateway, Measure, Origin, count};
use crate::tools::Tools;

const CONNECTIONS: usize = 64;

/// What can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// 90 % of the load on one key of one region, beside the same load spread evenly: how the servers share it
    HotRegion,
    /// Hits from Redis over one and over 16 servers, beside passing through to a static origin
    Remote,
    /// Small hits from Redis while bodies of 8 MiB are read from it too
    LargeBodies,
}

/// How scenarios are played.
pub(crate) struct Play<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) tidegate: &'a Path,
    pub(crate) rounds: usize,
    pub(crate) seconds: u64,
}

/// What is measured under one name.
struct Case<'a> {
    name: &'a str,
    gateway: &'a Gateway,
    aim: Aim,
    /// What is read from it under the load, about ten times a second.
    beside: Option<&'a [String]>,
}

/// A case's rounds.
struct Seen {
    name: String,
    rate: Spread,
    cpu_us: Spread,
    busy: Spread,
    p50_us: Spread,
    p99_us: Spread,
    requests: u64,
    asked: u64,
    /// Reads of each server over all rounds.
    reads: Vec<u64>,
}

impl Play<'_> {
    pub(crate) fn scenario(&self, scenario: Scenario) -> Result<String> {
        match scenario {
            Scenario::HotRegion => self.hot_region(),
            Scenario::Remote => self.remote(),
            Scenario::LargeBodies => self.large_bodies(),
        }
    }

    /// Lesson `hot-region`: small bodies, which fit the memory as soon as they are hot, and large ones, which never do.
    fn hot_region(&self) -> Result<String> {
        let scratch = Scratch::named("hot-region")?;
        let mut out = String::from("## hot-region\n\nFour Redis servers, 64 connections, a memory of 1 MiB.\n\n");
        for (what, bytes, keys) in [("1 KiB", 1 << 10, 10_000), ("900 KiB, more than the memory holds", 900 << 10, 40)]
        {
            let servers = self.servers(4, what, &scratch)?;
            let mut origin = Origin::start(&format!("origin-{bytes}"), bytes, self.tools, &scratch)?;
            let large = Origin::start(&format!("unused-{bytes}"), 1, self.tools, &scratch)?;
            let form = Form { name: &format!("gateway-{bytes}"), memory: "1MiB", servers: &servers, large: &large };
            let gateway = Gateway::start(&form, &origin, self.tidegate, self.tools, &scratch)?;
            let even = Aim { connections: CONNECTIONS, base: "/hit/key", keys, mostly: 0 };
            gateway.fill(&even.targets(), &mut origin)?;
            let cases = [
                Case { name: &format!("{what}: even"), gateway: &gateway, aim: even, beside: None },
                Case {
                    name: &format!("{what}: 90 % one key"),
                    gateway: &gateway,
                    aim: Aim { mostly: 90, ..even },
                    beside: None,
                },
            ];
            let seen = self.rounds(&cases, &servers, &mut origin, &scratch)?;
            out.push_str(&table(&seen, &servers));
            let ratio = seen[1].p99_us.median / seen[0].p99_us.median;
            writeln!(out, "\np99 with one hot key, as a ratio to that of the even load: {ratio:.2}\n")
                .expect("writing to a string does not fail");
        }
        Ok(out)
    }

    fn remote(&self) -> Result<String> {
        let scratch = Scratch::named("remote")?;
        let servers = self.servers(16, "redis", &scratch)?;
        let mut out = String::from("## remote\n\nHits from Redis over 64 connections, a memory of 1 MiB.\n\n");
        for (what, bytes, keys) in [("1 KiB", 1 << 10, 10_000), ("64 KiB", 64 << 10, 2_000)] {
            let mut origin = Origin::start(&format!("origin-{bytes}"), bytes, self.tools, &scratch)?;
            let large = Origin::start(&format!("unused-{bytes}"), 1, self.tools, &scratch)?;
            let start = |name: &str, servers: &[Redis], origin: &Origin| {
                let form = Form { name: &format!("{name}-{bytes}"), memory: "1MiB", servers, large: &large };
                Gateway::start(&form, origin, self.tidegate, self.tools, &scratch)
            };
            let (one, all) = (start("one", &servers[..1], &origin)?, start("all", &servers, &origin)?);
            let hit = Aim { connections: CONNECTIONS, base: "/hit/key", keys, mostly: 0 };
            one.fill(&hit.targets(), &mut origin)?;
            all.fill(&hit.targets(), &mut origin)?;
            let case = |name, gateway, base| Case { name, gateway, aim: Aim { base, ..hit }, beside: None };
            let names = ["pass-through", "1 server", "16 servers"].map(|name| format!("{what}: {name}"));
            let cases = [
                case(&names[0], &one, "/pass/key"),
                case(&names[1], &one, "/hit/key"),
                case(&names[2], &all, "/hit/key"),
            ];
            let seen = self.rounds(&cases, &servers, &mut origin, &scratch)?;
            out.push_str(&table(&seen, &[]));
            for hits in &seen[1..] {
                let (rate, cpu) = (hits.rate.median / seen[0].rate.median, seen[0].cpu_us.median / hits.cpu_us.median);
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
        let scratch = Scratch::named("large-bodies")?;
        let servers = self.servers(1, "redis", &scratch)?;
        let mut origin = Origin::start("origin", 1 << 10, self.tools, &scratch)?;
        let mut large = Origin::start("large", 8 << 20, self.tools, &scratch)?;
        let form = Form { name: "gateway", memory: "8MiB", servers: &servers, large: &large };
        let gateway = Gateway::start(&form, &origin, self.tidegate, self.tools, &scratch)?;
        // Few of so many are in memory, and of the large ones none fits it.
        let small = Aim { connections: CONNECTIONS, base: "/hit/key", keys: 40_000, mostly: 0 };
        gateway.fill(&small.targets(), &mut origin)?;
        let bodies: Vec<String> = (0..4).map(|n| format!("/large/{n}")).collect();
        gateway.fill(&bodies, &mut large)?;
        let cases = [
            Case { name: "1 KiB alone", gateway: &gateway, aim: small, beside: None },
            Case { name: "with bodies of 8 MiB beside", gateway: &gateway, aim: small, beside: Some(&bodies) },
        ];
        let seen = self.rounds(&cases, &servers, &mut origin, &scratch)?;
        let ratio = seen[1].p50_us.median / seen[0].p50_us.median;
        Ok(format!(
            "## large-bodies\n\nHits of 1 KiB from one Redis server, 64 connections; beside them, one body of 8 MiB at a time, about ten a \
             second.\n\n{}\np50 with large bodies, as a ratio to that without: {ratio:.2}\n",
            table(&seen, &servers)
        ))
    }

    fn servers(&self, count: usize, name: &str, scratch: &Scratch) -> Result<Vec<Redis>> {
        let name = name.split(|letter: char| !letter.is_ascii_alphanumeric()).next().unwrap_or_default();
        (0..count).map(|number| Redis::start(&format!("redis-{name}-{number}"), self.tools, scratch)).collect()
    }

    fn rounds(
        &self,
        cases: &[Case<'_>],
        servers: &[Redis],
        origin: &mut Origin,
        scratch: &Scratch,
    ) -> Result<Vec<Seen>> {
        let mut measures: Vec<Vec<Measure>> = cases.iter().map(|_| Vec::new()).collect();
        let mut reads = vec![vec![0; servers.len()]; cases.len()];
        for round in 0..=self.rounds {
            for place in 0..cases.len() {
                // Each round begins with another case, so that none always follows the same one.
                let turn = (place + round) % cases.len();
                let case = &cases[turn];
                let before = read(servers)?;
                // The first round warms up.
                let seconds = if round == 0 { 1 } else { self.seconds };
                let mut beside = Beside::new(case);
                let measure =
                    case.gateway.measure(case.aim, seconds, (self.tools, scratch), origin, || beside.ask())?;
                if round == 0 {
                    continue;
                }
                for (sum, (after, before)) in reads[turn].iter_mut().zip(read(servers)?.iter().zip(&before)) {
                    *sum += after - before;
                }
                eprintln!(
                    "{}: round {round}/{}, {:.0}/s, {:.1} us CPU a request, p50 {:?}, p99 {:?}",
                    case.name,
                    self.rounds,
                    measure.rate(),
                    measure.cpu_us,
                    measure.report.p50,
                    measure.report.p99
                );
                measures[turn].push(measure);
            }
        }
        let seen = cases.iter().zip(measures).zip(reads);
        Ok(seen.map(|((case, measures), reads)| Seen::of(case.name, &measures, reads)).collect())
    }
}

/// Reads large bodies while a load runs.
struct Beside<'a> {
    targets: &'a [String],
    client: Option<Connection>,
    next: usize,
}

impl<'a> Beside<'a> {
    fn new(case: &Case<'a>) -> Self {
        let client = case.beside.and_then(|_| Connection::open(case.gateway.address).ok());
        Beside { targets: case.beside.unwrap_or_default(), client, next: 0 }
    }

    /// Called every 10 ms: asks every tenth time.
    fn ask(&mut self) {
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

impl Seen {
    fn of(name: &str, measures: &[Measure], reads: Vec<u64>) -> Self {
        let spread = |of: fn(&Measure) -> f64| Spread::of(measures.iter().map(of)).unwrap_or_default();
        Seen {
            name: name.to_owned(),
            rate: spread(Measure::rate),
            cpu_us: spread(|measure| measure.cpu_us),
            busy: spread(|measure| measure.busy),
            p50_us: spread(|measure| measure.report.p50.as_secs_f64() * 1e6),
            p99_us: spread(|measure| measure.report.p99.as_secs_f64() * 1e6),
            requests: measures.iter().map(|measure| measure.report.requests).sum(),
            asked: measures.iter().map(|measure| measure.asked).sum(),
            reads,
        }
    }

    /// Of a thousand requests, those that were read from servers.
    fn remote(&self) -> f64 {
        count(self.reads.iter().sum::<u64>()) / count(self.requests)
    }
}

fn read(servers: &[Redis]) -> Result<Vec<u64>> {
    servers.iter().map(Redis::reads).collect()
}

/// Medians with their spread; with `servers`, how the reads were shared.
fn table(seen: &[Seen], servers: &[Redis]) -> String {
    let mut out = String::from(
        "| case | requests/s | CPU us/request | gateway's share of its core | p50 us | p99 us | reads of Redis per request | asked of the origin |",
    );
    out.push_str(if servers.len() > 1 { " busiest server to the mean |\n" } else { "\n" });
    let columns = if servers.len() > 1 { 9 } else { 8 };
    writeln!(out, "|{}", "---|".repeat(columns)).expect("writing to a string does not fail");
    for case in seen {
        let wide = |spread: Spread| format!("{:.0} ({:.0} to {:.0})", spread.median, spread.min, spread.max);
        let fine = |spread: Spread| format!("{:.1} ({:.1} to {:.1})", spread.median, spread.min, spread.max);
        write!(
            out,
            "| {} | {} | {} | {:.2} | {} | {} | {:.2} | {} |",
            case.name,
            wide(case.rate),
            fine(case.cpu_us),
            case.busy.median,
            wide(case.p50_us),
            wide(case.p99_us),
            case.remote(),
            case.asked
        )
        .expect("writing to a string does not fail");
        if servers.len() > 1 {
            let (all, most) = (case.reads.iter().sum::<u64>(), case.reads.iter().max().copied().unwrap_or_default());
            let ratio = count(most) * count(case.reads.len() as u64) / count(all.max(1));
            write!(out, " {ratio:.2} |").expect("writing to a string does not fail");
        }
        out.push('\n');
    }
    out
}
