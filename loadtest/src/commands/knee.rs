//! `loadtest knee`: finds the knee of any service by its URL, and its goodput past it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::available_parallelism;
use std::time::{Duration, SystemTime};

use clap::Args;

use crate::bench::machine;
use crate::error::{LoadtestError, Result};
use crate::knee::report::{KneeContext, KneeReport};
use crate::knee::search::{KneePlan, KneeSearch, SearchEnd};
use crate::load::open_loop::OpenLoopLoad;
use crate::load::probe;
use crate::load::step::{LoadStep, StepLimits, StepVerdict};
use crate::load::target::{LoadTarget, RequestOptions};
use crate::report::progress_bar::ProgressBar;
use crate::{durations, interrupt};

/// Rest after a step that broke, so that the next one does not meet its backlog, in timeouts.
const RESTS: u32 = 2;
/// Files that the process needs besides its connections.
const OTHER_FILES: u64 = 32;
const THREADS_MAX: usize = 64;
const RATE_MAX: f64 = 1_000_000.0;

/// Arguments of `loadtest knee`.
#[derive(Args, Clone, Debug)]
pub(crate) struct KneeArguments {
    /// URL of the service, http:// or https://
    #[arg(long)]
    url: String,
    /// Method of the requests
    #[arg(long, default_value = "GET")]
    method: String,
    /// Field of the requests, as `Name: value`; may be repeated
    #[arg(long = "header", value_name = "FIELD")]
    headers: Vec<String>,
    /// Body of the requests
    #[arg(long, default_value = "", hide_default_value = true)]
    body: String,
    /// PEM file of a certificate authority to trust, besides those of the system
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Most connections at a time
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    connections: u32,
    /// Time of each step that counts
    #[arg(long, default_value = "5s", value_parser = durations::parse)]
    duration: Duration,
    /// Time before each step that does not count
    #[arg(long, default_value = "1s", value_parser = durations::parse)]
    warm_up: Duration,
    /// A rate holds if 99 % of the good responses are within this time
    #[arg(long, default_value = "250ms", value_parser = durations::parse)]
    p99: Duration,
    /// A rate holds if this part of its requests has a good response (status below 400)
    #[arg(long, default_value_t = 0.98)]
    goodput: f64,
    /// Time in which a response counts
    #[arg(long, default_value = "1s", value_parser = durations::parse)]
    timeout: Duration,
    /// First rate, in requests per second
    #[arg(long, default_value_t = 50.0)]
    start_rate: f64,
    /// Largest rate that is tried below the knee; twice the knee may exceed it
    #[arg(long, default_value_t = 50_000.0)]
    max_rate: f64,
    /// Halvings of the gap between a rate that holds and one that breaks
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=12))]
    bisections: u8,
    /// Searches, for the spread; as many steps at twice the knee
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=20))]
    rounds: u8,
    /// Threads of the load generator [default: one per core, at most 4]
    #[arg(long)]
    threads: Option<usize>,
    /// Directory for knee.md, knee.json, knee.svg and knee.html
    #[arg(long, value_name = "DIRECTORY")]
    write: Option<PathBuf>,
    /// Print JSON in place of Markdown
    #[arg(long)]
    json: bool,
}

/// Exits with 0 if the knee was found and goodput holds past it, or if no rate breaks; with 1 if
/// goodput does not hold, and with 130 after an interruption.
pub(crate) fn run(arguments: KneeArguments) -> Result<ExitCode> {
    arguments.check()?;
    if let Some(directory) = &arguments.write {
        fs::create_dir_all(directory).map_err(LoadtestError::io(format!("cannot create {}", directory.display())))?;
    }
    let target = LoadTarget::new(&arguments.request_options())?;
    interrupt::watch()?;
    probe::check(&target, arguments.timeout)?;
    let report = arguments.search(&target)?;
    if let Some(directory) = &arguments.write {
        write(directory, &report)?;
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report).expect("a report has only strings for keys"));
    } else {
        println!("{}", report.markdown());
    }
    Ok(match (report.end, report.holds_past_knee) {
        (SearchEnd::Interrupted, _) => ExitCode::from(130),
        (SearchEnd::Complete, Some(true)) | (SearchEnd::MaxRate, _) => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn write(directory: &Path, report: &KneeReport) -> Result<()> {
    let json = serde_json::to_string_pretty(report).expect("a report has only strings for keys");
    for (name, text) in [
        ("knee.md", report.markdown()),
        ("knee.json", json + "\n"),
        ("knee.svg", report.svg()),
        ("knee.html", report.html()),
    ] {
        let path = directory.join(name);
        fs::write(&path, text).map_err(LoadtestError::io(format!("cannot write {}", path.display())))?;
        eprintln!("loadtest: wrote {}", path.display());
    }
    Ok(())
}

impl KneeArguments {
    fn request_options(&self) -> RequestOptions {
        RequestOptions {
            url: self.url.clone(),
            method: self.method.clone(),
            headers: self.headers.clone(),
            body: self.body.clone(),
            ca: self.ca.clone(),
        }
    }

    /// Refuses values that contradict each other.
    fn check(&self) -> Result<()> {
        let refuse = |what: String| Err(LoadtestError::Usage(what));
        let is_rate = |rate: f64| (1.0..=RATE_MAX).contains(&rate);
        if !is_rate(self.start_rate) || !is_rate(self.max_rate) {
            return refuse(format!("--start-rate and --max-rate are from 1 to {RATE_MAX} requests per second"));
        }
        if self.start_rate >= self.max_rate {
            let (start, most) = (self.start_rate, self.max_rate);
            return refuse(format!("--start-rate {start} is not below --max-rate {most}"));
        }
        if !(0.5..=1.0).contains(&self.goodput) {
            return refuse(format!("--goodput {} is not a part from 0.5 to 1", self.goodput));
        }
        if self.duration < Duration::from_millis(500) {
            return refuse("--duration is below 500ms: too few requests for a p99".to_owned());
        }
        if self.timeout.is_zero() || self.timeout > Duration::from_secs(60) {
            return refuse("--timeout is from 1ms to 60s".to_owned());
        }
        if self.p99.is_zero() || self.p99 > self.timeout {
            return refuse(format!("--p99 {:?} is not from 1ms to --timeout {:?}", self.p99, self.timeout));
        }
        if self.threads.is_some_and(|threads| threads == 0 || threads > THREADS_MAX) {
            return refuse(format!("--threads is from 1 to {THREADS_MAX}"));
        }
        let files = machine::open_files();
        if u64::from(self.connections) + OTHER_FILES > files {
            return refuse(format!(
                "--connections {} needs more open files than the limit of {files}: raise it with `ulimit -n`",
                self.connections
            ));
        }
        Ok(())
    }

    fn search(&self, target: &LoadTarget) -> Result<KneeReport> {
        let limits = StepLimits { p99: self.p99, goodput: self.goodput };
        let plan = KneePlan {
            start_rate: self.start_rate,
            max_rate: self.max_rate,
            bisections: self.bisections.into(),
            rounds: self.rounds.into(),
        };
        let cores = available_parallelism().map_or(1, std::num::NonZero::get);
        let connections = usize::try_from(self.connections).expect("at most 100,000");
        let mut load = OpenLoopLoad {
            target,
            rate: 0.0,
            warm_up: self.warm_up,
            time: self.duration,
            connections,
            timeout: self.timeout,
            threads: self.threads.unwrap_or(cores.min(4)),
            stop: None,
        };
        let (mut bar, mut count) = (ProgressBar::new(), 0);
        let mut search = KneeSearch::new(plan);
        let step_time = self.warm_up + self.duration;
        search.run(|rate| {
            load.rate = rate;
            count += 1;
            let label = format!("step {count}: {rate:.0}/s");
            let report = load.run(|elapsed| bar.show(elapsed.as_secs_f64() / step_time.as_secs_f64(), &label))?;
            let step = LoadStep::new(rate, self.duration, &report, limits);
            bar.line(&step_line(count, &step));
            if step.verdict != StepVerdict::Holds {
                interrupt::wait_for(self.timeout * RESTS, || Ok(None::<()>))?;
            }
            Ok(step)
        })?;
        let context = KneeContext {
            url: target.url.clone(),
            date: httpdate::fmt_http_date(SystemTime::now()),
            machine: machine::description(),
            connections,
        };
        Ok(KneeReport::new(&search, limits, context))
    }
}

fn step_line(count: usize, step: &LoadStep) -> String {
    let verdict = match step.verdict {
        StepVerdict::Holds => "holds",
        StepVerdict::P99 => "breaks: p99",
        StepVerdict::Goodput => "breaks: goodput",
        StepVerdict::Generator => "the generator is late",
    };
    format!("step {count}: {:.0}/s: goodput {:.0}/s, p99 {:.1} ms: {verdict}", step.rate, step.goodput, step.p99_ms)
}
