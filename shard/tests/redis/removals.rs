//! Removals by one node while another one fetches the same key, over a real Redis server: the old
//! response is served by no node afterwards.

use crate::server::proxy::Proxy;
use crate::server::{Page, Server, region, remote_config};
use redis::Commands;
use shard::{
    Bus, BusLoop, Entry, EpochSnapshot, InsertTarget, KeyBuilder, LocalConfig, Region, RemoteConfig, RemoteLookup,
    StaleReason, Store, StoreView,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;

struct Node {
    bus: Arc<Bus<Page>>,
    view: StoreView<Page>,
    _tasks: JoinSet<()>,
}

impl Node {
    async fn start(name: &str, remote: RemoteConfig) -> Self {
        let store = Store::new(LocalConfig { memory_bytes: 16 << 20, hot_rate: 1_000 }, Some(remote)).unwrap();
        let bus = Bus::new(&store, name);
        let mut tasks = JoinSet::new();
        for bus_loop in bus.loops() {
            tasks.spawn(async move { BusLoop::run(&bus_loop).await });
        }
        let node = Self { _tasks: tasks, view: store.view(), bus };
        wait_until("subscribed", || node.is_subscribed()).await;
        node
    }

    async fn on(name: &str, url: String) -> Self {
        Self::start(name, remote_config(&[("default", &[url])])).await
    }

    fn is_subscribed(&self) -> bool {
        self.view.store().shard_reports().all(|shard| shard.is_subscribed)
    }

    /// Ends a fill that began with `since`.
    fn store(&self, name: &str, text: &str, since: EpochSnapshot) {
        self.store_body(name, (text, Vec::new()), since);
    }

    fn store_body(&self, name: &str, (text, body): (&str, Vec<u8>), since: EpochSnapshot) {
        let page = Page { text: text.into(), tags: Vec::new() };
        let entry = Entry::new(page, body.into(), 60 * SECOND, Instant::now()).with_fill_epoch(since);
        let mut key = KeyBuilder::new();
        self.view.insert(&REGION, &key.part(name.as_bytes()).key(), entry, InsertTarget::LocalAndRemote);
    }

    /// Removes a key in the default region and waits until the server has confirmed it.
    async fn remove(&self, name: &str) {
        let mut key = KeyBuilder::new();
        self.view.remove(&REGION, &key.part(name.as_bytes()).key());
        assert!(self.view.flush(5 * SECOND).await);
    }

    /// The body that the local cache serves as fresh.
    fn cached(&self, name: &str) -> Option<String> {
        let mut key = KeyBuilder::new();
        let hit = self.view.lookup_local(&key.part(name.as_bytes()).key())?;
        let is_suspect = hit.stale_reason(Instant::now()) == Some(StaleReason::SubscriptionGap);
        (!is_suspect).then(|| hit.meta.text.clone())
    }

    /// The body that the server returns.
    async fn remote(&self, name: &str) -> Option<String> {
        let mut key = KeyBuilder::new();
        match self.view.lookup_remote(&REGION, &key.part(name.as_bytes()).key()).await {
            RemoteLookup::Found(hit) => Some(hit.meta.text.clone()),
            RemoteLookup::Absent => None,
            other => panic!("{other:?}"),
        }
    }
}

async fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < 10 * SECOND, "timed out: {what}");
        sleep(Duration::from_millis(2)).await;
    }
}

fn tombstones(server: &Server) -> Vec<String> {
    server.connect().keys("tg:*:tombstone:*").unwrap()
}

#[tokio::test]
async fn a_fill_that_began_before_the_removal_of_an_absent_key_is_stored_nowhere() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    for (name, body) in [("small", 10), ("large", 200_000)] {
        let since = a.view.epoch_snapshot();
        b.remove(name).await;
        // The store may overtake the report of the removal: the server refuses it.
        a.store_body(name, ("old", vec![0; body]), since);
        assert!(a.view.flush(5 * SECOND).await);
        assert_eq!((a.cached(name), b.remote(name).await), (None, None), "{name}");
        // A fetch that began later is stored, by both nodes.
        for node in [&a, &b] {
            sleep(Duration::from_millis(20)).await;
            node.store(name, "new", node.view.epoch_snapshot());
            assert!(node.view.flush(5 * SECOND).await);
            assert_eq!(node.cached(name).as_deref(), Some("new"), "{name}");
        }
        assert_eq!(a.remote(name).await.as_deref(), Some("new"), "{name}");
    }
}

/// The node has no subscription at all: only the server can refuse the store. A large envelope is
/// stored first and deleted again.
#[tokio::test]
async fn the_server_refuses_an_outdated_store_of_a_node_without_reports() {
    let server = Server::start();
    let store = crate::server::store_on(&server);
    let (a, b) = (store.view(), Node::on("b", server.url()).await);
    for (dropped, name, body) in [(1, "small", 10), (2, "large", 200_000)] {
        let mut key = KeyBuilder::new();
        let key = key.part(name.as_bytes()).key();
        let since = a.epoch_snapshot();
        b.remove(name).await;
        let entry = crate::server::page("old", vec![0; body]).with_fill_epoch(since);
        a.insert(&REGION, &key, entry, InsertTarget::LocalAndRemote);
        assert!(a.lookup_local(&key).is_some(), "nothing was reported");
        assert!(a.flush(5 * SECOND).await);
        assert!(a.lookup_local(&key).is_none(), "the refusal is a report");
        let counts = store.shard_reports().next().unwrap().counts;
        assert_eq!((b.remote(name).await, counts.stored, counts.dropped_stores), (None, 0, dropped));
    }
}

#[tokio::test]
async fn an_entry_that_only_memory_holds_is_removed_on_other_nodes() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    // Too large for the server.
    a.store_body("x", ("old", vec![0; (1 << 20) + 1]), a.view.epoch_snapshot());
    assert!(a.view.flush(SECOND).await);
    assert_eq!((a.cached("x").as_deref(), b.remote("x").await), (Some("old"), None));
    b.remove("x").await;
    wait_until("the removal is reported", || a.cached("x").is_none()).await;
}

#[tokio::test]
async fn own_removals_do_not_affect_newer_entries() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    for n in 0..50 {
        let text = n.to_string();
        let mut key = KeyBuilder::new();
        a.view.remove(&REGION, &key.part(b"x").key());
        // The fetch begins in the same millisecond, before the delete was sent.
        a.store("x", &text, a.view.epoch_snapshot());
        assert!(a.view.flush(5 * SECOND).await);
        assert_eq!(a.cached("x"), Some(text.clone()), "round {n}");
        assert_eq!(b.remote("x").await, Some(text), "round {n}");
    }
    sleep(Duration::from_millis(100)).await;
    assert_eq!(a.cached("x").as_deref(), Some("49"), "after all reports");
}

/// Both nodes remove the key; the later tombstone does not hide the removal that it replaces.
#[tokio::test]
async fn removals_by_two_nodes_both_count() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    let mut key = KeyBuilder::new();
    a.view.remove(&REGION, &key.part(b"x").key());
    let since = a.view.epoch_snapshot();
    sleep(Duration::from_millis(5)).await;
    b.remove("x").await;
    a.remove("x").await;
    // As if the removal by this node had come before its fill, and that by the other one after it.
    let since = a.view.epoch_snapshot().with_beginning_of(since);
    a.store("x", "old", since);
    assert!(a.view.flush(5 * SECOND).await);
    assert_eq!((b.remote("x").await, tombstones(&server).len()), (None, 1));
    wait_until("the removal is reported", || a.cached("x").is_none()).await;
}

#[tokio::test]
async fn a_fill_that_began_before_a_subscription_gap_is_not_stored_remotely() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let (a, b) = (Node::on("a", proxy.url()).await, Node::on("b", server.url()).await);
    let since = a.view.epoch_snapshot();
    proxy.disconnect();
    wait_until("the subscription is lost", || !a.is_subscribed()).await;
    b.remove("x").await;
    // The server has lost the tombstone, as after a failover.
    assert_eq!(server.connect().del::<_, usize>(tombstones(&server)).unwrap(), 1);
    proxy.restore();
    wait_until("subscribed again", || a.is_subscribed()).await;
    a.store("x", "old", since);
    assert!(a.view.flush(5 * SECOND).await);
    assert_eq!((a.cached("x"), b.remote("x").await), (None, None), "it must be validated first");
    assert!(a.bus.report().subscription_gaps >= 1);
}

/// A hung server executes what it received in the order of arrival; none of it is lost or
/// reordered.
#[tokio::test]
async fn a_removal_at_a_slow_server_precedes_the_store() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    // Both write connections exist.
    for (node, name) in [(&a, "warm a"), (&b, "warm b")] {
        node.store(name, "x", node.view.epoch_snapshot());
        assert!(node.view.flush(SECOND).await);
    }
    let since = a.view.epoch_snapshot();
    server.signal("STOP");
    let mut key = KeyBuilder::new();
    b.view.remove(&REGION, &key.part(b"x").key());
    a.store("x", "old", since);
    assert!(!b.view.flush(Duration::from_millis(300)).await, "the server hangs");
    assert_eq!(a.cached("x").as_deref(), Some("old"), "the removal is not known yet");
    server.signal("CONT");
    assert!(a.view.flush(5 * SECOND).await && b.view.flush(5 * SECOND).await);
    wait_until("the removal is reported", || a.cached("x").is_none()).await;
    // The report of the store may remove the copy that this read leaves; nothing may restore it.
    assert_eq!(b.remote("x").await, None);
}

#[tokio::test]
async fn a_removal_sets_one_tombstone_for_a_key_however_often() {
    let server = Server::start();
    let b = Node::on("b", server.url()).await;
    for _ in 0..1_000 {
        let mut key = KeyBuilder::new();
        b.view.remove(&REGION, &key.part(b"x").key());
    }
    assert!(b.view.flush(5 * SECOND).await);
    assert_eq!(tombstones(&server).len(), 1);
    let expiry: i64 = server.connect().pttl(&tombstones(&server)[0]).unwrap();
    assert!((1..=30_000).contains(&expiry), "{expiry}");
    // Entries in other regions have keys, and tombstones, of their own.
    let mut key = KeyBuilder::new();
    b.view.remove(&region("eu"), &key.part(b"x").key());
    assert!(b.view.flush(5 * SECOND).await);
    assert_eq!(tombstones(&server).len(), 2);
}

/// A full server refuses tombstones; the delete itself frees memory and must not wait.
#[tokio::test]
async fn a_full_server_still_deletes() {
    let server = Server::start();
    let b = Node::on("b", server.url()).await;
    b.store("x", "old", b.view.epoch_snapshot());
    assert!(b.view.flush(SECOND).await);
    let () = redis::cmd("CONFIG").arg("SET").arg("maxmemory").arg(1).query(&mut server.connect()).unwrap();
    b.remove("x").await;
    let counts = b.view.store().shard_reports().next().unwrap().counts;
    assert_eq!((counts.deleted, counts.dropped_deletes, tombstones(&server).len()), (1, 0, 0));
}

/// A gateway starts without Redis and caches meanwhile; no server reports what is removed.
#[tokio::test]
async fn an_entry_from_before_the_first_subscription_must_be_validated() {
    let server = Server::start();
    let (b, proxy) = (Node::on("b", server.url()).await, Proxy::to(server.port()).await);
    proxy.disconnect();
    let store = crate::server::store(remote_config(&[("default", &[proxy.url()])]));
    let bus = Bus::new(&store, "a");
    let a = Node { _tasks: bus.run(), view: store.view(), bus };
    a.store("x", "old", a.view.epoch_snapshot());
    assert_eq!(a.cached("x").as_deref(), Some("old"));
    b.remove("x").await;
    // The tombstone has expired.
    assert_eq!(server.connect().del::<_, usize>(tombstones(&server)).unwrap(), 1);
    proxy.restore();
    wait_until("subscribed", || a.is_subscribed()).await;
    assert_eq!(a.cached("x"), None);
    assert!(a.view.flush(5 * SECOND).await);
    assert_eq!(b.remote("x").await, None);
}

/// A full server evicts keys with the shortest lifetime first, so the tombstone may be gone before
/// a node reads it.
#[tokio::test]
async fn a_tombstone_that_is_evicted_at_once_still_removes() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    b.remove("x").await;
    let tombstone = &tombstones(&server)[0];
    assert_eq!(server.connect().del::<_, usize>(tombstone).unwrap(), 1);
    sleep(Duration::from_millis(50)).await;
    // Too large for the server, so that no change of the entry itself is reported.
    a.store_body("x", ("old", vec![0; (1 << 20) + 1]), a.view.epoch_snapshot());
    assert_eq!(a.cached("x").as_deref(), Some("old"));
    let mut evicted = redis::pipe();
    evicted.atomic().set(tombstone, "00000000000000bb 1 1 0").ignore().del(tombstone).ignore();
    let () = evicted.query(&mut server.connect()).unwrap();
    wait_until("the removal is reported", || a.cached("x").is_none()).await;
}

/// One unanswered command does not end the subscription; the reports that it was for are not
/// repeated.
#[tokio::test]
async fn a_removal_whose_tombstone_cannot_be_read_still_removes() {
    let server = Server::start();
    let (a, b) = (Node::on("a", server.url()).await, Node::on("b", server.url()).await);
    b.remove("x").await;
    let tombstone = &tombstones(&server)[0];
    sleep(Duration::from_millis(50)).await;
    a.store_body("x", ("old", vec![0; (1 << 20) + 1]), a.view.epoch_snapshot());
    let (seconds, _): (u64, u64) = redis::cmd("TIME").query(&mut server.connect()).unwrap();
    // The server reports the change, and executes no command for 1.2 s.
    let value = format!("00000000000000bb 9 {} 0", (seconds + 1) * 1_000);
    let mut pause = redis::pipe();
    pause.set(tombstone, value).ignore().cmd("CLIENT").arg("PAUSE").arg(1_200).arg("ALL").ignore();
    let () = pause.query(&mut server.connect()).unwrap();
    wait_until("the removal is applied", || a.cached("x").is_none()).await;
    sleep(Duration::from_millis(1_500)).await;
    assert!(a.is_subscribed() && a.bus.report().subscription_gaps == 0, "{:?}", a.bus.report());
    assert_eq!(a.cached("x"), None);
}

/// Calls of a command since the server started, by any client and by scripts.
fn calls(server: &Server, command: &str) -> u64 {
    let stats: String = redis::cmd("INFO").arg("commandstats").query(&mut server.connect()).unwrap();
    let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
    line.and_then(|line| line.split(',').next()?.parse().ok()).unwrap_or(0)
}

/// The figures of docs/purging.md.
#[tokio::test]
async fn commands_per_removal_are_those_of_the_documentation() {
    const REMOVALS: u64 = 200;
    const COMMANDS: [&str; 5] = ["unlink", "set", "getrange", "eval", "time"];
    let server = Server::start();
    let nodes = [Node::on("a", server.url()).await, Node::on("b", server.url()).await];
    let [a, b] = &nodes;
    for (is_cached_elsewhere, expected) in [(false, [1, 1, 2]), (true, [1, 1, 4])] {
        let name = |n: u64| format!("{is_cached_elsewhere} {n}");
        if is_cached_elsewhere {
            for n in 0..REMOVALS {
                a.store(&name(n), "x", a.view.epoch_snapshot());
            }
            assert!(a.view.flush(5 * SECOND).await);
            for n in 0..REMOVALS {
                // The report of its own store may come later than the first read.
                let began = Instant::now();
                while a.cached(&name(n)).is_none() {
                    assert!(a.remote(&name(n)).await.is_some() && began.elapsed() < 5 * SECOND);
                }
            }
            sleep(Duration::from_millis(100)).await;
            assert!((0..REMOVALS).all(|n| a.cached(&name(n)).is_some()));
        }
        let before = COMMANDS.map(|command| calls(&server, command));
        for n in 0..REMOVALS {
            let mut key = KeyBuilder::new();
            b.view.remove(&REGION, &key.part(name(n).as_bytes()).key());
        }
        assert!(b.view.flush(5 * SECOND).await);
        wait_until("removed", || (0..REMOVALS).all(|n| a.cached(&name(n)).is_none())).await;
        sleep(Duration::from_millis(200)).await;
        let mut counts = COMMANDS.map(|command| calls(&server, command));
        counts.iter_mut().zip(before).for_each(|(count, before)| *count -= before);
        println!("{REMOVALS} removals, cached elsewhere: {is_cached_elsewhere}: {COMMANDS:?} {counts:?}");
        assert_eq!(counts[..2], expected.map(|each| each * REMOVALS)[..2]);
        // The heartbeats of both nodes add a few scripts. Reports of both changes of a key may
        // arrive at once, and the entry is then gone before its tombstone is read.
        assert!((REMOVALS..REMOVALS + 20).contains(&counts[3]), "{counts:?}");
        assert!((REMOVALS..REMOVALS + 20).contains(&counts[4]), "{counts:?}");
        assert!((2 * REMOVALS..=expected[2] * REMOVALS).contains(&counts[2]), "{counts:?}");
    }
}
