//! Connections to upstreams: an address, and for TLS the name and settings that identify the peer.
//!
//! Certificates are verified unless the configuration says otherwise. Connections with different
//! settings or names never share a pool.

use std::cell::Cell;
use std::fmt;
use std::future::{Future as _, poll_fn};
use std::hash::{BuildHasher as _, Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, VerifierBuilderError, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::http::attempt::UpstreamConnectionError;
use crate::http::h1::Http1UpstreamConnection;
use crate::http::message::Scheme;
use crate::http::tls_fault::{SelfSigned, TlsFault};
use crate::http::transport::{OpenConnection, TransportStream};
use crate::http::upstream_connection::{Http2UpstreamConnection, NewUpstreamConnection};

/// A protocol that is offered to an upstream (ALPN, RFC 7301).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UpstreamProtocol {
    Http2,
    Http1,
}

impl UpstreamProtocol {
    /// Its name in ALPN.
    fn alpn(self) -> Vec<u8> {
        match self {
            UpstreamProtocol::Http2 => b"h2".to_vec(),
            UpstreamProtocol::Http1 => b"http/1.1".to_vec(),
        }
    }
}

/// Lowest TLS version with an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UpstreamTlsVersion {
    #[default]
    V12,
    V13,
}

/// TLS with the endpoints of an upstream (`[upstreams.X.tls]`), with the content of the files.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct UpstreamTlsConfig {
    /// Authorities in PEM; `None`: those of the system.
    pub(crate) ca: Option<Vec<u8>>,
    /// The name that the certificate must have, and that SNI names; `None`: the host of the
    /// endpoint.
    pub(crate) server_name: Option<ServerName<'static>>,
    /// Certificate chain and key of the gateway in PEM.
    pub(crate) identity: Option<(Vec<u8>, Vec<u8>)>,
    /// The file of that chain.
    pub(crate) identity_file: Option<PathBuf>,
    /// Whether the certificate is verified.
    pub(crate) verify: bool,
    pub(crate) min_version: UpstreamTlsVersion,
    /// The protocols that are offered, the preferred one first; at least one.
    pub(crate) protocols: Vec<UpstreamProtocol>,
}

/// The settings made ready for connections. Equal settings are equal, whatever they were made from.
#[derive(Clone)]
pub(crate) struct UpstreamTls {
    settings: UpstreamTlsConfig,
    id: u32,
    client: Arc<ClientConfig>,
    /// Offers HTTP/1.1 alone; `None`: it is not allowed.
    http1: Option<Arc<ClientConfig>>,
}

/// Why settings of TLS cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamTlsError {
    #[error("the system has no certificates of authorities")]
    NoSystemRoots,
    #[error("not a certificate in PEM: {0}")]
    Pem(#[from] rustls_pki_types::pem::Error),
    #[error("no certificate in the file")]
    NoCertificate,
    #[error("unusable: {0}")]
    Rustls(#[from] rustls::Error),
    #[error("unusable: {0}")]
    Verifier(#[from] VerifierBuilderError),
    /// The file of a key of `tls` cannot be used.
    #[error("`{key}`: {source}")]
    File { key: &'static str, source: Box<UpstreamTlsError> },
}

impl UpstreamTlsError {
    /// Names the key of `tls` whose file is the reason.
    fn of_file(key: &'static str) -> impl Fn(UpstreamTlsError) -> UpstreamTlsError {
        move |source| UpstreamTlsError::File { key, source: Box::new(source) }
    }
}

impl UpstreamTls {
    /// # Errors
    /// A file has no usable certificate or key, or the system has no authorities.
    pub(crate) fn new(settings: UpstreamTlsConfig) -> Result<Self, UpstreamTlsError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let versions: &[_] = match settings.min_version {
            UpstreamTlsVersion::V12 => rustls::DEFAULT_VERSIONS,
            UpstreamTlsVersion::V13 => &[&rustls::version::TLS13],
        };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(versions)?;
        let builder = if settings.verify {
            let roots = match settings.ca.as_deref() {
                Some(ca) => authorities(ca).map_err(UpstreamTlsError::of_file("ca"))?,
                None => system_roots()?,
            };
            let roots = Arc::new(roots);
            let verifier =
                WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider)).build()?;
            builder.dangerous().with_custom_certificate_verifier(Arc::new(NamedFaults { verifier, roots }))
        } else {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
        };
        let mut client = match &settings.identity {
            None => builder.with_client_cert_resolver(Arc::new(NoClientCertificate)),
            Some((chain, key)) => {
                let (of_chain, of_key) = (UpstreamTlsError::of_file("cert"), UpstreamTlsError::of_file("key"));
                let chain = CertificateDer::pem_slice_iter(chain).collect::<Result<Vec<_>, _>>();
                let chain = chain.map_err(UpstreamTlsError::from).and_then(|chain| match chain.is_empty() {
                    true => Err(UpstreamTlsError::NoCertificate),
                    false => Ok(chain),
                });
                let chain = chain.map_err(of_chain)?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| of_key(error.into()))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| of_key(error.into()))?
            }
        };
        client.alpn_protocols = settings.protocols.iter().map(|protocol| protocol.alpn()).collect();
        let http1 = settings.protocols.contains(&UpstreamProtocol::Http1).then(|| {
            let mut http1 = client.clone();
            http1.alpn_protocols = vec![UpstreamProtocol::Http1.alpn()];
            Arc::new(http1)
        });
        Ok(UpstreamTls { settings, id: NEXT.fetch_add(1, Relaxed), client: Arc::new(client), http1 })
    }

    /// The settings of an upstream without `tls`: certificates are verified by the authorities of
    /// the system.
    ///
    /// # Errors
    /// The system has no authorities.
    pub(crate) fn verified() -> Result<Self, UpstreamTlsError> {
        let protocols = vec![UpstreamProtocol::Http2, UpstreamProtocol::Http1];
        UpstreamTls::new(UpstreamTlsConfig { verify: true, protocols, ..UpstreamTlsConfig::default() })
    }

    /// Whether certificates are verified.
    pub(crate) fn verifies(&self) -> bool {
        self.settings.verify
    }

    /// The certificate of the gateway, with its file.
    pub(crate) fn client_certificate(&self) -> Option<(&Path, CertificateDer<'static>)> {
        let (chain, _) = self.settings.identity.as_ref()?;
        let leaf = CertificateDer::pem_slice_iter(chain).next()?.ok()?;
        Some((self.settings.identity_file.as_deref()?, leaf))
    }
}

impl PartialEq for UpstreamTls {
    fn eq(&self, other: &Self) -> bool {
        self.settings == other.settings
    }
}

/// Shows no key.
impl fmt::Debug for UpstreamTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let UpstreamTlsConfig { ca, server_name, identity, identity_file, verify, min_version, protocols } =
            &self.settings;
        f.debug_struct("UpstreamTls")
            .field("ca", &ca.as_ref().map(Vec::len))
            .field("server_name", server_name)
            .field("has_identity", &identity.is_some())
            .field("identity_file", identity_file)
            .field("verify", verify)
            .field("min_version", min_version)
            .field("protocols", protocols)
            .finish_non_exhaustive()
    }
}

/// The authorities in the file `ca`.
fn authorities(ca: &[u8]) -> Result<RootCertStore, UpstreamTlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(ca) {
        roots.add(certificate?)?;
    }
    if roots.is_empty() { Err(UpstreamTlsError::NoCertificate) } else { Ok(roots) }
}

/// The authorities of the system: those that the other programs of the machine trust. They change
/// without a new release, and a private authority can be added to their files.
fn system_roots() -> Result<RootCertStore, UpstreamTlsError> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(UpstreamTlsError::NoSystemRoots) } else { Ok(roots) }
}

/// Verifies as usual, and names a certificate that is its own issuer and not trusted as such:
/// whether it is called one of an unknown issuer or of an authority depends on its extensions.
#[derive(Debug)]
struct NamedFaults {
    verifier: Arc<WebPkiServerVerifier>,
    roots: Arc<RootCertStore>,
}

impl NamedFaults {
    fn name(&self, error: rustls::Error, certificate: &CertificateDer<'_>) -> rustls::Error {
        let is_named = match &error {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => is_self_issued(certificate),
            // That of a trusted authority is refused because of its kind: no server may use it.
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) => {
                reason.downcast_ref() == Some(&webpki::Error::CaUsedAsEndEntity)
                    && is_self_issued(certificate)
                    && !self.is_trusted(certificate)
            }
            _ => false,
        };
        if !is_named {
            return error;
        }
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(SelfSigned(error)))))
    }

    fn is_trusted(&self, certificate: &CertificateDer<'_>) -> bool {
        webpki::anchor_from_trusted_cert(certificate).is_ok_and(|anchor| self.roots.roots.contains(&anchor.to_owned()))
    }
}

/// Whether a certificate names itself as its issuer.
fn is_self_issued(certificate: &CertificateDer<'_>) -> bool {
    webpki::EndEntityCert::try_from(certificate).is_ok_and(|parsed| parsed.issuer() == parsed.subject())
}

impl ServerCertVerifier for NamedFaults {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verifier
            .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
            .map_err(|error| self.name(error, end_entity))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verifier.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// Accepts every certificate, for `verify = false`. The handshake still proves that the peer has
/// the key of the certificate.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

thread_local! {
    /// Whether a server has asked for a certificate of the gateway that has none, since the last
    /// poll of a handshake on this thread began.
    static LACKS_CERTIFICATE: Cell<bool> = const { Cell::new(false) };
}

/// A gateway without a certificate. All connections share it, because a session is resumed only
/// with the same one: a request for a certificate is noted for the handshake that is polled.
#[derive(Debug)]
struct NoClientCertificate;

impl ResolvesClientCert for NoClientCertificate {
    fn resolve(&self, _issuers: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        LACKS_CERTIFICATE.set(true);
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

/// The peer that a kept connection is for. Connections are exchangeable if these are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnectionKey {
    pub(crate) address: SocketAddr,
    /// Of TLS: the settings, and the name of the certificate.
    tls: Option<(u32, ServerName<'static>)>,
    /// HTTP/2 in clear text.
    is_h2c: bool,
    /// The hash of the others: each request looks for the pool of its peer twice.
    hash: u64,
}

impl ConnectionKey {
    fn new(address: SocketAddr, tls: Option<(u32, ServerName<'static>)>, is_h2c: bool) -> Self {
        let hash = foldhash::fast::FixedState::default().hash_one((address, &tls, is_h2c));
        ConnectionKey { address, tls, is_h2c, hash }
    }
}

impl Hash for ConnectionKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
    }
}

/// TLS as a connector needs it.
#[derive(Clone)]
struct TlsClients {
    client: Arc<ClientConfig>,
    http1: Option<Arc<ClientConfig>>,
    offers_http2: bool,
}

/// Opens connections to one address.
#[derive(Clone)]
pub(crate) struct Connector {
    key: ConnectionKey,
    tls: Option<TlsClients>,
    /// Open connections of HTTP/1.1 and of HTTP/2, of all threads.
    open: [Arc<AtomicUsize>; 2],
}

impl Connector {
    /// Connections of HTTP/1.1 in clear text.
    pub(crate) fn plain(address: SocketAddr) -> Self {
        Connector::new(ConnectionKey::new(address, None, false), None)
    }

    /// Connections of HTTP/2 in clear text, with prior knowledge (RFC 9113 section 3.3).
    pub(crate) fn h2c(address: SocketAddr) -> Self {
        Connector::new(ConnectionKey::new(address, None, true), None)
    }

    /// Connections over TLS to a server whose certificate must be for `host`, unless the settings
    /// have another name.
    pub(crate) fn tls(address: SocketAddr, host: &str, tls: &UpstreamTls) -> Self {
        let name = tls.settings.server_name.clone().or_else(|| ServerName::try_from(host.to_owned()).ok());
        // A host that is no name has been refused with the configuration; its address is one.
        let name = name.unwrap_or_else(|| ServerName::from(address.ip()));
        let offers_http2 = tls.settings.protocols.contains(&UpstreamProtocol::Http2);
        let clients = TlsClients { client: Arc::clone(&tls.client), http1: tls.http1.clone(), offers_http2 };
        Connector::new(ConnectionKey::new(address, Some((tls.id, name)), false), Some(clients))
    }

    fn new(key: ConnectionKey, tls: Option<TlsClients>) -> Self {
        Connector { key, tls, open: Default::default() }
    }

    /// The number of open connections of HTTP/1.1 and of HTTP/2.
    pub(crate) fn open_connections(&self) -> [usize; 2] {
        self.open.each_ref().map(|count| count.load(Relaxed))
    }

    pub(crate) fn key(&self) -> &ConnectionKey {
        &self.key
    }

    /// Whether a connection may turn out to be one of HTTP/2.
    pub(crate) fn may_be_http2(&self) -> bool {
        self.is_http2() || self.tls.as_ref().is_some_and(|tls| tls.offers_http2)
    }

    /// Whether every connection is one of HTTP/2.
    pub(crate) fn is_http2(&self) -> bool {
        self.key.is_h2c || self.tls.as_ref().is_some_and(|tls| tls.http1.is_none())
    }

    /// Opens a connection of the protocol that the server selects. Cancel safe; the caller bounds
    /// the time.
    ///
    /// # Errors
    /// `Connect`; `Tls` if the handshake fails; `Ended` if the server ends the connection.
    pub(crate) async fn connect(&self) -> Result<NewUpstreamConnection, UpstreamConnectionError> {
        let (Some(tls), Some((_, name))) = (&self.tls, &self.key.tls) else {
            let stream = TransportStream::plain(self.connect_tcp().await?);
            return match self.key.is_h2c {
                true => self.begin_http2(stream).await,
                false => Ok(self.http1(stream)),
            };
        };
        let stream = handshake(&tls.client, name, self.connect_tcp().await?).await?;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let stream = TransportStream::tls_client(stream);
        if is_http2 { self.begin_http2(stream).await } else { Ok(self.http1(stream)) }
    }

    /// Opens a connection of HTTP/1.1, for what no other protocol has: a switch of the protocol.
    /// Cancel safe; the caller bounds the time.
    ///
    /// # Errors
    /// As `connect`.
    pub(crate) async fn connect_http1(&self) -> Result<NewUpstreamConnection, UpstreamConnectionError> {
        let Some((tls, (_, name))) = self.tls.as_ref().zip(self.key.tls.as_ref()) else { return self.connect().await };
        let Some(http1_only) = &tls.http1 else { return self.connect().await };
        let stream = handshake(http1_only, name, self.connect_tcp().await?).await?;
        Ok(self.http1(TransportStream::tls_client(stream)))
    }

    async fn connect_tcp(&self) -> Result<TcpStream, UpstreamConnectionError> {
        let stream = TcpStream::connect(self.key.address).await.map_err(UpstreamConnectionError::Connect)?;
        stream.set_nodelay(true).map_err(UpstreamConnectionError::Connect)?;
        Ok(stream)
    }

    fn http1(&self, stream: TransportStream) -> NewUpstreamConnection {
        let stream = stream.counted(OpenConnection::count(&self.open[0]));
        NewUpstreamConnection::Http1(Box::new(Http1UpstreamConnection::new(stream)))
    }

    async fn begin_http2(&self, stream: TransportStream) -> Result<NewUpstreamConnection, UpstreamConnectionError> {
        let scheme = if self.tls.is_some() { Scheme::Https } else { Scheme::Http };
        let authority = self.key.address.to_string();
        let stream = stream.counted(OpenConnection::count(&self.open[1]));
        Http2UpstreamConnection::open(stream, scheme, authority).await.map(NewUpstreamConnection::Http2)
    }
}

/// Completes the handshake of a connection. Cancel safe.
async fn handshake(
    client: &Arc<ClientConfig>,
    name: &ServerName<'static>,
    tcp: TcpStream,
) -> Result<TlsStream<TcpStream>, UpstreamConnectionError> {
    let mut connecting = pin!(TlsConnector::from(Arc::clone(client)).connect(name.clone(), tcp));
    let mut lacks_certificate = false;
    let connected = poll_fn(|cx| {
        LACKS_CERTIFICATE.set(false);
        let polled = connecting.as_mut().poll(cx);
        lacks_certificate |= LACKS_CERTIFICATE.get();
        polled
    });
    connected.await.map_err(|error| tls_error(error, lacks_certificate))
}

/// A failed handshake. `lacks_certificate`: the server has asked for a certificate, and the gateway
/// has none. Over TLS 1.2, many servers then send the alert `handshake_failure` (RFC 5246 section
/// 7.4.6), which names no reason.
fn tls_error(error: io::Error, lacks_certificate: bool) -> UpstreamConnectionError {
    match TlsFault::of_handshake(&error) {
        Some(TlsFault::Alert) if lacks_certificate => UpstreamConnectionError::Tls(TlsFault::ClientCertificate, error),
        Some(fault) => UpstreamConnectionError::Tls(fault, error),
        None => UpstreamConnectionError::Ended(error),
    }
}
