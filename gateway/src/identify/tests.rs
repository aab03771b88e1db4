//! Whose word is taken for what, header by header.

use super::issuer::{Issuer, set};
use super::keys::Keys;
use super::tokens::Algorithm;
use super::*;
use serde_json::json;

fn identity(settings: Settings) -> Identity {
    let tiers = ["anonymous", "standard", "platinum"].map(str::to_owned).to_vec();
    Identity::new(settings, tiers)
}

fn request(lines: &[(&str, &str)]) -> Request {
    Request { fields: crate::http::fields::tests::fields(lines), ..Request::default() }
}

/// Tokens of one issuer, whoever they say that they are of.
fn believing(issuer: &Issuer) -> tokens::Settings {
    tokens::Settings {
        keys: Keys::read(&set(&[issuer]), &[Algorithm::ES256]).expect("a usable set"),
        place: tokens::Place::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: tokens::Settings::LEEWAY,
    }
}

fn trusting() -> Settings {
    Settings {
        trusted_proxies: vec!["10.0.0.0/8".parse().expect("a network")],
        user: Some(Source::Header("x-user-id".into())),
        tier: Some(Source::Header("x-user-tier".into())),
        device: vec![Source::Header("x-device-id".into()), Source::Cookie("device".into())],
        region: vec![Source::Header("x-region".into())],
        ..Settings::default()
    }
}

#[test]
fn strangers_cannot_claim_an_address_a_user_or_a_tier() {
    let mut request = request(&[("X-Forwarded-For", "1.2.3.4"), ("X-User-Id", "bob"), ("x-user-tier", "platinum")]);
    let caller = identity(trusting()).caller(IpAddr::from([203, 0, 113, 9]), &mut request);
    assert_eq!(caller.ip, IpAddr::from([203, 0, 113, 9]));
    assert_eq!((caller.user, caller.tier), (None, 0));
    assert!(request.fields.named(b"x-user-id").next().is_none());
}

#[test]
fn the_rightmost_untrusted_hop_is_the_caller() {
    let chain = "6.6.6.6, 198.51.100.7, 10.1.1.1";
    for lines in
        [[("x-forwarded-for", chain)], [("forwarded", "for=6.6.6.6, for=\"198.51.100.7:80\";proto=http, for=10.1.1.1")]]
    {
        let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
        assert_eq!(caller.ip, IpAddr::from([198, 51, 100, 7]));
    }
    let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&[("x-forwarded-for", "junk")]));
    assert_eq!(caller.ip, IpAddr::from([10, 0, 0, 1]));
}

#[test]
fn trusted_proxies_name_user_and_tier() {
    let lines = [("x-user-id", "bob"), ("x-user-tier", "platinum"), ("x-region", "eu")];
    let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
    assert_eq!((caller.user.is_some(), caller.tier, caller.region.as_str()), (true, 2, "eu"));
    let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines[..1]));
    assert_eq!(caller.tier, 1);
}

#[test]
fn a_device_is_bound_to_its_network() {
    let identity = identity(trusting());
    let device =
        |ip: &str, lines: &[(&str, &str)]| identity.caller(ip.parse().expect("an address"), &mut request(lines)).device;
    assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.9", &[("x-device-id", "b")]));
    assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.8", &[("x-device-id", "a")]));
    assert_eq!(device("2001:db8::1", &[]), device("2001:db8::2", &[]));
    assert_eq!(device("203.0.113.9", &[("cookie", "x=1; device=a")]), device("203.0.113.9", &[("x-device-id", "a")]));
    let long = "x".repeat(64 << 10);
    let [whole, part] = [&long[..], &long[1..]].map(|id| device("203.0.113.9", &[("x-device-id", id)]));
    assert_ne!(whole, part, "all of it counts");
}

#[test]
fn traces_are_kept_or_made() {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let caller = identity(trusting()).caller(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", parent)]));
    assert_eq!(caller.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
    for bad in ["00-00000000000000000000000000000000-b7ad6b7169203331-01", "junk", &parent.to_uppercase()] {
        let caller = identity(trusting()).caller(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", bad)]));
        assert!(!caller.trace.brought && caller.trace.id != 0);
    }
}

#[test]
fn tokens_name_user_tier_and_claims_from_anywhere() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let identity = identity(Settings {
        user: Some(Source::Claim("sub".into())),
        tier: Some(Source::Claim("plan".into())),
        tokens: Some(believing(&issuer)),
        claims: vec!["tenant".into(), "org".into()],
        keys: vec![Source::Claim("tenant".into()), Source::Claim("org".into()), Source::Claim("sub".into())],
        ..trusting()
    });
    let of = |claims: serde_json::Value| {
        let mut request = request(&[("authorization", &format!("Bearer {}", issuer.token(claims)))]);
        let caller = identity.caller(IpAddr::from([203, 0, 113, 9]), &mut request);
        assert!(request.fields.named(b"authorization").next().is_some(), "it goes on to the upstream");
        caller
    };
    let ann = of(json!({ "sub": "ann", "plan": "platinum", "tenant": "t1", "org": 7 }));
    assert_eq!((ann.user.is_some(), ann.tier), (true, 2));
    for (claims, tier) in [(json!({ "sub": "ann" }), 1), (json!({ "sub": "ann", "plan": "unheard-of" }), 1)] {
        let caller = of(claims);
        assert_eq!((caller.user, caller.tier), (ann.user, tier));
    }
    for claims in [json!({ "plan": "platinum" }), json!({ "sub": "", "plan": "platinum" }), json!({ "sub": ["ann"] })] {
        assert_eq!((of(claims.clone()).user, of(claims).tier), (None, 0), "no user, no tier");
    }
    assert_ne!(of(json!({ "sub": "ann", "iss": "other" })).user, ann.user, "another issuer's");
    // Of no other claims anything is kept: `sub` is asked for as a key, and not among the claims.
    let claim = |caller: &Caller, name: &str| {
        caller.keys[["tenant", "org", "sub"].iter().position(|known| *known == name).expect("one of them")]
    };
    let bob = of(json!({ "sub": "bob", "tenant": "t1", "org": "7" }));
    assert!(claim(&ann, "tenant").is_some() && claim(&ann, "tenant") != claim(&ann, "org"));
    assert_eq!((claim(&ann, "tenant"), claim(&ann, "org")), (claim(&bob, "tenant"), claim(&bob, "org")));
    assert_eq!((claim(&ann, "sub"), claim(&of(json!({ "sub": "ann", "org": true })), "org")), (None, None));
    // A header names nobody here, and the same name in a header elsewhere is somebody else.
    let mut headers = request(&[("x-user-id", "ann"), ("x-user-tier", "platinum")]);
    let by_header = identity.caller(IpAddr::from([10, 0, 0, 1]), &mut headers);
    assert_eq!((by_header.user, by_header.tier, claim(&by_header, "tenant")), (None, 0, None));
    let trusted = Identity::new(trusting(), Vec::new()).caller(IpAddr::from([10, 0, 0, 1]), &mut headers);
    assert!(trusted.user.is_some() && trusted.user != ann.user);
}

#[test]
fn whoever_has_spent_his_bad_tokens_waits_unless_he_is_exempt_and_nobody_is_denied() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let here = IpAddr::from([203, 0, 113, 9]);
    let exempt = Entry::Network("203.0.113.0/24".parse().expect("a network"));
    for (exempt, denied, want) in [
        (vec![], vec![], Access::Unknown),
        (vec![exempt.clone()], vec![], Access::Exempt),
        (vec![exempt.clone()], vec![Entry::User("eve".into())], Access::Unknown),
        (vec![], vec![exempt], Access::Denied),
    ] {
        let identity = identity(Settings {
            user: Some(Source::Claim("sub".into())),
            tokens: Some(believing(&issuer)),
            access: AccessSettings { exempt, denied },
            ..Settings::default()
        });
        let access = |token: String| {
            identity.caller(here, &mut request(&[("authorization", &format!("Bearer {token}"))])).access
        };
        // A thread's budget outlives a configuration: what is spent is spent.
        (0..80).for_each(|n| _ = access(forger.token(json!({ "sub": n }))));
        assert_eq!(access(issuer.token(json!({ "sub": "new" }))), want);
        assert_ne!(access(String::new()), Access::Unknown, "without a token there is nothing to look at");
    }
}
