//! Verification of tokens, reasons for rejection, and the cost of a flood of invalid tokens.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{EncodingKey, Header};
use proptest::prelude::*;
use serde_json::json;

use super::super::AccessDecision;
use super::super::issuer::{Issuer, now, set};
use super::*;

const ADDRESS: KeyHash = KeyHash(1);

fn config(algorithms: &[Algorithm], issuers: &[&Issuer]) -> TokenConfig {
    TokenConfig {
        keys: TokenKeys::Fixed(JwkSet::parse(&set(issuers), algorithms).expect("a usable set")),
        location: TokenLocation::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: TokenConfig::LEEWAY,
    }
}

fn verifier_for(algorithms: &[Algorithm], issuers: &[&Issuer]) -> TokenVerifier {
    TokenVerifier::new(config(algorithms, issuers), "", None)
}

/// Extracts the user from `sub`, which is a number in these tests.
fn extract(claims: &VerifiedClaims) -> VerifiedIdentity {
    VerifiedIdentity {
        user: claims.text("sub").and_then(|sub| Some(KeyHash(sub.parse().ok()?))),
        user_name: None,
        user_class: None,
        access: AccessDecision::Unlisted,
        claims: None,
    }
}

/// The user of a token, or the reason for its rejection.
fn verify(tokens: &TokenVerifier, token: &str) -> Result<u128, TokenOutcome> {
    verify_at(tokens, token, ADDRESS, VerificationTime::read())
}

fn verify_at(
    tokens: &TokenVerifier,
    token: &str,
    address: KeyHash,
    now: VerificationTime,
) -> Result<u128, TokenOutcome> {
    tokens
        .lookup_or_verify(PresentedToken { text: token.as_bytes(), address, now }, extract)
        .map(|identity| identity.user.map_or(0, |user| user.0))
}

fn part(json: &Value) -> String {
    URL_SAFE_NO_PAD.encode(json.to_string())
}

/// A token with the given header and an all-zero signature.
fn unsigned(header: &Value) -> String {
    format!("{}.{}.{}", part(header), part(&json!({ "sub": "1", "exp": now() + 60 })), URL_SAFE_NO_PAD.encode([0; 64]))
}

#[test]
fn unpinned_algorithms_are_rejected_with_any_key() {
    let (ec, rsa) = (Issuer::new(Algorithm::ES256, "ec"), Issuer::new(Algorithm::RS256, "rsa"));
    let verifier = verifier_for(&[Algorithm::ES256, Algorithm::RS256], &[&ec, &rsa]);
    for none in ["none", "None", "NONE", "", "ES256K", "HS1"] {
        let header = json!({ "alg": none, "kid": "ec" });
        assert_eq!(verify(&verifier, &unsigned(&header)), Err(TokenOutcome::Algorithm), "{none}");
        let bare = format!("{}.{}.", part(&header), part(&json!({ "sub": "1", "exp": now() + 60 })));
        assert_eq!(verify(&verifier, &bare), Err(TokenOutcome::Algorithm), "{none}");
    }
    // Public key material used as an HMAC secret.
    for (issuer, member) in [(&ec, "x"), (&rsa, "n")] {
        let public = issuer.jwk[member].as_str().expect("a member");
        for secret in
            [public.as_bytes(), &URL_SAFE_NO_PAD.decode(public).expect("base64url"), issuer.jwk.to_string().as_bytes()]
        {
            let mut forger = Issuer::with_key(Algorithm::HS256, "", EncodingKey::from_secret(secret));
            forger.header.kid = issuer.header.kid.clone();
            assert_eq!(verify(&verifier, &forger.token(json!({ "sub": "1" }))), Err(TokenOutcome::Algorithm));
        }
    }
    // The right key under another algorithm of its type.
    let under = Header { alg: Algorithm::PS256, ..rsa.header.clone() };
    assert_eq!(verify(&verifier, &rsa.token_with(&under, json!({ "sub": "1" }))), Err(TokenOutcome::Algorithm));
    let both = verifier_for(&[Algorithm::RS256, Algorithm::PS256], &[&rsa]);
    assert_eq!(verify(&both, &rsa.token_with(&under, json!({ "sub": "1" }))), Err(TokenOutcome::Key));
    assert_eq!(verify(&both, &rsa.token(json!({ "sub": "1" }))), Ok(1));
}

#[test]
fn candidate_keys_follow_key_id_or_are_bounded() {
    let issuers: [Issuer; 6] = std::array::from_fn(|n| Issuer::new(Algorithm::ES256, &format!("k{n}")));
    let verifier = verifier_for(&[Algorithm::ES256], &issuers.each_ref());
    let named = |issuer: &Issuer, id: Option<&str>| {
        let header = Header { kid: id.map(str::to_owned), ..issuer.header.clone() };
        verify(&verifier, &issuer.token_with(&header, json!({ "sub": "7" })))
    };
    assert_eq!(named(&issuers[0], Some("k9")), Err(TokenOutcome::Key));
    assert_eq!(named(&issuers[0], Some("k1")), Err(TokenOutcome::Signature), "the key of another issuer");
    assert_eq!((named(&issuers[5], Some("k5")), named(&issuers[3], None)), (Ok(7), Ok(7)));
    assert_eq!(named(&issuers[4], None), Err(TokenOutcome::Signature), "the fifth is not tried");
    // A key in the token header is ignored.
    let unknown_issuer = Issuer::new(Algorithm::ES256, "");
    let jwk = serde_json::from_value(unknown_issuer.jwk.clone()).expect("a key");
    let header = Header { jwk: Some(jwk), ..unknown_issuer.header.clone() };
    assert_eq!(
        verify(&verifier, &unknown_issuer.token_with(&header, json!({ "sub": "1" }))),
        Err(TokenOutcome::Signature)
    );
}

#[test]
fn malformed_tokens_and_critical_headers_are_rejected() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let verifier = verifier_for(&[Algorithm::ES256], &[&issuer]);
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
        assert_eq!(verify(&verifier, &bad), Err(TokenOutcome::Malformed), "{bad}");
    }
    for crit in [json!([]), json!(["exp"]), json!(null), json!("b64")] {
        let header = json!({ "alg": "ES256", "kid": "a", "crit": crit, "b64": false });
        assert_eq!(verify(&verifier, &unsigned(&header)), Err(TokenOutcome::UnsupportedCritical));
    }
    let crit = Header { crit: Some(vec!["exp".to_owned()]), ..issuer.header.clone() };
    assert_eq!(
        verify(&verifier, &issuer.token_with(&crit, json!({ "sub": "1" }))),
        Err(TokenOutcome::UnsupportedCritical)
    );
    let forged = format!("{}.{}.{}", parts[0], part(&json!({ "sub": "2", "exp": now() + 60 })), parts[2]);
    assert_eq!(verify(&verifier, &forged), Err(TokenOutcome::Signature));
    assert_eq!(verify(&verifier, &good), Ok(1));
}

#[test]
fn validity_period_is_checked_with_leeway() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let verifier = verifier_for(&[Algorithm::ES256], &[&issuer]);
    let at = |unix_seconds: u64, token: &str| {
        verify_at(
            &verifier,
            token,
            ADDRESS,
            VerificationTime { unix_seconds, monotonic: CLOCK.now() + Duration::from_secs(unix_seconds) },
        )
    };
    let token = issuer.token(json!({ "sub": "1", "exp": 1_000 }));
    assert_eq!(
        (at(1_030, &token), at(1_029, &token)),
        (Err(TokenOutcome::Expired), Err(TokenOutcome::Expired)),
        "the rejection is cached"
    );
    assert_eq!(at(900, &issuer.token(json!({ "sub": "2", "exp": 1_000.5 }))), Ok(2));
    let token = issuer.token(json!({ "sub": "3", "exp": 1_000 }));
    assert_eq!((at(1_029, &token), at(1_030, &token)), (Ok(3), Err(TokenOutcome::Expired)), "the cached token expires");
    let token = issuer.token(json!({ "sub": "4", "exp": 9_000, "nbf": 2_000 }));
    assert_eq!(
        (at(1_969, &token), at(1_970, &token), at(1_980, &token)),
        (Err(TokenOutcome::NotYetValid), Err(TokenOutcome::NotYetValid), Ok(4))
    );
    for claims in [json!({ "exp": null }), json!({ "exp": "9999999999" }), json!({ "exp": -1 })] {
        assert_eq!(at(5, &issuer.token(claims.clone())), Err(TokenOutcome::MissingExpiry), "{claims}");
    }
    let odd = issuer.token(json!({ "sub": "1", "exp": 9_000, "nbf": "soon" }));
    assert_eq!(at(5, &odd), Err(TokenOutcome::Malformed));
}

#[test]
fn configured_issuer_and_audience_are_required() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let strict = TokenConfig {
        issuer: Some("https://id.test".to_owned()),
        audience: vec!["shop".to_owned(), "stall".to_owned()],
        ..config(&[Algorithm::ES256], &[&issuer])
    };
    let strict = TokenVerifier::new(strict, "", None);
    let of = |claims: Value| verify(&strict, &issuer.token(claims));
    let (right, wrong) = ("https://id.test", "https://id.test/");
    assert_eq!(of(json!({ "sub": "1", "iss": right, "aud": "shop" })), Ok(1));
    assert_eq!(of(json!({ "sub": "1", "iss": right, "aud": ["bank", "stall"] })), Ok(1));
    for claims in [json!({ "aud": "shop" }), json!({ "iss": wrong, "aud": "shop" }), json!({ "iss": 1, "aud": "shop" })]
    {
        assert_eq!(of(claims.clone()), Err(TokenOutcome::Issuer), "{claims}");
    }
    for aud in [json!(null), json!("bank"), json!([]), json!(["bank"]), json!({ "shop": 1 })] {
        assert_eq!(of(json!({ "iss": right, "aud": aud })), Err(TokenOutcome::Audience), "{aud}");
    }
    let open = verifier_for(&[Algorithm::ES256], &[&issuer]);
    assert_eq!(verify(&open, &issuer.token(json!({ "sub": "1", "iss": wrong, "aud": "bank" }))), Ok(1));
}

#[test]
fn only_a_single_token_is_extracted() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let extracted = |location: TokenLocation, lines: &[(&str, &str)]| {
        let tokens = TokenVerifier::new(TokenConfig { location, ..config(&[Algorithm::ES256], &[&issuer]) }, "", None);
        let mut fields = Fields::default();
        lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
        tokens.extract_token(&fields).map(|token| token.map(|token| String::from_utf8_lossy(token).into_owned()))
    };
    let some = |token: &str| Ok(Some(token.to_owned()));
    // The fields that remain after multiple tokens are removed.
    let remaining = |location: TokenLocation, lines: &[(&str, &str)]| {
        let tokens = TokenVerifier::new(TokenConfig { location, ..config(&[Algorithm::ES256], &[&issuer]) }, "", None);
        let mut fields = Fields::default();
        lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        tokens.has_multiple_tokens(&fields).then(|| {
            tokens.remove_tokens(&mut fields);
            fields.iter().map(|field| format!("{}: {}", text(field.name), text(field.value))).collect::<Vec<_>>()
        })
    };
    for (value, token) in [("Bearer a.b", "a.b"), ("bEARER   a.b", "a.b")] {
        assert_eq!(extracted(TokenLocation::Bearer, &[("Authorization", value)]), some(token));
    }
    for value in ["Basic YTpi", "Bearer", "Bearera.b", "", "Bearer "] {
        assert_eq!(extracted(TokenLocation::Bearer, &[("authorization", value)]), Ok(None), "{value}");
    }
    let twice = [("authorization", "Bearer a"), ("Authorization", "Bearer b")];
    assert_eq!(remaining(TokenLocation::Bearer, &twice), Some(vec![]));
    let header = || TokenLocation::Header("x-token".to_owned());
    assert_eq!(
        (extracted(header(), &[("X-Token", "a")]), extracted(header(), &[("x-token", "Bearer a")])),
        (some("a"), some("a"))
    );
    assert_eq!(remaining(header(), &[("x-token", "a"), ("x-token", "a"), ("x", "y")]), Some(vec!["x: y".to_owned()]));
    let cookie = || TokenLocation::Cookie("Session".to_owned());
    assert_eq!(extracted(cookie(), &[("cookie", "a=b; Session=a.b.c")]), some("a.b.c"));
    let pairs = [("cookie", "a=b; Session=a.b.c"), ("cookie", "Session=; Sessions=d;c=e")];
    assert_eq!(remaining(cookie(), &pairs), Some(vec!["cookie: a=b; Sessions=d; c=e".to_owned()]));
    assert_eq!(remaining(cookie(), &[("cookie", "Session=a; session=b")]), None);
    assert_eq!(extracted(cookie(), &[("authorization", "Bearer a"), ("cookie", "session=a")]), Ok(None));
    let (most, more) = ("x".repeat(8_192), format!("Bearer {}", "x".repeat(8_193)));
    assert_eq!(extracted(header(), &[("x-token", &most)]), some(&most));
    assert_eq!(extracted(TokenLocation::Bearer, &[("authorization", &more)]), Err(TokenOutcome::Oversize));
}

#[test]
fn every_algorithm_verifies_with_its_key_type() {
    use Algorithm::*;
    for algorithm in [RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA, HS256, HS384, HS512] {
        let (issuer, other) = (Issuer::new(algorithm, "a"), Issuer::new(algorithm, "a"));
        let verifier = verifier_for(&[algorithm], &[&issuer]);
        assert_eq!(verify(&verifier, &issuer.token(json!({ "sub": 42 }))), Ok(42), "{algorithm:?}");
        assert_eq!(
            verify(&verifier, &other.token(json!({ "sub": 42 }))),
            Err(TokenOutcome::Signature),
            "{algorithm:?}"
        );
    }
}

#[test]
fn token_is_verified_once_per_configuration() {
    let (old, new) = (Issuer::new(Algorithm::ES256, "old"), Issuer::new(Algorithm::ES256, "new"));
    let (before, after) = (verifier_for(&[Algorithm::ES256], &[&old]), verifier_for(&[Algorithm::ES256], &[&new]));
    let token = old.token(json!({ "sub": "1" }));
    let verified = |tokens: &TokenVerifier| {
        let mut count = 0;
        let presented = PresentedToken { text: token.as_bytes(), address: ADDRESS, now: VerificationTime::read() };
        let outcome = tokens.lookup_or_verify(presented, |claims| {
            count += 1;
            extract(claims)
        });
        (count, outcome.map(|identity| identity.user))
    };
    assert_eq!(verified(&before), (1, Ok(Some(KeyHash(1)))));
    assert_eq!(verified(&before), (0, Ok(Some(KeyHash(1)))));
    assert_eq!(verified(&after), (0, Err(TokenOutcome::Key)));
    assert_eq!(verified(&before), (0, Ok(Some(KeyHash(1)))), "kept while its key is in the set of its rules");
    // Another leeway, audience or issuer, or another claim that is read, are other rules.
    let strict = TokenConfig { leeway: Duration::ZERO, ..config(&[Algorithm::ES256], &[&old]) };
    assert_eq!(verified(&TokenVerifier::new(strict, "", None)).0, 1);
    let same_rules = verifier_for(&[Algorithm::ES256], &[&new, &old]);
    assert_eq!(verified(&same_rules).0, 1, "the results of other rules are gone");
    assert_eq!(verified(&before).0, 0, "a key was removed, but not its own");
    let read_otherwise = TokenVerifier::new(config(&[Algorithm::ES256], &[&old]), "another claim", None);
    assert_eq!((verified(&read_otherwise).0, verified(&read_otherwise).0), (1, 0));
}

/// A key that is published again under the same id with another value verifies no cached token.
#[test]
fn replaced_key_of_the_same_id_rejects_cached_tokens() {
    let (old, new) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let token = old.token(json!({ "sub": "1" }));
    assert_eq!(verify(&verifier_for(&[Algorithm::ES256], &[&old]), &token), Ok(1));
    assert_eq!(verify(&verifier_for(&[Algorithm::ES256], &[&new]), &token), Err(TokenOutcome::Signature));
    assert_eq!(verify(&verifier_for(&[Algorithm::ES256], &[&old]), &token), Ok(1), "its rejection is forgotten");
}

#[test]
fn claims_are_found_by_their_path() {
    let claims = json!({
        "sub": "ann",
        "https://id.test/claims": { "plan": "gold", "org.id": 7 },
        "realm_access": { "user": "bob", "roles": ["a", "b", 1, null], "deep": { "er": { "est": "cid" } } },
        "a.b": "dotted",
        "a": { "b": "nested", "c": "other" },
        "x.y": "text",
        "x": { "y": { "z": "found" } },
        "": { "": "empty" },
    });
    let Value::Object(claims) = claims else { panic!("an object") };
    let verified = VerifiedClaims { claims, expires_at: 0 };
    for (path, want) in [
        ("sub", Some("ann")),
        ("realm_access.user", Some("bob")),
        ("realm_access.deep.er.est", Some("cid")),
        ("https://id.test/claims.plan", Some("gold")),
        ("https://id.test/claims.org.id", Some("7")),
        ("a.b", Some("dotted")),
        ("a.c", Some("other")),
        ("x.y", Some("text")),
        // The claim with the longer name is no object: the shorter name is tried.
        ("x.y.z", Some("found")),
        ("realm_access", None),
        ("realm_access.roles", None),
        ("realm_access.", None),
        (".user", None),
        ("sub.x", None),
        ("realm_access.user.x", None),
        ("no.such.claim", None),
        (".", Some("empty")),
    ] {
        assert_eq!(verified.text(path).as_deref(), want, "{path}");
    }
    let texts = |path: &str| verified.texts(path).map(Cow::into_owned).collect::<Vec<_>>();
    assert_eq!(texts("realm_access.roles"), ["a", "b", "1"]);
    assert_eq!((texts("sub"), texts("nothing")), (vec!["ann".to_owned()], vec![]));
    // Long paths of many dots and deep objects are found without much work.
    assert_eq!(verified.text(&".".repeat(10_000)), None);
}

#[test]
fn invalid_signatures_are_limited_per_address_and_cached_ones_are_free() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let verifier = verifier_for(&[Algorithm::ES256], &[&issuer]);
    let now = VerificationTime::read();
    let at = |seconds: u64| VerificationTime { monotonic: now.monotonic + Duration::from_secs(seconds), ..now };
    let known = issuer.token(json!({ "sub": "1" }));
    assert_eq!(verify_at(&verifier, &known, ADDRESS, at(0)), Ok(1));
    let same = forger.token(json!({ "sub": "same" }));
    assert!((0..500).all(|_| verify_at(&verifier, &same, ADDRESS, at(0)) == Err(TokenOutcome::Signature)));
    let flood = |address: u128, seconds: u64| {
        let forged = (0..60).map(|n| forger.token(json!({ "sub": n, "from": address, "at": seconds })));
        let outcomes: Vec<_> =
            forged.map(|token| verify_at(&verifier, &token, KeyHash(address), at(seconds))).collect();
        outcomes.iter().filter(|outcome| **outcome == Err(TokenOutcome::Signature)).count()
    };
    assert_eq!((flood(1, 0), flood(2, 0), flood(1, 0)), (49, 50, 0), "the repeated token was charged once");
    assert_eq!(verify_at(&verifier, &known, ADDRESS, at(0)), Ok(1), "the cached token is still accepted");
    let new = issuer.token(json!({ "sub": "2" }));
    assert_eq!(verify_at(&verifier, &new, ADDRESS, at(0)), Err(TokenOutcome::ClientThrottled));
    assert_eq!(verify_at(&verifier, &new, KeyHash(3), at(0)), Ok(2), "another address");
    assert_eq!(flood(1, 1), 10);
    // Valid tokens are never charged.
    let many = (0..200).map(|n| verify_at(&verifier, &issuer.token(json!({ "sub": n })), KeyHash(4), at(1)));
    assert_eq!(many.filter(Result::is_ok).count(), 200);
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_rejected(head in "\\PC{0,40}", middle in "\\PC{0,40}", dots in 0..4usize) {
        thread_local!(static VERIFIER: TokenVerifier = verifier_for(&[Algorithm::EdDSA], &[&Issuer::new(Algorithm::EdDSA, "")]));
        let encoded = URL_SAFE_NO_PAD.encode(&head);
        for token in [format!("{head}{}{middle}", ".".repeat(dots)), format!("{encoded}.{middle}.{encoded}")] {
            prop_assert!(VERIFIER.with(|tokens| verify(tokens, &token)).is_err());
        }
    }
}
