//! A change of a breaker by an operator.

use std::time::Duration;

use super::state::ManualState;

/// The text by which a state is ended.
const JUDGE_TEXT: &str = "judge";

/// A change, which applies to the breakers of a route or of an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakerStateChange {
    /// A state for a time.
    Set(ManualState, Duration),
    /// It judges calls again.
    Judge,
}

impl BreakerStateChange {
    /// The text of an override on the bus, which has the duration beside it.
    pub(crate) fn to_text(self) -> &'static str {
        match self {
            BreakerStateChange::Set(state, _) => state.as_str(),
            BreakerStateChange::Judge => JUDGE_TEXT,
        }
    }

    /// Reads such a text; `None`: it is none.
    pub(crate) fn from_text(text: &str, duration: Duration) -> Option<Self> {
        if text == JUDGE_TEXT {
            return Some(BreakerStateChange::Judge);
        }
        ManualState::parse(text).map(|state| BreakerStateChange::Set(state, duration))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_as_they_were_written() {
        let duration = Duration::from_secs(60);
        for state in [ManualState::Open, ManualState::Closed] {
            let change = BreakerStateChange::Set(state, duration);
            assert_eq!(BreakerStateChange::from_text(change.to_text(), duration), Some(change));
        }
        let judge = BreakerStateChange::Judge;
        assert_eq!(BreakerStateChange::from_text(judge.to_text(), duration), Some(judge));
        assert_eq!(BreakerStateChange::from_text("ajar", duration), None);
    }
}
