//! Listens with a backlog that holds all connections that the load opens at once.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// More than any load opens; the kernel caps it at net.core.somaxconn. std, tokio and mio use 128:
/// beyond that, connections wait 1 s for a retransmitted SYN, which would be attributed to the
/// peer.
const BACKLOG: i32 = 65_535;

/// Returns a non-blocking listener.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpStream};

    use super::*;

    #[test]
    fn connections_queue_until_they_are_accepted() {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port");
        assert_eq!(listener.accept().expect_err("no client has connected").kind(), io::ErrorKind::WouldBlock);
        let address = listener.local_addr().expect("an address");
        let clients: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(address).expect("room")).collect();
        assert!(clients.iter().all(|_| listener.accept().is_ok()));
    }
}
