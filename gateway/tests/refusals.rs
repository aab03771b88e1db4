//! Responses to clients that are still sending their request: every client must be able to read
//! the response, also one that reads only after it has sent everything.
//!
//! A close with unread bytes resets a TCP connection, and the reset discards what the client has
//! not read yet. So the gateway ends its sending side and discards the client's bytes for a
//! short time.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use support::client::chunked;
use support::tls::{self, LISTEN_TLS};
use support::{BodyEnd, Client, Gateway, Origin, Process, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

/// The sizes of the uploads: below and above the default of `limits_http.body_bytes`.
const SIZES: [usize; 2] = [8 << 20, 20 << 20];
const SMALL_BODIES: &str = "[limits_http]\nbody_bytes = \"1MiB\"\n";
/// Each client is tried this often: a lost response is a race.
const TRIES: usize = 10;

/// An origin that responds to a request's head at once and then closes, with or without reading
/// the body.
fn early_origin(status: &'static str, reads_body: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || {
                stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
                let mut head = [0; 16 << 10];
                if stream.read(&mut head).is_ok_and(|count| count > 0) {
                    let response = format!("HTTP/1.1 {status}\r\nContent-Length: 5\r\nConnection: close\r\n\r\nearly");
                    drop(stream.write_all(response.as_bytes()));
                    while reads_body && stream.read(&mut head).is_ok_and(|count| count > 0) {}
                }
            });
        }
    });
    address
}

/// A gateway with a plain listener and one with TLS.
fn start_gateway(origin: SocketAddr, route: &str, rest: &str) -> (Gateway, CertificateDer<'static>) {
    let dir = TempDir::new();
    let trusted = tls::write_certificate(&dir);
    let listen = format!("{rest}\n[[listen]]\naddress = \"127.0.0.1:0\"\n{LISTEN_TLS}");
    let gateway = Gateway::start_in(dir, &one_route(origin, route, &listen));
    assert_eq!(gateway.addresses.len(), 2);
    (gateway, trusted)
}

/// Sends all of `request`, and only then reads the response.
#[track_caller]
fn send_then_read<S: Read + Write>(mut client: Client<S>, request: &[u8], expected: u16) {
    client.try_send(request).expect("the gateway reads all of the upload");
    let response = client.try_read_head().expect("the response is not lost");
    assert_eq!(response.status, expected);
    let response = client.read_body(response, "POST");
    assert_eq!(response.end, BodyEnd::Complete);
    // The gateway may have discarded the whole body; the connection then continues.
    if response.field("connection") == Some("close") {
        assert!(client.read_to_end().is_empty(), "nothing follows");
    }
}

/// Uploads of both sizes over plain TCP and TLS, with a length and chunked.
#[track_caller]
fn upload(gateway: &(Gateway, CertificateDer<'static>), target: &str, expected: u16) {
    let ([plain, secure], trusted) = (<[SocketAddr; 2]>::try_from(&*gateway.0.addresses).expect("two"), &gateway.1);
    for size in SIZES {
        let body = vec![b'x'; size];
        let head = |framing: String| format!("POST {target} HTTP/1.1\r\nHost: gate.test\r\n{framing}\r\n\r\n");
        let with_length = [head(format!("Content-Length: {size}")).as_bytes(), &body].concat();
        let in_chunks = [head("Transfer-Encoding: chunked".to_owned()).as_bytes(), &chunked(&body, 64 << 10)].concat();
        for request in [with_length, in_chunks] {
            send_then_read(Client::connect(plain), &request, expected);
            send_then_read(tls::connect(secure, trusted), &request, expected);
        }
    }
}

#[test]
fn oversize_upload_reads_its_413_after_sending_everything() {
    let origin = Origin::start(|_| Script::ok(&[], "unreachable"));
    let gateway = start_gateway(origin.address, "", SMALL_BODIES);
    for _ in 0..TRIES {
        upload(&gateway, "/", 413);
    }
    assert_eq!(origin.count(), 0);
}

#[test]
fn denied_upload_reads_its_429_after_sending_everything() {
    let origin = Origin::start(|_| Script::ok(&[], "admitted"));
    // One budget for the address: without and with TLS, the client is two devices.
    let none = "[limits.few]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\nper_address = 1\n[limits_http]\nbody_bytes = \"1GiB\"\n";
    let gateway = start_gateway(origin.address, "limits = [\"few\"]", none);
    assert_eq!(gateway.0.get("/", &[]).status, 200);
    upload(&gateway, "/", 429);
    // The response says that the connection ends, unless the body can be discarded for reuse.
    let connection = |length: usize| {
        let mut client = gateway.0.connect();
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n"));
        let response = client.read_response();
        (response.status, response.field("connection").map(str::to_owned))
    };
    assert_eq!((connection(20 << 20), connection(2_000)), ((429, Some("close".to_owned())), (429, None)));
}

#[test]
fn early_response_of_the_origin_reaches_a_client_that_sends_first() {
    for (status, reads_body) in [("413 Too Large", false), ("413 Too Large", true), ("401 Unauthorized", false)] {
        let rest = "[limits_http]\nbody_bytes = \"1GiB\"\n";
        let gateway = start_gateway(early_origin(status, reads_body), "cache = { mode = \"off\" }", rest);
        for _ in 0..3 {
            upload(&gateway, "/", status[..3].parse().expect("a number"));
        }
    }
}

#[test]
fn response_to_a_malformed_body_is_readable_after_sending_everything() {
    let origin = Origin::start(|_| Script::ok(&[], "unreachable"));
    let (gateway, trusted) = start_gateway(origin.address, "", "");
    let mut request = b"POST / HTTP/1.1\r\nHost: gate.test\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n".to_vec();
    request.resize(8 << 20, b'x');
    for _ in 0..TRIES {
        send_then_read(gateway.connect(), &request, 400);
        send_then_read(tls::connect(gateway.addresses[1], &trusted), &request, 400);
    }
}

/// Starts a client that sends its body until the gateway closes the connection. The thread returns
/// for how long it has sent.
fn endless_upload(gateway: &Gateway) -> std::thread::JoinHandle<Duration> {
    let mut client = gateway.connect();
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = [b"10000\r\n".as_slice(), &[b'x'; 1 << 16], b"\r\n"].concat();
    let is_refused = || gateway.metric("tidegate_requests_refused_total{reason=\"body_too_large\"}") > 0.0;
    while client.try_send(&chunk).is_ok() && !is_refused() {}
    std::thread::spawn(move || {
        let start = Instant::now();
        while client.try_send(&chunk).is_ok() && start.elapsed() < STEP_TIMEOUT {}
        start.elapsed()
    })
}

/// The longest time that a closing connection may stay open, with a margin for a busy machine.
const LINGER_MAX: Duration = Duration::from_secs(8);

#[test]
fn endless_upload_is_counted_and_closed_within_the_linger_time() {
    let origin = Origin::start(|_| Script::ok(&[], "unreachable"));
    let (gateway, _) = start_gateway(origin.address, "", SMALL_BODIES);
    let sender = endless_upload(&gateway);
    assert_eq!(gateway.metric("tidegate_connections"), 1.0);
    let sent_for = sender.join().expect("no panic");
    // A fast sender is closed earlier, by the number of bytes.
    assert!(sent_for < LINGER_MAX, "{sent_for:?}");
    wait_for(|| gateway.metric("tidegate_connections") == 0.0, STEP_TIMEOUT);
}

#[test]
fn drain_waits_no_longer_than_the_linger_time() {
    let origin = Origin::start(|_| Script::ok(&[], "unreachable"));
    let rest = format!("[server]\ndrain_idle = \"0s\"\n{SMALL_BODIES}");
    let (mut gateway, _) = start_gateway(origin.address, "", &rest);
    let sender = endless_upload(&gateway);
    let start = Instant::now();
    gateway.process.signal("TERM");
    let status = gateway.process.wait(STEP_TIMEOUT);
    assert!(status.is_some_and(|status| status.success()), "{status:?}");
    assert!(start.elapsed() < LINGER_MAX, "{:?}", start.elapsed());
    sender.join().expect("no panic");
}

// Clients of other languages. Each prints the status that it has read, or fails.

/// Runs a client, which must print `413` for each upload.
#[track_caller]
fn run_client(command: &mut Command, uploads: usize) {
    let mut process = Process::start(command);
    let status = process.wait(6 * STEP_TIMEOUT);
    wait_for(|| process.stdout.all().len() >= uploads || !process.stderr.all().is_empty(), STEP_TIMEOUT);
    let (statuses, errors) = (process.stdout.all(), process.stderr.all());
    assert!(status.is_some_and(|status| status.success()), "{status:?}: {statuses:?} {errors:?}");
    assert_eq!(statuses, vec!["413"; uploads], "{errors:?}");
}

/// Gateways that refuse uploads themselves, and one that passes the origin's early refusal on.
fn refusing_gateways() -> [(Gateway, CertificateDer<'static>); 2] {
    let closed = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let large = "[limits_http]\nbody_bytes = \"1GiB\"\n";
    [
        start_gateway(closed, "", SMALL_BODIES),
        start_gateway(early_origin("413 Too Large", false), "cache = { mode = \"off\" }", large),
    ]
}

const PYTHON: &str = "
import http.client, ssl, sys
context = ssl.create_default_context()
context.check_hostname = False
context.verify_mode = ssl.CERT_NONE
plain, tls = sys.argv[1:]
for _ in range(10):
    for size in (8 << 20, 20 << 20):
        for connection in (http.client.HTTPConnection(plain, timeout=10),
                           http.client.HTTPSConnection(tls, timeout=10, context=context)):
            connection.request('POST', '/', body=b'x' * size)
            print(connection.getresponse().status)
";

/// `http.client` sends the whole body before it reads.
#[test]
fn python_reads_the_413() {
    for (gateway, _) in refusing_gateways() {
        let addresses = gateway.addresses.iter().map(SocketAddr::to_string);
        run_client(Command::new("python3").args(["-c", PYTHON]).args(addresses), 40);
    }
}

#[test]
fn curl_reads_the_413() {
    for (gateway, _) in refusing_gateways() {
        let file = gateway.dir.path().join("upload");
        std::fs::write(&file, vec![b'x'; 20 << 20]).expect("a written file");
        for (scheme, address) in ["http", "https"].into_iter().zip(&gateway.addresses) {
            for _ in 0..TRIES {
                let mut curl = Command::new("curl");
                curl.args(["--silent", "--show-error", "--insecure", "--http1.1", "--max-time", "10", "-H", "Expect:"]);
                curl.args(["--output", "/dev/null", "--write-out", "%{http_code}\\n", "-T"]).arg(&file);
                run_client(curl.arg(format!("{scheme}://{address}/")), 1);
            }
        }
    }
}

const NODE: &str = "
const { once } = require('events');
const clients = [[require('http'), process.argv[1]], [require('https'), process.argv[2]]];
async function upload(module, address) {
  const [host, port] = address.split(':');
  const headers = { 'Content-Length': 20 << 20 };
  const request = module.request({ host, port, method: 'POST', headers, rejectUnauthorized: false });
  const responded = once(request, 'response');
  request.end(Buffer.alloc(20 << 20, 'x'));
  const [response] = await responded;
  response.resume();
  await once(response, 'end');
  console.log(response.statusCode);
}
(async () => {
  for (let i = 0; i < 10; i++) for (const [module, address] of clients) await upload(module, address);
})();
";

/// Runs where node is installed: it reports a broken pipe instead of a response that it has not
/// read.
#[test]
fn node_reads_the_413() {
    if Command::new("node").arg("--version").output().is_err() {
        eprintln!("skipped: node is not installed");
        return;
    }
    for (gateway, _) in refusing_gateways() {
        let addresses = gateway.addresses.iter().map(SocketAddr::to_string);
        run_client(Command::new("node").args(["-e", NODE]).args(addresses), 20);
    }
}
