//! The messages of a binary upgrade, and the connection that carries them with the descriptors.
//!
//! A message is one line of JSON; descriptors are attached to the first byte of its line
//! (`SCM_RIGHTS`). Invariant: neither a line nor the descriptors that wait for one are unbounded.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// Version of these messages. A successor of another version is refused.
pub(super) const PROTOCOL: u32 = 1;

/// Descriptors of one message: the kernel allows 253.
pub(super) const DESCRIPTORS_MAX: usize = 128;
/// Longest line; the longest message is a list of the indices of listeners.
const LINE_MAX: usize = 64 << 10;
/// Descriptors that may wait for their line: a peer sends the line with them.
const WAITING_MAX: usize = 2 * DESCRIPTORS_MAX;

/// The messages of an upgrade, in this order.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "message", rename_all = "snake_case")]
pub(super) enum UpgradeMessage {
    /// From the successor: it asks for the listeners.
    Hello { protocol: u32, version: String },
    /// To the successor, with `descriptors` descriptors: sockets of the listener `index`. A
    /// listener of many workers has several messages.
    Listener { index: usize, configured: SocketAddr, bound: SocketAddr, descriptors: usize },
    /// To the successor, with one descriptor.
    Admin { configured: SocketAddr, bound: SocketAddr },
    /// To the successor: all listeners have been sent.
    Complete { version: String },
    /// From the successor: it accepts connections of these listeners.
    Accepting { listeners: Vec<usize>, admin: bool },
    /// To the successor: the other process has stopped accepting, and drains.
    Draining,
    /// To the successor: the other process goes on as before.
    Refused { reason: String },
}

/// A connection between the two processes.
pub(super) struct UpgradeConnection {
    stream: UnixStream,
    received: Vec<u8>,
    descriptors: VecDeque<OwnedFd>,
}

impl UpgradeConnection {
    pub(super) fn new(stream: UnixStream) -> Self {
        UpgradeConnection { stream, received: Vec::new(), descriptors: VecDeque::new() }
    }

    /// For another runtime.
    pub(super) fn into_std(self) -> io::Result<std::os::unix::net::UnixStream> {
        self.stream.into_std()
    }

    pub(super) async fn send(&mut self, message: &UpgradeMessage) -> io::Result<()> {
        self.send_with(message, &[]).await
    }

    /// Sends a message with at most `DESCRIPTORS_MAX` sockets. Not cancel safe: a part of the line
    /// may have been sent.
    pub(super) async fn send_with(&mut self, message: &UpgradeMessage, sockets: &[TcpListener]) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
        let mut rest = &line[..];
        while !rest.is_empty() {
            let sent = self.stream.async_io(Interest::WRITABLE, || send_once(&self.stream, rest, &descriptors)).await?;
            rest = &rest[sent..];
            // Sent with the first bytes.
            descriptors.clear();
        }
        Ok(())
    }

    /// The next message; descriptors are taken with `take_sockets`. Cancel safe.
    ///
    /// # Errors
    /// The peer has closed the connection, or sent something else.
    pub(super) async fn receive(&mut self) -> io::Result<UpgradeMessage> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.received.len() > LINE_MAX || self.descriptors.len() > WAITING_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a message is too long"));
            }
            let (bytes, descriptors) = self.stream.async_io(Interest::READABLE, || receive_once(&self.stream)).await?;
            if bytes.is_empty() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other process closed the connection"));
            }
            self.received.extend(bytes);
            self.descriptors.extend(descriptors);
        }
    }

    /// The sockets of the last message.
    ///
    /// # Errors
    /// Fewer than `count` have arrived: the limit of descriptors of this process is too low. Or
    /// one is not a listening socket.
    pub(super) fn take_sockets(&mut self, count: usize) -> io::Result<Vec<TcpListener>> {
        if self.descriptors.len() < count {
            let problem = "descriptors were lost on the way; raise the limit of descriptors (ulimit -Hn)";
            return Err(io::Error::other(problem));
        }
        self.descriptors.drain(..count).map(as_listener).collect()
    }
}

fn as_listener(descriptor: OwnedFd) -> io::Result<TcpListener> {
    if !rustix::net::sockopt::socket_acceptconn(&descriptor)? {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a descriptor is not a listening socket"));
    }
    let listener = TcpListener::from(descriptor);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn send_once(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

fn receive_once(stream: &UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; 4 << 10];
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    bytes.truncate(received.bytes);
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok((bytes, rights.flatten().collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (UpgradeConnection, UpgradeConnection) {
        let (a, b) = UnixStream::pair().expect("sockets");
        (UpgradeConnection::new(a), UpgradeConnection::new(b))
    }

    #[tokio::test]
    async fn sockets_arrive_with_their_messages() {
        let sockets: Vec<TcpListener> =
            (0..3).map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
        let address = |socket: &TcpListener| socket.local_addr().expect("bound");
        let (mut a, mut b) = pair();
        let admin = |at| UpgradeMessage::Admin { configured: at, bound: at };
        // All lines are under way before the first is read.
        a.send(&UpgradeMessage::Hello { protocol: 1, version: "2".into() }).await.expect("sent");
        a.send_with(&admin(address(&sockets[0])), &sockets[..1]).await.expect("sent");
        a.send_with(&admin(address(&sockets[1])), &sockets[1..]).await.expect("sent");
        assert_eq!(b.receive().await.expect("received"), UpgradeMessage::Hello { protocol: 1, version: "2".into() });
        for (message, expected) in [&sockets[..1], &sockets[1..]].into_iter().enumerate() {
            assert_eq!(b.receive().await.expect("received"), admin(address(&sockets[message])));
            let received = b.take_sockets(expected.len()).expect("received");
            assert!(received.iter().map(address).eq(expected.iter().map(address)));
        }
        assert!(b.take_sockets(1).is_err());
        drop(a);
        assert_eq!(b.receive().await.expect_err("closed").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn other_descriptors_and_endless_lines_are_refused() {
        let (mut a, mut b) = pair();
        let connected = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let stream = std::net::TcpStream::connect(connected.local_addr().expect("bound")).expect("listening");
        let not_listening = TcpListener::from(OwnedFd::from(stream));
        a.send_with(&UpgradeMessage::Draining, &[not_listening]).await.expect("sent");
        b.receive().await.expect("received");
        assert!(b.take_sockets(1).is_err());
        let endless = async {
            while a.stream.async_io(Interest::WRITABLE, || send_once(&a.stream, &[b'x'; 4_096], &[])).await.is_ok() {}
        };
        tokio::select! {
            received = b.receive() => assert_eq!(received.expect_err("too long").kind(), io::ErrorKind::InvalidData),
            () = endless => panic!("the receiver reads"),
        }
    }
}
