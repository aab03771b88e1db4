//! The time of a thread that serves, read off the system once for each request and not twice.
//!
//! A request that a busy thread turns to has waited while the thread was at the one before: it arrived when that one ended, as far as
//! anybody can tell. Invariant: the end of a request is the arrival of one more at most, and of none where the thread has waited, or has
//! worked at length, since.

use std::cell::Cell;
use std::time::Instant;

thread_local! {
    static ENDED: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The time at which a request ends.
pub fn ends() -> Instant {
    let now = Instant::now();
    ENDED.set(Some(now));
    now
}

/// The time at which a request arrived that the thread turns to now.
pub fn arrives() -> Instant {
    ENDED.take().unwrap_or_else(Instant::now)
}

/// To be called before the thread waits, and after work that takes longer than a request does.
pub fn forget() {
    ENDED.set(None);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_is_one_arrival() {
        let end = ends();
        assert_eq!(arrives(), end);
        assert!(arrives() > end, "the clock was read");
        let end = ends();
        forget();
        assert!(arrives() > end, "the clock was read");
    }
}
