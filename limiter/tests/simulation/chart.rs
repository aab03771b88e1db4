//! The picture of the simulation: a fleet through an outage of Redis, and the result of every
//! scenario.

use std::fmt::Write;

use crate::catalogue::{OUTAGE, OUTAGE_RETURNS_EMPTY};
use crate::scenario::{Outcome, RATE};

const WIDTH: usize = 840;
/// The upper panel: positions of its axes.
const LEFT: f64 = 64.0;
const RIGHT: f64 = 816.0;
const TOP: f64 = 92.0;
const BOTTOM: f64 = 312.0;
/// Its ranges, in milliseconds and in admitted requests per step.
const FROM: usize = 1_000;
const TO: usize = 8_500;
const STEP: usize = 100;
const HIGHEST: f64 = 1_250.0;
/// The lower panel.
const TABLE: f64 = 420.0;
const ROW: f64 = 20.0;
const SCALE: (f64, f64) = (320.0, 560.0);
/// In percent of the ideal.
const PERCENT: (f64, f64) = (75.0, 105.0);

const STYLE: &str = "<style>
  text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-size: 16px; font-weight: 600 }
  .quiet { fill: #57606a } .head { fill: #57606a; font-weight: 600 } .grid { stroke: #e4e8ec } .axis { stroke: #8c959f }
  .limit { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 6 4 } .limit-text { fill: #bc4c00 }
  .outage { fill: #f1f3f5 } .band { fill: #f6f8fa }
  .kept { fill: none; stroke: #0a7ea4; stroke-width: 2.2; stroke-linejoin: round }
  .empty { fill: none; stroke: #8250df; stroke-width: 2.2; stroke-linejoin: round; stroke-dasharray: 2 3 }
  .stem { stroke: #0a7ea4; stroke-width: 2; opacity: 0.35 } .dot { fill: #0a7ea4 }
</style>
";

pub(crate) fn draw(outcomes: &[Outcome]) -> String {
    let height = TABLE + 40.0 + ROW * outcomes.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>The cluster limit through an outage of Redis, and by scenario</title>\n{STYLE}\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\"/>\n"
    );
    outage(&mut svg, outcomes);
    table(&mut svg, outcomes);
    svg + "</svg>\n"
}

fn outage(svg: &mut String, outcomes: &[Outcome]) {
    text(
        svg,
        ("title", (24.0, 30.0), "start"),
        "Twenty nodes share 10,000 requests per second while Redis is unavailable",
    );
    let subtitle = "Requests admitted per 100 ms by all nodes at five times the limit; simulated, virtual time, messages take 0.5 to 2.5 ms.";
    text(svg, ("quiet", (24.0, 50.0), "start"), subtitle);
    let (x, y) = (
        |millis: usize| LEFT + (millis - FROM) as f64 / (TO - FROM) as f64 * (RIGHT - LEFT),
        |count: f64| BOTTOM - count / HIGHEST * (BOTTOM - TOP),
    );
    let (down, back) = (x(2_000), x(7_000));
    push(
        svg,
        format!(
            "<rect class=\"outage\" x=\"{down:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{:.1}\"/>",
            back - down,
            BOTTOM - TOP
        ),
    );
    text(
        svg,
        ("quiet", (f64::midpoint(down, back), BOTTOM - 14.0), "middle"),
        "Redis unavailable: each node uses 0.8 of its last share",
    );
    for count in (0..=5).map(|step| f64::from(step) * 250.0) {
        line(svg, "grid", (LEFT, y(count)), (RIGHT, y(count)));
        text(svg, ("quiet", (LEFT - 8.0, y(count) + 4.0), "end"), &format!("{count:.0}"));
    }
    for second in 1..=8_usize {
        line(svg, "axis", (x(second * 1_000), BOTTOM), (x(second * 1_000), BOTTOM + 5.0));
        text(svg, ("quiet", (x(second * 1_000), BOTTOM + 19.0), "middle"), &format!("{second} s"));
    }
    line(svg, "axis", (LEFT, BOTTOM), (RIGHT, BOTTOM));
    let limit = y(RATE as f64 * STEP as f64 / 1_000.0);
    line(svg, "limit", (LEFT, limit), (RIGHT, limit));
    for (class, name) in [("empty", OUTAGE_RETURNS_EMPTY), ("kept", OUTAGE)] {
        let outcome = outcomes.iter().find(|outcome| outcome.scenario.name == name);
        let ticks = outcome.map_or(&[][..], |outcome| &outcome.ticks[..]);
        // A point is in the middle of the time that it counts.
        let point = |at: usize| {
            let admitted: u64 = ticks[at..at + STEP].iter().map(|tick| tick.admitted).sum();
            format!("{:.1},{:.1}", x(at + STEP / 2), y(admitted as f64))
        };
        let points: Vec<String> = (FROM..TO.min(ticks.len())).step_by(STEP).map(point).collect();
        push(svg, format!("<polyline class=\"{class}\" points=\"{}\"/>", points.join(" ")));
    }
    let mut legend = |at: f64, class: &str, content: &str| {
        line(svg, class, (at, 72.0), (at + 26.0, 72.0));
        text(svg, ("", (at + 34.0, 76.0), "start"), content);
    };
    legend(LEFT, "limit", "limit");
    legend(LEFT + 118.0, "kept", "Redis returns with its bucket");
    legend(LEFT + 368.0, "empty", "Redis returns empty");
}

fn table(svg: &mut String, outcomes: &[Outcome]) {
    text(
        svg,
        ("title", (24.0, TABLE - 54.0), "start"),
        "Requests admitted, relative to one ideal bucket that all nodes reach without delay",
    );
    let columns = [(292.0, "nodes"), (632.0, "of ideal"), (736.0, "worst window"), (816.0, "recovery")];
    text(svg, ("head", (24.0, TABLE - 8.0), "start"), "load and event");
    for (x, head) in columns {
        text(svg, ("head", (x, TABLE - 8.0), "end"), head);
    }
    let x = |percent: f64| SCALE.0 + (percent - PERCENT.0) / (PERCENT.1 - PERCENT.0) * (SCALE.1 - SCALE.0);
    let end = TABLE + ROW * outcomes.len() as f64;
    let top = |index: usize| TABLE + ROW * index as f64;
    for band in (0..outcomes.len()).step_by(2).map(top) {
        push(svg, format!("<rect class=\"band\" x=\"16\" y=\"{band}\" width=\"808\" height=\"{ROW}\"/>"));
    }
    for percent in [80.0, 90.0, 100.0] {
        let class = if percent < 100.0 { "grid" } else { "limit" };
        line(svg, class, (x(percent), TABLE - 2.0), (x(percent), end));
        text(svg, ("quiet", (x(percent), TABLE - 8.0), "middle"), &format!("{percent:.0} %"));
    }
    for (index, outcome) in outcomes.iter().enumerate() {
        let middle = top(index) + ROW / 2.0;
        let percent = outcome.of_ideal() * 100.0;
        let at = x(percent.clamp(PERCENT.0, PERCENT.1));
        line(svg, "stem", (x(100.0), middle), (at, middle));
        push(svg, format!("<circle class=\"dot\" cx=\"{at:.1}\" cy=\"{middle}\" r=\"4\"/>"));
        let cells = [
            outcome.scenario.nodes.to_string(),
            format!("{percent:.1} %"),
            format!("{:.0} % of B", outcome.excess / f64::from(outcome.scenario.burst) * 100.0),
            outcome.recovery.map_or(String::new(), |millis| format!("{millis} ms")),
        ];
        text(svg, ("", (24.0, middle + 4.0), "start"), outcome.scenario.name);
        for ((x, _), cell) in columns.iter().zip(&cells) {
            text(svg, ("", (*x, middle + 4.0), "end"), cell);
        }
    }
    let note = "Worst window: the most that any window of time t admitted above R * t, in percent of the burst B. Recovery: until 0.9 of the rate.";
    text(svg, ("quiet", (24.0, end + 24.0), "start"), note);
}

fn line(svg: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    push(
        svg,
        format!(
            "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
            from.0, from.1, to.0, to.1
        ),
    );
}

/// Class, position and anchor of a text.
type Label<'a> = (&'a str, (f64, f64), &'a str);

fn text(svg: &mut String, (class, (x, y), anchor): Label<'_>, content: &str) {
    let class = if class.is_empty() { String::new() } else { format!(" class=\"{class}\"") };
    push(svg, format!("<text{class} x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{content}</text>"));
}

fn push(svg: &mut String, element: String) {
    writeln!(svg, "{element}").expect("writing to a string cannot fail");
}
