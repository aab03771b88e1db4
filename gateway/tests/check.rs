//! `tidegate check`: what a start would find later, in files, and which documents are read.

mod support;

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use support::{TempDir, tidegate};

const MINIMAL: &str = "version = 1\n[upstreams.shop]\nendpoints = [\"http://127.0.0.1:3000\"]\n\
                       [[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"shop\"\n";

fn check(dir: &TempDir, arguments: &[&str]) -> (bool, String) {
    said(tidegate().arg("check").args(arguments).current_dir(dir.path()).output().expect("a command"))
}

fn said(output: Output) -> (bool, String) {
    let text = [output.stdout, output.stderr].map(|out| String::from_utf8_lossy(&out).into_owned()).concat();
    (output.status.success(), text)
}

fn print(dir: &TempDir, arguments: &[&str]) -> String {
    let mut command: Command = tidegate();
    said(command.args(["config", "print"]).args(arguments).current_dir(dir.path()).output().expect("a command")).1
}

/// Writes a certificate that ends in a year, and its key.
fn write_pair(dir: &TempDir, name: &str, year: i32) {
    let mut params = rcgen::CertificateParams::new(vec!["gate.test".to_owned()]).expect("a name");
    params.not_after = rcgen::date_time_ymd(year, 1, 1);
    let key = rcgen::KeyPair::generate().expect("a key");
    dir.write(&format!("{name}.crt"), &params.self_signed(&key).expect("a certificate").pem());
    dir.write(&format!("{name}.key"), &key.serialize_pem());
}

#[test]
fn certificates_are_loaded_as_a_start_does() {
    let dir = TempDir::new();
    write_pair(&dir, "a", 4_000);
    write_pair(&dir, "b", 4_000);
    write_pair(&dir, "old", 2_001);
    let with = |cert: &str, key: &str| {
        let tls = format!("[listen.tls]\ncertificates = [{{ cert = \"{cert}.crt\", key = \"{key}.key\" }}]\n");
        dir.write("c.toml", &format!("{MINIMAL}[[listen]]\naddress = \"127.0.0.1:8443\"\n{tls}"));
        check(&dir, &["c.toml", "--deny-warnings"])
    };
    assert!(with("a", "a").0);
    let (is_valid, text) = with("a", "b");
    assert!(!is_valid && text.contains("listen[0].tls.certificates[0]") && text.contains("b.key"), "{text}");
    let (is_valid, text) = with("old", "old");
    assert!(!is_valid && text.contains("the certificate has expired on Mon, 01 Jan 2001"), "{text}");
    assert!(check(&dir, &["c.toml"]).0, "a warning");
}

#[test]
fn documents_are_read_from_standard_input_and_refused_in_yaml() {
    let dir = TempDir::new();
    let piped = |text: &str| {
        let mut command = tidegate();
        let command = command.args(["check", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a command");
        child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
        said(child.wait_with_output().expect("an end"))
    };
    assert!(piped(MINIMAL).0);
    let json = "{ \"version\": 1, \"upstreams\": { \"shop\": { \"endpoints\": [\"http://127.0.0.1:3000\"] } }, \
                \"routes\": [{ \"name\": \"all\", \"match\": { \"path\": \"/*\" }, \"upstream\": \"shop\" }] }";
    assert!(piped(json).0);
    let (is_valid, text) = piped("versio = 1\n");
    assert!(!is_valid && text.contains("standard input:1:1"), "{text}");
    dir.write("c.yaml", "version: 1\n");
    let (is_valid, text) = check(&dir, &["c.yaml"]);
    assert!(!is_valid && text.contains("c.yaml is YAML, which is not read") && text.contains("TOML"), "{text}");
    dir.write("c.json", "{ // the version\n\"version\": 1 }");
    let (is_valid, text) = check(&dir, &["c.json"]);
    assert!(!is_valid && text.contains("JSON has no comments"), "{text}");
    let (is_valid, text) = check(&dir, &["absent.toml"]);
    assert!(!is_valid && text.contains("cannot read absent.toml"), "{text}");
}

#[test]
fn defaults_of_absent_features_are_not_printed() {
    let dir = TempDir::new();
    dir.write("c.toml", MINIMAL);
    let printed = print(&dir, &["c.toml", "--defaults", "--origin"]);
    assert!(printed.contains("routes[0].cache.mode = \"standard\"  # default\n"), "{printed}");
    for absent in ["redirect", "respond", "cors", "auth"] {
        assert!(!printed.contains(&format!("routes[0].{absent}.")), "{absent}: {printed}");
    }
    assert!(!printed.contains("upstreams.shop.tls."), "{printed}");
    let with = "[[routes]]\nname = \"r\"\nmatch = { path = \"/r\" }\nredirect = { to = \"/s\" }\n";
    dir.write("c.toml", &format!("{}{with}", MINIMAL.replace("http:", "https:")));
    let printed = print(&dir, &["c.toml", "--defaults"]);
    for present in ["routes[1].redirect.status = 308\n", "upstreams.shop.tls.verify = true\n"] {
        assert!(printed.contains(present), "{present}: {printed}");
    }
}
