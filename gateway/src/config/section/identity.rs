//! `[identity]`: whose word is taken for device, user, tier and region.

use super::super::document::Value;
use super::super::fault::{At, Problem};
use super::super::kind::{Given, Kind, Parsed};
use super::super::table::Table;
use super::forms;
use crate::identify::{AccessSettings, Settings, Source};

/// Sources that a client may set itself.
pub(super) const SOURCE: Parsed<Source> =
    Parsed { name: "\"header:NAME\", \"cookie:NAME\", \"host:\" or \"path:N\"", parse: source, show };

const REGION: Parsed<shard::Region> = Parsed {
    name: "a region's name: 1 to 32 of a-z, 0-9, `-` and `_`",
    parse: region,
    show: |region| region.to_string(),
};

/// The section, and the places of what believes trusted proxies alone.
pub(super) fn read(root: &Table<'_>) -> (Settings, Vec<At>) {
    let default = Settings::default();
    root.table("identity", |table| {
        let user = table.optional("user", &Claim { later: "a user from a JWT" });
        let tier = table.optional("tier", &Claim { later: "a tier from a JWT" });
        let trusting = [&user, &tier].into_iter().flatten().map(|source| source.at.clone()).collect();
        let settings = Settings {
            trusted_proxies: forms::list(table, "trusted_proxies", forms::NETWORK, default.trusted_proxies),
            device: forms::list(table, "device", SOURCE, default.device),
            user: user.map(|source| source.value),
            tier: tier.map(|source| source.value),
            region: forms::list(table, "region", SOURCE, default.region),
            region_default: table.or("region_default", &REGION, default.region_default),
            // What limits count by is read with them.
            keys: Vec::new(),
            access: AccessSettings::default(),
        };
        (settings, trusting)
    })
}

/// A source that only a trusted proxy can set: a header.
struct Claim {
    /// What a table in this place asks for.
    later: &'static str,
}

impl Kind for Claim {
    type Value = Source;

    fn describe(&self) -> String {
        "\"header:NAME\"".to_owned()
    }

    fn show(&self, value: &Source) -> String {
        SOURCE.show(value)
    }

    fn read(&self, given: &Given<'_>) -> Result<Source, Problem> {
        if let Value::Table(_) = given.node.value {
            return Err(
                Problem::unavailable(self.later).hint("write \"header:NAME\": a field that trusted_proxies set")
            );
        }
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
        // A cookie's name is a token, as a field's name is, but its case counts (RFC 6265 section 4.1.1).
        Some(("cookie", name)) => {
            forms::field(name).map_err(|_| problem(format!("`{name}` is not a cookie's name")))?;
            Ok(Source::Cookie(name.to_owned()))
        }
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
    }
}

fn region(text: &str) -> Result<shard::Region, Problem> {
    text.parse().map_err(|error: shard::BadRegion| Problem::bad(format!("`{text}`: {error}")))
}
