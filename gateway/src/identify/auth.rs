//! Authentication that a route demands: API keys, or HTTP Basic (RFC 7617).
//!
//! It precedes limits and cache. The name of the key or of the user identifies the user for limits.
//! Invariants: credentials are neither logged nor, unless configured, forwarded; memory does not
//! grow with what clients send; a password is verified off the thread that serves requests.

mod result;
mod credentials_cache;
pub(crate) mod htpasswd;
pub(crate) mod api_keys;
mod in_progress;
mod basic;
mod answer_cache;

use std::fmt;
use std::net::IpAddr;
use std::sync::LazyLock;

use limiter::KeyHash;

use self::api_keys::ApiKeys;
use self::basic::PasswordVerifier;
use crate::event::Event;
use crate::http::fields::{Fields, KnownField};
use crate::metrics::{self, Counters};

pub(crate) use answer_cache::{AcceptedFields, AnswerCache};
pub(crate) use htpasswd::PasswordFile;
pub(crate) use result::{AuthResult, PrincipalIndex};

/// Authentication of a route (`routes.auth`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AuthConfig {
    pub(crate) method: AuthMethod,
    /// Shown to users by browsers; without quotes and backslashes.
    pub(crate) realm: String,
    /// Whether the origin gets the field with the credentials.
    pub(crate) forwards_credentials: bool,
}

impl AuthConfig {
    /// The field that carries the credentials, in lower case.
    pub(crate) fn field(&self) -> &str {
        match &self.method {
            AuthMethod::ApiKey { field, .. } => field,
            AuthMethod::Basic(_) => KnownField::Authorization.as_str(),
        }
    }
}

/// The credentials that a route accepts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AuthMethod {
    /// Keys, and the field that carries one, in lower case.
    ApiKey {
        keys: ApiKeys,
        field: String,
    },
    Basic(PasswordFile),
}

static RESULTS: LazyLock<Counters<AuthResult>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    let help = "Requests of routes that demand credentials, by result.";
    metrics::expose_counters("tidegate_authentications", help, &RESULTS);
}

/// Counts the authentication of a request.
pub(crate) fn count(result: AuthResult) {
    RESULTS.inc(result);
}

/// The state of the authentication of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Authentication {
    /// The route demands none.
    #[default]
    NotRequired,
    Accepted(PrincipalIndex),
    Rejected(AuthResult),
    /// The password has to be verified, which takes long.
    Pending,
}

impl Authentication {
    /// Whether it holds for every request with the same head. A throttled client may try again.
    pub(crate) fn is_final(self) -> bool {
        !matches!(
            self,
            Authentication::Pending
                | Authentication::Rejected(AuthResult::ClientThrottled | AuthResult::VerificationThrottled)
        )
    }

    /// The result to count; `None` where there is none, or none yet.
    pub(crate) fn result(self) -> Option<AuthResult> {
        match self {
            Authentication::NotRequired | Authentication::Pending => None,
            Authentication::Accepted(_) => Some(AuthResult::Valid),
            Authentication::Rejected(result) => Some(result),
        }
    }

    /// The principal; `None` without one.
    pub(crate) fn principal(self) -> Option<PrincipalIndex> {
        match self {
            Authentication::Accepted(principal) => Some(principal),
            _ => None,
        }
    }
}

/// Authenticates the requests of one route.
pub(crate) struct Authenticator {
    config: AuthConfig,
    /// The value of `WWW-Authenticate`.
    challenge: String,
    passwords: Option<PasswordVerifier>,
}

impl Authenticator {
    /// `old`: the one that it replaces, for the same route.
    pub(crate) fn new(config: AuthConfig, old: Option<&Authenticator>) -> Self {
        let scheme = match &config.method {
            AuthMethod::Basic(_) => "Basic",
            AuthMethod::ApiKey { field, .. } if field == KnownField::Authorization.as_str() => "Bearer",
            // No scheme is registered for keys in a field of their own.
            AuthMethod::ApiKey { .. } => "ApiKey",
        };
        let mut challenge = format!("{scheme} realm=\"{}\"", config.realm);
        if scheme == "Basic" {
            // RFC 7617 section 2.1.
            challenge.push_str(", charset=\"UTF-8\"");
        }
        let passwords = match &config.method {
            AuthMethod::Basic(users) => {
                Some(PasswordVerifier::new(users.clone(), old.and_then(|old| old.passwords.as_ref())))
            }
            AuthMethod::ApiKey { .. } => None,
        };
        Authenticator { config, challenge, passwords }
    }

    pub(crate) fn config(&self) -> &AuthConfig {
        &self.config
    }

    /// The value of `WWW-Authenticate` for a request that is not authenticated (RFC 9110 section
    /// 11.6.1).
    pub(crate) fn challenge(&self) -> &str {
        &self.challenge
    }

    /// Authenticates a request, as far as this does not take long.
    pub(crate) fn authenticate(&self, fields: &Fields) -> Authentication {
        let result = match (&self.config.method, &self.passwords) {
            (AuthMethod::ApiKey { keys, field }, _) => keys.find(fields, field).map(Some),
            (AuthMethod::Basic(_), Some(passwords)) => passwords.look_up(fields),
            (AuthMethod::Basic(_), None) => Err(AuthResult::Unknown),
        };
        match result {
            Ok(Some(principal)) => Authentication::Accepted(principal),
            Ok(None) => Authentication::Pending,
            Err(result) => Authentication::Rejected(result),
        }
    }

    /// Verifies the password of a request whose authentication is pending. Wrong ones are charged
    /// to the address, given with its hash. Takes at most a few seconds. Cancel safe: a
    /// verification that runs is left to end.
    pub(crate) async fn verify(&self, fields: &Fields, (ip, address): (IpAddr, KeyHash)) -> Authentication {
        let Some(passwords) = &self.passwords else { return Authentication::Rejected(AuthResult::Unknown) };
        match passwords.verify(fields, address).await {
            Ok(principal) => Authentication::Accepted(principal),
            Err(result) => {
                if result == AuthResult::ClientThrottled {
                    Event::PasswordsThrottled { client: ip }.emit();
                }
                Authentication::Rejected(result)
            }
        }
    }

    /// The name of a principal, for limits, access lists and the access log.
    pub(crate) fn name(&self, principal: PrincipalIndex) -> &str {
        match &self.config.method {
            AuthMethod::ApiKey { keys, .. } => keys.name(principal),
            AuthMethod::Basic(users) => users.name(principal),
        }
    }

    /// The user class of a principal; `None`: the class of users without one.
    pub(crate) fn class(&self, principal: PrincipalIndex) -> Option<&str> {
        match &self.config.method {
            AuthMethod::ApiKey { keys, .. } => keys.class(principal),
            AuthMethod::Basic(_) => None,
        }
    }

    /// Removes the credentials from a request for the origin, unless it gets them.
    pub(crate) fn remove_credentials(&self, fields: &mut Fields) {
        if self.config.forwards_credentials {
            return;
        }
        let field = self.config.field().as_bytes();
        fields.retain(|line| !line.name.eq_ignore_ascii_case(field));
    }
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.config.fmt(f)
    }
}
