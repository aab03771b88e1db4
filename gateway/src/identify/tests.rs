//! Identification of callers from headers and tokens.

use super::issuer::{Issuer, set};
use super::jwk_set::JwkSet;
use super::tokens::Algorithm;
use super::*;
use serde_json::json;

fn identity(config: IdentityConfig) -> CallerIdentifier {
    let tiers = ["anonymous", "standard", "platinum"].map(str::to_owned).to_vec();
    CallerIdentifier::new(config, tiers)
}

fn request(lines: &[(&str, &str)]) -> Request {
    Request { fields: crate::http::fields::tests::fields(lines), ..Request::default() }
}

/// Accepts tokens signed by `issuer`, whatever their `iss` claim.
fn accepting(issuer: &Issuer) -> tokens::TokenConfig {
    tokens::TokenConfig {
        keys: tokens::TokenKeys::Fixed(JwkSet::parse(&set(&[issuer]), &[Algorithm::ES256]).expect("a usable set")),
        location: tokens::TokenLocation::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: tokens::TokenConfig::LEEWAY,
    }
}

fn trusted_config() -> IdentityConfig {
    IdentityConfig {
        trusted_proxies: vec!["10.0.0.0/8".parse().expect("a network")],
        user: Some(IdentitySource::Header("x-user-id".into())),
        user_class: Some(IdentitySource::Header("x-user-tier".into())),
        device: vec![IdentitySource::Header("x-device-id".into()), IdentitySource::Cookie("device".into())],
        region: vec![IdentitySource::Header("x-region".into())],
        regions: vec!["default".parse().expect("a region"), "eu".parse().expect("a region")],
        ..IdentityConfig::default()
    }
}

#[test]
fn untrusted_peers_cannot_claim_address_user_or_class() {
    let mut request = request(&[("X-Forwarded-For", "1.2.3.4"), ("X-User-Id", "bob"), ("x-user-tier", "platinum")]);
    let caller = identity(trusted_config()).identify(IpAddr::from([203, 0, 113, 9]), &mut request);
    assert_eq!(caller.ip, IpAddr::from([203, 0, 113, 9]));
    assert_eq!((caller.user, caller.user_class), (None, 0));
    assert!(request.fields.named(b"x-user-id").next().is_none());
}

#[test]
fn the_rightmost_untrusted_hop_is_the_caller() {
    let chain = "6.6.6.6, 198.51.100.7, 10.1.1.1";
    for lines in
        [[("x-forwarded-for", chain)], [("forwarded", "for=6.6.6.6, for=\"198.51.100.7:80\";proto=http, for=10.1.1.1")]]
    {
        let caller = identity(trusted_config()).identify(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
        assert_eq!(caller.ip, IpAddr::from([198, 51, 100, 7]));
    }
    let caller =
        identity(trusted_config()).identify(IpAddr::from([10, 0, 0, 1]), &mut request(&[("x-forwarded-for", "junk")]));
    assert_eq!(caller.ip, IpAddr::from([10, 0, 0, 1]));
}

#[test]
fn trusted_proxies_set_user_and_class() {
    let lines = [("x-user-id", "bob"), ("x-user-tier", "platinum"), ("x-region", "eu")];
    let caller = identity(trusted_config()).identify(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
    assert_eq!((caller.user.is_some(), caller.user_class, caller.region.as_str()), (true, 2, "eu"));
    let caller = identity(trusted_config()).identify(IpAddr::from([10, 0, 0, 1]), &mut request(&lines[..1]));
    assert_eq!(caller.user_class, 1);
}

#[test]
fn device_is_bound_to_network() {
    let identity = identity(trusted_config());
    let device = |ip: &str, lines: &[(&str, &str)]| {
        identity.identify(ip.parse().expect("an address"), &mut request(lines)).device
    };
    assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.9", &[("x-device-id", "b")]));
    assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.8", &[("x-device-id", "a")]));
    assert_eq!(device("2001:db8::1", &[]), device("2001:db8::2", &[]));
    assert_eq!(device("203.0.113.9", &[("cookie", "x=1; device=a")]), device("203.0.113.9", &[("x-device-id", "a")]));
    let long = "x".repeat(64 << 10);
    let [whole, part] = [&long[..], &long[1..]].map(|id| device("203.0.113.9", &[("x-device-id", id)]));
    assert_ne!(whole, part, "the whole id is hashed");
}

#[test]
fn traces_are_propagated_or_generated() {
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let caller =
        identity(trusted_config()).identify(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", parent)]));
    assert_eq!(caller.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
    for bad in ["00-00000000000000000000000000000000-b7ad6b7169203331-01", "junk", &parent.to_uppercase()] {
        let caller =
            identity(trusted_config()).identify(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", bad)]));
        assert!(caller.trace.source == TraceSource::New && caller.trace.id != 0);
    }
}

#[test]
fn tokens_set_user_class_and_claims_for_any_peer() {
    let issuer = Issuer::new(Algorithm::ES256, "a");
    let identity = identity(IdentityConfig {
        user: Some(IdentitySource::Claim("sub".into())),
        user_class: Some(IdentitySource::Claim("plan".into())),
        tokens: Some(accepting(&issuer)),
        claims: vec!["tenant".into(), "org".into()],
        keys: vec![
            IdentitySource::Claim("tenant".into()),
            IdentitySource::Claim("org".into()),
            IdentitySource::Claim("sub".into()),
        ],
        ..trusted_config()
    });
    let of = |claims: serde_json::Value| {
        let mut request = request(&[("authorization", &format!("Bearer {}", issuer.token(claims)))]);
        let caller = identity.identify(IpAddr::from([203, 0, 113, 9]), &mut request);
        assert!(request.fields.named(b"authorization").next().is_some(), "the token is forwarded to the upstream");
        caller
    };
    let ann = of(json!({ "sub": "ann", "plan": "platinum", "tenant": "t1", "org": 7 }));
    assert_eq!((ann.user.is_some(), ann.user_class), (true, 2));
    for (claims, tier) in [(json!({ "sub": "ann" }), 1), (json!({ "sub": "ann", "plan": "unheard-of" }), 1)] {
        let caller = of(claims);
        assert_eq!((caller.user, caller.user_class), (ann.user, tier));
    }
    for claims in [json!({ "plan": "platinum" }), json!({ "sub": "", "plan": "platinum" }), json!({ "sub": ["ann"] })] {
        assert_eq!(
            (of(claims.clone()).user, of(claims).user_class),
            (None, 0),
            "without a user, the class is anonymous"
        );
    }
    assert_ne!(of(json!({ "sub": "ann", "iss": "other" })).user, ann.user, "the subject of another issuer");
    // Only configured claims are kept: `sub` is a key here, but not among the claims.
    let claim = |caller: &Caller, name: &str| {
        caller.keys[["tenant", "org", "sub"].iter().position(|known| *known == name).expect("one of them")]
    };
    let bob = of(json!({ "sub": "bob", "tenant": "t1", "org": "7" }));
    assert!(claim(&ann, "tenant").is_some() && claim(&ann, "tenant") != claim(&ann, "org"));
    assert_eq!((claim(&ann, "tenant"), claim(&ann, "org")), (claim(&bob, "tenant"), claim(&bob, "org")));
    assert_eq!((claim(&ann, "sub"), claim(&of(json!({ "sub": "ann", "org": true })), "org")), (None, None));
    // A header does not set the user here. The same name in a header of another configuration is
    // another user.
    let mut headers = request(&[("x-user-id", "ann"), ("x-user-tier", "platinum")]);
    let by_header = identity.identify(IpAddr::from([10, 0, 0, 1]), &mut headers);
    assert_eq!((by_header.user, by_header.user_class, claim(&by_header, "tenant")), (None, 0, None));
    let trusted =
        CallerIdentifier::new(trusted_config(), Vec::new()).identify(IpAddr::from([10, 0, 0, 1]), &mut headers);
    assert!(trusted.user.is_some() && trusted.user != ann.user);
}

#[test]
fn exhausted_token_budget_rejects_unless_exempt_and_no_user_is_denied() {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let here = IpAddr::from([203, 0, 113, 9]);
    let exempt = AccessEntry::Network("203.0.113.0/24".parse().expect("a network"));
    for (exempt, denied, want) in [
        (vec![], vec![], AccessDecision::Unverified),
        (vec![exempt.clone()], vec![], AccessDecision::Exempt),
        (vec![exempt.clone()], vec![AccessEntry::User("eve".into())], AccessDecision::Unverified),
        (vec![], vec![exempt], AccessDecision::Denied),
    ] {
        let identity = identity(IdentityConfig {
            user: Some(IdentitySource::Claim("sub".into())),
            tokens: Some(accepting(&issuer)),
            access: AccessConfig { exempt, denied },
            ..IdentityConfig::default()
        });
        let access = |token: String| {
            identity.identify(here, &mut request(&[("authorization", &format!("Bearer {token}"))])).access
        };
        // The budget of a thread outlives a configuration.
        (0..80).for_each(|n| _ = access(forger.token(json!({ "sub": n }))));
        assert_eq!(access(issuer.token(json!({ "sub": "new" }))), want);
        assert_ne!(
            access(String::new()),
            AccessDecision::Unverified,
            "a request without a token needs no verification"
        );
    }
}
