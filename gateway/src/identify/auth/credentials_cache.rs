//! Results of password verifications, so that a password is hashed once in a while and not for
//! every request.
//!
//! The key is a keyed hash of name and password. A result is that of the user that the file had for
//! the name at that time: it is void once the file has another hash for the name. Invariants: the
//! tables have a fixed size; a wrong password never evicts a right one.

use std::time::Duration;

use limiter::MonotonicTime;

use super::super::token_cache::{TokenHasher, TokenTable};

/// How long a verified password is not hashed again. A change of its line takes effect at once.
const VERIFIED_TTL: Duration = Duration::from_secs(10 * 60);
/// How long a wrong password is rejected without another verification: a client that is
/// misconfigured repeats it.
const REJECTED_TTL: Duration = Duration::from_secs(10);
/// Users at a time, of small sites.
const VERIFIED_MAX: usize = 1_024;
const REJECTED_MAX: usize = 256;

/// Digest of a user's line: of the name and its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct UserDigest(pub(super) blake3::Hash);

/// Results of recent verifications.
pub(super) struct CredentialsCache {
    hasher: TokenHasher,
    verified: TokenTable<UserDigest>,
    /// `None`: of an unknown name.
    rejected: TokenTable<Option<UserDigest>>,
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
    /// Whether the password in `credentials` is right, where that is known; `None`: it has to be
    /// verified. `user`: the one of that name now.
    pub(super) fn get(&mut self, credentials: &[u8], user: Option<UserDigest>, now: MonotonicTime) -> Option<bool> {
        let digest = self.hasher.digest(credentials);
        let is_valid = |expires_at: u64| now.nanos() < expires_at;
        if let Some((verified, expires_at)) = self.verified.get(digest)
            && is_valid(expires_at)
            && Some(*verified) == user
        {
            return Some(true);
        }
        let is_rejected =
            self.rejected.get(digest).is_some_and(|(rejected, expires_at)| is_valid(expires_at) && *rejected == user);
        is_rejected.then_some(false)
    }

    /// `user`: the one whose hash was compared.
    pub(super) fn put(&mut self, credentials: &[u8], (user, is_right): (Option<UserDigest>, bool), now: MonotonicTime) {
        let digest = self.hasher.digest(credentials);
        match user.filter(|_| is_right) {
            Some(user) => self.verified.put(digest, (now + VERIFIED_TTL).nanos(), user),
            None => self.rejected.put(digest, (now + REJECTED_TTL).nanos(), user),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(text: &str) -> Option<UserDigest> {
        Some(UserDigest(blake3::hash(text.as_bytes())))
    }

    #[test]
    fn results_expire() {
        let mut cache = CredentialsCache::default();
        let at = |seconds| MonotonicTime::ORIGIN + Duration::from_secs(seconds);
        let ann = user("ann");
        cache.put(b"ann:1", (ann, true), at(5));
        cache.put(b"ann:2", (ann, false), at(5));
        assert_eq!(cache.get(b"ann:1", ann, at(604)), Some(true));
        assert_eq!(cache.get(b"ann:1", ann, at(605)), None);
        assert_eq!(cache.get(b"ann:2", ann, at(14)), Some(false));
        assert_eq!((cache.get(b"ann:2", ann, at(15)), cache.get(b"ann:3", ann, at(5))), (None, None));
    }

    #[test]
    fn results_are_void_with_another_line() {
        let mut cache = CredentialsCache::default();
        let now = MonotonicTime::ORIGIN;
        cache.put(b"ann:1", (user("ann"), true), now);
        cache.put(b"ann:2", (user("ann"), false), now);
        cache.put(b"new:1", (None, false), now);
        for other in [None, user("ann again")] {
            assert_eq!(cache.get(b"ann:1", other, now), None);
            assert_eq!(cache.get(b"ann:2", other, now), None);
        }
        assert_eq!((cache.get(b"new:1", None, now), cache.get(b"new:1", user("new"), now)), (Some(false), None));
    }
}
