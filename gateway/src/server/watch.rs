//! Notices that a file of the configuration changed: the document itself, its values and pages, certificates and keys.
//!
//! Directories are watched, not files: editors and Kubernetes replace files by renaming. What counts is what the files hold:
//! an event without a change of content is none.

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

/// How long the files must be left to those who write them: they write in pieces.
const SETTLE: Duration = Duration::from_millis(100);

/// The watched files' names, for the thread that receives events.
type Names = Arc<Mutex<BTreeSet<OsString>>>;

/// Writing to another file in a watched directory, such as a log, is no news; that a name there came or went may be, for a
/// watched name may lead through it.
fn may_concern(event: &notify::Event, names: &Names) -> bool {
    let names = names.lock().unwrap_or_else(PoisonError::into_inner);
    let is_known = |path: &PathBuf| path.file_name().is_some_and(|name| names.contains(name));
    match event.kind {
        EventKind::Access(_) => false,
        EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Metadata(_)) => event.paths.iter().any(is_known),
        _ => true,
    }
}

/// The files of one configuration. Dropping it ends the watching.
pub(super) struct Watch {
    rung: Arc<Notify>,
    names: Names,
    watcher: Option<RecommendedWatcher>,
    directories: BTreeSet<PathBuf>,
    /// What each file held when it was last looked at, before it was read as configuration.
    held: BTreeMap<PathBuf, Option<Vec<u8>>>,
}

impl Watch {
    /// Watches nothing yet. Where the system has no watches left, it says so and never notices anything.
    pub(super) fn new() -> Self {
        let rung = Arc::new(Notify::new());
        let names: Names = Arc::default();
        let (bell, known) = (Arc::clone(&rung), Arc::clone(&names));
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| may_concern(&event, &known)) {
                bell.notify_one();
            }
        });
        let watcher = watcher.inspect_err(|error| Event::WatchFailed { path: Path::new(""), error }.emit()).ok();
        Watch { rung, names, watcher, directories: BTreeSet::new(), held: BTreeMap::new() }
    }

    /// Watches these files instead of those before. What new ones hold now is taken as known; of the others, what they held
    /// at the last look: a change since then is still to be noticed.
    pub(super) fn renew(&mut self, files: Vec<PathBuf>) {
        let directories: BTreeSet<PathBuf> = files.iter().map(|file| directory(file)).collect();
        if let Some(watcher) = &mut self.watcher {
            for gone in self.directories.difference(&directories) {
                // A directory that no longer exists has lost its watch already.
                let _gone_already = watcher.unwatch(gone);
            }
            for new in directories.difference(&self.directories) {
                if let Err(error) = watcher.watch(new, RecursiveMode::NonRecursive) {
                    Event::WatchFailed { path: new, error: &error }.emit();
                }
            }
        }
        self.directories = directories;
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) =
            files.iter().filter_map(|file| file.file_name().map(OsString::from)).collect();
        let mut known = std::mem::take(&mut self.held);
        self.held = files
            .into_iter()
            .map(|file| {
                let held = known.remove(&file).unwrap_or_else(|| std::fs::read(&file).ok());
                (file, held)
            })
            .collect();
    }

    /// Looks at the files; whether any holds something else than it did. They are small (a value or a page has a mebibyte at
    /// most), and this thread serves no requests.
    pub(super) fn look(&mut self) -> bool {
        let mut is_changed = false;
        for (file, held) in &mut self.held {
            let now = std::fs::read(file).ok();
            is_changed |= now != *held;
            *held = now;
        }
        is_changed
    }

    /// Waits until some file holds something else than it did. Cancel safe.
    pub(super) async fn changed(&mut self) {
        loop {
            self.rung.notified().await;
            sleep(SETTLE).await;
            if self.look() {
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

    const PATIENCE: Duration = Duration::from_secs(10);

    async fn is_noticed(watch: &mut Watch, within: Duration) -> bool {
        tokio::time::timeout(within, watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn another_content_is_a_change_and_a_touch_is_none() {
        let directory = std::env::temp_dir().join(format!("tidegate-watch-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("writable");
        let (one, other) = (directory.join("one"), directory.join("other"));
        std::fs::write(&one, "1").expect("writable");
        std::fs::write(&other, "1").expect("writable");
        let mut watch = Watch::new();
        watch.renew(vec![one.clone(), other.clone()]);
        std::fs::write(&one, "1").expect("writable");
        assert!(!is_noticed(&mut watch, 4 * SETTLE).await);
        std::fs::write(directory.join("beside"), "2").expect("writable");
        std::fs::rename(directory.join("beside"), &other).expect("renamed");
        assert!(is_noticed(&mut watch, PATIENCE).await);
        let rung = Arc::clone(&watch.rung);
        std::fs::write(directory.join("log"), "1").expect("writable");
        sleep(SETTLE).await;
        drop(tokio::time::timeout(Duration::ZERO, rung.notified()).await);
        for _ in 0..3 {
            std::fs::write(directory.join("log"), "2").expect("writable");
        }
        assert!(tokio::time::timeout(2 * SETTLE, rung.notified()).await.is_err(), "a log beside it rings nothing");
        std::fs::remove_file(&one).expect("removed");
        assert!(is_noticed(&mut watch, PATIENCE).await);
        std::fs::write(&one, "2").expect("writable");
        watch.renew(vec![one.clone()]);
        assert!(is_noticed(&mut watch, PATIENCE).await, "a change since the last look");
        std::fs::write(&other, "3").expect("writable");
        assert!(!is_noticed(&mut watch, 4 * SETTLE).await);
        drop(std::fs::remove_dir_all(directory));
    }
}
