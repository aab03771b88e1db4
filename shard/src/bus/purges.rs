//! Owns how purges go over the bus: numbered by the first server that answers, told to all under that number, and told later to those
//! that were away.
//!
//! Refuses more purges than `PENDING_MAX` while no server answers.
//! Invariant: purges of this node are numbered in the order in which they were given.

use super::event::Position;
use super::line::Line;
use super::{ALL, BEAT_EVERY, Bus, Confirmation};
use crate::entry::{Meta, Purge, UNNUMBERED};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout_at};

/// Purges that wait for a server.
const PENDING_MAX: usize = 1_024;

/// Purges that are remembered for servers that were away.
const RECENT_MAX: usize = 4_096;

/// How long the nodes of a fleet leave it to each other to tell a server what it has missed.
const COMPENSATE_WITHIN: Duration = Duration::from_millis(500);

/// The number of a purge that ends what one node holds, and nothing at the servers.
pub(super) const HERE: u64 = 0;

#[derive(Default)]
pub(super) struct Talk {
    pub(super) pending: VecDeque<Pending>,
    /// The last purges of the fleet, whoever told them.
    recent: VecDeque<(u64, Purge)>,
    /// How many there were before those.
    forgotten: u64,
    /// Those that came late, to be told again under a higher number.
    pub(super) late: Vec<(u64, Purge)>,
}

pub(super) struct Pending {
    purge: Purge,
    to: String,
    done: oneshot::Sender<Announced>,
}

/// A purge that has a number.
#[derive(Clone, Debug)]
struct Announced {
    /// Where it stands, by line.
    at: Vec<(usize, Position)>,
    untold: Vec<usize>,
}

/// Too many purges wait for a server already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no server answers, and {PENDING_MAX} purges wait for one already")]
pub struct TooMany;

impl<M: Meta> Bus<M> {
    /// Purges here and on every node of the fleet, or on the node `to` alone, and waits up to `within` for what they say.
    ///
    /// # Errors
    /// Nothing was purged.
    pub async fn purge(
        self: &Arc<Self>,
        purges: &[Purge],
        to: Option<&str>,
        within: Duration,
    ) -> Result<Confirmation, TooMany> {
        let deadline = Instant::now() + within;
        let mut announced = Vec::new();
        {
            let mut talk = self.talk();
            if !self.lines.is_empty() && talk.pending.len() + purges.len() > PENDING_MAX {
                return Err(TooMany);
            }
            for &purge in purges {
                match to {
                    None => self.store.epochs().purge(purge, UNNUMBERED),
                    Some(to) if to == self.node => self.store.epochs().purge(purge, HERE),
                    Some(_) => {}
                }
                if !self.lines.is_empty() {
                    let (done, number) = oneshot::channel();
                    talk.pending.push_back(Pending { purge, to: to.unwrap_or(ALL).to_owned(), done });
                    announced.push(number);
                }
            }
        }
        let mut confirmation = Confirmation::default();
        if to.is_none_or(|to| to == self.node) {
            confirmation.nodes.insert(self.node.clone());
        }
        // Announced in a task of its own: a caller that gives up does not leave it half done.
        let bus = self.clone();
        let announcing = tokio::spawn(async move { bus.announce().await });
        let mut places = Vec::new();
        for number in announced {
            match timeout_at(deadline.into(), number).await {
                Ok(Ok(Announced { at, untold })) => {
                    places.extend(at);
                    confirmation.untold.extend(untold.into_iter().map(|line| self.lines[line].label()));
                }
                _ => confirmation.untold.extend(self.carriers().map(Line::label)),
            }
        }
        drop(announcing);
        // Of each line the last place: whoever has read that has read all.
        let mut last: BTreeMap<usize, Position> = BTreeMap::new();
        for (line, at) in places {
            last.entry(line).and_modify(|last| *last = at.max(*last)).or_insert(at);
        }
        self.confirm(&last, to, deadline, &mut confirmation).await;
        Ok(confirmation)
    }

    /// Gives pending purges their numbers and tells every server, as long as one answers.
    pub(super) async fn announce(self: &Arc<Self>) {
        let _turn = self.turn.lock().await;
        loop {
            let next = self.talk().pending.front().map(|pending| (pending.purge, pending.to.clone()));
            let Some((purge, to)) = next else { return };
            let mut number = None;
            let (mut at, mut untold) = (Vec::new(), Vec::new());
            let mut others = JoinSet::new();
            for (index, line) in self.lines.iter().enumerate() {
                let Some(way) = line.way() else {
                    if line.carries() {
                        untold.push(index);
                    }
                    continue;
                };
                let (known, to, from) = (self.store.epochs().number(), to.clone(), self.member.clone());
                let tell = async move { (index, way.tell(purge, number, known, &to, &from).await) };
                if number.is_some() {
                    others.spawn(tell);
                    continue;
                }
                // The first that answers gives the number.
                match tell.await {
                    (_, Ok(told)) => {
                        number = Some(told.number);
                        at.extend(told.at.map(|at| (index, at)));
                    }
                    (_, Err(_)) => untold.push(index),
                }
            }
            for (index, told) in others.join_all().await {
                match told {
                    Ok(told) => at.extend(told.at.map(|at| (index, at))),
                    Err(_) => untold.push(index),
                }
            }
            let Some(number) = number else { return };
            if to == ALL {
                self.store.epochs().numbered(purge, number);
                self.remember(number, purge);
            }
            if let Some(pending) = self.talk().pending.pop_front() {
                let _nobody_waits = pending.done.send(Announced { at, untold });
            }
        }
    }

    /// Tells a server what it has missed, unless another node has.
    pub(super) async fn compensate(self: &Arc<Self>, index: usize, since: u64) {
        let line = &self.lines[index];
        sleep(COMPENSATE_WITHIN.mul_f64((self.seed % 1_000) as f64 / 1_000.0)).await;
        let Some(way) = line.way() else { return };
        let (recent, is_whole) = self.talk().since(since);
        if !is_whole {
            let _tried_again_when_it_is_back = way.raise_floor(self.store.epochs().number()).await;
        }
        if let Ok(missing) = way.missing(&recent).await {
            for (number, purge) in missing {
                let _tried_again_when_it_is_back = way.tell(purge, Some(number), 0, ALL, &self.member).await;
            }
        }
    }

    /// Tells purges that no server took until now, as long as this is not dropped: a full server has room again one day.
    pub(super) async fn tell_what_waits(self: &Arc<Self>) {
        loop {
            self.announce().await;
            sleep(BEAT_EVERY).await;
        }
    }

    pub(super) fn remember(&self, number: u64, purge: Purge) {
        let mut talk = self.talk();
        talk.recent.push_back((number, purge));
        if talk.recent.len() > RECENT_MAX {
            talk.recent.pop_front();
            talk.forgotten += 1;
        }
    }
}

impl Talk {
    /// How many purges there have been.
    pub(super) fn count(&self) -> u64 {
        self.forgotten + self.recent.len() as u64
    }

    /// Those from `since` on, and whether that is all of them.
    fn since(&self, since: u64) -> (Vec<(u64, Purge)>, bool) {
        let skip = usize::try_from(since.saturating_sub(self.forgotten)).unwrap_or(usize::MAX);
        (self.recent.iter().skip(skip).copied().collect(), since >= self.forgotten)
    }
}
