//! `[[listen]]`, `[admin]` and `[limits_http]`.

use std::collections::HashSet;
use std::time::SystemTime;

use super::super::constraints;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::read_context::ReadPurpose;
use super::super::table_reader::TableReader;
use super::super::value_kind::{Boolean, DurationRange, IntegerRange, OneOf, SizeRange};
use super::bounds::{DAY, GIB, HOUR, MIB, MS, index, index_of};
use super::files::{check_listener_file, check_validity, optional_path, path};
use super::formats;
use super::secrets::secret;
use crate::accept::{self, ListenConfig};
use crate::http::HttpLimits;
use crate::http::limits::{GetBodyPolicy, UnderscorePolicy};
use crate::proxy_protocol::ProxyProtocolMode;
use crate::{admin, tls};

/// Every `[[listen]]` with the location of its address.
pub(super) fn listeners(root: &TableReader<'_>) -> Vec<(ListenConfig, DocumentLocation)> {
    const PROXY: OneOf<ProxyProtocolMode> = OneOf(&[
        ("off", Some(ProxyProtocolMode::Off)),
        ("optional", Some(ProxyProtocolMode::Optional)),
        ("required", Some(ProxyProtocolMode::Required)),
    ]);
    root.tables("listen", |listen| {
        let default = ListenConfig::default();
        let address = listen.required("address", &formats::SOCKET_ADDRESS);
        let proxy_protocol = listen.value_or("proxy_protocol", &PROXY, default.proxy_protocol);
        let http2 = listen.optional("http2", &Boolean).map_or(listen.has("tls"), |http2| http2.value);
        let tls = listen.optional_table("tls", |table| tls(table, http2));
        let (address, at) = address.map_or((default.address, listen.at.clone()), |address| (address.value, address.at));
        (ListenConfig { address, proxy_protocol, tls, http2 }, at)
    })
}

fn tls(table: &TableReader<'_>, http2: bool) -> tls::TlsConfig {
    const VERSIONS: OneOf<tls::MinTlsVersion> =
        OneOf(&[("1.2", Some(tls::MinTlsVersion::V12)), ("1.3", Some(tls::MinTlsVersion::V13))]);
    table.constraint(constraints::not_empty("certificates"));
    let mut seen = HashSet::new();
    let certificates: Vec<Option<tls::CertificateFiles>> = table.tables("certificates", |files| {
        let (cert, key) = (path(files, "cert"), path(files, "key"));
        for file in [&cert, &key].into_iter().flatten() {
            check_listener_file(files, file);
        }
        let at = files.at.clone();
        let certificate = tls::CertificateFiles { cert: cert?.value, key: key?.value };
        check_certificate(files, &certificate, &at);
        if !seen.insert(certificate.cert.clone()) {
            let problem = ConfigProblem::new(FaultCode::Duplicate, "the listener has this certificate already");
            files.context.warning(&at, problem.hint("remove one of the two"));
        }
        Some(certificate)
    });
    if certificates.is_empty() {
        let problem = ConfigProblem::new(FaultCode::Missing, "TLS needs at least one certificate");
        let hint = "write `certificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]`";
        table.context.error(&table.at, problem.hint(hint).lacks(&[&table.location_of(&["certificates"]).path]));
    }
    let client_auth = client_auth(table);
    tls::TlsConfig {
        client_auth,
        certificates: certificates.into_iter().flatten().collect(),
        min_version: table.value_or("min_version", &VERSIONS, tls::MinTlsVersion::default()),
        http2,
    }
}

/// Reports a certificate that a start would refuse, and one that has expired. Not when the process
/// loads its configuration: a reload keeps the certificate in use if its files are not usable.
fn check_certificate(table: &TableReader<'_>, files: &tls::CertificateFiles, at: &DocumentLocation) {
    if table.context.purpose != ReadPurpose::Check || table.context.has_fault_under(&at.path) {
        return;
    }
    match files.not_after() {
        Err(error) => table.context.error(at, ConfigProblem::new(FaultCode::File, error)),
        Ok(Some(time)) if time < SystemTime::now() => {
            let message = format!("the certificate has expired on {}", httpdate::fmt_http_date(time));
            let problem = ConfigProblem::new(FaultCode::Risk, message);
            table.context.warning(at, problem.hint("clients refuse it; renew it"));
        }
        Ok(_) => {}
    }
}

/// The keys of client certificates.
fn client_auth(table: &TableReader<'_>) -> Option<tls::ClientAuthConfig> {
    const MODES: OneOf<tls::ClientAuthMode> =
        OneOf(&[("required", Some(tls::ClientAuthMode::Required)), ("optional", Some(tls::ClientAuthMode::Optional))]);
    table.constraint(constraints::needs("client_auth", "client_ca"));
    table.constraint(constraints::needs("client_crl", "client_ca"));
    let (ca, crl) = (optional_path(table, "client_ca"), optional_path(table, "client_crl"));
    let [is_usable, _] = [&ca, &crl].map(|file| file.as_ref().is_some_and(|file| check_listener_file(table, file)));
    if let Some(ca) = ca.as_ref().filter(|_| is_usable && table.context.purpose == ReadPurpose::Check)
        && let Ok(pem) = std::fs::read(&ca.value)
    {
        check_validity(table, (ca, &pem), "clients that it certifies are refused");
    }
    let (mode, mode_at) = table.located_or("client_auth", &MODES, tls::ClientAuthMode::default());
    if ca.is_none() {
        for at in mode_at.iter().chain(crl.as_ref().map(|crl| &crl.at)) {
            let problem = ConfigProblem::new(FaultCode::Missing, "there is no authority to verify certificates with");
            table.context.error(at, problem.hint("set `client_ca`").lacks(&[&table.location_of(&["client_ca"]).path]));
        }
    }
    Some(tls::ClientAuthConfig { ca: ca?.value, crl: crl.map(|crl| crl.value), mode })
}

/// `[admin]` and the location of its address.
pub(super) fn admin(root: &TableReader<'_>) -> (admin::AdminConfig, DocumentLocation) {
    let default = admin::AdminConfig::default();
    root.table("admin", |table| {
        let address = table.value_or("address", &formats::SOCKET_ADDRESS, default.address);
        let token = secret(table, "token");
        let config = admin::AdminConfig { address, token: Some(token).filter(|token| !token.is_empty()) };
        (config, table.location_of(&["address"]))
    })
}

const GET_BODY: OneOf<GetBodyPolicy> =
    OneOf(&[("forward", Some(GetBodyPolicy::Forward)), ("refuse", Some(GetBodyPolicy::Refuse))]);

const UNDERSCORES: OneOf<UnderscorePolicy> =
    OneOf(&[("drop", Some(UnderscorePolicy::Drop)), ("forward", Some(UnderscorePolicy::Forward))]);

/// `[limits_http]`: bounds of one message, and of the number of connections.
pub(super) fn limits_http(root: &TableReader<'_>) -> (HttpLimits, accept::ConnectionLimits) {
    let (http, accept) = (HttpLimits::default(), accept::ConnectionLimits::default());
    root.table("limits_http", |table| {
        let limits = HttpLimits {
            header_bytes: bytes(table, "header_bytes", http.header_bytes),
            header_fields: index(table.value_or("header_fields", &IntegerRange(8..=256), index_of(http.header_fields))),
            uri_bytes: bytes(table, "uri_bytes", http.uri_bytes),
            body_bytes: table.value_or("body_bytes", &SizeRange(0..=1_024 * GIB), http.body_bytes),
            header_timeout: table.value_or("header_timeout", &DurationRange(MS..=HOUR), http.header_timeout),
            idle_timeout: table.value_or("idle_timeout", &DurationRange(MS..=DAY), http.idle_timeout),
            body_rate: u32::try_from(table.value_or("body_rate", &SizeRange(0..=GIB), http.body_rate.into()))
                .unwrap_or(u32::MAX),
            get_body: table.value_or("get_body", &GET_BODY, http.get_body),
            underscores: table.value_or("underscores", &UNDERSCORES, http.underscores),
            http2_memory: table.value_or("http2_memory", &SizeRange(MIB..=1_024 * GIB), http.http2_memory),
            http2_memory_per_ip: table.value_or(
                "http2_memory_per_ip",
                &SizeRange(MIB..=1_024 * GIB),
                http.http2_memory_per_ip,
            ),
            ..http
        };
        let connections = IntegerRange(1..=10_000_000);
        let accept = accept::ConnectionLimits {
            connections: index(table.value_or("connections", &connections, index_of(accept.connections))),
            connections_per_ip: index(table.value_or(
                "connections_per_ip",
                &connections,
                index_of(accept.connections_per_ip),
            )),
        };
        (limits, accept)
    })
}

fn bytes(table: &TableReader<'_>, key: &'static str, default: usize) -> usize {
    let default = u64::try_from(default).unwrap_or(u64::MAX);
    usize::try_from(table.value_or(key, &SizeRange(256..=MIB), default)).unwrap_or(usize::MAX)
}
