//! Reads the chain of proxies that trusted proxies record in `X-Forwarded-For` or `Forwarded` (RFC
//! 7239).
//!
//! Never combines the two fields. A proxy that writes one of them forwards a client's own line of
//! the other unchanged, so its content is untrusted. One field is used; the other is ignored and
//! not forwarded to the origin.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::http::fields::{Fields, KnownField};
use crate::http::h1::is_authority;
use crate::http::message::TrustedForwarding;

/// Field that trusted proxies write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwardedField {
    /// `X-Forwarded-For` if present, because most proxies write it and forward `Forwarded`
    /// unchanged; otherwise `Forwarded`, if that is present. Without both, a proxy may still report
    /// scheme and host in `X-Forwarded-Proto` and `X-Forwarded-Host`.
    #[default]
    Either,
    XForwardedFor,
    Forwarded,
}

impl ForwardedField {
    fn select(self, fields: &Fields) -> KnownField {
        match self {
            ForwardedField::Either if fields.has(KnownField::XForwardedFor) => KnownField::XForwardedFor,
            ForwardedField::Either if !fields.has(KnownField::Forwarded) => KnownField::XForwardedFor,
            ForwardedField::XForwardedFor => KnownField::XForwardedFor,
            ForwardedField::Either | ForwardedField::Forwarded => KnownField::Forwarded,
        }
    }

    /// The hops in order, the client first. For `Forwarded`, the `for` parameter of each element;
    /// `None` without one.
    fn hops(self, fields: &Fields) -> impl Iterator<Item = Option<&[u8]>> {
        let selected = self.select(fields);
        elements(fields, selected).map(move |hop| match selected {
            KnownField::Forwarded => parameter(hop, b"for"),
            _ => Some(hop),
        })
    }

    /// The rightmost untrusted address, or the leftmost if all are trusted. Stops at the first
    /// unreadable hop from the right and returns the last address before it, if any.
    pub(super) fn client_address(self, fields: &Fields, is_trusted: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        let hops: Vec<_> = self.hops(fields).collect();
        let mut last = None;
        for hop in hops.into_iter().rev() {
            let Some(ip) = hop.and_then(|hop| address(str::from_utf8(hop).ok()?)) else { return last };
            last = Some(ip);
            if !is_trusted(ip) {
                break;
            }
        }
        last
    }

    /// Forwarding information for the upstream. Obfuscated identifiers of `Forwarded` (`unknown`,
    /// `_hidden`) are kept as they are.
    pub(super) fn forwarding(self, fields: &Fields) -> TrustedForwarding {
        let selected = self.select(fields);
        let hops = self.hops(fields).flatten().map(|hop| {
            let text = String::from_utf8_lossy(hop);
            match (selected, address(&text)) {
                (KnownField::Forwarded, Some(ip)) => Cow::Owned(ip.to_string()),
                _ => text,
            }
        });
        let chain = hops.collect::<Vec<_>>().join(", ");
        let (proto, host) = match selected {
            // The peer wrote the last element. `X-Forwarded-` fields come from the client in this
            // case.
            KnownField::Forwarded => {
                let last = elements(fields, selected).last();
                let value = |name| last.and_then(|element| parameter(element, name));
                let host = value(b"host").filter(|host| str::from_utf8(host).is_ok_and(is_authority));
                (value(b"proto").filter(|proto| proto.iter().all(u8::is_ascii_alphanumeric)), host)
            }
            // Of a list, the peer wrote the last element.
            _ => (
                elements(fields, KnownField::XForwardedProto).last(),
                elements(fields, KnownField::XForwardedHost).last(),
            ),
        };
        // Scheme and host are case-insensitive; an origin may compare them as text.
        let lower = |value: Option<&[u8]>| value.map(<[u8]>::to_ascii_lowercase);
        TrustedForwarding { forwarded_for: chain, proto: lower(proto), host: lower(host) }
    }
}

/// Splits at every comma, even inside quotes: otherwise an element that a proxy appends would be
/// inside a quote that the client left open. No address contains a comma.
fn elements(fields: &Fields, known: KnownField) -> impl Iterator<Item = &[u8]> {
    let lines = fields.all(known).flat_map(|line| line.split(|byte| *byte == b','));
    lines.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// Value of a parameter of one `Forwarded` element (RFC 7239 section 5), unquoted.
fn parameter<'a>(element: &'a [u8], parameter_name: &[u8]) -> Option<&'a [u8]> {
    element.split(|byte| *byte == b';').find_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii());
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        name.eq_ignore_ascii_case(parameter_name).then_some(value)
    })
}

/// Parses an address with or without a port, IPv6 with or without brackets, and nothing else.
fn address(text: &str) -> Option<IpAddr> {
    let is_port = |port: &str| port.len() <= 5 && !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let ip: IpAddr = match text.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']')?;
            if !after.is_empty() && !after.strip_prefix(':').is_some_and(is_port) {
                return None;
            }
            address.parse::<Ipv6Addr>().ok()?.into()
        }
        None => text.parse().ok().or_else(|| {
            let (address, port) = text.rsplit_once(':')?;
            if is_port(port) { address.parse::<Ipv4Addr>().ok().map(IpAddr::V4) } else { None }
        })?,
    };
    Some(ip.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    fn client(field: ForwardedField, lines: &[(&str, &str)]) -> Option<String> {
        let is_trusted = |ip: IpAddr| ip.to_string().starts_with("10.");
        field.client_address(&fields(lines), is_trusted).map(|ip| ip.to_string())
    }

    const XFF: (&str, &str) = ("x-forwarded-for", "6.6.6.6, 198.51.100.7, 10.1.1.1");
    const FORWARDED: (&str, &str) = ("forwarded", "for=6.6.6.6, for=\"203.0.113.9:80\";proto=http, For = 10.1.1.1");

    #[test]
    fn only_the_selected_field_is_used() {
        for (field, both, forwarded_alone, xff_alone) in [
            (ForwardedField::Either, Some("198.51.100.7"), Some("203.0.113.9"), Some("198.51.100.7")),
            (ForwardedField::XForwardedFor, Some("198.51.100.7"), None, Some("198.51.100.7")),
            (ForwardedField::Forwarded, Some("203.0.113.9"), Some("203.0.113.9"), None),
        ] {
            let clients = [client(field, &[XFF, FORWARDED]), client(field, &[FORWARDED]), client(field, &[XFF])];
            assert_eq!(clients.each_ref().map(Option::as_deref), [both, forwarded_alone, xff_alone], "{field:?}");
        }
    }

    #[test]
    fn scheme_and_host_may_be_reported_without_an_address() {
        let reported = |lines: &[(&str, &str)]| {
            let TrustedForwarding { proto, host, .. } = ForwardedField::Either.forwarding(&fields(lines));
            [proto, host].map(|value| value.map(|value| String::from_utf8(value).expect("ASCII")))
        };
        let some = |text: &str| Some(text.to_owned());
        let lines = [("x-forwarded-proto", "HTTPS"), ("x-forwarded-host", "Shop.Example")];
        assert_eq!(reported(&lines), [some("https"), some("shop.example")]);
        assert_eq!(reported(&[("x-forwarded-proto", "http, https")]), [some("https"), None]);
        // A proxy that writes `Forwarded` passes a client's own lines of the others.
        assert_eq!(reported(&[("x-forwarded-proto", "https"), ("forwarded", "for=10.0.0.1")]), [None, None]);
    }

    #[test]
    fn chain_ends_at_first_unreadable_hop() {
        for (value, want) in [
            ("for=198.51.100.7, for=unknown, for=10.1.1.1", Some("10.1.1.1")),
            ("for=198.51.100.7, proto=http", None),
            ("for=\"[2001:db8::1]:4711\"", Some("2001:db8::1")),
            ("by=10.0.0.1;for=\"[2001:db8::1]\"", Some("2001:db8::1")),
            ("for=_hidden", None),
            ("for=\"", None),
            ("", None),
        ] {
            assert_eq!(client(ForwardedField::Forwarded, &[("forwarded", value)]).as_deref(), want, "{value}");
        }
        assert_eq!(
            client(ForwardedField::Either, &[("x-forwarded-for", "\u{e9}, 10.1.1.1")]).as_deref(),
            Some("10.1.1.1")
        );
    }

    /// A proxy appends its element after the client's.
    #[test]
    fn open_quote_does_not_hide_appended_element() {
        for name in ["x-forwarded-for", "forwarded"] {
            for claim in
                ["[1.2.3.4]\"", "1.2.3.4:\"", "\"", "\"1.2.3.4", "[::1]x", "1.2.3.4\\\"", "1.2.3.4:80:80", "a\"b;c=\""]
            {
                let line = match name {
                    "forwarded" => format!("for={claim}, for=203.0.113.9"),
                    _ => format!("{claim}, 203.0.113.9"),
                };
                assert_eq!(client(ForwardedField::Either, &[(name, &line)]).as_deref(), Some("203.0.113.9"), "{line}");
                let alone = line.split(", ").next().unwrap_or_default();
                assert_eq!(client(ForwardedField::Either, &[(name, alone)]), None, "{alone}");
            }
        }
        let hidden = "for=1.2.3.4;by=\", for=203.0.113.9, for=10.0.0.1;secret=\"x\"";
        assert_eq!(client(ForwardedField::Either, &[("forwarded", hidden)]).as_deref(), Some("203.0.113.9"));
        for (text, want) in
            [("198.51.100.7:80", true), ("[2001:db8::1]:80", true), ("2001:db8::1", true), ("[1.2.3.4]", false)]
        {
            assert_eq!(address(text).is_some(), want, "{text}");
        }
    }

    #[test]
    fn only_the_selected_field_is_forwarded() {
        let forwarding = |field: ForwardedField, lines: &[(&str, &str)]| field.forwarding(&fields(lines));
        let chain = |field: ForwardedField, lines: &[(&str, &str)]| forwarding(field, lines).forwarded_for;
        assert_eq!(chain(ForwardedField::Either, &[FORWARDED, XFF]), "6.6.6.6, 198.51.100.7, 10.1.1.1");
        assert_eq!(chain(ForwardedField::Forwarded, &[FORWARDED, XFF]), "6.6.6.6, 203.0.113.9, 10.1.1.1");
        assert_eq!(chain(ForwardedField::XForwardedFor, &[FORWARDED]), "");
        let hidden = ("forwarded", "for=unknown, proto=http, for=\"[::1]:80\"");
        assert_eq!(chain(ForwardedField::Forwarded, &[hidden]), "unknown, ::1");

        let forged = [("x-forwarded-host", "evil"), ("x-forwarded-proto", "ftp")];
        let element = ("forwarded", "for=6.6.6.6;host=evil, for=198.51.100.7;proto=https;host=\"shop.test:81\"");
        let of_forwarded = forwarding(ForwardedField::Either, &[forged[0], forged[1], element]);
        assert_eq!(
            (of_forwarded.proto.as_deref(), of_forwarded.host.as_deref()),
            (Some(&b"https"[..]), Some(&b"shop.test:81"[..]))
        );
        let bare = forwarding(ForwardedField::Forwarded, &[forged[0], forged[1], FORWARDED, XFF]);
        assert_eq!((bare.proto, bare.host), (None, None));
        let of_xff = forwarding(
            ForwardedField::Either,
            &[("x-forwarded-proto", "HTTPS"), ("x-forwarded-host", "Shop.test"), XFF, element],
        );
        assert_eq!((of_xff.proto.as_deref(), of_xff.host.as_deref()), (Some(&b"https"[..]), Some(&b"shop.test"[..])));
    }
}
