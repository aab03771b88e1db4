//! HTTP Basic authentication (RFC 7617): reads the credentials of a request and verifies passwords
//! on threads for blocking work.
//!
//! A verification takes 50 ms and more of a processor, on purpose. Bounds: few at a time in the
//! whole process, so that requests keep their processors; few that wait; few wrong passwords per
//! address. Verified credentials are cached (`credentials_cache`).

use std::collections::HashMap;
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use limiter::bucket::{Gcra, GcraTable};
use limiter::{Cost, KeyHash, MonotonicClock, Quota, Rate};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::credentials_cache::CredentialsCache;
use super::htpasswd::PasswordFile;
use super::result::{AuthResult, PrincipalIndex};
use crate::http::fields::{Fields, KnownField};

/// Longest encoded credentials: longer ones are no password of a person.
const CREDENTIALS_BYTES_MAX: usize = 1_024;
/// Requests that wait for a verification at a time. Each holds its connection.
const WAITING_MAX: usize = 64;
/// Of one address: a client that guesses passwords leaves room for others.
const ADDRESS_WAITING_MAX: usize = 16;
/// How long one waits: a browser's user tries again after that.
const WAIT_MAX: Duration = Duration::from_secs(5);
/// Wrong passwords of one address (IPv6: one /64): seconds for each, and number at once.
const WRONG_PER_ADDRESS: (u32, u32) = (6, 20);
/// Addresses with wrong passwords that are tracked at a time.
const TRACKED_ADDRESSES: NonZeroUsize = NonZeroUsize::new(1_024).expect("not zero");

/// Some clients leave out the padding.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

static CLOCK: LazyLock<MonotonicClock> = LazyLock::new(MonotonicClock::start);
/// Half of the processors.
static VERIFICATIONS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| {
    let processors = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    Arc::new(Semaphore::new((processors / 2).max(1)))
});
/// Requests that wait, by the hash of their address; at most `WAITING_MAX` in all.
static WAITING: LazyLock<Mutex<HashMap<KeyHash, usize>>> = LazyLock::new(Mutex::default);
/// One table for all routes and configurations: a reload gives no new tries.
static WRONG_PASSWORDS: LazyLock<GcraTable> = LazyLock::new(|| GcraTable::new(TRACKED_ADDRESSES));
static WRONG_QUOTA: LazyLock<Gcra> = LazyLock::new(|| {
    let rate = Rate::new(1, WRONG_PER_ADDRESS.0).expect("a constant within the limiter's range");
    let burst = NonZeroU32::new(WRONG_PER_ADDRESS.1).expect("a constant above zero");
    Gcra::new(Quota::new(rate, burst).expect("a constant within the limiter's range"))
});

/// Verifies the users of one file.
pub(super) struct PasswordVerifier {
    users: PasswordFile,
    cache: Arc<Mutex<CredentialsCache>>,
}

/// Name and password, separated by the first colon.
struct Credentials {
    text: Vec<u8>,
    colon: usize,
}

impl Credentials {
    /// The credentials of a request.
    fn read(fields: &Fields) -> Result<Credentials, AuthResult> {
        let mut lines = fields.all(KnownField::Authorization);
        let line = lines.next().ok_or(AuthResult::Missing)?;
        if lines.next().is_some() {
            return Err(AuthResult::Multiple);
        }
        let (scheme, encoded) = line.split_at_checked("Basic ".len()).ok_or(AuthResult::Missing)?;
        if !scheme.eq_ignore_ascii_case(b"Basic ") {
            return Err(AuthResult::Missing);
        }
        if encoded.len() > CREDENTIALS_BYTES_MAX {
            return Err(AuthResult::Malformed);
        }
        let text = BASE64.decode(encoded.trim_ascii()).map_err(|_| AuthResult::Malformed)?;
        let colon = memchr::memchr(b':', &text).ok_or(AuthResult::Malformed)?;
        // RFC 7617 section 2 excludes control characters. bcrypt would end a password at a zero.
        if text.iter().any(u8::is_ascii_control) {
            return Err(AuthResult::Malformed);
        }
        Ok(Credentials { text, colon })
    }

    fn name(&self) -> &[u8] {
        &self.text[..self.colon]
    }

    fn password(&self) -> &[u8] {
        &self.text[self.colon + 1..]
    }
}

/// Counts a request as waiting until it is dropped.
struct WaitingGuard(KeyHash);

impl WaitingGuard {
    /// `None` if too many wait, in all or of this address.
    fn new(address: KeyHash) -> Option<Self> {
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = waiting.values().sum();
        let own = waiting.entry(address).or_default();
        if total >= WAITING_MAX || *own >= ADDRESS_WAITING_MAX {
            if *own == 0 {
                waiting.remove(&address);
            }
            return None;
        }
        *own += 1;
        Some(WaitingGuard(address))
    }
}

impl Drop for WaitingGuard {
    fn drop(&mut self) {
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = waiting.get_mut(&self.0) {
            *own -= 1;
            if *own == 0 {
                waiting.remove(&self.0);
            }
        }
    }
}

impl PasswordVerifier {
    pub(super) fn new(users: PasswordFile) -> Self {
        PasswordVerifier { users, cache: Arc::default() }
    }

    /// The user whose credentials a request has, if they were verified lately; `None`: they have to
    /// be verified.
    pub(super) fn look_up(&self, fields: &Fields) -> Result<Option<PrincipalIndex>, AuthResult> {
        let credentials = Credentials::read(fields)?;
        self.cache().get(&credentials.text, CLOCK.now()).transpose()
    }

    /// Verifies the credentials of a request. The table of wrong passwords is charged before the
    /// verification, so that concurrent ones count, and refunded for a right password.
    pub(super) async fn verify(&self, fields: &Fields, address: KeyHash) -> Result<PrincipalIndex, AuthResult> {
        let credentials = Credentials::read(fields)?;
        let waiting = WaitingGuard::new(address).ok_or(AuthResult::VerificationThrottled)?;
        let permit = timeout(WAIT_MAX, Arc::clone(&VERIFICATIONS).acquire_owned()).await;
        drop(waiting);
        let Ok(Ok(permit)) = permit else { return Err(AuthResult::VerificationThrottled) };
        // A request with the same credentials may have been verified while this one waited.
        if let Some(known) = self.cache().get(&credentials.text, CLOCK.now()) {
            return known;
        }
        let one = Cost::new(NonZeroU32::MIN);
        if WRONG_PASSWORDS.commit(address, &WRONG_QUOTA, one, CLOCK.now()).is_err() {
            return Err(AuthResult::ClientThrottled);
        }
        let users = self.users.clone();
        let cache = Arc::clone(&self.cache);
        let verified = tokio::task::spawn_blocking(move || {
            // Held until the hash is computed. The result counts also if the client has closed its
            // connection: a right password is not charged as a wrong one.
            let _permit = permit;
            let found = users.verify(credentials.name(), credentials.password());
            if found.is_some() {
                WRONG_PASSWORDS.refund(address, &WRONG_QUOTA, one);
            }
            lock(&cache).put(&credentials.text, found, CLOCK.now());
            found
        });
        // A panic of the verification rejects the request.
        verified.await.unwrap_or(None).ok_or(AuthResult::Unknown)
    }

    fn cache(&self) -> MutexGuard<'_, CredentialsCache> {
        lock(&self.cache)
    }
}

fn lock(cache: &Mutex<CredentialsCache>) -> MutexGuard<'_, CredentialsCache> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn guesses_of_one_address_leave_room_for_others() {
        let (guessing, other) = (KeyHash(u128::MAX), KeyHash(u128::MAX - 1));
        let guards: Vec<WaitingGuard> = (0..40).filter_map(|_| WaitingGuard::new(guessing)).collect();
        assert_eq!(guards.len(), ADDRESS_WAITING_MAX);
        let waits = WaitingGuard::new(other);
        assert!(waits.is_some());
        drop((guards, waits));
        assert!(WaitingGuard::new(guessing).is_some());
        let waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!waiting.contains_key(&guessing) && !waiting.contains_key(&other));
    }

    #[test]
    fn credentials_follow_rfc_7617() {
        let read = |value: &str| {
            let credentials = Credentials::read(&fields(&[("Authorization", value)]))?;
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            Ok((text(credentials.name()), text(credentials.password())))
        };
        let of = |text: &str| format!("Basic {}", BASE64.encode(text));
        for (text, name, password) in
            [("test:123\u{a3}", "test", "123\u{a3}"), ("a:b:c", "a", "b:c"), (":", "", ""), ("ann:", "ann", "")]
        {
            assert_eq!(read(&of(text)), Ok((name.to_owned(), password.to_owned())), "{text}");
            assert!(read(&of(text).replace("Basic ", "bASIC   ").replace('=', "")).is_ok(), "{text}");
        }
        for value in ["Basic ****", "Basic YW5u", &of("a\0:b"), &of("a:b\n"), &of(&"x:".repeat(600)), "Basic "] {
            assert_eq!(read(value), Err(AuthResult::Malformed), "{value}");
        }
        for value in ["", "Basic", "Bearer YTpi", "BasicYTpi"] {
            assert_eq!(read(value), Err(AuthResult::Missing), "{value}");
        }
        let twice = fields(&[("authorization", &of("a:b")), ("Authorization", &of("a:b"))]);
        assert_eq!(Credentials::read(&twice).err(), Some(AuthResult::Multiple));
    }
}
