//! TLS termination for clients: certificate selection by SNI, minimum version, and the handshake
//! with its timeout.
//!
//! Certificates are swapped in place: open connections are unaffected, new handshakes use the
//! new ones. A file that becomes invalid while the process runs does not replace the certificate in
//! use.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, version};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::event::Event;

/// TLS of one listener (`[listen.tls]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TlsConfig {
    /// Certificates, selected by the server name that the client sends (SNI). The first one is
    /// the default.
    pub(crate) certificates: Vec<CertificateFiles>,
    /// The minimum version.
    pub(crate) min_version: MinTlsVersion,
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

/// The minimum TLS version of a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum MinTlsVersion {
    /// TLS 1.2 and 1.3.
    #[default]
    V12,
    /// TLS 1.3 only.
    V13,
}

/// Why TLS could not be set up, or a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("no certificate is configured")]
    NoCertificate,
    #[error("{}: no usable PEM content", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{}: invalid certificate", path.display())]
    Certificate { path: PathBuf, source: webpki::Error },
    #[error("{}: private key does not match the certificate", path.display())]
    Key { path: PathBuf, source: rustls::Error },
    #[error("failed to set up TLS")]
    Setup(#[from] rustls::Error),
    #[error("handshake failed")]
    Handshake(#[source] io::Error),
    #[error("handshake timed out")]
    HandshakeTimeout,
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
    acceptor: TlsAcceptor,
    resolver: Arc<CertificateResolver>,
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
        let versions: &[_] = match config.min_version {
            MinTlsVersion::V12 => &[&version::TLS13, &version::TLS12],
            MinTlsVersion::V13 => &[&version::TLS13],
        };
        let mut server_config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&resolver) as Arc<dyn ResolvesServerCert>);
        server_config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_H1.to_vec()];
        server_config.ticketer = aws_lc_rs::Ticketer::new()?;
        Ok(TlsTerminator { acceptor: TlsAcceptor::from(Arc::new(server_config)), resolver })
    }

    /// Performs the handshake within `handshake_timeout`. Cancel safe: a dropped handshake closes
    /// the connection.
    ///
    /// # Errors
    /// `Handshake` and `HandshakeTimeout`. Both are counted and logged (at debug level) here.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        handshake_timeout: Duration,
    ) -> Result<(TlsStream<TcpStream>, Alpn), TlsError> {
        let handshake = match timeout(handshake_timeout, self.acceptor.accept(stream)).await {
            Ok(handshake) => handshake.map_err(TlsError::Handshake),
            Err(_elapsed) => Err(TlsError::HandshakeTimeout),
        };
        let stream = handshake.inspect_err(|error| Event::TlsFailed { error: &ErrorWithSource(error) }.emit())?;
        let alpn = if stream.get_ref().1.alpn_protocol() == Some(ALPN_H2) { Alpn::H2 } else { Alpn::H1 };
        Ok((stream, alpn))
    }

    /// Reloads all files and replaces the certificates that have changed. If a file is unusable,
    /// its previous certificate is kept. Blocking file I/O.
    pub(crate) fn reload(&self) {
        let provider = aws_lc_rs::default_provider();
        let old = self.resolver.certificates.load_full();
        let mut renewed = Vec::new();
        let certificates =
            old.certificates.iter().map(|certificate| match LoadedCertificate::load(&certificate.files, &provider) {
                Ok(new) if new.key.cert == certificate.key.cert => certificate.clone(),
                Ok(new) => {
                    renewed.push(new.clone());
                    new
                }
                Err(error) => {
                    Event::CertificateRefused { path: &certificate.files.cert, error: &ErrorWithSource(&error) }.emit();
                    certificate.clone()
                }
            });
        if let Some(certificates) = CertificateStore::new(certificates.collect()) {
            self.resolver.certificates.store(Arc::new(certificates));
        }
        // Logged after the swap: a certificate that is logged as loaded is in use.
        renewed.iter().for_each(LoadedCertificate::log_loaded);
    }
}

/// A usable certificate with its DNS names.
#[derive(Clone)]
struct LoadedCertificate {
    files: CertificateFiles,
    key: Arc<CertifiedKey>,
    /// In lower case; a wildcard as written, `*.example.org`.
    names: Vec<String>,
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
        let names = webpki::EndEntityCert::try_from(leaf)
            .map_err(|source| TlsError::Certificate { path: files.cert.clone(), source })?
            .valid_dns_names()
            .map(str::to_ascii_lowercase)
            .collect();
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(pem(&files.key))?;
        let key = CertifiedKey::from_der(chain, key, provider)
            .map_err(|source| TlsError::Key { path: files.key.clone(), source })?;
        Ok(LoadedCertificate { files: files.clone(), key: Arc::new(key), names })
    }

    fn log_loaded(&self) {
        Event::CertificateLoaded { path: &self.files.cert, names: self.names.len() }.emit();
    }
}

/// All certificates of a listener, by DNS name.
struct CertificateStore {
    certificates: Vec<LoadedCertificate>,
    /// Indexes into `certificates`, in configuration order: a name may have an ECDSA and an RSA
    /// certificate.
    by_name: HashMap<String, Vec<usize>>,
}

impl CertificateStore {
    /// `None` without certificates.
    fn new(certificates: Vec<LoadedCertificate>) -> Option<Self> {
        certificates.first()?;
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, certificate) in certificates.iter().enumerate() {
            for name in &certificate.names {
                by_name.entry(name.clone()).or_default().push(index);
            }
        }
        Some(CertificateStore { certificates, by_name })
    }

    /// The certificates for `name`, else those for its wildcard, which covers one label (RFC 6125
    /// section 6.4.3), else the first one.
    fn for_name(&self, name: Option<&str>) -> &[usize] {
        let matching = name.map(str::to_ascii_lowercase).and_then(|name| {
            let wildcard = || self.by_name.get(&format!("*.{}", name.split_once('.')?.1));
            self.by_name.get(&name).or_else(wildcard)
        });
        matching.map_or(&[0], Vec::as_slice)
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

impl ResolvesServerCert for CertificateResolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificates.load().choose(&hello)
    }
}

impl fmt::Debug for CertificateResolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.certificates.load().by_name.keys()).finish()
    }
}

/// Displays an error and its source in one line.
struct ErrorWithSource<'a>(&'a TlsError);

impl fmt::Display for ErrorWithSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        std::error::Error::source(self.0).map_or(Ok(()), |source| write!(f, ": {source}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::ServerName;
    use rustls::{ClientConfig, RootCertStore};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsConnector;

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
        TlsConfig { certificates, min_version: MinTlsVersion::V12 }
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
                let name = ServerName::try_from(name).expect("valid name");
                TlsConnector::from(Arc::new(config)).connect(name, stream).await.is_ok()
            };
            let server = async {
                let (stream, _) = listener.accept().await.expect("connected");
                acceptor.accept(stream, Duration::from_secs(10)).await.map(|(_, alpn)| alpn)
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
        let handshake = acceptor.accept(stream, Duration::from_secs(3)).await;
        assert!(matches!(handshake, Err(TlsError::HandshakeTimeout)));
    }
}
