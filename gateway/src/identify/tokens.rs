//! JSON Web Tokens (RFC 7519): where a request carries one, whether it is believed, and what is kept of it.
//!
//! A token is believed from anybody, for its signature; the algorithms are pinned by the configuration, and one that is not
//! believed is counted and otherwise as good as none. Invariants: nothing of a token is read as a claim before a key of the
//! configuration has verified it; no token is ever logged; what is kept is bounded, whoever sends how many (`seen`).

use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
pub use jsonwebtoken::{Algorithm, AlgorithmFamily};
use jsonwebtoken::{TokenData, Validation, errors::ErrorKind};
use limiter::{Clock, KeyHash, Moment};
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::Facts;
use super::keys::Keys;
use super::seen::{Budget, Seen, Spent};
use crate::http::fields::{Fields, Known as Field};
use crate::http::message::Request;
use crate::label;
use crate::metrics::{self, Counter, Counters};

/// Bytes of a token that is looked at: what browsers and servers take as one header line.
const TOKEN_BYTES_MAX: usize = 8 << 10;

/// How long a token that was not believed is not looked at again: less than the usual leeway, so that one that was early by the
/// gateway's clock is believed in time.
const BAD_FOR: Duration = Duration::from_secs(10);

/// Where a request carries its token.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Place {
    /// `Authorization: Bearer TOKEN` (RFC 6750 section 2.1).
    #[default]
    Bearer,
    /// A field with the token, after `Bearer ` or alone; the name is in lower case.
    Header(String),
    Cookie(String),
}

/// Which tokens are believed (`identity.user.jwt`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub keys: Keys,
    pub place: Place,
    /// The value that `iss` must have; `None`: any.
    pub issuer: Option<String>,
    /// The values of which `aud` must have one; none: `aud` is not looked at.
    pub audience: Vec<String>,
    /// By how much the clocks of issuer and gateway may differ.
    pub leeway: Duration,
}

impl Settings {
    /// 30 s: clocks that are kept by NTP differ by less than one, and more only prolongs what was to end.
    pub const LEEWAY: Duration = Duration::from_secs(30);

    /// The field that carries the token, where it is not a cookie.
    pub fn field(&self) -> Option<&str> {
        match &self.place {
            Place::Bearer => Some(Field::Authorization.as_str()),
            Place::Header(name) => Some(name),
            Place::Cookie(_) => None,
        }
    }
}

label! {
    /// What became of a token.
    Outcome, "result", {
        Valid = "valid",
        /// Valid, and without the claim that names the user.
        NoUser = "no_user",
        /// Not three parts of base64url and JSON.
        Malformed = "malformed",
        /// More than one token: none of them goes on.
        Several = "several",
        /// Longer than 8 KiB.
        Oversize = "oversize",
        /// Its header has `crit`: something that must be understood, and is not.
        Critical = "critical",
        /// Not one of the pinned algorithms; `none` among them.
        Algorithm = "algorithm",
        /// No key of its name, or none of its algorithm.
        Key = "key",
        Signature = "signature",
        /// It never ends: there is no `exp`.
        Undated = "undated",
        Expired = "expired",
        /// Not valid yet (`nbf`).
        Early = "early",
        Issuer = "issuer",
        Audience = "audience",
        /// Not looked at: too many bad signatures came from its address.
        Unchecked = "unchecked",
        /// Not looked at: too many bad signatures came from everywhere.
        Flooded = "flooded",
    }
}

static OUTCOMES: LazyLock<Counters<Outcome>> = LazyLock::new(Counters::default);
static SIGNATURES: LazyLock<Counter> = LazyLock::new(Counter::default);
static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::start);

/// Registers the metrics of this module.
pub(super) fn expose() {
    metrics::expose_counters("tidegate_tokens", "Tokens that requests carried, by what became of them.", &OUTCOMES);
    metrics::expose_counter_with("tidegate_token_signatures", "Signatures of tokens that were verified.", |emit| {
        emit(&[], SIGNATURES.get());
    });
}

thread_local! {
    static SEEN: RefCell<Option<Box<Seen<Facts, Outcome>>>> = const { RefCell::new(None) };
}

/// When a token is looked at.
#[derive(Clone, Copy, Debug)]
struct Now {
    /// Seconds since 1970, as tokens are dated.
    wall: u64,
    moment: Moment,
}

impl Now {
    fn read() -> Now {
        // Before 1970 everything is early.
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Now { wall, moment: CLOCK.now() }
    }
}

/// Claims of a verified token.
pub(super) struct Claims {
    all: Map<String, Value>,
    /// The second from which it is no longer believed.
    until: u64,
}

impl Claims {
    /// A claim that is text or a number, as text; nothing where it is empty or anything else.
    pub(super) fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        match self.all.get(name)? {
            Value::String(text) if !text.is_empty() => Some(Cow::Borrowed(text)),
            Value::Number(number) => Some(Cow::Owned(number.to_string())),
            _ => None,
        }
    }
}

/// What a token's header says, before it is known whether it may be believed.
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    alg: Cow<'a, str>,
    #[serde(borrow, default)]
    kid: Option<Cow<'a, str>>,
    #[serde(default, deserialize_with = "is_there")]
    crit: bool,
}

fn is_there<'de, D: Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    IgnoredAny::deserialize(deserializer).map(|_| true)
}

/// Believes tokens by the configured rules.
pub(super) struct Tokens {
    settings: Settings,
    /// One for each pinned algorithm, and for that one alone.
    validations: Vec<Validation>,
    /// Another for each configuration, so that no thread takes what it has seen from one to the next.
    generation: u64,
}

impl Tokens {
    pub(super) fn new(settings: Settings) -> Self {
        static GENERATIONS: AtomicU64 = AtomicU64::new(1);
        let validation = |algorithm: &Algorithm| {
            let mut validation = Validation::new(*algorithm);
            // When it ends is judged here, by the same clock when it is new and when it is seen again.
            (validation.validate_exp, validation.validate_nbf) = (false, false);
            validation.validate_aud = !settings.audience.is_empty();
            if validation.validate_aud {
                validation.set_audience(&settings.audience);
                validation.required_spec_claims.insert("aud".to_owned());
            }
            if let Some(issuer) = &settings.issuer {
                validation.set_issuer(&[issuer]);
                validation.required_spec_claims.insert("iss".to_owned());
            }
            validation
        };
        let validations = settings.keys.algorithms().iter().map(validation).collect();
        Tokens { settings, validations, generation: GENERATIONS.fetch_add(1, Relaxed) }
    }

    /// What is known of the token that `request` carries; `Ok(None)` where it carries none, and why where it is not believed. `keep`
    /// takes from its claims what is worth keeping, once; bad signatures are counted against `address`.
    pub(super) fn look(
        &self,
        request: &mut Request,
        address: KeyHash,
        keep: impl FnOnce(&Claims) -> Facts,
    ) -> Result<Option<Facts>, Outcome> {
        if self.are_several(&request.fields) {
            self.drop_all(&mut request.fields);
            OUTCOMES.inc(Outcome::Several);
            return Err(Outcome::Several);
        }
        let outcome = match self.carried(&request.fields) {
            Ok(None) => return Ok(None),
            Ok(Some(token)) => self.judge(token, address, Now::read(), keep),
            Err(outcome) => Err(outcome),
        };
        OUTCOMES.inc(match &outcome {
            Ok(facts) if facts.user.is_some() => Outcome::Valid,
            Ok(_) => Outcome::NoUser,
            Err(outcome) => *outcome,
        });
        outcome.map(Some)
    }

    /// Whether there is more than one token, or the field that holds it is repeated: the origin might read another one.
    fn are_several(&self, fields: &Fields) -> bool {
        match &self.settings.place {
            Place::Bearer => fields.all(Field::Authorization).nth(1).is_some(),
            Place::Header(name) => fields.named(name.as_bytes()).nth(1).is_some(),
            Place::Cookie(name) => {
                let tokens = super::cookie_pairs(fields).filter_map(|pair| super::cookie_value(pair, name.as_bytes()));
                tokens.take(2).count() > 1
            }
        }
    }

    fn drop_all(&self, fields: &mut Fields) {
        match &self.settings.place {
            Place::Bearer => fields.remove(Field::Authorization),
            Place::Header(name) => fields.retain(|field| !field.name.eq_ignore_ascii_case(name.as_bytes())),
            Place::Cookie(name) => {
                let others = super::cookie_pairs(fields)
                    .filter(|pair| !pair.is_empty() && super::cookie_value(pair, name.as_bytes()).is_none());
                let others = others.collect::<Vec<_>>().join(&b"; "[..]);
                fields.remove(Field::Cookie);
                if !others.is_empty() {
                    fields.add(Field::Cookie, others);
                }
            }
        }
    }

    /// The token of a request, of which there is one at most.
    fn carried<'a>(&'a self, fields: &'a Fields) -> Result<Option<&'a [u8]>, Outcome> {
        let token = match &self.settings.place {
            Place::Bearer => fields.get(Field::Authorization).and_then(bearer),
            Place::Header(name) => fields.named(name.as_bytes()).next().map(|line| bearer(line).unwrap_or(line)),
            Place::Cookie(name) => super::cookie(fields, name.as_bytes()),
        };
        let token = token.filter(|token| !token.is_empty());
        if token.is_some_and(|token| token.len() > TOKEN_BYTES_MAX) { Err(Outcome::Oversize) } else { Ok(token) }
    }

    /// Looks a token up among those that were seen, and verifies it where it is new.
    fn judge(
        &self,
        token: &[u8],
        address: KeyHash,
        now: Now,
        keep: impl FnOnce(&Claims) -> Facts,
    ) -> Result<Facts, Outcome> {
        SEEN.with_borrow_mut(|seen| {
            let seen = seen.get_or_insert_default().under(self.generation);
            let digest = seen.digest(token);
            if let Some((facts, until)) = seen.good.get(digest) {
                return if now.wall < until { Ok(facts.clone()) } else { Err(Outcome::Expired) };
            }
            if let Some((outcome, until)) = seen.bad.get(digest)
                && now.moment.nanos() < until
            {
                return Err(*outcome);
            }
            match self.verify(token, address, now, &seen.budget) {
                Ok(claims) => {
                    let facts = keep(&claims);
                    seen.good.put(digest, claims.until, facts.clone());
                    Ok(facts)
                }
                Err(outcome) => {
                    if outcome.is_dear() {
                        seen.bad.put(digest, (now.moment + BAD_FOR).nanos(), outcome);
                    }
                    Err(outcome)
                }
            }
        })
    }

    fn verify(&self, token: &[u8], address: KeyHash, now: Now, budget: &Budget) -> Result<Claims, Outcome> {
        let head = token.split(|byte| *byte == b'.').next().unwrap_or_default();
        let head = URL_SAFE_NO_PAD.decode(head).map_err(|_| Outcome::Malformed)?;
        let head: Head<'_> = serde_json::from_slice(&head).map_err(|_| Outcome::Malformed)?;
        if head.crit {
            return Err(Outcome::Critical);
        }
        let algorithm: Algorithm = head.alg.parse().map_err(|_| Outcome::Algorithm)?;
        let pinned = self.validations.iter().find(|validation| validation.algorithms == [algorithm]);
        let validation = pinned.ok_or(Outcome::Algorithm)?;
        let mut keys = self.settings.keys.candidates(algorithm, head.kid.as_deref()).peekable();
        keys.peek().ok_or(Outcome::Key)?;
        budget.allows(address, now.moment).map_err(|spent| match spent {
            Spent::ByAddress => Outcome::Unchecked,
            Spent::ByAll => Outcome::Flooded,
        })?;
        for key in keys {
            SIGNATURES.inc();
            match jsonwebtoken::decode(token, key, validation) {
                Ok(TokenData { claims, .. }) => return self.dated(claims, now),
                Err(error) => match refusal(error.kind()) {
                    Outcome::Signature => budget.charge(address, now.moment),
                    other => return Err(other),
                },
            }
        }
        Err(Outcome::Signature)
    }

    /// The claims, where the token is valid now (RFC 7519 sections 4.1.4 and 4.1.5).
    fn dated(&self, all: Map<String, Value>, now: Now) -> Result<Claims, Outcome> {
        let leeway = self.settings.leeway.as_secs();
        let end = all.get("exp").and_then(seconds).ok_or(Outcome::Undated)?;
        let begin = match all.get("nbf") {
            Some(begin) => seconds(begin).ok_or(Outcome::Malformed)?,
            None => 0,
        };
        let until = end.saturating_add(leeway);
        if now.wall >= until {
            return Err(Outcome::Expired);
        }
        if now.wall.saturating_add(leeway) < begin {
            return Err(Outcome::Early);
        }
        Ok(Claims { all, until })
    }
}

impl Outcome {
    /// Whether it took a signature to find out; the others are found out again as quickly as they are looked up.
    fn is_dear(self) -> bool {
        use Outcome::*;
        matches!(self, Signature | Undated | Expired | Early | Issuer | Audience)
    }
}

/// What follows the scheme, in any letter case (RFC 9110 section 11.1).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

/// A NumericDate (RFC 7519 section 2), which may have a fraction.
fn seconds(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().map(|seconds| seconds as u64))
}

fn refusal(kind: &ErrorKind) -> Outcome {
    match kind {
        ErrorKind::InvalidSignature => Outcome::Signature,
        ErrorKind::InvalidAlgorithm => Outcome::Algorithm,
        ErrorKind::InvalidIssuer => Outcome::Issuer,
        ErrorKind::InvalidAudience => Outcome::Audience,
        ErrorKind::MissingRequiredClaim(name) => match name.as_str() {
            "iss" => Outcome::Issuer,
            "aud" => Outcome::Audience,
            _ => Outcome::Undated,
        },
        _ => Outcome::Malformed,
    }
}

#[cfg(test)]
mod tests;
