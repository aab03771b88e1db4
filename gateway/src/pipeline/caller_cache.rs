//! Caches identity, route and authentication of the previous request on a connection; they are
//! reused when the next head is byte-identical.
//!
//! Invariants: a cached caller was identified by the snapshot that the current request uses, so a
//! reload invalidates it, and from the same head: one that was read and not served, such as that of
//! a stream that was reset, has no caller here. Credentials that are removed make the next head a
//! new one.

use std::sync::Arc;

use super::snapshot::Snapshot;
use crate::hop;
use crate::http::message::Request;
use crate::identify::Caller;
use crate::identify::auth::Authentication;
use crate::peer::ConnectionPeer;
use crate::route::Route;

/// The caller and the route of a connection's last request.
#[derive(Default)]
pub(super) struct CallerCache {
    snapshot: Option<Arc<Snapshot>>,
    /// The number of the field section of the request (HTTP/2).
    section: Option<u64>,
    caller: Option<Caller>,
    /// Index of the route in the snapshot.
    route: Option<usize>,
    authentication: Authentication,
}

impl CallerCache {
    /// Identifies the caller of `request` behind `peer`, finds its route, if one matches, and
    /// authenticates it as far as this takes no time.
    pub(super) fn lookup<'s>(
        &mut self,
        snapshot: &'s Arc<Snapshot>,
        peer: &ConnectionPeer,
        request: &mut Request,
    ) -> (&Caller, Option<&'s Route>, Authentication) {
        hop::receive(request, snapshot.http.underscores);
        let CallerCache { snapshot: cached, section, caller, route, authentication } = self;
        let is_same_snapshot = cached.as_ref().is_some_and(|cached| Arc::ptr_eq(cached, snapshot));
        let is_same_section = std::mem::replace(section, request.section_number) == request.section_number;
        let is_hit = request.repeats_previous
            && is_same_section
            && is_same_snapshot
            && snapshot.identity.is_cacheable()
            && authentication.is_final();
        if !is_hit {
            *caller = None;
        }
        if !is_same_snapshot {
            *cached = Some(Arc::clone(snapshot));
        }
        if let Some(caller) = caller {
            snapshot.identity.renew_trace(caller, request);
        }
        let caller = caller.get_or_insert_with(|| {
            let mut caller = snapshot.identity.identify_peer(peer, request);
            // After the fields that only trusted proxies may send were removed, or read.
            let found = snapshot.routes.find(request);
            *route = found.map(|route| route.index);
            let authenticator = found.and_then(|route| route.authenticator.as_ref());
            *authentication = authenticator.map_or(Authentication::NotRequired, |authenticator| {
                let authentication = authenticator.authenticate(&request.fields);
                if let Some(principal) = authentication.principal() {
                    let (name, class) = (authenticator.name(principal), authenticator.class(principal));
                    snapshot.identity.set_principal(&mut caller, name, class);
                    authenticator.remove_credentials(&mut request.fields);
                }
                authentication
            });
            caller
        });
        request.is_authenticated = authentication.principal().is_some();
        (caller, route.and_then(|route| snapshot.routes.at(route)), *authentication)
    }
}
