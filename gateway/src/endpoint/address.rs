//! The address of an endpoint as the configuration writes it.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Scheme of an endpoint: how its address is found and which protocol it speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EndpointScheme {
    /// HTTP/1.1 in clear text.
    Http,
    /// HTTP over TLS, in the version that both ends prefer.
    Https,
    /// HTTP/2 in clear text, with prior knowledge.
    H2c,
    /// A service whose servers are in SRV records, reached as by `Http`.
    Srv,
    /// Such a service, reached as by `Https`.
    SrvHttps,
    /// A service of Kubernetes whose servers are in EndpointSlices, reached as by `Http`.
    Kubernetes,
    /// Such a service, reached as by `Https`.
    KubernetesHttps,
    /// Such a service, reached as by `H2c`.
    KubernetesH2c,
}

impl EndpointScheme {
    pub(crate) const ALL: [EndpointScheme; 8] = [
        EndpointScheme::Http,
        EndpointScheme::Https,
        EndpointScheme::H2c,
        EndpointScheme::Srv,
        EndpointScheme::SrvHttps,
        EndpointScheme::Kubernetes,
        EndpointScheme::KubernetesHttps,
        EndpointScheme::KubernetesH2c,
    ];

    /// Whether the servers speak TLS.
    pub(crate) fn has_tls(self) -> bool {
        matches!(self, EndpointScheme::Https | EndpointScheme::SrvHttps | EndpointScheme::KubernetesHttps)
    }

    /// Whether the servers speak HTTP/2 in clear text.
    pub(crate) fn is_h2c(self) -> bool {
        matches!(self, EndpointScheme::H2c | EndpointScheme::KubernetesH2c)
    }

    /// Whether the servers are in SRV records.
    pub(crate) fn is_service(self) -> bool {
        matches!(self, EndpointScheme::Srv | EndpointScheme::SrvHttps)
    }

    /// Whether the servers are in EndpointSlices of Kubernetes.
    pub(crate) fn is_kubernetes(self) -> bool {
        matches!(self, EndpointScheme::Kubernetes | EndpointScheme::KubernetesHttps | EndpointScheme::KubernetesH2c)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            EndpointScheme::Http => "http",
            EndpointScheme::Https => "https",
            EndpointScheme::H2c => "h2c",
            EndpointScheme::Srv => "srv",
            EndpointScheme::SrvHttps => "srv+https",
            EndpointScheme::Kubernetes => "kubernetes",
            EndpointScheme::KubernetesHttps => "kubernetes+https",
            EndpointScheme::KubernetesH2c => "kubernetes+h2c",
        }
    }

    /// The port of a URL without one; `None` where the records or slices name it.
    pub(crate) fn default_port(self) -> Option<u16> {
        match self {
            EndpointScheme::Http | EndpointScheme::H2c => Some(80),
            EndpointScheme::Https => Some(443),
            EndpointScheme::Srv
            | EndpointScheme::SrvHttps
            | EndpointScheme::Kubernetes
            | EndpointScheme::KubernetesHttps
            | EndpointScheme::KubernetesH2c => None,
        }
    }
}

/// One item of `endpoints`: a server, a name with any number of servers, or a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EndpointAddress {
    pub(crate) scheme: EndpointScheme,
    /// A host name, an IPv4 address, or an IPv6 address without brackets; of a service, its name;
    /// of one of Kubernetes, its name and namespace, `shop.default`.
    pub(crate) host: String,
    /// The port; that of the scheme if the URL has none, and 0 for a service without a number.
    pub(crate) port: u16,
    /// The name of the port of a service of Kubernetes, which has either a name or a number, or
    /// none of both: then it is the only one.
    pub(crate) port_name: Option<Box<str>>,
}

impl EndpointAddress {
    #[cfg(test)]
    pub(crate) fn http(host: &str, port: u16) -> Self {
        EndpointAddress { scheme: EndpointScheme::Http, host: host.to_owned(), port, port_name: None }
    }

    /// The name that a certificate must have: of a service, its domain. The names of its servers
    /// are what DNS says, which an attacker may have changed (RFC 6125 section 6.2.1). Of a service
    /// of Kubernetes, its DNS name in the cluster without the domain: `shop.default.svc`.
    pub(crate) fn certificate_name(&self) -> Cow<'_, str> {
        if self.scheme.is_kubernetes() {
            return format!("{}.svc", self.host).into();
        }
        if !self.scheme.is_service() {
            return self.host.as_str().into();
        }
        let mut name = self.host.as_str();
        while let Some((_, domain)) = name.split_once('.').filter(|(label, _)| label.starts_with('_')) {
            name = domain;
        }
        name.into()
    }

    /// The address, if the host is numeric and needs no resolution.
    pub(crate) fn numeric(&self) -> Option<SocketAddr> {
        self.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, self.port))
    }

    /// The authority of a request to it (RFC 9110 section 7.2): host, and port unless it is the
    /// default one; of a service of Kubernetes, the name of its certificate.
    pub(crate) fn authority(&self) -> String {
        if self.scheme.is_kubernetes() {
            return self.certificate_name().into_owned();
        }
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match self.scheme.default_port() {
            Some(default) if default != self.port => format!("{host}:{}", self.port),
            _ => host,
        }
    }

    /// The name of the endpoint at `address` in logs and metrics: the host as configured, and where
    /// it is a name, the address that it stands for.
    pub(crate) fn name_of(&self, address: SocketAddr) -> String {
        if self.numeric().is_some() { address.to_string() } else { format!("{}@{address}", self.host) }
    }
}

impl fmt::Display for EndpointAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scheme.as_str())?;
        f.write_str("://")?;
        if self.host.contains(':') {
            write!(f, "[{}]", self.host)?;
        } else {
            f.write_str(&self.host)?;
        }
        match &self.port_name {
            Some(name) => write!(f, ":{name}"),
            None if self.port == 0 => Ok(()),
            None => write!(f, ":{}", self.port),
        }
    }
}
