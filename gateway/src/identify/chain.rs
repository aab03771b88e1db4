//! Owns the chain of proxies that a request came through, as trusted proxies have written it: `X-Forwarded-For`, or `Forwarded`
//! (RFC 7239).
//!
//! Refuses to mix the two. A proxy that writes one of them passes a client's own line of the other on, and that says whatever the client
//! likes: one field is believed, and the other neither counts nor reaches the origin.

use std::borrow::Cow;
use std::net::IpAddr;

use crate::http::fields::{Fields, Known};

/// Which field trusted proxies write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Written {
    /// `X-Forwarded-For` where it is there, as most proxies write it and pass `Forwarded` on; else `Forwarded`.
    #[default]
    Either,
    XForwardedFor,
    Forwarded,
}

impl Written {
    fn believed(self, fields: &Fields) -> Known {
        match self {
            Written::Either if fields.has(Known::XForwardedFor) => Known::XForwardedFor,
            Written::XForwardedFor => Known::XForwardedFor,
            Written::Either | Written::Forwarded => Known::Forwarded,
        }
    }

    /// The hops as they are written, the client first. Of `Forwarded` what each says in `for`; `None` where it says nothing.
    fn hops(self, fields: &Fields) -> impl Iterator<Item = Option<&[u8]>> {
        let believed = self.believed(fields);
        fields.members(believed).map(move |hop| if believed == Known::Forwarded { parameter(hop) } else { Some(hop) })
    }

    /// The rightmost address that is not trusted; the leftmost if all are; what is left of the chain where it becomes unreadable, which
    /// can be nothing.
    pub(super) fn client(self, fields: &Fields, trusts: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let hops: Vec<_> = self.hops(fields).collect();
        let mut last = None;
        for hop in hops.into_iter().rev() {
            let Some(ip) = hop.and_then(|hop| address(str::from_utf8(hop).ok()?)) else { return last };
            last = Some(ip);
            if !trusts(ip) {
                break;
            }
        }
        last
    }

    /// The chain in the form of `X-Forwarded-For`, empty where there is none. What hides in `Forwarded` (`unknown`, `_hidden`) is passed
    /// on as it is.
    pub(super) fn text(self, fields: &Fields) -> String {
        let hops = self.hops(fields).flatten().map(|hop| {
            let text = String::from_utf8_lossy(hop);
            match (self.believed(fields), address(&text)) {
                (Known::Forwarded, Some(ip)) => Cow::Owned(ip.to_string()),
                _ => text,
            }
        });
        hops.collect::<Vec<_>>().join(", ")
    }
}

/// The `for` parameter of one `Forwarded` element (RFC 7239 section 5.2), without its quotes.
fn parameter(element: &[u8]) -> Option<&[u8]> {
    element.split(|byte| *byte == b';').find_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii());
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        name.eq_ignore_ascii_case(b"for").then_some(value)
    })
}

/// An address with or without a port, IPv6 with or without brackets.
fn address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(address, _)| address);
    let without_port = || text.rsplit_once(':').map(|(address, _)| address);
    bracketed.unwrap_or(text).parse().ok().or_else(|| without_port()?.parse().ok()).map(|ip: IpAddr| ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(lines: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        fields
    }

    fn client(written: Written, lines: &[(&str, &str)]) -> Option<String> {
        let trusts = |ip: IpAddr| ip.to_string().starts_with("10.");
        written.client(&fields(lines), trusts).map(|ip| ip.to_string())
    }

    const XFF: (&str, &str) = ("x-forwarded-for", "6.6.6.6, 198.51.100.7, 10.1.1.1");
    const FORWARDED: (&str, &str) = ("forwarded", "for=6.6.6.6, for=\"203.0.113.9:80\";proto=http, For = 10.1.1.1");

    #[test]
    fn one_field_is_believed_and_a_client_cannot_add_the_other() {
        for (written, both, forwarded_alone, xff_alone) in [
            (Written::Either, Some("198.51.100.7"), Some("203.0.113.9"), Some("198.51.100.7")),
            (Written::XForwardedFor, Some("198.51.100.7"), None, Some("198.51.100.7")),
            (Written::Forwarded, Some("203.0.113.9"), Some("203.0.113.9"), None),
        ] {
            let seen = [client(written, &[XFF, FORWARDED]), client(written, &[FORWARDED]), client(written, &[XFF])];
            assert_eq!(seen.each_ref().map(Option::as_deref), [both, forwarded_alone, xff_alone], "{written:?}");
        }
    }

    #[test]
    fn a_chain_ends_where_it_cannot_be_read() {
        for (value, want) in [
            ("for=198.51.100.7, for=unknown, for=10.1.1.1", Some("10.1.1.1")),
            ("for=198.51.100.7, proto=http", None),
            ("for=\"[2001:db8::1]:4711\"", Some("2001:db8::1")),
            ("by=10.0.0.1;for=\"[2001:db8::1]\"", Some("2001:db8::1")),
            ("for=_hidden", None),
            ("for=\"", None),
            ("", None),
        ] {
            assert_eq!(client(Written::Forwarded, &[("forwarded", value)]).as_deref(), want, "{value}");
        }
        assert_eq!(client(Written::Either, &[("x-forwarded-for", "\u{e9}, 10.1.1.1")]).as_deref(), Some("10.1.1.1"));
    }

    #[test]
    fn the_origin_gets_the_chain_that_is_believed() {
        let text = |written: Written, lines: &[(&str, &str)]| written.text(&fields(lines));
        assert_eq!(text(Written::Either, &[FORWARDED, XFF]), "6.6.6.6, 198.51.100.7, 10.1.1.1");
        assert_eq!(text(Written::Forwarded, &[FORWARDED, XFF]), "6.6.6.6, 203.0.113.9, 10.1.1.1");
        assert_eq!(text(Written::XForwardedFor, &[FORWARDED]), "");
        assert_eq!(
            text(Written::Forwarded, &[("forwarded", "for=unknown, proto=http, for=\"[::1]:80\"")]),
            "unknown, ::1"
        );
    }
}
