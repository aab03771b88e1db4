//! An HTTP/2 origin that runs a function for each stream, in clear text or over TLS.

use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{self, Connection, SendResponse};
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Barrier, Notify};
use tokio_rustls::TlsAcceptor;

use super::lock;

/// A stream as the origin gets it.
pub struct H2Stream {
    /// Index of its connection, from 0.
    pub connection: usize,
    pub request: http::Request<RecvStream>,
    pub respond: SendResponse<Bytes>,
    pub control: H2Control,
}

/// Ends connections of the origin.
#[derive(Clone)]
pub struct H2Control {
    /// Notified: the connection sends GOAWAY and ends after its streams.
    pub drain: Arc<Notify>,
    /// Notified: the connection ends at once.
    pub abort: Arc<Notify>,
}

impl H2Stream {
    /// Reads the whole request body. `None` if the stream was reset.
    pub async fn body(&mut self) -> Option<Vec<u8>> {
        let mut body = Vec::new();
        while let Some(data) = self.request.body_mut().data().await {
            let data = data.ok()?;
            drop(self.request.body_mut().flow_control().release_capacity(data.len()));
            body.extend_from_slice(&data);
        }
        Some(body)
    }

    /// Sends a response with a body.
    pub fn reply(&mut self, status: u16, body: impl Into<Bytes>) {
        let response = http::Response::builder().status(status).body(()).expect("a response");
        let body = body.into();
        let Ok(mut stream) = self.respond.send_response(response, body.is_empty()) else { return };
        if !body.is_empty() {
            drop(stream.send_data(body, true));
        }
    }
}

/// The head of a request that the origin has received.
#[derive(Clone, Debug)]
pub struct SeenRequest {
    pub connection: usize,
    pub method: String,
    pub uri: String,
    pub headers: http::HeaderMap,
}

/// An origin on its own port, whose connections run on a thread of its own.
pub struct H2Origin {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<SeenRequest>>>,
    connections: Arc<AtomicUsize>,
    running: Arc<AtomicUsize>,
    stop: Arc<Notify>,
}

/// How an origin behaves.
#[derive(Clone, Default)]
pub struct H2OriginOptions {
    pub max_streams: Option<u32>,
    pub tls: Option<Arc<ServerConfig>>,
    pub connect_protocol: bool,
    /// Bytes of one request body that are accepted before the origin reads them.
    pub window: Option<u32>,
    /// Connections wait for each other here before the origin sends its settings.
    pub before_settings: Option<Arc<Barrier>>,
}

impl H2Origin {
    pub fn start<F, R>(options: H2OriginOptions, serve: F) -> Self
    where
        F: Fn(H2Stream) -> R + Send + Sync + 'static,
        R: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        listener.set_nonblocking(true).expect("an option of every socket");
        let origin = H2Origin {
            address,
            seen: Arc::default(),
            connections: Arc::default(),
            running: Arc::default(),
            stop: Arc::default(),
        };
        let (seen, connections, running, stop) = (
            Arc::clone(&origin.seen),
            Arc::clone(&origin.connections),
            Arc::clone(&origin.running),
            Arc::clone(&origin.stop),
        );
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                loop {
                    let accepted = tokio::select! {
                        accepted = listener.accept() => accepted,
                        () = stop.notified() => return,
                    };
                    let Ok((stream, _)) = accepted else { continue };
                    drop(stream.set_nodelay(true));
                    let index = connections.fetch_add(1, Ordering::SeqCst);
                    let context = Context { seen: Arc::clone(&seen), running: Arc::clone(&running), index };
                    tokio::spawn(accept(stream, options.clone(), context, Arc::clone(&serve)));
                }
            });
        });
        origin
    }

    pub fn seen(&self) -> Vec<SeenRequest> {
        lock(&self.seen).clone()
    }

    /// Connections so far.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    /// Connections that have not ended.
    pub fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    /// Closes the listener and all connections.
    pub fn stop(&self) {
        self.stop.notify_one();
        let start = std::time::Instant::now();
        while std::net::TcpStream::connect(self.address).is_ok() && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}

impl Drop for H2Origin {
    fn drop(&mut self) {
        self.stop.notify_one();
    }
}

struct Context {
    seen: Arc<Mutex<Vec<SeenRequest>>>,
    running: Arc<AtomicUsize>,
    index: usize,
}

async fn accept<F, R>(stream: TcpStream, options: H2OriginOptions, context: Context, serve: Arc<F>)
where
    F: Fn(H2Stream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    context.running.fetch_add(1, Ordering::SeqCst);
    match &options.tls {
        None => run(stream, &options, &context, serve).await,
        Some(config) => {
            if let Ok(stream) = TlsAcceptor::from(Arc::clone(config)).accept(stream).await {
                run(stream, &options, &context, serve).await;
            }
        }
    }
    context.running.fetch_sub(1, Ordering::SeqCst);
}

async fn run<T, F, R>(stream: T, options: &H2OriginOptions, context: &Context, serve: Arc<F>)
where
    T: AsyncRead + AsyncWrite + Unpin,
    F: Fn(H2Stream) -> R + Send + Sync + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    if let Some(barrier) = &options.before_settings {
        barrier.wait().await;
    }
    let mut builder = server::Builder::new();
    if let Some(max) = options.max_streams {
        builder.max_concurrent_streams(max);
    }
    if let Some(window) = options.window {
        builder.initial_window_size(window);
    }
    if options.connect_protocol {
        builder.enable_connect_protocol();
    }
    let Ok(mut connection): Result<Connection<T, Bytes>, _> = builder.handshake(stream).await else { return };
    let control = H2Control { drain: Arc::default(), abort: Arc::default() };
    loop {
        tokio::select! {
            accepted = connection.accept() => {
                let Some(Ok((request, respond))) = accepted else { return };
                lock(&context.seen).push(SeenRequest {
                    connection: context.index,
                    method: request.method().to_string(),
                    uri: request.uri().to_string(),
                    headers: request.headers().clone(),
                });
                let connection = context.index;
                let control = control.clone();
                tokio::spawn(serve(H2Stream { connection, request, respond, control }));
            }
            () = control.drain.notified() => connection.graceful_shutdown(),
            () = control.abort.notified() => return,
        }
    }
}
