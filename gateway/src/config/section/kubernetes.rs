//! `[kubernetes]`: how the API server is reached, and the namespace of services without one.

use std::path::{Path, PathBuf};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use url::Url;

use super::super::constraints;
use super::super::fault::{ConfigProblem, DocumentLocation, FaultCode};
use super::super::read_context::Located;
use super::super::table_reader::TableReader;
use super::super::value_kind::{AnyString, DurationRange, ParsedString};
use super::bounds::{HOUR, MS, SECOND};
use super::{files, formats};
use crate::discovery::kubernetes::{self, KubernetesAccess, KubernetesConfig, SERVICE_ACCOUNT};
use crate::upstream::UpstreamConfig;

const API_URL: ParsedString<String> = ParsedString {
    name: "a URL such as \"https://10.0.0.1:6443\"",
    pattern: "",
    parse: parse_url,
    format: String::clone,
};

/// The section, with what its endpoints need of it.
pub(super) struct KubernetesSection {
    pub(super) config: KubernetesConfig,
    /// The namespace of services without one; `None`: it is not known.
    namespace: Option<String>,
    at: DocumentLocation,
}

pub(super) fn read(root: &TableReader<'_>) -> KubernetesSection {
    root.table("kubernetes", |table| {
        let default = KubernetesConfig::default();
        table.constraint(constraints::excludes("kubeconfig", &["url", "ca", "token_file"]));
        table.constraint(constraints::needs("context", "kubeconfig"));
        let url = table.optional("url", &API_URL);
        let [ca, token, kubeconfig] = ["ca", "token_file", "kubeconfig"].map(|key| files::optional_path(table, key));
        let context = table.optional("context", &AnyString);
        let namespace = table.optional("namespace", &formats::NAME).map(|namespace| namespace.value);
        let timeout = table.value_or("timeout", &DurationRange(100 * MS..=60 * SECOND), default.timeout);
        let watch_timeout = table.value_or("watch_timeout", &DurationRange(SECOND..=HOUR), default.watch_timeout);
        let (access, found) = match kubeconfig {
            Some(path) => by_kubeconfig(table, path, context),
            None => {
                if let Some(context) = &context {
                    let problem = ConfigProblem::bad_value("`context` has no effect without `kubeconfig`");
                    table.context.error(&context.at, problem);
                }
                by_url(table, url, [ca, token])
            }
        };
        let config = KubernetesConfig { access, timeout, watch_timeout };
        KubernetesSection { config, namespace: namespace.or(found), at: table.at.clone() }
    })
}

fn by_kubeconfig(
    table: &TableReader<'_>,
    path: Located<PathBuf>,
    context: Option<Located<String>>,
) -> (KubernetesAccess, Option<String>) {
    for key in ["url", "ca", "token_file"].into_iter().filter(|key| table.has(key)) {
        let problem = ConfigProblem::bad_value(format!("`{key}` has no effect with `kubeconfig`"));
        table.context.error(&table.location_of(&[key]), problem.hint("the kubeconfig has address and credentials"));
    }
    files::check_file(table, &path);
    let context = context.map(|context| context.value);
    let namespace = check_kubeconfig(table, &path, context.as_deref());
    (KubernetesAccess::Kubeconfig { path: path.value, context }, namespace)
}

/// The namespace of the context. Faults are reported.
fn check_kubeconfig(table: &TableReader<'_>, path: &Located<PathBuf>, context: Option<&str>) -> Option<String> {
    if !path.value.is_file() {
        return None;
    }
    #[cfg(feature = "kubernetes")]
    match kubernetes::check_kubeconfig(&path.value, context) {
        Ok(namespace) => return namespace.or_else(|| Some("default".to_owned())),
        Err(reason) => {
            let message = format!("cannot use the kubeconfig {}: {reason}", path.value.display());
            table.context.error(&path.at, ConfigProblem::new(FaultCode::File, message));
        }
    }
    #[cfg(not(feature = "kubernetes"))]
    let _read_by_kube_alone = (table, context);
    None
}

fn by_url(
    table: &TableReader<'_>,
    url: Option<Located<String>>,
    [ca, token]: [Option<Located<PathBuf>>; 2],
) -> (KubernetesAccess, Option<String>) {
    for file in [&ca, &token].into_iter().flatten() {
        files::check_file(table, file);
    }
    if let Some(ca) = &ca {
        check_authorities(table, ca);
    }
    let is_plain = url.as_ref().is_some_and(|url| url.value.starts_with("http:"));
    for (key, file) in [("ca", &ca), ("token_file", &token)] {
        if let Some(file) = file.as_ref().filter(|_| is_plain) {
            let problem = ConfigProblem::bad_value(format!("`{key}` is not used over `http`"));
            table.context.error(&file.at, problem.hint("write \"https://...\": a token is never sent in clear text"));
        }
    }
    let [ca, token] = [ca, token].map(|file| file.map(|file| file.value));
    if let Some(url) = url {
        return (KubernetesAccess::Url { url: Some(url.value), ca, token }, None);
    }
    let account = Path::new(SERVICE_ACCOUNT);
    let namespace = std::fs::read_to_string(account.join("namespace")).ok().map(|text| text.trim().to_owned());
    let access = KubernetesAccess::Url {
        url: url_of_cluster(table.context.environment.variable),
        ca: ca.or_else(|| Some(account.join("ca.crt"))),
        token: token.or_else(|| Some(account.join("token"))),
    };
    (access, namespace.filter(|namespace| !namespace.is_empty()))
}

/// The API server of the cluster that this process runs in.
fn url_of_cluster(variable: &dyn Fn(&str) -> Option<String>) -> Option<String> {
    let value = |name| variable(name).filter(|value| !value.is_empty());
    let (host, port) = (value("KUBERNETES_SERVICE_HOST")?, value("KUBERNETES_SERVICE_PORT")?);
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    Some(format!("https://{host}:{port}"))
}

fn check_authorities(table: &TableReader<'_>, ca: &Located<PathBuf>) {
    let Ok(pem) = std::fs::read(&ca.value) else { return };
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    if certificates.is_ok_and(|certificates| !certificates.is_empty()) {
        return;
    }
    let message = format!("no certificate in PEM in {}", ca.value.display());
    table.context.error(&ca.at, ConfigProblem::new(FaultCode::File, message));
}

/// A URL of an API server: it may have a path, as behind a proxy of several clusters.
fn parse_url(text: &str) -> Result<String, ConfigProblem> {
    let bad = |hint: &str| ConfigProblem::bad_value("not the URL of an API server").hint(hint);
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    let url =
        url.ok_or_else(|| bad("write \"https://HOST:6443\", or \"http://127.0.0.1:8001\" for `kubectl proxy`"))?;
    let has_credentials = !url.username().is_empty() || url.password().is_some();
    if url.query().is_some() || url.fragment().is_some() || has_credentials {
        return Err(bad("leave out query, fragment and user; credentials belong in `token_file` or a kubeconfig"));
    }
    Ok(text.trim_end_matches('/').to_owned())
}

/// Adds the namespace to the services of `upstreams` that have none, and checks that this binary
/// can discover them, and that none is named twice, with its namespace and without.
pub(super) fn complete(
    section: &KubernetesSection,
    upstreams: &mut [(UpstreamConfig, DocumentLocation)],
    root: &TableReader<'_>,
) {
    let mut has_services = false;
    for (upstream, at) in upstreams {
        let written = upstream.endpoints.clone();
        for endpoint in upstream.endpoints.iter_mut().filter(|endpoint| endpoint.scheme.is_kubernetes()) {
            let at = DocumentLocation { path: format!("{}.endpoints", at.path), span: at.span.clone() };
            if !kubernetes::IS_AVAILABLE {
                let message = format!("this binary has no discovery by Kubernetes, which {endpoint} needs");
                let problem = ConfigProblem::new(FaultCode::Unavailable, message);
                root.context.error(&at, problem.hint("use the released binary or the image, or build with `make build` (`cargo build --features gateway/kubernetes`)"));
                return;
            }
            has_services = true;
            if endpoint.host.contains('.') {
                continue;
            }
            match &section.namespace {
                Some(namespace) => endpoint.host = format!("{}.{namespace}", endpoint.host),
                None => {
                    let message = format!("{endpoint} has no namespace, and this process is in no pod");
                    let problem = ConfigProblem::new(FaultCode::Missing, message);
                    root.context.error(
                        &at,
                        problem.hint("write \"kubernetes://SERVICE.NAMESPACE:PORT\", or set `kubernetes.namespace`"),
                    );
                }
            }
        }
        for (index, endpoint) in upstream.endpoints.iter().enumerate() {
            let is_same = |earlier: &usize| upstream.endpoints[*earlier] == *endpoint;
            // Equal ones are reported where they are read.
            if let Some(earlier) = (0..index).find(is_same).filter(|earlier| written[*earlier] != written[index]) {
                let at = DocumentLocation { path: format!("{}.endpoints", at.path), span: at.span.clone() };
                let message = format!("duplicate endpoint: {} is {}", written[index], written[earlier]);
                root.context.error(&at, ConfigProblem::new(FaultCode::Duplicate, message));
            }
        }
    }
    if has_services {
        check_access(section, root);
    }
}

/// Warns where the API server cannot be reached as configured. The same file may be checked outside
/// of the cluster that it is for.
fn check_access(section: &KubernetesSection, root: &TableReader<'_>) {
    let KubernetesAccess::Url { url, ca, token } = &section.config.access else { return };
    if url.is_none() {
        let message = "no API server is known: KUBERNETES_SERVICE_HOST is not set";
        let problem = ConfigProblem::new(FaultCode::Risk, message);
        let hint =
            "outside of a cluster, set `kubernetes.kubeconfig` or `kubernetes.url`; no endpoint is found until then";
        return root.context.warning(&section.at, problem.hint(hint));
    }
    for (what, file) in [("the authorities", ca), ("the token", token)] {
        if let Some(file) = file.as_ref().filter(|file| std::fs::File::open(file).is_err()) {
            let message = format!("cannot read {what} of the service account: {}", file.display());
            let problem = ConfigProblem::new(FaultCode::Risk, message);
            let hint = "let the pod mount its token (`automountServiceAccountToken`), or set `kubernetes.ca` and `kubernetes.token_file`";
            root.context.warning(&section.at, problem.hint(hint));
        }
    }
}
