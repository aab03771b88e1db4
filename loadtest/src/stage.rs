//! What a scenario needs to stand: origins, Redis servers, gateways; and one measurement of a gateway.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::check::Counter;
use crate::client::Connection;
use crate::failure::{Failure, Result};
use crate::launch::{fill, free_addresses, this_program};
use crate::load::{Aim, Load, Report};
use crate::origin;
use crate::process::{Running, Scratch};
use crate::redis::Redis;
use crate::tools::{LOAD_CORE, SERVER_CORE, Tools};
use crate::usage;

const GATEWAY: &str = include_str!("../peers/remote.toml");
const PATIENCE: Duration = Duration::from_secs(20);
/// How often all keys are asked for until none is missing: what is queued for a server may be dropped.
const FILLS_MAX: usize = 20;

/// An origin whose bodies have one length.
pub(crate) struct Origin {
    address: SocketAddr,
    body_bytes: usize,
    counter: Counter,
    _process: Running,
}

/// What a gateway is to be like.
pub(crate) struct Form<'a> {
    pub(crate) name: &'a str,
    pub(crate) memory: &'a str,
    pub(crate) servers: &'a [Redis],
    /// What `/large/` asks.
    pub(crate) large: &'a Origin,
}

pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    process: Running,
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Measure {
    pub(crate) report: Report,
    pub(crate) cpu_us: f64,
    /// Share of the time in which the gateway ran.
    pub(crate) busy: f64,
    /// How often the origin was asked meanwhile.
    pub(crate) asked: u64,
}

impl Origin {
    pub(crate) fn start(name: &str, body_bytes: usize, tools: &Tools, scratch: &Scratch) -> Result<Self> {
        let [address] = free_addresses()?;
        let mut command = tools.pinned(LOAD_CORE, &this_program()?);
        command.args(["origin", "--listen", &address.to_string(), "--body-bytes", &body_bytes.to_string()]);
        let mut process = Running::start(name, command, scratch)?;
        process.await_ready(PATIENCE, || Counter::open(address).is_ok())?;
        Ok(Origin { address, body_bytes, counter: Counter::open(address)?, _process: process })
    }
}

impl Gateway {
    pub(crate) fn start(
        form: &Form<'_>,
        origin: &Origin,
        tidegate: &Path,
        tools: &Tools,
        scratch: &Scratch,
    ) -> Result<Self> {
        let [address, admin] = free_addresses()?;
        let mut endpoints = String::new();
        for server in form.servers {
            write!(endpoints, "{:?}, ", server.url()).expect("writing to a string does not fail");
        }
        let values = [
            ("LISTEN", address.to_string()),
            ("ADMIN", admin.to_string()),
            ("ENDPOINTS", endpoints),
            ("MEMORY", form.memory.to_owned()),
            ("ORIGIN", origin.address.to_string()),
            ("LARGE", form.large.address.to_string()),
        ];
        let text = fill(GATEWAY, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = scratch.write(&format!("{}.toml", form.name), &text)?;
        let mut command = tools.pinned(SERVER_CORE, tidegate);
        command.arg("run").arg("--config").arg(file);
        let mut process = Running::start(form.name, command, scratch)?;
        process.await_ready(PATIENCE, || {
            Connection::open(address)
                .and_then(|mut client| client.get("/pass/ready"))
                .is_ok_and(|answer| answer.status == 200)
        })?;
        Ok(Gateway { address, process })
    }

    /// Asks for every target until the origin is not asked any more; compares every answer.
    pub(crate) fn fill(&self, targets: &[String], origin: &mut Origin) -> Result<()> {
        let expected = origin::body(origin.body_bytes);
        let mut client = Connection::open(self.address).map_err(Failure::io("the gateway does not accept"))?;
        for _ in 0..FILLS_MAX {
            let before = origin.counter.settled()?;
            for target in targets {
                let answer = client.get(target).map_err(Failure::io(format!("the gateway at {target}")))?;
                let is_tagged = answer.etag.as_deref() == Some(&origin::etag(target.as_bytes()));
                if answer.status != 200 || answer.body != expected || !is_tagged {
                    let what = format!("status {}, {} bytes", answer.status, answer.body.len());
                    return Err(Failure::Wrong { peer: "tidegate".to_owned(), target: target.clone(), what });
                }
            }
            if origin.counter.settled()? == before {
                return Ok(());
            }
        }
        Err(Failure::Load("not all keys come to be stored".to_owned()))
    }

    /// Loads it for some seconds, and calls `meanwhile` again and again.
    pub(crate) fn measure(
        &self,
        aim: Aim,
        seconds: u64,
        (tools, scratch): (&Tools, &Scratch),
        origin: &mut Origin,
        meanwhile: impl FnMut(),
    ) -> Result<Measure> {
        let asked = origin.counter.settled()?;
        let (cpu, began) = (usage::of_tree(self.process.pid())?, Instant::now());
        let report = Load { tools, scratch, aim }.run(self.address, seconds, meanwhile)?;
        let (cpu, elapsed) = (usage::of_tree(self.process.pid())?.since(cpu), began.elapsed());
        let asked = origin.counter.settled()? - asked;
        if report.refused + report.broken > 0 {
            return Err(Failure::Load(format!("{report:?}")));
        }
        let cpu_us = cpu.total().as_secs_f64() * 1e6 / count(report.requests);
        Ok(Measure { report, cpu_us, busy: cpu.total().as_secs_f64() / elapsed.as_secs_f64(), asked })
    }
}

impl Measure {
    /// Requests per second.
    pub(crate) fn rate(&self) -> f64 {
        count(self.report.requests) / self.report.duration.as_secs_f64()
    }
}

/// Exact below 2^53, which no load reaches.
#[expect(clippy::cast_precision_loss)]
pub(crate) fn count(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_has_no_blank_that_nobody_fills() {
        let names = ["LISTEN", "ADMIN", "ENDPOINTS", "MEMORY", "ORIGIN", "LARGE"];
        let filled = fill(GATEWAY, &names.map(|name| (name, "x")));
        assert_eq!(filled.replace("@NAME@", "").matches('@').count(), 0, "{filled}");
    }
}
