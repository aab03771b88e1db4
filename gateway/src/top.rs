//! `tidegate top`: a running gateway in a terminal, by its admin API.
//!
//! Without a terminal, one snapshot is printed. Invariant: the terminal is as it was before when
//! the command ends, also after an error.

mod terminal;
mod screen;

use std::io::{self, IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::admin_client::{self, AdminClientError};
use screen::{Screen, ScreenSize};
use terminal::{Key, Terminal};

/// Time between two snapshots.
const INTERVAL: Duration = Duration::from_secs(1);
/// Size of a snapshot that is printed: as many lines as there are.
const PRINTED: ScreenSize = ScreenSize { columns: 160, rows: usize::MAX };

/// Why `tidegate top` ended.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    #[error(transparent)]
    Client(#[from] AdminClientError),
    #[error("cannot use the terminal: {0}")]
    Terminal(#[from] io::Error),
}

/// The gateway that is shown.
#[derive(Clone, Debug)]
pub struct TopTarget {
    pub admin: SocketAddr,
    pub token: Option<String>,
}

impl TopTarget {
    fn read(&self) -> Result<Screen, AdminClientError> {
        admin_client::dashboard(self.admin, self.token.as_deref()).map(|value| Screen::new(&value["state"]))
    }
}

/// Prints one snapshot.
///
/// # Errors
/// The admin API is unreachable, or it refused the request.
pub fn print_once(target: &TopTarget) -> Result<(), TopError> {
    let text = target.read()?.lines(PRINTED, 0).join("\n");
    // The reader may have closed the pipe.
    let _reader_may_be_gone = writeln!(io::stdout(), "{text}");
    Ok(())
}

/// Shows snapshots until `q` is pressed; prints one where there is no terminal.
///
/// # Errors
/// The first snapshot could not be read, or the terminal failed. Later failures are shown.
pub fn run(target: &TopTarget) -> Result<(), TopError> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return print_once(target);
    }
    let mut shown = target.read()?;
    let mut fault = None;
    let mut first_row = 0;
    let mut next = Instant::now() + INTERVAL;
    let terminal = Terminal::open()?;
    loop {
        let size = terminal.size();
        first_row = first_row.min(shown.rows_hidden(size));
        terminal.draw(&shown.lines_with(size, first_row, fault.as_deref()))?;
        match terminal.key(next.saturating_duration_since(Instant::now()))? {
            Some(Key::Quit) => return Ok(()),
            Some(Key::Up) => first_row = first_row.saturating_sub(1),
            Some(Key::Down) => first_row += 1,
            None => {}
        }
        if Instant::now() >= next {
            match target.read() {
                Ok(screen) => (shown, fault) = (screen, None),
                Err(error) => fault = Some(error.to_string()),
            }
            next = Instant::now() + INTERVAL;
        }
    }
}
