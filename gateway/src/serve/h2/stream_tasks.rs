//! Runs the streams of one connection within the connection's task.
//!
//! A stream is polled when it begins, and when it was woken. All streams that were woken are polled
//! before the connection writes, so that what they send leaves together; and no task is allocated
//! for a request. Invariant: a woken stream is polled, or the connection's task is woken again. The
//! waker of a past stream may poll its slot once more, in vain.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Wake, Waker};
use std::time::Instant;

use tokio::task::coop;

use crate::panics::poll_catch;
use crate::tasks::{TaskKind, TrackedWork, report_panic};

/// Futures of past streams whose memory a connection keeps for the next ones.
const KEPT_MAX: usize = 32;

/// The memory of a stream's future; `None` between two streams.
type StreamFuture<F> = Pin<Box<Option<F>>>;

/// The streams of one connection. `F` serves one stream.
pub(super) struct StreamTasks<F> {
    slots: Vec<StreamSlot<F>>,
    /// Indexes of slots without a stream.
    free: Vec<usize>,
    kept: Vec<StreamFuture<F>>,
    shared: Arc<WokenStreams>,
    /// Indexes that are being polled.
    polled: Vec<usize>,
}

struct StreamSlot<F> {
    future: Option<StreamFuture<F>>,
    /// When the request arrived.
    begun: Instant,
    /// Listed as a task as soon as it waits: most responses from the cache never do.
    listed: Option<TrackedWork>,
    state: Arc<StreamWaker>,
    waker: Waker,
}

/// The part of a connection that the wakers of its streams share with it.
#[derive(Default)]
struct WokenStreams(Mutex<WokenState>);

#[derive(Default)]
struct WokenState {
    indexes: Vec<usize>,
    connection: Option<Waker>,
    /// The connection's task runs, and looks at `indexes` before it waits.
    is_polled: bool,
}

/// Wakes one stream. It may outlive the stream and then wakes the next one of its slot, which is
/// polled in vain.
struct StreamWaker {
    index: usize,
    is_woken: AtomicBool,
    shared: Arc<WokenStreams>,
}

impl<F: Future<Output = ()>> StreamTasks<F> {
    pub(super) fn new() -> Self {
        StreamTasks {
            slots: Vec::new(),
            free: Vec::new(),
            kept: Vec::new(),
            shared: Arc::default(),
            polled: Vec::new(),
        }
    }

    /// The connection's task begins to run, until `leave`.
    pub(super) fn enter(&self, cx: &Context<'_>) {
        let mut state = self.shared.lock();
        state.is_polled = true;
        if !state.connection.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            state.connection = Some(cx.waker().clone());
        }
    }

    /// The connection's task has done what it can. It runs again at once if a stream is woken.
    pub(super) fn leave(&self) {
        let mut state = self.shared.lock();
        state.is_polled = false;
        if !state.indexes.is_empty()
            && let Some(connection) = &state.connection
        {
            connection.wake_by_ref();
        }
    }

    /// Begins a stream, whose request arrived at `begun`, and polls it once.
    #[inline]
    pub(super) fn begin(&mut self, begun: Instant, serve: impl FnOnce() -> F) {
        let index = self.insert(begun, serve);
        self.poll(index);
    }

    /// Begins a stream that is polled by the next `poll_woken`.
    #[inline]
    pub(super) fn begin_later(&mut self, begun: Instant, serve: impl FnOnce() -> F) {
        let index = self.insert(begun, serve);
        self.slots[index].waker.wake_by_ref();
    }

    // Inlined, so that the future is made where it stays: moving it costs as much as a copy of its
    // 6 KiB.
    #[inline(always)]
    fn insert(&mut self, begun: Instant, serve: impl FnOnce() -> F) -> usize {
        let mut memory: StreamFuture<F> = self.kept.pop().unwrap_or_else(|| Box::pin(None));
        memory.set(Some(serve()));
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index];
            (slot.future, slot.begun) = (Some(memory), begun);
            return index;
        }
        let index = self.slots.len();
        let state = Arc::new(StreamWaker { index, is_woken: AtomicBool::new(false), shared: Arc::clone(&self.shared) });
        let waker = Waker::from(Arc::clone(&state));
        self.slots.push(StreamSlot { future: Some(memory), begun, listed: None, state, waker });
        index
    }

    /// Polls the streams that were woken, as far as the budget of the connection's task allows.
    pub(super) fn poll_woken(&mut self) {
        std::mem::swap(&mut self.polled, &mut self.shared.lock().indexes);
        for at in 0..self.polled.len() {
            if !coop::has_budget_remaining() {
                let mut state = self.shared.lock();
                state.indexes.extend_from_slice(&self.polled[at..]);
                break;
            }
            self.poll(self.polled[at]);
        }
        self.polled.clear();
    }

    /// Polls every stream a last time: the connection is over, which they learn now.
    pub(super) fn end(&mut self) {
        for index in 0..self.slots.len() {
            self.poll(index);
        }
        self.slots.clear();
        self.free.clear();
        // Wakers may live on with a connection to an upstream.
        *self.shared.lock() = WokenState::default();
    }

    /// Releases the memory of past streams.
    pub(super) fn release(&mut self) {
        self.kept = Vec::new();
        if self.free.len() == self.slots.len() {
            self.slots = Vec::new();
            self.free = Vec::new();
        }
    }

    fn poll(&mut self, index: usize) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        slot.state.is_woken.store(false, Ordering::Release);
        let Some(future) = &mut slot.future else { return };
        let Some(running) = future.as_mut().as_pin_mut() else { return };
        let mut cx = Context::from_waker(&slot.waker);
        let polled = match &slot.listed {
            Some(work) => work.poll(running, &mut cx).map(drop),
            None => poll_catch(running, &mut cx).map(|ended| {
                if let Err(panic) = ended {
                    report_panic(TaskKind::Stream, &panic);
                }
            }),
        };
        if polled.is_pending() {
            slot.listed.get_or_insert_with(|| TrackedWork::of_current(TaskKind::Stream, slot.begun));
            return;
        }
        slot.listed = None;
        future.set(None);
        let memory = slot.future.take();
        self.free.push(index);
        if self.kept.len() < KEPT_MAX {
            self.kept.extend(memory);
        }
    }
}

impl<F> Drop for StreamTasks<F> {
    fn drop(&mut self) {
        *self.shared.lock() = WokenState::default();
    }
}

impl WokenStreams {
    fn lock(&self) -> MutexGuard<'_, WokenState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for StreamWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.is_woken.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut state = self.shared.lock();
        state.indexes.push(self.index);
        // The first one has woken the connection's task for all.
        if state.indexes.len() == 1
            && !state.is_polled
            && let Some(connection) = &state.connection
        {
            connection.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, poll_fn};
    use std::pin::pin;
    use std::sync::atomic::AtomicUsize;
    use std::task::Poll;

    use super::*;

    /// Counts how often it was woken.
    #[derive(Default)]
    struct CountingWaker(AtomicUsize);

    impl Wake for CountingWaker {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    type TestFuture = Pin<Box<dyn Future<Output = ()>>>;

    struct Connection {
        tasks: StreamTasks<TestFuture>,
        woken: Arc<CountingWaker>,
    }

    impl Connection {
        fn new() -> Self {
            Connection { tasks: StreamTasks::new(), woken: Arc::default() }
        }

        /// One poll of the connection's task.
        fn run(&mut self, act: impl FnOnce(&mut StreamTasks<TestFuture>)) {
            let waker = Waker::from(Arc::clone(&self.woken));
            self.tasks.enter(&Context::from_waker(&waker));
            act(&mut self.tasks);
            self.tasks.poll_woken();
            self.tasks.leave();
        }

        fn wakes(&self) -> usize {
            self.woken.0.load(Ordering::Relaxed)
        }
    }

    /// Ends after `waits` wakes; keeps its waker in `waker`.
    fn waits(mut waits: usize, waker: &Arc<Mutex<Option<Waker>>>) -> TestFuture {
        let waker = Arc::clone(waker);
        Box::pin(poll_fn(move |cx| {
            *waker.lock().expect("no panic") = Some(cx.waker().clone());
            waits = waits.saturating_sub(1);
            if waits == 0 { Poll::Ready(()) } else { Poll::Pending }
        }))
    }

    fn wake(waker: &Arc<Mutex<Option<Waker>>>) {
        waker.lock().expect("no panic").as_ref().expect("polled").wake_by_ref();
    }

    #[test]
    fn panic_ends_its_stream_and_no_other() {
        let mut connection = Connection::new();
        connection.run(|tasks| {
            tasks.begin(Instant::now(), || Box::pin(pending()));
            tasks.begin(Instant::now(), || Box::pin(async { panic!("in a stream") }));
        });
        assert_eq!(connection.tasks.free, [1]);
    }

    #[test]
    fn streams_that_are_woken_together_wake_the_connection_once() {
        let (mut connection, wakers) = (Connection::new(), [(); 3].map(|()| Arc::default()));
        connection.run(|tasks| wakers.iter().for_each(|waker| tasks.begin(Instant::now(), || waits(2, waker))));
        wakers.iter().for_each(wake);
        wakers.iter().for_each(wake);
        assert_eq!((connection.wakes(), connection.tasks.free.len()), (1, 0));
        connection.run(|_| ());
        assert_eq!((connection.wakes(), connection.tasks.free.len()), (1, 3));
    }

    #[test]
    fn stream_woken_while_the_connection_runs_is_polled_without_a_wake() {
        let (mut connection, waker) = (Connection::new(), Arc::default());
        connection.run(|tasks| {
            tasks.begin(Instant::now(), || waits(2, &waker));
            wake(&waker);
        });
        assert_eq!((connection.wakes(), connection.tasks.free.len()), (0, 1));
    }

    #[test]
    fn stream_woken_after_the_others_were_polled_wakes_the_connection() {
        let (mut connection, waker) = (Connection::new(), Arc::default());
        connection.run(|tasks| tasks.begin(Instant::now(), || waits(3, &waker)));
        connection.tasks.enter(&Context::from_waker(&Waker::from(Arc::clone(&connection.woken))));
        connection.tasks.poll_woken();
        wake(&waker);
        connection.tasks.leave();
        assert_eq!(connection.wakes(), 1);
    }

    #[test]
    fn waker_of_a_past_stream_does_no_harm() {
        let (mut connection, waker) = (Connection::new(), Arc::default());
        connection.run(|tasks| tasks.begin(Instant::now(), || waits(1, &waker)));
        wake(&waker);
        connection.run(|tasks| tasks.begin(Instant::now(), || Box::pin(pending())));
        connection.tasks.end();
        wake(&waker);
        drop(connection);
        wake(&waker);
    }

    #[tokio::test]
    async fn streams_beyond_the_budget_are_polled_by_the_next_poll() {
        let (mut connection, polls) = (Connection::new(), Arc::new(AtomicUsize::new(0)));
        let mut used_up = pin!(poll_fn(|cx| {
            connection.run(|tasks| {
                for _ in 0..2 {
                    let polls = Arc::clone(&polls);
                    tasks.begin_later(Instant::now(), || {
                        Box::pin(async move {
                            polls.fetch_add(1, Ordering::Relaxed);
                        })
                    });
                }
                while coop::has_budget_remaining() {
                    if let Poll::Ready(budget) = coop::poll_proceed(cx) {
                        budget.made_progress();
                    }
                }
            });
            Poll::Ready(())
        }));
        used_up.as_mut().await;
        assert_eq!((polls.load(Ordering::Relaxed), connection.wakes()), (0, 1));
        tokio::task::yield_now().await;
        connection.run(|_| ());
        assert_eq!(polls.load(Ordering::Relaxed), 2);
    }
}
