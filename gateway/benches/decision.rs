//! CPU cost of the cache decision: `cargo bench --package gateway --bench decision`. Figures are in
//! docs/performance.md.

use std::time::{Duration, SystemTime};

use divan::{Bencher, black_box};
use gateway::testing::CacheControl;
use gateway::testing::CachedObject;
use gateway::testing::Fields;
use gateway::testing::{CacheConfig, CachePolicy, key, policy};
use gateway::testing::{Request, Response, StatusCode};
use shard::{KeyBuilder, Region};

fn main() {
    divan::main();
}

fn fields(lines: &[(&str, &str)]) -> Fields {
    let mut fields = Fields::default();
    lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
    fields
}

/// A typical request of a browser.
fn request(more: &[(&str, &str)]) -> Request {
    let own = [
        ("Host", "shop.example"),
        ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
        ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
        ("Accept-Language", "de,en-US;q=0.7,en;q=0.3"),
        ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ];
    let mut request = Request { authority: "shop.example".into(), ..Request::default() };
    request.fields = fields(&[&own[..], more].concat());
    request.set_target("/products/4711?size=l");
    request
}

fn stored() -> CachedObject {
    let mut response = Response::new(StatusCode::OK);
    response.fields = fields(&[("Cache-Control", "max-age=3600"), ("ETag", "\"abc\""), ("Content-Type", "text/html")]);
    let candidate = policy::StoreCandidate {
        request: &request(&[]),
        directives: &CacheControl::default(),
        response: &response,
        received_at: SystemTime::now(),
        delay: Duration::ZERO,
    };
    candidate.evaluate(&CachePolicy::default(), &CacheConfig::default()).expect("storable").0
}

/// The checks between the cache lookup and the response.
fn decide(request: &Request, object: &CachedObject) -> bool {
    let mut directives = CacheControl::parse(&request.fields);
    directives.no_cache = policy::demands_validation(&request.fields, &directives);
    let freshness = object.freshness_after(Duration::from_secs(7));
    policy::is_cacheable_request(request)
        && policy::is_usable(object, freshness, &directives)
        && !policy::wants_range(request)
        && !policy::is_not_modified(&request.fields, object)
}

#[divan::bench]
fn hit(bencher: Bencher) {
    let (request, object) = (request(&[]), stored());
    assert!(decide(&request, &object));
    bencher.bench_local(|| decide(black_box(&request), black_box(&object)));
}

#[divan::bench]
fn conditional_hit(bencher: Bencher) {
    let (request, object) = (request(&[("Cache-Control", "max-age=60"), ("If-None-Match", "\"other\"")]), stored());
    assert!(decide(&request, &object));
    bencher.bench_local(|| decide(black_box(&request), black_box(&object)));
}

#[divan::bench]
fn cache_key(bencher: Bencher) {
    let (request, config, mut builder) = (request(&[]), CacheConfig::default(), KeyBuilder::new());
    bencher.bench_local(|| {
        key::write_primary(&mut builder, &config, black_box(&request), &Region::DEFAULT);
        builder.key().hash()
    });
}

#[divan::bench]
fn miss(bencher: Bencher) {
    let (request, mut response) = (request(&[]), Response::new(StatusCode::OK));
    response.fields =
        fields(&[("Cache-Control", "public, max-age=3600"), ("ETag", "\"abc\""), ("Vary", "Accept-Encoding")]);
    let (received_at, policy, config) = (SystemTime::now(), CachePolicy::default(), CacheConfig::default());
    bencher.bench_local(|| {
        let candidate = policy::StoreCandidate {
            request: &request,
            directives: &CacheControl::default(),
            response: black_box(&response),
            received_at,
            delay: Duration::ZERO,
        };
        candidate.evaluate(&policy, &config)
    });
}
