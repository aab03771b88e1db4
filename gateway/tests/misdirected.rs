//! 421 for requests whose authority has another certificate than their connection (RFC 9110 section
//! 15.5.20), over both protocols, by curl.

mod support;

use std::process::Command;

use support::{Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const LISTEN: &str = "[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\ncertificates = [\
                      { cert = \"first.crt\", key = \"first.key\" }, { cert = \"second.crt\", key = \"second.key\" }]\n";

fn start(origin: &Origin, rest: &str) -> Gateway {
    let dir = TempDir::new();
    let certificates: [(&str, &[&str]); 2] =
        [("first", &["first.test", "also.test"]), ("second", &["second.test", "*.second.test"])];
    for (file, names) in certificates {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = rcgen::generate_simple_self_signed(names).expect("a certificate");
        dir.write(&format!("{file}.crt"), &certificate.cert.pem());
        dir.write(&format!("{file}.key"), &certificate.signing_key.serialize_pem());
    }
    Gateway::start_in(dir, &one_route(origin.address, "", &format!("{rest}\n{LISTEN}")))
}

/// The status of a request for `host` over a connection to `server`, and its body.
fn status(gateway: &Gateway, (server, host): (&str, &str), protocol: &str) -> (u16, String) {
    let port = gateway.address.port();
    let output = Command::new("curl")
        .args(["-sk", "--max-time", "10", "-w", "\n%{http_code}", protocol, "-H", &format!("Host: {host}")])
        .args(["--resolve", &format!("{server}:{port}:127.0.0.1"), &format!("https://{server}:{port}/page")])
        .output()
        .expect("curl runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').expect("a body and a status");
    (status.parse().expect("a number"), body.to_owned())
}

#[test]
fn authority_of_another_certificate_is_misdirected() {
    let origin = Origin::start(|_| Script::ok(&[], "a page"));
    let gateway = start(&origin, "[log]\naccess = \"stdout\"\n");
    let mut refused = 0;
    for protocol in ["--http1.1", "--http2"] {
        for (server, host, expected) in [
            ("first.test", "first.test", 200),
            ("first.test", "FIRST.test:8443", 200),
            ("first.test", "first.test.", 200),
            // Served by the same certificate.
            ("first.test", "also.test", 200),
            ("a.second.test", "b.second.test", 200),
            ("a.second.test", "second.test:443", 200),
            ("first.test", "second.test", 421),
            ("first.test", "b.second.test", 421),
            ("second.test", "first.test", 421),
            // The first certificate is the default of unknown names.
            ("first.test", "unknown.test", 200),
            ("unknown.test", "other.test", 200),
            ("unknown.test", "second.test", 421),
            ("second.test", "unknown.test", 421),
            ("second.test", "a.b.second.test", 421),
            // A client that connects by the address names no server.
            ("127.0.0.1", "second.test", 200),
        ] {
            let (status, body) = status(&gateway, (server, host), protocol);
            assert_eq!(status, expected, "{protocol} {server} {host}");
            if expected == 421 {
                assert!(body.contains("misdirected"), "{body}");
                refused += 1;
            }
        }
    }
    wait_for(|| gateway.metric("tidegate_failures_total{kind=\"misdirected\"}") == f64::from(refused), STEP_TIMEOUT);
    assert!(origin.requests().iter().all(|request| request.target == "/page"));
    let lines = gateway.access_log(30);
    let refused_lines: Vec<_> = lines.iter().filter(|line| line["status"] == 421).collect();
    assert_eq!(refused_lines.len(), usize::try_from(refused).expect("few"));
    assert!(refused_lines.iter().all(|line| line["failure"] == "misdirected" && line["blame"] == "client"));
}

#[test]
fn connection_lives_after_a_misdirected_request() {
    let origin = Origin::start(|_| Script::ok(&[], "a page"));
    let gateway = start(&origin, "");
    let port = gateway.address.port();
    for protocol in ["--http1.1", "--http2"] {
        let url = format!("https://first.test:{port}/");
        let output = Command::new("curl")
            .args(["-sk", "--max-time", "10", "-o", "/dev/null", "-w", "%{http_code} %{num_connects},", protocol])
            .args(["-H", "Host: second.test", "--resolve", &format!("first.test:{port}:127.0.0.1"), &url])
            .args(["--next", "-sk", "-o", "/dev/null", "-w", "%{http_code} %{num_connects}", protocol, &url])
            .output()
            .expect("curl runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "421 1,200 0", "{protocol}");
    }
}

#[test]
fn trusted_proxy_connects_by_its_own_name() {
    let origin = Origin::start(|_| Script::ok(&[], "a page"));
    let gateway = start(&origin, "[identity]\ntrusted_proxies = [\"127.0.0.1/32\"]\n");
    for protocol in ["--http1.1", "--http2"] {
        assert_eq!(status(&gateway, ("first.test", "second.test"), protocol).0, 200);
    }
}
