//! Free addresses of this machine, for servers that are about to start.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};

use crate::error::{LoadtestError, Result};

/// Free loopback addresses. All ports are bound at the same time, so that they differ.
pub(crate) fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(LoadtestError::io("no free port"));
    let listeners: Vec<TcpListener> = (0..N).map(|_| bind()).collect::<Result<_>>()?;
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for (address, listener) in addresses.iter_mut().zip(&listeners) {
        *address = listener.local_addr().map_err(LoadtestError::io("a listener without address"))?;
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_addresses_differ() {
        let [one, other] = free_addresses().expect("two ports");
        assert_ne!(one, other);
    }
}
