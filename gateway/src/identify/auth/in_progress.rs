//! Verifications in progress, so that requests with equal credentials share one.
//!
//! The key is the address and a keyed hash of name and password: no password is kept for a
//! comparison, and the time of one says nothing about it. Requests of other addresses have
//! verifications of their own, which are charged to them. Invariants: one verification of a key at
//! a time; each entry has a leader, which removes it when it ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use limiter::KeyHash;
use tokio::sync::watch;

use super::super::token_cache::{TokenDigest, TokenHasher};
use super::result::{AuthResult, PrincipalIndex};

/// Requests that wait for one verification: more than a browser sends at a time over HTTP/2. Each
/// holds its connection or stream, and nothing else.
const JOINED_MAX: usize = 256;

type Verified = Result<PrincipalIndex, AuthResult>;
type Key = (KeyHash, TokenDigest);
type Results = Mutex<HashMap<Key, watch::Sender<Option<Verified>>>>;

/// The verifications in progress of one file.
#[derive(Default)]
pub(super) struct InProgress {
    hasher: TokenHasher,
    results: Arc<Results>,
}

/// How a request takes part in the verification of its credentials.
pub(super) enum Participation {
    /// It verifies them for all.
    Leads(Lead),
    Joins(Join),
    /// Too many have joined.
    Full,
}

/// A verification that others may join, until it is dropped.
pub(super) struct Lead {
    key: Key,
    results: Arc<Results>,
}

/// The verification of another request.
pub(super) struct Join(watch::Receiver<Option<Verified>>);

impl InProgress {
    pub(super) fn participate(&self, address: KeyHash, credentials: &[u8]) -> Participation {
        let key = (address, self.hasher.digest(credentials));
        let mut results = lock(&self.results);
        match results.get(&key) {
            Some(result) if result.receiver_count() >= JOINED_MAX => Participation::Full,
            Some(result) => Participation::Joins(Join(result.subscribe())),
            None => {
                results.insert(key, watch::Sender::new(None));
                Participation::Leads(Lead { key, results: Arc::clone(&self.results) })
            }
        }
    }
}

impl Lead {
    /// Ends the verification for all.
    pub(super) fn end(self, result: Verified) -> Verified {
        if let Some(sender) = lock(&self.results).get(&self.key) {
            sender.send_replace(Some(result));
        }
        result
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        lock(&self.results).remove(&self.key);
    }
}

impl Join {
    /// Waits for the result; `None`: the leader was cancelled. Cancel safe.
    pub(super) async fn result(mut self) -> Option<Verified> {
        let result = self.0.wait_for(Option::is_some).await.ok()?;
        *result
    }
}

fn lock(results: &Results) -> MutexGuard<'_, HashMap<Key, watch::Sender<Option<Verified>>>> {
    results.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADDRESS: KeyHash = KeyHash(1 << 100);

    #[tokio::test]
    async fn equal_credentials_of_an_address_share_a_result() {
        let all = InProgress::default();
        let Participation::Leads(lead) = all.participate(ADDRESS, b"ann:1") else { panic!("the first leads") };
        let joins: Vec<Join> = (0..JOINED_MAX)
            .map(|_| match all.participate(ADDRESS, b"ann:1") {
                Participation::Joins(join) => join,
                _ => panic!("there is room"),
            })
            .collect();
        assert!(matches!(all.participate(ADDRESS, b"ann:1"), Participation::Full));
        let others = [(ADDRESS, b"ann:2"), (KeyHash(2 << 100), b"ann:1")];
        assert!(others.iter().all(|(at, text)| matches!(all.participate(*at, *text), Participation::Leads(_))));
        assert_eq!(lead.end(Ok(PrincipalIndex(7))), Ok(PrincipalIndex(7)));
        for join in joins {
            assert_eq!(join.result().await, Some(Ok(PrincipalIndex(7))));
        }
        assert!(lock(&all.results).is_empty());
    }

    #[tokio::test]
    async fn a_leader_that_is_cancelled_is_followed_by_another() {
        let all = InProgress::default();
        let lead = all.participate(ADDRESS, b"ann:1");
        let Participation::Joins(join) = all.participate(ADDRESS, b"ann:1") else { panic!("it joins") };
        drop(lead);
        assert_eq!(join.result().await, None);
        assert!(matches!(all.participate(ADDRESS, b"ann:1"), Participation::Leads(_)));
    }
}
