//! Keeps the key set of tokens current, where the configuration names a URL: one task, replaced
//! when a reload names another URL.

use std::cell::RefCell;
use std::sync::Arc;

use super::state::SharedState;
use crate::identify::{self, RemoteKeySet};
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind, TaskWait};

/// The running task and its key set.
#[derive(Default)]
pub(super) struct KeySetRefresher {
    running: RefCell<Option<(Arc<RemoteKeySet>, ServiceTask)>>,
}

impl KeySetRefresher {
    /// Runs the task for the key set of the current snapshot, and no other one.
    pub(super) fn refresh_key_set_of(&self, shared: &SharedState) {
        let snapshot = shared.snapshot.load();
        let mut running = self.running.borrow_mut();
        let Some(keys) = snapshot.identity.remote_key_set() else {
            *running = None;
            return identify::forget_age();
        };
        if running.as_ref().is_some_and(|(current, _)| Arc::ptr_eq(current, keys)) {
            return;
        }
        let refreshed = Arc::clone(keys);
        let task = tasks::supervise(TaskKind::KeySet, async move || {
            tasks::set_waiting_for(TaskWait::Timer);
            refreshed.keep_current().await;
            ServiceEnd::Failed
        });
        *running = Some((Arc::clone(keys), task));
    }
}
