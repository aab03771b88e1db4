//! Renders the record as an SVG bar chart. The background is light or dark according to the
//! reader's system.

use std::fmt::Write;

use crate::bench::goal::goals;
use crate::bench::peer::Peer;
use crate::bench::record::{BenchRecord, PeerFigures, WorkloadRecord};
use crate::spread::Spread;

const WIDTH: f64 = 840.0;
const LEFT: f64 = 150.0;
/// Space for the figures next to the longest bar.
const RIGHT: f64 = 130.0;
const TOP: f64 = 84.0;
const BAR: f64 = 13.0;
/// Width of a figure next to a bar.
const FIGURE: f64 = 44.0;
const STEP: f64 = 18.0;
const TITLE: f64 = 24.0;
const GAP: f64 = 14.0;
const FOOT: f64 = 34.0;

const STYLE: &str = "\
  .page { fill: #ffffff } text { font: 12px system-ui, sans-serif; fill: #24292f; paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
  .title { font-size: 16px; font-weight: 600 }
  .group { font-weight: 600 } .quiet { fill: #57606a } .grid { stroke: #d8dee4 } .one { stroke: #57606a; stroke-dasharray: 4 3 }
  .other { fill: #8c959f } .tidegate { fill: #0a7ea4 } .bound { fill: #d0d7de; stroke: #8c959f } .goal { stroke: #bc4c00; stroke-width: 2.5 }
  .spread { stroke: #24292f; stroke-width: 1.2 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3; stroke: #0d1117 } .quiet { fill: #9198a1 } .grid { stroke: #2a313c } .one { stroke: #9198a1 }
    .other { fill: #6e7681 } .tidegate { fill: #39b6d8 } .bound { fill: #2a313c; stroke: #6e7681 } .goal { stroke: #f0883e }
    .spread { stroke: #e6edf3 }
  }
";

/// CPU time per request of every peer as ratios to nginx.
pub(crate) fn svg(record: &BenchRecord) -> String {
    let groups: Vec<(&WorkloadRecord, Vec<(&PeerFigures, Spread)>)> =
        record.workloads.iter().map(|entry| (entry, bars(entry))).filter(|(_, bars)| !bars.is_empty()).collect();
    let scale = Scale::of(groups.iter().flat_map(|(_, bars)| bars).map(|(_, ratio)| *ratio));
    let heights = groups.iter().map(|(_, bars)| TITLE + STEP * as_f64(bars.len()) + GAP);
    let height = TOP + heights.sum::<f64>() + FOOT;
    let mut chart = ChartWriter { text: String::new(), scale };
    chart.frame(height);
    let mut y = TOP;
    for (entry, bars) in &groups {
        let description = entry.workload().map_or("", |workload| workload.description());
        let (x, baseline, name) = (LEFT, y + 16.0, escape(&entry.name));
        chart.line(format_args!("<text class=\"group\" x=\"16\" y=\"{baseline}\">{name}</text>"));
        chart.line(format_args!("<text class=\"quiet\" x=\"{x}\" y=\"{baseline}\">{description}</text>"));
        y += TITLE;
        for (figures, ratio) in bars {
            let goal_x = goal_to_nginx(entry, figures).map(|ratio| chart.goal(y, ratio));
            chart.bar(y, (figures, *ratio), goal_x);
            y += STEP;
        }
        y += GAP;
    }
    chart.line(format_args!("</svg>"));
    chart.text
}

/// Peers with a bar: all but nginx, which is the line at 1. Empty if nginx was not measured.
fn bars(entry: &WorkloadRecord) -> Vec<(&PeerFigures, Spread)> {
    let ratio = |figures: &PeerFigures| figures.ratio_to.get(Peer::Nginx.name()).map(|ratio| ratio.cpu);
    let others = entry.peers.iter().filter(|figures| figures.name != Peer::Nginx.name());
    others.filter_map(|figures| Some((figures, ratio(figures)?))).collect()
}

/// Maps ratios to x coordinates.
struct Scale {
    /// The ratio at the right end, a multiple of 0.5.
    end: f64,
}

impl Scale {
    /// Every bar fits; a spread may be clipped.
    fn of(ratios: impl Iterator<Item = Spread>) -> Self {
        let longest = ratios.map(|ratio| ratio.median).fold(1.5, f64::max);
        Scale { end: (longest * 2.0).ceil() / 2.0 }
    }

    fn x(&self, ratio: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (ratio / self.end).clamp(0.0, 1.0)
    }
}

/// Writes the elements of the chart.
struct ChartWriter {
    text: String,
    scale: Scale,
}

impl ChartWriter {
    fn frame(&mut self, height: f64) {
        self.line(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">"
        ));
        self.line(format_args!("<title>CPU time per request as ratios to nginx</title>\n<style>\n{STYLE}</style>"));
        self.line(format_args!("<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>"));
        self.line(format_args!("<text class=\"title\" x=\"16\" y=\"28\">Requests per CPU second, nginx = 1</text>"));
        self.line(format_args!(
            "<text class=\"quiet\" x=\"16\" y=\"48\">One core; longer is better. Thin lines: minimum to maximum of the rounds. Orange: \
             Tidegate's goal. Upper bounds are programs that do no work.</text>"
        ));
        let bottom = height - FOOT;
        let mut ratio = 0.0;
        while ratio <= self.scale.end {
            let (x, class) = (self.scale.x(ratio), if is_one(ratio) { "one" } else { "grid" });
            self.line(format_args!("<line class=\"{class}\" x1=\"{x:.1}\" y1=\"72\" x2=\"{x:.1}\" y2=\"{bottom}\"/>"));
            for y in [68.0, bottom + 16.0] {
                let label = if is_one(ratio) { "nginx".to_owned() } else { format!("{ratio}") };
                self.line(format_args!(
                    "<text class=\"quiet\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>"
                ));
            }
            ratio += 0.5;
        }
    }

    fn bar(&mut self, y: f64, (figures, ratio): (&PeerFigures, Spread), goal_x: Option<f64>) {
        let class = match figures.name.as_str() {
            "tidegate" => "tidegate",
            "constant-response" | "byte-relay" => "bound",
            _ => "other",
        };
        let (start, end, low, high) =
            (self.scale.x(0.0), self.scale.x(ratio.median), self.scale.x(ratio.min), self.scale.x(ratio.max));
        let (middle, base, name) = (y + BAR / 2.0, y + BAR - 2.5, escape(&figures.name));
        let errors = if figures.errors > 0 { format!(", {} errors", figures.errors) } else { String::new() };
        self.line(format_args!("<text x=\"{:.1}\" y=\"{base:.1}\" text-anchor=\"end\">{name}</text>", start - 8.0));
        self.line(format_args!(
            "<rect class=\"{class}\" x=\"{start:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/>",
            end - start
        ));
        self.line(format_args!(
            "<line class=\"spread\" x1=\"{low:.1}\" y1=\"{middle:.1}\" x2=\"{high:.1}\" y2=\"{middle:.1}\"/>"
        ));
        // The figure is next to the bar, or next to the goal if they would overlap.
        let edge = high.max(end);
        let x = goal_x.filter(|goal_x| (edge..edge + FIGURE).contains(goal_x)).unwrap_or(edge) + 8.0;
        self.line(format_args!("<text x=\"{x:.1}\" y=\"{base:.1}\">{:.2}{errors}</text>", ratio.median));
    }

    /// Draws the mark of a goal and returns its x coordinate.
    fn goal(&mut self, y: f64, ratio: f64) -> f64 {
        let (x, top, bottom) = (self.scale.x(ratio), y - 2.0, y + BAR + 2.0);
        self.line(format_args!(
            "<line class=\"goal\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"><title>goal {ratio}</title></line>"
        ));
        x
    }

    fn line(&mut self, arguments: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{arguments}").expect("writing to a string does not fail");
    }
}

fn is_one(ratio: f64) -> bool {
    (ratio - 1.0).abs() < f64::EPSILON
}

/// Goal of the workload relative to nginx, for the figures of Tidegate.
fn goal_to_nginx(entry: &WorkloadRecord, figures: &PeerFigures) -> Option<f64> {
    let workload = entry.workload().filter(|_| figures.name == Peer::Tidegate.name())?;
    goals(workload).iter().find(|goal| goal.baseline == Peer::Nginx).map(|goal| goal.ratio)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Exact up to 2^32.
fn as_f64(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::tests::entry;
    use crate::bench::workload::Workload;

    #[test]
    fn empty_record_gives_an_empty_chart() {
        let text = svg(&BenchRecord::default());
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
        assert_eq!(text.matches("<rect").count(), 1);
    }

    #[test]
    fn each_peer_but_nginx_has_a_bar_and_tidegate_a_goal() {
        let mut record = BenchRecord::default();
        record.put(entry(Workload::Hit1k, "a"));
        // Its only goal is relative to another baseline.
        record.put(entry(Workload::Hit1k512c, "a"));
        let text = svg(&record);
        assert_eq!(text.matches("<rect class=\"tidegate\"").count(), 2, "{text}");
        assert_eq!(text.matches("<title>goal 1.8</title>").count(), 1, "{text}");
        assert!(!text.contains("class=\"other\""), "{text}");
    }

    #[test]
    fn every_bar_fits_and_a_spread_is_clipped() {
        let ratio = |median| Spread { median, min: 0.0, max: 99.0 };
        let scale = Scale::of([ratio(1.2), ratio(2.1)].into_iter());
        assert!(is_one(scale.end - 1.5));
        assert!(scale.x(99.0) <= WIDTH - RIGHT);
        assert!(is_one(Scale::of(std::iter::empty()).end - 0.5));
    }

    #[test]
    fn names_from_a_file_are_escaped() {
        assert_eq!(escape("<a>&"), "&lt;a&gt;&amp;");
    }
}
