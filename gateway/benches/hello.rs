//! Cost of the TLS fingerprint of a connection, and of the work of the server in the handshake that
//! it belongs to: `cargo bench --package gateway --bench hello`.

use std::sync::Arc;

use divan::{Bencher, black_box};
use gateway::testing::has_fingerprint;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

fn main() {
    divan::main();
}

/// Configurations of a server with a P-256 certificate and of a client that trusts it.
fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["gate.test".to_owned()]).expect("a name");
    let certificate = params.self_signed(&key).expect("a certificate").der().clone();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let server = server.expect("TLS 1.2 and 1.3").with_no_client_auth();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut roots = RootCertStore::empty();
    roots.add(certificate.clone()).expect("a certificate");
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let client = client.expect("TLS 1.2 and 1.3").with_root_certificates(roots).with_no_client_auth();
    (Arc::new(server.with_single_cert(vec![certificate], key).expect("a certificate")), Arc::new(client))
}

/// The first flight of a client: its ClientHello in TLS records.
fn hello(client: &Arc<ClientConfig>) -> Vec<u8> {
    let name = ServerName::try_from("gate.test").expect("a name");
    let mut client = ClientConnection::new(Arc::clone(client), name).expect("a client");
    let mut records = Vec::new();
    client.write_tls(&mut records).expect("a vector");
    records
}

#[divan::bench]
fn fingerprint(bencher: Bencher) {
    let records = hello(&configs().1);
    assert!(has_fingerprint(&records));
    bencher.bench_local(|| has_fingerprint(black_box(&records)));
}

/// From the ClientHello to the server's Finished: key exchange and signature.
#[divan::bench]
fn first_flight_of_the_server(bencher: Bencher) {
    let (server, client) = configs();
    bencher.with_inputs(|| hello(&client)).bench_local_values(|records| {
        let mut server = ServerConnection::new(Arc::clone(&server)).expect("a server");
        server.read_tls(&mut &records[..]).expect("a vector");
        server.process_new_packets().expect("a ClientHello");
        let mut flight = Vec::new();
        server.write_tls(&mut flight).expect("a vector");
        flight
    });
}
