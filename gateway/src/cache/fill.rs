//! Makes many requests for one missing answer into one: a leader fetches, joiners wait for its head and stream the same bytes.
//!
//! A leader that is dropped before it had a head hands over to one joiner, and so does the first that fails. A reader may begin in the middle; while nothing is
//! stored (the body outgrew the limit), what every reader has taken is freed and the slowest reader holds the fetch back.
//! Bounds: joiners per fill, bytes that all fills hold together, bytes held by an overflowing fill; the map holds only fills that a request is leading.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};
use shard::{CacheKey, KeyRef};

use crate::error::Kind;
use crate::http::body::{BodyError, Source};
use crate::http::fields::Fields;
use crate::http::message::Response;

/// Requests that may wait for one fill; more go to the origin by themselves, because their answer is late already.
const JOINERS_MAX: u32 = 20_000;
/// Bytes between the fetch and the slowest reader once a body is too large to store.
const WINDOW: u64 = 1 << 20;
/// Failures after which all who wait fail alike: an origin that is dead is not asked once for each of them.
const FAILURES_MAX: u8 = 2;
/// Locks of the map.
const PARTS: usize = 64;

enum Phase {
    /// No head yet; without a leader, the next joiner that looks becomes it.
    Waiting {
        is_led: bool,
    },
    Open(Arc<Response>),
    /// Nothing to share: look again, or go alone.
    Over,
    Failed(Kind),
}

struct State {
    phase: Phase,
    pieces: VecDeque<Bytes>,
    /// Offset of the first piece held.
    begin: u64,
    end: u64,
    is_complete: bool,
    trailers: Option<Arc<Fields>>,
    is_cut: bool,
    failures: u8,
    overflows: bool,
    /// Offset of each reader by its number; `None` where the number is free.
    readers: Vec<Option<u64>>,
    waiting: u32,
    wakers: Vec<Waker>,
    feeder: Option<Waker>,
}

struct Fill {
    state: Mutex<State>,
}

impl Fill {
    fn new() -> Self {
        Fill {
            state: Mutex::new(State {
                phase: Phase::Waiting { is_led: true },
                pieces: VecDeque::new(),
                begin: 0,
                end: 0,
                is_complete: false,
                trailers: None,
                is_cut: false,
                failures: 0,
                overflows: false,
                readers: Vec::new(),
                waiting: 0,
                wakers: Vec::new(),
                feeder: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn wake(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
    }

    fn sleep(&mut self, cx: &Context<'_>) {
        if !self.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.wakers.push(cx.waker().clone());
        }
    }

    fn has_readers(&self) -> bool {
        self.readers.iter().any(Option::is_some)
    }

    /// Frees what no reader needs, once nothing is stored.
    fn free(&mut self) {
        if !self.overflows {
            return;
        }
        let slowest = self.readers.iter().flatten().copied().min().unwrap_or(self.end);
        while let Some(piece) = self.pieces.front()
            && self.begin + piece.len() as u64 <= slowest
        {
            self.begin += piece.len() as u64;
            self.pieces.pop_front();
        }
        if let Some(feeder) = self.feeder.take() {
            feeder.wake();
        }
    }
}

type Part = HashMap<CacheKey, Arc<Fill>, foldhash::fast::RandomState>;

/// The fills under way in this process.
pub struct Fills {
    parts: Box<[Mutex<Part>]>,
    /// Bytes of bodies on their way into the cache.
    held: Arc<AtomicU64>,
}

/// What one body takes of the bytes that all fills may hold; given back when it is dropped.
pub struct Held {
    all: Arc<AtomicU64>,
    own: u64,
}

impl Held {
    /// Takes more, unless all together would hold more than `most`.
    pub fn grow(&mut self, bytes: u64, most: u64) -> bool {
        self.own += bytes;
        self.all.fetch_add(bytes, Ordering::Relaxed) + bytes <= most
    }

    pub fn give_back(&mut self) {
        self.all.fetch_sub(std::mem::take(&mut self.own), Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.give_back();
    }
}

impl Default for Fills {
    fn default() -> Self {
        Fills { parts: (0..PARTS).map(|_| Mutex::default()).collect(), held: Arc::default() }
    }
}

/// What a request that missed does next.
pub enum Turn {
    Lead(Lead),
    Join(Joiner),
    /// Too many wait already.
    Alone,
}

impl Fills {
    /// Joins the fill of `key`, or leads a new one.
    pub fn enter(self: &Arc<Self>, key: &KeyRef<'_>) -> Turn {
        let mut part = self.part(key.hash());
        let owned = key.to_owned();
        if let Some(fill) = part.get(&owned) {
            let mut state = fill.lock();
            if state.waiting >= JOINERS_MAX {
                return Turn::Alone;
            }
            state.waiting += 1;
            drop(state);
            return Turn::Join(Joiner { fill: Arc::clone(fill), place: Some((Arc::clone(self), owned)) });
        }
        let fill = Arc::new(Fill::new());
        part.insert(owned.clone(), Arc::clone(&fill));
        Turn::Lead(Lead { fill, place: Some((Arc::clone(self), owned)), is_settled: false })
    }

    /// For a body that is about to be kept.
    pub fn hold(&self) -> Held {
        Held { all: Arc::clone(&self.held), own: 0 }
    }

    /// Leads, unless somebody does already: for work that nobody waits for.
    pub fn lead_if_free(self: &Arc<Self>, key: &KeyRef<'_>) -> Option<Lead> {
        match self.enter(key) {
            Turn::Lead(lead) => Some(lead),
            Turn::Join(_) | Turn::Alone => None,
        }
    }

    fn part(&self, hash: u64) -> MutexGuard<'_, Part> {
        let index = usize::try_from(hash >> 32).unwrap_or(0) % PARTS;
        self.parts[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, key: &CacheKey, fill: &Arc<Fill>) {
        let mut part = self.part(key.as_key().hash());
        if part.get(key).is_some_and(|held| Arc::ptr_eq(held, fill)) {
            part.remove(key);
        }
    }
}

/// The right and the duty to fetch. Dropping it before `open`, `release` or `fail` hands the duty to a joiner.
pub struct Lead {
    fill: Arc<Fill>,
    place: Option<(Arc<Fills>, CacheKey)>,
    is_settled: bool,
}

impl Lead {
    /// A fetch that nobody else joins.
    pub fn solo() -> Self {
        Lead { fill: Arc::new(Fill::new()), place: None, is_settled: false }
    }

    /// Whether others may be waiting.
    pub fn is_solo(&self) -> bool {
        self.place.is_none()
    }

    /// Nothing to share: joiners look again for themselves.
    pub fn release(mut self) {
        self.settle(Phase::Over);
    }

    /// The fetch failed: one joiner tries once more; when that fails too, all who wait fail alike.
    pub fn fail(mut self, kind: Kind) {
        let mut state = self.fill.lock();
        state.failures += 1;
        if state.waiting > 0 && state.failures < FAILURES_MAX {
            state.phase = Phase::Waiting { is_led: false };
            state.wake();
            drop(state);
            self.is_settled = true;
            return;
        }
        drop(state);
        self.fail_all(kind);
    }

    /// The fetch failed, and another would too.
    pub fn fail_all(mut self, kind: Kind) {
        self.settle(Phase::Failed(kind));
    }

    /// Shares the head, and makes the leader's own reader. The feed must be completed or dropped.
    pub fn open(mut self, response: Response) -> (Feed, Reader) {
        self.is_settled = true;
        let mut state = self.fill.lock();
        state.phase = Phase::Open(Arc::new(response));
        let reader = Reader::new(&self.fill, &mut state);
        state.wake();
        drop(state);
        let feed = Feed { fill: Arc::clone(&self.fill), place: self.place.take() };
        (feed, reader)
    }

    fn settle(&mut self, phase: Phase) {
        self.is_settled = true;
        if let Some((fills, key)) = self.place.take() {
            fills.leave(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.phase = phase;
        state.wake();
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if self.is_settled {
            return;
        }
        let mut state = self.fill.lock();
        if state.waiting > 0 {
            state.phase = Phase::Waiting { is_led: false };
            state.wake();
            return;
        }
        state.phase = Phase::Over;
        drop(state);
        if let Some((fills, key)) = self.place.take() {
            fills.leave(&key, &self.fill);
        }
    }
}

/// A request that waits for another's fetch.
pub struct Joiner {
    fill: Arc<Fill>,
    place: Option<(Arc<Fills>, CacheKey)>,
}

/// What waiting came to.
pub enum Joined {
    Stream(Arc<Response>, Reader),
    /// Look again; nothing is shared.
    Again,
    Failed(Kind),
    /// The leader left: this request leads now.
    Lead(Lead),
}

impl Joiner {
    /// Waits for the leader's head. Cancel safe.
    pub async fn wait(&mut self) -> Joined {
        poll_fn(|cx| self.poll_wait(cx)).await
    }

    fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<Joined> {
        let mut state = self.fill.lock();
        match &state.phase {
            Phase::Waiting { is_led: true } => {
                state.sleep(cx);
                Poll::Pending
            }
            Phase::Waiting { is_led: false } => {
                state.phase = Phase::Waiting { is_led: true };
                drop(state);
                let place = self.place.clone();
                Poll::Ready(Joined::Lead(Lead { fill: Arc::clone(&self.fill), place, is_settled: false }))
            }
            Phase::Open(response) => {
                let response = Arc::clone(response);
                if state.begin > 0 || state.is_cut {
                    return Poll::Ready(Joined::Again);
                }
                let reader = Reader::new(&self.fill, &mut state);
                Poll::Ready(Joined::Stream(response, reader))
            }
            Phase::Over => Poll::Ready(Joined::Again),
            Phase::Failed(kind) => Poll::Ready(Joined::Failed(*kind)),
        }
    }
}

impl Drop for Joiner {
    fn drop(&mut self) {
        let mut state = self.fill.lock();
        state.waiting = state.waiting.saturating_sub(1);
        // It may have been woken to lead and left instead.
        if matches!(state.phase, Phase::Waiting { is_led: false }) {
            let is_last = state.waiting == 0;
            if is_last {
                state.phase = Phase::Over;
            }
            state.wake();
            drop(state);
            if is_last && let Some((fills, key)) = &self.place {
                fills.leave(key, &self.fill);
            }
        }
    }
}

/// The fetching side of an open fill. Dropping it before `complete` cuts every reader's answer.
pub struct Feed {
    fill: Arc<Fill>,
    place: Option<(Arc<Fills>, CacheKey)>,
}

impl Feed {
    /// Adds bytes for all readers.
    pub fn push(&self, data: &[u8]) {
        let mut state = self.fill.lock();
        state.end += data.len() as u64;
        state.pieces.push_back(Bytes::copy_from_slice(data));
        state.wake();
    }

    /// Bytes so far.
    pub fn bytes(&self) -> u64 {
        self.fill.lock().end
    }

    /// Stops keeping the body: it is too large to store. Nobody can join any more.
    pub fn overflow(&mut self) {
        if let Some((fills, key)) = self.place.take() {
            fills.leave(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.overflows = true;
        state.free();
    }

    /// Ready with `true` when more bytes are wanted, with `false` when nobody reads any longer.
    pub fn poll_wanted(&self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut state = self.fill.lock();
        // Also woken when the last reader leaves while the upstream is silent.
        state.feeder = Some(cx.waker().clone());
        if !state.has_readers() && state.waiting == 0 {
            return Poll::Ready(false);
        }
        if state.overflows && state.end - state.begin > WINDOW {
            return Poll::Pending;
        }
        Poll::Ready(true)
    }

    /// The whole body in one piece, unless it overflowed.
    pub fn body(&self) -> Option<Bytes> {
        let mut state = self.fill.lock();
        if state.overflows {
            return None;
        }
        if let (Some(only), 1) = (state.pieces.front(), state.pieces.len()) {
            return Some(only.clone());
        }
        let mut whole = BytesMut::with_capacity(usize::try_from(state.end).ok()?);
        state.pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
        let whole = whole.freeze();
        // Who still reads shares what is stored.
        state.pieces = VecDeque::from([whole.clone()]);
        Some(whole)
    }

    /// The body is whole, and these came after it. Call it after the entry was stored, so that who comes next finds it. Trailers
    /// reach those who read now and are not stored (RFC 9111 section 3.1).
    pub fn complete(mut self, trailers: Option<&Fields>) {
        if let Some((fills, key)) = self.place.take() {
            fills.leave(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.is_complete = true;
        state.trailers = trailers.map(|trailers| Arc::new(trailers.clone()));
        state.wake();
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        if let Some((fills, key)) = self.place.take() {
            fills.leave(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.is_cut = !state.is_complete;
        state.wake();
    }
}

/// One reader of a fill's body.
pub struct Reader {
    fill: Arc<Fill>,
    number: usize,
    offset: u64,
    piece: Bytes,
    takes_trailers: bool,
    trailers: Option<Arc<Fields>>,
}

impl Reader {
    fn new(fill: &Arc<Fill>, state: &mut State) -> Self {
        let number = state.readers.iter().position(Option::is_none).unwrap_or_else(|| {
            state.readers.push(None);
            state.readers.len() - 1
        });
        state.readers[number] = Some(0);
        Reader { fill: Arc::clone(fill), number, offset: 0, piece: Bytes::new(), takes_trailers: false, trailers: None }
    }

    /// Says whether the client reads trailers; it gets none before.
    pub fn take_trailers(&mut self, takes_trailers: bool) {
        self.takes_trailers = takes_trailers;
    }
}

impl Source for Reader {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if !self.piece.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.fill.lock();
        if self.offset < state.end {
            self.piece = piece_at(&state, self.offset);
            return Poll::Ready(Ok(()));
        }
        if state.is_complete {
            self.trailers = state.trailers.clone().filter(|_| self.takes_trailers);
            return Poll::Ready(Ok(()));
        }
        if state.is_cut {
            return Poll::Ready(Err(BodyError::Truncated));
        }
        state.sleep(cx);
        Poll::Pending
    }

    fn data(&self) -> &[u8] {
        &self.piece
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    fn consume(&mut self, count: usize) {
        self.piece.advance(count);
        self.offset += count as u64;
        if self.piece.is_empty() {
            let mut state = self.fill.lock();
            state.readers[self.number] = Some(self.offset);
            state.free();
        }
    }
}

/// The bytes from `offset` to the end of the piece they are in.
fn piece_at(state: &State, offset: u64) -> Bytes {
    let mut at = state.begin;
    for piece in &state.pieces {
        let end = at + piece.len() as u64;
        if offset < end {
            return piece.slice(usize::try_from(offset - at).unwrap_or(0)..);
        }
        at = end;
    }
    Bytes::new()
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.fill.lock();
        state.readers[self.number] = None;
        state.free();
        if let Some(feeder) = state.feeder.take() {
            feeder.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::StatusCode;
    use shard::KeyBuilder;

    fn lead_and_joiner() -> (Arc<Fills>, Lead, Joiner) {
        let fills = Arc::new(Fills::default());
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"k").key();
        let (Turn::Lead(lead), Turn::Join(joiner)) = (fills.enter(&key), fills.enter(&key)) else {
            panic!("the first leads, the second joins")
        };
        (fills, lead, joiner)
    }

    async fn read(reader: &mut Reader) -> Result<Vec<u8>, BodyError> {
        let mut whole = Vec::new();
        loop {
            poll_fn(|cx| reader.poll_fill(cx)).await?;
            if reader.data().is_empty() {
                return Ok(whole);
            }
            whole.push(reader.data()[0]);
            reader.consume(1);
        }
    }

    #[tokio::test]
    async fn a_leader_that_leaves_hands_over_to_one() {
        let (fills, lead, mut joiner) = lead_and_joiner();
        drop(lead);
        let Joined::Lead(lead) = joiner.wait().await else { panic!("the joiner leads") };
        drop(joiner);
        lead.release();
        assert!(fills.parts.iter().all(|part| part.lock().unwrap().is_empty()));
    }

    #[tokio::test]
    async fn a_failure_is_tried_again_by_one_and_then_shared_by_all() {
        let (fills, lead, mut joiner) = lead_and_joiner();
        let mut builder = KeyBuilder::new();
        let Turn::Join(mut other) = fills.enter(&builder.part(b"k").key()) else { panic!("it joins") };
        lead.fail(Kind::Timeout);
        let Joined::Lead(lead) = joiner.wait().await else { panic!("one tries again") };
        assert!(poll_fn(|cx| Poll::Ready(other.poll_wait(cx).is_pending())).await, "the other goes on waiting");
        lead.fail(Kind::Timeout);
        assert!(matches!(other.wait().await, Joined::Failed(Kind::Timeout)));
        drop((joiner, other));
        assert!(fills.parts.iter().all(|part| part.lock().unwrap().is_empty()));
    }

    #[test]
    fn all_fills_together_are_bounded() {
        let fills = Fills::default();
        let (mut one, mut two) = (fills.hold(), fills.hold());
        assert!(one.grow(6, 10) && !two.grow(5, 10));
        two.give_back();
        assert!(two.grow(4, 10));
        drop((one, two));
        assert_eq!(fills.held.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn a_cut_fill_cuts_every_reader() {
        let (_, lead, mut joiner) = lead_and_joiner();
        let (feed, mut own) = lead.open(Response::new(StatusCode::OK));
        feed.push(b"ab");
        let Joined::Stream(_, mut reader) = joiner.wait().await else { panic!("a stream") };
        drop(feed);
        assert!(matches!(read(&mut own).await, Err(BodyError::Truncated)));
        assert!(matches!(read(&mut reader).await, Err(BodyError::Truncated)));
    }

    #[tokio::test]
    async fn joiners_in_the_middle_get_every_byte() {
        let (_, lead, mut joiner) = lead_and_joiner();
        let (feed, mut own) = lead.open(Response::new(StatusCode::OK));
        feed.push(b"ab");
        let Joined::Stream(_, mut reader) = joiner.wait().await else { panic!("a stream") };
        feed.push(b"cd");
        assert_eq!(feed.body().as_deref(), Some(&b"abcd"[..]));
        feed.complete(None);
        assert_eq!(read(&mut reader).await.expect("whole"), b"abcd");
        assert_eq!(read(&mut own).await.expect("whole"), b"abcd");
    }

    #[tokio::test]
    async fn an_overflowing_fill_waits_for_its_slowest_reader_and_forgets() {
        let (_, lead, _joiner) = lead_and_joiner();
        let (mut feed, mut own) = lead.open(Response::new(StatusCode::OK));
        feed.overflow();
        feed.push(&vec![b'x'; WINDOW as usize + 1]);
        assert!(poll_fn(|cx| Poll::Ready(feed.poll_wanted(cx))).await.is_pending());
        poll_fn(|cx| own.poll_fill(cx)).await.expect("data");
        let count = own.data().len();
        own.consume(count);
        assert_eq!(poll_fn(|cx| Poll::Ready(feed.poll_wanted(cx))).await, Poll::Ready(true));
        assert_eq!(feed.fill.lock().pieces.len(), 0);
        assert_eq!(feed.body(), None);
    }

    #[tokio::test]
    async fn nobody_left_stops_the_feed() {
        let (_, lead, joiner) = lead_and_joiner();
        drop(joiner);
        let (feed, own) = lead.open(Response::new(StatusCode::OK));
        drop(own);
        assert_eq!(poll_fn(|cx| Poll::Ready(feed.poll_wanted(cx))).await, Poll::Ready(false));
    }
}
