//! The control address of a fault proxy: GET reads plan and counts, PUT replaces the plan, DELETE
//! clears it. One request per connection, JSON both ways.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::faults::plan::FaultPlan;
use crate::faults::proxy::FaultProxy;
use crate::interrupt;

const STEP_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_BYTES_MAX: usize = 64 << 10;
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Serves until the command is interrupted or the proxy ends. `listener` does not block.
pub(crate) fn serve(listener: &TcpListener, proxy: &FaultProxy) -> io::Result<()> {
    while !interrupt::is_requested() && proxy.is_running() {
        match listener.accept() {
            // A broken request is the client's affair.
            Ok((stream, _)) => drop(answer(stream, proxy)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => thread::sleep(POLL_INTERVAL),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream, proxy: &FaultProxy) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(STEP_TIMEOUT))?;
    stream.set_write_timeout(Some(STEP_TIMEOUT))?;
    let request = read_request(&mut stream);
    let (status, body) = match request {
        Ok((method, body)) => respond(proxy, &method, &body),
        Err(fault) => ("400 Bad Request", json!({ "error": fault.to_string() })),
    };
    let body = format!("{body}\n");
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

fn respond(proxy: &FaultProxy, method: &str, body: &[u8]) -> (&'static str, serde_json::Value) {
    let plan = match method {
        "GET" => None,
        "PUT" => Some(FaultPlan::from_json(body)),
        "DELETE" => Some(Ok(FaultPlan::default())),
        _ => return ("405 Method Not Allowed", json!({ "error": "GET, PUT and DELETE are known" })),
    };
    match plan {
        Some(Err(fault)) => return ("400 Bad Request", json!({ "error": fault })),
        Some(Ok(plan)) => proxy.set_plan(plan),
        None => {}
    }
    ("200 OK", json!({ "plan": *proxy.plan(), "counts": proxy.report() }))
}

/// Method and body of a request.
fn read_request(stream: &mut impl Read) -> io::Result<(String, Vec<u8>)> {
    let invalid = |message: &'static str| io::Error::new(io::ErrorKind::InvalidData, message);
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4_096]);
    loop {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut fields);
        if let httparse::Status::Complete(head) = request.parse(&bytes).map_err(|_| invalid("not an HTTP request"))? {
            let length = request.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
            let length = match length {
                None => 0,
                Some(field) => std::str::from_utf8(field.value)
                    .ok()
                    .and_then(|text| text.trim().parse::<usize>().ok())
                    .filter(|length| *length <= REQUEST_BYTES_MAX)
                    .ok_or_else(|| invalid("Content-Length is not a number of at most 65536"))?,
            };
            if bytes.len() >= head + length {
                return Ok((request.method.unwrap_or_default().to_owned(), bytes[head..head + length].to_vec()));
            }
        }
        if bytes.len() > 2 * REQUEST_BYTES_MAX {
            return Err(invalid("the request is too long"));
        }
        match stream.read(&mut buffer)? {
            0 => return Err(invalid("the request is incomplete")),
            length => bytes.extend_from_slice(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    #[test]
    fn incomplete_or_oversize_requests_are_errors() {
        for text in ["", "PUT / HTTP/1.1\r\n", "PUT / HTTP/1.1\r\nContent-Length: 5\r\n\r\nabc", "x\r\n\r\n"] {
            assert!(read_request(&mut text.as_bytes()).is_err(), "{text}");
        }
        for length in ["-1", "x", "65537"] {
            let text = format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
            assert!(read_request(&mut text.as_bytes()).is_err(), "{length}");
        }
    }

    #[test]
    fn plan_is_read_replaced_and_cleared() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let upstream = TcpListener::bind(any).expect("a port");
        let to = upstream.local_addr().expect("an address");
        let proxy = FaultProxy::start(any, to, (FaultPlan::default(), 0)).expect("a proxy");
        let body = br#"{"rules": [{"latency_ms": 5, "direction": "down"}]}"#;
        let (status, reply) = respond(&proxy, "PUT", body);
        assert!(status.starts_with("200") && reply["plan"]["rules"][0]["latency_ms"] == 5, "{reply}");
        let (status, reply) = respond(&proxy, "PUT", b"{\"rules\": [{\"latency\": 5}]}");
        assert!(
            status.starts_with("400") && reply["error"].as_str().is_some_and(|it| it.contains("latency")),
            "{reply}"
        );
        assert_eq!(respond(&proxy, "GET", b"").1["plan"]["rules"].as_array().map(Vec::len), Some(1));
        assert_eq!(respond(&proxy, "DELETE", b"").1["plan"]["rules"].as_array().map(Vec::len), Some(0));
        assert!(respond(&proxy, "POST", b"").0.starts_with("405"));
    }
}
