//! Lookups while Redis is down, hangs, rejects commands or recovers: never an error, never a wait
//! beyond the deadline.

use crate::server::{DEADLINE, Page, SLACK, Server, free_port, page, region, remote_config, store, store_on};
use shard::{
    InsertTarget, KeyBuilder, Region, RemoteConfig, RemoteLookup, ShardBreakerState, ShardFault, Store, StoreView,
};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);

/// A store with the default deadline.
fn store_with_default_deadline(regions: &[(&str, &[String])]) -> Arc<Store<Page>> {
    store(RemoteConfig { deadline: DEADLINE, ..remote_config(regions) })
}

async fn lookup(view: &StoreView<Page>, region: &Region) -> (RemoteLookup<Page>, Duration) {
    let mut key = KeyBuilder::new();
    let (key, began) = (key.part(b"/a").key(), Instant::now());
    (view.lookup_remote(region, &key).await, began.elapsed())
}

fn put(view: &StoreView<Page>, region: &Region) {
    let mut key = KeyBuilder::new();
    view.insert(region, &key.part(b"/a").key(), page("meta", "body"), InsertTarget::LocalAndRemote);
}

/// Looks up 200 times a second until the shard responds, and returns the time that took. Every
/// lookup ends in time.
async fn wait_recovered(view: &StoreView<Page>, within: Duration) -> Duration {
    let began = Instant::now();
    loop {
        let (result, took) = lookup(view, &Region::DEFAULT).await;
        assert!(took < DEADLINE + SLACK, "{result:?} after {took:?}");
        if !matches!(result, RemoteLookup::Unavailable(_)) {
            return began.elapsed();
        }
        assert!(began.elapsed() < within, "still {result:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Looks up until the breaker has opened; every lookup ends in time.
async fn wait_open(view: &StoreView<Page>) {
    let began = Instant::now();
    while view.store().shard_reports().next().unwrap().reads == ShardBreakerState::Closed {
        let (result, took) = lookup(view, &Region::DEFAULT).await;
        assert!(matches!(result, RemoteLookup::Unavailable(_)) && took < DEADLINE + SLACK, "{result:?} after {took:?}");
        assert!(began.elapsed() < 3 * SECOND, "the breaker does not open");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The median time of 20 lookups while the breaker is open.
async fn median_while_open(view: &StoreView<Page>) -> Duration {
    let mut all = Vec::new();
    for _ in 0..20 {
        let (result, took) = lookup(view, &Region::DEFAULT).await;
        assert!(matches!(result, RemoteLookup::Unavailable(_)), "{result:?}");
        all.push(took);
    }
    all.sort_unstable();
    all[10]
}

#[tokio::test]
async fn killed_server_is_an_immediate_miss_and_recovers_within_a_second() {
    let server = Server::start();
    let view = store_with_default_deadline(&[("default", &[server.url()])]).view();
    wait_recovered(&view, 5 * SECOND).await;
    let port = server.stop();
    let (result, took) = lookup(&view, &Region::DEFAULT).await;
    assert!(matches!(result, RemoteLookup::Unavailable(_)) && took < DEADLINE + SLACK, "{result:?} after {took:?}");
    wait_open(&view).await;
    let open = median_while_open(&view).await;
    assert!(open < Duration::from_millis(1), "{open:?}");
    let _server = Server::start_on(port, &[]);
    let back = wait_recovered(&view, SECOND).await;
    println!("killed: {took:?} at first, {open:?} while open, back after {back:?}");
    // Writes have their own breaker and connection.
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
}

#[tokio::test]
async fn hung_server_costs_one_deadline_and_does_not_affect_other_regions() {
    let (hung, healthy) = (Server::start(), Server::start());
    let view = store_with_default_deadline(&[("default", &[hung.url()]), ("eu", &[healthy.url()])]).view();
    let eu = region("eu");
    for region in [&Region::DEFAULT, &eu] {
        put(&view, region);
    }
    assert!(view.flush(SECOND).await);
    wait_recovered(&view, 5 * SECOND).await;

    hung.signal("STOP");
    let (result, first) = lookup(&view, &Region::DEFAULT).await;
    assert!(
        matches!(result, RemoteLookup::Unavailable(ShardFault::Timeout)) && first < DEADLINE + SLACK,
        "{result:?} after {first:?}"
    );
    wait_open(&view).await;
    let open = median_while_open(&view).await;
    assert!(open < Duration::from_millis(1), "{open:?}");
    let (mut found, mut worst) = (0, Duration::ZERO);
    for _ in 0..200 {
        let (result, took) = lookup(&view, &eu).await;
        found += u32::from(matches!(result, RemoteLookup::Found(_)));
        worst = worst.max(took);
    }
    // All lookups succeed unless the machine itself is slow.
    assert!(found >= 150, "{found}");

    // Long enough for a connection attempt to time out.
    sleep(Duration::from_millis(1_500)).await;
    hung.signal("CONT");
    let back = wait_recovered(&view, 5 * SECOND).await;
    println!(
        "hung: {first:?} at first, {open:?} while open, other region {found} of 200, at worst {worst:?}, back after {back:?}"
    );
}

#[tokio::test]
async fn starts_without_redis_and_uses_it_once_available() {
    let port = free_port();
    let view = store_with_default_deadline(&[("default", &[format!("redis://127.0.0.1:{port}")])]).view();
    put(&view, &Region::DEFAULT);
    let mut key = KeyBuilder::new();
    assert!(view.lookup_local(&key.part(b"/a").key()).is_some());
    wait_open(&view).await;
    assert!(view.flush(SECOND).await);
    let counts = || view.store().shard_reports().next().unwrap().counts;
    assert_eq!((counts().stored, counts().dropped_stores), (0, 0));
    let server = Server::start_on(port, &[]);
    wait_recovered(&view, SECOND).await;
    // Entries stored meanwhile and still held here are written, and other nodes find them.
    let other = store_on(&server).view();
    let began = Instant::now();
    while !matches!(lookup(&other, &Region::DEFAULT).await.0, RemoteLookup::Found(_)) {
        assert!(began.elapsed() < 2 * SECOND, "the store is not retried: {:?}", counts());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn delete_survives_an_outage() {
    let server = Server::start();
    let (view, other) = (store_with_default_deadline(&[("default", &[server.url()])]).view(), store_on(&server).view());
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    server.signal("STOP");
    let mut key = KeyBuilder::new();
    view.remove(&Region::DEFAULT, &key.part(b"/a").key());
    assert!(!view.flush(Duration::from_millis(500)).await);
    server.signal("CONT");
    assert!(view.flush(5 * SECOND).await);
    let (result, _) = lookup(&other, &Region::DEFAULT).await;
    assert!(matches!(result, RemoteLookup::Absent), "{result:?}");
}

#[tokio::test]
async fn full_server_rejects_writes_and_serves_reads() {
    let server = Server::start_on(free_port(), &["--maxmemory", "3mb", "--maxmemory-policy", "noeviction"]);
    let view = store_on(&server).view();
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    for n in 0..20u8 {
        let mut key = KeyBuilder::new();
        view.insert(
            &Region::DEFAULT,
            &key.part(&[n]).key(),
            page("large", vec![0; 500_000]),
            InsertTarget::LocalAndRemote,
        );
        assert!(view.flush(SECOND).await);
    }
    let report = view.store().shard_reports().next().unwrap();
    assert!(report.write_faults.get(ShardFault::OutOfMemory) > 0, "{report:?}");
    assert_eq!((report.reads, report.writes), (ShardBreakerState::Closed, ShardBreakerState::Open));
    assert!(matches!(lookup(&view, &Region::DEFAULT).await.0, RemoteLookup::Found(_)));
}

#[tokio::test]
async fn wrong_password_is_classified_and_never_shown() {
    let server = Server::start_on(free_port(), &["--requirepass", "right"]);
    let url = |password: &str| format!("redis://:{password}@127.0.0.1:{}", server.port());
    let view = store(remote_config(&[("default", &[url("right")])])).view();
    assert!(matches!(lookup(&view, &Region::DEFAULT).await.0, RemoteLookup::Absent));
    let view = store(remote_config(&[("default", &[url("wrong")])])).view();
    assert!(matches!(lookup(&view, &Region::DEFAULT).await.0, RemoteLookup::Unavailable(_)));
    let report = view.store().shard_reports().next().unwrap();
    assert!(report.read_faults.get(ShardFault::Denied) > 0 && !format!("{report:?}").contains("wrong"), "{report:?}");
}

#[tokio::test]
async fn cancelled_lookup_leaves_no_state() {
    let server = Server::start();
    let view = store_on(&server).view();
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    for _ in 0..50 {
        tokio::select! {
            biased;
            _ = lookup(&view, &Region::DEFAULT) => {}
            () = tokio::task::yield_now() => {}
        }
    }
    assert!(matches!(lookup(&view, &Region::DEFAULT).await.0, RemoteLookup::Found(_)));
    assert_eq!(view.store().shard_reports().next().unwrap().read_faults.iter().map(|(_, n)| n).sum::<u64>(), 0);
}

/// Each thread has its own connections and shares the breaker: failures of other threads must not
/// reopen it after a thread has recovered.
#[test]
fn threads_with_separate_runtimes_recover_together() {
    let server = Server::start();
    let store = store_with_default_deadline(&[("default", &[server.url()])]);
    let port = server.port();
    let (stop, restarted) = (std::sync::Barrier::new(4), std::sync::Barrier::new(4));
    let server = std::sync::Mutex::new(Some(server));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let view = store.view();
                let runtime = tokio::runtime::LocalRuntime::new().unwrap();
                runtime.block_on(async {
                    wait_recovered(&view, 5 * SECOND).await;
                    if stop.wait().is_leader() {
                        server.lock().unwrap().take().unwrap().stop();
                    }
                    let down = Instant::now();
                    while down.elapsed() < SECOND {
                        let (result, took) = lookup(&view, &Region::DEFAULT).await;
                        assert!(took < DEADLINE + SLACK, "{result:?} after {took:?}");
                        sleep(Duration::from_millis(1)).await;
                    }
                    if restarted.wait().is_leader() {
                        *server.lock().unwrap() = Some(Server::start_on(port, &[]));
                    }
                    wait_recovered(&view, SECOND + SECOND / 2).await;
                    // Other threads may still be recovering; their failures must not keep this one
                    // out for long.
                    sleep(SECOND / 2).await;
                    let mut responses = 0;
                    for _ in 0..50 {
                        responses += u32::from(matches!(lookup(&view, &Region::DEFAULT).await.0, RemoteLookup::Absent));
                        sleep(Duration::from_millis(2)).await;
                    }
                    assert!(responses >= 45, "{responses}");
                });
            });
        }
    });
    assert_eq!(store.shard_reports().next().unwrap().reads, ShardBreakerState::Closed);
}

/// The server delays writes but not reads.
#[tokio::test]
async fn deleted_entry_is_absent_before_the_server_confirms_the_delete() {
    let server = Server::start();
    let store = store_on(&server);
    let (one, other) = (store.view(), store.view());
    put(&one, &Region::DEFAULT);
    assert!(one.flush(SECOND).await);
    assert!(matches!(lookup(&other, &Region::DEFAULT).await.0, RemoteLookup::Found(_)));
    redis::cmd("CLIENT").arg("PAUSE").arg(400).arg("WRITE").exec(&mut server.connect()).unwrap();
    let mut key = KeyBuilder::new();
    one.remove(&Region::DEFAULT, &key.part(b"/a").key());
    let (result, took) = lookup(&other, &Region::DEFAULT).await;
    assert!(matches!(result, RemoteLookup::Absent) && took < Duration::from_millis(200), "{result:?} after {took:?}");
    assert!(one.flush(5 * SECOND).await);
    assert!(matches!(lookup(&other, &Region::DEFAULT).await.0, RemoteLookup::Absent));
    put(&one, &Region::DEFAULT);
    assert!(one.flush(SECOND).await);
    assert!(matches!(lookup(&other, &Region::DEFAULT).await.0, RemoteLookup::Found(_)), "it may be stored again");
}
