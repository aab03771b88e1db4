//! What a token costs: `cargo bench --package gateway --bench token`. Known ones are what every request meets; new ones are
//! verified, once on each thread.

#[path = "../tests/support/issuer.rs"]
mod issuer;

use std::net::{IpAddr, Ipv4Addr};

use divan::{Bencher, black_box};
use gateway::http::message::Request;
use gateway::identify::keys::Keys;
use gateway::identify::tokens::{self, Algorithm, Place};
use gateway::identify::{Identity, Settings, Source};
use issuer::{Issuer, set};
use serde_json::json;

const PEER: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// More than a thread remembers, so that each is new when its turn comes again.
const NEW: usize = 10_000;

fn main() {
    divan::main();
}

/// Who believes this issuer; `None`: tokens are nothing to it.
fn identity(issuer: Option<&Issuer>) -> Identity {
    let believed = issuer.map(|issuer| tokens::Settings {
        keys: Keys::read(&set(&[issuer]), &[issuer.header.alg]).expect("a usable set"),
        place: Place::Bearer,
        issuer: None,
        audience: Vec::new(),
        leeway: tokens::Settings::LEEWAY,
    });
    let user = issuer.map(|_| Source::Claim("sub".to_owned()));
    let tiers = ["anonymous", "standard"].map(str::to_owned).to_vec();
    Identity::new(Settings { user, tokens: believed, ..Settings::default() }, tiers)
}

fn request(issuer: &Issuer, user: usize) -> Request {
    let claims = json!({ "sub": user.to_string(), "iss": "https://id.example", "aud": ["shop"], "iat": 0, "scope": "orders:read orders:write" });
    let mut request = Request { authority: "shop.example".into(), ..Request::default() };
    request.fields.push(b"authorization", format!("Bearer {}", issuer.token(claims)).as_bytes());
    request
}

#[divan::bench]
fn none_is_asked_for(bencher: Bencher) {
    let (identity, mut request) = (identity(None), request(&Issuer::new(Algorithm::ES256, "a"), 1));
    bencher.bench_local(|| identity.caller(PEER, black_box(&mut request)));
}

#[divan::bench(args = [Algorithm::ES256, Algorithm::RS256])]
fn known(bencher: Bencher, algorithm: Algorithm) {
    let issuer = Issuer::new(algorithm, "a");
    let (identity, mut request) = (identity(Some(&issuer)), request(&issuer, 1));
    assert!(identity.caller(PEER, &mut request).user.is_some());
    bencher.bench_local(|| identity.caller(PEER, black_box(&mut request)));
}

#[divan::bench]
fn known_to_be_bad(bencher: Bencher) {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let (identity, mut request) = (identity(Some(&issuer)), request(&forger, 1));
    assert!(identity.caller(PEER, &mut request).user.is_none());
    bencher.bench_local(|| identity.caller(PEER, black_box(&mut request)));
}

#[divan::bench(args = [Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA, Algorithm::RS256, Algorithm::HS256])]
fn new(bencher: Bencher, algorithm: Algorithm) {
    let issuer = Issuer::new(algorithm, "a");
    let identity = identity(Some(&issuer));
    let count = if algorithm == Algorithm::RS256 { NEW / 2 } else { NEW };
    let mut requests: Vec<Request> = (0..count).map(|user| request(&issuer, user)).collect();
    let mut next = 0;
    bencher.bench_local(|| {
        next = (next + 1) % count;
        identity.caller(PEER, black_box(&mut requests[next]))
    });
}

/// Refused without a signature: what a flood of different ones costs once its address is known for it.
#[divan::bench]
fn unchecked(bencher: Bencher) {
    let (issuer, forger) = (Issuer::new(Algorithm::ES256, "a"), Issuer::new(Algorithm::ES256, "a"));
    let identity = identity(Some(&issuer));
    let mut requests: Vec<Request> = (0..NEW).map(|user| request(&forger, user)).collect();
    requests.iter_mut().take(100).for_each(|request| _ = black_box(identity.caller(PEER, request)));
    let mut next = 100;
    bencher.bench_local(|| {
        next = (next + 1) % NEW;
        identity.caller(PEER, black_box(&mut requests[next]))
    });
}
