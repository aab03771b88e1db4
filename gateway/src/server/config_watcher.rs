//! Detects changes of the files of a configuration: the document itself, its values and pages,
//! certificates and keys.
//!
//! Directories are watched, not files: editors and Kubernetes replace files by renaming. They are
//! the directories of the file and of every symbolic link on the way to it, as certbot and
//! Kubernetes use them. File systems that report no events (NFS, some overlays) are polled slowly.
//! A file counts as changed only if its contents differ.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use notify::event::ModifyKind;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::config::{self, ConfigFile, FileDigest};
use crate::event::Event;

/// Delay between a file event and the comparison of the contents: files are written in pieces.
const SETTLE_DELAY: Duration = Duration::from_millis(100);
/// Interval at which the files are compared by their metadata, where no event arrives.
const POLL_INTERVAL: Duration = Duration::from_secs(10);
/// Most symbolic links on the way to a file, as in Linux.
const LINKS_MAX: usize = 40;

/// Names of the watched files, for the thread that receives file events.
type WatchedNames = Arc<Mutex<BTreeSet<OsString>>>;

/// Whether an event may mean that a watched file changed. Writes to other files in a watched
/// directory, such as a log, do not count. Any created, renamed or removed name counts, since a
/// watched path may be a symbolic link through it.
fn may_affect(event: &notify::Event, names: &WatchedNames) -> bool {
    let names = names.lock().unwrap_or_else(PoisonError::into_inner);
    let is_watched = |path: &PathBuf| path.file_name().is_some_and(|name| names.contains(name));
    match event.kind {
        EventKind::Access(_) => false,
        EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_)) => event.paths.iter().any(is_watched),
        _ => true,
    }
}

/// Watches the files of one configuration until it is dropped.
pub(super) struct ConfigWatcher {
    file_event: Arc<Notify>,
    names: WatchedNames,
    watcher: Option<RecommendedWatcher>,
    poll_interval: Duration,
    /// The watched directories. A directory that was replaced by another one of its name has to be
    /// watched again.
    directories: BTreeMap<PathBuf, Option<FileIdentity>>,
    /// Each file at the last comparison, before it was read as configuration.
    files: BTreeMap<PathBuf, FileState>,
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
    /// Watches no files yet. If the system has no watches left, emits `watch_failed` and never
    /// detects a change.
    pub(super) fn new() -> Self {
        let file_event = Arc::new(Notify::new());
        let names: WatchedNames = Arc::default();
        let (notify, watched) = (Arc::clone(&file_event), Arc::clone(&names));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| may_affect(&event, &watched)) {
                notify.notify_one();
            }
        });
        let watcher = watcher.inspect_err(|error| Event::WatchFailed { path: Path::new(""), error }.emit()).ok();
        let (directories, files) = (BTreeMap::new(), BTreeMap::new());
        ConfigWatcher { file_event, names, watcher, poll_interval: POLL_INTERVAL, directories, files }
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
                self.file_event.notify_one();
            }
        }
    }

    /// Watches the directories by which the files are reached now: a link may have a new target.
    fn watch_directories(&mut self) {
        let mut entries = BTreeSet::new();
        self.files.keys().for_each(|file| entries.extend(entries_on_the_way(file)));
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            entries.iter().map(|(_, name)| name.clone()).collect();
        let directories: BTreeSet<PathBuf> = entries.into_iter().map(|(directory, _)| directory).collect();
        let Some(watcher) = &mut self.watcher else { return };
        self.directories.retain(|directory, _| {
            let is_kept = directories.contains(directory);
            if !is_kept {
                // A directory that no longer exists has no watch any more.
                let _may_be_unwatched = watcher.unwatch(directory);
            }
            is_kept
        });
        for directory in directories {
            let current = fs::metadata(&directory).ok().map(|metadata| identity(&metadata));
            let is_new = !self.directories.contains_key(&directory);
            if !is_new && self.directories[&directory] == current {
                continue;
            }
            let _of_the_replaced_directory = watcher.unwatch(&directory);
            let watched = watcher.watch(&directory, RecursiveMode::NonRecursive);
            if let (Err(error), true) = (&watched, is_new) {
                Event::WatchFailed { path: &directory, error }.emit();
            }
            self.directories.insert(directory, current.filter(|_| watched.is_ok()));
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
        let is_replaced = |(directory, watched): (&PathBuf, &Option<FileIdentity>)| {
            fs::metadata(directory).ok().map(|metadata| identity(&metadata)) != *watched
        };
        self.files.iter().any(is_new) || self.directories.iter().any(is_replaced)
    }

    /// Waits until the contents of a file change. Cancel safe.
    pub(super) async fn changed(&mut self) {
        loop {
            tokio::select! {
                () = self.file_event.notified() => sleep(SETTLE_DELAY).await,
                () = sleep(self.poll_interval) => {
                    if !self.has_new_metadata() {
                        continue;
                    }
                }
            }
            let is_changed = self.compare_contents();
            self.watch_directories();
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
        let file_event = Arc::clone(&watcher.file_event);
        fs::write(directory.join("log"), "1").expect("writable");
        sleep(SETTLE_DELAY).await;
        drop(tokio::time::timeout(Duration::ZERO, file_event.notified()).await);
        for _ in 0..3 {
            fs::write(directory.join("log"), "2").expect("writable");
        }
        assert!(
            tokio::time::timeout(2 * SETTLE_DELAY, file_event.notified()).await.is_err(),
            "writes to another file notified"
        );
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
        watcher.watcher = None;
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
