//! Quantiles of the durations that a histogram has counted between two moments.

use std::time::Duration;

/// The observations of a histogram by part of a bucket, as pairs of upper bound in seconds and
/// count.
#[derive(Clone, Debug, Default)]
pub(crate) struct DurationCounts(Vec<(f64, u64)>);

impl DurationCounts {
    pub(super) fn new(buckets: Vec<(f64, u64)>) -> Self {
        DurationCounts(buckets)
    }

    /// The observations that are not in `earlier`.
    pub(crate) fn since(&self, earlier: &DurationCounts) -> DurationCounts {
        let before = |index: usize| earlier.0.get(index).map_or(0, |(_, count)| *count);
        let buckets = self.0.iter().enumerate();
        DurationCounts(buckets.map(|(index, (bound, count))| (*bound, count.saturating_sub(before(index)))).collect())
    }

    /// Adds the observations of another histogram with the same buckets.
    pub(crate) fn add(&mut self, other: &DurationCounts) {
        if self.0.is_empty() {
            self.0.clone_from(&other.0);
            return;
        }
        self.0.iter_mut().zip(&other.0).for_each(|((_, count), (_, more))| *count += more);
    }

    /// The quantile `part`, from 0 to 1, by linear interpolation in its bucket, as Prometheus
    /// estimates it; `None` without observations. At most the highest finite bound.
    pub(crate) fn quantile(&self, part: f64) -> Option<Duration> {
        let total: u64 = self.0.iter().map(|(_, count)| count).sum();
        if total == 0 {
            return None;
        }
        let (wanted, mut below, mut lower) = (part * total as f64, 0, 0.0);
        for (bound, count) in &self.0 {
            if *count > 0 && (below + count) as f64 >= wanted {
                let share = ((wanted - below as f64) / *count as f64).clamp(0.0, 1.0);
                let seconds = if bound.is_finite() { lower + (bound - lower) * share } else { lower };
                return Some(Duration::from_secs_f64(seconds));
            }
            below += count;
            if bound.is_finite() {
                lower = *bound;
            }
        }
        Some(Duration::from_secs_f64(lower))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(counts: [u64; 3]) -> DurationCounts {
        DurationCounts::new([0.01, 0.1, f64::INFINITY].into_iter().zip(counts).collect())
    }

    fn millis(counts: &DurationCounts, part: f64) -> Option<f64> {
        counts.quantile(part).map(|quantile| (quantile.as_secs_f64() * 1e4).round() / 10.0)
    }

    #[test]
    fn quantiles_are_interpolated_and_bounded() {
        assert_eq!(millis(&counts([0, 0, 0]), 0.5), None);
        assert_eq!(millis(&DurationCounts::default(), 0.5), None);
        assert_eq!(millis(&counts([10, 0, 0]), 0.5), Some(5.0));
        assert_eq!(millis(&counts([50, 50, 0]), 0.75), Some(55.0));
        assert_eq!(millis(&counts([0, 0, 7]), 0.99), Some(100.0));
        assert_eq!(millis(&counts([1, 0, 0]), 0.0), Some(0.0));
        assert_eq!(millis(&counts([1, 1, 1]), 1.0), Some(100.0));
    }

    #[test]
    fn differences_and_sums_are_by_bucket() {
        let difference = counts([5, 6, 7]).since(&counts([5, 4, 7]));
        assert_eq!(millis(&difference, 1.0), Some(100.0));
        assert_eq!(counts([5, 6, 7]).since(&DurationCounts::default()).0, counts([5, 6, 7]).0);
        assert_eq!(counts([1, 0, 0]).since(&counts([2, 0, 0])).0, counts([0, 0, 0]).0, "a counter that began again");
        let mut sum = DurationCounts::default();
        sum.add(&counts([1, 2, 3]));
        sum.add(&counts([1, 0, 0]));
        assert_eq!(sum.0, counts([2, 2, 3]).0);
    }
}
