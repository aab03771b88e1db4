//! The result of the last reload, for the dashboard.
//!
//! Invariant: the text is bounded, however many faults a file has.

use std::cell::{Cell, RefCell};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::config::ConfigReport;

/// Faults that are shown. The log and `tidegate check` have all.
const FAULTS_MAX: usize = 10;

/// The result of the last reload.
#[derive(Default)]
pub(super) struct ReloadStatus {
    last: RefCell<Option<Value>>,
    reloads: Cell<u64>,
    refused: Cell<u64>,
}

impl ReloadStatus {
    /// Records a reload that took effect, with its warnings and the settings that need a restart.
    pub(super) fn record_loaded(&self, trigger: &str, warnings: &ConfigReport, restart: &[&str]) {
        self.reloads.set(self.reloads.get() + 1);
        self.record(trigger, "loaded", faults(warnings));
        if let Some(last) = &mut *self.last.borrow_mut() {
            last["needs_restart"] = json!(restart);
        }
    }

    /// Records a reload that was refused for the faults of its file.
    pub(super) fn record_refused(&self, trigger: &str, report: &ConfigReport) {
        self.refused.set(self.refused.get() + 1);
        self.record(trigger, "refused", faults(report));
    }

    /// Records a reload that was refused for another reason.
    pub(super) fn record_failed(&self, trigger: &str, error: &dyn std::fmt::Display) {
        self.refused.set(self.refused.get() + 1);
        self.record(trigger, "refused", json!([{ "severity": "error", "message": error.to_string() }]));
    }

    fn record(&self, trigger: &str, result: &str, faults: Value) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        *self.last.borrow_mut() = Some(json!({
            "time": time,
            "trigger": trigger,
            "result": result,
            "faults": faults,
            "needs_restart": [],
        }));
    }

    /// `generation` is that of the configuration in use.
    pub(super) fn to_json(&self, generation: u64) -> Value {
        json!({
            "generation": generation,
            "loaded": self.reloads.get(),
            "refused": self.refused.get(),
            "last": *self.last.borrow(),
        })
    }
}

fn faults(report: &ConfigReport) -> Value {
    let mut faults = report.to_json();
    if let Some(list) = faults.as_array_mut() {
        list.truncate(FAULTS_MAX);
    }
    faults
}
