//! Users by signed tokens: who is told apart, who is nobody, and what happens when the keys change.
//!
//! Rates are so slow that nothing comes back while a test runs; a burst is then exactly what is admitted.

mod support;
#[path = "support/issuer.rs"]
mod issuer;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use issuer::{Issuer, now, set};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use support::{Client, Dir, Gateway, Origin, PATIENCE, Script, one_route, tidegate, wait_for};

/// Tokens of `https://id.test` for this shop, one user's and all devices' limits.
const REST: &str = "[identity.user.jwt]\nkeys = \"jwks.json\"\nalgorithms = [\"ES256\"]\nissuer = \"https://id.test\"\n\
                    audience = [\"shop\"]\n[identity.tier]\njwt_claim = \"plan\"\n[tiers]\nplatinum = 3.2\n\
                    [limits.user]\ntier = \"user\"\nrate = \"1/h\"\nburst = 5\n\
                    [limits.device]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1000\n\
                    [server]\nworkers = 1\n[log]\nlevel = \"debug\"\n";

const ROUTE: &str = "cache = { mode = \"off\" }\nlimits = [\"user\", \"device\"]";

fn origin() -> Origin {
    Origin::start(|_| Script::ok(&[], "passed"))
}

/// A gateway that believes these issuers.
fn believing(origin: &Origin, issuers: &[&Issuer]) -> Gateway {
    let dir = Dir::new();
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

/// How many of `count` requests with this token pass; the others are denied.
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
fn whoever_is_not_believed_is_nobody() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "k1"), Issuer::new(Algorithm::ES256, "k1"));
    let (origin, other) = (origin(), Issuer::new(Algorithm::RS256, "k1"));
    let gateway = believing(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let platinum = || with(claims("ann"), "plan", json!("platinum"));
    let public = issuer.jwk["x"].as_str().expect("a point").to_owned();
    let mut confused = Issuer::with_key(Algorithm::HS256, "", EncodingKey::from_secret(public.as_bytes()));
    confused.header.kid = Some("k1".to_owned());
    let stranger = Issuer::new(Algorithm::ES256, "k2");
    let crit = Header { crit: Some(vec!["exp".to_owned()]), ..issuer.header.clone() };
    let part = |json: Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let none = format!("{}.{}.", part(json!({ "alg": "none" })), part(with(platinum(), "exp", json!(now() + 60))));
    let bad = [
        (none, "algorithm"),
        (confused.token(platinum()), "algorithm"),
        (other.token(platinum()), "algorithm"),
        (forger.token(platinum()), "signature"),
        (stranger.token(platinum()), "key"),
        (issuer.token(with(platinum(), "exp", json!(now() - 40))), "expired"),
        (issuer.token(with(platinum(), "nbf", json!(now() + 600))), "early"),
        (issuer.token(with(platinum(), "exp", json!("never"))), "undated"),
        (issuer.token(with(platinum(), "iss", json!("https://other.test"))), "issuer"),
        (issuer.token(with(platinum(), "aud", json!(["bank"]))), "audience"),
        (issuer.token_with(&crit, platinum()), "critical"),
        (issuer.token(with(platinum(), "sub", json!(true))), "no_user"),
        ("opaque".to_owned(), "malformed"),
        ("x".repeat(8_193), "oversize"),
    ];
    for (token, result) in &bad {
        let before = tokens(&gateway, result);
        // The rule of users does not apply to who is none; a user would have been denied the eighth.
        assert_eq!(passed(&mut client, token, 8), 8, "{result}");
        assert_eq!(tokens(&gateway, result) - before, 8.0, "{result}");
    }
    assert_eq!(passed(&mut client, &issuer.token(platinum()), 20), 16, "ann herself has lost nothing by all that");
    let said = gateway.process.stderr.all().join("\n") + &gateway.process.stdout.all().join("\n");
    assert!(bad.iter().all(|(token, _)| !said.contains(token.as_str())), "no token is logged");
    // The upstream gets what the client sent.
    assert_eq!(origin.requests()[0].field("authorization"), Some(&*format!("Bearer {}", bad[0].0)));
}

#[test]
fn users_have_limits_of_their_own_by_the_weight_of_their_tier() {
    let (origin, issuer) = (origin(), Issuer::new(Algorithm::ES256, "k1"));
    let gateway = believing(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let of = |user: &str, plan: &str| issuer.token(with(claims(user), "plan", json!(plan)));
    assert_eq!(passed(&mut client, &of("ann", "platinum"), 20), 16, "3.2 times the burst");
    assert_eq!(passed(&mut client, &of("ann", "platinum"), 5), 0, "another token of the same user");
    assert_eq!(
        (passed(&mut client, &of("bob", "standard"), 9), passed(&mut client, &of("cid", "unheard-of"), 9)),
        (5, 5)
    );
    assert_eq!(passed(&mut gateway.connect(), &issuer.token(claims("bob")), 2), 0, "the same user elsewhere");
    assert_eq!(tokens(&gateway, "valid"), 45.0);
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), 5.0, "one for each token, not for each request");
    // A header of the same name is nobody's word here.
    assert!((0..9).all(|_| client.get("/", &[("X-User-Id", "bob")]).status == 200));
}

#[test]
fn new_keys_are_believed_and_old_ones_not_without_closing_a_connection() {
    let (origin, old, new) = (origin(), Issuer::new(Algorithm::ES256, "old"), Issuer::new(Algorithm::ES256, "new"));
    let gateway = believing(&origin, &[&old]);
    let mut client = gateway.connect();
    let (of_old, of_new) = (old.token(claims("ann")), new.token(claims("ann")));
    assert_eq!((passed(&mut client, &of_old, 2), passed(&mut client, &of_new, 9)), (2, 9));
    let reloads = |event: &str| gateway.process.stderr.events(event).len();
    // Beside it and renamed, as an editor or Kubernetes does.
    let replace = |text: &str| {
        let beside = gateway.dir.write("jwks.json.new", text);
        std::fs::rename(beside, gateway.dir.path().join("jwks.json")).expect("a renamed file");
    };
    replace("{ \"keys\": [] }");
    wait_for(|| reloads("reload_refused") == 1, PATIENCE);
    assert_eq!(passed(&mut client, &of_old, 1), 1, "what cannot be used changes nothing");
    replace(&set(&[&new]));
    wait_for(|| reloads("reloaded") == 1, PATIENCE);
    let before = (tokens(&gateway, "valid"), tokens(&gateway, "key"));
    assert_eq!((passed(&mut client, &of_new, 9), passed(&mut client, &of_old, 9)), (2, 9), "ann has spent three");
    assert_eq!((tokens(&gateway, "valid") - before.0, tokens(&gateway, "key") - before.1), (9.0, 9.0));
}

#[test]
fn a_flood_of_bad_tokens_takes_few_signatures_and_nothing_from_known_users() {
    let (origin, issuer, forger) = (origin(), Issuer::new(Algorithm::ES256, "k1"), Issuer::new(Algorithm::ES256, "k1"));
    let gateway = believing(&origin, &[&issuer]);
    let mut client = gateway.connect();
    let known = issuer.token(with(claims("ann"), "plan", json!("platinum")));
    assert_eq!(passed(&mut client, &known, 1), 1);
    let begin = std::time::Instant::now();
    let anonymous: usize = (0..300).map(|n| passed(&mut client, &forger.token(claims(&n.to_string())), 1)).sum();
    let most = 50.0 + 10.0 * (begin.elapsed().as_secs_f64() + 1.0);
    let (verified, unchecked) = (tokens(&gateway, "signature"), tokens(&gateway, "unchecked"));
    assert!((50.0..=most).contains(&verified), "{verified} of at most {most}");
    assert_eq!((verified + unchecked, verified), (300.0, anonymous as f64));
    assert_eq!(gateway.metric("tidegate_token_signatures_total"), verified + 1.0);
    assert_eq!(passed(&mut client, &known, 20), 15, "known all the same");
    // A good one that is new might be anybody's: its user would otherwise have no limit, and reach the origin although denied.
    let new = issuer.token(claims("bob"));
    let answer = client.get("/", &[("Authorization", &format!("Bearer {new}"))]);
    assert_eq!((answer.status, answer.field("retry-after")), (429, Some("1")), "{answer:?}");
    assert!(String::from_utf8_lossy(&answer.body).contains("\"reason\":\"unchecked\""));
    assert!(gateway.metric("tidegate_failures_total{kind=\"unchecked\"}") > 200.0);
    wait_for(|| passed(&mut client, &new, 1) == 1, PATIENCE);
}

#[test]
fn a_file_without_keys_keeps_the_gateway_from_starting() {
    let dir = Dir::new();
    let file =
        dir.write("tidegate.toml", &format!("version = 1\n{}", one_route(([127, 0, 0, 1], 1).into(), ROUTE, REST)));
    for (text, want) in [("{}", "it is no JWK set"), ("{ \"keys\": [] }", "no key in it")] {
        dir.write("jwks.json", text);
        for command in [&["check"][..], &["run", "--config"]] {
            let output = tidegate().args(command).arg(&file).output().expect("it runs");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(1) && said.contains(want) && said.contains("tidegate.toml:"),
                "{said}"
            );
        }
    }
}
