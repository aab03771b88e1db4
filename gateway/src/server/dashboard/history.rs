//! The last fifteen minutes of the process, one point for each five seconds.
//!
//! Invariant: at most `POINTS` points are kept, about 20 KB. Every point has a sequence number, so
//! that a reader gets each point once.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::{Value, json};

use super::sample::RequestRates;

/// Distance of two points.
pub(super) const INTERVAL: Duration = Duration::from_secs(5);
/// Points that are kept.
const POINTS: usize = 180;

/// The process in the interval before one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct HistoryPoint {
    /// Seconds since 1970.
    pub(super) time: f64,
    pub(super) rates: RequestRates,
    /// Denials of limits per second.
    pub(super) denied: f64,
    pub(super) connections: usize,
    pub(super) in_flight: u64,
}

impl HistoryPoint {
    fn to_json(self) -> Value {
        let mut point = self.rates.to_json();
        point["time"] = json!(self.time);
        point["denied_per_second"] = json!(self.denied);
        point["connections"] = json!(self.connections);
        point["requests_in_flight"] = json!(self.in_flight);
        point
    }
}

/// The latest points and the number of the next one.
#[derive(Default)]
pub(super) struct History {
    points: VecDeque<HistoryPoint>,
    next: u64,
}

impl History {
    pub(super) fn push(&mut self, point: HistoryPoint) {
        if self.points.len() == POINTS {
            self.points.pop_front();
        }
        self.points.push_back(point);
        self.next += 1;
    }

    /// The points from number `from` on, the oldest first, and the number of the next point.
    pub(super) fn since(&self, from: u64) -> (Vec<Value>, u64) {
        let first = self.next - self.points.len() as u64;
        let skipped = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX);
        (self.points.iter().skip(skipped).map(|point| point.to_json()).collect(), self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_is_bounded_and_numbered() {
        let mut history = History::default();
        assert_eq!(history.since(0), (vec![], 0));
        for number in 0..POINTS + 2 {
            history.push(HistoryPoint { connections: number, ..HistoryPoint::default() });
        }
        let (points, next) = history.since(0);
        assert_eq!((points.len(), points[0]["connections"].as_u64(), next), (POINTS, Some(2), POINTS as u64 + 2));
        let (points, _) = history.since(next - 1);
        assert_eq!(points.iter().map(|point| point["connections"].as_u64()).collect::<Vec<_>>(), [Some(181)]);
        assert_eq!(history.since(next), (vec![], next));
        assert_eq!(history.since(next + 9), (vec![], next), "a reader of an earlier process");
    }
}
