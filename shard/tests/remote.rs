//! What nodes see of each other through Redis: entries, removals, and what is not an entry.

mod server;

use redis::Commands;
use server::{Page, Server, page, region, settings, store, store_on};
use shard::{Fault, KeyBuilder, Reach, Region, Remote, RemoteSettings, Tier, View};
use std::time::{Duration, Instant};

const WITHIN: Duration = Duration::from_secs(2);

async fn found(view: &View<Page>, region: &Region, path: &str) -> Option<String> {
    let mut key = KeyBuilder::new();
    match view.remote(region, &key.part(path.as_bytes()).key()).await {
        Remote::Found(hit) => {
            assert_eq!(hit.tier(), Tier::Remote);
            Some(format!("{} {}", hit.meta.text, String::from_utf8_lossy(hit.body())))
        }
        Remote::Absent => None,
        other => panic!("{other:?}"),
    }
}

async fn put(view: &View<Page>, region: &Region, path: &str, body: &'static str) {
    let mut key = KeyBuilder::new();
    view.insert(region, &key.part(path.as_bytes()).key(), page("meta", body), Reach::Shared);
    assert!(view.flush(WITHIN).await);
}

#[tokio::test]
async fn one_node_stores_another_finds_a_third_removes() {
    let server = Server::start();
    let [one, two, three] = [(); 3].map(|()| store_on(&server).view());
    assert_eq!(found(&two, &Region::DEFAULT, "/a").await, None);
    put(&one, &Region::DEFAULT, "/a", "body").await;
    let name: String = server.spy().keys::<_, Vec<String>>("*").unwrap().remove(0);
    let ttl_ms: i64 = server.spy().pttl(&name).unwrap();
    assert!(name.starts_with("tg:{default:") && (58_000..=60_000).contains(&ttl_ms), "{name} {ttl_ms}");

    assert_eq!(found(&two, &Region::DEFAULT, "/a").await.as_deref(), Some("meta body"));
    let mut key = KeyBuilder::new();
    assert!(two.local(&key.part(b"/a").key()).is_some());

    three.remove(&Region::DEFAULT, &key.key());
    assert!(three.flush(WITHIN).await);
    assert_eq!(found(&one, &Region::DEFAULT, "/a").await, None);
}

#[tokio::test]
async fn regions_live_apart() {
    let (here, there) = (Server::start(), Server::start());
    let view = store(settings(&[("default", &[here.url()]), ("eu", &[there.url()])])).view();
    let [default, eu, asia] = ["default", "eu", "asia"].map(region);
    for (region, body) in [(&default, "default"), (&eu, "eu"), (&asia, "asia")] {
        put(&view, region, "/a", body).await;
    }
    let count = |server: &Server| redis::cmd("DBSIZE").query::<u64>(&mut server.spy()).unwrap();
    assert_eq!((count(&here), count(&there)), (2, 1));
    for (region, body) in [(&default, "meta default"), (&eu, "meta eu"), (&asia, "meta asia")] {
        assert_eq!(found(&view, region, "/a").await.as_deref(), Some(body));
    }
}

#[tokio::test]
async fn slots_of_a_region_spread_over_its_endpoints_as_placement_says() {
    let servers = [Server::start(), Server::start()];
    let store = store(settings(&[("default", &[servers[0].url(), servers[1].url()])]));
    let (view, mut expected, mut key) = (store.view(), [0u64; 2], KeyBuilder::new());
    for n in 0..100 {
        let path = format!("/{n}");
        put(&view, &Region::DEFAULT, &path, "x").await;
        let placement = store.placement(&Region::DEFAULT, &key.clear().part(path.as_bytes()).key());
        let holds = |server: &Server| placement.endpoint.as_deref().unwrap().ends_with(&format!(":{}", server.port()));
        expected[servers.iter().position(holds).unwrap()] += 1;
    }
    let held = servers.each_ref().map(|server| redis::cmd("DBSIZE").query::<u64>(&mut server.spy()).unwrap());
    assert_eq!(held, expected);
    assert!(held.iter().all(|&n| n > 30), "{held:?}");
}

#[tokio::test]
async fn a_damaged_or_swapped_value_is_a_miss_is_counted_and_goes() {
    let server = Server::start();
    let (writer, reader) = (store_on(&server).view(), store_on(&server).view());
    put(&writer, &Region::DEFAULT, "/a", "body a").await;
    let mut spy = server.spy();
    let first: String = spy.keys::<_, Vec<String>>("*").unwrap().remove(0);
    put(&writer, &Region::DEFAULT, "/b", "body b").await;
    let second = spy.keys::<_, Vec<String>>("*").unwrap().into_iter().find(|name| *name != first).unwrap();

    let b: Vec<u8> = spy.get(&second).unwrap();
    let () = spy.set(&first, &b).unwrap();
    let () = spy.setrange(&second, b.len() as isize - 1, "X").unwrap();
    assert_eq!(found(&reader, &Region::DEFAULT, "/a").await, None);
    let corrupt = || reader.store().shards().next().unwrap().counts.corrupt;
    assert_eq!(corrupt(), 1);
    // The connection was thrown away with the first; its successor is made in the background.
    while corrupt() < 2 {
        let mut key = KeyBuilder::new();
        let answer = reader.remote(&Region::DEFAULT, &key.part(b"/b").key()).await;
        assert!(matches!(answer, Remote::Absent | Remote::Unavailable(Fault::Resting)), "{answer:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(reader.flush(WITHIN).await);
    assert_eq!(redis::cmd("DBSIZE").query::<u64>(&mut spy).unwrap(), 0);
    assert_eq!(reader.store().shards().next().unwrap().counts.removed, 2);
}

#[tokio::test]
async fn the_entry_of_a_node_with_another_secret_is_a_miss_and_stays() {
    let server = Server::start();
    let ours = store_on(&server).view();
    let theirs = store(RemoteSettings { secret: "other".into(), ..settings(&[("default", &[server.url()])]) }).view();
    put(&theirs, &Region::DEFAULT, "/a", "body").await;
    assert_eq!(found(&ours, &Region::DEFAULT, "/a").await, None);
    assert!(ours.flush(WITHIN).await);
    assert!(found(&theirs, &Region::DEFAULT, "/a").await.is_some());
    let counts = ours.store().shards().next().unwrap().counts;
    assert_eq!((counts.foreign, counts.corrupt), (1, 0));
}

#[tokio::test]
async fn large_bodies_stay_local_and_a_huge_value_is_not_pulled_in() {
    let server = Server::start();
    let view = store_on(&server).view();
    let mut key = KeyBuilder::new();
    let key = key.part(b"/a").key();
    view.insert(&Region::DEFAULT, &key, page("large", vec![0; (1 << 20) + 1]), Reach::Shared);
    assert!(view.flush(WITHIN).await && view.local(&key).is_some());
    assert_eq!(view.store().shards().next().unwrap().counts.oversize, 1);

    put(&view, &Region::DEFAULT, "/b", "body").await;
    let mut spy = server.spy();
    let name: String = spy.keys::<_, Vec<String>>("*").unwrap().remove(0);
    let () = spy.setrange(&name, 200 << 20, "end").unwrap();
    let answer = view.remote(&Region::DEFAULT, &KeyBuilder::new().part(b"/b").key()).await;
    assert!(!matches!(answer, Remote::Found(_)), "{answer:?}");
    let stats: String = redis::cmd("INFO").arg("stats").query(&mut spy).unwrap();
    let sent = stats.lines().find_map(|line| line.strip_prefix("total_net_output_bytes:")).unwrap();
    assert!(sent.trim().parse::<u64>().unwrap() < 3 << 20, "{sent}");
}

#[tokio::test]
async fn an_entry_overtaken_by_a_removal_does_not_reach_redis() {
    let server = Server::start();
    let view = store_on(&server).view();
    let mut key = KeyBuilder::new();
    let key = key.part(b"/a").key();
    let since = view.since();
    view.remove(&Region::DEFAULT, &key);
    view.insert(&Region::DEFAULT, &key, page("late", "x").begun(since), Reach::Shared);
    view.insert(&Region::DEFAULT, &key, page("queued", "x"), Reach::Shared);
    view.remove(&Region::DEFAULT, &key);
    assert!(view.flush(WITHIN).await);
    assert_eq!(redis::cmd("DBSIZE").query::<u64>(&mut server.spy()).unwrap(), 0);
}

#[tokio::test]
async fn a_thousand_entries_are_written_without_loss_when_they_come_at_the_pace_of_fills() {
    let server = Server::start();
    let view = store_on(&server).view();
    let began = Instant::now();
    for n in 0..1_000 {
        let mut key = KeyBuilder::new();
        view.insert(
            &Region::DEFAULT,
            &key.part(format!("/{n}").as_bytes()).key(),
            page("m", vec![0; 1024]),
            Reach::Shared,
        );
        if n % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    assert!(view.flush(WITHIN).await);
    let counts = view.store().shards().next().unwrap().counts;
    println!("1,000 entries in {:?}", began.elapsed());
    assert_eq!((counts.stored, counts.dropped_stores), (1_000, 0));
}
