//! Hop-by-hop fields and the gateway's own forwarding fields: what crosses the gateway, in both directions.
//!
//! The only place that strips connection fields (RFC 9110 section 7.6.1) or writes `Via` and `X-Forwarded-*`.

use std::net::IpAddr;

use crate::http::fields::{Fields, Known, KnownSet};
use crate::http::message::{Request, Version};
use crate::http::text;

/// Fields that belong to one connection, removed whether or not `Connection` names them.
const ALWAYS: KnownSet = KnownSet::of(&[
    Known::Connection,
    Known::KeepAlive,
    Known::ProxyConnection,
    Known::ProxyAuthenticate,
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
    let named = fields.members(Known::Connection).filter(|member| !is_option(member));
    let nominated: Vec<Vec<u8>> = named.map(<[u8]>::to_vec).collect();
    fields.retain(|field| {
        let is_connection = field.known.is_some_and(|known| ALWAYS.has(known));
        let is_protected = field.known.is_some_and(|known| NEVER.has(known));
        let is_nominated = || nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
        !is_connection && (is_protected || !is_nominated())
    });
}

/// Turns a client's request into the one the origin gets. `trusted_chain` is the believed `X-Forwarded-For` so far; with
/// it, what the trusted peer says of the original scheme and host is believed too.
pub fn forward(request: &mut Request, peer: IpAddr, trusted_chain: Option<&str>) {
    let said = |known| trusted_chain.and(request.fields.get(known)).map(<[u8]>::to_vec);
    let (proto, host) = (said(Known::XForwardedProto), said(Known::XForwardedHost));
    strip(&mut request.fields);
    if request.fields.has_any(CLAIMS) {
        request.fields.retain(|field| !field.known.is_some_and(|known| CLAIMS.has(known)));
    }
    request.fields.add_with(Known::XForwardedFor, |text| {
        if let Some(chain) = trusted_chain.filter(|chain| !chain.is_empty()) {
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

    fn fields(lines: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (name, value) in lines {
            fields.push(name.as_bytes(), value.as_bytes());
        }
        fields
    }

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
        request.fields = fields(&[("X-Forwarded-Proto", "https"), ("X-Forwarded-For", "6.6.6.6")]);
        forward(&mut request, IpAddr::from([10, 0, 0, 1]), Some("6.6.6.6"));
        assert_eq!(request.fields.get(Known::XForwardedProto), Some(&b"https"[..]));
        assert_eq!(request.fields.get(Known::XForwardedFor), Some(&b"6.6.6.6, 10.0.0.1"[..]));
    }
}
