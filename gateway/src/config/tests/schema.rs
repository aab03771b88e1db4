//! The JSON Schema accepts what the gateway accepts, and refuses what it refuses by its syntax.
//! [`super::parse_in`] checks the first for every accepted document of these tests.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use boon::{Compiler, SchemaIndex, Schemas};
use serde_json::{Map, Value, json};

use super::super::node::{DocumentNode, DocumentValue};
use super::super::{DocumentFormat, document, schema};
use super::{MINIMAL, parse_toml};

/// The fault that the schema finds in a document; `None`: it accepts the document.
pub(super) fn schema_fault(text: &str, format: DocumentFormat) -> Option<String> {
    static COMPILED: OnceLock<(Schemas, SchemaIndex)> = OnceLock::new();
    let (schemas, index) = COMPILED.get_or_init(|| {
        let (mut schemas, mut compiler) = (Schemas::new(), Compiler::new());
        compiler.add_resource("tidegate.schema.json", schema()).expect("a document");
        let index = compiler.compile("tidegate.schema.json", &mut schemas).expect("a schema of draft 2020-12");
        (schemas, index)
    });
    let root = document::parse(text, format).expect("a well-formed document");
    schemas.validate(&value(&root), *index).err().map(|error| format!("{error:#}"))
}

fn value(node: &DocumentNode) -> Value {
    match &node.value {
        DocumentValue::String(text) => json!(text),
        DocumentValue::Integer(number) => json!(number),
        DocumentValue::Float(number) => json!(number),
        DocumentValue::Boolean(value) => json!(value),
        DocumentValue::Array(items) => items.iter().map(value).collect(),
        DocumentValue::Table(entries) => {
            Value::Object(entries.iter().map(|entry| (entry.key.clone(), value(&entry.node))).collect::<Map<_, _>>())
        }
        DocumentValue::Unsupported(_) => Value::Null,
    }
}

/// All complete configurations in the file `directory` or below the directory.
fn complete_configurations(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    let paths = match std::fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| entry.expect("an entry").path()).collect(),
        Err(_file) => vec![directory.to_owned()],
    };
    for path in paths {
        if path.is_dir() {
            complete_configurations(&path, found);
            continue;
        }
        let is_toml = path.extension().is_some_and(|extension| extension == "toml");
        if !is_toml && path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("UTF-8");
        // Of a page, each block that is a whole configuration.
        let parts = if is_toml { vec![&*text] } else { text.split("```toml\n").skip(1).collect() };
        for part in parts {
            let part = if is_toml { part } else { part.split("```").next().unwrap_or_default() };
            if part.lines().any(|line| line.starts_with("version = 1")) {
                found.push((path.clone(), part.to_owned()));
            }
        }
    }
}

#[test]
fn every_complete_configuration_of_the_repository_matches_the_schema() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = Vec::new();
    for directory in ["README.md", "docs", "gateway/src", "gateway/tests/data", "gateway/packaging", "loadtest/k6"] {
        complete_configurations(&repository.join(directory), &mut found);
    }
    assert!(found.len() >= 45, "{}", found.len());
    for (path, text) in &found {
        let fault = schema_fault(text, DocumentFormat::Toml);
        if path.ends_with("contract.toml") {
            // It has keys of later versions.
            assert!(fault.is_some_and(|fault| fault.contains("journal")));
            let current = text.replace("journal ", "# ").split("[journal]").next().unwrap_or_default().to_owned();
            assert_eq!(schema_fault(&current, DocumentFormat::Toml), None);
            continue;
        }
        assert_eq!(fault, None, "{}", path.display());
    }
}

/// Each line is added to the smallest configuration, or replaces a part of it.
#[test]
fn the_schema_refuses_what_check_refuses_by_its_syntax() {
    let route = |keys: &str| format!("[[routes]]\nname = \"b\"\nmatch = {{ path = \"/b\" }}\n{keys}");
    let forwarded = |keys: &str| route(&format!("upstream = \"shop\"\n{keys}"));
    let upstream = |keys: &str| format!("[upstreams.b]\n{keys}");
    let limit = |keys: &str| format!("[limits.a]\nrate = \"1/s\"\nburst = 1\n{keys}");
    let endpoints = |value: &str| upstream(&format!("endpoints = [{value}]"));
    let refused = [
        // Units and ranges.
        "[server]\ndrain_timeout = 30".to_owned(),
        "[server]\ndrain_timeout = \"30\"".to_owned(),
        "[server]\ndrain_timeout = \"1.5s\"".to_owned(),
        "[server]\ndrain_timeout = \"7d\"".to_owned(),
        "[server]\nworkers = 1025".to_owned(),
        "[server]\nworkers = \"4\"".to_owned(),
        "[server]\nnode = \"a b\"".to_owned(),
        "[limits_http]\nheader_timeout = \"0s\"".to_owned(),
        "[limits_http]\nbody_bytes = \"16MB\"".to_owned(),
        "[limits_http]\nbody_bytes = 16".to_owned(),
        "[cache]\nmemory = \"64\"".to_owned(),
        "[cache]\nhot_rate = \"0/s\"".to_owned(),
        "[cache]\nhot_rate = \"5\"".to_owned(),
        "[cache]\nfill_bytes = \"1MiB\"\ninflight_fetch_bytes = \"2MiB\"".to_owned(),
        "[tiers]\ngold = 0".to_owned(),
        "[tiers]\n\"a b\" = 2".to_owned(),
        // Listeners.
        "[[listen]]\nproxy_protocol = \"off\"".to_owned(),
        "[[listen]]\naddress = \"8080\"".to_owned(),
        "[[listen]]\naddress = \"localhost:8080\"".to_owned(),
        "[[listen]]\naddress = \"127.0.0.1:0\"\ntls = {}".to_owned(),
        "[[listen]]\naddress = \"127.0.0.1:0\"\ntls = { certificates = [] }".to_owned(),
        "[[listen]]\naddress = \"127.0.0.1:0\"\ntls = { certificates = [{ cert = \"a\" }] }".to_owned(),
        // Callers.
        "[identity]\ndevice = \"host:\"".to_owned(),
        "[identity]\ndevice = [\"query:id\"]".to_owned(),
        "[identity]\ndevice = [\"path:33\"]".to_owned(),
        "[identity]\ndevice = [\"path:01\"]".to_owned(),
        "[identity]\nregion = [\"path:+1\"]".to_owned(),
        "[identity]\nuser = \"cookie:user\"".to_owned(),
        "[identity]\nuser = {}".to_owned(),
        "[identity]\nuser = { jwt = { algorithms = [\"ES256\"] } }".to_owned(),
        "[identity]\nuser = { jwt = { keys = \"k\", algorithms = [] } }".to_owned(),
        "[identity]\nuser = { jwt = { keys = \"k\", algorithms = [\"none\"] } }".to_owned(),
        "[identity]\ntrusted_proxies = [\"10.0.0.0/8/1\"]".to_owned(),
        "[identity]\ngeoip = { regions = { eu = [\"DE\"] } }".to_owned(),
        "[identity]\nregions = [\"EU\"]".to_owned(),
        "[access]\ndenied = [\"device:\"]".to_owned(),
        // Limits.
        "[limits.a]\ntier = \"node\"\nrate = \"1/s\"".to_owned(),
        "[limits.a]\ntier = \"node\"\nrate = \"1/w\"\nburst = 1".to_owned(),
        "[limits.a]\ntier = \"node\"\nrate = 1\nburst = 1".to_owned(),
        "[limits.\"a b\"]\ntier = \"node\"\nrate = \"1/s\"\nburst = 1".to_owned(),
        limit("tier = \"galaxy\""),
        limit("tier = \"key\""),
        limit("tier = \"node\"\nkey = \"host:\""),
        limit("tier = \"cluster\"\nkeys = 5"),
        limit("tier = \"node\"\nper_address = 5"),
        // Upstreams.
        upstream("timeout = \"1s\""),
        endpoints(""),
        endpoints("\"127.0.0.1:3000\""),
        endpoints("\"ftp://a\""),
        endpoints("\"http://a/path\""),
        endpoints("\"http://user@a\""),
        endpoints("{ weight = 2 }"),
        endpoints("{ url = \"http://a\", weight = 0 }"),
        endpoints("{ url = \"http://a\", weight = 1001 }"),
        endpoints("{ url = \"http://a\", wait = 1 }"),
        endpoints("{ url = \"a\" }"),
        endpoints("{ url = \"http://a\", zone = \"\" }"),
        upstream("endpoints = [\"https://a\"]\ntls = { cert = \"a\" }"),
        upstream("endpoints = [\"http://a\"]\nhash_by = \"url\""),
        upstream("endpoints = [\"http://a\"]\nbreaker = { error_ratio = 0 }"),
        upstream("endpoints = [\"http://a\"]\nhealth = {}"),
        upstream("endpoints = [\"http://a\"]\nretry_on = [\"6xx\"]"),
        // Routes.
        "[[routes]]\nmatch = { path = \"/b\" }\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nmatch = {}\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nmatch = { path = \"b\" }\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nmatch = { path = \"/b*\" }\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nmatch = { path = \"/b\", methods = [\"get\"] }\nupstream = \"shop\"".to_owned(),
        "[[routes]]\nname = \"b\"\nmatch = { path = \"/b\", headers = { \"a b\" = \"1\" } }\nupstream = \"shop\""
            .to_owned(),
        route(""),
        route("upstream = \"shop\"\nredirect = { to = \"/c\" }"),
        route("upstream = \"shop\"\nrespond = {}"),
        route("redirect = { to = \"/c\" }\nrespond = {}"),
        route("redirect = {}"),
        route("redirect = { to = \"/c\" }\ntimeout = \"1s\""),
        route("respond = { status = 99 }"),
        route("respond = {}\ncache = {}"),
        route("respond = {}\ncanary = { upstream = \"shop\", percent = 1 }"),
        forwarded("canary = { upstream = \"shop\" }"),
        forwarded("strip_prefix = \"/b\"\nrewrite = \"/c\""),
        forwarded("strip_prefix = \"b\""),
        forwarded("auth = {}"),
        forwarded("auth = { basic = \"a\", api_keys = \"b\" }"),
        forwarded("auth = { basic = \"a\", header = \"x-key\" }"),
        forwarded("auth = { forward = \"http://127.0.0.1:1/\", realm = \"a\" }"),
        forwarded("auth = { basic = \"a\", timeout = \"1s\" }"),
        forwarded("cors = {}"),
        forwarded("cors = { origins = [\"app.example\"] }"),
        forwarded("compress = []"),
        forwarded("compress = [\"deflate\"]"),
        forwarded("compress = { types = [\"html\"] }"),
        forwarded("cost = 0"),
        forwarded("cost_by_status = { 6xx = 2 }"),
        forwarded("pages = { 200 = \"a\" }"),
        forwarded("cache = { ttl = { 404 = \"1\" } }"),
        forwarded("cache = { languages = [\"en_GB\"] }"),
        forwarded("weight = 7"),
        forwarded("journal = {}"),
        // Others.
        "[redis.regions.eu]\nslots = 4".to_owned(),
        "[redis.regions.eu]\nendpoints = [\"redis://a\"]\ncluster = [\"redis://b\"]".to_owned(),
        "[redis.regions.eu]\nendpoints = [\"http://a\"]".to_owned(),
        "[redis.regions.EU]\nendpoints = [\"redis://a\"]".to_owned(),
        "[redis]\ntls = { cert = \"a\" }".to_owned(),
        "[kubernetes]\ncontext = \"a\"".to_owned(),
        "[kubernetes]\nkubeconfig = \"a\"\nurl = \"https://a\"".to_owned(),
        "[server.paths]\nnormalise = \"off\"\nencoded_slash = \"keep\"".to_owned(),
        "[log]\nformat = \"combined\"\nfields = [\"status\"]".to_owned(),
        "[tracing]\nratio = 2".to_owned(),
        "[sever]".to_owned(),
    ];
    assert_eq!(schema_fault(MINIMAL, DocumentFormat::Toml), None);
    for addition in refused {
        let text = format!("{MINIMAL}{addition}\n");
        let report = parse_toml(&text).err();
        assert!(report.is_some(), "accepted by check: {addition}");
        assert!(schema_fault(&text, DocumentFormat::Toml).is_some(), "accepted by the schema: {addition}");
    }
    for text in ["", "version = 2", "version = \"1\""] {
        assert!(parse_toml(text).is_err() && schema_fault(text, DocumentFormat::Toml).is_some(), "{text}");
    }
}
