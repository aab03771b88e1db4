//! A hostile server sends replies without an end, on each kind of connection: memory stays bounded,
//! the connection is dropped at once, and the fault is counted.

use crate::server::hostile::{Flood, HostileServer};
use crate::server::{Page, page, remote_config, store};
use limiter::lease::{LeaseBackend, LeaseRequest};
use limiter::{Quota, Rate};
use shard::{
    Bus, InsertTarget, KeyBuilder, RedisLeaseBackend, Region, RegionConfig, RemoteConfig, ShardFault, ShardFaultCounts,
    Store,
};
use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;

/// The limit of the bus, twice while the client copies, and what the allocator keeps. Without
/// limits, each flood takes hundreds of mebibytes.
const GROWTH_MAX: usize = 64 << 20;

/// A connection that is flooded without a limit is dropped after several timeouts.
const DROPPED_WITHIN: Duration = Duration::from_millis(1_500);

const NESTED: &str = "arrays in an array";

const FLOODS: &[Flood] = &[
    Flood { name: "a string without end", first: b"$1099511627776\r\n", then: b"xxxxxxxxxxxxxxxx" },
    Flood { name: "a string of 512 MiB", first: b"$536870912\r\n", then: b"xxxxxxxxxxxxxxxx" },
    Flood { name: "a line without end", first: b"+", then: b"xxxxxxxxxxxxxxxx" },
    Flood { name: "an error without end", first: b"-ERR ", then: b"xxxxxxxxxxxxxxxx" },
    Flood { name: "an array without end", first: b"*1000000000\r\n", then: b"$4\r\nabcd\r\n" },
    Flood { name: NESTED, first: b"*2\r\n", then: b"*2\r\n:1\r\n" },
    Flood { name: "a push message without end", first: b">1000000000\r\n+invalidate\r\n", then: b"$4\r\nabcd\r\n" },
    Flood { name: "an invalidated key without end", first: b">2\r\n+invalidate\r\n*1\r\n$90000000\r\n", then: b"xxxx" },
];

/// Only the bus, whose replies are metered, refuses replies without a request; elsewhere they are
/// dropped.
const UNASKED: Flood = Flood { name: "replies without a request", first: b"+OK\r\n", then: b"$4\r\nabcd\r\n" };

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
}

/// Drives operations until the flooded connection is dropped; returns the growth of the process.
async fn until_dropped(server: &HostileServer, what: &str, mut operate: impl AsyncFnMut()) -> usize {
    let (before, began, mut growth) = (resident_bytes(), Instant::now(), 0);
    while server.dropped() == 0 {
        let _may_fail = timeout(Duration::from_millis(50), operate()).await;
        sleep(Duration::from_millis(2)).await;
        growth = growth.max(resident_bytes().saturating_sub(before));
        assert!(began.elapsed() < DROPPED_WITHIN, "{what}: not dropped after {} bytes", server.sent());
    }
    assert!(growth < GROWTH_MAX, "{what}: {} MiB", growth >> 20);
    growth
}

/// Counted refusals. The client refuses deeply nested arrays and wrong replies to a login by
/// itself, and does not pass on the reason to all callers.
fn refused(flood: &Flood, faults: &ShardFaultCounts) -> u64 {
    let by_client = [ShardFault::Protocol, ShardFault::Io].map(|fault| faults.get(fault)).iter().sum();
    faults.get(ShardFault::ReplyTooLong) + if [NESTED, UNASKED.name].contains(&flood.name) { by_client } else { 0 }
}

fn config(server: &HostileServer) -> RemoteConfig {
    remote_config(&[("default", &[format!("redis://{}", server.address())])])
}

async fn read(store: &Arc<Store<Page>>) {
    let mut key = KeyBuilder::new();
    let _result = store.view().lookup_remote(&REGION, &key.part(b"x").key()).await;
}

#[tokio::test]
async fn a_reply_without_end_is_refused_on_every_connection() {
    let mut growths: BTreeMap<&str, usize> = BTreeMap::new();
    let mut note = |operation, growth: usize| {
        let most = growths.entry(operation).or_default();
        *most = growth.max(*most);
    };
    for flood in FLOODS {
        let server = HostileServer::start(&["GETRANGE"], *flood).await;
        let reads = store(config(&server));
        let growth = until_dropped(&server, flood.name, async || read(&reads).await).await;
        note("reads", growth);
        let report = reads.shard_reports().next().unwrap();
        assert!(refused(flood, &report.read_faults) >= 1, "{}: {:?}", flood.name, report.read_faults);

        // Small entries are written by a script, large ones by a transaction.
        for (trigger, body) in [(&["EVAL"], 10), (&["MULTI"], 100_000)] {
            let server = HostileServer::start(trigger, *flood).await;
            let writes = store(config(&server));
            let view = writes.view();
            let growth = until_dropped(&server, flood.name, async || {
                let entry = page("x", vec![0; body]).with_fill_epoch(view.epoch_snapshot());
                let mut key = KeyBuilder::new();
                view.insert(&REGION, &key.part(b"x").key(), entry, InsertTarget::LocalAndRemote);
                view.flush(SECOND).await;
            })
            .await;
            note("writes", growth);
            sleep(Duration::from_millis(20)).await;
            let report = writes.shard_reports().next().unwrap();
            assert!(refused(flood, &report.write_faults) >= 1, "{}: {:?}", flood.name, report.write_faults);
        }

        let server = HostileServer::start(&["EVALSHA"], *flood).await;
        let leases = RedisLeaseBackend::new(&store(config(&server)), "rule", SECOND).unwrap();
        let quota = Quota::new(Rate::new(10, 1).unwrap(), NonZeroU32::new(10).unwrap()).unwrap();
        let growth = until_dropped(&server, flood.name, async || {
            let _refused = leases.acquire(lease_request(quota)).await;
        })
        .await;
        note("leases", growth);
    }
    for flood in FLOODS.iter().chain([&UNASKED]) {
        // Login, the subscription itself, its clock, catching up, and a heartbeat.
        for trigger in [&["HELLO"][..], &["CLIENT", "TRACKING"], &["TIME"], &["XRANGE"], &["EVAL"]] {
            let server = HostileServer::start(trigger, *flood).await;
            let subscribed = store(config(&server));
            let bus = Bus::new(&subscribed, "node");
            let _tasks = bus.run();
            let what = format!("{} after {trigger:?}", flood.name);
            let growth = until_dropped(&server, &what, async || ()).await;
            note("bus", growth);
            sleep(Duration::from_millis(20)).await;
            let report = subscribed.shard_reports().next().unwrap();
            assert!(refused(flood, &report.bus_faults) >= 1, "{what}: {:?}", report.bus_faults);
        }
    }
    for flood in FLOODS {
        let server = HostileServer::start(&["CLUSTER", "SLOTS"], *flood).await;
        let region = RegionConfig {
            slots: 16,
            endpoints: Vec::new(),
            cluster: vec![format!("redis://{}", server.address())],
            fallback: Vec::new(),
        };
        let cluster = store(RemoteConfig { regions: BTreeMap::from([(REGION, region)]), ..remote_config(&[]) });
        let _tasks = Bus::new(&cluster, "node").run();
        note("cluster", until_dropped(&server, flood.name, async || ()).await);

        let server = HostileServer::start(&["SENTINEL"], *flood).await;
        let sentinel = format!("redis+sentinel://{}/orders", server.address());
        let watched = store(remote_config(&[("default", &[sentinel])]));
        let _tasks = Bus::new(&watched, "node").run();
        note("sentinel", until_dropped(&server, flood.name, async || ()).await);
    }
    println!("largest growth in bytes: {growths:?}");
}

fn lease_request(quota: Quota) -> LeaseRequest {
    LeaseRequest {
        node: 1,
        quota,
        expected_nodes: 1,
        requested: 1,
        returned: 0,
        held: 0,
        demand_millis: 0,
        ordinary_millis: 0,
        borrowed: 0,
        share_micros: 1_000_000,
        uptime_micros: 0,
        leaving: false,
    }
}
