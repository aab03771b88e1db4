//! [`Fraction`]: a part of a burst that is reserved for others.
//!
//! Values outside 0 to 1 are rejected. Invariant: a part is rounded up, so that the reserve is
//! never smaller than configured.

use std::fmt;

use serde::Deserialize;

use super::QuotaError;

const UNIT: u64 = 1_000_000;

/// A number from 0 to 1, stored in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "f64")]
pub struct Fraction(u64);

impl Fraction {
    pub const ZERO: Fraction = Fraction(0);

    /// This part of some tokens, in whole tokens.
    pub(crate) fn of(self, tokens: u32) -> u32 {
        // At most `tokens`, because a fraction is at most one.
        (u64::from(tokens) * self.0).div_ceil(UNIT) as u32
    }

    /// This part of `tokens`, at most 2^32 of them, in millionths of a token.
    pub(crate) const fn micros_of(self, tokens: u64) -> u64 {
        tokens * self.0
    }
}

impl TryFrom<f64> for Fraction {
    type Error = QuotaError;

    fn try_from(value: f64) -> Result<Fraction, QuotaError> {
        // NaN is in no range.
        if !(0.0..=1.0).contains(&value) {
            return Err(QuotaError::Fraction(value));
        }
        Ok(Fraction((value * UNIT as f64).round() as u64))
    }
}

impl fmt::Display for Fraction {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0 as f64 / UNIT as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_values_outside_0_to_1_and_rounds_up() {
        for value in [-0.1, 1.1, f64::NAN, f64::INFINITY] {
            assert!(Fraction::try_from(value).is_err(), "{value}");
        }
        let fifth = Fraction::try_from(0.2).unwrap();
        assert_eq!((fifth.of(10), fifth.of(11), fifth.of(u32::MAX)), (2, 3, 858_993_459));
        assert_eq!((Fraction::ZERO.of(9), Fraction::try_from(1.0).unwrap().of(9)), (0, 9));
        assert_eq!(fifth.to_string(), "0.2");
    }
}
