//! Owns the address of a server, which may change while the process runs: after a failover to a
//! replica, or when a cluster is resharded.
//!
//! Refuses to discover addresses: see `topology`; and to connect: see `dial`.
//! Invariant: labels and messages about an address contain no credentials.

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo, RedisConnectionInfo};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
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

/// One resolved address of a server, with everything that a connection to it needs.
#[derive(Clone)]
pub(crate) struct ResolvedServer {
    pub(crate) address: ConnectionAddr,
    /// User, password and database.
    pub(crate) login: RedisConnectionInfo,
    pub(crate) tls: Option<Arc<ClientConfig>>,
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
    tls: Option<Arc<ClientConfig>>,
}

/// The address or the certificates do not parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct InvalidAddress;

impl Dialer {
    pub(crate) fn new(url: &str, tls: &RedisTlsConfig) -> Result<Self, InvalidAddress> {
        let info = url.into_connection_info().map_err(|_| InvalidAddress)?;
        let tls = match info.addr() {
            // Certificates are always verified.
            ConnectionAddr::TcpTls { insecure: true, .. } => return Err(InvalidAddress),
            ConnectionAddr::TcpTls { .. } => Some(Arc::new(tls.client_config()?)),
            ConnectionAddr::Tcp(..) | ConnectionAddr::Unix(_) => None,
            _ => return Err(InvalidAddress),
        };
        Ok(Self { info, tls })
    }

    pub(crate) fn is_tcp(&self) -> bool {
        matches!(self.info.addr(), ConnectionAddr::Tcp(..) | ConnectionAddr::TcpTls { .. })
    }

    /// The server of the configured address.
    pub(crate) fn server(&self) -> ResolvedServer {
        self.server_from(self.info.addr().clone())
    }

    /// The server at another address, with the same credentials, database and certificates.
    pub(crate) fn server_at(&self, host: &str, port: u16) -> ResolvedServer {
        let host = host.to_owned();
        self.server_from(match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
            }
            _ => ConnectionAddr::Tcp(host, port),
        })
    }

    fn server_from(&self, address: ConnectionAddr) -> ResolvedServer {
        let login = self.info.redis_settings().clone();
        let label = match login.db() {
            0 => address.to_string(),
            db => format!("{address}/{db}"),
        };
        ResolvedServer { address, login, tls: self.tls.clone(), label }
    }
}

impl RedisTlsConfig {
    fn client_config(&self) -> Result<ClientConfig, InvalidAddress> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(ca) => {
                for certificate in certificates(ca)? {
                    roots.add(certificate).map_err(|_| InvalidAddress)?;
                }
            }
            // Without the system's authorities no server is trusted, which the connection reports.
            None => _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
        }
        let config = ClientConfig::builder().with_root_certificates(roots);
        let Some((chain, key)) = &self.client else { return Ok(config.with_no_client_auth()) };
        let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| InvalidAddress)?;
        config.with_client_auth_cert(certificates(chain)?, key).map_err(|_| InvalidAddress)
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, InvalidAddress> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|_| InvalidAddress)
}
