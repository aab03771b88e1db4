//! The address of an endpoint as the configuration writes it.

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
}

impl EndpointScheme {
    pub(crate) const ALL: [EndpointScheme; 5] = [
        EndpointScheme::Http,
        EndpointScheme::Https,
        EndpointScheme::H2c,
        EndpointScheme::Srv,
        EndpointScheme::SrvHttps,
    ];

    /// Whether the servers speak TLS.
    pub(crate) fn has_tls(self) -> bool {
        matches!(self, EndpointScheme::Https | EndpointScheme::SrvHttps)
    }

    /// Whether the servers are in SRV records.
    pub(crate) fn is_service(self) -> bool {
        matches!(self, EndpointScheme::Srv | EndpointScheme::SrvHttps)
    }

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            EndpointScheme::Http => "http",
            EndpointScheme::Https => "https",
            EndpointScheme::H2c => "h2c",
            EndpointScheme::Srv => "srv",
            EndpointScheme::SrvHttps => "srv+https",
        }
    }

    /// The port of a URL without one; `None` where the records name it.
    pub(crate) fn default_port(self) -> Option<u16> {
        match self {
            EndpointScheme::Http | EndpointScheme::H2c => Some(80),
            EndpointScheme::Https => Some(443),
            EndpointScheme::Srv | EndpointScheme::SrvHttps => None,
        }
    }
}

/// One item of `endpoints`: a server, a name with any number of servers, or a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct EndpointAddress {
    pub(crate) scheme: EndpointScheme,
    /// A host name, an IPv4 address, or an IPv6 address without brackets; of a service, its name.
    pub(crate) host: String,
    /// The port; that of the scheme if the URL has none, and 0 for a service.
    pub(crate) port: u16,
}

impl EndpointAddress {
    #[cfg(test)]
    pub(crate) fn http(host: &str, port: u16) -> Self {
        EndpointAddress { scheme: EndpointScheme::Http, host: host.to_owned(), port }
    }

    /// The name that a certificate must have: of a service, its domain. The names of its servers
    /// are what DNS says, which an attacker may have changed (RFC 6125 section 6.2.1).
    pub(crate) fn certificate_name(&self) -> &str {
        if !self.scheme.is_service() {
            return &self.host;
        }
        let mut name = self.host.as_str();
        while let Some((_, domain)) = name.split_once('.').filter(|(label, _)| label.starts_with('_')) {
            name = domain;
        }
        name
    }

    /// The address, if the host is numeric and needs no resolution.
    pub(crate) fn numeric(&self) -> Option<SocketAddr> {
        self.host.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, self.port))
    }

    /// The authority of a request to it (RFC 9110 section 7.2): host, and port unless it is the
    /// default one.
    pub(crate) fn authority(&self) -> String {
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
        if self.port == 0 { Ok(()) } else { write!(f, ":{}", self.port) }
    }
}
