//! The limiter's inputs for a request: its subject and the clock.

use std::sync::LazyLock;

use limiter::{MonotonicClock, Subject, UserClass};

use crate::identify::Caller;

/// One clock for all limits of the process.
pub(super) static CLOCK: LazyLock<MonotonicClock> = LazyLock::new(MonotonicClock::start);

/// Converts a caller into the limiter's subject.
pub(super) fn subject(caller: &Caller) -> Subject<'_> {
    let class = UserClass(u8::try_from(caller.user_class).unwrap_or(0));
    Subject { device: caller.device, user: caller.user, class, keys: &caller.keys }
}
