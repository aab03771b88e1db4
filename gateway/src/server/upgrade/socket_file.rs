//! The file of the upgrade socket: created with mode 0600, replaced at once, removed at the end.
//!
//! Invariant: a process removes only the file that it has created, and none that a successor may be
//! replacing. The successor replaces it by renaming, so that there is one at any time. A file of a
//! successor that was killed before it had taken over is removed by the next one that has.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// The socket file of this process, under its final name once it is published.
pub(super) struct SocketFile {
    path: PathBuf,
    /// The current place of the file.
    current: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    is_left: bool,
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Whether a process accepts connections at `path`.
pub(super) fn is_answered(path: &Path) -> bool {
    UnixStream::connect(path).is_ok()
}

impl SocketFile {
    /// Listens under another name in the same directory.
    ///
    /// # Errors
    /// The directory does not exist, or this user may not write to it.
    pub(super) fn create(path: &Path) -> io::Result<(SocketFile, UnixListener)> {
        let mut current = path.as_os_str().to_owned();
        current.push(format!(".{}", std::process::id()));
        let current = PathBuf::from(current);
        // Of an earlier process with this id.
        if current.exists() {
            fs::remove_file(&current)?;
        }
        let listener = UnixListener::bind(&current)?;
        listener.set_nonblocking(true)?;
        let identity = identity(&fs::symlink_metadata(&current)?);
        let file = SocketFile { path: path.to_owned(), current, identity, is_left: false };
        fs::set_permissions(&file.current, Permissions::from_mode(0o600))?;
        Ok((file, listener))
    }

    /// Gives the file its name, in place of the one that has it.
    pub(super) fn publish(&mut self) -> io::Result<()> {
        fs::rename(&self.current, &self.path)?;
        self.current.clone_from(&self.path);
        // The running process serves one successor at a time, so that no other one is starting.
        self.abandoned().iter().for_each(|path| drop(fs::remove_file(path)));
        Ok(())
    }

    /// Files with names of `create` that no process answers.
    fn abandoned(&self) -> Vec<PathBuf> {
        let Some((directory, name)) = self.path.parent().zip(self.path.file_name()) else { return Vec::new() };
        let prefix = [name.as_encoded_bytes(), b"."].concat();
        let is_of_create = |entry: &fs::DirEntry| {
            let name = entry.file_name();
            let id = name.as_encoded_bytes().strip_prefix(&prefix[..]);
            let is_named = id.is_some_and(|id| !id.is_empty() && id.iter().all(u8::is_ascii_digit));
            is_named && entry.file_type().is_ok_and(|kind| kind.is_socket())
        };
        let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
        let entries = fs::read_dir(directory).into_iter().flatten().map_while(Result::ok);
        entries.filter(is_of_create).map(|entry| entry.path()).filter(|path| !is_answered(path)).collect()
    }

    /// Leaves the file to a successor, which replaces it if it is configured to.
    pub(super) fn leave(&mut self) {
        self.is_left = true;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_own = fs::symlink_metadata(&self.current).is_ok_and(|metadata| identity(&metadata) == self.identity);
        if is_own && !self.is_left {
            // Without it the next start finds a file that no process answers, and replaces it.
            drop(fs::remove_file(&self.current));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successor_replaces_the_file_and_keeps_it() {
        let directory = std::env::temp_dir().join(format!("tidegate-upgrade-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("writable");
        let path = directory.join("up.sock");
        assert!(!is_answered(&path));
        let (mut old, old_listener) = SocketFile::create(&path).expect("writable");
        assert!(!path.exists(), "not before it is published");
        old.publish().expect("renamed");
        assert!(is_answered(&path));
        let mode = fs::metadata(&path).expect("it exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        // One of a killed successor, one of a process that goes on, and files of others.
        let sibling = |suffix: &str| directory.join(format!("up.sock{suffix}"));
        drop(UnixListener::bind(sibling(".1")).expect("writable"));
        let answered = UnixListener::bind(sibling(".2")).expect("writable");
        for other in [".3", ".old"] {
            fs::write(sibling(other), "").expect("writable");
        }
        let (mut new, new_listener) = SocketFile::create(&path).expect("writable");
        assert!(sibling(".1").exists(), "not before it has taken over");
        new.publish().expect("renamed");
        assert!(!sibling(".1").exists());
        for kept in [".2", ".3", ".old"] {
            fs::remove_file(sibling(kept)).expect("kept");
        }
        drop(answered);
        drop((old, old_listener));
        assert!(is_answered(&path), "the file of the successor stays");
        new.leave();
        drop(new);
        assert!(path.exists(), "a file that is left");
        drop(new_listener);
        assert!(!is_answered(&path));
        let (mut last, last_listener) = SocketFile::create(&path).expect("writable");
        last.publish().expect("renamed");
        drop((last, last_listener));
        assert_eq!(fs::read_dir(&directory).expect("it exists").count(), 0);
        assert!(SocketFile::create(&directory.join("missing/up.sock")).is_err());
        fs::remove_dir_all(directory).expect("removed");
    }
}
