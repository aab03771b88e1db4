//! Verifies JSON Web Tokens (RFC 7519) and extracts the caller's identity from them.
//!
//! A token is accepted from any sender, because of its signature. The configuration pins the
//! algorithms. A rejected token is counted and otherwise treated as no token. Invariants: no claim
//! is read before a configured key has verified the token; no token is logged; the cache of results
//! is bounded, whatever clients send (`token_cache`).

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
pub use jsonwebtoken::Algorithm;
pub(crate) use jsonwebtoken::AlgorithmFamily;
use jsonwebtoken::{TokenData, Validation, errors::ErrorKind};
use limiter::{KeyHash, MonotonicClock, MonotonicTime};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::access::AccessDecision;
use super::cookie;
use super::jwk_set::{JwkSet, KeyFingerprint};
use super::key_set_fetch::KeySetUrl;
use super::remote_key_set::RemoteKeySet;
use super::token_cache::{CacheGeneration, ExhaustedBudget, VerificationBudget, VerifiedTokenCache};
use crate::http::fields::{Fields, KnownField as Field};
use crate::http::message::Request;
use crate::label;
use crate::metrics::{self, Counter, Counters};

/// Longest token that is verified: the usual limit of browsers and servers for one header line.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// Time for which a rejection is cached: less than the usual leeway, so that a token that arrived
/// early by the gateway's clock is accepted in time.
const REJECTION_TTL: Duration = Duration::from_secs(10);

/// Part of the request that carries the token.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TokenLocation {
    /// `Authorization: Bearer TOKEN` (RFC 6750 section 2.1).
    #[default]
    Bearer,
    /// A field with the token, with or without the prefix `Bearer `; the name is in lower case.
    Header(String),
    Cookie(String),
}

/// Configuration of token verification (`identity.user.jwt`).
#[derive(Clone, Debug, PartialEq)]
pub struct TokenConfig {
    pub keys: TokenKeys,
    pub location: TokenLocation,
    /// Required value of `iss`; `None`: any.
    pub issuer: Option<String>,
    /// `aud` must contain one of these values; if empty, `aud` is ignored.
    pub audience: Vec<String>,
    /// Tolerated difference between the clocks of issuer and gateway.
    pub leeway: Duration,
}

/// The keys that verify tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum TokenKeys {
    /// Of a file.
    Fixed(JwkSet),
    /// Published by the issuer.
    Remote(KeySetUrl),
}

impl TokenKeys {
    /// The algorithms that a token may be signed with.
    pub(crate) fn algorithms(&self) -> &[Algorithm] {
        match self {
            TokenKeys::Fixed(keys) => keys.algorithms(),
            TokenKeys::Remote(url) => &url.algorithms,
        }
    }
}

impl TokenConfig {
    /// 30 s: clocks synchronised by NTP differ by less than 1 s, and a larger value only extends
    /// expired tokens.
    pub const LEEWAY: Duration = Duration::from_secs(30);

    /// The field that carries the token, unless it is a cookie.
    pub(crate) fn field(&self) -> Option<&str> {
        match &self.location {
            TokenLocation::Bearer => Some(Field::Authorization.as_str()),
            TokenLocation::Header(name) => Some(name),
            TokenLocation::Cookie(_) => None,
        }
    }
}

label! {
    /// Result of the verification of a token.
    pub(crate) TokenOutcome, "result", {
        Valid = "valid",
        /// Valid, but without the claim that names the user.
        NoUser = "no_user",
        /// Not three base64url parts with JSON.
        Malformed = "malformed",
        /// More than one token; all are removed from the request.
        Multiple = "multiple",
        /// Longer than 8 KiB.
        Oversize = "oversize",
        /// The header has `crit`, an extension that must be understood (RFC 7515 section 4.1.11).
        UnsupportedCritical = "unsupported_crit",
        /// Not a pinned algorithm, `none` included.
        Algorithm = "algorithm",
        /// No configured key with its key id, or none for its algorithm.
        Key = "key",
        /// Not verified: the key set of the issuer has not been fetched yet, or has expired.
        KeysUnavailable = "keys_unavailable",
        Signature = "signature",
        /// No `exp`: the token would never expire.
        MissingExpiry = "missing_exp",
        Expired = "expired",
        /// Not valid yet (`nbf`).
        NotYetValid = "not_yet_valid",
        Issuer = "issuer",
        Audience = "audience",
        /// Not verified: its address exceeded the budget of invalid signatures.
        ClientThrottled = "client_throttled",
        /// Not verified: all addresses of this thread exceeded the budget of invalid signatures.
        VerificationThrottled = "verification_throttled",
    }
}

static OUTCOMES: LazyLock<Counters<TokenOutcome>> = LazyLock::new(Counters::default);
static SIGNATURES: LazyLock<Counter> = LazyLock::new(Counter::default);
static CLOCK: LazyLock<MonotonicClock> = LazyLock::new(MonotonicClock::start);

/// Registers the metrics of this module.
pub(super) fn expose() {
    metrics::expose_counters("tidegate_tokens", "Tokens of requests, by result of the verification.", &OUTCOMES);
    metrics::expose_counter_with("tidegate_token_signatures", "Signature verifications of tokens.", |emit| {
        emit(&[], SIGNATURES.get());
    });
}

/// The token cache of one thread: identities of accepted tokens, outcomes of rejected ones.
type ThreadTokenCache = VerifiedTokenCache<AcceptedToken, TokenOutcome>;

/// The identity of an accepted token, and the key that verified it.
struct AcceptedToken {
    identity: VerifiedIdentity,
    key: KeyFingerprint,
}

thread_local! {
    static TOKEN_CACHE: RefCell<Option<Box<ThreadTokenCache>>> = const { RefCell::new(None) };
}

/// Monotonic and wall-clock time of one verification: caching uses the first, `exp` and `nbf` the
/// second.
#[derive(Clone, Copy, Debug)]
struct VerificationTime {
    /// Seconds since the Unix epoch, the unit of the claims.
    unix_seconds: u64,
    monotonic: MonotonicTime,
}

impl VerificationTime {
    fn read() -> VerificationTime {
        // A clock before the epoch reads as 0, so that tokens with `nbf` are not yet valid.
        let unix_seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        VerificationTime { unix_seconds, monotonic: CLOCK.now() }
    }
}

/// A token as received, before its verification.
#[derive(Clone, Copy)]
struct PresentedToken<'a> {
    text: &'a [u8],
    /// Hash of the address to which an invalid signature is charged.
    address: KeyHash,
    now: VerificationTime,
}

/// Attributes of a verified token that requests need.
#[derive(Clone, Debug)]
pub(super) struct VerifiedIdentity {
    pub(super) user: Option<KeyHash>,
    /// The name of the user; `None` also where no route writes it into a field.
    pub(super) user_name: Option<Arc<str>>,
    /// Index into the configured user classes.
    pub(super) user_class: Option<usize>,
    /// Access of the user by the allow and deny lists.
    pub(super) access: AccessDecision,
    /// By index into [`super::IdentityConfig::claims`].
    pub(super) claims: Option<Arc<[Option<KeyHash>]>>,
}

/// All claims of a verified token as JSON, and its expiry.
pub(super) struct VerifiedClaims {
    claims: Map<String, Value>,
    /// Unix time in seconds at which the token expires, leeway included.
    expires_at: u64,
}

impl VerifiedClaims {
    /// A claim that is a non-empty string or a number, as text; `None` for any other.
    pub(super) fn text(&self, path: &str) -> Option<Cow<'_, str>> {
        text(find(&self.claims, path)?)
    }

    /// The texts of a claim that may also be an array of them.
    pub(super) fn texts(&self, path: &str) -> impl Iterator<Item = Cow<'_, str>> {
        let values = match find(&self.claims, path) {
            Some(Value::Array(values)) => values.as_slice(),
            Some(value) => std::slice::from_ref(value),
            None => &[],
        };
        values.iter().filter_map(text)
    }
}

/// The claim at `path`: the claim of that name or, with dots, a member of a claim that is an
/// object. The longest name wins at each level, because names of claims may contain dots.
fn find<'a>(claims: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    if let Some(value) = claims.get(path) {
        return Some(value);
    }
    path.rmatch_indices('.').find_map(|(dot, _)| {
        let Value::Object(members) = claims.get(&path[..dot])? else { return None };
        find(members, &path[dot + 1..])
    })
}

fn text(value: &Value) -> Option<Cow<'_, str>> {
    match value {
        Value::String(text) if !text.is_empty() => Some(Cow::Borrowed(text)),
        Value::Number(number) => Some(Cow::Owned(number.to_string())),
        _ => None,
    }
}

/// Header of a token that is not yet verified.
#[derive(Deserialize)]
struct TokenHeader<'a> {
    #[serde(borrow)]
    alg: Cow<'a, str>,
    #[serde(borrow, default)]
    kid: Option<Cow<'a, str>>,
    #[serde(default, deserialize_with = "is_present")]
    crit: bool,
}

fn is_present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// Verifies tokens according to the configuration.
pub(super) struct TokenVerifier {
    config: TokenConfig,
    /// One per pinned algorithm, which accepts that algorithm only.
    validations: Vec<Validation>,
    keys: ActiveKeys,
    /// Digest of the rules, so that no thread reuses results of other rules.
    rules: u128,
}

/// The keys in use.
enum ActiveKeys {
    Fixed(JwkSet),
    Remote(Arc<RemoteKeySet>),
}

impl TokenVerifier {
    /// `extraction` stands for what is read from the claims of a token: results are reused by
    /// another verifier with the same rules and the same text. Takes a fetched key set over from
    /// `old`.
    pub(super) fn new(config: TokenConfig, extraction: &str, old: Option<&TokenVerifier>) -> Self {
        let validation = |algorithm: &Algorithm| {
            let mut validation = Validation::new(*algorithm);
            // `check_validity_period` checks the times, with the same clock for new and for cached
            // tokens.
            (validation.validate_exp, validation.validate_nbf) = (false, false);
            validation.validate_aud = !config.audience.is_empty();
            if validation.validate_aud {
                validation.set_audience(&config.audience);
                validation.required_spec_claims.insert("aud".to_owned());
            }
            if let Some(issuer) = &config.issuer {
                validation.set_issuer(&[issuer]);
                validation.required_spec_claims.insert("iss".to_owned());
            }
            validation
        };
        let validations = config.keys.algorithms().iter().map(validation).collect();
        let algorithms = config.keys.algorithms();
        let rules =
            format!("{:?}", (algorithms, &config.issuer, &config.audience, config.leeway.as_secs(), extraction));
        let rules = blake3::derive_key("tidegate identify 1: rules of tokens", rules.as_bytes());
        let rules = u128::from_le_bytes(rules[..16].try_into().expect("a key has 32 bytes"));
        let keys = match &config.keys {
            TokenKeys::Fixed(keys) => ActiveKeys::Fixed(keys.clone()),
            TokenKeys::Remote(url) => {
                let kept = old.and_then(TokenVerifier::remote_keys).filter(|old| old.config() == url);
                ActiveKeys::Remote(kept.map_or_else(|| Arc::new(RemoteKeySet::new(url.clone())), Arc::clone))
            }
        };
        TokenVerifier { config, validations, keys, rules }
    }

    /// The key set that has to be fetched.
    pub(super) fn remote_keys(&self) -> Option<&Arc<RemoteKeySet>> {
        match &self.keys {
            ActiveKeys::Fixed(_) => None,
            ActiveKeys::Remote(keys) => Some(keys),
        }
    }

    /// Verifies the token of `request`, or returns the cached result. `Ok(None)` without a token.
    /// `extract` runs once per verified token. Invalid signatures are charged to `address`.
    pub(super) fn verify_request(
        &self,
        request: &mut Request,
        address: KeyHash,
        extract: impl FnOnce(&VerifiedClaims) -> VerifiedIdentity,
    ) -> Result<Option<VerifiedIdentity>, TokenOutcome> {
        if self.has_multiple_tokens(&request.fields) {
            self.remove_tokens(&mut request.fields);
            OUTCOMES.inc(TokenOutcome::Multiple);
            return Err(TokenOutcome::Multiple);
        }
        let outcome = match self.extract_token(&request.fields) {
            Ok(None) => return Ok(None),
            Ok(Some(token)) => {
                let token = PresentedToken { text: token, address, now: VerificationTime::read() };
                self.lookup_or_verify(token, extract)
            }
            Err(outcome) => Err(outcome),
        };
        OUTCOMES.inc(match &outcome {
            Ok(identity) if identity.user.is_some() => TokenOutcome::Valid,
            Ok(_) => TokenOutcome::NoUser,
            Err(outcome) => *outcome,
        });
        outcome.map(Some)
    }

    /// Whether there is more than one token, or the field that carries it is repeated. The origin
    /// might read another one.
    fn has_multiple_tokens(&self, fields: &Fields) -> bool {
        match &self.config.location {
            TokenLocation::Bearer => fields.all(Field::Authorization).nth(1).is_some(),
            TokenLocation::Header(name) => fields.named(name.as_bytes()).nth(1).is_some(),
            TokenLocation::Cookie(name) => {
                let tokens = cookie::pairs(fields).filter_map(|pair| cookie::value(pair, name.as_bytes()));
                tokens.take(2).count() > 1
            }
        }
    }

    fn remove_tokens(&self, fields: &mut Fields) {
        match &self.config.location {
            TokenLocation::Bearer => fields.remove(Field::Authorization),
            TokenLocation::Header(name) => fields.retain(|field| !field.name.eq_ignore_ascii_case(name.as_bytes())),
            TokenLocation::Cookie(name) => {
                let others = cookie::pairs(fields)
                    .filter(|pair| !pair.is_empty() && cookie::value(pair, name.as_bytes()).is_none());
                let others = others.collect::<Vec<_>>().join(&b"; "[..]);
                fields.remove(Field::Cookie);
                if !others.is_empty() {
                    fields.add(Field::Cookie, others);
                }
            }
        }
    }

    /// The token of a request that carries at most one.
    fn extract_token<'a>(&'a self, fields: &'a Fields) -> Result<Option<&'a [u8]>, TokenOutcome> {
        let token = match &self.config.location {
            TokenLocation::Bearer => fields.get(Field::Authorization).and_then(bearer),
            TokenLocation::Header(name) => {
                fields.named(name.as_bytes()).next().map(|line| bearer(line).unwrap_or(line))
            }
            TokenLocation::Cookie(name) => cookie::find(fields, name.as_bytes()),
        };
        let token = token.filter(|token| !token.is_empty());
        if token.is_some_and(|token| token.len() > TOKEN_BYTES_MAX) { Err(TokenOutcome::Oversize) } else { Ok(token) }
    }

    /// Looks up the token in the cache of this thread, and verifies it on a miss.
    fn lookup_or_verify(
        &self,
        token: PresentedToken<'_>,
        extract: impl FnOnce(&VerifiedClaims) -> VerifiedIdentity,
    ) -> Result<VerifiedIdentity, TokenOutcome> {
        let fetched;
        let keys = match &self.keys {
            ActiveKeys::Fixed(keys) => keys,
            ActiveKeys::Remote(remote) => {
                fetched = remote.current();
                fetched.as_deref().ok_or(TokenOutcome::KeysUnavailable)?
            }
        };
        TOKEN_CACHE.with_borrow_mut(|cache| {
            let generation = CacheGeneration { rules: self.rules, keys: keys.digest() };
            let cache = cache.get_or_insert_default().for_generation(generation);
            let digest = cache.digest(token.text);
            let now = token.now;
            if let Some((accepted, expires_at)) = cache.accepted.get(digest)
                && keys.contains(accepted.key)
            {
                let is_expired = now.unix_seconds >= expires_at;
                return if is_expired { Err(TokenOutcome::Expired) } else { Ok(accepted.identity.clone()) };
            }
            if let Some((outcome, expires_at)) = cache.rejected.get(digest)
                && now.monotonic.nanos() < expires_at
            {
                return Err(*outcome);
            }
            match self.verify(keys, token, &cache.budget) {
                Ok((claims, key)) => {
                    let identity = extract(&claims);
                    cache.accepted.put(digest, claims.expires_at, AcceptedToken { identity: identity.clone(), key });
                    Ok(identity)
                }
                Err(outcome) => {
                    if outcome.is_expensive() {
                        cache.rejected.put(digest, (now.monotonic + REJECTION_TTL).nanos(), outcome);
                    } else if let (TokenOutcome::Key, ActiveKeys::Remote(remote)) = (outcome, &self.keys) {
                        // The issuer may have a new key.
                        remote.request_refresh();
                    }
                    Err(outcome)
                }
            }
        })
    }

    fn verify(
        &self,
        keys: &JwkSet,
        token: PresentedToken<'_>,
        budget: &VerificationBudget,
    ) -> Result<(VerifiedClaims, KeyFingerprint), TokenOutcome> {
        let PresentedToken { text, address, now } = token;
        let head = text.split(|byte| *byte == b'.').next().unwrap_or_default();
        let head = URL_SAFE_NO_PAD.decode(head).map_err(|_| TokenOutcome::Malformed)?;
        let head: TokenHeader<'_> = serde_json::from_slice(&head).map_err(|_| TokenOutcome::Malformed)?;
        if head.crit {
            return Err(TokenOutcome::UnsupportedCritical);
        }
        let algorithm: Algorithm = head.alg.parse().map_err(|_| TokenOutcome::Algorithm)?;
        let pinned = self.validations.iter().find(|validation| validation.algorithms == [algorithm]);
        let validation = pinned.ok_or(TokenOutcome::Algorithm)?;
        let mut keys = keys.candidates(algorithm, head.kid.as_deref()).peekable();
        keys.peek().ok_or(TokenOutcome::Key)?;
        budget.check(address, now.monotonic).map_err(|exhausted| match exhausted {
            ExhaustedBudget::Address => TokenOutcome::ClientThrottled,
            ExhaustedBudget::Thread => TokenOutcome::VerificationThrottled,
        })?;
        for key in keys {
            SIGNATURES.inc();
            match jsonwebtoken::decode(text, &key.decoding, validation) {
                Ok(TokenData { claims, .. }) => {
                    return Ok((self.check_validity_period(claims, now)?, key.fingerprint));
                }
                Err(error) => match rejection(error.kind()) {
                    TokenOutcome::Signature => budget.charge(address, now.monotonic),
                    other => return Err(other),
                },
            }
        }
        Err(TokenOutcome::Signature)
    }

    /// Checks `exp` and `nbf` (RFC 7519 sections 4.1.4 and 4.1.5).
    fn check_validity_period(
        &self,
        claims: Map<String, Value>,
        now: VerificationTime,
    ) -> Result<VerifiedClaims, TokenOutcome> {
        let leeway = self.config.leeway.as_secs();
        let expiry = claims.get("exp").and_then(seconds).ok_or(TokenOutcome::MissingExpiry)?;
        let not_before = match claims.get("nbf") {
            Some(value) => seconds(value).ok_or(TokenOutcome::Malformed)?,
            None => 0,
        };
        let expires_at = expiry.saturating_add(leeway);
        if now.unix_seconds >= expires_at {
            return Err(TokenOutcome::Expired);
        }
        if now.unix_seconds.saturating_add(leeway) < not_before {
            return Err(TokenOutcome::NotYetValid);
        }
        Ok(VerifiedClaims { claims, expires_at })
    }
}

impl TokenOutcome {
    /// Whether the result required a signature verification. Other rejections are as cheap to
    /// repeat as to look up.
    fn is_expensive(self) -> bool {
        use TokenOutcome::*;
        matches!(self, Signature | MissingExpiry | Expired | NotYetValid | Issuer | Audience)
    }
}

/// Credentials after the scheme `Bearer`, which is case-insensitive (RFC 9110 section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// A NumericDate (RFC 7519 section 2), which may have a fraction.
fn seconds(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().map(|seconds| seconds as u64))
}

fn rejection(kind: &ErrorKind) -> TokenOutcome {
    match kind {
        ErrorKind::InvalidSignature => TokenOutcome::Signature,
        ErrorKind::InvalidAlgorithm => TokenOutcome::Algorithm,
        ErrorKind::InvalidIssuer => TokenOutcome::Issuer,
        ErrorKind::InvalidAudience => TokenOutcome::Audience,
        ErrorKind::MissingRequiredClaim(name) => match name.as_str() {
            "iss" => TokenOutcome::Issuer,
            "aud" => TokenOutcome::Audience,
            _ => TokenOutcome::MissingExpiry,
        },
        _ => TokenOutcome::Malformed,
    }
}

#[cfg(test)]
mod tests;
