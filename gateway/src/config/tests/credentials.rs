//! `routes.auth` and `identity.geoip`: their files and their faults.

use std::path::PathBuf;
use std::sync::LazyLock;

use super::super::{Config, ConfigReport, DocumentFormat};
use super::{MINIMAL, lines, parse_in};
use crate::identify::mmdb::database;

/// A directory with usable and unusable files.
static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
    let directory = std::env::temp_dir().join(format!("tidegate-credentials-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("the temporary directory is writable");
    let hash = |digit: &str| digit.repeat(64);
    let countries = database("GeoLite2-Country", &[("192.0.2.0/24", "DE", "EU")]);
    for (name, content) in [
        ("keys.txt", format!("ann:sha256:{}\nbob:sha256:{}:gold\n", hash("0"), hash("1")).into_bytes()),
        ("classes.txt", format!("# x\nann:sha256:{}:glod\n", hash("0")).into_bytes()),
        ("none.txt", b"# none\n".to_vec()),
        ("plain.txt", b"ann:secret\n".to_vec()),
        ("users", b"ann:$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5\n".to_vec()),
        ("apr1", b"ann:$apr1$8v5KoN3c$m3Oq2Tz8xQ0zQ1Jj1jQyW1\n".to_vec()),
        ("countries.mmdb", countries.clone()),
        ("short.mmdb", countries[..countries.len() - 9].to_vec()),
        ("networks.mmdb", database("GeoLite2-ASN", &[])),
    ] {
        std::fs::write(directory.join(name), content).expect("the temporary directory is writable");
    }
    directory
});

fn parse(text: &str) -> Result<(Config, ConfigReport), ConfigReport> {
    parse_in(&DIRECTORY, &format!("{MINIMAL}{text}\n"), DocumentFormat::Toml)
}

/// Faults and warnings of a document whose line 9 is the first of `text`, a part of the route.
fn faults(text: &str) -> Vec<String> {
    lines(&match parse(text) {
        Ok((_, warnings)) => warnings,
        Err(report) => report,
    })
}

#[track_caller]
fn assert_fault(text: &str, want: &str) {
    let found = faults(text);
    assert!(found.len() == 1 && found[0].starts_with(want), "{text}: {found:#?}");
}

#[test]
fn faults_of_authentication_are_located() {
    for (auth, want) in [
        ("{}", "9:8 routes[0].auth: `basic`, `api_keys` or `forward` is missing (write { basic"),
        ("\"users\"", "9:8 routes[0].auth: expected a table, found a string"),
        ("{ basic = \"absent\" }", "9:18 routes[0].auth.basic: cannot read"),
        ("{ basic = \"apr1\" }", "9:18 routes[0].auth.basic: cannot use apr1: line 1: the hash is not bcrypt"),
        ("{ basic = \"none.txt\" }", "9:18 routes[0].auth.basic: cannot use none.txt: it has no user"),
        ("{ api_keys = \"plain.txt\" }", "9:21 routes[0].auth.api_keys: cannot use plain.txt: line 1 is not"),
        ("{ api_keys = \"none.txt\" }", "9:21 routes[0].auth.api_keys: none.txt has no keys"),
        (
            "{ api_keys = \"classes.txt\" }",
            "9:21 routes[0].auth.api_keys: classes.txt line 2: `[tiers]` does not define `glod` (did you mean `gold`?)",
        ),
        ("{ basic = \"users\", api_keys = \"keys.txt\" }", "9:38 routes[0].auth.api_keys: a route has either"),
        ("{ basic = \"users\", header = \"x-key\" }", "9:36 routes[0].auth.header: `header` applies to `api_keys`"),
        ("{ basic = \"users\", realm = \"a\\\"b\" }", "9:35 routes[0].auth.realm: not a realm"),
        ("{ basic = \"users\", realm = \"\" }", "9:35 routes[0].auth.realm: not a realm"),
        ("{ api_keys = \"keys.txt\", header = \"x key\" }", "9:42 routes[0].auth.header: "),
        ("{ api_keys = \"keys.txt\", credentials = \"keep\" }", "9:47 routes[0].auth.credentials: unknown value"),
        (
            "{ forward = \"127.0.0.1:4000/verify\" }",
            "9:20 routes[0].auth.forward: not an endpoint: it does not start with a scheme",
        ),
        ("{ basik = \"users\" }", "9:10 routes[0].auth.basik: unknown key `basik` (did you mean `basic`?)"),
    ] {
        let found = faults(&format!("auth = {auth}\n[tiers]\ngold = 2.0\n"));
        assert!(found.iter().any(|fault| fault.starts_with(want)), "{auth}: {found:#?}");
        assert!(!found.join("").contains("secret"), "a line is not repeated: {found:?}");
    }
    for auth in [
        "{ basic = \"users\", realm = \"Staging area\" }",
        "{ api_keys = \"keys.txt\", header = \"x-key\" }",
        "{ forward = \"http://127.0.0.1:4000/verify\" }",
    ] {
        // Keys alone name a class.
        let tiers = if auth.contains("api_keys") { "[tiers]\ngold = 2.0\n" } else { "" };
        assert_eq!(faults(&format!("auth = {auth}\n{tiers}")), [""; 0], "{auth}");
    }
}

#[test]
fn users_of_routes_are_users_for_limits_and_lists() {
    let rest = "[limits.user]\ntier = \"user\"\nrate = \"1/s\"\nburst = 1\n[access]\ndenied = [\"user:eve\"]\n";
    let route = |auth: &str| format!("limits = [\"user\"]\n{auth}\n{rest}");
    assert_eq!(faults(&route("")).len(), 2);
    assert_eq!(faults(&route("auth = { basic = \"users\" }")), [""; 0]);
    let (config, _) =
        parse("auth = { api_keys = \"keys.txt\", header = \"X-Key\" }\n[tiers]\ngold = 2.0").expect("valid");
    assert_eq!(&*config.http.dropped_trailers, ["x-key"]);
    assert!(config.files.iter().any(|file| file.path.ends_with("keys.txt")), "{:?}", config.files);
    assert!(!format!("{:?}", config.routes).contains(&"0".repeat(20)), "no hash is shown");
}

#[test]
fn faults_of_geoip_are_located() {
    let database = "database = \"countries.mmdb\"";
    for (identity, want) in [
        ("geoip = {}", "10:9 identity.geoip: `database` is missing (write { database"),
        ("geoip = { database = \"absent\" }", "10:22 identity.geoip.database: cannot use"),
        ("geoip = { database = \"short.mmdb\" }", "10:22 identity.geoip.database: cannot use"),
        ("geoip = { database = \"users\" }", "10:22 identity.geoip.database: cannot use"),
        ("geoip = { database = \".\" }", "10:22 identity.geoip.database: cannot use"),
        (
            "geoip = { database = \"networks.mmdb\" }",
            "10:22 identity.geoip.database: a database of the kind `GeoLite2-ASN` may have no countries",
        ),
        ("region = [\"geoip:\"]", "10:10 identity.region: there is no database of countries"),
        ("region = [\"header:x\", \"geoip:country\"]", "10:10 identity.region: there is no database of countries"),
        (
            "region = [\"geoip:city\"]",
            "10:11 identity.region[0]: `geoip:city` is not a source (write \"geoip:country\"",
        ),
        ("device = [\"geoip:country\"]", "10:11 identity.device[0]: `geoip:country` is not a source here"),
    ] {
        assert_fault(&format!("[identity]\n{identity}"), want);
    }
    for (regions, want) in [
        (
            "north = [\"de\"]",
            "identity.geoip.regions.north[0]: `de` is not a country or a continent (write two capital",
        ),
        (
            "north = [\"EU\"]",
            "identity.geoip.regions.north[0]: `EU` is not a country or a continent (write \"continent:EU\"",
        ),
        ("north = [\"continent:XX\"]", "identity.geoip.regions.north[0]: `continent:XX` is not a country"),
        ("north = []", "identity.geoip.regions.north: the array needs at least one item"),
        ("north = [\"DE\"], south = [\"DE\"]", "identity.geoip.regions.south[0]: `DE` already has a region"),
        ("west = [\"DE\"]", "identity.geoip: the region `west` is not configured (add it to"),
    ] {
        let identity = format!(
            "[identity]\nregion = [\"geoip:\"]\nregions = [\"north\", \"south\"]\ngeoip = {{ {database}, regions = {{ {regions} }} }}"
        );
        let found = faults(&identity);
        assert!(found.iter().any(|fault| fault.contains(want)), "{regions}: {found:#?}");
    }
    let areas = "regions = { north = [\"DE\", \"continent:AS\"] }";
    let limit = "[limits.country]\ntier = \"key\"\nkey = \"geoip:country\"\nrate = \"1/s\"\nburst = 1\n";
    let with = |region: &str, geoip: &str| {
        faults(&format!(
            "limits = [\"country\"]\n[identity]\nregions = [\"north\"]\nregion = [{region}]\n{geoip}\n{limit}"
        ))
    };
    assert_eq!(with("\"geoip:\"", &format!("geoip = {{ {database}, {areas} }}")), [""; 0]);
    assert_eq!(with("\"geoip:country\", \"geoip:continent\"", &format!("geoip = {{ {database} }}")), [""; 0]);
    let unused = with("", &format!("geoip = {{ {database}, {areas} }}"));
    assert!(unused.len() == 1 && unused[0].contains("the regions of areas have no effect"), "{unused:?}");
    let empty = with("\"geoip:\"", &format!("geoip = {{ {database} }}"));
    assert!(empty.len() == 1 && empty[0].contains("`geoip:` finds no region"), "{empty:?}");
    let limit = with("", "");
    assert!(limit.len() == 1 && limit[0].contains("limits.country: there is no database"), "{limit:?}");
}
