//! The file of the upgrade socket: created with mode 0600, replaced at once, removed at the end.
//!
//! Invariant: a process removes only the file that it has created, and none that a successor may be
//! replacing. The successor replaces it by renaming, so that there is one at any time.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
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
        Ok(())
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
        let (mut new, new_listener) = SocketFile::create(&path).expect("writable");
        new.publish().expect("renamed");
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
