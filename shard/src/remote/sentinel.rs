//! Owns the syntax of Sentinel endpoints:
//! `redis+sentinel://[user:password@]host:port,host:port/master[/db]`, or `rediss+sentinel://`
//! where the master uses TLS. The credentials are those of the master; Sentinels are queried
//! without credentials.
//!
//! Refuses to quote an invalid address: it may contain a password.

use super::address::{Dialer, InvalidAddress, RedisTlsConfig, ServerAddress};
use super::topology::TopologyDiscovery;
use std::sync::Arc;
use tokio::sync::Notify;

const SENTINEL_PORT: &str = "26379";

/// A parsed Sentinel URL: the Sentinels, the name of the master, and the URL parts for connections
/// to the master.
pub(crate) struct SentinelEndpoint {
    /// URL of the master with the first Sentinel's host and port.
    template: String,
    /// URLs of the Sentinels.
    sentinels: Vec<String>,
    pub(crate) master: String,
}

impl SentinelEndpoint {
    /// `None` for a URL of another scheme.
    pub(crate) fn parse(url: &str) -> Option<Result<Self, InvalidAddress>> {
        let (scheme, rest) = url.split_once("+sentinel://")?;
        matches!(scheme, "redis" | "rediss").then(|| Self::parse_parts(scheme, rest).ok_or(InvalidAddress))
    }

    fn parse_parts(scheme: &str, rest: &str) -> Option<Self> {
        let (authority, path) = rest.split_once('/')?;
        let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let (master, db) = path.split_once('/').unwrap_or((path, "0"));
        if master.is_empty() || db.parse::<u8>().is_err() || hosts.split(',').any(|host| host.is_empty()) {
            return None;
        }
        let has_port = |host: &str| host.rsplit_once(']').map_or(host, |(_, tail)| tail).contains(':');
        let hosts: Vec<String> = hosts
            .split(',')
            .map(|host| if has_port(host) { host.to_owned() } else { format!("{host}:{SENTINEL_PORT}") })
            .collect();
        let login = if login.is_empty() { String::new() } else { format!("{login}@") };
        Some(Self {
            template: format!("{scheme}://{login}{}/{db}", hosts[0]),
            sentinels: hosts.iter().map(|host| format!("redis://{host}")).collect(),
            master: master.to_owned(),
        })
    }

    /// The discovery of the master, and the address that it updates.
    pub(crate) fn discovery(
        &self,
        tls: &RedisTlsConfig,
    ) -> Result<(TopologyDiscovery, Arc<ServerAddress>), InvalidAddress> {
        let dialer = Dialer::new(&self.template, tls)?;
        let plain = RedisTlsConfig::default();
        let sentinels = self.sentinels.iter().map(|url| Ok(Dialer::new(url, &plain)?.server()));
        let sentinels = sentinels.collect::<Result<Vec<_>, InvalidAddress>>()?;
        let rediscover = Arc::new(Notify::new());
        let address = ServerAddress::unresolved(rediscover.clone());
        Ok((
            TopologyDiscovery::Sentinels {
                sentinels,
                master: self.master.clone(),
                dialer: Box::new(dialer),
                address: address.clone(),
                rediscover,
            },
            address,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_parsed() {
        let parse = |url: &str| {
            SentinelEndpoint::parse(url).map(|parsed| parsed.map(|it| (it.template, it.sentinels, it.master)))
        };
        let (template, sentinels, master) = parse("rediss+sentinel://u:p@a:1,[::1],b/orders/3").unwrap().unwrap();
        assert_eq!((template.as_str(), master.as_str()), ("rediss://u:p@a:1/3", "orders"));
        assert_eq!(sentinels, ["redis://a:1", "redis://[::1]:26379", "redis://b:26379"]);
        assert!(parse("redis://a:1").is_none());
        for bad in [
            "redis+sentinel://a",
            "redis+sentinel://a/",
            "redis+sentinel:///m",
            "redis+sentinel://a,/m",
            "redis+sentinel://a/m/x",
        ] {
            assert!(parse(bad).unwrap().is_err(), "{bad}");
        }
    }
}
