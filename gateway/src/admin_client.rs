//! HTTP client of the commands `purge` and `top` for the admin API of a running gateway.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use crate::purge::PurgeOrder;

/// Exceeds the time for which a gateway waits for acknowledgements of the fleet.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout of a request that waits for nothing.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// The state of a gateway with 200 routes and several hundred endpoints is about 300 KB.
const RESPONSE_BYTES_MAX: u64 = 16 << 20;

/// Failure of an admin API request.
#[derive(Debug, thiserror::Error)]
pub enum AdminClientError {
    #[error("cannot reach a gateway at {address}: {reason}; is it running, and is this its `admin.address`?")]
    Unreachable { address: SocketAddr, reason: String },
    #[error("the gateway requires a token: set ADMIN_TOKEN to its `admin.token`")]
    TokenMissing,
    #[error("the token is not that of the gateway: ADMIN_TOKEN or --token differs from its `admin.token`")]
    TokenWrong,
    #[error("the gateway rejected the request: {0}")]
    Rejected(String),
    #[error("the server at {0} is not a gateway of this version")]
    UnexpectedResponse(SocketAddr),
}

/// The admin address in `text`: `HOST:PORT`, or the URL of the dashboard as the gateway prints it.
///
/// # Errors
/// The fault of the text.
pub fn parse_address(text: &str) -> Result<SocketAddr, String> {
    let address = text.strip_prefix("http://").map_or(text, |rest| rest.split('/').next().unwrap_or_default());
    let resolved = address.to_socket_addrs().map_err(|error| format!("{error}; such as 127.0.0.1:9900"))?;
    // A gateway listens on IPv4 by default; a name often has addresses of both families.
    let mut addresses: Vec<SocketAddr> = resolved.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.first().copied().ok_or_else(|| "the name has no address".to_owned())
}

/// Sends the order to the gateway at `address` and returns the JSON outcome.
pub fn purge(
    address: SocketAddr,
    token: Option<&str>,
    order: &PurgeOrder,
) -> Result<serde_json::Value, AdminClientError> {
    let request = agent(TIMEOUT).post(format!("http://{address}/api/v1/purge?{}", order.to_query()));
    read((address, token), authorize(request, token).send_empty())
}

/// The content of the dashboard of the gateway at `address`.
pub fn dashboard(address: SocketAddr, token: Option<&str>) -> Result<serde_json::Value, AdminClientError> {
    let request = agent(READ_TIMEOUT).get(format!("http://{address}/api/v1/dashboard"));
    read((address, token), authorize(request, token).call())
}

fn agent(timeout: Duration) -> ureq::Agent {
    let config = ureq::Agent::config_builder().timeout_global(Some(timeout)).http_status_as_error(false).proxy(None);
    ureq::Agent::new_with_config(config.build())
}

fn authorize<B>(request: ureq::RequestBuilder<B>, token: Option<&str>) -> ureq::RequestBuilder<B> {
    match token {
        Some(token) => request.header("authorization", format!("Bearer {token}")),
        None => request,
    }
}

fn read(
    (address, token): (SocketAddr, Option<&str>),
    response: Result<http::Response<ureq::Body>, ureq::Error>,
) -> Result<serde_json::Value, AdminClientError> {
    let unreachable = |error: ureq::Error| AdminClientError::Unreachable { address, reason: error.to_string() };
    let mut response = response.map_err(unreachable)?;
    let text = response.body_mut().with_config().limit(RESPONSE_BYTES_MAX).read_to_string().map_err(unreachable)?;
    match response.status().as_u16() {
        200 | 202 => serde_json::from_str(&text).map_err(|_not_json| AdminClientError::UnexpectedResponse(address)),
        401 if token.is_some() => Err(AdminClientError::TokenWrong),
        401 => Err(AdminClientError::TokenMissing),
        400 | 403 | 429 | 503 => Err(AdminClientError::Rejected(text.trim_end().to_owned())),
        _ => Err(AdminClientError::UnexpectedResponse(address)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admin_address_is_an_address_a_name_or_a_url() {
        let address = SocketAddr::from(([127, 0, 0, 1], 9900));
        for text in ["127.0.0.1:9900", "http://127.0.0.1:9900/", "http://127.0.0.1:9900", "localhost:9900"] {
            assert_eq!(parse_address(text), Ok(address), "{text}");
        }
        for text in ["", "9900", "127.0.0.1", "https://127.0.0.1:9900"] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }
}
