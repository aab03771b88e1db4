//! TLS termination for clients: certificate selection by SNI, minimum version, client certificates,
//! and the handshake with its timeout and its fingerprint.
//!
//! Certificates and authorities are swapped in place: open connections are unaffected, new
//! handshakes use the new ones. A file that becomes invalid while the process runs does not replace
//! what is in use. Invariant: a listener with client certificates resumes no session, so that every
//! connection is verified by the authorities and the clock of its own start.

mod client_hello;
mod ja4;
mod der;
mod certificate_names;
mod validity;
mod error;
mod client_auth;
mod failure;
mod handshake_turns;
mod server_configs;

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{Accepted, AcceptedAlert, Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Connection, ProtocolVersion, ServerConfig, version};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::event::Event;
use crate::http::socket::{self, Transfer, poll_system_call};
use crate::http::tls_stream::TlsStream;
use crate::metrics;
use crate::peer::{CertificateIndex, CertificateNames, ServerName, TlsFingerprint};
use client_auth::LoadedClientAuth;
use error::ErrorWithSource;
use handshake_turns::HandshakeTurn;
use server_configs::ServerConfigs;

pub(crate) use client_auth::{ClientAuthConfig, ClientAuthMode};
pub(crate) use error::TlsError;
pub(crate) use validity::{not_after, not_after_each};

/// TLS of one listener (`[listen.tls]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TlsConfig {
    /// Certificates, selected by the server name that the client sends (SNI). The first one is
    /// the default.
    pub(crate) certificates: Vec<CertificateFiles>,
    /// The minimum version.
    pub(crate) min_version: MinTlsVersion,
    /// Whether HTTP/2 is offered (ALPN).
    pub(crate) http2: bool,
    /// `None`: clients are not asked for a certificate.
    pub(crate) client_auth: Option<ClientAuthConfig>,
}

impl TlsConfig {
    /// All files that the configuration names.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        let certificates = self.certificates.iter().flat_map(|files| [&*files.cert, &*files.key]);
        let client_auth =
            self.client_auth.iter().flat_map(|auth| std::iter::once(&*auth.ca).chain(auth.crl.as_deref()));
        certificates.chain(client_auth)
    }
}

/// Paths of a certificate chain and its private key, both PEM, resolved against the directory of
/// the configuration file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CertificateFiles {
    /// The chain, leaf first.
    pub(crate) cert: PathBuf,
    /// The private key of the leaf.
    pub(crate) key: PathBuf,
}

impl CertificateFiles {
    /// Loads the certificate with its key as a listener does, and returns the end of its validity.
    /// Blocking file I/O.
    ///
    /// # Errors
    /// Why a listener cannot use them.
    pub(crate) fn not_after(&self) -> Result<Option<SystemTime>, String> {
        let loaded = LoadedCertificate::load(self, &aws_lc_rs::default_provider());
        loaded.map(|certificate| certificate.not_after()).map_err(|error| ErrorWithSource(&error).to_string())
    }
}

/// The minimum TLS version of a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum MinTlsVersion {
    /// TLS 1.2 and 1.3.
    #[default]
    V12,
    /// TLS 1.3 only.
    V13,
}

/// The application protocol negotiated by a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alpn {
    /// HTTP/1.1, also if the client offered no protocol.
    H1,
    H2,
}

const ALPN_H2: &[u8] = b"h2";
const ALPN_H1: &[u8] = b"http/1.1";

/// Installs the process-wide crypto provider, so that libraries with their own TLS use the same one
/// as the listeners.
pub(crate) fn install_crypto_provider() {
    let _already_installed = aws_lc_rs::default_provider().install_default();
}

/// TLS termination of a listener. Shared by all workers, so that every worker accepts the session
/// tickets of the others.
pub(crate) struct TlsTerminator {
    /// Replaced when the authorities of clients change.
    server_configs: ArcSwap<ServerConfigs>,
    resolver: Arc<CertificateResolver>,
    config: TlsConfig,
    client_auth: ArcSwapOption<LoadedClientAuth>,
    /// Those of the last reload.
    refused: ArcSwap<Vec<RefusedCertificate>>,
}

/// A changed file of which the former content stays in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RefusedCertificate {
    pub(crate) file: PathBuf,
    pub(crate) error: String,
}

impl RefusedCertificate {
    /// Reports that `file` cannot be used.
    fn report(file: &Path, error: &TlsError) -> Self {
        let error = ErrorWithSource(error).to_string();
        Event::CertificateRefused { path: file, error: &error }.emit();
        RefusedCertificate { file: file.to_owned(), error }
    }
}

/// A connection after its handshake.
pub(crate) struct TlsConnection {
    pub(crate) stream: TlsStream,
    pub(crate) alpn: Alpn,
    /// As in the access log, such as `1.3`.
    pub(crate) version: &'static str,
    pub(crate) fingerprint: Option<TlsFingerprint>,
    /// Of the client's certificate, which has been verified.
    pub(crate) certificate: Option<CertificateNames>,
    /// `None`: the listener has one certificate, or the client has named no server.
    pub(crate) server_name: Option<ServerName>,
}

/// Registers the metrics of this module. `for_each_terminator` visits the listeners with TLS.
/// `for_each_client`: the client certificates with which upstreams are called, with their files.
pub(crate) fn expose(
    for_each_terminator: impl Fn(&mut dyn FnMut(&TlsTerminator)) + Send + Sync + 'static,
    for_each_client: impl Fn(&mut dyn FnMut(&Path, &CertificateDer<'_>)) + Send + Sync + 'static,
) {
    failure::expose();
    let help = "The time at which a certificate in use expires, in seconds since 1970.";
    metrics::expose_gauge_with("tidegate_certificate_not_after_timestamp_seconds", help, move |emit| {
        // Listeners and upstreams may share a certificate.
        let mut seen: Vec<PathBuf> = Vec::new();
        let mut add = |path: &Path, name: &str, not_after: Option<SystemTime>| {
            let Some(time) = not_after.filter(|_| !seen.iter().any(|known| known == path)) else { return };
            seen.push(path.to_owned());
            let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
            emit(&[("certificate", &path.to_string_lossy()), ("name", name)], seconds as f64);
        };
        for_each_terminator(&mut |terminator| {
            for certificate in &terminator.resolver.certificates.load().certificates {
                let name = certificate.names.first().map_or("", String::as_str);
                add(&certificate.files.cert, name, certificate.not_after());
            }
        });
        for_each_client(&mut |path, leaf| {
            let names = dns_names(leaf).unwrap_or_default();
            add(path, names.first().map_or("", String::as_str), not_after(leaf));
        });
    });
}

impl TlsTerminator {
    /// Loads all certificates. Blocking file I/O.
    ///
    /// # Errors
    /// Fails on the first unusable file: a listener never starts with a part of its certificates.
    pub(crate) fn new(config: &TlsConfig) -> Result<TlsTerminator, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let certificates = config
            .certificates
            .iter()
            .map(|files| LoadedCertificate::load(files, &provider))
            .collect::<Result<Vec<_>, _>>()?;
        certificates.iter().for_each(LoadedCertificate::log_loaded);
        let certificates = CertificateStore::new(certificates).ok_or(TlsError::NoCertificate)?;
        let resolver = Arc::new(CertificateResolver { certificates: ArcSwap::from_pointee(certificates) });
        let client_auth = config.client_auth.as_ref().map(LoadedClientAuth::load).transpose()?;
        client_auth.iter().for_each(|loaded| log_authorities(config, loaded));
        let server_config = server_config(config, &resolver, client_auth.as_ref())?;
        Ok(TlsTerminator {
            server_configs: ArcSwap::from_pointee(ServerConfigs::new(server_config)),
            resolver,
            config: config.clone(),
            client_auth: ArcSwapOption::from_pointee(client_auth),
            refused: ArcSwap::default(),
        })
    }

    /// Performs the handshake within `handshake_timeout`. Cancel safe: a dropped handshake closes
    /// the connection.
    ///
    /// # Errors
    /// `Handshake` and `HandshakeTimeout`. Both are counted and logged here.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        handshake_timeout: Duration,
        client: IpAddr,
    ) -> Result<TlsConnection, TlsError> {
        let handshake = match timeout(handshake_timeout, self.handshake(stream, client)).await {
            Ok(handshake) => handshake.map_err(TlsError::Handshake),
            Err(_elapsed) => Err(TlsError::HandshakeTimeout),
        };
        handshake.inspect_err(|error| failure::report(error, client))
    }

    async fn handshake(&self, tcp: TcpStream, client: IpAddr) -> io::Result<TlsConnection> {
        let (accepted, fingerprint) = read_hello(&tcp).await?;
        let turn = HandshakeTurn::take(client).await;
        let server_config = Arc::clone(self.server_configs.load().of(&accepted.client_hello()));
        let session = match accepted.into_connection(server_config) {
            Ok(session) => session,
            Err((error, alert)) => return Err(refuse_hello(&tcp, error, alert).await),
        };
        let mut stream = TlsStream::new(tcp, session.into());
        // The answer to the hello leaves before others have their turn.
        let begun = poll_fn(|cx| Poll::Ready(stream.poll_handshake(cx))).await;
        turn.end().await;
        match begun {
            Poll::Ready(completed) => completed?,
            Poll::Pending => poll_fn(|cx| stream.poll_handshake(cx)).await?,
        }
        let Connection::Server(connection) = stream.session() else { unreachable!("made by the server's acceptor") };
        let alpn = if connection.alpn_protocol() == Some(ALPN_H2) { Alpn::H2 } else { Alpn::H1 };
        let version = match connection.protocol_version() {
            Some(ProtocolVersion::TLSv1_3) => "1.3",
            Some(ProtocolVersion::TLSv1_2) => "1.2",
            // No other version is enabled.
            _ => "",
        };
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let certificate = leaf.map(|leaf| certificate_names::names(leaf));
        let server_name = connection.server_name().and_then(|name| self.resolver.server_name(name));
        Ok(TlsConnection { stream, alpn, version, fingerprint, certificate, server_name })
    }

    /// The certificates in use.
    pub(crate) fn certificates(&self) -> Vec<CertificateReport> {
        let store = self.resolver.certificates.load();
        let report = |certificate: &LoadedCertificate| CertificateReport {
            file: certificate.files.cert.clone(),
            names: certificate.names.clone(),
            expires_at: certificate.key.cert.first().and_then(|leaf| not_after(leaf)),
        };
        store.certificates.iter().map(report).collect()
    }

    /// The files that the last reload has refused.
    pub(crate) fn refused(&self) -> Arc<Vec<RefusedCertificate>> {
        self.refused.load_full()
    }

    /// Reloads all files and replaces the certificates that have changed. If a file is unusable,
    /// its previous certificate is kept. Blocking file I/O.
    pub(crate) fn reload(&self) {
        let provider = aws_lc_rs::default_provider();
        let old = self.resolver.certificates.load_full();
        let (mut renewed, mut refused) = (Vec::new(), Vec::new());
        let certificates = old.certificates.iter().map(|certificate| match certificate.successor(&provider) {
            Ok(new) if new.key.cert == certificate.key.cert => certificate.clone(),
            Ok(new) => {
                renewed.push(new.clone());
                new
            }
            Err(error) => {
                refused.push(RefusedCertificate::report(&certificate.files.cert, &error));
                certificate.clone()
            }
        });
        if let Some(certificates) = CertificateStore::new(certificates.collect()) {
            self.resolver.certificates.store(Arc::new(certificates));
        }
        // Logged after the swap: a certificate that is logged as loaded is in use.
        renewed.iter().for_each(LoadedCertificate::log_loaded);
        refused.extend(self.reload_client_auth());
        self.refused.store(Arc::new(refused));
    }

    /// Replaces the authorities and revocation lists if one of their files has changed. Returns the
    /// file that is refused.
    fn reload_client_auth(&self) -> Option<RefusedCertificate> {
        let (Some(config), Some(old)) = (&self.config.client_auth, self.client_auth.load_full()) else { return None };
        let new = match LoadedClientAuth::load(config) {
            Ok(new) if new.is_same(&old) => return None,
            new => new,
        };
        let new = new.and_then(|new| {
            let server_config = server_config(&self.config, &self.resolver, Some(&new))?;
            Ok((new, server_config))
        });
        match new {
            Ok((new, server_config)) => {
                self.server_configs.store(Arc::new(ServerConfigs::new(server_config)));
                log_authorities(&self.config, &new);
                self.client_auth.store(Some(Arc::new(new)));
                None
            }
            Err(error) => Some(RefusedCertificate::report(&config.ca, &error)),
        }
    }
}

fn server_config(
    tls: &TlsConfig,
    resolver: &Arc<CertificateResolver>,
    client_auth: Option<&LoadedClientAuth>,
) -> Result<ServerConfig, rustls::Error> {
    let versions: &[_] = match tls.min_version {
        MinTlsVersion::V12 => &[&version::TLS13, &version::TLS12],
        MinTlsVersion::V13 => &[&version::TLS13],
    };
    let builder = ServerConfig::builder_with_provider(Arc::new(server_configs::crypto_provider()));
    let builder = builder.with_protocol_versions(versions)?;
    let builder = match client_auth {
        Some(loaded) => builder.with_client_cert_verifier(Arc::clone(&loaded.verifier)),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::clone(resolver) as Arc<dyn ResolvesServerCert>);
    let protocols = if tls.http2 { &[ALPN_H2, ALPN_H1][..] } else { &[ALPN_H1] };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    if client_auth.is_some() {
        // A resumed session has the certificate of its first handshake, which may have expired or
        // been revoked since.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    } else {
        config.ticketer = aws_lc_rs::Ticketer::new()?;
    }
    Ok(config)
}

fn log_authorities(config: &TlsConfig, loaded: &LoadedClientAuth) {
    if let Some(auth) = &config.client_auth {
        Event::ClientCaLoaded { path: &auth.ca, authorities: loaded.authorities }.emit();
    }
}

/// Reads the ClientHello, and answers a bad one with an alert. rustls bounds its length to 64 KiB.
async fn read_hello(tcp: &TcpStream) -> io::Result<(Accepted, Option<TlsFingerprint>)> {
    let mut acceptor = Acceptor::default();
    let mut received = Vec::new();
    loop {
        let read = poll_fn(|cx| {
            poll_system_call(tcp, cx, Interest::READABLE, || {
                let mut reader = RecordingReader { tcp, received: &mut received, capacity: 0 };
                let count = acceptor.read_tls(&mut reader)?;
                Ok(Transfer { count, capacity: reader.capacity })
            })
        });
        if read.await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => return Ok((accepted, ja4::fingerprint(&received))),
            Err((error, alert)) => return Err(refuse_hello(tcp, error, alert).await),
        }
    }
}

/// Sends the alert of a refused ClientHello; returns the refusal.
async fn refuse_hello(tcp: &TcpStream, error: rustls::Error, mut alert: AcceptedAlert) -> io::Error {
    let mut bytes = Vec::new();
    let written = alert.write_all(&mut bytes);
    // A new connection has room for an alert, before the runtime knows; and the client may have
    // closed it: the handshake has failed in any case.
    let _sent_or_failed = written.and_then(|()| socket::send(tcp, &[IoSlice::new(&bytes)]));
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// JA4 of the ClientHello at the start of TLS records, and the part of it to which devices are
/// bound; for fuzz targets and benches.
#[doc(hidden)]
pub fn fingerprint_text(records: &[u8]) -> Option<(String, String)> {
    let fingerprint = ja4::fingerprint(records)?;
    Some((fingerprint.ja4.as_str().to_owned(), fingerprint.stable.as_str().to_owned()))
}

/// As [`fingerprint_text`], without the texts.
#[doc(hidden)]
pub fn has_fingerprint(records: &[u8]) -> bool {
    ja4::fingerprint(records).is_some()
}

/// Reads from a socket by one system call, and keeps a copy for the fingerprint.
struct RecordingReader<'a> {
    tcp: &'a TcpStream,
    received: &'a mut Vec<u8>,
    /// How many bytes the call could have received.
    capacity: usize,
}

impl Read for RecordingReader<'_> {
    fn read(&mut self, space: &mut [u8]) -> io::Result<usize> {
        let Transfer { count, capacity } = socket::receive(self.tcp, space)?;
        self.received.extend_from_slice(&space[..count]);
        self.capacity = capacity;
        Ok(count)
    }
}

/// A certificate in use, for operators.
pub(crate) struct CertificateReport {
    pub(crate) file: PathBuf,
    pub(crate) names: Vec<String>,
    pub(crate) expires_at: Option<SystemTime>,
}

/// A usable certificate with its DNS names.
#[derive(Clone)]
struct LoadedCertificate {
    files: CertificateFiles,
    key: Arc<CertifiedKey>,
    /// In lower case; a wildcard as written, `*.example.org`.
    names: Vec<String>,
}

/// The DNS names of a certificate, in lower case.
pub(crate) fn dns_names(leaf: &CertificateDer<'_>) -> Result<Vec<String>, webpki::Error> {
    Ok(webpki::EndEntityCert::try_from(leaf)?.valid_dns_names().map(str::to_ascii_lowercase).collect())
}

impl LoadedCertificate {
    fn load(files: &CertificateFiles, provider: &CryptoProvider) -> Result<LoadedCertificate, TlsError> {
        let pem = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::Pem { path, source }
        };
        let chain = CertificateDer::pem_file_iter(&files.cert)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(pem(&files.cert))?;
        let leaf = chain.first().ok_or(pem::Error::NoItemsFound).map_err(pem(&files.cert))?;
        let names = dns_names(leaf).map_err(|source| TlsError::Certificate { path: files.cert.clone(), source })?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(pem(&files.key))?;
        let key = CertifiedKey::from_der(chain, key, provider)
            .map_err(|source| TlsError::Key { path: files.key.clone(), source })?;
        Ok(LoadedCertificate { files: files.clone(), key: Arc::new(key), names })
    }

    fn not_after(&self) -> Option<SystemTime> {
        not_after(self.key.cert.first()?)
    }

    /// The certificate that its files have now. An expired one does not replace a valid one: every
    /// client would refuse it.
    fn successor(&self, provider: &CryptoProvider) -> Result<LoadedCertificate, TlsError> {
        let new = LoadedCertificate::load(&self.files, provider)?;
        let now = SystemTime::now();
        let is_valid = self.not_after().is_none_or(|time| time >= now);
        match new.not_after() {
            Some(since) if since < now && is_valid => Err(TlsError::Expired { path: self.files.cert.clone(), since }),
            _ => Ok(new),
        }
    }

    fn log_loaded(&self) {
        Event::CertificateLoaded { path: &self.files.cert, names: self.names.len() }.emit();
    }
}

/// All certificates of a listener, by DNS name.
struct CertificateStore {
    certificates: Vec<LoadedCertificate>,
    /// A name may have an ECDSA and an RSA certificate.
    index: Arc<CertificateIndex>,
}

impl CertificateStore {
    /// `None` without certificates.
    fn new(certificates: Vec<LoadedCertificate>) -> Option<Self> {
        certificates.first()?;
        let mut by_name = CertificateIndex::default();
        for (index, certificate) in certificates.iter().enumerate() {
            for name in &certificate.names {
                by_name.add(name, index);
            }
        }
        Some(CertificateStore { certificates, index: Arc::new(by_name) })
    }

    /// The certificates for `name`; without one, the first.
    fn for_name(&self, name: Option<&str>) -> &[usize] {
        name.map_or(&[0], |name| self.index.for_name(&name.to_ascii_lowercase()))
    }

    fn choose(&self, hello: &ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let candidates = self.for_name(hello.server_name()).iter().map(|index| &self.certificates[*index].key);
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        candidates.clone().find(fits).or_else(|| candidates.clone().next()).cloned()
    }
}

/// Selects the certificate of a handshake by SNI and signature scheme; a reload swaps the store
/// atomically, without a lock.
struct CertificateResolver {
    certificates: ArcSwap<CertificateStore>,
}

impl CertificateResolver {
    /// The name of a handshake; `None`: every name has the same certificate.
    fn server_name(&self, name: &str) -> Option<ServerName> {
        let store = self.certificates.load();
        (store.certificates.len() > 1).then(|| ServerName::new(name, &store.index))
    }
}

impl ResolvesServerCert for CertificateResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificates.load().choose(&hello)
    }
}

impl fmt::Debug for CertificateResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.certificates.load().index.names()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConfig, RootCertStore};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsConnector;

    const LOCALHOST: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    /// A temporary directory of certificates, removed on drop.
    struct CertificateDirectory(PathBuf);

    impl CertificateDirectory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tidegate-tls-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).expect("the temporary directory is writable");
            CertificateDirectory(path)
        }

        /// Writes a new certificate for `names`; returns its paths and content.
        fn write(&self, file: &str, names: &[&str]) -> (CertificateFiles, CertificateDer<'static>) {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let generated = rcgen::generate_simple_self_signed(names).expect("valid names");
            let files =
                CertificateFiles { cert: self.0.join(format!("{file}.crt")), key: self.0.join(format!("{file}.key")) };
            std::fs::write(&files.cert, generated.cert.pem()).expect("writable");
            std::fs::write(&files.key, generated.signing_key.serialize_pem()).expect("writable");
            (files, generated.cert.der().clone())
        }
    }

    impl Drop for CertificateDirectory {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn config(certificates: &[&CertificateFiles]) -> TlsConfig {
        let certificates = certificates.iter().map(|files| (*files).clone()).collect();
        TlsConfig { certificates, min_version: MinTlsVersion::V12, http2: true, client_auth: None }
    }

    struct TestClient {
        trusted: CertificateDer<'static>,
        alpn: &'static [&'static [u8]],
        versions: &'static [&'static rustls::SupportedProtocolVersion],
    }

    impl TestClient {
        fn trusting(trusted: &CertificateDer<'static>) -> Self {
            TestClient { trusted: trusted.clone(), alpn: &[ALPN_H2, ALPN_H1], versions: rustls::ALL_VERSIONS }
        }

        /// Performs a handshake with SNI `name`; returns the server's result and whether the client
        /// succeeded.
        async fn handshake(&self, acceptor: &TlsTerminator, name: &'static str) -> (Result<Alpn, TlsError>, bool) {
            let mut roots = RootCertStore::empty();
            roots.add(self.trusted.clone()).expect("a certificate");
            let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_protocol_versions(self.versions)
                .expect("valid versions")
                .with_root_certificates(roots)
                .with_no_client_auth();
            config.alpn_protocols = self.alpn.iter().map(|name| name.to_vec()).collect();
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            let address = listener.local_addr().expect("bound");
            let client = async {
                let stream = TcpStream::connect(address).await.expect("listening");
                let name = rustls::pki_types::ServerName::try_from(name).expect("valid name");
                TlsConnector::from(Arc::new(config)).connect(name, stream).await.is_ok()
            };
            let server = async {
                let (stream, _) = listener.accept().await.expect("connected");
                acceptor.accept(stream, Duration::from_secs(10), LOCALHOST).await.map(|connection| connection.alpn)
            };
            tokio::join!(server, client)
        }

        async fn accepts_certificate(&self, acceptor: &TlsTerminator, name: &'static str) -> bool {
            self.handshake(acceptor, name).await.1
        }
    }

    #[test]
    fn unusable_file_is_named_in_the_error() {
        let directory = CertificateDirectory::new("refused");
        let (good, _) = directory.write("good", &["a.test"]);
        let (other, _) = directory.write("other", &["b.test"]);
        let error = |config: &TlsConfig| TlsTerminator::new(config).err().expect("refused");
        assert!(matches!(error(&config(&[])), TlsError::NoCertificate));
        let mixed = CertificateFiles { cert: good.cert.clone(), key: other.key.clone() };
        assert!(matches!(error(&config(&[&good, &mixed])), TlsError::Key { path, .. } if path == other.key));
        let missing = CertificateFiles { cert: directory.0.join("none.crt"), key: good.key.clone() };
        assert!(matches!(error(&config(&[&missing])), TlsError::Pem { path, .. } if path == missing.cert));
        let empty = CertificateFiles { cert: good.key.clone(), key: good.key.clone() };
        assert!(matches!(error(&config(&[&empty])), TlsError::Pem { .. }));
    }

    #[tokio::test]
    async fn certificates_are_selected_by_sni() {
        let directory = CertificateDirectory::new("names");
        let (first, first_der) = directory.write("first", &["first.test", "*.first.test"]);
        let (second, second_der) = directory.write("second", &["*.second.test", "exact.first.test"]);
        let acceptor = TlsTerminator::new(&config(&[&first, &second])).expect("usable");
        let (of_first, of_second) = (TestClient::trusting(&first_der), TestClient::trusting(&second_der));
        assert!(of_first.accepts_certificate(&acceptor, "first.test").await);
        assert!(of_first.accepts_certificate(&acceptor, "www.first.test").await);
        assert!(of_second.accepts_certificate(&acceptor, "exact.first.test").await);
        assert!(of_second.accepts_certificate(&acceptor, "www.second.test").await);
        let names = |name| acceptor.resolver.certificates.load().for_name(name).to_vec();
        assert_eq!((names(Some("WWW.Second.test")), names(Some("a.b.second.test"))), (vec![1], vec![0]));
        assert_eq!((names(Some("unknown.test")), names(None)), (vec![0], vec![0]));
    }

    #[tokio::test]
    async fn alpn_and_version_are_negotiated() {
        let directory = CertificateDirectory::new("alpn");
        let (files, der) = directory.write("a", &["a.test"]);
        let mut config = config(&[&files]);
        let acceptor = TlsTerminator::new(&config).expect("usable");
        let mut client = TestClient::trusting(&der);
        assert_eq!(client.handshake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H2);
        client.alpn = &[ALPN_H1];
        assert_eq!(client.handshake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H1);
        client.alpn = &[];
        const TLS12: &[&rustls::SupportedProtocolVersion] = &[&version::TLS12];
        client.versions = TLS12;
        assert_eq!(client.handshake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H1);
        config.min_version = MinTlsVersion::V13;
        let acceptor = TlsTerminator::new(&config).expect("usable");
        assert!(matches!(client.handshake(&acceptor, "a.test").await, (Err(TlsError::Handshake(_)), false)));
    }

    #[tokio::test]
    async fn reload_keeps_the_certificate_of_a_bad_file_and_replaces_a_changed_one() {
        let directory = CertificateDirectory::new("reload");
        let (files, old) = directory.write("a", &["a.test"]);
        let acceptor = TlsTerminator::new(&config(&[&files])).expect("usable");
        std::fs::write(&files.cert, "-----BEGIN CERTIFICATE-----\nhalf a fi").expect("writable");
        acceptor.reload();
        assert!(TestClient::trusting(&old).accepts_certificate(&acceptor, "a.test").await);
        let (_, new) = directory.write("a", &["a.test"]);
        acceptor.reload();
        assert!(TestClient::trusting(&new).accepts_certificate(&acceptor, "a.test").await);
        assert!(!TestClient::trusting(&old).accepts_certificate(&acceptor, "a.test").await);
    }

    #[tokio::test(start_paused = true)]
    async fn handshake_of_a_silent_client_times_out() {
        let directory = CertificateDirectory::new("silent");
        let (files, _) = directory.write("a", &["a.test"]);
        let acceptor = TlsTerminator::new(&config(&[&files])).expect("usable");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let _silent = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("listening");
        let (stream, _) = listener.accept().await.expect("connected");
        let handshake = acceptor.accept(stream, Duration::from_secs(3), LOCALHOST).await;
        assert!(matches!(handshake, Err(TlsError::HandshakeTimeout)));
    }
}
