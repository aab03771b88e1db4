//! How long a response stays fresh and how old it is already (RFC 9111 section 4.2).

use std::time::{Duration, SystemTime};

use super::control::{Control, SECONDS_MAX};
use super::{RoutePolicy, date};
use crate::http::fields::{Fields, Known};
use crate::http::message::{Response, StatusCode};

/// The clocks of two nodes may differ by this much: a `Date` that is off by less is a clock, not an age.
const TOLERANCE: Duration = Duration::from_millis(1_500);

/// A freshness lifetime and where it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifetime {
    /// The origin said so, even that there is none.
    Explicit(Duration),
    /// The route says so, or a tenth of the time since the last change.
    Assumed(Duration),
    Unknown,
}

impl Lifetime {
    /// `is_targeted`: `control` comes from a targeted field, beside which `Expires` does not count (RFC 9213 section 2.2).
    pub(super) fn of(
        control: &Control,
        is_targeted: bool,
        response: &Response,
        route: &RoutePolicy,
        now: SystemTime,
    ) -> Lifetime {
        // Section 4.2.1: `s-maxage`, else `max-age`, else `Expires`.
        if let Some(lifetime) = control.s_maxage.or(control.max_age) {
            return Lifetime::Explicit(lifetime);
        }
        if !is_targeted && let Some(lifetime) = expires(&response.fields, now) {
            return Lifetime::Explicit(lifetime);
        }
        if !(may_assume(response.status) || control.public) {
            return Lifetime::Unknown;
        }
        if !route.default_ttl.is_zero() {
            return Lifetime::Assumed(route.default_ttl);
        }
        heuristic(&response.fields, route.heuristic_max, now).map_or(Lifetime::Unknown, Lifetime::Assumed)
    }

    pub(super) fn length(self) -> Duration {
        match self {
            Lifetime::Explicit(length) | Lifetime::Assumed(length) => length,
            Lifetime::Unknown => Duration::ZERO,
        }
    }
}

/// An unreadable `Expires` is in the past, and so are two of them (section 5.3).
fn expires(fields: &Fields, now: SystemTime) -> Option<Duration> {
    let mut lines = fields.all(Known::Expires);
    let line = lines.next()?;
    let expires = if lines.next().is_some() { None } else { date::parse(line) };
    let since = dated(fields).unwrap_or(now);
    Some(expires.and_then(|expires| expires.duration_since(since).ok()).unwrap_or_default())
}

/// A tenth of the time since the last change (section 4.2.2), at most `most`.
fn heuristic(fields: &Fields, most: Duration, now: SystemTime) -> Option<Duration> {
    let modified = date::parse(fields.get(Known::LastModified)?)?;
    let since = dated(fields).unwrap_or(now).duration_since(modified).ok()?;
    Some((since / 10).min(most)).filter(|lifetime| !lifetime.is_zero())
}

/// Statuses that may be kept without being told to: the heuristically cacheable ones (RFC 9110 section 15.1).
pub(super) fn may_assume(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// The corrected initial age (section 4.2.3). `now` is the moment the head was complete, `delay` how long the exchange took.
pub(super) fn initial_age(fields: &Fields, now: SystemTime, delay: Duration) -> Duration {
    let apparent = dated(fields).and_then(|date| now.duration_since(date).ok());
    let apparent = apparent.filter(|age| *age > TOLERANCE).unwrap_or_default();
    // Of several members the first counts, and one that is no number counts for nothing (section 5.1).
    let said = fields.members(Known::Age).next().filter(|age| age.iter().all(u8::is_ascii_digit)).map(|age| {
        let add = |sum: u64, digit: &u8| (sum * 10 + u64::from(digit - b'0')).min(SECONDS_MAX);
        Duration::from_secs(age.iter().fold(0, add)) + delay
    });
    apparent.max(said.unwrap_or_default())
}

fn dated(fields: &Fields) -> Option<SystemTime> {
    fields.get(Known::Date).and_then(date::parse)
}
