//! What an operator ends with `tidegate purge`: a URL with all its variants, what bears a tag, or everything; hard and softly.

mod support;

use std::process::Output;
use std::time::Duration;

use support::client::Answer;
use support::{Gateway, Origin, Received, Script, one_route, tidegate, wait_for};

const ROUTE: &str = "cache = { mode = \"standard\", stale_while_revalidate = \"60s\" }";

/// Answers that bear as many tags as their path has parts: `/a/b` bears `a` and `a-b`.
fn tagged(request: &Received) -> Script {
    let path = request.target.split('?').next().unwrap_or_default();
    let mut tags: Vec<String> = Vec::new();
    for part in path.split('/').filter(|part| !part.is_empty()) {
        tags.push(tags.last().map_or(part.to_owned(), |last| format!("{last}-{part}")));
    }
    let fields = [("Cache-Control", "max-age=60"), ("Surrogate-Key", &tags.join(" ")), ("Vary", "Accept-Language")];
    Script::ok(&fields, format!("{} {}", request.target, request.field("accept-language").unwrap_or("-")))
}

fn purge(gateway: &Gateway, arguments: &[&str]) -> Output {
    let admin = gateway.admin.to_string();
    let output = tidegate().arg("purge").args(arguments).args(["--admin", &admin]).output();
    output.expect("the command runs")
}

#[track_caller]
fn purged(gateway: &Gateway, arguments: &[&str]) {
    let output = purge(gateway, arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("(on "), "{output:?}");
}

/// The freshness that is left, in seconds.
fn ttl(answer: &Answer) -> i64 {
    let (_, ttl) = answer.cache_status().rsplit_once("ttl=").unwrap_or_else(|| panic!("{}", answer.cache_status()));
    ttl.split(';').next().and_then(|ttl| ttl.parse().ok()).expect("a number")
}

fn hits(gateway: &Gateway, targets: &[&str]) -> Vec<bool> {
    targets.iter().map(|target| gateway.get(target, &[]).is_hit()).collect()
}

#[test]
fn a_tag_ends_what_bears_it_and_nothing_else() {
    let origin = Origin::start(tagged);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    let targets = ["/a", "/a/b", "/a/b/c", "/ab", "/b", "/A"];
    hits(&gateway, &targets);
    assert_eq!(hits(&gateway, &targets), [true; 6]);
    purged(&gateway, &["--tag", "a-b"]);
    assert_eq!(hits(&gateway, &targets), [true, false, false, true, true, true]);
    purged(&gateway, &["--tag", "a", "--tag", "no-such-tag"]);
    assert_eq!(hits(&gateway, &targets), [false, false, false, true, true, true]);
    purged(&gateway, &["--all"]);
    assert_eq!(hits(&gateway, &targets), [false; 6]);
    assert_eq!(hits(&gateway, &targets), [true; 6]);
}

#[test]
fn a_url_ends_with_all_its_variants_in_all_regions() {
    let origin = Origin::start(tagged);
    let rest = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nregion = [\"header:x-region\"]";
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, rest));
    let all =
        [("/a?x", "de", "eu"), ("/a?x", "fr", "eu"), ("/a?x", "de", "us"), ("/a", "de", "eu"), ("/a?xy", "de", "eu")];
    let hits = || {
        all.map(|(target, language, region)| {
            let fields = [("host", "Shop.Example"), ("accept-language", language), ("x-region", region)];
            gateway.get(target, &fields).is_hit()
        })
    };
    hits();
    assert_eq!(hits(), [true; 5]);
    purged(&gateway, &["--url", "http://shop.example:80/a?x"]);
    assert_eq!(hits(), [false, false, false, true, true]);
}

#[test]
fn what_is_purged_softly_answers_once_more_while_it_is_fetched_anew() {
    let origin = Origin::start(tagged);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    hits(&gateway, &["/a", "/b"]);
    purged(&gateway, &["--tag", "a", "--soft"]);
    let stale = gateway.get("/a", &[]);
    assert_eq!((stale.status, stale.text()), (200, "/a -".to_owned()));
    assert!(ttl(&stale) <= 0, "{}", stale.cache_status());
    origin.wait_for_requests(3);
    wait_for(|| ttl(&gateway.get("/a", &[])) > 0, Duration::from_secs(5));
    assert_eq!(origin.count(), 3);
    assert_eq!(hits(&gateway, &["/b"]), [true]);
    // It also stands in for an origin that fails, and what was purged hard does not.
    purged(&gateway, &["--tag", "a", "--soft"]);
    purged(&gateway, &["--tag", "b"]);
    origin.stop();
    assert_eq!(gateway.get("/a", &[]).status, 200);
    assert!(gateway.get("/b", &[]).status >= 500);
}

#[test]
fn a_fill_under_way_when_its_tag_is_purged_is_served_and_not_stored() {
    let gate = support::Gate::default();
    let held = gate.clone();
    let origin = Origin::start(move |_| {
        let fields = [("Cache-Control", "max-age=60"), ("Surrogate-Key", "a"), ("Content-Length", "4")];
        Script::new().head(200, &fields).send("bo").wait(&held).send("dy")
    });
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| gateway.get("/", &[]));
        origin.wait_for_requests(1);
        purged(&gateway, &["--tag", "a"]);
        gate.open();
        assert_eq!(first.join().expect("answered").text(), "body");
    });
    assert!(!gateway.get("/", &[]).is_hit());
    assert!(gateway.get("/", &[]).is_hit());
}

#[test]
fn orders_that_are_unclear_and_gateways_that_are_not_there_are_told_of() {
    let origin = Origin::start(tagged);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    hits(&gateway, &["/a"]);
    let refused = purge(&gateway, &["--url", "/a", "--all"]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("write the whole URL"), "{refused:?}");
    assert_eq!(hits(&gateway, &["/a"]), [true], "an order that is refused is not followed in part");
    let nothing = purge(&gateway, &["--soft"]);
    assert_eq!(nothing.status.code(), Some(2), "{nothing:?}");
    let absent = tidegate().args(["purge", "--all", "--admin", "127.0.0.1:1"]).output().expect("the command runs");
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("no gateway answers at 127.0.0.1:1"), "{absent:?}");
}
