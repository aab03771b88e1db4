//! The JA4 fingerprint: in the access log, as a part of the device, and as the key of a limit.

mod support;

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, ClientConfig, ClientConnection, HandshakeKind, RootCertStore, StreamOwned};

use support::tls::{LISTEN_TLS, write_certificate};
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

type TlsClient = Client<StreamOwned<ClientConnection, TcpStream>>;

/// A gateway with TLS, and what its clients need.
struct Server {
    gateway: Gateway,
    trusted: CertificateDer<'static>,
}

const LOG: &str = "[log]\naccess = \"stdout\"\n";

impl Server {
    fn start(route: &str, rest: &str) -> Self {
        let origin = Origin::start(|_| Script::ok(&[], "ok"));
        let (dir, address) = (TempDir::new(), origin.address);
        let trusted = write_certificate(&dir);
        let gateway = Gateway::start_in(dir, &one_route(address, route, &format!("{LISTEN_TLS}{LOG}{rest}")));
        // The origin lives as long as the process of the test: no response needs it.
        std::mem::forget(origin);
        Server { gateway, trusted }
    }

    /// A TLS stack with these protocols and all cipher suites but those of `without`.
    fn stack(&self, alpn: &[&str], without: &[CipherSuite]) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.trusted.clone()).expect("a usable certificate");
        let mut provider = rustls::crypto::aws_lc_rs::default_provider();
        provider.cipher_suites.retain(|suite| !without.contains(&suite.suite()));
        let builder = ClientConfig::builder_with_provider(Arc::new(provider));
        let builder = builder.with_safe_default_protocol_versions().expect("TLS 1.2 and 1.3");
        let mut config = builder.with_root_certificates(roots).with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        config
    }

    fn connect(&self, stack: &Arc<ClientConfig>) -> TlsClient {
        Client::from_stream(over(TcpStream::connect(self.gateway.address).expect("a connection"), stack))
    }

    fn connect_from(&self, source: [u8; 4], stack: &Arc<ClientConfig>) -> TlsClient {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::new(IpAddr::from(source), 0).into()).expect("a loopback address");
        socket.connect(&self.gateway.address.into()).expect("a connection");
        Client::from_stream(over(socket.into(), stack))
    }

    fn status(&self, stack: &Arc<ClientConfig>, device: &str) -> u16 {
        self.connect(stack).get("/", &[("x-device-id", device)]).status
    }

    /// The values of a field of all log lines, without repetitions.
    fn logged(&self, lines: usize, field: &str) -> BTreeSet<String> {
        let log = self.gateway.access_log(lines);
        log.iter().filter_map(|line| line[field].as_str().map(str::to_owned)).collect()
    }
}

fn over(socket: TcpStream, stack: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
    socket.set_nodelay(true).expect("a live socket");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    socket.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let name = ServerName::try_from("gate.test").expect("a name");
    StreamOwned::new(ClientConnection::new(Arc::clone(stack), name).expect("a client"), socket)
}

const DEVICE_LIMIT: &str = "[limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 2\n";
const BY_DEVICE: &str = "limits = [\"device\"]";

/// rustls sends its extensions in a random order.
#[test]
fn fingerprint_does_not_depend_on_order_packets_or_records() {
    let server = Server::start("", "");
    let stack = Arc::new(server.stack(&["http/1.1"], &[]));
    for _ in 0..5 {
        assert_eq!(server.connect(&Arc::new(server.stack(&["http/1.1"], &[]))).get("/", &[]).status, 200);
    }
    // One byte in each packet.
    let mut stream = over(TcpStream::connect(server.gateway.address).expect("a connection"), &stack);
    let mut hello = Vec::new();
    stream.conn.write_tls(&mut hello).expect("a vector");
    for byte in &hello {
        stream.sock.write_all(&[*byte]).expect("a live socket");
    }
    assert_eq!(Client::from_stream(stream).get("/", &[]).status, 200);
    // Many records.
    let mut fragmented = server.stack(&["http/1.1"], &[]);
    fragmented.max_fragment_size = Some(64);
    assert_eq!(server.connect(&Arc::new(fragmented)).get("/", &[]).status, 200);
    let ja4 = server.logged(7, "ja4");
    assert_eq!(ja4.len(), 1, "{ja4:?}");
    let ja4 = ja4.first().expect("one fingerprint");
    // TLS 1.3, a server name, 9 suites of rustls and its signal, and HTTP/1.1.
    assert!(ja4.starts_with("t13d10") && ja4[8..].starts_with("h1_") && ja4.len() == 36, "{ja4}");
}

#[test]
fn device_is_bound_to_the_tls_stack() {
    let identity = "[identity]\ndevice = [\"header:x-device-id\"]\n";
    let server = Server::start(BY_DEVICE, &format!("{identity}{DEVICE_LIMIT}"));
    let one = Arc::new(server.stack(&["http/1.1"], &[]));
    let other = Arc::new(server.stack(&["http/1.1"], &[CipherSuite::TLS13_AES_128_GCM_SHA256]));
    let twice = |stack: &Arc<ClientConfig>| [(); 2].map(|()| server.status(stack, "a"));
    assert_eq!(twice(&one), [200, 200]);
    assert_eq!(server.status(&one, "a"), 429);
    // Another TLS stack with the same id, as a thief of the id has, does not use up its bucket.
    assert_eq!(twice(&other), [200, 200]);
    assert_eq!(server.status(&other, "a"), 429);
    // The same stack with another application protocol is the same device.
    assert_eq!(server.status(&Arc::new(server.stack(&[], &[])), "a"), 429);
}

#[test]
fn resumption_keeps_the_device() {
    let server = Server::start(BY_DEVICE, DEVICE_LIMIT);
    let stack = Arc::new(server.stack(&["http/1.1"], &[]));
    let get = |kind| {
        let mut stream = over(TcpStream::connect(server.gateway.address).expect("a connection"), &stack);
        let status = Client::from_stream(&mut stream).get("/", &[]).status;
        assert_eq!(stream.conn.handshake_kind(), Some(kind));
        status
    };
    let statuses = [get(HandshakeKind::Full), get(HandshakeKind::Resumed), get(HandshakeKind::Resumed)];
    let fingerprints = server.logged(3, "fingerprint");
    assert_eq!(fingerprints.len(), 1, "{fingerprints:?}");
    assert_eq!(statuses, [200, 200, 429], "one device");
    assert_eq!(server.logged(3, "ja4").len(), 2, "the extension of resumption is a part of JA4");
}

/// Neither new ids nor new TLS stacks raise the total of one address.
#[test]
fn rotation_of_ids_and_stacks_buys_no_more_than_the_budget_of_the_address() {
    for identity in ["[identity]\ndevice = [\"header:x-device-id\"]\n", ""] {
        let server = Server::start(BY_DEVICE, &format!("{identity}{DEVICE_LIMIT}per_address = 3\n"));
        let suites: Vec<CipherSuite> =
            rustls::crypto::aws_lc_rs::default_provider().cipher_suites.iter().map(|suite| suite.suite()).collect();
        let mut admitted = 0;
        for (at, suite) in suites.iter().enumerate() {
            let stack = Arc::new(server.stack(&["http/1.1"], &[*suite]));
            for device in 0..2 {
                admitted += u32::from(server.status(&stack, &format!("{at}-{device}")) == 200);
            }
        }
        assert_eq!(admitted, 6, "three times the burst of a device: {identity:?}");
        let stack = Arc::new(server.stack(&["http/1.1"], &[]));
        let other_address = server.connect_from([127, 0, 0, 2], &stack).get("/", &[]).status;
        assert_eq!(other_address, 200);
    }
}

#[test]
fn limits_count_by_fingerprint() {
    let rest = "[[listen]]\naddress = \"127.0.0.1:0\"\n\
                [limits.stack]\ntier = \"key\"\nkey = \"ja4:\"\nrate = \"1/h\"\nburst = 2\n";
    let server = Server::start("limits = [\"stack\"]", rest);
    // Each client has its own sessions: JA4 differs after a resumption.
    let get = |last, without: &[CipherSuite]| {
        let stack = Arc::new(server.stack(&["http/1.1"], without));
        server.connect_from([127, 0, 0, last], &stack).get("/", &[]).status
    };
    let other = [CipherSuite::TLS13_AES_128_GCM_SHA256];
    assert_eq!([get(1, &[]), get(2, &[]), get(3, &[]), get(3, &other)], [200, 200, 429, 200]);
    for _ in 0..4 {
        let status = Client::connect(server.gateway.addresses[1]).get("/", &[]).status;
        assert_eq!(status, 200, "no key without TLS");
    }
}

/// The TLS stack of a trusted proxy is not that of its clients.
#[test]
fn fingerprint_of_a_proxy_is_not_used() {
    let rest = format!("[identity]\ntrusted_proxies = [\"127.0.0.1\"]\n{DEVICE_LIMIT}");
    let server = Server::start(BY_DEVICE, &rest);
    let client = [("x-forwarded-for", "192.0.2.1")];
    for (without, expected) in [
        (CipherSuite::TLS13_AES_128_GCM_SHA256, 200),
        (CipherSuite::TLS13_AES_256_GCM_SHA384, 200),
        (CipherSuite::TLS13_CHACHA20_POLY1305_SHA256, 429),
    ] {
        let stack = Arc::new(server.stack(&["http/1.1"], &[without]));
        assert_eq!(server.connect(&stack).get("/", &client).status, expected);
    }
}

/// An operator sees the fingerprint in the log and asks for the state of the device with it.
#[test]
fn explanation_takes_the_fingerprint() {
    let identity = "[identity]\ndevice = [\"header:x-device-id\"]\n";
    let server = Server::start(BY_DEVICE, &format!("{identity}{DEVICE_LIMIT}"));
    let stack = Arc::new(server.stack(&["http/1.1"], &[]));
    while server.status(&stack, "a") == 200 {}
    let fingerprint = server.logged(3, "fingerprint").pop_first().expect("a fingerprint");
    let explain = |parameters: &str| {
        let target = format!("/api/v1/limits/explain?ip=127.0.0.1&device=a{parameters}");
        let response = server.gateway.admin(&target);
        assert_eq!(response.status, 200, "{response:?}");
        response.text()
    };
    assert_ne!(explain(&format!("&fingerprint={fingerprint}")), explain(""));
}

/// Bytes that are no ClientHello get an alert, and a silent or slow client ends at the timeout.
#[test]
fn malformed_hellos_are_refused() {
    let server = Server::start("", "[limits_http]\nheader_timeout = \"1s\"\n");
    let failures =
        |reason: &str| server.gateway.metric(&format!("tidegate_tls_handshakes_failed_total{{reason=\"{reason}\"}}"));
    let cases: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\0\x04\x02\0\0\0",
        b"\x16\x03\x01\0\x08\x01\0\0\x04\x03\x03\0\0",
        b"\x16\x03\x01\0\0\x16\x03\x01\0\0\x16\x03\x01\0\0",
    ];
    for hello in cases {
        let answer = server.gateway.raw(hello);
        assert_eq!((answer.first(), answer.len()), (Some(&21), 7), "an alert alone: {answer:?}");
    }
    wait_for(|| failures("protocol") >= 3.0, STEP_TIMEOUT);
    assert_eq!(server.gateway.raw(b"\x16\x03\x01\x01\0\x01"), b"");
    // The connection may end before the failure is counted.
    wait_for(|| failures("timeout") >= 1.0, STEP_TIMEOUT);
    // The message may have 16 MiB by its length: rustls refuses it before that.
    let mut client = server.gateway.connect();
    let mut endless = vec![0x16, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff];
    endless.resize(5 + 0x4000, 0);
    while client.try_send(&endless).is_ok() {
        endless[5..9].fill(0);
    }
    assert!(server.gateway.process.memory() < 64 << 20);
}
