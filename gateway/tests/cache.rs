//! The cache as a client and an origin see it: what is stored, what is validated, what stands in, and who waits for whom.

mod support;

use support::{Gateway, Origin, Script, one_route};

const CACHED: &str = "cache = { mode = \"standard\" }";

#[test]
fn a_second_request_is_a_hit() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "kept"));
    let gateway = Gateway::start(&one_route(origin.address, CACHED, ""));
    let (first, second) = (gateway.get("/a", &[]), gateway.get("/a", &[]));
    assert_eq!((first.status, first.text(), first.is_hit()), (200, "kept".into(), false));
    assert!(first.cache_status().contains("stored"), "{}", first.cache_status());
    assert_eq!((second.status, second.text(), second.is_hit()), (200, "kept".into(), true));
    assert!(second.field("age").is_some());
    assert_eq!(origin.count(), 1);
    assert_eq!(gateway.metric("tidegate_cache_results_total{cache=\"hit\"}"), 1.0);
}
