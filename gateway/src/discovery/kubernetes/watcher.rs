//! Follows the slices of one service: lists them, then watches them from the version of the list
//! on.
//!
//! Invariants: a watch that ends is continued at the last version that arrived, so that no change
//! is lost; a version that is too old (410) means a new list; what is known stays published until
//! something newer is; a failure is published beside it.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::api::{ServiceKey, SliceApi};
use super::api_error::ApiError;
use super::backoff::WatchBackoff;
use super::lines::WatchLines;
use super::metrics::{ApiResult, SKIPPED, SkipReason, WATCHES};
use super::slice::{EndpointSlice, Lenient, RawObject};
use super::slice_set::{SLICES_MAX, SliceSet};
use crate::tasks::{self, TaskWait};

/// Pages of one list: a server may make them smaller than it is asked for.
const PAGES_MAX: usize = SLICES_MAX;
/// A watch that ends earlier without an event is no success: the next one begins after a delay.
const HEALTHY_AFTER: Duration = Duration::from_secs(1);

/// The known state of a service.
#[derive(Clone, Debug, Default)]
pub(super) struct ServiceState {
    /// The slices; `None` before the first list.
    pub(super) slices: Option<Arc<SliceSet>>,
    /// The number of changes of `slices`.
    pub(super) revision: u64,
    /// Why newer slices cannot be had now.
    pub(super) error: Option<Arc<str>>,
}

/// A line of a watch.
#[derive(Deserialize)]
struct WatchEvent {
    r#type: String,
    object: Lenient<RawObject>,
}

/// The next step after a watch that has ended.
enum WatchEnd {
    /// Another one, from the version where this one has ended.
    Continue,
    /// A new list.
    List,
}

/// Follows the slices of one service. Never returns. Cancel safe.
pub(super) async fn watch_service(api: Rc<SliceApi>, service: ServiceKey, state: &watch::Sender<ServiceState>) {
    let mut watcher = Watcher { api, service, state, slices: SliceSet::default(), backoff: WatchBackoff::new() };
    let mut is_list_gone = false;
    loop {
        let listed_at = Instant::now();
        let result = watcher.list().await;
        // A list of several pages may take so long that its version is too old for the next one.
        let is_first_gone = matches!(result, Err(ApiError::Gone)) && !is_list_gone;
        is_list_gone = is_first_gone;
        let version = match result {
            Ok(version) => version,
            Err(_) if is_first_gone => continue,
            Err(error) => {
                watcher.fail(&error).await;
                continue;
            }
        };
        watcher.follow(version).await;
        // A server that declares every version as too old is not asked in a loop.
        if listed_at.elapsed() < HEALTHY_AFTER {
            watcher.pause(None).await;
        }
    }
}

struct Watcher<'s> {
    api: Rc<SliceApi>,
    service: ServiceKey,
    state: &'s watch::Sender<ServiceState>,
    slices: SliceSet,
    backoff: WatchBackoff,
}

impl Watcher<'_> {
    /// Lists all slices and publishes them. Returns their version.
    async fn list(&mut self) -> Result<String, ApiError> {
        tasks::set_waiting_for(TaskWait::ApiServer);
        let (mut slices, mut next) = (SliceSet::default(), None);
        for _ in 0..PAGES_MAX {
            let page = self.api.list(&self.service, next.as_deref()).await?;
            for (name, slice) in page.items.into_iter().filter_map(|item| self.usable(item)) {
                slices.insert(name, slice);
            }
            next = page.next;
            if next.is_none() {
                self.slices = slices;
                self.publish_list();
                return Ok(page.version);
            }
        }
        Err(ApiError::Malformed(format!("a list of more than {PAGES_MAX} pages")))
    }

    /// Watches from `version` on, until the slices have to be listed again.
    async fn follow(&mut self, mut version: String) {
        loop {
            tasks::set_waiting_for(TaskWait::ApiServer);
            // Not all gateways begin their next watch at the same time.
            let seconds = self.backoff.jitter(self.api.watch_timeout).as_secs();
            let begun = Instant::now();
            let mut lines = match self.api.watch(&self.service, &version, seconds).await {
                Ok(lines) => lines,
                Err(error) => {
                    WATCHES.inc(error.result());
                    if matches!(error, ApiError::Gone) {
                        return;
                    }
                    self.fail(&error).await;
                    continue;
                }
            };
            self.recover();
            let before = version.clone();
            match self.apply_lines(&mut lines, &mut version).await {
                Ok(WatchEnd::List) => return,
                Ok(WatchEnd::Continue) => {
                    if begun.elapsed() < HEALTHY_AFTER && version == before {
                        self.pause(None).await;
                    } else {
                        self.backoff.reset();
                    }
                }
                Err(error) => {
                    self.api.forget_client();
                    return self.fail(&error).await;
                }
            }
        }
    }

    /// Applies the events of a watch. Its end is no failure.
    async fn apply_lines(&mut self, lines: &mut WatchLines, version: &mut String) -> Result<WatchEnd, ApiError> {
        loop {
            let result = match lines.next().await {
                Ok(Some(line)) => self.apply(&line, version),
                Ok(None) => {
                    WATCHES.inc(ApiResult::Ok);
                    return Ok(WatchEnd::Continue);
                }
                Err(error @ ApiError::Broken(_)) => {
                    WATCHES.inc(error.result());
                    self.api.forget_client();
                    return Ok(WatchEnd::Continue);
                }
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => self.backoff.reset(),
                Err(error) => {
                    WATCHES.inc(error.result());
                    return if matches!(error, ApiError::Gone) { Ok(WatchEnd::List) } else { Err(error) };
                }
            }
        }
    }

    /// Applies one event and publishes what it changes.
    fn apply(&mut self, line: &[u8], version: &mut String) -> Result<(), ApiError> {
        let event: WatchEvent =
            serde_json::from_slice(line).map_err(|error| ApiError::Malformed(format!("an event: {error}")))?;
        let WatchEvent { r#type: kind, object } = event;
        if kind == "ERROR" {
            let Lenient::Good(status) = object else { return Err(ApiError::Malformed("an error event".to_owned())) };
            let message = status.message.unwrap_or_default();
            return Err(ApiError::of_status(status.code.unwrap_or(500), &message, None));
        }
        let newer = match &object {
            Lenient::Good(object) => object.metadata.resource_version.clone(),
            Lenient::Bad(_) => None,
        };
        match &*kind {
            "BOOKMARK" => {}
            "ADDED" | "MODIFIED" => {
                if let Some((name, slice)) = self.usable(object) {
                    self.slices.insert(name, slice);
                    self.publish();
                }
            }
            "DELETED" => match object {
                Lenient::Good(RawObject { metadata, .. }) if metadata.name.is_some() => {
                    self.slices.remove(metadata.name.as_deref().unwrap_or_default());
                    self.publish();
                }
                // Which slice is gone is not known: the list says it.
                _ => return Err(ApiError::Malformed("a deleted object without a name".to_owned())),
            },
            other => return Err(ApiError::Malformed(format!("an event `{}`", other.escape_debug()))),
        }
        if let Some(newer) = newer.filter(|newer| !newer.is_empty()) {
            *version = newer;
        }
        Ok(())
    }

    /// A slice with its name. One that cannot be used is counted; its last usable form stays.
    fn usable(&self, object: Lenient<RawObject>) -> Option<(Box<str>, Arc<EndpointSlice>)> {
        let mut object = object.good()?;
        let Some(name) = object.metadata.name.take().filter(|name| !name.is_empty()) else {
            SKIPPED.inc(SkipReason::Malformed);
            return None;
        };
        let slice = object.into_slice().map(Arc::new).or_else(|| self.slices.get(&name).cloned());
        slice.map(|slice| (name, slice))
    }

    /// Publishes the slices if they have changed.
    fn publish(&self) {
        self.state.send_if_modified(|state| self.update(state));
    }

    /// Publishes the slices of a list: the API server answers.
    fn publish_list(&self) {
        self.state.send_if_modified(|state| {
            let had_error = state.error.take().is_some();
            self.update(state) || had_error
        });
    }

    /// Returns whether the slices have changed.
    fn update(&self, state: &mut ServiceState) -> bool {
        let is_changed = state.slices.as_deref() != Some(&self.slices);
        if is_changed {
            state.slices = Some(Arc::new(self.slices.clone()));
            state.revision += 1;
        }
        is_changed
    }

    /// The API server answers.
    fn recover(&self) {
        self.state.send_if_modified(|state| state.error.take().is_some());
    }

    /// Publishes a failure and waits until the next request.
    async fn fail(&mut self, error: &ApiError) {
        let text: Arc<str> = self.describe(error).into();
        self.state.send_if_modified(|state| {
            let is_changed = state.error.as_deref() != Some(&text);
            state.error = Some(Arc::clone(&text));
            is_changed
        });
        self.pause(error.retry_after()).await;
    }

    /// The error, with what is to be done about it.
    fn describe(&self, error: &ApiError) -> String {
        let ServiceKey { namespace, .. } = &self.service;
        match error {
            ApiError::Forbidden(_) => format!(
                "{error}; the service account needs a Role in namespace `{namespace}` with the verbs `list` and \
                 `watch` for `endpointslices` of the group `discovery.k8s.io`, and a RoleBinding"
            ),
            ApiError::Status { status: 404, .. } => {
                format!("{error}; is this the URL of an API server of Kubernetes 1.21 or later?")
            }
            error => error.to_string(),
        }
    }

    async fn pause(&mut self, retry_after: Option<Duration>) {
        tasks::set_waiting_for(TaskWait::Timer);
        sleep(self.backoff.next(retry_after)).await;
    }
}
