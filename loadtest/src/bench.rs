//! The bench: Tidegate and its peers under the same load, in turns.
//!
//! Definitions: `workload`, `peer` and `goal`. A run: `launcher` and `origin_front` start the
//! servers, `load_run` loads them, `response_check` verifies them with `client` or `curl` and
//! counts in `probe_counts`, `comparison` plays the rounds and shows `progress`. Figures: `machine`
//! says where they are from, `record` stores them, `markdown` and `chart` render them, and
//! `report_directory` holds the files.

pub(crate) mod probe_counts;
pub(crate) mod workload;
mod load_run;
pub(crate) mod peer;
mod goal;
pub(crate) mod client;
mod curl;
pub(crate) mod response_check;
mod launcher;
mod origin_front;
mod progress;
pub(crate) mod comparison;
pub(crate) mod machine;
pub(crate) mod record;
pub(crate) mod markdown;
mod chart;
pub(crate) mod report_directory;
