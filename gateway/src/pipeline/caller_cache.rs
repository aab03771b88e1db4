//! Caches identity and route of the previous request on a connection; both are reused when the next
//! head is byte-identical.
//!
//! Invariant: a cached caller was identified by the snapshot that the current request uses, so a
//! reload invalidates it.

use std::sync::Arc;

use super::snapshot::Snapshot;
use crate::hop;
use crate::http::message::Request;
use crate::identify::Caller;
use crate::peer::ConnectionPeer;
use crate::route::Route;

/// The caller and the route of a connection's last request.
#[derive(Default)]
pub(super) struct CallerCache {
    snapshot: Option<Arc<Snapshot>>,
    caller: Option<Caller>,
    /// Index of the route in the snapshot.
    route: Option<usize>,
}

impl CallerCache {
    /// Identifies the caller of `request` behind `peer` and finds its route, if one matches.
    pub(super) fn lookup<'s>(
        &mut self,
        snapshot: &'s Arc<Snapshot>,
        peer: &ConnectionPeer,
        request: &mut Request,
    ) -> (&Caller, Option<&'s Route>) {
        hop::receive(request, snapshot.http.underscores);
        let CallerCache { snapshot: cached, caller, route } = self;
        let is_same_snapshot = cached.as_ref().is_some_and(|cached| Arc::ptr_eq(cached, snapshot));
        let is_hit = request.repeats_previous && is_same_snapshot && snapshot.identity.is_cacheable();
        if !is_hit {
            *caller = None;
            *route = snapshot.routes.find(request).map(|route| route.index);
        }
        if !is_same_snapshot {
            *cached = Some(Arc::clone(snapshot));
        }
        if let Some(caller) = caller {
            caller.trace = snapshot.identity.trace(request);
        }
        let caller = caller.get_or_insert_with(|| snapshot.identity.identify_peer(peer, request));
        (caller, route.and_then(|route| snapshot.routes.at(route)))
    }
}
