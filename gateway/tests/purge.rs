//! Purges with `tidegate purge`: a URL with all its variants, a tag, or everything; hard and soft.

mod support;

use std::process::Output;
use std::time::Duration;

use support::client::ClientResponse;
use support::{Client, Gateway, Origin, ReceivedRequest, Script, one_route, tidegate, wait_for};

const ROUTE: &str = "cache = { mode = \"standard\", stale_while_revalidate = \"60s\" }";

/// Responses with one tag per path segment: `/a/b` has the tags `a` and `a-b`.
fn tagged(request: &ReceivedRequest) -> Script {
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

/// Remaining freshness in seconds.
fn ttl(response: &ClientResponse) -> i64 {
    let (_, ttl) = response.cache_status().rsplit_once("ttl=").unwrap_or_else(|| panic!("{}", response.cache_status()));
    ttl.split(';').next().and_then(|ttl| ttl.parse().ok()).expect("a number")
}

fn hits(gateway: &Gateway, targets: &[&str]) -> Vec<bool> {
    targets.iter().map(|target| gateway.get(target, &[]).is_hit()).collect()
}

#[test]
fn tag_purge_removes_exactly_the_tagged_objects() {
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
fn url_purge_removes_all_variants_in_all_regions() {
    let origin = Origin::start(tagged);
    let rest =
        "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\nregion = [\"header:x-region\"]\nregions = [\"eu\", \"us\"]";
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
fn soft_purged_object_is_served_stale_while_revalidated() {
    let origin = Origin::start(tagged);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    hits(&gateway, &["/a", "/b"]);
    let soft = purge(&gateway, &["--tag", "a", "--soft"]);
    assert!(soft.stdout.starts_with(b"marked stale: tag \"a\" (on "), "{soft:?}");
    wait_for(|| !gateway.process.stderr.events("purged").is_empty(), Duration::from_secs(5));
    let events = gateway.process.stderr.events("purged");
    let counts =
        |event: &serde_json::Value| ["unacknowledged_nodes", "unreachable_servers"].map(|key| event[key].as_u64());
    assert_eq!(events.iter().map(counts).collect::<Vec<_>>(), [[Some(0), Some(0)]], "{events:?}");
    let stale = gateway.get("/a", &[]);
    assert_eq!((stale.status, stale.text()), (200, "/a -".to_owned()));
    assert!(ttl(&stale) <= 0, "{}", stale.cache_status());
    origin.wait_for_requests(3);
    wait_for(|| ttl(&gateway.get("/a", &[])) > 0, Duration::from_secs(5));
    assert_eq!(origin.count(), 3);
    assert_eq!(hits(&gateway, &["/b"]), [true]);
    // A soft-purged object is also served if the origin fails; a hard-purged one is not.
    purged(&gateway, &["--tag", "a", "--soft"]);
    purged(&gateway, &["--tag", "b"]);
    origin.stop();
    assert_eq!(gateway.get("/a", &[]).status, 200);
    assert!(gateway.get("/b", &[]).status >= 500);
}

#[test]
fn fill_in_progress_during_purge_is_served_but_not_stored() {
    let gate = support::Gate::default();
    let script_gate = gate.clone();
    let origin = Origin::start(move |_| {
        let fields = [("Cache-Control", "max-age=60"), ("Surrogate-Key", "a"), ("Content-Length", "4")];
        Script::new().head(200, &fields).send("bo").wait(&script_gate).send("dy")
    });
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| gateway.get("/", &[]));
        origin.wait_for_requests(1);
        purged(&gateway, &["--tag", "a"]);
        gate.open();
        assert_eq!(first.join().expect("a response").text(), "body");
    });
    assert!(!gateway.get("/", &[]).is_hit());
    assert!(gateway.get("/", &[]).is_hit());
}

#[test]
fn invalid_orders_and_unreachable_gateways_are_reported() {
    let origin = Origin::start(tagged);
    let gateway = Gateway::start(&one_route(origin.address, ROUTE, ""));
    hits(&gateway, &["/a"]);
    let rejected = purge(&gateway, &["--url", "/a", "--tag", "a"]);
    assert!(!rejected.status.success());
    assert!(String::from_utf8_lossy(&rejected.stderr).contains("write the whole URL"), "{rejected:?}");
    assert_eq!(hits(&gateway, &["/a"]), [true], "a rejected order purges nothing");
    let no_target = purge(&gateway, &["--soft"]);
    assert_eq!(no_target.status.code(), Some(2), "{no_target:?}");
    for other_target in [["--url", "http://a/"], ["--tag", "a"]] {
        let output = purge(&gateway, &[&["--all"][..], &other_target].concat());
        assert_eq!(output.status.code(), Some(2), "--all excludes other targets: {output:?}");
    }
    // Tags that no response can have: white space and commas separate them.
    for tag in ["a b", "a,b", " a", ""] {
        let output = purge(&gateway, &["--tag", tag]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]), "{tag:?}: {output:?}");
        let hint = if tag.is_empty() { "a tag must not be empty" } else { "repeat `tag` for each of several" };
        assert!(stderr.contains(hint), "{tag:?}: {stderr}");
    }
    for query in ["all=true&tag=a", "url=http://a/&all=true", "tag=a%20b", "tag=a,b", "tag=a%00"] {
        let target = format!("/api/v1/purge?{query}");
        let rejected = Client::connect(gateway.admin).request("POST", &target, &[("host", "localhost")], b"");
        assert_eq!(rejected.status, 400, "{query}: {}", rejected.text());
    }
    assert_eq!(hits(&gateway, &["/a"]), [true], "a rejected order purges nothing");
    let unknown_node = purge(&gateway, &["--all", "--node", "absent"]);
    assert_eq!((unknown_node.status.code(), &unknown_node.stdout[..]), (Some(1), &b""[..]), "{unknown_node:?}");
    let status: serde_json::Value = serde_json::from_slice(&gateway.admin("/api/v1/status").body).expect("JSON");
    let expected = format!("the fleet has no node `absent`; its nodes: {}\n", status["node"].as_str().expect("a name"));
    assert!(String::from_utf8_lossy(&unknown_node.stderr).ends_with(&expected), "{unknown_node:?}");
    assert_eq!(hits(&gateway, &["/a"]), [true], "nothing is purged");
    purged(&gateway, &["--all", "--node", status["node"].as_str().expect("a name")]);
    assert_eq!(hits(&gateway, &["/a"]), [false]);
    let unreachable = tidegate().args(["purge", "--all", "--admin", "127.0.0.1:1"]).output().expect("the command runs");
    assert_eq!(unreachable.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&unreachable.stderr).contains("cannot reach a gateway at 127.0.0.1:1"),
        "{unreachable:?}"
    );
}
