//! Key sets that an issuer publishes over HTTPS: fetched beside requests, kept while the issuer is
//! away, fetched again for unknown key ids.

mod support;
#[path = "support/issuer.rs"]
mod issuer;

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use issuer::{Issuer, set};
use jsonwebtoken::Algorithm;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::json;
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, lock, one_route, wait_for};

/// The response of the server.
#[derive(Clone)]
enum Reply {
    Keys(String),
    Status(u16),
    /// A redirect to this URL.
    Redirect(String),
    /// More bytes than a key set may have.
    Endless,
    /// Nothing, until the server stops.
    Silence,
}

/// The HTTPS server of an issuer, with a certificate for `localhost`.
struct KeyServer {
    address: SocketAddr,
    reply: Arc<Mutex<Reply>>,
    fetches: Arc<AtomicUsize>,
    is_stopped: Arc<AtomicBool>,
}

/// An authority, and the TLS configuration of servers with its certificate.
struct Authority {
    pem: String,
    config: Arc<ServerConfig>,
}

impl Authority {
    fn new(server_name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "Test authority");
        let authority =
            CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key")).expect("an authority");
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![server_name.to_owned()]).expect("a name");
        let certificate = params.signed_by(&key, &authority).expect("a certificate");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = builder.expect("TLS 1.2 and 1.3").with_no_client_auth();
        let config = config.with_single_cert(vec![certificate.der().clone()], key).expect("a certificate");
        Authority { pem: authority.pem(), config: Arc::new(config) }
    }
}

impl KeyServer {
    fn start(authority: &Authority, reply: Reply) -> Self {
        Self::start_at(([127, 0, 0, 1], 0).into(), authority, reply)
    }

    fn start_at(address: SocketAddr, authority: &Authority, reply: Reply) -> Self {
        let listener = TcpListener::bind(address).expect("a free port");
        let server = KeyServer {
            address: listener.local_addr().expect("a bound socket"),
            reply: Arc::new(Mutex::new(reply)),
            fetches: Arc::default(),
            is_stopped: Arc::default(),
        };
        let (reply, fetches, is_stopped) =
            (Arc::clone(&server.reply), Arc::clone(&server.fetches), Arc::clone(&server.is_stopped));
        let config = Arc::clone(&authority.config);
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                if is_stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(socket) = socket else { continue };
                let (config, reply, fetches, is_stopped) =
                    (Arc::clone(&config), Arc::clone(&reply), Arc::clone(&fetches), Arc::clone(&is_stopped));
                // An error is a client that has closed the connection.
                std::thread::spawn(move || drop(serve(socket, config, (&reply, &fetches, &is_stopped))));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("https://localhost:{}/jwks.json", self.address.port())
    }

    fn set_reply(&self, reply: Reply) {
        *lock(&self.reply) = reply;
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::Relaxed)
    }
}

impl Drop for KeyServer {
    fn drop(&mut self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        drop(TcpStream::connect_timeout(&self.address, STEP_TIMEOUT));
    }
}

fn serve(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    (reply, fetches, is_stopped): (&Mutex<Reply>, &AtomicUsize, &AtomicBool),
) -> std::io::Result<()> {
    socket.set_read_timeout(Some(STEP_TIMEOUT))?;
    socket.set_write_timeout(Some(STEP_TIMEOUT))?;
    let mut stream = StreamOwned::new(ServerConnection::new(config).expect("a connection"), socket);
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    fetches.fetch_add(1, Ordering::Relaxed);
    let reply = lock(reply).clone();
    let respond = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
    };
    match reply {
        Reply::Keys(keys) => stream.write_all(respond("200 OK", &keys).as_bytes())?,
        Reply::Status(status) => stream.write_all(respond(&format!("{status} Odd"), "").as_bytes())?,
        Reply::Redirect(url) => {
            stream.write_all(respond(&format!("302 Found\r\nLocation: {url}"), "").as_bytes())?;
        }
        Reply::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"keys\":[")?;
            // 64 MiB, unless the client stops reading.
            (0..16_384).try_for_each(|_| stream.write_all(&[b' '; 4_096]))?;
        }
        Reply::Silence => {
            while !is_stopped.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
    stream.flush()
}

/// Users have a limit of 5; without a user, a request passes.
fn config(origin: &Origin, url: &str, keys: &str) -> String {
    let rest = format!(
        "[identity.user.jwt]\nkeys = \"{url}\"\nalgorithms = [\"ES256\"]\nclaim = \"realm_access.user\"\n{keys}\n\
         [limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 5\n[server]\nworkers = 1\n[log]\nlevel = \"debug\"\n"
    );
    one_route(origin.address, "cache = { mode = \"off\" }\nlimits = [\"user\"]", &rest)
}

fn start(origin: &Origin, authority: &Authority, url: &str) -> Gateway {
    let dir = TempDir::new();
    dir.write("ca.pem", &authority.pem);
    Gateway::start_in(dir, &config(origin, url, "keys_ca = \"ca.pem\""))
}

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "passed"))
}

fn token(issuer: &Issuer, user: &str) -> String {
    format!("Bearer {}", issuer.token(json!({ "realm_access": { "user": user } })))
}

fn get(client: &mut Client, token: &str) -> u16 {
    client.get("/", &[("Authorization", token)]).status
}

fn tokens(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_tokens_total{{result=\"{result}\"}}"))
}

fn fetches(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_token_key_set_fetches_total{{result=\"{result}\"}}"))
}

/// Waits until a request with this token has a user.
#[track_caller]
fn wait_until_valid(gateway: &Gateway, token: &str) {
    let mut client = gateway.connect();
    let before = tokens(gateway, "valid");
    wait_for(
        || {
            get(&mut client, token);
            tokens(gateway, "valid") > before
        },
        STEP_TIMEOUT,
    );
}

#[test]
fn issuer_that_is_away_at_the_start_is_fetched_from_later() {
    let (origin, authority, issuer) = (origin(), Authority::new("localhost"), Issuer::new(Algorithm::ES256, "a"));
    let address = support::free_address();
    let gateway = start(&origin, &authority, &format!("https://localhost:{}/jwks.json", address.port()));
    let mut client = gateway.connect();
    let of_ann = token(&issuer, "ann");
    wait_for(|| fetches(&gateway, "unreachable") >= 1.0, STEP_TIMEOUT);
    // Requests are served meanwhile, without a user and its limit.
    assert!((0..8).all(|_| get(&mut client, &of_ann) == 200));
    assert_eq!(tokens(&gateway, "keys_unavailable"), 8.0);
    let failed = gateway.process.stderr.events("key_set_fetch_failed");
    assert_eq!(
        (failed[0]["has_keys"].as_bool(), failed[0]["level"].as_str()),
        (Some(false), Some("WARN")),
        "{failed:?}"
    );
    assert_eq!(gateway.admin("/ready").status, 200);
    let server = KeyServer::start_at(address, &authority, Reply::Keys(set(&[&issuer])));
    wait_until_valid(&gateway, &of_ann);
    assert_eq!((server.fetches(), fetches(&gateway, "fetched")), (1, 1.0));
    assert_eq!(gateway.process.stderr.events("key_set_fetched").len(), 1);
    assert!(gateway.metric("tidegate_token_key_set_age_seconds") < 60.0);
    let statuses: Vec<u16> = (0..8).map(|_| get(&mut client, &of_ann)).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 4, "one was used before: {statuses:?}");
}

#[test]
fn unknown_key_id_causes_few_fetches_and_failures_change_nothing() {
    let (origin, authority) = (origin(), Authority::new("localhost"));
    let (old, new) = (Issuer::new(Algorithm::ES256, "old"), Issuer::new(Algorithm::ES256, "new"));
    let server = KeyServer::start(&authority, Reply::Keys(set(&[&old])));
    let gateway = start(&origin, &authority, &server.url());
    let (of_old, of_new) = (token(&old, "ann"), token(&new, "bob"));
    wait_until_valid(&gateway, &of_old);
    let mut client = gateway.connect();
    // The first fetch for an unknown key id fails: the old keys stay.
    server.set_reply(Reply::Status(500));
    assert_eq!(get(&mut client, &of_new), 200);
    wait_for(|| fetches(&gateway, "status") >= 1.0, STEP_TIMEOUT);
    let valid = tokens(&gateway, "valid");
    assert_eq!(get(&mut client, &of_old), 200);
    assert_eq!(tokens(&gateway, "valid"), valid + 1.0);
    let failed = gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains("key_set_fetch_failed"));
    assert!(failed.is_some_and(|line| line.contains("\"has_keys\":true") && line.contains("status 500")));
    // The retry recovers.
    server.set_reply(Reply::Keys(set(&[&old, &new])));
    wait_until_valid(&gateway, &of_new);
    // A flood of invented key ids: at most two more fetches of the three at once.
    let before = server.fetches();
    for n in 0..300 {
        let unknown = Issuer::new(Algorithm::ES256, &format!("k{n}"));
        assert_eq!(get(&mut client, &token(&unknown, "eve")), 200);
    }
    assert!(server.fetches() - before <= 3, "{} fetches", server.fetches() - before);
    assert!(tokens(&gateway, "key") >= 300.0);
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), 2.0, "one for each valid token");
}

#[test]
fn unusable_key_sets_are_refused() {
    let (origin, authority) = (origin(), Authority::new("localhost"));
    let (issuer, unknown) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "b"));
    let (other, secret) = (Issuer::new(Algorithm::ES384, "c"), Issuer::new(Algorithm::HS256, "s"));
    let usable = Reply::Keys(set(&[&issuer]));
    let plain = Origin::start(|_| Script::ok(&[], "{ \"keys\": [] }"));
    for (reply, result) in [
        (Reply::Keys("<html>".to_owned()), "invalid"),
        (Reply::Keys(set(&[])), "invalid"),
        (Reply::Keys(set(&[&other])), "invalid"),
        (Reply::Keys(set(&[&issuer, &secret])), "invalid"),
        (Reply::Endless, "invalid"),
        (Reply::Status(204), "status"),
        (Reply::Status(404), "status"),
        (Reply::Redirect(format!("http://{}/", plain.address)), "unreachable"),
    ] {
        let server = KeyServer::start(&authority, usable.clone());
        let gateway = start(&origin, &authority, &server.url());
        let of_ann = token(&issuer, "ann");
        wait_until_valid(&gateway, &of_ann);
        let memory = gateway.process.memory();
        server.set_reply(reply);
        assert_eq!(get(&mut gateway.connect(), &token(&unknown, "eve")), 200);
        wait_for(|| fetches(&gateway, result) >= 1.0, STEP_TIMEOUT);
        let valid = tokens(&gateway, "valid");
        assert_eq!(get(&mut gateway.connect(), &of_ann), 200, "{result}");
        assert_eq!(tokens(&gateway, "valid"), valid + 1.0, "{result}");
        assert!(gateway.process.memory() < memory + (8 << 20), "{} bytes more", gateway.process.memory() - memory);
        server.set_reply(Reply::Keys(set(&[&unknown])));
        wait_until_valid(&gateway, &token(&unknown, "eve"));
        let key = tokens(&gateway, "key");
        get(&mut gateway.connect(), &of_ann);
        assert_eq!(tokens(&gateway, "key"), key + 1.0, "its key was removed by the issuer");
    }
    assert_eq!(plain.count(), 0, "no set is read in plaintext");
}

#[test]
fn silent_server_holds_no_request_and_is_given_up() {
    let (origin, authority, issuer) = (origin(), Authority::new("localhost"), Issuer::new(Algorithm::ES256, "a"));
    let server = KeyServer::start(&authority, Reply::Keys(set(&[&issuer])));
    let gateway = start(&origin, &authority, &server.url());
    let of_ann = token(&issuer, "ann");
    wait_until_valid(&gateway, &of_ann);
    server.set_reply(Reply::Silence);
    let mut client = gateway.connect();
    assert_eq!(get(&mut client, &token(&Issuer::new(Algorithm::ES256, "b"), "eve")), 200);
    wait_for(|| server.fetches() == 2, STEP_TIMEOUT);
    let begin = Instant::now();
    let (valid, key) = (tokens(&gateway, "valid"), tokens(&gateway, "key"));
    assert!((0..3).all(|_| get(&mut client, &of_ann) == 200));
    assert!((0..20).all(|n| get(&mut client, &token(&Issuer::new(Algorithm::ES256, &format!("k{n}")), "eve")) == 200));
    assert_eq!((tokens(&gateway, "valid"), tokens(&gateway, "key")), (valid + 3.0, key + 20.0));
    assert_eq!(server.fetches(), 2, "one fetch at a time");
    wait_for(|| fetches(&gateway, "unreachable") >= 1.0, Duration::from_secs(20));
    assert!(begin.elapsed() > Duration::from_secs(8), "{:?}", begin.elapsed());
    // A gateway that fetches stops without waiting for it.
    wait_for(|| server.fetches() == 3, STEP_TIMEOUT);
    let mut gateway = gateway;
    gateway.process.signal("INT");
    assert!(gateway.process.wait(Duration::from_secs(5)).is_some_and(|status| status.success()));
}

#[test]
fn server_is_authenticated() {
    let origin = origin();
    let (authority, other) = (Authority::new("localhost"), Authority::new("localhost"));
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let keys = Reply::Keys(set(&[&issuer]));
    let server = KeyServer::start(&authority, keys.clone());
    let misnamed_authority = Authority::new("elsewhere.test");
    let misnamed = KeyServer::start(&misnamed_authority, keys);
    for (authority, url) in
        [(Some(&other), server.url()), (Some(&misnamed_authority), misnamed.url()), (None, server.url())]
    {
        let dir = TempDir::new();
        dir.write("ca.pem", authority.map_or("", |authority| &authority.pem));
        let keys = authority.map_or("", |_| "keys_ca = \"ca.pem\"");
        let gateway = Gateway::start_in(dir, &config(&origin, &url, keys));
        wait_for(|| fetches(&gateway, "unreachable") >= 1.0, STEP_TIMEOUT);
        assert_eq!(get(&mut gateway.connect(), &token(&issuer, "ann")), 200);
        assert_eq!((tokens(&gateway, "valid"), tokens(&gateway, "keys_unavailable")), (0.0, 1.0));
    }
    assert_eq!((server.fetches(), misnamed.fetches()), (0, 0), "no request was sent");
}

#[test]
fn reload_keeps_keys_and_verified_tokens() {
    let (origin, authority, issuer) = (origin(), Authority::new("localhost"), Issuer::new(Algorithm::ES256, "a"));
    let server = KeyServer::start(&authority, Reply::Keys(set(&[&issuer])));
    let url = server.url();
    let gateway = start(&origin, &authority, &url);
    let of_ann = token(&issuer, "ann");
    wait_until_valid(&gateway, &of_ann);
    drop(server);
    let reloaded = |config: String| {
        let before = gateway.process.stderr.events("reloaded").len();
        gateway.rewrite(&config);
        wait_for(|| gateway.process.stderr.events("reloaded").len() > before, STEP_TIMEOUT);
    };
    let mut client = gateway.connect();
    let original = config(&origin, &url, "keys_ca = \"ca.pem\"");
    reloaded(original.replace("burst = 5", "burst = 50"));
    let valid = tokens(&gateway, "valid");
    assert!((0..3).all(|_| get(&mut client, &of_ann) == 200));
    assert_eq!(tokens(&gateway, "valid"), valid + 3.0, "the issuer is away");
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), 1.0, "no token is verified again");
    // Other rules: the same keys verify the token again.
    reloaded(original.replace("claim =", "leeway = \"5s\"\nclaim ="));
    assert_eq!(get(&mut client, &of_ann), 200);
    assert_eq!((tokens(&gateway, "valid"), gateway.metric("tidegate_token_signatures_total")), (valid + 4.0, 2.0));
    // Another URL: its keys are unknown.
    let unavailable = tokens(&gateway, "keys_unavailable");
    reloaded(original.replace("jwks.json", "other.json"));
    assert_eq!(get(&mut client, &of_ann), 200);
    assert_eq!(tokens(&gateway, "keys_unavailable"), unavailable + 1.0);
    let exposition = gateway.admin("/metrics").text();
    assert!(!exposition.contains("\ntidegate_token_key_set_age_seconds "), "no set is in use");
}
