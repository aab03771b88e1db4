//! Decides which requests may use the admin API and read its pages.
//!
//! With a token, `/api` requires it. Without one, `/api` accepts direct requests of programs on
//! this machine. Web pages of other origins are refused in both cases: a browser sends their
//! requests from inside the network of its user.
//!
//! Invariant: a token is compared in a time that does not depend on the configured one.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::config::AdminConfig;
use super::token_throttle::TokenThrottle;
use crate::event::Event;
use crate::http::fields::KnownField;
use crate::http::message::{Request, StatusCode};
use crate::label;
use crate::metrics::{self, Counters};
use crate::simple_server::SimpleResponse;
use crate::tasks::{self, TaskWait};

label! {
    /// Why a request to the admin address was rejected.
    pub(crate) AdminRejection, "reason", {
        /// The request has no bearer token.
        NoToken = "no_token",
        WrongToken = "wrong_token",
        /// Too many wrong tokens came from the address.
        Throttled = "throttled",
        /// Not from this machine.
        Peer = "peer",
        /// Forwarded by a proxy.
        Proxied = "proxied",
        /// The host is not this machine.
        Host = "host",
        /// Sent by a web page of another origin.
        Origin = "origin",
    }
}

static REJECTIONS: LazyLock<Counters<AdminRejection>> = LazyLock::new(Counters::default);

pub(super) fn expose() {
    let help = "Requests that the admin address rejected, by reason.";
    metrics::expose_counters("tidegate_admin_rejections", help, &REJECTIONS);
}

/// Requests that may wait for the check of their token at once: a quarter of the connections.
const WAITERS_MAX: usize = 16;

/// The state of the checks: wrong tokens by address, and the requests that wait.
#[derive(Default)]
pub(super) struct AdminAccess {
    throttle: RefCell<TokenThrottle>,
    waiters: Cell<usize>,
}

/// A request that waits for the check of its token.
struct Waiter<'a>(&'a Cell<usize>);

impl<'a> Waiter<'a> {
    /// `None` if too many wait.
    fn new(waiters: &'a Cell<usize>) -> Option<Self> {
        (waiters.get() < WAITERS_MAX).then(|| {
            waiters.set(waiters.get() + 1);
            Waiter(waiters)
        })
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl AdminAccess {
    /// Decides whether a request may use the API. Cancel safe.
    ///
    /// # Errors
    /// The response to send instead.
    pub(super) async fn check_api(
        &self,
        config: &AdminConfig,
        request: &Request,
        peer: IpAddr,
    ) -> Result<(), SimpleResponse> {
        if is_from_foreign_page(request) {
            return Err(reject(AdminRejection::Origin));
        }
        match &config.token {
            Some(token) => self.check_token(token, request, peer).await,
            None => check_direct(config, request, peer).map_err(reject),
        }
    }

    async fn check_token(&self, token: &str, request: &Request, peer: IpAddr) -> Result<(), SimpleResponse> {
        let Some(given) = bearer_token(request) else {
            return Err(reject(AdminRejection::NoToken));
        };
        let reserved = self.throttle.borrow_mut().reserve_check(peer, Instant::now());
        match reserved {
            Ok(Duration::ZERO) => {}
            Ok(wait) => {
                let Some(_waiter) = Waiter::new(&self.waiters) else { return Err(throttled(wait)) };
                tasks::set_waiting_for(TaskWait::Timer);
                tokio::time::sleep(wait).await;
            }
            Err(wait) => return Err(throttled(wait)),
        }
        if is_same_token(given, token) {
            self.throttle.borrow_mut().record_right(peer);
            return Ok(());
        }
        let count = self.throttle.borrow_mut().record_wrong(peer, Instant::now());
        Event::AdminTokenRejected { address: peer, count }.emit();
        Err(reject(AdminRejection::WrongToken))
    }
}

/// Decides whether a request may read a page that needs no token. If the address is reachable from
/// this machine only, a name of another host has been made to resolve to it (DNS rebinding).
pub(super) fn check_page(config: &AdminConfig, request: &Request) -> Result<(), AdminRejection> {
    let is_private = config.token.is_none() && config.address.ip().is_loopback();
    if is_private && !is_local_host(request, config) { Err(AdminRejection::Host) } else { Ok(()) }
}

/// Accepts direct requests of programs on this machine. Any host name may resolve to loopback (DNS
/// rebinding), and a proxy on this machine forwards requests of others.
fn check_direct(config: &AdminConfig, request: &Request, peer: IpAddr) -> Result<(), AdminRejection> {
    if !peer.is_loopback() {
        return Err(AdminRejection::Peer);
    }
    if request.fields.has(KnownField::Forwarded) || request.fields.has(KnownField::XForwardedFor) {
        return Err(AdminRejection::Proxied);
    }
    if is_local_host(request, config) { Ok(()) } else { Err(AdminRejection::Host) }
}

/// Whether the host is a loopback name or address, or the configured address.
fn is_local_host(request: &Request, config: &AdminConfig) -> bool {
    let host = request.host();
    match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback() || address == config.address.ip(),
        Err(_) => {
            let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
            name == "localhost" || name.ends_with(".localhost")
        }
    }
}

/// Whether a browser sent the request for a page of another origin. Browsers send `Origin` with
/// every unsafe method (Fetch standard, section 3.2) and `Sec-Fetch-Site` where it can be trusted;
/// other programs send neither.
fn is_from_foreign_page(request: &Request) -> bool {
    let is_own_site = |site: &[u8]| site == b"same-origin" || site == b"none";
    let mut sites = request.fields.named(b"sec-fetch-site");
    let mut origins = request.fields.named(b"origin");
    !sites.all(is_own_site) || !origins.all(|origin| is_own_origin(origin, &request.authority))
}

/// Whether `origin` has the host and port of `authority`. The origin `null` is no own one.
fn is_own_origin(origin: &[u8], authority: &str) -> bool {
    let Some((scheme, host)) = std::str::from_utf8(origin).ok().and_then(|origin| origin.split_once("://")) else {
        return false;
    };
    let default_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        _ => return false,
    };
    let without_port = |host: &str| host.strip_suffix(default_port).unwrap_or(host).to_ascii_lowercase();
    without_port(host) == without_port(authority)
}

/// The bearer token of a request that has exactly one (RFC 6750 section 2.1).
fn bearer_token(request: &Request) -> Option<&[u8]> {
    let mut values = request.fields.all(KnownField::Authorization);
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.split_at_checked(7)?;
    (scheme.eq_ignore_ascii_case(b"Bearer ") && !token.trim_ascii().is_empty()).then_some(token.trim_ascii())
}

/// Compares digests, which takes the same time for all tokens of one length: neither a common
/// prefix nor the length of the configured token shows.
fn is_same_token(given: &[u8], token: &str) -> bool {
    // The comparison of two `blake3::Hash` takes constant time.
    blake3::hash(given) == blake3::hash(token.as_bytes())
}

/// Counts a rejection and composes its response.
pub(super) fn reject(reason: AdminRejection) -> SimpleResponse {
    REJECTIONS.inc(reason);
    let (status, text) = match reason {
        AdminRejection::NoToken | AdminRejection::WrongToken => (StatusCode::UNAUTHORIZED, "token required"),
        AdminRejection::Throttled => {
            (StatusCode::TOO_MANY_REQUESTS, "too many wrong tokens from this address; try again later")
        }
        AdminRejection::Peer => (StatusCode::FORBIDDEN, "without admin.token, only loopback peers are accepted"),
        AdminRejection::Proxied => (StatusCode::FORBIDDEN, "without admin.token, only direct requests are accepted"),
        AdminRejection::Host => {
            (StatusCode::FORBIDDEN, "without admin.token, the host must be a loopback name or address")
        }
        AdminRejection::Origin => (StatusCode::FORBIDDEN, "requests of other web pages are not accepted"),
    };
    let response = SimpleResponse::text(status, text);
    if status == StatusCode::UNAUTHORIZED { response.with_named("www-authenticate", "Bearer") } else { response }
}

fn throttled(wait: Duration) -> SimpleResponse {
    let seconds = wait.as_secs_f64().ceil().max(1.0).to_string();
    reject(AdminRejection::Throttled).with(KnownField::RetryAfter, &seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_are_own_by_host_and_port_only() {
        for (origin, authority) in [
            ("http://localhost:9900", "localhost:9900"),
            ("http://LOCALHOST:9900", "localhost:9900"),
            ("http://localhost", "localhost"),
            ("http://localhost:80", "localhost"),
            ("http://localhost", "localhost:80"),
            ("https://admin.example", "admin.example"),
            ("https://admin.example", "admin.example:443"),
            ("http://[::1]:9900", "[::1]:9900"),
        ] {
            assert!(is_own_origin(origin.as_bytes(), authority), "{origin} {authority}");
        }
        for (origin, authority) in [
            ("null", "localhost:9900"),
            ("", "localhost:9900"),
            ("http://localhost:9901", "localhost:9900"),
            ("http://localhost", "localhost:9900"),
            ("https://localhost", "localhost:80"),
            ("http://evil.example", "localhost:9900"),
            ("http://localhost:9900.evil.example", "localhost:9900"),
            ("http://evil.example@localhost:9900", "localhost:9900"),
            ("http://localhost:9900/", "localhost:9900"),
            ("http://localhost:9900 http://evil.example", "localhost:9900"),
            ("localhost:9900", "localhost:9900"),
            ("file://", ""),
            ("chrome-extension://localhost:9900", "localhost:9900"),
        ] {
            assert!(!is_own_origin(origin.as_bytes(), authority), "{origin} {authority}");
        }
        assert!(!is_own_origin(b"http://\xff", "\u{fffd}"));
    }

    #[test]
    fn tokens_are_equal_as_a_whole() {
        assert!(is_same_token(b"secret", "secret"));
        for given in [&b""[..], b"secre", b"secrets", b"Secret", b"secret\0"] {
            assert!(!is_same_token(given, "secret"), "{given:?}");
        }
    }
}
