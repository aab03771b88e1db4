//! Turns a panic of a function or a future into an error.

use std::any::Any;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

/// The payload of a panic.
pub(crate) type Panic = Box<dyn Any + Send>;

/// Calls `act` and turns its panic into `Err`.
pub(crate) fn catch<T>(act: impl FnOnce() -> T) -> Result<T, Panic> {
    catch_unwind(AssertUnwindSafe(act))
}

/// Polls a future and turns its panic into `Err`.
pub(crate) fn poll_catch<F: Future>(future: Pin<&mut F>, cx: &mut Context<'_>) -> Poll<Result<F::Output, Panic>> {
    match catch(|| future.poll(cx)) {
        Ok(Poll::Ready(output)) => Poll::Ready(Ok(output)),
        Ok(Poll::Pending) => Poll::Pending,
        Err(panic) => Poll::Ready(Err(panic)),
    }
}

/// The message of a panic, as far as it is text.
pub(crate) fn message(panic: &Panic) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::pin::pin;

    #[tokio::test]
    async fn panic_in_a_future_becomes_an_error() {
        let mut future = pin!(async {
            tokio::task::yield_now().await;
            panic!("in a request");
        });
        let caught: Result<(), _> = poll_fn(|cx| poll_catch(future.as_mut(), cx)).await;
        assert!(caught.is_err());
    }
}
