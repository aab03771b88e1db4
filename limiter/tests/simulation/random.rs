//! Pseudo-random numbers: SplitMix64 from a seed, with integers and products only, so that every
//! machine gets the same sequence.

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A whole number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True with a probability of this many in a million.
    pub(crate) fn chance(&mut self, of_million: u64) -> bool {
        self.below(1_000_000) < of_million
    }

    /// The number of arrivals when `mean` are expected: binomial, nearly as variable as Poisson.
    pub(crate) fn arrivals(&mut self, mean: f64) -> u64 {
        if mean <= 0.0 {
            return 0;
        }
        let slots = 6 + 2 * mean.ceil() as u64;
        let hit = (mean / slots as f64 * 4_294_967_296.0) as u64;
        // Two draws of 32 bits from each number.
        let hits = |bits: u64| u64::from((bits & 0xffff_ffff) < hit) + u64::from((bits >> 32) < hit);
        (0..slots / 2).map(|_| hits(self.next())).sum()
    }
}
