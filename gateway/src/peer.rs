//! The client's end of a connection: its address, and what the connection shows about the client
//! before its first request.
//!
//! Invariant: a connection in plaintext without a PROXY protocol header allocates nothing here.

use std::fmt;
use std::net::IpAddr;
use std::rc::Rc;

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
    pub(crate) fingerprint: Option<TlsFingerprint>,
    /// Of the verified client certificate.
    pub(crate) certificate: Option<CertificateNames>,
}

impl PeerDetails {
    fn is_empty(&self) -> bool {
        let PeerDetails { proxy, is_unknown, fingerprint, certificate } = self;
        proxy.is_none() && !is_unknown && fingerprint.is_none() && certificate.is_none()
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

    pub(crate) fn fingerprint(&self) -> Option<&TlsFingerprint> {
        self.details.as_ref()?.fingerprint.as_ref()
    }

    pub(crate) fn certificate(&self) -> Option<&CertificateNames> {
        self.details.as_ref()?.certificate.as_ref()
    }
}

impl From<IpAddr> for ConnectionPeer {
    fn from(ip: IpAddr) -> Self {
        ConnectionPeer { ip, details: None }
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
