//! Hop-by-hop fields and the gateway's own forwarding fields: what crosses the gateway, in both directions.
//!
//! The only place that strips connection fields (RFC 9110 section 7.6.1) or writes `Via` and `X-Forwarded-*`.

use std::net::IpAddr;

use crate::http::fields::{Fields, Known, KnownSet};
use crate::http::message::{Length, Method, Request, Response, StatusCode, Version};
use crate::http::text;

/// Fields that belong to one connection, removed whether or not `Connection` names them.
const ALWAYS: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::ProxyAuthenticate,
    Known::ProxyAuthenticationInfo,
    Known::ProxyAuthorization,
    Known::Te,
    Known::Trailer,
    Known::Upgrade,
]);

/// Fields that must reach the other side even when a hostile `Connection` names them.
const NEVER: KnownSet = KnownSet::of(&[
    Known::Host,
    Known::ContentLength,
    Known::TransferEncoding,
    Known::CacheControl,
    Known::Vary,
    Known::Authorization,
    Known::Cookie,
]);

/// Fields that end here: by most of them clients try to be somebody else, or to reach another resource than is keyed.
const CLAIMS: KnownSet = KnownSet::of(&[
    Known::Forwarded,
    Known::XForwardedFor,
    Known::XForwardedHost,
    Known::XForwardedPort,
    Known::XForwardedProto,
    Known::XOriginalUrl,
    Known::XRealIp,
    Known::XRewriteUrl,
    // What the client expected of the gateway was met or refused.
    Known::Expect,
]);

/// Strips `fields` in place. Call it before adding the gateway's own fields: a hostile `Connection` may name them.
pub fn strip(fields: &mut Fields) {
    if !fields.has_any(ALWAYS) {
        return;
    }
    // Options of the connection itself, which are all that most messages name.
    let is_option = |member: &[u8]| member.eq_ignore_ascii_case(b"keep-alive") || member.eq_ignore_ascii_case(b"close");
    let mut nominated: Vec<Vec<u8>> = Vec::new();
    if !fields.all(Known::Connection).all(is_option) {
        nominated = fields.members(Known::Connection).map(<[u8]>::to_vec).collect();
    }
    fields.retain(|field| {
        let is_connection = field.known.is_some_and(|known| ALWAYS.has(known));
        let is_protected = field.known.is_some_and(|known| NEVER.has(known));
        let is_nominated = || nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
        !is_connection && (is_protected || !is_nominated())
    });
}

/// Counts one gateway off the `Max-Forwards` of an OPTIONS request, the only method that it means anything for here; true
/// where none is left and this gateway has to answer (RFC 9110 section 7.6.2). Nonsense is left to the origin.
pub fn ends_here(request: &mut Request) -> bool {
    if request.method != Method::OPTIONS {
        return false;
    }
    let left = request.fields.get(Known::MaxForwards).and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
    match left {
        None => false,
        Some(0u32) => true,
        Some(left) => {
            request.fields.set(Known::MaxForwards, (left - 1).to_string());
            false
        }
    }
}

/// Whether the request offers to switch to another protocol. HTTP/2 and TLS are matters of one connection: they cross no
/// gateway, and an offer of them is dropped.
pub fn offers_upgrade(request: &Request) -> bool {
    let is_hop = |protocol: &[u8]| {
        let starts = |name: &[u8]| protocol.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
        starts(b"h2c") || starts(b"tls/") || starts(b"http/")
    };
    let mut offered = request.fields.members(Known::Upgrade).peekable();
    request.version == Version::Http11
        && request.length == Length::Empty
        && offered.peek().is_some()
        && request.fields.members(Known::Connection).any(|option| option.eq_ignore_ascii_case(b"upgrade"))
        && !offered.any(is_hop)
}

/// Strips an answer. Of one that switches protocols, the switch itself is said again.
pub fn strip_answer(response: &mut Response) {
    let protocol = match response.status {
        StatusCode::SWITCHING_PROTOCOLS => response.fields.get(Known::Upgrade).map(<[u8]>::to_vec),
        _ => None,
    };
    strip(&mut response.fields);
    add_upgrade(protocol.as_deref(), &mut response.fields);
}

fn add_upgrade(protocol: Option<&[u8]>, fields: &mut Fields) {
    if let Some(protocol) = protocol {
        fields.add(Known::Connection, "upgrade");
        fields.add(Known::Upgrade, protocol);
    }
}

/// What a trusted peer says of the request before it came here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Whom it came through, the client first, as `X-Forwarded-For` has it; can be empty.
    pub chain: String,
    pub proto: Option<Vec<u8>>,
    pub host: Option<Vec<u8>>,
}

/// Turns a client's request into the one the origin gets. `heard` is what a peer says that may be believed.
pub fn forward(request: &mut Request, peer: IpAddr, heard: Option<Heard>) {
    let Heard { chain, proto, host } = heard.unwrap_or_default();
    let upgrade = offers_upgrade(request).then(|| {
        let protocols: Vec<&[u8]> = request.fields.members(Known::Upgrade).collect();
        protocols.join(&b", "[..])
    });
    strip(&mut request.fields);
    add_upgrade(upgrade.as_deref(), &mut request.fields);
    if request.fields.has_any(CLAIMS) {
        request.fields.retain(|field| !field.known.is_some_and(|known| CLAIMS.has(known)));
    }
    request.fields.add_with(Known::XForwardedFor, |text| {
        if !chain.is_empty() {
            text.extend_from_slice(chain.as_bytes());
            text.extend_from_slice(b", ");
        }
        text::push_ip(text, peer);
    });
    request.fields.add(Known::XForwardedProto, proto.as_deref().unwrap_or(request.scheme.as_str().as_bytes()));
    let host = host.as_deref().unwrap_or(request.authority.as_bytes());
    if !host.is_empty() {
        request.fields.add(Known::XForwardedHost, host);
    }
    add_via(&mut request.fields, request.version);
}

/// Appends the gateway to `Via` (RFC 9110 section 7.6.3).
pub fn add_via(fields: &mut Fields, received: Version) {
    match received {
        Version::Http10 => fields.add(Known::Via, "1.0 tidegate"),
        Version::Http11 => fields.add(Known::Via, "1.1 tidegate"),
        Version::Http2 => fields.add(Known::Via, "2.0 tidegate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn every_connection_line_counts_and_protected_fields_stay() {
        let mut fields = fields(&[
            ("Connection", "x-a, cache-control"),
            ("connection", "X-B"),
            ("x-a", "1"),
            ("x-b", "2"),
            ("Cache-Control", "private"),
            ("TE", "trailers"),
            ("x-c", "3"),
        ]);
        strip(&mut fields);
        let names: Vec<_> = fields.iter().map(|field| String::from_utf8_lossy(field.name).into_owned()).collect();
        assert_eq!(names, ["Cache-Control", "x-c"]);
    }

    #[test]
    fn options_are_answered_by_the_last_gateway_that_may() {
        let asked = |method, hops: &str| {
            let mut request = Request { method, fields: fields(&[("Max-Forwards", hops)]), ..Request::default() };
            let ends = ends_here(&mut request);
            (ends, request.fields.get(Known::MaxForwards).map(<[u8]>::to_vec))
        };
        assert_eq!(asked(Method::OPTIONS, "0"), (true, Some(b"0".to_vec())));
        assert_eq!(asked(Method::OPTIONS, "5"), (false, Some(b"4".to_vec())));
        assert_eq!(asked(Method::OPTIONS, "-1"), (false, Some(b"-1".to_vec())));
        assert_eq!(asked(Method::GET, "0"), (false, Some(b"0".to_vec())));
    }

    #[test]
    fn claims_of_clients_are_replaced() {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.fields =
            fields(&[("X-Forwarded-For", "6.6.6.6"), ("X-Original-URL", "/admin"), ("x-real-ip", "6.6.6.6")]);
        forward(&mut request, IpAddr::from([10, 0, 0, 1]), None);
        assert_eq!(request.fields.get(Known::XForwardedFor), Some(&b"10.0.0.1"[..]));
        assert!(!request.fields.has(Known::XOriginalUrl) && !request.fields.has(Known::XRealIp));
        assert_eq!(request.fields.get(Known::XForwardedHost), Some(&b"shop"[..]));
    }

    #[test]
    fn a_trusted_proxy_tells_of_the_original_scheme() {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.fields = fields(&[("X-Forwarded-Proto", "ftp"), ("X-Forwarded-For", "7.7.7.7")]);
        let heard = Heard { chain: "6.6.6.6".into(), proto: Some(b"https".to_vec()), host: None };
        forward(&mut request, IpAddr::from([10, 0, 0, 1]), Some(heard));
        assert_eq!(request.fields.get(Known::XForwardedProto), Some(&b"https"[..]));
        assert_eq!(request.fields.get(Known::XForwardedFor), Some(&b"6.6.6.6, 10.0.0.1"[..]));
    }
}
