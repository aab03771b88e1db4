//! Targeted cache control (RFC 9213): fields that speak to this cache alone, before `Cache-Control` and `Expires`.
//!
//! They are structured dictionaries (RFC 9651). One that is empty or cannot be parsed counts as absent; directives whose value
//! has another type than theirs are ignored, and so are parameters (RFC 9213 section 2.1).

use std::time::Duration;

use sfv::{BareItem, Dictionary, ListEntry, Parser};

use super::control::{Control, SECONDS_MAX};
use crate::http::fields::Fields;

/// The directives of the first of `names` that is there and valid.
pub(super) fn control(names: &[String], fields: &Fields) -> Option<Control> {
    names.iter().find_map(|name| {
        let mut lines = fields.named(name.as_bytes());
        let mut text = lines.next()?.to_vec();
        for line in lines {
            text.extend_from_slice(b", ");
            text.extend_from_slice(line);
        }
        let dictionary: Dictionary = Parser::new(&text).parse().ok()?;
        (!dictionary.is_empty()).then(|| of(&dictionary))
    })
}

fn of(dictionary: &Dictionary) -> Control {
    let mut control = Control::default();
    for (name, entry) in dictionary {
        let ListEntry::Item(item) = entry else { continue };
        match &item.bare_item {
            BareItem::Boolean(true) => control.take_flag(name.as_str()),
            BareItem::Integer(seconds) => {
                let seconds = u64::try_from(i64::from(*seconds)).unwrap_or(0).min(SECONDS_MAX);
                control.take_seconds(name.as_str(), Duration::from_secs(seconds));
            }
            // Named fields: the whole response is meant, which is the safe reading.
            BareItem::String(_) if matches!(name.as_str(), "private" | "no-cache") => control.take_flag(name.as_str()),
            _ => {}
        }
    }
    control
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> Option<Control> {
        let mut fields = Fields::default();
        lines.iter().for_each(|line| fields.push(b"CDN-Cache-Control", line.as_bytes()));
        control(&["mine".to_owned(), "cdn-cache-control".to_owned()], &fields)
    }

    #[test]
    fn types_decide() {
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
    fn what_is_invalid_is_absent() {
        for lines in [&[][..], &[""], &["max-age=10, %%"], &["Max-Age=1"], &["max-age=10,"], &["a", "%"]] {
            assert_eq!(of(lines), None, "{lines:?}");
        }
    }
}
