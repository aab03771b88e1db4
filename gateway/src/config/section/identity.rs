//! `[identity]`: whose word is taken for device, user, tier and region.

use super::super::document::Value;
use super::super::fault::{At, Code, Problem};
use super::super::kind::{Choice, Given, Kind, Parsed};
use super::super::reading::Placed;
use super::super::table::{Either, Table};
use super::{forms, tokens};
use crate::identify::{AccessSettings, Settings, Source, Written};

/// Sources that a client may set itself.
pub(super) const SOURCE: Parsed<Source> =
    Parsed { name: "\"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\"", parse: source, show };

const REGION: Parsed<shard::Region> = Parsed {
    name: "a region's name: 1 to 32 of a-z, 0-9, `-` and `_`",
    parse: region,
    show: |region| region.to_string(),
};

const WRITTEN: Choice<Written> = Choice(&[
    ("either", Some(Written::Either)),
    ("x-forwarded-for", Some(Written::XForwardedFor)),
    ("forwarded", Some(Written::Forwarded)),
]);

/// The section, and the places of what believes trusted proxies alone.
pub(super) fn read(root: &Table<'_>) -> (Settings, Vec<At>) {
    let default = Settings::default();
    root.table("identity", |table| {
        let mut trusting = Vec::new();
        let mut header = |source: Placed<Source>| {
            trusting.push(source.at);
            source.value
        };
        let (user, tokens) = match table.either("user", &Header { or: "{ jwt = { ... } }" }, tokens::read) {
            Some(Either::Value(source)) => (Some(header(source)), None),
            Some(Either::Table(read)) => read.unzip(),
            None => (None, None),
        };
        let tier = table.either("tier", &Header { or: "{ jwt_claim = \"NAME\" }" }, |tier| {
            tier.required("jwt_claim", &tokens::CLAIM)
        });
        let tier = match tier {
            Some(Either::Value(source)) => Some(header(source)),
            Some(Either::Table(claim)) => claim.map(|claim| tier_claim(table, claim)),
            None => None,
        };
        let (forwarded_field, at) = table.placed_or("forwarded_field", &WRITTEN, default.forwarded_field);
        trusting.extend(at);
        let settings = Settings {
            trusted_proxies: forms::list(table, "trusted_proxies", forms::NETWORK, default.trusted_proxies),
            forwarded_field,
            device: forms::list(table, "device", SOURCE, default.device),
            user,
            tier,
            tokens,
            claims: default.claims,
            region: forms::list(table, "region", SOURCE, default.region),
            region_default: table.or("region_default", &REGION, default.region_default),
            // What limits count by is read with them.
            keys: Vec::new(),
            access: AccessSettings::default(),
        };
        (settings, trusting)
    })
}

fn tier_claim(identity: &Table<'_>, claim: Placed<String>) -> Source {
    if !identity.has_table("user") {
        let problem = Problem::new(Code::Missing, "there is no token to read it from");
        identity
            .reading
            .error(&claim.at, problem.hint("a tier from a token needs `identity.user = { jwt = { ... } }`"));
    }
    Source::Claim(claim.value)
}

/// A source that only a trusted proxy can set: a header. A table may stand in its place.
struct Header {
    or: &'static str,
}

impl Kind for Header {
    type Value = Source;

    fn describe(&self) -> String {
        format!("\"header:NAME\" or {}", self.or)
    }

    fn show(&self, value: &Source) -> String {
        SOURCE.show(value)
    }

    fn read(&self, given: &Given<'_>) -> Result<Source, Problem> {
        let Value::Text(_) = given.node.value else { return Err(given.wrong_type(self)) };
        match SOURCE.read(given)? {
            header @ Source::Header(_) => Ok(header),
            _ => Err(Problem::bad("a client could set this itself")
                .hint("write \"header:NAME\": a field that trusted_proxies set")),
        }
    }
}

fn source(text: &str) -> Result<Source, Problem> {
    let problem = |reason: String| Problem::bad(reason).hint(format!("write {}", SOURCE.name));
    match text.split_once(':') {
        Some(("header", name)) => Ok(Source::Header(forms::field(name)?)),
        Some(("cookie", name)) => Ok(Source::Cookie(forms::cookie(name)?)),
        Some(("host", "")) => Ok(Source::Host),
        Some(("path", number)) => match number.parse() {
            Ok(number @ 1..=32) => Ok(Source::Path(number)),
            _ => Err(problem(format!("`{number}` is not the number of a segment, 1 to 32"))),
        },
        Some(("geoip", _)) => Err(Problem::unavailable("a region from GeoIP")),
        _ => Err(problem(format!("`{text}` is not a source"))),
    }
}

fn show(source: &Source) -> String {
    match source {
        Source::Header(name) => format!("header:{name}"),
        Source::Cookie(name) => format!("cookie:{name}"),
        Source::Host => "host:".to_owned(),
        Source::Path(number) => format!("path:{number}"),
        Source::Claim(name) => format!("claim:{name}"),
    }
}

fn region(text: &str) -> Result<shard::Region, Problem> {
    text.parse().map_err(|error: shard::BadRegion| Problem::bad(format!("`{text}`: {error}")))
}
