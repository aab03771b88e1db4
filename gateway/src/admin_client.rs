//! The way from the command to the admin address of a gateway that runs.

use std::net::SocketAddr;
use std::time::Duration;

use crate::purge::Order;

/// Longer than a gateway waits for the others of its fleet.
const PATIENCE: Duration = Duration::from_secs(30);
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// Why a gateway could not be asked, or refused.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no gateway answers at {address}: {why}; is it running, and is this its `admin.address`?")]
    Unreachable { address: SocketAddr, why: String },
    #[error("the gateway wants its token: set ADMIN_TOKEN to its `admin.token`")]
    Token,
    #[error("the gateway refused: {0}")]
    Refused(String),
    #[error("what answers at {0} is no gateway of this version")]
    Foreign(SocketAddr),
}

/// Gives the order to the gateway at `address`; what came of it, as the admin address tells it.
pub fn purge(address: SocketAddr, token: Option<&str>, order: &Order) -> Result<serde_json::Value, ClientError> {
    let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false).proxy(None);
    let agent = ureq::Agent::new_with_config(config.build());
    let mut request = agent.post(format!("http://{address}/api/v1/purge?{}", order.query()));
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let unreachable = |error: ureq::Error| ClientError::Unreachable { address, why: error.to_string() };
    let mut answer = request.send_empty().map_err(unreachable)?;
    let text = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string().map_err(unreachable)?;
    match answer.status().as_u16() {
        200 | 202 => serde_json::from_str(&text).map_err(|_not_json| ClientError::Foreign(address)),
        401 => Err(ClientError::Token),
        400 | 403 | 503 => Err(ClientError::Refused(text.trim_end().to_owned())),
        _ => Err(ClientError::Foreign(address)),
    }
}
