//! Output that several commands share: line charts, and the progress bar.

pub(crate) mod line_chart;
pub(crate) mod progress_bar;
