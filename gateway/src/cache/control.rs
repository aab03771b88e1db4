//! `Cache-Control` directives, read once (RFC 9111 section 5.2).
//!
//! Directives are case-insensitive; unknown ones are ignored; of a repeated one with different values the most
//! restrictive counts; an unreadable number counts as 0 where that is the safe side (section 4.2.1).

use std::time::Duration;

use crate::http::fields::{Fields, Known, is_token};

/// Larger delta-seconds count as this (RFC 9111 section 1.2.2).
pub(super) const SECONDS_MAX: u64 = 1 << 31;

/// The directives of one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    pub no_store: bool,
    pub no_cache: bool,
    pub private: bool,
    /// `no-cache` or `private` name fields: these are not stored, and the rest may be (sections 5.2.2.4 and 5.2.2.7).
    pub withholds: bool,
    pub public: bool,
    pub must_revalidate: bool,
    pub proxy_revalidate: bool,
    pub must_understand: bool,
    pub only_if_cached: bool,
    pub max_age: Option<Duration>,
    pub s_maxage: Option<Duration>,
    pub stale_while_revalidate: Option<Duration>,
    pub stale_if_error: Option<Duration>,
    pub min_fresh: Option<Duration>,
    /// `max-stale` without a value accepts any staleness.
    pub max_stale: Option<Duration>,
}

impl Control {
    pub fn of(fields: &Fields) -> Control {
        let mut control = Control::default();
        for member in fields.members(Known::CacheControl) {
            let (name, value) = split(member);
            control.take(&name.to_ascii_lowercase(), value);
        }
        control
    }

    fn take(&mut self, name: &[u8], value: Option<&[u8]>) {
        let Ok(name) = std::str::from_utf8(name) else { return };
        match name {
            "max-age" | "s-maxage" | "stale-while-revalidate" | "stale-if-error" | "min-fresh" => {
                self.take_seconds(name, seconds(value));
            }
            "max-stale" => {
                self.max_stale = Some(value.map_or(Duration::from_secs(SECONDS_MAX), |_| seconds(value)));
            }
            "no-cache" | "private" if value.is_some_and(|value| names(value).is_some()) => self.withholds = true,
            _ => self.take_flag(name),
        }
    }

    /// A directive without a value, or whose value does not matter.
    pub(super) fn take_flag(&mut self, name: &str) {
        match name {
            "no-store" => self.no_store = true,
            "no-cache" => self.no_cache = true,
            "private" => self.private = true,
            "public" => self.public = true,
            "must-revalidate" => self.must_revalidate = true,
            "proxy-revalidate" => self.proxy_revalidate = true,
            "must-understand" => self.must_understand = true,
            "only-if-cached" => self.only_if_cached = true,
            _ => {}
        }
    }

    /// A directive with delta-seconds.
    pub(super) fn take_seconds(&mut self, name: &str, value: Duration) {
        match name {
            "max-age" => least(&mut self.max_age, value),
            "s-maxage" => least(&mut self.s_maxage, value),
            "stale-while-revalidate" => least(&mut self.stale_while_revalidate, value),
            "stale-if-error" => least(&mut self.stale_if_error, value),
            "min-fresh" => self.min_fresh = Some(value),
            _ => {}
        }
    }

    /// Whether a stale response may never be used without validation (RFC 9111 section 4.2.4).
    pub fn forbids_stale(&self) -> bool {
        self.must_revalidate || self.proxy_revalidate || self.no_cache || self.s_maxage.is_some()
    }
}

/// The fields that a response's `Cache-Control` keeps from being stored.
pub fn withheld(fields: &Fields) -> impl Iterator<Item = &[u8]> {
    fields
        .members(Known::CacheControl)
        .filter_map(|member| {
            let (name, value) = split(member);
            let is_such = name.eq_ignore_ascii_case(b"no-cache") || name.eq_ignore_ascii_case(b"private");
            names(value.filter(|_| is_such)?)
        })
        .flatten()
}

/// Name and value of a directive.
fn split(member: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memchr(b'=', member) {
        Some(at) => (member[..at].trim_ascii(), Some(member[at + 1..].trim_ascii())),
        None => (member, None),
    }
}

/// The names in a quoted list of fields; `None` where it is no such list, and the directive is read as if it had no value.
fn names(value: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let list = value.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    let names = || list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
    (names().next().is_some() && names().all(is_token)).then(names)
}

fn least(slot: &mut Option<Duration>, value: Duration) {
    *slot = Some(slot.map_or(value, |old| old.min(value)));
}

fn seconds(value: Option<&[u8]>) -> Duration {
    let value = value.unwrap_or_default();
    let digits = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")).unwrap_or(value);
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Duration::ZERO;
    }
    let total = digits
        .iter()
        .fold(0u64, |sum, digit| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0')).min(SECONDS_MAX));
    Duration::from_secs(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Control {
        let mut fields = Fields::default();
        for line in lines {
            fields.push(b"Cache-Control", line.as_bytes());
        }
        Control::of(&fields)
    }

    #[test]
    fn restrictive_readings_win() {
        assert_eq!(of(&["max-age=10, MAX-AGE=5"]).max_age, Some(Duration::from_secs(5)));
        assert_eq!(of(&["max-age=-1"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age=1.5"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age=\"7\""]).max_age, Some(Duration::from_secs(7)));
        assert_eq!(of(&["max-age=99999999999999999999999"]).max_age, Some(Duration::from_secs(1 << 31)));
    }

    #[test]
    fn lines_join_and_quotes_hide() {
        let control = of(&["x=\"no-store, private\"", "No-Cache=\"set-cookie\"", "s-maxage=3"]);
        assert!(!control.no_store && !control.private && !control.no_cache && control.withholds);
        assert_eq!(control.s_maxage, Some(Duration::from_secs(3)));
    }

    #[test]
    fn only_a_list_of_names_withholds_fields() {
        let mut fields = Fields::default();
        fields.push(b"Cache-Control", b"private=\"X-User, set-cookie\", max-age=1, No-Cache=\"A\"");
        assert!(withheld(&fields).eq([&b"X-User"[..], b"set-cookie", b"A"]));
        for whole in ["private=x", "private=\"\"", "private=\"a b\"", "private=\"a", "private=\", ,\""] {
            assert!(of(&[whole]).private, "{whole}");
        }
    }
}
