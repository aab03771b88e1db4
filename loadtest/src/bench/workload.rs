//! Workloads: targets, connections, and which results count as errors.

use std::time::Duration;

use clap::ValueEnum;

use crate::bench::probe_counts::ProbeCounts;
use crate::load::h2load::TlsLoad;
use crate::load::report::LoadReport;
use crate::load::wrk::LoadProfile;

/// A kind of load. The order is that of every report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Workload {
    /// One key of 1 KiB, from the cache
    #[value(name = "hit-1k")]
    Hit1k,
    /// The same over 512 connections
    #[value(name = "hit-1k-512c")]
    Hit1k512c,
    /// 10,000 keys of 1 KiB in random order, from the cache
    #[value(name = "hit-10k-keys")]
    Hit10kKeys,
    /// One key of 16 KiB, from the cache
    #[value(name = "hit-16k")]
    Hit16k,
    /// One key of 1 MiB, from the cache
    #[value(name = "hit-1m")]
    Hit1m,
    /// 1 KiB, always from the origin
    #[value(name = "pass-1k")]
    Pass1k,
    /// The same over 512 connections
    #[value(name = "pass-1k-512c")]
    Pass1k512c,
    /// 1 KiB, always from an origin that speaks TLS
    PassTls,
    /// 1 KiB, always from an origin that speaks HTTP/2
    PassH2,
    /// Denied by a limit: 429
    Denied,
    /// One key of 1 KiB from the cache, HTTP/2 over TLS
    #[value(name = "h2-hit-1k")]
    H2Hit1k,
    /// One key of 16 KiB from the cache, HTTP/2 over TLS
    #[value(name = "h2-hit-16k")]
    H2Hit16k,
    /// 1 KiB, always from the origin, HTTP/2 over TLS
    #[value(name = "h2-pass-1k")]
    H2Pass1k,
    /// One key of 1 KiB from the cache, HTTP/1.1 over TLS
    #[value(name = "tls-hit-1k")]
    TlsHit1k,
    /// The same with a new connection for each request
    TlsHandshake,
}

const H2_CONNECTIONS: usize = 16;
const H2_STREAMS: usize = 32;

/// The protocol of an origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OriginProtocol {
    /// HTTP/1.1 in clear text.
    Plain,
    /// HTTP/1.1 over TLS.
    Tls,
    /// HTTP/2 in clear text, with prior knowledge.
    H2c,
}

/// The required source of the responses: the cache, the origin, or a limit (429).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ResponseSource {
    Cache,
    Origin,
    Limit,
}

impl Workload {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Workload::Hit1k => "hit-1k",
            Workload::Hit1k512c => "hit-1k-512c",
            Workload::Hit10kKeys => "hit-10k-keys",
            Workload::Hit16k => "hit-16k",
            Workload::Hit1m => "hit-1m",
            Workload::Pass1k => "pass-1k",
            Workload::Pass1k512c => "pass-1k-512c",
            Workload::PassTls => "pass-tls",
            Workload::PassH2 => "pass-h2",
            Workload::Denied => "denied",
            Workload::H2Hit1k => "h2-hit-1k",
            Workload::H2Hit16k => "h2-hit-16k",
            Workload::H2Pass1k => "h2-pass-1k",
            Workload::TlsHit1k => "tls-hit-1k",
            Workload::TlsHandshake => "tls-handshake",
        }
    }

    /// Description in reports.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Workload::Hit1k => "one key of 1 KiB from the cache, 64 connections",
            Workload::Hit1k512c => "one key of 1 KiB from the cache, 512 connections",
            Workload::Hit10kKeys => "10,000 keys of 1 KiB in random order from the cache, 64 connections",
            Workload::Hit16k => "one key of 16 KiB from the cache, 64 connections",
            Workload::Hit1m => "one key of 1 MiB from the cache, 64 connections",
            Workload::Pass1k => "1 KiB, always from the origin, 64 connections",
            Workload::Pass1k512c => "1 KiB, always from the origin, 512 connections",
            Workload::PassTls => "1 KiB, always from the origin by HTTP/1.1 over TLS, 64 connections in clear text",
            Workload::PassH2 => "1 KiB, always from the origin by HTTP/2 in clear text, 64 connections of HTTP/1.1",
            Workload::Denied => "429 from a limit on the client address, 64 connections",
            Workload::H2Hit1k => {
                "one key of 1 KiB from the cache, HTTP/2 over TLS, 16 connections with 32 concurrent streams each"
            }
            Workload::H2Hit16k => {
                "one key of 16 KiB from the cache, HTTP/2 over TLS, 16 connections with 32 concurrent streams each"
            }
            Workload::H2Pass1k => {
                "1 KiB, always from the origin by HTTP/1.1, HTTP/2 over TLS, 16 connections with 32 concurrent streams each"
            }
            Workload::TlsHit1k => "one key of 1 KiB from the cache, HTTP/1.1 over TLS, 64 connections",
            Workload::TlsHandshake => {
                "one key of 1 KiB from the cache, HTTP/1.1 over TLS, 1,000 new connections per second with full handshakes, one request each"
            }
        }
    }

    /// The load over TLS; `None` in clear text.
    pub(crate) fn tls_load(self) -> Option<TlsLoad> {
        match self {
            Workload::H2Hit1k | Workload::H2Hit16k | Workload::H2Pass1k => {
                Some(TlsLoad::Http2 { connections: H2_CONNECTIONS, streams: H2_STREAMS })
            }
            Workload::TlsHit1k => Some(TlsLoad::Http1 { connections: self.connections() }),
            Workload::TlsHandshake => Some(TlsLoad::NewConnections),
            _ => None,
        }
    }

    pub(crate) fn is_tls(self) -> bool {
        self.tls_load().is_some()
    }

    pub(crate) fn is_http2(self) -> bool {
        matches!(self.tls_load(), Some(TlsLoad::Http2 { .. }))
    }

    pub(crate) fn origin_protocol(self) -> OriginProtocol {
        match self {
            Workload::PassTls => OriginProtocol::Tls,
            Workload::PassH2 => OriginProtocol::H2c,
            _ => OriginProtocol::Plain,
        }
    }

    /// Whether servers of the workload need a certificate: the peers, or the origin.
    pub(crate) fn needs_certificate(self) -> bool {
        self.is_tls() || self.origin_protocol() == OriginProtocol::Tls
    }

    pub(crate) fn source(self) -> ResponseSource {
        match self {
            Workload::Hit1k
            | Workload::Hit1k512c
            | Workload::Hit10kKeys
            | Workload::Hit16k
            | Workload::Hit1m
            | Workload::H2Hit1k
            | Workload::H2Hit16k
            | Workload::TlsHit1k
            | Workload::TlsHandshake => ResponseSource::Cache,
            Workload::Pass1k | Workload::Pass1k512c | Workload::PassTls | Workload::PassH2 | Workload::H2Pass1k => {
                ResponseSource::Origin
            }
            Workload::Denied => ResponseSource::Limit,
        }
    }

    /// Concurrent requests.
    pub(crate) fn connections(self) -> usize {
        match self {
            Workload::Hit1k512c | Workload::Pass1k512c => 512,
            Workload::H2Hit1k | Workload::H2Hit16k | Workload::H2Pass1k => H2_CONNECTIONS * H2_STREAMS,
            _ => 64,
        }
    }

    pub(crate) fn body_bytes(self) -> usize {
        match self {
            Workload::Hit16k | Workload::H2Hit16k => 16 << 10,
            Workload::Hit1m => 1 << 20,
            _ => 1 << 10,
        }
    }

    pub(crate) fn keys(self) -> usize {
        if self == Workload::Hit10kKeys { 10_000 } else { 1 }
    }

    /// The target, or the prefix of all targets if there are several.
    pub(crate) fn base(self) -> &'static str {
        match self.source() {
            ResponseSource::Cache => "/hit/key",
            ResponseSource::Origin => "/pass/key",
            ResponseSource::Limit => "/denied/key",
        }
    }

    pub(crate) fn profile(self) -> LoadProfile {
        LoadProfile { connections: self.connections(), base: self.base(), keys: self.keys(), hot_percent: 0 }
    }

    pub(crate) fn targets(self) -> Vec<String> {
        self.profile().targets()
    }

    /// Errors of a run, from the counts of wrk, the `probes` sent during the run, and the number of
    /// requests at the origin.
    pub(crate) fn errors(self, report: &LoadReport, probes: &ProbeCounts, origin_requests: u64) -> u64 {
        let body_bytes = u64::try_from(self.body_bytes()).unwrap_or(u64::MAX);
        let truncated = u64::from(report.bytes < report.requests * body_bytes);
        let wrong = match self.source() {
            ResponseSource::Cache => report.error_statuses + origin_requests + truncated,
            ResponseSource::Origin => {
                report.error_statuses + (report.requests + probes.sent).saturating_sub(origin_requests) + truncated
            }
            // The lowest rate of an nginx limit admits one request per minute.
            ResponseSource::Limit => {
                let admitted = report.requests - report.error_statuses + probes.admitted;
                admitted.saturating_sub(1 + report.duration.as_secs() / Duration::from_mins(1).as_secs())
            }
        };
        let is_silent = u64::from(report.requests == 0);
        wrong + report.socket_errors + probes.wrong + is_silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(error_statuses: u64, socket_errors: u64) -> LoadReport {
        let (second, ms) = (Duration::from_secs(1), Duration::from_millis(1));
        LoadReport { requests: 100, bytes: 130_000, duration: second, p50: ms, p99: ms, error_statuses, socket_errors }
    }

    fn probes(sent: u64, wrong: u64, admitted: u64) -> ProbeCounts {
        ProbeCounts { sent, wrong, admitted }
    }

    #[test]
    fn hit_that_reaches_the_origin_is_an_error() {
        assert_eq!(Workload::Hit1k.errors(&report(0, 0), &probes(4, 0, 0), 0), 0);
        assert_eq!(Workload::Hit1k.errors(&report(2, 3), &probes(4, 1, 0), 4), 10);
        assert_eq!(Workload::Hit16k.errors(&report(0, 0), &probes(0, 0, 0), 0), 1, "bodies are truncated");
        let silent = LoadReport { requests: 0, ..report(0, 0) };
        assert_eq!(Workload::Hit1k.errors(&silent, &probes(0, 0, 0), 0), 1, "nothing was answered");
    }

    #[test]
    fn pass_that_does_not_reach_the_origin_is_an_error() {
        assert_eq!(Workload::Pass1k.errors(&report(0, 0), &probes(3, 0, 0), 103), 0);
        assert_eq!(Workload::Pass1k.errors(&report(1, 0), &probes(3, 0, 0), 93), 11);
    }

    #[test]
    fn admitted_request_of_the_denied_workload_is_an_error() {
        assert_eq!(Workload::Denied.errors(&report(99, 0), &probes(4, 0, 0), 1), 0);
        assert_eq!(Workload::Denied.errors(&report(100, 0), &probes(4, 0, 1), 1), 0);
        assert_eq!(Workload::Denied.errors(&report(90, 1), &probes(4, 0, 2), 10), 12);
    }

    #[test]
    fn names_match_the_command_line() {
        for workload in Workload::value_variants() {
            let value = workload.to_possible_value().expect("no variant is hidden");
            assert_eq!(value.get_name(), workload.name());
            assert_eq!(workload.targets().len(), workload.keys());
        }
    }
}
