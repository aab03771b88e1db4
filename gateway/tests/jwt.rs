//! Users identified by signed tokens: separate limits, rejected tokens, and key rotation.
//!
//! Refill rates are so low that no token returns during a test; the burst is then exactly what is
//! admitted.

mod support;
#[path = "support/issuer.rs"]
mod issuer;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use issuer::{Issuer, now, set};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, tidegate, wait_for};

/// Accepts tokens of `https://id.test` for audience `shop`; limits per user and per device.
const REST: &str = "[identity.user.jwt]\nkeys = \"jwks.json\"\nalgorithms = [\"ES256\"]\nissuer = \"https://id.test\"\n\
                    audience = [\"shop\"]\n[identity.tier]\njwt_claim = \"plan\"\n[tiers]\nplatinum = 3.2\n\
                    [limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 5\n\
                    [limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1000\n\
                    [server]\nworkers = 1\n[log]\nlevel = \"debug\"\n";

const ROUTE: &str = "cache = { mode = \"off\" }\nlimits = [\"user\", \"device\"]";

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "passed"))
}

/// A gateway that accepts tokens of these issuers.
fn start_gateway(origin: &Origin, issuers: &[&Issuer]) -> Gateway {
    let dir = TempDir::new();
    dir.write("jwks.json", &set(issuers));
    Gateway::start_in(dir, &one_route(origin.address, ROUTE, REST))
}

fn claims(user: &str) -> Value {
    json!({ "sub": user, "iss": "https://id.test", "aud": "shop" })
}

fn with(mut claims: Value, name: &str, value: Value) -> Value {
    claims[name] = value;
    claims
}

/// Number of `count` requests with this token that pass; the others must be denied.
#[track_caller]
fn passed(client: &mut Client, token: &str, count: usize) -> usize {
    let authorization = format!("Bearer {token}");
    let fields = [("Authorization", &*authorization)];
    let statuses: Vec<u16> = (0..count).map(|_| client.get("/", &fields).status).collect();
    assert!(statuses.iter().all(|status| matches!(status, 200 | 429)), "{statuses:?}");
    statuses.iter().filter(|status| **status == 200).count()
}

fn tokens(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_tokens_total{{result=\"{result}\"}}"))
}

#[test]
fn rejected_tokens_leave_the_caller_anonymous() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "k1"), Issuer::new(Algorithm::ES256, "k1"));
    let (origin, other) = (origin(), Issuer::new(Algorithm::RS256, "k1"));
    let gateway = start_gateway(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let platinum = || with(claims("ann"), "plan", json!("platinum"));
    let public = issuer.jwk["x"].as_str().expect("a point").to_owned();
    let mut confused = Issuer::with_key(Algorithm::HS256, "", EncodingKey::from_secret(public.as_bytes()));
    confused.header.kid = Some("k1".to_owned());
    let unknown_issuer = Issuer::new(Algorithm::ES256, "k2");
    let crit = Header { crit: Some(vec!["exp".to_owned()]), ..issuer.header.clone() };
    let part = |json: Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let none = format!("{}.{}.", part(json!({ "alg": "none" })), part(with(platinum(), "exp", json!(now() + 60))));
    let bad = [
        (none, "algorithm"),
        (confused.token(platinum()), "algorithm"),
        (other.token(platinum()), "algorithm"),
        (forger.token(platinum()), "signature"),
        (unknown_issuer.token(platinum()), "key"),
        (issuer.token(with(platinum(), "exp", json!(now() - 40))), "expired"),
        (issuer.token(with(platinum(), "nbf", json!(now() + 600))), "not_yet_valid"),
        (issuer.token(with(platinum(), "exp", json!("never"))), "missing_exp"),
        (issuer.token(with(platinum(), "iss", json!("https://other.test"))), "issuer"),
        (issuer.token(with(platinum(), "aud", json!(["bank"]))), "audience"),
        (issuer.token_with(&crit, platinum()), "unsupported_crit"),
        (issuer.token(with(platinum(), "sub", json!(true))), "no_user"),
        ("opaque".to_owned(), "malformed"),
        ("x".repeat(8_193), "oversize"),
    ];
    for (token, result) in &bad {
        let before = tokens(&gateway, result);
        // The user rule does not apply to an anonymous caller; a user would exceed the burst of 5.
        assert_eq!(passed(&mut client, token, 8), 8, "{result}");
        assert_eq!(tokens(&gateway, result) - before, 8.0, "{result}");
    }
    assert_eq!(passed(&mut client, &issuer.token(platinum()), 20), 16, "the rejected tokens did not charge ann");
    let output = gateway.process.stderr.all().join("\n") + &gateway.process.stdout.all().join("\n");
    assert!(bad.iter().all(|(token, _)| !output.contains(token.as_str())), "no token is logged");
    // The upstream receives the client's own header.
    assert_eq!(origin.requests()[0].field("authorization"), Some(&*format!("Bearer {}", bad[0].0)));
}

#[test]
fn user_limits_are_separate_and_weighted_by_class() {
    let (origin, issuer) = (origin(), Issuer::new(Algorithm::ES256, "k1"));
    let gateway = start_gateway(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let of = |user: &str, plan: &str| issuer.token(with(claims(user), "plan", json!(plan)));
    assert_eq!(passed(&mut client, &of("ann", "platinum"), 20), 16, "3.2 times the burst");
    assert_eq!(passed(&mut client, &of("ann", "platinum"), 5), 0, "another token of the same user");
    assert_eq!(
        (passed(&mut client, &of("bob", "standard"), 9), passed(&mut client, &of("cid", "unheard-of"), 9)),
        (5, 5)
    );
    assert_eq!(
        passed(&mut gateway.connect(), &issuer.token(claims("bob")), 2),
        0,
        "the same user on another connection"
    );
    assert_eq!(tokens(&gateway, "valid"), 45.0);
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), 5.0, "one per token, not per request");
    // A user id header is ignored with token authentication.
    assert!((0..9).all(|_| client.get("/", &[("X-User-Id", "bob")]).status == 200));
}

#[test]
fn key_rotation_takes_effect_without_closing_connections() {
    let (origin, old, new) = (origin(), Issuer::new(Algorithm::ES256, "old"), Issuer::new(Algorithm::ES256, "new"));
    let gateway = start_gateway(&origin, &[&old]);
    let mut client = gateway.connect();
    let (of_old, of_new) = (old.token(claims("ann")), new.token(claims("ann")));
    assert_eq!((passed(&mut client, &of_old, 2), passed(&mut client, &of_new, 9)), (2, 9));
    let reloads = |event: &str| gateway.process.stderr.events(event).len();
    // Writes a new file and renames it, as an editor or Kubernetes does.
    let replace = |text: &str| {
        let new_file = gateway.dir.write("jwks.json.new", text);
        std::fs::rename(new_file, gateway.dir.path().join("jwks.json")).expect("a renamed file");
    };
    replace("{ \"keys\": [] }");
    wait_for(|| reloads("reload_refused") == 1, STEP_TIMEOUT);
    assert_eq!(passed(&mut client, &of_old, 1), 1, "an unusable key set changes nothing");
    replace(&set(&[&new]));
    wait_for(|| reloads("reloaded") == 1, STEP_TIMEOUT);
    let before = (tokens(&gateway, "valid"), tokens(&gateway, "key"));
    assert_eq!((passed(&mut client, &of_new, 9), passed(&mut client, &of_old, 9)), (2, 9), "ann has used three tokens");
    assert_eq!((tokens(&gateway, "valid") - before.0, tokens(&gateway, "key") - before.1), (9.0, 9.0));
}

#[test]
fn invalid_token_flood_costs_few_verifications_and_does_not_affect_cached_users() {
    let (origin, issuer, forger) = (origin(), Issuer::new(Algorithm::ES256, "k1"), Issuer::new(Algorithm::ES256, "k1"));
    let gateway = start_gateway(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let cached = issuer.token(with(claims("ann"), "plan", json!("platinum")));
    assert_eq!(passed(&mut client, &cached, 1), 1);
    let begin = std::time::Instant::now();
    let anonymous: usize = (0..300).map(|n| passed(&mut client, &forger.token(claims(&n.to_string())), 1)).sum();
    let most = 50.0 + 10.0 * (begin.elapsed().as_secs_f64() + 1.0);
    let (verified, throttled) = (tokens(&gateway, "signature"), tokens(&gateway, "client_throttled"));
    assert!((50.0..=most).contains(&verified), "{verified} of at most {most}");
    assert_eq!((verified + throttled, verified), (300.0, anonymous as f64));
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), verified + 1.0);
    assert_eq!(passed(&mut client, &cached, 20), 15, "the cached token is still accepted");
    // A new valid token is rejected too: its user would otherwise evade limits, or reach the origin
    // although denied.
    let mut responses = (0..10).map(|n| {
        // One verification becomes possible every 100 ms.
        passed(&mut client, &forger.token(claims(&format!("late {n}"))), 1);
        let new = issuer.token(claims(&format!("bob {n}")));
        client.get("/", &[("Authorization", &format!("Bearer {new}"))])
    });
    let response = responses.find(|response| response.status != 200).expect("a rejection");
    assert_eq!((response.status, response.field("retry-after")), (429, Some("1")), "{response:?}");
    assert!(String::from_utf8_lossy(&response.body).contains("\"reason\":\"verification_throttled\""));
    assert!(gateway.metric("tidegate_failures_total{kind=\"verification_throttled\"}") > 200.0);
    let new = issuer.token(claims("bob"));
    wait_for(|| passed(&mut client, &new, 1) == 1, STEP_TIMEOUT);
}

#[test]
fn unusable_key_file_prevents_start() {
    let dir = TempDir::new();
    let file =
        dir.write("tidegate.toml", &format!("version = 1\n{}", one_route(([127, 0, 0, 1], 1).into(), ROUTE, REST)));
    for (text, want) in [("{}", "not a JWK set"), ("{ \"keys\": [] }", "no key for the allowed algorithms")] {
        dir.write("jwks.json", text);
        for command in [&["check"][..], &["run", "--config"]] {
            let output = tidegate().args(command).arg(&file).output().expect("the command runs");
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(1) && stderr.contains(want) && stderr.contains("tidegate.toml:"),
                "{stderr}"
            );
        }
    }
}
