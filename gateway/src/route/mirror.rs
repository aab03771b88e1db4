//! A mirror: another upstream that gets copies of a share of a route's requests. Its responses are
//! read and dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use limiter::Percent;

use crate::label;
use crate::metrics::Counters;
use crate::upstream::Upstream;

/// Copies of a route's requests for another upstream (`routes.mirror`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MirrorConfig {
    /// Index into the upstreams.
    pub(crate) upstream: usize,
    /// Part of the requests.
    pub(crate) percent: Percent,
}

label! {
    /// The end of a mirrored request.
    pub(crate) MirrorResult, "result", {
        /// The upstream has responded, with any status.
        Responded = "responded",
        Failed = "failed",
        /// Not sent: too many copies are in progress.
        Busy = "busy",
        /// Not sent: the body is larger than what is kept, or came too slowly.
        Body = "body",
    }
}

/// The mirror of a route.
pub(crate) struct Mirror {
    pub(crate) upstream: Arc<Upstream>,
    percent: Percent,
    /// Requests so far.
    requests: AtomicU64,
    pub(crate) results: Arc<Counters<MirrorResult>>,
}

impl Mirror {
    pub(crate) fn new(upstream: Arc<Upstream>, percent: Percent, results: Arc<Counters<MirrorResult>>) -> Self {
        Mirror { upstream, percent, requests: AtomicU64::new(0), results }
    }

    /// Whether the next request is copied: evenly spread, as often as the percentage says.
    pub(crate) fn takes_next(&self) -> bool {
        let percent = u64::from(self.percent.get());
        let before = self.requests.fetch_add(1, Relaxed) % 100;
        (before + 1) * percent / 100 > before * percent / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::EndpointAddress;
    use crate::upstream::UpstreamConfig;

    #[test]
    fn share_of_requests_is_exact_and_evenly_spread() {
        for percent in [0, 1, 25, 50, 99, 100] {
            let config = UpstreamConfig::new("copy".into(), vec![EndpointAddress::http("127.0.0.1", 1)]);
            let percentage = Percent::try_from(percent).expect("a percentage");
            let mirror = Mirror::new(Arc::new(Upstream::new(config, None)), percentage, Arc::default());
            let taken: Vec<bool> = (0..1_000).map(|_| mirror.takes_next()).collect();
            assert_eq!(taken.iter().filter(|taken| **taken).count(), 10 * usize::from(percent));
            if percent == 25 {
                assert!(taken.chunks(4).all(|chunk| chunk.iter().filter(|taken| **taken).count() == 1));
            }
        }
    }
}
