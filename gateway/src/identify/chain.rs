//! Owns the chain of proxies that a request came through, as trusted proxies have written it: `X-Forwarded-For`, or `Forwarded`
//! (RFC 7239).
//!
//! Refuses to mix the two. A proxy that writes one of them passes a client's own line of the other on, and that says whatever the client
//! likes: one field is believed, and the other neither counts nor reaches the origin.

use std::borrow::Cow;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::hop::Heard;
use crate::http::fields::{Fields, Known};
use crate::http::h1::is_authority;

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
        elements(fields, believed).map(move |hop| match believed {
            Known::Forwarded => parameter(hop, b"for"),
            _ => Some(hop),
        })
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

    /// What is said of the request before it came here. What hides in `Forwarded` (`unknown`, `_hidden`) is passed on as it is.
    pub(super) fn heard(self, fields: &Fields) -> Heard {
        let believed = self.believed(fields);
        let hops = self.hops(fields).flatten().map(|hop| {
            let text = String::from_utf8_lossy(hop);
            match (believed, address(&text)) {
                (Known::Forwarded, Some(ip)) => Cow::Owned(ip.to_string()),
                _ => text,
            }
        });
        let chain = hops.collect::<Vec<_>>().join(", ");
        let (proto, host) = match believed {
            // The last element is the peer's. What passes for its own `X-Forwarded-` fields is the client's.
            Known::Forwarded => {
                let own = elements(fields, believed).last();
                let said = |name| own.and_then(|element| parameter(element, name));
                let host = said(b"host").filter(|host| str::from_utf8(host).is_ok_and(is_authority));
                (said(b"proto").filter(|proto| proto.iter().all(u8::is_ascii_alphanumeric)), host)
            }
            _ => (fields.get(Known::XForwardedProto), fields.get(Known::XForwardedHost)),
        };
        Heard { chain, proto: proto.map(<[u8]>::to_vec), host: host.map(<[u8]>::to_vec) }
    }
}

/// What is between commas, in or out of quotes: a proxy that appends to a client's line must not end up within a quote that the client
/// left open, and no address has a comma.
fn elements(fields: &Fields, known: Known) -> impl Iterator<Item = &[u8]> {
    let lines = fields.all(known).flat_map(|line| line.split(|byte| *byte == b','));
    lines.map(<[u8]>::trim_ascii).filter(|element| !element.is_empty())
}

/// A parameter of one `Forwarded` element (RFC 7239 section 5), without its quotes.
fn parameter<'a>(element: &'a [u8], wanted: &[u8]) -> Option<&'a [u8]> {
    element.split(|byte| *byte == b';').find_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (pair[..at].trim_ascii(), pair[at + 1..].trim_ascii());
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        name.eq_ignore_ascii_case(wanted).then_some(value)
    })
}

/// An address with or without a port, IPv6 with or without brackets; nothing else beside it.
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

    /// A proxy that appends puts its own word behind whatever the client wrote.
    #[test]
    fn an_open_quote_does_not_hide_what_a_proxy_appends() {
        for name in ["x-forwarded-for", "forwarded"] {
            for claim in
                ["[1.2.3.4]\"", "1.2.3.4:\"", "\"", "\"1.2.3.4", "[::1]x", "1.2.3.4\\\"", "1.2.3.4:80:80", "a\"b;c=\""]
            {
                let line = match name {
                    "forwarded" => format!("for={claim}, for=203.0.113.9"),
                    _ => format!("{claim}, 203.0.113.9"),
                };
                assert_eq!(client(Written::Either, &[(name, &line)]).as_deref(), Some("203.0.113.9"), "{line}");
                let alone = line.split(", ").next().unwrap_or_default();
                assert_eq!(client(Written::Either, &[(name, alone)]), None, "{alone}");
            }
        }
        let hidden = "for=1.2.3.4;by=\", for=203.0.113.9, for=10.0.0.1;secret=\"x\"";
        assert_eq!(client(Written::Either, &[("forwarded", hidden)]).as_deref(), Some("203.0.113.9"));
        for (text, want) in
            [("198.51.100.7:80", true), ("[2001:db8::1]:80", true), ("2001:db8::1", true), ("[1.2.3.4]", false)]
        {
            assert_eq!(address(text).is_some(), want, "{text}");
        }
    }

    #[test]
    fn the_origin_hears_what_is_believed_and_nothing_else() {
        let heard = |written: Written, lines: &[(&str, &str)]| written.heard(&fields(lines));
        let chain = |written: Written, lines: &[(&str, &str)]| heard(written, lines).chain;
        assert_eq!(chain(Written::Either, &[FORWARDED, XFF]), "6.6.6.6, 198.51.100.7, 10.1.1.1");
        assert_eq!(chain(Written::Forwarded, &[FORWARDED, XFF]), "6.6.6.6, 203.0.113.9, 10.1.1.1");
        assert_eq!(chain(Written::XForwardedFor, &[FORWARDED]), "");
        let hidden = ("forwarded", "for=unknown, proto=http, for=\"[::1]:80\"");
        assert_eq!(chain(Written::Forwarded, &[hidden]), "unknown, ::1");

        let forged = [("x-forwarded-host", "evil"), ("x-forwarded-proto", "ftp")];
        let said = ("forwarded", "for=6.6.6.6;host=evil, for=198.51.100.7;proto=https;host=\"shop.test:81\"");
        let of_forwarded = heard(Written::Either, &[forged[0], forged[1], said]);
        assert_eq!(
            (of_forwarded.proto.as_deref(), of_forwarded.host.as_deref()),
            (Some(&b"https"[..]), Some(&b"shop.test:81"[..]))
        );
        let bare = heard(Written::Forwarded, &[forged[0], forged[1], FORWARDED, XFF]);
        assert_eq!((bare.proto, bare.host), (None, None));
        let of_xff =
            heard(Written::Either, &[("x-forwarded-proto", "https"), ("x-forwarded-host", "shop.test"), XFF, said]);
        assert_eq!((of_xff.proto.as_deref(), of_xff.host.as_deref()), (Some(&b"https"[..]), Some(&b"shop.test"[..])));
    }
}
