//! Routes that demand credentials: API keys and HTTP Basic, what the origin and the cache see of
//! them, limits of their users, reload of their files, and the cost of guessing.

mod support;

use std::net::IpAddr;
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use gateway::credentials::NewApiKey;
use support::{Client, ClientResponse, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, tidegate, wait_for};

/// Cost of hashes whose verification takes a millisecond.
const CHEAP: u32 = 4;

const KEYS: &str = "auth = { api_keys = \"keys.txt\" }";
const BASIC: &str = "auth = { basic = \"users.htpasswd\", realm = \"Staging\" }";

fn hash_line(name: &str, password: &str, cost: u32) -> String {
    format!("{name}:{}\n", bcrypt::hash(password, cost).expect("a hash"))
}

fn basic(name: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))
}

/// A route `/*` with `auth`, a route `/open/*` without it, and one worker.
fn config(origin: &Origin, auth: &str, rest: &str) -> String {
    let origin = origin.address;
    format!(
        "[upstreams.origin]\nendpoints = [\"http://{origin}\"]\n\
         [[routes]]\nname = \"open\"\nmatch = {{ path = \"/open/*\" }}\nupstream = \"origin\"\n\
         [[routes]]\nname = \"closed\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\n{auth}\n\
         [server]\nworkers = 1\n[log]\naccess = \"stdout\"\n{rest}\n"
    )
}

fn results(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_authentications_total{{result=\"{result}\"}}"))
}

/// Writes a new file and renames it, as an editor or Kubernetes does.
fn replace(gateway: &Gateway, name: &str, text: &str) {
    let new_file = gateway.dir.write("replacement", text);
    std::fs::rename(new_file, gateway.dir.path().join(name)).expect("a renamed file");
}

fn reloads(gateway: &Gateway, event: &str) -> usize {
    gateway.process.stderr.events(event).len()
}

#[track_caller]
fn assert_rejected(response: &ClientResponse, challenge: &str) {
    assert_eq!((response.status, response.field("www-authenticate")), (401, Some(challenge)), "{response:?}");
    assert_eq!(response.field("cache-control"), Some("no-store"));
    assert!(response.text().contains("\"reason\":\"unauthorized\""), "{response:?}");
}

#[test]
fn keys_are_demanded_removed_and_name_the_user() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let (ann, bob) = (NewApiKey::generate("ann", None), NewApiKey::generate("bob", Some("platinum")));
    let (ann, bob) = (ann.expect("a key"), bob.expect("a key"));
    let dir = TempDir::new();
    dir.write("keys.txt", &format!("# holders\n{}\n{}\n", ann.line, bob.line));
    let limits = "[tiers]\nplatinum = 2.0\n[limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 5\n[access]\nexempt = [\"user:root\"]\n";
    let auth = format!("{KEYS}\nlimits = [\"user\"]\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start_in(dir, &config(&origin, &auth, limits));
    let mut client = gateway.connect();
    let challenge = "ApiKey realm=\"restricted\"";
    let other = NewApiKey::generate("ann", None).expect("a key").key;
    let twice = [("x-api-key", &*ann.key), ("X-Api-Key", &*ann.key)];
    for fields in [
        &[][..],
        &[("x-api-key", "")],
        &[("x-api-key", &other)],
        &[("x-api-key", "short")],
        &twice,
        &[("authorization", &*ann.key)],
    ] {
        assert_rejected(&client.get("/a", fields), challenge);
    }
    assert_eq!(origin.count(), 0, "nothing without a key reached the origin");
    assert_eq!(client.get("/open/a", &[]).status, 200, "the other route demands none");
    let passed = |client: &mut Client, key: &str, count: usize| {
        (0..count).filter(|_| client.get("/a", &[("X-Api-Key", key), ("x-other", "1")]).status == 200).count()
    };
    assert_eq!(
        (passed(&mut client, &ann.key, 8), passed(&mut client, &bob.key, 12)),
        (5, 10),
        "bob has twice the burst"
    );
    assert_eq!(passed(&mut gateway.connect(), &ann.key, 1), 0, "the same user on another connection");
    let last = origin.last();
    assert_eq!((last.field("x-api-key"), last.field("x-other")), (None, Some("1")));
    assert_eq!(
        ["missing", "unknown", "malformed", "multiple"].map(|result| results(&gateway, result)),
        [3.0, 1.0, 1.0, 1.0]
    );
    assert_eq!(results(&gateway, "valid"), 15.0, "a request over its limit is denied before");
    let log = gateway.access_log(28);
    let users: Vec<&str> = log.iter().filter_map(|line| line["user"].as_str()).collect();
    assert_eq!(users.iter().filter(|user| **user == "ann").count(), 9, "{users:?}");
    assert_eq!(log.iter().filter(|line| line["failure"] == "unauthorized" && line["status"] == 401).count(), 6);
    let output = gateway.process.stderr.all().join("\n") + &gateway.process.stdout.all().join("\n");
    assert!([&ann.key, &bob.key, &other].iter().all(|key| !output.contains(key.as_str())), "no key is logged");
}

#[test]
fn origin_gets_credentials_only_if_configured() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let key = NewApiKey::generate("ann", None).expect("a key");
    let key_fields = [("Authorization", &*format!("Bearer {}", key.key))];
    let password = basic("ann", "secret");
    for (auth, fields) in [
        ("api_keys = \"keys.txt\", header = \"authorization\"", &key_fields),
        ("basic = \"users.htpasswd\"", &[("Authorization", &*password)]),
    ] {
        for (credentials, want) in [("remove", None), ("forward", Some(fields[0].1))] {
            let dir = TempDir::new();
            dir.write("keys.txt", &key.line);
            dir.write("users.htpasswd", &hash_line("ann", "secret", CHEAP));
            let route = format!("auth = {{ {auth}, credentials = \"{credentials}\" }}\ncache = {{ mode = \"off\" }}");
            let gateway = Gateway::start_in(dir, &config(&origin, &route, ""));
            let mut client = gateway.connect();
            for _ in 0..3 {
                assert_eq!(client.get("/", fields).status, 200, "{auth}");
                assert_eq!(origin.last().field("authorization"), want, "{auth} {credentials}");
            }
            assert_eq!(client.request("POST", "/", fields, b"body").status, 200);
            assert_eq!((origin.last().field("authorization"), &*origin.last().body), (want, &b"body"[..]));
        }
    }
}

#[test]
fn changed_files_take_effect_at_once_and_unusable_ones_change_nothing() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let (ann, bob) = (NewApiKey::generate("ann", None), NewApiKey::generate("bob", None));
    let (ann, bob) = (ann.expect("a key"), bob.expect("a key"));
    let dir = TempDir::new();
    dir.write("keys.txt", &ann.line);
    let gateway = Gateway::start_in(dir, &config(&origin, KEYS, ""));
    let mut client = gateway.connect();
    let mut status = |key: &str| client.get("/", &[("x-api-key", key)]).status;
    assert_eq!((status(&ann.key), status(&bob.key)), (200, 401));
    replace(&gateway, "keys.txt", &format!("{}\nbob:plain", ann.line));
    wait_for(|| reloads(&gateway, "reload_refused") == 1, STEP_TIMEOUT);
    assert_eq!((status(&ann.key), status(&bob.key)), (200, 401), "the old keys stay");
    let fault = "keys.txt: line 2 is not `NAME:sha256:HEX`";
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains(fault)).is_some());
    replace(&gateway, "keys.txt", &bob.line);
    wait_for(|| reloads(&gateway, "reloaded") == 1, STEP_TIMEOUT);
    assert_eq!((status(&ann.key), status(&bob.key)), (401, 200), "on the open connection too");

    let dir = TempDir::new();
    dir.write("users.htpasswd", &hash_line("ann", "old", CHEAP));
    let gateway = Gateway::start_in(dir, &config(&origin, BASIC, ""));
    let mut client = gateway.connect();
    let mut status = |password: &str| client.get("/", &[("authorization", &basic("ann", password))]).status;
    assert_eq!((status("old"), status("old"), status("new")), (200, 200, 401));
    replace(&gateway, "users.htpasswd", "ann:$apr1$8v5KoN3c$m3Oq2Tz8xQ0zQ1Jj1jQyW1\n");
    wait_for(|| reloads(&gateway, "reload_refused") == 1, STEP_TIMEOUT);
    assert_eq!(status("old"), 200);
    replace(&gateway, "users.htpasswd", &hash_line("ann", "new", CHEAP));
    wait_for(|| reloads(&gateway, "reloaded") == 1, STEP_TIMEOUT);
    assert_eq!((status("old"), status("new")), (401, 200), "a verified password is forgotten");
}

#[test]
fn passwords_are_verified_once_beside_the_worker() {
    const EXPENSIVE: u32 = 11;
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &(hash_line("ann", "pass:wörd", EXPENSIVE) + &hash_line("bob", "b", EXPENSIVE)));
    let auth = format!("{BASIC}\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start_in(dir, &config(&origin, &auth, ""));
    let challenge = "Basic realm=\"Staging\", charset=\"UTF-8\"";
    let mut client = gateway.connect();
    for value in ["", "Basic", "Bearer abc", "Basic ****", &basic("eve", "x"), &basic("ann", "pass")] {
        assert_rejected(&client.get("/", &[("authorization", value)]), challenge);
    }
    assert_eq!(origin.count(), 0);
    let ann = basic("ann", "pass:wörd");
    // The only worker serves other requests meanwhile.
    let begin = Instant::now();
    client.send_get("/first", &[("authorization", &ann)]);
    let mut other = gateway.connect();
    assert_eq!(other.get("/open/1", &[]).status, 200);
    assert_eq!(other.get("/open/2", &[]).status, 200);
    let served = begin.elapsed();
    assert_eq!(client.read_response().status, 200);
    let verified = begin.elapsed();
    assert!(served < verified, "{served:?} for others, {verified:?} for the password");
    assert_eq!(origin.last().target, "/first");
    // The same user on new connections: no hash is computed.
    let begin = Instant::now();
    (0..50).for_each(|_| assert_eq!(gateway.get("/", &[("Authorization", &ann)]).status, 200));
    assert!(begin.elapsed() < verified * 10, "{:?} for 50 requests, {verified:?} for one hash", begin.elapsed());
    assert_eq!(results(&gateway, "valid"), 51.0);
}

#[test]
fn guessing_is_slowed_per_address_and_does_not_affect_known_users() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &(hash_line("ann", "right", CHEAP) + &hash_line("bob", "right", CHEAP)));
    let auth = format!("{BASIC}\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start_in(dir, &config(&origin, &auth, ""));
    let get =
        |client: &mut Client, name: &str, password: &str| client.get("/", &[("authorization", &basic(name, password))]);
    let mut client = gateway.connect();
    assert_eq!(get(&mut client, "ann", "right").status, 200);
    let statuses: Vec<u16> = (0..60).map(|n| get(&mut client, "ann", &format!("guess{n}")).status).collect();
    assert!(statuses[..20].iter().all(|status| *status == 401), "{statuses:?}");
    // One more each six seconds.
    assert!(statuses[25..].iter().filter(|status| **status == 429).count() >= 30, "{statuses:?}");
    let throttled = get(&mut client, "bob", "right");
    assert_eq!((throttled.status, throttled.field("retry-after")), (429, Some("6")), "{throttled:?}");
    assert!(throttled.text().contains("authentication_throttled"));
    assert_eq!(get(&mut client, "ann", "right").status, 200, "a verified password needs no verification");
    let other = IpAddr::from([127, 0, 0, 2]);
    assert_eq!(get(&mut Client::connect_from(other, gateway.address), "bob", "right").status, 200, "another address");
    assert_eq!(get(&mut client, "bob", "right").status, 200, "verified for another address");
    // A client with one wrong password repeats it at no cost, once it has been verified.
    let mut third = Client::connect_from(IpAddr::from([127, 0, 0, 3]), gateway.address);
    assert!((0..40).all(|_| get(&mut third, "ann", "typo").status == 401));
    assert_eq!(get(&mut third, "bob", "guess").status, 401, "it is not throttled");
    assert_eq!(reloads(&gateway, "passwords_throttled").min(1), 1);
    assert!(results(&gateway, "client_throttled") >= 30.0);
}

/// A client opens many connections at once, and all have the same password.
#[test]
fn equal_credentials_share_one_verification() {
    const SLOW: u32 = 10;
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &hash_line("ann", "right", SLOW));
    let auth = format!("{BASIC}\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start_in(dir, &config(&origin, &auth, ""));
    let statuses = |password: &str| -> Vec<u16> {
        let mut clients: Vec<Client> = (0..40).map(|_| gateway.connect()).collect();
        clients.iter_mut().for_each(|client| client.send_get("/", &[("authorization", &basic("ann", password))]));
        // The one that came first leaves.
        drop(clients.remove(0));
        clients.iter_mut().map(|client| client.read_response().status).collect()
    };
    assert_eq!(statuses("right"), [200; 39]);
    assert_eq!(statuses("wrong"), [401; 39]);
    // The wrong one was charged once: 19 others of 20 are verified.
    let mut client = gateway.connect();
    let mut guess = |number| client.get("/", &[("authorization", &basic("ann", &format!("guess{number}")))]).status;
    assert!((0..19).all(|number| guess(number) == 401));
}

#[test]
fn waiting_verifications_are_bounded() {
    const SLOW: u32 = 12;
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &hash_line("ann", "right", SLOW));
    let gateway = Gateway::start_in(dir, &config(&origin, BASIC, ""));
    let mut clients: Vec<Client> = (0..120).map(|_| gateway.connect()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send_get("/", &[("authorization", &basic("ann", &n.to_string()))]);
    }
    // 16 of an address wait, for 5 s. Those that find no place get their response at once.
    wait_for(|| results(&gateway, "verification_throttled") >= 40.0, Duration::from_secs(4));
    assert_eq!(gateway.get("/open/", &[]).status, 200);
    let responses: Vec<ClientResponse> = clients.iter_mut().map(Client::read_response).collect();
    let busy: Vec<&ClientResponse> = responses.iter().filter(|response| response.status == 503).collect();
    assert!(busy.len() >= 30, "{} of 120", busy.len());
    assert!(busy.iter().all(|response| response.field("retry-after") == Some("1")), "{:?}", busy[0]);
    let statuses: Vec<u16> = responses.iter().map(|response| response.status).collect();
    assert!(statuses.iter().all(|status| matches!(status, 401 | 429 | 503)), "{statuses:?}");
    wait_for(|| gateway.get("/", &[("authorization", &basic("ann", "right"))]).status != 503, STEP_TIMEOUT);
}

#[test]
fn stored_pages_need_the_permission_of_the_origin_and_the_credentials_of_the_client() {
    let origin = Origin::start(|request| match &*request.target {
        "/public" => Script::ok(&[("Cache-Control", "public, max-age=60")], "shared"),
        "/vary" => Script::ok(&[("Cache-Control", "public, max-age=60"), ("Vary", "x-api-key")], "shared"),
        _ => Script::ok(&[("Cache-Control", "max-age=60")], "for one user"),
    });
    let keys = ["ann", "bob"].map(|name| NewApiKey::generate(name, None).expect("a key"));
    let dir = TempDir::new();
    dir.write("keys.txt", &keys.each_ref().map(|key| key.line.as_str()).join("\n"));
    dir.write("users.htpasswd", &(hash_line("ann", "a", CHEAP) + &hash_line("bob", "b", CHEAP)));
    let users = [basic("ann", "a"), basic("bob", "b")];
    let [ann, bob] = [0, 1].map(|n| (("x-api-key", &*keys[n].key), ("authorization", &*users[n])));
    let gateway = Gateway::start_in(dir, &config(&origin, KEYS, ""));
    for (auth, ann, bob) in [(KEYS, ann.0, bob.0), (BASIC, ann.1, bob.1)] {
        let before = reloads(&gateway, "reloaded");
        gateway.rewrite(&config(&origin, auth, "# changed"));
        wait_for(|| reloads(&gateway, "reloaded") > before, STEP_TIMEOUT);
        let mut client = gateway.connect();
        let tag = if auth == KEYS { "keys" } else { "basic" };
        let count = origin.count();
        for _ in 0..2 {
            let page = client.get(&format!("/private?{tag}"), &[ann]);
            assert!(page.status == 200 && !page.is_hit(), "{page:?}");
        }
        assert!(!client.get(&format!("/private?{tag}"), &[bob]).is_hit());
        assert_eq!(origin.count() - count, 3, "{tag}");
        if auth == KEYS {
            assert!(!client.get("/public", &[ann]).is_hit());
        }
        assert!(client.get("/public", &[bob]).is_hit(), "the origin permits it");
        assert_eq!(client.get("/public", &[]).status, 401, "a stored page demands credentials too");
        assert_eq!(client.get("/vary", &[ann]).status, 200);
        assert!(client.get("/vary", &[bob]).is_hit(), "the field is not forwarded: no variants");
    }
}

#[test]
fn denied_users_and_addresses_are_refused() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &(hash_line("ann", "a", CHEAP) + &hash_line("eve", "e", CHEAP)));
    let rest = "[access]\ndenied = [\"user:eve\", \"127.0.0.9\"]\n";
    let gateway = Gateway::start_in(dir, &config(&origin, BASIC, rest));
    let eve = [("authorization", &*basic("eve", "e"))];
    let mut client = gateway.connect();
    assert_eq!([0, 1].map(|_| client.get("/", &eve).status), [403, 403], "verified, then from the cache");
    assert_eq!(client.get("/", &[("authorization", &basic("ann", "a"))]).status, 200);
    let mut denied = Client::connect_from(IpAddr::from([127, 0, 0, 9]), gateway.address);
    assert_eq!(denied.get("/", &[("authorization", &basic("ann", "wrong"))]).status, 403);
    assert_eq!(results(&gateway, "unknown"), 0.0, "its password was not verified");
}

/// Output of a command that reads `input`.
fn run(arguments: &[&str], input: &str) -> (bool, String, String) {
    use std::io::Write as _;
    let mut command = tidegate();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("a started process");
    child.stdin.take().expect("stdin is piped").write_all(input.as_bytes()).expect("the command reads");
    let output = child.wait_with_output().expect("the command ends");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (output.status.success(), text(output.stdout), text(output.stderr))
}

#[test]
fn commands_print_lines_that_the_files_accept() {
    let (is_ok, line, shown) = run(&["key", "ann", "--tier", "standard"], "");
    let key = shown.trim().rsplit(' ').next().expect("a key").to_owned();
    assert!(is_ok && line.starts_with("ann:sha256:") && line.ends_with(":standard\n") && !line.contains(&key));
    let (is_ok, own, shown) = run(&["key", "bob", "--stdin"], "0123456789abcdef0123456789abcdef\n");
    assert!(is_ok && shown.is_empty(), "{shown}");
    let (is_ok, user, _) = run(&["password", "cid"], "secret word\n");
    assert!(is_ok && user.starts_with("cid:$2"), "{user}");
    let dir = TempDir::new();
    dir.write("keys.txt", &(line + &own));
    dir.write("users.htpasswd", &user);
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let gateway = Gateway::start_in(dir, &config(&origin, KEYS, ""));
    for key in [&*key, "0123456789abcdef0123456789abcdef"] {
        assert_eq!(gateway.get("/", &[("x-api-key", key)]).status, 200);
    }
    gateway.rewrite(&config(&origin, BASIC, ""));
    wait_for(|| reloads(&gateway, "reloaded") == 1, STEP_TIMEOUT);
    let mut client = gateway.connect();
    client.set_read_timeout(Duration::from_secs(30));
    assert_eq!(client.get("/", &[("authorization", &basic("cid", "secret word"))]).status, 200);
    for (arguments, input, want) in [
        (&["key", "a b"][..], "", "a name is"),
        (&["key", "ann", "--stdin"], "short", "a key is"),
        (&["password", "a:b"], "x", "a name is"),
        (&["password", "ann"], "\n", "a password is"),
        // Of several lines, one would be the secret and the others nothing.
        (&["password", "ann"], "first word\nsecond word\n", "several lines"),
        (&["key", "ann", "--stdin"], "a-key-that-is-long-enough\r\nx", "several lines"),
        (&["password", "ann"], &"x".repeat(1_025), "more than 1 KiB"),
    ] {
        let (is_ok, output, error) = run(arguments, input);
        assert!(!is_ok && output.is_empty() && error.contains(want), "{arguments:?}: {error}");
    }
}

#[test]
fn fixed_responses_need_credentials_and_preflights_do_not() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let key = NewApiKey::generate("ann", None).expect("a key");
    let dir = TempDir::new();
    dir.write("keys.txt", &key.line);
    let cors = format!("{KEYS}\ncors = {{ origins = [\"https://app.test\"] }}");
    let rest = format!(
        "[[routes]]\nname = \"fixed\"\nmatch = {{ path = \"/fixed\" }}\n{KEYS}\nrespond = {{ status = 200, body = \"fixed\" }}\n\
         [[routes]]\nname = \"moved\"\nmatch = {{ path = \"/moved\" }}\n{KEYS}\nredirect = {{ to = \"https://new.test/\" }}\n"
    );
    let gateway = Gateway::start_in(dir, &config(&origin, &cors, &rest));
    let mut client = gateway.connect();
    for path in ["/fixed", "/moved", "/"] {
        assert_rejected(&client.get(path, &[]), "ApiKey realm=\"restricted\"");
    }
    let with_key = [("x-api-key", &*key.key)];
    assert_eq!(client.get("/fixed", &with_key).text(), "fixed");
    assert!((300..400).contains(&client.get("/moved", &with_key).status));
    let from_app = ("origin", "https://app.test");
    let preflight = [from_app, ("access-control-request-method", "GET")];
    let allowed = client.request("OPTIONS", "/", &preflight, b"");
    assert_eq!(allowed.field("access-control-allow-origin"), Some("https://app.test"), "{allowed:?}");
    assert!(allowed.status < 300);
    assert_eq!(client.request("OPTIONS", "/", &[from_app], b"").status, 401, "no preflight");
    assert_eq!(client.request("OPTIONS", "/fixed", &preflight, b"").status, 401, "a route without `cors`");
    assert_eq!(origin.count(), 0);
}

#[test]
fn upload_with_a_wrong_password_is_refused_and_the_connection_stays_usable() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let dir = TempDir::new();
    dir.write("users.htpasswd", &hash_line("ann", "right", CHEAP));
    let gateway = Gateway::start_in(dir, &config(&origin, BASIC, ""));
    let mut client = gateway.connect();
    let (wrong, right) = (basic("ann", "wrong"), basic("ann", "right"));
    for body in [&b"small"[..], &[7; 20_000]] {
        assert_eq!(client.request("POST", "/", &[("authorization", &wrong)], body).status, 401);
        assert_eq!(origin.count(), 0);
    }
    assert_eq!(client.request("POST", "/", &[("authorization", &right)], b"body").status, 200);
    assert_eq!(&*origin.last().body, b"body");
    // A body that the gateway does not read ends the connection.
    let mut large = gateway.connect();
    large.send(format!("POST / HTTP/1.1\r\nHost: a\r\nAuthorization: {wrong}\r\nContent-Length: 10000000\r\n\r\n"));
    assert_eq!(large.read_response().status, 401);
}

/// Users of tokens and holders of keys with equal names are different users.
#[test]
fn explanations_find_the_holder_of_a_key() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let ann = NewApiKey::generate("ann", None).expect("a key");
    let dir = TempDir::new();
    dir.write("keys.txt", &format!("{}\n", ann.line));
    let secret = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY";
    dir.write("jwks.json", &format!("{{\"keys\":[{{\"kty\":\"oct\",\"alg\":\"HS256\",\"k\":\"{secret}\"}}]}}"));
    let rest = "[limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 5\n\
                [identity.user.jwt]\nkeys = \"jwks.json\"\nalgorithms = [\"HS256\"]\nclaim = \"sub\"\n";
    let auth = format!("{KEYS}\nlimits = [\"user\"]\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start_in(dir, &config(&origin, &auth, rest));
    for _ in 0..2 {
        assert_eq!(gateway.get("/", &[("x-api-key", &ann.key)]).status, 200);
    }
    let remaining = |who: &str| {
        let reply = gateway.admin(&format!("/api/v1/limits/explain?ip=127.0.0.1&{who}")).text();
        let reply: serde_json::Value = serde_json::from_str(&reply).expect("JSON");
        reply["rules"][0]["remaining"].as_u64()
    };
    assert_eq!((remaining("principal=ann"), remaining("user=ann")), (Some(3), Some(5)));
    let both = gateway.admin("/api/v1/limits/explain?ip=127.0.0.1&user=ann&principal=ann");
    assert_eq!(both.status, 400, "{}", both.text());
}
