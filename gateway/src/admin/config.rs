//! `[admin]`: address and token of the admin listener.

use std::net::{Ipv4Addr, SocketAddr};

/// Configuration of the admin listener (`[admin]`).
#[derive(Clone, Debug, PartialEq)]
pub struct AdminConfig {
    /// Address and port of the admin listener.
    pub address: SocketAddr,
    /// Bearer token that `/api` requires. Without one, `/api` accepts loopback peers only.
    pub(crate) token: Option<String>,
}

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { address: SocketAddr::from((Ipv4Addr::LOCALHOST, 9900)), token: None }
    }
}
