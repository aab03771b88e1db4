//! The fleet bus over real Redis servers: purges, invalidations and overrides, also across outages.

use crate::server::proxy::Proxy;
use crate::server::{Page, Server, free_port, remote_config};
use shard::{
    Bus, DeliveryReport, Entry, FleetNodes, InsertTarget, KeyBuilder, LocalConfig, OverrideRequest, Purge, PurgeScope,
    Region, RemoteLookup, StaleReason, Store, StoreView, Tag,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;

/// One node: a store with its bus.
struct Node {
    bus: Arc<Bus<Page>>,
    store: Arc<Store<Page>>,
    view: StoreView<Page>,
    _tasks: JoinSet<()>,
}

impl Node {
    fn start(name: &str, endpoints: &[String]) -> Self {
        let remote = remote_config(&[("default", endpoints)]);
        let store = Store::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, Some(remote)).unwrap();
        let bus = Bus::new(&store, name);
        Self { _tasks: bus.run(), view: store.view(), bus, store }
    }

    async fn start_subscribed(name: &str, endpoints: &[String]) -> Self {
        let node = Self::start(name, endpoints);
        wait_until("subscribed to all servers", || node.is_subscribed()).await;
        node
    }

    fn is_subscribed(&self) -> bool {
        self.store.shard_reports().all(|shard| shard.is_subscribed)
    }

    /// Stores a page whose tag is its own name.
    async fn put(&self, name: &str) {
        let mut key = KeyBuilder::new();
        let page = Page { text: name.into(), tags: vec![Tag::surrogate_key(name.as_bytes())] };
        let entry = Entry::new(page, name.as_bytes().to_vec().into(), 60 * SECOND, Instant::now())
            .with_fill_epoch(self.view.epoch_snapshot());
        self.view.insert(&REGION, &key.part(name.as_bytes()).key(), entry, InsertTarget::LocalAndRemote);
        assert!(self.view.flush(SECOND).await);
    }

    fn has_cached(&self, name: &str) -> bool {
        let mut key = KeyBuilder::new();
        let hit = self.view.lookup_local(&key.part(name.as_bytes()).key());
        hit.is_some_and(|hit| hit.stale_reason(Instant::now()) != Some(StaleReason::SubscriptionGap))
    }

    /// Whether the server has it. A connection that was cut has to be re-established first.
    async fn is_on_server(&self, name: &str) -> bool {
        let began = Instant::now();
        loop {
            let mut key = KeyBuilder::new();
            match self.view.lookup_remote(&REGION, &key.part(name.as_bytes()).key()).await {
                RemoteLookup::Found(_) => return true,
                RemoteLookup::Absent => return false,
                other => assert!(began.elapsed() < 2 * SECOND, "{other:?}"),
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Fetches it until it stays cached: the invalidation of its own storing may still be in
    /// flight.
    async fn fetch_until_cached(&self, name: &str) {
        let began = Instant::now();
        while !(self.is_on_server(name).await && self.has_cached(name)) {
            assert!(began.elapsed() < 2 * SECOND, "{name} is not cached");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn purge(&self, name: &str) -> DeliveryReport {
        self.bus.purge(&[hard(name)], None, 3 * SECOND).await.unwrap()
    }
}

fn hard(name: &str) -> Purge {
    Purge { scope: PurgeScope::Tag(Tag::surrogate_key(name.as_bytes())), is_soft: false }
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < 10 * SECOND, "timed out: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("n{n}")).collect()
}

#[tokio::test]
async fn a_disconnected_node_is_unacknowledged_and_catches_up_on_purges() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let mut nodes = Vec::new();
    for (n, name) in names(20).iter().enumerate() {
        let url = if n == 19 { proxy.url() } else { server.url() };
        nodes.push(Node::start_subscribed(name, &[url]).await);
    }
    let all: Vec<String> = (0..10).map(|n| format!("page{n}")).collect();
    for page in &all {
        nodes[0].put(page).await;
        for node in &nodes[1..] {
            node.fetch_until_cached(page).await;
        }
    }
    let began = Instant::now();
    let complete = nodes[3].purge("page0").await;
    println!("20 nodes acknowledged after {:?}", began.elapsed());
    assert_eq!(
        (complete.acknowledged_nodes.len(), complete.unacknowledged_nodes.len(), complete.unreachable_servers.len()),
        (20, 0, 0),
        "{complete:?}"
    );
    assert!(nodes.iter().all(|node| !node.has_cached("page0")));
    assert!(!nodes[5].is_on_server("page0").await, "entries stored before the purge are not found");

    proxy.disconnect();
    let disconnected = Instant::now();
    for (n, page) in all.iter().enumerate().skip(1) {
        let partial = nodes[n].purge(page).await;
        assert_eq!(partial.acknowledged_nodes.len() + partial.unacknowledged_nodes.len(), 20, "{partial:?}");
        assert_eq!(partial.unacknowledged_nodes.iter().map(String::as_str).collect::<Vec<_>>(), ["n19"]);
        assert!(nodes[..19].iter().all(|node| !node.has_cached(page)) && nodes[19].has_cached(page));
    }
    sleep((5 * SECOND).saturating_sub(disconnected.elapsed())).await;
    proxy.restore();
    let reconnected = Instant::now();
    wait_until("the disconnected node applies the purges", || !all.iter().any(|page| nodes[19].has_cached(page))).await;
    println!(
        "purges missed for {:?} were applied {:?} after the reconnection",
        reconnected - disconnected,
        reconnected.elapsed()
    );
    wait_until("subscribed again", || nodes[19].is_subscribed()).await;
    assert!(!nodes[19].is_on_server("page7").await);
    let again = nodes[19].purge("page1").await;
    assert_eq!((again.acknowledged_nodes.len(), again.unacknowledged_nodes.len()), (20, 0), "{again:?}");
}

/// A node that ends without leaving is awaited until a new process of its name has started. A
/// second process of the same name that is alive is awaited like any other node.
#[tokio::test]
async fn a_new_process_replaces_a_crashed_one_of_its_name_but_no_live_one() {
    let server = Server::start();
    let one = Node::start_subscribed("one", &[server.url()]).await;
    let crashed = Node::start_subscribed("two", &[server.url()]).await;
    let list = |names: &std::collections::BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>();
    let lists = |report: &DeliveryReport| (list(&report.acknowledged_nodes), list(&report.unacknowledged_nodes));
    let (one_only, both) = (vec!["one".to_owned()], vec!["one".to_owned(), "two".to_owned()]);
    drop(crashed);
    let report = one.bus.purge(&[hard("a")], None, 10 * SECOND).await.unwrap();
    assert_eq!(lists(&report), (one_only, vec!["two".to_owned()]), "no process replaces it");

    let proxy = Proxy::to(server.port()).await;
    let again = Node::start_subscribed("two", &[proxy.url()]).await;
    let report = one.purge("a").await;
    assert_eq!(lists(&report), (both.clone(), Vec::new()), "the new process is there instead");
    let report = one.publish(request("x", "one", HOUR, None)).await;
    assert_eq!(lists(&report), (both.clone(), Vec::new()));

    // One that is started within the heartbeat interval of the crash replaces the old one, too.
    drop(again);
    let again = Node::start_subscribed("two", &[proxy.url()]).await;
    let report = one.bus.purge(&[hard("a")], None, 10 * SECOND).await.unwrap();
    assert_eq!(lists(&report), (both.clone(), Vec::new()));
    assert_eq!(lists(&again.purge("a").await), (both.clone(), Vec::new()));

    let _twin = Node::start_subscribed("two", &[server.url()]).await;
    sleep(3 * SECOND).await;
    let report = one.purge("a").await;
    assert_eq!(lists(&report), (both.clone(), Vec::new()));
    proxy.disconnect();
    let report = one.bus.purge(&[hard("a")], None, 10 * SECOND).await.unwrap();
    assert_eq!(lists(&report), (both.clone(), vec!["two".to_owned()]), "the first has not acknowledged");
    proxy.restore();
    wait_until("subscribed again", || again.is_subscribed()).await;
    assert_eq!(lists(&one.purge("a").await), (both, Vec::new()));
}

#[tokio::test]
async fn a_new_node_does_not_find_purged_entries() {
    let server = Server::start();
    let one = Node::start_subscribed("one", &[server.url()]).await;
    for page in ["a", "b"] {
        one.put(page).await;
    }
    one.purge("a").await;
    let two = Node::start_subscribed("two", &[server.url()]).await;
    assert!(!two.is_on_server("a").await && two.is_on_server("b").await);
    // An entry stored after the purge is found.
    one.put("a").await;
    let three = Node::start_subscribed("three", &[server.url()]).await;
    assert!(three.is_on_server("a").await && two.is_on_server("a").await);
}

#[tokio::test]
async fn a_node_recovers_purges_from_a_trimmed_stream() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let (one, two) =
        (Node::start_subscribed("one", &[server.url()]).await, Node::start_subscribed("two", &[proxy.url()]).await);
    one.put("a").await;
    two.fetch_until_cached("a").await;
    proxy.disconnect();
    one.purge("a").await;
    let _trimmed: () =
        redis::cmd("XTRIM").arg("tg:{bus}:events").arg("MAXLEN").arg(0).query(&mut server.connect()).unwrap();
    proxy.restore();
    wait_until("subscribed again", || two.is_subscribed()).await;
    assert!(!two.has_cached("a") && !two.is_on_server("a").await);
}

#[tokio::test]
async fn an_unreachable_server_receives_missed_purges_later() {
    let (first, second) = (Server::start(), Server::start());
    let endpoints = [first.url(), second.url()];
    let one = Node::start_subscribed("one", &endpoints).await;
    for n in 0..8 {
        one.put(&format!("page{n}")).await;
    }
    second.signal("STOP");
    let mut unreachable = Vec::new();
    for n in 0..8 {
        unreachable.extend(one.purge(&format!("page{n}")).await.unreachable_servers);
    }
    assert!(
        unreachable.iter().all(|label| second.url().ends_with(label.as_str())) && !unreachable.is_empty(),
        "{unreachable:?}"
    );
    second.signal("CONT");
    let scores =
        |server: &Server| -> usize { redis::cmd("ZCARD").arg("tg:{bus}:tags").query(&mut server.connect()).unwrap() };
    wait_until("the second server has all purges", || scores(&second) == 8).await;
    // Without the first server, only the second has the purges.
    let port = first.stop();
    let two = Node::start("two", &endpoints);
    wait_until("subscribed to the second server", || two.store.shard_reports().any(|shard| shard.is_subscribed)).await;
    let mut absent = 0;
    for n in 0..8 {
        let mut key = KeyBuilder::new();
        match two.view.lookup_remote(&REGION, &key.part(format!("page{n}").as_bytes()).key()).await {
            RemoteLookup::Absent => absent += 1,
            RemoteLookup::Unavailable(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(absent > 0);
    drop(Server::start_on(port, &[]));
}

/// The network loses a purge before the connection is found lost.
#[tokio::test]
async fn a_purge_that_was_lost_on_its_way_is_sent_again() {
    let (first, second) = (Server::start(), Server::start());
    let proxy = Proxy::to(second.port()).await;
    let one = Node::start_subscribed("one", &[first.url(), proxy.url()]).await;
    // Heartbeats have been answered.
    sleep(Duration::from_millis(1_500)).await;
    proxy.stall();
    sleep(Duration::from_millis(50)).await;
    let report = one.purge("a").await;
    assert_eq!(report.unreachable_servers.len(), 1, "{report:?}");
    proxy.disconnect();
    wait_until("the subscription is lost", || !one.is_subscribed()).await;
    let purges =
        |server: &Server| -> usize { redis::cmd("ZCARD").arg("tg:{bus}:tags").query(&mut server.connect()).unwrap() };
    assert_eq!(purges(&second), 0);
    proxy.restore();
    wait_until("the second server has the purge", || purges(&second) == 1).await;
}

#[tokio::test]
async fn a_purge_without_servers_applies_locally_and_is_published_later() {
    let port = free_port();
    let url = [format!("redis://127.0.0.1:{port}")];
    let one = Node::start("one", &url);
    one.put("a").await;
    let report = one.bus.purge(&[hard("a")], None, SECOND).await.unwrap();
    assert_eq!(
        (report.acknowledged_nodes.len(), report.unreachable_servers.len(), one.has_cached("a")),
        (1, 1, false),
        "{report:?}"
    );
    assert_eq!(one.bus.report().pending_purges, 1);
    let server = Server::start_on(port, &[]);
    wait_until("the purge was published", || one.bus.report().pending_purges == 0).await;
    let published: usize = redis::cmd("XLEN").arg("tg:{bus}:events").query(&mut server.connect()).unwrap();
    assert_eq!(published, 1);
    // The purges made while no server responded do not affect later entries.
    one.put("a").await;
    let two = Node::start_subscribed("two", &url).await;
    assert!(two.is_on_server("a").await);
}

#[tokio::test]
async fn changes_by_other_nodes_invalidate_cached_entries_own_ones_do_not() {
    let server = Server::start();
    let (one, two) =
        (Node::start_subscribed("one", &[server.url()]).await, Node::start_subscribed("two", &[server.url()]).await);
    one.put("a").await;
    two.fetch_until_cached("a").await;
    sleep(Duration::from_millis(100)).await;
    assert!(one.has_cached("a") && two.has_cached("a"), "no other node has changed it");
    // Stored again by the other node.
    two.put("a").await;
    wait_until("the change is reported", || !one.has_cached("a")).await;
    assert!(two.has_cached("a") && one.is_on_server("a").await);
    // Deleted by the other node.
    let mut key = KeyBuilder::new();
    let key = key.part(b"a").key();
    one.view.remove(&REGION, &key);
    wait_until("the deletion is reported", || !two.has_cached("a")).await;
    // A node's own deletion does not prevent storing what it fetches afterwards.
    for n in 0..20 {
        one.view.remove(&REGION, &key);
        one.put("a").await;
        sleep(Duration::from_millis(5)).await;
        assert!(one.has_cached("a"), "round {n}");
    }
}

#[tokio::test]
async fn a_fill_is_not_stored_if_another_node_changed_its_entry() {
    let server = Server::start();
    let (one, two) =
        (Node::start_subscribed("one", &[server.url()]).await, Node::start_subscribed("two", &[server.url()]).await);
    let since = one.view.epoch_snapshot();
    two.put("a").await;
    wait_until("the change is reported", || one.bus.report().invalidations > 0).await;
    let mut key = KeyBuilder::new();
    let key = key.part(b"a").key();
    let page = Page { text: "old".into(), tags: Vec::new() };
    let entry = Entry::new(page, "old".into(), 60 * SECOND, Instant::now()).with_fill_epoch(since);
    let served = one.view.insert(&REGION, &key, entry, InsertTarget::LocalAndRemote);
    assert_eq!(served.meta.text, "old");
    assert!(one.view.lookup_local(&key).is_none());
    let RemoteLookup::Found(hit) = one.view.lookup_remote(&REGION, &key).await else { panic!("nothing") };
    assert_eq!(hit.meta.text, "a");
}

#[tokio::test]
async fn cached_entries_are_suspect_after_a_subscription_gap() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let (one, two) =
        (Node::start_subscribed("one", &[server.url()]).await, Node::start_subscribed("two", &[proxy.url()]).await);
    for page in ["kept", "changed"] {
        one.put(page).await;
        two.fetch_until_cached(page).await;
    }
    proxy.disconnect();
    wait_until("the subscription is lost", || !two.is_subscribed()).await;
    one.put("changed").await;
    assert!(two.has_cached("kept") && two.has_cached("changed"), "cached entries are used while disconnected");
    proxy.restore();
    wait_until("subscribed again", || two.is_subscribed()).await;
    assert!(!two.has_cached("kept") && !two.has_cached("changed"));
    // An entry that is fetched again is trusted.
    two.fetch_until_cached("kept").await;
}

#[tokio::test]
async fn a_purge_for_one_node_applies_on_that_node_only() {
    let server = Server::start();
    let (one, two) =
        (Node::start_subscribed("one", &[server.url()]).await, Node::start_subscribed("two", &[server.url()]).await);
    one.put("a").await;
    two.fetch_until_cached("a").await;
    let report = one.bus.purge(&[hard("a")], Some("two"), 3 * SECOND).await.unwrap();
    assert_eq!(
        (report.acknowledged_nodes.iter().map(String::as_str).collect::<Vec<_>>(), report.unacknowledged_nodes.len()),
        (vec!["two"], 0),
        "{report:?}"
    );
    assert!(one.has_cached("a") && !two.has_cached("a"));
    assert!(two.is_on_server("a").await, "the server still has it");
    let unknown = one.bus.purge(&[hard("a")], Some("three"), SECOND).await.unwrap();
    assert_eq!(unknown.unacknowledged_nodes.iter().collect::<Vec<_>>(), ["three"]);
}

/// Without a server, the nodes that were members before are reported as unacknowledged.
#[tokio::test]
async fn a_purge_during_an_outage_reports_the_nodes_that_it_does_not_reach() {
    let server = Server::start();
    let url = [server.url()];
    let one = Node::start_subscribed("one", &url).await;
    let two = Node::start_subscribed("two", &url).await;
    let both = FleetNodes { names: ["one", "two"].map(str::to_owned).into(), is_complete: true };
    assert_eq!((one.bus.nodes().await, two.bus.nodes().await), (both.clone(), both.clone()));
    server.stop();
    wait_until("both are disconnected", || !one.is_subscribed() && !two.is_subscribed()).await;
    assert_eq!(one.bus.nodes().await, FleetNodes { is_complete: false, ..both });
    let report = one.bus.purge(&[hard("a")], None, SECOND).await.unwrap();
    let list = |names: &std::collections::BTreeSet<String>| names.iter().cloned().collect::<Vec<_>>();
    assert_eq!(
        (list(&report.acknowledged_nodes), list(&report.unacknowledged_nodes)),
        (vec!["one".into()], vec!["two".into()])
    );
    assert_eq!(report.unreachable_servers.len(), 1, "{report:?}");
}

/// An entry that one node stored while the server was unreachable may have been deleted by another
/// node meanwhile; neither knows of the other.
#[tokio::test]
async fn an_entry_stored_during_an_outage_does_not_undo_a_deletion() {
    let server = Server::start();
    let (one, other) =
        (Node::start_subscribed("a", &[server.url()]).await, Node::start_subscribed("b", &[server.url()]).await);
    let port = server.stop();
    wait_until("both are disconnected", || !one.is_subscribed() && !other.is_subscribed()).await;
    one.put("x").await;
    let mut key = KeyBuilder::new();
    other.view.remove(&REGION, &key.part(b"x").key());
    let _server = Server::start_on(port, &[]);
    wait_until("both are subscribed again", || one.is_subscribed() && other.is_subscribed()).await;
    sleep(SECOND).await;
    assert!(!other.is_on_server("x").await, "it was deleted");
    // Fills that begin now are stored as usual.
    one.put("y").await;
    assert!(other.is_on_server("y").await);
}

// Overrides.

const HOUR: Duration = Duration::from_secs(3_600);

fn request<'a>(name: &'a str, text: &'a str, duration: Duration, node: Option<&'a str>) -> OverrideRequest<'a> {
    OverrideRequest { name, text, duration, node }
}

impl Node {
    async fn publish(&self, request: OverrideRequest<'_>) -> DeliveryReport {
        self.bus.publish_override(request, 3 * SECOND).await.unwrap()
    }

    /// The active overrides, as `name=text`.
    fn overrides(&self) -> Vec<String> {
        self.bus.overrides().into_iter().map(|active| format!("{}={}", active.name, active.text)).collect()
    }
}

#[tokio::test]
async fn an_override_applies_until_it_expires_or_is_replaced() {
    let servers = [Server::start(), Server::start()];
    let urls = servers.each_ref().map(Server::url);
    let (a, b) = (Node::start_subscribed("a", &urls).await, Node::start_subscribed("b", &urls).await);
    let report = a.publish(request("x", "one", HOUR, None)).await;
    assert_eq!(
        (report.acknowledged_nodes.len(), report.unacknowledged_nodes.len(), report.unreachable_servers.len()),
        (2, 0, 0),
        "{report:?}"
    );
    assert_eq!((a.overrides(), b.overrides()), (vec!["x=one".to_owned()], vec!["x=one".to_owned()]));
    let report = b.publish(request("x", "two of b", HOUR, Some("b"))).await;
    assert_eq!((report.acknowledged_nodes.len(), report.unacknowledged_nodes.len()), (1, 0), "{report:?}");
    let report = b.publish(request("y", "for a", SECOND, Some("a"))).await;
    assert_eq!(
        (report.acknowledged_nodes.into_iter().collect::<Vec<_>>(), report.unacknowledged_nodes.len()),
        (vec!["a".to_owned()], 0)
    );
    assert_eq!((a.overrides(), b.overrides()), (vec!["x=one".into(), "y=for a".into()], vec!["x=two of b".to_owned()]));
    // A node that starts later reads the fleet-wide overrides that have not expired.
    let late = Node::start_subscribed("late", &urls).await;
    assert_eq!(late.overrides(), ["x=one"]);
    wait_until("it has expired", || a.overrides() == ["x=one"]).await;
    let report = late.publish(request("x", "three", HOUR, None)).await;
    assert_eq!((report.acknowledged_nodes.len(), report.unacknowledged_nodes.len()), (3, 0), "{report:?}");
    for node in [&a, &b, &late] {
        assert_eq!(node.overrides(), ["x=three"]);
    }
    let names: Vec<String> = redis::cmd("HKEYS").arg("tg:{bus}:notices").query(&mut servers[0].connect()).unwrap();
    assert_eq!(names, ["x"], "overrides for one node are not stored");
}

#[tokio::test]
async fn an_override_needs_one_server_and_reaches_a_reconnected_node() {
    let (server, other) = (Server::start(), Server::start());
    let proxy = Proxy::to(server.port()).await;
    let urls = [server.url(), other.url()];
    let near = Node::start_subscribed("near", &urls).await;
    let far = Node::start_subscribed("far", &[proxy.url()]).await;
    proxy.disconnect();
    other.stop();
    wait_until("one server is disconnected", || !near.is_subscribed()).await;
    let request = request("x", "during the outage", HOUR, None);
    let report = near.bus.publish_override(request, SECOND).await.unwrap();
    let list = |names: std::collections::BTreeSet<String>| names.into_iter().collect::<Vec<_>>();
    assert_eq!(
        (list(report.acknowledged_nodes), list(report.unacknowledged_nodes)),
        (vec!["near".to_owned()], vec!["far".to_owned()])
    );
    assert_eq!(report.unreachable_servers.len(), 1);
    assert!(far.overrides().is_empty());
    proxy.restore();
    wait_until("the override is applied", || far.overrides() == ["x=during the outage"]).await;
}

#[tokio::test]
async fn an_override_without_servers_applies_locally() {
    let store = Store::<Page>::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, None).unwrap();
    let bus = Bus::new(&store, "alone");
    let request = request("x", "one", HOUR, None);
    let report = bus.publish_override(request, SECOND).await.unwrap();
    assert_eq!(
        (report.acknowledged_nodes.len(), report.unacknowledged_nodes.len(), report.unreachable_servers.len()),
        (1, 0, 0)
    );
    assert_eq!(bus.overrides()[0].text, "one");
    bus.overrides_changed().await;
    let report = bus
        .publish_override(OverrideRequest { text: "two", node: Some("elsewhere"), ..request }, SECOND)
        .await
        .unwrap();
    assert_eq!((report.acknowledged_nodes.len(), report.unacknowledged_nodes.len()), (0, 1));
    assert_eq!(bus.overrides()[0].text, "one");
    assert!(bus.publish_override(OverrideRequest { text: &"x".repeat(1_000), ..request }, SECOND).await.is_err());
}

#[tokio::test]
async fn overrides_are_republished_after_an_outage_and_after_data_loss() {
    let server = Server::start();
    let url = [server.url()];
    let (a, b) = (Node::start_subscribed("a", &url).await, Node::start_subscribed("b", &url).await);
    assert_eq!(a.bus.nodes().await, FleetNodes { names: ["a", "b"].map(str::to_owned).into(), is_complete: true });
    let port = server.stop();
    wait_until("both are disconnected", || !a.is_subscribed() && !b.is_subscribed()).await;
    let report = a.publish(request("x", "during the outage", HOUR, None)).await;
    assert_eq!(
        (report.acknowledged_nodes.len(), report.unacknowledged_nodes.len(), report.unreachable_servers.len()),
        (1, 1, 1),
        "{report:?}"
    );
    let server = Server::start_on(port, &[]);
    wait_until("the other node applies it", || b.overrides() == ["x=during the outage"]).await;
    // An expired override is still the latest version: an older one does not become active again.
    b.publish(request("x", "for a moment", Duration::from_millis(1), None)).await;
    wait_until("it has expired", || a.overrides().is_empty() && b.overrides().is_empty()).await;
    let _flushed: () = redis::cmd("FLUSHALL").query(&mut server.connect()).unwrap();
    let stored =
        || -> Vec<String> { redis::cmd("HVALS").arg("tg:{bus}:notices").query(&mut server.connect()).unwrap() };
    wait_until("it is republished", || stored().iter().any(|value| value.ends_with("for a moment"))).await;
    assert!(Node::start_subscribed("late", &url).await.overrides().is_empty());
}
