//! Owns opening a connection to a server, and the task that moves commands and replies on it.
//!
//! The Redis client has no bounds of its own, neither in time nor in bytes: callers bound the time,
//! and the stream bounds the bytes of replies (see `reply_limit`).
//!
//! Refuses to retry. Invariant: the task and its socket end when the last clone of the connection
//! is dropped, whatever the server does.

use super::address::ResolvedServer;
use super::fault::ShardFault;
use super::reply_limit::{LimitedStream, ReplyAllowance, ReplyLimits};
use crate::tasks::{ShardTaskKind, ShardTaskWait, TaskGuard};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ConnectionAddr, Pipeline, ProtocolVersion, PushInfo, RedisError, Value};
use rustls::pki_types::ServerName;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsConnector;

/// Addresses of one name that are tried, at once.
const ADDRESSES_MAX: usize = 8;

/// A connection to a server; clones share it.
#[derive(Clone)]
pub(crate) struct RedisConnection {
    connection: MultiplexedConnection,
    driver: Arc<ConnectionDriver>,
}

/// The task of a connection, which ends with it, and the bound on its replies.
struct ConnectionDriver {
    task: AbortHandle,
    allowance: Arc<ReplyAllowance>,
}

impl Drop for ConnectionDriver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Parameters of a new connection.
pub(crate) struct DialOptions {
    /// Name of its task.
    pub(crate) name: Arc<str>,
    pub(crate) limits: ReplyLimits,
    pub(crate) config: AsyncConnectionConfig,
    pub(crate) protocol: ProtocolVersion,
}

impl DialOptions {
    pub(crate) fn new(name: Arc<str>, limits: ReplyLimits) -> Self {
        let config = AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None);
        Self { name, limits, config, protocol: ProtocolVersion::RESP2 }
    }

    /// Calls `receive` for each push message, which needs RESP3. It must not block.
    pub(crate) fn with_push<T: 'static>(
        self,
        receive: impl Fn(PushInfo) -> Result<(), T> + Send + Sync + 'static,
    ) -> Self {
        Self { config: self.config.set_push_sender(receive), protocol: ProtocolVersion::RESP3, ..self }
    }
}

impl RedisConnection {
    /// Connects and logs in. The caller limits the time. Cancel safe.
    pub(crate) async fn open(server: &ResolvedServer, options: DialOptions) -> Result<Self, ShardFault> {
        match &server.address {
            ConnectionAddr::Tcp(host, port) => Self::log_in(connect_tcp(host, *port).await?, server, options).await,
            ConnectionAddr::TcpTls { host, port, .. } => {
                let tls = server.tls.clone().ok_or(ShardFault::Connect)?;
                let name = ServerName::try_from(host.as_str()).map_err(|_| ShardFault::Connect)?.to_owned();
                let stream = connect_tcp(host, *port).await?;
                let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|_| ShardFault::Connect)?;
                Self::log_in(stream, server, options).await
            }
            ConnectionAddr::Unix(path) => {
                let stream = UnixStream::connect(path).await.map_err(|_| ShardFault::Connect)?;
                Self::log_in(stream, server, options).await
            }
            _ => Err(ShardFault::Connect),
        }
    }

    async fn log_in<S>(stream: S, server: &ResolvedServer, options: DialOptions) -> Result<Self, ShardFault>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let DialOptions { name, limits, config, protocol } = options;
        let allowance = Arc::new(ReplyAllowance::default());
        // The replies to the login.
        allowance.allow(limits.reply_bytes);
        let login = server.login.clone().set_protocol(protocol);
        let stream = LimitedStream::new(stream, limits, allowance.clone());
        let connected = MultiplexedConnection::new_with_config(&login, stream, config).await;
        let (connection, driver) = connected.map_err(|error| {
            if allowance.is_exceeded() { ShardFault::ReplyTooLong } else { ShardFault::from_connect_error(&error) }
        })?;
        allowance.settle();
        let task = tokio::spawn(async move {
            let _listed = TaskGuard::new(ShardTaskKind::Connection, &name, ShardTaskWait::Exchange);
            driver.await;
        });
        let driver = Arc::new(ConnectionDriver { task: task.abort_handle(), allowance });
        Ok(Self { connection, driver })
    }

    /// Sends a pipeline and waits for its replies; the caller limits the time. Error replies are
    /// returned as values. Cancel safe: later replies are dropped.
    pub(crate) async fn send(&mut self, pipeline: &Pipeline) -> Result<Vec<Value>, ShardFault> {
        let replies = self.connection.send_packed_commands(pipeline, 0, pipeline.len()).await;
        replies.map_err(|error| self.fault(&error))
    }

    /// The same on a metered connection: all replies together may have `bytes`.
    pub(crate) async fn send_metered(&mut self, pipeline: &Pipeline, bytes: usize) -> Result<Vec<Value>, ShardFault> {
        self.driver.allowance.allow(bytes);
        let replies = self.send(pipeline).await?;
        self.driver.allowance.settle();
        Ok(replies)
    }

    /// The client does not pass on why its stream ended to all of its callers.
    fn fault(&self, error: &RedisError) -> ShardFault {
        if self.driver.allowance.is_exceeded() { ShardFault::ReplyTooLong } else { ShardFault::from_error(error) }
    }
}

/// Connects to the first address of a name that accepts.
async fn connect_tcp(host: &str, port: u16) -> Result<TcpStream, ShardFault> {
    let resolved = tokio::net::lookup_host((host, port)).await.map_err(|_| ShardFault::Connect)?;
    let mut attempts: JoinSet<io::Result<TcpStream>> =
        resolved.take(ADDRESSES_MAX).map(|address: SocketAddr| TcpStream::connect(address)).collect();
    while let Some(attempt) = attempts.join_next().await {
        if let Ok(Ok(stream)) = attempt {
            // Reads share a connection: with Nagle's algorithm, each would wait for the
            // acknowledgement of the previous one.
            stream.set_nodelay(true).map_err(|_| ShardFault::Connect)?;
            return Ok(stream);
        }
    }
    Err(ShardFault::Connect)
}
