//! Listening so that as many connections as the load opens at once are all accepted.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// More than any load opens; the kernel caps it at net.core.somaxconn. std, tokio and mio ask for 128: beyond that, connections
/// wait a second for their SYN to be sent again, and the peer that opened them would be blamed.
const BACKLOG: i32 = 65_535;

/// A listener that does not block.
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
    fn connections_wait_until_they_are_accepted() {
        let listener = listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).expect("a port");
        assert_eq!(listener.accept().expect_err("nobody is there").kind(), io::ErrorKind::WouldBlock);
        let address = listener.local_addr().expect("an address");
        let clients: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(address).expect("room")).collect();
        assert!(clients.iter().all(|_| listener.accept().is_ok()));
    }
}
