//! A verification service that decides about the requests of a route (`routes.auth.forward`).

use std::sync::Arc;
use std::time::Duration;

use super::RouteTarget;
use crate::identify::auth::AnswerCache;

/// The service, and the fields of its acceptance that are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ForwardAuthConfig {
    /// Index into the upstreams.
    pub(crate) upstream: usize,
    /// Host and port of the service.
    pub(crate) authority: String,
    /// Path and query of the service.
    pub(crate) target: String,
    /// For the whole call.
    pub(crate) timeout: Duration,
    /// Fields of an acceptance that the origin receives, in lower case. Those that a client sends
    /// are removed.
    pub(crate) fields: Vec<String>,
    /// The field of an acceptance that names the user, in lower case.
    pub(crate) user: Option<String>,
}

/// The service of a route at run time.
pub(crate) struct ForwardAuth {
    pub(crate) config: ForwardAuthConfig,
    pub(crate) target: RouteTarget,
    pub(crate) answers: AnswerCache,
}

impl ForwardAuth {
    /// As `old`, if nothing has changed, so that a reload keeps its answers.
    pub(crate) fn replacing(old: Option<&Arc<Self>>, config: &ForwardAuthConfig, target: RouteTarget) -> Arc<Self> {
        let is_same = |old: &&Arc<Self>| old.config == *config && Arc::ptr_eq(&old.target.upstream, &target.upstream);
        match old.filter(is_same) {
            Some(old) => Arc::clone(old),
            None => Arc::new(ForwardAuth { config: config.clone(), target, answers: AnswerCache::default() }),
        }
    }
}
