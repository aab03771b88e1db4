//! An issuer of tokens: a key made here and now, what is published of it, and tokens signed with it.
#![allow(dead_code, unreachable_pub, reason = "scenario tests and unit tests compile this, each for itself")]

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::jwk::Jwk;
use jsonwebtoken::{Algorithm, AlgorithmFamily, EncodingKey, Header};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, RsaKeySize};
use serde_json::{Value, json};

/// Bytes of PKCS #8 before the PKCS #1 key of 2048 bits in it.
const PKCS8_HEAD: usize = 26;
/// What stands before a seed of Ed25519 in PKCS #8 (RFC 8410 section 7).
const ED_HEAD: &[u8] = b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";

pub struct Issuer {
    key: EncodingKey,
    pub header: Header,
    /// What it publishes; a secret publishes itself.
    pub jwk: Value,
}

impl Issuer {
    /// With a new key for `algorithm`; tokens name it where `id` is not empty.
    pub fn new(algorithm: Algorithm, id: &str) -> Self {
        let made = |algorithm| KeyPair::generate_for(algorithm).expect("a key").serialize_der();
        let key = match algorithm.family() {
            AlgorithmFamily::Hmac => {
                let random: [u64; 8] = std::array::from_fn(|_| rand());
                EncodingKey::from_secret(&random.map(u64::to_le_bytes).concat())
            }
            AlgorithmFamily::Rsa => {
                let key = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048).expect("a key");
                EncodingKey::from_rsa_der(&key.serialize_der()[PKCS8_HEAD..])
            }
            AlgorithmFamily::Ec if algorithm == Algorithm::ES384 => {
                EncodingKey::from_ec_der(&made(&PKCS_ECDSA_P384_SHA384))
            }
            AlgorithmFamily::Ec => EncodingKey::from_ec_der(&made(&PKCS_ECDSA_P256_SHA256)),
            AlgorithmFamily::Ed => {
                // The first version of PKCS #8 has the seed and nothing after it.
                let key = made(&PKCS_ED25519);
                EncodingKey::from_ed_der(&[ED_HEAD, &key[ED_HEAD.len()..ED_HEAD.len() + 32]].concat())
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

    /// A token with these claims, for an hour unless they say otherwise.
    pub fn token(&self, claims: Value) -> String {
        self.token_with(&self.header, claims)
    }

    /// Likewise, under a header of the test's own.
    pub fn token_with(&self, header: &Header, mut claims: Value) -> String {
        if claims.get("exp").is_none() {
            claims["exp"] = json!(now() + 3_600);
        }
        jsonwebtoken::encode(header, &claims, &self.key).expect("claims to sign")
    }
}

/// A JWK set with the keys of these issuers.
pub fn set(issuers: &[&Issuer]) -> String {
    json!({ "keys": issuers.iter().map(|issuer| &issuer.jwk).collect::<Vec<_>>() }).to_string()
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later").as_secs()
}

fn rand() -> u64 {
    use std::hash::BuildHasher as _;
    std::hash::RandomState::new().hash_one(0)
}
