//! TLS to upstreams: verification, names, client certificates, and failures with their reasons.

mod support;

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::process::Command;

use support::dns::{DnsAnswer, DnsRecord, DnsServer};
use support::tls_origin::{Authority, TlsOrigin, TlsOriginOptions, self_signed};
use support::{Client, Gateway, Process, STEP_TIMEOUT, TempDir, free_address, tidegate, wait_for};

const NAME: &str = "shop.test";

fn config(origin: SocketAddr, tls: &str) -> String {
    format!(
        "version = 1\n[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [\"https://{origin}\"]\ntls = {{ {tls} }}\n\
         breaker = {{ minimum = 1000 }}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\ncache = {{ mode = \"off\" }}\n"
    )
}

const VERIFIED: &str = "ca = \"ca.pem\", server_name = \"shop.test\"";

/// A gateway that trusts `authority`.
fn gateway(authority: &Authority, origin: SocketAddr, tls: &str) -> Gateway {
    let dir = TempDir::new();
    authority.write(&dir);
    Gateway::start_in(dir, &config(origin, tls))
}

/// The kind of the first failure in the log.
fn failure_kind(gateway: &Gateway) -> String {
    let events = || gateway.process.stderr.events("upstream_failed");
    wait_for(|| !events().is_empty(), STEP_TIMEOUT);
    events()[0]["kind"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn verified_upstream_serves_requests_over_kept_connections() {
    let authority = Authority::new("ours");
    for tls12_only in [false, true] {
        let options = TlsOriginOptions { tls12_only, ..TlsOriginOptions::default() };
        let origin = TlsOrigin::start(authority.sign(NAME, |_| {}), &options);
        let gateway = gateway(&authority, origin.address, VERIFIED);
        let mut client = gateway.connect();
        for length in [0, 1, 1_000, 100_000, 1 << 20] {
            let body = vec![b'x'; length];
            assert_eq!(client.request("POST", "/", &[], &body).text(), length.to_string());
            assert_eq!(client.get("/", &[]).status, 200);
        }
        let seen = origin.seen();
        assert_eq!((seen.len(), seen[0].server_name.as_deref()), (1, Some(NAME)), "TLS 1.2 only: {tls12_only}");
    }
}

#[test]
fn next_connection_resumes_the_session() {
    let authority = Authority::new("ours");
    let options = TlsOriginOptions { closes: true, ..TlsOriginOptions::default() };
    let origin = TlsOrigin::start(authority.sign(NAME, |_| {}), &options);
    let gateway = gateway(&authority, origin.address, VERIFIED);
    (0..3).for_each(|_| assert_eq!(gateway.request("POST", "/", &[], b"x").status, 200));
    let resumed: Vec<bool> = origin.seen().iter().map(|seen| seen.is_resumed).collect();
    assert_eq!(resumed, [false, true, true]);
}

#[test]
fn wrong_certificates_are_502_with_their_reasons() {
    let (authority, other) = (Authority::new("ours"), Authority::new("another"));
    let cases = [
        ("certificate_name", authority.sign("other.test", |_| {})),
        ("certificate_unknown_issuer", other.sign(NAME, |_| {})),
        ("certificate_self_signed", self_signed(NAME, rcgen::IsCa::NoCa)),
        ("certificate_self_signed", self_signed(NAME, rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained))),
        ("certificate_expired", authority.sign(NAME, |params| params.not_after = rcgen::date_time_ymd(2020, 1, 1))),
        (
            "certificate_not_yet_valid",
            authority.sign(NAME, |params| {
                params.not_before = rcgen::date_time_ymd(2200, 1, 1);
                params.not_after = rcgen::date_time_ymd(2300, 1, 1);
            }),
        ),
    ];
    for (reason, signed) in cases {
        let origin = TlsOrigin::start(signed, &TlsOriginOptions::default());
        let gateway = gateway(&authority, origin.address, VERIFIED);
        let response = gateway.request("POST", "/", &[], b"secret");
        assert_eq!(
            (response.status, response.field("proxy-status")),
            (502, Some("tidegate; error=tls_certificate_error")),
            "{reason}"
        );
        assert_eq!(failure_kind(&gateway), reason);
        assert_eq!(gateway.metric(&format!("tidegate_upstream_tls_failures_total{{reason=\"{reason}\"}}")), 1.0);
        assert_eq!(gateway.metric("tidegate_failures_total{kind=\"upstream_tls\"}"), 1.0);
    }
}

/// `openssl req -x509` makes a certificate of an authority, which no server may use: its issuer is
/// trusted here, so that its kind is the reason.
#[test]
fn a_trusted_certificate_of_an_authority_is_refused_for_its_kind() {
    for (is_ca, status) in
        [(rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained), 502), (rcgen::IsCa::ExplicitNoCa, 200)]
    {
        let signed = self_signed(NAME, is_ca);
        let dir = TempDir::new();
        dir.write("ca.pem", &signed.pem);
        let origin = TlsOrigin::start(signed, &TlsOriginOptions::default());
        let gateway = Gateway::start_in(dir, &config(origin.address, VERIFIED));
        assert_eq!(gateway.request("POST", "/", &[], b"x").status, status);
        if status != 200 {
            let reason = "certificate_of_authority";
            assert_eq!(failure_kind(&gateway), reason);
            assert_eq!(gateway.metric(&format!("tidegate_upstream_tls_failures_total{{reason=\"{reason}\"}}")), 1.0);
        }
    }
}

/// `tidegate run --upstream https://...` verifies as a configuration without `tls` does: by the
/// authorities of the system.
#[test]
fn upstream_of_the_command_line_is_verified() {
    let (authority, other) = (Authority::new("ours"), Authority::new("another"));
    for (trusted, status) in [(&authority, 200), (&other, 502)] {
        let origin = TlsOrigin::start(authority.sign("127.0.0.1", |_| {}), &TlsOriginOptions::default());
        let dir = TempDir::new();
        trusted.write(&dir);
        let (url, admin) = (format!("https://{}", origin.address), free_address().to_string());
        let mut command = tidegate();
        command.args(["run", "--listen", "127.0.0.1:0", "--admin", &admin, "--upstream", &url]);
        let process =
            Process::start(command.env("SSL_CERT_FILE", dir.path().join("ca.pem")).env_remove("SSL_CERT_DIR"));
        wait_for(|| !process.stderr.events("ready").is_empty(), STEP_TIMEOUT);
        let address = process.stderr.event("listening")["address"].as_str().expect("an address").to_owned();
        let mut client = Client::connect(address.parse().expect("an address"));
        assert_eq!(client.request("POST", "/", &[("host", "gate.test")], b"x").status, status);
        assert_eq!(origin.seen().len(), usize::from(status == 200), "handshakes that were completed");
    }
}

#[test]
fn handshakes_that_fail_otherwise_have_their_own_reasons() {
    /// Servers by what they answer to the first bytes of a handshake.
    const PLAIN: &[u8] = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
    /// The alert `protocol_version` of one that speaks TLS 1.1 at most.
    const OLD: &[u8] = &[21, 3, 1, 0, 2, 2, 70];
    let authority = Authority::new("ours");
    for (answer, kind, reason, (failure, status), error) in [
        (PLAIN, "tls_protocol", "protocol", ("upstream_tls_protocol", 502), "tls_protocol_error"),
        (OLD, "tls_alert", "alert", ("upstream_tls_alert", 502), "tls_alert_received"),
        // It may be overloaded, or restart.
        (&b""[..], "tls_closed", "closed", ("no_response", 503), "connection_terminated"),
    ] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                drop(stream.read(&mut [0; 4096]));
                drop(stream.write_all(answer));
            }
        });
        let gateway = gateway(&authority, address, VERIFIED);
        let response = gateway.request("POST", "/", &[], b"secret");
        let expected = format!("tidegate; error={error}");
        assert_eq!((response.status, response.field("proxy-status")), (status, Some(&*expected)), "{kind}");
        assert_eq!(failure_kind(&gateway), kind);
        assert!(gateway.metric(&format!("tidegate_upstream_tls_failures_total{{reason=\"{reason}\"}}")) >= 1.0);
        assert_eq!(gateway.metric(&format!("tidegate_failures_total{{kind=\"{failure}\"}}")), 1.0);
    }
}

#[test]
fn client_certificates_have_an_end_in_the_metrics() {
    let authority = Authority::new("ours");
    let origin = TlsOrigin::start(authority.sign(NAME, |_| {}), &TlsOriginOptions::default());
    let dir = TempDir::new();
    authority.write(&dir);
    let signed = authority.sign("gateway.test", |params| params.not_after = rcgen::date_time_ymd(2100, 1, 1));
    dir.write("client.pem", &signed.pem);
    dir.write("client.key", &signed.key_pem);
    let tls = format!("{VERIFIED}, cert = \"client.pem\", key = \"client.key\"");
    let gateway = Gateway::start_in(dir, &config(origin.address, &tls));
    let text = gateway.admin("/metrics").text();
    let line = text.lines().find(|line| line.starts_with("tidegate_certificate_not_after_timestamp_seconds{"));
    let line = line.expect("the certificate");
    assert!(
        line.contains("client.pem\"") && line.contains("name=\"gateway.test\"") && line.contains(" 4102444800"),
        "{line}"
    );
}

#[test]
fn name_is_that_of_the_endpoint_unless_another_one_is_configured() {
    let authority = Authority::new("ours");
    let origin = TlsOrigin::start(authority.sign("127.0.0.1", |_| {}), &TlsOriginOptions::default());
    let gateway = gateway(&authority, origin.address, "ca = \"ca.pem\"");
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert_eq!(origin.seen()[0].server_name, None, "an address is no name for SNI");
}

#[test]
fn verification_can_be_switched_off_and_is_logged_then() {
    let authority = Authority::new("unknown");
    let origin = TlsOrigin::start(authority.sign("other.test", |_| {}), &TlsOriginOptions::default());
    let gateway = Gateway::start(&config(origin.address, "verify = false"));
    assert_eq!(gateway.get("/", &[]).status, 200);
    wait_for(|| !gateway.process.stderr.events("upstream_unverified").is_empty(), STEP_TIMEOUT);
    assert_eq!(gateway.process.stderr.event("upstream_unverified")["upstream"], "shop");
}

#[test]
fn client_certificate_is_sent_where_the_upstream_asks_for_it() {
    let (authority, clients) = (Authority::new("ours"), Authority::new("clients"));
    for tls12_only in [false, true] {
        let options = TlsOriginOptions { client_ca: Some(&clients), tls12_only, ..TlsOriginOptions::default() };
        let origin = TlsOrigin::start(authority.sign(NAME, |_| {}), &options);
        let without = gateway(&authority, origin.address, VERIFIED);
        assert_eq!(without.request("POST", "/", &[], b"x").status, 502, "TLS 1.2 only: {tls12_only}");
        assert_eq!(failure_kind(&without), "client_certificate");

        let dir = TempDir::new();
        authority.write(&dir);
        let signed = clients.sign("gateway.test", |_| {});
        dir.write("client.pem", &signed.pem);
        dir.write("client.key", &signed.key_pem);
        let tls = format!("{VERIFIED}, cert = \"client.pem\", key = \"client.key\"");
        let with = Gateway::start_in(dir, &config(origin.address, &tls));
        assert_eq!(with.request("POST", "/", &[], b"x").status, 200, "TLS 1.2 only: {tls12_only}");
    }
}

/// Over TLS 1.2, OpenSSL ends a handshake without a certificate with the alert `handshake_failure`.
#[test]
fn client_certificate_that_is_missing_is_named_although_the_alert_does_not() {
    const ALERT: [u8; 6] = [21, 3, 3, 0, 2, 2];
    const HANDSHAKE_FAILURE: u8 = 40;
    let (authority, clients) = (Authority::new("ours"), Authority::new("clients"));
    for (client_ca, kind) in [(Some(&clients), "client_certificate"), (None, "tls_alert")] {
        let options = TlsOriginOptions { client_ca, tls12_only: true, ..TlsOriginOptions::default() };
        let origin = TlsOrigin::start(authority.sign(NAME, |_| {}), &options);
        let server = origin.address;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        std::thread::spawn(move || {
            for mut client in listener.incoming().flatten() {
                if kind == "tls_alert" {
                    drop(client.read(&mut [0; 4096]));
                    drop(client.write_all(&[&ALERT[..], &[HANDSHAKE_FAILURE]].concat()));
                    continue;
                }
                let mut server = std::net::TcpStream::connect(server).expect("the origin");
                let (mut from, mut to) = (client.try_clone().expect("a handle"), server.try_clone().expect("a handle"));
                std::thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
                let mut bytes = [0; 16 << 10];
                while let Ok(count @ 1..) = server.read(&mut bytes) {
                    if bytes[..count - 1].ends_with(&ALERT) {
                        bytes[count - 1] = HANDSHAKE_FAILURE;
                    }
                    drop(client.write_all(&bytes[..count]));
                }
            }
        });
        let gateway = gateway(&authority, address, VERIFIED);
        assert_eq!(gateway.request("POST", "/", &[], b"x").status, 502, "{kind}");
        assert_eq!(failure_kind(&gateway), kind);
    }
}

#[test]
fn lower_versions_and_clear_text_are_refused() {
    let authority = Authority::new("ours");
    let options = TlsOriginOptions { tls12_only: true, ..TlsOriginOptions::default() };
    let old = TlsOrigin::start(authority.sign(NAME, |_| {}), &options);
    let plain = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = plain.local_addr().expect("a bound port");
    std::thread::spawn(move || {
        // The gateway connects once, and the test once more to end this thread.
        for mut stream in plain.incoming().take(2).map_while(Result::ok) {
            drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"));
            drop(stream.read(&mut [0; 1_000]));
        }
    });
    // The server that has no common version says so.
    for (origin, kind) in [(old.address, "tls_alert"), (address, "tls_protocol")] {
        let gateway = gateway(&authority, origin, &format!("{VERIFIED}, min_version = \"1.3\""));
        assert_eq!(gateway.get("/", &[]).status, 502);
        assert_eq!(failure_kind(&gateway), kind);
    }
    drop(std::net::TcpStream::connect(address));
}

#[test]
fn changed_authority_is_reloaded() {
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    let origin = TlsOrigin::start(second.sign(NAME, |_| {}), &TlsOriginOptions::default());
    let gateway = gateway(&first, origin.address, VERIFIED);
    assert_eq!(gateway.get("/", &[]).status, 502);
    second.write(&gateway.dir);
    wait_for(|| gateway.get("/", &[]).status == 200, STEP_TIMEOUT);
}

#[test]
fn health_checks_use_tls() {
    let authority = Authority::new("ours");
    let origin = TlsOrigin::start(authority.sign("other.test", |_| {}), &TlsOriginOptions::default());
    let keys = format!("{VERIFIED} }}\nhealth = {{ path = \"/\", interval = \"100ms\", unhealthy = 1");
    let gateway = gateway(&authority, origin.address, &keys);
    wait_for(|| !gateway.process.stderr.events("endpoint_down").is_empty(), STEP_TIMEOUT);
    assert_eq!(gateway.process.stderr.event("endpoint_down")["reason"], "health_check");
}

/// nginx closes kept connections after 3 requests, and asks for a certificate of the gateway.
#[test]
fn nginx_serves_over_tls_with_client_certificates() {
    if Command::new("nginx").arg("-v").output().is_err() {
        // It is not installed; the other tests of this file do not need it.
        return;
    }
    let (authority, dir, address) = (Authority::new("ours"), TempDir::new(), free_address());
    let (server, client) = (authority.sign(NAME, |_| {}), authority.sign("gateway.test", |_| {}));
    authority.write(&dir);
    dir.write("server.pem", &server.pem);
    dir.write("server.key", &server.key_pem);
    dir.write("client.pem", &client.pem);
    dir.write("client.key", &client.key_pem);
    let path = dir.path().display();
    let nginx = format!(
        "daemon off;\nmaster_process off;\npid {path}/nginx.pid;\nerror_log {path}/error.log;\n\
         events {{}}\nhttp {{\naccess_log off;\nclient_body_temp_path {path}/body;\nproxy_temp_path {path}/proxy;\n\
         fastcgi_temp_path {path}/fastcgi;\nuwsgi_temp_path {path}/uwsgi;\nscgi_temp_path {path}/scgi;\n\
         server {{\nlisten {address} ssl;\nkeepalive_requests 3;\nssl_certificate {path}/server.pem;\n\
         ssl_certificate_key {path}/server.key;\nssl_client_certificate {path}/ca.pem;\nssl_verify_client on;\n\
         location / {{ return 200 \"$ssl_server_name $ssl_client_s_dn $request_method $uri\"; }}\n}}\n}}\n"
    );
    let file = dir.write("nginx.conf", &nginx);
    let _nginx = Process::start(Command::new("nginx").arg("-c").arg(&file).arg("-p").arg(dir.path()));
    wait_for(|| std::net::TcpStream::connect(address).is_ok(), STEP_TIMEOUT);
    let tls = format!("{VERIFIED}, cert = \"client.pem\", key = \"client.key\"");
    let gateway = Gateway::start_in(dir, &config(address, &tls));
    let mut connection = gateway.connect();
    for method in ["GET", "POST", "PUT", "GET", "DELETE", "POST", "GET", "POST"] {
        let response = connection.request(method, "/a", &[], b"");
        assert_eq!(response.status, 200, "{}", response.text());
        let text = response.text();
        assert!(text.starts_with(NAME) && text.ends_with(&format!("{method} /a")), "{text}");
    }
}

/// The certificate must be for the domain of the service, whatever name its SRV record has.
#[test]
fn servers_of_a_service_have_certificates_for_its_domain() {
    let authority = Authority::new("ours");
    for (name, is_trusted) in [(NAME, true), ("host.test", false)] {
        let origin = TlsOrigin::start(authority.sign(name, |_| {}), &TlsOriginOptions::default());
        let dns = DnsServer::start();
        let record = DnsRecord::Service { priority: 1, port: origin.address.port(), target: "host.test".to_owned() };
        dns.set("_https._tcp.shop.test", DnsAnswer::Records(60, vec![record]));
        dns.set_addresses("host.test", &["127.0.0.1"]);
        let dir = TempDir::new();
        authority.write(&dir);
        let config = config(origin.address, "ca = \"ca.pem\"")
            .replace(&format!("https://{}", origin.address), "srv+https://_https._tcp.shop.test");
        let gateway = Gateway::start_in(dir, &format!("{config}{}", dns.section()));
        let status = gateway.get("/", &[]).status;
        assert_eq!(status, if is_trusted { 200 } else { 502 }, "{name}");
        if !is_trusted {
            assert_eq!(failure_kind(&gateway), "certificate_name");
        }
    }
}
