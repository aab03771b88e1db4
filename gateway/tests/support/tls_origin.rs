//! An origin over TLS, with certificates of a test's own authority.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rcgen::{CertificateParams, CertifiedIssuer, DnType, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{HandshakeKind, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

use super::{STEP_TIMEOUT, TempDir, lock};

/// An authority that signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate with its key, in PEM and as rustls takes them.
pub struct Signed {
    pub pem: String,
    pub key_pem: String,
    der: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Signed {
    /// The chain and the key, as rustls takes them.
    pub fn into_parts(self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.der], self.key)
    }
}

/// A certificate for `name` that is its own issuer. `is_ca`: as `openssl req -x509` makes it.
pub fn self_signed(name: &str, is_ca: rcgen::IsCa) -> Signed {
    let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
    params.is_ca = is_ca;
    let key = KeyPair::generate().expect("a key");
    let certificate = params.self_signed(&key).expect("a certificate");
    Signed {
        pem: certificate.pem(),
        key_pem: key.serialize_pem(),
        der: certificate.der().clone(),
        key: PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
    }
}

impl Authority {
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Writes the certificate of the authority to `ca.pem`.
    pub fn write(&self, dir: &TempDir) {
        dir.write("ca.pem", &self.pem());
    }

    /// A certificate for `name`, which `change` modifies before it is signed.
    pub fn sign(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Signed {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.0).expect("a certificate");
        Signed {
            pem: certificate.pem(),
            key_pem: key.serialize_pem(),
            der: certificate.der().clone(),
            key: PrivateKeyDer::try_from(key.serialize_der()).expect("a key"),
        }
    }
}

/// A handshake as the origin saw it: the name in SNI, and whether the session was resumed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeenHandshake {
    pub server_name: Option<String>,
    pub is_resumed: bool,
}

/// The settings of an origin.
#[derive(Default)]
pub struct TlsOriginOptions<'a> {
    /// The authority of client certificates, which are then required.
    pub client_ca: Option<&'a Authority>,
    pub tls12_only: bool,
    /// Closes each connection after its first response.
    pub closes: bool,
}

/// An origin over TLS that responds to every request with the length of its body. It ends with the
/// test.
pub struct TlsOrigin {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<SeenHandshake>>>,
    is_stopped: Arc<AtomicBool>,
}

impl TlsOrigin {
    pub fn start(signed: Signed, options: &TlsOriginOptions<'_>) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions: &[_] = if options.tls12_only { &[&rustls::version::TLS12] } else { rustls::DEFAULT_VERSIONS };
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .expect("a version");
        let builder = match options.client_ca {
            None => builder.with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                roots.add(authority.0.der().clone()).expect("an authority");
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().expect("a verifier"))
            }
        };
        let config = Arc::new(builder.with_single_cert(vec![signed.der], signed.key).expect("a usable certificate"));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let (seen, is_stopped) = (Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicBool::new(false)));
        let (noted, stopped, closes) = (Arc::clone(&seen), Arc::clone(&is_stopped), options.closes);
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (config, noted) = (Arc::clone(&config), Arc::clone(&noted));
                std::thread::spawn(move || drop(serve(socket, config, &noted, closes)));
            }
        });
        TlsOrigin { address, seen, is_stopped }
    }

    /// The handshakes so far, in order.
    pub fn seen(&self) -> Vec<SeenHandshake> {
        lock(&self.seen).clone()
    }
}

impl Drop for TlsOrigin {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
    }
}

fn serve(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    seen: &Mutex<Vec<SeenHandshake>>,
    closes: bool,
) -> std::io::Result<()> {
    socket.set_read_timeout(Some(STEP_TIMEOUT))?;
    let connection = ServerConnection::new(config).map_err(std::io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    lock(seen).push(SeenHandshake {
        server_name: stream.conn.server_name().map(str::to_owned),
        is_resumed: stream.conn.handshake_kind() == Some(HandshakeKind::Resumed),
    });
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if !read_more(&mut stream, &mut buffer)? {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse().ok());
        let length: usize = length.unwrap_or(0);
        while buffer.len() < end + length && read_more(&mut stream, &mut buffer)? {}
        buffer.drain(..end + length);
        let body = length.to_string();
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        stream.flush()?;
        if closes {
            stream.conn.send_close_notify();
            stream.flush()?;
            return Ok(());
        }
    }
}

fn read_more(stream: &mut StreamOwned<ServerConnection, TcpStream>, buffer: &mut Vec<u8>) -> std::io::Result<bool> {
    let mut chunk = [0; 16 * 1024];
    let count = stream.read(&mut chunk)?;
    buffer.extend_from_slice(&chunk[..count]);
    Ok(count > 0)
}
