//! Servers whose address changes (a Redis Cluster of three masters and three replicas, a master
//! watched by Sentinels) and restricted access (TLS, and users with minimal permissions).

use crate::server::{Page, Server, documented_acl, free_port, page, region, remote_config};
use shard::{
    Bus, InsertTarget, KeyBuilder, LocalConfig, OverrideRequest, Purge, PurgeScope, RedisTlsConfig, Region,
    RegionConfig, RemoteConfig, RemoteLookup, ShardFault, Store, StoreView,
};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;
const PAGES: usize = 60;

struct Node {
    bus: Arc<Bus<Page>>,
    view: StoreView<Page>,
    _tasks: JoinSet<()>,
}

impl Node {
    fn start(remote: RemoteConfig) -> Self {
        let store = Store::new(LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 }, Some(remote)).unwrap();
        let bus = Bus::new(&store, "node");
        Self { _tasks: bus.run(), view: store.view(), bus }
    }

    async fn put(&self, n: usize) {
        let mut key = KeyBuilder::new();
        let text = n.to_string();
        self.view.insert(
            &REGION,
            &key.part(text.as_bytes()).key(),
            page(&text, text.clone()),
            InsertTarget::LocalAndRemote,
        );
    }

    async fn get(&self, n: usize) -> RemoteLookup<Page> {
        let mut key = KeyBuilder::new();
        let result = self.view.lookup_remote(&REGION, &key.part(n.to_string().as_bytes()).key()).await;
        if let RemoteLookup::Found(hit) = &result {
            assert_eq!(hit.meta.text, n.to_string(), "another key's value");
        }
        result
    }

    /// Number of pages found; a failed lookup counts as not found.
    async fn count(&self) -> usize {
        let mut found_count = 0;
        for n in 0..PAGES {
            found_count += usize::from(matches!(self.get(n).await, RemoteLookup::Found(_)));
        }
        found_count
    }

    async fn wait_all_found(&self, within: Duration) -> Duration {
        let began = Instant::now();
        loop {
            let found_count = self.count().await;
            if found_count == PAGES {
                return began.elapsed();
            }
            assert!(began.elapsed() < within, "{found_count} of {PAGES}: {:#?}", self.faults());
            for n in 0..PAGES {
                self.put(n).await;
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn faults(&self) -> Vec<(String, Vec<(ShardFault, u64)>)> {
        let faults = |report: shard::ShardReport| {
            let all = report.read_faults.iter().chain(report.write_faults.iter()).chain(report.bus_faults.iter());
            (report.endpoint, all.filter(|(_, count)| *count > 0).collect())
        };
        self.view.store().shard_reports().map(faults).collect()
    }
}

fn cluster_settings(nodes: &[&Server]) -> RemoteConfig {
    let mut remote = remote_config(&[]);
    let cluster = nodes.iter().map(|node| node.url()).collect();
    remote.regions.insert(REGION, RegionConfig { slots: 16, endpoints: Vec::new(), cluster, fallback: Vec::new() });
    RemoteConfig { deadline: Duration::from_millis(200), ..remote }
}

fn redis_cli(arguments: &[&str]) -> String {
    let output = Command::new("redis-cli").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A temporary directory, deleted at the end of the test.
struct TempDir(PathBuf);

impl TempDir {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("tidegate-moving-{}-{}", std::process::id(), free_port()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _gone_already = std::fs::remove_dir_all(&self.0);
    }
}

/// Three masters, then their three replicas.
fn start_cluster(dir: &TempDir) -> Vec<Server> {
    let nodes: Vec<Server> = (0..6)
        .map(|n| {
            let file = dir.file(&format!("nodes{n}.conf"));
            let port = loop {
                // The port of the cluster bus is 10,000 higher.
                let port = free_port();
                if std::net::TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
                    break port;
                }
            };
            let options =
                ["--cluster-enabled", "yes", "--cluster-config-file", &file, "--cluster-node-timeout", "1000"];
            let fast = ["--cluster-replica-validity-factor", "0", "--repl-diskless-sync-delay", "0"];
            Server::start_on(port, &[&options[..], &fast].concat())
        })
        .collect();
    let addresses: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
    let mut create = vec!["--cluster", "create"];
    create.extend(addresses.iter().map(String::as_str));
    create.extend(["--cluster-replicas", "1", "--cluster-yes"]);
    redis_cli(&create);
    nodes
}

#[tokio::test]
async fn cluster_uses_all_masters_and_survives_the_loss_of_one() {
    let dir = TempDir::new();
    let mut nodes = start_cluster(&dir);
    let node = Node::start(cluster_settings(&[&nodes[0], &nodes[4]]));
    let began = node.wait_all_found(20 * SECOND).await;
    let keys: Vec<usize> =
        nodes[..3].iter().map(|node| redis::cmd("DBSIZE").query(&mut node.connect()).unwrap()).collect();
    assert!(keys.iter().all(|&keys| keys > 2), "{keys:?}");
    let endpoints: Vec<_> = node.view.store().shard_reports().map(|shard| shard.endpoint).collect();
    assert_eq!(endpoints.len(), 3, "{endpoints:?}");

    // The test kills the master that carries the bus; the loss of any other has fewer effects.
    let bus: usize =
        redis_cli(&["-p", &nodes[0].port().to_string(), "cluster", "keyslot", "bus"]).trim().parse().unwrap();
    let lost = bus * 3 / 16_384;
    let purge = Purge { scope: PurgeScope::Everything, is_soft: false };
    let before = node.bus.purge(&[purge], None, 3 * SECOND).await.unwrap();
    assert_eq!((before.acknowledged_nodes.len(), before.unreachable_servers.len()), (1, 0), "{before:?}");
    node.wait_all_found(5 * SECOND).await;
    drop(nodes.remove(lost));
    let (mut slowest, killed) = (Duration::ZERO, Instant::now());
    let mut found_during_outage = 0;
    while killed.elapsed() < SECOND {
        for n in 0..PAGES {
            let began = Instant::now();
            found_during_outage += usize::from(matches!(node.get(n).await, RemoteLookup::Found(_)));
            slowest = slowest.max(began.elapsed());
        }
        sleep(Duration::from_millis(10)).await;
    }
    assert!(found_during_outage > 0, "entries of the other masters stay readable");
    assert!(slowest < Duration::from_millis(400), "{slowest:?}");
    let back = node.wait_all_found(20 * SECOND).await;
    println!(
        "cluster: all found after {began:?}; after the loss of a master: slowest lookup {slowest:?}, all found again after {:?}",
        SECOND + back
    );
    let after = node.bus.purge(&[purge], None, 3 * SECOND).await.unwrap();
    assert_eq!((after.acknowledged_nodes.len(), after.unreachable_servers.len()), (1, 0), "{after:?}");
    assert_eq!(node.count().await, 0);
}

#[tokio::test]
async fn migrated_slots_are_followed() {
    let dir = TempDir::new();
    let nodes = start_cluster(&dir);
    let node = Node::start(cluster_settings(&[&nodes[0]]));
    node.wait_all_found(20 * SECOND).await;
    let id = |server: &Server| redis_cli(&["-p", &server.port().to_string(), "cluster", "myid"]).trim().to_owned();
    let (from, to, port) = (id(&nodes[0]), id(&nodes[1]), nodes[0].port().to_string());
    let any = format!("127.0.0.1:{port}");
    let slots = ["--cluster-slots", "5461", "--cluster-yes"];
    redis_cli(&[&["--cluster", "reshard", &any, "--cluster-from", &from, "--cluster-to", &to][..], &slots].concat());
    let began = Instant::now();
    node.wait_all_found(10 * SECOND).await;
    let moved =
        node.faults().iter().flat_map(|(_, faults)| faults.clone()).any(|(fault, _)| fault == ShardFault::Moved);
    println!("resharded a master: followed after {:?}, MOVED received: {moved}", began.elapsed());
    assert_eq!(node.view.store().shard_reports().count(), 2);
}

/// While a slot migrates, its old server redirects requests for keys that have been migrated.
#[tokio::test]
async fn delete_during_slot_migration_reaches_the_new_master() {
    let dir = TempDir::new();
    let nodes = start_cluster(&dir);
    let node = Node::start(cluster_settings(&[&nodes[0]]));
    node.wait_all_found(20 * SECOND).await;
    let mut key = KeyBuilder::new();
    let key = key.part(b"7").key();
    let placement = node.view.store().placement(&REGION, &key);
    let command = |at: &Server, words: &[&str]| redis_cli(&[&["-p", &at.port().to_string()][..], words].concat());
    let id = |at: &Server| command(at, &["cluster", "myid"]).trim().to_owned();
    let hash_slot = command(&nodes[0], &["cluster", "keyslot", &format!("{{default:{}}}", placement.slot)]);
    let hash_slot = hash_slot.trim();
    let from =
        nodes.iter().find(|node| placement.endpoint.as_ref().is_some_and(|at| node.url().ends_with(at))).unwrap();
    let to = nodes[..3].iter().find(|node| node.port() != from.port()).unwrap();
    command(to, &["cluster", "setslot", hash_slot, "importing", &id(from)]);
    command(from, &["cluster", "setslot", hash_slot, "migrating", &id(to)]);
    let keys = command(from, &["cluster", "getkeysinslot", hash_slot, "100"]);
    let keys: Vec<_> = keys.split_whitespace().collect();
    let port = to.port().to_string();
    command(from, &[&["migrate", "127.0.0.1", &port, "", "0", "5000", "keys"][..], &keys].concat());
    let held = || {
        let keys = command(to, &["cluster", "getkeysinslot", hash_slot, "100"]);
        keys.split_whitespace().filter(|key| !key.contains(":tombstone:")).count()
    };
    let before = held();

    node.view.remove(&REGION, &key);
    assert!(!node.view.flush(SECOND / 5).await, "the delete cannot complete yet");
    assert_eq!(
        (held(), node.view.store().shard_reports().map(|shard| shard.counts.dropped_deletes).sum()),
        (before, 0)
    );
    for at in [to, from] {
        command(at, &["cluster", "setslot", hash_slot, "node", &id(to)]);
    }
    let began = Instant::now();
    while held() == before {
        assert!(began.elapsed() < 5 * SECOND, "the entry still exists: {:#?}", node.faults());
        // The deleted entry is not read meanwhile either.
        assert!(!matches!(node.get(7).await, RemoteLookup::Found(_)));
        node.view.run_maintenance();
        sleep(SECOND / 10).await;
    }
    println!("deleted {:?} after its slot had migrated", began.elapsed());
    assert!(node.view.flush(SECOND).await && matches!(node.get(7).await, RemoteLookup::Absent));
    assert_eq!(held(), before - 1, "the other migrated entries remain");
}

#[tokio::test]
async fn sentinel_failover_is_followed() {
    let dir = TempDir::new();
    let first = Server::start();
    let second = Server::start_on(
        free_port(),
        &["--replicaof", "127.0.0.1", &first.port().to_string(), "--repl-diskless-sync-delay", "0"],
    );
    let port = free_port();
    let file = dir.file("sentinel.conf");
    let text = format!(
        "sentinel monitor orders 127.0.0.1 {} 1\nsentinel down-after-milliseconds orders 500\nsentinel failover-timeout orders 2000\n",
        first.port()
    );
    std::fs::write(&file, text).unwrap();
    let _sentinel = Server::sentinel(port, &file);
    let url = format!("redis+sentinel://127.0.0.1:{port}/orders");
    let mut remote = remote_config(&[("default", &[url])]);
    remote.deadline = Duration::from_millis(200);
    let node = Node::start(remote);
    node.wait_all_found(10 * SECOND).await;
    // The Sentinel must know the replica before it can promote it.
    let began = Instant::now();
    while !redis_cli(&["-p", &port.to_string(), "sentinel", "replicas", "orders"]).contains(&second.port().to_string())
    {
        assert!(began.elapsed() < 20 * SECOND, "the Sentinel does not discover the replica");
        sleep(Duration::from_millis(100)).await;
    }
    first.stop();
    let back = node.wait_all_found(20 * SECOND).await;
    println!("sentinel: all found again {back:?} after the master was killed");
    let report = node.view.store().shard_reports().next().unwrap();
    assert_eq!(report.endpoint, "orders", "the label is the master's name");
    drop(second);
}

/// Certificates of a test authority, for 127.0.0.1.
fn certificates(dir: &TempDir) -> (String, String, String) {
    let (key, cert, ca, ca_key) = (dir.file("key.pem"), dir.file("cert.pem"), dir.file("ca.pem"), dir.file("ca.key"));
    let run = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&[
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-keyout",
        &ca_key,
        "-out",
        &ca,
    ]);
    let request = dir.file("request.pem");
    run(&[
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=redis",
        "-keyout",
        &key,
        "-out",
        &request,
    ]);
    let names = dir.file("names");
    std::fs::write(&names, "subjectAltName=IP:127.0.0.1\n").unwrap();
    run(&[
        "x509",
        "-req",
        "-in",
        &request,
        "-CA",
        &ca,
        "-CAkey",
        &ca_key,
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        &names,
        "-out",
        &cert,
    ]);
    (ca, cert, key)
}

#[tokio::test]
async fn mutual_tls_is_verified_by_both_sides() {
    let _another_test_has = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let dir = TempDir::new();
    let (ca, cert, key) = certificates(&dir);
    let (plain, port) = (free_port(), free_port().to_string());
    let _server = Server::start_on(
        plain,
        &["--tls-port", &port, "--tls-cert-file", &cert, "--tls-key-file", &key, "--tls-ca-cert-file", &ca],
    );
    let read = |path: &str| std::fs::read(path).unwrap();
    let remote = |tls: RedisTlsConfig| RemoteConfig {
        tls,
        ..remote_config(&[("default", &[format!("rediss://127.0.0.1:{port}")])])
    };
    let node = Node::start(remote(RedisTlsConfig { ca: Some(read(&ca)), client: Some((read(&cert), read(&key))) }));
    node.wait_all_found(10 * SECOND).await;
    for tls in [RedisTlsConfig::default(), RedisTlsConfig { ca: Some(read(&ca)), client: None }] {
        let client_without_certificate = Node::start(remote(tls));
        sleep(SECOND / 2).await;
        assert_eq!(client_without_certificate.count().await, 0);
    }
}

#[tokio::test]
async fn documented_acl_suffices_and_missing_permissions_are_reported() {
    let server = Server::start();
    let rules = documented_acl();
    let full = server.create_user("tidegate", rules);
    let without_tracking = server.create_user("reader", &rules.replace("+client|tracking", ""));
    let node = Node::start(remote_config(&[("default", &[full])]));
    node.wait_all_found(10 * SECOND).await;
    let everything = Purge { scope: PurgeScope::Everything, is_soft: false };
    assert!(node.bus.purge(&[everything], None, SECOND).await.unwrap().unreachable_servers.is_empty());
    assert!(
        node.bus
            .publish_override(OverrideRequest { name: "x", text: "text", duration: 60 * SECOND, node: None }, SECOND)
            .await
            .unwrap()
            .unreachable_servers
            .is_empty()
    );
    node.view.remove(&REGION, &KeyBuilder::new().part(b"1").key());
    assert!(node.view.flush(SECOND).await);
    let denied =
        |node: &Node| node.faults().iter().any(|(_, all)| all.iter().any(|(fault, _)| *fault == ShardFault::Denied));
    assert!(!denied(&node), "{:?}", node.faults());

    let reader = Node::start(remote_config(&[("default", &[without_tracking])]));
    sleep(SECOND / 2).await;
    assert!(matches!(reader.get(0).await, RemoteLookup::Unavailable(ShardFault::Unsubscribed)));
    assert!(denied(&reader), "{:?}", reader.faults());
    let _region_of_its_own = region("default");
}
