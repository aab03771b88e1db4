//! Owns the bus's way to one server: a connection that is told of every change of our keys, and over which the bus speaks.
//!
//! A line comes up in this order: it asks to be told of changes, hears what was said while it was away, tells what the server
//! has missed, gives up what is held of the server's entries if it was up before, and only then lets its shards be read.
//!
//! Refuses to stay up where changes may have been lost: a queue that overflows ends the line.
//! Invariant: while a line is up, a change on its server reaches this process within `BEAT` or the line goes down.

use super::event::{self, Event, NOTICE, Position, Said, What};
use super::notice::NOTICES_MAX;
use super::script::{
    BEAT, BUS, BUS_TAG, EVENTS, EVENTS_MAX, FORGET_MS, NODES, NOTICES, SAY, STATE, TAGS, TAGS_KEPT, TELL,
};
use crate::entry::Purge;
use crate::placement::{PREFIX, named};
use crate::remote::{Cluster, Fault, Site, Spot};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Pipeline, PushInfo, PushKind, Value, from_redis_value_ref};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::timeout;

/// How often a node gives a sign of life, and looks whether a push was lost on the way.
pub(super) const BEAT_EVERY: Duration = Duration::from_secs(1);

/// What one command may take; nobody waits for it but the bus.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// Covers a name lookup, a handshake across an ocean and a password.
const CONNECT_WITHIN: Duration = Duration::from_secs(2);

/// Changes that wait to be looked at: more than a server makes in a second.
const CHANGES_MAX: usize = 65_536;

/// How much of the stream, or of the tags, is read at a time.
const PIECE: usize = 1_000;

/// In seconds since 1970. Dates in HTTP end with the year 9999, and clocks go on from what they were told.
const YEAR_9000: u64 = 221_845_392_000;

/// What a server pushed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// The bus's own keys changed.
    Bus,
    /// An entry changed: the beginning of its digest, and its key.
    Entry(u64, Vec<u8>),
    /// Everything may have changed, or the connection ended.
    Lost,
}

/// A connection that is told of changes.
pub(super) struct Connected {
    pub(super) way: Way,
    pub(super) changes: mpsc::Receiver<Change>,
    /// Set where a change found no room.
    pub(super) overflowed: Arc<AtomicBool>,
}

/// A connection to speak over; clones share it.
#[derive(Clone)]
pub(super) struct Way(MultiplexedConnection);

/// What a server answered to a purge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) number: u64,
    /// Where it stands in the stream; `None` where the server knew it already.
    pub(super) at: Option<Position>,
}

/// A node of the fleet, as a server knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sign {
    pub(super) position: Position,
    pub(super) seen_ms: u64,
}

/// One server.
pub(super) struct Line {
    /// The shards that are on it.
    pub(super) shards: Vec<usize>,
    pub(super) site: Arc<Site>,
    label: Option<String>,
    /// The cluster that it is a place of, and which.
    cluster: Option<(Arc<Cluster>, usize)>,
    heard: Mutex<Heard>,
}

/// What was heard on a line, and the way while it is up.
#[derive(Default)]
struct Heard {
    way: Option<Way>,
    /// Up to here the stream was read; `None` before the first time.
    position: Option<Position>,
    /// The highest number of a purge on this server.
    number: u64,
}

impl Line {
    /// To a server that has several shards.
    pub(super) fn to_server(label: String, shards: Vec<usize>, site: Arc<Site>) -> Self {
        Self { shards, site, label: Some(label), cluster: None, heard: Mutex::default() }
    }

    /// To a place in a cluster. One place of each carries the bus; all tell of changes.
    pub(super) fn to_place(shard: usize, cluster: Arc<Cluster>, place: usize) -> Self {
        let site = cluster.sites[place].clone();
        Self { shards: vec![shard], site, label: None, cluster: Some((cluster, place)), heard: Mutex::default() }
    }

    /// As an operator knows it.
    pub(super) fn label(&self) -> String {
        let now = || self.site.now().map(|spot| spot.label.clone());
        self.label.clone().or_else(now).unwrap_or_else(|| "cluster".to_owned())
    }

    /// Whether the bus runs over it.
    pub(super) fn carries(&self) -> bool {
        self.cluster.as_ref().is_none_or(|(cluster, place)| cluster.place_of_tag(BUS_TAG) == Some(*place))
    }

    /// Whether it is a place in a cluster whose purges nobody has told yet.
    pub(super) fn is_in_the_dark(&self) -> bool {
        self.cluster.as_ref().is_some_and(|(cluster, _)| !cluster.is_heard.load(Ordering::Acquire))
    }

    pub(super) fn is_heard(&self) {
        if let Some((cluster, _)) = &self.cluster {
            cluster.is_heard.store(true, Ordering::Release);
        }
    }

    /// Connects, and has the server tell of changes from now on.
    pub(super) async fn connect(&self, spot: &Spot) -> Result<Connected, Fault> {
        let (sender, changes) = mpsc::channel(CHANGES_MAX);
        let overflowed = Arc::new(AtomicBool::new(false));
        let noted = overflowed.clone();
        let push = move |push: PushInfo| {
            let mut told = Ok(());
            each_change(push, |change| {
                if sender.try_send(change).is_err() {
                    noted.store(true, Ordering::Release);
                    told = Err(());
                }
            });
            told
        };
        let config =
            AsyncConnectionConfig::new().set_connection_timeout(None).set_response_timeout(None).set_push_sender(push);
        let attempt = spot.line.get_multiplexed_async_connection_with_config(&config);
        let connection = match timeout(CONNECT_WITHIN, attempt).await {
            Ok(connected) => connected.map_err(|error| Fault::of_connecting(&error))?,
            Err(_) => return Err(Fault::Timeout),
        };
        let way = Way(connection);
        let mut track = Pipeline::with_capacity(1);
        track.cmd("CLIENT").arg("TRACKING").arg("ON").arg("BCAST").arg("PREFIX").arg(PREFIX);
        way.ask(&track).await?;
        Ok(Connected { way, changes, overflowed })
    }

    /// The way, while the line is up and the bus runs over it.
    pub(super) fn way(&self) -> Option<Way> {
        if self.carries() { self.heard().way.clone() } else { None }
    }

    pub(super) fn goes_up(&self, way: Way) {
        self.heard().way = Some(way);
    }

    pub(super) fn goes_down(&self) {
        self.heard().way = None;
    }

    pub(super) fn number(&self) -> u64 {
        self.heard().number
    }

    pub(super) fn position(&self) -> Option<Position> {
        self.heard().position
    }

    /// Reads what the stream has to say since it was last read, in order, and where it was cut or lost meanwhile, what was purged.
    /// `floor` is told the number below which purges were forgotten.
    pub(super) async fn catch_up(&self, way: &Way, mut hear: impl FnMut(News)) -> Result<(), Fault> {
        let (first, last) = way.ends().await?;
        let known = self.position();
        let is_whole =
            known.is_some_and(|known| known == last || first.is_some_and(|first| first <= known && known < last));
        if is_whole {
            return self.read(way, &mut hear).await;
        }
        // What is said from here on is read from the stream; what was said before, from where the last word of each is kept. Only when that
        // has been heard does the stream count as read so far.
        for said in way.notices().await? {
            hear(News::Said(said));
        }
        let (number, floor) = way.state().await?;
        hear(News::Floor(floor));
        let since = if known.is_some() { self.number().min(number) } else { 0 };
        let purged = way.purged_since(since).await?;
        self.heard().position = Some(last);
        for (purge, number) in purged {
            self.note_number(number);
            hear(News::Purged(purge, number));
        }
        self.note_number(number);
        self.read(way, &mut hear).await
    }

    /// Reads the stream to its end.
    pub(super) async fn read(&self, way: &Way, hear: &mut impl FnMut(News)) -> Result<(), Fault> {
        loop {
            let position = self.position().unwrap_or_default();
            let mut read = Pipeline::with_capacity(1);
            read.cmd("XRANGE").arg(EVENTS).arg(format!("({position}")).arg("+").arg("COUNT").arg(PIECE);
            let reply = way.ask(&read).await?.pop().ok_or(Fault::Protocol)?;
            let entries = event::entries(&reply).ok_or(Fault::Protocol)?;
            let is_end = entries.len() < PIECE;
            for (position, event) in entries {
                if let Some(event) = event {
                    if let What::Purge { number, .. } = event.what {
                        self.note_number(number);
                    }
                    hear(News::Event(event));
                }
                self.heard().position = Some(position);
            }
            if is_end {
                return Ok(());
            }
        }
    }

    pub(super) fn note_number(&self, number: u64) {
        let mut heard = self.heard();
        heard.number = heard.number.max(number);
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is heard of a server.
pub(super) enum News {
    Event(Event),
    /// A purge that is not in the stream any more.
    Purged(Purge, u64),
    /// Purges up to this number were forgotten.
    Floor(u64),
    /// A notice that may not be in the stream any more.
    Said(Said),
}

impl Way {
    /// Sends commands and waits for their replies; an error among them is a fault.
    pub(super) async fn ask(&self, commands: &Pipeline) -> Result<Vec<Value>, Fault> {
        let mut connection = self.0.clone();
        let exchange = connection.send_packed_commands(commands, 0, commands.len());
        let replies = match timeout(ASK_WITHIN, exchange).await {
            Ok(replies) => replies.map_err(|error| Fault::of(&error))?,
            Err(_) => return Err(Fault::Timeout),
        };
        match replies.iter().find_map(Fault::in_reply) {
            Some(fault) => Err(fault),
            None => Ok(replies),
        }
    }

    /// Tells a purge: under `number`, or under one that the server gives, above `known`.
    pub(super) async fn tell(
        &self,
        purge: Purge,
        number: Option<u64>,
        known: u64,
        to: &str,
        from: &str,
    ) -> Result<Told, Fault> {
        let mut tell = Pipeline::with_capacity(1);
        tell.cmd("EVAL").arg(TELL).arg(3).arg(EVENTS).arg(STATE).arg(TAGS);
        tell.arg(number.unwrap_or(0)).arg(known).arg(event::told(purge)).arg(to).arg(from);
        tell.arg(EVENTS_MAX).arg(TAGS_KEPT);
        let reply = self.ask(&tell).await?.pop().ok_or(Fault::Protocol)?;
        let [number, id]: [String; 2] = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        Ok(Told { number: number.parse().map_err(|_| Fault::Protocol)?, at: id.parse().ok() })
    }

    /// Says a notice that holds for so long; where it stands in the stream, unless the server knew it.
    pub(super) async fn say(
        &self,
        (name, text, version): (&str, &str, u64),
        lasting: Duration,
        to: &str,
        from: &str,
    ) -> Result<Option<Position>, Fault> {
        let mut say = Pipeline::with_capacity(1);
        say.cmd("EVAL").arg(SAY).arg(2).arg(EVENTS).arg(NOTICES);
        say.arg(name).arg(version).arg(text).arg(lasting.as_millis() as u64).arg(to).arg(from);
        say.arg(NOTICE).arg(EVENTS_MAX).arg(NOTICES_MAX);
        let reply = self.ask(&say).await?.pop().ok_or(Fault::Protocol)?;
        let id: String = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        Ok(id.parse().ok())
    }

    /// Every notice to all nodes that the server keeps and that can be read. They keep nobody from hearing the rest.
    async fn notices(&self) -> Result<Vec<Said>, Fault> {
        let mut ask = Pipeline::with_capacity(1);
        ask.cmd("HGETALL").arg(NOTICES);
        let reply = match self.ask(&ask).await {
            // Something else has that name.
            Err(Fault::Refused) => return Ok(Vec::new()),
            reply => reply?.pop().ok_or(Fault::Protocol)?,
        };
        let pairs: Vec<(Value, Value)> = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        let text = |value: &Value| from_redis_value_ref::<String>(value).ok();
        Ok(pairs.iter().filter_map(|(name, kept)| event::said(text(name)?, &text(kept)?)).collect())
    }

    /// A sign of life of `member`, who has read up to `position` and knows `number` from this server.
    pub(super) async fn beat(&self, member: &str, position: Position, number: u64) -> Result<(), Fault> {
        let mut beat = Pipeline::with_capacity(1);
        beat.cmd("EVAL").arg(BEAT).arg(4).arg(NODES).arg(STATE).arg(TAGS).arg(EVENTS);
        beat.arg(member).arg(position.to_string()).arg(FORGET_MS).arg(number);
        self.ask(&beat).await.map(drop)
    }

    /// What time it is at the server, in milliseconds since 1970; also to hear whether it answers.
    pub(super) async fn time(&self) -> Result<u64, Fault> {
        let mut time = Pipeline::with_capacity(1);
        time.cmd("TIME");
        let reply = self.ask(&time).await?.pop().ok_or(Fault::Protocol)?;
        let [seconds, micros]: [String; 2] = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| Fault::Protocol);
        match (number(&seconds)?, number(&micros)?) {
            (seconds @ ..YEAR_9000, micros @ ..1_000_000) => Ok(seconds * 1_000 + micros / 1_000),
            // No clock says so.
            _ => Err(Fault::Protocol),
        }
    }

    pub(super) async fn leave(&self, members: &[String]) -> Result<(), Fault> {
        let mut leave = Pipeline::with_capacity(1);
        leave.cmd("HDEL").arg(NODES).arg(members);
        self.ask(&leave).await.map(drop)
    }

    /// Every member that gave a sign of life lately.
    pub(super) async fn signs(&self) -> Result<HashMap<String, Sign>, Fault> {
        let mut ask = Pipeline::with_capacity(1);
        ask.cmd("HGETALL").arg(NODES);
        let reply = self.ask(&ask).await?.pop().ok_or(Fault::Protocol)?;
        let all: HashMap<String, String> = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        let sign = |text: &str| {
            let (position, seen) = text.split_once(' ')?;
            Some(Sign { position: position.parse().ok()?, seen_ms: seen.parse().ok()? })
        };
        Ok(all.into_iter().filter_map(|(member, text)| Some((member, sign(&text)?))).collect())
    }

    /// What of `purges` the server does not know, or knows by a lower number.
    pub(super) async fn missing(&self, purges: &[(u64, Purge)]) -> Result<Vec<(u64, Purge)>, Fault> {
        let mut missing = Vec::new();
        for piece in purges.chunks(PIECE) {
            let mut ask = Pipeline::with_capacity(piece.len());
            for (_, purge) in piece {
                ask.cmd("ZSCORE").arg(TAGS).arg(event::told(*purge));
            }
            for ((number, purge), reply) in piece.iter().zip(self.ask(&ask).await?) {
                let known: Option<f64> = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
                if known.is_none_or(|known| (known as u64) < *number) {
                    missing.push((*number, *purge));
                }
            }
        }
        Ok(missing)
    }

    /// Has everything with a tag that is older than `number` taken for purged by whoever asks this server later.
    pub(super) async fn raise_floor(&self, number: u64) -> Result<(), Fault> {
        let mut raise = Pipeline::with_capacity(1);
        raise.cmd("HSET").arg(STATE).arg("floor").arg(number);
        self.ask(&raise).await.map(drop)
    }

    /// The beginnings of entries, as many bytes of each as tell their editions.
    pub(super) async fn heads(&self, keys: &[Vec<u8>], bytes: usize) -> Result<Vec<Value>, Fault> {
        let mut ask = Pipeline::with_capacity(keys.len());
        for key in keys {
            ask.cmd("GETRANGE").arg(key).arg(0).arg(bytes - 1);
        }
        self.ask(&ask).await
    }

    /// The first place in the stream, and the last that was ever given in it.
    async fn ends(&self) -> Result<(Option<Position>, Position), Fault> {
        let mut ends = Pipeline::with_capacity(2);
        ends.cmd("XRANGE").arg(EVENTS).arg("-").arg("+").arg("COUNT").arg(1);
        ends.cmd("EXISTS").arg(EVENTS);
        let replies = self.ask(&ends).await?;
        let first = replies.first().and_then(event::entries).ok_or(Fault::Protocol)?;
        let first = first.first().map(|(position, _)| *position);
        if replies.get(1) == Some(&Value::Int(0)) {
            return Ok((None, Position::default()));
        }
        // A stream that was cut to nothing still knows.
        let mut info = Pipeline::with_capacity(1);
        info.cmd("XINFO").arg("STREAM").arg(EVENTS);
        let reply = self.ask(&info).await?.pop().ok_or(Fault::Protocol)?;
        let info: HashMap<String, Value> = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        let last = info.get("last-generated-id").and_then(|id| from_redis_value_ref::<String>(id).ok());
        Ok((first, last.and_then(|id| id.parse().ok()).ok_or(Fault::Protocol)?))
    }

    /// The highest number given, and the last of those that were forgotten.
    async fn state(&self) -> Result<(u64, u64), Fault> {
        let mut ask = Pipeline::with_capacity(1);
        ask.cmd("HMGET").arg(STATE).arg("last").arg("floor");
        let reply = self.ask(&ask).await?.pop().ok_or(Fault::Protocol)?;
        let [last, floor]: [Option<u64>; 2] = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
        Ok((last.unwrap_or_default(), floor.unwrap_or_default()))
    }

    /// What was purged after `number`, in order of the numbers.
    async fn purged_since(&self, number: u64) -> Result<Vec<(Purge, u64)>, Fault> {
        let mut all = Vec::new();
        loop {
            let mut ask = Pipeline::with_capacity(1);
            ask.cmd("ZRANGEBYSCORE").arg(TAGS).arg(format!("({number}")).arg("+inf").arg("WITHSCORES");
            ask.arg("LIMIT").arg(all.len()).arg(PIECE);
            let reply = self.ask(&ask).await?.pop().ok_or(Fault::Protocol)?;
            let piece: Vec<(String, f64)> = from_redis_value_ref(&reply).map_err(|_| Fault::Protocol)?;
            let is_end = piece.len() < PIECE;
            // A purge that a later release tells otherwise still has its place in the count.
            all.extend(piece.into_iter().map(|(what, number)| (event::understood(&what), number as u64)));
            if is_end {
                return Ok(all.into_iter().filter_map(|(purge, number)| Some((purge?, number))).collect());
            }
        }
    }
}

/// Takes a push apart.
fn each_change(push: PushInfo, mut tell: impl FnMut(Change)) {
    match push.kind {
        PushKind::Disconnection => tell(Change::Lost),
        PushKind::Invalidate => match push.data.into_iter().next() {
            Some(Value::Array(keys)) => keys.into_iter().filter_map(change).for_each(tell),
            // The server was emptied.
            _ => tell(Change::Lost),
        },
        _ => {}
    }
}

/// What the change of a key means; `None` for keys that look like ours and are not.
fn change(key: Value) -> Option<Change> {
    let Value::BulkString(key) = key else { return None };
    if key.starts_with(BUS.as_bytes()) {
        return Some(Change::Bus);
    }
    named(&key).map(|name| Change::Entry(name, key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{KeyBuilder, Region};
    use crate::placement::{Slot, redis_key};

    fn changes(kind: PushKind, data: Vec<Value>) -> Vec<Change> {
        let mut changes = Vec::new();
        each_change(PushInfo { kind, data }, |change| changes.push(change));
        changes
    }

    #[test]
    fn a_push_tells_which_entries_changed() {
        let mut key = KeyBuilder::new();
        let key = key.part(b"/a").key();
        let digest = key.digest(&Region::DEFAULT);
        let name = redis_key(&Region::DEFAULT, Slot::of(&key, 16), &digest);
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let keys = Value::Array(vec![text(&name), text(NODES), text("tg:{x}:"), text("tg:{x}:zzzzzzzzzzzzzzzz")]);
        assert_eq!(
            changes(PushKind::Invalidate, vec![keys]),
            [Change::Entry(digest.beginning(), name.into_bytes()), Change::Bus]
        );
        assert_eq!(changes(PushKind::Invalidate, vec![Value::Nil]), [Change::Lost]);
        assert_eq!(changes(PushKind::Disconnection, Vec::new()), [Change::Lost]);
        assert_eq!(changes(PushKind::Message, Vec::new()), []);
    }
}
