//! What operators change about a rule for a while, as they ask for it, as nodes tell each other, and as it takes effect.
//!
//! Refuses trials without an end.

use std::time::Duration;

use limiter::{Limiter, Mode, Percent, RuleError, Trial};

use super::inquiry::{self, BadInquiry};
use super::{CLOCK, Settings};

/// A trial nobody ends by hand ends by then, at the latest: long enough for a week's traffic and its Monday.
const TRIAL_MAX: Duration = Duration::from_secs(8 * 86_400);

/// How a node tells others that a trial ends.
const END: &str = "end";

const PARAMETERS: &str = "mode, percent, for and node";

/// What is done to a rule for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Change {
    /// What is not named is as configured.
    Try { mode: Option<Mode>, percent: Option<Percent>, lasting: Duration },
    /// Back to what is configured.
    End,
}

/// What a query says.
#[derive(Default)]
struct Asked {
    mode: Option<Mode>,
    percent: Option<Percent>,
    lasting: Option<Duration>,
    node: Option<String>,
}

impl Asked {
    fn read(query: &str) -> Result<Self, BadInquiry> {
        let mut asked = Asked::default();
        for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
            let bad = |what| BadInquiry::Bad(value.clone().into_owned(), what);
            match &*name {
                "mode" => {
                    asked.mode = Some(match &*value {
                        "enforce" => Mode::Enforce,
                        "shadow" => Mode::Shadow,
                        "off" => Mode::Off,
                        _ => return Err(bad("enforce, shadow or off")),
                    });
                }
                "percent" => {
                    let percentage = value.parse().ok().and_then(|number: u8| Percent::try_from(number).ok());
                    asked.percent = Some(percentage.ok_or_else(|| bad("a whole number from 0 to 100"))?);
                }
                "for" => {
                    let lasting = span(&value).ok_or_else(|| bad("a duration such as 90s, 15m or 2h, at most 8 days"));
                    asked.lasting = Some(lasting?);
                }
                "node" if value.is_empty() || value == "*" => {
                    return Err(bad("the name of a node; all are meant without"));
                }
                "node" => asked.node = Some(value.into_owned()),
                _ => return Err(BadInquiry::Unknown(name.into_owned(), PARAMETERS)),
            }
        }
        Ok(asked)
    }
}

impl Change {
    /// Reads what a trial is to be, and on which node if not on all: `mode=shadow&percent=10&for=15m&node=n1`.
    pub(super) fn read(query: &str) -> Result<(Change, Option<String>), BadInquiry> {
        match Asked::read(query)? {
            Asked { mode: None, percent: None, .. } | Asked { lasting: None, .. } => Err(BadInquiry::NoTrial),
            Asked { mode, percent, lasting: Some(lasting), node } => Ok((Change::Try { mode, percent, lasting }, node)),
        }
    }

    /// Reads where a trial is to end: `node=n1`.
    pub(super) fn read_end(query: &str) -> Result<(Change, Option<String>), BadInquiry> {
        match Asked::read(query)? {
            Asked { mode: None, percent: None, lasting: None, node } => Ok((Change::End, node)),
            _ => Err(BadInquiry::Unknown(query.to_owned(), "only node, where a trial ends")),
        }
    }

    /// As nodes tell each other, beside for how long.
    pub fn to_text(self) -> String {
        let Change::Try { mode, percent, .. } = self else { return END.to_owned() };
        let mut text = url::form_urlencoded::Serializer::new(String::new());
        if let Some(mode) = mode {
            text.append_pair("mode", inquiry::mode(mode));
        }
        if let Some(percent) = percent {
            text.append_pair("percent", &percent.get().to_string());
        }
        text.finish()
    }

    /// What another node told, `lasting` from now on; `None` where it makes no sense here.
    pub fn of_text(text: &str, lasting: Duration) -> Option<Change> {
        if text == END {
            return Some(Change::End);
        }
        let Asked { mode, percent, .. } = Asked::read(text).ok()?;
        Some(Change::Try { mode, percent, lasting })
    }

    /// How long other nodes are to know of it: of an end, as long as what it ends could have gone on.
    pub fn lasting(self) -> Duration {
        match self {
            Change::Try { lasting, .. } => lasting,
            Change::End => TRIAL_MAX,
        }
    }

    /// As a log tells it.
    pub fn told(&self) -> String {
        match self {
            Change::Try { mode: named, percent, lasting } => {
                let mode = named.map_or_else(String::new, |named| format!("{} ", inquiry::mode(named)));
                let percent = percent.map_or_else(String::new, |percent| format!("for {} % ", percent.get()));
                format!("{mode}{percent}during {} s", lasting.as_secs_f64().round())
            }
            Change::End => "as configured".to_owned(),
        }
    }

    /// Puts it into effect: a rule and what belongs to it change together.
    ///
    /// # Errors
    /// There is no such rule.
    pub fn take_effect(self, limiter: &Limiter, settings: &Settings, rule: &str) -> Result<(), BadInquiry> {
        let missing = |_: RuleError| BadInquiry::NoRule(rule.to_owned());
        let own = settings.rules.iter().find(|own| &*own.rule.name == rule);
        let own = own.ok_or_else(|| BadInquiry::NoRule(rule.to_owned()))?;
        for name in own.names() {
            match self {
                Change::Try { mode, percent, lasting } => {
                    let (mode, percent) = (mode.unwrap_or(own.rule.mode), percent.unwrap_or(own.rule.percent));
                    limiter.try_out(&name, Trial { mode, percent }, CLOCK.now() + lasting)
                }
                Change::End => limiter.end_trial(&name),
            }
            .map_err(missing)?;
        }
        Ok(())
    }
}

/// A whole number of s, m, h or d.
fn span(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return None,
    };
    let span = Duration::from_secs(number.parse::<u64>().ok()?.checked_mul(seconds)?);
    (!span.is_zero() && span <= TRIAL_MAX).then_some(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_wants_an_end_and_something_to_try() {
        let percent = Some(Percent::try_from(10).expect("a percentage"));
        let expected = Change::Try { mode: Some(Mode::Shadow), percent, lasting: Duration::from_secs(900) };
        assert_eq!(Change::read("mode=shadow&percent=10&for=15m"), Ok((expected, None)));
        assert_eq!(Change::read("node=b&mode=shadow&percent=10&for=15m"), Ok((expected, Some("b".to_owned()))));
        for query in ["", "mode=shadow", "for=15m", "node=b&for=1s"] {
            assert_eq!(Change::read(query), Err(BadInquiry::NoTrial), "{query}");
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
            assert!(matches!(Change::read(query), Err(BadInquiry::Bad(..))), "{query}");
        }
        assert!(matches!(Change::read("mode=off&for=1s&x=1"), Err(BadInquiry::Unknown(..))));
        assert_eq!(Change::read_end("node=b"), Ok((Change::End, Some("b".to_owned()))));
        assert!(matches!(Change::read_end("for=1s"), Err(BadInquiry::Unknown(..))));
    }

    #[test]
    fn another_node_understands_what_is_told() {
        let lasting = Duration::from_secs(60);
        let percent = Percent::try_from(10).ok();
        for change in [
            Change::End,
            Change::Try { mode: Some(Mode::Off), percent: None, lasting },
            Change::Try { mode: None, percent, lasting },
            Change::Try { mode: Some(Mode::Shadow), percent, lasting },
        ] {
            assert_eq!(Change::of_text(&change.to_text(), lasting), Some(change), "{}", change.to_text());
        }
        assert_eq!(Change::of_text("mode=later", lasting), None);
    }
}
