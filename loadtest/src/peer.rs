//! The servers that are compared.

use clap::ValueEnum;

use crate::tools::Tool;
use crate::workload::{Source, Workload};

/// A server that is measured. The order is that of every report.
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
    /// The defaults with one worker; always measured
    Tidegate,
    /// A constant answer: the limit for hits and denials
    LimitAnswer,
    /// A relay of bytes: the limit for passing on
    LimitRelay,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Nginx => "nginx",
            Peer::NginxNosendfile => "nginx-nosendfile",
            Peer::NginxOpenfiles => "nginx-openfiles",
            Peer::Haproxy => "haproxy",
            Peer::Varnish => "varnish",
            Peer::Tidegate => "tidegate",
            Peer::LimitAnswer => "limit-answer",
            Peer::LimitRelay => "limit-relay",
        }
    }

    /// How it is set up, for a reader of reports.
    pub(crate) fn about(self) -> &'static str {
        match self {
            Peer::Nginx => {
                "Debian's settings, one worker process without master, no access log, cache on tmpfs, `keepalive_requests` and \
                 timeouts raised so that no reconnection is measured, 64 kept upstream connections (512 where the load has as many)"
            }
            Peer::NginxNosendfile => "the same with `sendfile off`, its best setting here for small objects",
            Peer::NginxOpenfiles => {
                "the same with `sendfile off` and `open_file_cache` for all keys; measured on request"
            }
            Peer::Haproxy => {
                "`nbthread 1`, a `cache` of 256 MiB whose `max-age` outlives the bench, `http-reuse always` towards the origin, no log; a \
                 stick table denies"
            }
            Peer::Varnish => {
                "all its threads on the one core, one thread pool with a thread for every connection made beforehand, `malloc` storage, \
                 its built-in rules, no log: the shared memory log is masked; vmod vsthrottle denies"
            }
            Peer::Tidegate => "its defaults with one worker, no access log",
            Peer::LimitAnswer => {
                "no server: an epoll loop that looks for the end of a request's head and writes one prepared answer, whatever was asked for"
            }
            Peer::LimitRelay => {
                "no server: an epoll loop that copies bytes between each client and an upstream connection of its own"
            }
        }
    }

    /// The program to install; `None` where it is part of this repository.
    pub(crate) fn tool(self) -> Option<Tool> {
        match self {
            Peer::Nginx | Peer::NginxNosendfile | Peer::NginxOpenfiles => Some(Tool::Nginx),
            Peer::Haproxy => Some(Tool::Haproxy),
            Peer::Varnish => Some(Tool::Varnishd),
            Peer::Tidegate | Peer::LimitAnswer | Peer::LimitRelay => None,
        }
    }

    /// Whether the workload says anything about it: each limit limits one kind of work.
    pub(crate) fn takes_part_in(self, workload: Workload) -> bool {
        match self {
            Peer::LimitAnswer => workload.source() != Source::Origin,
            Peer::LimitRelay => workload.source() == Source::Origin,
            _ => true,
        }
    }

    /// What is measured where nobody names peers: all but the one setting that nobody runs by default.
    pub(crate) fn usual() -> Vec<Peer> {
        Peer::value_variants().iter().copied().filter(|peer| *peer != Peer::NginxOpenfiles).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for peer in Peer::value_variants() {
            assert_eq!(peer.to_possible_value().expect("no variant is hidden").get_name(), peer.name());
        }
    }

    #[test]
    fn every_workload_has_one_limit() {
        for workload in Workload::value_variants() {
            let limits = [Peer::LimitAnswer, Peer::LimitRelay];
            assert_eq!(limits.iter().filter(|limit| limit.takes_part_in(*workload)).count(), 1);
        }
    }
}
