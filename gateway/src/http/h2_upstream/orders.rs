//! Every interleaving of threads that reserve and release memory of responses, explored by loom.

use std::sync::Arc;

use sync::{AtomicUsize, Ordering::Relaxed};
use window_account::WindowAccount;

mod sync {
    pub(super) use loom::sync::atomic::{AtomicUsize, Ordering};
}
#[expect(clippy::duplicate_mod, reason = "compiled with the atomics of loom")]
#[path = "window_account.rs"]
mod window_account;

#[test]
fn threads_together_reserve_no_more_than_the_maximum() {
    loom::model(|| {
        let account = Arc::new(WindowAccount { max: AtomicUsize::new(5), reserved: AtomicUsize::new(0) });
        let reserve = |bytes| {
            let account = Arc::clone(&account);
            loom::thread::spawn(move || account.reserve(bytes).then_some(bytes))
        };
        let others = [reserve(3), reserve(4)];
        let own = account.reserve(5).then_some(5);
        let granted: usize = others.into_iter().filter_map(|other| other.join().expect("no panic")).chain(own).sum();
        assert!((1..=5).contains(&granted), "the first one has room: {granted}");
        assert_eq!(account.reserved.load(Relaxed), granted);
    });
}

#[test]
fn released_bytes_can_be_reserved_again() {
    loom::model(|| {
        let account = Arc::new(WindowAccount { max: AtomicUsize::new(5), reserved: AtomicUsize::new(5) });
        let other = Arc::clone(&account);
        let releasing = loom::thread::spawn(move || other.release(5));
        let early = account.reserve(5);
        releasing.join().expect("no panic");
        assert!(early || account.reserve(5));
        assert_eq!(account.reserved.load(Relaxed), 5);
    });
}
