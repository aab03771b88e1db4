//! TLS towards clients: certificates by server name, the lowest version spoken, and the handshake under its deadline.
//!
//! Certificates are swapped in place: connections live on with what they began with, new handshakes get the new ones.
//! A file that turns bad while the process runs never takes the certificate away that is in use.

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
pub struct Settings {
    /// Certificates, chosen by the server name the client asks for (SNI); the first one answers clients that ask for none.
    pub certificates: Vec<Files>,
    /// The lowest version that is spoken.
    pub min_version: MinVersion,
}

/// A certificate chain and its private key, both PEM, as paths resolved against the directory of the configuration file.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    /// The chain, leaf first.
    pub cert: PathBuf,
    /// The private key of the leaf.
    pub key: PathBuf,
}

/// The lowest TLS version of a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum MinVersion {
    /// TLS 1.2 and 1.3.
    #[default]
    V12,
    /// TLS 1.3 alone.
    V13,
}

/// Why there is no TLS, or no certificate.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("no certificate is configured")]
    NoCertificate,
    #[error("{}: no PEM with what is needed", path.display())]
    Pem { path: PathBuf, source: pem::Error },
    #[error("{}: the certificate is not usable", path.display())]
    Certificate { path: PathBuf, source: webpki::Error },
    #[error("{}: key and certificate do not go together", path.display())]
    Key { path: PathBuf, source: rustls::Error },
    #[error("TLS cannot be set up")]
    Setup(#[from] rustls::Error),
    #[error("handshake failed")]
    Handshake(#[source] io::Error),
    #[error("handshake took too long")]
    HandshakeTimeout,
}

/// The protocol that a handshake agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/1.1, also where the client named no protocol.
    H1,
    H2,
}

const ALPN_H2: &[u8] = b"h2";
const ALPN_H1: &[u8] = b"http/1.1";

/// Has libraries that speak TLS themselves use the same cryptography as listeners.
pub fn install_provider() {
    let _another_is_installed = aws_lc_rs::default_provider().install_default();
}

/// The TLS side of one listener, shared by all workers, so that a session ticket of one is good at all.
pub struct Acceptor {
    acceptor: TlsAcceptor,
    resolver: Arc<Resolver>,
}

impl Acceptor {
    /// Reads all certificates. Blocks on files.
    ///
    /// # Errors
    /// The first file that cannot be used: nothing is served with half of the certificates.
    pub fn new(settings: &Settings) -> Result<Acceptor, TlsError> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let pairs =
            settings.certificates.iter().map(|files| Pair::load(files, &provider)).collect::<Result<Vec<_>, _>>()?;
        pairs.iter().for_each(Pair::announce);
        let certificates = Certificates::new(pairs).ok_or(TlsError::NoCertificate)?;
        let resolver = Arc::new(Resolver { certificates: ArcSwap::from_pointee(certificates) });
        let versions: &[_] = match settings.min_version {
            MinVersion::V12 => &[&version::TLS13, &version::TLS12],
            MinVersion::V13 => &[&version::TLS13],
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&resolver) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![ALPN_H2.to_vec(), ALPN_H1.to_vec()];
        config.ticketer = aws_lc_rs::Ticketer::new()?;
        Ok(Acceptor { acceptor: TlsAcceptor::from(Arc::new(config)), resolver })
    }

    /// Shakes hands, within `patience`. Cancel safe: a dropped handshake closes the connection.
    ///
    /// # Errors
    /// `Handshake` and `HandshakeTimeout`; both are counted and logged (at debug level) here.
    pub async fn accept(
        &self,
        stream: TcpStream,
        patience: Duration,
    ) -> Result<(TlsStream<TcpStream>, Alpn), TlsError> {
        let shaken = match timeout(patience, self.acceptor.accept(stream)).await {
            Ok(shaken) => shaken.map_err(TlsError::Handshake),
            Err(_elapsed) => Err(TlsError::HandshakeTimeout),
        };
        let stream = shaken.inspect_err(|error| Event::TlsFailed { error: &Reason(error) }.emit())?;
        let alpn = if stream.get_ref().1.alpn_protocol() == Some(ALPN_H2) { Alpn::H2 } else { Alpn::H1 };
        Ok((stream, alpn))
    }

    /// Reads all files again and serves what has changed. A pair that cannot be used keeps its place with what it had.
    /// Blocks on files.
    pub fn reload(&self) {
        let provider = aws_lc_rs::default_provider();
        let old = self.resolver.certificates.load_full();
        let mut renewed = Vec::new();
        let pairs = old.pairs.iter().map(|pair| match Pair::load(&pair.files, &provider) {
            Ok(new) if new.key.cert == pair.key.cert => pair.clone(),
            Ok(new) => {
                renewed.push(new.clone());
                new
            }
            Err(error) => {
                Event::CertificateRefused { path: &pair.files.cert, error: &Reason(&error) }.emit();
                pair.clone()
            }
        });
        if let Some(certificates) = Certificates::new(pairs.collect()) {
            self.resolver.certificates.store(Arc::new(certificates));
        }
        // Whoever reads of it may count on being served it.
        renewed.iter().for_each(Pair::announce);
    }
}

/// A usable certificate with the names it is valid for.
#[derive(Clone)]
struct Pair {
    files: Files,
    key: Arc<CertifiedKey>,
    /// In lower case; a wildcard as it is written, `*.example.org`.
    names: Vec<String>,
}

impl Pair {
    fn load(files: &Files, provider: &CryptoProvider) -> Result<Pair, TlsError> {
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
        Ok(Pair { files: files.clone(), key: Arc::new(key), names })
    }

    fn announce(&self) {
        Event::CertificateLoaded { path: &self.files.cert, names: self.names.len() }.emit();
    }
}

/// All certificates of a listener, by name.
struct Certificates {
    pairs: Vec<Pair>,
    /// Indexes into `pairs`, in the order of the configuration: one name may have an ECDSA and an RSA certificate.
    by_name: HashMap<String, Vec<usize>>,
}

impl Certificates {
    /// `None` without any certificate.
    fn new(pairs: Vec<Pair>) -> Option<Self> {
        pairs.first()?;
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        for (index, pair) in pairs.iter().enumerate() {
            for name in &pair.names {
                by_name.entry(name.clone()).or_default().push(index);
            }
        }
        Some(Certificates { pairs, by_name })
    }

    /// Those for `name`, else those for its wildcard, which stands for one label (RFC 6125 section 6.4.3), else the first.
    fn for_name(&self, name: Option<&str>) -> &[usize] {
        let found = name.map(str::to_ascii_lowercase).and_then(|name| {
            let wildcard = || self.by_name.get(&format!("*.{}", name.split_once('.')?.1));
            self.by_name.get(&name).or_else(wildcard)
        });
        found.map_or(&[0], Vec::as_slice)
    }

    fn choose(&self, hello: &ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let candidates = self.for_name(hello.server_name()).iter().map(|index| &self.pairs[*index].key);
        let fits = |key: &&Arc<CertifiedKey>| key.key.choose_scheme(hello.signature_schemes()).is_some();
        candidates.clone().find(fits).or_else(|| candidates.clone().next()).cloned()
    }
}

struct Resolver {
    certificates: ArcSwap<Certificates>,
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.certificates.load().choose(&hello)
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.certificates.load().by_name.keys()).finish()
    }
}

/// An error and its source in one line.
struct Reason<'a>(&'a TlsError);

impl fmt::Display for Reason<'_> {
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

    /// A directory with a certificate per name, gone with the value.
    struct Directory(PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tidegate-tls-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).expect("the temporary directory is writable");
            Directory(path)
        }

        /// Writes a new certificate for `names`; returns where, and what it is.
        fn write(&self, file: &str, names: &[&str]) -> (Files, CertificateDer<'static>) {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let made = rcgen::generate_simple_self_signed(names).expect("valid names");
            let files = Files { cert: self.0.join(format!("{file}.crt")), key: self.0.join(format!("{file}.key")) };
            std::fs::write(&files.cert, made.cert.pem()).expect("writable");
            std::fs::write(&files.key, made.signing_key.serialize_pem()).expect("writable");
            (files, made.cert.der().clone())
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).ok();
        }
    }

    fn settings(certificates: &[&Files]) -> Settings {
        let certificates = certificates.iter().map(|files| (*files).clone()).collect();
        Settings { certificates, min_version: MinVersion::V12 }
    }

    struct Client {
        trusted: CertificateDer<'static>,
        alpn: &'static [&'static [u8]],
        versions: &'static [&'static rustls::SupportedProtocolVersion],
    }

    impl Client {
        fn trusting(trusted: &CertificateDer<'static>) -> Self {
            Client { trusted: trusted.clone(), alpn: &[ALPN_H2, ALPN_H1], versions: rustls::ALL_VERSIONS }
        }

        /// Shakes hands as a client that asks for `name`: what the server agreed to, and whether the client did.
        async fn shake(&self, acceptor: &Acceptor, name: &'static str) -> (Result<Alpn, TlsError>, bool) {
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

        async fn is_served(&self, acceptor: &Acceptor, name: &'static str) -> bool {
            self.shake(acceptor, name).await.1
        }
    }

    #[test]
    fn unusable_files_are_refused_by_name() {
        let directory = Directory::new("refused");
        let (good, _) = directory.write("good", &["a.test"]);
        let (other, _) = directory.write("other", &["b.test"]);
        let error = |settings: &Settings| Acceptor::new(settings).err().expect("refused");
        assert!(matches!(error(&settings(&[])), TlsError::NoCertificate));
        let mixed = Files { cert: good.cert.clone(), key: other.key.clone() };
        assert!(matches!(error(&settings(&[&good, &mixed])), TlsError::Key { path, .. } if path == other.key));
        let missing = Files { cert: directory.0.join("none.crt"), key: good.key.clone() };
        assert!(matches!(error(&settings(&[&missing])), TlsError::Pem { path, .. } if path == missing.cert));
        let empty = Files { cert: good.key.clone(), key: good.key.clone() };
        assert!(matches!(error(&settings(&[&empty])), TlsError::Pem { .. }));
    }

    #[tokio::test]
    async fn certificates_are_chosen_by_name() {
        let directory = Directory::new("names");
        let (first, first_der) = directory.write("first", &["first.test", "*.first.test"]);
        let (second, second_der) = directory.write("second", &["*.second.test", "exact.first.test"]);
        let acceptor = Acceptor::new(&settings(&[&first, &second])).expect("usable");
        let (of_first, of_second) = (Client::trusting(&first_der), Client::trusting(&second_der));
        assert!(of_first.is_served(&acceptor, "first.test").await);
        assert!(of_first.is_served(&acceptor, "www.first.test").await);
        assert!(of_second.is_served(&acceptor, "exact.first.test").await);
        assert!(of_second.is_served(&acceptor, "www.second.test").await);
        let names = |name| acceptor.resolver.certificates.load().for_name(name).to_vec();
        assert_eq!((names(Some("WWW.Second.test")), names(Some("a.b.second.test"))), (vec![1], vec![0]));
        assert_eq!((names(Some("unknown.test")), names(None)), (vec![0], vec![0]));
    }

    #[tokio::test]
    async fn protocol_and_version_are_negotiated() {
        let directory = Directory::new("alpn");
        let (files, der) = directory.write("a", &["a.test"]);
        let mut settings = settings(&[&files]);
        let acceptor = Acceptor::new(&settings).expect("usable");
        let mut client = Client::trusting(&der);
        assert_eq!(client.shake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H2);
        client.alpn = &[ALPN_H1];
        assert_eq!(client.shake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H1);
        client.alpn = &[];
        const TLS12: &[&rustls::SupportedProtocolVersion] = &[&version::TLS12];
        client.versions = TLS12;
        assert_eq!(client.shake(&acceptor, "a.test").await.0.expect("agreed"), Alpn::H1);
        settings.min_version = MinVersion::V13;
        let acceptor = Acceptor::new(&settings).expect("usable");
        assert!(matches!(client.shake(&acceptor, "a.test").await, (Err(TlsError::Handshake(_)), false)));
    }

    #[tokio::test]
    async fn a_bad_file_keeps_the_certificate_and_a_new_one_replaces_it() {
        let directory = Directory::new("reload");
        let (files, old) = directory.write("a", &["a.test"]);
        let acceptor = Acceptor::new(&settings(&[&files])).expect("usable");
        std::fs::write(&files.cert, "-----BEGIN CERTIFICATE-----\nhalf a fi").expect("writable");
        acceptor.reload();
        assert!(Client::trusting(&old).is_served(&acceptor, "a.test").await);
        let (_, new) = directory.write("a", &["a.test"]);
        acceptor.reload();
        assert!(Client::trusting(&new).is_served(&acceptor, "a.test").await);
        assert!(!Client::trusting(&old).is_served(&acceptor, "a.test").await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_runs_into_the_deadline() {
        let directory = Directory::new("silent");
        let (files, _) = directory.write("a", &["a.test"]);
        let acceptor = Acceptor::new(&settings(&[&files])).expect("usable");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let _silent = TcpStream::connect(listener.local_addr().expect("bound")).await.expect("listening");
        let (stream, _) = listener.accept().await.expect("connected");
        let shaken = acceptor.accept(stream, Duration::from_secs(3)).await;
        assert!(matches!(shaken, Err(TlsError::HandshakeTimeout)));
    }
}
