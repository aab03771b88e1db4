//! Clients of the API server, by the crate kube: TLS, the credentials of a pod, and files of
//! `kubectl` with their plugins.
//!
//! Token, authorities and kubeconfig are read again for each new client. There is a new one when
//! the token has changed and after each failure, so that rotated files take effect by themselves.

use std::cell::RefCell;
use std::path::Path;
use std::time::Duration;

use kube::Client;
use kube::client::ClientBuilder;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use tokio::time::timeout;

use super::api_error::{ApiError, error_chain};
use super::{KubernetesAccess, KubernetesConfig};

/// Longest time for making a client: a plugin of a kubeconfig may ask another service.
const BUILD_TIMEOUT: Duration = Duration::from_secs(30);

/// The client in use, of one thread.
pub(super) struct ClientCache {
    access: KubernetesAccess,
    timeout: Duration,
    /// The client, with the token that it sends.
    current: RefCell<Option<(Option<String>, Client)>>,
}

impl ClientCache {
    pub(super) fn new(config: &KubernetesConfig) -> Self {
        ClientCache { access: config.access.clone(), timeout: config.timeout, current: RefCell::default() }
    }

    /// A client with the current token. Cancel safe.
    pub(super) async fn client(&self) -> Result<Client, ApiError> {
        let token = read_token(&self.access)?;
        if let Some((used, client)) = &*self.current.borrow()
            && *used == token
        {
            return Ok(client.clone());
        }
        let mut config = match &self.access {
            KubernetesAccess::Url { url, ca, .. } => by_url(url.as_deref(), ca.as_deref(), token.as_deref())?,
            KubernetesAccess::Kubeconfig { path, context } => by_kubeconfig(path, context.as_deref()).await?,
        };
        config.connect_timeout = Some(self.timeout);
        config.write_timeout = Some(self.timeout);
        // The watches have delays of their own.
        config.default_retry = false;
        // A plugin is a process that is waited for: not on this thread, which serves other watches.
        let built = tokio::task::spawn_blocking(move || ClientBuilder::try_from(config).map(|builder| builder.build()));
        let client = match timeout(BUILD_TIMEOUT, built).await {
            Ok(Ok(Ok(client))) => client,
            Ok(Ok(Err(error))) => return Err(ApiError::Access(format!("no client: {}", error_chain(&error)))),
            Ok(Err(error)) => return Err(ApiError::Access(format!("no client: {error}"))),
            Err(_) => return Err(ApiError::Access("no client: the plugin of the kubeconfig does not end".to_owned())),
        };
        *self.current.borrow_mut() = Some((token, client.clone()));
        Ok(client)
    }

    /// The next request gets a new client.
    pub(super) fn forget(&self) {
        *self.current.borrow_mut() = None;
    }
}

/// The token of a file; `None` without one, or where a kubeconfig has the credentials.
fn read_token(access: &KubernetesAccess) -> Result<Option<String>, ApiError> {
    let KubernetesAccess::Url { token: Some(path), .. } = access else { return Ok(None) };
    match std::fs::read_to_string(path) {
        Ok(token) => Ok(Some(token.trim().to_owned())),
        Err(error) => Err(ApiError::Access(format!("cannot read the token {}: {error}", path.display()))),
    }
}

fn by_url(url: Option<&str>, ca: Option<&Path>, token: Option<&str>) -> Result<kube::Config, ApiError> {
    let url = url.ok_or_else(|| {
        ApiError::Access("not in a cluster: KUBERNETES_SERVICE_HOST is not set, nor is `kubernetes.url`".to_owned())
    })?;
    let url = url.parse::<http::Uri>().map_err(|error| ApiError::Access(format!("`kubernetes.url`: {error}")))?;
    let mut config = kube::Config::new(url);
    if let Some(ca) = ca {
        let unusable = |error: &dyn std::fmt::Display| {
            ApiError::Access(format!("cannot use the authorities {}: {error}", ca.display()))
        };
        let pem = std::fs::read(ca).map_err(|error| unusable(&error))?;
        let certificates = CertificateDer::pem_slice_iter(&pem).map(|der| der.map(|der| der.to_vec()));
        let certificates = certificates.collect::<Result<Vec<_>, _>>().map_err(|error| unusable(&error))?;
        if certificates.is_empty() {
            return Err(unusable(&"no certificate in the file"));
        }
        config.root_cert = Some(certificates);
    }
    config.auth_info.token = token.map(|token| token.to_owned().into());
    Ok(config)
}

async fn by_kubeconfig(path: &Path, context: Option<&str>) -> Result<kube::Config, ApiError> {
    let unusable = |error: &dyn std::error::Error| {
        ApiError::Access(format!("cannot use the kubeconfig {}: {}", path.display(), error_chain(error)))
    };
    let file = Kubeconfig::read_from(path).map_err(|error| unusable(&error))?;
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    kube::Config::from_custom_kubeconfig(file, &options).await.map_err(|error| unusable(&error))
}

/// Reads a kubeconfig to find its faults. Returns the namespace of the context.
///
/// # Errors
/// The fault of the file, without its content.
pub(crate) fn check_kubeconfig(path: &Path, context: Option<&str>) -> Result<Option<String>, String> {
    let file = Kubeconfig::read_from(path).map_err(|error| error_chain(&error))?;
    let Some(name) = context.or(file.current_context.as_deref()).filter(|name| !name.is_empty()) else {
        return Err("it has no current context: name one with `kubernetes.context`".to_owned());
    };
    let Some(named) = file.contexts.iter().find(|named| named.name == name) else {
        let known: Vec<&str> = file.contexts.iter().map(|named| &*named.name).collect();
        return Err(format!("it has no context `{name}`; it has: {}", known.join(", ")));
    };
    let context = named.context.as_ref().ok_or_else(|| format!("its context `{name}` is empty"))?;
    let cluster = file.clusters.iter().find(|named| named.name == context.cluster);
    let server = cluster.and_then(|named| named.cluster.as_ref()).and_then(|cluster| cluster.server.as_ref());
    match server {
        Some(_) => Ok(context.namespace.clone().filter(|namespace| !namespace.is_empty())),
        None => Err(format!("its cluster `{}` has no server", context.cluster)),
    }
}
