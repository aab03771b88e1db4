//! The numbers of a rule: how much ([`Rate`], [`Quota`]), for which subjects ([`Weight`],
//! [`Fraction`], [`Percent`]), at what cost ([`Cost`]) and whether it is enforced ([`Mode`]).
//!
//! Zero, negative and implausible values are rejected where they are parsed. Invariant: rates are
//! exact fractions; every rounding admits less, never more.

mod fraction;
#[cfg(test)]
mod tests;

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use fraction::Fraction;

/// Above this, the interval between tokens in whole nanoseconds would be off by more than 1 %.
const TOKENS_PER_SECOND_MAX: u64 = 10_000_000;
/// Keeps `count * microseconds` of half a minute exact in a double, the only number type of the
/// lease's script.
const COUNT_MAX: u64 = 100_000_000;
/// A burst that takes longer to refill is a typing error. The limit also keeps the arithmetic in
/// nanoseconds far from overflow.
const REFILL_MAX: Duration = Duration::from_secs(366 * 24 * 3600);
const NANOS: u128 = 1_000_000_000;
/// Weights are stored in millionths, so that 3.2 is exact.
const WEIGHT_UNIT: u64 = 1_000_000;
/// The smallest weight, one millionth.
pub const WEIGHT_MIN: f64 = 0.000_001;
/// The largest weight.
pub const WEIGHT_MAX: f64 = 10_000.0;

/// Why a number of a rule was rejected.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum QuotaError {
    #[error("rate `{0}` is not of the form `100/s`: a count, a slash and one of s, m, h, d")]
    Shape(String),
    #[error("rate `{0}` needs a whole count from 1 to {COUNT_MAX}")]
    Count(String),
    #[error("rate `{0}` is above {TOKENS_PER_SECOND_MAX} a second, the finest this limiter can measure")]
    TooFast(String),
    #[error("a burst of {burst} at {rate} takes over a year to refill")]
    TooSlow { rate: String, burst: u32 },
    #[error("weight {0} is not a number from {WEIGHT_MIN} to {WEIGHT_MAX}")]
    Weight(f64),
    #[error("{0} is not a fraction from 0 to 1")]
    Fraction(f64),
    #[error("{0} is not a percentage from 0 to 100")]
    Percent(u8),
}

/// Tokens per period, as an exact fraction in lowest terms.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Rate {
    count: u64,
    seconds: u64,
    /// The seconds of the period in which the rate was written, for `Display` only.
    written: u32,
}

/// The period in which a rate was written is not a part of it.
impl PartialEq for Rate {
    fn eq(&self, other: &Rate) -> bool {
        (self.count, self.seconds) == (other.count, other.seconds)
    }
}

impl Eq for Rate {}

impl Rate {
    /// `count` tokens every `seconds` seconds.
    pub fn new(count: u64, seconds: u32) -> Result<Rate, QuotaError> {
        let text = || format!("{count}/{seconds}s");
        if count == 0 || seconds == 0 {
            return Err(QuotaError::Count(text()));
        }
        let rate = Rate::reduced(count, u64::from(seconds)).written_per(seconds);
        if rate.count > COUNT_MAX {
            return Err(QuotaError::Count(text()));
        }
        rate.within_resolution().ok_or_else(|| QuotaError::TooFast(text()))
    }

    fn reduced(count: u64, seconds: u64) -> Rate {
        let divisor = greatest_common_divisor(count, seconds);
        Rate { count: count / divisor, seconds: seconds / divisor, written: 1 }
    }

    fn written_per(self, seconds: u32) -> Rate {
        Rate { written: seconds, ..self }
    }

    fn within_resolution(self) -> Option<Rate> {
        (u128::from(self.count) <= u128::from(TOKENS_PER_SECOND_MAX) * u128::from(self.seconds)).then_some(self)
    }

    /// The numerator, in tokens.
    pub const fn count(self) -> u64 {
        self.count
    }

    /// The denominator, in seconds.
    pub const fn seconds(self) -> u64 {
        self.seconds
    }

    /// Millionths of a token per second, rounded down.
    pub(crate) fn micros_per_second(self) -> u64 {
        // At most 10^7 tokens, hence 10^13 millionths, a second.
        (u128::from(self.count) * 1_000_000 / u128::from(self.seconds)) as u64
    }

    /// Nanoseconds from one token to the next, rounded up.
    pub(crate) fn interval_nanos(self) -> u64 {
        u64::try_from((u128::from(self.seconds) * NANOS).div_ceil(u128::from(self.count))).unwrap_or(u64::MAX)
    }
}

impl FromStr for Rate {
    type Err = QuotaError;

    fn from_str(text: &str) -> Result<Rate, QuotaError> {
        let shape = || QuotaError::Shape(text.to_owned());
        let (count, period) = text.split_once('/').ok_or_else(shape)?;
        let seconds = match period {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            "d" => 86_400,
            _ => return Err(shape()),
        };
        if !count.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(QuotaError::Count(text.to_owned()));
        }
        let count = count.parse().map_err(|_| QuotaError::Count(text.to_owned()))?;
        Rate::new(count, seconds).map_err(|error| match error {
            QuotaError::TooFast(_) => QuotaError::TooFast(text.to_owned()),
            _ => QuotaError::Count(text.to_owned()),
        })
    }
}

impl TryFrom<String> for Rate {
    type Error = QuotaError;

    fn try_from(text: String) -> Result<Rate, QuotaError> {
        text.parse()
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In the period in which it was written, where that gives a whole number.
        let written = u128::from(self.count) * u128::from(self.written);
        let (count, seconds) = match written % u128::from(self.seconds) {
            0 => (written / u128::from(self.seconds), u64::from(self.written)),
            _ => (u128::from(self.count), self.seconds),
        };
        match seconds {
            1 => write!(out, "{count}/s"),
            60 => write!(out, "{count}/m"),
            3_600 => write!(out, "{count}/h"),
            86_400 => write!(out, "{count}/d"),
            seconds => write!(out, "{count}/{seconds}s"),
        }
    }
}

/// A rate, and how many tokens may be spent at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    rate: Rate,
    burst: NonZeroU32,
}

impl Quota {
    pub fn new(rate: Rate, burst: NonZeroU32) -> Result<Quota, QuotaError> {
        let quota = Quota { rate, burst };
        let refill = u128::from(rate.interval_nanos()) * u128::from(burst.get());
        if refill > REFILL_MAX.as_nanos() {
            return Err(QuotaError::TooSlow { rate: rate.to_string(), burst: burst.get() });
        }
        Ok(quota)
    }

    pub const fn rate(self) -> Rate {
        self.rate
    }

    pub const fn burst(self) -> NonZeroU32 {
        self.burst
    }

    /// The time in which a spent burst refills: the window of `RateLimit-Policy`.
    pub fn window(self) -> Duration {
        Duration::from_nanos(self.rate.interval_nanos() * u64::from(self.burst.get()))
    }

    /// The quota of a subject with this weight: rate and burst are multiplied; the burst is rounded
    /// down, to at least one token.
    pub fn weighted(self, weight: Weight) -> Result<Quota, QuotaError> {
        // A quota that was weighted before may have a large count already.
        let (count, seconds) = (self.rate.count.checked_mul(weight.0), self.rate.seconds.checked_mul(WEIGHT_UNIT));
        let rate = count.zip(seconds).and_then(|(count, seconds)| Rate::reduced(count, seconds).within_resolution());
        let rate = rate.ok_or_else(|| QuotaError::TooFast(format!("{} x {weight}", self.rate)))?;
        let rate = rate.written_per(self.rate.written);
        let burst = u128::from(self.burst.get()) * u128::from(weight.0) / u128::from(WEIGHT_UNIT);
        let burst = u32::try_from(burst).unwrap_or(u32::MAX);
        Quota::new(rate, NonZeroU32::new(burst).unwrap_or(NonZeroU32::MIN))
    }
}

/// The factor of a user class on rate and burst: finite, above zero, stored in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "f64")]
pub struct Weight(u64);

impl Weight {
    pub const ONE: Weight = Weight(WEIGHT_UNIT);
}

impl TryFrom<f64> for Weight {
    type Error = QuotaError;

    fn try_from(value: f64) -> Result<Weight, QuotaError> {
        let millionths = (value * WEIGHT_UNIT as f64).round();
        if !value.is_finite() || millionths < 1.0 || value > WEIGHT_MAX {
            return Err(QuotaError::Weight(value));
        }
        Ok(Weight(millionths as u64))
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0 as f64 / WEIGHT_UNIT as f64)
    }
}

/// The tokens that one request spends in every rule that applies to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cost(NonZeroU32);

impl Cost {
    pub const ONE: Cost = Cost(NonZeroU32::MIN);

    pub const fn new(tokens: NonZeroU32) -> Cost {
        Cost(tokens)
    }

    pub const fn tokens(self) -> NonZeroU32 {
        self.0
    }
}

/// Whether a rule denies, only reports, or is not evaluated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    #[default]
    Enforce,
    Shadow,
    Off,
}

/// The keyed hash of a subject: selects its cell in a table, and whether a percentage applies to
/// it. Its key is a secret, so that clients cannot find an id that shares the cell of another
/// client. [`Percent`] selects the same subjects on every node, and after a restart, where that
/// secret is the same. Tables hash it again with a secret of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyHash(pub u128);

impl KeyHash {
    /// The hash in 64 bits, for uses in which a rare collision does no harm.
    pub(crate) const fn low_bits(self) -> u64 {
        self.0 as u64
    }

    /// The half by which logs and lists name the subject.
    pub const fn high_bits(self) -> u64 {
        (self.0 >> 64) as u64
    }
}

/// The percentage of subjects that a rule applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u8")]
pub struct Percent(u8);

impl Percent {
    pub const ALL: Percent = Percent(100);

    /// From 0 to 100.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Whether the percentage includes the subject. `salt` identifies the rule, so that two rules
    /// select different subjects. Raising the percentage only adds subjects.
    pub fn includes(self, subject: KeyHash, salt: u64) -> bool {
        if self == Percent::ALL {
            return true;
        }
        let position = (u128::from(mix(subject.low_bits() ^ salt)) * 100) >> 64;
        position < u128::from(self.0)
    }
}

impl TryFrom<u8> for Percent {
    type Error = QuotaError;

    fn try_from(value: u8) -> Result<Percent, QuotaError> {
        if value > 100 { Err(QuotaError::Percent(value)) } else { Ok(Percent(value)) }
    }
}

/// The finaliser of SplitMix64: every input bit affects every output bit, whatever hash the caller
/// used.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

fn greatest_common_divisor(mut left: u64, mut right: u64) -> u64 {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}
