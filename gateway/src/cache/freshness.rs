//! Freshness lifetime and age of a response (RFC 9111 section 4.2).

use std::time::{Duration, SystemTime};

use super::config::CachePolicy;
use super::control::SECONDS_MAX;
use super::date;
use super::stored::LifetimeSource;
use super::targeted::ResponseDirectives;
use crate::http::fields::{Fields, KnownField};
use crate::http::message::{Response, StatusCode};

/// Accepted clock skew between two hosts. A smaller offset of `Date` is not counted as age.
const CLOCK_SKEW_MAX: Duration = Duration::from_millis(1_500);

/// A freshness lifetime and its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FreshnessLifetime {
    /// Given by the origin, which includes a lifetime of zero.
    Explicit(Duration),
    /// Given by the cache policy, or the heuristic tenth of the time since the last modification.
    Assumed(Duration, LifetimeSource),
    Unknown,
}

impl FreshnessLifetime {
    pub(super) fn of(
        directives: &ResponseDirectives,
        response: &Response,
        policy: &CachePolicy,
        now: SystemTime,
    ) -> FreshnessLifetime {
        let control = &directives.control;
        // Section 4.2.1: `s-maxage`, else `max-age`, else `Expires`.
        if let Some(lifetime) = control.s_maxage.or(control.max_age) {
            return FreshnessLifetime::Explicit(lifetime);
        }
        if !directives.is_targeted
            && let Some(lifetime) = expires(&response.fields, now)
        {
            return FreshnessLifetime::Explicit(lifetime);
        }
        if !(is_heuristically_cacheable(response.status) || control.public) {
            return FreshnessLifetime::Unknown;
        }
        if !policy.default_ttl.is_zero() {
            return FreshnessLifetime::Assumed(policy.default_ttl, LifetimeSource::DefaultTtl);
        }
        heuristic(&response.fields, policy.heuristic_max, now).map_or(FreshnessLifetime::Unknown, |lifetime| {
            FreshnessLifetime::Assumed(lifetime, LifetimeSource::Heuristic)
        })
    }

    /// The lifetime as far as the origin has given it, at most `bound`.
    pub(super) fn explicit(self, bound: Option<Duration>) -> FreshnessLifetime {
        match self {
            FreshnessLifetime::Explicit(lifetime) => {
                FreshnessLifetime::Explicit(bound.map_or(lifetime, |bound| lifetime.min(bound)))
            }
            FreshnessLifetime::Assumed(..) | FreshnessLifetime::Unknown => FreshnessLifetime::Unknown,
        }
    }

    pub(super) fn duration(self) -> Duration {
        match self {
            FreshnessLifetime::Explicit(duration) | FreshnessLifetime::Assumed(duration, _) => duration,
            FreshnessLifetime::Unknown => Duration::ZERO,
        }
    }

    pub(super) fn source(self) -> LifetimeSource {
        match self {
            FreshnessLifetime::Assumed(_, source) => source,
            FreshnessLifetime::Explicit(_) | FreshnessLifetime::Unknown => LifetimeSource::Origin,
        }
    }
}

/// An invalid or repeated `Expires` is in the past (section 5.3).
fn expires(fields: &Fields, now: SystemTime) -> Option<Duration> {
    let mut lines = fields.all(KnownField::Expires);
    let line = lines.next()?;
    let expires = if lines.next().is_some() { None } else { date::parse(line) };
    let since = date_field(fields).unwrap_or(now);
    Some(expires.and_then(|expires| expires.duration_since(since).ok()).unwrap_or_default())
}

/// A tenth of the time since the last modification (section 4.2.2), at most `max`.
fn heuristic(fields: &Fields, max: Duration, now: SystemTime) -> Option<Duration> {
    let modified = date::parse(fields.get(KnownField::LastModified)?)?;
    let since = date_field(fields).unwrap_or(now).duration_since(modified).ok()?;
    Some((since / 10).min(max)).filter(|lifetime| !lifetime.is_zero())
}

/// Whether `status` is heuristically cacheable: such a response may be stored without explicit
/// freshness (RFC 9110 section 15.1).
pub(super) fn is_heuristically_cacheable(status: StatusCode) -> bool {
    matches!(status.as_u16(), 200 | 203 | 204 | 300 | 301 | 308 | 404 | 405 | 410 | 414 | 501)
}

/// The corrected initial age (section 4.2.3). `now` is when the head was complete; `delay` is the
/// time that the exchange took until then.
pub(super) fn initial_age(fields: &Fields, now: SystemTime, delay: Duration) -> Duration {
    let apparent = date_field(fields).and_then(|date| now.duration_since(date).ok());
    let apparent = apparent.filter(|age| *age > CLOCK_SKEW_MAX).unwrap_or_default();
    // The first of several members applies. An invalid number is ignored (section 5.1).
    let age_field =
        fields.members(KnownField::Age).next().filter(|age| age.iter().all(u8::is_ascii_digit)).map(|age| {
            let add = |sum: u64, digit: &u8| (sum * 10 + u64::from(digit - b'0')).min(SECONDS_MAX);
            Duration::from_secs(age.iter().fold(0, add)) + delay
        });
    apparent.max(age_field.unwrap_or_default())
}

fn date_field(fields: &Fields) -> Option<SystemTime> {
    fields.get(KnownField::Date).and_then(date::parse)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: u64 = 1_800_000_000;

    fn at(offset: i64) -> String {
        httpdate::fmt_http_date(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW.saturating_add_signed(offset)))
    }

    /// Caching fields of a response, in whole seconds. Dates are relative to now.
    #[derive(Clone, Debug)]
    struct ResponseFields {
        s_maxage: Option<u64>,
        max_age: Option<u64>,
        expires: Option<i64>,
        date: Option<i64>,
        age: Option<u64>,
        modified: Option<i64>,
        delay: u64,
    }

    impl ResponseFields {
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

        /// RFC 9111 section 4.2.1, then 4.2.2, literally. In tenths of a second.
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
            // `CLOCK_SKEW_MAX` is 1.5 s.
            let apparent = if apparent > 1 { apparent } else { 0 };
            let corrected = self.age.map_or(0, |age| age.min(1 << 31) as i64 + self.delay as i64);
            apparent.max(corrected)
        }
    }

    fn response_fields() -> impl Strategy<Value = ResponseFields> {
        let seconds = || prop::option::of(prop_oneof![0u64..5, 0u64..100_000, any::<u64>()]);
        let offset = || prop::option::of(prop_oneof![-5i64..5, -1_000_000i64..1_000_000]);
        (seconds(), seconds(), offset(), offset(), seconds(), offset(), 0u64..30).prop_map(
            |(s_maxage, max_age, expires, date, age, modified, delay)| ResponseFields {
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
        fn ages_and_lifetimes_follow_rfc_9111(sent in response_fields()) {
            let (response, policy) = (sent.response(), CachePolicy::default());
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
            let directives = ResponseDirectives::of(&[], &response.fields);
            let lifetime = FreshnessLifetime::of(&directives, &response, &policy, now).duration();
            prop_assert_eq!(lifetime.as_millis() as i64 / 100, sent.lifetime(policy.heuristic_max.as_secs()));
            let age = initial_age(&response.fields, now, Duration::from_secs(sent.delay));
            prop_assert_eq!(age.as_secs() as i64, sent.initial_age());
        }
    }
}
