//! Pictures and tables of simulations, in docs/. A test compares them with what is committed;
//! `UPDATE_DOCS=1` (`make docs`) writes them.

use std::fmt::Write;
use std::path::PathBuf;

const WIDTH: f64 = 840.0;
/// Size of a panel with its title and axis.
const PANEL: (f64, f64) = (400.0, 190.0);
const TOP: f64 = 84.0;
const STYLE: &str = "<style>
  text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-size: 16px; font-weight: 600 }
  .head { font-weight: 600 } .quiet { fill: #57606a } .grid { stroke: #e4e8ec } .axis { stroke: #8c959f }
  polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round }
  .a { stroke: #0a7ea4 } .b { stroke: #bc4c00 } .c { stroke: #8250df } .d { stroke: #1a7f37 }
</style>
";
const CLASSES: [&str; 4] = ["a", "b", "c", "d"];

/// One diagram: values over an axis from 0 on.
pub(crate) struct Panel {
    pub(crate) title: String,
    /// The unit of the horizontal axis, and its end.
    pub(crate) across: (&'static str, f64),
    pub(crate) highest: f64,
    pub(crate) lines: Vec<Vec<(f64, f64)>>,
}

/// Draws panels in two columns. `legend` names the lines of all panels.
pub(crate) fn draw((title, subtitle): (&str, &str), legend: &[&str], panels: &[Panel]) -> String {
    let height = TOP + PANEL.1 * panels.len().div_ceil(2) as f64 + 12.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\">\n\
         <title>{title}</title>\n{STYLE}<rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#ffffff\"/>\n"
    );
    text(&mut svg, ("title", 24.0, 30.0), title);
    text(&mut svg, ("quiet", 24.0, 50.0), subtitle);
    for (index, name) in legend.iter().enumerate() {
        let x = 24.0 + 200.0 * index as f64;
        push(
            &mut svg,
            &format!(
                "<line class=\"{}\" stroke-width=\"2\" x1=\"{x}\" y1=\"68\" x2=\"{}\" y2=\"68\"/>",
                CLASSES[index],
                x + 24.0
            ),
        );
        text(&mut svg, ("", x + 32.0, 72.0), name);
    }
    for (index, panel) in panels.iter().enumerate() {
        panel.draw(&mut svg, (24.0 + 408.0 * (index % 2) as f64, TOP + PANEL.1 * (index / 2) as f64));
    }
    svg + "</svg>\n"
}

impl Panel {
    fn draw(&self, svg: &mut String, (left, top): (f64, f64)) {
        let (from, to) = ((left + 44.0, top + PANEL.1 - 34.0), (left + PANEL.0 - 16.0, top + 30.0));
        let x = |value: f64| from.0 + value / self.across.1 * (to.0 - from.0);
        let y = |value: f64| from.1 + value.min(self.highest) / self.highest * (to.1 - from.1);
        text(svg, ("head", left, top + 16.0), &self.title);
        for part in [0.0, 0.5, 1.0] {
            let value = self.highest * part;
            push(
                svg,
                &format!(
                    "<line class=\"grid\" x1=\"{:.1}\" y1=\"{2:.1}\" x2=\"{:.1}\" y2=\"{2:.1}\"/>",
                    from.0,
                    to.0,
                    y(value)
                ),
            );
            let label = if self.highest < 4.0 { format!("{value:.1}") } else { format!("{value:.0}") };
            push(
                svg,
                &format!(
                    "<text class=\"quiet\" text-anchor=\"end\" x=\"{:.1}\" y=\"{:.1}\">{label}</text>",
                    from.0 - 6.0,
                    y(value) + 4.0
                ),
            );
            let at = self.across.1 * part;
            push(
                svg,
                &format!(
                    "<text class=\"quiet\" text-anchor=\"middle\" x=\"{:.1}\" y=\"{:.1}\">{at:.0} {}</text>",
                    x(at),
                    from.1 + 18.0,
                    self.across.0
                ),
            );
        }
        for (line, class) in self.lines.iter().zip(CLASSES) {
            let points: Vec<String> =
                line.iter().map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(*value))).collect();
            push(svg, &format!("<polyline class=\"{class}\" points=\"{}\"/>", points.join(" ")));
        }
    }
}

/// Class and position of a text, and the text.
fn text(svg: &mut String, (class, x, y): (&str, f64, f64), content: &str) {
    push(svg, &format!("<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{content}</text>"));
}

fn push(svg: &mut String, element: &str) {
    writeln!(svg, "{element}").expect("writing to a string cannot fail");
}

fn documents() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs"))
}

/// Compares a file of docs/ with `expected`.
pub(crate) fn assert_file(name: &str, expected: &str) {
    let path = documents().join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&path, expected).expect("a writable directory");
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == expected, "docs/{name} differs from the simulation: `make docs` regenerates it");
}

/// Compares the part of docs/simulations.md between the comments `NAME` and `/NAME`.
pub(crate) fn assert_table(name: &str, table: &str) {
    let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- /{name} -->\n"));
    let page = std::fs::read_to_string(documents().join("simulations.md")).expect("docs/simulations.md");
    let (before, rest) = page.split_once(&begin).expect("the first comment");
    let (_, after) = rest.split_once(&end).expect("the last comment");
    assert_file("simulations.md", &format!("{before}{begin}{table}{end}{after}"));
}
