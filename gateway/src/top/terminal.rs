//! The terminal of `tidegate top`: its own screen, keys without echo, and the former state at the
//! end.

use std::io::{self, Write as _};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::stdio::{stdin, stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::screen::ScreenSize;

/// Another screen, without a cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

/// A key that has a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    Quit,
    Up,
    Down,
}

/// The terminal, which is restored on drop.
pub(super) struct Terminal {
    before: Termios,
}

impl Terminal {
    pub(super) fn open() -> io::Result<Self> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        // Keys that were pressed before are kept.
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        let terminal = Terminal { before };
        write(ENTER)?;
        Ok(terminal)
    }

    pub(super) fn size(&self) -> ScreenSize {
        let size = tcgetwinsize(stdout()).ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
        let (columns, rows) = size.map_or((80, 24), |size| (size.ws_col, size.ws_row));
        ScreenSize { columns: columns.into(), rows: rows.into() }
    }

    /// Replaces the content of the screen.
    pub(super) fn draw(&self, lines: &[String]) -> io::Result<()> {
        let mut text = String::from("\x1b[H");
        for (index, line) in lines.iter().enumerate() {
            text.push_str(if index == 0 { "" } else { "\r\n" });
            text.push_str(line);
            text.push_str("\x1b[K");
        }
        text.push_str("\x1b[J");
        write(&text)
    }

    /// The next key; `None` after `wait` without one. A terminal that has closed is `Quit`.
    pub(super) fn key(&self, wait: Duration) -> io::Result<Option<Key>> {
        let timeout = Timespec::try_from(wait).map_err(|_too_long| io::ErrorKind::InvalidInput)?;
        let mut input = [PollFd::from_borrowed_fd(stdin(), PollFlags::IN)];
        match poll(&mut input, Some(&timeout)) {
            // A changed size interrupts the wait.
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            result => _ = result?,
        }
        let mut bytes = [0; 16];
        let count = rustix::io::read(stdin(), &mut bytes)?;
        Ok(key_of(&bytes[..count]))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing can be reported on a terminal that fails.
        let _left = write(LEAVE);
        let _restored = tcsetattr(stdin(), OptionalActions::Flush, &self.before);
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// The key of the bytes that a terminal sends for it.
fn key_of(bytes: &[u8]) -> Option<Key> {
    match bytes {
        [] | [b'q' | b'Q' | 0x03 | 0x04 | 0x1b] => Some(Key::Quit),
        b"\x1b[A" | b"\x1bOA" | b"k" => Some(Key::Up),
        b"\x1b[B" | b"\x1bOB" | b"j" => Some(Key::Down),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_known_by_their_bytes() {
        let keys = ["q", "\x03", "\x1b", "", "\x1b[A", "\x1b[B", "x", "\x1b[5~"].map(|key| key_of(key.as_bytes()));
        let quit = Some(Key::Quit);
        assert_eq!(keys, [quit, quit, quit, quit, Some(Key::Up), Some(Key::Down), None, None]);
    }
}
