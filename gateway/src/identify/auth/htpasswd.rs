//! Files of users and password hashes, as `htpasswd -B` writes them.
//!
//! Accepts bcrypt, argon2 and SHA-crypt. Refuses hashes that are fast to try (MD5, SHA-1, DES,
//! plain text) and parameters that would occupy a processor for seconds or gibibytes of memory.

use std::collections::HashMap;
use std::fmt;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use argon2::password_hash::PasswordVerifier as _;
use argon2::password_hash::phc::PasswordHash as PhcHash;

use super::credentials_cache::UserDigest;
use super::result::PrincipalIndex;

/// About two seconds of a processor. `htpasswd` allows 17.
const BCRYPT_COST_MAX: u32 = 15;
/// About one second of a processor; the default is 5,000.
const SHA_ROUNDS_MAX: u32 = 1_000_000;
/// KiB of memory and passes of argon2; more than the recommendations of RFC 9106 section 4 for
/// servers, except the first one, of 2 GiB.
const ARGON2_KIB_MAX: u32 = 256 << 10;
const ARGON2_PASSES_MAX: u32 = 10;
/// Different costs of the hashes of a file: a wrong password costs one hash of each.
const COSTS_MAX: usize = 8;
/// Longest time that a wrong password may take on a slow processor: less than the longest wait for
/// a verification, so that a few guesses do not keep all others out.
const COST_SUM_MAX: Duration = Duration::from_secs(4);
/// Lines with a longer name are mistakes.
const NAME_BYTES_MAX: usize = 256;

/// The users of one file and their password hashes.
#[derive(Clone)]
pub(crate) struct PasswordFile(Arc<UserTable>);

struct UserTable {
    users: Vec<User>,
    by_name: HashMap<String, PrincipalIndex>,
    /// A user of each cost that occurs, for hashes that are computed in vain.
    costs: Vec<usize>,
    /// Digest of the source text.
    digest: blake3::Hash,
}

struct User {
    name: String,
    hash: StoredHash,
    digest: UserDigest,
    /// Index of the cost of the hash in `costs`.
    cost: usize,
}

/// A checked hash in its text form.
enum StoredHash {
    Bcrypt(String),
    Argon2(String),
    ShaCrypt(String),
}

/// Why a file of users cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum PasswordFileError {
    #[error("line {0} is not `NAME:HASH`")]
    Line(usize),
    #[error("line {0}: the hash is not bcrypt, argon2 or SHA-crypt")]
    Kind(usize),
    #[error("line {0}: the hash is malformed")]
    Hash(usize),
    #[error("line {0}: the parameters of the hash are too expensive")]
    Cost(usize),
    #[error("line {line}: the name of line {first} occurs again")]
    Duplicate { line: usize, first: usize },
    #[error("line {line}: the hashes have more than {max} different costs")]
    Costs { line: usize, max: usize },
    #[error(
        "line {line}: a wrong password, which costs one hash of each kind and cost of the file, would take about {} s",
        sum.as_secs()
    )]
    CostSum { line: usize, sum: Duration },
    #[error("it has no user")]
    Empty,
}

impl PasswordFile {
    /// Parses a file. Empty lines and lines that begin with `#` are ignored.
    pub(crate) fn parse(text: &str) -> Result<PasswordFile, PasswordFileError> {
        let (mut users, mut by_name, mut lines) = (Vec::new(), HashMap::new(), HashMap::new());
        let (mut costs, mut cost_names, mut sum) = (Vec::new(), Vec::new(), Duration::ZERO);
        for (line, text) in (1..).zip(text.lines().map(str::trim)) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let (name, hash) = text.split_once(':').ok_or(PasswordFileError::Line(line))?;
            if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
                return Err(PasswordFileError::Line(line));
            }
            // `htpasswd` separates further columns by colons, which are ignored.
            let hash = StoredHash::parse(hash.split(':').next().unwrap_or_default(), line)?;
            if let Some(first) = lines.insert(name, line) {
                return Err(PasswordFileError::Duplicate { line, first });
            }
            let cost_name = hash.cost_name();
            let cost = cost_names.iter().position(|known| *known == cost_name).unwrap_or_else(|| {
                cost_names.push(cost_name);
                sum += hash.time();
                costs.push(users.len());
                costs.len() - 1
            });
            if costs.len() > COSTS_MAX {
                return Err(PasswordFileError::Costs { line, max: COSTS_MAX });
            }
            if sum > COST_SUM_MAX {
                return Err(PasswordFileError::CostSum { line, sum });
            }
            // A file has at most one mebibyte.
            let index = PrincipalIndex(u32::try_from(users.len()).unwrap_or(u32::MAX));
            by_name.insert(name.to_owned(), index);
            let digest = UserDigest(blake3::hash(format!("{name}:{}", hash.text()).as_bytes()));
            users.push(User { name: name.to_owned(), hash, digest, cost });
        }
        if users.is_empty() {
            return Err(PasswordFileError::Empty);
        }
        let digest = blake3::hash(text.as_bytes());
        Ok(PasswordFile(Arc::new(UserTable { users, by_name, costs, digest })))
    }

    /// Verifies a password, which takes long. A wrong password, and one for an unknown name, cost
    /// one hash of each cost that the file has: the time does not say whether a name exists.
    pub(super) fn verify(&self, name: &[u8], password: &[u8]) -> Option<PrincipalIndex> {
        let table = &*self.0;
        let found = self.find(name);
        let user = found.and_then(|index| table.users.get(index.0 as usize));
        if user.is_some_and(|user| user.hash.matches(password)) {
            return found;
        }
        let own = user.map(|user| user.cost);
        for (_, user) in table.costs.iter().enumerate().filter(|(cost, _)| Some(*cost) != own) {
            black_box(table.users.get(*user).is_some_and(|user| user.hash.matches(password)));
        }
        None
    }

    /// The user of a name.
    pub(super) fn find(&self, name: &[u8]) -> Option<PrincipalIndex> {
        self.0.by_name.get(std::str::from_utf8(name).ok()?).copied()
    }

    /// The digest of a user's line.
    pub(super) fn digest(&self, index: PrincipalIndex) -> Option<UserDigest> {
        self.0.users.get(index.0 as usize).map(|user| user.digest)
    }

    pub(super) fn name(&self, index: PrincipalIndex) -> &str {
        self.0.users.get(index.0 as usize).map_or("", |user| &user.name)
    }
}

/// Cost of new hashes: about 0.2 s of a processor.
const BCRYPT_COST: u32 = 12;
/// bcrypt ignores what follows.
const BCRYPT_BYTES_MAX: usize = 72;

/// A line with a new hash of a password, or why there is none.
pub fn password_line(name: &str, password: &str) -> Result<String, String> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains(':') || name.chars().any(char::is_control) {
        return Err("a name is 1 to 256 characters without `:` and control characters".to_owned());
    }
    if password.is_empty() || password.len() > BCRYPT_BYTES_MAX || password.chars().any(char::is_control) {
        return Err("a password is one line of 1 to 72 bytes without control characters".to_owned());
    }
    let hash = bcrypt::hash(password, BCRYPT_COST).map_err(|error| error.to_string())?;
    Ok(format!("{name}:{hash}"))
}

impl StoredHash {
    fn parse(text: &str, line: usize) -> Result<StoredHash, PasswordFileError> {
        let malformed = PasswordFileError::Hash(line);
        let bounded = |is_bounded: bool| if is_bounded { Ok(()) } else { Err(PasswordFileError::Cost(line)) };
        let is_of = |prefixes: &[&str]| prefixes.iter().any(|prefix| text.starts_with(prefix));
        if is_of(&["$2y$", "$2b$", "$2a$"]) {
            let parts: bcrypt::HashParts = text.parse().map_err(|_| malformed)?;
            bounded(parts.get_cost() <= BCRYPT_COST_MAX)?;
            return Ok(StoredHash::Bcrypt(text.to_owned()));
        }
        if is_of(&["$argon2id$", "$argon2i$", "$argon2d$"]) {
            let hash = PhcHash::new(text).map_err(|_| PasswordFileError::Hash(line))?;
            let params = argon2::Params::try_from(&hash).map_err(|_| malformed)?;
            bounded(params.m_cost() <= ARGON2_KIB_MAX && params.t_cost() <= ARGON2_PASSES_MAX)?;
            return Ok(StoredHash::Argon2(text.to_owned()));
        }
        if is_of(&["$5$", "$6$"]) {
            let parts: Vec<&str> = text[3..].split('$').collect();
            let rounds = match parts[..] {
                [_salt, _hash] => sha_crypt::Params::RECOMMENDED_ROUNDS,
                [rounds, _salt, _hash] => {
                    let rounds = rounds.strip_prefix("rounds=").and_then(|rounds| rounds.parse().ok());
                    rounds.filter(|rounds| *rounds >= sha_crypt::Params::ROUNDS_MIN).ok_or(malformed)?
                }
                _ => return Err(malformed),
            };
            bounded(rounds <= SHA_ROUNDS_MAX)?;
            let length = if text.starts_with("$5$") { 43 } else { 86 };
            let is_hash = parts.last().is_some_and(|hash| hash.len() == length);
            return if is_hash {
                Ok(StoredHash::ShaCrypt(text.to_owned()))
            } else {
                Err(PasswordFileError::Hash(line))
            };
        }
        Err(PasswordFileError::Kind(line))
    }

    fn text(&self) -> &str {
        let (StoredHash::Bcrypt(text) | StoredHash::Argon2(text) | StoredHash::ShaCrypt(text)) = self;
        text
    }

    /// About the time that the hash takes on a slow processor.
    fn time(&self) -> Duration {
        let text = self.text();
        let malformed = Duration::ZERO;
        match self {
            StoredHash::Bcrypt(_) => {
                // A quarter of a second with the cost 12, and twice as long with each further one.
                text.parse().map_or(malformed, |parts: bcrypt::HashParts| {
                    Duration::from_millis(2_u64.saturating_pow(parts.get_cost()) / 16)
                })
            }
            StoredHash::Argon2(_) => {
                let params = PhcHash::new(text).ok().and_then(|hash| argon2::Params::try_from(&hash).ok());
                params.map_or(malformed, |params| {
                    Duration::from_micros(u64::from(params.m_cost()) * u64::from(params.t_cost()) / 2)
                })
            }
            StoredHash::ShaCrypt(_) => {
                let rounds = text.split('$').find_map(|part| part.strip_prefix("rounds="));
                let rounds = rounds.and_then(|rounds| rounds.parse().ok());
                Duration::from_micros(2 * rounds.unwrap_or(u64::from(sha_crypt::Params::RECOMMENDED_ROUNDS)))
            }
        }
    }

    /// Kind and parameters: hashes of one name take equally long.
    fn cost_name(&self) -> String {
        let text = self.text();
        let parts: Vec<&str> = text.split('$').collect();
        match self {
            StoredHash::Bcrypt(_) => format!("bcrypt {}", parts.get(2).unwrap_or(&"")),
            // `$argon2id$v=19$m=65536,t=3,p=4$salt$hash`; the version may be absent.
            StoredHash::Argon2(_) => parts[1..parts.len().saturating_sub(2).max(1)].join(" "),
            StoredHash::ShaCrypt(_) => {
                let rounds = parts.get(2).filter(|part| part.starts_with("rounds=")).unwrap_or(&"");
                format!("sha-crypt {} {rounds}", parts.get(1).unwrap_or(&""))
            }
        }
    }

    fn matches(&self, password: &[u8]) -> bool {
        match self {
            // Bytes after the 72nd are not part of the hash, as in `htpasswd`.
            StoredHash::Bcrypt(hash) => bcrypt::verify(password, hash).unwrap_or(false),
            StoredHash::Argon2(hash) => argon2::Argon2::default().verify_password(password, hash.as_str()).is_ok(),
            StoredHash::ShaCrypt(hash) => {
                sha_crypt::ShaCrypt::default().verify_password(password, hash.as_str()).is_ok()
            }
        }
    }
}

/// Compares the source texts.
impl PartialEq for PasswordFile {
    fn eq(&self, other: &PasswordFile) -> bool {
        self.0.digest == other.0.digest
    }
}

impl fmt::Debug for PasswordFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.users.iter().map(|user| &user.name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification of SHA-crypt.
    const SHA256: &str = "$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5";
    const SHA512: &str = "$6$rounds=10000$saltstringsaltst$OW1/O6BYHV6BcXZu8QVeXbDWra3Oeqh0sbHbbMCVNSnCM/UrjmM0Dp8vOuZeHBy/YTBmSK6H9qs/y3RnOaw5v.";

    fn bcrypt_of(password: &str) -> String {
        bcrypt::hash(password, 4).expect("a hash").replace("$2b$", "$2y$")
    }

    fn argon2_of(password: &str, kib: u32) -> String {
        use argon2::password_hash::PasswordHasher as _;
        let params = argon2::Params::new(kib, 1, 1, None).expect("parameters");
        argon2::Argon2::from(params)
            .hash_password_with_salt(password.as_bytes(), b"saltsalt")
            .expect("a hash")
            .to_string()
    }

    #[test]
    fn passwords_of_each_kind_are_verified() {
        let text = format!(
            "# users\nann:{}\nbob:{}:Bob's column\n\ncid:{SHA256}\ndéa:{SHA512}\n",
            bcrypt_of("pass"),
            argon2_of("pass:word", 64)
        );
        let file = PasswordFile::parse(&text).expect("a usable file");
        let verify = |name: &str, password: &str| {
            file.verify(name.as_bytes(), password.as_bytes()).map(|index| file.name(index).to_owned())
        };
        for (name, password) in
            [("ann", "pass"), ("bob", "pass:word"), ("cid", "Hello world!"), ("déa", "Hello world!")]
        {
            assert_eq!(verify(name, password).as_deref(), Some(name));
            for wrong in ["", "Pass", "pass:wor", "Hello world"] {
                assert_eq!(verify(name, wrong), None, "{name} {wrong}");
            }
            // The hash of an existing user is computed for an unknown name; its password does not
            // admit that name.
            assert!((0..20).all(|n| verify(&format!("eve{n}"), password).is_none()));
        }
        assert_eq!(file.verify(b"d\xe9a", b"Hello world!"), None, "not UTF-8");
        assert!(!format!("{file:?}").contains("$2y$"), "no hash is shown");
    }

    #[test]
    fn wrong_passwords_cost_one_hash_of_each_cost() {
        let bcrypt = |cost| bcrypt::hash("pass", cost).expect("a hash");
        let lines =
            [bcrypt(4), bcrypt(5), bcrypt(4), argon2_of("pass", 64), argon2_of("pass", 128), argon2_of("x", 64)];
        let lines = lines.iter().map(String::as_str).chain([SHA256, SHA512]);
        let text: String = lines.enumerate().map(|(at, hash)| format!("user{at}:{hash}\n")).collect();
        let file = PasswordFile::parse(&text).expect("a usable file");
        let costs: Vec<usize> = file.0.users.iter().map(|user| user.cost).collect();
        assert_eq!((costs, &file.0.costs[..]), (vec![0, 1, 0, 2, 3, 2, 4, 5], &[0, 1, 3, 4, 6, 7][..]));
        let many: String = (0..9).map(|at| format!("user{at}:{}\n", argon2_of("x", 64 + 8 * at))).collect();
        assert_eq!(PasswordFile::parse(&many).expect_err("refused"), PasswordFileError::Costs { line: 9, max: 8 });
    }

    #[test]
    fn the_costs_of_a_wrong_password_are_bounded_together() {
        let hash = bcrypt_of("pass");
        let (_, salted) = hash.rsplit_once('$').expect("a hash");
        let file = |costs: &[u32]| {
            let line = |cost: &u32| format!("user{cost}:$2b${cost:02}${salted}\n");
            PasswordFile::parse(&costs.iter().map(line).collect::<String>())
        };
        assert!(file(&[15, 14, 10, 9]).is_ok());
        let error = file(&[15, 14, 13, 12, 11, 10]).expect_err("refused");
        assert_eq!(error, PasswordFileError::CostSum { line: 6, sum: Duration::from_millis(4_032) });
    }

    #[test]
    fn digests_are_those_of_lines() {
        let (one, two) = (bcrypt_of("1"), bcrypt_of("2"));
        let file = |text: String| PasswordFile::parse(&text).expect("a usable file");
        let before = file(format!("ann:{one}\nbob:{two}\n"));
        let after = file(format!("# first\nbob:{one}\nann:{one}:a column\n"));
        let digest = |file: &PasswordFile, name: &str| file.find(name.as_bytes()).and_then(|index| file.digest(index));
        assert_eq!(digest(&before, "ann"), digest(&after, "ann"));
        assert_ne!(digest(&before, "bob"), digest(&after, "bob"));
        assert_eq!(digest(&after, "eve"), None);
    }

    #[test]
    fn fast_malformed_and_expensive_hashes_are_refused() {
        use PasswordFileError::*;
        let bcrypt = bcrypt_of("a");
        for (hash, want) in [
            ("$apr1$8v5KoN3c$m3Oq2Tz8xQ0zQ1Jj1jQyW1", Kind(1)),
            ("{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=", Kind(1)),
            ("rl.3StKT.4T8M", Kind(1)),
            ("secret", Kind(1)),
            ("", Kind(1)),
            ("$2x$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW", Kind(1)),
            (&bcrypt[..59], Hash(1)),
            (&bcrypt.replace("$04$", "$16$"), Cost(1)),
            ("$argon2id$v=19$m=64,t=1$", Hash(1)),
            (&argon2_of("a", 64).replace("m=64", "m=1048576"), Cost(1)),
            (&argon2_of("a", 64).replace("t=1", "t=99"), Cost(1)),
            (&SHA512.replace("10000", "1000001"), Cost(1)),
            (&SHA512.replace("10000", "x"), Hash(1)),
            ("$5$salt", Hash(1)),
            (&SHA256[..50], Hash(1)),
        ] {
            assert_eq!(PasswordFile::parse(&format!("ann:{hash}")).expect_err("refused"), want, "{hash}");
        }
        assert_eq!(PasswordFile::parse("# none\n").expect_err("refused"), Empty);
        assert_eq!(PasswordFile::parse("ann").expect_err("refused"), Line(1));
        let twice = format!("ann:{SHA256}\nbob:{SHA256}\nann:{SHA256}");
        assert_eq!(PasswordFile::parse(&twice).expect_err("refused"), Duplicate { line: 3, first: 1 });
    }
}
