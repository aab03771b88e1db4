//! CPU time of a process tree and of a core, from /proc.

use std::fs;
use std::time::Duration;

use crate::error::{LoadtestError, Result};

/// One clock tick of /proc: `USER_HZ` is 100 on all current Linux architectures, independent of the
/// kernel's internal tick.
const TICK: Duration = Duration::from_millis(10);

/// CPU time in user and kernel mode.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct CpuTime {
    pub(crate) user: Duration,
    pub(crate) system: Duration,
}

impl CpuTime {
    pub(crate) fn total(self) -> Duration {
        self.user + self.system
    }

    pub(crate) fn since(self, before: CpuTime) -> CpuTime {
        CpuTime { user: self.user.saturating_sub(before.user), system: self.system.saturating_sub(before.system) }
    }
}

/// Parsed /proc/PID/stat.
#[derive(Debug, PartialEq)]
struct ProcessStat {
    parent: u32,
    cpu: CpuTime,
}

/// CPU time of a process and all its descendants, threads included. Exited children do not count.
pub(crate) fn of_tree(root: u32) -> Result<CpuTime> {
    let processes = processes()?;
    let mut sum = CpuTime::default();
    for member in members(root, &processes) {
        for (_, stat) in processes.iter().filter(|(pid, _)| *pid == member) {
            sum.user += stat.cpu.user;
            sum.system += stat.cpu.system;
        }
    }
    Ok(sum)
}

/// A process and all its descendants.
pub(crate) fn tree(root: u32) -> Result<Vec<u32>> {
    Ok(members(root, &processes()?))
}

fn processes() -> Result<Vec<(u32, ProcessStat)>> {
    let mut processes = Vec::new();
    let entries = fs::read_dir("/proc").map_err(LoadtestError::io("cannot list /proc"))?;
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that exited in the meantime is not a measured one: those run until the end.
        let Ok(text) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let stat = parse_stat(&text).ok_or(LoadtestError::Unexpected { file: format!("/proc/{pid}/stat"), text })?;
        processes.push((pid, stat));
    }
    Ok(processes)
}

fn members(root: u32, processes: &[(u32, ProcessStat)]) -> Vec<u32> {
    let mut tree = vec![root];
    // Each process has one parent and is therefore added once.
    let mut next = 0;
    while let Some(&member) = tree.get(next) {
        next += 1;
        tree.extend(
            processes.iter().filter(|(pid, stat)| stat.parent == member && *pid != member).map(|(pid, _)| *pid),
        );
    }
    tree
}

/// Parses fields 4, 14 and 15 of proc_pid_stat(5). Field 2, the name, may contain spaces and
/// parentheses; it ends at the last `)`.
fn parse_stat(text: &str) -> Option<ProcessStat> {
    let (_, after_name) = text.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<u32>().ok().map(|ticks| TICK * ticks);
    let cpu = CpuTime { user: ticks(11)?, system: ticks(12)? };
    Some(ProcessStat { parent: fields.get(1)?.parse().ok()?, cpu })
}

/// Non-idle time of a core, including time stolen by other virtual machines.
pub(crate) fn of_core(core: usize) -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").map_err(LoadtestError::io("cannot read /proc/stat"))?;
    parse_core(&text, core).ok_or(LoadtestError::Unexpected { file: "/proc/stat".to_owned(), text })
}

/// Parses `cpuN user nice system idle iowait irq softirq steal guest guest_nice`. Guest time is
/// part of user time.
fn parse_core(text: &str, core: usize) -> Option<Duration> {
    let name = format!("cpu{core}");
    let line = text.lines().find_map(|line| line.strip_prefix(&name)?.strip_prefix(' '))?;
    let ticks: Vec<u32> = line.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6, 7].map(|index| ticks.get(index).copied());
    let sum: Option<u32> = busy.into_iter().sum();
    Some(TICK * sum?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn malformed_text_is_rejected() {
        for text in ["", "1 (a", "1 (a) S 1", "1 (a) S x 0 0 0 0 0 0 0 0 0 0 5 6 0"] {
            assert_eq!(parse_stat(text), None, "{text}");
        }
        for text in ["", "cpu 1 2 3", "cpu1 1 2 3 4 5 6 7 8", "cpu0 1 2 3", "cpu0 a b c d e f g h"] {
            assert_eq!(parse_core(text, 0), None, "{text}");
        }
    }

    #[test]
    fn process_name_may_contain_any_characters() {
        let text = "77 (a) R 1 (b) S 5 77 77 0 -1 4194304 9 0 0 0 123 45 900 800 20 0 1 0 3 4 5\n";
        assert_eq!(
            parse_stat(text),
            Some(ProcessStat { parent: 5, cpu: CpuTime { user: ms(1_230), system: ms(450) } })
        );
    }

    #[test]
    fn busy_time_excludes_idle_and_iowait() {
        let text = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 400 500 6 7 8 1 0\ncpu10 0 0 0 0 0 0 0 0 0 0\nintr 5\n";
        assert_eq!(parse_core(text, 0), Some(ms(270)));
        assert_eq!(parse_core(text, 1), None);
    }

    #[test]
    fn descendants_are_members_and_other_processes_are_not() {
        let of = |parent| ProcessStat { parent, cpu: CpuTime::default() };
        let processes = [(4, of(3)), (2, of(1)), (3, of(2)), (9, of(1))];
        assert_eq!(members(2, &processes), [2, 3, 4]);
        assert_eq!(members(7, &processes), [7]);
    }

    #[test]
    fn own_process_has_cpu_time() {
        of_tree(std::process::id()).expect("this process exists");
        assert!(of_core(0).expect("core 0 exists") > Duration::ZERO);
    }
}
