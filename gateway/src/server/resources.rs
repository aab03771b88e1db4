//! What the process takes from the machine: descriptors, memory, CPU time; raised where it may be, exposed as metrics.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::event::Event;
use crate::metrics;

/// Descriptors beside those of clients: listeners, logs, Redis, idle upstream connections.
const OTHERS: u64 = 1_024;

/// Raises the descriptor limit as far as this user may, and says so where `connections` and as many towards origins
/// would not fit: accepting then pauses before the configured limit is reached.
pub(super) fn raise_descriptors(connections: usize) {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let effective = match raised {
        Ok(()) => limit.maximum,
        Err(_not_allowed) => limit.current,
    };
    let wanted = (connections as u64).saturating_mul(2).saturating_add(OTHERS);
    if let Some(effective) = effective.filter(|effective| *effective < wanted) {
        Event::DescriptorsCapped { wanted, effective }.emit();
    }
}

/// Exposes what Prometheus calls the standard process metrics; a figure that the system does not give is left out.
pub(super) fn expose() {
    metrics::expose_gauge_with("process_resident_memory_bytes", "Memory held by the process.", |emit| {
        if let Some(bytes) = resident_bytes(&fs::read_to_string("/proc/self/status").unwrap_or_default()) {
            emit(&[], bytes as f64);
        }
    });
    metrics::expose_gauge_with("process_open_fds", "Open file descriptors.", |emit| {
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            // The directory itself is one of them.
            emit(&[], descriptors.count().saturating_sub(1) as f64);
        }
    });
    metrics::expose_gauge_with("process_max_fds", "File descriptors the process may open.", |emit| {
        if let Some(limit) = getrlimit(Resource::Nofile).current {
            emit(&[], limit as f64);
        }
    });
}

/// The line `VmRSS:    1234 kB` of proc_pid_status(5).
fn resident_bytes(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read_in_bytes() {
        assert_eq!(resident_bytes("Name:\ttidegate\nVmRSS:\t    2048 kB\nThreads:\t3\n"), Some(2 << 20));
        assert_eq!((resident_bytes(""), resident_bytes("VmRSS: many kB")), (None, None));
    }
}
