//! The failure of one attempt to get a response, as data that every decision after it reads.

use std::sync::Arc;

use crate::endpoint::Endpoint;
use crate::http::attempt::UpstreamConnectionError;
use crate::http::exchange_clock::Blame;

/// Why an attempt to get a response from an endpoint failed.
#[derive(Debug)]
pub(crate) struct AttemptError {
    /// The endpoint; `None` if the upstream has none.
    pub(crate) endpoint: Option<Arc<str>>,
    pub(crate) error: UpstreamConnectionError,
    /// Whether the failure is proof of a fault of the upstream. One that fails before the client
    /// has delivered its whole request may have waited for the client.
    pub(crate) is_verdict: bool,
    /// Whether the failure is that of one endpoint that is out of use while others are not, or that
    /// there is no endpoint to call: it is no verdict about the upstream.
    pub(crate) is_outlier: bool,
    /// Whether the endpoint may have got any byte of the request.
    pub(crate) request_sent: bool,
}

impl AttemptError {
    /// There is no endpoint: the source has said so, or it has never answered, and nothing was
    /// called. A breaker that counted this would reject calls after the first endpoint has come.
    pub(super) fn no_endpoint(error: UpstreamConnectionError) -> Self {
        AttemptError { is_outlier: true, ..AttemptError::unsent(None, error) }
    }

    /// A failure before any byte of the request was sent.
    pub(super) fn unsent(endpoint: Option<&Endpoint>, error: UpstreamConnectionError) -> Self {
        AttemptError {
            endpoint: endpoint.map(|endpoint| Arc::clone(&endpoint.name)),
            is_verdict: error.blame() == Blame::Upstream,
            is_outlier: false,
            request_sent: false,
            error,
        }
    }
}
