//! `[identity]`: trusted proxies, and the sources of device, user, user class and region.

use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::node::DocumentValue;
use super::super::read_context::Located;
use super::super::table_reader::{TableReader, ValueOrTable};
use super::super::value_kind::{Boolean, InputValue, OneOf, ParsedString, ValueKind, quoted, string_schema};
use super::{formats, geoip, secrets, tokens};
use crate::identify::{AccessConfig, CertificateField, ForwardedField, IdentityConfig, IdentitySource};
use formats::{segment_number, token};

/// Sources that a client controls.
pub(super) const SOURCE: ParsedString<IdentitySource> = ParsedString {
    name: "\"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\"",
    pattern: concat!("(header|cookie):", token!(), "|host:|path:", segment_number!()),
    parse: parse_source,
    format: format_source,
};

/// Sources of the region.
const REGION_SOURCE: ParsedString<IdentitySource> = ParsedString {
    name: "\"header:NAME\", \"cookie:NAME\", \"host:\", \"path:N\", \"geoip:\", \"geoip:country\" or \"geoip:continent\"",
    pattern: concat!("(header|cookie):", token!(), "|host:|geoip:(country|continent)?|path:", segment_number!()),
    parse: |text| match text.strip_prefix("geoip:") {
        Some("") => Ok(IdentitySource::GeoIpRegion),
        Some(_) => parse_connection_source(text),
        None => parse_source(text),
    },
    format: format_source,
};

const FORWARDED_FIELD: OneOf<ForwardedField> = OneOf(&[
    ("either", Some(ForwardedField::Either)),
    ("x-forwarded-for", Some(ForwardedField::XForwardedFor)),
    ("forwarded", Some(ForwardedField::Forwarded)),
]);

/// Reads the section; also returns the locations of keys that have effect only with trusted
/// proxies.
pub(super) fn read(root: &TableReader<'_>) -> (IdentityConfig, Vec<DocumentLocation>) {
    let default = IdentityConfig::default();
    root.table("identity", |table| {
        let mut proxy_dependent = Vec::new();
        let mut header = |source: Located<IdentitySource>| {
            proxy_dependent.push(source.at);
            source.value
        };
        let (user, tokens) = match table.value_or_table("user", &USER, tokens::read) {
            Some(ValueOrTable::Value(Located { value: certificate @ IdentitySource::Certificate(_), .. })) => {
                (Some(certificate), None)
            }
            Some(ValueOrTable::Value(source)) => (Some(header(source)), None),
            Some(ValueOrTable::Table(read)) => read.unzip(),
            None => (None, None),
        };
        let class = table.value_or_table("tier", &CLASS, |table| table.required("jwt_claim", &tokens::CLAIM));
        let user_class = match class {
            Some(ValueOrTable::Value(source)) => Some(header(source)),
            Some(ValueOrTable::Table(claim)) => claim.map(|claim| user_class_claim(table, claim)),
            None => None,
        };
        let (forwarded_field, at) = table.located_or("forwarded_field", &FORWARDED_FIELD, default.forwarded_field);
        proxy_dependent.extend(at);
        let config = IdentityConfig {
            trusted_proxies: formats::list(table, "trusted_proxies", formats::NETWORK, default.trusted_proxies),
            forwarded_field,
            device: formats::list(table, "device", SOURCE, default.device),
            user,
            user_class,
            tokens,
            claims: default.claims,
            region: formats::list(table, "region", REGION_SOURCE, default.region),
            region_default: table.value_or("region_default", &formats::REGION, default.region_default),
            regions: formats::list(table, "regions", formats::REGION, Vec::new()),
            geoip: geoip::read(table),
            // Set by the section `[limits]`.
            keys: Vec::new(),
            access: AccessConfig::default(),
            untrusted_fields: formats::list(table, "untrusted_fields", formats::FIELD_NAME, default.untrusted_fields),
            has_fingerprints: default.has_fingerprints,
            has_principals: default.has_principals,
            trace_sampling: default.trace_sampling,
            request_id: table.value_or("request_id", &Boolean, default.request_id),
            has_user_names: default.has_user_names,
            secret: secrets::secret(table, "secret"),
        };
        (config, proxy_dependent)
    })
}

fn user_class_claim(identity: &TableReader<'_>, claim: Located<String>) -> IdentitySource {
    if !identity.has_table("user") {
        let problem = ConfigProblem::new(FaultCode::Missing, "there is no token to read the claim from");
        let problem = problem.hint("set `identity.user = { jwt = { ... } }`").lacks(&["identity.user"]);
        identity.context.error(&claim.at, problem);
    }
    IdentitySource::Claim(claim.value)
}

const USER: TrustedSource = TrustedSource {
    description: "\"header:NAME\", \"certificate:subject\", \"certificate:san\" or { jwt = { ... } }",
    certificate: true,
};

const CLASS: TrustedSource =
    TrustedSource { description: "\"header:NAME\" or { jwt_claim = \"NAME\" }", certificate: false };

/// The kind of value of `identity.user` and `identity.tier`: sources that a client cannot set
/// itself.
struct TrustedSource {
    description: &'static str,
    /// Whether it may be a name in a client certificate.
    certificate: bool,
}

impl ValueKind for TrustedSource {
    type Value = IdentitySource;

    fn describe(&self) -> String {
        self.description.to_owned()
    }

    fn format(&self, value: &IdentitySource) -> String {
        quoted(&format_source(value))
    }

    fn schema(&self) -> serde_json::Value {
        let certificate = if self.certificate { "|certificate:(subject|san)" } else { "" };
        string_schema(&format!("header:{}{certificate}", token!()))
    }

    fn read(&self, input: &InputValue<'_>) -> Result<IdentitySource, ConfigProblem> {
        let DocumentValue::String(_) = input.node.value else { return Err(input.wrong_type(self)) };
        match TRUSTED_SOURCE.read(input)? {
            header @ IdentitySource::Header(_) => Ok(header),
            certificate @ IdentitySource::Certificate(_) if self.certificate => Ok(certificate),
            IdentitySource::Certificate(_) => {
                Err(ConfigProblem::bad_value("a certificate does not name a user class").hint(self.describe()))
            }
            _ => Err(ConfigProblem::bad_value("a client could set this source itself")
                .hint("write \"header:NAME\" with a field that the trusted proxies set")),
        }
    }
}

const TRUSTED_SOURCE: ParsedString<IdentitySource> =
    ParsedString { name: USER.description, pattern: "", parse: parse_connection_source, format: format_source };

/// A source that clients control, or a property of their connection.
pub(super) fn parse_connection_source(text: &str) -> Result<IdentitySource, ConfigProblem> {
    match text.split_once(':') {
        Some(("certificate", "subject")) => Ok(IdentitySource::Certificate(CertificateField::Subject)),
        Some(("certificate", "san")) => Ok(IdentitySource::Certificate(CertificateField::San)),
        Some(("certificate", name)) => Err(ConfigProblem::bad_value(format!("a certificate has no `{name}`"))
            .hint("write \"certificate:subject\" or \"certificate:san\"")),
        Some(("ja4", "")) => Ok(IdentitySource::Ja4),
        Some(("geoip", "country")) => Ok(IdentitySource::GeoIpCountry),
        Some(("geoip", "continent")) => Ok(IdentitySource::GeoIpContinent),
        Some(("geoip", _)) => Err(ConfigProblem::bad_value(format!("`{text}` is not a source"))
            .hint("write \"geoip:country\" or \"geoip:continent\"")),
        _ => parse_source(text),
    }
}

fn parse_source(text: &str) -> Result<IdentitySource, ConfigProblem> {
    let problem = |reason: String| ConfigProblem::bad_value(reason).hint(format!("write {}", SOURCE.name));
    match text.split_once(':') {
        Some(("header", name)) => Ok(IdentitySource::Header(formats::parse_field_name(name)?)),
        Some(("cookie", name)) => Ok(IdentitySource::Cookie(formats::parse_cookie_name(name)?)),
        Some(("host", "")) => Ok(IdentitySource::Host),
        Some(("path", number)) => match number.parse() {
            // As it is printed: neither `01` nor `+1`.
            Ok(parsed @ 1..=32u8) if parsed.to_string() == number => Ok(IdentitySource::Path(parsed.into())),
            _ => Err(problem(format!("`{number}` is not a segment number, 1 to 32"))),
        },
        Some(("geoip", _)) => Err(ConfigProblem::bad_value(format!("`{text}` is not a source here"))
            .hint("GeoIP is a source of the region, and \"geoip:country\" a key of limits")),
        _ => Err(problem(format!("`{text}` is not a source"))),
    }
}

pub(super) fn format_source(source: &IdentitySource) -> String {
    match source {
        IdentitySource::Header(name) => format!("header:{name}"),
        IdentitySource::Cookie(name) => format!("cookie:{name}"),
        IdentitySource::Host => "host:".to_owned(),
        IdentitySource::Path(number) => format!("path:{number}"),
        IdentitySource::Claim(name) => format!("claim:{name}"),
        IdentitySource::Certificate(CertificateField::Subject) => "certificate:subject".to_owned(),
        IdentitySource::Certificate(CertificateField::San) => "certificate:san".to_owned(),
        IdentitySource::Ja4 => "ja4:".to_owned(),
        IdentitySource::GeoIpRegion => "geoip:".to_owned(),
        IdentitySource::GeoIpCountry => "geoip:country".to_owned(),
        IdentitySource::GeoIpContinent => "geoip:continent".to_owned(),
    }
}
