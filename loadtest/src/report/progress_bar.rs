//! Progress of a long command on standard error: a bar that is redrawn on a terminal, lines
//! elsewhere.

use std::io::{IsTerminal as _, Write as _, stderr};
use std::time::{Duration, Instant};

const WIDTH: usize = 24;
const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// One bar. Its lines stay above it.
pub(crate) struct ProgressBar {
    is_terminal: bool,
    drawn: Option<Instant>,
}

impl ProgressBar {
    pub(crate) fn new() -> Self {
        ProgressBar { is_terminal: stderr().is_terminal(), drawn: None }
    }

    /// Shows a part from 0 to 1 with a label. Nothing happens where standard error is no terminal.
    pub(crate) fn show(&mut self, part: f64, label: &str) {
        if !self.is_terminal || self.drawn.is_some_and(|drawn| drawn.elapsed() < REDRAW_INTERVAL) {
            return;
        }
        self.drawn = Some(Instant::now());
        // A terminal that has gone does not end the measurement.
        drop(write!(stderr(), "\r\x1b[K{} {label}", bar(part)));
    }

    /// Writes a line that stays.
    pub(crate) fn line(&mut self, text: &str) {
        let clear = if self.drawn.take().is_some() { "\r\x1b[K" } else { "" };
        drop(writeln!(stderr(), "{clear}{text}"));
    }
}

impl Drop for ProgressBar {
    fn drop(&mut self) {
        if self.drawn.is_some() {
            drop(write!(stderr(), "\r\x1b[K"));
        }
    }
}

fn bar(part: f64) -> String {
    let full = (part.clamp(0.0, 1.0) * WIDTH as f64) as usize;
    format!("[{}{}]", "#".repeat(full), ".".repeat(WIDTH - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bar_has_its_width_whatever_the_part() {
        for (part, full) in [(-1.0, 0), (0.0, 0), (0.5, 12), (1.0, 24), (7.0, 24)] {
            assert_eq!((bar(part).len(), bar(part).matches('#').count()), (WIDTH + 2, full));
        }
    }
}
