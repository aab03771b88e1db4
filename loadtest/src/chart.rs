//! The record as a bar chart, in SVG written by hand. It brings its own background, light or dark as the reader's system is.

use std::fmt::Write;

use crate::goal::goals;
use crate::peer::Peer;
use crate::record::{Entry, Figures, Record};
use crate::spread::Spread;

const WIDTH: f64 = 840.0;
const LEFT: f64 = 150.0;
/// Room for the figures beside the longest bar.
const RIGHT: f64 = 130.0;
const TOP: f64 = 84.0;
const BAR: f64 = 13.0;
/// Width of a figure beside a bar.
const FIGURE: f64 = 44.0;
const STEP: f64 = 18.0;
const TITLE: f64 = 24.0;
const GAP: f64 = 14.0;
const FOOT: f64 = 34.0;

const STYLE: &str = "\
  .page { fill: #ffffff } text { font: 12px system-ui, sans-serif; fill: #24292f; paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
  .title { font-size: 16px; font-weight: 600 }
  .group { font-weight: 600 } .quiet { fill: #57606a } .grid { stroke: #d8dee4 } .one { stroke: #57606a; stroke-dasharray: 4 3 }
  .other { fill: #8c959f } .tidegate { fill: #0a7ea4 } .limit { fill: #d0d7de; stroke: #8c959f } .goal { stroke: #bc4c00; stroke-width: 2.5 }
  .spread { stroke: #24292f; stroke-width: 1.2 }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } text { fill: #e6edf3; stroke: #0d1117 } .quiet { fill: #9198a1 } .grid { stroke: #2a313c } .one { stroke: #9198a1 }
    .other { fill: #6e7681 } .tidegate { fill: #39b6d8 } .limit { fill: #2a313c; stroke: #6e7681 } .goal { stroke: #f0883e }
    .spread { stroke: #e6edf3 }
  }
";

/// CPU time per request of every peer as ratios to nginx.
pub(crate) fn svg(record: &Record) -> String {
    let groups: Vec<(&Entry, Vec<(&Figures, Spread)>)> =
        record.workloads.iter().map(|entry| (entry, bars(entry))).filter(|(_, bars)| !bars.is_empty()).collect();
    let scale = Scale::of(groups.iter().flat_map(|(_, bars)| bars).map(|(_, ratio)| *ratio));
    let heights = groups.iter().map(|(_, bars)| TITLE + STEP * count(bars.len()) + GAP);
    let height = TOP + heights.sum::<f64>() + FOOT;
    let mut text = String::new();
    frame(&mut text, &scale, height);
    let mut y = TOP;
    for (entry, bars) in &groups {
        let about = entry.workload().map_or("", |workload| workload.about());
        let (x, at, name) = (LEFT, y + 16.0, escaped(&entry.name));
        line(&mut text, format_args!("<text class=\"group\" x=\"16\" y=\"{at}\">{name}</text>"));
        line(&mut text, format_args!("<text class=\"quiet\" x=\"{x}\" y=\"{at}\">{about}</text>"));
        y += TITLE;
        for (figures, ratio) in bars {
            let goal = wanted(entry, figures).map(|ratio| goal(&mut text, &scale, y, ratio));
            bar(&mut text, &scale, y, (figures, *ratio), goal);
            y += STEP;
        }
        y += GAP;
    }
    line(&mut text, format_args!("</svg>"));
    text
}

/// Who is shown: nginx is the line at 1, and without it there is nothing to compare with.
fn bars(entry: &Entry) -> Vec<(&Figures, Spread)> {
    let ratio = |figures: &Figures| figures.ratio_to.get(Peer::Nginx.name()).map(|ratio| ratio.cpu);
    let others = entry.peers.iter().filter(|figures| figures.name != Peer::Nginx.name());
    others.filter_map(|figures| Some((figures, ratio(figures)?))).collect()
}

/// From ratios to places.
struct Scale {
    /// The ratio at the right end, a multiple of one half.
    end: f64,
}

impl Scale {
    /// Every bar fits; a spread may be cut off.
    fn of(ratios: impl Iterator<Item = Spread>) -> Self {
        let longest = ratios.map(|ratio| ratio.median).fold(1.5, f64::max);
        Scale { end: (longest * 2.0).ceil() / 2.0 }
    }

    fn place(&self, ratio: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * (ratio / self.end).clamp(0.0, 1.0)
    }
}

fn frame(text: &mut String, scale: &Scale, height: f64) {
    line(
        text,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">"
        ),
    );
    line(text, format_args!("<title>CPU time per request as ratios to nginx</title>\n<style>\n{STYLE}</style>"));
    line(text, format_args!("<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>"));
    line(text, format_args!("<text class=\"title\" x=\"16\" y=\"28\">Requests per CPU second, nginx = 1</text>"));
    line(
        text,
        format_args!(
            "<text class=\"quiet\" x=\"16\" y=\"48\">One core; longer is better. Thin lines: smallest to largest of the rounds. Orange: \
             Tidegate's goal. Limits do no work at all.</text>"
        ),
    );
    let bottom = height - FOOT;
    let mut ratio = 0.0;
    while ratio <= scale.end {
        let (x, class) = (scale.place(ratio), if is_one(ratio) { "one" } else { "grid" });
        line(text, format_args!("<line class=\"{class}\" x1=\"{x:.1}\" y1=\"72\" x2=\"{x:.1}\" y2=\"{bottom}\"/>"));
        for y in [68.0, bottom + 16.0] {
            let label = if is_one(ratio) { "nginx".to_owned() } else { format!("{ratio}") };
            line(
                text,
                format_args!("<text class=\"quiet\" x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>"),
            );
        }
        ratio += 0.5;
    }
}

fn is_one(ratio: f64) -> bool {
    (ratio - 1.0).abs() < f64::EPSILON
}

fn bar(text: &mut String, scale: &Scale, y: f64, (figures, ratio): (&Figures, Spread), goal: Option<f64>) {
    let class = match figures.name.as_str() {
        "tidegate" => "tidegate",
        name if name.starts_with("limit") => "limit",
        _ => "other",
    };
    let (start, end, low, high) =
        (scale.place(0.0), scale.place(ratio.median), scale.place(ratio.min), scale.place(ratio.max));
    let (middle, base, name) = (y + BAR / 2.0, y + BAR - 2.5, escaped(&figures.name));
    let errors = if figures.errors > 0 { format!(", {} errors", figures.errors) } else { String::new() };
    line(text, format_args!("<text x=\"{:.1}\" y=\"{base:.1}\" text-anchor=\"end\">{name}</text>", start - 8.0));
    line(
        text,
        format_args!(
            "<rect class=\"{class}\" x=\"{start:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\"/>",
            end - start
        ),
    );
    line(
        text,
        format_args!("<line class=\"spread\" x1=\"{low:.1}\" y1=\"{middle:.1}\" x2=\"{high:.1}\" y2=\"{middle:.1}\"/>"),
    );
    // The figure stands beside the bar, or beside the goal where that would be under it.
    let edge = high.max(end);
    let x = goal.filter(|goal| (edge..edge + FIGURE).contains(goal)).unwrap_or(edge) + 8.0;
    line(text, format_args!("<text x=\"{x:.1}\" y=\"{base:.1}\">{:.2}{errors}</text>", ratio.median));
}

/// The goal to nginx, where figures and workload have one.
fn wanted(entry: &Entry, figures: &Figures) -> Option<f64> {
    let workload = entry.workload().filter(|_| figures.name == Peer::Tidegate.name())?;
    goals(workload).iter().find(|goal| goal.yardstick == Peer::Nginx).map(|goal| goal.ratio)
}

/// Marks a goal, and tells where.
fn goal(text: &mut String, scale: &Scale, y: f64, ratio: f64) -> f64 {
    let (x, top, bottom) = (scale.place(ratio), y - 2.0, y + BAR + 2.0);
    line(
        text,
        format_args!(
            "<line class=\"goal\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"><title>goal {ratio}</title></line>"
        ),
    );
    x
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Exact: nobody has that many peers.
fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap_or(u32::MAX))
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
    fn without_figures_there_is_an_empty_chart() {
        let text = svg(&Record::default());
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n"), "{text}");
        assert_eq!(text.matches("<rect").count(), 1);
    }

    #[test]
    fn each_peer_but_nginx_has_a_bar_and_tidegate_a_goal() {
        let mut record = Record::default();
        record.put(entry(Workload::Hit1k, "a"));
        // Its only goal is to another yardstick.
        record.put(entry(Workload::Hit1k512c, "a"));
        let text = svg(&record);
        assert_eq!(text.matches("<rect class=\"tidegate\"").count(), 2, "{text}");
        assert_eq!(text.matches("<title>goal 1.8</title>").count(), 1, "{text}");
        assert!(!text.contains("class=\"other\""), "{text}");
    }

    #[test]
    fn every_bar_fits_and_a_spread_is_cut_off() {
        let ratio = |median| Spread { median, min: 0.0, max: 99.0 };
        let scale = Scale::of([ratio(1.2), ratio(2.1)].into_iter());
        assert!(is_one(scale.end - 1.5));
        assert!(scale.place(99.0) <= WIDTH - RIGHT);
        assert!(is_one(Scale::of(std::iter::empty()).end - 0.5));
    }

    #[test]
    fn names_from_a_file_are_no_markup() {
        assert_eq!(escaped("<a>&"), "&lt;a&gt;&amp;");
    }
}
