//! HTTP/2 of clients without TLS, with prior knowledge (RFC 9113 section 3.3).

mod support;

use std::io::{Read, Write};
use std::process::Command;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use support::frames::{
    DATA, END_HEADERS, Frame, FrameClient, GOAWAY, HEADERS, PING, SETTINGS, Server, WINDOW, body, get, request, status,
};
use support::tls::LISTEN_TLS;
use support::{Gateway, Origin, STEP_TIMEOUT, Script, one_route};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const LISTEN: &str = "[[listen]]\naddress = \"127.0.0.1:0\"\nhttp2 = true\n";

fn origin() -> Origin {
    Origin::start(|request| {
        let proto = request.field("x-forwarded-proto").unwrap_or_default().to_owned();
        Script::ok(&[], format!("{} {} {proto} {} bytes", request.method, request.target, request.body.len()))
    })
}

fn gateway(origin: &Origin, rest: &str) -> Gateway {
    let listen = if rest.contains("[[listen]]") { "" } else { LISTEN };
    Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }", &format!("{rest}{listen}")))
}

#[test]
fn client_with_prior_knowledge_is_served() {
    let origin = origin();
    let gateway = gateway(&origin, "[log]\naccess = \"stdout\"\n");
    let mut client = FrameClient::connect_plain(gateway.address);
    client.send_preface(WINDOW);
    client.send(&get(1, "/a?b"));
    let response = client.response(1);
    assert_eq!((status(&response), body(&response)), (200, b"GET /a?b http 0 bytes".to_vec()));
    client.send(&request(3, "POST", "/upload"));
    client.send(&Frame::new(DATA, 1, 3).with([b'x'; 1_000]));
    let response = client.response(3);
    assert_eq!((status(&response), body(&response)), (200, b"POST /upload http 1000 bytes".to_vec()));
    let log = gateway.access_log(2);
    assert!(
        log.iter()
            .all(|line| line["version"] == "2.0" && line["scheme"] == "http" && line.get("tls_version").is_none()),
        "{log:?}"
    );
    assert_eq!(gateway.metric("tidegate_requests_total{network_protocol_version=\"2\"}"), 2.0);
    // Clients of HTTP/1.1 share the listener.
    assert_eq!(gateway.get("/", &[]).text(), "GET / http 0 bytes");
}

#[test]
fn preface_may_arrive_in_pieces() {
    let origin = origin();
    let gateway = gateway(&origin, "");
    let bytes = [PREFACE, &Frame::new(SETTINGS, 0, 0).bytes(), &get(1, "/a").bytes()].concat();
    for piece in [1, 17, 18, 19, 24, 25, bytes.len()] {
        let mut client = FrameClient::connect_plain(gateway.address);
        for part in bytes.chunks(piece) {
            client.send_bytes(part);
            if piece > 1 {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        assert_eq!(status(&client.response(1)), 200, "pieces of {piece} bytes");
    }
}

#[test]
fn listener_without_http2_refuses_it() {
    let origin = origin();
    for listen in [LISTEN.replace("http2 = true\n", ""), LISTEN.replace("true", "false")] {
        let gateway = gateway(&origin, &listen);
        let mut client = gateway.connect();
        client.send(PREFACE);
        assert_eq!(client.read_response_to("GET").status, 505);
        assert_eq!(gateway.get("/", &[]).status, 200);
    }
    assert_eq!(origin.count(), 2);
    // With TLS, it is not offered.
    for (http2, agreed) in [("", &b"h2"[..]), ("http2 = true", b"h2"), ("http2 = false", b"http/1.1")] {
        let listen = LISTEN_TLS.replace("[listen.tls]", &format!("{http2}\n[listen.tls]"));
        let dir = support::TempDir::new();
        let trusted = support::tls::write_certificate(&dir);
        let gateway = Gateway::start_in(dir, &one_route(origin.address, "", &listen));
        let mut stream = tls_stream(&gateway, &trusted, &[b"h2", b"http/1.1"]);
        assert_eq!(stream.conn.alpn_protocol(), Some(agreed));
        if agreed == b"http/1.1" {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: gate.test\r\nConnection: close\r\n\r\n").expect("a live socket");
            assert!(read_all(&mut stream).starts_with("HTTP/1.1 200 "));
        }
    }
}

/// After the handshake.
fn tls_stream(
    gateway: &Gateway,
    trusted: &rustls::pki_types::CertificateDer<'static>,
    protocols: &[&[u8]],
) -> StreamOwned<ClientConnection, std::net::TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a usable certificate");
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("TLS 1.2 and 1.3").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let name = ServerName::try_from("gate.test").expect("a name");
    let connection = ClientConnection::new(std::sync::Arc::new(config), name).expect("a client");
    let socket = std::net::TcpStream::connect_timeout(&gateway.address, STEP_TIMEOUT).expect("a connection");
    socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).expect("a handshake");
    }
    stream
}

fn read_all(stream: &mut impl Read) -> String {
    let mut bytes = Vec::new();
    // The end may be one without close_notify.
    let _whole_or_cut = stream.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// HTTP/2 begins a connection without TLS, or TLS has agreed on it: nothing else switches to it.
#[test]
fn connection_of_http_1_1_does_not_become_one_of_http_2() {
    let server = Server::echo("");
    let mut stream = tls_stream(&server.gateway, &server.trusted, &[b"http/1.1"]);
    stream.write_all(PREFACE).expect("a live socket");
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 505 "));
    let origin = origin();
    let gateway = gateway(&origin, "");
    let mut client = gateway.connect();
    assert_eq!(client.get("/", &[]).status, 200);
    client.send(PREFACE);
    assert_eq!(client.read_response_to("GET").status, 505);
    // The switch by an upgrade is no more (RFC 9113 section 3.1).
    let fields =
        [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA")];
    assert_eq!(gateway.get("/", &fields).status, 200);
}

#[test]
fn faults_of_the_preface_end_the_connection() {
    let origin = origin();
    let gateway = gateway(&origin, "[limits_http]\nheader_timeout = \"500ms\"\n");
    let mut client = FrameClient::connect_plain(gateway.address);
    client.send_bytes(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r");
    assert_eq!(client.expect(GOAWAY).code(), 1);
    let mut client = FrameClient::connect_plain(gateway.address);
    client.send_bytes(&[PREFACE, &Frame::new(PING, 0, 0).with([0; 8]).bytes()].concat());
    assert_eq!(client.expect(GOAWAY).code(), 1);
    for part in [&PREFACE[..18], &PREFACE[..23], PREFACE] {
        let mut client = FrameClient::connect_plain(gateway.address);
        let begin = Instant::now();
        client.send_bytes(part);
        if part.len() == PREFACE.len() {
            client.send(&Frame::new(HEADERS, END_HEADERS, 1));
        }
        client.closed_within(STEP_TIMEOUT);
        assert!(begin.elapsed() < Duration::from_secs(4), "{} bytes: {:?}", part.len(), begin.elapsed());
    }
    assert_eq!(origin.count(), 0);
}

#[test]
fn curl_and_nghttp_use_it() {
    let origin = origin();
    let gateway = gateway(&origin, "");
    let url = format!("http://{}/tool", gateway.address);
    let curl = ["--http2-prior-knowledge", "-s", "-d", "abc", "-w", " %{http_version}", "--max-time", "10", &url];
    let output = Command::new("curl").args(curl).output().expect("curl");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "POST /tool http 3 bytes 2");
    let output = Command::new("nghttp").args(["-t", "10", &url]).output().expect("nghttp");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "GET /tool http 0 bytes");
}

#[test]
fn header_of_the_proxy_protocol_may_come_first() {
    let origin = Origin::start(|request| Script::ok(&[], request.field("x-forwarded-for").unwrap_or_default()));
    let rest = "[identity]\ntrusted_proxies = [\"127.0.0.1\"]\n[[listen]]\naddress = \"127.0.0.1:0\"\nhttp2 = true\nproxy_protocol = \"required\"\n";
    let gateway = gateway(&origin, rest);
    let mut client = FrameClient::connect_plain(gateway.address);
    client.send_bytes(b"PROXY TCP4 192.0.2.9 192.0.2.1 4000 80\r\n");
    client.send_preface(WINDOW);
    client.send(&get(1, "/"));
    assert!(String::from_utf8_lossy(&body(&client.response(1))).contains("192.0.2.9"));
}
