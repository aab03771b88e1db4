//! Why a request was not answered by its origin or the cache: classified once, here, it feeds the answer, the log and the metric.

use crate::http::body::BodyError;
use crate::http::h1::{LinkError, Refusal};
use crate::http::message::StatusCode;
use crate::label;
use crate::metrics::Label as _;

label! {
    /// The class of a failure.
    Kind, "kind", {
        NoRoute = "no_route",
        Forbidden = "forbidden",
        Limited = "limited",
        Unchecked = "unchecked",
        BreakerOpen = "breaker_open",
        Connect = "connect",
        ConnectTimeout = "connect_timeout",
        NoAnswer = "no_answer",
        Malformed = "malformed",
        Timeout = "timeout",
        Upstream = "upstream",
        OnlyIfCached = "only_if_cached",
        Client = "client",
        ClientGone = "client_gone",
        Panic = "panic",
    }
}

/// A request that did not get its answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no route matches")]
    NoRoute,
    /// The caller is on the list of those who get nothing.
    #[error("denied by the access list")]
    Forbidden,
    /// A limit denied it; which one, and for how long, its story tells.
    #[error("denied by a limit")]
    Limited,
    /// Too many bad tokens came before its own, which was not looked at.
    #[error("its token was not looked at")]
    Unchecked,
    #[error("circuit breaker is open")]
    BreakerOpen,
    /// The upstream failed before its answer began.
    #[error("upstream failed")]
    Link(#[from] LinkError),
    /// Another request for the same key, which this one waited for, failed so.
    #[error("the shared fill failed")]
    Shared(Kind),
    /// The body of the answer failed before anything of it had left.
    #[error("the answer's body failed")]
    Body(Kind),
    /// `only-if-cached`, and nothing was (RFC 9111 section 5.2.1.7).
    #[error("not cached")]
    OnlyIfCached,
    #[error("internal failure")]
    Panic,
}

impl Error {
    pub fn kind(&self) -> Kind {
        match self {
            Error::NoRoute => Kind::NoRoute,
            Error::Forbidden => Kind::Forbidden,
            Error::Limited => Kind::Limited,
            Error::Unchecked => Kind::Unchecked,
            Error::BreakerOpen => Kind::BreakerOpen,
            Error::OnlyIfCached => Kind::OnlyIfCached,
            Error::Panic => Kind::Panic,
            Error::Shared(kind) | Error::Body(kind) => *kind,
            Error::Link(link) => match link {
                LinkError::Connect(_) => Kind::Connect,
                LinkError::ConnectTimeout => Kind::ConnectTimeout,
                LinkError::NoAnswer(_) => Kind::NoAnswer,
                LinkError::Io(_) => Kind::Upstream,
                LinkError::Malformed(_) => Kind::Malformed,
                LinkError::Timeout => Kind::Timeout,
                LinkError::Client(_) => Kind::Client,
                LinkError::ClientGone => Kind::ClientGone,
            },
        }
    }

    /// Whether a stale answer or the route's page may stand in: something behind the gateway failed.
    pub fn is_degradable(&self) -> bool {
        matches!(
            self.kind(),
            Kind::BreakerOpen
                | Kind::Connect
                | Kind::ConnectTimeout
                | Kind::NoAnswer
                | Kind::Malformed
                | Kind::Timeout
                | Kind::Upstream
        )
    }

    /// The status where nothing else decides it.
    pub fn status(&self) -> StatusCode {
        if let Some(refusal) = self.refusal() {
            return refusal.status();
        }
        match self.kind() {
            Kind::NoRoute => StatusCode::NOT_FOUND,
            Kind::Forbidden => StatusCode::FORBIDDEN,
            Kind::Limited | Kind::Unchecked => StatusCode::TOO_MANY_REQUESTS,
            Kind::BreakerOpen => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Timeout | Kind::ConnectTimeout | Kind::OnlyIfCached => StatusCode::GATEWAY_TIMEOUT,
            Kind::Panic => StatusCode::INTERNAL_SERVER_ERROR,
            // 499 is nginx's name for it; nobody reads it but the log.
            Kind::ClientGone => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
            Kind::Client => StatusCode::BAD_REQUEST,
            Kind::Connect | Kind::NoAnswer | Kind::Malformed | Kind::Upstream => StatusCode::BAD_GATEWAY,
        }
    }

    /// How the client is refused whose request's body failed.
    pub fn refusal(&self) -> Option<Refusal> {
        let Error::Link(LinkError::Client(body)) = self else { return None };
        Some(match body {
            BodyError::TooLarge => Refusal::BodyTooLarge,
            BodyError::Timeout => Refusal::BodyTimeout,
            BodyError::Malformed(_) | BodyError::Truncated | BodyError::ClientGone | BodyError::Io(_) => {
                Refusal::BodySyntax
            }
        })
    }

    /// A short fixed word for clients.
    pub fn reason(&self) -> &'static str {
        self.refusal().map_or(self.kind().as_str(), Refusal::reason)
    }
}

impl From<&BodyError> for Error {
    fn from(error: &BodyError) -> Self {
        Error::Body(match error {
            BodyError::Malformed(_) => Kind::Malformed,
            BodyError::Timeout => Kind::Timeout,
            BodyError::ClientGone => Kind::ClientGone,
            BodyError::Truncated | BodyError::TooLarge | BodyError::Io(_) => Kind::Upstream,
        })
    }
}
