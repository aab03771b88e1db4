//! The access log of exchanges that something else than their own end has ended: the drain timeout,
//! a fault of the client, or the end of their connection. Each has one line with one reason.

mod support;

use std::collections::BTreeMap;

use support::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, PING, RST_STREAM, Server, WINDOW, get,
    head_block, request_with,
};
use support::{Gateway, Origin, STEP_TIMEOUT, Script, one_route, wait_for};

const LOG: &str = "[log]\naccess = \"stdout\"\n";
const DRAIN: &str = "[server]\ndrain_timeout = \"300ms\"\n[log]\naccess = \"stdout\"\n";

/// `/wait` is never answered, `/begin` in part, `/switch` with another protocol.
fn origin() -> Origin {
    Origin::start(|request| match &*request.target {
        "/begin" => Script::new().send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nbegin").hang(),
        "/switch" => Script::new()
            .send("HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\nhello")
            .hang(),
        _ => Script::new().hang(),
    })
}

type Ends = BTreeMap<String, (u64, String, String, u64)>;

/// Status, reason, blame and body bytes of the lines, by path.
fn ends(gateway: &Gateway, count: usize) -> Ends {
    let lines = gateway.access_log(count);
    assert_eq!(lines.len(), count, "{lines:?}");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let end = |line: &serde_json::Value| {
        let [status, bytes] = ["status", "bytes"].map(|name| line[name].as_u64().unwrap_or_default());
        (status, text(&line["aborted"]), text(&line["blame"]), bytes)
    };
    lines.iter().map(|line| (text(&line["path"]), end(line))).collect()
}

fn expected<const N: usize>(ends: [(&str, u64, &str, &str, u64); N]) -> Ends {
    let owned = |(path, status, aborted, blame, bytes): (&str, u64, &str, &str, u64)| {
        (path.to_owned(), (status, aborted.to_owned(), blame.to_owned(), bytes))
    };
    ends.map(owned).into()
}

#[test]
fn drain_timeout_ends_exchanges_of_http1_with_a_line_for_each() {
    let origin = origin();
    let mut gateway = Gateway::start(&one_route(origin.address, "", DRAIN));
    let mut clients = ["/wait", "/begin", "/switch"].map(|path| {
        let mut client = gateway.connect();
        let switch = [("Connection", "upgrade"), ("Upgrade", "echo")];
        client.send_get(path, if path == "/switch" { &switch } else { &[] });
        client
    });
    origin.wait_for_requests(3);
    assert_eq!([clients[1].read_head().status, clients[2].read_head().status], [200, 101]);
    clients[1].read_bytes(5);
    clients[2].read_bytes(5);
    gateway.process.signal("TERM");
    assert!(gateway.process.wait(STEP_TIMEOUT).is_some());
    let all = [
        ("/wait", 503, "drain_timeout", "gateway", 0),
        ("/begin", 200, "drain_timeout", "gateway", 5),
        ("/switch", 101, "drain_timeout", "gateway", 5),
    ];
    assert_eq!(ends(&gateway, 3), expected(all));
}

#[test]
fn drain_timeout_ends_streams_with_a_line_for_each() {
    let mut server = Server::start(origin(), "", DRAIN);
    let mut client = server.connect();
    client.send(&get(1, "/wait"));
    client.send(&get(3, "/begin"));
    server.origin.wait_for_requests(2);
    assert_eq!(client.expect(DATA).payload, b"begin");
    server.gateway.process.signal("TERM");
    assert!(server.gateway.process.wait(STEP_TIMEOUT).is_some());
    let all = [("/wait", 503, "drain_timeout", "gateway", 0), ("/begin", 200, "drain_timeout", "gateway", 5)];
    assert_eq!(ends(&server.gateway, 2), expected(all));
}

#[test]
fn faults_of_request_bodies_over_http2_have_their_names() {
    let server = Server::start(origin(), "", LOG);
    let mut client = server.connect();
    let data = |stream, flags, bytes: usize| Frame::new(DATA, flags, stream).with(vec![b'x'; bytes]);
    let put = |stream, path, length| request_with(stream, ("PUT", path), &[("content-length", length)]);
    client.send(&put(1, "/longer", "5"));
    client.send(&data(1, 0, 6));
    client.send(&put(3, "/shorter", "5"));
    client.send(&data(3, END_STREAM, 4));
    client.send(&put(5, "/reset", "5"));
    client.send(&data(5, 0, 1));
    client.send(&put(7, "/trailers", "5"));
    client.send(&data(7, 0, 5));
    client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 7).with(head_block(&[("X-A", "b")])));
    client.expect(RST_STREAM);
    // Once its exchange reads the body.
    wait_for(|| server.origin.connections() > 0, STEP_TIMEOUT);
    client.send(&Frame::new(RST_STREAM, 0, 5).with(8_u32.to_be_bytes()));
    let lines = server.gateway.access_log(4);
    let refused: BTreeMap<_, _> =
        lines.iter().map(|line| (line["path"].as_str().unwrap_or_default(), line["refused"].clone())).collect();
    let all = [
        ("/longer", "body_length"),
        ("/reset", "body_reset"),
        ("/shorter", "body_length"),
        ("/trailers", "body_syntax"),
    ];
    assert_eq!(refused, all.map(|(path, reason)| (path, reason.into())).into());
}

#[test]
fn streams_that_end_with_their_connection_have_its_reason() {
    let limits = format!("[limits_http]\nheader_timeout = \"300ms\"\n{LOG}");
    // A head that stays incomplete, a flood, an error of the protocol, and a client that leaves.
    let part = Frame::new(HEADERS, END_STREAM, 3).with(head_block(&[(":method", "GET")])).bytes();
    let flood = Frame::new(PING, 0, 0).with([0; 8]).bytes().repeat(400);
    let wrong = Frame::new(CONTINUATION, END_HEADERS, 3).bytes();
    for (bytes, reason) in
        [(part, "head_timeout"), (flood, "flood"), (wrong, "protocol_error"), (Vec::new(), "client_closed")]
    {
        let server = Server::start(origin(), "", &limits);
        let mut client = FrameClient::connect(&server.gateway, &server.trusted, WINDOW);
        client.send(&get(1, "/begin"));
        assert_eq!(client.expect(DATA).payload, b"begin");
        client.send_bytes(&bytes);
        if bytes.is_empty() {
            drop(client);
        } else {
            client.expect(support::frames::GOAWAY);
        }
        let mut all = expected([("/begin", 200, reason, "client", 5)]);
        if reason == "head_timeout" {
            // The head that was late has a line of its own.
            all.extend(expected([("-", 408, reason, "client", 0)]));
        }
        assert_eq!(ends(&server.gateway, all.len()), all, "{reason}");
        let aborted = format!("tidegate_responses_aborted_total{{reason=\"{reason}\"}}");
        assert_eq!(server.gateway.metric(&aborted), all.len() as f64);
    }
}
