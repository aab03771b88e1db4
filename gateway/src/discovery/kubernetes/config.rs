//! Configuration of the access to the API server (`[kubernetes]`).

use std::path::{Path, PathBuf};
use std::time::Duration;

/// The directory with token, authorities and namespace of the service account of a pod.
pub(crate) const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// How the API server is reached, and for how long an answer of it is waited for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KubernetesConfig {
    pub(crate) access: KubernetesAccess,
    /// Limit for one page of a list, and for the head of the response to a watch.
    pub(crate) timeout: Duration,
    /// The longest time of one watch. The next one continues where it has ended.
    pub(crate) watch_timeout: Duration,
}

/// How the API server is reached. Files are read again for each new client.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KubernetesAccess {
    /// By its URL; `None`: this process is not in a cluster, and no URL is configured.
    Url {
        url: Option<String>,
        /// Authorities of its certificate in PEM; `None`: those of the system.
        ca: Option<PathBuf>,
        /// A bearer token; `None`: there is none.
        token: Option<PathBuf>,
    },
    /// As a file of `kubectl` says.
    Kubeconfig {
        path: PathBuf,
        /// `None`: the current one of the file.
        context: Option<String>,
    },
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        KubernetesConfig {
            access: KubernetesAccess::Url {
                url: None,
                ca: Some(Path::new(SERVICE_ACCOUNT).join("ca.crt")),
                token: Some(Path::new(SERVICE_ACCOUNT).join("token")),
            },
            timeout: Duration::from_secs(10),
            // The time after which a watch without data counts as dead: a minute of old endpoints,
            // and one request in a minute for each service.
            watch_timeout: Duration::from_secs(60),
        }
    }
}
