//! API keys: a file of hashed keys, their creation, and the lookup of one in a request.
//!
//! A line of the file is `NAME:sha256:HEX` or `NAME:sha256:HEX:TIER`. A fast hash suffices, because
//! a key has 256 random bits: there is no dictionary to try, and 2^128 tries would take as long
//! with any hash. A short key could be guessed and is refused, by `tidegate key` and in requests.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::crypto::aws_lc_rs;
use sha2::{Digest as _, Sha256};

use super::result::{AuthResult, PrincipalIndex};
use crate::http::fields::{Fields, KnownField};

/// Shortest key: 128 bits in base64.
const KEY_BYTES_MIN: usize = 22;
/// Longest key; longer ones are not hashed.
const KEY_BYTES_MAX: usize = 256;
/// Random bytes of a new key.
const KEY_RANDOM_BYTES: usize = 32;
/// Names are in logs.
const NAME_BYTES_MAX: usize = 64;
/// Prefix of new keys, by which scanners for leaked secrets recognise them.
const KEY_PREFIX: &str = "tgk_";
/// The only hash. Named in the file, so that another one can be added.
const HASH_NAME: &str = "sha256";

/// The keys of one file.
#[derive(Clone)]
pub(crate) struct ApiKeys(Arc<ApiKeyTable>);

struct ApiKeyTable {
    entries: Vec<ApiKeyEntry>,
    /// Index by a keyed hash of the hash of the key, so that the time of a lookup says nothing
    /// about the hashes in the table.
    by_digest: HashMap<u128, PrincipalIndex>,
    lookup_key: [u8; 32],
    /// Digest of the source text.
    digest: blake3::Hash,
}

struct ApiKeyEntry {
    name: String,
    class: Option<String>,
    line: usize,
}

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error, PartialEq)]
pub(crate) enum ApiKeyFileError {
    #[error("line {0} is not `NAME:sha256:HEX` or `NAME:sha256:HEX:TIER`")]
    Line(usize),
    #[error("line {0}: a name is 1 to 64 letters, digits, `.`, `-`, `_` or `@`")]
    Name(usize),
    #[error("line {0}: the hash is not 64 hexadecimal digits")]
    Hash(usize),
    #[error("line {line}: {what} of line {first} occurs again")]
    Duplicate { line: usize, first: usize, what: &'static str },
}

impl ApiKeys {
    /// Parses a file. Empty lines and lines that begin with `#` are ignored. A file without keys
    /// accepts none.
    pub(crate) fn parse(text: &str) -> Result<ApiKeys, ApiKeyFileError> {
        let mut table = ApiKeyTable {
            entries: Vec::new(),
            by_digest: HashMap::new(),
            lookup_key: random_key(),
            digest: blake3::hash(text.as_bytes()),
        };
        let mut names = HashMap::new();
        for (line, text) in (1..).zip(text.lines().map(str::trim)) {
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let parts: Vec<&str> = text.split(':').collect();
            let (name, hash, class) = match parts[..] {
                [name, HASH_NAME, hash] => (name, hash, None),
                [name, HASH_NAME, hash, class] if !class.is_empty() => (name, hash, Some(class.to_owned())),
                _ => return Err(ApiKeyFileError::Line(line)),
            };
            if !is_name(name) {
                return Err(ApiKeyFileError::Name(line));
            }
            let hash = parse_hash(hash).ok_or(ApiKeyFileError::Hash(line))?;
            if let Some(first) = names.insert(name, line) {
                return Err(ApiKeyFileError::Duplicate { line, first, what: "the name" });
            }
            // A file has at most one mebibyte.
            let index = PrincipalIndex(u32::try_from(table.entries.len()).unwrap_or(u32::MAX));
            if let Some(first) = table.by_digest.insert(keyed(&table.lookup_key, &hash), index) {
                let first = table.entries[first.0 as usize].line;
                return Err(ApiKeyFileError::Duplicate { line, first, what: "the key" });
            }
            table.entries.push(ApiKeyEntry { name: name.to_owned(), class, line });
        }
        Ok(ApiKeys(Arc::new(table)))
    }

    /// Finds the key that a request carries in `field`.
    pub(super) fn find(&self, fields: &Fields, field: &str) -> Result<PrincipalIndex, AuthResult> {
        let mut lines = fields.named(field.as_bytes());
        let line = lines.next().ok_or(AuthResult::Missing)?;
        if lines.next().is_some() {
            // The origin, or a proxy before the gateway, might read another one.
            return Err(AuthResult::Multiple);
        }
        let key = match field == KnownField::Authorization.as_str() {
            true => bearer(line).ok_or(AuthResult::Missing)?,
            false => line,
        };
        let is_key = (KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic);
        if !is_key {
            return Err(if key.is_empty() { AuthResult::Missing } else { AuthResult::Malformed });
        }
        let hash: [u8; 32] = Sha256::digest(key).into();
        self.0.by_digest.get(&keyed(&self.0.lookup_key, &hash)).copied().ok_or(AuthResult::Unknown)
    }

    pub(super) fn name(&self, index: PrincipalIndex) -> &str {
        self.0.entries.get(index.0 as usize).map_or("", |entry| &entry.name)
    }

    pub(super) fn class(&self, index: PrincipalIndex) -> Option<&str> {
        self.0.entries.get(index.0 as usize)?.class.as_deref()
    }

    /// The user classes that the file names, with their lines.
    pub(crate) fn classes(&self) -> impl Iterator<Item = (&str, usize)> {
        self.0.entries.iter().filter_map(|entry| Some((entry.class.as_deref()?, entry.line)))
    }

    /// The number of keys.
    pub(crate) fn len(&self) -> usize {
        self.0.entries.len()
    }
}

/// Compares the source texts.
impl PartialEq for ApiKeys {
    fn eq(&self, other: &ApiKeys) -> bool {
        self.0.digest == other.0.digest
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.entries.iter().map(|entry| &entry.name)).finish()
    }
}

/// A new key and its line for the file.
#[derive(Debug)]
pub struct NewApiKey {
    pub key: String,
    pub line: String,
}

/// Why no line for a key can be written.
#[derive(Debug, thiserror::Error)]
pub enum NewApiKeyError {
    #[error("a name is 1 to {NAME_BYTES_MAX} letters, digits, `.`, `-`, `_` or `@`")]
    Name,
    #[error("a tier is 1 to {NAME_BYTES_MAX} letters, digits, `.`, `-` or `_`")]
    Tier,
    #[error("a key is {KEY_BYTES_MIN} to {KEY_BYTES_MAX} visible characters; a shorter one could be guessed")]
    Key,
    #[error("the system has no random numbers")]
    Random,
}

impl NewApiKey {
    /// Creates a random key.
    pub fn generate(name: &str, tier: Option<&str>) -> Result<NewApiKey, NewApiKeyError> {
        let mut random = [0; KEY_RANDOM_BYTES];
        aws_lc_rs::default_provider().secure_random.fill(&mut random).map_err(|_| NewApiKeyError::Random)?;
        NewApiKey::of(format!("{KEY_PREFIX}{}", URL_SAFE_NO_PAD.encode(random)), name, tier)
    }

    /// Hashes a key that exists already. Its randomness cannot be checked, its length is.
    pub fn of(key: String, name: &str, tier: Option<&str>) -> Result<NewApiKey, NewApiKeyError> {
        if !is_name(name) {
            return Err(NewApiKeyError::Name);
        }
        if tier.is_some_and(|tier| !is_name(tier) || tier.contains('@')) {
            return Err(NewApiKeyError::Tier);
        }
        if !(KEY_BYTES_MIN..=KEY_BYTES_MAX).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(NewApiKeyError::Key);
        }
        let hash: String = Sha256::digest(&key).iter().map(|byte| format!("{byte:02x}")).collect();
        let tier = tier.map(|tier| format!(":{tier}")).unwrap_or_default();
        Ok(NewApiKey { line: format!("{name}:{HASH_NAME}:{hash}{tier}"), key })
    }
}

fn is_name(text: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'@');
    (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_plain)
}

fn parse_hash(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut hash = [0; 32];
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(hash)
}

fn keyed(key: &[u8; 32], hash: &[u8; 32]) -> u128 {
    let keyed = blake3::keyed_hash(key, hash);
    u128::from_le_bytes(keyed.as_bytes()[..16].try_into().expect("a hash has 32 bytes"))
}

/// From 128 bits of system randomness, the seed of the standard library's hash tables.
fn random_key() -> [u8; 32] {
    let state = RandomState::new();
    let words: Vec<u8> = (0..4u64).flat_map(|word| state.hash_one(word).to_le_bytes()).collect();
    blake3::derive_key("tidegate identify 1: lookup of API keys", &words)
}

/// Credentials after the scheme `Bearer`.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    fn line(name: &str) -> String {
        NewApiKey::generate(name, None).expect("a key").line
    }

    #[test]
    fn generated_keys_are_found_by_their_line_alone() {
        let (ann, bob) = (NewApiKey::generate("ann", None), NewApiKey::generate("bob", Some("gold")));
        let (ann, bob) = (ann.expect("a key"), bob.expect("a key"));
        assert!(ann.key.starts_with("tgk_") && ann.key.len() == 47 && ann.key != bob.key);
        let text = format!("# keys\n\n{}\n  {}  \n", ann.line, bob.line);
        assert!(!text.contains(&ann.key));
        let keys = ApiKeys::parse(&text).expect("a usable file");
        let find = |key: &str| keys.find(&fields(&[("X-API-Key", key)]), "x-api-key");
        let found = find(&bob.key).expect("bob's key");
        assert_eq!((keys.name(found), keys.class(found), keys.len()), ("bob", Some("gold"), 2));
        assert_eq!(keys.class(find(&ann.key).expect("ann's key")), None);
        for (key, want) in [
            (&*ann.line, AuthResult::Unknown),
            (&ann.key[..46], AuthResult::Unknown),
            (&ann.key.to_ascii_uppercase(), AuthResult::Unknown),
            (&ann.key[..21], AuthResult::Malformed),
            (&"x".repeat(257), AuthResult::Malformed),
            (&format!("{} ", &ann.key[..40].replace('_', " ")), AuthResult::Malformed),
            ("", AuthResult::Missing),
        ] {
            assert_eq!(find(key), Err(want), "{key}");
        }
        let two = fields(&[("x-api-key", &ann.key), ("X-Api-Key", &ann.key)]);
        assert_eq!(keys.find(&two, "x-api-key"), Err(AuthResult::Multiple));
        assert_eq!(keys.find(&fields(&[]), "x-api-key"), Err(AuthResult::Missing));
        let authorization = |value: &str| keys.find(&fields(&[("authorization", value)]), "authorization");
        assert_eq!(authorization(&format!("bearer  {}", bob.key)), Ok(found));
        assert_eq!(authorization(&bob.key), Err(AuthResult::Missing), "without the scheme");
        assert!(!format!("{keys:?}").contains(&bob.line[11..40]), "no hash is shown");
    }

    #[test]
    fn unusable_files_are_refused_with_the_line() {
        let (ann, bob) = (line("ann"), line("bob"));
        let hash = "0".repeat(64);
        for (text, want) in [
            ("ann".to_owned(), ApiKeyFileError::Line(1)),
            (format!("{ann}\nbob:md5:{hash}"), ApiKeyFileError::Line(2)),
            (format!("bob:sha256:{hash}:"), ApiKeyFileError::Line(1)),
            (format!("bob:sha256:{hash}:a:b"), ApiKeyFileError::Line(1)),
            (format!("# x\nb b:sha256:{hash}"), ApiKeyFileError::Name(2)),
            (format!(":sha256:{hash}"), ApiKeyFileError::Name(1)),
            (format!("{}:sha256:{hash}", "n".repeat(65)), ApiKeyFileError::Name(1)),
            (format!("bob:sha256:{}", &hash[1..]), ApiKeyFileError::Hash(1)),
            (format!("bob:sha256:{}+", &hash[1..]), ApiKeyFileError::Hash(1)),
            (format!("bob:sha256:{}", "é".repeat(32)), ApiKeyFileError::Hash(1)),
            (format!("{ann}\n{bob}\n{}", ann.replace(&ann[11..], &bob[11..])), {
                ApiKeyFileError::Duplicate { line: 3, first: 1, what: "the name" }
            }),
            (
                format!("{ann}\n{}", ann.replace("ann", "eve")),
                ApiKeyFileError::Duplicate { line: 2, first: 1, what: "the key" },
            ),
        ] {
            assert_eq!(ApiKeys::parse(&text).expect_err("unusable"), want, "{text}");
        }
        assert_eq!(ApiKeys::parse("").expect("no keys").len(), 0);
    }

    #[test]
    fn short_keys_and_names_with_separators_are_refused_at_creation() {
        let key = |length: usize| "k".repeat(length);
        assert!(matches!(NewApiKey::of(key(21), "a", None), Err(NewApiKeyError::Key)));
        assert!(matches!(NewApiKey::of(key(257), "a", None), Err(NewApiKeyError::Key)));
        assert!(matches!(NewApiKey::of(key(30) + " ", "a", None), Err(NewApiKeyError::Key)));
        assert!(matches!(NewApiKey::generate("a:b", None), Err(NewApiKeyError::Name)));
        assert!(matches!(NewApiKey::generate("a", Some("x:y")), Err(NewApiKeyError::Tier)));
        let known = NewApiKey::of(key(22), "ann", Some("gold")).expect("a line").line;
        // `printf kkkkkkkkkkkkkkkkkkkkkk | sha256sum`
        let hash: String = Sha256::digest(key(22)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(known, format!("ann:sha256:{hash}:gold"));
    }
}
