//! Bytes of bodies that an endpoint has got and given, by direction. Heads are not counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::label;
use crate::metrics::{Counters, Label as _};

label! {
    /// The direction of bytes, as the gateway sees it.
    pub(crate) TrafficDirection, "direction", {
        Sent = "sent",
        Received = "received",
    }
}

/// The counts of one endpoint. Those of its upstream outlive it.
#[derive(Default)]
pub(super) struct EndpointTraffic {
    bytes: [AtomicU64; TrafficDirection::ALL.len()],
    totals: Option<Arc<Counters<TrafficDirection>>>,
}

impl EndpointTraffic {
    pub(super) fn set_totals(&mut self, totals: &Arc<Counters<TrafficDirection>>) {
        self.totals = Some(Arc::clone(totals));
    }

    /// Adds the bytes of one exchange. Most requests have none.
    pub(super) fn add(&self, direction: TrafficDirection, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.bytes[direction.index()].fetch_add(bytes, Relaxed);
        if let Some(totals) = &self.totals {
            totals.add(direction, bytes);
        }
    }

    pub(super) fn get(&self, direction: TrafficDirection) -> u64 {
        self.bytes[direction.index()].load(Relaxed)
    }
}
