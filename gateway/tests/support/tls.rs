//! TLS for the scenario tests: a self-signed certificate for gate.test and a client that trusts it.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::{Client, STEP_TIMEOUT, TempDir};

/// `[[listen]]` on a free port with the certificate that `write_certificate` writes.
pub const LISTEN_TLS: &str = "[[listen]]\naddress = \"127.0.0.1:0\"\n\
                              [listen.tls]\ncertificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]\n";

/// Writes a certificate and its key to `dir`.
pub fn write_certificate(dir: &TempDir) -> CertificateDer<'static> {
    let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    dir.write("tls.crt", &certificate.cert.pem());
    dir.write("tls.key", &certificate.signing_key.serialize_pem());
    certificate.cert.der().clone()
}

/// A TLS connection that does not offer HTTP/2.
pub fn connect(
    address: SocketAddr,
    trusted: &CertificateDer<'static>,
) -> Client<StreamOwned<ClientConnection, TcpStream>> {
    Client::from_stream(over(TcpStream::connect_timeout(&address, STEP_TIMEOUT).expect("a connection"), trusted))
}

/// As `connect`, over a connected socket.
pub fn over(socket: TcpStream, trusted: &CertificateDer<'static>) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a usable certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().expect("TLS 1.2 and 1.3");
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(Arc::new(config), name).expect("a client");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    socket.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    StreamOwned::new(connection, socket)
}
