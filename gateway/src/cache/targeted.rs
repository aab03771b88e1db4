//! Targeted cache control (RFC 9213): fields for this cache, which take precedence over
//! `Cache-Control` and `Expires`.
//!
//! The fields are structured dictionaries (RFC 9651). An empty or invalid dictionary counts as
//! absent. Directives with a value of another type are ignored, and so are parameters (RFC 9213
//! section 2.1).

use std::time::Duration;

use sfv::{BareItem, Dictionary, ListEntry, Parser};

use super::control::{CacheControl, SECONDS_MAX};
use crate::http::fields::Fields;

/// The directives of a response that apply to this cache.
pub(super) struct ResponseDirectives {
    pub(super) control: CacheControl,
    /// The directives come from a targeted field. `Expires` is then ignored (RFC 9213 section 2.2).
    pub(super) is_targeted: bool,
}

impl ResponseDirectives {
    /// Reads the first valid field of `names`, else `Cache-Control`.
    pub(super) fn of(names: &[String], fields: &Fields) -> Self {
        match control(names, fields) {
            Some(control) => ResponseDirectives { control, is_targeted: true },
            None => ResponseDirectives { control: CacheControl::parse(fields), is_targeted: false },
        }
    }
}

/// The directives of the first of `names` that is present and valid.
fn control(names: &[String], fields: &Fields) -> Option<CacheControl> {
    names.iter().find_map(|name| {
        let mut lines = fields.named(name.as_bytes());
        let mut text = lines.next()?.to_vec();
        for line in lines {
            text.extend_from_slice(b", ");
            text.extend_from_slice(line);
        }
        let dictionary: Dictionary = Parser::new(&text).parse().ok()?;
        (!dictionary.is_empty()).then(|| from_dictionary(&dictionary))
    })
}

fn from_dictionary(dictionary: &Dictionary) -> CacheControl {
    let mut control = CacheControl::default();
    for (name, entry) in dictionary {
        let ListEntry::Item(item) = entry else { continue };
        match &item.bare_item {
            BareItem::Boolean(true) => control.set_flag(name.as_str()),
            BareItem::Integer(seconds) => {
                let seconds = u64::try_from(i64::from(*seconds)).unwrap_or(0).min(SECONDS_MAX);
                control.set_seconds(name.as_str(), Duration::from_secs(seconds));
            }
            // A field list is read as applying to the complete response, which is the safe
            // interpretation.
            BareItem::String(_) if matches!(name.as_str(), "private" | "no-cache") => control.set_flag(name.as_str()),
            _ => {}
        }
    }
    control
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Option<CacheControl> {
        let mut fields = Fields::default();
        lines.iter().for_each(|line| fields.push(b"CDN-Cache-Control", line.as_bytes()));
        control(&["other-cache-control".to_owned(), "cdn-cache-control".to_owned()], &fields)
    }

    #[test]
    fn values_of_another_type_are_ignored() {
        let max_age = |line| of(&[line]).expect("valid").max_age;
        assert_eq!(max_age("max-age=10;x=1, foo"), Some(Duration::from_secs(10)));
        assert_eq!(max_age("max-age=\"10\", foo"), None);
        assert_eq!(max_age("max-age=10.0, foo"), None);
        assert_eq!(max_age("max-age=-1"), Some(Duration::ZERO));
        assert_eq!(max_age("max-age=99999999999"), Some(Duration::from_secs(SECONDS_MAX)));
        assert!(of(&["private, no-store=?0"]).is_some_and(|control| control.private && !control.no_store));
        assert!(of(&["no-store", "max-age=1"]).is_some_and(|control| control.no_store && control.max_age.is_some()));
    }

    #[test]
    fn invalid_fields_count_as_absent() {
        for lines in [&[][..], &[""], &["max-age=10, %%"], &["Max-Age=1"], &["max-age=10,"], &["a", "%"]] {
            assert_eq!(of(lines), None, "{lines:?}");
        }
    }
}
