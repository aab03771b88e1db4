//! Regions and limits by the country of the client's address, and the reload of the database.

mod support;
#[path = "support/mmdb.rs"]
mod mmdb;

use std::net::IpAddr;

use mmdb::database;
use support::{Client, Gateway, Origin, STEP_TIMEOUT, Script, TempDir, one_route, wait_for};

const KIND: &str = "GeoLite2-Country";

fn write(dir: &TempDir, name: &str, networks: &[(&str, &str, &str)]) {
    std::fs::write(dir.path().join(name), database(KIND, networks)).expect("a written file");
}

/// A gateway that trusts `X-Forwarded-For` of 127.0.0.1 and finds countries in `geo.mmdb`.
fn start(origin: &Origin, networks: &[(&str, &str, &str)], identity: &str) -> Gateway {
    start_route(origin, networks, identity, "limits = [\"country\"]")
}

/// The same with other keys of the route.
fn start_route(origin: &Origin, networks: &[(&str, &str, &str)], identity: &str, route: &str) -> Gateway {
    let dir = TempDir::new();
    write(&dir, "geo.mmdb", networks);
    let rest = format!(
        "[identity]\ntrusted_proxies = [\"127.0.0.1\"]\n{identity}\n\
         [limits.country]\ntier = \"key\"\nkey = \"geoip:country\"\nrate = \"1/h\"\nburst = 3\n\
         [server]\nworkers = 1\n[log]\naccess = \"stdout\"\n"
    );
    Gateway::start_in(dir, &one_route(origin.address, route, &rest))
}

fn from(client: &mut Client, address: &str, fields: &[(&str, &str)]) -> support::ClientResponse {
    client.get("/page", &[&[("x-forwarded-for", address)], fields].concat())
}

/// The region of the slot that answered, from `Cache-Status`.
fn region(client: &mut Client, address: &str, fields: &[(&str, &str)]) -> String {
    let response = from(client, address, fields);
    assert_eq!(response.status, 200, "{response:?}");
    let status = from(client, address, fields).cache_status().to_owned();
    let detail = status.split("detail=").nth(1).unwrap_or_else(|| panic!("no location in {status}"));
    detail.split([' ', ':']).nth(1).unwrap_or_default().to_owned()
}

#[test]
fn regions_follow_the_country_of_the_believed_address() {
    let origin = Origin::start(|_| Script::ok(&[("Cache-Control", "max-age=60")], "page"));
    let networks = [
        ("192.0.2.0/24", "DE", "EU"),
        ("198.51.100.0/24", "US", "NA"),
        ("203.0.113.0/24", "JP", "AS"),
        ("2001:db8::/32", "FR", "EU"),
    ];
    let regions = "regions = [\"north\", \"south\", \"west\", \"jp\"]\n";
    let areas = "geoip = { database = \"geo.mmdb\", regions = { north = [\"continent:EU\"], south = [\"FR\"], west = [\"US\"] } }";
    let sources = "region = [\"header:x-region\", \"geoip:\", \"geoip:country\"]\n";
    let gateway = start(&origin, &networks, &format!("{regions}{sources}{areas}"));
    let mut client = gateway.connect();
    for (address, fields, want) in [
        ("192.0.2.1", &[][..], "north"),
        ("2001:db8::1", &[], "south"),
        ("203.0.113.1", &[], "jp"),
        ("100.64.0.1", &[], "default"),
        ("198.51.100.1", &[("x-region", "south")], "south"),
        // A name that is not configured counts as the default: a source with a value decides.
        ("198.51.100.2", &[("x-region", "west2")], "default"),
    ] {
        if address == "198.51.100.2" {
            // The limit of the country has one request left.
            let response = from(&mut client, address, fields);
            assert_eq!(response.status, 200);
            continue;
        }
        assert_eq!(region(&mut client, address, fields), want, "{address}");
    }
    let log = gateway.access_log(11);
    let countries: Vec<&str> = log.iter().filter_map(|line| line["country"].as_str()).collect();
    assert_eq!(countries, ["DE", "DE", "FR", "FR", "JP", "JP", "US", "US", "US"]);
    // An untrusted client cannot choose its country.
    let mut other = Client::connect_from(IpAddr::from([127, 0, 0, 2]), gateway.address);
    assert_eq!(from(&mut other, "192.0.2.1", &[]).status, 200);
    assert_eq!(gateway.access_log(12)[11].get("country"), None);
}

#[test]
fn limits_count_by_country() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let networks = [("192.0.2.0/24", "DE", "EU"), ("198.51.100.0/24", "US", "NA")];
    let gateway = start(&origin, &networks, "geoip = { database = \"geo.mmdb\" }");
    let mut client = gateway.connect();
    let mut passed =
        |network: &str| (1..=5).filter(|n| from(&mut client, &format!("{network}{n}"), &[]).status == 200).count();
    assert_eq!((passed("192.0.2."), passed("198.51.100."), passed("192.0.2.10")), (3, 3, 0));
    assert_eq!(passed("100.64.0."), 5, "an address without a country is not counted");
}

/// A key that follows from the address, the user or the device of the description is derived.
#[test]
fn limits_by_what_an_explanation_has_are_explained() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let key = |name: &str, key: &str| {
        format!("[limits.{name}]\ntier = \"key\"\nkey = \"{key}\"\nrate = \"1/h\"\nburst = 3\n")
    };
    let limits = [
        key("continent", "geoip:continent"),
        key("user", "header:x-user"),
        key("device", "cookie:id"),
        key("path", "path:1"),
    ];
    let identity = format!(
        "geoip = {{ database = \"geo.mmdb\" }}\nuser = \"header:x-user\"\ndevice = [\"cookie:id\"]\n{}",
        limits.concat()
    );
    let names = "limits = [\"country\", \"continent\", \"user\", \"device\", \"path\"]";
    let gateway = start_route(&origin, &[("192.0.2.0/24", "DE", "EU")], &identity, names);
    let fields = [("x-user", "alice"), ("cookie", "id=abc")];
    assert_eq!(from(&mut gateway.connect(), "192.0.2.1", &fields).status, 200);
    let remaining = |query: &str| -> Vec<(String, Option<u64>)> {
        let explained = gateway.admin(&format!("/api/v1/limits/explain?{query}"));
        let explained: serde_json::Value = serde_json::from_str(&explained.text()).expect("JSON");
        let rules = explained["rules"].as_array().expect("a list").iter();
        let all = rules.map(|rule| {
            let applies = !rule["reason"].as_str().expect("text").starts_with("does not apply");
            (rule["name"].as_str().expect("text").to_owned(), rule["remaining"].as_u64().filter(|_| applies))
        });
        all.collect()
    };
    let of = |values: [Option<u64>; 5]| -> Vec<(String, Option<u64>)> {
        ["country", "continent", "user", "device", "path"].map(str::to_owned).into_iter().zip(values).collect()
    };
    let sorted = |mut rows: Vec<(String, Option<u64>)>| {
        rows.sort();
        rows
    };
    for (query, want) in [
        ("ip=192.0.2.7", [Some(2), Some(2), None, None, None]),
        ("ip=192.0.2.7&user=alice&device=abc", [Some(2), Some(2), Some(2), Some(2), None]),
        ("ip=192.0.2.7&key=user:alice&key=device:abc&key=path:page", [Some(2); 5]),
        ("ip=192.0.2.7&key=country:us&key=continent:na&user=bob", [Some(3), Some(3), Some(3), None, None]),
        ("ip=100.64.0.1&key=country:de", [Some(2), None, None, None, None]),
    ] {
        assert_eq!(sorted(remaining(query)), sorted(of(want)), "{query}");
    }
}

#[test]
fn changed_database_takes_effect_and_a_damaged_one_does_not() {
    let origin = Origin::start(|_| Script::ok(&[], "page"));
    let gateway = start(&origin, &[("192.0.2.0/24", "DE", "EU")], "geoip = { database = \"geo.mmdb\" }");
    let mut client = gateway.connect();
    let mut count = 0;
    let mut country = || {
        from(&mut client, "192.0.2.1", &[]);
        count += 1;
        gateway.access_log(count)[count - 1]["country"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(country(), "DE");
    let replace = |bytes: &[u8]| {
        let file = gateway.dir.path().join("geo.mmdb.new");
        std::fs::write(&file, bytes).expect("a written file");
        std::fs::rename(file, gateway.dir.path().join("geo.mmdb")).expect("a renamed file");
    };
    let reloads = |event: &str| gateway.process.stderr.events(event).len();
    let next = database(KIND, &[("192.0.2.0/24", "FR", "EU")]);
    replace(&next[..next.len() / 2]);
    wait_for(|| reloads("reload_refused") == 1, STEP_TIMEOUT);
    assert_eq!(country(), "DE");
    let fault = "not a database in MaxMind's format";
    assert!(gateway.process.stderr.find(STEP_TIMEOUT, |line| line.contains(fault)).is_some());
    replace(&next);
    wait_for(|| reloads("reloaded") == 1, STEP_TIMEOUT);
    assert_eq!(country(), "FR", "on the open connection too");
}
