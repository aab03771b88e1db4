//! Ctrl-C, SIGTERM and SIGHUP become a flag, so that everything ends by going out of scope.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{Failure, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// How often a wait looks at the flag, and at what it waits for.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Starts to listen. Until then signals end the process at once.
pub(crate) fn watch() -> Result<()> {
    let failed = || Failure::io("cannot listen to signals");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed())?;
    // Registered here, so that none is lost until the thread runs.
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

/// Waits until `done` has an answer, at most `patience`; `None` after that.
pub(crate) fn wait_for<T>(patience: Duration, mut done: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + patience;
    loop {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(Failure::Interrupted);
        }
        if let Some(answer) = done()? {
            return Ok(Some(answer));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_answer_or_its_patience() {
        assert_eq!(wait_for(Duration::ZERO, || Ok(None::<u8>)).expect("no signal"), None);
        let mut left = 2;
        let counted = wait_for(Duration::from_secs(60), || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(counted.expect("no signal"), Some("done"));
    }
}
