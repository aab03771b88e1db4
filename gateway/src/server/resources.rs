//! Resources of the process: raises the limit of file descriptors, and exposes descriptors,
//! memory and CPU time as metrics.

use std::fs;
use std::time::SystemTime;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::event::Event;
use crate::metrics;

/// Descriptors that are not client connections: listeners, logs, Redis, idle upstream connections.
const RESERVED_DESCRIPTORS: u64 = 1_024;

/// Raises the soft descriptor limit to the hard limit. Emits an event if the limit is too low for
/// `connections` clients and as many upstream connections: accepting then pauses before the
/// configured number is reached.
pub(super) fn raise_descriptors(connections: usize) {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let effective = match raised {
        Ok(()) => limit.maximum,
        Err(_not_allowed) => limit.current,
    };
    let required = (connections as u64).saturating_mul(2).saturating_add(RESERVED_DESCRIPTORS);
    if let Some(effective) = effective.filter(|effective| *effective < required) {
        Event::DescriptorsCapped { required, effective }.emit();
    }
}

/// Exposes the standard process metrics of Prometheus. Omits values that the system does not
/// provide.
pub(super) fn expose() {
    let started_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    let help = "The time at which the process started, in seconds since 1970.";
    metrics::expose_gauge_with("process_start_time_seconds", help, move |emit| emit(&[], started_at));
    metrics::expose_counter_with("process_cpu_seconds", "CPU time of the process.", |emit| {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        emit(&[], time.tv_sec as f64 + time.tv_nsec as f64 / 1e9);
    });
    metrics::expose_gauge_with("process_resident_memory_bytes", "Memory held by the process.", |emit| {
        if let Some(bytes) = resident_bytes(&fs::read_to_string("/proc/self/status").unwrap_or_default()) {
            emit(&[], bytes as f64);
        }
    });
    metrics::expose_gauge_with("process_open_fds", "Open file descriptors.", |emit| {
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            // One of them is the descriptor of the directory that is read here.
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
    fn resident_memory_is_parsed_in_bytes() {
        assert_eq!(resident_bytes("Name:\ttidegate\nVmRSS:\t    2048 kB\nThreads:\t3\n"), Some(2 << 20));
        assert_eq!((resident_bytes(""), resident_bytes("VmRSS: many kB")), (None, None));
    }
}
