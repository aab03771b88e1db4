//! Owns a way to a server that can be cut: connections through it end at once, and new ones are refused until it is mended. It can
//! also be slow: each connection then brings so many bytes a second.
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
    is_cut: Arc<watch::Sender<bool>>,
    pace: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let is_cut = Arc::new(watch::Sender::new(false));
        let cut = is_cut.clone();
        let pace = Arc::new(AtomicU64::new(0));
        let paced = pace.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut cut = cut.subscribe();
                if *cut.borrow_and_update() {
                    continue;
                }
                let pace = paced.load(Ordering::Relaxed);
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    let _set = (near.set_nodelay(true), far.set_nodelay(true));
                    let carry = async {
                        if pace == 0 {
                            _ = copy_bidirectional(&mut near, &mut far).await;
                        } else {
                            slowly(near, far, pace).await;
                        }
                    };
                    tokio::select! {
                        () = carry => {}
                        _ = cut.wait_for(|cut| *cut) => {}
                    }
                });
            }
        });
        Self { address, is_cut, pace, task }
    }

    /// From now on new connections bring so many bytes a second.
    pub(crate) fn pace(&self, bytes_per_second: u64) {
        self.pace.store(bytes_per_second, Ordering::Relaxed);
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub(crate) fn cut(&self) {
        self.is_cut.send_replace(true);
    }

    pub(crate) fn mend(&self) {
        self.is_cut.send_replace(false);
    }
}

async fn slowly(near: TcpStream, far: TcpStream, pace: u64) {
    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
    let up = copy(&mut from_near, &mut to_far);
    let down = async {
        let mut piece = vec![0; 64 << 10];
        while let Ok(bytes @ 1..) = from_far.read(&mut piece).await {
            if to_near.write_all(&piece[..bytes]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs_f64(bytes as f64 / pace as f64)).await;
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
