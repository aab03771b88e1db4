//! The server in front of the origin where that is to speak TLS or HTTP/2: HAProxy on the core of
//! the load. Its cost is that of the load, and the same for all peers.

use std::net::SocketAddr;
use std::time::Duration;

use crate::bench::workload::OriginProtocol;
use crate::error::Result;
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::template::fill_template;
use crate::process::tools::{LOAD_CORE, Tool, Tools};
use crate::servers::certificate::ServerCertificate;
use crate::servers::free_address::free_addresses;

const FRONT: &str = include_str!("../../peers/origin-front.cfg");
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The origin of a workload, for the server in front of it.
pub(crate) struct OriginFront<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a ScratchDirectory,
    pub(crate) origin: SocketAddr,
}

impl OriginFront<'_> {
    /// Starts the server and returns it with its address; `None` if the origin needs none.
    pub(crate) fn start(
        &self,
        protocol: OriginProtocol,
        certificate: Option<&ServerCertificate>,
    ) -> Result<Option<(ChildProcess, SocketAddr)>> {
        let bind = match (protocol, certificate) {
            (OriginProtocol::Plain, _) => return Ok(None),
            (OriginProtocol::H2c, _) => " proto h2".to_owned(),
            (OriginProtocol::Tls, certificate) => {
                let both = certificate.map(|certificate| certificate.both.display().to_string()).unwrap_or_default();
                format!(" ssl crt {both} alpn http/1.1")
            }
        };
        let [address] = free_addresses()?;
        let values = [("LISTEN", address.to_string()), ("BIND", bind), ("ORIGIN", self.origin.to_string())];
        let text = fill_template(FRONT, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("origin-front.cfg", &text)?;
        let mut command = self.tools.pinned(LOAD_CORE, self.tools.path(Tool::Haproxy));
        command.arg("-db").arg("-f").arg(file);
        let mut process = ChildProcess::start("origin-front", command, self.scratch)?;
        process.await_ready(START_TIMEOUT, || std::net::TcpStream::connect(address).is_ok())?;
        Ok(Some((process, address)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn template_has_no_unfilled_placeholder() {
        let filled = fill_template(FRONT, &["LISTEN", "BIND", "ORIGIN"].map(|name| (name, "x")));
        assert_eq!(filled.replace("@NAME@", "").matches('@').count(), 0, "{filled}");
    }
}
