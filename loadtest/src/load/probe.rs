//! One request before a load, so that a wrong URL is an error at once.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use crate::error::{LoadtestError, Result};
use crate::load::connection::LoadConnection;
use crate::load::response_reader::{Keep, ResponseReader};
use crate::load::target::LoadTarget;

/// Time of the first connection and its response, beyond the timeout of the load: a service may
/// start lazily.
const PATIENCE: Duration = Duration::from_secs(5);

/// Fails if the target cannot be reached or does not respond with a status below 400.
pub(crate) fn check(target: &LoadTarget, response_timeout: Duration) -> Result<()> {
    let url = &target.url;
    let unreachable = || LoadtestError::io(format!("{url} cannot be reached; is the service running?"));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(LoadtestError::io("no runtime"))?;
    let exchange = async {
        let address = target.addresses.select(0).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut connection = LoadConnection::open(address, target.tls.as_ref()).await?;
        let mut response = ResponseReader::new(Keep::Status, target.is_head);
        connection.exchange(&target.requests[0], &mut response).await?;
        Ok::<u16, io::Error>(response.status)
    };
    let result = runtime.block_on(async { timeout(PATIENCE.max(response_timeout), exchange).await });
    match result {
        Err(_) => Err(LoadtestError::Load(format!("{url} does not respond within {PATIENCE:?}"))),
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => Err(LoadtestError::Load(format!(
            "{url}: {error}; `https://` is for a service with a trusted certificate (--ca FILE adds one), `http://` for one \
             without TLS"
        ))),
        Ok(Err(error)) => Err(unreachable()(error)),
        Ok(Ok(status)) if status >= 400 => Err(LoadtestError::Load(format!(
            "{url} responds with status {status}: a load needs responses below 400; check the path, --header and --method"
        ))),
        Ok(Ok(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn service_that_is_not_there_is_named() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        let target = LoadTarget::plain(address, &["/".to_owned()], "");
        let fault = check(&target, Duration::from_secs(1)).expect_err("nothing listens").to_string();
        assert!(fault.contains(&address.to_string()) && fault.contains("is the service running?"), "{fault}");
    }
}
