//! Answers of verification services (`routes.auth.forward`) that allow it, for the time that they
//! say.
//!
//! The key is a keyed hash of everything that the service received. Invariant: the table has a
//! fixed size; only acceptances are kept.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use limiter::MonotonicTime;

use super::super::token_cache::{TokenHasher, TokenTable};

/// Requests of one route whose answer is kept at a time.
const ANSWERS_MAX: usize = 4_096;
/// Longest time that an answer is used, whatever it says.
const TTL_MAX: Duration = Duration::from_secs(3_600);

/// Fields of an acceptance that the origin receives, with names in lower case.
pub(crate) type AcceptedFields = Arc<[(String, Vec<u8>)]>;

/// The acceptances of one route.
pub(crate) struct AnswerCache {
    hasher: TokenHasher,
    accepted: Mutex<TokenTable<AcceptedFields>>,
}

impl Default for AnswerCache {
    fn default() -> Self {
        AnswerCache { hasher: TokenHasher::default(), accepted: Mutex::new(TokenTable::new(ANSWERS_MAX)) }
    }
}

impl AnswerCache {
    /// The acceptance of the request that is described by `question`.
    pub(crate) fn get(&self, question: &[u8], now: MonotonicTime) -> Option<AcceptedFields> {
        let mut accepted = self.accepted.lock().unwrap_or_else(PoisonError::into_inner);
        let (fields, expires_at) = accepted.get(self.hasher.digest(question))?;
        (now.nanos() < expires_at).then(|| Arc::clone(fields))
    }

    /// Keeps an acceptance for `ttl`.
    pub(crate) fn put(&self, question: &[u8], fields: AcceptedFields, (now, ttl): (MonotonicTime, Duration)) {
        if !ttl.is_zero() {
            let expires_at = (now + ttl.min(TTL_MAX)).nanos();
            self.accepted.lock().unwrap_or_else(PoisonError::into_inner).put(
                self.hasher.digest(question),
                expires_at,
                fields,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_expire_and_belong_to_one_request() {
        let cache = AnswerCache::default();
        let at = |seconds| MonotonicTime::ORIGIN + Duration::from_secs(seconds);
        let fields: AcceptedFields = Arc::from([("x-user".to_owned(), b"ann".to_vec())]);
        cache.put(b"a", Arc::clone(&fields), (at(1), Duration::from_secs(10)));
        cache.put(b"b", Arc::clone(&fields), (at(1), Duration::ZERO));
        cache.put(b"c", Arc::clone(&fields), (at(1), Duration::from_secs(1 << 30)));
        assert_eq!(cache.get(b"a", at(10)), Some(Arc::clone(&fields)));
        assert_eq!((cache.get(b"a", at(11)), cache.get(b"b", at(1)), cache.get(b"d", at(1))), (None, None, None));
        assert_eq!((cache.get(b"c", at(3_600)).is_some(), cache.get(b"c", at(3_601))), (true, None));
    }
}
