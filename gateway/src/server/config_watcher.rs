//! Detects changes of the files of a configuration: the document itself, its values and pages,
//! certificates and keys.
//!
//! Directories are watched, not files: editors and Kubernetes replace files by renaming. A file
//! counts as changed only if its contents differ.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::ModifyKind;
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::event::Event;

/// Delay between a file event and the comparison of the contents: files are written in pieces.
const SETTLE_DELAY: Duration = Duration::from_millis(100);

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
    directories: BTreeSet<PathBuf>,
    /// Contents of each file at the last comparison, before it was read as configuration.
    contents: BTreeMap<PathBuf, Option<Vec<u8>>>,
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
        ConfigWatcher { file_event, names, watcher, directories: BTreeSet::new(), contents: BTreeMap::new() }
    }

    /// Replaces the watched files. New files start with their current contents. Files that were
    /// watched before keep the contents of the last comparison, so that a change since then is
    /// still detected.
    pub(super) fn watch_files(&mut self, files: Vec<PathBuf>) {
        let directories: BTreeSet<PathBuf> = files.iter().map(|file| directory(file)).collect();
        if let Some(watcher) = &mut self.watcher {
            for removed in self.directories.difference(&directories) {
                // A directory that no longer exists has no watch any more.
                let _may_be_unwatched = watcher.unwatch(removed);
            }
            for added in directories.difference(&self.directories) {
                if let Err(error) = watcher.watch(added, RecursiveMode::NonRecursive) {
                    Event::WatchFailed { path: added, error: &error }.emit();
                }
            }
        }
        self.directories = directories;
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            files.iter().filter_map(|file| file.file_name().map(OsString::from)).collect();
        let mut known = std::mem::take(&mut self.contents);
        self.contents = files
            .into_iter()
            .map(|file| {
                let contents = known.remove(&file).unwrap_or_else(|| std::fs::read(&file).ok());
                (file, contents)
            })
            .collect();
    }

    /// Reads the files and returns whether the contents of any have changed. Blocking is
    /// acceptable: the files are small (a value or a page has at most one mebibyte), and this
    /// thread serves no requests.
    pub(super) fn compare_contents(&mut self) -> bool {
        let mut is_changed = false;
        for (file, contents) in &mut self.contents {
            let current = std::fs::read(file).ok();
            is_changed |= current != *contents;
            *contents = current;
        }
        is_changed
    }

    /// Waits until the contents of a file change. Cancel safe.
    pub(super) async fn changed(&mut self) {
        loop {
            self.file_event.notified().await;
            sleep(SETTLE_DELAY).await;
            if self.compare_contents() {
                return;
            }
        }
    }
}

fn directory(file: &Path) -> PathBuf {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    async fn detects_change(watcher: &mut ConfigWatcher, within: Duration) -> bool {
        tokio::time::timeout(within, watcher.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn changed_contents_are_detected_and_rewrites_of_the_same_are_not() {
        let directory = std::env::temp_dir().join(format!("tidegate-watch-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("writable");
        let (first, second) = (directory.join("first"), directory.join("second"));
        std::fs::write(&first, "1").expect("writable");
        std::fs::write(&second, "1").expect("writable");
        let mut watcher = ConfigWatcher::new();
        watcher.watch_files(vec![first.clone(), second.clone()]);
        std::fs::write(&first, "1").expect("writable");
        assert!(!detects_change(&mut watcher, 4 * SETTLE_DELAY).await);
        std::fs::write(directory.join("beside"), "2").expect("writable");
        std::fs::rename(directory.join("beside"), &second).expect("renamed");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        let file_event = Arc::clone(&watcher.file_event);
        std::fs::write(directory.join("log"), "1").expect("writable");
        sleep(SETTLE_DELAY).await;
        drop(tokio::time::timeout(Duration::ZERO, file_event.notified()).await);
        for _ in 0..3 {
            std::fs::write(directory.join("log"), "2").expect("writable");
        }
        assert!(
            tokio::time::timeout(2 * SETTLE_DELAY, file_event.notified()).await.is_err(),
            "writes to another file notified"
        );
        std::fs::remove_file(&first).expect("removed");
        assert!(detects_change(&mut watcher, TIMEOUT).await);
        std::fs::write(&first, "2").expect("writable");
        watcher.watch_files(vec![first.clone()]);
        assert!(detects_change(&mut watcher, TIMEOUT).await, "a change since the last comparison");
        std::fs::write(&second, "3").expect("writable");
        assert!(!detects_change(&mut watcher, 4 * SETTLE_DELAY).await);
        drop(std::fs::remove_dir_all(directory));
    }
}
