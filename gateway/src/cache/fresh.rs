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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn at(offset: i64) -> String {
        httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.saturating_add_signed(offset)))
    }

    /// What an answer says, in whole seconds; dates are relative to now.
    #[derive(Clone, Debug)]
    struct Said {
        s_maxage: Option<u64>,
        max_age: Option<u64>,
        expires: Option<i64>,
        date: Option<i64>,
        age: Option<u64>,
        modified: Option<i64>,
        delay: u64,
    }

    impl Said {
        fn response(&self) -> Response {
            let mut response = Response::new(StatusCode::OK);
            let mut push = |name: &str, value: Option<String>| {
                value.into_iter().for_each(|value| response.fields.push(name.as_bytes(), value.as_bytes()));
            };
            push("Cache-Control", self.max_age.map(|seconds| format!("max-age={seconds}")));
            push("Cache-Control", self.s_maxage.map(|seconds| format!("s-maxage={seconds}")));
            push("Expires", self.expires.map(at));
            push("Date", self.date.map(at));
            push("Age", self.age.map(|seconds| seconds.to_string()));
            push("Last-Modified", self.modified.map(at));
            response
        }

        /// RFC 9111 section 4.2.1, then 4.2.2, word for word; in tenths of a second.
        fn lifetime(&self, heuristic_max: u64) -> i64 {
            let date = self.date.unwrap_or(0);
            if let Some(seconds) = self.s_maxage {
                seconds.min(1 << 31) as i64 * 10
            } else if let Some(seconds) = self.max_age {
                seconds.min(1 << 31) as i64 * 10
            } else if let Some(expires) = self.expires {
                (expires - date).max(0) * 10
            } else {
                self.modified.map_or(0, |modified| (date - modified).clamp(0, heuristic_max as i64 * 10))
            }
        }

        /// RFC 9111 section 4.2.3: apparent_age, corrected_age_value, corrected_initial_age.
        fn initial_age(&self) -> i64 {
            let apparent = self.date.map_or(0, |date| (-date).max(0));
            // Clocks of two nodes may differ by 1.5 s.
            let apparent = if apparent > 1 { apparent } else { 0 };
            let corrected = self.age.map_or(0, |age| age.min(1 << 31) as i64 + self.delay as i64);
            apparent.max(corrected)
        }
    }

    fn said() -> impl Strategy<Value = Said> {
        let seconds = || prop::option::of(prop_oneof![0u64..5, 0u64..100_000, any::<u64>()]);
        let offset = || prop::option::of(prop_oneof![-5i64..5, -1_000_000i64..1_000_000]);
        (seconds(), seconds(), offset(), offset(), seconds(), offset(), 0u64..30).prop_map(
            |(s_maxage, max_age, expires, date, age, modified, delay)| Said {
                s_maxage,
                max_age,
                expires,
                date,
                age,
                modified,
                delay,
            },
        )
    }

    proptest! {
        #[test]
        fn ages_and_lifetimes_are_those_of_the_standard(said in said()) {
            let (response, route) = (said.response(), RoutePolicy::default());
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
            let lifetime = Lifetime::of(&Control::of(&response.fields), false, &response, &route, now).length();
            prop_assert_eq!(lifetime.as_millis() as i64 / 100, said.lifetime(route.heuristic_max.as_secs()));
            let age = initial_age(&response.fields, now, Duration::from_secs(said.delay));
            prop_assert_eq!(age.as_secs() as i64, said.initial_age());
        }
    }
}
