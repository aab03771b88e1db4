//! The keys for token verification: a JSON Web Key set (RFC 7517), parsed when the configuration is
//! read or the set was fetched.
//!
//! Rejects a set that mixes secrets with public keys, keys that are too weak for their algorithm,
//! and a set without a key for the pinned algorithms. Invariant: a key serves only algorithms of
//! its own type and curve. A public key is therefore never used as a secret, and a token never
//! chooses the algorithm.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use serde::Deserialize;

/// Sets of issuers have two to ten keys; more is a mistake.
const JWKS_KEYS_MAX: usize = 64;

/// Keys that are tried for a token without a key id. Each try costs a signature verification; key
/// rotation keeps two or three keys at a time.
const CANDIDATES_MAX: usize = 4;

/// RSA modulus sizes in bits that the verification library accepts (RFC 7518 section 3.3 requires
/// at least 2048).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=8_192;

/// Reason for rejecting a key set.
#[derive(Debug, thiserror::Error)]
pub enum JwkSetError {
    #[error("not a JWK set: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the set has {0} keys, more than {JWKS_KEYS_MAX}")]
    TooMany(usize),
    #[error("{key} is a secret (`oct`), but the algorithms are for public keys")]
    Secret { key: String },
    #[error("{key} is a public key, but the algorithms are for secrets (`oct`)")]
    Public { key: String },
    #[error("{key} is malformed: {reason}")]
    Malformed { key: String, reason: &'static str },
    #[error("{key} has an unsupported size: {bits} bits, {needed} are required")]
    Strength { key: String, bits: usize, needed: String },
    #[error("the set has no key for the allowed algorithms")]
    NoUsableKey,
}

/// The keys of one issuer for the pinned algorithms.
#[derive(Clone)]
pub struct JwkSet {
    keys: Vec<VerificationKey>,
    algorithms: Vec<Algorithm>,
    has_private: bool,
    /// Digest of the source text.
    digest: blake3::Hash,
}

/// One key of a set: its key id, the pinned algorithms of its type, and the key in the form of the
/// verification library.
#[derive(Clone)]
pub(super) struct VerificationKey {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    pub(super) decoding: DecodingKey,
    pub(super) fingerprint: KeyFingerprint,
}

/// Digest of all members of a key, its id included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KeyFingerprint(u128);

impl KeyFingerprint {
    /// Members of an object are in the order of their names.
    fn of(key: &serde_json::Value) -> Self {
        KeyFingerprint(first_half(&blake3::hash(key.to_string().as_bytes())))
    }
}

fn first_half(hash: &blake3::Hash) -> u128 {
    u128::from_le_bytes(hash.as_bytes()[..16].try_into().expect("a hash has 32 bytes"))
}

/// JSON form of a key set (RFC 7517 section 5), whose keys are left unparsed so that unsupported
/// ones can be ignored.
#[derive(Deserialize)]
struct RawJwkSet {
    keys: Vec<serde_json::Value>,
}

impl JwkSet {
    /// Parses a JWK set for `algorithms`, which are all for secrets or all for public keys. Ignores
    /// keys for other uses, of other types or for other algorithms, as RFC 7517 section 5 requires.
    pub fn parse(text: &str, algorithms: &[Algorithm]) -> Result<JwkSet, JwkSetError> {
        let set: RawJwkSet = serde_json::from_str(text)?;
        if set.keys.len() > JWKS_KEYS_MAX {
            return Err(JwkSetError::TooMany(set.keys.len()));
        }
        let is_for_secrets = algorithms.iter().any(|algorithm| algorithm.family() == AlgorithmFamily::Hmac);
        let mut jwk_set = JwkSet {
            keys: Vec::new(),
            algorithms: algorithms.to_vec(),
            has_private: false,
            digest: blake3::hash(text.as_bytes()),
        };
        for (index, value) in set.keys.into_iter().enumerate() {
            let is_secret = match value.get("kty").and_then(serde_json::Value::as_str) {
                Some("oct") => true,
                Some("RSA" | "EC" | "OKP") => false,
                _ => continue,
            };
            let is_private = !is_secret && value.get("d").is_some();
            let fingerprint = KeyFingerprint::of(&value);
            let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { continue };
            let key =
                jwk.common.key_id.as_ref().map_or_else(|| format!("key {}", index + 1), |id| format!("key `{id}`"));
            match (is_secret, is_for_secrets) {
                (true, false) => return Err(JwkSetError::Secret { key }),
                (false, true) => return Err(JwkSetError::Public { key }),
                _ => {}
            }
            jwk_set.has_private |= is_private;
            jwk_set.add(&jwk, key, fingerprint)?;
        }
        if jwk_set.keys.is_empty() { Err(JwkSetError::NoUsableKey) } else { Ok(jwk_set) }
    }

    fn add(&mut self, jwk: &Jwk, name: String, fingerprint: KeyFingerprint) -> Result<(), JwkSetError> {
        let common = &jwk.common;
        let is_for_other_use = common.public_key_use.as_ref().is_some_and(|it| *it != PublicKeyUse::Signature)
            || common.key_operations.as_ref().is_some_and(|it| !it.contains(&KeyOperations::Verify));
        let serves = |algorithm: &&Algorithm| {
            is_compatible(jwk, **algorithm) && common.key_algorithm.is_none_or(|named| named == (**algorithm).into())
        };
        let algorithms: Vec<Algorithm> = self.algorithms.iter().filter(serves).copied().collect();
        if is_for_other_use || algorithms.is_empty() {
            return Ok(());
        }
        check_strength(jwk, &algorithms, &name)?;
        let malformed = |_| JwkSetError::Malformed { key: name, reason: "its members are not base64url" };
        let decoding = DecodingKey::from_jwk(jwk).map_err(malformed)?;
        self.keys.push(VerificationKey { id: common.key_id.clone(), algorithms, decoding, fingerprint });
        Ok(())
    }

    /// The algorithms that a token may be signed with.
    pub(crate) fn algorithms(&self) -> &[Algorithm] {
        &self.algorithms
    }

    /// Whether a key contains its private part, which a verifier should not hold.
    pub(crate) fn has_private(&self) -> bool {
        self.has_private
    }

    /// The keys to verify a token with: those with the key id of its header or, without one, those
    /// for its algorithm.
    pub(super) fn candidates(&self, algorithm: Algorithm, id: Option<&str>) -> impl Iterator<Item = &VerificationKey> {
        let matches = move |key: &&VerificationKey| {
            key.algorithms.contains(&algorithm) && id.is_none_or(|id| key.id.as_deref() == Some(id))
        };
        self.keys.iter().filter(matches).take(CANDIDATES_MAX)
    }

    /// Whether the set has exactly this key.
    pub(super) fn contains(&self, fingerprint: KeyFingerprint) -> bool {
        self.keys.iter().any(|key| key.fingerprint == fingerprint)
    }

    /// Digest of the whole set.
    pub(super) fn digest(&self) -> u128 {
        first_half(&self.digest)
    }

    /// The number of usable keys.
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}

/// Whether a key has the type and curve of the algorithm (RFC 7518 section 3.1, RFC 8037 section
/// 3.1).
fn is_compatible(jwk: &Jwk, algorithm: Algorithm) -> bool {
    match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => algorithm.family() == AlgorithmFamily::Rsa,
        AlgorithmParameters::OctetKey(_) => algorithm.family() == AlgorithmFamily::Hmac,
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => algorithm == Algorithm::ES256,
            EllipticCurve::P384 => algorithm == Algorithm::ES384,
            _ => false,
        },
        AlgorithmParameters::OctetKeyPair(key) => key.curve == EllipticCurve::Ed25519 && algorithm == Algorithm::EdDSA,
        _ => false,
    }
}

/// Rejects keys that the verification library would accept but can verify no signature with, and
/// secrets short enough to guess.
fn check_strength(jwk: &Jwk, algorithms: &[Algorithm], name: &str) -> Result<(), JwkSetError> {
    let malformed = |reason| JwkSetError::Malformed { key: name.to_owned(), reason };
    let bytes = |member: &str| URL_SAFE_NO_PAD.decode(member).map_err(|_| malformed("its members are not base64url"));
    let strength = |bits, needed| Err(JwkSetError::Strength { key: name.to_owned(), bits, needed });
    let point = |members: &[&String], length: usize| {
        let is_right = |member: &&String| Ok(bytes(member)?.len() == length);
        let are_right: Result<Vec<bool>, JwkSetError> = members.iter().map(is_right).collect();
        if are_right?.contains(&false) {
            Err(malformed("its point has the wrong length for the curve"))
        } else {
            Ok(())
        }
    };
    match &jwk.algorithm {
        AlgorithmParameters::RSA(key) => {
            let modulus = bytes(&key.n)?;
            let bits = modulus.len() * 8 - modulus.first().map_or(0, |first| first.leading_zeros() as usize);
            let needed = || format!("{} to {}", RSA_BITS.start(), RSA_BITS.end());
            if RSA_BITS.contains(&bits) { Ok(()) } else { strength(bits, needed()) }
        }
        AlgorithmParameters::EllipticCurve(key) => {
            point(&[&key.x, &key.y], if key.curve == EllipticCurve::P256 { 32 } else { 48 })
        }
        AlgorithmParameters::OctetKeyPair(key) => point(&[&key.x], 32),
        AlgorithmParameters::OctetKey(key) => {
            // At least as long as the hash (RFC 7518 section 3.2).
            let needed = algorithms.iter().map(|algorithm| hash_bits(*algorithm)).max().unwrap_or_default();
            let bits = bytes(&key.value)?.len() * 8;
            if bits < needed { strength(bits, format!("{needed} or more")) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

fn hash_bits(algorithm: Algorithm) -> usize {
    match algorithm {
        Algorithm::HS512 => 512,
        Algorithm::HS384 => 384,
        _ => 256,
    }
}

/// Compares source text and algorithms.
impl PartialEq for JwkSet {
    fn eq(&self, other: &JwkSet) -> bool {
        (self.digest, &self.algorithms) == (other.digest, &other.algorithms)
    }
}

/// Omits the keys, which may be secrets.
impl fmt::Debug for JwkSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.keys.iter().map(|key| (&key.id, &key.algorithms))).finish()
    }
}

#[cfg(test)]
mod tests {
    use Algorithm::{ES256, ES384, EdDSA, HS256, HS512, PS256, RS256};
    use serde_json::{Value, json};

    use super::super::issuer::Issuer;
    use super::*;

    fn read(keys: &[Value], algorithms: &[Algorithm]) -> Result<JwkSet, String> {
        JwkSet::parse(&json!({ "keys": keys }).to_string(), algorithms).map_err(|error| error.to_string())
    }

    #[test]
    fn invalid_key_sets_are_rejected() {
        let (ec, secret) = (Issuer::new(ES256, "pub").jwk, Issuer::new(HS256, "sec").jwk);
        for (keys, algorithms, want) in [
            (
                vec![ec.clone(), secret.clone()],
                ES256,
                "key `sec` is a secret (`oct`), but the algorithms are for public keys",
            ),
            (
                vec![secret.clone(), ec.clone()],
                HS256,
                "key `pub` is a public key, but the algorithms are for secrets (`oct`)",
            ),
            (vec![], ES256, "the set has no key for the allowed algorithms"),
            (vec![ec.clone()], RS256, "the set has no key for the allowed algorithms"),
            (vec![ec.clone()], ES384, "the set has no key for the allowed algorithms"),
            (vec![ec.clone(); 65], ES256, "the set has 65 keys, more than 64"),
            (
                vec![json!({ "kty": "oct", "k": "c2hvcnQ" })],
                HS512,
                "key 1 has an unsupported size: 40 bits, 512 or more are required",
            ),
            (
                vec![json!({ "kty": "RSA", "kid": "r", "n": URL_SAFE_NO_PAD.encode([0x7f; 128]), "e": "AQAB" })],
                RS256,
                "key `r` has an unsupported size: 1023 bits, 2048 to 8192 are required",
            ),
            (
                vec![json!({ "kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA" })],
                ES256,
                "key 1 is malformed: its point has the wrong length for the curve",
            ),
            (
                vec![json!({ "kty": "OKP", "crv": "Ed25519", "x": "%" })],
                EdDSA,
                "key 1 is malformed: its members are not base64url",
            ),
        ] {
            assert_eq!(read(&keys, &[algorithms]).expect_err(want), want);
        }
        for text in ["", "[]", "{}", "{\"keys\": 1}", "-----BEGIN PUBLIC KEY-----"] {
            assert!(matches!(JwkSet::parse(text, &[ES256]), Err(JwkSetError::Json(_))), "{text}");
        }
    }

    #[test]
    fn keys_for_other_purposes_are_ignored() {
        let ec = Issuer::new(ES256, "a").jwk;
        let with = |member: &str, value: Value| {
            let mut key = ec.clone();
            key[member] = value;
            key
        };
        let others = [
            with("use", json!("enc")),
            with("key_ops", json!(["sign"])),
            with("alg", json!("ECDH-ES")),
            with("crv", json!("secp256k1")),
            with("kty", json!("AKP")),
            json!({ "kid": "nothing" }),
            json!(7),
        ];
        assert!(read(&others, &[ES256]).is_err());
        let all = [&others[..], &[with("use", json!("sig")), with("key_ops", json!(["verify"]))]].concat();
        let keys = read(&all, &[ES256, PS256]).expect("two usable keys");
        assert_eq!((keys.candidates(ES256, Some("a")).count(), keys.candidates(PS256, None).count()), (2, 0));
        assert!(!keys.has_private() && read(&[with("d", json!("AAAA"))], &[ES256]).expect("usable").has_private());
    }

    #[test]
    fn debug_output_contains_no_secret() {
        let secret = Issuer::new(HS256, "s").jwk;
        let shown = format!("{:?}", read(std::slice::from_ref(&secret), &[HS256]).expect("usable"));
        assert!(shown.contains("HS256") && !shown.contains(secret["k"].as_str().expect("a secret")), "{shown}");
    }
}
