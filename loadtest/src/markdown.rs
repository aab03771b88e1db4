//! The record as Markdown.

use std::fmt::Write;

use clap::ValueEnum;

use crate::goal::{Goal, YARDSTICKS, goals};
use crate::machine::Run;
use crate::peer::Peer;
use crate::record::{Entry, Figures, Ratio, Record};
use crate::spread::Spread;

const HEAD: &str = "\
# Figures

Written by `make bench`, which replaces the figures of the workloads that it measures and keeps the others. Do not edit.

![CPU time per request as ratios to nginx](latest.svg)
";

const METHOD: &str = "\
## How to read this

Each server runs on core 0 alone; load (wrk, one thread) and origin share core 1. All servers of a workload are up at the same time, and are
loaded one after the other in each round; each round begins with another one. Figures are medians of the rounds. Ratios are drawn within
each round, then: median (smallest to largest). Above 1 is better than nginx: less CPU time per request, or more requests/s.

- CPU time is what the kernel charges to the server's processes. It is the figure to compare by: where *busy* is clearly below 100 %, the load or
  the origin on core 1 was the bottleneck, and requests/s and latency say more about those than about the server.
- *busy*: how much of core 0 the server took, and everything else; the latter is noise, or network work that the kernel charges to nobody.
- Latency is that of a closed loop: each connection sends its next request when it has its answer.
- *errors*: answers of a wrong status, connections that broke, answers after 2 s, bytes that are missing, hits that reached the origin, passes
  that did not, requests that a limit let through, and probes (four a second beside the load) whose status, ETag or body was wrong. Before the
  rounds the answer for every key is compared in full, and before and after them again those for a sample of a thousand.
";

/// The whole record as a page.
pub(crate) fn page(record: &Record) -> String {
    let runs = runs(record);
    let mut text = String::from(HEAD);
    text.push_str(&summary(record, &runs));
    line(&mut text, format_args!("\n## Workloads"));
    for entry in &record.workloads {
        text.push_str(&section(entry));
    }
    line(&mut text, format_args!("\n{METHOD}\n## How the servers are set up\n"));
    line(&mut text, format_args!("The files are in [loadtest/peers](../../loadtest/peers), the command lines in"));
    line(&mut text, format_args!("[launch.rs](../../loadtest/src/launch.rs).\n"));
    for peer in Peer::value_variants() {
        line(&mut text, format_args!("- **{}**: {}.", peer.name(), peer.about()));
    }
    for (number, run) in (1..).zip(&runs) {
        describe(&mut text, number, run);
    }
    text
}

/// What was measured together, in the order of the workloads.
fn runs(record: &Record) -> Vec<&Run> {
    let mut runs: Vec<&Run> = Vec::new();
    for entry in &record.workloads {
        if !runs.contains(&&entry.run) {
            runs.push(&entry.run);
        }
    }
    runs
}

fn summary(record: &Record, runs: &[&Run]) -> String {
    let mut text = String::new();
    line(&mut text, format_args!("\n## Goals\n"));
    line(
        &mut text,
        format_args!(
            "CPU time per request, as ratios to nginx (in parentheses: to nginx with `sendfile off`). *limit* does no work at all.\n"
        ),
    );
    line(&mut text, format_args!("| workload | goal | tidegate | met | haproxy | varnish | limit | run |"));
    line(&mut text, format_args!("|---|---|---|---|---|---|---|---|"));
    for entry in &record.workloads {
        let goals = entry.workload().map_or_else(Vec::new, goals);
        let pairs = |names: &[&str]| names.iter().find_map(|name| entry.peer(name)).map_or_else(String::new, pair);
        let run = runs.iter().position(|run| **run == entry.run).map_or(0, |place| place + 1);
        line(
            &mut text,
            format_args!(
                "| [{name}](#{name}) | {} | {} | {} | {} | {} | {} | [{run}](#run-{run}) |",
                wanted(&goals),
                pairs(&["tidegate"]),
                goals.iter().map(|goal| verdict(entry, *goal)).collect::<Vec<_>>().join(", "),
                pairs(&["haproxy"]),
                pairs(&["varnish"]),
                pairs(&["limit-answer", "limit-relay"]),
                name = entry.name,
            ),
        );
    }
    text
}

/// The goals as the issue writes them.
fn wanted(goals: &[Goal]) -> String {
    let words = goals.iter().map(|goal| match goal.yardstick {
        Peer::Nginx => format!("{}", goal.ratio),
        _ => format!("({})", goal.ratio),
    });
    words.collect::<Vec<_>>().join(" ")
}

/// Ratios to both yardsticks.
fn pair(figures: &Figures) -> String {
    let words = YARDSTICKS.iter().filter_map(|yardstick| {
        let ratio = figures.ratio_to.get(yardstick.name())?.cpu.median;
        Some(if *yardstick == Peer::Nginx { format!("{ratio:.2}") } else { format!("({ratio:.2})") })
    });
    words.collect::<Vec<_>>().join(" ")
}

/// A goal counts as met by the median, and not at all by wrong answers.
fn verdict(entry: &Entry, goal: Goal) -> &'static str {
    let Some(ratio) = ratio_to(entry, Peer::Tidegate, goal.yardstick) else { return "not measured" };
    let both = [Peer::Tidegate, goal.yardstick].map(|peer| entry.peer(peer.name()));
    if both.into_iter().flatten().any(|figures| figures.errors > 0) {
        "errors"
    } else if ratio.cpu.median >= goal.ratio {
        "yes"
    } else {
        "**no**"
    }
}

fn ratio_to(entry: &Entry, peer: Peer, yardstick: Peer) -> Option<&Ratio> {
    entry.peer(peer.name())?.ratio_to.get(yardstick.name())
}

/// One workload: its table, its goals, and when it was measured.
pub(crate) fn section(entry: &Entry) -> String {
    let mut text = String::new();
    let (run, about) = (&entry.run, entry.workload().map_or("", |workload| workload.about()));
    line(&mut text, format_args!("\n### {}\n\n{about}\n", entry.name));
    let yardsticks: Vec<&str> =
        YARDSTICKS.iter().map(|peer| peer.name()).filter(|name| entry.peer(name).is_some()).collect();
    let mut head =
        String::from("| peer | requests/s | CPU us/request (user + system) | p50 us | p99 us | errors | busy |");
    for yardstick in &yardsticks {
        head.push_str(&format!(" CPU to {yardstick} | requests/s to {yardstick} |"));
    }
    line(&mut text, format_args!("{head}\n|---|{}", "---:|".repeat(6 + 2 * yardsticks.len())));
    for figures in &entry.peers {
        line(&mut text, format_args!("{}", row(figures, &yardsticks)));
    }
    text.push('\n');
    for goal in entry.workload().map_or_else(Vec::new, goals) {
        let measured = ratio_to(entry, Peer::Tidegate, goal.yardstick).map(|ratio| spread(ratio.cpu));
        line(
            &mut text,
            format_args!(
                "- goal: {} to {}; measured: {}; met: {}",
                goal.ratio,
                goal.yardstick.name(),
                measured.unwrap_or_else(|| "nothing".to_owned()),
                verdict(entry, goal)
            ),
        );
    }
    for (peer, why) in &entry.left_out {
        line(&mut text, format_args!("- without {peer}: {why}"));
    }
    let commit = commit(run);
    line(&mut text, format_args!("- measured {} at {commit}: {} rounds of {} s", run.date, run.rounds, run.seconds));
    text
}

fn row(figures: &Figures, yardsticks: &[&str]) -> String {
    let mut row = format!(
        "| {} | {:.0} | {:.2} ({:.2} + {:.2}) | {:.0} | {:.0} | {} | {:.0} % + {:.0} % |",
        figures.name,
        figures.requests_per_second.median,
        figures.cpu_us_per_request.median,
        figures.user_us_per_request.median,
        figures.system_us_per_request.median,
        figures.p50_us.median,
        figures.p99_us.median,
        figures.errors,
        figures.server_share_of_core.median * 100.0,
        figures.others_share_of_core.median * 100.0,
    );
    for yardstick in yardsticks {
        match figures.ratio_to.get(*yardstick) {
            Some(ratio) => {
                row.push_str(&format!(" {} | {} |", spread(ratio.cpu), spread(ratio.requests_per_second)));
            }
            None => row.push_str(" | |"),
        }
    }
    row
}

fn spread(spread: Spread) -> String {
    format!("{:.2} ({:.2} to {:.2})", spread.median, spread.min, spread.max)
}

fn commit(run: &Run) -> String {
    if run.has_changes { format!("`{}` with changes", run.commit) } else { format!("`{}`", run.commit) }
}

fn describe(text: &mut String, number: usize, run: &Run) {
    line(text, format_args!("\n### Run {number}\n"));
    line(text, format_args!("- date: {}\n- commit: {}\n- command: `{}`", run.date, commit(run), run.command));
    for (name, fact) in run.machine.iter().chain(&run.versions) {
        line(text, format_args!("- {name}: {fact}"));
    }
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(text, "{arguments}").expect("a String takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::entry;
    use crate::workload::Workload;

    #[test]
    fn a_goal_is_not_met_without_figures_or_with_errors() {
        let goal = |ratio| Goal { yardstick: Peer::Nginx, ratio };
        let mut entry = entry(Workload::Hit1k, "a");
        assert_eq!(verdict(&entry, Goal { yardstick: Peer::NginxNosendfile, ratio: 1.1 }), "not measured");
        assert_eq!((verdict(&entry, goal(2.0)), verdict(&entry, goal(2.1))), ("yes", "**no**"));
        entry.peers[1].errors = 1;
        assert_eq!(verdict(&entry, goal(2.0)), "errors");
    }

    #[test]
    fn a_table_has_two_columns_for_each_yardstick_that_was_measured() {
        let text = section(&entry(Workload::Hit1k, "abc"));
        let row = "| tidegate | 1000 | 5.00 (5.00 + 0.00) | 1000000 | 1000000 | 0 | 0 % + 0 % | 2.00 (1.50 to 4.00) | \
                   1.00 (1.00 to 1.00) |";
        assert!(text.contains(row), "{text}");
        let pipes: Vec<usize> =
            text.lines().filter(|line| line.starts_with('|')).map(|line| line.matches('|').count()).collect();
        assert_eq!(pipes, [10, 10, 10, 10], "{text}");
        assert!(text.contains("- without varnish: it cannot"), "{text}");
        assert!(text.contains("at `abc`: 3 rounds of 1 s"), "{text}");
    }

    #[test]
    fn the_page_names_each_run_once() {
        let mut record = Record::default();
        for (workload, commit) in [(Workload::Hit1k, "aa"), (Workload::Hit16k, "bb"), (Workload::Denied, "aa")] {
            record.put(entry(workload, commit));
        }
        let text = page(&record);
        assert!(text.contains("| [hit-1k](#hit-1k) | 1.8 (1.45) | 2.00 | yes, not measured | "), "{text}");
        assert!(text.contains("| [hit-16k](#hit-16k) | 1.7 | 2.00 | yes |  |  |  | [2](#run-2) |"), "{text}");
        assert!(text.contains("| [denied](#denied) | 1.1 | 2.00 | yes |  |  |  | [1](#run-1) |"), "{text}");
        assert_eq!(text.matches("- commit: ").count(), 2, "{text}");
    }
}
