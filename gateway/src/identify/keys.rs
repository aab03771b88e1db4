//! The keys that tokens are verified with: a set of JSON Web Keys (RFC 7517), made ready when the configuration is read.
//!
//! Refuses a set that mixes secrets with public keys, keys too weak for their algorithm, and a set without any key for the
//! pinned algorithms. Invariant: a key serves only algorithms of its own type and curve, so that a public key is never
//! taken for a secret, and no algorithm is ever chosen by a token.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, AlgorithmFamily, DecodingKey};
use serde::Deserialize;

/// Sets of issuers have two to ten; more is a mistake.
const KEYS_MAX: usize = 64;

/// Keys that are tried for a token that names none: each costs a signature. Who rotates keys has two or three at a time.
const TRIED_MAX: usize = 4;

/// Bits of an RSA modulus that the verifying library takes (RFC 7518 section 3.3 asks for 2048 at least).
const RSA_BITS: std::ops::RangeInclusive<usize> = 2_048..=8_192;

/// Why a set of keys is refused.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("it is no JWK set: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has {0} keys, more than {KEYS_MAX}")]
    TooMany(usize),
    #[error("{key} is a secret (`oct`), and the algorithms are for public keys")]
    Secret { key: String },
    #[error("{key} is a public key, and the algorithms are for secrets (`oct`)")]
    Public { key: String },
    #[error("{key} is not a key: {why}")]
    Malformed { key: String, why: &'static str },
    #[error("{key} is too weak or too large: {bits} bits, and {needed} are needed")]
    Strength { key: String, bits: usize, needed: String },
    #[error("no key in it is for the algorithms that are allowed")]
    Nothing,
}

/// The keys of one issuer, for pinned algorithms.
#[derive(Clone)]
pub struct Keys {
    keys: Vec<Key>,
    algorithms: Vec<Algorithm>,
    has_private: bool,
    /// Of the text they were read from.
    digest: blake3::Hash,
}

#[derive(Clone)]
struct Key {
    id: Option<String>,
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

#[derive(Deserialize)]
struct Set {
    keys: Vec<serde_json::Value>,
}

impl Keys {
    /// Reads a JWK set for `algorithms`, which are all for secrets or all for public keys. Keys for other uses, of other types
    /// or for other algorithms are left out, as RFC 7517 section 5 asks.
    pub fn read(text: &str, algorithms: &[Algorithm]) -> Result<Keys, KeysError> {
        let set: Set = serde_json::from_str(text)?;
        if set.keys.len() > KEYS_MAX {
            return Err(KeysError::TooMany(set.keys.len()));
        }
        let is_for_secrets = algorithms.iter().any(|algorithm| algorithm.family() == AlgorithmFamily::Hmac);
        let mut read = Keys {
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
            let Ok(jwk) = serde_json::from_value::<Jwk>(value) else { continue };
            let key =
                jwk.common.key_id.as_ref().map_or_else(|| format!("key {}", index + 1), |id| format!("key `{id}`"));
            match (is_secret, is_for_secrets) {
                (true, false) => return Err(KeysError::Secret { key }),
                (false, true) => return Err(KeysError::Public { key }),
                _ => {}
            }
            read.has_private |= is_private;
            read.add(&jwk, key)?;
        }
        if read.keys.is_empty() { Err(KeysError::Nothing) } else { Ok(read) }
    }

    fn add(&mut self, jwk: &Jwk, name: String) -> Result<(), KeysError> {
        let common = &jwk.common;
        let is_for_other_use = common.public_key_use.as_ref().is_some_and(|it| *it != PublicKeyUse::Signature)
            || common.key_operations.as_ref().is_some_and(|it| !it.contains(&KeyOperations::Verify));
        let serves = |algorithm: &&Algorithm| {
            is_for(jwk, **algorithm) && common.key_algorithm.is_none_or(|named| named == (**algorithm).into())
        };
        let algorithms: Vec<Algorithm> = self.algorithms.iter().filter(serves).copied().collect();
        if is_for_other_use || algorithms.is_empty() {
            return Ok(());
        }
        check(jwk, &algorithms, &name)?;
        let malformed = |_| KeysError::Malformed { key: name, why: "its members are not base64url" };
        let decoding = DecodingKey::from_jwk(jwk).map_err(malformed)?;
        self.keys.push(Key { id: common.key_id.clone(), algorithms, decoding });
        Ok(())
    }

    /// The algorithms that a token may be signed with.
    pub fn algorithms(&self) -> &[Algorithm] {
        &self.algorithms
    }

    /// Whether some key has its private part, which nobody who verifies should hold.
    pub fn has_private(&self) -> bool {
        self.has_private
    }

    /// The keys that a token with this header may be signed with: those it names, else those of its algorithm.
    pub(super) fn candidates(&self, algorithm: Algorithm, id: Option<&str>) -> impl Iterator<Item = &DecodingKey> {
        let is_meant =
            move |key: &&Key| key.algorithms.contains(&algorithm) && id.is_none_or(|id| key.id.as_deref() == Some(id));
        self.keys.iter().filter(is_meant).take(TRIED_MAX).map(|key| &key.decoding)
    }
}

/// Whether type and curve of a key are those of the algorithm (RFC 7518 section 3.1, RFC 8037 section 3.1).
fn is_for(jwk: &Jwk, algorithm: Algorithm) -> bool {
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

/// Refuses a key that the verifying library would take and then never find a signature of, and a secret that can be guessed.
fn check(jwk: &Jwk, algorithms: &[Algorithm], name: &str) -> Result<(), KeysError> {
    let malformed = |why| KeysError::Malformed { key: name.to_owned(), why };
    let bytes = |member: &str| URL_SAFE_NO_PAD.decode(member).map_err(|_| malformed("its members are not base64url"));
    let strength = |bits, needed| Err(KeysError::Strength { key: name.to_owned(), bits, needed });
    let point = |members: &[&String], length: usize| {
        let is_right = |member: &&String| Ok(bytes(member)?.len() == length);
        let are_right: Result<Vec<bool>, KeysError> = members.iter().map(is_right).collect();
        if are_right?.contains(&false) { Err(malformed("its point is not one of the curve")) } else { Ok(()) }
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
            // As long as the hash, at least (RFC 7518 section 3.2).
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

/// The same text for the same algorithms.
impl PartialEq for Keys {
    fn eq(&self, other: &Keys) -> bool {
        (self.digest, &self.algorithms) == (other.digest, &other.algorithms)
    }
}

/// Some of them may be secrets.
impl fmt::Debug for Keys {
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

    fn read(keys: &[Value], algorithms: &[Algorithm]) -> Result<Keys, String> {
        Keys::read(&json!({ "keys": keys }).to_string(), algorithms).map_err(|error| error.to_string())
    }

    #[test]
    fn sets_that_cannot_be_what_was_meant_are_refused() {
        let (ec, secret) = (Issuer::new(ES256, "pub").jwk, Issuer::new(HS256, "sec").jwk);
        for (keys, algorithms, want) in [
            (
                vec![ec.clone(), secret.clone()],
                ES256,
                "key `sec` is a secret (`oct`), and the algorithms are for public keys",
            ),
            (
                vec![secret.clone(), ec.clone()],
                HS256,
                "key `pub` is a public key, and the algorithms are for secrets (`oct`)",
            ),
            (vec![], ES256, "no key in it is for the algorithms that are allowed"),
            (vec![ec.clone()], RS256, "no key in it is for the algorithms that are allowed"),
            (vec![ec.clone()], ES384, "no key in it is for the algorithms that are allowed"),
            (vec![ec.clone(); 65], ES256, "it has 65 keys, more than 64"),
            (
                vec![json!({ "kty": "oct", "k": "c2hvcnQ" })],
                HS512,
                "key 1 is too weak or too large: 40 bits, and 512 or more are needed",
            ),
            (
                vec![json!({ "kty": "RSA", "kid": "r", "n": URL_SAFE_NO_PAD.encode([0x7f; 128]), "e": "AQAB" })],
                RS256,
                "key `r` is too weak or too large: 1023 bits, and 2048 to 8192 are needed",
            ),
            (
                vec![json!({ "kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA" })],
                ES256,
                "key 1 is not a key: its point is not one of the curve",
            ),
            (
                vec![json!({ "kty": "OKP", "crv": "Ed25519", "x": "%" })],
                EdDSA,
                "key 1 is not a key: its members are not base64url",
            ),
        ] {
            assert_eq!(read(&keys, &[algorithms]).expect_err(want), want);
        }
        for text in ["", "[]", "{}", "{\"keys\": 1}", "-----BEGIN PUBLIC KEY-----"] {
            assert!(matches!(Keys::read(text, &[ES256]), Err(KeysError::Json(_))), "{text}");
        }
    }

    #[test]
    fn keys_for_anything_else_are_left_out() {
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
        let keys = read(&all, &[ES256, PS256]).expect("two of them are for this");
        assert_eq!((keys.candidates(ES256, Some("a")).count(), keys.candidates(PS256, None).count()), (2, 0));
        assert!(!keys.has_private() && read(&[with("d", json!("AAAA"))], &[ES256]).expect("usable").has_private());
    }

    #[test]
    fn no_secret_is_shown() {
        let secret = Issuer::new(HS256, "s").jwk;
        let shown = format!("{:?}", read(std::slice::from_ref(&secret), &[HS256]).expect("usable"));
        assert!(shown.contains("HS256") && !shown.contains(secret["k"].as_str().expect("a secret")), "{shown}");
    }
}
