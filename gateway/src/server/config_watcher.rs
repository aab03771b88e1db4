//! Detects changes of the files of a configuration: the document itself, its values and pages,
//! certificates and keys.
//!
//! Directories are watched, not files: editors and Kubernetes replace files by renaming. They are
//! the directories of the file and of every symbolic link on the way to it, as certbot and
//! Kubernetes use them. A log may be in the same directory: the system reports that a file was
//! closed after it was written, but no single write, so that the writes of others wake nothing.
//! File systems that report no events (NFS, some overlays), and files that are written without
//! being closed, are polled slowly. A file counts as changed only if its contents differ.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::future;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::net::unix::pipe;
use tokio::time::sleep;

use crate::config::{self, ConfigFile, FileDigest};
use crate::event::Event;

/// Delay between a file event and the comparison of the contents: files are written in pieces.
const SETTLE_DELAY: Duration = Duration::from_millis(100);
/// Interval at which the files are compared by their metadata, where no event arrives.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Most symbolic links on the way to a file, as in Linux.
const LINKS_MAX: usize = 40;
/// Bytes of events that are read at once: at least one with the longest name.
const EVENT_BYTES: usize = 4 << 10;

/// The changes of a directory that the system reports: its entries, their attributes, the end of
/// writing to a file, and the directory itself.
const WATCHED: WatchFlags = WatchFlags::ONLYDIR
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF);
/// Events of the directory itself by which a watched file may have changed. Others of it follow
/// from `unwatch`.
const OF_DIRECTORY: ReadFlags =
    ReadFlags::DELETE_SELF.union(ReadFlags::MOVE_SELF).union(ReadFlags::UNMOUNT).union(ReadFlags::QUEUE_OVERFLOW);

/// The events of the watched directories (inotify(7)). Their descriptor is read like a pipe.
struct DirectoryEvents(pipe::Receiver);

impl DirectoryEvents {
    fn new() -> io::Result<Self> {
        let descriptor = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(DirectoryEvents(pipe::Receiver::from_owned_fd_unchecked(descriptor)?))
    }

    fn watch(&self, directory: &Path) -> io::Result<i32> {
        Ok(inotify::add_watch(&self.0, directory, WATCHED)?)
    }

    fn unwatch(&self, watch: i32) {
        // A directory that no longer exists has no watch any more.
        let _may_be_unwatched = inotify::remove_watch(&self.0, watch);
    }

    /// Reads the events that have arrived. Returns whether one may mean that a file with one of the
    /// `names` on its way has changed.
    fn read(&self, names: &BTreeSet<OsString>) -> bool {
        let mut space = [0; EVENT_BYTES];
        let mut may_affect = false;
        while let Ok(count @ 1..) = self.0.try_read(&mut space) {
            let mut rest = &space[..count];
            while let Some((mask, name)) = take_event(&mut rest) {
                may_affect |= mask.intersects(OF_DIRECTORY) || names.contains(name);
            }
        }
        may_affect
    }

    /// Waits for an event that may mean that a file with one of the `names` on its way has changed.
    /// Cancel safe.
    async fn wait(&self, names: &BTreeSet<OsString>) {
        // A failure is the end of the runtime.
        while self.0.readable().await.is_ok() {
            if self.read(names) {
                return;
            }
        }
        future::pending().await
    }
}

/// Takes the first event (`struct inotify_event`): its mask and the name of the entry, which is
/// empty in one of the directory itself.
fn take_event<'a>(bytes: &mut &'a [u8]) -> Option<(ReadFlags, &'a OsStr)> {
    let (head, rest) = bytes.split_first_chunk::<16>()?;
    let word = |at: usize| head[at..].first_chunk().copied().map(u32::from_ne_bytes);
    let (mask, length) = (word(4)?, usize::try_from(word(12)?).ok()?);
    let (name, rest) = rest.split_at_checked(length)?;
    *bytes = rest;
    // Zeros fill it up.
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Some((ReadFlags::from_bits_retain(mask), OsStr::from_bytes(&name[..end])))
}

/// Watches the files of one configuration until it is dropped.
pub(super) struct ConfigWatcher {
    /// `None`: the system has no more.
    events: Option<DirectoryEvents>,
    /// Names of the watched files, and of every directory and link on the way to them.
    names: BTreeSet<OsString>,
    /// The files are to be compared without waiting for an event.
    is_due: bool,
    poll_interval: Duration,
    /// The watched directories. A directory that was replaced by another one of its name has to be
    /// watched again.
    directories: BTreeMap<PathBuf, WatchedDirectory>,
    /// Each file at the last comparison, before it was read as configuration.
    files: BTreeMap<PathBuf, FileState>,
}

/// A directory when its watch began; `None`: it could not be read, or not be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WatchedDirectory {
    identity: Option<FileIdentity>,
    watch: Option<i32>,
}

/// A file at the last comparison; `None`: it could not be read.
#[derive(Default)]
struct FileState {
    metadata: Option<(FileIdentity, u64, Option<SystemTime>)>,
    /// Digest of the contents: a database of countries has many mebibytes.
    contents: FileDigest,
}

/// Device and inode.
type FileIdentity = (u64, u64);

fn identity(metadata: &Metadata) -> FileIdentity {
    (metadata.dev(), metadata.ino())
}

impl FileState {
    fn read(file: &Path) -> Self {
        // In this order: a change between the two is found by the next comparison.
        let metadata = Self::metadata(file);
        FileState { metadata, contents: config::digest(file) }
    }

    /// Identity, length and time of the last modification.
    fn metadata(file: &Path) -> Option<(FileIdentity, u64, Option<SystemTime>)> {
        let metadata = fs::metadata(file).ok()?;
        Some((identity(&metadata), metadata.len(), metadata.modified().ok()))
    }
}

impl ConfigWatcher {
    /// Watches no files yet. Call it in a runtime. If the system has no watches left, emits
    /// `watch_failed`, and changes are found by polling.
    pub(super) fn new() -> Self {
        let events = DirectoryEvents::new();
        let events = events.inspect_err(|error| Event::WatchFailed { path: Path::new(""), error }.emit()).ok();
        ConfigWatcher {
            events,
            names: BTreeSet::new(),
            is_due: false,
            poll_interval: POLL_INTERVAL,
            directories: BTreeMap::new(),
            files: BTreeMap::new(),
        }
    }

    /// Replaces the watched files. New files start with the contents that the configuration was
    /// read from, and files that were watched before keep those of the last comparison: a change
    /// since then is detected, although no event was received for it.
    pub(super) fn watch_files(&mut self, files: Vec<ConfigFile>) {
        let mut known = std::mem::take(&mut self.files);
        let mut new = Vec::new();
        for ConfigFile { path, contents } in files {
            if self.files.contains_key(&path) {
                continue;
            }
            let state = known.remove(&path).unwrap_or_else(|| {
                new.push(path.clone());
                FileState { metadata: None, contents }
            });
            self.files.insert(path, state);
        }
        self.watch_directories();
        for file in new {
            let current = FileState::read(&file);
            let Some(state) = self.files.get_mut(&file) else { continue };
            if current.contents == state.contents {
                *state = current;
            } else {
                self.is_due = true;
            }
        }
    }

    /// Watches the directories by which the files are reached now: a link may have a new target.
    fn watch_directories(&mut self) {
        let mut directories = BTreeSet::new();
        self.names.clear();
        for (directory, name) in self.files.keys().flat_map(|file| entries_on_the_way(file)) {
            self.names.insert(name);
            // One that is missing, or replaced, is an event of the directory above it.
            self.names.extend(directory.iter().map(OsStr::to_owned));
            directories.insert(directory);
        }
        let Some(events) = &self.events else { return };
        self.directories.retain(|directory, watched| {
            let is_kept = directories.contains(directory);
            if !is_kept {
                watched.watch.into_iter().for_each(|watch| events.unwatch(watch));
            }
            is_kept
        });
        for directory in directories {
            let identity = fs::metadata(&directory).ok().map(|metadata| identity(&metadata));
            let known = self.directories.get(&directory).copied();
            if known.is_some_and(|known| known.identity == identity) {
                continue;
            }
            known.and_then(|known| known.watch).into_iter().for_each(|watch| events.unwatch(watch));
            let watched = events.watch(&directory);
            if let (Err(error), None) = (&watched, known) {
                Event::WatchFailed { path: &directory, error }.emit();
            }
            let identity = identity.filter(|_| watched.is_ok());
            self.directories.insert(directory, WatchedDirectory { identity, watch: watched.ok() });
        }
    }

    /// Reads the files and returns whether the contents of any have changed. Blocking is
    /// acceptable: the files are small (a value or a page has at most one mebibyte) or
    /// changed rarely, and this thread serves no requests.
    pub(super) fn compare_contents(&mut self) -> bool {
        let mut is_changed = false;
        for (file, state) in &mut self.files {
            let current = FileState::read(file);
            is_changed |= current.contents != state.contents;
            *state = current;
        }
        is_changed
    }

    /// Whether the metadata of a file or of a directory differ from those of the last comparison.
    fn has_new_metadata(&self) -> bool {
        let is_new = |(file, state): (&PathBuf, &FileState)| FileState::metadata(file) != state.metadata;
        let is_replaced = |(directory, watched): (&PathBuf, &WatchedDirectory)| {
            fs::metadata(directory).ok().map(|metadata| identity(&metadata)) != watched.identity
        };
        self.files.iter().any(is_new) || self.directories.iter().any(is_replaced)
    }

    /// Waits for an event of a watched file. Cancel safe.
    async fn event(&self) {
        match &self.events {
            Some(events) => events.wait(&self.names).await,
            None => future::pending().await,
        }
    }

    /// Waits until the contents of a file change. Cancel safe.
    pub(super) async fn changed(&mut self) {
        loop {
            if !self.is_due {
                tokio::select! {
                    () = self.event() => {}
                    () = sleep(self.poll_interval) => {
                        if !self.has_new_metadata() {
                            continue;
                        }
                    }
                }
                self.is_due = true;
            }
            sleep(SETTLE_DELAY).await;
            if let Some(events) = &self.events {
                // Events that have arrived meanwhile are part of the same change.
                events.read(&self.names);
            }
            let is_changed = self.compare_contents();
            self.watch_directories();
            self.is_due = false;
            if is_changed {
                return;
            }
        }
    }
}

/// The directory entries that decide what a path refers to: every symbolic link on the way, and the
/// file itself. The directories contain no symbolic link.
fn entries_on_the_way(file: &Path) -> Vec<(PathBuf, OsString)> {
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let mut entries = Vec::new();
    let mut resolved = PathBuf::new();
    let mut rest: Vec<PathBuf> = components(&absolute);
    while let Some(component) = rest.pop() {
        if component.as_os_str() == ".." {
            resolved.pop();
            continue;
        }
        // An absolute component, the root, replaces the whole path.
        let path = resolved.join(&component);
        match fs::read_link(&path) {
            Ok(target) if entries.len() < LINKS_MAX => {
                entries.push((resolved.clone(), component.into_os_string()));
                rest.extend(components(&target));
            }
            _ => resolved = path,
        }
    }
    if let (Some(directory), Some(name)) = (resolved.parent(), resolved.file_name()) {
        entries.push((directory.to_owned(), name.to_owned()));
    }
    entries
}

/// The components of a path from the last to the first, without `.`.
fn components(path: &Path) -> Vec<PathBuf> {
    let components = path.components().filter(|component| *component != Component::CurDir);
    let mut components: Vec<PathBuf> = components.map(|component| component.as_os_str().into()).collect();
    components.reverse();
    components
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// The files as a configuration reads them now.
    fn read<const N: usize>(files: [PathBuf; N]) -> Vec<ConfigFile> {
        files.iter().map(|file| ConfigFile::before_use(file)).collect()
    }

    async fn detects_change(watcher: &mut ConfigWatcher, within: Duration) -> bool {
        tokio::time::timeout(within, watcher.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn changed_contents_are_detected_and_rewrites_of_the_same_are_not() {
        let directory = std::env::temp_dir().join(format!("tidegate-watch-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("writable");
        let (first, second) = (directory.join("first"), directory.join("second"));
        fs::write(&first, "1").expect("writable");
        fs::write(&second, "1").expect("writable");
        let mut watcher = ConfigWatcher::new();
        watcher.watch_files(read([first.clone(), second.clone()]));
        fs::write(&first, "1").expect("writable");
        assert!(!detects_change(&mut watcher, 4 * SETTLE_DELAY).await);
        fs::write(directory.join("beside"), "2").expect("writable");
        fs::rename(directory.join("beside"), &second).expect("renamed");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        let log = directory.join("log");
        for contents in [Some("1"), Some("2"), None] {
            contents.map_or_else(|| fs::remove_file(&log), |contents| fs::write(&log, contents)).expect("writable");
            let event = tokio::time::timeout(SETTLE_DELAY, watcher.event()).await;
            assert!(event.is_err(), "changes of another file are no event");
        }
        fs::rename(&second, &log).expect("renamed");
        tokio::time::timeout(TIMEOUT, watcher.event()).await.expect("a file that is moved away is an event");
        fs::rename(&log, &second).expect("renamed");
        fs::remove_file(&first).expect("removed");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        fs::write(&first, "2").expect("writable");
        watcher.watch_files(read([first.clone()]));
        assert!(detects_change(&mut watcher, TIMEOUT).await, "a change since the last comparison");
        fs::write(&second, "3").expect("writable");
        assert!(!detects_change(&mut watcher, 4 * SETTLE_DELAY).await);
        drop(fs::remove_dir_all(directory));
    }

    #[tokio::test]
    async fn changes_between_load_and_watch_are_detected() {
        let directory = TestDirectory::new("load");
        for (at_load, at_watch) in
            [(Some("1"), Some("2")), (None, Some("1")), (Some("1"), None), (Some("1"), Some("1"))]
        {
            let file = directory.0.join("file");
            let put = |contents: Option<&str>| match contents {
                Some(contents) => directory.write("file", contents),
                None => drop(fs::remove_file(&file)),
            };
            put(at_load);
            let loaded = read([file.clone()]);
            put(at_watch);
            let mut watcher = ConfigWatcher::new();
            watcher.watch_files(loaded);
            let wait = if at_load == at_watch { 4 * SETTLE_DELAY } else { TIMEOUT };
            assert_eq!(detects_change(&mut watcher, wait).await, at_load != at_watch, "{at_load:?} {at_watch:?}");
        }
    }

    /// A directory of one test, removed on drop.
    struct TestDirectory(PathBuf);

    impl TestDirectory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tidegate-links-{}-{name}", std::process::id()));
            drop(fs::remove_dir_all(&path));
            fs::create_dir_all(&path).expect("writable");
            TestDirectory(path.canonicalize().expect("it exists"))
        }

        fn write(&self, name: &str, contents: &str) {
            let path = self.0.join(name);
            fs::create_dir_all(path.parent().expect("inside the directory")).expect("writable");
            fs::write(path, contents).expect("writable");
        }

        /// Replaces a link atomically.
        fn link(&self, target: &str, name: &str) {
            let (path, new) = (self.0.join(name), self.0.join("new-link"));
            fs::create_dir_all(path.parent().expect("inside the directory")).expect("writable");
            symlink(target, &new).expect("writable");
            fs::rename(new, path).expect("writable");
        }
    }

    impl Drop for TestDirectory {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.0));
        }
    }

    /// Detects by events alone.
    fn watching(file: PathBuf) -> ConfigWatcher {
        let mut watcher = ConfigWatcher::new();
        watcher.poll_interval = Duration::from_secs(3_600);
        watcher.watch_files(read([file]));
        watcher
    }

    #[tokio::test]
    async fn file_rewritten_in_place_behind_links_is_detected() {
        let directory = TestDirectory::new("in-place");
        directory.write("target/page", "1");
        directory.link("../target/page", "second/page");
        directory.link("second/page", "page");
        let mut watcher = watching(directory.0.join("page"));
        for contents in ["2", "3"] {
            directory.write("target/page", contents);
            assert!(detects_change(&mut watcher, TIMEOUT).await, "{contents}");
        }
        directory.write("other/page", "4");
        directory.link("../other/page", "second/page");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "a link in the middle has another target");
        directory.write("other/page", "5");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "the new target");
    }

    #[tokio::test]
    async fn data_link_of_kubernetes_is_followed() {
        let directory = TestDirectory::new("kubernetes");
        directory.write("..2026_1/tls.crt", "1");
        directory.link("..2026_1", "..data");
        directory.link("..data/tls.crt", "tls.crt");
        let mut watcher = watching(directory.0.join("tls.crt"));
        for version in 2..5 {
            directory.write(&format!("..2026_{version}/tls.crt"), &version.to_string());
            directory.link(&format!("..2026_{version}"), "..data");
            fs::remove_dir_all(directory.0.join(format!("..2026_{}", version - 1))).expect("removed");
            assert!(detects_change(&mut watcher, TIMEOUT).await, "version {version}");
        }
        directory.write("..2026_4/tls.crt", "in place");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "in the directory of the last version");
    }

    #[tokio::test]
    async fn links_of_certbot_are_followed() {
        let directory = TestDirectory::new("certbot");
        directory.write("archive/a.test/fullchain1.pem", "1");
        directory.link("../../archive/a.test/fullchain1.pem", "live/a.test/fullchain.pem");
        let mut watcher = watching(directory.0.join("live/a.test/fullchain.pem"));
        directory.write("archive/a.test/fullchain2.pem", "2");
        directory.link("../../archive/a.test/fullchain2.pem", "live/a.test/fullchain.pem");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "a renewal");
        directory.write("archive/a.test/fullchain2.pem", "3");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "rewritten in the archive");
    }

    #[tokio::test]
    async fn linked_directories_are_followed() {
        let directory = TestDirectory::new("directories");
        directory.write("releases/1/pages/busy.html", "1");
        directory.write("releases/2/pages/busy.html", "2");
        directory.link("releases/1", "current");
        let mut watcher = watching(directory.0.join("current/pages/../pages/busy.html"));
        directory.write("releases/1/pages/busy.html", "in place");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        directory.link("releases/2", "current");
        assert!(detects_change(&mut watcher, TIMEOUT).await, "another directory");
    }

    /// As on a file system without events.
    #[tokio::test]
    async fn files_are_polled_where_no_event_arrives() {
        let directory = TestDirectory::new("polled");
        directory.write("target/page", "1");
        directory.link("target/page", "page");
        let mut watcher = ConfigWatcher::new();
        watcher.events = None;
        watcher.poll_interval = Duration::from_millis(10);
        watcher.watch_files(read([directory.0.join("page")]));
        assert!(!detects_change(&mut watcher, Duration::from_millis(100)).await);
        directory.write("target/page", "longer");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        fs::remove_file(directory.0.join("target/page")).expect("removed");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        directory.write("target/page", "again");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
    }

    /// The poll finds that the directory is another one; from then on events arrive again.
    #[tokio::test]
    async fn replaced_directory_is_watched_again() {
        let directory = TestDirectory::new("replaced");
        directory.write("tls/key", "1");
        let mut watcher = ConfigWatcher::new();
        watcher.poll_interval = Duration::from_millis(10);
        watcher.watch_files(read([directory.0.join("tls/key")]));
        fs::rename(directory.0.join("tls"), directory.0.join("old")).expect("renamed");
        directory.write("tls/key", "2");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        while detects_change(&mut watcher, 4 * SETTLE_DELAY).await {}
        watcher.poll_interval = Duration::from_secs(3_600);
        directory.write("tls/key", "3");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
    }

    #[test]
    fn events_end_with_the_bytes_that_were_read() {
        let event = |mask: u32, name: &[u8]| {
            let words = [1_u32, mask, 0, u32::try_from(name.len()).expect("short")].map(u32::to_ne_bytes);
            [&words.concat(), name].concat()
        };
        let bytes = [event(ReadFlags::CREATE.bits(), b"ab\0\0"), event(ReadFlags::DELETE_SELF.bits(), b"")].concat();
        let mut rest = &*bytes;
        assert_eq!(take_event(&mut rest), Some((ReadFlags::CREATE, OsStr::new("ab"))));
        assert_eq!(take_event(&mut rest), Some((ReadFlags::DELETE_SELF, OsStr::new(""))));
        assert_eq!(take_event(&mut rest), None);
        assert!((0..bytes.len()).all(|count| take_event(&mut &bytes[..count]).is_none() || count >= 20));
    }

    #[test]
    fn loops_and_missing_targets_end() {
        let directory = TestDirectory::new("loops");
        directory.link("b", "a");
        directory.link("a", "b");
        assert_eq!(entries_on_the_way(&directory.0.join("a")).len(), LINKS_MAX + 1);
        directory.link("nowhere/page", "dangling");
        let entries = entries_on_the_way(&directory.0.join("dangling"));
        assert_eq!(entries, [(directory.0.clone(), "dangling".into()), (directory.0.join("nowhere"), "page".into())]);
    }
}
