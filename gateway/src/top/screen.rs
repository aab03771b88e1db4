//! The lines of `tidegate top`, from the state that the dashboard has.
//!
//! Texts of the gateway contain no control characters here: they cannot change the terminal.

use serde_json::Value;

/// Columns and rows of a screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScreenSize {
    pub(super) columns: usize,
    pub(super) rows: usize,
}

/// The widest cell. A longer name is cut.
const CELL_MAX: usize = 40;

/// The state of a gateway as lines: some that always stay, and rows that can be scrolled.
#[derive(Debug)]
pub(super) struct Screen {
    head: Vec<String>,
    rows: Vec<String>,
}

impl Screen {
    pub(super) fn new(state: &Value) -> Self {
        let mut rows = table(&ROUTE_TITLES, list(&state["routes"]).iter().map(route_cells).collect());
        rows.push(String::new());
        let endpoints = list(&state["upstreams"]).iter().flat_map(|upstream| {
            list(&upstream["endpoints"]).iter().map(|endpoint| endpoint_cells(upstream, endpoint))
        });
        rows.extend(table(&ENDPOINT_TITLES, endpoints.collect()));
        Screen { head: head(state), rows }
    }

    /// The lines that fit, beginning with row `first`.
    pub(super) fn lines(&self, size: ScreenSize, first: usize) -> Vec<String> {
        let lines = self.head.iter().chain(self.rows.iter().skip(first)).take(size.rows);
        lines.map(|line| cut(line, size.columns).to_owned()).collect()
    }

    /// As `lines`, with a last line for keys or a fault.
    pub(super) fn lines_with(&self, size: ScreenSize, first: usize, fault: Option<&str>) -> Vec<String> {
        let mut lines = self.lines(ScreenSize { rows: size.rows.saturating_sub(1), ..size }, first);
        let last = fault.map_or_else(|| "q: quit   up, down: scroll".to_owned(), |fault| format!("! {}", plain(fault)));
        lines.push(cut(&last, size.columns).to_owned());
        lines
    }

    /// The rows that do not fit on the screen.
    pub(super) fn rows_hidden(&self, size: ScreenSize) -> usize {
        (self.head.len() + self.rows.len() + 1).saturating_sub(size.rows)
    }
}

fn head(state: &Value) -> Vec<String> {
    let totals = &state["totals"];
    let degraded: Vec<String> = list(&state["degraded"]).iter().map(text).collect();
    let reload = &state["reload"];
    let mut lines = vec![
        format!(
            "tidegate {} on {}, up {}   connections {} of {}   requests in flight {}",
            text(&state["version"]),
            text(&state["node"]),
            duration(&state["uptime_seconds"]),
            number(&state["connections"]),
            number(&state["connections_max"]),
            number(&state["requests_in_flight"]),
        ),
        format!(
            "requests/s {}   5xx/s {}   degraded/s {}   denied/s {}   hits {}   p50 {}   p99 {}",
            number(&totals["requests_per_second"]),
            number(&totals["errors_per_second"]),
            number(&totals["degraded_per_second"]),
            number(&totals["denied_per_second"]),
            percent(&totals["hit_ratio"]),
            millis(&totals["p50_ms"]),
            millis(&totals["p99_ms"]),
        ),
    ];
    if state["draining"] == true {
        lines.push("! draining".to_owned());
    }
    if !degraded.is_empty() {
        lines.push(format!("! degraded: {}", degraded.join("; ")));
    }
    if reload["last"]["result"] == "refused" {
        let fault = &reload["last"]["faults"][0];
        lines.push(format!(
            "! the changed configuration is refused: line {}: {}",
            fault["line"],
            text(&fault["message"])
        ));
    }
    lines.push(String::new());
    lines
}

const ROUTE_TITLES: [&str; 10] =
    ["ROUTE", "UPSTREAM", "REQ/S", "5XX/S", "4XX/S", "P50", "P99", "HITS", "DEGRADED/S", "BREAKER"];

fn route_cells(route: &Value) -> Vec<String> {
    let numbers = ["requests_per_second", "errors_per_second", "client_errors_per_second"];
    let mut cells = vec![text(&route["name"]), text(&route["upstream"])];
    cells.extend(numbers.map(|key| number(&route[key])));
    cells.extend([millis(&route["p50_ms"]), millis(&route["p99_ms"]), percent(&route["hit_ratio"])]);
    cells.extend([number(&route["degraded_per_second"]), text(&route["breaker"])]);
    cells
}

const ENDPOINT_TITLES: [&str; 14] = [
    "ENDPOINT",
    "UPSTREAM",
    "CALLS/S",
    "FAILED/S",
    "RETRIED",
    "SENT/S",
    "RECEIVED/S",
    "IN FLIGHT",
    "P50",
    "P99",
    "H1",
    "H2",
    "BACK IN",
    "STATE",
];

fn endpoint_cells(upstream: &Value, endpoint: &Value) -> Vec<String> {
    let connections = &endpoint["connections"];
    let reason = &endpoint["reason"];
    let state = if reason.is_null() {
        text(&endpoint["state"])
    } else {
        format!("{}: {}", text(&endpoint["state"]), text(reason))
    };
    let mut cells = vec![text(&endpoint["name"]), text(&upstream["name"])];
    cells.extend(["calls_per_second", "failures_per_second", "retries"].map(|key| number(&endpoint[key])));
    cells.extend(["bytes_sent_per_second", "bytes_received_per_second"].map(|key| bytes(&endpoint[key])));
    cells.push(number(&endpoint["in_flight"]));
    cells.extend(["latency_p50_ms", "latency_p99_ms"].map(|key| millis(&endpoint[key])));
    cells.extend([number(&connections["1.1"]), number(&connections["2"])]);
    cells.extend([duration(&endpoint["seconds_left"]), state]);
    cells
}

/// Lines with columns of equal width. The first two columns and the last one are texts, which begin
/// at the left.
fn table(titles: &[&str], rows: Vec<Vec<String>>) -> Vec<String> {
    let mut rows = rows;
    rows.insert(0, titles.iter().map(|title| (*title).to_owned()).collect());
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).min(CELL_MAX);
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            let cell = cut(cell, *width);
            if column < 2 || column + 1 == titles.len() { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// A text without control characters; `-` for none.
fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| "-".to_owned(), plain)
}

fn plain(text: &str) -> String {
    text.chars().map(|it| if it.is_control() { '?' } else { it }).collect()
}

fn number(value: &Value) -> String {
    match value.as_f64() {
        None => "-".to_owned(),
        Some(number) if number >= 100.0 || number.fract() == 0.0 => format!("{number:.0}"),
        Some(number) => format!("{number:.2}"),
    }
}

fn bytes(value: &Value) -> String {
    let Some(mut size) = value.as_f64() else { return "-".to_owned() };
    let mut unit = 0;
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    while size >= 1_024.0 && unit + 1 < UNITS.len() {
        size /= 1_024.0;
        unit += 1;
    }
    let decimals = usize::from(unit > 0);
    format!("{size:.decimals$} {}", UNITS[unit])
}

fn percent(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |ratio| format!("{:.1} %", ratio * 100.0))
}

fn millis(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), |millis| format!("{millis:.2} ms"))
}

fn duration(value: &Value) -> String {
    let Some(seconds) = value.as_f64() else { return "-".to_owned() };
    let seconds = seconds.ceil() as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The first `width` characters.
fn cut(text: &str, width: usize) -> &str {
    text.char_indices().nth(width).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn state() -> Value {
        let endpoint = json!({
            "name": "127.0.0.1:80", "state": "out", "reason": "failures", "seconds_left": 6.2, "in_flight": 3,
            "calls_per_second": 12.345, "failures_per_second": 1.0, "retries": 4,
            "bytes_sent_per_second": 12.0, "bytes_received_per_second": 1_572_864.0, "latency_p50_ms": 0.5, "latency_p99_ms": null,
            "connections": { "1.1": 2, "2": 0 },
        });
        json!({
            "version": "0.1.0", "node": "n\u{1b}[2J", "uptime_seconds": 7_300, "connections": 5, "connections_max": 9,
            "requests_in_flight": 1, "draining": false, "degraded": ["breaker shop"],
            "totals": { "requests_per_second": 420.4, "hit_ratio": 0.25 },
            "routes": [{ "name": "shop", "upstream": "shop", "requests_per_second": 420.4, "breaker": "open" }],
            "upstreams": [{ "name": "shop", "endpoints": [endpoint] }],
            "reload": { "last": { "result": "refused", "faults": [{ "line": 7, "message": "unknown key" }] } },
        })
    }

    #[test]
    fn routes_and_endpoints_are_lines() {
        let lines = Screen::new(&state()).lines(ScreenSize { columns: 200, rows: 99 }, 0);
        let line = |start: &str| lines.iter().find(|line| line.starts_with(start)).map_or("", String::as_str);
        assert_eq!(line("tidegate"), "tidegate 0.1.0 on n?[2J, up 2 h   connections 5 of 9   requests in flight 1");
        assert!(line("requests/s 420 ").contains("hits 25.0 %   p50 -"), "{lines:?}");
        assert_eq!(line("! degraded"), "! degraded: breaker shop");
        assert_eq!(line("! the changed"), "! the changed configuration is refused: line 7: unknown key");
        let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
        assert_eq!(cells(line("shop")), "shop shop 420 - - - - - - open");
        assert_eq!(
            cells(line("127.0.0.1:80")),
            "127.0.0.1:80 shop 12.35 1 4 12 B 1.5 MiB 3 0.50 ms - 2 0 7 s out: failures"
        );
    }

    #[test]
    fn lines_fit_the_screen() {
        let (screen, size) = (Screen::new(&state()), ScreenSize { columns: 20, rows: 6 });
        let lines = screen.lines_with(size, 2, Some("lost\n"));
        assert!(lines.len() == 6 && lines.iter().all(|line| line.chars().count() <= 20), "{lines:?}");
        assert_eq!(lines[5], "! lost?");
        assert_eq!(screen.rows_hidden(size), 5);
        assert_eq!(screen.rows_hidden(ScreenSize { columns: 20, rows: 99 }), 0);
    }

    #[test]
    fn another_state_is_shown_as_empty() {
        for state in [json!(null), json!([]), json!({ "routes": 1, "upstreams": [{}] })] {
            assert!(Screen::new(&state).lines(ScreenSize { columns: 80, rows: 24 }, 0).len() >= 3);
        }
    }
}
