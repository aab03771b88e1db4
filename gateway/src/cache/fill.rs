//! Collapses concurrent misses of one key into one fetch. The leader fetches; joiners wait for the
//! response head and stream the same body.
//!
//! A leader that is dropped before it has a head is replaced by one joiner. A leader whose fetch
//! fails is replaced once. A reader can start in the middle of a fetch. When the body outgrows the
//! size limit, it will not be stored: chunks that every reader has consumed are freed, and the
//! slowest reader throttles the fetch.
//!
//! Bounds: joiners per fill, total bytes reserved by all fills, and bytes buffered by an overflowed
//! fill. The table contains only fills with a leader.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use bytes::{Buf, Bytes, BytesMut};
use shard::{CacheKey, KeyRef};

use crate::error::ErrorKind;
use crate::http::body::{BodyError, BodySource};
use crate::http::fields::Fields;
use crate::http::message::Response;

/// Requests that may wait for one fill. Further requests go to the origin on their own, because
/// their response is already late.
const JOINERS_MAX: u32 = 20_000;
/// Bytes between the producer and the slowest reader of a body that is too large to store.
const READER_WINDOW_BYTES: u64 = 1 << 20;
/// Failures after which all waiting requests fail. A dead origin then does not receive one request
/// for each of them.
const FAILURES_MAX: u8 = 2;
/// Number of locks of the table.
const PARTITIONS: usize = 64;

/// Progress of a fill: waiting for the head, open with a head, or ended.
enum FillPhase {
    /// No response head yet. Without a leader, the next joiner that is polled becomes the leader.
    Waiting {
        has_leader: bool,
    },
    Streaming(Arc<Response>),
    /// Nothing is shared. Joiners look up again or fetch on their own.
    Closed,
    Failed(ErrorKind),
}

/// Mutable state of a fill, behind its lock: the phase, the buffered chunks with their offsets, the
/// position of each reader, and the wakers of waiting tasks.
struct FillState {
    phase: FillPhase,
    chunks: VecDeque<Bytes>,
    /// Offset of the first buffered chunk.
    start: u64,
    end: u64,
    is_complete: bool,
    trailers: Option<Arc<Fields>>,
    is_aborted: bool,
    failures: u8,
    is_overflowed: bool,
    /// Offset of each reader by index. `None`: the index is unused.
    readers: Vec<Option<u64>>,
    waiting: u32,
    wakers: Vec<Waker>,
    producer_waker: Option<Waker>,
}

/// One fetch that several requests share: its head, the bytes that arrived, and its readers.
struct Fill {
    state: Mutex<FillState>,
}

impl Fill {
    fn new() -> Self {
        Fill {
            state: Mutex::new(FillState {
                phase: FillPhase::Waiting { has_leader: true },
                chunks: VecDeque::new(),
                start: 0,
                end: 0,
                is_complete: false,
                trailers: None,
                is_aborted: false,
                failures: 0,
                is_overflowed: false,
                readers: Vec::new(),
                waiting: 0,
                wakers: Vec::new(),
                producer_waker: None,
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, FillState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FillState {
    fn wake_all(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
    }

    fn register_waker(&mut self, cx: &Context<'_>) {
        if !self.wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            self.wakers.push(cx.waker().clone());
        }
    }

    fn has_readers(&self) -> bool {
        self.readers.iter().any(Option::is_some)
    }

    /// Frees the chunks that every reader has consumed, if the body will not be stored.
    fn discard_consumed(&mut self) {
        if !self.is_overflowed {
            return;
        }
        let slowest = self.readers.iter().flatten().copied().min().unwrap_or(self.end);
        while let Some(chunk) = self.chunks.front()
            && self.start + chunk.len() as u64 <= slowest
        {
            self.start += chunk.len() as u64;
            self.chunks.pop_front();
        }
        if let Some(producer_waker) = self.producer_waker.take() {
            producer_waker.wake();
        }
    }
}

/// Map of one lock stripe of the fill table.
type FillPartition = HashMap<CacheKey, Arc<Fill>, foldhash::fast::RandomState>;

/// The fills in progress in this process.
pub(crate) struct FillTable {
    partitions: Box<[Mutex<FillPartition>]>,
    /// Bytes reserved by all bodies that are being fetched into the cache.
    reserved: Arc<AtomicU64>,
}

/// The bytes that one body reserves of the limit for all fills. They are released on drop.
pub(crate) struct InflightReservation {
    total: Arc<AtomicU64>,
    own: u64,
}

impl InflightReservation {
    /// Reserves more bytes. Returns false if all fills together then exceed `limit`.
    pub(crate) fn grow(&mut self, bytes: u64, limit: u64) -> bool {
        self.own += bytes;
        self.total.fetch_add(bytes, Ordering::Relaxed) + bytes <= limit
    }

    pub(crate) fn release(&mut self) {
        self.total.fetch_sub(std::mem::take(&mut self.own), Ordering::Relaxed);
    }
}

impl Drop for InflightReservation {
    fn drop(&mut self) {
        self.release();
    }
}

impl Default for FillTable {
    fn default() -> Self {
        FillTable { partitions: (0..PARTITIONS).map(|_| Mutex::default()).collect(), reserved: Arc::default() }
    }
}

/// The role of a request that missed.
pub(crate) enum JoinResult {
    Lead(FillLeader),
    Join(FillJoiner),
    /// Too many requests wait already. The request fetches on its own.
    Bypass,
}

impl FillTable {
    /// Joins the fill of `key`, or leads a new one.
    pub(crate) fn join_or_lead(self: &Arc<Self>, key: &KeyRef<'_>) -> JoinResult {
        let mut partition = self.partition(key.hash());
        let owned = key.to_owned();
        if let Some(fill) = partition.get(&owned) {
            let mut state = fill.lock();
            if state.waiting >= JOINERS_MAX {
                return JoinResult::Bypass;
            }
            state.waiting += 1;
            drop(state);
            return JoinResult::Join(FillJoiner {
                fill: Arc::clone(fill),
                registration: Some((Arc::clone(self), owned)),
            });
        }
        let fill = Arc::new(Fill::new());
        partition.insert(owned.clone(), Arc::clone(&fill));
        JoinResult::Lead(FillLeader { fill, registration: Some((Arc::clone(self), owned)), is_finished: false })
    }

    /// Starts an empty reservation for a body.
    pub(crate) fn reserve(&self) -> InflightReservation {
        InflightReservation { total: Arc::clone(&self.reserved), own: 0 }
    }

    /// Leads a fill of `key`, unless there is one already. For background work.
    pub(crate) fn try_lead(self: &Arc<Self>, key: &KeyRef<'_>) -> Option<FillLeader> {
        match self.join_or_lead(key) {
            JoinResult::Lead(leader) => Some(leader),
            JoinResult::Join(_) | JoinResult::Bypass => None,
        }
    }

    fn partition(&self, hash: u64) -> MutexGuard<'_, FillPartition> {
        let index = usize::try_from(hash >> 32).unwrap_or(0) % PARTITIONS;
        self.partitions[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remove(&self, key: &CacheKey, fill: &Arc<Fill>) {
        let mut partition = self.partition(key.as_key().hash());
        if partition.get(key).is_some_and(|current| Arc::ptr_eq(current, fill)) {
            partition.remove(key);
        }
    }
}

/// The obligation to fetch. A joiner takes it over if it is dropped before `publish_head`,
/// `release` or `fail`.
pub(crate) struct FillLeader {
    fill: Arc<Fill>,
    registration: Option<(Arc<FillTable>, CacheKey)>,
    is_finished: bool,
}

impl FillLeader {
    /// A fetch that no other request joins.
    pub(crate) fn solo() -> Self {
        FillLeader { fill: Arc::new(Fill::new()), registration: None, is_finished: false }
    }

    /// Whether no other request can join.
    pub(crate) fn is_solo(&self) -> bool {
        self.registration.is_none()
    }

    /// Ends the fill without a shared response. Joiners look up again.
    pub(crate) fn release(mut self) {
        self.finish(FillPhase::Closed);
    }

    /// Reports a failed fetch. One joiner retries once. A second failure fails all waiting
    /// requests.
    pub(crate) fn fail(mut self, kind: ErrorKind) {
        let mut state = self.fill.lock();
        state.failures += 1;
        if state.waiting > 0 && state.failures < FAILURES_MAX {
            state.phase = FillPhase::Waiting { has_leader: false };
            state.wake_all();
            drop(state);
            self.is_finished = true;
            return;
        }
        drop(state);
        self.fail_all(kind);
    }

    /// Reports a failed fetch that a retry would not change. All waiting requests fail.
    pub(crate) fn fail_all(mut self, kind: ErrorKind) {
        self.finish(FillPhase::Failed(kind));
    }

    /// Publishes the response head to the joiners and returns the reader of the leader. The
    /// producer must be completed or dropped.
    pub(crate) fn publish_head(mut self, response: Response) -> (Producer, FillReader) {
        self.is_finished = true;
        let mut state = self.fill.lock();
        state.phase = FillPhase::Streaming(Arc::new(response));
        let reader = FillReader::new(&self.fill, &mut state);
        state.wake_all();
        drop(state);
        let producer = Producer { fill: Arc::clone(&self.fill), registration: self.registration.take() };
        (producer, reader)
    }

    fn finish(&mut self, phase: FillPhase) {
        self.is_finished = true;
        if let Some((fills, key)) = self.registration.take() {
            fills.remove(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.phase = phase;
        state.wake_all();
    }
}

impl Drop for FillLeader {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        let mut state = self.fill.lock();
        if state.waiting > 0 {
            state.phase = FillPhase::Waiting { has_leader: false };
            state.wake_all();
            return;
        }
        state.phase = FillPhase::Closed;
        drop(state);
        if let Some((fills, key)) = self.registration.take() {
            fills.remove(&key, &self.fill);
        }
    }
}

/// A request that waits for the fetch of another request.
pub(crate) struct FillJoiner {
    fill: Arc<Fill>,
    registration: Option<(Arc<FillTable>, CacheKey)>,
}

/// The next step of a joiner after its wait: stream the body, look up again, fail, or lead the
/// fetch.
pub(crate) enum JoinOutcome {
    Stream(Arc<Response>, FillReader),
    /// Nothing is shared. The request looks up again.
    Retry,
    Failed(ErrorKind),
    /// The leader was dropped or failed. This request leads now.
    Lead(FillLeader),
}

impl FillJoiner {
    /// Waits for the head of the leader's response. Cancel safe.
    pub(crate) async fn wait(&mut self) -> JoinOutcome {
        poll_fn(|cx| self.poll_wait(cx)).await
    }

    fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<JoinOutcome> {
        let mut state = self.fill.lock();
        match &state.phase {
            FillPhase::Waiting { has_leader: true } => {
                state.register_waker(cx);
                Poll::Pending
            }
            FillPhase::Waiting { has_leader: false } => {
                state.phase = FillPhase::Waiting { has_leader: true };
                drop(state);
                let registration = self.registration.clone();
                Poll::Ready(JoinOutcome::Lead(FillLeader {
                    fill: Arc::clone(&self.fill),
                    registration,
                    is_finished: false,
                }))
            }
            FillPhase::Streaming(response) => {
                let response = Arc::clone(response);
                if state.start > 0 || state.is_aborted {
                    return Poll::Ready(JoinOutcome::Retry);
                }
                let reader = FillReader::new(&self.fill, &mut state);
                Poll::Ready(JoinOutcome::Stream(response, reader))
            }
            FillPhase::Closed => Poll::Ready(JoinOutcome::Retry),
            FillPhase::Failed(kind) => Poll::Ready(JoinOutcome::Failed(*kind)),
        }
    }
}

impl Drop for FillJoiner {
    fn drop(&mut self) {
        let mut state = self.fill.lock();
        state.waiting = state.waiting.saturating_sub(1);
        // This joiner may have been woken to become the leader. Wake another one.
        if matches!(state.phase, FillPhase::Waiting { has_leader: false }) {
            let is_last = state.waiting == 0;
            if is_last {
                state.phase = FillPhase::Closed;
            }
            state.wake_all();
            drop(state);
            if is_last && let Some((fills, key)) = &self.registration {
                fills.remove(key, &self.fill);
            }
        }
    }
}

/// The fetching side of a fill. Dropping it before `complete` aborts the body for every reader.
pub(crate) struct Producer {
    fill: Arc<Fill>,
    registration: Option<(Arc<FillTable>, CacheKey)>,
}

impl Producer {
    /// Appends bytes to the body.
    pub(crate) fn push(&self, data: &[u8]) {
        let mut state = self.fill.lock();
        state.end += data.len() as u64;
        state.chunks.push_back(Bytes::copy_from_slice(data));
        state.wake_all();
    }

    /// Length of the body so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.fill.lock().end
    }

    /// Stops buffering the complete body, because it is too large to store. No further request can
    /// join.
    pub(crate) fn overflow(&mut self) {
        if let Some((fills, key)) = self.registration.take() {
            fills.remove(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.is_overflowed = true;
        state.discard_consumed();
    }

    /// Resolves to `true` when more bytes can be pushed, and to `false` when no reader is left.
    pub(crate) fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut state = self.fill.lock();
        // Also wakes the producer when the last reader is dropped while the upstream is silent.
        state.producer_waker = Some(cx.waker().clone());
        if !state.has_readers() && state.waiting == 0 {
            return Poll::Ready(false);
        }
        if state.is_overflowed && state.end - state.start > READER_WINDOW_BYTES {
            return Poll::Pending;
        }
        Poll::Ready(true)
    }

    /// The complete body in one buffer. `None` if it overflowed.
    pub(crate) fn body(&self) -> Option<Bytes> {
        let mut state = self.fill.lock();
        if state.is_overflowed {
            return None;
        }
        if let (Some(only), 1) = (state.chunks.front(), state.chunks.len()) {
            return Some(only.clone());
        }
        let mut body = BytesMut::with_capacity(usize::try_from(state.end).ok()?);
        state.chunks.iter().for_each(|chunk| body.extend_from_slice(chunk));
        let body = body.freeze();
        // The remaining readers share the buffer that is stored.
        state.chunks = VecDeque::from([body.clone()]);
        Some(body)
    }

    /// Ends the body, with its trailers. Call it after the entry is stored, so that the next lookup
    /// finds the entry. Trailers go to the current readers and are not stored (RFC 9111 section
    /// 3.1).
    pub(crate) fn complete(mut self, trailers: Option<&Fields>) {
        if let Some((fills, key)) = self.registration.take() {
            fills.remove(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.is_complete = true;
        state.trailers = trailers.map(|trailers| Arc::new(trailers.clone()));
        state.wake_all();
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        if let Some((fills, key)) = self.registration.take() {
            fills.remove(&key, &self.fill);
        }
        let mut state = self.fill.lock();
        state.is_aborted = !state.is_complete;
        state.wake_all();
    }
}

/// One reader of the body of a fill, with its offset and its current chunk.
pub(crate) struct FillReader {
    fill: Arc<Fill>,
    index: usize,
    offset: u64,
    chunk: Bytes,
    accepts_trailers: bool,
    trailers: Option<Arc<Fields>>,
}

impl FillReader {
    fn new(fill: &Arc<Fill>, state: &mut FillState) -> Self {
        let index = state.readers.iter().position(Option::is_none).unwrap_or_else(|| {
            state.readers.push(None);
            state.readers.len() - 1
        });
        state.readers[index] = Some(0);
        FillReader {
            fill: Arc::clone(fill),
            index,
            offset: 0,
            chunk: Bytes::new(),
            accepts_trailers: false,
            trailers: None,
        }
    }

    /// Sets whether the client accepts trailers. Default: it does not.
    pub(crate) fn accept_trailers(&mut self, accepts_trailers: bool) {
        self.accepts_trailers = accepts_trailers;
    }
}

impl BodySource for FillReader {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        if !self.chunk.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.fill.lock();
        if self.offset < state.end {
            self.chunk = chunk_at(&state, self.offset);
            return Poll::Ready(Ok(()));
        }
        if state.is_complete {
            self.trailers = state.trailers.clone().filter(|_| self.accepts_trailers);
            return Poll::Ready(Ok(()));
        }
        if state.is_aborted {
            return Poll::Ready(Err(BodyError::Truncated));
        }
        state.register_waker(cx);
        Poll::Pending
    }

    fn data(&self) -> &[u8] {
        &self.chunk
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref()
    }

    fn consume(&mut self, count: usize) {
        self.chunk.advance(count);
        self.offset += count as u64;
        if self.chunk.is_empty() {
            let mut state = self.fill.lock();
            state.readers[self.index] = Some(self.offset);
            state.discard_consumed();
        }
    }
}

/// The bytes from `offset` to the end of their chunk.
fn chunk_at(state: &FillState, offset: u64) -> Bytes {
    let mut at = state.start;
    for chunk in &state.chunks {
        let end = at + chunk.len() as u64;
        if offset < end {
            return chunk.slice(usize::try_from(offset - at).unwrap_or(0)..);
        }
        at = end;
    }
    Bytes::new()
}

impl Drop for FillReader {
    fn drop(&mut self) {
        let mut state = self.fill.lock();
        state.readers[self.index] = None;
        state.discard_consumed();
        if let Some(producer_waker) = state.producer_waker.take() {
            producer_waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::StatusCode;
    use shard::KeyBuilder;

    fn lead_and_joiner() -> (Arc<FillTable>, FillLeader, FillJoiner) {
        let fills = Arc::new(FillTable::default());
        let mut builder = KeyBuilder::new();
        let key = builder.part(b"k").key();
        let (JoinResult::Lead(leader), JoinResult::Join(joiner)) = (fills.join_or_lead(&key), fills.join_or_lead(&key))
        else {
            panic!("the first leads, the second joins")
        };
        (fills, leader, joiner)
    }

    async fn read(reader: &mut FillReader) -> Result<Vec<u8>, BodyError> {
        let mut body = Vec::new();
        loop {
            poll_fn(|cx| reader.poll_fill(cx)).await?;
            if reader.data().is_empty() {
                return Ok(body);
            }
            body.push(reader.data()[0]);
            reader.consume(1);
        }
    }

    #[tokio::test]
    async fn dropped_leader_hands_over_to_one_joiner() {
        let (fills, leader, mut joiner) = lead_and_joiner();
        drop(leader);
        let JoinOutcome::Lead(leader) = joiner.wait().await else { panic!("the joiner becomes the leader") };
        drop(joiner);
        leader.release();
        assert!(fills.partitions.iter().all(|partition| partition.lock().unwrap().is_empty()));
    }

    #[tokio::test]
    async fn one_joiner_retries_a_failure_and_the_second_failure_reaches_all() {
        let (fills, leader, mut joiner) = lead_and_joiner();
        let mut builder = KeyBuilder::new();
        let JoinResult::Join(mut other) = fills.join_or_lead(&builder.part(b"k").key()) else { panic!("a joiner") };
        leader.fail(ErrorKind::Timeout);
        let JoinOutcome::Lead(leader) = joiner.wait().await else { panic!("one joiner retries") };
        assert!(poll_fn(|cx| Poll::Ready(other.poll_wait(cx).is_pending())).await, "the other joiner still waits");
        leader.fail(ErrorKind::Timeout);
        assert!(matches!(other.wait().await, JoinOutcome::Failed(ErrorKind::Timeout)));
        drop((joiner, other));
        assert!(fills.partitions.iter().all(|partition| partition.lock().unwrap().is_empty()));
    }

    #[test]
    fn total_bytes_of_all_fills_are_bounded() {
        let fills = FillTable::default();
        let (mut first, mut second) = (fills.reserve(), fills.reserve());
        assert!(first.grow(6, 10) && !second.grow(5, 10));
        second.release();
        assert!(second.grow(4, 10));
        drop((first, second));
        assert_eq!(fills.reserved.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn aborted_fill_fails_every_reader() {
        let (_, leader, mut joiner) = lead_and_joiner();
        let (producer, mut own) = leader.publish_head(Response::new(StatusCode::OK));
        producer.push(b"ab");
        let JoinOutcome::Stream(_, mut reader) = joiner.wait().await else { panic!("a stream") };
        drop(producer);
        assert!(matches!(read(&mut own).await, Err(BodyError::Truncated)));
        assert!(matches!(read(&mut reader).await, Err(BodyError::Truncated)));
    }

    #[tokio::test]
    async fn joiner_during_the_fetch_reads_every_byte() {
        let (_, leader, mut joiner) = lead_and_joiner();
        let (producer, mut own) = leader.publish_head(Response::new(StatusCode::OK));
        producer.push(b"ab");
        let JoinOutcome::Stream(_, mut reader) = joiner.wait().await else { panic!("a stream") };
        producer.push(b"cd");
        assert_eq!(producer.body().as_deref(), Some(&b"abcd"[..]));
        producer.complete(None);
        assert_eq!(read(&mut reader).await.expect("a complete body"), b"abcd");
        assert_eq!(read(&mut own).await.expect("a complete body"), b"abcd");
    }

    #[tokio::test]
    async fn overflowed_fill_waits_for_its_slowest_reader_and_frees_consumed_chunks() {
        let (_, leader, _joiner) = lead_and_joiner();
        let (mut producer, mut own) = leader.publish_head(Response::new(StatusCode::OK));
        producer.overflow();
        producer.push(&vec![b'x'; READER_WINDOW_BYTES as usize + 1]);
        assert!(poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await.is_pending());
        poll_fn(|cx| own.poll_fill(cx)).await.expect("data");
        let count = own.data().len();
        own.consume(count);
        assert_eq!(poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await, Poll::Ready(true));
        assert_eq!(producer.fill.lock().chunks.len(), 0);
        assert_eq!(producer.body(), None);
    }

    #[tokio::test]
    async fn producer_stops_without_readers() {
        let (_, leader, joiner) = lead_and_joiner();
        drop(joiner);
        let (producer, own) = leader.publish_head(Response::new(StatusCode::OK));
        drop(own);
        assert_eq!(poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await, Poll::Ready(false));
    }
}
