//! HTTP client of the `purge` command for the admin API of a running gateway.

use std::net::SocketAddr;
use std::time::Duration;

use crate::purge::PurgeOrder;

/// Exceeds the time for which a gateway waits for acknowledgements of the fleet.
const TIMEOUT: Duration = Duration::from_secs(30);
const RESPONSE_BYTES_MAX: u64 = 1 << 20;

/// Failure of an admin API request.
#[derive(Debug, thiserror::Error)]
pub enum AdminClientError {
    #[error("cannot reach a gateway at {address}: {reason}; is it running, and is this its `admin.address`?")]
    Unreachable { address: SocketAddr, reason: String },
    #[error("the gateway requires a token: set ADMIN_TOKEN to its `admin.token`")]
    Unauthorized,
    #[error("the gateway rejected the request: {0}")]
    Rejected(String),
    #[error("the server at {0} is not a gateway of this version")]
    UnexpectedResponse(SocketAddr),
}

/// Sends the order to the gateway at `address` and returns the JSON outcome.
pub fn purge(
    address: SocketAddr,
    token: Option<&str>,
    order: &PurgeOrder,
) -> Result<serde_json::Value, AdminClientError> {
    let config = ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).proxy(None);
    let agent = ureq::Agent::new_with_config(config.build());
    let mut request = agent.post(format!("http://{address}/api/v1/purge?{}", order.to_query()));
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let unreachable = |error: ureq::Error| AdminClientError::Unreachable { address, reason: error.to_string() };
    let mut response = request.send_empty().map_err(unreachable)?;
    let text = response.body_mut().with_config().limit(RESPONSE_BYTES_MAX).read_to_string().map_err(unreachable)?;
    match response.status().as_u16() {
        200 | 202 => serde_json::from_str(&text).map_err(|_not_json| AdminClientError::UnexpectedResponse(address)),
        401 => Err(AdminClientError::Unauthorized),
        400 | 403 | 503 => Err(AdminClientError::Rejected(text.trim_end().to_owned())),
        _ => Err(AdminClientError::UnexpectedResponse(address)),
    }
}
