//! Cost of token verification: `cargo bench --package gateway --bench token`. Most requests carry a
//! cached token; a new token is verified once per thread.

#[path = "../tests/support/issuer.rs"]
mod issuer;

use std::net::{IpAddr, Ipv4Addr};

use divan::{Bencher, black_box};
use gateway::testing::JwkSet;
use gateway::testing::Request;
use gateway::testing::tokens::{self, Algorithm, TokenLocation};
use gateway::testing::{CallerIdentifier, IdentityConfig, IdentitySource};
use issuer::{Issuer, set};
use serde_json::json;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// More than the cache of a thread holds, so that each token is evicted before its reuse.
const NEW_TOKENS: usize = 10_000;

fn main() {
    divan::main();
}

/// Identifier that accepts tokens of `issuer`; `None`: tokens are ignored.
fn identity(issuer: Option<&Issuer>) -> CallerIdentifier {
    let tokens = issuer.map(|issuer| tokens::TokenConfig {
        keys: tokens::TokenKeys::Fixed(JwkSet::parse(&set(&[issuer]), &[issuer.header.alg]).expect("a usable set")),
        location: TokenLocation::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: tokens::TokenConfig::LEEWAY,
    });
    let user = issuer.map(|_| IdentitySource::Claim("sub".to_owned()));
    let user_classes = ["anonymous", "standard"].map(str::to_owned).to_vec();
    CallerIdentifier::new(IdentityConfig { user, tokens, ..IdentityConfig::default() }, user_classes)
}

fn request(issuer: &Issuer, user: usize) -> Request {
    let claims = json!({ "sub": user.to_string(), "iss": "https://id.example", "aud": ["shop"], "iat": 0, "scope": "orders:read orders:write" });
    let mut request = Request { authority: "shop.example".into(), ..Request::default() };
    request.fields.push(b"authorization", format!("Bearer {}", issuer.token(claims)).as_bytes());
    request
}

#[divan::bench]
fn ignored(bencher: Bencher) {
    let (identity, mut request) = (identity(None), request(&Issuer::new(Algorithm::ES256, "a"), 1));
    bencher.bench_local(|| identity.identify(PEER, black_box(&mut request)));
}

#[divan::bench(args = [Algorithm::ES256, Algorithm::RS256])]
fn cached(bencher: Bencher, algorithm: Algorithm) {
    let issuer = Issuer::new(algorithm, "a");
    let (identity, mut request) = (identity(Some(&issuer)), request(&issuer, 1));
    assert!(identity.identify(PEER, &mut request).user.is_some());
    bencher.bench_local(|| identity.identify(PEER, black_box(&mut request)));
}

#[divan::bench]
fn cached_rejection(bencher: Bencher) {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let (identity, mut request) = (identity(Some(&issuer)), request(&forger, 1));
    assert!(identity.identify(PEER, &mut request).user.is_none());
    bencher.bench_local(|| identity.identify(PEER, black_box(&mut request)));
}

#[divan::bench(args = [Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA, Algorithm::RS256, Algorithm::HS256])]
fn new(bencher: Bencher, algorithm: Algorithm) {
    let issuer = Issuer::new(algorithm, "a");
    let identity = identity(Some(&issuer));
    let count = if algorithm == Algorithm::RS256 { NEW_TOKENS / 2 } else { NEW_TOKENS };
    let mut requests: Vec<Request> = (0..count).map(|user| request(&issuer, user)).collect();
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 1) % count;
        identity.identify(PEER, black_box(&mut requests[next]))
    });
}

/// Rejected without verification: the cost of a flood of distinct invalid tokens after the budget
/// of their address is exhausted.
#[divan::bench]
fn throttled(bencher: Bencher) {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let identity = identity(Some(&issuer));
    let mut requests: Vec<Request> = (0..NEW_TOKENS).map(|user| request(&forger, user)).collect();
    requests.iter_mut().take(100).for_each(|request| _ = black_box(identity.identify(PEER, request)));
    let mut next = 100;
    bencher.bench_local(|| {
        next = (next + 1) % NEW_TOKENS;
        identity.identify(PEER, black_box(&mut requests[next]))
    });
}
