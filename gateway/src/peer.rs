//! The client's end of a connection: its address, and what the connection shows about the client
//! before its first request.
//!
//! Invariant: a connection in plaintext without a PROXY protocol header allocates nothing here.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

/// One client as far as its address tells: an IPv4 address, or an IPv6 /64, which is the usual
/// allocation of one subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ClientNetwork {
    V4(u32),
    V6(u64),
}

impl ClientNetwork {
    /// `ip` is canonical: all IPv4-mapped IPv6 addresses would share one /64.
    pub(crate) fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ClientNetwork::V4(ip.to_bits()),
            IpAddr::V6(ip) => ClientNetwork::V6((ip.to_bits() >> 64) as u64),
        }
    }
}

/// The client of a connection. Cloning is cheap.
#[derive(Clone, Debug)]
pub(crate) struct ConnectionPeer {
    /// Canonical address: the socket's, or the one that a trusted proxy reports in a PROXY protocol
    /// header.
    pub(crate) ip: IpAddr,
    /// `None`: nothing but the address is known.
    details: Option<Rc<PeerDetails>>,
}

/// Properties of a connection that most connections in plaintext do not have.
#[derive(Debug, Default)]
pub(crate) struct PeerDetails {
    /// Address of the trusted proxy that sent a PROXY protocol header for a client.
    pub(crate) proxy: Option<IpAddr>,
    /// The header names no address: the client is unknown, and its fields are not those of the
    /// proxy.
    pub(crate) is_unknown: bool,
    /// Version of TLS, such as `1.3`; `None`: plaintext.
    pub(crate) tls_version: Option<&'static str>,
    pub(crate) fingerprint: Option<TlsFingerprint>,
    /// Of the verified client certificate.
    pub(crate) certificate: Option<CertificateNames>,
    /// `None`: the listener has one certificate, or the client has named no server.
    pub(crate) server_name: Option<ServerName>,
}

impl PeerDetails {
    fn is_empty(&self) -> bool {
        let PeerDetails { proxy, is_unknown, tls_version, fingerprint, certificate, server_name } = self;
        let is_plain = tls_version.is_none() && fingerprint.is_none() && certificate.is_none() && server_name.is_none();
        proxy.is_none() && !is_unknown && is_plain
    }
}

impl ConnectionPeer {
    /// `ip` is canonical.
    pub(crate) fn new(ip: IpAddr, details: PeerDetails) -> Self {
        ConnectionPeer { ip, details: (!details.is_empty()).then(|| Rc::new(details)) }
    }

    /// Whether the address is the client's own, or that of the proxy itself.
    pub(crate) fn is_known(&self) -> bool {
        self.details.as_ref().is_none_or(|details| !details.is_unknown)
    }

    pub(crate) fn proxy(&self) -> Option<IpAddr> {
        self.details.as_ref()?.proxy
    }

    /// Version of TLS; `None`: plaintext.
    pub(crate) fn tls_version(&self) -> Option<&'static str> {
        self.details.as_ref()?.tls_version
    }

    pub(crate) fn fingerprint(&self) -> Option<&TlsFingerprint> {
        self.details.as_ref()?.fingerprint.as_ref()
    }

    pub(crate) fn certificate(&self) -> Option<&CertificateNames> {
        self.details.as_ref()?.certificate.as_ref()
    }

    /// Whether the certificate of the connection is none of those for `host`: the client cannot
    /// know that this server answers for it (RFC 9110 section 15.5.20).
    pub(crate) fn is_misdirected(&self, host: &str) -> bool {
        let server_name = self.details.as_ref().and_then(|details| details.server_name.as_ref());
        server_name.is_some_and(|server_name| server_name.excludes(host))
    }
}

impl From<IpAddr> for ConnectionPeer {
    fn from(ip: IpAddr) -> Self {
        ConnectionPeer { ip, details: None }
    }
}

/// The certificates of a listener by DNS name, as indexes in the order of the configuration.
#[derive(Debug, Default)]
pub(crate) struct CertificateIndex {
    by_name: HashMap<String, Vec<usize>>,
}

impl CertificateIndex {
    /// Adds the certificate at `index`, which has this name, in lower case.
    pub(crate) fn add(&mut self, name: &str, index: usize) {
        self.by_name.entry(name.to_owned()).or_default().push(index);
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &String> {
        self.by_name.keys()
    }

    /// The certificates for `name`, in lower case, else those for its wildcard, which covers one
    /// label (RFC 6125 section 6.4.3), else the first one.
    pub(crate) fn for_name(&self, name: &str) -> &[usize] {
        let wildcard = || self.by_name.get(&format!("*.{}", name.split_once('.')?.1));
        self.by_name.get(name).or_else(wildcard).map_or(&[0], Vec::as_slice)
    }
}

/// The server that the client has named in its handshake (SNI), and the certificates that it could
/// get.
#[derive(Debug)]
pub(crate) struct ServerName {
    /// In lower case.
    name: Box<str>,
    certificates: Arc<CertificateIndex>,
}

impl ServerName {
    /// `name` as the client has sent it.
    pub(crate) fn new(name: &str, certificates: &Arc<CertificateIndex>) -> Self {
        ServerName { name: name.to_ascii_lowercase().into(), certificates: Arc::clone(certificates) }
    }

    /// Whether `host`, in lower case, has none of the certificates of this name.
    fn excludes(&self, host: &str) -> bool {
        if host.is_empty() || host == &*self.name {
            return false;
        }
        let ours = self.certificates.for_name(&self.name);
        let others = self.certificates.for_name(host.strip_suffix('.').unwrap_or(host));
        !others.iter().any(|other| ours.contains(other))
    }
}

/// A JA4 fingerprint, such as `t13d1516h2_8daaf6152771_e5627efa2ab1`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ja4(pub(crate) [u8; Ja4::LENGTH]);

impl Ja4 {
    pub(crate) const LENGTH: usize = 36;

    pub(crate) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a fingerprint is ASCII")
    }
}

impl fmt::Debug for Ja4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The fingerprint of the client's TLS stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TlsFingerprint {
    pub(crate) ja4: Ja4,
    /// The fingerprint without the parts that differ between connections of one client: resumption,
    /// padding, and the application protocol.
    pub(crate) stable: Ja4,
}

/// The names in a verified client certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CertificateNames {
    /// The subject as RFC 4514 writes it; empty if the certificate has none.
    pub(crate) subject: Box<str>,
    /// The first URI, DNS name or mail address of the subject alternative names, in this order of
    /// preference, such as `URI:spiffe://test/a`; empty if there is none.
    pub(crate) san: Box<str>,
}
