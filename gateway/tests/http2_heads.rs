//! Every request of the corpus that HTTP/2 can express gets the same status as over HTTP/1.1. And
//! h2spec.

mod support;

#[path = "corpus/format.rs"]
#[expect(dead_code, reason = "the corpus of responses is not used here")]
mod format;

use std::path::PathBuf;
use std::process::Command;

use format::{ClientStep, RequestCase};
use support::frames::{DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, head_block};
use support::tls::{LISTEN_TLS, write_certificate};
use support::{Gateway, Origin, Script, TempDir, one_route};

/// The limits of the corpus.
const LIMITS: &str =
    "[limits_http]\nheader_bytes = \"4KiB\"\nheader_fields = 20\nuri_bytes = \"1KiB\"\nbody_bytes = \"64KiB\"\n";
const WINDOW: u32 = 65_535;

/// A request in the form of HTTP/2.
struct Http2Request {
    fields: Vec<(String, String)>,
    body: usize,
}

/// The first request of a case; `None`: HTTP/2 cannot express it.
fn converted(case: &RequestCase) -> Option<Http2Request> {
    let bytes: Vec<u8> = case
        .steps
        .iter()
        .filter_map(|step| match step {
            ClientStep::Send(bytes) => Some(bytes.clone()),
            _ => None,
        })
        .flatten()
        .collect();
    let text = String::from_utf8(bytes).ok()?;
    let (head, _) = text.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let parts: Vec<&str> = lines.next()?.split(' ').collect();
    let [method, target, "HTTP/1.1"] = *parts else { return None };
    if method.is_empty() || !(target.starts_with('/') || target == "*") || method == "CONNECT" {
        return None;
    }
    let mut pseudo = vec![
        (":method".to_owned(), method.to_owned()),
        (":scheme".to_owned(), "https".to_owned()),
        (":path".to_owned(), target.to_owned()),
    ];
    let (mut fields, mut hosts, mut length) = (Vec::new(), Vec::new(), None);
    for line in lines {
        let (name, value) = line.split_once(':')?;
        let is_expressible = !name.is_empty() && !name.contains([' ', '\t']) && !line.contains(['\r', '\n']);
        let name = name.to_lowercase();
        let is_connection =
            ["connection", "te", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection", "trailer"];
        if !is_expressible || is_connection.contains(&&*name) {
            return None;
        }
        let value = value.trim_matches([' ', '\t']).to_owned();
        match &*name {
            "host" => hosts.push(value),
            "content-length" => {
                length = Some(value.parse().unwrap_or(0));
                fields.push((name, value));
            }
            _ => fields.push((name, value)),
        }
    }
    match &*hosts {
        [host] => pseudo.push((":authority".to_owned(), host.clone())),
        hosts => fields.extend(hosts.iter().map(|host| ("host".to_owned(), host.clone()))),
    }
    pseudo.extend(fields);
    let body = length.unwrap_or(0);
    // One frame.
    let head: usize = pseudo.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
    (head < 16_000 && (body <= 16_000 || body > 65_536)).then_some(Http2Request { fields: pseudo, body })
}

#[test]
fn corpus_has_the_same_statuses_as_over_http1() {
    let origin = Origin::start(|_| Script::ok(&[], ""));
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let config = one_route(origin.address, "cache = { mode = \"off\" }", &format!("{LIMITS}\n{LISTEN_TLS}"));
    let gateway = Gateway::start_in(dir, &config);
    let (mut compared, mut refused, mut failures) = (0, 0, Vec::new());
    let cases = format::files("requests").into_iter().flat_map(|path| format::requests(&path));
    let leaves = |case: &RequestCase| case.steps.iter().any(|step| matches!(step, ClientStep::Shutdown));
    for case in cases.filter(|case| case.known_failure.is_none() && !leaves(case)) {
        let Some(request) = converted(&case) else { continue };
        let Some(expected) = case.responses.first().map(|response| response.status).filter(|status| *status >= 200)
        else {
            continue;
        };
        let mut client = FrameClient::connect(&gateway, &trusted, WINDOW);
        let fields: Vec<(&str, &str)> = request.fields.iter().map(|(name, value)| (&**name, &**value)).collect();
        let has_length = fields.iter().any(|(name, _)| *name == "content-length");
        let flags = END_HEADERS | if has_length { 0 } else { END_STREAM };
        // In one flight, so that no 100 (Continue) is due.
        let mut sent = Frame::new(HEADERS, flags, 1).with(head_block(&fields)).bytes();
        if has_length && expected < 300 {
            sent.extend(Frame::new(DATA, END_STREAM, 1).with(vec![0; request.body]).bytes());
        }
        client.send_bytes(&sent);
        let frames = client.response(1);
        let status = frames.iter().find(|frame| frame.kind == HEADERS).map_or(0, Frame::status);
        compared += 1;
        refused += usize::from(expected >= 400);
        if status != expected {
            failures.push(format!("{}: {status} instead of {expected}: {:?}", case.name, request.fields));
        }
    }
    assert!(failures.is_empty(), "{} of {compared}:\n{}", failures.len(), failures.join("\n"));
    assert!(compared >= 100 && refused >= 50, "{compared} cases, {refused} refused");
}

/// The path of h2spec, if it is installed or Go can build it.
fn h2spec() -> Option<PathBuf> {
    let bin = PathBuf::from(std::env::var_os("HOME")?).join(".cache/tidegate/bin");
    let installed = bin.join("h2spec");
    if installed.is_file() {
        return Some(installed);
    }
    let mut go = Command::new("go");
    go.env("GOBIN", &bin).env("GOFLAGS", "-mod=mod");
    let built = go.args(["install", "github.com/summerwind/h2spec/cmd/h2spec@v2.2.1+incompatible"]).output();
    match built {
        Ok(output) if output.status.success() => Some(installed),
        Ok(output) => {
            eprintln!("SKIPPED: h2spec cannot be built: {}", String::from_utf8_lossy(&output.stderr));
            None
        }
        Err(_) => {
            eprintln!("SKIPPED: h2spec was not run, because neither it nor Go is installed.");
            None
        }
    }
}

#[test]
fn h2spec_passes() {
    let Some(h2spec) = h2spec() else { return };
    let origin = Origin::start(|_| Script::ok(&[], "hello"));
    let dir = TempDir::new();
    write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "", LISTEN_TLS));
    let (host, port) = (gateway.address.ip().to_string(), gateway.address.port().to_string());
    let output = Command::new(h2spec).args(["-t", "-k", "-S", "-o", "5", "-h", &host, "-p", &port]).output();
    let output = output.expect("h2spec runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains(" 0 failed"), "{text}");
    eprintln!("h2spec: {}", text.lines().rfind(|line| line.contains("tests,")).unwrap_or_default());
}

#[test]
fn both_protocols_are_counted_alike() {
    let origin = Origin::start(|_| Script::ok(&[], "hello"));
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "", &format!("{LIMITS}\n{LISTEN_TLS}")));
    let long = "x".repeat(5_000);
    type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str);
    let requests: [Case<'_>; 8] = [
        ("GET", "/a", &[], ""),
        ("GET", "/b", &[("x-a", "1")], ""),
        ("GET", "*", &[], "target"),
        ("get", "/", &[], "method_case"),
        ("TRACE", "/", &[], "method"),
        ("GET", "/", &[("expect", "other")], "expectation"),
        ("GET", "/", &[("x-long", &long)], "head_too_large"),
        ("POST", "/", &[("content-length", "100000")], "body_too_large"),
    ];
    for (method, target, fields, _) in requests {
        let mut lines = format!("{method} {target} HTTP/1.1\r\nHost: gate.test\r\n");
        fields.iter().for_each(|(name, value)| lines.push_str(&format!("{name}: {value}\r\n")));
        let mut http1 = support::tls::connect(gateway.address, &trusted);
        http1.send(format!("{lines}\r\n"));
        let over_http1 = http1.read_response().status;
        let mut pseudo =
            vec![(":method", method), (":scheme", "https"), (":path", target), (":authority", "gate.test")];
        pseudo.extend_from_slice(fields);
        let mut http2 = FrameClient::connect(&gateway, &trusted, WINDOW);
        let has_length = fields.iter().any(|(name, _)| *name == "content-length");
        let flags = END_HEADERS | if has_length { 0 } else { END_STREAM };
        http2.send(&Frame::new(HEADERS, flags, 1).with(head_block(&pseudo)));
        let frames = http2.response(1);
        assert_eq!(frames[0].status(), over_http1, "{method} {target} {fields:?}");
    }
    let count = |series: &str, version: &str| {
        let separator = if series.contains('{') { "," } else { "{" };
        gateway.metric(&format!("{}{separator}network_protocol_version=\"{version}\"}}", series.trim_end_matches('}')))
    };
    for version in ["1.1", "2"] {
        let ended = || count("http_server_request_duration_seconds_count", version) == 2.0;
        support::wait_for(ended, support::STEP_TIMEOUT);
        assert_eq!(count("tidegate_requests_total", version), 2.0, "{version}");
        for (.., reason) in requests.iter().filter(|(.., reason)| !reason.is_empty()) {
            let series = format!("tidegate_requests_refused_total{{reason=\"{reason}\"}}");
            support::wait_for(|| count(&series, version) == 1.0, support::STEP_TIMEOUT);
        }
        assert_eq!(count("tidegate_requests_refused_total", version), 6.0, "{version}");
    }
    assert_eq!(gateway.metric("tidegate_requests_in_flight"), 0.0);
    // A head that does not end.
    let dir = TempDir::new();
    let trusted = write_certificate(&dir);
    let limits = "[limits_http]\nheader_timeout = \"300ms\"\n";
    let gateway = Gateway::start_in(dir, &one_route(origin.address, "", &format!("{limits}\n{LISTEN_TLS}")));
    let mut http2 = FrameClient::connect(&gateway, &trusted, WINDOW);
    http2.send(&Frame::new(HEADERS, END_STREAM, 1).with(head_block(&[(":method", "GET")])));
    let mut http1 = support::tls::connect(gateway.address, &trusted);
    http1.send("GET / HTTP/1.1\r\n");
    for version in ["1.1", "2"] {
        let series = format!(
            "tidegate_requests_refused_total{{reason=\"head_timeout\",network_protocol_version=\"{version}\"}}"
        );
        support::wait_for(|| gateway.metric(&series) == 1.0, support::STEP_TIMEOUT);
    }
    let mut lines: Vec<[String; 4]> = gateway
        .access_log(2)
        .iter()
        .map(|line| ["version", "scheme", "refused", "status"].map(|name| line[name].to_string()))
        .collect();
    lines.sort_unstable();
    let line = |version: &str| [version, "\"https\"", "\"head_timeout\"", "408"].map(str::to_owned);
    assert_eq!(lines, [line("\"1.1\""), line("\"2.0\"")]);
}
