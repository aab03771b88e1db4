//! The access log: one line for each request, written by a dedicated thread.
//!
//! A request formats its line into a buffer of its thread and never writes to a file. A bounded
//! channel passes whole buffers to the single writer, so lines do not interleave. If the writer
//! cannot keep up, lines are dropped and counted.

mod entry;

pub(crate) use entry::{AccessLogEntry, AccessLogFormat, LogField};

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use crate::event::Event;
use crate::metrics::{self, Counter};
use crate::timestamp::TimestampFormatter;

/// Destination of the access log.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AccessLogTarget {
    /// Standard output.
    Stdout,
    /// Disabled.
    Off,
    /// Appended to this file.
    File(PathBuf),
}

impl AccessLogTarget {
    /// The path of the file, if it is one.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            AccessLogTarget::File(path) => Some(path),
            AccessLogTarget::Stdout | AccessLogTarget::Off => None,
        }
    }
}

/// A thread submits its buffer at this size.
const BATCH_BYTES: usize = 32 << 10;
/// A thread submits its buffer at this age.
const BATCH_AGE_MAX: Duration = Duration::from_millis(100);
/// Buffers queued for the writer: about 4 MiB, which is 0.1 s at 150,000 requests per second.
const QUEUE_BATCHES: usize = 128;
/// Time that `close` waits for a writer that is blocked on a full pipe.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

static DROPPED: LazyLock<Counter> = LazyLock::new(Counter::default);

/// Exposes `tidegate_access_log_dropped_total`.
pub(crate) fn expose() {
    metrics::expose_counter_with(
        "tidegate_access_log_dropped",
        "Lines of the access log that were dropped because its writer could not keep up or failed.",
        |emit| emit(&[], DROPPED.get()),
    );
}

/// Formatted lines for the writer.
#[derive(Default)]
struct LineBatch {
    text: Vec<u8>,
    lines: u64,
}

/// Message to the writer thread of the access log: a batch of lines, or the request to stop.
enum WriterMessage {
    Lines(LineBatch),
    Close,
}

/// Access log: the channel to its writer thread, or `None` if it is disabled. `record` may be
/// called from any thread.
pub(crate) struct AccessLog(Option<AccessLogInner>);

/// The channel to the writer thread, and what identifies this log among the thread buffers.
struct AccessLogInner {
    /// Identifies the log within the process: a thread's buffer belongs to one log.
    id: u64,
    /// `None`: standard output.
    path: Option<PathBuf>,
    sender: SyncSender<WriterMessage>,
    reopen: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl AccessLog {
    /// Opens the log and starts its writer.
    ///
    /// # Errors
    /// The file cannot be opened for appending, or the writer's thread cannot be started.
    pub(crate) fn open(target: &AccessLogTarget) -> io::Result<AccessLog> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let sink = match target {
            AccessLogTarget::Off => return Ok(AccessLog(None)),
            AccessLogTarget::Stdout => LogSink::Stdout,
            AccessLogTarget::File(path) => LogSink::File { file: open_file(path)?, path: path.clone() },
        };
        let (sender, receiver) = sync_channel(QUEUE_BATCHES);
        let reopen = Arc::new(AtomicBool::new(false));
        let writer = LogWriter { sink, receiver, reopen: Arc::clone(&reopen), has_partial_line: false };
        let writer = thread::Builder::new().name("access-log".to_owned()).spawn(|| writer.run())?;
        let id = NEXT.fetch_add(1, Relaxed);
        let path = target.path().map(Path::to_owned);
        Ok(AccessLog(Some(AccessLogInner { id, path, sender, reopen, writer: Mutex::new(Some(writer)) })))
    }

    /// Whether the log is enabled.
    pub(crate) fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Appends a line to this thread's buffer, and submits the buffer when it is full or old.
    pub(crate) fn record(&self, format: &AccessLogFormat, line: &AccessLogEntry<'_>) {
        let Some(open) = &self.0 else { return };
        let now = SystemTime::now();
        BUFFER.with_borrow_mut(|buffer| {
            buffer.attach_to(open);
            buffer.append(now, (format, line));
            buffer.submit_if_due(now);
        });
    }

    /// Submits this thread's buffer. Call it about every 100 ms, so that lines do not wait for
    /// later ones, and before the thread stops recording.
    pub(crate) fn flush(&self) {
        BUFFER.with_borrow_mut(ThreadBuffer::submit);
    }

    /// Reopens the file, for log rotation.
    pub(crate) fn reopen(&self) {
        let Some(open) = &self.0 else { return };
        open.reopen.store(true, Relaxed);
        // Wakes an idle writer. If the channel is full, the writer is awake.
        let _full_or_closed = open.sender.try_send(WriterMessage::Lines(LineBatch::default()));
    }

    /// Writes the submitted buffers, including this thread's, and stops the writer. Blocks for at
    /// most 5 s. A thread submits its buffer when it ends, so join the recording threads first.
    pub(crate) fn close(&self) {
        self.flush();
        let Some(open) = &self.0 else { return };
        let Some(writer) = open.writer.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let deadline = Instant::now() + CLOSE_TIMEOUT;
        while let Err(TrySendError::Full(_)) = open.sender.try_send(WriterMessage::Close) {
            if Instant::now() >= deadline {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        while !writer.is_finished() {
            if Instant::now() >= deadline {
                let error = &"the writer is blocked; its lines are lost";
                Event::AccessLogFailed { path: open.path.as_deref(), error }.emit();
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        if writer.join().is_err() {
            Event::AccessLogFailed { path: open.path.as_deref(), error: &"the writer panicked" }.emit();
        }
    }
}

thread_local! {
    static BUFFER: RefCell<ThreadBuffer> = const { RefCell::new(ThreadBuffer::new()) };
}

/// Formatted lines of one thread, submitted to the writer at `BATCH_BYTES` or `BATCH_AGE_MAX`.
struct ThreadBuffer {
    /// Id and channel of the log that the lines belong to.
    log: Option<(u64, SyncSender<WriterMessage>)>,
    batch: LineBatch,
    /// Time of the first line.
    started_at: SystemTime,
    timestamps: TimestampFormatter,
}

impl ThreadBuffer {
    const fn new() -> Self {
        ThreadBuffer {
            log: None,
            batch: LineBatch { text: Vec::new(), lines: 0 },
            started_at: SystemTime::UNIX_EPOCH,
            timestamps: TimestampFormatter::new(),
        }
    }

    fn attach_to(&mut self, open: &AccessLogInner) {
        if self.log.as_ref().is_none_or(|(id, _)| *id != open.id) {
            self.submit();
            self.log = Some((open.id, open.sender.clone()));
        }
    }

    fn append(&mut self, now: SystemTime, (format, line): (&AccessLogFormat, &AccessLogEntry<'_>)) {
        if self.batch.lines == 0 {
            self.started_at = now;
            self.batch.text.reserve(BATCH_BYTES + 1024);
        }
        format.write(&mut self.batch.text, (&mut self.timestamps, now), line);
        self.batch.lines += 1;
    }

    fn submit_if_due(&mut self, now: SystemTime) {
        // If the clock was set back, the age is unknown and the buffer counts as old.
        let is_old = now.duration_since(self.started_at).map_or(true, |age| age >= BATCH_AGE_MAX);
        if is_old || self.batch.text.len() >= BATCH_BYTES {
            self.submit();
        }
    }

    fn submit(&mut self) {
        if self.batch.lines == 0 {
            return;
        }
        let Some((_, sender)) = &self.log else { return };
        let batch = std::mem::take(&mut self.batch);
        let lines = batch.lines;
        if let Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) =
            sender.try_send(WriterMessage::Lines(batch))
        {
            DROPPED.add(lines);
            if let WriterMessage::Lines(mut batch) = message {
                batch.text.clear();
                self.batch = LineBatch { text: batch.text, lines: 0 };
            }
        }
    }
}

impl Drop for ThreadBuffer {
    fn drop(&mut self) {
        self.submit();
    }
}

/// Open destination of the access log: standard output, or a file with the path for reopening.
enum LogSink {
    Stdout,
    File { file: File, path: PathBuf },
}

impl LogSink {
    fn path(&self) -> Option<&Path> {
        match self {
            LogSink::Stdout => None,
            LogSink::File { path, .. } => Some(path),
        }
    }
}

/// State of the writer thread: the destination, the bounded channel of batches, and the flag that
/// requests a reopened file.
struct LogWriter {
    sink: LogSink,
    receiver: Receiver<WriterMessage>,
    reopen: Arc<AtomicBool>,
    /// The last write failed and may have written part of a line.
    has_partial_line: bool,
}

impl LogWriter {
    fn run(mut self) {
        while let Ok(WriterMessage::Lines(batch)) = self.receiver.recv() {
            self.reopen_if_requested();
            if let Err(error) = self.write(&batch.text) {
                self.has_partial_line = true;
                DROPPED.add(batch.lines);
                Event::AccessLogFailed { path: self.sink.path(), error: &error }.emit();
            }
        }
    }

    fn reopen_if_requested(&mut self) {
        if !self.reopen.swap(false, Relaxed) {
            return;
        }
        if let LogSink::File { file, path } = &mut self.sink {
            match open_file(path) {
                Ok(opened) => *file = opened,
                Err(error) => Event::AccessLogFailed { path: Some(path), error: &error }.emit(),
            }
        }
    }

    fn write(&mut self, text: &[u8]) -> io::Result<()> {
        let mut stdout;
        let sink: &mut dyn Write = match &mut self.sink {
            LogSink::File { file, .. } => file,
            LogSink::Stdout => {
                stdout = io::stdout().lock();
                &mut stdout
            }
        };
        if self.has_partial_line {
            sink.write_all(b"\n")?;
            self.has_partial_line = false;
        }
        sink.write_all(text)?;
        sink.flush()
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::entry::tests::line;
    use super::*;

    static FORMAT: LazyLock<AccessLogFormat> = LazyLock::new(AccessLogFormat::default);

    fn file(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("tidegate-log-{}-{name}", std::process::id()));
        std::fs::remove_file(&path).ok();
        path
    }

    fn read(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).expect("the log exists");
        std::fs::remove_file(path).expect("the log can be removed");
        text.lines().map(|line| serde_json::from_str(line).expect("a line is JSON")).collect()
    }

    #[test]
    fn lines_of_many_threads_do_not_interleave() {
        let path = file("threads");
        let log = AccessLog::open(&AccessLogTarget::File(path.clone())).expect("the file can be opened");
        let long = "/".repeat(300);
        thread::scope(|scope| {
            let record = || (0..500).for_each(|_| log.record(&FORMAT, &line(&long, "r")));
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(record)).collect();
            // Joined explicitly: the end of the scope does not wait for thread-local destructors,
            // which submit the rest.
            threads.into_iter().for_each(|thread| thread.join().expect("no panic"));
        });
        log.close();
        assert_eq!(read(&path).len(), 2_000);
    }

    #[test]
    fn reopen_creates_the_file_after_rotation() {
        let (path, moved) = (file("reopen"), file("moved"));
        let log = AccessLog::open(&AccessLogTarget::File(path.clone())).expect("the file can be opened");
        log.record(&FORMAT, &line("/1", "r"));
        log.flush();
        let start = Instant::now();
        while std::fs::metadata(&path).expect("the log exists").len() == 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "a flushed line was not written");
            thread::sleep(Duration::from_millis(1));
        }
        std::fs::rename(&path, &moved).expect("the log can be moved");
        log.reopen();
        log.record(&FORMAT, &line("/2", "r"));
        log.close();
        assert_eq!((&read(&moved)[0]["path"], &read(&path)[0]["path"]), (&"/1".into(), &"/2".into()));
    }

    #[test]
    fn blocked_writer_drops_lines_without_blocking() {
        let (sender, receiver) = sync_channel(1);
        let open =
            AccessLogInner { id: u64::MAX, path: None, sender, reopen: Arc::default(), writer: Mutex::new(None) };
        let log = AccessLog(Some(open));
        let before = DROPPED.get();
        for _ in 0..3 {
            log.record(&FORMAT, &line("/", "r"));
            log.flush();
        }
        assert!(DROPPED.get() >= before + 2);
        assert!(matches!(receiver.recv(), Ok(WriterMessage::Lines(batch)) if batch.lines == 1));
        log.record(&FORMAT, &line("/", "r"));
        log.flush();
        assert!(matches!(receiver.recv(), Ok(WriterMessage::Lines(_))));
    }

    #[test]
    fn disabled_log_records_nothing_and_unopenable_file_is_an_error() {
        let log = AccessLog::open(&AccessLogTarget::Off).expect("nothing to open");
        log.record(&FORMAT, &line("/", "r"));
        log.close();
        assert!(AccessLog::open(&AccessLogTarget::File("/nonexistent/dir/log".into())).is_err());
    }
}
