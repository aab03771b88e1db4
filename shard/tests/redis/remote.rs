//! Entries, deletes and invalid values that nodes see of each other through Redis.

use crate::server::{Page, Server, page, region, remote_config, store, store_on};
use redis::Commands;
use shard::{CacheLayer, InsertTarget, KeyBuilder, Region, RemoteConfig, RemoteLookup, ShardFault, StoreView};
use std::time::{Duration, Instant};

const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

async fn read(view: &StoreView<Page>, region: &Region, path: &str) -> Option<String> {
    let mut key = KeyBuilder::new();
    match view.lookup_remote(region, &key.part(path.as_bytes()).key()).await {
        RemoteLookup::Found(hit) => {
            assert_eq!(hit.layer(), CacheLayer::Remote);
            Some(format!("{} {}", hit.meta.text, String::from_utf8_lossy(hit.body())))
        }
        RemoteLookup::Absent => None,
        other => panic!("{other:?}"),
    }
}

async fn put(view: &StoreView<Page>, region: &Region, path: &str, body: &'static str) {
    let mut key = KeyBuilder::new();
    view.insert(region, &key.part(path.as_bytes()).key(), page("meta", body), InsertTarget::LocalAndRemote);
    assert!(view.flush(FLUSH_TIMEOUT).await);
}

#[tokio::test]
async fn entry_and_delete_are_visible_to_other_nodes() {
    let server = Server::start();
    let [one, two, three] = [(); 3].map(|()| store_on(&server).view());
    assert_eq!(read(&two, &Region::DEFAULT, "/a").await, None);
    put(&one, &Region::DEFAULT, "/a", "body").await;
    let name: String = server.connect().keys::<_, Vec<String>>("*").unwrap().remove(0);
    let ttl_ms: i64 = server.connect().pttl(&name).unwrap();
    assert!(name.starts_with("tg:{default:") && (58_000..=60_000).contains(&ttl_ms), "{name} {ttl_ms}");

    assert_eq!(read(&two, &Region::DEFAULT, "/a").await.as_deref(), Some("meta body"));
    let mut key = KeyBuilder::new();
    assert!(two.lookup_local(&key.part(b"/a").key()).is_some());

    three.remove(&Region::DEFAULT, &key.key());
    assert!(three.flush(FLUSH_TIMEOUT).await);
    assert_eq!(read(&one, &Region::DEFAULT, "/a").await, None);
}

#[tokio::test]
async fn regions_have_separate_entries() {
    let (default_server, eu_server) = (Server::start(), Server::start());
    let view = store(remote_config(&[("default", &[default_server.url()]), ("eu", &[eu_server.url()])])).view();
    let [default, eu, asia] = ["default", "eu", "asia"].map(region);
    for (region, body) in [(&default, "default"), (&eu, "eu"), (&asia, "asia")] {
        put(&view, region, "/a", body).await;
    }
    let count = |server: &Server| redis::cmd("DBSIZE").query::<u64>(&mut server.connect()).unwrap();
    assert_eq!((count(&default_server), count(&eu_server)), (2, 1));
    for (region, body) in [(&default, "meta default"), (&eu, "meta eu"), (&asia, "meta asia")] {
        assert_eq!(read(&view, region, "/a").await.as_deref(), Some(body));
    }
}

#[tokio::test]
async fn slots_of_a_region_spread_over_its_endpoints_as_placed() {
    let servers = [Server::start(), Server::start()];
    let store = store(remote_config(&[("default", &[servers[0].url(), servers[1].url()])]));
    let (view, mut expected, mut key) = (store.view(), [0u64; 2], KeyBuilder::new());
    for n in 0..100 {
        let path = format!("/{n}");
        put(&view, &Region::DEFAULT, &path, "x").await;
        let placement = store.placement(&Region::DEFAULT, &key.clear().part(path.as_bytes()).key());
        let holds = |server: &Server| placement.endpoint.as_deref().unwrap().ends_with(&format!(":{}", server.port()));
        expected[servers.iter().position(holds).unwrap()] += 1;
    }
    let held = servers.each_ref().map(|server| redis::cmd("DBSIZE").query::<u64>(&mut server.connect()).unwrap());
    assert_eq!(held, expected);
    assert!(held.iter().all(|&n| n > 30), "{held:?}");
}

#[tokio::test]
async fn damaged_or_swapped_value_is_a_counted_miss_and_is_deleted() {
    let server = Server::start();
    let (writer, reader) = (store_on(&server).view(), store_on(&server).view());
    put(&writer, &Region::DEFAULT, "/a", "body a").await;
    let mut connection = server.connect();
    let first: String = connection.keys::<_, Vec<String>>("*").unwrap().remove(0);
    put(&writer, &Region::DEFAULT, "/b", "body b").await;
    let second = connection.keys::<_, Vec<String>>("*").unwrap().into_iter().find(|name| *name != first).unwrap();

    let b: Vec<u8> = connection.get(&second).unwrap();
    let () = connection.set(&first, &b).unwrap();
    let () = connection.setrange(&second, b.len() as isize - 1, "X").unwrap();
    assert_eq!(read(&reader, &Region::DEFAULT, "/a").await, None);
    let corrupt = || reader.store().shard_reports().next().unwrap().counts.corrupt;
    assert_eq!(corrupt(), 1);
    // The first read discarded the connection; its successor is opened in the background.
    while corrupt() < 2 {
        let mut key = KeyBuilder::new();
        let result = reader.lookup_remote(&Region::DEFAULT, &key.part(b"/b").key()).await;
        assert!(
            matches!(result, RemoteLookup::Absent | RemoteLookup::Unavailable(ShardFault::ConnectBackoff)),
            "{result:?}"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(reader.flush(FLUSH_TIMEOUT).await);
    assert_eq!(redis::cmd("DBSIZE").query::<u64>(&mut connection).unwrap(), 0);
    assert_eq!(reader.store().shard_reports().next().unwrap().counts.deleted, 2);
}

#[tokio::test]
async fn entry_with_another_secret_is_a_miss_and_is_kept() {
    let server = Server::start();
    let ours = store_on(&server).view();
    let theirs =
        store(RemoteConfig { secret: "other".into(), ..remote_config(&[("default", &[server.url()])]) }).view();
    put(&theirs, &Region::DEFAULT, "/a", "body").await;
    assert_eq!(read(&ours, &Region::DEFAULT, "/a").await, None);
    assert!(ours.flush(FLUSH_TIMEOUT).await);
    assert!(read(&theirs, &Region::DEFAULT, "/a").await.is_some());
    let counts = ours.store().shard_reports().next().unwrap().counts;
    assert_eq!((counts.incompatible, counts.corrupt), (1, 0));
}

#[tokio::test]
async fn oversized_bodies_stay_local_and_a_huge_value_is_not_read() {
    let server = Server::start();
    let view = store_on(&server).view();
    let mut key = KeyBuilder::new();
    let key = key.part(b"/a").key();
    view.insert(&Region::DEFAULT, &key, page("large", vec![0; (1 << 20) + 1]), InsertTarget::LocalAndRemote);
    assert!(view.flush(FLUSH_TIMEOUT).await && view.lookup_local(&key).is_some());
    assert_eq!(view.store().shard_reports().next().unwrap().counts.oversize, 1);

    put(&view, &Region::DEFAULT, "/b", "body").await;
    let mut connection = server.connect();
    let name: String = connection.keys::<_, Vec<String>>("*").unwrap().remove(0);
    let () = connection.setrange(&name, 200 << 20, "end").unwrap();
    let result = view.lookup_remote(&Region::DEFAULT, &KeyBuilder::new().part(b"/b").key()).await;
    assert!(!matches!(result, RemoteLookup::Found(_)), "{result:?}");
    let stats: String = redis::cmd("INFO").arg("stats").query(&mut connection).unwrap();
    let sent = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:")).unwrap();
    assert!(sent.trim().parse::<u64>().unwrap() < 3 << 20, "{sent}");
}

#[tokio::test]
async fn entry_overtaken_by_a_delete_is_not_written() {
    let server = Server::start();
    let view = store_on(&server).view();
    let mut key = KeyBuilder::new();
    let key = key.part(b"/a").key();
    let snapshot = view.epoch_snapshot();
    view.remove(&Region::DEFAULT, &key);
    view.insert(&Region::DEFAULT, &key, page("late", "x").with_fill_epoch(snapshot), InsertTarget::LocalAndRemote);
    view.insert(&Region::DEFAULT, &key, page("queued", "x"), InsertTarget::LocalAndRemote);
    view.remove(&Region::DEFAULT, &key);
    assert!(view.flush(FLUSH_TIMEOUT).await);
    let keys: Vec<String> = server.connect().keys("*").unwrap();
    assert!(keys.len() == 1 && keys[0].contains(":tombstone:"), "{keys:?}");
    let expiry: i64 = server.connect().pttl(&keys[0]).unwrap();
    assert!((1..=30_000).contains(&expiry), "{expiry}");
}

#[tokio::test]
async fn thousand_entries_at_the_rate_of_fills_are_written_without_loss() {
    let server = Server::start();
    let view = store_on(&server).view();
    let began = Instant::now();
    for n in 0..1_000 {
        let mut key = KeyBuilder::new();
        view.insert(
            &Region::DEFAULT,
            &key.part(format!("/{n}").as_bytes()).key(),
            page("m", vec![0; 1024]),
            InsertTarget::LocalAndRemote,
        );
        if n % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(view.flush(FLUSH_TIMEOUT).await);
    let counts = view.store().shard_reports().next().unwrap().counts;
    println!("1,000 entries in {:?}", began.elapsed());
    assert_eq!((counts.stored, counts.dropped_stores), (1_000, 0));
}
