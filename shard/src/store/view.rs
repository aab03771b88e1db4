//! Owns one thread's way to the store: its table, its connections, and the order in which tiers are asked and told.
//!
//! Refuses to wait: only `remote` does, at most for the deadline, and `flush`, which no request calls.
//! Invariant: what is removed here is gone locally, on every thread, when `remove` returns.

use super::{Place, Store, Whither};
use crate::entry::{Entry, Judgement, Meta, Since};
use crate::hot::Tally;
use crate::key::{KeyRef, Region, Tag};
use crate::local::{Moment, Near, NearCopy};
use crate::remote::{Common, Fault, Found, Job, Wanted, Wire};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// Slots that one `tidy` looks at: the whole table in 16 of them.
const TIDY: usize = 1024;

/// Between two attempts to have removed what a cluster moves: each refusal makes it be asked who holds what.
const STRAYS_EVERY: Duration = Duration::from_secs(1);

/// The same at the end, when little time is left.
const STRAYS_AGAIN: Duration = Duration::from_millis(100);

/// A thread's way to the store. `Send`, so that it can be made before its thread runs; not `Sync`. Its connections belong to the
/// runtime that first uses them.
pub struct View<M> {
    store: Arc<Store<M>>,
    near: RefCell<Near<M>>,
    tally: RefCell<Tally>,
    /// One for each of the store's shards.
    wires: Box<[Wire<M>]>,
    strays_sent: Cell<Instant>,
    /// The region of the last insertion, which is nearly always that of the next.
    region: Cell<Option<Region>>,
}

/// Which tier answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tier {
    /// This thread's table.
    Near,
    /// The cache that all threads share; also what was just inserted.
    Memory,
    /// Redis.
    Remote,
}

/// How far an insertion goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    Local,
    /// Local at once, and in the background to the region's shard.
    Shared,
}

/// What the remote tier knows.
#[derive(Debug)]
pub enum Remote<M> {
    /// It is now in the local tier too.
    Found(Hit<M>),
    Absent,
    Unavailable(Fault),
    /// The region has no remote tier.
    Off,
}

/// An entry held by this thread. Cheap to clone and to hold for as long as a response takes.
#[derive(Debug)]
pub struct Hit<M> {
    copy: Arc<NearCopy<M>>,
    tier: Tier,
}

impl<M> Hit<M> {
    pub fn tier(&self) -> Tier {
        self.tier
    }

    /// The body by this thread's own handle: cloning it touches no counter that other cores write. It keeps the entry.
    /// (The field `body` of the entry is the same bytes by the handle that all threads share.)
    pub fn body(&self) -> &Bytes {
        self.copy.body()
    }

    /// The entry itself, for another thread.
    pub fn share(&self) -> Arc<Entry<M>> {
        self.copy.share()
    }
}

impl<M> Clone for Hit<M> {
    fn clone(&self) -> Self {
        Self { copy: self.copy.clone(), tier: self.tier }
    }
}

impl<M> Deref for Hit<M> {
    type Target = Entry<M>;

    fn deref(&self) -> &Entry<M> {
        self.copy.entry()
    }
}

impl<M: Meta> View<M> {
    pub(super) fn new(store: Arc<Store<M>>) -> Self {
        store.local.joined();
        let wires = store.remote.iter().flat_map(|remote| {
            let common = Common {
                seal: remote.seal.clone(),
                epochs: store.epochs.clone(),
                removals: remote.removals.clone(),
                deadline: remote.deadline,
            };
            remote.shards.iter().map(move |shard| Wire::new(shard.clone(), common.clone()))
        });
        let tally = RefCell::new(store.hot.tally());
        Self {
            wires: wires.collect(),
            near: RefCell::new(Near::new()),
            tally,
            store,
            strays_sent: Cell::new(Instant::now()),
            region: Cell::new(None),
        }
    }

    /// The entry, if this process has it and its time is not over. Whether it is fresh is for the caller to see.
    pub fn local(&self, key: &KeyRef<'_>) -> Option<Hit<M>> {
        self.local_at(key, Instant::now())
    }

    /// `local` for a caller that has read the clock.
    pub fn local_at(&self, key: &KeyRef<'_>, now: Instant) -> Option<Hit<M>> {
        self.tally.borrow_mut().see(key);
        let moment = self.store.local.moment(now);
        let found = self.near.borrow_mut().get(key, moment);
        if let Some(found) = found {
            if found.touch {
                self.store.local.touch(key);
            }
            return Some(Hit { copy: found.copy, tier: Tier::Near });
        }
        let copy = self.store.local.get(key, moment)?;
        self.keep_near(key, &copy, moment);
        Some(Hit { copy, tier: Tier::Memory })
    }

    /// Asks the region's shard, or for what is hot one that has a copy, within the deadline. Cancel safe: an answer that comes
    /// later is dropped.
    pub async fn remote(&self, region: &Region, key: &KeyRef<'_>) -> Remote<M> {
        let Some(place) = self.store.place(region, key) else { return Remote::Off };
        let since = self.since();
        let found = if self.store.hot.has(key.hash()) {
            self.fetch_hot(region, &place).await
        } else {
            let wire = &self.wires[place.shard];
            let fetched = wire.fetch(&place.name, &place.digest, Wanted::Entry, self.deadline()).await;
            fetched.map(|found| found.map(|found| found.entry))
        };
        match found {
            Ok(Some(entry)) => {
                let (copy, _) = self.hold(key, entry.begun(since).at_home(Some(place.home())));
                Remote::Found(Hit { copy, tier: Tier::Remote })
            }
            Ok(None) => Remote::Absent,
            Err(fault) => Remote::Unavailable(fault),
        }
    }

    /// One of the copies where they are known, else the entry itself; a copy that is missing or of another edition is replaced.
    async fn fetch_hot(&self, region: &Region, place: &Place) -> Result<Option<Entry<M>>, Fault> {
        let (copies, began) = (&self.store.copies, Instant::now());
        let choice = copies.choose(&place.digest, self.tally.borrow_mut().random());
        if let Some(choice) = &choice {
            let spot = choice.spot();
            // A server that is late leaves time for the other.
            let wanted = Wanted::Copy { edition: choice.edition };
            let found = self.wires[spot.shard].fetch(&spot.name, &place.digest, wanted, self.deadline() / 2).await;
            match found {
                // It may have been changed, and that told, while this copy was on its way.
                Ok(Some(found)) if copies.is_known(choice) => {
                    return Ok(Some(found.entry));
                }
                // Slots of a cluster have moved, and copies are to follow.
                Err(Fault::Moved) => copies.forget(place.digest.beginning()),
                Ok(_) | Err(_) => {}
            }
        }
        let (changes, left) = (copies.changes(&place.digest), self.deadline().saturating_sub(began.elapsed()));
        let fetched = self.wires[place.shard].fetch(&place.name, &place.digest, Wanted::Entry, left);
        let Some(found) = fetched.await? else {
            return Ok(None);
        };
        let Found { entry, envelope } = found;
        copies.learn(&place.digest, entry.edition(), changes, || self.store.spots(region, place));
        if let Some(choice) = choice.filter(|choice| choice.edition == entry.edition() && copies.claim(choice)) {
            let (spot, until) = (choice.spot(), entry.until());
            self.wires[spot.shard].send(Job::Copy { name: spot.name.clone(), envelope, until });
        }
        Ok(Some(entry))
    }

    fn deadline(&self) -> Duration {
        self.store.remote.as_ref().map_or(Duration::ZERO, |remote| remote.deadline)
    }

    /// To be taken before a fill's request goes out, and given to its entry (`Entry::begun`): the entry is then not stored if
    /// its key, whichever it turns out to be, is removed, or one of its tags purged, while the fill runs.
    pub fn since(&self) -> Since {
        self.store.epochs.since()
    }

    /// Whether neither the key was removed nor one of `tags` purged since then.
    pub fn still(&self, key: &KeyRef<'_>, tags: &[Tag], since: Since) -> bool {
        let epochs = &self.store.epochs;
        epochs.is_kept(key.hash(), since) && epochs.judge(tags, since.generation()) == Judgement::Sound
    }

    /// Stores an entry. The hit serves the response at hand even where nothing could be stored.
    pub fn insert(&self, region: &Region, key: &KeyRef<'_>, entry: Entry<M>, reach: Reach) -> Hit<M> {
        // What is stored for a region that nobody remembers could not be removed again.
        if self.region.get() != Some(*region) {
            if !self.store.name(region) {
                let copy = NearCopy::new(key, Arc::new(entry));
                return Hit { copy, tier: Tier::Memory };
            }
            self.region.set(Some(*region));
        }
        let place = if reach == Reach::Shared { self.store.place(region, key) } else { None };
        let (copy, stored) = self.hold(key, entry.at_home(place.as_ref().map(Place::home)));
        if stored && let Some(place) = place {
            let (name, digest, hash) = (place.name, place.digest, key.hash());
            self.wires[place.shard].send(Job::Store { name, digest, hash, entry: copy.share(), is_late: false });
        }
        Hit { copy, tier: Tier::Memory }
    }

    /// Removes an entry from the local tier now, and from the region's shard in the background.
    pub fn remove(&self, region: &Region, key: &KeyRef<'_>) {
        // The shard first: a read that began before is not kept once the local tier has counted the removal, and a later one
        // finds that a removal waits.
        if let Some(place) = self.store.place(region, key) {
            let beginning = place.digest.beginning();
            self.wires[place.shard].send(Job::Remove { name: place.name, astray: None });
            self.store.copies.forget(beginning);
        }
        self.store.local.remove(key);
    }

    /// Lets go of a bounded piece of what no longer counts, and sends on what was to be removed from a place that has moved. To be called about once a second by the thread's own clock, and again
    /// soon while it says that there is more.
    pub fn tidy(&self) -> bool {
        let moment = self.store.local.moment(Instant::now());
        self.near.borrow_mut().sweep(TIDY, moment);
        self.store.hot.report(&mut self.tally.borrow_mut(), moment.now);
        if moment.now.duration_since(self.strays_sent.get()) >= STRAYS_EVERY {
            self.send_strays();
        }
        self.store.local.settle(moment)
    }

    /// Waits until everything queued for shards is carried out or dropped; false if that took longer than `within`. For the end
    /// of a process. Cancel safe.
    pub async fn flush(&self, within: Duration) -> bool {
        let all = async {
            loop {
                for wire in &self.wires {
                    wire.drained().await;
                }
                if !self.send_strays() {
                    return;
                }
                sleep(STRAYS_AGAIN).await;
            }
        };
        timeout(within, all).await.is_ok()
    }

    /// Sends removals that a server of a cluster has sent elsewhere to where they belong; says whether there were any.
    fn send_strays(&self) -> bool {
        self.strays_sent.set(Instant::now());
        let mut had_some = false;
        for (shard, wire) in self.wires.iter().enumerate() {
            for stray in wire.take_strays() {
                had_some = true;
                match self.store.follow(shard, &stray.name) {
                    Whither::To(home) => {
                        let (name, astray) = (stray.name.clone(), Some(stray.since));
                        // Begun there before it is ended here, so that nobody reads the entry between the two.
                        self.wires[home].send(Job::Remove { name, astray });
                        wire.resent(&stray.name, true);
                    }
                    Whither::Unknown => wire.put_back(stray),
                    Whither::Nowhere => wire.resent(&stray.name, false),
                }
            }
        }
        had_some
    }

    pub fn store(&self) -> &Arc<Store<M>> {
        &self.store
    }

    fn hold(&self, key: &KeyRef<'_>, entry: Entry<M>) -> (Arc<NearCopy<M>>, bool) {
        let now = Instant::now();
        let inserted = self.store.local.insert(key, entry, now);
        if inserted.stored {
            self.keep_near(key, &inserted.copy, self.store.local.moment(now));
        }
        (inserted.copy, inserted.stored)
    }

    fn keep_near(&self, key: &KeyRef<'_>, copy: &Arc<NearCopy<M>>, moment: Moment<'_>) {
        self.near.borrow_mut().put(key, copy.clone(), moment, self.store.local.near_bytes());
    }
}

impl<M> Drop for View<M> {
    fn drop(&mut self) {
        self.store.hot.left(self.tally.get_mut());
        self.store.local.left();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::tests::Note;
    use crate::entry::{Purge, Scope};
    use crate::key::KeyBuilder;
    use crate::store::LocalSettings;

    const EVERYTHING: Purge = Purge { scope: Scope::Everything, is_soft: false };

    fn store() -> Arc<Store<Note>> {
        Store::new(LocalSettings { memory_bytes: 1 << 20, hot_rate: 1_000 }, None).unwrap()
    }

    fn entry(text: &str) -> Entry<Note> {
        Entry::new(Note(text.into()), Bytes::from_static(b"body"), Duration::from_secs(60), Instant::now())
    }

    fn large(text: &str) -> Entry<Note> {
        Entry::new(Note(text.into()), vec![0; 10_000].into(), Duration::from_secs(60), Instant::now())
    }

    #[test]
    fn a_removal_on_one_thread_is_seen_by_all() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("a"), Reach::Shared);
        assert_eq!(two.local(&key).map(|hit| hit.tier()), Some(Tier::Memory));
        assert_eq!(two.local(&key).map(|hit| hit.tier()), Some(Tier::Near));
        one.remove(&Region::DEFAULT, &key);
        assert!(one.local(&key).is_none() && two.local(&key).is_none());
    }

    #[test]
    fn a_replaced_entry_is_not_served_by_another_threads_table() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("old"), Reach::Local);
        let held = two.local(&key).unwrap();
        one.insert(&Region::DEFAULT, &key, entry("new"), Reach::Local);
        assert_eq!(two.local(&key).unwrap().meta.0, "new");
        assert_eq!((held.meta.0.as_str(), held.body().as_ref()), ("old", &b"body"[..]));
    }

    #[test]
    fn a_purge_reaches_every_table_and_fills_under_way() {
        let (mut builder, store) = (KeyBuilder::new(), store());
        let key = builder.part(b"/").key();
        let (one, two) = (store.view(), store.view());
        one.insert(&Region::DEFAULT, &key, entry("a"), Reach::Local);
        two.local(&key).unwrap();
        let since = two.since();
        store.purge_here(EVERYTHING);
        assert!(one.local(&key).is_none() && two.local(&key).is_none());
        let served = two.insert(&Region::DEFAULT, &key, entry("late").begun(since), Reach::Local);
        assert_eq!(served.meta.0, "late");
        assert!(one.local(&key).is_none() && two.local(&key).is_none());
    }

    /// The shared cache pushes out what is rarely asked for, and hears of a part of the hits in threads' tables.
    #[test]
    fn an_entry_in_use_on_one_thread_is_not_pushed_out_by_colder_ones() {
        let (store, now) = (store(), Instant::now());
        let (one, two) = (store.view(), store.view());
        let mut hot = KeyBuilder::new();
        let hot = hot.part(b"hot").key();
        one.insert(&Region::DEFAULT, &hot, large("hot"), Reach::Local);
        for n in 0..40u32 {
            for _ in 0..20 {
                assert!(one.local_at(&hot, now + n * Duration::from_secs(1)).is_some(), "pushed out after {n} s");
            }
            for m in 0..50 {
                let mut cold = KeyBuilder::new();
                let cold = cold.part(&(n * 50 + m).to_le_bytes()).key();
                two.insert(&Region::DEFAULT, &cold, large("cold"), Reach::Local);
                store.local.touch(&cold);
            }
            store.local.settle(store.local.moment(Instant::now()));
        }
    }

    #[test]
    fn a_view_may_move_to_its_thread() {
        let view = store().view();
        std::thread::spawn(move || view.tidy()).join().unwrap();
    }
}
