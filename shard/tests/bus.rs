//! What the nodes of a fleet hear of each other over real servers: purges, changes, and what was said while one was away.

mod server;

#[path = "server/proxy.rs"]
mod proxy;

use proxy::Proxy;
use server::{Page, Server, free_port, settings};
use shard::{Bus, Doubt, Entry, KeyBuilder, LocalSettings, Purge, Reach, Region, Remote, Scope, Store, Tag, View};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SECOND: Duration = Duration::from_secs(1);
const REGION: Region = Region::DEFAULT;

/// A gateway's worth of store.
struct Node {
    bus: Arc<Bus<Page>>,
    store: Arc<Store<Page>>,
    view: View<Page>,
    _tasks: JoinSet<()>,
}

impl Node {
    fn start(name: &str, endpoints: &[String]) -> Self {
        let remote = settings(&[("default", endpoints)]);
        let store = Store::new(LocalSettings { memory_bytes: 1 << 20, hot_rate: 1_000 }, Some(remote)).unwrap();
        let bus = Bus::new(&store, name);
        Self { _tasks: bus.run(), view: store.view(), bus, store }
    }

    async fn ready(name: &str, endpoints: &[String]) -> Self {
        let node = Self::start(name, endpoints);
        until("it is in sight of all servers", || node.is_watching()).await;
        node
    }

    fn is_watching(&self) -> bool {
        self.store.shards().all(|shard| shard.is_watched)
    }

    /// Stores a page that bears its own name as a tag.
    async fn put(&self, name: &str) {
        let mut key = KeyBuilder::new();
        let page = Page { text: name.into(), tags: vec![Tag::named(name.as_bytes())] };
        let entry =
            Entry::new(page, name.as_bytes().to_vec().into(), 60 * SECOND, Instant::now()).begun(self.view.since());
        self.view.insert(&REGION, &key.part(name.as_bytes()).key(), entry, Reach::Shared);
        assert!(self.view.flush(SECOND).await);
    }

    fn holds(&self, name: &str) -> bool {
        let mut key = KeyBuilder::new();
        let hit = self.view.local(&key.part(name.as_bytes()).key());
        hit.is_some_and(|hit| hit.doubt(Instant::now()) != Some(Doubt::Unwatched))
    }

    /// Whether the shard has it. A connection that was cut has to be made anew first.
    async fn finds(&self, name: &str) -> bool {
        let began = Instant::now();
        loop {
            let mut key = KeyBuilder::new();
            match self.view.remote(&REGION, &key.part(name.as_bytes()).key()).await {
                Remote::Found(_) => return true,
                Remote::Absent => return false,
                other => assert!(began.elapsed() < 2 * SECOND, "{other:?}"),
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Finds it and holds it: not yet while the news of its being stored are still on their way.
    async fn fetches(&self, name: &str) {
        let began = Instant::now();
        while !(self.finds(name).await && self.holds(name)) {
            assert!(began.elapsed() < 2 * SECOND, "{name} is not held");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn purge(&self, name: &str) -> shard::Confirmation {
        self.bus.purge(&[hard(name)], None, 3 * SECOND).await.unwrap()
    }
}

fn hard(name: &str) -> Purge {
    Purge { scope: Scope::Tag(Tag::named(name.as_bytes())), is_soft: false }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < 10 * SECOND, "in vain: {what}");
        sleep(Duration::from_millis(5)).await;
    }
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("n{n}")).collect()
}

#[tokio::test]
async fn of_twenty_nodes_with_one_cut_off_each_confirms_or_is_missing_and_hears_it_later() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let mut nodes = Vec::new();
    for (n, name) in names(20).iter().enumerate() {
        let url = if n == 19 { proxy.url() } else { server.url() };
        nodes.push(Node::ready(name, &[url]).await);
    }
    let all: Vec<String> = (0..10).map(|n| format!("page{n}")).collect();
    for page in &all {
        nodes[0].put(page).await;
        for node in &nodes[1..] {
            node.fetches(page).await;
        }
    }
    let began = Instant::now();
    let whole = nodes[3].purge("page0").await;
    println!("20 nodes confirmed after {:?}", began.elapsed());
    assert_eq!((whole.nodes.len(), whole.missing.len(), whole.untold.len()), (20, 0, 0), "{whole:?}");
    assert!(nodes.iter().all(|node| !node.holds("page0")));
    assert!(!nodes[5].finds("page0").await, "what was stored before is not found again");

    proxy.cut();
    let cut = Instant::now();
    for (n, page) in all.iter().enumerate().skip(1) {
        let part = nodes[n].purge(page).await;
        assert_eq!(part.nodes.len() + part.missing.len(), 20, "{part:?}");
        assert_eq!(part.missing.iter().map(String::as_str).collect::<Vec<_>>(), ["n19"]);
        assert!(nodes[..19].iter().all(|node| !node.holds(page)) && nodes[19].holds(page));
    }
    sleep((5 * SECOND).saturating_sub(cut.elapsed())).await;
    proxy.mend();
    let mended = Instant::now();
    until("the one that was cut off hears it", || !all.iter().any(|page| nodes[19].holds(page))).await;
    println!("what was missed for {:?} was heard {:?} after the cut was mended", mended - cut, mended.elapsed());
    until("it is in sight again", || nodes[19].is_watching()).await;
    assert!(!nodes[19].finds("page7").await);
    let again = nodes[19].purge("page1").await;
    assert_eq!((again.nodes.len(), again.missing.len()), (20, 0), "{again:?}");
}

#[tokio::test]
async fn a_node_that_starts_does_not_find_what_was_purged_before() {
    let server = Server::start();
    let one = Node::ready("one", &[server.url()]).await;
    for page in ["a", "b"] {
        one.put(page).await;
    }
    one.purge("a").await;
    let two = Node::ready("two", &[server.url()]).await;
    assert!(!two.finds("a").await && two.finds("b").await);
    // What is stored after the purge is found.
    one.put("a").await;
    let three = Node::ready("three", &[server.url()]).await;
    assert!(three.finds("a").await && two.finds("a").await);
}

#[tokio::test]
async fn a_stream_that_was_cut_meanwhile_is_made_up_for() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let (one, two) = (Node::ready("one", &[server.url()]).await, Node::ready("two", &[proxy.url()]).await);
    one.put("a").await;
    two.fetches("a").await;
    proxy.cut();
    one.purge("a").await;
    let _trimmed: () =
        redis::cmd("XTRIM").arg("tg:{bus}:events").arg("MAXLEN").arg(0).query(&mut server.spy()).unwrap();
    proxy.mend();
    until("it is in sight again", || two.is_watching()).await;
    assert!(!two.holds("a") && !two.finds("a").await);
}

#[tokio::test]
async fn a_server_that_was_away_is_told_what_it_missed() {
    let (first, second) = (Server::start(), Server::start());
    let endpoints = [first.url(), second.url()];
    let one = Node::ready("one", &endpoints).await;
    for n in 0..8 {
        one.put(&format!("page{n}")).await;
    }
    second.signal("STOP");
    let mut untold = Vec::new();
    for n in 0..8 {
        untold.extend(one.purge(&format!("page{n}")).await.untold);
    }
    assert!(untold.iter().all(|label| second.url().ends_with(label.as_str())) && !untold.is_empty(), "{untold:?}");
    second.signal("CONT");
    let scores =
        |server: &Server| -> usize { redis::cmd("ZCARD").arg("tg:{bus}:tags").query(&mut server.spy()).unwrap() };
    until("the second server is told", || scores(&second) == 8).await;
    // Without the first server, the second alone says what was purged.
    let port = first.stop();
    let two = Node::start("two", &endpoints);
    until("the second server is in sight", || two.store.shards().any(|shard| shard.is_watched)).await;
    let mut answered = 0;
    for n in 0..8 {
        let mut key = KeyBuilder::new();
        match two.view.remote(&REGION, &key.part(format!("page{n}").as_bytes()).key()).await {
            Remote::Absent => answered += 1,
            Remote::Unavailable(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert!(answered > 0);
    drop(Server::start_on(port, &[]));
}

#[tokio::test]
async fn without_any_server_a_purge_holds_here_and_is_told_when_one_comes() {
    let port = free_port();
    let url = [format!("redis://127.0.0.1:{port}")];
    let one = Node::start("one", &url);
    one.put("a").await;
    let alone = one.bus.purge(&[hard("a")], None, SECOND).await.unwrap();
    assert_eq!((alone.nodes.len(), alone.untold.len(), one.holds("a")), (1, 1, false), "{alone:?}");
    assert_eq!(one.bus.report().pending, 1);
    let server = Server::start_on(port, &[]);
    until("it was told", || one.bus.report().pending == 0).await;
    let told: usize = redis::cmd("XLEN").arg("tg:{bus}:events").query(&mut server.spy()).unwrap();
    assert_eq!(told, 1);
    // What was purged twice while nobody answered is not purged for ever.
    one.put("a").await;
    let two = Node::ready("two", &url).await;
    assert!(two.finds("a").await);
}

#[tokio::test]
async fn a_change_by_another_node_ends_what_is_held_and_ones_own_does_not() {
    let server = Server::start();
    let (one, two) = (Node::ready("one", &[server.url()]).await, Node::ready("two", &[server.url()]).await);
    one.put("a").await;
    two.fetches("a").await;
    sleep(Duration::from_millis(100)).await;
    assert!(one.holds("a") && two.holds("a"), "nobody else has changed it");
    // Stored anew by the other.
    two.put("a").await;
    until("the change is told", || !one.holds("a")).await;
    assert!(two.holds("a") && one.finds("a").await);
    // Removed by the other.
    let mut key = KeyBuilder::new();
    let key = key.part(b"a").key();
    one.view.remove(&REGION, &key);
    until("the removal is told", || !two.holds("a")).await;
    // Its own removal does not spoil what is fetched after it.
    for n in 0..20 {
        one.view.remove(&REGION, &key);
        one.put("a").await;
        sleep(Duration::from_millis(5)).await;
        assert!(one.holds("a"), "round {n}");
    }
}

#[tokio::test]
async fn a_fill_whose_entry_another_node_changes_meanwhile_is_not_stored() {
    let server = Server::start();
    let (one, two) = (Node::ready("one", &[server.url()]).await, Node::ready("two", &[server.url()]).await);
    let since = one.view.since();
    two.put("a").await;
    until("the change is told", || one.bus.report().changes > 0).await;
    let mut key = KeyBuilder::new();
    let key = key.part(b"a").key();
    let page = Page { text: "old".into(), tags: Vec::new() };
    let entry = Entry::new(page, "old".into(), 60 * SECOND, Instant::now()).begun(since);
    let served = one.view.insert(&REGION, &key, entry, Reach::Shared);
    assert_eq!(served.meta.text, "old");
    assert!(one.view.local(&key).is_none());
    let Remote::Found(hit) = one.view.remote(&REGION, &key).await else { panic!("nothing") };
    assert_eq!(hit.meta.text, "a");
}

#[tokio::test]
async fn what_is_held_of_a_server_that_was_lost_is_in_doubt_once_it_is_back() {
    let server = Server::start();
    let proxy = Proxy::to(server.port()).await;
    let (one, two) = (Node::ready("one", &[server.url()]).await, Node::ready("two", &[proxy.url()]).await);
    for page in ["kept", "changed"] {
        one.put(page).await;
        two.fetches(page).await;
    }
    proxy.cut();
    one.put("changed").await;
    assert!(two.holds("kept") && two.holds("changed"), "while nobody can say, what is held answers");
    proxy.mend();
    until("it is in sight again", || two.is_watching()).await;
    assert!(!two.holds("kept") && !two.holds("changed"));
    // What is found again is beyond doubt.
    two.fetches("kept").await;
}

#[tokio::test]
async fn a_word_to_one_node_is_for_that_node() {
    let server = Server::start();
    let (one, two) = (Node::ready("one", &[server.url()]).await, Node::ready("two", &[server.url()]).await);
    one.put("a").await;
    two.fetches("a").await;
    let said = one.bus.purge(&[hard("a")], Some("two"), 3 * SECOND).await.unwrap();
    assert_eq!(
        (said.nodes.iter().map(String::as_str).collect::<Vec<_>>(), said.missing.len()),
        (vec!["two"], 0),
        "{said:?}"
    );
    assert!(one.holds("a") && !two.holds("a"));
    assert!(two.finds("a").await, "the server still has it");
    let nobody = one.bus.purge(&[hard("a")], Some("three"), SECOND).await.unwrap();
    assert_eq!(nobody.missing.iter().collect::<Vec<_>>(), ["three"]);
}

/// What one node stored while the server was away, another may have removed meanwhile: neither has heard of the other.
#[tokio::test]
async fn what_was_stored_during_an_outage_does_not_come_back_over_a_removal() {
    let server = Server::start();
    let (one, other) = (Node::ready("a", &[server.url()]).await, Node::ready("b", &[server.url()]).await);
    let port = server.stop();
    until("both have lost it", || !one.is_watching() && !other.is_watching()).await;
    one.put("x").await;
    let mut key = KeyBuilder::new();
    other.view.remove(&REGION, &key.part(b"x").key());
    let _server = Server::start_on(port, &[]);
    until("both see it again", || one.is_watching() && other.is_watching()).await;
    sleep(SECOND).await;
    assert!(!other.finds("x").await, "it was removed");
    // What is begun now is told as ever.
    one.put("y").await;
    assert!(other.finds("y").await);
}

// What is said beside purges.

const HOUR: Duration = Duration::from_secs(3_600);

impl Node {
    async fn say(&self, name: &str, text: &str, lasting: Duration, to: Option<&str>) -> shard::Confirmation {
        self.bus.say(name, text, lasting, to, 3 * SECOND).await.unwrap()
    }

    /// What holds, as `name=text`.
    fn notices(&self) -> Vec<String> {
        self.bus.notices().into_iter().map(|notice| format!("{}={}", notice.name, notice.text)).collect()
    }
}

#[tokio::test]
async fn a_notice_holds_on_all_nodes_or_on_one_until_its_time_is_over_or_another_follows() {
    let servers = [Server::start(), Server::start()];
    let urls = servers.each_ref().map(Server::url);
    let (a, b) = (Node::ready("a", &urls).await, Node::ready("b", &urls).await);
    let told = a.say("x", "one", HOUR, None).await;
    assert_eq!((told.nodes.len(), told.missing.len(), told.untold.len()), (2, 0, 0), "{told:?}");
    assert_eq!((a.notices(), b.notices()), (vec!["x=one".to_owned()], vec!["x=one".to_owned()]));
    let told = b.say("x", "two of b", HOUR, Some("b")).await;
    assert_eq!((told.nodes.len(), told.missing.len()), (1, 0), "{told:?}");
    let told = b.say("y", "for a", SECOND, Some("a")).await;
    assert_eq!((told.nodes.into_iter().collect::<Vec<_>>(), told.missing.len()), (vec!["a".to_owned()], 0));
    assert_eq!((a.notices(), b.notices()), (vec!["x=one".into(), "y=for a".into()], vec!["x=two of b".to_owned()]));
    // Who starts later hears what is up for all, and what is over is over for him as well.
    let late = Node::ready("late", &urls).await;
    assert_eq!(late.notices(), ["x=one"]);
    until("its time is over", || a.notices() == ["x=one"]).await;
    let told = late.say("x", "three", HOUR, None).await;
    assert_eq!((told.nodes.len(), told.missing.len()), (3, 0), "{told:?}");
    for node in [&a, &b, &late] {
        assert_eq!(node.notices(), ["x=three"]);
    }
    let left: Vec<String> = redis::cmd("HKEYS").arg("tg:{bus}:notices").query(&mut servers[0].spy()).unwrap();
    assert_eq!(left, ["x"], "what was said to one is not kept");
}

#[tokio::test]
async fn a_notice_reaches_a_node_that_was_cut_off_and_needs_no_more_than_one_server() {
    let (server, other) = (Server::start(), Server::start());
    let proxy = Proxy::to(server.port()).await;
    let urls = [server.url(), other.url()];
    let near = Node::ready("near", &urls).await;
    let far = Node::ready("far", &[proxy.url()]).await;
    proxy.cut();
    other.stop();
    until("a server is out of sight", || !near.is_watching()).await;
    let told = near.bus.say("x", "meanwhile", HOUR, None, SECOND).await.unwrap();
    let list = |names: std::collections::BTreeSet<String>| names.into_iter().collect::<Vec<_>>();
    assert_eq!((list(told.nodes), list(told.missing)), (vec!["near".to_owned()], vec!["far".to_owned()]));
    assert_eq!(told.untold.len(), 1);
    assert!(far.notices().is_empty());
    proxy.mend();
    until("it has heard it", || far.notices() == ["x=meanwhile"]).await;
}

#[tokio::test]
async fn without_servers_a_notice_holds_here() {
    let store = Store::<Page>::new(LocalSettings { memory_bytes: 1 << 20, hot_rate: 1_000 }, None).unwrap();
    let bus = Bus::new(&store, "alone");
    let told = bus.say("x", "one", HOUR, None, SECOND).await.unwrap();
    assert_eq!((told.nodes.len(), told.missing.len(), told.untold.len()), (1, 0, 0));
    assert_eq!(bus.notices()[0].text, "one");
    bus.notices_changed().await;
    let told = bus.say("x", "two", HOUR, Some("elsewhere"), SECOND).await.unwrap();
    assert_eq!((told.nodes.len(), told.missing.len()), (0, 1));
    assert_eq!(bus.notices()[0].text, "one");
    assert!(bus.say("x", &"x".repeat(1_000), HOUR, None, SECOND).await.is_err());
}

#[tokio::test]
async fn a_notice_that_no_server_could_be_told_is_told_when_one_is_back_and_again_where_it_was_lost() {
    let server = Server::start();
    let url = [server.url()];
    let (a, b) = (Node::ready("a", &url).await, Node::ready("b", &url).await);
    let port = server.stop();
    until("it is out of sight", || !a.is_watching() && !b.is_watching()).await;
    let told = a.say("x", "meanwhile", HOUR, None).await;
    assert_eq!((told.nodes.len(), told.missing.len(), told.untold.len()), (1, 0, 1), "{told:?}");
    let server = Server::start_on(port, &[]);
    until("the other hears it", || b.notices() == ["x=meanwhile"]).await;
    // What was over is the last word too: an older one does not come back.
    b.say("x", "for a moment", Duration::from_millis(1), None).await;
    until("it is over", || a.notices().is_empty() && b.notices().is_empty()).await;
    let _emptied: () = redis::cmd("FLUSHALL").query(&mut server.spy()).unwrap();
    let kept = || -> Vec<String> { redis::cmd("HVALS").arg("tg:{bus}:notices").query(&mut server.spy()).unwrap() };
    until("it is told again", || kept().iter().any(|kept| kept.ends_with("for a moment"))).await;
    assert!(Node::ready("late", &url).await.notices().is_empty());
}
