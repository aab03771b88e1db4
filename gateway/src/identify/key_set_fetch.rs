//! Fetches a key set over HTTPS, on a thread of its own.
//!
//! Bounds: one response of at most 256 KiB in 10 s, redirects and name resolution included. The
//! certificate of every server on the way is verified.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use jsonwebtoken::Algorithm;
use tokio::sync::oneshot;
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

use super::jwk_set::{JwkSet, JwkSetError};
use crate::label;

/// Issuers respond in less than a second. Nothing but the next fetch waits for a slow one.
const TIMEOUT: Duration = Duration::from_secs(10);
/// A set of the largest keys with certificate chains has less than 100 KiB.
const BODY_BYTES_MAX: u64 = 256 << 10;
/// Redirects that are followed, each to another HTTPS URL.
const REDIRECTS_MAX: u32 = 3;

/// The place of a key set, and what is accepted from there.
#[derive(Clone, PartialEq)]
pub struct KeySetUrl {
    /// With `https`.
    pub url: String,
    pub algorithms: Vec<Algorithm>,
    /// Authorities of the issuer's certificate in DER; empty: those of the system.
    pub authorities: Vec<Vec<u8>>,
    /// How long a set is used after its lifetime while the issuer does not respond.
    pub stale: Duration,
}

impl fmt::Debug for KeySetUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

label! {
    /// Result of a fetch of a key set.
    pub(super) KeySetFetch, "result", {
        Fetched = "fetched",
        /// No response in time, or no trusted TLS connection.
        Unreachable = "unreachable",
        /// A status other than 200.
        Status = "status",
        /// Not a usable key set.
        Invalid = "invalid",
    }
}

/// A key set as the issuer publishes it now.
pub(super) struct FetchedKeySet {
    pub(super) keys: JwkSet,
    /// `max-age` of the response.
    pub(super) lifetime: Option<Duration>,
}

/// Why a key set could not be fetched.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeySetFetchError {
    #[error("{0}")]
    Request(Box<ureq::Error>),
    #[error("the response has status {0}")]
    Status(u16),
    #[error("{0}")]
    Keys(#[from] JwkSetError),
    #[error("no thread for the request")]
    Thread,
}

impl KeySetFetchError {
    pub(super) fn kind(&self) -> KeySetFetch {
        match self {
            KeySetFetchError::Request(error) => match **error {
                ureq::Error::BodyExceedsLimit(_) => KeySetFetch::Invalid,
                _ => KeySetFetch::Unreachable,
            },
            KeySetFetchError::Thread => KeySetFetch::Unreachable,
            KeySetFetchError::Status(_) => KeySetFetch::Status,
            KeySetFetchError::Keys(_) => KeySetFetch::Invalid,
        }
    }
}

/// Fetches and parses the set. Takes at most `TIMEOUT`.
pub(super) async fn fetch(config: &KeySetUrl) -> Result<FetchedKeySet, KeySetFetchError> {
    let (sender, receiver) = oneshot::channel();
    let config = config.clone();
    // A thread of its own: the end of the process does not wait for it, as it does for the blocking
    // tasks of a runtime.
    let started = std::thread::Builder::new().name("key-set".to_owned()).spawn(move || {
        let _receiver_may_be_gone = sender.send(fetch_blocking(&config));
    });
    match started {
        Ok(_detached) => receiver.await.unwrap_or(Err(KeySetFetchError::Thread)),
        Err(_) => Err(KeySetFetchError::Thread),
    }
}

fn fetch_blocking(config: &KeySetUrl) -> Result<FetchedKeySet, KeySetFetchError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(provider)
        .root_certs(RootCerts::Specific(Arc::new(authorities(config))));
    let agent = ureq::Agent::config_builder()
        .timeout_global(Some(TIMEOUT))
        .https_only(true)
        .http_status_as_error(false)
        .max_redirects(REDIRECTS_MAX)
        .proxy(None)
        .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
        .accept("application/jwk-set+json, application/json;q=0.9")
        .tls_config(tls.build());
    let failed = |error| KeySetFetchError::Request(Box::new(error));
    let mut response = ureq::Agent::new_with_config(agent.build()).get(&config.url).call().map_err(failed)?;
    if response.status().as_u16() != 200 {
        return Err(KeySetFetchError::Status(response.status().as_u16()));
    }
    let control = response.headers().get_all("cache-control").iter().filter_map(|value| value.to_str().ok());
    let lifetime = control.filter_map(max_age).min();
    let text = response.body_mut().with_config().limit(BODY_BYTES_MAX).read_to_string().map_err(failed)?;
    Ok(FetchedKeySet { keys: JwkSet::parse(&text, &config.algorithms)?, lifetime })
}

/// Read for each fetch: the system's authorities may change, and without them the error says why
/// no server is trusted.
fn authorities(config: &KeySetUrl) -> Vec<Certificate<'static>> {
    if config.authorities.is_empty() {
        let system = rustls_native_certs::load_native_certs().certs;
        return system.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect();
    }
    config.authorities.iter().map(|der| Certificate::from_der(der).to_owned()).collect()
}

/// The freshness lifetime in a `Cache-Control` value (RFC 9111 section 5.2.2); zero if the response
/// must not be reused.
fn max_age(value: &str) -> Option<Duration> {
    let mut lifetimes = value.split(',').filter_map(|directive| {
        let (name, argument) = directive.split_once('=').unwrap_or((directive, ""));
        match name.trim().to_ascii_lowercase().as_str() {
            "no-store" | "no-cache" => Some(Duration::ZERO),
            "max-age" => argument.trim().trim_matches('"').parse().ok().map(Duration::from_secs),
            _ => None,
        }
    });
    let first = lifetimes.next()?;
    Some(lifetimes.fold(first, Duration::min))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetime_is_the_shortest_directive() {
        let seconds = |value: &str| max_age(value).map(|lifetime| lifetime.as_secs());
        for (value, want) in [
            ("public, max-age=300", Some(300)),
            ("Max-Age=\"20\", s-maxage=9", Some(20)),
            ("max-age=300, no-cache", Some(0)),
            ("no-store", Some(0)),
            ("public", None),
            ("max-age=soon", None),
            ("max-age=99999999999999999999", None),
            ("", None),
        ] {
            assert_eq!(seconds(value), want, "{value}");
        }
    }
}
