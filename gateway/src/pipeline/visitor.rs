//! Who asks on a connection, and for which route.
//!
//! A client that asks for the same in the same words, as those do that are denied and try again, is known by them. Invariant: what is
//! known was found by the site that a request is answered by, in the request before it.

use std::net::IpAddr;
use std::sync::Arc;

use super::Site;
use crate::http::message::Request;
use crate::identify::Caller;
use crate::route::Route;

/// The sender of a connection's last request.
#[derive(Default)]
pub struct Visitor {
    site: Option<Arc<Site>>,
    caller: Option<Caller>,
    /// The place of the route among those of the site.
    route: Option<usize>,
}

impl Visitor {
    /// Finds who sent `request` behind `peer`, and its route, if there is one.
    pub(super) fn meet<'s>(
        &mut self,
        site: &'s Arc<Site>,
        peer: &IpAddr,
        request: &mut Request,
    ) -> (&Caller, Option<&'s Route>) {
        let Visitor { site: known, caller, route } = self;
        let is_same_site = known.as_ref().is_some_and(|known| Arc::ptr_eq(known, site));
        let is_known = request.repeats && is_same_site && site.identity.is_steady();
        if !is_known {
            *caller = None;
            *route = site.routes.find(request).map(|route| route.index);
        }
        if !is_same_site {
            *known = Some(Arc::clone(site));
        }
        if let Some(caller) = caller {
            caller.trace = site.identity.trace(request);
        }
        let caller = caller.get_or_insert_with(|| site.identity.caller(*peer, request));
        (caller, route.and_then(|route| site.routes.at(route)))
    }

    /// The same once more; none where there is no route.
    pub(super) fn met<'s>(&self, site: &'s Site) -> Option<(&Caller, &'s Route)> {
        self.caller.as_ref().zip(self.route.and_then(|route| site.routes.at(route)))
    }
}
