//! Faults of a TCP connection: which there are, for which direction and share of connections, and
//! their two forms, JSON and text.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::durations;
use crate::seeded_random::SeededRandom;

const RULES_MAX: usize = 32;
const DELAY_MAX_MS: u64 = 600_000;
/// Time between the pieces of `drip`.
const DRIP_INTERVAL: Duration = Duration::from_millis(100);
const EXAMPLE: &str = "such as `latency=100ms,jitter=20ms,direction=down,share=0.5`";

/// The direction of bytes: `up` from the client to the upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Direction {
    Up,
    Down,
    #[default]
    Both,
}

/// Faults that come together, and the connections that have them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FaultRule {
    pub(crate) direction: Direction,
    /// Part of the connections, from 0 to 1.
    pub(crate) share: f64,
    pub(crate) latency_ms: u64,
    /// Up to this is added to the latency, evenly spread.
    pub(crate) jitter_ms: u64,
    pub(crate) bytes_per_second: Option<u64>,
    /// Bytes that are written at a time, with 100 ms between them.
    pub(crate) drip_bytes: Option<u64>,
    /// Closes both sides (FIN) after this many bytes of the direction.
    pub(crate) cut_after_bytes: Option<u64>,
    /// Resets both sides (RST) after this many bytes of the direction.
    pub(crate) reset_after_bytes: Option<u64>,
    /// Connections are accepted and nothing is forwarded.
    pub(crate) hang: bool,
    /// Connections are refused, or reset where only a share of them has the fault.
    pub(crate) refuse: bool,
    /// Probability of each byte to be changed.
    pub(crate) corrupt: f64,
}

impl Default for FaultRule {
    fn default() -> Self {
        FaultRule {
            direction: Direction::Both,
            share: 1.0,
            latency_ms: 0,
            jitter_ms: 0,
            bytes_per_second: None,
            drip_bytes: None,
            cut_after_bytes: None,
            reset_after_bytes: None,
            hang: false,
            refuse: false,
            corrupt: 0.0,
        }
    }
}

/// All rules; a connection has the faults of each that applies to it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct FaultPlan {
    pub(crate) rules: Vec<FaultRule>,
}

/// The faults of one direction of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct FaultEffects {
    pub(crate) latency: Duration,
    pub(crate) jitter: Duration,
    pub(crate) bytes_per_second: Option<u64>,
    pub(crate) drip: Option<(u64, Duration)>,
    pub(crate) cut_after: Option<u64>,
    pub(crate) reset_after: Option<u64>,
    pub(crate) hangs: bool,
    pub(crate) refuses: bool,
    pub(crate) corrupt: f64,
}

impl FaultRule {
    /// One text of `key=value` pairs, separated by commas; `hang` and `refuse` need no value.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut rule = FaultRule::default();
        for pair in text.split(',').map(str::trim) {
            let (key, value) = pair.split_once('=').map_or((pair, "true"), |(key, value)| (key.trim(), value.trim()));
            let fault = |what: &str| format!("`{pair}`: {what}; a fault is {EXAMPLE}");
            let millis = || {
                let time = durations::parse(value).map_err(|hint| fault(&hint))?;
                u64::try_from(time.as_millis()).map_err(|_| fault("too long"))
            };
            let bytes = || parse_bytes(value).map(Some).ok_or_else(|| fault("not a number of bytes such as 10KiB"));
            let part = || value.parse().map_err(|_| fault("not a number from 0 to 1"));
            let flag = || value.parse().map_err(|_| fault("`true` or `false` is needed"));
            match key {
                "direction" => {
                    rule.direction = match value {
                        "up" => Direction::Up,
                        "down" => Direction::Down,
                        "both" => Direction::Both,
                        _ => return Err(fault("`up`, `down` or `both` is needed")),
                    }
                }
                "share" => rule.share = part()?,
                "latency" => rule.latency_ms = millis()?,
                "jitter" => rule.jitter_ms = millis()?,
                "rate" => rule.bytes_per_second = bytes()?,
                "drip" => rule.drip_bytes = bytes()?,
                "cut" => rule.cut_after_bytes = bytes()?,
                "reset" => rule.reset_after_bytes = bytes()?,
                "hang" => rule.hang = flag()?,
                "refuse" => rule.refuse = flag()?,
                "corrupt" => rule.corrupt = part()?,
                _ => {
                    return Err(fault(
                        "unknown; there are latency, jitter, rate, drip, cut, reset, hang, refuse, corrupt, direction and share",
                    ));
                }
            }
        }
        rule.check().map(|()| rule)
    }

    fn check(&self) -> Result<(), String> {
        let is_part = |number: f64| (0.0..=1.0).contains(&number);
        if !is_part(self.share) || !is_part(self.corrupt) {
            return Err(format!("share {} and corrupt {} are numbers from 0 to 1", self.share, self.corrupt));
        }
        if self.latency_ms > DELAY_MAX_MS || self.jitter_ms > DELAY_MAX_MS {
            return Err("latency and jitter are at most 10 minutes".to_owned());
        }
        if self.bytes_per_second == Some(0) || self.drip_bytes == Some(0) {
            return Err("rate and drip are at least 1 byte; `hang` forwards nothing".to_owned());
        }
        let nothing = FaultRule { direction: self.direction, share: self.share, ..FaultRule::default() };
        if *self == nothing { Err(format!("a rule without a fault; write one {EXAMPLE}")) } else { Ok(()) }
    }
}

impl FaultPlan {
    /// Rules as texts, separated by `;`. An empty text or `clear` has none.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.is_empty() || text == "clear" {
            return Ok(FaultPlan::default());
        }
        let rules = text.split(';').map(FaultRule::parse).collect::<Result<_, _>>()?;
        FaultPlan { rules }.checked()
    }

    pub(crate) fn from_json(text: &[u8]) -> Result<Self, String> {
        let plan: FaultPlan = serde_json::from_slice(text).map_err(|fault| format!("not a plan: {fault}"))?;
        plan.checked()
    }

    pub(crate) fn checked(self) -> Result<Self, String> {
        if self.rules.len() > RULES_MAX {
            return Err(format!("{} rules are more than {RULES_MAX}", self.rules.len()));
        }
        self.rules.iter().try_for_each(FaultRule::check).map(|()| self)
    }

    /// Whether all connections are refused, so that there is no listener.
    pub(crate) fn refuses_all(&self) -> bool {
        self.rules.iter().any(|rule| rule.refuse && rule.share >= 1.0)
    }

    /// The faults of a connection, which are the same each time for the same seed, number and plan.
    pub(crate) fn effects(&self, direction: Direction, (seed, connection): (u64, u64)) -> FaultEffects {
        let mut effects = FaultEffects::default();
        let least = |one: Option<u64>, other: Option<u64>| one.into_iter().chain(other).min();
        for (index, rule) in (0..).zip(&self.rules) {
            let draw = SeededRandom::new(seed, connection.wrapping_mul(1_000_003).wrapping_add(index)).unit();
            if draw >= rule.share {
                continue;
            }
            effects.refuses |= rule.refuse;
            if rule.direction != Direction::Both && rule.direction != direction {
                continue;
            }
            effects.latency += Duration::from_millis(rule.latency_ms);
            effects.jitter += Duration::from_millis(rule.jitter_ms);
            effects.bytes_per_second = least(effects.bytes_per_second, rule.bytes_per_second);
            let drip = least(effects.drip.map(|(bytes, _)| bytes), rule.drip_bytes);
            effects.drip = drip.map(|bytes| (bytes, DRIP_INTERVAL));
            effects.cut_after = least(effects.cut_after, rule.cut_after_bytes);
            effects.reset_after = least(effects.reset_after, rule.reset_after_bytes);
            effects.hangs |= rule.hang;
            effects.corrupt = effects.corrupt.max(rule.corrupt);
        }
        effects
    }
}

/// A number with `B`, `KiB`, `MiB`, or without a unit.
fn parse_bytes(text: &str) -> Option<u64> {
    let digits = text.find(|it: char| !it.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_that_is_no_fault_is_refused_with_a_hint() {
        for (text, part) in [
            ("latncy=1ms", "there are latency"),
            ("latency=100", "not a duration"),
            ("share=0.5", "without a fault"),
            ("hang,share=2", "from 0 to 1"),
            ("rate=0", "at least 1 byte"),
            ("rate=10 KB", "number of bytes"),
            ("hang,direction=left", "`up`, `down` or `both`"),
            ("latency=1h", "at most 10 minutes"),
            ("hang;", "unknown"),
        ] {
            let fault = FaultPlan::parse(text).expect_err(text);
            assert!(fault.contains(part), "{text}: {fault}");
        }
        let fault = FaultPlan::from_json(b"{\"rules\": [{\"delay\": 1}]}").expect_err("an unknown key");
        assert!(fault.contains("unknown field `delay`"), "{fault}");
        assert!(FaultPlan::from_json(b"{\"rules\": [{}]}").is_err());
    }

    #[test]
    fn text_and_json_are_the_same_plan() {
        let text = "latency=100ms, jitter=5ms,direction=down,share=0.25; reset=2KiB,corrupt=0.001";
        let plan = FaultPlan::parse(text).expect("a plan");
        let json = serde_json::to_vec(&plan).expect("JSON");
        assert_eq!(FaultPlan::from_json(&json), Ok(plan.clone()));
        assert_eq!((plan.rules[0].latency_ms, plan.rules[1].reset_after_bytes), (100, Some(2_048)));
        assert_eq!(FaultPlan::parse(" clear "), Ok(FaultPlan::default()));
    }

    #[test]
    fn share_and_direction_select_connections_and_sides() {
        let plan = FaultPlan::parse("latency=100ms,direction=down,share=0.25").expect("a plan");
        let count = |direction| {
            let has = |connection| plan.effects(direction, (9, connection)).latency > Duration::ZERO;
            (0..4_000).filter(|connection| has(*connection)).count()
        };
        assert_eq!(count(Direction::Up), 0);
        assert!((900..1_100).contains(&count(Direction::Down)), "{}", count(Direction::Down));
        assert_eq!(count(Direction::Down), count(Direction::Down));
    }

    #[test]
    fn rules_add_up() {
        let plan = FaultPlan::parse("latency=10ms,rate=500;latency=5ms,rate=100;hang,share=0").expect("a plan");
        let effects = plan.effects(Direction::Up, (0, 0));
        assert_eq!((effects.latency.as_millis(), effects.bytes_per_second, effects.hangs), (15, Some(100), false));
    }
}
