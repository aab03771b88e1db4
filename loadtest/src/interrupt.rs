//! Converts Ctrl-C, SIGTERM and SIGHUP into a flag, so that destructors stop all child processes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{LoadtestError, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Polling interval of waits.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Installs the signal handlers. Until then, a signal ends the process at once.
pub(crate) fn watch() -> Result<()> {
    let failed = || LoadtestError::io("cannot install signal handlers");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed())?;
    // Registered before the thread starts, so that no signal is lost.
    let (mut interrupt, mut terminate, mut hangup) = {
        let _inside = runtime.enter();
        let listen = |kind| signal(kind).map_err(failed());
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?)
    };
    let wait = move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
    };
    thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(failed())?;
    Ok(())
}

/// Whether a signal has asked for the end of the command.
pub(crate) fn is_requested() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Polls `poll` until it returns a value; `None` after `timeout`.
pub(crate) fn wait_for<T>(timeout: Duration, mut poll: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + timeout;
    loop {
        if is_requested() {
            return Err(LoadtestError::Interrupted);
        }
        if let Some(value) = poll()? {
            return Ok(Some(value));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_with_a_value_or_its_timeout() {
        assert_eq!(wait_for(Duration::ZERO, || Ok(None::<u8>)).expect("no signal"), None);
        let mut left = 2;
        let counted = wait_for(Duration::from_secs(60), || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(counted.expect("no signal"), Some("done"));
    }
}
