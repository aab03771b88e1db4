//! `[tracing]`: where spans are sent, and which requests have them.

use http::{HeaderName, HeaderValue};
use url::Url;

use super::super::constraints;
use super::super::fault::{ConfigProblem, FaultCode, FaultSeverity};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{AnyString, Boolean, OneOf, ParsedString, Share};
use super::formats;
use crate::spans::{ExportCompression, TracingConfig};

/// The path of traces below the endpoint of a collector (OTLP 1.x).
const TRACES_PATH: &str = "/v1/traces";

const ENDPOINT: ParsedString<String> = ParsedString {
    name: "the URL of a collector such as \"http://127.0.0.1:4318\", or \"\" for none",
    pattern: "",
    parse: parse_endpoint,
    format: String::clone,
};

/// `None`: nothing is traced.
pub(super) fn read(root: &TableReader<'_>) -> Option<TracingConfig> {
    root.table("tracing", |table| {
        let url = table.value_or("otlp", &ENDPOINT, String::new());
        let ratio = table.value_or("ratio", &Share, 1.0);
        let service_name = table.value_or("service_name", &AnyString, "tidegate".to_owned());
        const COMPRESSIONS: OneOf<ExportCompression> =
            OneOf(&[("none", Some(ExportCompression::None)), ("gzip", Some(ExportCompression::Gzip))]);
        let compression = table.value_or("compression", &COMPRESSIONS, ExportCompression::default());
        table.constraint(constraints::names("headers", formats::FIELD_PATTERN));
        let headers = table.named_values("headers", &AnyString);
        let hint = "the field would be sent twice; keep one";
        formats::check_field_names(table, headers.iter().map(|(name, _)| name), FaultSeverity::Error, hint);
        let headers = headers.into_iter().filter_map(|(name, value)| header(table, &name, value)).collect();
        let has_query = table.value_or("query", &Boolean, false);
        warn_without_effect(table);
        (!url.is_empty()).then_some(TracingConfig { url, ratio, service_name, has_query, compression, headers })
    })
}

/// Without `otlp`, no other key has effect. An empty one switches tracing off, and is meant so.
fn warn_without_effect(table: &TableReader<'_>) {
    if table.has("otlp") {
        return;
    }
    for key in ["ratio", "service_name", "compression", "headers", "query"].into_iter().filter(|key| table.has(key)) {
        let problem = ConfigProblem::new(FaultCode::Risk, format!("`{key}` has no effect: no request is traced"));
        let problem = problem.hint("set `tracing.otlp` to the URL of a collector").lacks(&["tracing.otlp"]);
        table.context.warning(&table.location_of(&[key]), problem);
    }
}

fn header(table: &TableReader<'_>, name: &Located<String>, value: String) -> Option<(String, String)> {
    if HeaderName::from_bytes(name.value.as_bytes()).is_err() || HeaderValue::from_str(&value).is_err() {
        // The value may be a secret.
        let problem = ConfigProblem::bad_value(format!("`{}` is no field with a valid value", name.value));
        table.context.error(&name.at, problem);
        return None;
    }
    Some((name.value.clone(), value))
}

/// The URL of traces: an endpoint without that path is the base of all signals, as in
/// `OTEL_EXPORTER_OTLP_ENDPOINT`. Faults do not repeat the text, which may have credentials: they
/// are logged and shown on the dashboard.
fn parse_endpoint(text: &str) -> Result<String, ConfigProblem> {
    if text.is_empty() {
        return Ok(String::new());
    }
    let bad = |hint: &str| ConfigProblem::bad_value("this is not the URL of a collector").hint(hint);
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let mut url = url.ok_or_else(|| bad("OTLP is sent over HTTP: write \"http://HOST:4318\""))?;
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    if url.query().is_some() || url.fragment().is_some() || has_credentials {
        return Err(bad("leave out query, fragment and user; credentials belong in `tracing.headers`"));
    }
    if !url.path().ends_with(TRACES_PATH) {
        let path = format!("{}{TRACES_PATH}", url.path().trim_end_matches('/'));
        url.set_path(&path);
    }
    Ok(url.into())
}
