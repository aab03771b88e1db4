//! Owns a server that replies like Redis until it receives a certain command, and then sends bytes
//! without an end.
//!
//! Refuses to outlive its test.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Bytes that are sent once, and those that follow again and again.
#[derive(Clone, Copy)]
pub(crate) struct Flood {
    pub(crate) name: &'static str,
    pub(crate) first: &'static [u8],
    pub(crate) then: &'static [u8],
}

pub(crate) struct HostileServer {
    address: SocketAddr,
    dropped: Arc<AtomicUsize>,
    sent: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl HostileServer {
    /// `trigger`: the first words of the command, in capital letters.
    pub(crate) async fn start(trigger: &'static [&'static str], flood: Flood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let [dropped, sent] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let (counts, mut tasks) = ((dropped.clone(), sent.clone()), JoinSet::new());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (dropped, sent) = counts.clone();
                connections.spawn(async move {
                    if serve(stream, trigger, flood, &sent).await.is_none() {
                        dropped.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self { address, dropped, sent, _tasks: tasks }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections that the client closed while it was flooded.
    pub(crate) fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Bytes of the flood that were sent.
    pub(crate) fn sent(&self) -> usize {
        self.sent.load(Ordering::Relaxed)
    }
}

/// `None` if the client closed the connection during the flood.
async fn serve(stream: TcpStream, trigger: &[&str], flood: Flood, sent: &AtomicUsize) -> Option<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let Some(words) = command(&mut stream).await else { return Some(()) };
        let starts = words.len() >= trigger.len() && words.iter().zip(trigger).all(|(word, trigger)| word == trigger);
        let socket = stream.get_mut();
        if starts {
            let then = flood.then.repeat((64 << 10) / flood.then.len());
            socket.write_all(flood.first).await.ok()?;
            loop {
                socket.write_all(&then).await.ok()?;
                sent.fetch_add(then.len(), Ordering::Relaxed);
            }
        }
        let reply: &[u8] = match words.first().map(String::as_str) {
            Some("HELLO") => b"%1\r\n+proto\r\n:3\r\n",
            Some("TIME") => b"*2\r\n$10\r\n1800000000\r\n$1\r\n1\r\n",
            Some("GETRANGE") => b"$0\r\n\r\n",
            Some("XRANGE") => b"*0\r\n",
            Some("EXISTS") => b":0\r\n",
            Some("HGETALL") => b"%0\r\n",
            Some("HMGET") => b"*2\r\n$-1\r\n$-1\r\n",
            Some("ZRANGEBYSCORE") => b"*0\r\n",
            _ => b"+OK\r\n",
        };
        if socket.write_all(reply).await.is_err() {
            return Some(());
        }
    }
}

/// The words of the next command, in capital letters.
async fn command(stream: &mut BufReader<TcpStream>) -> Option<Vec<String>> {
    let mut line = String::new();
    stream.read_line(&mut line).await.ok()?;
    let count: usize = line.trim().strip_prefix('*')?.parse().ok()?;
    let mut words = Vec::new();
    for _ in 0..count {
        line.clear();
        stream.read_line(&mut line).await.ok()?;
        let length: usize = line.trim().strip_prefix('$')?.parse().ok()?;
        let mut word = vec![0; length + 2];
        stream.read_exact(&mut word).await.ok()?;
        words.push(String::from_utf8_lossy(&word[..length]).to_ascii_uppercase());
    }
    Some(words)
}
