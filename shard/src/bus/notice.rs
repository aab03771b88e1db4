//! Owns notices: short texts by name that hold for a while, on all nodes or on one. What they mean is for those who read them.
//!
//! Each has a version, by which a node that hears two of one name knows the later: servers tell them in any order.
//!
//! Refuses more than `NOTICES_MAX` names, and longer texts than `TEXT_MAX`.
//! Invariant: of a name, a notice is replaced by a later one only.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// They are about what a configuration names.
pub(super) const NOTICES_MAX: usize = 1_024;

/// Of a name or a text, in bytes.
pub(super) const TEXT_MAX: usize = 512;

/// Longer than anything is tried out for.
const LASTING_MAX: Duration = Duration::from_secs(30 * 86_400);

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

/// What holds on this node.
#[derive(Default)]
pub(super) struct Board {
    notices: Mutex<BTreeMap<String, Notice>>,
    changed: Notify,
}

impl Board {
    /// Puts a notice up unless a later one of its name is there; says whether it is news.
    pub(super) fn put(&self, name: &str, text: &str, version: u64, lasting: Duration) -> Result<bool, NoRoom> {
        let mut notices = self.notices();
        if notices.get(name).is_some_and(|known| known.version >= version) {
            return Ok(false);
        }
        let now = Instant::now();
        if notices.len() >= NOTICES_MAX {
            notices.retain(|_, notice| notice.until > now);
        }
        let has_room = notices.len() < NOTICES_MAX || notices.contains_key(name);
        if !has_room || name.len().max(text.len()) > TEXT_MAX {
            return Err(NoRoom);
        }
        let until = now + lasting.min(LASTING_MAX);
        let notice = Notice { name: name.to_owned(), text: text.to_owned(), version, until };
        notices.insert(name.to_owned(), notice);
        drop(notices);
        self.changed.notify_one();
        Ok(true)
    }

    /// A version for a new notice: the time in microseconds, and in any case above the last.
    pub(super) fn next_version(&self, name: &str, now: SystemTime) -> u64 {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let known = self.notices().get(name).map_or(0, |known| known.version);
        u64::try_from(now).unwrap_or(u64::MAX).max(known.saturating_add(1))
    }

    pub(super) fn list(&self) -> Vec<Notice> {
        let now = Instant::now();
        self.notices().values().filter(|notice| notice.until > now).cloned().collect()
    }

    /// Waits until a notice was put up since the last call. Cancel safe.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    fn notices(&self) -> MutexGuard<'_, BTreeMap<String, Notice>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn the_latest_of_a_name_holds_in_whatever_order_they_come() {
        let board = Board::default();
        assert_eq!(board.put("a", "second", 2, HOUR), Ok(true));
        assert_eq!(board.put("a", "first", 1, HOUR), Ok(false));
        assert_eq!(board.put("a", "again", 2, HOUR), Ok(false));
        assert_eq!(board.put("b", "over", 1, Duration::ZERO), Ok(true));
        let texts: Vec<_> = board.list().into_iter().map(|notice| notice.text).collect();
        assert_eq!(texts, ["second"]);
        assert_eq!(board.next_version("a", UNIX_EPOCH), 3);
        assert_eq!(board.next_version("c", UNIX_EPOCH + Duration::from_secs(1)), 1_000_000);
    }

    #[test]
    fn what_is_over_gives_way_and_what_holds_does_not() {
        let board = Board::default();
        for n in 0..NOTICES_MAX {
            let lasting = if n == 0 { Duration::ZERO } else { HOUR };
            assert_eq!(board.put(&n.to_string(), "text", 1, lasting), Ok(true));
        }
        assert_eq!(board.put("new", "text", 1, HOUR), Ok(true), "one was over");
        assert_eq!(board.put("newer", "text", 1, HOUR), Err(NoRoom));
        assert_eq!(board.put("new", "text", 2, HOUR), Ok(true));
        assert_eq!(board.put("new", &"x".repeat(TEXT_MAX + 1), 3, HOUR), Err(NoRoom));
    }
}
