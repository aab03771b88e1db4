//! Owns the address of a server, which may change while the process runs: after a failover to a
//! replica, or when a cluster is resharded.
//!
//! Refuses to discover addresses: see `topology`.
//! Invariant: labels and messages about an address contain no credentials.

use redis::io::tcp::TcpSettings;
use redis::{
    Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, TlsCertificates,
};
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// Certificates for `rediss://`, in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct RedisTlsConfig {
    /// The authority that signs the servers' certificates; `None` uses the authorities of the
    /// system.
    pub ca: Option<Vec<u8>>,
    /// The client certificate and its key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

/// The current address of a server, which may change or be unresolved.
pub(crate) struct ServerAddress {
    server: watch::Sender<Option<Arc<ResolvedServer>>>,
    rediscover: Arc<Notify>,
}

/// One resolved address of a server and the Redis clients of each purpose for it.
pub(crate) struct ResolvedServer {
    pub(crate) client: Client,
    /// Client for the subscription to invalidations, which requires RESP3.
    pub(crate) resp3_client: Client,
    /// Host, port and database; no credentials.
    pub(crate) label: String,
}

impl ServerAddress {
    pub(crate) fn fixed(server: ResolvedServer) -> Arc<Self> {
        Arc::new(Self { server: watch::Sender::new(Some(Arc::new(server))), rediscover: Arc::default() })
    }

    /// An address that `topology` resolves; `rediscover` triggers it.
    pub(crate) fn unresolved(rediscover: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { server: watch::Sender::new(None), rediscover })
    }

    /// Triggers discovery: the server at this address is not the expected one.
    pub(crate) fn request_rediscovery(&self) {
        self.rediscover.notify_one();
    }

    pub(crate) fn current(&self) -> Option<Arc<ResolvedServer>> {
        self.server.borrow().clone()
    }

    /// Whether `server` is still the current address.
    pub(crate) fn is_current(&self, server: &Arc<ResolvedServer>) -> bool {
        self.server.borrow().as_ref().is_some_and(|current| Arc::ptr_eq(current, server))
    }

    pub(crate) fn set(&self, server: Option<ResolvedServer>) {
        self.server.send_replace(server.map(Arc::new));
    }

    /// Waits until the address is resolved. Cancel safe.
    pub(crate) async fn wait_resolved(&self) -> Arc<ResolvedServer> {
        let mut changes = self.server.subscribe();
        match changes.wait_for(Option::is_some).await.ok().and_then(|current| current.clone()) {
            Some(server) => server,
            // `self` owns the sender, so the channel stays open.
            None => std::future::pending().await,
        }
    }

    /// Waits until the address is no longer `server`. Cancel safe.
    pub(crate) async fn wait_changed(&self, server: &Arc<ResolvedServer>) {
        let mut changes = self.server.subscribe();
        let is_gone = |current: &Option<Arc<ResolvedServer>>| {
            current.as_ref().is_none_or(|current| !Arc::ptr_eq(current, server))
        };
        if changes.wait_for(is_gone).await.is_err() {
            // `self` owns the sender, so the channel stays open.
            std::future::pending::<()>().await;
        }
    }
}

/// Credentials, database and certificates that several servers share.
#[derive(Clone)]
pub(crate) struct Dialer {
    info: ConnectionInfo,
    tls: Option<TlsCertificates>,
}

/// The address or the certificates do not parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InvalidAddress;

impl Dialer {
    pub(crate) fn new(url: &str, tls: &RedisTlsConfig) -> Result<Self, InvalidAddress> {
        // Reads share a connection: with Nagle's algorithm, each would wait for the acknowledgement
        // of the previous one.
        let tcp = TcpSettings::default().set_nodelay(true);
        let info = url.into_connection_info().map_err(|_| InvalidAddress)?.set_tcp_settings(tcp);
        let tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. }).then(|| TlsCertificates {
            client_tls: tls.client.clone().map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key }),
            root_cert: tls.ca.clone(),
        });
        Ok(Self { info, tls })
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self.info.addr(), ConnectionAddr::Tcp(..) | ConnectionAddr::TcpTls { .. })
    }

    /// The server of the configured address.
    pub(crate) fn server(&self) -> Result<ResolvedServer, InvalidAddress> {
        self.server_from(self.info.clone())
    }

    /// The server at another address, with the same credentials, database and certificates.
    pub(crate) fn server_at(&self, host: &str, port: u16) -> Result<ResolvedServer, InvalidAddress> {
        let host = host.to_owned();
        let address = match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
            }
            _ => ConnectionAddr::Tcp(host, port),
        };
        self.server_from(self.info.clone().set_addr(address))
    }

    fn server_from(&self, info: ConnectionInfo) -> Result<ResolvedServer, InvalidAddress> {
        let label = match info.redis_settings().db() {
            0 => info.addr().to_string(),
            db => format!("{}/{db}", info.addr()),
        };
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let resp3_client = self.client(info.clone().set_redis_settings(settings))?;
        Ok(ResolvedServer { client: self.client(info)?, resp3_client, label })
    }

    fn client(&self, info: ConnectionInfo) -> Result<Client, InvalidAddress> {
        match &self.tls {
            Some(tls) => Client::build_with_tls(info, tls.clone()),
            None => Client::open(info),
        }
        .map_err(|_| InvalidAddress)
    }
}
