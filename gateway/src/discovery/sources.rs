//! The sources that endpoints of a configuration name, and what they share: the resolver of names,
//! and the watches of Kubernetes.

use std::rc::Rc;
use std::time::Duration;

use super::dns::{DnsConfig, DnsSource, NameResolver};
use super::kubernetes::KubernetesConfig;
#[cfg(feature = "kubernetes")]
use super::kubernetes::{KubernetesSource, KubernetesWatches};
use super::{EndpointSource, LookupError, SourceAnswer};
use crate::endpoint::EndpointAddress;
use crate::tasks::TaskWait;

/// Makes the sources of one configuration.
pub(crate) struct EndpointSources {
    resolver: Rc<NameResolver>,
    kubernetes: KubernetesConfig,
    #[cfg(feature = "kubernetes")]
    watches: Rc<KubernetesWatches>,
}

/// The source of a name or of a service.
#[derive(Clone)]
pub(crate) enum NamedSource {
    Dns(DnsSource),
    #[cfg(feature = "kubernetes")]
    Kubernetes(KubernetesSource),
}

impl EndpointSources {
    pub(crate) fn new(dns: &DnsConfig, kubernetes: &KubernetesConfig) -> Self {
        EndpointSources {
            resolver: Rc::new(NameResolver::new(dns.clone())),
            kubernetes: kubernetes.clone(),
            #[cfg(feature = "kubernetes")]
            watches: Rc::new(KubernetesWatches::new(kubernetes.clone())),
        }
    }

    /// The sources of another configuration; `None` if it is the same. Unchanged parts are
    /// taken over.
    pub(crate) fn changed(&self, dns: &DnsConfig, kubernetes: &KubernetesConfig) -> Option<Self> {
        let (is_same_dns, is_same_kubernetes) = (self.resolver.config() == dns, self.kubernetes == *kubernetes);
        if is_same_dns && is_same_kubernetes {
            return None;
        }
        let mut changed = EndpointSources::new(dns, kubernetes);
        if is_same_dns {
            changed.resolver = Rc::clone(&self.resolver);
        }
        #[cfg(feature = "kubernetes")]
        if is_same_kubernetes {
            changed.watches = Rc::clone(&self.watches);
        }
        Some(changed)
    }

    /// The source of an item of `endpoints` that is no address.
    pub(crate) fn source(&self, origin: &EndpointAddress, own_zone: Option<&str>) -> NamedSource {
        #[cfg(feature = "kubernetes")]
        if origin.scheme.is_kubernetes() {
            return NamedSource::Kubernetes(self.watches.source(origin, own_zone.map(str::to_owned)));
        }
        // DNS knows no zones. Without the feature, the configuration has no services of Kubernetes.
        let _used_by_kubernetes = own_zone;
        NamedSource::Dns(DnsSource::new(Rc::clone(&self.resolver), origin.clone()))
    }
}

impl NamedSource {
    /// The limit of one lookup.
    pub(crate) fn limit(&self) -> Duration {
        match self {
            NamedSource::Dns(source) => source.limit(),
            #[cfg(feature = "kubernetes")]
            NamedSource::Kubernetes(source) => source.limit(),
        }
    }
}

impl EndpointSource for NamedSource {
    fn waits_for(&self) -> TaskWait {
        match self {
            NamedSource::Dns(source) => source.waits_for(),
            #[cfg(feature = "kubernetes")]
            NamedSource::Kubernetes(source) => source.waits_for(),
        }
    }

    async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
        match self {
            NamedSource::Dns(source) => source.lookup().await,
            #[cfg(feature = "kubernetes")]
            NamedSource::Kubernetes(source) => source.lookup().await,
        }
    }

    async fn wait(&mut self, delay: Duration) {
        match self {
            NamedSource::Dns(source) => source.wait(delay).await,
            #[cfg(feature = "kubernetes")]
            NamedSource::Kubernetes(source) => source.wait(delay).await,
        }
    }
}
