//! Hop-by-hop fields and forwarding fields, for requests and responses.
//!
//! The only place that strips connection fields (RFC 9110 section 7.6.1) or writes `Via` and
//! `X-Forwarded-*`.

use std::net::IpAddr;

use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::{BodyLength, HttpVersion, Method, Request, Response, StatusCode};
use crate::http::text;

/// Hop-by-hop fields, removed whether or not `Connection` names them.
const HOP_BY_HOP: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Connection,
    KnownField::KeepAlive,
    KnownField::ProxyConnection,
    KnownField::ProxyAuthenticate,
    KnownField::ProxyAuthenticationInfo,
    KnownField::ProxyAuthorization,
    KnownField::Te,
    KnownField::Trailer,
    KnownField::Upgrade,
]);

/// End-to-end fields that are kept even if a hostile `Connection` names them.
const PROTECTED: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Host,
    KnownField::ContentLength,
    KnownField::TransferEncoding,
    KnownField::CacheControl,
    KnownField::Vary,
    KnownField::Authorization,
    KnownField::Cookie,
]);

/// Request fields that are not forwarded. With most of them a client can spoof its identity, or
/// request another resource than the one in the cache key.
const SPOOFABLE: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Forwarded,
    KnownField::XForwardedFor,
    KnownField::XForwardedHost,
    KnownField::XForwardedPort,
    KnownField::XForwardedProto,
    KnownField::XOriginalUrl,
    KnownField::XRealIp,
    KnownField::XRewriteUrl,
    // The gateway itself has handled or refused the expectation.
    KnownField::Expect,
]);

/// Removes hop-by-hop fields in place. Call it before adding the gateway's own fields: a hostile
/// `Connection` may name them.
pub(crate) fn strip(fields: &mut Fields) {
    if !fields.has_any(HOP_BY_HOP) {
        return;
    }
    // Most messages name only connection options, which are not field names.
    let is_option = |member: &[u8]| member.eq_ignore_ascii_case(b"keep-alive") || member.eq_ignore_ascii_case(b"close");
    let mut nominated: Vec<Vec<u8>> = Vec::new();
    if !fields.all(KnownField::Connection).all(is_option) {
        nominated = fields.members(KnownField::Connection).map(<[u8]>::to_vec).collect();
    }
    fields.retain(|field| {
        let is_connection = field.known.is_some_and(|known| HOP_BY_HOP.contains(known));
        let is_protected = field.known.is_some_and(|known| PROTECTED.contains(known));
        let is_nominated = || nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
        !is_connection && (is_protected || !is_nominated())
    });
}

/// Decrements `Max-Forwards` of an OPTIONS request, the only supported method for which it has a
/// meaning. Returns true if it was 0 and the gateway must respond itself (RFC 9110 section 7.6.2).
/// An invalid value is forwarded unchanged.
pub(crate) fn decrement_max_forwards(request: &mut Request) -> bool {
    if request.method != Method::OPTIONS {
        return false;
    }
    let hops_left =
        request.fields.get(KnownField::MaxForwards).and_then(|value| std::str::from_utf8(value).ok()?.parse().ok());
    match hops_left {
        None => false,
        Some(0u32) => true,
        Some(left) => {
            request.fields.set(KnownField::MaxForwards, (left - 1).to_string());
            false
        }
    }
}

/// Whether the request offers a protocol switch that can be forwarded. HTTP/2 and TLS apply to one
/// connection, so an offer of them is dropped.
pub(crate) fn offers_upgrade(request: &Request) -> bool {
    let is_per_connection = |protocol: &[u8]| {
        let starts = |name: &[u8]| protocol.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
        starts(b"h2c") || starts(b"tls/") || starts(b"http/")
    };
    let mut offered = request.fields.members(KnownField::Upgrade).peekable();
    request.version == HttpVersion::Http11
        && request.length == BodyLength::Empty
        && offered.peek().is_some()
        && request.fields.members(KnownField::Connection).any(|option| option.eq_ignore_ascii_case(b"upgrade"))
        && !offered.any(is_per_connection)
}

/// Removes hop-by-hop fields of a response. Keeps the protocol switch of a 101 response.
pub(crate) fn strip_response(response: &mut Response) {
    let protocol = match response.status {
        StatusCode::SWITCHING_PROTOCOLS => response.fields.get(KnownField::Upgrade).map(<[u8]>::to_vec),
        _ => None,
    };
    strip(&mut response.fields);
    add_upgrade(protocol.as_deref(), &mut response.fields);
}

fn add_upgrade(protocol: Option<&[u8]>, fields: &mut Fields) {
    if let Some(protocol) = protocol {
        fields.add(KnownField::Connection, "upgrade");
        fields.add(KnownField::Upgrade, protocol);
    }
}

/// Forwarding information from a trusted peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TrustedForwarding {
    /// The addresses before the peer, client first, in the format of `X-Forwarded-For`. Can be
    /// empty.
    pub(crate) forwarded_for: String,
    pub(crate) proto: Option<Vec<u8>>,
    pub(crate) host: Option<Vec<u8>>,
}

/// Rewrites the fields of a client request for the origin. `forwarding` is `None` for an untrusted
/// peer.
pub(crate) fn prepare_for_upstream(request: &mut Request, peer: IpAddr, forwarding: Option<TrustedForwarding>) {
    let TrustedForwarding { forwarded_for, proto, host } = forwarding.unwrap_or_default();
    let upgrade = offers_upgrade(request).then(|| {
        let protocols: Vec<&[u8]> = request.fields.members(KnownField::Upgrade).collect();
        protocols.join(&b", "[..])
    });
    strip(&mut request.fields);
    add_upgrade(upgrade.as_deref(), &mut request.fields);
    if request.fields.has_any(SPOOFABLE) {
        request.fields.retain(|field| !field.known.is_some_and(|known| SPOOFABLE.contains(known)));
    }
    request.fields.add_with(KnownField::XForwardedFor, |text| {
        if !forwarded_for.is_empty() {
            text.extend_from_slice(forwarded_for.as_bytes());
            text.extend_from_slice(b", ");
        }
        text::push_ip(text, peer);
    });
    request.fields.add(KnownField::XForwardedProto, proto.as_deref().unwrap_or(request.scheme.as_str().as_bytes()));
    let host = host.as_deref().unwrap_or(request.authority.as_bytes());
    if !host.is_empty() {
        request.fields.add(KnownField::XForwardedHost, host);
    }
    add_via(&mut request.fields, request.version);
}

/// Appends the gateway to `Via` (RFC 9110 section 7.6.3).
pub(crate) fn add_via(fields: &mut Fields, received: HttpVersion) {
    match received {
        HttpVersion::Http10 => fields.add(KnownField::Via, "1.0 tidegate"),
        HttpVersion::Http11 => fields.add(KnownField::Via, "1.1 tidegate"),
        HttpVersion::Http2 => fields.add(KnownField::Via, "2.0 tidegate"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    #[test]
    fn all_connection_lines_are_applied_and_protected_fields_stay() {
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
    fn max_forwards_zero_ends_options_at_the_gateway() {
        let decrement = |method, hops: &str| {
            let mut request = Request { method, fields: fields(&[("Max-Forwards", hops)]), ..Request::default() };
            let ends_here = decrement_max_forwards(&mut request);
            (ends_here, request.fields.get(KnownField::MaxForwards).map(<[u8]>::to_vec))
        };
        assert_eq!(decrement(Method::OPTIONS, "0"), (true, Some(b"0".to_vec())));
        assert_eq!(decrement(Method::OPTIONS, "5"), (false, Some(b"4".to_vec())));
        assert_eq!(decrement(Method::OPTIONS, "-1"), (false, Some(b"-1".to_vec())));
        assert_eq!(decrement(Method::GET, "0"), (false, Some(b"0".to_vec())));
    }

    #[test]
    fn spoofed_fields_are_replaced() {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.fields =
            fields(&[("X-Forwarded-For", "6.6.6.6"), ("X-Original-URL", "/admin"), ("x-real-ip", "6.6.6.6")]);
        prepare_for_upstream(&mut request, IpAddr::from([10, 0, 0, 1]), None);
        assert_eq!(request.fields.get(KnownField::XForwardedFor), Some(&b"10.0.0.1"[..]));
        assert!(!request.fields.has(KnownField::XOriginalUrl) && !request.fields.has(KnownField::XRealIp));
        assert_eq!(request.fields.get(KnownField::XForwardedHost), Some(&b"shop"[..]));
    }

    #[test]
    fn trusted_proxy_sets_the_original_scheme() {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.fields = fields(&[("X-Forwarded-Proto", "ftp"), ("X-Forwarded-For", "7.7.7.7")]);
        let forwarding =
            TrustedForwarding { forwarded_for: "6.6.6.6".into(), proto: Some(b"https".to_vec()), host: None };
        prepare_for_upstream(&mut request, IpAddr::from([10, 0, 0, 1]), Some(forwarding));
        assert_eq!(request.fields.get(KnownField::XForwardedProto), Some(&b"https"[..]));
        assert_eq!(request.fields.get(KnownField::XForwardedFor), Some(&b"6.6.6.6, 10.0.0.1"[..]));
    }
}
