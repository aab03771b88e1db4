//! The reference for the fleet: the ideal bucket that every request reaches without delay, and
//! the audit of all windows.

/// One token bucket for all nodes, without any delay. Starts empty, as the fleet's does. In
/// millionths of tokens.
pub(crate) struct IdealBucket {
    rate: u64,
    burst: u64,
    level: u64,
    at: u64,
}

impl IdealBucket {
    pub(crate) fn new(rate: u64, burst: u64) -> IdealBucket {
        IdealBucket { rate, burst: burst * 1_000_000, level: 0, at: 0 }
    }

    /// How many of these requests at `micros` it admits.
    pub(crate) fn admit(&mut self, requests: u64, micros: u64) -> u64 {
        self.level = self.burst.min(self.level + (micros - self.at) * self.rate);
        self.at = micros;
        let admitted = requests.min(self.level / 1_000_000);
        self.level -= admitted * 1_000_000;
        admitted
    }
}

/// Whether `admitted <= rate * t + burst` over every window, both ends included: the minimum of
/// `admitted - rate * t` so far represents all possible beginnings.
pub(crate) struct BoundAudit {
    rate: f64,
    least: f64,
    /// The largest excess over `rate * t` of any window that has ended, in tokens.
    pub(crate) worst: f64,
}

impl BoundAudit {
    pub(crate) fn new(rate: u64) -> BoundAudit {
        BoundAudit { rate: rate as f64, least: f64::MAX, worst: 0.0 }
    }

    /// Records the total admitted before and after the requests at `micros`.
    pub(crate) fn record(&mut self, before: u64, after: u64, micros: u64) {
        let passed = self.rate * micros as f64 / 1e6;
        self.least = self.least.min(before as f64 - passed);
        self.worst = self.worst.max(after as f64 - passed - self.least);
    }
}
