//! The breakers of the current snapshot, for the control thread: their changes by time, and admin
//! queries.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};

use crate::breaker::{Breaker, BreakerQuery, BreakerQueryError, BreakerTarget};
use crate::pipeline::Snapshot;
use crate::route::Route;

/// Breakers that a reply has: there may be one for each route.
pub(super) const BREAKERS_MAX: usize = 200;

/// Each breaker once: routes may share one.
pub(super) fn list(snapshot: &Snapshot) -> Vec<&Arc<Breaker>> {
    let mut breakers: Vec<&Arc<Breaker>> = Vec::new();
    for target in snapshot.routes.iter().flat_map(Route::targets) {
        // One of a route has its name; the others are few.
        let is_listed = target.breaker.name().route.is_none()
            && breakers.iter().any(|breaker| Arc::ptr_eq(breaker, &target.breaker));
        if !is_listed {
            breakers.push(&target.breaker);
        }
    }
    breakers
}

/// Makes and reports the changes that are due.
pub(super) fn advance(snapshot: &Snapshot) {
    let now = Instant::now();
    for breaker in list(snapshot) {
        breaker.announce(breaker.advance(now));
    }
}

/// Answers a query with a page of the list, or with the breakers of a target.
///
/// # Errors
/// There is no such breaker.
pub(super) fn query(snapshot: &Snapshot, query: &BreakerQuery) -> Result<Value, BreakerQueryError> {
    let (breakers, from) = match query {
        BreakerQuery::List { from } => (list(snapshot), *from),
        BreakerQuery::Target(target) | BreakerQuery::Set { target, .. } => (find(snapshot, target)?, 0),
    };
    let now = Instant::now();
    let page = breakers.iter().skip(from).take(BREAKERS_MAX);
    let page: Vec<Value> = page.map(|breaker| breaker.to_json(now)).collect();
    // A list is continued; those of a target are listed as far as they fit.
    let is_list = matches!(query, BreakerQuery::List { .. });
    let next = Some(from.saturating_add(page.len())).filter(|next| is_list && *next < breakers.len());
    Ok(json!({ "breakers": page, "total": breakers.len(), "next": next }))
}

fn find<'s>(snapshot: &'s Snapshot, target: &BreakerTarget) -> Result<Vec<&'s Arc<Breaker>>, BreakerQueryError> {
    match target {
        BreakerTarget::Upstream(name) => {
            let breakers = list(snapshot).into_iter().filter(|breaker| *breaker.name().upstream == **name);
            let breakers: Vec<_> = breakers.collect();
            if breakers.is_empty() { Err(BreakerQueryError::UnknownUpstream(name.clone())) } else { Ok(breakers) }
        }
        BreakerTarget::Route(name) => {
            let route = snapshot.routes.iter().find(|route| *route.config.name == **name);
            let target = route.and_then(|route| route.target.as_ref());
            let breaker = &target.ok_or_else(|| BreakerQueryError::UnknownRoute(name.clone()))?.breaker;
            if breaker.name().route.is_none() {
                let upstream = breaker.name().upstream.to_string();
                return Err(BreakerQueryError::SharedBreaker { route: name.clone(), upstream });
            }
            Ok(vec![breaker])
        }
    }
}
