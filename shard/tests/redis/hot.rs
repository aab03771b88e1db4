//! Hot entries: pinned if memory permits, else spread over servers, and never older than the
//! entry's own slot.

use crate::server::{Page, Server, reads_by_server, remote_config};
use shard::{Bus, CacheHit, Entry, InsertTarget, KeyBuilder, LocalConfig, Region, RemoteLookup, Store, StoreView};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;

/// Memory too small for any body of these tests.
const SMALL_MEMORY_BYTES: usize = 16 << 10;
const BODY: usize = 30_000;

struct Node {
    _bus: Arc<Bus<Page>>,
    store: Arc<Store<Page>>,
    view: StoreView<Page>,
    _tasks: JoinSet<()>,
}

impl Node {
    async fn start(name: &str, memory_bytes: usize, servers: &[Server]) -> Self {
        let endpoints: Vec<_> = servers.iter().map(Server::url).collect();
        let remote = remote_config(&[("default", &endpoints)]);
        let store = Store::new(LocalConfig { memory_bytes, hot_rate: 200 }, Some(remote)).unwrap();
        let bus = Bus::new(&store, name);
        let node = Self { _tasks: bus.run(), view: store.view(), _bus: bus, store };
        while !node.store.shard_reports().all(|shard| shard.is_subscribed) {
            sleep(Duration::from_millis(5)).await;
        }
        node
    }

    async fn put(&self, key: &str, revision: u32) {
        let page = Page { text: format!("{key} {revision}"), tags: Vec::new() };
        let entry = Entry::new(page, vec![revision as u8; BODY].into(), 60 * SECOND, Instant::now());
        self.view.insert(
            &REGION,
            &key_of(key).key(),
            entry.with_fill_epoch(self.view.epoch_snapshot()),
            InsertTarget::LocalAndRemote,
        );
        assert!(self.view.flush(SECOND).await);
    }

    async fn find(&self, key: &str) -> CacheHit<Page> {
        match self.view.lookup_remote(&REGION, &key_of(key).key()).await {
            RemoteLookup::Found(hit) => hit,
            other => panic!("{key}: {other:?}"),
        }
    }

    /// Looks it up until it is hot.
    async fn heat(&self, key: &str) {
        let began = Instant::now();
        while self.store.hot_keys().is_empty() {
            assert!(began.elapsed() < 10 * SECOND, "{key} does not become hot");
            for _ in 0..100 {
                let _hit_or_miss = self.view.lookup_local(&key_of(key).key());
            }
            self.view.run_maintenance();
            sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(self.store.hot_keys()[0].key, key_of(key).key().to_owned());
    }
}

fn key_of(name: &str) -> KeyBuilder {
    let mut key = KeyBuilder::new();
    key.part(name.as_bytes());
    key
}

/// Nine of ten reads are for one entry; the memory holds none.
#[tokio::test]
async fn reads_of_a_hot_entry_are_spread_over_all_servers() {
    let servers: Vec<_> = (0..4).map(|_| Server::start()).collect();
    let node = Node::start("a", SMALL_MEMORY_BYTES, &servers).await;
    let keys: Vec<_> = (0..200).map(|n| format!("/{n}")).collect();
    for key in &keys {
        node.put(key, 1).await;
    }
    node.heat("/0").await;
    let read = async |turns: usize| {
        let before = reads_by_server(&servers);
        for turn in 0..turns {
            let key = if turn % 10 < 9 { "/0" } else { &keys[turn / 10 % keys.len()] };
            let hit = node.find(key).await;
            assert_eq!((hit.meta.text.as_str(), hit.body().len()), (format!("{key} 1").as_str(), BODY));
            if turn % 100 == 0 {
                node.heat("/0").await;
            }
        }
        let spent = reads_by_server(&servers).into_iter().zip(before).map(|(after, before)| after - before);
        spent.collect::<Vec<_>>()
    };
    read(200).await;
    assert!(node.view.flush(SECOND).await);
    let spent = read(4_000).await;
    let mean = spent.iter().sum::<u64>() / 4;
    println!("reads by server: {spent:?}");
    assert!(spent.iter().all(|&count| count < 2 * mean && count * 2 > mean), "{spent:?}");
    assert!(spent.iter().sum::<u64>() < 4_400, "few reads need two servers: {spent:?}");
    let counts = node.store.shard_reports().map(|shard| (shard.counts.hits, shard.counts.misses));
    let counted = counts.reduce(|(a, b), (c, d)| (a + c, b + d));
    assert_eq!(counted, Some((4_200, 0)), "a lookup is counted once, whichever server replied");
}

/// One node changes the entry repeatedly; another node that reads copies never sees an older
/// revision.
#[tokio::test]
async fn copies_never_return_an_older_revision() {
    let servers: Vec<_> = (0..4).map(|_| Server::start()).collect();
    let (writer, reader) =
        (Node::start("a", SMALL_MEMORY_BYTES, &servers).await, Node::start("b", SMALL_MEMORY_BYTES, &servers).await);
    writer.put("/0", 0).await;
    reader.heat("/0").await;
    let home = writer.store.placement(&REGION, &key_of("/0").key()).endpoint.unwrap();
    let others = || -> u64 {
        let reads = reads_by_server(&servers).into_iter().zip(&servers);
        reads.filter(|(_, server)| !server.url().ends_with(&home)).map(|(reads, _)| reads).sum()
    };
    let before = others();
    let (mut last, mut seen, mut longest) = (0, BTreeSet::new(), Duration::ZERO);
    for revision in 0..50 {
        writer.put("/0", revision).await;
        // Changes of other entries have no effect.
        writer.put(&format!("/other/{revision}"), 1).await;
        let written = Instant::now();
        for _ in 0..100 {
            let hit = reader.find("/0").await;
            let found: u32 = hit.meta.text.strip_prefix("/0 ").unwrap().parse().unwrap();
            assert!(hit.body().iter().all(|&byte| u32::from(byte) == found));
            assert!(found >= last, "{found} after {last}");
            if found == revision && last < revision {
                longest = longest.max(written.elapsed());
            }
            last = found;
            seen.insert(found);
        }
        reader.heat("/0").await;
    }
    println!("revisions seen: {} of 50; the latest was seen at most {longest:?} after it was written", seen.len());
    assert_eq!(last, 49);
    let copies = others() - before;
    assert!(copies > 1_000, "copies were read {copies} times of 5,000");
    assert!(seen.len() > 25, "{seen:?}");
    // A deleted entry is not found in a copy.
    writer.view.remove(&REGION, &key_of("/0").key());
    assert!(writer.view.flush(SECOND).await);
    let began = Instant::now();
    while !matches!(reader.view.lookup_remote(&REGION, &key_of("/0").key()).await, RemoteLookup::Absent) {
        assert!(began.elapsed() < SECOND, "it is still found");
    }
    for _ in 0..100 {
        assert!(matches!(reader.view.lookup_remote(&REGION, &key_of("/0").key()).await, RemoteLookup::Absent));
    }
}

#[tokio::test]
async fn a_dead_server_does_not_affect_reads_of_a_hot_entry() {
    let mut servers: Vec<_> = (0..4).map(|_| Server::start()).collect();
    let node = Node::start("a", SMALL_MEMORY_BYTES, &servers).await;
    node.put("/0", 1).await;
    node.heat("/0").await;
    for _ in 0..200 {
        node.find("/0").await;
    }
    let endpoint = node.store.placement(&REGION, &key_of("/0").key()).endpoint.unwrap();
    let other = servers.iter().position(|server| !server.url().ends_with(&endpoint)).unwrap();
    servers.remove(other).stop();
    for _ in 0..500 {
        node.find("/0").await;
    }
}

#[tokio::test]
async fn a_hot_entry_is_pinned_until_it_is_changed_or_cold() {
    let servers = [Server::start()];
    let (node, other) = (Node::start("a", 4 << 20, &servers).await, Node::start("b", 4 << 20, &servers).await);
    node.put("/0", 1).await;
    node.heat("/0").await;
    let flood = |from: usize| {
        for n in from..from + 2_000 {
            let key = format!("/flood/{n}");
            let page = Page { text: key.clone(), tags: Vec::new() };
            let entry = Entry::new(page, vec![0; 4_000].into(), 60 * SECOND, Instant::now());
            node.view.insert(&REGION, &key_of(&key).key(), entry, InsertTarget::Local);
            // Looked up several times, so that moka admits them.
            (0..3).for_each(|_| drop(node.view.lookup_local(&key_of(&key).key())));
        }
    };
    let mut pinned = 0;
    for round in 0..20 {
        flood(round * 2_000);
        node.heat("/0").await;
        assert!(node.view.lookup_local(&key_of("/0").key()).is_some(), "round {round}");
        pinned = pinned.max(node.store.local_report().pinned);
    }
    println!("pinned at most: {pinned}");
    other.put("/0", 2).await;
    let began = Instant::now();
    while node.view.lookup_local(&key_of("/0").key()).is_some() {
        assert!(began.elapsed() < SECOND, "it is cached although it was changed");
        sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(node.store.local_report().pinned, 0);
    node.find("/0").await;
    flood(0);
    let began = Instant::now();
    while !node.store.hot_keys().is_empty() || node.store.local_report().pinned > 0 {
        assert!(began.elapsed() < 10 * SECOND, "it stays hot");
        node.view.run_maintenance();
        sleep(Duration::from_millis(100)).await;
    }
}
