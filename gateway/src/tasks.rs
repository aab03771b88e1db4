//! The tasks of all threads: what runs, since when, and what it waits for.
//!
//! Every task of the gateway is spawned here. It has a kind, belongs to the thread that spawned it,
//! and ends with that thread's runtime at the latest. A panic ends the task, is counted and logged,
//! and never leaves the task. A task that must run as long as its owner is a service: it is
//! restarted after a panic, with a growing delay.
//!
//! A registered task costs 8 bytes in a table of its thread. Spawning, ending and noting a wait
//! take no lock; a table grows with the highest number of concurrent tasks of its thread. The
//! listing reads the tables of all threads without stopping them.

use std::cell::{Cell, RefCell};
use std::collections::BinaryHeap;
use std::future::{Future, poll_fn};
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use pin_project_lite::pin_project;
use shard::{ListedShardTask, ShardTaskKind};
use tokio::task::{AbortHandle, spawn_local};
use tokio::time::sleep;

use crate::event::Event;
use crate::label;
use crate::metrics::{self, Counters, Label};
use crate::panics::{self, Panic, poll_catch};

label! {
    /// The work of a task.
    pub(crate) TaskKind, "kind", {
        /// Accepts connections on one socket of a worker.
        Listener = "listener",
        /// Takes over the connections that other workers pass to this one.
        Incoming = "incoming",
        /// Sweeps the tables of a worker.
        Maintenance = "maintenance",
        /// Serves one client connection.
        Connection = "connection",
        /// Serves one stream of an HTTP/2 connection.
        Stream = "stream",
        /// Drives one HTTP/2 connection to an upstream.
        UpstreamConnection = "upstream_connection",
        /// Moves the body of a shared fetch to its readers and into the store.
        Fill = "fill",
        /// Leads a shared fetch whose client has closed, for the requests that wait.
        DetachedFetch = "detached_fetch",
        /// Sends a copy of a request to the mirror of its route.
        Mirror = "mirror",
        /// Validates a stale object.
        BackgroundValidation = "background_validation",
        /// Accepts connections on the admin address.
        Admin = "admin",
        /// Serves one connection of the admin address, or of the origin of `tidegate demo`.
        SimpleConnection = "simple_connection",
        /// Watches the configuration and reloads it.
        Reload = "reload",
        /// Applies the limit overrides that arrive on the bus.
        Overrides = "overrides",
        /// Reports state changes of shards, limits and the clock.
        StateReport = "state_report",
        /// Samples the counters for the dashboard.
        Dashboard = "dashboard",
        /// Refreshes the lease of one cluster limit.
        Lease = "lease",
        /// Fetches the key set of tokens.
        KeySet = "key_set",
        /// Follows the bus of one Redis server, or discovers the servers of a cluster.
        Bus = "bus",
        /// Follows the addresses of one name of an upstream.
        Discovery = "discovery",
        /// Watches the endpoints of one service of Kubernetes.
        KubernetesWatch = "kubernetes_watch",
        /// Checks the health of an upstream's endpoints.
        HealthCheck = "health_check",
    }
}

label! {
    /// The event that a task waits for.
    pub(crate) TaskWait, "waiting_for", {
        /// Nothing: the task runs. Or a thing that has no name here.
        Unnamed = "",
        /// The next connection.
        NewConnection = "new_connection",
        ProxyHeader = "proxy_header",
        TlsHandshake = "tls_handshake",
        /// The next request.
        ClientHead = "client_head",
        ClientBody = "client_body",
        /// The client reads the response.
        ClientRead = "client_read",
        /// The client closes a connection after its last response.
        ClientClose = "client_close",
        /// The verification of a password.
        Password = "password",
        /// A slot of the upstream's concurrency limit.
        ConcurrencySlot = "concurrency_slot",
        UpstreamConnect = "upstream_connect",
        /// The upstream accepts bytes of the request.
        UpstreamSend = "upstream_send",
        UpstreamHead = "upstream_head",
        UpstreamBody = "upstream_body",
        /// The next event of an upstream.
        EventStream = "event_stream",
        /// The fetch of another request.
        SharedFetch = "shared_fetch",
        /// The readers of a shared fetch.
        Readers = "readers",
        /// A lookup in a shard.
        Shard = "shard",
        /// An answer of a name server.
        NameServer = "name_server",
        /// An answer, or the next change, of the API server of Kubernetes.
        ApiServer = "api_server",
        /// The next run.
        Timer = "timer",
        /// A changed file, or a signal.
        Change = "change",
        /// The delay before a service is restarted.
        Restart = "restart",
    }
}

/// Maximum tasks in the listing: the oldest ones, which are the ones that an operator looks for.
const LISTED_MAX: usize = 1_000;
/// Slots that are allocated at once, 2 KiB.
const BLOCK_SLOTS: usize = 256;
/// Delay before the first restart of a service; doubles with each further one.
const RESTART_DELAY_MIN: Duration = Duration::from_millis(100);
const RESTART_DELAY_MAX: Duration = Duration::from_secs(10);
/// A service that ran for this long counts as healthy: its next restart has the shortest delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

static PANICS: LazyLock<Counters<TaskKind>> = LazyLock::new(Counters::default);
static RESTARTS: LazyLock<Counters<TaskKind>> = LazyLock::new(Counters::default);

/// The tables of all threads.
static BLOCKS: Mutex<Vec<RegisteredBlock>> = Mutex::new(Vec::new());

/// The slots of some tasks of one thread. A slot packs the state of its task: milliseconds from
/// the start of the process to the start of the task (48 bits), its kind plus one, and its wait. A
/// free slot is zero. Only its own thread writes a slot.
type TaskBlock = Arc<[AtomicU64; BLOCK_SLOTS]>;

/// A block in the list of all threads, with the name of the thread that owns it.
struct RegisteredBlock {
    thread: Arc<str>,
    slots: TaskBlock,
}

/// The state of one task, as packed in its slot.
#[derive(Clone, Copy)]
struct TaskState {
    started_ms: u64,
    kind: TaskKind,
    wait: TaskWait,
}

impl TaskState {
    fn pack(self) -> u64 {
        self.started_ms << 16 | (self.kind.index() as u64 + 1) << 8 | self.wait.index() as u64
    }

    /// A packed state with another wait.
    fn with_wait(packed: u64, wait: TaskWait) -> u64 {
        packed & !0xff | wait.index() as u64
    }

    fn unpack(packed: u64) -> Option<Self> {
        let [wait, kind, ..] = packed.to_le_bytes();
        let kind = *TaskKind::ALL.get(usize::from(kind).checked_sub(1)?)?;
        Some(TaskState { started_ms: packed >> 16, kind, wait: *TaskWait::ALL.get(usize::from(wait))? })
    }
}

/// The tasks of one thread.
struct ThreadTasks {
    blocks: RefCell<Vec<TaskBlock>>,
    free: RefCell<Vec<u32>>,
    /// The slot of the task that is being polled.
    current: Cell<Option<u32>>,
}

thread_local! {
    static TASKS: ThreadTasks =
        const { ThreadTasks { blocks: RefCell::new(Vec::new()), free: RefCell::new(Vec::new()), current: Cell::new(None) } };
}

impl ThreadTasks {
    fn allocate(&self) -> u32 {
        if let Some(slot) = self.free.borrow_mut().pop() {
            return slot;
        }
        let (mut blocks, mut free) = (self.blocks.borrow_mut(), self.free.borrow_mut());
        let first = blocks.len() * BLOCK_SLOTS;
        let slots: TaskBlock = Arc::new([const { AtomicU64::new(0) }; BLOCK_SLOTS]);
        let thread = Arc::from(std::thread::current().name().unwrap_or_default());
        let registered = RegisteredBlock { thread, slots: Arc::clone(&slots) };
        BLOCKS.lock().unwrap_or_else(PoisonError::into_inner).push(registered);
        blocks.push(slots);
        // The lowest slot is on top, so that few tasks use few cache lines.
        let index = |slot: usize| u32::try_from(slot).expect("a thread has fewer than 2^32 tasks");
        free.extend((first + 1..first + BLOCK_SLOTS).rev().map(index));
        index(first)
    }

    fn with_slot(&self, slot: u32, act: impl FnOnce(&AtomicU64)) {
        let slot = slot as usize;
        if let Some(block) = self.blocks.borrow().get(slot / BLOCK_SLOTS) {
            act(&block[slot % BLOCK_SLOTS]);
        }
    }

    /// The wait of the task that is being polled.
    fn current_wait(&self) -> TaskWait {
        let mut wait = TaskWait::Unnamed;
        if let Some(slot) = self.current.get() {
            self.with_slot(slot, |packed| {
                wait = TaskState::unpack(packed.load(Relaxed)).map_or(wait, |state| state.wait);
            });
        }
        wait
    }

    fn set_wait(&self, slot: u32, wait: TaskWait) {
        // Only this thread writes the slot.
        self.with_slot(slot, |packed| packed.store(TaskState::with_wait(packed.load(Relaxed), wait), Relaxed));
    }
}

impl Drop for ThreadTasks {
    fn drop(&mut self) {
        let own = self.blocks.get_mut();
        let is_foreign = |block: &RegisteredBlock| !own.iter().any(|own| Arc::ptr_eq(own, &block.slots));
        BLOCKS.lock().unwrap_or_else(PoisonError::into_inner).retain(is_foreign);
    }
}

/// The entry of one task in the table of its thread, until it is dropped.
struct TaskSlot {
    index: u32,
    /// The table belongs to the thread.
    _not_send: PhantomData<*const ()>,
}

impl TaskSlot {
    fn new(kind: TaskKind) -> Self {
        TaskSlot::with_state(TaskState { started_ms: since_start(Instant::now()), kind, wait: TaskWait::Unnamed })
    }

    fn with_state(state: TaskState) -> Self {
        let index = TASKS.with(|tasks| {
            let index = tasks.allocate();
            tasks.with_slot(index, |packed| packed.store(state.pack(), Relaxed));
            index
        });
        TaskSlot { index, _not_send: PhantomData }
    }
}

impl Drop for TaskSlot {
    fn drop(&mut self) {
        // The table is gone if the runtime outlives the thread's values.
        let _table_is_gone = TASKS.try_with(|tasks| {
            tasks.with_slot(self.index, |packed| packed.store(0, Relaxed));
            tasks.free.borrow_mut().push(self.index);
        });
    }
}

fn since_start(now: Instant) -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(now.saturating_duration_since(*START).as_millis()).unwrap_or(u64::MAX)
}

/// A part of a task's work that is listed as a task of its own. A panic of it ends it.
pub(crate) struct TrackedWork {
    slot: TaskSlot,
    kind: TaskKind,
}

impl TrackedWork {
    fn new(kind: TaskKind) -> Self {
        TrackedWork { slot: TaskSlot::new(kind), kind }
    }

    /// Lists work that the current task began at `begun`, and has polled already: it waits for what
    /// the task waits for.
    pub(crate) fn of_current(kind: TaskKind, begun: Instant) -> Self {
        let wait = TASKS.with(ThreadTasks::current_wait);
        let slot = TaskSlot::with_state(TaskState { started_ms: since_start(begun), kind, wait });
        TrackedWork { slot, kind }
    }

    /// Polls the work; `None` after a panic.
    pub(crate) fn poll<F: Future>(&self, future: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        let outer = TASKS.with(|tasks| tasks.current.replace(Some(self.slot.index)));
        let polled = poll_catch(future, cx);
        TASKS.with(|tasks| tasks.current.set(outer));
        polled.map(|ended| ended.map_err(|panic| report_panic(self.kind, &panic)).ok())
    }
}

pin_project! {
    /// A future that is listed as a task while it exists. Its panic ends it with `None`.
    pub(crate) struct TrackedTask<F> {
        #[pin]
        future: F,
        work: TrackedWork,
    }
}

impl<F: Future> Future for TrackedTask<F> {
    type Output = Option<F::Output>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<F::Output>> {
        let this = self.project();
        this.work.poll(this.future, cx)
    }
}

/// Lists `future` as a task of this thread. For a spawner that is not `spawn`, such as a `JoinSet`.
pub(crate) fn track<F: Future>(kind: TaskKind, future: F) -> TrackedTask<F> {
    TrackedTask { future, work: TrackedWork::new(kind) }
}

/// Runs `future` as a task of this thread, until it ends. It must end by itself: each of its waits
/// has a deadline. Needs a local runtime.
pub(crate) fn spawn<F: Future + 'static>(kind: TaskKind, future: F) {
    spawn_local(track(kind, future));
}

/// Counts and logs the panic of a task.
pub(crate) fn report_panic(kind: TaskKind, panic: &Panic) {
    PANICS.inc(kind);
    Event::TaskPanicked { kind: kind.as_str(), panic: panics::message(panic) }.emit();
}

/// Notes what the current task waits for, until it waits for something else. Call it where the task
/// begins to wait, not where it merely may. Does nothing outside of a task.
pub(crate) fn set_waiting_for(wait: TaskWait) {
    TASKS.with(|tasks| {
        if let Some(slot) = tasks.current.get() {
            tasks.set_wait(slot, wait);
        }
    });
}

/// Why a service returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ServiceEnd {
    /// Its owner ends too.
    Finished,
    /// It cannot go on; it is to be started again.
    Failed,
}

/// Stops its service when it is dropped.
#[must_use = "dropping it stops the service"]
pub(crate) struct ServiceTask(AbortHandle);

impl Drop for ServiceTask {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Runs a service: `run` is called again after a panic and after `ServiceEnd::Failed`, with a
/// growing delay. The service ends with `ServiceEnd::Finished`, and when the returned task is
/// dropped. Needs a local runtime.
pub(crate) fn supervise<F>(kind: TaskKind, mut run: F) -> ServiceTask
where
    F: AsyncFnMut() -> ServiceEnd + 'static,
{
    let supervised = async move {
        let mut delay = RESTART_DELAY_MIN;
        loop {
            let started = tokio::time::Instant::now();
            let ended = {
                let mut running = pin!(run());
                poll_fn(|cx| poll_catch(running.as_mut(), cx)).await
            };
            match ended {
                Ok(ServiceEnd::Finished) => return,
                Ok(ServiceEnd::Failed) => Event::ServiceEnded { kind: kind.as_str() }.emit(),
                Err(panic) => report_panic(kind, &panic),
            }
            if started.elapsed() >= HEALTHY_AFTER {
                delay = RESTART_DELAY_MIN;
            }
            set_waiting_for(TaskWait::Restart);
            sleep(delay).await;
            set_waiting_for(TaskWait::Unnamed);
            delay = (2 * delay).min(RESTART_DELAY_MAX);
            RESTARTS.inc(kind);
        }
    };
    ServiceTask(spawn_local(track(kind, supervised)).abort_handle())
}

/// One task in the listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ListedTask {
    pub(crate) kind: TaskKind,
    /// Name of the thread that runs the task.
    pub(crate) thread: Arc<str>,
    pub(crate) age: Duration,
    pub(crate) waiting_for: TaskWait,
}

/// The running tasks: their number by kind, and the oldest ones.
pub(crate) struct TaskList {
    /// By `TaskKind::index`.
    counts: [u64; TaskKind::ALL.len()],
    /// At most `LISTED_MAX`, the oldest first.
    pub(crate) oldest: Vec<ListedTask>,
    /// The tasks of connections and write queues to shards, the oldest first. A few for each worker
    /// and shard.
    pub(crate) shard_tasks: Vec<ListedShardTask>,
}

impl TaskList {
    /// Reads the tables of all threads.
    pub(crate) fn read() -> Self {
        let now = since_start(Instant::now());
        let mut counts = [0; TaskKind::ALL.len()];
        // The youngest of the oldest is on top.
        let mut oldest = BinaryHeap::new();
        for_each_slot(|thread, packed| {
            let Some(state) = TaskState::unpack(packed) else { return };
            counts[state.kind.index()] += 1;
            oldest.push((packed, Arc::clone(thread)));
            if oldest.len() > LISTED_MAX {
                oldest.pop();
            }
        });
        let listed = oldest.into_sorted_vec().into_iter().filter_map(|(packed, thread)| {
            let TaskState { started_ms, kind, wait } = TaskState::unpack(packed)?;
            let age = Duration::from_millis(now.saturating_sub(started_ms));
            Some(ListedTask { kind, thread, age, waiting_for: wait })
        });
        TaskList { counts, oldest: listed.collect(), shard_tasks: ListedShardTask::all() }
    }

    pub(crate) fn count(&self, kind: TaskKind) -> u64 {
        self.counts[kind.index()]
    }

    pub(crate) fn to_json(&self) -> serde_json::Value {
        let seconds = |age: Duration| age.as_millis() as f64 / 1_000.0;
        let tasks = self.oldest.iter().map(|task| {
            serde_json::json!({
                "kind": task.kind.as_str(),
                "thread": &*task.thread,
                "age_seconds": seconds(task.age),
                "waiting_for": task.waiting_for.as_str(),
            })
        });
        let shard_tasks = self.shard_tasks.iter().take(LISTED_MAX).map(|task| {
            serde_json::json!({
                "kind": task.kind.name(),
                "name": &*task.name,
                "thread": &*task.thread,
                "age_seconds": seconds(task.age),
                "waiting_for": task.waiting_for,
            })
        });
        let counts = TaskKind::ALL.iter().map(|kind| (kind.as_str().to_owned(), self.count(*kind).into()));
        let of_kind = |kind| self.shard_tasks.iter().filter(|task| task.kind == kind).count() as u64;
        let shard_counts = ShardTaskKind::ALL.iter().map(|kind| (kind.name().to_owned(), of_kind(*kind).into()));
        serde_json::json!({
            "count": self.counts.iter().sum::<u64>() + self.shard_tasks.len() as u64,
            "kinds": counts.chain(shard_counts).collect::<serde_json::Map<_, _>>(),
            "tasks": tasks.chain(shard_tasks).collect::<Vec<_>>(),
        })
    }
}

fn for_each_slot(mut visit: impl FnMut(&Arc<str>, u64)) {
    for block in BLOCKS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        block.slots.iter().for_each(|slot| visit(&block.thread, slot.load(Relaxed)));
    }
}

/// Exposes the metrics of tasks.
pub(crate) fn expose() {
    metrics::expose_gauge_with("tidegate_tasks", "Running tasks, by kind.", |emit| {
        let mut counts = [0_u64; TaskKind::ALL.len()];
        for_each_slot(|_, packed| {
            if let Some(state) = TaskState::unpack(packed) {
                counts[state.kind.index()] += 1;
            }
        });
        for kind in TaskKind::ALL {
            emit(&[(TaskKind::NAME, kind.as_str())], counts[kind.index()] as f64);
        }
        let shard_tasks = ListedShardTask::all();
        for kind in ShardTaskKind::ALL {
            let running = shard_tasks.iter().filter(|task| task.kind == kind).count();
            emit(&[(TaskKind::NAME, kind.name())], running as f64);
        }
    });
    metrics::expose_counter_with("tidegate_task_panics", "Tasks that panicked, by kind.", |emit| {
        for kind in TaskKind::ALL {
            emit(&[(TaskKind::NAME, kind.as_str())], PANICS.get(*kind));
        }
        for kind in ShardTaskKind::ALL {
            emit(&[(TaskKind::NAME, kind.name())], kind.panics());
        }
    });
    metrics::expose_counters(
        "tidegate_task_restarts",
        "Services that were started again after a panic or an unexpected end, by kind.",
        &RESTARTS,
    );
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};
    use std::rc::Rc;

    use tokio::task::{LocalSet, yield_now};

    use super::*;

    /// Runs a scenario on a thread of its own name with a paused clock.
    fn run_local(scenario: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        LocalSet::new().block_on(&runtime.expect("a runtime"), scenario);
    }

    /// The listed tasks of this thread.
    fn own_tasks() -> Vec<(TaskKind, TaskWait)> {
        let current = std::thread::current();
        let tasks = TaskList::read().oldest.into_iter().filter(|task| current.name() == Some(&task.thread));
        tasks.map(|task| (task.kind, task.waiting_for)).collect()
    }

    #[test]
    fn task_is_listed_with_its_wait_until_it_ends() {
        run_local(async {
            let (end, ended) = tokio::sync::oneshot::channel::<()>();
            spawn(TaskKind::Fill, async move {
                set_waiting_for(TaskWait::UpstreamHead);
                yield_now().await;
                set_waiting_for(TaskWait::UpstreamBody);
                let _sender_may_be_gone = ended.await;
            });
            assert_eq!(own_tasks(), [(TaskKind::Fill, TaskWait::Unnamed)]);
            yield_now().await;
            assert_eq!(own_tasks(), [(TaskKind::Fill, TaskWait::UpstreamHead)]);
            yield_now().await;
            assert_eq!(own_tasks(), [(TaskKind::Fill, TaskWait::UpstreamBody)]);
            drop(end);
            yield_now().await;
            assert_eq!(own_tasks(), []);
        });
    }

    #[test]
    fn wait_is_that_of_the_polled_task() {
        run_local(async {
            set_waiting_for(TaskWait::Timer);
            let inner = track(TaskKind::Stream, async {
                set_waiting_for(TaskWait::ClientBody);
                yield_now().await;
            });
            let outer = track(TaskKind::Connection, async {
                let mut inner = pin!(inner);
                poll_fn(|cx| {
                    let polled = inner.as_mut().poll(cx);
                    set_waiting_for(TaskWait::ClientHead);
                    polled
                })
                .await;
            });
            let mut outer = pin!(outer);
            assert!(poll_fn(|cx| Poll::Ready(outer.as_mut().poll(cx).is_pending())).await);
            let mut tasks = own_tasks();
            tasks.sort_by_key(|(kind, _)| kind.index());
            let expected = [(TaskKind::Connection, TaskWait::ClientHead), (TaskKind::Stream, TaskWait::ClientBody)];
            assert_eq!(tasks, expected);
        });
        assert_eq!(own_tasks(), []);
    }

    #[test]
    fn panic_is_counted_and_stays_in_its_task() {
        run_local(async {
            let before = PANICS.get(TaskKind::BackgroundValidation);
            spawn(TaskKind::BackgroundValidation, async { panic!("in a task") });
            yield_now().await;
            assert_eq!((PANICS.get(TaskKind::BackgroundValidation), own_tasks()), (before + 1, Vec::new()));
        });
        expose();
        let exposition = metrics::exposition(metrics::ExpositionFormat::Text);
        assert!(exposition.contains("tidegate_task_panics_total{kind=\"background_validation\"} 1"), "{exposition}");
        assert!(exposition.contains("tidegate_tasks{kind=\"background_validation\"} 0"), "{exposition}");
    }

    #[test]
    fn service_is_restarted_with_a_growing_delay_until_it_finishes() {
        run_local(async {
            let (panics, restarts) = (PANICS.get(TaskKind::Overrides), RESTARTS.get(TaskKind::Overrides));
            let starts = Rc::new(RefCell::new(Vec::new()));
            let recorded = Rc::clone(&starts);
            let begin = tokio::time::Instant::now();
            let _service = supervise(TaskKind::Overrides, async move || {
                recorded.borrow_mut().push(begin.elapsed());
                let run = recorded.borrow().len();
                match run {
                    1 => panic!("in a service"),
                    2 => ServiceEnd::Failed,
                    // Long enough to count as healthy.
                    3 => {
                        sleep(HEALTHY_AFTER).await;
                        ServiceEnd::Failed
                    }
                    _ => ServiceEnd::Finished,
                }
            });
            sleep(Duration::from_millis(50)).await;
            assert_eq!(own_tasks(), [(TaskKind::Overrides, TaskWait::Restart)]);
            sleep(2 * HEALTHY_AFTER).await;
            let expected = [0, 100, 300, 60_400].map(Duration::from_millis);
            assert_eq!((starts.take().as_slice(), own_tasks()), (expected.as_slice(), Vec::new()));
            let counted = (PANICS.get(TaskKind::Overrides) - panics, RESTARTS.get(TaskKind::Overrides) - restarts);
            assert_eq!(counted, (1, 3));
        });
    }

    #[test]
    fn dropped_service_ends() {
        run_local(async {
            let service = supervise(TaskKind::Bus, async || pending().await);
            yield_now().await;
            assert_eq!(own_tasks().len(), 1);
            drop(service);
            yield_now().await;
            assert_eq!(own_tasks(), []);
        });
    }

    #[test]
    fn listing_is_bounded_and_has_the_oldest_first() {
        let tasks: Vec<_> = (0..2 * LISTED_MAX).map(|_| track(TaskKind::Stream, ready(()))).collect();
        let list = TaskList::read();
        assert!(list.count(TaskKind::Stream) >= tasks.len() as u64);
        assert_eq!(list.oldest.len(), LISTED_MAX);
        assert!(list.oldest.is_sorted_by(|older, younger| older.age >= younger.age));
        drop(tasks);
        // The slots are used again.
        let blocks = TASKS.with(|tasks| tasks.blocks.borrow().len());
        let again: Vec<_> = (0..2 * LISTED_MAX).map(|_| track(TaskKind::Stream, ready(()))).collect();
        assert_eq!(TASKS.with(|tasks| tasks.blocks.borrow().len()), blocks);
        drop(again);
    }

    #[test]
    fn tables_of_ended_threads_are_gone() {
        let thread = std::thread::Builder::new().name("short-lived".to_owned());
        let task = || drop(track(TaskKind::Stream, ready(())));
        thread.spawn(task).expect("a thread").join().expect("no panic");
        let blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(blocks.iter().all(|block| &*block.thread != "short-lived"));
    }

    #[test]
    fn tracking_adds_little_to_a_task() {
        assert_eq!(size_of::<TrackedTask<[u64; 100]>>(), 800 + 8);
    }
}
