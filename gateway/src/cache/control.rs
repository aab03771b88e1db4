//! Parses `Cache-Control` directives (RFC 9111 section 5.2).
//!
//! Directives are case-insensitive. Unknown directives are ignored. If a directive is repeated with
//! different values, the most restrictive value applies. An invalid number is read as 0, which is
//! the safe interpretation (section 4.2.1).

use std::time::Duration;

use crate::http::fields::{Fields, KnownField, is_token};

/// Upper bound of delta-seconds; larger values are read as this value (RFC 9111 section 1.2.2).
pub(super) const SECONDS_MAX: u64 = 1 << 31;

/// The `Cache-Control` directives of one message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheControl {
    pub(crate) no_store: bool,
    pub no_cache: bool,
    pub(crate) private: bool,
    /// `no-cache` or `private` is present in its qualified form. The listed fields are not stored;
    /// the rest of the response may be (sections 5.2.2.4 and 5.2.2.7).
    pub(crate) has_qualified_fields: bool,
    pub(crate) public: bool,
    pub(crate) must_revalidate: bool,
    pub(crate) proxy_revalidate: bool,
    pub(crate) must_understand: bool,
    pub(crate) only_if_cached: bool,
    pub(crate) max_age: Option<Duration>,
    pub(crate) s_maxage: Option<Duration>,
    pub(crate) stale_while_revalidate: Option<Duration>,
    pub(crate) stale_if_error: Option<Duration>,
    pub(crate) min_fresh: Option<Duration>,
    /// `max-stale` without a value accepts any staleness.
    pub(crate) max_stale: Option<Duration>,
}

impl CacheControl {
    /// The directives of a request without its demands for validation.
    pub(crate) fn without_demands(self) -> CacheControl {
        CacheControl { no_cache: false, max_age: None, min_fresh: None, ..self }
    }

    pub fn parse(fields: &Fields) -> CacheControl {
        let mut control = CacheControl::default();
        for member in fields.members(KnownField::CacheControl) {
            let (name, value) = split_directive(member);
            control.apply(&name.to_ascii_lowercase(), value);
        }
        control
    }

    fn apply(&mut self, name: &[u8], value: Option<&[u8]>) {
        let Ok(name) = std::str::from_utf8(name) else { return };
        match name {
            "max-age" | "s-maxage" | "stale-while-revalidate" | "stale-if-error" | "min-fresh" => {
                self.set_seconds(name, seconds(value));
            }
            "max-stale" => {
                self.max_stale = Some(value.map_or(Duration::from_secs(SECONDS_MAX), |_| seconds(value)));
            }
            "no-cache" | "private" if value.is_some_and(|value| field_list(value).is_some()) => {
                self.has_qualified_fields = true
            }
            _ => self.set_flag(name),
        }
    }

    /// Sets a directive without a value, or whose value is ignored.
    pub(super) fn set_flag(&mut self, name: &str) {
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

    /// Sets a directive with delta-seconds.
    pub(super) fn set_seconds(&mut self, name: &str, value: Duration) {
        match name {
            "max-age" => set_min(&mut self.max_age, value),
            "s-maxage" => set_min(&mut self.s_maxage, value),
            "stale-while-revalidate" => set_min(&mut self.stale_while_revalidate, value),
            "stale-if-error" => set_min(&mut self.stale_if_error, value),
            "min-fresh" => self.min_fresh = Some(value),
            _ => {}
        }
    }

    /// Whether a stale response must not be used without validation (RFC 9111 section 4.2.4).
    pub(crate) fn forbids_stale(&self) -> bool {
        self.must_revalidate || self.proxy_revalidate || self.no_cache || self.s_maxage.is_some()
    }
}

/// The fields that the qualified forms of `no-cache` and `private` exclude from storage.
pub(crate) fn qualified_fields(fields: &Fields) -> impl Iterator<Item = &[u8]> {
    fields
        .members(KnownField::CacheControl)
        .filter_map(|member| {
            let (name, value) = split_directive(member);
            let may_be_qualified = name.eq_ignore_ascii_case(b"no-cache") || name.eq_ignore_ascii_case(b"private");
            field_list(value.filter(|_| may_be_qualified)?)
        })
        .flatten()
}

/// Splits a directive into name and value.
fn split_directive(member: &[u8]) -> (&[u8], Option<&[u8]>) {
    match memchr::memchr(b'=', member) {
        Some(at) => (member[..at].trim_ascii(), Some(member[at + 1..].trim_ascii())),
        None => (member, None),
    }
}

/// The field names of a quoted list. `None` if the value is not a valid list: the directive then
/// counts as having no value.
fn field_list(value: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let list = value.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    let field_list = || list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
    (field_list().next().is_some() && field_list().all(is_token)).then(field_list)
}

fn set_min(slot: &mut Option<Duration>, value: Duration) {
    *slot = Some(slot.map_or(value, |current| current.min(value)));
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

    fn of(lines: &[&str]) -> CacheControl {
        let mut fields = Fields::default();
        for line in lines {
            fields.push(b"Cache-Control", line.as_bytes());
        }
        CacheControl::parse(&fields)
    }

    #[test]
    fn most_restrictive_interpretation_wins() {
        assert_eq!(of(&["max-age=10, MAX-AGE=5"]).max_age, Some(Duration::from_secs(5)));
        assert_eq!(of(&["max-age=-1"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age=1.5"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age"]).max_age, Some(Duration::ZERO));
        assert_eq!(of(&["max-age=\"7\""]).max_age, Some(Duration::from_secs(7)));
        assert_eq!(of(&["max-age=99999999999999999999999"]).max_age, Some(Duration::from_secs(1 << 31)));
    }

    #[test]
    fn lines_are_combined_and_quoted_text_is_not_a_directive() {
        let control = of(&["x=\"no-store, private\"", "No-Cache=\"set-cookie\"", "s-maxage=3"]);
        assert!(!control.no_store && !control.private && !control.no_cache && control.has_qualified_fields);
        assert_eq!(control.s_maxage, Some(Duration::from_secs(3)));
    }

    #[test]
    fn only_a_valid_field_list_is_the_qualified_form() {
        let mut fields = Fields::default();
        fields.push(b"Cache-Control", b"private=\"X-User, set-cookie\", max-age=1, No-Cache=\"A\"");
        assert!(qualified_fields(&fields).eq([&b"X-User"[..], b"set-cookie", b"A"]));
        for value in ["private=x", "private=\"\"", "private=\"a b\"", "private=\"a", "private=\", ,\""] {
            assert!(of(&[value]).private, "{value}");
        }
    }
}
