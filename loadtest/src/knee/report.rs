//! The report of a knee search: as JSON, as Markdown, as SVG and as one HTML page that loads
//! nothing.

use std::fmt::Write as _;

use serde::Serialize;

use crate::knee::scalability::ScalabilityLaw;
use crate::knee::search::{GOODPUT_RATIO, KneeSearch, SearchEnd};
use crate::load::step::{LoadStep, StepLimits, StepVerdict};
use crate::report::line_chart::{self, ChartSeries, LineChart, SeriesForm, escape};
use crate::spread::Spread;

/// Points of the drawn law.
const LAW_POINTS: usize = 80;

/// All figures of a search.
#[derive(Debug, Serialize)]
pub(crate) struct KneeReport {
    pub(crate) url: String,
    pub(crate) date: String,
    pub(crate) machine: String,
    pub(crate) connections: usize,
    pub(crate) p99_limit_ms: f64,
    pub(crate) goodput_limit: f64,
    pub(crate) end: SearchEnd,
    /// Requests per second.
    pub(crate) knee: Option<Spread>,
    pub(crate) peak_goodput: Option<f64>,
    /// Goodput at twice the knee as a part of the peak.
    pub(crate) goodput_ratio: Option<Spread>,
    pub(crate) goodput_ratio_needed: f64,
    /// Absent without a measurement at twice the knee.
    pub(crate) holds_past_knee: Option<bool>,
    pub(crate) scalability: Option<ScalabilityLaw>,
    pub(crate) steps: Vec<LoadStep>,
}

/// The place and time of a search.
pub(crate) struct KneeContext {
    pub(crate) url: String,
    pub(crate) date: String,
    pub(crate) machine: String,
    pub(crate) connections: usize,
}

impl KneeReport {
    pub(crate) fn new(search: &KneeSearch, limits: StepLimits, context: KneeContext) -> Self {
        let KneeContext { url, date, machine, connections } = context;
        let goodput_ratio = search.goodput_ratio();
        let counted = search.steps.iter().filter(|step| step.verdict != StepVerdict::Generator);
        let points: Vec<(f64, f64)> = counted.map(|step| (step.in_progress(), step.goodput)).collect();
        KneeReport {
            url,
            date,
            machine,
            connections,
            p99_limit_ms: limits.p99.as_secs_f64() * 1e3,
            goodput_limit: limits.goodput,
            end: search.end,
            knee: search.knee(),
            peak_goodput: search.peak(),
            goodput_ratio,
            goodput_ratio_needed: GOODPUT_RATIO,
            holds_past_knee: goodput_ratio.map(|ratio| ratio.median >= GOODPUT_RATIO),
            scalability: ScalabilityLaw::fit(&points),
            steps: search.steps.clone(),
        }
    }

    /// The result in one or two sentences.
    pub(crate) fn summary(&self) -> String {
        let last = self.steps.last().map_or(0.0, |step| step.rate);
        let knee = self.knee.map(|knee| format!("{:.0}/s ({:.0} to {:.0})", knee.median, knee.min, knee.max));
        let ratio = self.goodput_ratio.map(|ratio| {
            let holds = if ratio.median >= GOODPUT_RATIO { "holds" } else { "does NOT hold" };
            format!(
                "goodput at twice the knee is {:.3} ({:.3} to {:.3}) of the peak: it {holds} ({GOODPUT_RATIO} is needed)",
                ratio.median, ratio.min, ratio.max
            )
        });
        match (self.end, knee, ratio) {
            (SearchEnd::MaxRate, ..) => {
                format!("No knee: every rate up to {last:.0}/s holds. Raise --max-rate to find it.")
            }
            (SearchEnd::Generator, ..) => format!(
                "The load generator is the limit: at {last:.0}/s it cannot send the requests in time. Use more --threads or \
                 another machine."
            ),
            (SearchEnd::Interrupted, None, _) => "Interrupted before the knee was found.".to_owned(),
            (SearchEnd::Interrupted, Some(knee), ratio) => {
                format!(
                    "Interrupted. The knee is at {knee}{}.",
                    ratio.map_or(String::new(), |ratio| format!("; {ratio}"))
                )
            }
            (SearchEnd::Complete, knee, ratio) => {
                format!("The knee is at {}; {}.", knee.unwrap_or_default(), ratio.unwrap_or_default())
            }
        }
    }

    pub(crate) fn markdown(&self) -> String {
        let mut out = format!(
            "## knee of {}\n\n{}\n\n{}\n\nA rate holds if p99 is at most {:.0} ms and goodput at least {} of it. Latencies count from \
             the time at which a request is due.\n\n\
             | offered/s | goodput/s | p50 ms | p99 ms | p99.9 ms | in progress | 429, 503 | failed | holds |\n\
             |---|---|---|---|---|---|---|---|---|\n",
            self.url,
            self.summary(),
            self.law_text(),
            self.p99_limit_ms,
            self.goodput_limit
        );
        for step in self.sorted_steps() {
            writeln!(
                out,
                "| {:.0} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {} | {} | {} |",
                step.rate,
                step.goodput,
                step.p50_ms,
                step.p99_ms,
                step.p999_ms,
                step.in_progress(),
                step.rejected,
                step.failed,
                verdict_text(step.verdict)
            )
            .expect("writing to a string does not fail");
        }
        writeln!(out, "\n{}; {} connections at most; {}", self.machine, self.connections, self.date)
            .expect("writing to a string does not fail");
        out
    }

    fn sorted_steps(&self) -> Vec<&LoadStep> {
        let mut steps: Vec<&LoadStep> = self.steps.iter().collect();
        steps.sort_by(|one, other| one.rate.total_cmp(&other.rate));
        steps
    }

    fn law_text(&self) -> String {
        let Some(law) = self.scalability else {
            return "Universal scalability law: too few different steps to fit it.".to_owned();
        };
        let peak = law.peak().map_or_else(
            || "throughput does not fall with more requests in progress".to_owned(),
            |peak| {
                format!("the highest throughput is {:.0}/s, with {peak:.0} requests in progress", law.throughput(peak))
            },
        );
        format!(
            "Universal scalability law: sigma {:.4}, kappa {:.6}, lambda {:.0}/s, R^2 {:.3} of {} steps; {peak}.",
            law.sigma, law.kappa, law.lambda, law.r_squared, law.points
        )
    }

    fn charts(&self) -> Vec<LineChart> {
        let steps = self.sorted_steps();
        let of = |figure: fn(&LoadStep) -> (f64, f64)| steps.iter().map(|step| figure(step)).collect::<Vec<_>>();
        // Without a good response there is no latency.
        let answered = |figure: fn(&LoadStep) -> (f64, f64)| {
            steps.iter().filter(|step| step.good > 0).map(|step| figure(step)).collect::<Vec<_>>()
        };
        let dots = |name: &str, points| ChartSeries { name: name.to_owned(), form: SeriesForm::Dots, points };
        let line = |name: &str, points| ChartSeries { name: name.to_owned(), form: SeriesForm::Line, points };
        let knee = self.knee.map(|knee| (knee.median, "knee".to_owned()));
        let marks: Vec<(f64, String)> = knee.into_iter().collect();
        let most = steps.iter().map(|step| step.rate).fold(0.0, f64::max);
        let peak = self.peak_goodput.unwrap_or(most);
        let chart = |title: &str, labels: [&str; 2], series| LineChart {
            title: title.to_owned(),
            x_label: labels[0].to_owned(),
            y_label: labels[1].to_owned(),
            series,
            marks: Vec::new(),
        };
        let offered = "offered requests per second";
        let mut charts = vec![
            LineChart {
                marks: marks.clone(),
                ..chart(
                    "Goodput by load",
                    [offered, "good responses per second"],
                    vec![
                        dots("measured", of(|step| (step.rate, step.goodput))),
                        line("all good", vec![(0.0, 0.0), (peak, peak)]),
                    ],
                )
            },
            LineChart {
                marks,
                ..chart(
                    "Latency by load",
                    [offered, "ms, from the time at which a request was due"],
                    vec![
                        dots("p99", answered(|step| (step.rate, step.p99_ms))),
                        dots("p50", answered(|step| (step.rate, step.p50_ms))),
                    ],
                )
            },
        ];
        if let Some(law) = self.scalability {
            let most = steps.iter().map(|step| step.in_progress()).fold(1.0, f64::max);
            let curve = (0..=LAW_POINTS).map(|at| most * at as f64 / LAW_POINTS as f64).map(|n| (n, law.throughput(n)));
            charts.push(chart(
                "Throughput by requests in progress",
                ["requests in progress", "good responses per second"],
                vec![
                    dots("measured", of(|step| (step.in_progress(), step.goodput))),
                    line("universal scalability law", curve.filter(|(_, x)| x.is_finite() && *x >= 0.0).collect()),
                ],
            ));
        }
        charts
    }

    pub(crate) fn svg(&self) -> String {
        line_chart::document(&self.charts())
    }

    /// One page with charts and table. It loads nothing and follows the reader's colours.
    pub(crate) fn html(&self) -> String {
        let mut rows = String::new();
        for step in self.sorted_steps() {
            let cells = [step.rate, step.goodput, step.p50_ms, step.p99_ms, step.p999_ms, step.in_progress()];
            let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", line_chart::number(*cell))).collect();
            writeln!(
                rows,
                "<tr>{cells}<td>{}</td><td>{}</td><td class=\"{:?}\">{}</td></tr>",
                step.rejected,
                step.failed,
                step.verdict,
                verdict_text(step.verdict)
            )
            .expect("writing to a string does not fail");
        }
        include_str!("../../pages/knee.html")
            .replace("@URL@", &escape(&self.url))
            .replace("@SUMMARY@", &escape(&self.summary()))
            .replace("@LAW@", &escape(&self.law_text()))
            .replace(
                "@LIMITS@",
                &format!("p99 at most {:.0} ms and goodput at least {}", self.p99_limit_ms, self.goodput_limit),
            )
            .replace("@MACHINE@", &escape(&format!("{}; {}", self.machine, self.date)))
            .replace("@ROWS@", &rows)
            .replace("@CHARTS@", &self.svg())
    }
}

fn verdict_text(verdict: StepVerdict) -> &'static str {
    match verdict {
        StepVerdict::Holds => "yes",
        StepVerdict::P99 => "no: p99",
        StepVerdict::Goodput => "no: goodput",
        StepVerdict::Generator => "generator late",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::knee::search::KneePlan;
    use crate::load::step::tests::{LIMITS, step};

    fn report(max_rate: f64) -> KneeReport {
        let mut search = KneeSearch::new(KneePlan { start_rate: 10.0, max_rate, bisections: 3, rounds: 2 });
        let service = |rate: f64| Ok(if rate <= 700.0 { step(rate, rate, 5.0) } else { step(rate, 690.0, 80.0) });
        search.run(service).expect("a search");
        let context = KneeContext {
            url: "http://a.example/<b>".to_owned(),
            date: "today".to_owned(),
            machine: "2 cores".to_owned(),
            connections: 8,
        };
        KneeReport::new(&search, LIMITS, context)
    }

    #[test]
    fn report_without_a_knee_says_so() {
        let report = report(300.0);
        assert!(report.summary().contains("every rate up to 300/s holds"), "{}", report.summary());
        let json = serde_json::to_value(&report).expect("JSON");
        assert!(json["knee"].is_null() && json["holds_past_knee"].is_null() && json["end"] == "max_rate", "{json}");
        assert!(report.svg().contains("Goodput by load"));
    }

    #[test]
    fn page_is_complete_escaped_and_loads_nothing() {
        let report = report(100_000.0);
        let page = report.html();
        for placeholder in ["@URL@", "@SUMMARY@", "@LAW@", "@LIMITS@", "@MACHINE@", "@ROWS@", "@CHARTS@"] {
            assert!(!page.contains(placeholder), "{placeholder}");
        }
        assert!(page.contains("a.example/&lt;b&gt;") && page.contains("prefers-color-scheme: dark"), "{page}");
        let without_namespace = page.replace("http://www.w3.org/2000/svg", "").replace("http://a.example", "");
        for external in ["http://", "https://", "src=", "href=", "@import", "url("] {
            assert!(!without_namespace.contains(external), "{external}");
        }
        assert_eq!(page.matches("<tr>").count(), report.steps.len() + 1);
        assert!(report.markdown().contains("yes |") && report.markdown().contains("no: goodput |"));
    }
}
