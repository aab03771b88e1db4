//! Owns notices: short texts by name that hold for a while, on all nodes or on one. What they mean is for those who read them.
//!
//! Each has a version, by which a node that hears two of one name knows the later: servers tell them in any order. Those to all nodes are
//! kept beyond their end, so that a server which was away, or has lost its memory, can be told what was the last word.
//!
//! Refuses more than `NOTICES_MAX` names, longer texts than `TEXT_MAX`, and versions from a time that has not come.
//! Invariant: of a name, a notice is replaced by a later one only.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// They are about what a configuration names.
pub(super) const NOTICES_MAX: usize = 1_024;

/// Of a name or a text, in bytes.
pub(super) const TEXT_MAX: usize = 512;

/// As long as anything may be tried out.
const LASTING_MAX: Duration = Duration::from_secs(8 * 86_400);

/// By how many microseconds a version may be ahead of this node's time: far more than clocks differ. A higher one could not be overruled.
const AHEAD_MAX: u64 = 86_400_000_000;

/// A text that holds for a while.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub name: String,
    pub text: String,
    /// Higher for later ones of the same name.
    pub version: u64,
    pub until: Instant,
}

/// Why a notice is not put up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there are {NOTICES_MAX} notices already, or this one is longer than {TEXT_MAX} bytes")]
pub struct NoRoom;

/// What this node knows of.
pub(super) struct Board {
    held: Mutex<Held>,
    changed: Notify,
    /// Below 1,000: tells versions apart that two nodes give in the same millisecond.
    tie: u64,
}

#[derive(Default)]
struct Held {
    posted: BTreeMap<String, Posted>,
    /// The highest version that was given or heard of, whoever a notice was for.
    last: u64,
}

struct Posted {
    notice: Notice,
    is_for_all: bool,
}

impl Board {
    pub(super) fn new(seed: u64) -> Self {
        Self { held: Mutex::default(), changed: Notify::new(), tie: seed % 1_000 }
    }

    /// Puts a notice up unless a later one of its name is there; says whether it is news. `now` is this node's time.
    pub(super) fn put(&self, said: &Saying<'_>, lasting: Duration, now: SystemTime) -> Result<bool, NoRoom> {
        let &Saying { name, text, version, is_for_all } = said;
        if version > micros(now).saturating_add(AHEAD_MAX) {
            return Ok(false);
        }
        let mut held = self.held();
        held.last = held.last.max(version);
        if held.posted.get(name).is_some_and(|known| known.notice.version >= version) {
            return Ok(false);
        }
        let now = Instant::now();
        if held.posted.len() >= NOTICES_MAX {
            held.posted.retain(|_, posted| posted.notice.until > now);
        }
        let has_room = held.posted.len() < NOTICES_MAX || held.posted.contains_key(name);
        if !has_room || name.len().max(text.len()) > TEXT_MAX {
            return Err(NoRoom);
        }
        let until = now + lasting.min(LASTING_MAX);
        let notice = Notice { name: name.to_owned(), text: text.to_owned(), version, until };
        held.posted.insert(name.to_owned(), Posted { notice, is_for_all });
        drop(held);
        self.changed.notify_one();
        Ok(true)
    }

    /// Remembers the version of a notice that is for others.
    pub(super) fn note(&self, version: u64, now: SystemTime) {
        if version <= micros(now).saturating_add(AHEAD_MAX) {
            let mut held = self.held();
            held.last = held.last.max(version);
        }
    }

    /// A version for a new notice: the time in microseconds, and in any case above all that are known.
    pub(super) fn next_version(&self, now: SystemTime) -> u64 {
        let mut held = self.held();
        held.last = (micros(now) / 1_000 * 1_000 + self.tie).max(held.last + 1);
        held.last
    }

    /// What holds.
    pub(super) fn list(&self) -> Vec<Notice> {
        let now = Instant::now();
        let held = self.held();
        held.posted.values().map(|posted| &posted.notice).filter(|notice| notice.until > now).cloned().collect()
    }

    /// The last word to all nodes by each name, which may be over.
    pub(super) fn for_all(&self) -> Vec<Notice> {
        let held = self.held();
        held.posted.values().filter(|posted| posted.is_for_all).map(|posted| posted.notice.clone()).collect()
    }

    /// Waits until a notice was put up since the last call. Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A notice as it is put up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saying<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
    pub(super) version: u64,
    pub(super) is_for_all: bool,
}

fn micros(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    fn put(board: &Board, name: &str, text: &str, version: u64, lasting: Duration) -> Result<bool, NoRoom> {
        board.put(&Saying { name, text, version, is_for_all: name != "mine" }, lasting, UNIX_EPOCH)
    }

    #[test]
    fn the_latest_of_a_name_holds_in_whatever_order_they_come() {
        let board = Board::new(7);
        assert_eq!(put(&board, "a", "second", 2, HOUR), Ok(true));
        assert_eq!(put(&board, "a", "first", 1, HOUR), Ok(false));
        assert_eq!(put(&board, "a", "again", 2, HOUR), Ok(false));
        assert_eq!(put(&board, "a", "of the future", 2 * AHEAD_MAX, HOUR), Ok(false));
        assert_eq!(put(&board, "b", "over", 1, Duration::ZERO), Ok(true));
        assert_eq!(put(&board, "mine", "here", 1, HOUR), Ok(true));
        let texts = |notices: Vec<Notice>| notices.into_iter().map(|notice| notice.text).collect::<Vec<_>>();
        assert_eq!(
            (texts(board.list()), texts(board.for_all())),
            (vec!["second".into(), "here".into()], vec!["second".to_owned(), "over".into()])
        );
    }

    #[test]
    fn versions_rise_whatever_clocks_do_and_whoever_gave_them() {
        let (board, second) = (Board::new(123_007), UNIX_EPOCH + Duration::from_secs(1));
        let given = [second, second, UNIX_EPOCH].map(|now| board.next_version(now));
        assert_eq!(given, [1_000_007, 1_000_008, 1_000_009]);
        board.note(2_000_000, second);
        board.note(u64::MAX, second);
        assert_eq!(board.next_version(second), 2_000_001);
    }

    #[test]
    fn what_is_over_gives_way_and_what_holds_does_not() {
        let board = Board::new(0);
        for n in 0..NOTICES_MAX {
            let lasting = if n == 0 { Duration::ZERO } else { HOUR };
            assert_eq!(put(&board, &n.to_string(), "text", 1, lasting), Ok(true));
        }
        assert_eq!(put(&board, "new", "text", 1, HOUR), Ok(true), "one was over");
        assert_eq!(put(&board, "newer", "text", 1, HOUR), Err(NoRoom));
        assert_eq!(put(&board, "new", "text", 2, HOUR), Ok(true));
        assert_eq!(put(&board, "new", &"x".repeat(TEXT_MAX + 1), 3, HOUR), Err(NoRoom));
    }
}
