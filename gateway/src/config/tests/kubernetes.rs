//! Services of Kubernetes as endpoints, and the section `kubernetes`.

use std::path::Path;

use super::super::section::parse_endpoint;
use super::super::{Config, ConfigDocument, DocumentFormat};
use super::lines;

/// The faults of a document with one endpoint, read in a directory and with an environment.
fn faults(endpoint: &str, section: &str, (base, host): (&Path, Option<&str>)) -> Vec<String> {
    let text = format!(
        "version = 1\n[upstreams.shop]\nendpoints = [\"{endpoint}\"]\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n{section}"
    );
    let env = |name: &str| match name {
        "KUBERNETES_SERVICE_HOST" => host.map(str::to_owned),
        "KUBERNETES_SERVICE_PORT" => Some("443".to_owned()),
        _ => None,
    };
    let format = DocumentFormat::Toml;
    match Config::parse(&ConfigDocument { name: "test.toml", text: &text, format, base, env: &env }) {
        Ok((_, warnings)) => lines(&warnings),
        Err(report) => lines(&report),
    }
}

fn nowhere() -> (&'static Path, Option<&'static str>) {
    (Path::new(""), None)
}
const URL: &str = "[kubernetes]\nurl = \"https://10.0.0.1:6443\"\n";

#[test]
fn services_have_a_name_a_namespace_and_a_port() {
    for url in [
        "kubernetes://shop.default:http",
        "kubernetes+https://shop.default:8443",
        "kubernetes+h2c://shop.my-team",
        "kubernetes://shop:http",
    ] {
        assert_eq!(parse_endpoint(url).expect(url).to_string(), url);
    }
    assert_eq!(
        parse_endpoint("kubernetes://Shop.Default:80/").expect("a service").to_string(),
        "kubernetes://shop.default:80"
    );
    let secure = parse_endpoint("kubernetes+https://shop.default:https").expect("a service");
    assert_eq!((&*secure.certificate_name(), secure.authority()), ("shop.default.svc", "shop.default.svc".to_owned()));
    for (url, reason) in [
        ("kubernetes://shop.default.svc:http", "it has more than a service and a namespace"),
        ("kubernetes://", "a name has letters, digits and `-` only"),
        ("kubernetes://shop.:80", "a name has letters, digits and `-` only"),
        ("kubernetes://sh_op.default", "a name has letters, digits and `-` only"),
        ("kubernetes://-shop.default", "a name has letters, digits and `-` only"),
        ("kubernetes://me@shop.default", "a name has letters, digits and `-` only"),
        ("kubernetes://shop.default/path", "a name has letters, digits and `-` only"),
        ("kubernetes://shop.default:0", "its port is not 1 to 65535"),
        ("kubernetes://shop.default:70000", "its port is not 1 to 65535"),
        ("kubernetes://shop.default:", "its port is neither a name nor a number"),
        ("kubernetes://shop.default:http/x", "its port is neither a name nor a number"),
    ] {
        let problem = parse_endpoint(url).expect_err(url);
        assert_eq!(problem.message, format!("not a service of Kubernetes: {reason}"), "{url}");
        assert!(problem.hint.as_deref().is_some_and(|hint| hint.contains("kubernetes://SERVICE.NAMESPACE:PORT")));
    }
    assert!(Config::for_upstream("kubernetes://shop.default:http", None).is_err());
}

#[cfg(not(feature = "kubernetes"))]
#[test]
fn binary_without_the_feature_refuses_services() {
    let found = faults("kubernetes://shop.default:http", URL, nowhere());
    assert_eq!(found.len(), 1, "{found:#?}");
    assert!(
        found[0].contains("this binary has no discovery by Kubernetes") && found[0].contains("make build"),
        "{found:#?}"
    );
    assert_eq!(faults("http://127.0.0.1:3000", URL, nowhere()), [""; 0]);
}

#[cfg(feature = "kubernetes")]
#[test]
fn namespace_and_server_are_to_be_known() {
    let starts = |found: &[String], wanted: &[&str]| {
        assert_eq!(found.len(), wanted.len(), "{found:#?}");
        found.iter().zip(wanted).for_each(|(found, wanted)| assert!(found.contains(wanted), "{found}: {wanted}"));
    };
    let service = "kubernetes://shop.default:http";
    starts(&faults(service, URL, nowhere()), &[]);
    starts(&faults(service, "", nowhere()), &["no API server is known: KUBERNETES_SERVICE_HOST is not set"]);
    let unread = ["cannot read the authorities of the service account", "cannot read the token of the service account"];
    starts(&faults(service, "", (Path::new(""), Some("fd00::1"))), &unread);
    starts(&faults("kubernetes://shop:http", URL, nowhere()), &["has no namespace, and this process is in no pod"]);
    starts(&faults("kubernetes://shop:http", &format!("{URL}namespace = \"default\"\n"), nowhere()), &[]);
}

#[cfg(feature = "kubernetes")]
#[test]
fn service_with_and_without_its_namespace_is_a_duplicate() {
    let of =
        |endpoints: &str, namespace: &str| faults(endpoints, &format!("{URL}namespace = \"{namespace}\"\n"), nowhere());
    for both in
        ["kubernetes://shop:http\", \"kubernetes://shop.a:http", "kubernetes://shop.a:http\", \"kubernetes://shop:http"]
    {
        let found = of(both, "a");
        assert!(found.len() == 1 && found[0].contains("shop.endpoints: duplicate endpoint: "), "{found:#?}");
        assert_eq!(of(both, "b"), [""; 0]);
    }
    let found = of("kubernetes://shop:http\", \"kubernetes://shop:http", "a");
    assert!(found.len() == 1 && found[0].ends_with("duplicate endpoint"), "once: {found:#?}");
}

#[test]
fn access_is_checked_with_its_files() {
    let dir = std::env::temp_dir().join(format!("tidegate-kubernetes-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    std::fs::write(dir.join("ca.crt"), "no certificate").expect("a file");
    std::fs::write(dir.join("token"), "t").expect("a file");
    let of = |section: &str| faults("http://127.0.0.1:3000", section, (&dir, None));
    for (section, wanted) in [
        ("[kubernetes]\nurl = \"10.0.0.1\"", "not the URL of an API server"),
        ("[kubernetes]\nurl = \"https://me:secret@10.0.0.1\"", "leave out query, fragment and user"),
        ("[kubernetes]\nurl = \"http://10.0.0.1\"\ntoken_file = \"token\"", "`token_file` is not used over `http`"),
        ("[kubernetes]\nurl = \"https://10.0.0.1\"\nca = \"ca.crt\"", "no certificate in PEM"),
        ("[kubernetes]\nurl = \"https://10.0.0.1\"\nca = \"none.crt\"", "cannot read"),
        ("[kubernetes]\nurl = \"https://10.0.0.1\"\ncontext = \"lab\"", "`context` has no effect without `kubeconfig`"),
        ("[kubernetes]\nkubeconfig = \"none\"", "cannot read"),
        ("[kubernetes]\nwatch_timeout = \"500ms\"", "expected a duration, 1s to 1h"),
        ("[kubernetes]\ntoken = \"secret\"", "unknown key `token`"),
    ] {
        let found = of(section);
        assert!(found.iter().any(|found| found.contains(wanted)), "{section}: {found:#?}");
        assert!(!found.concat().contains("secret@"), "{found:#?}");
    }
    std::fs::remove_dir_all(&dir).expect("removed");
}

#[cfg(feature = "kubernetes")]
#[test]
fn kubeconfigs_are_checked_and_name_the_namespace() {
    let dir = std::env::temp_dir().join(format!("tidegate-kubeconfig-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).expect("a file");
    let clusters = "clusters: [{ name: lab, cluster: { server: 'https://10.0.0.1' } }, { name: bare, cluster: {} }]\n";
    let contexts = "contexts: [{ name: one, context: { cluster: lab, user: me, namespace: shops } }, \
                    { name: two, context: { cluster: bare, user: me } }]\n";
    write("good", &format!("current-context: one\n{clusters}{contexts}"));
    write("none", &format!("{clusters}{contexts}"));
    write("wrong", "token: [secret\n");
    let of = |keys: &str| faults("kubernetes://shop:http", &format!("[kubernetes]\n{keys}\n"), (&dir, None));
    assert_eq!(of("kubeconfig = \"good\""), [""; 0]);
    assert_eq!(of("kubeconfig = \"none\"\ncontext = \"one\""), [""; 0]);
    for (keys, wanted) in [
        ("kubeconfig = \"none\"", "it has no current context"),
        ("kubeconfig = \"good\"\ncontext = \"three\"", "it has no context `three`; it has: one, two"),
        ("kubeconfig = \"good\"\ncontext = \"two\"", "its cluster `bare` has no server"),
        ("kubeconfig = \"wrong\"", "cannot use the kubeconfig"),
        ("kubeconfig = \"good\"\nurl = \"https://10.0.0.1\"", "`url` has no effect with `kubeconfig`"),
    ] {
        let found = of(keys);
        assert!(found.iter().any(|found| found.contains(wanted)), "{keys}: {found:#?}");
        assert!(!found.concat().contains("secret"), "{found:#?}");
    }
    std::fs::remove_dir_all(&dir).expect("removed");
}
