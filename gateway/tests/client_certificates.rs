//! Client certificates: verification, reload of authorities and revocation lists, and users from
//! the names in a certificate.

mod support;

use std::io::Write;
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
    date_time_ymd,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, HandshakeKind, RootCertStore, StreamOwned};

use support::tls::write_certificate;
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

/// An authority that issues client certificates.
struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A client certificate with its key.
struct ClientCertificate {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    fn issue(&self, name: &str) -> ClientCertificate {
        self.issue_with(name, |_| {})
    }

    fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> ClientCertificate {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Test");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().expect("a key");
        ClientCertificate { certificate: params.signed_by(&key, &self.0).expect("a certificate"), key }
    }

    /// A revocation list that is current until `year`.
    fn revoke(&self, serials: &[u64], year: i32) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2024, 1, 1),
            next_update: date_time_ymd(year, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.0).and_then(|list| list.pem()).expect("a list")
    }
}

fn with_serial(serial: u64) -> impl FnOnce(&mut CertificateParams) {
    move |params| params.serial_number = Some(SerialNumber::from(serial))
}

/// A gateway with one TLS listener and `keys` of its `[listen.tls]`.
struct MutualTls {
    gateway: Gateway,
    trusted: CertificateDer<'static>,
}

impl MutualTls {
    fn start(dir: TempDir, origin: &Origin, (keys, route, rest): (&str, &str, &str)) -> Self {
        let trusted = write_certificate(&dir);
        let listen = format!(
            "[[listen]]\naddress = \"127.0.0.1:0\"\n[listen.tls]\n\
             certificates = [{{ cert = \"tls.crt\", key = \"tls.key\" }}]\n{keys}\n"
        );
        MutualTls {
            gateway: Gateway::start_in(dir, &one_route(origin.address, route, &format!("{listen}{rest}"))),
            trusted,
        }
    }

    fn config(
        &self,
        client: Option<&ClientCertificate>,
        version: &'static rustls::SupportedProtocolVersion,
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.trusted.clone()).expect("a usable certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_protocol_versions(&[version]).expect("a version");
        let builder = builder.with_root_certificates(roots);
        match client {
            None => builder.with_no_client_auth(),
            Some(client) => {
                let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(client.key.serialize_der()));
                builder.with_client_auth_cert(vec![client.certificate.der().clone()], key).expect("a matching key")
            }
        }
    }

    fn stream(&self, config: &Arc<ClientConfig>) -> StreamOwned<ClientConnection, TcpStream> {
        let name = ServerName::try_from("gate.test").expect("a name");
        let connection = ClientConnection::new(Arc::clone(config), name).expect("a client");
        let socket = TcpStream::connect(self.gateway.address).expect("a connection");
        socket.set_read_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        socket.set_write_timeout(Some(STEP_TIMEOUT)).expect("a live socket");
        StreamOwned::new(connection, socket)
    }

    /// The status of a GET, or the alert of the gateway.
    fn try_get(&self, config: ClientConfig, target: &str) -> Result<u16, String> {
        let mut client = Client::from_stream(self.stream(&Arc::new(config)));
        let sent = client.try_send(&support::client::request("GET", target, &[], b""));
        sent.and_then(|()| client.try_read_head()).map(|response| response.status).map_err(|error| error.to_string())
    }

    /// As `try_get`, over TLS 1.3.
    fn get(&self, client: &ClientCertificate, target: &str) -> Result<u16, String> {
        self.try_get(self.config(Some(client), &rustls::version::TLS13), target)
    }

    fn failures(&self, reason: &str) -> f64 {
        self.gateway.metric(&format!("tidegate_tls_handshakes_failed_total{{reason=\"{reason}\"}}"))
    }
}

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "ok"))
}

fn is_alert<T: std::fmt::Debug>(result: &Result<T, String>, alert: &str) -> bool {
    result.as_ref().is_err_and(|error| error.contains(alert))
}

#[test]
fn only_certificates_of_the_authority_are_accepted() {
    let (origin, dir) = (origin(), TempDir::new());
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    dir.write("ca.pem", &authority.0.pem());
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "", ""));
    let right = authority.issue("ann");
    let expired = authority.issue_with("ann", |params| params.not_after = date_time_ymd(2020, 1, 1));
    let future = authority.issue_with("ann", |params| params.not_before = date_time_ymd(3000, 1, 1));
    let of_servers =
        authority.issue_with("ann", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    let (unknown, imitated) = (other.issue("ann"), Authority::new("ca").issue("ann"));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let get = |client| server.try_get(server.config(client, version), "/");
        assert_eq!(get(Some(&right)), Ok(200));
        let missing = get(None);
        // TLS 1.2 has no alert of its own for it.
        assert!(is_alert(&missing, "ertificateRequired") || is_alert(&missing, "HandshakeFailure"), "{missing:?}");
        for (client, alert, reason) in [
            (&unknown, "", "certificate_unknown_issuer"),
            (&expired, "CertificateExpired", "certificate_expired"),
            (&future, "", "certificate_not_yet_valid"),
            (&of_servers, "", "certificate_invalid"),
            // Of an authority with the same name and another key.
            (&imitated, "", "certificate_invalid"),
        ] {
            let before = server.failures(reason);
            let result = get(Some(client));
            assert!(is_alert(&result, "alert") && is_alert(&result, alert), "{reason}: {result:?}");
            // The alert may arrive before the failure is counted.
            wait_for(|| server.failures(reason) - before == 1.0, STEP_TIMEOUT);
        }
    }
    wait_for(|| server.failures("certificate_missing") == 2.0, STEP_TIMEOUT);
    assert_eq!(origin.count(), 2);
    let lines = server.gateway.process.stderr.events("client_certificate_refused");
    let suppressed: u64 = lines.iter().filter_map(|line| line["suppressed"].as_u64()).sum();
    assert!(!lines.is_empty() && lines.len() as u64 + suppressed <= 12, "{lines:?}");
    assert_eq!(
        (lines[0]["reason"].as_str(), lines[0]["client"].as_str()),
        (Some("certificate_missing"), Some("127.0.0.1"))
    );
    // One reason does not hide another, although all of these came within moments.
    for reason in ["certificate_unknown_issuer", "certificate_expired", "certificate_not_yet_valid"] {
        assert!(lines.iter().any(|line| line["reason"] == reason), "{reason}: {lines:?}");
    }
}

/// A changed file that cannot be used is named by `/ready` and the dashboard until it can.
#[test]
fn refused_files_are_shown_until_they_are_usable() {
    let (origin, dir) = (origin(), TempDir::new());
    let authority = Authority::new("ca");
    dir.write("ca.pem", &authority.0.pem());
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "", ""));
    let (gateway, dir) = (&server.gateway, &server.gateway.dir);
    let read = |path: &str| serde_json::from_str::<serde_json::Value>(&gateway.admin(path).text()).expect("JSON");
    let degraded = || read("/ready")["degraded"].to_string();
    let shown = || read("/api/v1/dashboard")["state"]["refused_certificates"].to_string();
    let client = authority.issue("ann");
    let pair = |year: i32| {
        let mut params = CertificateParams::new(vec!["gate.test".to_owned()]).expect("a name");
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().expect("a key");
        (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
    };
    let [certificate, key] =
        ["tls.crt", "tls.key"].map(|name| std::fs::read_to_string(dir.path().join(name)).expect("a file"));
    let ((other, _), (expired, its_key)) = (pair(4_000), pair(2_001));
    let half = "-----BEGIN CERTIFICATE-----\nhalf a fi".to_owned();
    for (changed, changed_key, error) in [
        (&other, &key, "private key does not match"),
        (&expired, &its_key, "the certificate has expired on Mon, 01 Jan 2001"),
        (&half, &key, "no usable PEM content"),
    ] {
        assert_eq!(degraded(), "[]");
        dir.write("tls.key", changed_key);
        dir.write("tls.crt", changed);
        wait_for(|| shown().contains(error), STEP_TIMEOUT);
        let named = degraded();
        assert!(named.contains("certificate ") && named.contains("tls.crt"), "{named}");
        assert_eq!(gateway.admin("/ready").status, 200, "the former certificate serves");
        assert_eq!(server.get(&client, "/"), Ok(200));
        dir.write("tls.key", &key);
        dir.write("tls.crt", &certificate);
        wait_for(|| degraded() == "[]" && shown() == "[]", STEP_TIMEOUT);
    }
    dir.write("ca.pem", "no certificate");
    wait_for(|| degraded().contains("ca.pem") && shown().contains("ca.pem"), STEP_TIMEOUT);
    dir.write("ca.pem", &authority.0.pem());
    wait_for(|| degraded() == "[]" && shown() == "[]", STEP_TIMEOUT);
}

#[test]
fn optional_certificate_is_verified_if_there_is_one() {
    let (origin, dir) = (origin(), TempDir::new());
    let authority = Authority::new("ca");
    dir.write("ca.pem", &authority.0.pem());
    let rest = "[identity]\nuser = \"certificate:subject\"\n[access]\ndenied = [\"user:CN=eve,O=Test\"]\n";
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"\nclient_auth = \"optional\"", "", rest));
    assert_eq!(server.try_get(server.config(None, &rustls::version::TLS13), "/"), Ok(200));
    assert_eq!(server.get(&authority.issue("ann"), "/"), Ok(200));
    assert_eq!(server.get(&authority.issue("eve"), "/"), Ok(403), "the user is the subject");
    let other = server.get(&Authority::new("other").issue("ann"), "/");
    assert!(is_alert(&other, "alert"), "{other:?}");
}

#[test]
fn users_are_the_names_in_certificates() {
    let origin = origin();
    let san = |uri: &str| {
        let uri = SanType::URI(uri.try_into().expect("ASCII"));
        move |params: &mut CertificateParams| params.subject_alt_names = vec![uri]
    };
    for (source, same_name, other_name) in
        [("subject", "ann", "bob"), ("san", "spiffe://test/ann", "spiffe://test/bob")]
    {
        let dir = TempDir::new();
        let authority = Authority::new("ca");
        dir.write("ca.pem", &authority.0.pem());
        let rest = format!(
            "[identity]\nuser = \"certificate:{source}\"\n\
             [limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 1\n\
             [limits.issued]\ntier = \"key\"\nkey = \"certificate:{source}\"\nrate = \"1/h\"\nburst = 9\n"
        );
        let server =
            MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "limits = [\"user\", \"issued\"]", &rest));
        let issue = |name: &str| match source {
            "subject" => authority.issue(name),
            _ => authority.issue_with("same", san(name)),
        };
        let statuses = [issue(same_name), issue(same_name), issue(other_name)].map(|client| server.get(&client, "/"));
        assert_eq!(statuses, [Ok(200), Ok(429), Ok(200)], "{source}");
        // A client cannot name a user itself.
        let spoofed = [("x-user-id", "CN=bob,O=Test"), ("x-forwarded-client-cert", "Subject=\"CN=bob,O=Test\"")];
        let config = Arc::new(server.config(Some(&issue(same_name)), &rustls::version::TLS13));
        assert_eq!(Client::from_stream(server.stream(&config)).get("/", &spoofed).status, 429);
    }
}

/// Fields in which proxies report client certificates do not come from clients.
#[test]
fn certificate_fields_of_clients_are_dropped() {
    let (origin, dir) = (origin(), TempDir::new());
    let authority = Authority::new("ca");
    dir.write("ca.pem", &authority.0.pem());
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "", ""));
    let names = [
        "Client-Cert",
        "Client-Cert-Chain",
        "X-Forwarded-Client-Cert",
        "X-Forwarded-Tls-Client-Cert",
        "X-Forwarded-Tls-Client-Cert-Info",
        "SSL-Client-Cert",
        "SSL-Client-Subject-DN",
        "SSL-Client-Verify",
    ];
    let fields = names.map(|name| (name, "x"));
    let config = Arc::new(server.config(Some(&authority.issue("ann")), &rustls::version::TLS13));
    assert_eq!(Client::from_stream(server.stream(&config)).get("/", &fields).status, 200);
    for name in names {
        assert_eq!(origin.last().field(name), None, "{name}");
    }
}

fn wait_for_events(server: &MutualTls, event: &str, count: usize) {
    wait_for(|| server.gateway.process.stderr.events(event).len() >= count, STEP_TIMEOUT);
}

/// The file is rewritten in place behind a link into another directory. No session outlives it.
#[test]
fn changed_authorities_are_used_for_the_next_connection() {
    let (origin, dir) = (origin(), TempDir::new());
    let (old, new) = (Authority::new("old"), Authority::new("new"));
    std::fs::create_dir(dir.path().join("secrets")).expect("a directory");
    dir.write("secrets/ca.pem", &old.0.pem());
    std::os::unix::fs::symlink("secrets/ca.pem", dir.path().join("ca.pem")).expect("a link");
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "", ""));
    let (of_old, of_new) = (old.issue("ann"), new.issue("ann"));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        // One configuration keeps the sessions of a client.
        let config = Arc::new(server.config(Some(&of_old), version));
        for _ in 0..2 {
            let mut stream = server.stream(&config);
            let mut client = Client::from_stream(&mut stream);
            assert_eq!(client.get("/", &[]).status, 200);
            assert_eq!(stream.conn.handshake_kind(), Some(HandshakeKind::Full), "the certificate is verified anew");
        }
    }
    assert!(is_alert(&server.get(&of_new, "/"), "alert"));
    let config = Arc::new(server.config(Some(&of_old), &rustls::version::TLS13));
    let mut open = Client::from_stream(server.stream(&config));
    assert_eq!(open.get("/", &[]).status, 200);

    server.gateway.dir.write("secrets/ca.pem", "no certificate");
    wait_for_events(&server, "certificate_refused", 1);
    assert_eq!(server.get(&of_old, "/"), Ok(200), "an unusable file changes nothing");

    server.gateway.dir.write("secrets/ca.pem", &new.0.pem());
    wait_for_events(&server, "client_ca_loaded", 2);
    let mut resumed = Client::from_stream(server.stream(&config));
    let sent = resumed.try_send(&support::client::request("GET", "/", &[], b""));
    let result = sent.and_then(|()| resumed.try_read_head()).map(|response| response.status);
    assert!(result.is_err(), "no session of the old authority is resumed: {result:?}");
    assert_eq!(server.get(&of_new, "/"), Ok(200));
    assert_eq!(open.get("/", &[]).status, 200, "open connections go on");
}

#[test]
fn revoked_certificates_are_refused() {
    let (origin, dir) = (origin(), TempDir::new());
    let authority = Authority::new("ca");
    dir.write("ca.pem", &authority.0.pem());
    dir.write("crl.pem", &authority.revoke(&[7], 4000));
    let keys = "client_ca = \"ca.pem\"\nclient_crl = \"crl.pem\"";
    let server = MutualTls::start(dir, &origin, (keys, "", ""));
    let (seven, eight) = (authority.issue_with("a", with_serial(7)), authority.issue_with("b", with_serial(8)));
    let revoked = server.get(&seven, "/");
    assert!(is_alert(&revoked, "CertificateRevoked"), "{revoked:?}");
    assert_eq!(server.get(&eight, "/"), Ok(200));
    wait_for(|| server.failures("certificate_revoked") == 1.0, STEP_TIMEOUT);
    server.gateway.dir.write("crl.pem", &authority.revoke(&[8], 4000));
    wait_for_events(&server, "client_ca_loaded", 2);
    assert_eq!(server.get(&seven, "/"), Ok(200));
    assert!(is_alert(&server.get(&eight, "/"), "CertificateRevoked"));
    server.gateway.dir.write("crl.pem", &authority.revoke(&[], 2025));
    wait_for_events(&server, "client_ca_loaded", 3);
    assert!(is_alert(&server.get(&seven, "/"), "alert"), "an outdated list");
    server.gateway.dir.write("crl.pem", &Authority::new("other").revoke(&[], 4000));
    wait_for_events(&server, "client_ca_loaded", 4);
    assert!(is_alert(&server.get(&seven, "/"), "alert"), "no list of the authority");
    wait_for(|| server.failures("revocation_unknown") == 2.0, STEP_TIMEOUT);
}

/// The certificate of the gateway itself, as Kubernetes replaces it.
#[test]
fn certificate_behind_links_is_reloaded() {
    let (origin, dir) = (origin(), TempDir::new());
    let version = |name: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).expect("a directory");
        let certificate = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
        dir.write(&format!("{name}/tls.crt"), &certificate.cert.pem());
        dir.write(&format!("{name}/tls.key"), &certificate.signing_key.serialize_pem());
        certificate.cert.der().clone()
    };
    let (first, second) = (version("..1"), version("..2"));
    let link = |target: &str, name: &str| {
        let new = dir.path().join("new");
        std::os::unix::fs::symlink(target, &new).expect("a link");
        std::fs::rename(new, dir.path().join(name)).expect("a link");
    };
    link("..1", "..data");
    link("..data/tls.crt", "tls.crt");
    link("..data/tls.key", "tls.key");
    let path = dir.path().to_owned();
    let config = one_route(origin.address, "", support::tls::LISTEN_TLS);
    let served = |gateway: &Gateway, trusted: &CertificateDer<'static>| {
        support::tls::connect(gateway.address, trusted)
            .try_send(&support::client::request("GET", "/", &[], b""))
            .is_ok()
    };
    let gateway = Gateway::start_in(dir, &config);
    assert!(served(&gateway, &first) && !served(&gateway, &second));
    // In place, in the directory of the first version.
    let renewed = rcgen::generate_simple_self_signed(vec!["gate.test".to_owned()]).expect("a certificate");
    std::fs::write(path.join("..1/tls.key"), renewed.signing_key.serialize_pem()).expect("a written file");
    std::fs::write(path.join("..1/tls.crt"), renewed.cert.pem()).expect("a written file");
    wait_for(|| served(&gateway, renewed.cert.der()), STEP_TIMEOUT);
    std::os::unix::fs::symlink("..2", path.join("new")).expect("a link");
    std::fs::rename(path.join("new"), path.join("..data")).expect("a link");
    wait_for(|| served(&gateway, &second), STEP_TIMEOUT);
}

fn is_installed(program: &str, argument: &str) -> bool {
    let found = Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_err() {
        eprintln!("{program} is not installed: nothing was tested");
    }
    found.is_ok()
}

/// Other TLS stacks, over both protocols.
#[test]
fn curl_and_openssl_present_certificates() {
    let (origin, dir) = (origin(), TempDir::new());
    let authority = Authority::new("ca");
    dir.write("ca.pem", &authority.0.pem());
    let (right, wrong) = (authority.issue("ann"), Authority::new("other").issue("ann"));
    for (name, client) in [("right", &right), ("wrong", &wrong)] {
        dir.write(&format!("{name}.crt"), &client.certificate.pem());
        dir.write(&format!("{name}.key"), &client.key.serialize_pem());
    }
    let rest = "[identity]\nuser = \"certificate:subject\"\n[access]\ndenied = [\"user:CN=ann,O=Test\"]\n";
    let server = MutualTls::start(dir, &origin, ("client_ca = \"ca.pem\"", "", rest));
    let (address, path) = (server.gateway.address, server.gateway.dir.path());
    if is_installed("curl", "--version") {
        let curl = |protocol: &str, client: Option<&str>| {
            let mut command = Command::new("curl");
            command.args([
                "-sS",
                "--max-time",
                "10",
                protocol,
                "-o",
                "/dev/null",
                "-w",
                "%{http_code} %{http_version}",
            ]);
            command.args(["--cacert", "tls.crt", "--resolve", &format!("gate.test:{}:127.0.0.1", address.port())]);
            if let Some(client) = client {
                command.args(["--cert", &format!("{client}.crt"), "--key", &format!("{client}.key")]);
            }
            let output = command.arg(format!("https://gate.test:{}/", address.port())).current_dir(path).output();
            let output = output.expect("curl runs");
            (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
        };
        // 403: the subject is known.
        assert_eq!(curl("--http1.1", Some("right")), (true, "403 1.1".to_owned()));
        assert_eq!(curl("--http2", Some("right")), (true, "403 2".to_owned()));
        for protocol in ["--http1.1", "--http2"] {
            assert!(!curl(protocol, Some("wrong")).0 && !curl(protocol, None).0);
        }
    }
    if is_installed("openssl", "version") {
        let openssl = |version: &str, client: &str| {
            let mut process = Command::new("openssl")
                .args(["s_client", version, "-quiet", "-no_ign_eof", "-servername", "gate.test", "-CAfile", "tls.crt"])
                .args([
                    "-connect",
                    &address.to_string(),
                    "-cert",
                    &format!("{client}.crt"),
                    "-key",
                    &format!("{client}.key"),
                ])
                .current_dir(path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("openssl runs");
            let request = b"GET / HTTP/1.1\r\nHost: gate.test\r\nConnection: close\r\n\r\n";
            // A refused client may have closed its input already.
            let stdin = process.stdin.take();
            let _written_or_closed = stdin.as_ref().map(|mut stdin| stdin.write_all(request));
            let output = process.wait_with_output().expect("openssl ends");
            drop(stdin);
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            text(&output.stdout) + &text(&output.stderr)
        };
        for version in ["-tls1_2", "-tls1_3"] {
            let right = openssl(version, "right");
            assert!(right.contains("HTTP/1.1 403"), "{right}");
            let wrong = openssl(version, "wrong");
            assert!(wrong.contains("alert") && !wrong.contains("HTTP/1.1"), "{wrong}");
        }
    }
}
