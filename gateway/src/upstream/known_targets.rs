//! The known addresses of one item of `endpoints`: the last good answer of its source, and the
//! failure since.

use std::time::Instant;

use serde_json::json;

use crate::endpoint::{EndpointAddress, EndpointTarget};

/// The addresses of one item of `endpoints`.
#[derive(Clone, Default)]
pub(super) enum KnownTargets {
    /// No lookup has ended yet.
    #[default]
    Awaited,
    /// Every lookup has failed so far.
    None,
    /// The last good answer.
    Some(Vec<EndpointTarget>),
}

/// The addresses of one item of `endpoints`, and whether they can be looked up now.
#[derive(Clone, Default)]
pub(super) struct NamedTargets {
    pub(super) targets: KnownTargets,
    /// The last failure, and the time of the first since the last good answer.
    pub(super) failure: Option<(String, Instant)>,
}

impl NamedTargets {
    /// Of an item that is an address.
    pub(super) fn numeric(target: EndpointTarget) -> Self {
        NamedTargets { targets: KnownTargets::Some(vec![target]), failure: None }
    }

    /// Returns whether there was no failure before.
    pub(super) fn note_failure(&mut self, error: String, now: Instant) -> bool {
        match &mut self.failure {
            Some((known, _)) => {
                *known = error;
                false
            }
            None => {
                self.failure = Some((error, now));
                true
            }
        }
    }

    /// The state for the admin address.
    pub(super) fn to_json(&self, origin: &EndpointAddress, now: Instant) -> serde_json::Value {
        let addresses = match &self.targets {
            KnownTargets::Some(targets) => Some(targets.len()),
            KnownTargets::Awaited | KnownTargets::None => None,
        };
        json!({
            "name": origin.to_string(),
            "addresses": addresses,
            "error": self.failure.as_ref().map(|(error, _)| error),
            "failing_seconds": self.failure.as_ref().map(|(_, since)| now.saturating_duration_since(*since).as_secs()),
        })
    }
}
