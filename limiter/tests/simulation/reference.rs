//! Owns what the fleet is measured by: the ideal bucket that every request would ask, and the account of all windows.

/// One token bucket for everybody, without any distance. Starts empty, as the fleet's does. In millionths.
pub(crate) struct Reference {
    rate: u64,
    burst: u64,
    level: u64,
    at: u64,
}

impl Reference {
    pub(crate) fn new(rate: u64, burst: u64) -> Reference {
        Reference { rate, burst: burst * 1_000_000, level: 0, at: 0 }
    }

    /// How many of so many requests at `micros` it admits.
    pub(crate) fn admit(&mut self, requests: u64, micros: u64) -> u64 {
        self.level = self.burst.min(self.level + (micros - self.at) * self.rate);
        self.at = micros;
        let admitted = requests.min(self.level / 1_000_000);
        self.level -= admitted * 1_000_000;
        admitted
    }
}

/// Whether `admitted <= rate * t + burst` over every window, its two ends included: the least of
/// `admitted - rate * t` so far stands for all the beginnings at once.
pub(crate) struct Audit {
    rate: f64,
    least: f64,
    /// The largest excess over `rate * t` of any window that ended so far, in tokens.
    pub(crate) worst: f64,
}

impl Audit {
    pub(crate) fn new(rate: u64) -> Audit {
        Audit { rate: rate as f64, least: f64::MAX, worst: 0.0 }
    }

    /// Takes what was admitted in all before, and after, the requests of the moment `micros`.
    pub(crate) fn note(&mut self, before: u64, after: u64, micros: u64) {
        let passed = self.rate * micros as f64 / 1e6;
        self.least = self.least.min(before as f64 - passed);
        self.worst = self.worst.max(after as f64 - passed - self.least);
    }
}
