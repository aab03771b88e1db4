//! Failures of requests that neither the origin nor the cache answered. The classification feeds
//! the response, the log and the metric.

use crate::http::attempt::UpstreamConnectionError;
use crate::http::body::BodyError;
use crate::http::exchange_clock::{Blame, ExchangeTimeout};
use crate::http::h1::RequestRefusal;
use crate::http::message::StatusCode;
use crate::http::tls_fault::TlsFaultClass;
use crate::label;
use crate::metrics::Label as _;

label! {
    /// The class of a failure: the metric's label and the `reason` for clients.
    pub(crate) ErrorKind, "kind", {
        NoRoute = "no_route",
        Misdirected = "misdirected",
        Forbidden = "forbidden",
        Limited = "limited",
        VerificationThrottled = "verification_throttled",
        Unauthorized = "unauthorized",
        AuthenticationThrottled = "authentication_throttled",
        AuthenticationBusy = "authentication_busy",
        VerificationUnavailable = "verification_unavailable",
        BreakerOpen = "breaker_open",
        ConcurrencyLimit = "concurrency_limit",
        Connect = "connect",
        NoAddress = "no_address",
        NoEndpoints = "no_endpoints",
        /// The certificate of the upstream is not accepted.
        UpstreamTls = "upstream_tls",
        /// The upstream has ended the handshake with an alert.
        UpstreamTlsAlert = "upstream_tls_alert",
        /// The upstream does not speak TLS, or has closed the connection in the handshake.
        UpstreamTlsProtocol = "upstream_tls_protocol",
        ConnectTimeout = "connect_timeout",
        NoResponse = "no_response",
        Malformed = "malformed",
        Timeout = "timeout",
        TotalTimeout = "total_timeout",
        Upstream = "upstream",
        NotSwitched = "not_switched",
        SharedFetchTimeout = "shared_fetch_timeout",
        SlowReader = "slow_reader",
        OnlyIfCached = "only_if_cached",
        ClientBody = "client_body",
        ClientGone = "client_gone",
        Panic = "panic",
    }
}

/// Why a request did not get a response from its origin or the cache.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no route matches")]
    NoRoute,
    /// The authority has another certificate than the connection.
    #[error("the connection is that of another server")]
    Misdirected,
    /// The caller is on the deny list.
    #[error("denied by the access list")]
    Forbidden,
    /// A limit denied the request. The `RequestRecord` holds the rule and the wait.
    #[error("denied by a limit")]
    Limited,
    /// Its token was not verified: too many invalid tokens came before it.
    #[error("token verification is throttled")]
    VerificationThrottled,
    /// The request has not the credentials that its route demands.
    #[error("not authenticated")]
    Unauthorized,
    /// Its password was not verified: too many wrong ones came from its address.
    #[error("authentication is throttled")]
    AuthenticationThrottled,
    /// Its password was not verified: too many wait for their verification.
    #[error("too many passwords wait for their verification")]
    AuthenticationBusy,
    /// The verification service of the route has no answer.
    #[error("the verification service has no answer")]
    VerificationUnavailable,
    #[error("circuit breaker is open")]
    BreakerOpen,
    /// The upstream has as many calls in progress as it can serve, and too many wait.
    #[error("the upstream has too many calls in progress")]
    ConcurrencyLimit,
    /// The upstream failed before its response began.
    #[error("upstream failed")]
    UpstreamConnection(#[from] UpstreamConnectionError),
    /// A 2xx response to an extended CONNECT from a server that has not switched protocols: the
    /// client would take its body for bytes of the tunnel.
    #[error("the protocol was not switched")]
    NotSwitched,
    /// The fetch of another request for the same key, which this request joined, failed.
    #[error("the shared fetch failed")]
    SharedFetch(ErrorKind),
    /// The fetch of another request, which this request joined, has no result after two attempts'
    /// time.
    #[error("the shared fetch has no result in time")]
    SharedFetchTimeout,
    /// The response body failed before any byte was sent to the client.
    #[error("the response body failed")]
    ResponseBody(ErrorKind),
    /// `only-if-cached` without a usable stored response (RFC 9111 section 5.2.1.7).
    #[error("not cached")]
    OnlyIfCached,
    #[error("internal failure")]
    Panic,
}

impl ErrorKind {
    /// The status of the response, unless a refusal or the route's page has another one.
    fn status(self) -> StatusCode {
        match self {
            ErrorKind::NoRoute => StatusCode::NOT_FOUND,
            ErrorKind::Misdirected => StatusCode::MISDIRECTED_REQUEST,
            ErrorKind::Forbidden => StatusCode::FORBIDDEN,
            ErrorKind::Unauthorized => StatusCode::UNAUTHORIZED,
            ErrorKind::Limited | ErrorKind::VerificationThrottled | ErrorKind::AuthenticationThrottled => {
                StatusCode::TOO_MANY_REQUESTS
            }
            ErrorKind::BreakerOpen
            | ErrorKind::ConcurrencyLimit
            | ErrorKind::NoEndpoints
            | ErrorKind::SlowReader
            | ErrorKind::VerificationUnavailable
            | ErrorKind::AuthenticationBusy => StatusCode::SERVICE_UNAVAILABLE,
            ErrorKind::Timeout
            | ErrorKind::TotalTimeout
            | ErrorKind::ConnectTimeout
            | ErrorKind::SharedFetchTimeout
            | ErrorKind::OnlyIfCached => StatusCode::GATEWAY_TIMEOUT,
            ErrorKind::Panic => StatusCode::INTERNAL_SERVER_ERROR,
            // nginx's 499, for the log only: the client has closed the connection.
            ErrorKind::ClientGone => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
            ErrorKind::ClientBody => StatusCode::BAD_REQUEST,
            ErrorKind::Connect
            | ErrorKind::NoAddress
            | ErrorKind::UpstreamTls
            | ErrorKind::UpstreamTlsAlert
            | ErrorKind::UpstreamTlsProtocol
            | ErrorKind::NoResponse
            | ErrorKind::Malformed
            | ErrorKind::Upstream
            | ErrorKind::NotSwitched => StatusCode::BAD_GATEWAY,
        }
    }

    /// Whether a response of the gateway to a request with a route, or without one, can have
    /// `status`, unless `degrade.status` names it.
    pub(crate) fn is_answered_with(status: StatusCode) -> bool {
        // That of `ClientGone` is for the log only.
        let mut kinds = ErrorKind::ALL.iter().filter(|kind| **kind != ErrorKind::ClientGone);
        let mut refusals = RequestRefusal::ALL.iter().filter(|refusal| refusal.is_of_body());
        kinds.any(|kind| kind.status() == status) || refusals.any(|refusal| refusal.status() == status)
    }

    /// The side that is responsible for the failure.
    pub(crate) fn blame(self) -> Blame {
        match self {
            ErrorKind::NoRoute
            | ErrorKind::Misdirected
            | ErrorKind::Forbidden
            | ErrorKind::Limited
            | ErrorKind::VerificationThrottled
            | ErrorKind::Unauthorized
            | ErrorKind::AuthenticationThrottled
            | ErrorKind::OnlyIfCached
            | ErrorKind::SlowReader
            | ErrorKind::ClientBody
            | ErrorKind::ClientGone => Blame::Client,
            ErrorKind::BreakerOpen
            | ErrorKind::ConcurrencyLimit
            | ErrorKind::AuthenticationBusy
            | ErrorKind::TotalTimeout
            | ErrorKind::SharedFetchTimeout
            | ErrorKind::Panic => Blame::Gateway,
            ErrorKind::Connect
            | ErrorKind::NoAddress
            | ErrorKind::NoEndpoints
            | ErrorKind::UpstreamTls
            | ErrorKind::UpstreamTlsAlert
            | ErrorKind::UpstreamTlsProtocol
            | ErrorKind::ConnectTimeout
            | ErrorKind::NoResponse
            | ErrorKind::Malformed
            | ErrorKind::Timeout
            | ErrorKind::Upstream
            | ErrorKind::VerificationUnavailable
            | ErrorKind::NotSwitched => Blame::Upstream,
        }
    }
}

impl Error {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Error::NoRoute => ErrorKind::NoRoute,
            Error::Misdirected => ErrorKind::Misdirected,
            Error::Forbidden => ErrorKind::Forbidden,
            Error::Limited => ErrorKind::Limited,
            Error::VerificationThrottled => ErrorKind::VerificationThrottled,
            Error::Unauthorized => ErrorKind::Unauthorized,
            Error::AuthenticationThrottled => ErrorKind::AuthenticationThrottled,
            Error::AuthenticationBusy => ErrorKind::AuthenticationBusy,
            Error::VerificationUnavailable => ErrorKind::VerificationUnavailable,
            Error::BreakerOpen => ErrorKind::BreakerOpen,
            Error::ConcurrencyLimit => ErrorKind::ConcurrencyLimit,
            Error::NotSwitched => ErrorKind::NotSwitched,
            Error::OnlyIfCached => ErrorKind::OnlyIfCached,
            Error::Panic => ErrorKind::Panic,
            Error::SharedFetchTimeout => ErrorKind::SharedFetchTimeout,
            Error::SharedFetch(kind) | Error::ResponseBody(kind) => *kind,
            Error::UpstreamConnection(error) => match error {
                UpstreamConnectionError::Connect(_) => ErrorKind::Connect,
                UpstreamConnectionError::NoAddress => ErrorKind::NoAddress,
                UpstreamConnectionError::NoEndpoints => ErrorKind::NoEndpoints,
                UpstreamConnectionError::Tls(fault, _) => match fault.class() {
                    TlsFaultClass::Certificate => ErrorKind::UpstreamTls,
                    TlsFaultClass::Alert => ErrorKind::UpstreamTlsAlert,
                    TlsFaultClass::Protocol => ErrorKind::UpstreamTlsProtocol,
                    TlsFaultClass::Connection => ErrorKind::NoResponse,
                },
                UpstreamConnectionError::Ended(_)
                | UpstreamConnectionError::NoResponse(_)
                | UpstreamConnectionError::Refused(_)
                | UpstreamConnectionError::Reset(_) => ErrorKind::NoResponse,
                UpstreamConnectionError::Io(_) => ErrorKind::Upstream,
                UpstreamConnectionError::Malformed(_) => ErrorKind::Malformed,
                UpstreamConnectionError::Timeout(timeout) => timeout_kind(*timeout),
                UpstreamConnectionError::ClientStopped(_)
                | UpstreamConnectionError::Client(_)
                | UpstreamConnectionError::Unsendable(_) => ErrorKind::ClientBody,
                UpstreamConnectionError::ClientGone => ErrorKind::ClientGone,
            },
        }
    }

    /// Whether a stale response or the route's page may replace the response: the failure is behind
    /// the gateway.
    pub(crate) fn is_degradable(&self) -> bool {
        matches!(
            self.kind(),
            ErrorKind::BreakerOpen
                | ErrorKind::ConcurrencyLimit
                | ErrorKind::Connect
                | ErrorKind::NoAddress
                | ErrorKind::NoEndpoints
                | ErrorKind::UpstreamTls
                | ErrorKind::UpstreamTlsAlert
                | ErrorKind::UpstreamTlsProtocol
                | ErrorKind::ConnectTimeout
                | ErrorKind::NoResponse
                | ErrorKind::Malformed
                | ErrorKind::Timeout
                | ErrorKind::TotalTimeout
                | ErrorKind::Upstream
                | ErrorKind::SharedFetchTimeout
                | ErrorKind::SlowReader
        )
    }

    /// The status, unless the route's page sets another one.
    pub(crate) fn status(&self) -> StatusCode {
        if let Some(refusal) = self.refusal() {
            return refusal.status();
        }
        self.kind().status()
    }

    /// The refusal for a failed request body.
    pub(crate) fn refusal(&self) -> Option<RequestRefusal> {
        let body = match self {
            Error::UpstreamConnection(UpstreamConnectionError::Client(body)) => body,
            Error::UpstreamConnection(UpstreamConnectionError::ClientStopped(_)) => {
                return Some(RequestRefusal::BodyTimeout);
            }
            _ => return None,
        };
        Some(match body {
            BodyError::TooLarge => RequestRefusal::BodyTooLarge,
            BodyError::Timeout(_) => RequestRefusal::BodyTimeout,
            BodyError::Malformed(_) => RequestRefusal::BodySyntax,
            BodyError::Stream(refusal) => *refusal,
            // The client has closed its connection, or its sending side: it may still read.
            BodyError::Truncated
            | BodyError::Reset(_)
            | BodyError::ClientGone
            | BodyError::Detached
            | BodyError::Io(_) => RequestRefusal::BodyTruncated,
        })
    }

    /// A fixed word for clients.
    pub(crate) fn reason(&self) -> &'static str {
        self.refusal().map_or(self.kind().as_str(), RequestRefusal::reason)
    }
}

/// The class of a timeout of an exchange with an upstream.
fn timeout_kind(timeout: ExchangeTimeout) -> ErrorKind {
    match timeout {
        ExchangeTimeout::ClientBody | ExchangeTimeout::ClientRead => ErrorKind::ClientBody,
        ExchangeTimeout::UpstreamConnect => ErrorKind::ConnectTimeout,
        ExchangeTimeout::UpstreamSend
        | ExchangeTimeout::UpstreamHead
        | ExchangeTimeout::UpstreamBody
        | ExchangeTimeout::EventStream => ErrorKind::Timeout,
        ExchangeTimeout::Total => ErrorKind::TotalTimeout,
    }
}

impl From<&BodyError> for Error {
    fn from(error: &BodyError) -> Self {
        Error::ResponseBody(match error {
            BodyError::Malformed(_) => ErrorKind::Malformed,
            BodyError::Timeout(timeout) => timeout_kind(*timeout),
            BodyError::ClientGone | BodyError::Stream(_) => ErrorKind::ClientGone,
            BodyError::Detached => ErrorKind::SlowReader,
            BodyError::Truncated | BodyError::Reset(_) | BodyError::TooLarge | BodyError::Io(_) => ErrorKind::Upstream,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_and_slow_readers_of_shared_fetches_are_not_blamed_on_the_upstream() {
        let timeout = Error::SharedFetchTimeout.kind();
        assert_eq!((timeout.as_str(), timeout.blame()), ("shared_fetch_timeout", Blame::Gateway));
        let slow = Error::from(&BodyError::Detached).kind();
        assert_eq!((slow.as_str(), slow.blame()), ("slow_reader", BodyError::Detached.blame()));
    }
}
