//! `identity.geoip`: the database of countries, and the regions of countries and continents.

use std::path::PathBuf;
use std::sync::Arc;

use super::super::constraints;
use super::super::fault::{ConfigProblem, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{ArrayOf, ParsedString, Repeats};
use super::{files, formats};
use crate::identify::{CountryCode, GeoArea, GeoDatabase, GeoIpConfig};

const AREA: ParsedString<GeoArea> = ParsedString {
    name: "a country such as \"DE\", or \"continent:EU\"",
    pattern: "[A-Z][A-Z]|continent:(AF|AN|AS|EU|NA|OC|SA)",
    parse: parse_area,
    format: |area| match area {
        GeoArea::Country(code) => code.as_str().to_owned(),
        GeoArea::Continent(code) => format!("continent:{}", code.as_str()),
    },
};

/// The codes of continents in databases.
const CONTINENTS: [&str; 7] = ["AF", "AN", "AS", "EU", "NA", "OC", "SA"];

pub(super) fn read(identity: &TableReader<'_>) -> Option<GeoIpConfig> {
    identity.table("geoip", |table| {
        table.constraint(constraints::exactly_one(&["database"]));
        table.constraint(constraints::names("regions", formats::REGION_PATTERN));
        let database = files::optional_path(table, "database");
        let named = table.named_values("regions", &ArrayOf { item: AREA, min_items: 1, repeats: Repeats::BySection });
        let mut regions: Vec<(GeoArea, shard::Region)> = Vec::new();
        for (name, areas) in named {
            let region = match (formats::REGION.parse)(&name.value) {
                Ok(region) => region,
                Err(problem) => {
                    table.context.error(&name.at, problem);
                    continue;
                }
            };
            for area in areas {
                if regions.iter().any(|(known, _)| *known == area.value) {
                    let message = format!("`{}` already has a region", (AREA.format)(&area.value));
                    table.context.error(&area.at, ConfigProblem::new(FaultCode::Duplicate, message));
                    continue;
                }
                regions.push((area.value, region));
            }
        }
        match database {
            Some(path) => Some(GeoIpConfig { database: open(table, &path)?, regions }),
            None => {
                if identity.has("geoip") {
                    let problem = ConfigProblem::new(FaultCode::Missing, "`database` is missing");
                    let hint = "write { database = \"GeoLite2-Country.mmdb\", regions = { north = [\"DE\"] } }";
                    table.context.error(&table.at, problem.hint(hint));
                }
                None
            }
        }
    })
}

fn open(table: &TableReader<'_>, path: &Located<PathBuf>) -> Option<Arc<GeoDatabase>> {
    table.context.environment.watch(&path.value);
    let opened = GeoDatabase::open(&path.value).map_err(|error| {
        let problem = ConfigProblem::new(FaultCode::File, format!("cannot use {}: {error}", path.value.display()));
        table.context.error(&path.at, problem.hint("expected a database of countries or cities, a file `.mmdb`"));
    });
    let database = opened.ok()?;
    if !database.has_countries() {
        let message = format!("a database of the kind `{}` may have no countries", database.kind());
        table.context.warning(&path.at, ConfigProblem::new(FaultCode::Risk, message));
    }
    Some(database)
}

fn parse_area(text: &str) -> Result<GeoArea, ConfigProblem> {
    let problem = || ConfigProblem::bad_value(format!("`{text}` is not a country or a continent"));
    if let Some(continent) = text.strip_prefix("continent:") {
        let code = CountryCode::new(continent).filter(|_| CONTINENTS.contains(&continent));
        return code
            .map(GeoArea::Continent)
            .ok_or_else(|| problem().hint("the continents are AF, AN, AS, EU, NA, OC and SA"));
    }
    match CountryCode::new(text) {
        // Reserved, and not the code of a country in databases.
        Some(_) if text == "EU" => Err(problem().hint("write \"continent:EU\"")),
        Some(code) => Ok(GeoArea::Country(code)),
        None => Err(problem().hint("write two capital letters (ISO 3166-1), or \"continent:EU\"")),
    }
}
