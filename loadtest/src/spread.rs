//! Median and range of measurements.

use serde::{Deserialize, Serialize};

/// Median, minimum and maximum of measurements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Spread {
    /// `None` without measurements. The median of an even number is the mean of the middle two.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let (lower, upper) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Spread { median: f64::midpoint(lower, upper), min, max })
    }

    /// Rounded to three decimal places, which exceeds the precision of any measurement here.
    pub(crate) fn rounded(self) -> Self {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        Spread { median: round(self.median), min: round(self.min), max: round(self.max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_input_has_no_median() {
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn median_is_the_middle_or_the_mean_of_two() {
        for (values, median, min, max) in [
            (vec![4.0], 4.0, 4.0, 4.0),
            (vec![3.0, 1.0], 2.0, 1.0, 3.0),
            (vec![9.0, 1.0, 2.0], 2.0, 1.0, 9.0),
            (vec![10.0, -1.0, 2.0, 3.0], 2.5, -1.0, 10.0),
        ] {
            assert_eq!(Spread::of(values), Some(Spread { median, min, max }));
        }
    }

    #[test]
    fn rounding_keeps_three_decimal_places() {
        let spread = Spread { median: 1.0 / 3.0, min: -0.000_4, max: 12.345_6 };
        assert_eq!(spread.rounded(), Spread { median: 0.333, min: -0.0, max: 12.346 });
    }
}
