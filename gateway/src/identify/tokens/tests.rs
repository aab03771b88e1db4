//! Which tokens are believed, which are not and why, and what a flood of bad ones costs.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{EncodingKey, Header};
use proptest::prelude::*;
use serde_json::json;

use super::super::Access;
use super::super::issuer::{Issuer, now, set};
use super::*;

const HERE: KeyHash = KeyHash(1);

fn settings(algorithms: &[Algorithm], issuers: &[&Issuer]) -> Settings {
    Settings {
        keys: Keys::read(&set(issuers), algorithms).expect("a usable set"),
        place: Place::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: Settings::LEEWAY,
    }
}

fn tokens(algorithms: &[Algorithm], issuers: &[&Issuer]) -> Tokens {
    Tokens::new(settings(algorithms, issuers))
}

/// The facts of a token: a hash of its `sub`, which is a number here.
fn keep(claims: &Claims) -> Facts {
    Facts {
        user: claims.text("sub").and_then(|sub| Some(KeyHash(sub.parse().ok()?))),
        tier: None,
        listed: Access::Ordinary,
        claims: None,
    }
}

/// The user of a token, or why it is not believed.
fn judge(tokens: &Tokens, token: &str) -> Result<u64, Outcome> {
    judge_at(tokens, token, HERE, Now::read())
}

fn judge_at(tokens: &Tokens, token: &str, address: KeyHash, now: Now) -> Result<u64, Outcome> {
    tokens.judge(token.as_bytes(), address, now, keep).map(|facts| facts.user.map_or(0, |user| user.0))
}

fn part(json: &Value) -> String {
    URL_SAFE_NO_PAD.encode(json.to_string())
}

/// A token with a header of any kind and a signature that is none.
fn unsigned(header: &Value) -> String {
    format!("{}.{}.{}", part(header), part(&json!({ "sub": "1", "exp": now() + 60 })), URL_SAFE_NO_PAD.encode([0; 64]))
}

#[test]
fn algorithms_that_are_not_pinned_are_refused_whatever_the_key() {
    let (ec, rsa) = (Issuer::new(Algorithm::ES256, "ec"), Issuer::new(Algorithm::RS256, "rsa"));
    let believing = tokens(&[Algorithm::ES256, Algorithm::RS256], &[&ec, &rsa]);
    for none in ["none", "None", "NONE", "", "ES256K", "HS1"] {
        let header = json!({ "alg": none, "kid": "ec" });
        assert_eq!(judge(&believing, &unsigned(&header)), Err(Outcome::Algorithm), "{none}");
        let bare = format!("{}.{}.", part(&header), part(&json!({ "sub": "1", "exp": now() + 60 })));
        assert_eq!(judge(&believing, &bare), Err(Outcome::Algorithm), "{none}");
    }
    // What everybody can read, taken for a secret.
    for (issuer, member) in [(&ec, "x"), (&rsa, "n")] {
        let public = issuer.jwk[member].as_str().expect("a member");
        for secret in
            [public.as_bytes(), &URL_SAFE_NO_PAD.decode(public).expect("base64url"), issuer.jwk.to_string().as_bytes()]
        {
            let mut forger = Issuer::with_key(Algorithm::HS256, "", EncodingKey::from_secret(secret));
            forger.header.kid = issuer.header.kid.clone();
            assert_eq!(judge(&believing, &forger.token(json!({ "sub": "1" }))), Err(Outcome::Algorithm));
        }
    }
    // The right key under another algorithm of its type.
    let under = Header { alg: Algorithm::PS256, ..rsa.header.clone() };
    assert_eq!(judge(&believing, &rsa.token_with(&under, json!({ "sub": "1" }))), Err(Outcome::Algorithm));
    let both = tokens(&[Algorithm::RS256, Algorithm::PS256], &[&rsa]);
    assert_eq!(judge(&both, &rsa.token_with(&under, json!({ "sub": "1" }))), Err(Outcome::Key));
    assert_eq!(judge(&both, &rsa.token(json!({ "sub": "1" }))), Ok(1));
}

#[test]
fn keys_are_those_a_token_names_and_a_few_where_it_names_none() {
    let issuers: [Issuer; 6] = std::array::from_fn(|n| Issuer::new(Algorithm::ES256, &format!("k{n}")));
    let believing = tokens(&[Algorithm::ES256], &issuers.each_ref());
    let named = |issuer: &Issuer, id: Option<&str>| {
        let header = Header { kid: id.map(str::to_owned), ..issuer.header.clone() };
        judge(&believing, &issuer.token_with(&header, json!({ "sub": "7" })))
    };
    assert_eq!(named(&issuers[0], Some("k9")), Err(Outcome::Key));
    assert_eq!(named(&issuers[0], Some("k1")), Err(Outcome::Signature), "another one's key");
    assert_eq!((named(&issuers[5], Some("k5")), named(&issuers[3], None)), (Ok(7), Ok(7)));
    assert_eq!(named(&issuers[4], None), Err(Outcome::Signature), "the fifth is not tried");
    // A key in the header is nobody's.
    let stranger = Issuer::new(Algorithm::ES256, "");
    let jwk = serde_json::from_value(stranger.jwk.clone()).expect("a key");
    let header = Header { jwk: Some(jwk), ..stranger.header.clone() };
    assert_eq!(judge(&believing, &stranger.token_with(&header, json!({ "sub": "1" }))), Err(Outcome::Signature));
}

#[test]
fn malformed_tokens_and_critical_headers_are_refused() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let believing = tokens(&[Algorithm::ES256], &[&issuer]);
    let good = issuer.token(json!({ "sub": "1" }));
    let parts: Vec<&str> = good.split('.').collect();
    for bad in [
        "x".to_owned(),
        "..".to_owned(),
        parts[..2].join("."),
        format!("{good}.{}", parts[2]),
        format!("{good}="),
        good.replace('.', ".."),
        format!("{}.{}.{}", part(&json!([])), parts[1], parts[2]),
        format!("{}.{}.{}", part(&json!({ "kid": "a" })), parts[1], parts[2]),
        format!("{}.{}.{}", part(&json!({ "alg": "ES256", "kid": 7 })), parts[1], parts[2]),
        format!("{}.{}.{}", URL_SAFE_NO_PAD.encode("{\"alg\":\"none\",\"alg\":\"ES256\"}"), parts[1], parts[2]),
    ] {
        assert_eq!(judge(&believing, &bad), Err(Outcome::Malformed), "{bad}");
    }
    for crit in [json!([]), json!(["exp"]), json!(null), json!("b64")] {
        let header = json!({ "alg": "ES256", "kid": "a", "crit": crit, "b64": false });
        assert_eq!(judge(&believing, &unsigned(&header)), Err(Outcome::Critical));
    }
    let crit = Header { crit: Some(vec!["exp".to_owned()]), ..issuer.header.clone() };
    assert_eq!(judge(&believing, &issuer.token_with(&crit, json!({ "sub": "1" }))), Err(Outcome::Critical));
    let forged = format!("{}.{}.{}", parts[0], part(&json!({ "sub": "2", "exp": now() + 60 })), parts[2]);
    assert_eq!(judge(&believing, &forged), Err(Outcome::Signature));
    assert_eq!(judge(&believing, &good), Ok(1));
}

#[test]
fn a_token_ends_and_begins_by_the_clock_and_a_leeway() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let believing = tokens(&[Algorithm::ES256], &[&issuer]);
    let at = |wall: u64, token: &str| {
        judge_at(&believing, token, HERE, Now { wall, moment: CLOCK.now() + Duration::from_secs(wall) })
    };
    let token = issuer.token(json!({ "sub": "1", "exp": 1_000 }));
    assert_eq!((at(1_030, &token), at(1_029, &token)), (Err(Outcome::Expired), Err(Outcome::Expired)), "seen as bad");
    assert_eq!(at(900, &issuer.token(json!({ "sub": "2", "exp": 1_000.5 }))), Ok(2));
    let token = issuer.token(json!({ "sub": "3", "exp": 1_000 }));
    assert_eq!((at(1_029, &token), at(1_030, &token)), (Ok(3), Err(Outcome::Expired)), "seen as good");
    let token = issuer.token(json!({ "sub": "4", "exp": 9_000, "nbf": 2_000 }));
    assert_eq!(
        (at(1_969, &token), at(1_970, &token), at(1_980, &token)),
        (Err(Outcome::Early), Err(Outcome::Early), Ok(4))
    );
    for claims in [json!({ "exp": null }), json!({ "exp": "9999999999" }), json!({ "exp": -1 })] {
        assert_eq!(at(5, &issuer.token(claims.clone())), Err(Outcome::Undated), "{claims}");
    }
    let odd = issuer.token(json!({ "sub": "1", "exp": 9_000, "nbf": "soon" }));
    assert_eq!(at(5, &odd), Err(Outcome::Malformed));
}

#[test]
fn issuer_and_audience_are_asked_for_where_they_are_configured() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let strict = Tokens::new(Settings {
        issuer: Some("https://id.test".to_owned()),
        audience: vec!["shop".to_owned(), "stall".to_owned()],
        ..settings(&[Algorithm::ES256], &[&issuer])
    });
    let of = |claims: Value| judge(&strict, &issuer.token(claims));
    let (right, wrong) = ("https://id.test", "https://id.test/");
    assert_eq!(of(json!({ "sub": "1", "iss": right, "aud": "shop" })), Ok(1));
    assert_eq!(of(json!({ "sub": "1", "iss": right, "aud": ["bank", "stall"] })), Ok(1));
    for claims in [json!({ "aud": "shop" }), json!({ "iss": wrong, "aud": "shop" }), json!({ "iss": 1, "aud": "shop" })]
    {
        assert_eq!(of(claims.clone()), Err(Outcome::Issuer), "{claims}");
    }
    for aud in [json!(null), json!("bank"), json!([]), json!(["bank"]), json!({ "shop": 1 })] {
        assert_eq!(of(json!({ "iss": right, "aud": aud })), Err(Outcome::Audience), "{aud}");
    }
    let open = tokens(&[Algorithm::ES256], &[&issuer]);
    assert_eq!(judge(&open, &issuer.token(json!({ "sub": "1", "iss": wrong, "aud": "bank" }))), Ok(1));
}

#[test]
fn a_token_is_one_line_of_its_place() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let carried = |place: Place, lines: &[(&str, &str)]| {
        let tokens = Tokens::new(Settings { place, ..settings(&[Algorithm::ES256], &[&issuer]) });
        let mut fields = Fields::default();
        lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
        tokens.carried(&fields).map(|token| token.map(|token| String::from_utf8_lossy(token).into_owned()))
    };
    let some = |token: &str| Ok(Some(token.to_owned()));
    // What is left of several.
    let passed_on = |place: Place, lines: &[(&str, &str)]| {
        let tokens = Tokens::new(Settings { place, ..settings(&[Algorithm::ES256], &[&issuer]) });
        let mut fields = Fields::default();
        lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        tokens.are_several(&fields).then(|| {
            tokens.drop_all(&mut fields);
            fields.iter().map(|field| format!("{}: {}", text(field.name), text(field.value))).collect::<Vec<_>>()
        })
    };
    for (value, token) in [("Bearer a.b", "a.b"), ("bEARER   a.b", "a.b")] {
        assert_eq!(carried(Place::Bearer, &[("Authorization", value)]), some(token));
    }
    for value in ["Basic YTpi", "Bearer", "Bearera.b", "", "Bearer "] {
        assert_eq!(carried(Place::Bearer, &[("authorization", value)]), Ok(None), "{value}");
    }
    let twice = [("authorization", "Bearer a"), ("Authorization", "Bearer b")];
    assert_eq!(passed_on(Place::Bearer, &twice), Some(vec![]));
    let header = || Place::Header("x-token".to_owned());
    assert_eq!(
        (carried(header(), &[("X-Token", "a")]), carried(header(), &[("x-token", "Bearer a")])),
        (some("a"), some("a"))
    );
    assert_eq!(passed_on(header(), &[("x-token", "a"), ("x-token", "a"), ("x", "y")]), Some(vec!["x: y".to_owned()]));
    let cookie = || Place::Cookie("Session".to_owned());
    assert_eq!(carried(cookie(), &[("cookie", "a=b; Session=a.b.c")]), some("a.b.c"));
    let pairs = [("cookie", "a=b; Session=a.b.c"), ("cookie", "Session=; Sessions=d;c=e")];
    assert_eq!(passed_on(cookie(), &pairs), Some(vec!["cookie: a=b; Sessions=d; c=e".to_owned()]));
    assert_eq!(passed_on(cookie(), &[("cookie", "Session=a; session=b")]), None);
    assert_eq!(carried(cookie(), &[("authorization", "Bearer a"), ("cookie", "session=a")]), Ok(None));
    let (most, more) = ("x".repeat(8_192), format!("Bearer {}", "x".repeat(8_193)));
    assert_eq!(carried(header(), &[("x-token", &most)]), some(&most));
    assert_eq!(carried(Place::Bearer, &[("authorization", &more)]), Err(Outcome::Oversize));
}

#[test]
fn every_algorithm_is_verified_with_its_own_kind_of_key() {
    use Algorithm::*;
    for algorithm in [RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA, HS256, HS384, HS512] {
        let (issuer, other) = (Issuer::new(algorithm, "a"), Issuer::new(algorithm, "a"));
        let believing = tokens(&[algorithm], &[&issuer]);
        assert_eq!(judge(&believing, &issuer.token(json!({ "sub": 42 }))), Ok(42), "{algorithm:?}");
        assert_eq!(judge(&believing, &other.token(json!({ "sub": 42 }))), Err(Outcome::Signature), "{algorithm:?}");
    }
}

#[test]
fn a_token_is_verified_once_until_the_configuration_changes() {
    let (old, new) = (Issuer::new(Algorithm::ES256, "old"), Issuer::new(Algorithm::ES256, "new"));
    let (before, after) = (tokens(&[Algorithm::ES256], &[&old]), tokens(&[Algorithm::ES256], &[&new]));
    let token = old.token(json!({ "sub": "1" }));
    let verified = |tokens: &Tokens| {
        let mut count = 0;
        let outcome = tokens.judge(token.as_bytes(), HERE, Now::read(), |claims| {
            count += 1;
            keep(claims)
        });
        (count, outcome.map(|facts| facts.user))
    };
    assert_eq!(verified(&before), (1, Ok(Some(KeyHash(1)))));
    assert_eq!(verified(&before), (0, Ok(Some(KeyHash(1)))));
    assert_eq!(verified(&after), (0, Err(Outcome::Key)));
    assert_eq!(verified(&before).0, 1, "what was seen is forgotten");
}

#[test]
fn bad_signatures_are_few_per_address_and_the_same_one_costs_nothing() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let believing = tokens(&[Algorithm::ES256], &[&issuer]);
    let now = Now::read();
    let at = |seconds: u64| Now { moment: now.moment + Duration::from_secs(seconds), ..now };
    let known = issuer.token(json!({ "sub": "1" }));
    assert_eq!(judge_at(&believing, &known, HERE, at(0)), Ok(1));
    let same = forger.token(json!({ "sub": "same" }));
    assert!((0..500).all(|_| judge_at(&believing, &same, HERE, at(0)) == Err(Outcome::Signature)));
    let flood = |address: u64, seconds: u64| {
        let forged = (0..60).map(|n| forger.token(json!({ "sub": n, "from": address, "at": seconds })));
        let outcomes: Vec<_> =
            forged.map(|token| judge_at(&believing, &token, KeyHash(address), at(seconds))).collect();
        outcomes.iter().filter(|outcome| **outcome == Err(Outcome::Signature)).count()
    };
    assert_eq!((flood(1, 0), flood(2, 0), flood(1, 0)), (49, 50, 0), "one is charged to the same one");
    assert_eq!(judge_at(&believing, &known, HERE, at(0)), Ok(1), "known all the same");
    let new = issuer.token(json!({ "sub": "2" }));
    assert_eq!(judge_at(&believing, &new, HERE, at(0)), Err(Outcome::Unchecked));
    assert_eq!(judge_at(&believing, &new, KeyHash(3), at(0)), Ok(2), "elsewhere");
    assert_eq!(flood(1, 1), 10);
    // Good tokens are never counted against anybody.
    let many = (0..200).map(|n| judge_at(&believing, &issuer.token(json!({ "sub": n })), KeyHash(4), at(1)));
    assert_eq!(many.filter(Result::is_ok).count(), 200);
}

proptest! {
    #[test]
    fn any_bytes_are_judged(head in "\\PC{0,40}", middle in "\\PC{0,40}", dots in 0..4usize) {
        thread_local!(static BELIEVING: Tokens = tokens(&[Algorithm::EdDSA], &[&Issuer::new(Algorithm::EdDSA, "")]));
        let encoded = URL_SAFE_NO_PAD.encode(&head);
        for token in [format!("{head}{}{middle}", ".".repeat(dots)), format!("{encoded}.{middle}.{encoded}")] {
            prop_assert!(BELIEVING.with(|tokens| judge(tokens, &token)).is_err());
        }
    }
}
