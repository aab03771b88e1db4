//! `[[listen]]`, `[admin]` and `[limits_http]`.

use super::super::fault::At;
use super::super::kind::{Choice, Size, Span, Text, Whole};
use super::super::table::Table;
use super::{DAY, GIB, HOUR, MIB, MS, check_file, forms, index, index_of, path};
use crate::accept::{self, Listen};
use crate::http::Limits;
use crate::http::limits::GetBody;
use crate::{admin, tls};

/// Every `[[listen]]` and the place of its address.
pub(super) fn listeners(root: &Table<'_>) -> Vec<(Listen, At)> {
    const PROXY: Choice<()> = Choice(&[("off", Some(())), ("optional", None), ("required", None)]);
    root.tables("listen", |listen| {
        let default = Listen::default();
        let address = listen.required("address", &forms::SOCKET);
        listen.or("proxy_protocol", &PROXY, ());
        let tls = listen.some_table("tls", tls);
        match address {
            Some(address) => (Listen { address: address.value, tls }, address.at),
            None => (Listen { tls, ..default }, listen.at.clone()),
        }
    })
}

fn tls(table: &Table<'_>) -> tls::Settings {
    const VERSIONS: Choice<tls::MinVersion> =
        Choice(&[("1.2", Some(tls::MinVersion::V12)), ("1.3", Some(tls::MinVersion::V13))]);
    let certificates: Vec<Option<tls::Files>> = table.tables("certificates", |files| {
        let (cert, key) = (path(files, "cert"), path(files, "key"));
        for file in [&cert, &key].into_iter().flatten() {
            check_file(files, file);
        }
        Some(tls::Files { cert: cert?.value, key: key?.value })
    });
    if certificates.is_empty() {
        let problem = super::Problem::new(super::Code::Missing, "TLS needs at least one certificate");
        let hint = "write `certificates = [{ cert = \"tls.crt\", key = \"tls.key\" }]`";
        table.reading.error(&table.at, problem.hint(hint));
    }
    tls::Settings {
        certificates: certificates.into_iter().flatten().collect(),
        min_version: table.or("min_version", &VERSIONS, tls::MinVersion::default()),
    }
}

/// `[admin]` and the place of its address.
pub(super) fn admin(root: &Table<'_>) -> (admin::Settings, At) {
    let default = admin::Settings::default();
    root.table("admin", |table| {
        let address = table.or("address", &forms::SOCKET, default.address);
        let token = table.or("token", &Text, String::new());
        let settings = admin::Settings { address, token: Some(token).filter(|token| !token.is_empty()) };
        (settings, table.place_of(&["address"]))
    })
}

const GET_BODY: Choice<GetBody> = Choice(&[("forward", Some(GetBody::Forward)), ("refuse", Some(GetBody::Refuse))]);

/// `[limits_http]`: what one message may hold, and how many connections may stand.
pub(super) fn limits_http(root: &Table<'_>) -> (Limits, accept::Settings) {
    let (http, accept) = (Limits::default(), accept::Settings::default());
    root.table("limits_http", |table| {
        let limits = Limits {
            header_bytes: bytes(table, "header_bytes", http.header_bytes),
            header_fields: index(table.or("header_fields", &Whole(8..=256), index_of(http.header_fields))),
            uri_bytes: bytes(table, "uri_bytes", http.uri_bytes),
            body_bytes: table.or("body_bytes", &Size(0..=1_024 * GIB), http.body_bytes),
            header_timeout: table.or("header_timeout", &Span(MS..=HOUR), http.header_timeout),
            idle_timeout: table.or("idle_timeout", &Span(MS..=DAY), http.idle_timeout),
            body_rate: u32::try_from(table.or("body_rate", &Size(0..=GIB), http.body_rate.into())).unwrap_or(u32::MAX),
            get_body: table.or("get_body", &GET_BODY, http.get_body),
            ..http
        };
        let connections = Whole(1..=10_000_000);
        let accept = accept::Settings {
            connections: index(table.or("connections", &connections, index_of(accept.connections))),
            connections_per_ip: index(table.or(
                "connections_per_ip",
                &connections,
                index_of(accept.connections_per_ip),
            )),
        };
        (limits, accept)
    })
}

fn bytes(table: &Table<'_>, key: &'static str, default: usize) -> usize {
    let default = u64::try_from(default).unwrap_or(u64::MAX);
    usize::try_from(table.or(key, &Size(256..=MIB), default)).unwrap_or(usize::MAX)
}
