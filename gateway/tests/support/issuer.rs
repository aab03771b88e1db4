//! A token issuer for tests: a generated key, its public JWK, and tokens signed with it.
#![allow(dead_code, unreachable_pub, reason = "scenario tests and unit tests compile this module separately")]

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, AlgorithmFamily, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};

/// Length of the PKCS #8 prefix before a 2048-bit PKCS #1 key.
const PKCS8_PREFIX_BYTES: usize = 26;
/// PKCS #8 prefix of an Ed25519 seed (RFC 8410 section 7).
const ED25519_PREFIX: &[u8] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

pub struct Issuer {
    key: EncodingKey,
    pub header: Header,
    /// The published key; for HMAC algorithms, the secret itself.
    pub jwk: Value,
}

impl Issuer {
    /// Generates a key for `algorithm`. Tokens carry the key id `id` unless it is empty.
    pub fn new(algorithm: Algorithm, id: &str) -> Self {
        let generate = |algorithm| KeyPair::generate_for(algorithm).expect("a key").serialize_der();
        let key = match algorithm.family() {
            AlgorithmFamily::Hmac => {
                let random: [u64; 8] = std::array::from_fn(|_| rand());
                EncodingKey::from_secret(&random.map(u64::to_le_bytes).concat())
            }
            AlgorithmFamily::Rsa => {
                let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).expect("a key");
                EncodingKey::from_rsa_der(&key.serialize_der()[PKCS8_PREFIX_BYTES..])
            }
            AlgorithmFamily::Ec if algorithm == Algorithm::ES384 => {
                EncodingKey::from_ec_der(&generate(&PKCS_ECDSA_P384_SHA384))
            }
            AlgorithmFamily::Ec => EncodingKey::from_ec_der(&generate(&PKCS_ECDSA_P256_SHA256)),
            AlgorithmFamily::Ed => {
                // PKCS #8 version 1 ends after the seed; version 2 appends the public key.
                let key = generate(&PKCS_ED25519);
                EncodingKey::from_ed_der(
                    &[ED25519_PREFIX, &key[ED25519_PREFIX.len()..ED25519_PREFIX.len() + 32]].concat(),
                )
            }
        };
        Issuer::with_key(algorithm, id, key)
    }

    pub fn with_key(algorithm: Algorithm, id: &str, key: EncodingKey) -> Self {
        let mut jwk = Jwk::from_encoding_key(&key, algorithm).expect("a key for this algorithm");
        let mut header = Header::new(algorithm);
        if !id.is_empty() {
            (jwk.common.key_id, header.kid) = (Some(id.to_owned()), Some(id.to_owned()));
        }
        Issuer { key, header, jwk: json!(jwk) }
    }

    /// Signs a token with these claims. It is valid for one hour unless the claims set `exp`.
    pub fn token(&self, claims: Value) -> String {
        self.token_with(&self.header, claims)
    }

    /// Signs a token with a given header.
    pub fn token_with(&self, header: &Header, mut claims: Value) -> String {
        if claims.get("exp").is_none() {
            claims["exp"] = json!(now() + 3_600);
        }
        jsonwebtoken::encode(header, &claims, &self.key).expect("claims to sign")
    }
}

/// JWK set with the keys of these issuers.
pub fn set(issuers: &[&Issuer]) -> String {
    json!({ "keys": issuers.iter().map(|issuer| &issuer.jwk).collect::<Vec<_>>() }).to_string()
}

/// Current Unix time in seconds.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a time after the epoch").as_secs()
}

fn rand() -> u64 {
    use std::hash::BuildHasher as _;
    std::hash::RandomState::new().hash_one(0)
}
