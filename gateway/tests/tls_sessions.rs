//! The start and the end of TLS connections: session tickets, and the client's `close_notify`.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, StreamOwned, SupportedProtocolVersion};

use support::tls::{LISTEN_TLS, write_certificate};
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route};

/// A gateway with a TLS listener, and its certificate.
fn start(origin: &Origin) -> (Gateway, CertificateDer<'static>) {
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    (Gateway::start_in(dir, &one_route(origin.address, "", LISTEN_TLS)), trusted)
}

fn config(trusted: &CertificateDer<'static>, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a usable certificate");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).expect("a version");
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

fn connect(gateway: &Gateway, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(Arc::clone(config), name).expect("a client");
    let socket = TcpStream::connect(gateway.address).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    StreamOwned::new(connection, socket)
}

/// The tickets of TLS 1.3 leave with the first response, those of TLS 1.2 with the handshake.
#[test]
fn second_connection_resumes_the_session() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let (gateway, trusted) = start(&origin);
    for version in [&TLS12, &TLS13] {
        // One configuration keeps the sessions of a client.
        let config = config(&trusted, version);
        for kind in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut stream = connect(&gateway, &config);
            assert_eq!(Client::from_stream(&mut stream).get("/", &[]).status, 200);
            assert_eq!(stream.conn.handshake_kind(), Some(kind), "{version:?}");
        }
    }
}

/// A client that ends its side between two requests, but not the connection.
#[test]
fn close_notify_of_an_idle_client_is_answered() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let (gateway, trusted) = start(&origin);
    for version in [&TLS12, &TLS13] {
        let mut stream = connect(&gateway, &config(&trusted, version));
        assert_eq!(Client::from_stream(&mut stream).get("/", &[]).status, 200);
        stream.conn.send_close_notify();
        stream.conn.write_tls(&mut stream.sock).expect("sent");
        // Without a `close_notify`, the end would be an error.
        assert_eq!(stream.read(&mut [0; 16]).map_err(|error| error.kind()), Ok(0), "{version:?}");
    }
}

/// Each part of a handshake may arrive in several segments.
#[test]
fn handshake_in_single_bytes() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let (gateway, trusted) = start(&origin);
    for version in [&TLS12, &TLS13] {
        let mut stream = connect(&gateway, &config(&trusted, version));
        stream.sock.set_nodelay(true).expect("a live socket");
        while stream.conn.is_handshaking() {
            let mut flight = Vec::new();
            while stream.conn.wants_write() {
                stream.conn.write_tls(&mut flight).expect("a buffer");
            }
            for byte in flight {
                stream.sock.write_all(&[byte]).expect("sent");
            }
            if stream.conn.is_handshaking() {
                stream.conn.read_tls(&mut stream.sock).expect("received");
                stream.conn.process_new_packets().expect("valid records");
            }
        }
        assert_eq!(Client::from_stream(&mut stream).get("/", &[]).status, 200, "{version:?}");
    }
}
