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

/// The missing variable is the fault; the missing token is its consequence.
#[test]
fn a_missing_variable_is_reported_once() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cookbook/kubernetes.toml");
    let (is_valid, text) =
        said(tidegate().env_remove("ADMIN_TOKEN").args(["check", example]).output().expect("a command"));
    assert!(!is_valid && text.contains("ADMIN_TOKEN"), "{text}");
    assert!(!text.contains("without a token"), "{text}");
}

/// Which of several files cannot be used is part of the message.
#[test]
fn unusable_files_of_tls_are_named() {
    let dir = TempDir::new();
    write_pair(&dir, "a", 4_000);
    write_pair(&dir, "b", 4_000);
    dir.write("empty.pem", "no certificate");
    let upstream = MINIMAL.replace("http://127.0.0.1", "https://127.0.0.1");
    let redis = "[redis.regions.default]\nendpoints = [\"rediss://127.0.0.1:1\"]\n[redis.tls]\n";
    for (base, keys, want) in [
        (&upstream, "[upstreams.shop.tls]\nca = \"empty.pem\"\n", "empty.pem: no certificate in the file"),
        (&upstream, "[upstreams.shop.tls]\ncert = \"empty.pem\"\nkey = \"a.key\"\n", "empty.pem: no certificate"),
        (&upstream, "[upstreams.shop.tls]\ncert = \"a.crt\"\nkey = \"empty.pem\"\n", "empty.pem: not a"),
        (&upstream, "[upstreams.shop.tls]\ncert = \"a.crt\"\nkey = \"b.key\"\n", "b.key: unusable"),
        (&MINIMAL.to_owned(), &format!("{redis}ca = \"empty.pem\"\n"), "empty.pem contains no PEM certificate"),
    ] {
        let text = format!("{base}{keys}");
        let (is_valid, said) = check(&dir, &[dir.write("tidegate.toml", &text).to_str().expect("a path")]);
        assert!(!is_valid && said.contains(want), "{keys}: {said}");
    }
}

#[test]
fn largest_tables_of_limits_are_checked_without_their_memory() {
    let dir = TempDir::new();
    let limit = "[limits.a]\ntier = \"device\"\nrate = \"10/s\"\nburst = 10\nkeys = 16777216\n";
    dir.write("c.toml", &format!("{MINIMAL}limits = [\"a\"]\n{limit}"));
    // Each has a GiB.
    let command = format!("ulimit -v 800000; exec {:?} check c.toml", tidegate().get_program());
    let (is_valid, text) =
        said(Command::new("sh").args(["-c", &command]).current_dir(dir.path()).output().expect("sh"));
    assert!(is_valid, "{text}");
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
    // Nothing but the text shows the format.
    for (text, hint) in [
        ("# c\n---\nversion: 1\nupstreams:\n  shop: {}\n", "this looks like YAML"),
        ("// c\n{ \"version\": 1 }\n", "comments of TOML begin with `#`"),
    ] {
        let (is_valid, said) = piped(text);
        assert!(!is_valid && said.contains(hint), "{said}");
    }
    dir.write("c.conf", json);
    let (is_valid, text) = check(&dir, &["c.conf"]);
    assert!(!is_valid && text.contains("give the file the extension `.json`"), "{text}");
    let (_, text) = piped("version = 1\nversion = : 2\n");
    assert!(!text.contains("looks like"), "{text}");
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
    assert!(printed.contains("\ncache.mode = \"standard\"  # default\n"), "{printed}");
    for absent in ["redirect", "respond", "cors", "auth"] {
        assert!(!printed.contains(&format!("\n{absent}.")), "{absent}: {printed}");
    }
    assert!(!printed.contains("upstreams.shop.tls."), "{printed}");
    // It has an effect once `tracing.otlp` is there, of which the default is printed too.
    assert!(printed.contains("\ntracing.ratio = 1.0  # default\n"), "{printed}");
    let with = "[[routes]]\nname = \"r\"\nmatch = { path = \"/r\" }\nredirect = { to = \"/s\" }\n";
    dir.write("c.toml", &format!("{}{with}", MINIMAL.replace("http:", "https:")));
    let printed = print(&dir, &["c.toml", "--defaults"]);
    for present in ["\nredirect.status = 308\n", "\nupstreams.shop.tls.verify = true\n"] {
        assert!(printed.contains(present), "{present}: {printed}");
    }
}

/// A pipe whose reader has gone, as `head` leaves it.
fn closed_pipe() -> std::io::PipeWriter {
    std::io::pipe().expect("a pipe").1
}

#[test]
fn commands_end_quietly_when_their_reader_has_gone() {
    let dir = TempDir::new();
    dir.write("good.toml", MINIMAL);
    dir.write("bad.toml", "version = 2\nx = 1\n");
    let port = support::free_address().to_string();
    let one_option = "--help";
    for (arguments, is_success) in [
        (&["check", "good.toml"][..], true),
        (&["check", "bad.toml"], false),
        (&["check", "bad.toml", "--json"], false),
        (&["check", "none.toml"], false),
        (&["config", "print", "good.toml", "--defaults"], true),
        (&["config", "print", "bad.toml"], false),
        (&["config", "schema"], true),
        (&["completions", "bash"], true),
        (&["man"], true),
        (&["man", "no"], false),
        (&["key", "ann"], true),
        (&["password", "ann"], true),
        (&["purge", "--all", "--admin", &port], false),
        (&["top", "--admin", &port], false),
        (&["run", "--config", "bad.toml"], false),
        (&["run", one_option], true),
        (&["no-command"], false),
    ] {
        let mut command = tidegate();
        let command = command.args(arguments).current_dir(dir.path()).stdout(closed_pipe()).stderr(closed_pipe());
        let mut child = command.stdin(Stdio::piped()).spawn().expect("a command");
        let mut input = child.stdin.take().expect("stdin is piped");
        // A command that does not read it may have ended.
        drop(input.write_all(b"a password\n"));
        drop(input);
        let status = child.wait().expect("an exit");
        assert_eq!(status.success(), is_success, "{arguments:?}: {status}");
        assert_ne!(status.code(), Some(101), "{arguments:?} panicked");
    }
}

#[test]
fn manual_pages_exist_for_commands_at_every_depth() {
    let man = |names: &[&str]| said(tidegate().arg("man").args(names).output().expect("a command"));
    for (names, expected) in [
        (&["config"][..], "tidegate\\-config"),
        (&["config", "print"], "effective value"),
        (&["run"], "Configuration file"),
    ] {
        let (is_success, text) = man(names);
        assert!(is_success && text.contains(expected), "{names:?}: {text}");
    }
    assert!(!man(&["config", "no"]).0 && !man(&["run", "print"]).0);
    // Each page names the program and its version as its source.
    for names in [&[][..], &["purge"], &["config", "print"]] {
        let source = format!("\"tidegate {}\"", env!("CARGO_PKG_VERSION"));
        let (_, text) = man(names);
        assert!(text.lines().any(|line| line.starts_with(".TH ") && line.contains(&source)), "{names:?}: {text}");
    }
}

#[test]
fn printed_configuration_is_checked_from_standard_input() {
    let dir = TempDir::new();
    dir.write(
        "c.toml",
        &format!(
            "{MINIMAL}auth = {{ forward = \"http://127.0.0.1:4000/verify?key=query-secret\" }}\n\
             [[routes]]\nname = \"other\"\nmatch = {{ path = \"/o\", headers = {{ x-edge-auth = \"header-secret\" }} }}\n\
             upstream = \"shop\"\n[admin]\ntoken = \"${{ADMIN_SECRET}}\"\n[identity]\nsecret = \"literal-secret-of-24-bytes\"\n"
        ),
    );
    let printed = |arguments: &[&str], input: &str| {
        let mut command = tidegate();
        let command = command.args(arguments).current_dir(dir.path()).env("ADMIN_SECRET", "admin-secret-of-the-test");
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = piped.spawn().expect("a command");
        child.stdin.take().expect("stdin is piped").write_all(input.as_bytes()).expect("a reader");
        said(child.wait_with_output().expect("an exit"))
    };
    for more in [&[][..], &["--defaults"], &["--origin"], &["--defaults", "--origin"]] {
        let (is_valid, text) = printed(&[&["config", "print", "c.toml"], more].concat(), "");
        assert!(is_valid && !text.contains("-secret"), "{text}");
        assert!(text.contains("admin.token = \"${ADMIN_SECRET}\""), "{text}");
        let (is_valid, report) = printed(&["check", "-"], &text);
        assert!(is_valid, "{report}\n{text}");
        assert_eq!(
            printed(&[&["config", "print", "-"], more].concat(), &text).1.matches('=').count(),
            text.matches('=').count()
        );
    }
}

#[test]
fn client_certificates_of_upstreams_are_loaded() {
    let dir = TempDir::new();
    write_pair(&dir, "a", 4_000);
    write_pair(&dir, "b", 4_000);
    write_pair(&dir, "old", 2_001);
    let with = |tls: &str| {
        let config =
            MINIMAL.replace("http://127.0.0.1:3000\"]", &format!("https://127.0.0.1:3000\"]\ntls = {{ {tls} }}"));
        dir.write("c.toml", &config);
        check(&dir, &["c.toml", "--deny-warnings"])
    };
    assert!(with("cert = \"a.crt\", key = \"a.key\", ca = \"b.crt\"").0);
    for (tls, expected) in [
        ("cert = \"a.crt\", key = \"b.key\"", "keys may not be consistent"),
        ("cert = \"a.key\", key = \"a.key\"", "upstreams.shop.tls"),
        ("cert = \"none.crt\", key = \"a.key\"", "cannot read"),
        ("cert = \"old.crt\", key = \"old.key\"", "old.crt: the certificate has expired on Mon, 01 Jan 2001"),
        ("ca = \"old.crt\"", "old.crt: the certificate has expired on Mon, 01 Jan 2001"),
    ] {
        let (is_valid, text) = with(tls);
        assert!(!is_valid && text.contains(expected), "{tls}: {text}");
    }
    let certificates = "certificates = [{ cert = \"a.crt\", key = \"a.key\" }]\nclient_ca = \"old.crt\"\n";
    dir.write("c.toml", &format!("{MINIMAL}[[listen]]\naddress = \"127.0.0.1:8443\"\n[listen.tls]\n{certificates}"));
    let (is_valid, text) = check(&dir, &["c.toml", "--deny-warnings"]);
    assert!(!is_valid && text.contains("listen[0].tls.client_ca") && text.contains("has expired"), "{text}");
}

#[test]
fn names_of_this_machine_are_compared_with_the_listeners() {
    let dir = TempDir::new();
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("a name");
    let warns = |endpoint: &str, listen: &str, more: &str| {
        let config = MINIMAL.replace("http://127.0.0.1:3000", endpoint);
        dir.write("c.toml", &format!("{config}{more}[[listen]]\naddress = \"{listen}\"\n"));
        let (_, text) = check(&dir, &["c.toml"]);
        text.contains("is this gateway")
    };
    for (endpoint, listen, expected) in [
        ("http://localhost:8080", "127.0.0.1:8080", true),
        ("http://LOCALHOST:8080", "[::1]:8080", true),
        ("http://app.localhost:8080", "0.0.0.0:8080", true),
        ("http://[::1]:8080", "[::]:8080", true),
        (&*format!("http://{}:8080", own.trim_end()), "0.0.0.0:8080", true),
        ("http://localhost:8081", "127.0.0.1:8080", false),
        ("http://localhost:8080", "192.0.2.1:8080", false),
        ("http://shop.example:8080", "0.0.0.0:8080", false),
    ] {
        assert_eq!(warns(endpoint, listen, ""), expected, "{endpoint} {listen}");
    }
    let auth = "auth = { forward = \"http://localhost:8080/verify\" }\n";
    assert!(warns("http://127.0.0.1:3000", "127.0.0.1:8080", auth), "a verification service");
}
