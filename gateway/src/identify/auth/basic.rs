//! HTTP Basic authentication (RFC 7617): reads the credentials of a request and verifies passwords
//! on threads for blocking work.
//!
//! A verification takes 50 ms and more of a processor, on purpose. Bounds: few at a time in the
//! whole process, so that requests keep their processors, and one at a time of an address, so that
//! others do not wait for all of its passwords; few that wait; few wrong passwords per address. The
//! names of one address take turns: behind a NAT, a user does not wait for all guesses of another.
//! Equal credentials of one address share a verification (`in_progress`). Verified credentials are
//! cached (`credentials_cache`).

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::num::{NonZeroU32, NonZeroUsize};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use limiter::bucket::{Gcra, GcraTable};
use limiter::{Cost, KeyHash, MonotonicClock, Quota, Rate};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::credentials_cache::CredentialsCache;
use super::htpasswd::PasswordFile;
use super::in_progress::{InProgress, Lead, Participation};
use super::result::{AuthResult, PrincipalIndex};
use crate::http::fields::{Fields, KnownField};

/// Longest encoded credentials: longer ones are no password of a person.
const CREDENTIALS_BYTES_MAX: usize = 1_024;
/// Passwords that wait or are verified at a time, without equal ones.
const QUEUED_MAX: usize = 64;
/// Of one address: a client that guesses passwords leaves room for others.
const ADDRESS_QUEUED_MAX: usize = 16;
/// Of one name of an address: the others of the address have room.
const NAME_QUEUED_MAX: usize = 12;
/// How long a request waits: a browser's user tries again after that.
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
/// By the hash of the address; at most `QUEUED_MAX` requests in all.
static QUEUES: LazyLock<Mutex<HashMap<KeyHash, AddressQueue>>> = LazyLock::new(Mutex::default);
/// Hashes names. Two names with one hash share their turn.
static NAME_HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
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
    in_progress: InProgress,
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

/// The requests of an address whose passwords wait or are verified.
#[derive(Default)]
struct AddressQueue {
    requests: usize,
    turn: OnePermit,
    /// By the hash of the name.
    names: HashMap<u64, NameQueue>,
}

/// The requests of one name of an address.
#[derive(Default)]
struct NameQueue {
    requests: usize,
    turn: OnePermit,
}

/// One at a time, in the order in which they come.
struct OnePermit(Arc<Semaphore>);

impl Default for OnePermit {
    fn default() -> Self {
        OnePermit(Arc::new(Semaphore::new(1)))
    }
}

/// A request whose password waits or is verified, until it is dropped.
struct QueuedRequest {
    address: KeyHash,
    name: u64,
    /// One verification of a name at a time: other names of the address wait for one of it at most.
    name_turn: Arc<Semaphore>,
    /// One verification of an address at a time: passwords of other addresses wait for one of this
    /// address at most, however many it has sent.
    address_turn: Arc<Semaphore>,
}

impl QueuedRequest {
    /// `None` if there are too many, in all, of this address, or of this name there.
    fn new(address: KeyHash, name: &[u8]) -> Option<Self> {
        let name = NAME_HASHER.hash_one(name);
        let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = queues.values().map(|queue| queue.requests).sum();
        let own = queues.get(&address);
        let of_name = own.and_then(|queue| queue.names.get(&name)).map_or(0, |queue| queue.requests);
        let of_address = own.map_or(0, |queue| queue.requests);
        if total >= QUEUED_MAX || of_address >= ADDRESS_QUEUED_MAX || of_name >= NAME_QUEUED_MAX {
            return None;
        }
        let queue = queues.entry(address).or_default();
        let names = queue.names.entry(name).or_default();
        queue.requests += 1;
        names.requests += 1;
        let [name_turn, address_turn] = [&names.turn, &queue.turn].map(|turn| Arc::clone(&turn.0));
        Some(QueuedRequest { address, name, name_turn, address_turn })
    }

    /// Waits for the turn of the name, of the address, and of the process, in this order: a
    /// request that holds one of them waits for later ones only.
    async fn permits(&self) -> Result<[OwnedSemaphorePermit; 3], AcquireError> {
        let of_name = Arc::clone(&self.name_turn).acquire_owned().await?;
        let of_address = Arc::clone(&self.address_turn).acquire_owned().await?;
        Ok([of_name, of_address, Arc::clone(&VERIFICATIONS).acquire_owned().await?])
    }
}

impl Drop for QueuedRequest {
    fn drop(&mut self) {
        let mut queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = queues.get_mut(&self.address) {
            own.requests -= 1;
            if let Some(names) = own.names.get_mut(&self.name) {
                names.requests -= 1;
                if names.requests == 0 {
                    own.names.remove(&self.name);
                }
            }
            if own.requests == 0 {
                queues.remove(&self.address);
            }
        }
    }
}

impl PasswordVerifier {
    /// With the results of `old`, the verifier of the file before its change: those of users whose
    /// lines are the same stay valid.
    pub(super) fn new(users: PasswordFile, old: Option<&PasswordVerifier>) -> Self {
        let cache = old.map(|old| Arc::clone(&old.cache)).unwrap_or_default();
        PasswordVerifier { users, cache, in_progress: InProgress::default() }
    }

    /// The result for credentials, if it is known.
    fn known(&self, credentials: &Credentials) -> Option<Result<PrincipalIndex, AuthResult>> {
        let found = self.users.find(credentials.name());
        let digest = found.and_then(|index| self.users.digest(index));
        let is_right = self.cache().get(&credentials.text, digest, CLOCK.now())?;
        Some(found.filter(|_| is_right).ok_or(AuthResult::Unknown))
    }

    /// The user whose credentials a request has, if they were verified lately; `None`: they have to
    /// be verified.
    pub(super) fn look_up(&self, fields: &Fields) -> Result<Option<PrincipalIndex>, AuthResult> {
        let credentials = Credentials::read(fields)?;
        self.known(&credentials).transpose()
    }

    /// Verifies the credentials of a request, or waits for a verification of equal ones.
    pub(super) async fn verify(&self, fields: &Fields, address: KeyHash) -> Result<PrincipalIndex, AuthResult> {
        let credentials = Credentials::read(fields)?;
        let deadline = Instant::now() + WAIT_MAX;
        loop {
            match self.in_progress.participate(address, &credentials.text) {
                Participation::Leads(lead) => return self.verify_for_all(credentials, address, (lead, deadline)).await,
                Participation::Full => return Err(AuthResult::VerificationThrottled),
                Participation::Joins(join) => match timeout_at(deadline, join.result()).await {
                    Ok(Some(result)) => return result,
                    // The client of the leader has left.
                    Ok(None) => {}
                    Err(_) => return Err(AuthResult::VerificationThrottled),
                },
            }
        }
    }

    /// Verifies credentials for the requests that have joined. The table of wrong passwords is
    /// charged before the verification, so that concurrent ones count, and refunded for a right
    /// password.
    async fn verify_for_all(
        &self,
        credentials: Credentials,
        address: KeyHash,
        (lead, deadline): (Lead, Instant),
    ) -> Result<PrincipalIndex, AuthResult> {
        let Some(queued) = QueuedRequest::new(address, credentials.name()) else {
            return lead.end(Err(AuthResult::VerificationThrottled));
        };
        let Ok(Ok(permits)) = timeout_at(deadline, queued.permits()).await else {
            return lead.end(Err(AuthResult::VerificationThrottled));
        };
        // Another address may have had the same credentials verified meanwhile.
        if let Some(known) = self.known(&credentials) {
            return lead.end(known);
        }
        let one = Cost::new(NonZeroU32::MIN);
        if WRONG_PASSWORDS.commit(address, &WRONG_QUOTA, one, CLOCK.now()).is_err() {
            return lead.end(Err(AuthResult::ClientThrottled));
        }
        let users = self.users.clone();
        let cache = Arc::clone(&self.cache);
        let verified = tokio::task::spawn_blocking(move || {
            // Held until the hash is computed. The result counts also if the client has closed its
            // connection: a right password is not charged as a wrong one.
            let _held = (permits, queued);
            let found = users.verify(credentials.name(), credentials.password());
            let user = users.find(credentials.name()).and_then(|index| users.digest(index));
            if found.is_some() {
                WRONG_PASSWORDS.refund(address, &WRONG_QUOTA, one);
            }
            lock(&cache).put(&credentials.text, (user, found.is_some()), CLOCK.now());
            lead.end(found.ok_or(AuthResult::Unknown))
        });
        // A panic of the verification rejects the request.
        verified.await.unwrap_or(Err(AuthResult::Unknown))
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
        let of_name = |name: &str| (0..40).filter_map(|_| QueuedRequest::new(guessing, name.as_bytes())).collect();
        let [mut queued, of_bob]: [Vec<QueuedRequest>; 2] = ["ann", "bob"].map(of_name);
        assert_eq!((queued.len(), queued.len() + of_bob.len()), (NAME_QUEUED_MAX, ADDRESS_QUEUED_MAX));
        assert!(!Arc::ptr_eq(&of_bob[0].name_turn, &queued[0].name_turn));
        queued.extend(of_bob);
        assert!(queued.iter().all(|request| Arc::ptr_eq(&request.address_turn, &queued[0].address_turn)), "one turn");
        let of_other = QueuedRequest::new(other, b"ann").expect("room");
        assert!(!Arc::ptr_eq(&of_other.address_turn, &queued[0].address_turn));
        drop((queued, of_other));
        assert!(QueuedRequest::new(guessing, b"ann").is_some());
        let queues = QUEUES.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!queues.contains_key(&guessing) && !queues.contains_key(&other));
    }

    /// As many guesses as may wait, each of which takes long: a login from another address waits
    /// for one of them at most, and so does one of another name from the same address.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_login_does_not_wait_for_the_guesses_of_another_address_or_name() {
        let [first, second, third] = [1, 2, 4].map(|number| KeyHash(number << 100));
        login_beside_guesses((ADDRESS_QUEUED_MAX, first), (second, "ann")).await;
        login_beside_guesses((NAME_QUEUED_MAX, third), (third, "bob")).await;
    }

    /// Guesses are those of the name `ann`; those above `NAME_QUEUED_MAX` of another one.
    async fn login_beside_guesses((guess_count, guessing): (usize, KeyHash), (address, name): (KeyHash, &str)) {
        let hash = bcrypt::hash("right", 9).expect("a hash");
        let users = PasswordFile::parse(&format!("ann:{hash}\nbob:{hash}\n")).expect("a usable file");
        let verifier = Arc::new(PasswordVerifier::new(users, None));
        let of = |text: String| fields(&[("Authorization", &format!("Basic {}", BASE64.encode(text)))]);
        let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let mut guesses = tokio::task::JoinSet::new();
        for number in 0..guess_count {
            let guessed = if number < NAME_QUEUED_MAX { "ann" } else { "eve" };
            let fields = of(format!("{guessed}:wrong{number} for {name}"));
            let (verifier, done) = (Arc::clone(&verifier), Arc::clone(&done));
            guesses.spawn(async move {
                let result = verifier.verify(&fields, guessing).await;
                done.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                result
            });
        }
        while done.load(std::sync::atomic::Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let before = done.load(std::sync::atomic::Ordering::SeqCst);
        assert!(verifier.verify(&of(format!("{name}:right")), address).await.is_ok());
        let meanwhile = done.load(std::sync::atomic::Ordering::SeqCst) - before;
        assert!(meanwhile <= 3, "{meanwhile} of {guess_count} guesses came first for {name}");
        while guesses.join_next().await.is_some() {}
    }

    #[tokio::test]
    async fn verified_passwords_of_unchanged_lines_outlive_the_file() {
        let line = |name: &str, password: &str| format!("{name}:{}\n", bcrypt::hash(password, 4).expect("a hash"));
        let (ann, bob) = (line("ann", "1"), line("bob", "2"));
        let file = |text: &str| PasswordFile::parse(text).expect("a usable file");
        let of = |text: &str| fields(&[("Authorization", &format!("Basic {}", BASE64.encode(text)))]);
        let old = PasswordVerifier::new(file(&[&*ann, &bob].concat()), None);
        for credentials in ["ann:1", "bob:2"] {
            assert!(old.verify(&of(credentials), KeyHash(3 << 100)).await.is_ok());
        }
        assert_eq!(old.verify(&of("eve:3"), KeyHash(3 << 100)).await, Err(AuthResult::Unknown));
        let changed = [&*line("eve", "3"), &line("bob", "2"), &ann].concat();
        let new = PasswordVerifier::new(file(&changed), Some(&old));
        assert_eq!(new.look_up(&of("ann:1")), Ok(Some(PrincipalIndex(2))), "known, at its new place");
        assert_eq!(new.look_up(&of("bob:2")), Ok(None), "its line has changed");
        assert_eq!(new.look_up(&of("eve:3")), Ok(None), "it is new");
        let without = PasswordVerifier::new(file(&bob), Some(&new));
        assert_eq!(without.look_up(&of("ann:1")), Ok(None), "it is gone");
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
