//! A canary: another upstream that gets a part of a route's requests.
//!
//! A caller stays with its upstream: the part is one of callers, not of requests, and a larger
//! percentage only adds callers. Responses of both are stored under different keys.

use limiter::Percent;

use super::condition::ValuePattern;
use crate::http::message::Request;
use crate::identify::Caller;

/// A part of a route's requests for another upstream (`routes.canary`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CanaryConfig {
    /// Index into the upstreams.
    pub(crate) upstream: usize,
    /// Part of the callers: by user, without one by device.
    pub(crate) percent: Percent,
    /// Fields of requests that go to the canary independent of their callers; empty: there are
    /// none. All must match.
    pub(crate) headers: Vec<(String, ValuePattern)>,
}

impl CanaryConfig {
    /// Whether the canary of the route named `route` gets the request.
    pub(crate) fn takes(&self, route: &str, caller: &Caller, request: &Request) -> bool {
        let matches = |(name, pattern): &(String, ValuePattern)| {
            request.fields.named(name.as_bytes()).any(|value| pattern.matches(value))
        };
        let is_named = !self.headers.is_empty() && self.headers.iter().all(matches);
        is_named || self.percent.includes(caller.user.unwrap_or(caller.device), number_of(route))
    }
}

/// A number for a name, the same on all nodes.
pub(super) fn number_of(name: &str) -> u64 {
    blake3::hash(name.as_bytes()).as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
