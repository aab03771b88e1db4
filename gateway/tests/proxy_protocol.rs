//! The PROXY protocol: the address of the client behind a proxy that does not speak HTTP.

mod support;

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use support::tls::{self, LISTEN_TLS, write_certificate};
use support::{Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const V1: &str = "PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\r\n";
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A version 2 header for a client at 192.0.2.`last`, followed by type-length-values.
fn v2(last: u8, values: &[u8]) -> Vec<u8> {
    let addresses = [192, 0, 2, last, 192, 0, 2, 2, 0x03, 0xe8, 1, 187];
    header(0x21, 0x11, &[&addresses, values].concat())
}

fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(body.len()).expect("short").to_be_bytes();
    [SIGNATURE, &[command, family], &length, body].concat()
}

/// Loopback is the trusted proxy, except 127.0.0.9.
const TRUSTED: &str = "trusted_proxies = [\"127.0.0.0/29\"]";

fn config(origin: &Origin, mode: &str, rest: &str) -> String {
    let listen = format!("[[listen]]\naddress = \"127.0.0.1:0\"\nproxy_protocol = \"{mode}\"\n");
    one_route(origin.address, "", &format!("[identity]\n{TRUSTED}\n{listen}{rest}"))
}

fn gateway(origin: &Origin, mode: &str, rest: &str) -> Gateway {
    Gateway::start(&config(origin, mode, rest))
}

fn refused(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metric(&format!("tidegate_proxy_protocol_refused_total{{reason=\"{reason}\"}}"))
}

/// Sends a header and a request; returns the `X-Forwarded-For` that the origin received.
fn forwarded_for(gateway: &Gateway, origin: &Origin, header: &[u8]) -> String {
    let mut client = gateway.connect();
    let target = format!("/{}", origin.requests().len());
    client.send([header, &support::client::request("GET", &target, &[], b"")].concat());
    assert_eq!(client.read_response().status, 200, "{header:?}");
    let requests = origin.requests();
    requests.last().and_then(|request| request.field("x-forwarded-for")).expect("a forwarded request").to_owned()
}

#[test]
fn address_of_the_header_is_the_peer() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "[log]\naccess = \"stdout\"");
    for (header, expected) in [
        (V1.into(), "192.0.2.1"),
        ("PROXY TCP6 2001:db8::1 ::1 1 2\r\n".into(), "2001:db8::1"),
        ("PROXY TCP6 ::ffff:192.0.2.7 ::1 1 2\r\n".into(), "192.0.2.7"),
        ("PROXY UNKNOWN\r\n".into(), "127.0.0.1"),
        (v2(3, b""), "192.0.2.3"),
        (v2(4, b"\x02\0\x06a.test\x05\0\x02id\x04\0\0"), "192.0.2.4"),
        (header(0x20, 0x00, b""), "127.0.0.1"),
        (header(0x21, 0x00, b""), "127.0.0.1"),
        (header(0x21, 0x31, &[b'/'; 216]), "127.0.0.1"),
    ] {
        assert_eq!(forwarded_for(&gateway, &origin, &header), expected);
    }
    let log = gateway.access_log(9);
    let addresses = |path: &str| {
        let line = log.iter().find(|line| line["path"] == path).expect("a line for each request");
        (line["client"].as_str(), line["proxy"].as_str())
    };
    assert_eq!(addresses("/0"), (Some("192.0.2.1"), Some("127.0.0.1")));
    assert_eq!(addresses("/3"), (Some("127.0.0.1"), Some("127.0.0.1")), "an unknown client");
    assert_eq!(addresses("/6"), (Some("127.0.0.1"), None), "the proxy itself");
}

/// The header may arrive in any pieces, and together with what follows it.
#[test]
fn header_is_read_in_pieces() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    for header in [V1.as_bytes().to_vec(), v2(1, b"")] {
        let all = [&header[..], &support::client::request("GET", "/", &[], b"")].concat();
        for cut in [1, 5, 12, 15, 16, header.len() - 1, header.len(), header.len() + 3] {
            let mut client = gateway.connect();
            let before = gateway.process.stderr.all().len();
            client.send(&all[..cut]);
            // An exchange on another connection: the first part has been read by then.
            assert_eq!(gateway.admin("/live").status, 200);
            client.send(&all[cut..]);
            assert_eq!(client.read_response().status, 200, "{cut}");
            assert_eq!(gateway.process.stderr.all().len(), before);
        }
    }
}

#[test]
fn malformed_headers_close_the_connection() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    let request = support::client::request("GET", "/", &[], b"");
    let checksum = v2(1, b"\x03\0\x04\0\0\0\0");
    for (reason, headers) in [
        (
            "malformed",
            vec![
                b"PROXY TCP4 192.0.2.1 192.0.2.2 1000 443\n".to_vec(),
                b"PROXY TCP4 192.0.2.256 192.0.2.2 1000 443\r\n".to_vec(),
                b"PROXY TCP4 192.0.2.1 192.0.2.2 01000 443\r\n".to_vec(),
                b"PROXY TCP4 192.0.2.1  192.0.2.2 1000 443\r\n".to_vec(),
                b"PROXY \r\n".to_vec(),
                header(0x22, 0x11, &[0; 12]),
                header(0x11, 0x11, &[0; 12]),
                header(0x21, 0x12, &[0; 12]),
                header(0x21, 0x11, &[0; 11]),
                v2(1, b"\x04\0\x09x"),
            ],
        ),
        ("too_long", vec![[b"PROXY UNKNOWN ", &[b'x'; 92][..], b"\r\n"].concat(), header(0x21, 0x11, &[0; 4_081])]),
        ("checksum", vec![checksum]),
        ("missing", vec![b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(), b"\x16\x03\x01\0\x05hello".to_vec()]),
    ] {
        let before = refused(&gateway, reason);
        for header in &headers {
            assert_eq!(gateway.raw(&[&header[..], &request].concat()), b"", "{reason}: {header:?}");
        }
        assert_eq!(refused(&gateway, reason) - before, headers.len() as f64, "{reason}");
    }
    assert!(origin.requests().is_empty());
    let event = gateway.process.stderr.event("proxy_header_refused");
    assert_eq!((event["reason"].as_str(), event["peer"].as_str()), (Some("malformed"), Some("127.0.0.1")));
}

#[test]
fn untrusted_peers_cannot_send_a_header() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let untrusted: IpAddr = [127, 0, 0, 9].into();
    let request = |header: &[u8]| [header, &support::client::request("GET", "/", &[], b"")].concat();
    let required = gateway(&origin, "required", "");
    for bytes in [request(V1.as_bytes()), request(b"")] {
        let mut client = Client::connect_from(untrusted, required.address);
        // The gateway may have closed the connection already.
        let _sent_or_closed = client.try_send(&bytes);
        assert_eq!(client.read_to_end(), b"");
    }
    assert_eq!(refused(&required, "untrusted"), 2.0);
    for mode in ["optional", "off"] {
        let gateway = gateway(&origin, mode, "");
        for header in [V1.as_bytes().to_vec(), v2(1, b"")] {
            let mut client = Client::connect_from(untrusted, gateway.address);
            client.send(request(&header));
            assert_eq!(client.read_response().status, 400, "{mode}: {header:?}");
        }
        let mut client = Client::connect_from(untrusted, gateway.address);
        client.send(request(b""));
        assert_eq!(client.read_response().status, 200, "{mode}");
        assert_eq!(refused(&gateway, "untrusted"), 0.0);
    }
    // Off: a header is no request from a trusted proxy either.
    let off = gateway(&origin, "off", "");
    assert!(off.raw(&request(V1.as_bytes())).starts_with(b"HTTP/1.1 400 "));
}

#[test]
fn optional_header_may_be_absent() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "optional", "");
    assert_eq!(forwarded_for(&gateway, &origin, V1.as_bytes()), "192.0.2.1");
    assert_eq!(forwarded_for(&gateway, &origin, b""), "127.0.0.1");
    // The beginnings of a method and of a header may be equal.
    let mut client = gateway.connect();
    client.send(b"P");
    assert_eq!(gateway.admin("/live").status, 200);
    client.send(&support::client::request("PUT", "/put", &[], b"x")[1..]);
    assert_eq!(client.read_response().status, 200);
}

/// The fields of a client behind a trusted proxy that only passes bytes on are the client's own.
#[test]
fn identity_fields_of_the_client_are_not_those_of_the_proxy() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    let spoofed = [("x-forwarded-for", "198.51.100.1"), ("x-real-ip", "198.51.100.1")];
    for (header, expected) in [
        (V1, "192.0.2.1"),
        ("PROXY UNKNOWN\r\n", "127.0.0.1"),
        ("PROXY TCP4 127.0.0.2 127.0.0.1 1 2\r\n", "198.51.100.1, 127.0.0.2"),
    ] {
        let mut client = gateway.connect();
        let target = format!("/{}", origin.requests().len());
        client.send([header.as_bytes(), &support::client::request("GET", &target, &spoofed, b"")].concat());
        assert_eq!(client.read_response().status, 200);
        let received = origin.requests().pop().expect("a request");
        assert_eq!(received.field("x-forwarded-for"), Some(expected), "{header}");
        assert_eq!(received.field("x-real-ip").is_some(), expected.contains(','), "{header}");
    }
}

#[test]
fn limits_count_by_the_address_of_the_header() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let rest = "[limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\n\
                [limits_http]\nconnections_per_ip = 2\nheader_timeout = \"1s\"\n";
    let config = config(&origin, "required", rest)
        .replace("upstream = \"origin\"\n", "upstream = \"origin\"\nlimits = [\"device\"]\n");
    let gateway = Gateway::start(&config);
    let connect = |last: u8| {
        let mut client = gateway.connect();
        client.send(v2(last, b""));
        client
    };
    let statuses = |last| [(); 2].map(|()| connect(last).get("/", &[]).status);
    assert_eq!((statuses(1), statuses(2)), ([200, 429], [200, 429]));
    wait_for(|| gateway.metric("tidegate_connections") == 0.0, STEP_TIMEOUT);
    let mut held = [connect(1), connect(1), connect(2), connect(2)];
    for client in &mut held {
        assert_eq!(client.get("/", &[]).status, 429);
    }
    assert!(connect(1).is_closed_within(STEP_TIMEOUT), "a third connection of one client");
    assert_eq!(gateway.metric("tidegate_connections_refused_total{reason=\"connections_per_ip\"}"), 1.0);
    drop(held);
    wait_for(|| gateway.metric("tidegate_connections") == 0.0, STEP_TIMEOUT);
    // A proxy holds more connections that wait for their header than one client may have.
    let silent: Vec<Client> = (0..5).map(|_| gateway.connect()).collect();
    wait_for(|| gateway.metric("tidegate_connections") == 5.0, STEP_TIMEOUT);
    for mut client in silent {
        assert!(client.is_closed_within(STEP_TIMEOUT), "closed after header_timeout");
    }
    assert_eq!(refused(&gateway, "timeout"), 5.0);
    let mut ended = gateway.connect();
    ended.send(b"PROXY TCP4 192.0");
    ended.finish();
    assert!(ended.is_closed_within(STEP_TIMEOUT));
    assert_eq!(refused(&gateway, "closed"), 1.0);
}

#[test]
fn header_comes_before_tls() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let listen = LISTEN_TLS.replace("[listen.tls]", "proxy_protocol = \"required\"\n[listen.tls]");
    let config = one_route(origin.address, "", &format!("[identity]\n{TRUSTED}\n{listen}[log]\naccess = \"stdout\""));
    let gateway = Gateway::start_in(dir, &config);
    for header in [V1.as_bytes().to_vec(), v2(1, b"")] {
        // In packets of their own, and in one packet with the ClientHello.
        for is_coalesced in [false, true] {
            let mut socket = std::net::TcpStream::connect(gateway.address).expect("a connection");
            socket.set_nodelay(true).expect("a live socket");
            if is_coalesced {
                let mut stream = tls::over(socket, &trusted);
                let mut first = header.clone();
                stream.conn.write_tls(&mut first).expect("a vector");
                stream.sock.write_all(&first).expect("a live socket");
                let mut client = Client::from_stream(stream);
                assert_eq!(client.get("/", &[]).status, 200);
            } else {
                socket.write_all(&header).expect("a live socket");
                assert_eq!(Client::from_stream(tls::over(socket, &trusted)).get("/", &[]).status, 200);
            }
        }
    }
    let log = gateway.access_log(4);
    for line in log {
        assert_eq!((line["client"].as_str(), line["scheme"].as_str()), (Some("192.0.2.1"), Some("https")));
        assert!(line["ja4"].is_string(), "the TLS connection is the client's own");
    }
}

/// A reload changes the networks that may send headers.
#[test]
fn trusted_proxies_are_reloaded() {
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    assert_eq!(forwarded_for(&gateway, &origin, V1.as_bytes()), "192.0.2.1");
    gateway.rewrite(&config(&origin, "required", "").replace(TRUSTED, "trusted_proxies = [\"10.0.0.0/8\"]"));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    let mut client = gateway.connect();
    assert!(client.is_closed_within(STEP_TIMEOUT));
    assert_eq!(refused(&gateway, "untrusted"), 1.0);
}

fn is_installed(program: &str) -> bool {
    let found = Command::new(program).arg("-v").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_err() {
        eprintln!("{program} is not installed: nothing was tested");
    }
    found.is_ok()
}

#[test]
fn curl_sends_a_header() {
    if !is_installed("curl") {
        return;
    }
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    let url = format!("http://{}/", gateway.address);
    let output = Command::new("curl").args(["-sS", "--max-time", "10", "--haproxy-protocol", &url]).output();
    let output = output.expect("curl runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok", "{output:?}");
    assert_eq!(origin.requests()[0].field("x-forwarded-for"), Some("127.0.0.1"));
}

#[test]
fn haproxy_sends_headers_of_both_versions() {
    if !is_installed("haproxy") {
        return;
    }
    let origin = Origin::start(|_| Script::ok(&[], "ok"));
    let gateway = gateway(&origin, "required", "");
    for (option, source) in
        [("send-proxy", 5), ("send-proxy-v2", 6), ("send-proxy-v2 proxy-v2-options crc32c,unique-id", 7)]
    {
        let front = support::free_address();
        let (dir, back) = (TempDir::new(), gateway.address);
        let config = dir.write(
            "haproxy.cfg",
            &format!(
                "defaults\n mode tcp\n timeout connect 5s\n timeout client 5s\n timeout server 5s\n\
                 frontend f\n bind {front}\n default_backend b\n unique-id-format x1\n\
                 backend b\n server s {back} {option}\n"
            ),
        );
        let mut proxy = Process::start(Command::new("haproxy").arg("-db").arg("-f").arg(config));
        wait_for(|| std::net::TcpStream::connect(front).is_ok(), STEP_TIMEOUT);
        let before = origin.requests().len();
        let source = IpAddr::from([127, 0, 0, source]);
        let mut client = Client::connect_from(source, SocketAddr::new([127, 0, 0, 1].into(), front.port()));
        assert_eq!(client.get(&format!("/{source}"), &[]).status, 200, "{option}");
        let received = origin.requests().split_off(before).pop().expect("a request");
        assert_eq!(received.field("x-forwarded-for"), Some(&*source.to_string()), "{option}");
        proxy.kill();
    }
}
