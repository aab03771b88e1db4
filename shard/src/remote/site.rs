//! Owns where a server is: an address that may change while the process runs, because a replica took over or a cluster moved.
//!
//! Refuses to look for it: see `scout`.
//! Invariant: what is said about an address contains no credentials.

use redis::io::tcp::TcpSettings;
use redis::{
    Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, TlsCertificates,
};
use std::sync::Arc;
use tokio::sync::{Notify, watch};

/// Certificates for `rediss://`, in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Who may sign servers' certificates; the system's authorities where there is none.
    pub ca: Option<Vec<u8>>,
    /// A certificate of one's own, with its key.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

/// An address that may change, or not be known yet.
pub(crate) struct Site {
    spot: watch::Sender<Option<Arc<Spot>>>,
    call: Arc<Notify>,
}

/// An address.
pub(crate) struct Spot {
    pub(crate) client: Client,
    /// What connects to be told of changes, which needs the third version of the protocol.
    pub(crate) line: Client,
    /// Host, port and database; no credentials.
    pub(crate) label: String,
}

impl Site {
    pub(crate) fn fixed(spot: Spot) -> Arc<Self> {
        Arc::new(Self { spot: watch::Sender::new(Some(Arc::new(spot))), call: Arc::default() })
    }

    /// One that is looked for by whoever waits for `call`.
    pub(crate) fn unknown(call: Arc<Notify>) -> Arc<Self> {
        Arc::new(Self { spot: watch::Sender::new(None), call })
    }

    /// Has it looked for: what is there is not what was expected.
    pub(crate) fn doubt(&self) {
        self.call.notify_one();
    }

    pub(crate) fn now(&self) -> Option<Arc<Spot>> {
        self.spot.borrow().clone()
    }

    /// Whether it is still there.
    pub(crate) fn is_at(&self, spot: &Arc<Spot>) -> bool {
        self.spot.borrow().as_ref().is_some_and(|now| Arc::ptr_eq(now, spot))
    }

    pub(crate) fn move_to(&self, spot: Option<Spot>) {
        self.spot.send_replace(spot.map(Arc::new));
    }

    /// Waits until it is known. Cancel safe.
    pub(crate) async fn appears(&self) -> Arc<Spot> {
        let mut moves = self.spot.subscribe();
        match moves.wait_for(Option::is_some).await.ok().and_then(|now| now.clone()) {
            Some(spot) => spot,
            // The sender lives in `self`.
            None => std::future::pending().await,
        }
    }

    /// Waits until it is not at `spot` any more. Cancel safe.
    pub(crate) async fn left(&self, spot: &Arc<Spot>) {
        let mut moves = self.spot.subscribe();
        let is_gone = |now: &Option<Arc<Spot>>| now.as_ref().is_none_or(|now| !Arc::ptr_eq(now, spot));
        if moves.wait_for(is_gone).await.is_err() {
            // The sender lives in `self`.
            std::future::pending::<()>().await;
        }
    }
}

/// How to reach servers that have credentials, database and certificates in common.
#[derive(Clone)]
pub(crate) struct Dialer {
    info: ConnectionInfo,
    tls: Option<TlsCertificates>,
}

/// The address does not parse, or the certificates do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BadAddress;

impl Dialer {
    pub(crate) fn new(url: &str, tls: &TlsSettings) -> Result<Self, BadAddress> {
        // Reads share a connection: with Nagle on, one would wait for the acknowledgement of the one before.
        let tcp = TcpSettings::default().set_nodelay(true);
        let info = url.into_connection_info().map_err(|_| BadAddress)?.set_tcp_settings(tcp);
        let tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. }).then(|| TlsCertificates {
            client_tls: tls.client.clone().map(|(client_cert, client_key)| ClientTlsConfig { client_cert, client_key }),
            root_cert: tls.ca.clone(),
        });
        Ok(Self { info, tls })
    }

    pub(crate) fn is_on_a_network(&self) -> bool {
        matches!(self.info.addr(), ConnectionAddr::Tcp(..) | ConnectionAddr::TcpTls { .. })
    }

    /// The address of its own.
    pub(crate) fn spot(&self) -> Result<Spot, BadAddress> {
        self.spot_of(self.info.clone())
    }

    /// Another address, with everything else alike.
    pub(crate) fn spot_at(&self, host: &str, port: u16) -> Result<Spot, BadAddress> {
        let host = host.to_owned();
        let address = match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
            }
            _ => ConnectionAddr::Tcp(host, port),
        };
        self.spot_of(self.info.clone().set_addr(address))
    }

    fn spot_of(&self, info: ConnectionInfo) -> Result<Spot, BadAddress> {
        let label = match info.redis_settings().db() {
            0 => info.addr().to_string(),
            db => format!("{}/{db}", info.addr()),
        };
        let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
        let line = self.client(info.clone().set_redis_settings(settings))?;
        Ok(Spot { client: self.client(info)?, line, label })
    }

    fn client(&self, info: ConnectionInfo) -> Result<Client, BadAddress> {
        match &self.tls {
            Some(tls) => Client::build_with_tls(info, tls.clone()),
            None => Client::open(info),
        }
        .map_err(|_| BadAddress)
    }
}
