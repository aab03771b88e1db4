//! Results of password verifications, so that a password is hashed once in a while and not for
//! every request.
//!
//! The key is a keyed hash of name and password. Invariants: the tables have a fixed size; a wrong
//! password never evicts a right one.

use std::time::Duration;

use limiter::MonotonicTime;

use super::super::token_cache::{TokenHasher, TokenTable};
use super::result::{AuthResult, PrincipalIndex};

/// How long a verified password is not hashed again. A change of the file takes effect at once.
const VERIFIED_TTL: Duration = Duration::from_secs(10 * 60);
/// How long a wrong password is rejected without another verification: a client that is
/// misconfigured repeats it.
const REJECTED_TTL: Duration = Duration::from_secs(10);
/// Users at a time, of small sites.
const VERIFIED_MAX: usize = 1_024;
const REJECTED_MAX: usize = 256;

/// Results of recent verifications.
pub(super) struct CredentialsCache {
    hasher: TokenHasher,
    verified: TokenTable<PrincipalIndex>,
    rejected: TokenTable<()>,
}

impl Default for CredentialsCache {
    fn default() -> Self {
        CredentialsCache {
            hasher: TokenHasher::default(),
            verified: TokenTable::new(VERIFIED_MAX),
            rejected: TokenTable::new(REJECTED_MAX),
        }
    }
}

impl CredentialsCache {
    /// The known result for `credentials`; `None`: they have to be verified.
    pub(super) fn get(&mut self, credentials: &[u8], now: MonotonicTime) -> Option<Result<PrincipalIndex, AuthResult>> {
        let digest = self.hasher.digest(credentials);
        let is_valid = |expires_at: u64| now.nanos() < expires_at;
        if let Some((principal, expires_at)) = self.verified.get(digest)
            && is_valid(expires_at)
        {
            return Some(Ok(*principal));
        }
        let is_rejected = self.rejected.get(digest).is_some_and(|(_, expires_at)| is_valid(expires_at));
        is_rejected.then_some(Err(AuthResult::Unknown))
    }

    pub(super) fn put(&mut self, credentials: &[u8], result: Option<PrincipalIndex>, now: MonotonicTime) {
        let digest = self.hasher.digest(credentials);
        match result {
            Some(principal) => self.verified.put(digest, (now + VERIFIED_TTL).nanos(), principal),
            None => self.rejected.put(digest, (now + REJECTED_TTL).nanos(), ()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_expire() {
        let mut cache = CredentialsCache::default();
        let at = |seconds| MonotonicTime::ORIGIN + Duration::from_secs(seconds);
        cache.put(b"ann:1", Some(PrincipalIndex(7)), at(5));
        cache.put(b"ann:2", None, at(5));
        assert_eq!(cache.get(b"ann:1", at(604)), Some(Ok(PrincipalIndex(7))));
        assert_eq!(cache.get(b"ann:1", at(605)), None);
        assert_eq!(cache.get(b"ann:2", at(14)), Some(Err(AuthResult::Unknown)));
        assert_eq!((cache.get(b"ann:2", at(15)), cache.get(b"ann:3", at(5))), (None, None));
    }
}
