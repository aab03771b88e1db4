//! Follows the names of all upstreams: one service for each name asks its source, and gives the
//! upstream every answer. Another service checks the health of the endpoints of each upstream.

use std::rc::Rc;
use std::sync::Arc;

use super::state::SharedState;
use crate::discovery::{self, DnsSource, NameResolver};
use crate::event::Event;
use crate::tasks::{self, ServiceEnd, ServiceTask, TaskKind};
use crate::upstream::{self, Upstream};

/// The services that follow the upstreams of the current snapshot.
pub(super) struct FollowedUpstreams {
    resolver: Rc<NameResolver>,
    running: Vec<(Arc<Upstream>, Vec<ServiceTask>)>,
}

impl FollowedUpstreams {
    pub(super) fn new(shared: &SharedState) -> Self {
        FollowedUpstreams {
            resolver: Rc::new(NameResolver::new(shared.config.load().dns.clone())),
            running: Vec::new(),
        }
    }

    /// Starts services for the new upstreams of the current snapshot, and stops those of upstreams
    /// that are not in it.
    pub(super) fn follow(&mut self, shared: &SharedState) {
        let dns = shared.config.load().dns.clone();
        if *self.resolver.config() != dns {
            self.resolver = Rc::new(NameResolver::new(dns));
            self.running.clear();
        }
        let snapshot = shared.snapshot.load();
        self.running.retain(|(followed, _)| snapshot.upstreams.iter().any(|upstream| Arc::ptr_eq(upstream, followed)));
        for upstream in &snapshot.upstreams {
            if self.running.iter().any(|(followed, _)| Arc::ptr_eq(upstream, followed)) {
                continue;
            }
            if upstream.config().tls.as_ref().is_some_and(|tls| !tls.verifies()) {
                Event::UpstreamUnverified { upstream: &upstream.config().name }.emit();
            }
            let services = upstream.names().map(|(index, _)| follow_name(&self.resolver, upstream, index));
            let services = services.chain([check_health(upstream)]).collect();
            self.running.push((Arc::clone(upstream), services));
        }
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

/// Follows the name at `index` of the endpoints of `upstream`.
fn follow_name(resolver: &Rc<NameResolver>, upstream: &Arc<Upstream>, index: usize) -> ServiceTask {
    let (resolver, upstream) = (Rc::clone(resolver), Arc::clone(upstream));
    tasks::supervise(TaskKind::Discovery, async move || {
        let Some(origin) = upstream.config().endpoints.get(index) else { return ServiceEnd::Finished };
        let source = DnsSource::new(Rc::clone(&resolver), origin.clone());
        let (name, mut is_failing) = (origin.to_string(), false);
        discovery::follow(source, resolver.config().timeout, |result| {
            let upstream_name = &*upstream.config().name;
            match result {
                Ok(targets) => {
                    if is_failing {
                        is_failing = false;
                        Event::LookupRecovered { upstream: upstream_name, name: &name }.emit();
                    }
                    if let Some(change) = upstream.set_targets(index, targets) {
                        let (endpoints, added, removed) = (change.endpoints, change.added, change.removed);
                        Event::EndpointsChanged { upstream: upstream_name, name: &name, endpoints, added, removed }
                            .emit();
                    }
                }
                Err(error) => {
                    upstream.note_failed_lookup(index);
                    if !is_failing {
                        is_failing = true;
                        let known = upstream.endpoints().list().len();
                        Event::LookupFailed { upstream: upstream_name, name: &name, known, error: &error }.emit();
                    }
                }
            }
        })
        .await;
        ServiceEnd::Finished
    })
}
