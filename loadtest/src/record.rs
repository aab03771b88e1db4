//! The figures that are kept: one entry for each workload, replaced only when that workload is measured again.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bench::{Comparison, Measured, Sample};
use crate::goal::YARDSTICKS;
use crate::machine::Run;
use crate::spread::Spread;
use crate::workload::Workload;

/// Changes when an older file can no longer be read.
const FORMAT: u32 = 1;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    format: u32,
    pub(crate) workloads: Vec<Entry>,
}

/// One workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) run: Run,
    pub(crate) peers: Vec<Figures>,
    /// Peers that cannot do this, each with the reason.
    pub(crate) left_out: BTreeMap<String, String>,
}

/// One peer under one workload: spreads over the rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) name: String,
    pub(crate) requests_per_second: Spread,
    pub(crate) cpu_us_per_request: Spread,
    pub(crate) user_us_per_request: Spread,
    pub(crate) system_us_per_request: Spread,
    pub(crate) p50_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) server_share_of_core: Spread,
    pub(crate) others_share_of_core: Spread,
    pub(crate) errors: u64,
    pub(crate) ratio_to: BTreeMap<String, Ratio>,
    pub(crate) rounds: Vec<Round>,
}

/// Above 1 is better than the yardstick.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    pub(crate) cpu: Spread,
    pub(crate) requests_per_second: Spread,
}

/// One round as it was counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Round {
    requests: u64,
    bytes: u64,
    duration_us: u64,
    user_us: u64,
    system_us: u64,
    others_us: u64,
    p50_us: u64,
    p99_us: u64,
    errors: u64,
}

impl Default for Record {
    fn default() -> Self {
        Record { format: FORMAT, workloads: Vec::new() }
    }
}

impl Record {
    /// Reads an earlier record. Workloads that are no longer measured are dropped.
    pub(crate) fn parse(text: &str) -> serde_json::Result<Self> {
        let mut record: Record = serde_json::from_str(text)?;
        if record.format != FORMAT {
            let format = record.format;
            return Err(serde::de::Error::custom(format_args!("format {format} is not {FORMAT}")));
        }
        record.workloads.retain(|entry| entry.workload().is_some());
        Ok(record)
    }

    /// Takes the place of the same workload's earlier figures.
    pub(crate) fn put(&mut self, entry: Entry) {
        self.workloads.retain(|earlier| earlier.name != entry.name);
        self.workloads.push(entry);
        self.workloads.sort_by_key(Entry::workload);
    }
}

impl Entry {
    pub(crate) fn new(comparison: &Comparison, run: &Run) -> Self {
        let left_out = comparison.left_out.iter().map(|(peer, why)| (peer.name().to_owned(), why.clone()));
        Entry {
            name: comparison.workload.name().to_owned(),
            run: run.clone(),
            peers: comparison.peers.iter().map(|measured| Figures::new(measured, comparison)).collect(),
            left_out: left_out.collect(),
        }
    }

    pub(crate) fn workload(&self) -> Option<Workload> {
        Workload::value_variants().iter().copied().find(|workload| workload.name() == self.name)
    }

    pub(crate) fn peer(&self, name: &str) -> Option<&Figures> {
        self.peers.iter().find(|figures| figures.name == name)
    }

    pub(crate) fn errors(&self) -> u64 {
        self.peers.iter().map(|figures| figures.errors).sum()
    }
}

impl Figures {
    fn new(measured: &Measured, comparison: &Comparison) -> Self {
        let of = |figure: fn(&Sample) -> f64| spread(measured.samples.iter().map(figure));
        let yardsticks = comparison.peers.iter().filter(|other| YARDSTICKS.contains(&other.peer));
        Figures {
            name: measured.peer.name().to_owned(),
            requests_per_second: of(Sample::rate),
            cpu_us_per_request: of(Sample::cpu_per_request),
            user_us_per_request: of(Sample::user_per_request),
            system_us_per_request: of(Sample::system_per_request),
            p50_us: of(|sample| sample.report.p50.as_secs_f64() * 1e6),
            p99_us: of(|sample| sample.report.p99.as_secs_f64() * 1e6),
            server_share_of_core: of(Sample::busy),
            others_share_of_core: of(Sample::disturbed),
            errors: measured.samples.iter().map(|sample| sample.errors).sum(),
            ratio_to: yardsticks.map(|other| (other.peer.name().to_owned(), Ratio::new(measured, other))).collect(),
            rounds: measured.samples.iter().map(Round::new).collect(),
        }
    }
}

impl Ratio {
    /// Ratios are drawn within rounds, since a round's noise hits all peers.
    fn new(measured: &Measured, yardstick: &Measured) -> Self {
        let rounds = || measured.samples.iter().zip(&yardstick.samples);
        Ratio {
            cpu: spread(rounds().map(|(sample, yardstick)| yardstick.cpu_per_request() / sample.cpu_per_request())),
            requests_per_second: spread(rounds().map(|(sample, yardstick)| sample.rate() / yardstick.rate())),
        }
    }
}

impl Round {
    fn new(sample: &Sample) -> Self {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        Round {
            requests: sample.report.requests,
            bytes: sample.report.bytes,
            duration_us: us(sample.report.duration),
            user_us: us(sample.cpu.user),
            system_us: us(sample.cpu.system),
            others_us: us(sample.others),
            p50_us: us(sample.report.p50),
            p99_us: us(sample.report.p99),
            errors: sample.errors,
        }
    }
}

/// There is at least one round, in which something was answered; otherwise the figure is 0.
fn spread(values: impl Iterator<Item = f64>) -> Spread {
    Spread::of(values.filter(|value| value.is_finite())).unwrap_or_default().rounded()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::load::Report;
    use crate::peer::Peer;
    use crate::usage::Cpu;

    /// A round of one second and 1,000 requests; `cpu` in milliseconds is then also microseconds per request.
    fn round(cpu: u64) -> Sample {
        let second = Duration::from_secs(1);
        let report =
            Report { requests: 1_000, bytes: 0, duration: second, p50: second, p99: second, refused: 0, broken: 0 };
        let cpu = Cpu { user: Duration::from_millis(cpu), system: Duration::ZERO };
        Sample { report, errors: 0, cpu, others: Duration::ZERO, elapsed: second }
    }

    fn run(commit: &str) -> Run {
        Run {
            date: "Tue, 24 Nov 2026 02:00:00 GMT".to_owned(),
            commit: commit.to_owned(),
            has_changes: false,
            command: "loadtest bench".to_owned(),
            rounds: 3,
            seconds: 1,
            machine: BTreeMap::from([("kernel".to_owned(), "6.1".to_owned())]),
            versions: BTreeMap::from([("nginx".to_owned(), "nginx/1.22.1".to_owned())]),
        }
    }

    /// Tidegate at twice nginx, with a spread from 1.5 to 4.
    pub(crate) fn entry(workload: Workload, commit: &str) -> Entry {
        let measured = |peer, cpus: [u64; 3]| Measured { peer, samples: cpus.map(round).to_vec() };
        let peers = vec![measured(Peer::Nginx, [10, 20, 12]), measured(Peer::Tidegate, [5, 5, 8])];
        let left_out = vec![(Peer::Varnish, "it cannot".to_owned())];
        Entry::new(&Comparison { workload, peers, left_out }, &run(commit))
    }

    #[test]
    fn a_record_of_another_format_or_none_is_refused() {
        for text in ["", "[]", "{\"format\": 1}", "{\"format\": 2, \"workloads\": []}"] {
            assert!(Record::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ratios_are_drawn_within_rounds() {
        let entry = entry(Workload::Hit1k, "a");
        let ratio = &entry.peer("tidegate").expect("it was measured").ratio_to["nginx"];
        assert_eq!(ratio.cpu, Spread { median: 2.0, min: 1.5, max: 4.0 });
        assert_eq!(ratio.requests_per_second, Spread { median: 1.0, min: 1.0, max: 1.0 });
        assert_eq!(entry.peers[0].cpu_us_per_request, Spread { median: 12.0, min: 10.0, max: 20.0 });
        assert_eq!(entry.peers[0].ratio_to.len(), 1);
    }

    #[test]
    fn a_measurement_replaces_its_own_workload_and_no_other() {
        let mut record = Record::default();
        record.put(entry(Workload::Denied, "a"));
        record.put(entry(Workload::Hit1k, "a"));
        record.put(entry(Workload::Denied, "b"));
        let kept: Vec<(&str, &str)> =
            record.workloads.iter().map(|entry| (entry.name.as_str(), entry.run.commit.as_str())).collect();
        assert_eq!(kept, [("hit-1k", "a"), ("denied", "b")]);
    }

    #[test]
    fn what_is_written_is_read_again_but_for_workloads_nobody_knows() {
        let mut record = Record::default();
        record.put(entry(Workload::Hit1k, "a"));
        let text = serde_json::to_string(&record).expect("a record is JSON");
        assert_eq!(Record::parse(&text).expect("its own text"), record);
        let renamed = text.replace("hit-1k", "hit-2k");
        assert_eq!(Record::parse(&renamed).expect("the same form"), Record::default());
    }
}
