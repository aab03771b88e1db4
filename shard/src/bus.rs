//! Owns what nodes of a fleet tell each other: purges and notices, over every server of every region, and what servers tell of changes.
//!
//! A purge holds here at once. It is then numbered by the first server that answers, told to all of them under that number, and
//! waited for: each node writes down how far it has read. A server that is away is told when it is back, and a purge that no
//! server could be told waits for the first. A node that was cut off reads on from its place in the stream, or asks for the last
//! purges of all tags where the stream is cut; so does one that has just started. What one node tells another reads at its own
//! pace: nobody waits for the slow.
//!
//! A notice (see `notice`) holds here at once too, and is told to every server that can be reached; a node that starts hears those that
//! hold.
//!
//! Entries that servers say were changed are compared with what is held: what this node wrote itself is left alone.
//!
//! Refuses more purges than wait for a server already (see `purges`).
//! Invariant: a shard is read only while its server's purges are known here and its changes are being told.

mod event;
mod line;
mod notice;
mod purges;
mod say;
mod script;

pub use notice::{NoRoom, Notice};
pub use purges::TooMany;

use crate::entry::{EDITION_BYTES, Meta, Seal};
use crate::key::CacheKey;
use crate::remote::Fault;
use crate::store::Store;
use event::{Event, Position, What};
use line::{BEAT_EVERY, Change, Connected, Line, News, Sign, Way};
use notice::Board;
use purges::{HERE, Talk};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Mutex as Turn, Notify};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// Everybody, as an event's addressee.
const ALL: &str = "*";

/// Between attempts to connect; half of it is jitter.
const REST: Duration = Duration::from_millis(200);

/// Beats in a row that a server may leave unanswered.
const MISSED_MAX: u32 = 2;

/// Microseconds by which a purge may come after later ones: there are several servers, and none waits for the others.
const LATE: u64 = 2_000_000;

/// A node that has been silent for longer is not waited for.
const SILENT_MS: u64 = 3_000;

/// How often it is looked whether all have confirmed, beside being told that some have.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Changes looked at in one go.
const PIECE: usize = 256;

/// The bus of a store.
pub struct Bus<M> {
    store: Arc<Store<M>>,
    node: String,
    /// Node and process: two processes may have been given the same name.
    member: String,
    lines: Vec<Line>,
    seed: u64,
    talk: Mutex<Talk>,
    /// One announces at a time, in the order of the purges.
    turn: Turn<()>,
    /// Some node has written down how far it has read.
    read_on: Notify,
    board: Board,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    heard: AtomicU64,
    notices: AtomicU64,
    changes: AtomicU64,
    losses: AtomicU64,
}

/// Figures of a bus since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BusReport {
    /// Purges heard from other nodes.
    pub heard: u64,
    /// Notices likewise.
    pub notices: u64,
    /// Entries that servers said were changed.
    pub changes: u64,
    /// Times that a server was lost sight of.
    pub losses: u64,
    /// Purges that no server could be told yet.
    pub pending: usize,
}

/// What became of purges. They hold on this node in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Confirmation {
    /// Nodes that have confirmed them, this one included.
    pub nodes: BTreeSet<String>,
    /// Nodes that have not: they will as soon as they are reached.
    pub missing: BTreeSet<String>,
    /// Servers that could not be told: they will be as soon as they answer.
    pub untold: BTreeSet<String>,
}

impl<M: Meta> Bus<M> {
    /// The bus for a store's shards, as `node`. From now on they are not read until `run` has heard of their purges.
    pub fn new(store: &Arc<Store<M>>, node: &str) -> Arc<Self> {
        let seed = RandomState::new().hash_one(node);
        store.copies().are_told();
        let mut servers: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        let mut places = Vec::new();
        for (index, shard) in store.shards_here().iter().enumerate() {
            shard.lose_sight();
            match store.cluster_of(index) {
                Some((cluster, place)) => places.push(Line::to_place(index, cluster.clone(), place)),
                None => servers.entry(shard.label().unwrap_or_default()).or_default().push(index),
            }
        }
        let line = |(label, shards): (String, Vec<usize>)| {
            let site = store.shards_here()[shards[0]].site().clone();
            Line::to_server(label, shards, site)
        };
        Arc::new(Self {
            store: store.clone(),
            node: node.to_owned(),
            member: format!("{node}/{seed:016x}"),
            lines: servers.into_iter().map(line).chain(places).collect(),
            seed,
            talk: Mutex::default(),
            turn: Turn::new(()),
            read_on: Notify::new(),
            board: Board::new(seed),
            counts: Counts::default(),
        })
    }

    /// Keeps in step with the fleet. The tasks belong to the runtime that this is called in, and end with the set.
    pub fn run(self: &Arc<Self>) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        for index in 0..self.lines.len() {
            let bus = self.clone();
            tasks.spawn(async move { bus.attend(index).await });
        }
        for scout in self.store.scouts() {
            let scout = scout.clone();
            tasks.spawn(async move { scout.run().await });
        }
        tasks
    }

    /// Says that this node leaves: nobody is to wait for it.
    pub async fn leave(&self) {
        let members = [self.member.clone()];
        for way in self.lines.iter().filter_map(Line::way) {
            let _gone_by_itself_later = way.leave(&members).await;
        }
    }

    pub fn report(&self) -> BusReport {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        BusReport {
            heard: count(&self.counts.heard),
            notices: count(&self.counts.notices),
            changes: count(&self.counts.changes),
            losses: count(&self.counts.losses),
            pending: self.talk().pending.len(),
        }
    }

    /// Waits until every node has read on to one of the places, or is known not to.
    async fn confirm(
        &self,
        places: &BTreeMap<usize, Position>,
        to: Option<&str>,
        deadline: Instant,
        confirmation: &mut Confirmation,
    ) {
        loop {
            let heard = self.read_on.notified();
            let mut silent: HashMap<String, bool> = HashMap::new();
            let mut confirmed = BTreeSet::new();
            for (&line, &at) in places {
                let Some(way) = self.lines[line].way() else { continue };
                let Ok(signs) = way.signs().await else { continue };
                let newest = signs.values().map(|sign| sign.seen_ms).max().unwrap_or_default();
                for (member, Sign { position, seen_ms }) in signs {
                    if member == self.member || to.is_some_and(|to| to != node_of(&member)) {
                        continue;
                    }
                    let is_silent = newest - seen_ms > SILENT_MS;
                    silent.entry(member.clone()).and_modify(|silent| *silent &= is_silent).or_insert(is_silent);
                    if position >= at {
                        confirmed.insert(member);
                    }
                }
            }
            let is_open = |(member, is_silent): (&String, &bool)| !confirmed.contains(member) && !is_silent;
            let is_settled = !silent.iter().any(is_open);
            if is_settled || Instant::now() >= deadline {
                for member in silent.into_keys() {
                    let nodes =
                        if confirmed.contains(&member) { &mut confirmation.nodes } else { &mut confirmation.missing };
                    nodes.insert(node_of(&member).to_owned());
                }
                if let Some(to) = to
                    && !confirmation.nodes.contains(to)
                {
                    confirmation.missing.insert(to.to_owned());
                }
                return;
            }
            tokio::select! {
                () = heard => {}
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    /// Keeps one line up.
    async fn attend(self: &Arc<Self>, index: usize) {
        let line = &self.lines[index];
        // What the fleet has purged since the line went down, by its place among all.
        let mut missed = 0;
        let mut was_up = false;
        loop {
            let spot = line.site.appears().await;
            let carries = line.carries();
            let fault = match line.connect(&spot).await {
                Ok(connected) => match self.comes_up(line, &connected.way, carries, was_up).await {
                    Ok(()) => {
                        was_up = true;
                        let (bus, since) = (self.clone(), missed);
                        let mut helpers = JoinSet::new();
                        helpers.spawn(async move {
                            bus.repeat_notices(index).await;
                            bus.compensate(index, since).await;
                            bus.tell_what_waits().await;
                        });
                        tokio::select! {
                            fault = self.follow(line, connected, carries) => fault,
                            () = line.site.left(&spot) => Fault::Moved,
                        }
                    }
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            line.goes_down();
            line.site.doubt();
            if was_up {
                missed = self.talk().count();
                self.counts.losses.fetch_add(1, Ordering::Relaxed);
            }
            for &shard in &line.shards {
                self.store.shards_here()[shard].lost_sight(fault);
            }
            // After that: who reads until then might learn anew what nobody will tell the end of.
            self.store.copies().forget_all();
            let jitter = RandomState::new().hash_one(self.seed) % 1_000;
            sleep(REST / 2 + REST.mul_f64(jitter as f64 / 2_000.0)).await;
        }
    }

    /// The clock of its server counts for what is stored there.
    async fn ask_the_time(&self, line: &Line, way: &Way) -> Result<(), Fault> {
        let sent = Instant::now();
        let unix_ms = way.time().await?;
        let heard = Instant::now();
        line.shards.iter().for_each(|&shard| self.store.shards_here()[shard].clock().learn(unix_ms, sent, heard));
        Ok(())
    }

    async fn comes_up(&self, line: &Line, way: &Way, carries: bool, was_up: bool) -> Result<(), Fault> {
        self.ask_the_time(line, way).await?;
        if carries {
            line.catch_up(way, |news| self.hear(line, news)).await?;
            self.beat(line, way).await?;
            line.is_heard();
        } else if line.is_in_the_dark() {
            return Err(Fault::Unwatched);
        }
        line.goes_up(way.clone());
        self.store.copies().forget_all();
        for &shard in &line.shards {
            if was_up {
                self.store.epochs().lost_sight(shard);
            }
            self.store.shards_here()[shard].echoes().clear();
            self.store.shards_here()[shard].in_sight();
        }
        Ok(())
    }

    /// Follows a line until it is lost; says why.
    async fn follow(self: &Arc<Self>, line: &Line, mut connected: Connected, carries: bool) -> Fault {
        let way = connected.way.clone();
        let mut beat = tokio::time::interval(BEAT_EVERY);
        let mut unanswered = 0;
        let mut changes = Vec::new();
        loop {
            if connected.overflowed.load(Ordering::Acquire) {
                return Fault::Protocol;
            }
            let done = tokio::select! {
                count = connected.changes.recv_many(&mut changes, PIECE) => {
                    if count == 0 {
                        return Fault::Io;
                    }
                    self.look_at(line, &way, std::mem::take(&mut changes)).await
                }
                _ = beat.tick() => match line.carries() {
                    // It begins anew with what it was not told, or needs no longer be.
                    now if now != carries => Err(Fault::Moved),
                    carries => {
                        let told = self.ask_the_time(line, &way).await;
                        if carries && told.is_ok() { self.read_on(line, &way, true).await } else { told }
                    }
                },
            };
            match done {
                Ok(()) => unanswered = 0,
                Err(Fault::Timeout) if unanswered + 1 < MISSED_MAX => unanswered += 1,
                Err(fault) => return fault,
            }
        }
    }

    /// Writes down how far the stream was read. A server that is full or a replica takes no word from anybody, and still tells of
    /// changes: others then take this node for missing, which it is to them.
    async fn beat(&self, line: &Line, way: &Way) -> Result<(), Fault> {
        let written = way.beat(&self.member, line.position().unwrap_or_default(), line.number()).await;
        match written {
            Err(fault @ (Fault::OutOfMemory | Fault::ReadOnly)) => {
                line.shards.iter().for_each(|&shard| self.store.shards_here()[shard].note(fault));
                Ok(())
            }
            other => other,
        }
    }

    /// Reads what is new in the stream and writes down how far.
    async fn read_on(&self, line: &Line, way: &Way, is_due: bool) -> Result<(), Fault> {
        let before = line.position();
        line.read(way, &mut |news| self.hear(line, news)).await?;
        if is_due || line.position() != before {
            self.beat(line, way).await?;
        }
        let late = std::mem::take(&mut self.talk().late);
        for (number, purge) in late {
            for way in self.lines.iter().filter_map(Line::way) {
                let _missed_by_who_is_away = way.tell(purge, Some(number), 0, ALL, &self.member).await;
            }
        }
        Ok(())
    }

    async fn look_at(&self, line: &Line, way: &Way, changes: Vec<Change>) -> Result<(), Fault> {
        let mut held: Vec<(CacheKey, u64)> = Vec::new();
        let mut keys = Vec::new();
        let mut is_said = false;
        for change in changes {
            match change {
                Change::Lost => return Err(Fault::Io),
                Change::Bus => is_said = true,
                Change::Entry(name, key) => {
                    self.counts.changes.fetch_add(1, Ordering::Relaxed);
                    self.store.copies().forget(name);
                    if line.shards.iter().any(|&shard| self.store.shards_here()[shard].echoes().take(name)) {
                        continue;
                    }
                    // Whatever is held: an older one may be on its way here.
                    self.store.epochs().changed(name);
                    if let Some((cache_key, entry)) = self.store.local().named(name) {
                        held.push((cache_key, entry.edition()));
                        keys.push(key);
                    }
                }
            }
        }
        if !keys.is_empty() {
            let heads = way.heads(&keys, EDITION_BYTES).await?;
            for ((key, edition), head) in held.into_iter().zip(heads) {
                let is_same = match &head {
                    redis::Value::BulkString(head) => Seal::edition(head) == Some(edition),
                    _ => false,
                };
                if !is_same {
                    self.store.local().remove(&key.as_key());
                }
            }
        }
        if is_said && line.carries() {
            self.read_on(line, way, false).await?;
            self.read_on.notify_waiters();
        }
        Ok(())
    }

    fn hear(&self, line: &Line, news: News) {
        let epochs = self.store.epochs();
        match news {
            News::Said(said) => _ = self.heed(line, &said, true),
            News::Floor(number) => epochs.forget_before(number),
            News::Purged(purge, number) => {
                if !epochs.knows(purge, number) {
                    epochs.purge(purge, number);
                }
            }
            News::Event(Event { to, what, from }) if from == self.member || (to != ALL && to != self.node) => {
                if let What::Notice(said) = what {
                    self.board.note(said.version, self.store.wall_time());
                }
            }
            News::Event(Event { to, what: What::Notice(said), .. }) => {
                if self.heed(line, &said, to == ALL) {
                    self.counts.notices.fetch_add(1, Ordering::Relaxed);
                }
            }
            News::Event(Event { to, what: What::Purge { purge, number }, .. }) => {
                if to == ALL && epochs.knows(purge, number) {
                    return;
                }
                self.counts.heard.fetch_add(1, Ordering::Relaxed);
                if to != ALL {
                    return epochs.purge(purge, HERE);
                }
                // One that comes late ends what was stored by those who knew later ones, too; and all are to know.
                let known = epochs.number();
                let is_late = number + LATE < known;
                let number = if is_late { known } else { number };
                epochs.purge(purge, number);
                self.remember(number, purge);
                if is_late {
                    self.talk().late.push((number, purge));
                }
            }
        }
    }

    /// Lines that the bus runs over.
    fn carriers(&self) -> impl Iterator<Item = &Line> {
        self.lines.iter().filter(|line| line.carries())
    }

    fn talk(&self) -> MutexGuard<'_, Talk> {
        self.talk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn node_of(member: &str) -> &str {
    member.rsplit_once('/').map_or(member, |(node, _)| node)
}
