//! Temporary overrides of a rule: parsed from admin queries, encoded for other nodes, and applied
//! to the limiter.
//!
//! Rejects overrides without an expiry.

use std::time::Duration;

use limiter::{Limiter, Mode, Override, Percent, RuleError};
use shard::OVERRIDE_DURATION_MAX;

use super::config::LimitConfig;
use super::error::AdminQueryError;
use super::subject::CLOCK;

/// Wire text of [`OverrideCommand::Clear`] on the bus.
const CLEAR_TEXT: &str = "end";

const PARAMETERS: &str = "mode, percent, for and node";

/// Change of one rule for a limited time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum OverrideCommand {
    /// A setting that is `None` keeps its configured value.
    Set { mode: Option<Mode>, percent: Option<Percent>, duration: Duration },
    /// Restores the configured values.
    Clear,
}

/// Parsed parameters of an override query: mode, percent, duration and node.
#[derive(Default)]
struct OverrideParameters {
    mode: Option<Mode>,
    percent: Option<Percent>,
    duration: Option<Duration>,
    node: Option<String>,
}

impl OverrideParameters {
    fn parse(query: &str) -> Result<Self, AdminQueryError> {
        let mut parameters = OverrideParameters::default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let invalid = |expected| AdminQueryError::InvalidValue(value.clone().into_owned(), expected);
            match &*name {
                "mode" => {
                    parameters.mode = Some(match &*value {
                        "enforce" => Mode::Enforce,
                        "shadow" => Mode::Shadow,
                        "off" => Mode::Off,
                        _ => return Err(invalid("enforce, shadow or off")),
                    });
                }
                "percent" => {
                    let percentage = value.parse().ok().and_then(|number: u8| Percent::try_from(number).ok());
                    parameters.percent = Some(percentage.ok_or_else(|| invalid("a whole number from 0 to 100"))?);
                }
                "for" => {
                    let duration = parse_duration(&value)
                        .ok_or_else(|| invalid("a duration such as 90s, 15m or 2h, at most 8 days"));
                    parameters.duration = Some(duration?);
                }
                "node" if value.is_empty() || value == "*" => {
                    return Err(invalid("the name of a node; omit `node` for all nodes"));
                }
                "node" => parameters.node = Some(value.into_owned()),
                _ => return Err(AdminQueryError::UnknownParameter(name.into_owned(), PARAMETERS)),
            }
        }
        Ok(parameters)
    }
}

impl OverrideCommand {
    /// Parses an override and the node it is limited to, if any:
    /// `mode=shadow&percent=10&for=15m&node=n1`.
    pub(super) fn parse(query: &str) -> Result<(OverrideCommand, Option<String>), AdminQueryError> {
        match OverrideParameters::parse(query)? {
            OverrideParameters { mode: None, percent: None, .. } | OverrideParameters { duration: None, .. } => {
                Err(AdminQueryError::MissingOverride)
            }
            OverrideParameters { mode, percent, duration: Some(duration), node } => {
                Ok((OverrideCommand::Set { mode, percent, duration }, node))
            }
        }
    }

    /// Parses the node on which an override is cleared, if it is limited to one: `node=n1`.
    pub(super) fn parse_clear(query: &str) -> Result<(OverrideCommand, Option<String>), AdminQueryError> {
        match OverrideParameters::parse(query)? {
            OverrideParameters { mode: None, percent: None, duration: None, node } => {
                Ok((OverrideCommand::Clear, node))
            }
            _ => Err(AdminQueryError::UnknownParameter(query.to_owned(), "node")),
        }
    }

    /// Encodes the command for the bus, without its duration.
    pub(crate) fn to_text(self) -> String {
        let OverrideCommand::Set { mode, percent, .. } = self else { return CLEAR_TEXT.to_owned() };
        let mut text = url::form_urlencoded::Serializer::new(String::new());
        if let Some(mode) = mode {
            text.append_pair("mode", mode_name(mode));
        }
        if let Some(percent) = percent {
            text.append_pair("percent", &percent.get().to_string());
        }
        text.finish()
    }

    /// Decodes a command that another node published and that has `duration` left; `None` if it is
    /// malformed.
    pub(crate) fn from_text(text: &str, duration: Duration) -> Option<OverrideCommand> {
        if text == CLEAR_TEXT {
            return Some(OverrideCommand::Clear);
        }
        let OverrideParameters { mode, percent, .. } = OverrideParameters::parse(text).ok()?;
        Some(OverrideCommand::Set { mode, percent, duration })
    }

    /// How long the bus keeps the command. `Clear` is kept for as long as the override it clears
    /// could last.
    pub(crate) fn duration(self) -> Duration {
        match self {
            OverrideCommand::Set { duration, .. } => duration,
            OverrideCommand::Clear => OVERRIDE_DURATION_MAX,
        }
    }

    /// Description for the log.
    pub(crate) fn description(&self) -> String {
        match self {
            OverrideCommand::Set { mode, percent, duration } => {
                let mode = mode.map_or_else(String::new, |mode| format!("{} ", mode_name(mode)));
                let percent = percent.map_or_else(String::new, |percent| format!("for {} % ", percent.get()));
                format!("{mode}{percent}during {} s", duration.as_secs_f64().round())
            }
            OverrideCommand::Clear => "as configured".to_owned(),
        }
    }

    /// Applies the command to a rule and to its derived per-address rule.
    ///
    /// # Errors
    /// There is no such rule.
    pub(crate) fn apply(self, limiter: &Limiter, config: &LimitConfig, rule: &str) -> Result<(), AdminQueryError> {
        let unknown_rule = |_: RuleError| AdminQueryError::UnknownRule(rule.to_owned());
        let rule_config = config.rules.iter().find(|config| &*config.rule.name == rule);
        let rule_config = rule_config.ok_or_else(|| AdminQueryError::UnknownRule(rule.to_owned()))?;
        for name in rule_config.names() {
            match self {
                OverrideCommand::Set { mode, percent, duration } => {
                    let (mode, percent) =
                        (mode.unwrap_or(rule_config.rule.mode), percent.unwrap_or(rule_config.rule.percent));
                    limiter.set_override(&name, Override { mode, percent }, CLOCK.now() + duration)
                }
                OverrideCommand::Clear => limiter.clear_override(&name),
            }
            .map_err(unknown_rule)?;
        }
        Ok(())
    }
}

/// Parses a whole number with the unit s, m, h or d, above zero and at most 8 days.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    let duration = Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?);
    (!duration.is_zero() && duration <= OVERRIDE_DURATION_MAX).then_some(duration)
}

/// Name of a mode in the configuration and in the admin API.
pub(super) fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Enforce => "enforce",
        Mode::Shadow => "shadow",
        Mode::Off => "off",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_requires_duration_and_setting() {
        let percent = Some(Percent::try_from(10).expect("a percentage"));
        let expected = OverrideCommand::Set { mode: Some(Mode::Shadow), percent, duration: Duration::from_secs(900) };
        assert_eq!(OverrideCommand::parse("mode=shadow&percent=10&for=15m"), Ok((expected, None)));
        assert_eq!(
            OverrideCommand::parse("node=b&mode=shadow&percent=10&for=15m"),
            Ok((expected, Some("b".to_owned())))
        );
        for query in ["", "mode=shadow", "for=15m", "node=b&for=1s"] {
            assert_eq!(OverrideCommand::parse(query), Err(AdminQueryError::MissingOverride), "{query}");
        }
        for query in [
            "mode=x&for=1s",
            "percent=101&for=1s",
            "percent=-1&for=1s",
            "mode=off&for=0s",
            "mode=off&for=9d",
            "mode=off&for=1",
            "mode=off&for=m",
            "mode=off&for=1m&node=*",
        ] {
            assert!(matches!(OverrideCommand::parse(query), Err(AdminQueryError::InvalidValue(..))), "{query}");
        }
        assert!(matches!(OverrideCommand::parse("mode=off&for=1s&x=1"), Err(AdminQueryError::UnknownParameter(..))));
        assert_eq!(OverrideCommand::parse_clear("node=b"), Ok((OverrideCommand::Clear, Some("b".to_owned()))));
        assert!(matches!(OverrideCommand::parse_clear("for=1s"), Err(AdminQueryError::UnknownParameter(..))));
    }

    #[test]
    fn wire_text_round_trips() {
        let duration = Duration::from_secs(60);
        let percent = Percent::try_from(10).ok();
        for command in [
            OverrideCommand::Clear,
            OverrideCommand::Set { mode: Some(Mode::Off), percent: None, duration },
            OverrideCommand::Set { mode: None, percent, duration },
            OverrideCommand::Set { mode: Some(Mode::Shadow), percent, duration },
        ] {
            assert_eq!(
                OverrideCommand::from_text(&command.to_text(), duration),
                Some(command),
                "{}",
                command.to_text()
            );
        }
        assert_eq!(OverrideCommand::from_text("mode=later", duration), None);
    }
}
