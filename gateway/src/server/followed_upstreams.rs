//! Follows the names of all upstreams: one service for each name, or service of Kubernetes, asks
//! its source, and gives the upstream every answer. Another service checks the health of the
//! endpoints of each upstream.

use std::sync::Arc;

use super::state::SharedState;
use crate::discovery::{self, EndpointSources, LookupError};
use crate::endpoint::EndpointTarget;
use crate::event::Event;
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind};
use crate::upstream::{self, Upstream};

/// The services that follow the upstreams of the current snapshot.
pub(super) struct FollowedUpstreams {
    sources: EndpointSources,
    running: Vec<(Arc<Upstream>, Vec<ServiceTask>)>,
}

impl FollowedUpstreams {
    pub(super) fn new(shared: &SharedState) -> Self {
        let config = shared.config.load();
        FollowedUpstreams { sources: EndpointSources::new(&config.dns, &config.kubernetes), running: Vec::new() }
    }

    /// Starts services for the new upstreams of the current snapshot, and stops those of upstreams
    /// that are not in it.
    pub(super) fn follow(&mut self, shared: &SharedState) {
        let config = shared.config.load();
        // Stopped at the end: a watch that the new upstreams use too goes on.
        let mut stopped = Vec::new();
        if let Some(changed) = self.sources.changed(&config.dns, &config.kubernetes) {
            self.sources = changed;
            stopped.append(&mut self.running);
        }
        let snapshot = shared.snapshot.load();
        let is_gone = |(followed, _): &mut (Arc<Upstream>, Vec<ServiceTask>)| {
            !snapshot.upstreams.iter().any(|upstream| Arc::ptr_eq(upstream, followed))
        };
        stopped.extend(self.running.extract_if(.., is_gone));
        for upstream in &snapshot.upstreams {
            if self.running.iter().any(|(followed, _)| Arc::ptr_eq(upstream, followed)) {
                continue;
            }
            if upstream.config().tls.as_ref().is_some_and(|tls| !tls.verifies()) {
                Event::UpstreamUnverified { upstream: &upstream.config().name }.emit();
            }
            let services = upstream.names().map(|(index, _)| follow_name(&self.sources, upstream, index));
            let services = services.chain([check_health(upstream)]).collect();
            self.running.push((Arc::clone(upstream), services));
        }
        drop(stopped);
    }
}

/// Checks the health of the endpoints of `upstream`.
fn check_health(upstream: &Arc<Upstream>) -> ServiceTask {
    let upstream = Arc::clone(upstream);
    tasks::supervise(TaskKind::HealthCheck, async move || {
        upstream::check_health(&upstream).await;
        ServiceEnd::Finished
    })
}

/// Gives `upstream` every answer of the source of the item at `index` of its endpoints.
fn follow_name(sources: &EndpointSources, upstream: &Arc<Upstream>, index: usize) -> ServiceTask {
    let upstream = Arc::clone(upstream);
    // Made at once: a watch that an earlier upstream has used goes on.
    let origin = upstream.config().endpoints.get(index);
    let named =
        origin.map(|origin| (sources.source(origin, upstream.config().own_zone.as_deref()), origin.to_string()));
    tasks::supervise(TaskKind::Discovery, async move || {
        let Some((source, name)) = &named else { return ServiceEnd::Finished };
        let on_result = |result| take_over(&upstream, (index, name), result);
        discovery::follow(source.clone(), source.limit(), on_result).await;
        ServiceEnd::Finished
    })
}

/// Takes over an answer for the item at `index`, whose name is `name`, or notes its failure. Logs
/// changes, and when lookups begin to fail and succeed again.
fn take_over(upstream: &Upstream, (index, name): (usize, &str), result: Result<Vec<EndpointTarget>, LookupError>) {
    let upstream_name = &*upstream.config().name;
    match result {
        Ok(targets) => {
            if upstream.note_answer(index) {
                Event::LookupRecovered { upstream: upstream_name, name }.emit();
            }
            let change = upstream.set_targets(index, targets);
            if let Some(change) = change.filter(|change| change.added + change.removed > 0) {
                let (endpoints, added, removed) = (change.endpoints, change.added, change.removed);
                Event::EndpointsChanged { upstream: upstream_name, name, endpoints, added, removed }.emit();
            }
        }
        Err(error) => {
            if upstream.note_failed_lookup(index, &error) {
                let known = upstream.endpoints().list().len();
                Event::LookupFailed { upstream: upstream_name, name, known, error: &error }.emit();
            }
        }
    }
}
