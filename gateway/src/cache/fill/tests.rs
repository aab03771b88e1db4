//! Fills: leaders, joiners and readers that are dropped, fail, fall behind or are interleaved.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use proptest::prelude::*;
use shard::{EpochSnapshot, KeyBuilder, KeyRef, LocalConfig, Store};

use super::leader::FillJoiner;
use super::state::{Fill, WINDOW_BYTES, WINDOW_BYTES_MIN};
use super::*;
use crate::cache::stored::CacheMeta;
use crate::error::ErrorKind;
use crate::http::body::{BodyError, BodySource};
use crate::http::message::{Response, StatusCode};

/// More than any test buffers.
const BUDGET: u64 = 1 << 40;

fn with_key<T>(act: impl FnOnce(&KeyRef<'_>) -> T) -> T {
    let mut builder = KeyBuilder::new();
    act(&builder.part(b"k").key())
}

/// A time in a sequence without removals.
fn epoch() -> EpochSnapshot {
    static EPOCH: LazyLock<EpochSnapshot> = LazyLock::new(|| {
        let local = LocalConfig { memory_bytes: 1 << 20, hot_rate: 1_000 };
        let store = Store::<CacheMeta>::new(local, None).expect("a store without shards");
        store.view().epoch_snapshot()
    });
    *EPOCH
}

fn enter(table: &Arc<FillTable>) -> JoinResult {
    with_key(|key| table.join_or_lead(key, epoch(), |_| true))
}

fn lead(table: &Arc<FillTable>) -> FillLeader {
    let JoinResult::Lead(leader) = enter(table) else { panic!("the first request leads") };
    leader
}

fn join(table: &Arc<FillTable>) -> FillJoiner {
    let JoinResult::Join(joiner) = enter(table) else { panic!("later requests join") };
    joiner
}

fn head() -> Response {
    Response::new(StatusCode::OK)
}

fn publish(leader: FillLeader, table: &FillTable) -> (Producer, FillReader) {
    leader.publish_head(head(), table.budget(), BUDGET)
}

fn stream(outcome: JoinOutcome) -> FillReader {
    let JoinOutcome::Stream(_, reader) = outcome else { panic!("the body is shared") };
    reader
}

async fn read(reader: &mut FillReader) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    loop {
        poll_fn(|cx| reader.poll_fill(cx)).await?;
        let count = reader.data().len();
        if count == 0 {
            return Ok(body);
        }
        body.extend_from_slice(reader.data());
        reader.consume(count);
    }
}

/// One poll with a waker that records whether it was woken.
#[derive(Default)]
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn dropped_leader_is_replaced_by_one_joiner() {
    let table = Arc::new(FillTable::default());
    let (leader, joiner) = (lead(&table), join(&table));
    drop(leader);
    let JoinOutcome::Lead(leader) = joiner.wait(Duration::from_secs(1)).await else { panic!("the joiner leads") };
    leader.end(FetchEnd::LookUpAgain);
    assert!(table.is_empty());
}

#[tokio::test]
async fn failure_is_retried_once_and_then_shared() {
    let table = Arc::new(FillTable::default());
    let (leader, first, mut other) = (lead(&table), join(&table), join(&table));
    leader.end(FetchEnd::Retry(ErrorKind::NoResponse));
    let JoinOutcome::Lead(leader) = first.wait(Duration::from_secs(1)).await else { panic!("one joiner retries") };
    assert!(poll_fn(|cx| Poll::Ready(other.poll_wait(cx).is_pending())).await, "the other one waits");
    leader.end(FetchEnd::Retry(ErrorKind::NoResponse));
    let outcome = other.wait(Duration::from_secs(1)).await;
    assert!(matches!(outcome, JoinOutcome::Failed(ErrorKind::NoResponse)));
    assert!(table.is_empty());
}

#[tokio::test]
async fn final_failure_reaches_every_joiner_at_once() {
    let table = Arc::new(FillTable::default());
    let (leader, first, second) = (lead(&table), join(&table), join(&table));
    leader.end(FetchEnd::Fail(ErrorKind::Timeout));
    for joiner in [first, second] {
        let outcome = joiner.wait(Duration::from_secs(1)).await;
        assert!(matches!(outcome, JoinOutcome::Failed(ErrorKind::Timeout)));
    }
}

#[tokio::test(start_paused = true)]
async fn joiner_whose_budget_runs_out_fails_and_does_not_fetch() {
    let table = Arc::new(FillTable::default());
    let (_leader, joiner) = (lead(&table), join(&table));
    let begun = tokio::time::Instant::now();
    assert!(matches!(joiner.wait(Duration::from_secs(3)).await, JoinOutcome::TimedOut));
    assert_eq!(begun.elapsed(), Duration::from_secs(3));
}

#[tokio::test]
async fn failed_producer_aborts_every_reader() {
    let table = Arc::new(FillTable::default());
    let (leader, joiner) = (lead(&table), join(&table));
    let (producer, mut own) = publish(leader, &table);
    producer.push(b"ab");
    let mut reader = stream(joiner.wait(Duration::from_secs(1)).await);
    drop(producer);
    assert!(matches!(read(&mut own).await, Err(BodyError::Truncated)));
    assert!(matches!(read(&mut reader).await, Err(BodyError::Truncated)));
}

#[tokio::test]
async fn request_that_joins_in_the_middle_reads_every_byte() {
    let table = Arc::new(FillTable::default());
    let leader = lead(&table);
    let (producer, mut own) = publish(leader, &table);
    producer.push(b"ab");
    let mut reader = stream(join(&table).wait(Duration::from_secs(1)).await);
    producer.push(b"cd");
    assert_eq!(producer.body_with(&[]).as_deref(), Some(&b"abcd"[..]));
    producer.complete(None);
    assert_eq!(read(&mut reader).await.expect("complete"), b"abcd");
    assert_eq!(read(&mut own).await.expect("complete"), b"abcd");
    assert!(table.is_empty());
}

#[tokio::test]
async fn complete_response_is_given_to_waiting_requests() {
    let table = Arc::new(FillTable::default());
    let (leader, first, second) = (lead(&table), join(&table), join(&table));
    leader.publish_complete(head(), bytes::Bytes::from_static(b"abc"));
    for joiner in [first, second] {
        let mut reader = stream(joiner.wait(Duration::from_secs(1)).await);
        assert_eq!(read(&mut reader).await.expect("complete"), b"abc");
    }
    assert!(table.is_empty());
}

#[tokio::test]
async fn slow_reader_is_detached_when_another_one_waits() {
    let table = Arc::new(FillTable::default());
    let (leader, joiner) = (lead(&table), join(&table));
    let (mut producer, mut fast) = publish(leader, &table);
    let mut slow = stream(joiner.wait(Duration::from_secs(1)).await);
    producer.stop_keeping();
    producer.push(&vec![b'x'; WINDOW_BYTES as usize]);
    let ready = async |producer: &Producer| poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await;
    assert!(ready(&producer).await.is_pending(), "both readers have bytes to read");
    poll_fn(|cx| fast.poll_fill(cx)).await.expect("bytes");
    let count = fast.data().len();
    fast.consume(count);
    assert_eq!(ready(&producer).await, Poll::Ready(true));
    assert_eq!(table.budget().charged(), 0, "the bytes that only the slow reader lacks are freed");
    assert!(matches!(poll_fn(|cx| slow.poll_fill(cx)).await, Err(BodyError::Detached)));
    producer.push(b"end");
    producer.complete(None);
    assert_eq!(read(&mut fast).await.expect("complete"), b"end");
}

#[tokio::test]
async fn only_reader_sets_the_pace() {
    let table = Arc::new(FillTable::default());
    let (mut producer, mut own) = publish(lead(&table), &table);
    producer.stop_keeping();
    producer.push(&vec![b'x'; WINDOW_BYTES as usize]);
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&flag));
    assert!(producer.poll_ready(&mut Context::from_waker(&waker)).is_pending());
    poll_fn(|cx| own.poll_fill(cx)).await.expect("bytes");
    own.consume(own.data().len());
    assert!(flag.0.load(Ordering::Relaxed), "the reader wakes the producer");
    assert_eq!(producer.poll_ready(&mut Context::from_waker(&waker)), Poll::Ready(true));
}

#[tokio::test]
async fn used_up_budget_narrows_the_window() {
    let table = Arc::new(FillTable::default());
    let (mut producer, _own) = lead(&table).publish_head(head(), table.budget(), WINDOW_BYTES_MIN);
    assert!(!producer.can_keep(WINDOW_BYTES_MIN + 1, BUDGET));
    producer.stop_keeping();
    producer.push(&vec![b'x'; WINDOW_BYTES_MIN as usize]);
    assert!(poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await.is_pending());
}

#[tokio::test]
async fn last_waiting_request_that_leaves_wakes_the_producer() {
    let table = Arc::new(FillTable::default());
    let (leader, joiner) = (lead(&table), join(&table));
    let (producer, own) = publish(leader, &table);
    drop(own);
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&flag));
    assert_eq!(producer.poll_ready(&mut Context::from_waker(&waker)), Poll::Ready(true));
    drop(joiner);
    assert!(flag.0.load(Ordering::Relaxed));
    assert_eq!(producer.poll_ready(&mut Context::from_waker(&waker)), Poll::Ready(false));
}

/// Wakeups at a change: constant work for each of 10,000 requests. With a scan of all wakers for
/// each, this takes minutes.
#[tokio::test]
async fn ten_thousand_joiners_share_one_fetch() {
    let table = Arc::new(FillTable::default());
    let leader = lead(&table);
    let joiners: Vec<_> = (0..10_000).map(|_| Box::pin(join(&table).wait(Duration::from_secs(60)))).collect();
    let all = tokio::spawn(async move {
        let mut read_bytes = 0;
        let mut readers = Vec::new();
        let mut joiners = joiners;
        for joiner in &mut joiners {
            assert!(poll_fn(|cx| Poll::Ready(joiner.as_mut().poll(cx).is_pending())).await);
        }
        for joiner in joiners {
            readers.push(stream(joiner.await));
        }
        for mut reader in readers {
            read_bytes += read(&mut reader).await.expect("complete").len();
        }
        read_bytes
    });
    tokio::task::yield_now().await;
    let (producer, _own) = publish(leader, &table);
    producer.push(b"abcd");
    producer.complete(None);
    assert_eq!(all.await.expect("no panic"), 40_000);
    assert!(table.is_empty());
}

/// Polls a joiner that must be pending.
fn poll_pending(joiner: &mut FillJoiner) {
    assert!(joiner.poll_wait(&mut Context::from_waker(Waker::noop())).is_pending());
}

/// Slots visited since the last call.
fn take_visits(fill: &Fill) -> usize {
    std::mem::take(&mut fill.lock().slots.visits)
}

/// Steps instead of time. With a scan of all slots in each step, 10,000 readers would make 10^8
/// visits for each chunk.
#[test]
fn work_of_a_step_is_constant_at_ten_thousand_requests() {
    const REQUESTS: usize = 10_000;
    const CHUNKS: usize = 8;
    /// Slots that a step visits at most: its own, its neighbours in two lists, one that is woken.
    const STEP: usize = 12;
    let table = Arc::new(FillTable::default());
    let (leader, mut joiners) = (lead(&table), (0..REQUESTS).map(|_| join(&table)).collect::<Vec<_>>());
    let fill = Arc::clone(&leader.fill);
    joiners.iter_mut().for_each(poll_pending);
    assert!(take_visits(&fill) <= REQUESTS * STEP, "join and wait");
    // A chain of leaders that are dropped.
    drop(leader);
    for _ in 0..REQUESTS / 2 {
        let mut first = joiners.remove(0);
        let Poll::Ready(JoinOutcome::Lead(leader)) = first.poll_wait(&mut Context::from_waker(Waker::noop())) else {
            panic!("the first waiting request leads")
        };
        drop(leader);
    }
    assert!(take_visits(&fill) <= REQUESTS / 2 * STEP, "hand over");
    let Poll::Ready(JoinOutcome::Lead(leader)) = joiners[0].poll_wait(&mut Context::from_waker(Waker::noop())) else {
        panic!("the first waiting request leads")
    };
    joiners.remove(0);
    let (mut producer, own) = publish(leader, &table);
    producer.stop_keeping();
    let mut readers = vec![own];
    for mut joiner in joiners {
        let Poll::Ready(outcome) = joiner.poll_wait(&mut Context::from_waker(Waker::noop())) else { panic!("a head") };
        readers.push(stream(outcome));
    }
    assert!(take_visits(&fill) <= readers.len() * STEP, "head");
    for _ in 0..CHUNKS {
        producer.push(b"chunk");
        assert!(producer.poll_ready(&mut Context::from_waker(Waker::noop())).is_ready());
        for reader in &mut readers {
            assert!(matches!(reader.poll_fill(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(()))));
            reader.consume(b"chunk".len());
            assert!(reader.poll_fill(&mut Context::from_waker(Waker::noop())).is_pending());
        }
        assert!(take_visits(&fill) <= readers.len() * STEP, "chunk");
    }
    assert_eq!(table.budget().charged(), 0, "chunks that all have read are freed");
    let half = readers.split_off(readers.len() / 2);
    let count = half.len();
    drop(half);
    assert!(take_visits(&fill) <= count * STEP, "leave");
    producer.push(&vec![b'x'; WINDOW_BYTES as usize]);
    assert!(producer.poll_ready(&mut Context::from_waker(Waker::noop())).is_pending());
    assert!(take_visits(&fill) <= readers.len() * STEP, "wake");
    assert!(readers[0].poll_fill(&mut Context::from_waker(Waker::noop())).is_ready());
    readers[0].consume(WINDOW_BYTES as usize);
    assert_eq!(producer.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(true));
    assert!(take_visits(&fill) <= readers.len() * STEP, "detach");
}

#[tokio::test]
async fn detached_reader_continues_where_its_next_chunk_is_still_buffered() {
    let table = Arc::new(FillTable::default());
    let (leader, joiner) = (lead(&table), join(&table));
    let (mut producer, mut fast) = publish(leader, &table);
    let mut slow = stream(joiner.wait(Duration::from_secs(1)).await);
    producer.stop_keeping();
    producer.push(&vec![b'x'; WINDOW_BYTES as usize]);
    poll_fn(|cx| slow.poll_fill(cx)).await.expect("bytes");
    slow.consume(1);
    poll_fn(|cx| fast.poll_fill(cx)).await.expect("bytes");
    fast.consume(WINDOW_BYTES as usize);
    assert!(poll_fn(|cx| Poll::Ready(producer.poll_ready(cx))).await.is_ready());
    slow.consume(WINDOW_BYTES as usize - 1);
    producer.push(b"end");
    producer.complete(None);
    assert_eq!(read(&mut slow).await.expect("complete"), b"end");
    assert_eq!(read(&mut fast).await.expect("complete"), b"end");
}

#[test]
fn leader_without_a_client_is_woken_when_nobody_waits() {
    let table = Arc::new(FillTable::default());
    let (leader, first, second) = (lead(&table), join(&table), join(&table));
    let flag = Arc::new(Flag::default());
    let waker = Waker::from(Arc::clone(&flag));
    assert!(leader.is_awaited(&Context::from_waker(&waker)));
    drop(first);
    assert!(!flag.0.load(Ordering::Relaxed) && leader.is_awaited(&Context::from_waker(&waker)));
    drop(second);
    assert!(flag.0.load(Ordering::Relaxed), "woken");
    assert!(!leader.is_awaited(&Context::from_waker(&waker)));
    drop(leader);
    assert!(table.is_empty());
}

/// One step of an interleaving; numbers choose among the requests in that state.
#[derive(Clone, Copy, Debug)]
enum Step {
    Enter,
    /// The key was removed: nothing that began before is joined.
    EnterAfterRemoval,
    PollJoiner(usize),
    DropJoiner(usize),
    FailLeader(usize),
    FailAll(usize),
    DropLeader(usize),
    ReleaseLeader(usize),
    PublishHead(usize),
    PublishComplete(usize),
    Push(usize, u16),
    StopKeeping(usize),
    /// Makes room in the budget, which detaches readers of every body that is not kept.
    MakeRoom(usize),
    /// Takes room for more bytes, which may detach readers.
    PollProducer(usize),
    /// With the whole body in one buffer, where it was kept.
    CompleteWhole(usize),
    Complete(usize),
    DropProducer(usize),
    Read(usize),
    DropReader(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..8usize;
    prop_oneof![
        4 => Just(Step::Enter),
        1 => Just(Step::EnterAfterRemoval),
        4 => n.clone().prop_map(Step::PollJoiner),
        1 => n.clone().prop_map(Step::DropJoiner),
        1 => n.clone().prop_map(Step::FailLeader),
        1 => n.clone().prop_map(Step::FailAll),
        1 => n.clone().prop_map(Step::DropLeader),
        1 => n.clone().prop_map(Step::ReleaseLeader),
        2 => n.clone().prop_map(Step::PublishHead),
        1 => n.clone().prop_map(Step::PublishComplete),
        4 => (n.clone(), 1..40_000u16).prop_map(|(at, bytes)| Step::Push(at, bytes)),
        1 => n.clone().prop_map(Step::StopKeeping),
        1 => n.clone().prop_map(Step::MakeRoom),
        4 => n.clone().prop_map(Step::PollProducer),
        1 => n.clone().prop_map(Step::CompleteWhole),
        1 => n.clone().prop_map(Step::Complete),
        1 => n.clone().prop_map(Step::DropProducer),
        4 => n.clone().prop_map(Step::Read),
        1 => n.prop_map(Step::DropReader),
    ]
}

struct WaitingRequest {
    joiner: FillJoiner,
    flag: Arc<Flag>,
    is_polled: bool,
}

/// A body that was read, and whether it follows the pattern without a gap.
struct ReadingRequest {
    reader: FillReader,
    next: u64,
}

/// The requests of one key, by state.
struct Interleaving {
    table: Arc<FillTable>,
    waiting: Vec<WaitingRequest>,
    leaders: Vec<FillLeader>,
    producers: Vec<(Producer, u64)>,
    readers: Vec<ReadingRequest>,
    waves: Vec<Wave>,
}

/// The exchanges of one fill, and its leaders that were dropped.
struct Wave {
    fill: Arc<Fill>,
    exchanges: usize,
    dropped: usize,
}

/// The byte of every body at `offset`.
fn pattern(offset: u64) -> u8 {
    (offset % 251) as u8
}

fn take<T>(list: &mut Vec<T>, at: usize) -> Option<T> {
    if list.is_empty() { None } else { Some(list.swap_remove(at % list.len())) }
}

impl Interleaving {
    fn new() -> Self {
        Interleaving {
            table: Arc::default(),
            waiting: Vec::new(),
            leaders: Vec::new(),
            producers: Vec::new(),
            readers: Vec::new(),
            waves: Vec::new(),
        }
    }

    fn wave(&mut self, fill: &Arc<Fill>) -> &mut Wave {
        let known = self.waves.iter().position(|wave| Arc::ptr_eq(&wave.fill, fill));
        let at = known.unwrap_or_else(|| {
            self.waves.push(Wave { fill: Arc::clone(fill), exchanges: 0, dropped: 0 });
            self.waves.len() - 1
        });
        &mut self.waves[at]
    }

    fn becomes_leader(&mut self, leader: FillLeader) {
        let Wave { exchanges, dropped, .. } = self.wave(&leader.fill);
        *exchanges += 1;
        assert!(*exchanges <= 2 + *dropped, "{exchanges} exchanges, {dropped} dropped");
        self.leaders.push(leader);
    }

    fn enter(&mut self, is_removed: bool) {
        let entered = with_key(|key| self.table.join_or_lead(key, epoch(), |_| !is_removed));
        match entered {
            JoinResult::Lead(leader) => self.becomes_leader(leader),
            JoinResult::Join(_) if is_removed => panic!("a fetch from before the removal is joined"),
            JoinResult::Join(joiner) => {
                self.waiting.push(WaitingRequest { joiner, flag: Arc::default(), is_polled: false });
            }
            JoinResult::Bypass => panic!("far fewer requests than a fill has places"),
        }
    }

    fn poll(&mut self, at: usize) {
        let request = &mut self.waiting[at];
        request.is_polled = true;
        request.flag.0.store(false, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&request.flag));
        let Poll::Ready(outcome) = request.joiner.poll_wait(&mut Context::from_waker(&waker)) else { return };
        drop(self.waiting.swap_remove(at));
        match outcome {
            JoinOutcome::Stream(_, reader) => self.readers.push(ReadingRequest { reader, next: 0 }),
            JoinOutcome::Lead(leader) => self.becomes_leader(leader),
            JoinOutcome::Retry => self.enter(false),
            JoinOutcome::Bypass | JoinOutcome::Failed(_) => {}
            JoinOutcome::TimedOut => panic!("no time passes"),
        }
    }

    /// Reads one chunk; returns whether the reader has come to an end.
    fn read(&mut self, at: usize) -> bool {
        let request = &mut self.readers[at];
        match request.reader.poll_fill(&mut Context::from_waker(Waker::noop())) {
            Poll::Pending => false,
            Poll::Ready(Err(_)) => true,
            Poll::Ready(Ok(())) => {
                let count = request.reader.data().len();
                for (index, byte) in request.reader.data().iter().enumerate() {
                    assert_eq!(*byte, pattern(request.next + index as u64), "a byte is lost or repeated");
                }
                request.next += count as u64;
                request.reader.consume(count);
                count == 0
            }
        }
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Enter => self.enter(false),
            Step::EnterAfterRemoval => self.enter(true),
            Step::PollJoiner(at) if !self.waiting.is_empty() => self.poll(at % self.waiting.len()),
            Step::DropJoiner(at) => drop(take(&mut self.waiting, at)),
            Step::FailLeader(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    leader.end(FetchEnd::Retry(ErrorKind::NoResponse));
                }
            }
            Step::FailAll(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    leader.end(FetchEnd::Fail(ErrorKind::Timeout));
                }
            }
            Step::DropLeader(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    self.wave(&leader.fill).dropped += 1;
                }
            }
            Step::ReleaseLeader(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    leader.end(FetchEnd::LookUpAgain);
                }
            }
            Step::PublishHead(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    // The smallest window, so that readers are detached.
                    let (producer, reader) = leader.publish_head(head(), self.table.budget(), 0);
                    self.producers.push((producer, 0));
                    self.readers.push(ReadingRequest { reader, next: 0 });
                }
            }
            Step::PublishComplete(at) => {
                if let Some(leader) = take(&mut self.leaders, at) {
                    leader.publish_complete(head(), (0..9).map(pattern).collect());
                }
            }
            Step::Push(at, bytes) if !self.producers.is_empty() => {
                let index = at % self.producers.len();
                let (producer, offset) = &mut self.producers[index];
                let data: Vec<u8> = (*offset..*offset + u64::from(bytes)).map(pattern).collect();
                producer.push(&data);
                *offset += u64::from(bytes);
            }
            Step::StopKeeping(at) if !self.producers.is_empty() => {
                let index = at % self.producers.len();
                self.producers[index].0.stop_keeping();
            }
            Step::MakeRoom(at) if !self.producers.is_empty() => {
                let index = at % self.producers.len();
                assert!(!self.producers[index].0.can_keep(1, u64::MAX), "the budget is 0");
            }
            Step::PollProducer(at) if !self.producers.is_empty() => {
                let index = at % self.producers.len();
                let _has_room = self.producers[index].0.poll_ready(&mut Context::from_waker(Waker::noop()));
            }
            Step::CompleteWhole(at) => {
                if let Some((producer, length)) = take(&mut self.producers, at) {
                    if let Some(body) = producer.body_with(&[]) {
                        assert_eq!(body.len() as u64, length);
                    }
                    producer.complete(None);
                }
            }
            Step::Complete(at) => {
                if let Some((producer, _)) = take(&mut self.producers, at) {
                    producer.complete(None);
                }
            }
            Step::DropProducer(at) => drop(take(&mut self.producers, at)),
            Step::Read(at) if !self.readers.is_empty() => {
                let index = at % self.readers.len();
                if self.read(index) {
                    drop(self.readers.swap_remove(index));
                }
            }
            Step::DropReader(at) => drop(take(&mut self.readers, at)),
            Step::PollJoiner(_)
            | Step::Push(..)
            | Step::StopKeeping(_)
            | Step::MakeRoom(_)
            | Step::PollProducer(_)
            | Step::Read(_) => {}
        }
    }

    /// Ends every fetch, then polls only the requests that were woken or never polled.
    fn finish(mut self) {
        loop {
            while let Some(leader) = self.leaders.pop() {
                leader.end(FetchEnd::Fail(ErrorKind::Timeout));
            }
            while let Some((producer, _)) = self.producers.pop() {
                producer.complete(None);
            }
            let is_due = |request: &WaitingRequest| !request.is_polled || request.flag.0.load(Ordering::Relaxed);
            let Some(at) = self.waiting.iter().position(is_due) else { break };
            self.poll(at);
        }
        assert_eq!(self.waiting.len(), 0, "a waiting request has no end");
        while !self.readers.is_empty() {
            if self.read(0) {
                drop(self.readers.swap_remove(0));
            }
        }
        assert_eq!(self.table.budget().charged(), 0, "bytes are charged and not held");
        assert!(self.table.is_empty(), "a fill is left in the table");
        assert!(self.waves.iter().all(|wave| wave.fill.lock().slots.len() == 0), "a place is left");
    }
}

proptest! {
    #[test]
    fn every_interleaving_ends_every_request(steps in prop::collection::vec(step(), 1..200)) {
        let mut interleaving = Interleaving::new();
        for step in steps {
            interleaving.apply(step);
        }
        interleaving.finish();
    }
}

#[tokio::test]
async fn cancelled_wait_leaves_no_place_and_no_charge() {
    let table = Arc::new(FillTable::default());
    let (leader, waiting) = (lead(&table), join(&table));
    let fill = Arc::clone(&leader.fill);
    {
        let mut wait = pin!(waiting.wait(Duration::from_secs(60)));
        assert!(poll_fn(|cx| Poll::Ready(wait.as_mut().poll(cx).is_pending())).await);
    }
    assert!(!leader.has_waiting());
    let (producer, own) = publish(leader, &table);
    producer.push(b"abcd");
    // Joined after the head, and never polled.
    let late = join(&table);
    producer.complete(None);
    drop(own);
    assert_eq!(table.budget().charged(), 4, "the late request has to read the bytes");
    drop(late);
    assert_eq!((table.budget().charged(), fill.lock().slots.len()), (0, 0));
    assert!(table.is_empty());
}

/// The body is in the store, in a buffer of its own. Its readers hold what the budget has charged.
#[tokio::test]
async fn complete_body_is_charged_until_its_readers_have_read_it() {
    let table = Arc::new(FillTable::default());
    let (producer, mut own) = publish(lead(&table), &table);
    producer.push(b"ab");
    producer.push(b"cd");
    let body = producer.body_with(&[]);
    producer.complete(None);
    assert_eq!((body.as_deref(), table.budget().charged()), (Some(&b"abcd"[..]), 4));
    poll_fn(|cx| own.poll_fill(cx)).await.expect("bytes");
    own.consume(2);
    assert_eq!(table.budget().charged(), 2, "what was read is freed");
    drop(own);
    assert_eq!((body.as_deref(), table.budget().charged()), (Some(&b"abcd"[..]), 0));
}

/// Clients that do not read hold the whole budget: one a body that is complete, one a body that is
/// too large to store.
#[tokio::test]
async fn slow_readers_make_room_for_a_body_that_may_be_stored_the_oldest_first() {
    const LENGTH: u64 = 4 * WINDOW_BYTES_MIN;
    let table = Arc::new(FillTable::default());
    let lead_with = |part: &[u8]| {
        let mut builder = KeyBuilder::new();
        match table.join_or_lead(&builder.part(part).key(), epoch(), |_| true) {
            JoinResult::Lead(leader) => leader.publish_head(head(), table.budget(), 2 * LENGTH),
            JoinResult::Join(_) | JoinResult::Bypass => panic!("the key is new"),
        }
    };
    let fill = |producer: &Producer| (0..4).for_each(|_| producer.push(&[b'x'; WINDOW_BYTES_MIN as usize]));
    let (complete, mut oldest) = lead_with(b"complete");
    fill(&complete);
    complete.complete(None);
    let (mut large, mut newer) = lead_with(b"large");
    fill(&large);
    large.stop_keeping();
    let (small, _own) = lead_with(b"small");
    assert!(oldest.may_be_detached() && newer.may_be_detached());
    assert!(small.can_keep(1_000, BUDGET), "there is room");
    assert!(matches!(poll_fn(|cx| oldest.poll_fill(cx)).await, Err(BodyError::Detached)));
    poll_fn(|cx| newer.poll_fill(cx)).await.expect("not needed yet");
    assert!(small.can_keep(LENGTH + 1, BUDGET), "the other one makes room too");
    assert!(!small.can_keep(2 * LENGTH, BUDGET), "one chunk is held by its reader");
    drop(large);
}
