//! Line charts as SVG without scripts or external resources. Colours follow the reader's system,
//! light or dark.

use std::fmt::Write as _;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 74.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 46.0;
const COLUMNS: usize = 5;
const ROWS: usize = 5;

/// Rules of a chart, for a document that embeds several.
pub(crate) const STYLE: &str = "\
.page { fill: #ffffff } .chart text { font: 12px system-ui, sans-serif; fill: #24292f } .chart .title { font-size: 15px; font-weight: 600 }
.chart .quiet { fill: #57606a } .grid { stroke: #d8dee4 } .mark { stroke: #bc4c00; stroke-dasharray: 5 4 } .chart .marked { fill: #bc4c00 }
.line { fill: none; stroke-width: 2 } .s0 { stroke: #0a7ea4 } .s1 { stroke: #8250df } .s2 { stroke: #bc4c00 } .s3 { stroke: #57606a }
.d0 { fill: #0a7ea4 } .d1 { fill: #8250df } .d2 { fill: #bc4c00 } .d3 { fill: #57606a }
@media (prefers-color-scheme: dark) {
.page { fill: #0d1117 } .chart text { fill: #e6edf3 } .chart .quiet { fill: #9198a1 } .grid { stroke: #2a313c } .mark { stroke: #f0883e } .chart .marked { fill: #f0883e }
.s0 { stroke: #39b6d8 } .s1 { stroke: #b392f0 } .s2 { stroke: #f0883e } .s3 { stroke: #9198a1 }
.d0 { fill: #39b6d8 } .d1 { fill: #b392f0 } .d2 { fill: #f0883e } .d3 { fill: #9198a1 }
}
";

/// The form of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SeriesForm {
    Line,
    Dots,
}

/// One line or set of dots.
#[derive(Clone, Debug)]
pub(crate) struct ChartSeries {
    pub(crate) name: String,
    pub(crate) form: SeriesForm,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A chart: title, labels of both axes, series, and vertical marks.
#[derive(Clone, Debug, Default)]
pub(crate) struct LineChart {
    pub(crate) title: String,
    pub(crate) x_label: String,
    pub(crate) y_label: String,
    pub(crate) series: Vec<ChartSeries>,
    pub(crate) marks: Vec<(f64, String)>,
}

/// Charts below each other, as a document of their own.
pub(crate) fn document(charts: &[LineChart]) -> String {
    let height = HEIGHT * charts.len() as f64;
    let title = charts.first().map_or("", |chart| chart.title.as_str());
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"8\"/>\n",
        escape(title)
    );
    for (index, chart) in charts.iter().enumerate() {
        let y = HEIGHT * index as f64;
        write(&mut out, format_args!("<g class=\"chart\" transform=\"translate(0 {y})\">"));
        chart.draw(&mut out);
        out.push_str("</g>\n");
    }
    out.push_str("</svg>\n");
    out
}

impl LineChart {
    fn draw(&self, out: &mut String) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let x_end =
            round_up(points().map(|point| point.0).chain(self.marks.iter().map(|mark| mark.0)).fold(0.0, f64::max));
        let y_end = round_up(points().map(|point| point.1).fold(0.0, f64::max));
        let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * value / x_end;
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / y_end;
        write(out, format_args!("<text class=\"title\" x=\"16\" y=\"24\">{}</text>", escape(&self.title)));
        self.legend(out);
        for row in 0..=ROWS {
            let value = y_end * row as f64 / ROWS as f64;
            let (at, label) = (y(value), number(value));
            write(
                out,
                format_args!(
                    "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{:.1}\" y2=\"{at:.1}\"/>",
                    WIDTH - RIGHT
                ),
            );
            write(
                out,
                format_args!(
                    "<text class=\"quiet\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                    LEFT - 8.0,
                    at + 4.0
                ),
            );
        }
        for column in 0..=COLUMNS {
            let value = x_end * column as f64 / COLUMNS as f64;
            let (at, label) = (x(value), number(value));
            write(
                out,
                format_args!(
                    "<text class=\"quiet\" x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{label}</text>",
                    HEIGHT - BOTTOM + 18.0
                ),
            );
        }
        let (middle, foot) = ((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 8.0);
        write(
            out,
            format_args!(
                "<text class=\"quiet\" x=\"{middle:.1}\" y=\"{foot:.1}\" text-anchor=\"middle\">{}</text>",
                escape(&self.x_label)
            ),
        );
        for (value, name) in &self.marks {
            let at = x(*value);
            write(
                out,
                format_args!(
                    "<line class=\"mark\" x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{:.1}\"/>",
                    HEIGHT - BOTTOM
                ),
            );
            write(
                out,
                format_args!(
                    "<text class=\"marked\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                    at - 4.0,
                    TOP + 10.0,
                    escape(name)
                ),
            );
        }
        for (index, series) in self.series.iter().enumerate() {
            let class = index % 4;
            match series.form {
                SeriesForm::Line => {
                    let path: Vec<String> =
                        series.points.iter().map(|(px, py)| format!("{:.1},{:.1}", x(*px), y(*py))).collect();
                    write(out, format_args!("<polyline class=\"line s{class}\" points=\"{}\"/>", path.join(" ")));
                }
                SeriesForm::Dots => {
                    for (px, py) in &series.points {
                        write(
                            out,
                            format_args!(
                                "<circle class=\"d{class}\" cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.2\"/>",
                                x(*px),
                                y(*py)
                            ),
                        );
                    }
                }
            }
        }
    }

    fn legend(&self, out: &mut String) {
        write(out, format_args!("<text class=\"quiet\" x=\"16\" y=\"46\">{}</text>", escape(&self.y_label)));
        let mut right = WIDTH - RIGHT;
        for (index, series) in self.series.iter().enumerate().rev() {
            write(
                out,
                format_args!(
                    "<text class=\"quiet\" x=\"{right:.1}\" y=\"46\" text-anchor=\"end\">{}</text>",
                    escape(&series.name)
                ),
            );
            right -= 7.0 * series.name.chars().count() as f64 + 12.0;
            write(out, format_args!("<circle class=\"d{}\" cx=\"{right:.1}\" cy=\"42\" r=\"4\"/>", index % 4));
            right -= 14.0;
        }
    }
}

fn write(out: &mut String, arguments: std::fmt::Arguments<'_>) {
    writeln!(out, "{arguments}").expect("writing to a string does not fail");
}

/// The next number of 1, 1.5, 2, 3, 5, 7.5 and their multiples by powers of ten; 1 of 0.
fn round_up(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0];
    steps.iter().map(|step| step * power).find(|end| *end >= value * 0.999_999).unwrap_or(10.0 * power)
}

/// A number with as many places as it needs on an axis.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 10_000.0 => format!("{:.1} k", value / 1e3).replace(".0 k", " k"),
        size if size >= 20.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_chart_is_drawn() {
        let text = document(&[LineChart::default()]);
        assert!(text.starts_with("<svg ") && text.ends_with("</svg>\n") && !text.contains("NaN"), "{text}");
    }

    #[test]
    fn each_series_has_its_form_and_names_are_escaped() {
        let series =
            |name: &str, form| ChartSeries { name: name.to_owned(), form, points: vec![(0.0, 1.0), (9.0, 12.0)] };
        let chart = LineChart {
            title: "a < b".to_owned(),
            series: vec![series("line", SeriesForm::Line), series("dots", SeriesForm::Dots)],
            marks: vec![(5.0, "knee".to_owned())],
            ..LineChart::default()
        };
        let text = document(&[chart]);
        assert_eq!(text.matches("<polyline").count(), 1, "{text}");
        assert_eq!(text.matches("r=\"3.2\"").count(), 2, "{text}");
        assert!(text.contains("a &lt; b") && text.contains("prefers-color-scheme: dark"), "{text}");
    }

    #[test]
    fn axes_end_at_a_round_number_that_holds_all_points() {
        for (value, end) in
            [(0.0, 1.0), (0.9, 1.0), (101.0, 150.0), (99.0, 100.0), (7_400.0, 7_500.0), (8_000.0, 10_000.0)]
        {
            assert!((round_up(value) - end).abs() < 1e-6 * end, "{value}: {}", round_up(value));
        }
    }
}
