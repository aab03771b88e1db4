//! What deciding costs on a hit: `cargo bench --package gateway --bench decision`. Figures are in docs/performance.md.

use std::time::{Duration, SystemTime};

use divan::{Bencher, black_box};
use gateway::cache::control::Control;
use gateway::cache::stored::Object;
use gateway::cache::{RoutePolicy, Settings, key, policy};
use gateway::http::fields::Fields;
use gateway::http::message::{Request, Response, StatusCode};
use shard::{KeyBuilder, Region};

fn main() {
    divan::main();
}

fn fields(lines: &[(&str, &str)]) -> Fields {
    let mut fields = Fields::default();
    lines.iter().for_each(|(name, value)| fields.push(name.as_bytes(), value.as_bytes()));
    fields
}

/// What a browser sends.
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

fn stored() -> Object {
    let mut response = Response::new(StatusCode::OK);
    response.fields = fields(&[("Cache-Control", "max-age=3600"), ("ETag", "\"abc\""), ("Content-Type", "text/html")]);
    let (now, none) = (SystemTime::now(), Duration::ZERO);
    let (route, settings) = (RoutePolicy::default(), Settings::default());
    policy::judge(&request(&[]), &Control::default(), &response, &route, &settings, now, none).expect("storable").0
}

/// Everything between the lookup and the answer.
fn decide(request: &Request, object: &Object) -> bool {
    let mut asked = Control::of(&request.fields);
    asked.no_cache = policy::demands_validation(&request.fields, &asked);
    let standing = object.standing(Duration::from_secs(7));
    policy::is_lookup(request)
        && policy::may_use(object, standing, &asked)
        && !policy::wants_part(request)
        && !policy::is_not_modified(&request.fields, object)
}

#[divan::bench]
fn on_a_hit(bencher: Bencher) {
    let (request, object) = (request(&[]), stored());
    assert!(decide(&request, &object));
    bencher.bench_local(|| decide(black_box(&request), black_box(&object)));
}

#[divan::bench]
fn on_a_hit_with_conditions(bencher: Bencher) {
    let (request, object) = (request(&[("Cache-Control", "max-age=60"), ("If-None-Match", "\"other\"")]), stored());
    assert!(decide(&request, &object));
    bencher.bench_local(|| decide(black_box(&request), black_box(&object)));
}

#[divan::bench]
fn the_key(bencher: Bencher) {
    let (request, settings, mut builder) = (request(&[]), Settings::default(), KeyBuilder::new());
    bencher.bench_local(|| {
        key::primary(&mut builder, &settings, black_box(&request), &Region::DEFAULT);
        builder.key().hash()
    });
}

#[divan::bench]
fn of_a_miss(bencher: Bencher) {
    let (request, mut response) = (request(&[]), Response::new(StatusCode::OK));
    response.fields =
        fields(&[("Cache-Control", "public, max-age=3600"), ("ETag", "\"abc\""), ("Vary", "Accept-Encoding")]);
    let (now, route, settings) = (SystemTime::now(), RoutePolicy::default(), Settings::default());
    bencher.bench_local(|| {
        policy::judge(&request, &Control::default(), black_box(&response), &route, &settings, now, Duration::ZERO)
    });
}
