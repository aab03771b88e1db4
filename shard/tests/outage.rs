//! What a request sees while Redis is gone, hangs, refuses or comes back: never an error, never a wait beyond the deadline.

mod server;

use server::{DEADLINE, Page, SLACK, Server, free_port, page, region, settings, store, store_on};
use shard::{BreakerState, Fault, KeyBuilder, Reach, Region, Remote, RemoteSettings, Store, View};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);

/// A store with the default deadline.
fn prompt(regions: &[(&str, &[String])]) -> Arc<Store<Page>> {
    store(RemoteSettings { deadline: DEADLINE, ..settings(regions) })
}

async fn ask(view: &View<Page>, region: &Region) -> (Remote<Page>, Duration) {
    let mut key = KeyBuilder::new();
    let (key, began) = (key.part(b"/a").key(), Instant::now());
    (view.remote(region, &key).await, began.elapsed())
}

fn put(view: &View<Page>, region: &Region) {
    let mut key = KeyBuilder::new();
    view.insert(region, &key.part(b"/a").key(), page("meta", "body"), Reach::Shared);
}

/// Asks as requests would, 200 a second, until the shard answers; how long that took. Every answer on the way comes in time.
async fn recovery(view: &View<Page>, within: Duration) -> Duration {
    let began = Instant::now();
    loop {
        let (answer, took) = ask(view, &Region::DEFAULT).await;
        assert!(took < DEADLINE + SLACK, "{answer:?} after {took:?}");
        if !matches!(answer, Remote::Unavailable(_)) {
            return began.elapsed();
        }
        assert!(began.elapsed() < within, "still {answer:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

/// Asks until the breaker has opened; every answer comes in time.
async fn until_open(view: &View<Page>) {
    let began = Instant::now();
    while view.store().shards().next().unwrap().reads == BreakerState::Closed {
        let (answer, took) = ask(view, &Region::DEFAULT).await;
        assert!(matches!(answer, Remote::Unavailable(_)) && took < DEADLINE + SLACK, "{answer:?} after {took:?}");
        assert!(began.elapsed() < 3 * SECOND, "the breaker does not open");
        sleep(Duration::from_millis(5)).await;
    }
}

/// The median of 20 answers while the breaker is open.
async fn at_once(view: &View<Page>) -> Duration {
    let mut all = Vec::new();
    for _ in 0..20 {
        let (answer, took) = ask(view, &Region::DEFAULT).await;
        assert!(matches!(answer, Remote::Unavailable(_)), "{answer:?}");
        all.push(took);
    }
    all.sort_unstable();
    all[10]
}

#[tokio::test]
async fn a_server_that_is_killed_is_a_miss_at_once_and_back_within_a_second() {
    let server = Server::start();
    let view = prompt(&[("default", &[server.url()])]).view();
    recovery(&view, 5 * SECOND).await;
    let port = server.stop();
    let (answer, took) = ask(&view, &Region::DEFAULT).await;
    assert!(matches!(answer, Remote::Unavailable(_)) && took < DEADLINE + SLACK, "{answer:?} after {took:?}");
    until_open(&view).await;
    let open = at_once(&view).await;
    assert!(open < Duration::from_millis(1), "{open:?}");
    let _server = Server::start_on(port, &[]);
    let back = recovery(&view, SECOND).await;
    println!("killed: {took:?} at first, {open:?} while open, back after {back:?}");
    // Writing has a breaker and a connection of its own.
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
}

#[tokio::test]
async fn a_server_that_hangs_costs_one_deadline_and_nothing_elsewhere() {
    let (hung, sound) = (Server::start(), Server::start());
    let view = prompt(&[("default", &[hung.url()]), ("eu", &[sound.url()])]).view();
    let eu = region("eu");
    for region in [&Region::DEFAULT, &eu] {
        put(&view, region);
    }
    assert!(view.flush(SECOND).await);
    recovery(&view, 5 * SECOND).await;

    hung.signal("STOP");
    let (answer, first) = ask(&view, &Region::DEFAULT).await;
    assert!(
        matches!(answer, Remote::Unavailable(Fault::Timeout)) && first < DEADLINE + SLACK,
        "{answer:?} after {first:?}"
    );
    until_open(&view).await;
    let open = at_once(&view).await;
    assert!(open < Duration::from_millis(1), "{open:?}");
    let (mut found, mut worst) = (0, Duration::ZERO);
    for _ in 0..200 {
        let (answer, took) = ask(&view, &eu).await;
        found += u32::from(matches!(answer, Remote::Found(_)));
        worst = worst.max(took);
    }
    // All of them, unless the machine itself is late.
    assert!(found >= 150, "{found}");

    // Long enough for a connection that is being made to give up.
    sleep(Duration::from_millis(1_500)).await;
    hung.signal("CONT");
    let back = recovery(&view, 5 * SECOND).await;
    println!(
        "hung: {first:?} at first, {open:?} while open, other region {found} of 200, at worst {worst:?}, back after {back:?}"
    );
}

#[tokio::test]
async fn without_redis_at_the_start_everything_works_and_redis_is_found_when_it_comes() {
    let port = free_port();
    let view = prompt(&[("default", &[format!("redis://127.0.0.1:{port}")])]).view();
    put(&view, &Region::DEFAULT);
    let mut key = KeyBuilder::new();
    assert!(view.local(&key.part(b"/a").key()).is_some());
    until_open(&view).await;
    assert!(view.flush(SECOND).await);
    let counts = || view.store().shards().next().unwrap().counts;
    assert_eq!((counts().stored, counts().dropped_stores), (0, 0));
    let server = Server::start_on(port, &[]);
    recovery(&view, SECOND).await;
    // What was stored meanwhile, and is still held here, the others now find.
    let other = store_on(&server).view();
    let began = Instant::now();
    while !matches!(ask(&other, &Region::DEFAULT).await.0, Remote::Found(_)) {
        assert!(began.elapsed() < 2 * SECOND, "it is not made up for: {:?}", counts());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_removal_survives_an_outage() {
    let server = Server::start();
    let (view, other) = (prompt(&[("default", &[server.url()])]).view(), store_on(&server).view());
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    server.signal("STOP");
    let mut key = KeyBuilder::new();
    view.remove(&Region::DEFAULT, &key.part(b"/a").key());
    assert!(!view.flush(Duration::from_millis(500)).await);
    server.signal("CONT");
    assert!(view.flush(5 * SECOND).await);
    let (answer, _) = ask(&other, &Region::DEFAULT).await;
    assert!(matches!(answer, Remote::Absent), "{answer:?}");
}

#[tokio::test]
async fn a_full_server_refuses_writes_and_still_serves_reads() {
    let server = Server::start_on(free_port(), &["--maxmemory", "3mb", "--maxmemory-policy", "noeviction"]);
    let view = store_on(&server).view();
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    for n in 0..20u8 {
        let mut key = KeyBuilder::new();
        view.insert(&Region::DEFAULT, &key.part(&[n]).key(), page("large", vec![0; 500_000]), Reach::Shared);
        assert!(view.flush(SECOND).await);
    }
    let report = view.store().shards().next().unwrap();
    assert!(report.write_faults.of(Fault::OutOfMemory) > 0, "{report:?}");
    assert_eq!((report.reads, report.writes), (BreakerState::Closed, BreakerState::Open));
    assert!(matches!(ask(&view, &Region::DEFAULT).await.0, Remote::Found(_)));
}

#[tokio::test]
async fn a_wrong_password_is_told_apart_and_never_shown() {
    let server = Server::start_on(free_port(), &["--requirepass", "right"]);
    let url = |password: &str| format!("redis://:{password}@127.0.0.1:{}", server.port());
    let view = store(settings(&[("default", &[url("right")])])).view();
    assert!(matches!(ask(&view, &Region::DEFAULT).await.0, Remote::Absent));
    let view = store(settings(&[("default", &[url("wrong")])])).view();
    assert!(matches!(ask(&view, &Region::DEFAULT).await.0, Remote::Unavailable(_)));
    let report = view.store().shards().next().unwrap();
    assert!(report.read_faults.of(Fault::Denied) > 0 && !format!("{report:?}").contains("wrong"), "{report:?}");
}

#[tokio::test]
async fn dropping_a_question_leaves_nothing_behind() {
    let server = Server::start();
    let view = store_on(&server).view();
    put(&view, &Region::DEFAULT);
    assert!(view.flush(SECOND).await);
    for _ in 0..50 {
        tokio::select! {
            biased;
            _ = ask(&view, &Region::DEFAULT) => {}
            () = tokio::task::yield_now() => {}
        }
    }
    assert!(matches!(ask(&view, &Region::DEFAULT).await.0, Remote::Found(_)));
    assert_eq!(view.store().shards().next().unwrap().read_faults.iter().map(|(_, n)| n).sum::<u64>(), 0);
}

/// Every thread has its own connections and shares the breaker: one that is back must not be shut again by the others.
#[test]
fn threads_with_runtimes_of_their_own_come_back_together() {
    let server = Server::start();
    let store = prompt(&[("default", &[server.url()])]);
    let port = server.port();
    let (stop, restarted) = (std::sync::Barrier::new(4), std::sync::Barrier::new(4));
    let server = std::sync::Mutex::new(Some(server));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let view = store.view();
                let runtime = tokio::runtime::LocalRuntime::new().unwrap();
                runtime.block_on(async {
                    recovery(&view, 5 * SECOND).await;
                    if stop.wait().is_leader() {
                        server.lock().unwrap().take().unwrap().stop();
                    }
                    let down = Instant::now();
                    while down.elapsed() < SECOND {
                        let (answer, took) = ask(&view, &Region::DEFAULT).await;
                        assert!(took < DEADLINE + SLACK, "{answer:?} after {took:?}");
                        sleep(Duration::from_millis(1)).await;
                    }
                    if restarted.wait().is_leader() {
                        *server.lock().unwrap() = Some(Server::start_on(port, &[]));
                    }
                    recovery(&view, SECOND + SECOND / 2).await;
                    // The others may still be on their way; none of their failures may shut this one out for long.
                    sleep(SECOND / 2).await;
                    let mut answered = 0;
                    for _ in 0..50 {
                        answered += u32::from(matches!(ask(&view, &Region::DEFAULT).await.0, Remote::Absent));
                        sleep(Duration::from_millis(2)).await;
                    }
                    assert!(answered >= 45, "{answered}");
                });
            });
        }
    });
    assert_eq!(store.shards().next().unwrap().reads, BreakerState::Closed);
}

/// Writes wait at the server, reads do not.
#[tokio::test]
async fn what_was_removed_is_not_found_while_its_server_has_not_heard_of_it() {
    let server = Server::start();
    let store = store_on(&server);
    let (one, other) = (store.view(), store.view());
    put(&one, &Region::DEFAULT);
    assert!(one.flush(SECOND).await);
    assert!(matches!(ask(&other, &Region::DEFAULT).await.0, Remote::Found(_)));
    redis::cmd("CLIENT").arg("PAUSE").arg(400).arg("WRITE").exec(&mut server.spy()).unwrap();
    let mut key = KeyBuilder::new();
    one.remove(&Region::DEFAULT, &key.part(b"/a").key());
    let (answer, took) = ask(&other, &Region::DEFAULT).await;
    assert!(matches!(answer, Remote::Absent) && took < Duration::from_millis(200), "{answer:?} after {took:?}");
    assert!(one.flush(5 * SECOND).await);
    assert!(matches!(ask(&other, &Region::DEFAULT).await.0, Remote::Absent));
    put(&one, &Region::DEFAULT);
    assert!(one.flush(SECOND).await);
    assert!(matches!(ask(&other, &Region::DEFAULT).await.0, Remote::Found(_)), "it may be stored again");
}
