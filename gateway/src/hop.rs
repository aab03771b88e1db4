//! Hop-by-hop fields and forwarding fields, for requests and responses.
//!
//! The only place that strips connection fields (RFC 9110 section 7.6.1) or writes `Via` and
//! `X-Forwarded-*`. The fields of a request are removed before anything reads them, so that
//! identity, limits, route and cache key see what the origin sees: docs/request-fields.md.

use std::net::IpAddr;
use std::time::Duration;

use crate::http::fields::{Field, Fields, KnownField, KnownFieldSet};
use crate::http::limits::UnderscorePolicy;
use crate::http::message::{
    BodyLength, HttpVersion, Method, OriginEdits, Request, Response, Scheme, StatusCode, TrustedForwarding,
};
use crate::http::{text, websocket};

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

/// Fields that the gateway writes itself, or has handled; what the client sent is not forwarded.
const REPLACED: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Forwarded,
    KnownField::XForwardedFor,
    KnownField::XForwardedHost,
    KnownField::XForwardedProto,
    KnownField::Expect,
    // `h1::upstream` writes the time that is left when it sends the head.
    KnownField::XEnvoyExpectedRqTimeoutMs,
]);

/// Other names under which applications look for the address of the client. Only trusted proxies
/// may send them.
pub(crate) const CLIENT_ADDRESS_FIELDS: &[KnownField] = &[
    KnownField::CfConnectingIp,
    KnownField::CfConnectingIpv6,
    KnownField::ClientIp,
    KnownField::FastlyClientIp,
    KnownField::FlyClientIp,
    KnownField::ForwardedFor,
    KnownField::ProxyClientIp,
    KnownField::TrueClientIp,
    KnownField::WlProxyClientIp,
    KnownField::XAzureClientIp,
    KnownField::XClientIp,
    KnownField::XClusterClientIp,
    KnownField::XEnvoyExternalAddress,
    KnownField::XOriginalForwardedFor,
    KnownField::XOriginatingIp,
    KnownField::XRealIp,
    KnownField::XRemoteAddr,
    KnownField::XRemoteIp,
];

/// Fields from which applications may take another scheme, host, path, method, user or client
/// certificate than those of the request. Only trusted proxies may send them, and each is part of
/// the cache key: the origin is told.
pub(crate) const ALTERNATIVE_FIELDS: &[KnownField] = &[
    KnownField::ClientCert,
    KnownField::ClientCertChain,
    KnownField::CloudfrontForwardedProto,
    KnownField::FrontEndHttps,
    // CGI passes it as `HTTP_PROXY`, which many HTTP clients take for their own proxy.
    KnownField::Proxy,
    KnownField::RemoteUser,
    KnownField::SslClientCert,
    KnownField::SslClientSubjectDn,
    KnownField::SslClientVerify,
    KnownField::XEnvoyOriginalPath,
    KnownField::XForwarded,
    KnownField::XForwardedBy,
    KnownField::XForwardedClientCert,
    KnownField::XForwardedMethod,
    KnownField::XForwardedPath,
    KnownField::XForwardedPort,
    KnownField::XForwardedPrefix,
    KnownField::XForwardedProtocol,
    KnownField::XForwardedScheme,
    KnownField::XForwardedServer,
    KnownField::XForwardedSsl,
    KnownField::XForwardedTlsClientCert,
    KnownField::XForwardedTlsClientCertInfo,
    KnownField::XForwardedUri,
    KnownField::XHost,
    KnownField::XHttpHostOverride,
    KnownField::XHttpMethod,
    KnownField::XHttpMethodOverride,
    KnownField::XMethodOverride,
    KnownField::XOriginalHost,
    KnownField::XOriginalMethod,
    KnownField::XOriginalUri,
    KnownField::XOriginalUrl,
    KnownField::XProxyUser,
    KnownField::XRemoteUser,
    KnownField::XRewriteUrl,
    KnownField::XScheme,
    KnownField::XScriptName,
    KnownField::XUrlScheme,
];

/// Prepares the fields of a request that has just been parsed: keeps what they say about the
/// connection, then removes connection fields, the fields that `Connection` names, and names with
/// `_`. A repetition of the head is restored without connection fields.
pub(crate) fn receive(request: &mut Request, underscores: UnderscorePolicy) {
    if request.fields.has_underscore() && underscores == UnderscorePolicy::Drop {
        request.fields.retain(|field| !field.name.contains(&b'_'));
    }
    if !request.fields.has_any(HOP_BY_HOP) {
        return;
    }
    request.accepts_trailers =
        request.fields.members(KnownField::Te).any(|coding| coding.eq_ignore_ascii_case(b"trailers"));
    if request.version == HttpVersion::Http11 {
        // Over HTTP/2 the offer is no field.
        request.upgrade = offered_protocols(request);
    }
    let nominated = nominated(&request.fields);
    // The trailers of such a body pass, and some servers read only those that are announced.
    let has_trailers = request.length == BodyLength::Streamed;
    let has_trailers = has_trailers && !nominated.iter().any(|name| name.eq_ignore_ascii_case(b"trailer"));
    let is_announcement = |field: Field<'_>| has_trailers && field.known == Some(KnownField::Trailer);
    request.fields.retain_received(|field| is_announcement(field) || !is_hop_by_hop(field, &nominated));
}

/// Removes hop-by-hop fields in place. Call it before adding the gateway's own fields: a hostile
/// `Connection` may name them.
pub(crate) fn strip(fields: &mut Fields) {
    if !fields.has_any(HOP_BY_HOP) {
        return;
    }
    let nominated = nominated(fields);
    fields.retain(|field| !is_hop_by_hop(field, &nominated));
}

/// The field names in `Connection`.
fn nominated(fields: &Fields) -> Vec<Vec<u8>> {
    // Most messages name only connection options, which are not field names.
    let is_option = |member: &[u8]| member.eq_ignore_ascii_case(b"keep-alive") || member.eq_ignore_ascii_case(b"close");
    if fields.all(KnownField::Connection).all(is_option) {
        return Vec::new();
    }
    fields.members(KnownField::Connection).map(<[u8]>::to_vec).collect()
}

fn is_hop_by_hop(field: Field<'_>, nominated: &[Vec<u8>]) -> bool {
    let is_connection = field.known.is_some_and(|known| HOP_BY_HOP.contains(known));
    let is_protected = field.known.is_some_and(|known| PROTECTED.contains(known));
    let is_nominated = || nominated.iter().any(|name| field.name.eq_ignore_ascii_case(name));
    is_connection || (!is_protected && is_nominated())
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

/// The time in which the sender expects the whole response. To be read from trusted proxies only.
/// As in Envoy, 0 is no limit; a value that is not a number of milliseconds, or one of more than 49
/// days, is ignored.
pub(crate) fn expected_within(fields: &Fields) -> Option<Duration> {
    if !fields.has(KnownField::XEnvoyExpectedRqTimeoutMs) {
        return None;
    }
    let parse = |value: &[u8]| str::from_utf8(value).ok()?.parse::<u32>().ok().filter(|milliseconds| *milliseconds > 0);
    let shortest = fields.all(KnownField::XEnvoyExpectedRqTimeoutMs).filter_map(parse).min()?;
    Some(Duration::from_millis(shortest.into()))
}

/// Whether the request offers a protocol switch that can be forwarded.
pub(crate) fn offers_upgrade(request: &Request) -> bool {
    request.upgrade.is_some() && request.length == BodyLength::Empty
}

/// The protocols of an offer to switch. HTTP/2 and TLS apply to one connection, so an offer of them
/// is dropped.
fn offered_protocols(request: &Request) -> Option<Box<[u8]>> {
    let is_per_connection = |protocol: &&[u8]| {
        let starts = |name: &[u8]| protocol.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name));
        starts(b"h2c") || starts(b"tls/") || starts(b"http/")
    };
    let names_upgrade =
        || request.fields.members(KnownField::Connection).any(|option| option.eq_ignore_ascii_case(b"upgrade"));
    if !request.fields.has(KnownField::Upgrade) || !names_upgrade() {
        return None;
    }
    let protocols: Vec<&[u8]> = request.fields.members(KnownField::Upgrade).collect();
    let is_forwardable = !protocols.is_empty() && !protocols.iter().any(is_per_connection);
    is_forwardable.then(|| protocols.join(&b", "[..]).into())
}

/// Whether a request that was prepared for the upstream is an extended CONNECT: a 2xx status tells
/// its client that the tunnel is open (RFC 8441 section 4).
pub(crate) fn is_extended_connect(request: &Request) -> bool {
    request.version == HttpVersion::Http2 && (request.upgrade.is_some() || request.fields.has(KnownField::Upgrade))
}

/// Makes a 101 response to an extended CONNECT the one to which it corresponds in HTTP/2.
pub(crate) fn accept_extended_connect(response: &mut Response) {
    response.status = StatusCode::OK;
    strip(&mut response.fields);
    response.fields.retain(|field| !field.name.eq_ignore_ascii_case(websocket::ACCEPT.as_bytes()));
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

/// Rewrites the fields of a client request for the origin.
pub(crate) fn prepare_for_upstream(request: &mut Request, peer: IpAddr) {
    let upgrade = request.upgrade.take().filter(|_| request.length == BodyLength::Empty);
    add_upgrade(upgrade.as_deref(), &mut request.fields);
    if upgrade.is_some()
        && request.version == HttpVersion::Http2
        && let Some(key) = websocket::new_key()
    {
        request.fields.push(websocket::KEY.as_bytes(), key.as_bytes());
    }
    if request.fields.has_any(REPLACED) {
        request.fields.retain(|field| !field.known.is_some_and(|known| REPLACED.contains(known)));
    }
    let (forwarded, scheme) = (request.forwarded.as_deref(), request.scheme);
    request.fields.add_with(KnownField::XForwardedFor, |text| push_forwarded_for(text, forwarded, peer));
    request.fields.add(KnownField::XForwardedProto, forwarded_proto(forwarded, scheme));
    let host = forwarded_host(forwarded, &request.authority);
    if !host.is_empty() {
        request.fields.add(KnownField::XForwardedHost, host);
    }
    add_via(&mut request.fields, request.version);
}

/// The value with which the origin receives a field that the gateway replaces; `None`: the field is
/// forwarded as received. Empty: the origin does not receive it.
pub(crate) fn replaced_value(request: &Request, peer: IpAddr, name: &str) -> Option<Vec<u8>> {
    match request.origin_edits.as_deref() {
        None => written_value(request, peer, name),
        Some(edits) => edited_value(edits, name, || written_value(request, peer, name), request),
    }
}

/// `replaced_value` with the edits of the route. `written` is the value before them.
#[cold]
fn edited_value(
    edits: &OriginEdits,
    name: &str,
    written: impl FnOnce() -> Option<Vec<u8>>,
    request: &Request,
) -> Option<Vec<u8>> {
    let values = |edits: &[(String, Vec<u8>)]| -> Vec<Vec<u8>> {
        edits.iter().filter(|(edited, _)| edited == name).map(|(_, value)| value.clone()).collect()
    };
    let (set, added) = (values(&edits.set), values(&edits.added));
    let is_replaced = !set.is_empty() || edits.removed.iter().any(|removed| removed == name);
    if name == "host" && edits.host.is_some() {
        return edits.host.clone().map(String::into_bytes);
    }
    if !is_replaced && added.is_empty() {
        return written();
    }
    let mut lines = set;
    if !is_replaced {
        let received = || request.fields.named(name.as_bytes()).map(<[u8]>::to_vec).collect();
        lines = written().map_or_else(received, |value| vec![value]);
    }
    lines.extend(added);
    Some(lines.join(&b", "[..]))
}

/// The value that the gateway itself writes, before the edits of the route.
fn written_value(request: &Request, peer: IpAddr, name: &str) -> Option<Vec<u8>> {
    let forwarded = request.forwarded.as_deref();
    match KnownField::of(name.as_bytes())? {
        KnownField::XForwardedFor => {
            let mut text = Vec::new();
            push_forwarded_for(&mut text, forwarded, peer);
            Some(text)
        }
        KnownField::XForwardedProto => Some(forwarded_proto(forwarded, request.scheme).to_vec()),
        KnownField::XForwardedHost => Some(forwarded_host(forwarded, &request.authority).to_vec()),
        KnownField::Host => Some(request.authority.clone().into_bytes()),
        known if REPLACED.contains(known) || HOP_BY_HOP.contains(known) => Some(Vec::new()),
        _ => None,
    }
}

fn push_forwarded_for(text: &mut Vec<u8>, forwarded: Option<&TrustedForwarding>, peer: IpAddr) {
    if let Some(forwarded) = forwarded.filter(|forwarded| !forwarded.forwarded_for.is_empty()) {
        text.extend_from_slice(forwarded.forwarded_for.as_bytes());
        text.extend_from_slice(b", ");
    }
    text::push_ip(text, peer);
}

fn forwarded_proto(forwarded: Option<&TrustedForwarding>, scheme: Scheme) -> &[u8] {
    let proto = forwarded.and_then(|forwarded| forwarded.proto.as_deref());
    proto.unwrap_or(scheme.as_str().as_bytes())
}

fn forwarded_host<'a>(forwarded: Option<&'a TrustedForwarding>, authority: &'a str) -> &'a [u8] {
    forwarded.and_then(|forwarded| forwarded.host.as_deref()).unwrap_or(authority.as_bytes())
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
    fn connection_fields_are_removed_on_receipt_and_the_offer_is_kept() {
        let mut request = Request {
            fields: fields(&[
                ("Connection", "upgrade, x-tenant, Origin"),
                ("Upgrade", "websocket"),
                ("TE", "trailers"),
                ("X-Tenant", "victim"),
                ("Origin", "https://evil.example"),
                ("Cookie", "a=b"),
                ("X_Forwarded_For", "6.6.6.6"),
                ("Transfer_Encoding", "chunked"),
            ]),
            ..Request::default()
        };
        receive(&mut request, UnderscorePolicy::Drop);
        let names: Vec<_> =
            request.fields.iter().map(|field| String::from_utf8_lossy(field.name).into_owned()).collect();
        assert_eq!(names, ["Cookie"]);
        assert!(request.accepts_trailers && offers_upgrade(&request));
        prepare_for_upstream(&mut request, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(request.fields.get(KnownField::Upgrade), Some(&b"websocket"[..]));
        assert_eq!(request.fields.get(KnownField::Connection), Some(&b"upgrade"[..]));
    }

    #[test]
    fn forwarding_fields_are_replaced() {
        let mut request = Request { authority: "shop".into(), ..Request::default() };
        request.fields = fields(&[("X-Forwarded-For", "6.6.6.6"), ("Forwarded", "for=6.6.6.6"), ("Expect", "x")]);
        prepare_for_upstream(&mut request, IpAddr::from([10, 0, 0, 1]));
        assert_eq!(request.fields.get(KnownField::XForwardedFor), Some(&b"10.0.0.1"[..]));
        assert!(!request.fields.has(KnownField::Forwarded) && !request.fields.has(KnownField::Expect));
        assert_eq!(request.fields.get(KnownField::XForwardedHost), Some(&b"shop"[..]));
    }

    #[test]
    fn expected_time_is_a_positive_number_of_milliseconds() {
        let within = |values: &[&str]| {
            let lines: Vec<_> = values.iter().map(|value| ("X-Envoy-Expected-Rq-Timeout-Ms", *value)).collect();
            expected_within(&fields(&lines)).map(|time| time.as_millis())
        };
        assert_eq!(within(&["1500"]), Some(1_500));
        assert_eq!(within(&["900", "300", "x"]), Some(300));
        assert_eq!(within(&["4294967295"]), Some(4_294_967_295));
        for ignored in ["0", "", "-1", "1s", "1.5", "4294967296", "99999999999999999999", "\u{e9}"] {
            assert_eq!(within(&[ignored]), None, "{ignored}");
        }
        assert_eq!(within(&[]), None);
    }

    #[test]
    fn trusted_proxy_sets_the_original_scheme() {
        let forwarded =
            TrustedForwarding { forwarded_for: "6.6.6.6".into(), proto: Some(b"https".to_vec()), host: None };
        let mut request = Request { authority: "shop".into(), forwarded: Some(forwarded.into()), ..Request::default() };
        request.fields = fields(&[("X-Forwarded-Proto", "ftp"), ("X-Forwarded-For", "7.7.7.7")]);
        let peer = IpAddr::from([10, 0, 0, 1]);
        let replaced = |request: &Request, name| {
            replaced_value(request, peer, name).map(|value| String::from_utf8(value).expect("ASCII"))
        };
        let before = ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host", "forwarded", "te", "accept"]
            .map(|name| replaced(&request, name));
        let expected = [Some("6.6.6.6, 10.0.0.1"), Some("https"), Some("shop"), Some(""), Some(""), None];
        assert_eq!(before.each_ref().map(Option::as_deref), expected);
        prepare_for_upstream(&mut request, peer);
        for (name, expected) in [("x-forwarded-for", before[0].as_deref()), ("x-forwarded-proto", Some("https"))] {
            let sent = request.fields.named(name.as_bytes()).next().map(String::from_utf8_lossy);
            assert_eq!(sent.as_deref(), expected, "the origin receives what variants compare");
        }
    }
}
