//! Owns a TCP proxy in front of a server. It can be disconnected: open connections end at once, and
//! new ones are closed until it is restored. It can be stalled: connections stay open, and what is
//! sent is lost. It can also be slow: each new connection then transfers a limited number of bytes
//! per second.
//!
//! Refuses to outlive its test.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub(crate) struct Proxy {
    address: SocketAddr,
    is_disconnected: Arc<watch::Sender<bool>>,
    is_stalled: Arc<watch::Sender<bool>>,
    bytes_per_second: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let is_disconnected = Arc::new(watch::Sender::new(false));
        let disconnected = is_disconnected.clone();
        let is_stalled = Arc::new(watch::Sender::new(false));
        let stalled = is_stalled.clone();
        let bytes_per_second = Arc::new(AtomicU64::new(0));
        let limit = bytes_per_second.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let mut disconnected = disconnected.subscribe();
                if *disconnected.borrow_and_update() {
                    continue;
                }
                let mut stalled = stalled.subscribe();
                let bytes_per_second = limit.load(Ordering::Relaxed);
                tokio::spawn(async move {
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let _set = (client.set_nodelay(true), server.set_nodelay(true));
                    let relay = async {
                        if bytes_per_second == 0 {
                            _ = copy_bidirectional(&mut client, &mut server).await;
                        } else {
                            relay_slowly(client, server, bytes_per_second).await;
                        }
                    };
                    let relay = async {
                        // Kept while the connection is stalled: it owns the sockets.
                        let mut relay = std::pin::pin!(relay);
                        let is_stalled = tokio::select! {
                            () = &mut relay => false,
                            _ = stalled.wait_for(|stalled| *stalled) => true,
                        };
                        if is_stalled {
                            std::future::pending::<()>().await;
                        }
                    };
                    tokio::select! {
                        () = relay => {}
                        _ = disconnected.wait_for(|disconnected| *disconnected) => {}
                    }
                });
            }
        });
        Self { address, is_disconnected, is_stalled, bytes_per_second, task }
    }

    /// Limits the bandwidth of new connections.
    pub(crate) fn limit_bandwidth(&self, bytes_per_second: u64) {
        self.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub(crate) fn disconnect(&self) {
        self.is_disconnected.send_replace(true);
    }

    pub(crate) fn stall(&self) {
        self.is_stalled.send_replace(true);
    }

    pub(crate) fn restore(&self) {
        self.is_stalled.send_replace(false);
        self.is_disconnected.send_replace(false);
    }
}

async fn relay_slowly(client: TcpStream, server: TcpStream, bytes_per_second: u64) {
    let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
        (client.into_split(), server.into_split());
    let up = copy(&mut from_client, &mut to_server);
    let down = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(bytes @ 1..) = from_server.read(&mut buffer).await {
            if to_client.write_all(&buffer[..bytes]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64)).await;
        }
    };
    tokio::select! {
        _ = up => {}
        () = down => {}
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}
