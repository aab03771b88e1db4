//! The stored figures: one record per workload, replaced when that workload is measured again.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bench::comparison::{PeerSamples, Sample, WorkloadComparison};
use crate::bench::goal::BASELINES;
use crate::bench::machine::BenchRun;
use crate::bench::workload::Workload;
use crate::spread::Spread;

/// Version of the file format; increases if older files can no longer be parsed.
const FORMAT: u32 = 1;

/// Content of latest.json: the version of the file format, and one record per workload.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BenchRecord {
    format: u32,
    pub(crate) workloads: Vec<WorkloadRecord>,
}

/// Figures of one workload in its latest run, by peer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WorkloadRecord {
    pub(crate) name: String,
    pub(crate) run: BenchRun,
    pub(crate) peers: Vec<PeerFigures>,
    /// Peers that cannot run this workload, with reasons.
    pub(crate) skipped_peers: BTreeMap<String, String>,
}

/// Figures of one peer under one workload: spreads over the rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct PeerFigures {
    pub(crate) name: String,
    pub(crate) requests_per_second: Spread,
    pub(crate) cpu_us_per_request: Spread,
    pub(crate) user_us_per_request: Spread,
    pub(crate) system_us_per_request: Spread,
    pub(crate) p50_us: Spread,
    pub(crate) p99_us: Spread,
    pub(crate) server_share_of_core: Spread,
    pub(crate) others_share_of_core: Spread,
    /// Absent: they could not be counted.
    #[serde(default)]
    pub(crate) system_calls_per_request: Option<f64>,
    pub(crate) errors: u64,
    pub(crate) ratio_to: BTreeMap<String, BaselineRatio>,
    pub(crate) rounds: Vec<SampleFigures>,
}

/// Ratio of the baseline to this peer; above 1 is better than the baseline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct BaselineRatio {
    pub(crate) cpu: Spread,
    pub(crate) requests_per_second: Spread,
}

/// Figures of one peer in one round: requests, bytes, CPU time, latencies and errors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct SampleFigures {
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

impl Default for BenchRecord {
    fn default() -> Self {
        BenchRecord { format: FORMAT, workloads: Vec::new() }
    }
}

impl BenchRecord {
    /// Parses a stored record. Workloads that no longer exist are dropped.
    pub(crate) fn parse(text: &str) -> serde_json::Result<Self> {
        let mut record: BenchRecord = serde_json::from_str(text)?;
        if record.format != FORMAT {
            let format = record.format;
            return Err(serde::de::Error::custom(format_args!("format {format} is not {FORMAT}")));
        }
        record.workloads.retain(|entry| entry.workload().is_some());
        Ok(record)
    }

    /// Stores the figures of a workload in place of its earlier ones.
    pub(crate) fn put(&mut self, entry: WorkloadRecord) {
        self.workloads.retain(|earlier| earlier.name != entry.name);
        self.workloads.push(entry);
        self.workloads.sort_by_key(WorkloadRecord::workload);
    }
}

impl WorkloadRecord {
    pub(crate) fn new(comparison: &WorkloadComparison, run: &BenchRun) -> Self {
        let skipped_peers =
            comparison.skipped_peers.iter().map(|(peer, reason)| (peer.name().to_owned(), reason.clone()));
        WorkloadRecord {
            name: comparison.workload.name().to_owned(),
            run: run.clone(),
            peers: comparison.peers.iter().map(|measured| PeerFigures::new(measured, comparison)).collect(),
            skipped_peers: skipped_peers.collect(),
        }
    }

    pub(crate) fn workload(&self) -> Option<Workload> {
        Workload::value_variants().iter().copied().find(|workload| workload.name() == self.name)
    }

    pub(crate) fn peer(&self, name: &str) -> Option<&PeerFigures> {
        self.peers.iter().find(|figures| figures.name == name)
    }

    pub(crate) fn errors(&self) -> u64 {
        self.peers.iter().map(|figures| figures.errors).sum()
    }
}

impl PeerFigures {
    fn new(measured: &PeerSamples, comparison: &WorkloadComparison) -> Self {
        let of = |figure: fn(&Sample) -> f64| spread(measured.samples.iter().map(figure));
        let baselines = comparison.peers.iter().filter(|other| BASELINES.contains(&other.peer));
        PeerFigures {
            name: measured.peer.name().to_owned(),
            requests_per_second: of(Sample::rate),
            cpu_us_per_request: of(Sample::cpu_per_request),
            user_us_per_request: of(Sample::user_per_request),
            system_us_per_request: of(Sample::system_per_request),
            p50_us: of(|sample| sample.report.p50.as_secs_f64() * 1e6),
            p99_us: of(|sample| sample.report.p99.as_secs_f64() * 1e6),
            server_share_of_core: of(Sample::server_share),
            others_share_of_core: of(Sample::others_share),
            system_calls_per_request: measured.system_calls.map(|calls| (calls * 1000.0).round() / 1000.0),
            errors: measured.samples.iter().map(|sample| sample.errors).sum(),
            ratio_to: baselines
                .map(|other| (other.peer.name().to_owned(), BaselineRatio::new(measured, other)))
                .collect(),
            rounds: measured.samples.iter().map(SampleFigures::new).collect(),
        }
    }
}

impl BaselineRatio {
    /// Ratios are calculated within each round, because noise in a round affects all peers.
    fn new(measured: &PeerSamples, baseline: &PeerSamples) -> Self {
        let rounds = || measured.samples.iter().zip(&baseline.samples);
        BaselineRatio {
            cpu: spread(rounds().map(|(sample, baseline)| baseline.cpu_per_request() / sample.cpu_per_request())),
            requests_per_second: spread(rounds().map(|(sample, baseline)| sample.rate() / baseline.rate())),
        }
    }
}

impl SampleFigures {
    fn new(sample: &Sample) -> Self {
        let us = |duration: Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        SampleFigures {
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

/// 0 if no round has a finite value, which happens if no request got a response.
fn spread(values: impl Iterator<Item = f64>) -> Spread {
    Spread::of(values.filter(|value| value.is_finite())).unwrap_or_default().rounded()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::bench::peer::Peer;
    use crate::load::report::LoadReport;
    use crate::process::cpu_time::CpuTime;

    /// A round of 1 s with 1,000 requests, so that `cpu` in milliseconds equals microseconds per
    /// request.
    fn round(cpu: u64) -> Sample {
        let second = Duration::from_secs(1);
        let report = LoadReport {
            requests: 1_000,
            bytes: 0,
            duration: second,
            p50: second,
            p99: second,
            error_statuses: 0,
            socket_errors: 0,
        };
        let cpu = CpuTime { user: Duration::from_millis(cpu), system: Duration::ZERO };
        Sample { report, errors: 0, cpu, others: Duration::ZERO, elapsed: second }
    }

    fn run(commit: &str) -> BenchRun {
        BenchRun {
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

    /// Tidegate at a ratio of 2 to nginx, with a spread from 1.5 to 4.
    pub(crate) fn entry(workload: Workload, commit: &str) -> WorkloadRecord {
        let measured =
            |peer, cpus: [u64; 3]| PeerSamples { peer, samples: cpus.map(round).to_vec(), system_calls: Some(4.0) };
        let peers = vec![measured(Peer::Nginx, [10, 20, 12]), measured(Peer::Tidegate, [5, 5, 8])];
        let skipped_peers = vec![(Peer::Varnish, "it cannot".to_owned())];
        WorkloadRecord::new(&WorkloadComparison { workload, peers, skipped_peers }, &run(commit))
    }

    #[test]
    fn other_formats_and_malformed_records_are_rejected() {
        for text in ["", "[]", "{\"format\": 1}", "{\"format\": 2, \"workloads\": []}"] {
            assert!(BenchRecord::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn ratios_are_calculated_within_rounds() {
        let entry = entry(Workload::Hit1k, "a");
        let ratio = &entry.peer("tidegate").expect("tidegate was measured").ratio_to["nginx"];
        assert_eq!(ratio.cpu, Spread { median: 2.0, min: 1.5, max: 4.0 });
        assert_eq!(ratio.requests_per_second, Spread { median: 1.0, min: 1.0, max: 1.0 });
        assert_eq!(entry.peers[0].cpu_us_per_request, Spread { median: 12.0, min: 10.0, max: 20.0 });
        assert_eq!(entry.peers[0].ratio_to.len(), 1);
    }

    #[test]
    fn measurement_replaces_the_figures_of_its_workload_only() {
        let mut record = BenchRecord::default();
        record.put(entry(Workload::Denied, "a"));
        record.put(entry(Workload::Hit1k, "a"));
        record.put(entry(Workload::Denied, "b"));
        let kept: Vec<(&str, &str)> =
            record.workloads.iter().map(|entry| (entry.name.as_str(), entry.run.commit.as_str())).collect();
        assert_eq!(kept, [("hit-1k", "a"), ("denied", "b")]);
    }

    #[test]
    fn written_record_parses_back_without_unknown_workloads() {
        let mut record = BenchRecord::default();
        record.put(entry(Workload::Hit1k, "a"));
        let text = serde_json::to_string(&record).expect("a record is JSON");
        assert_eq!(BenchRecord::parse(&text).expect("its own text"), record);
        let renamed = text.replace("hit-1k", "hit-2k");
        assert_eq!(BenchRecord::parse(&renamed).expect("the same form"), BenchRecord::default());
    }
}
