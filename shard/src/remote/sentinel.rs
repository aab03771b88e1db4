//! Owns the form of an address that Sentinels are asked for: `redis+sentinel://[user:password@]host:port,host:port/master[/db]`,
//! `rediss+sentinel://` where the master speaks TLS. The credentials are the master's; Sentinels are asked without.
//!
//! Refuses to say what is wrong: the text may hold a password.

use super::scout::Scout;
use super::site::{BadAddress, Dialer, Site, TlsSettings};
use std::sync::Arc;
use tokio::sync::Notify;

const PORT: &str = "26379";

pub(crate) struct Sentinels {
    /// An address of the master's kind, whose host and port are the first Sentinel's.
    template: String,
    /// Addresses of the Sentinels.
    addresses: Vec<String>,
    pub(crate) master: String,
}

impl Sentinels {
    /// `None` for an address of another form.
    pub(crate) fn of(url: &str) -> Option<Result<Self, BadAddress>> {
        let (scheme, rest) = url.split_once("+sentinel://")?;
        matches!(scheme, "redis" | "rediss").then(|| Self::read(scheme, rest).ok_or(BadAddress))
    }

    fn read(scheme: &str, rest: &str) -> Option<Self> {
        let (authority, path) = rest.split_once('/')?;
        let (login, hosts) = authority.rsplit_once('@').map_or(("", authority), |(login, hosts)| (login, hosts));
        let (master, db) = path.split_once('/').unwrap_or((path, "0"));
        if master.is_empty() || db.parse::<u8>().is_err() || hosts.split(',').any(|host| host.is_empty()) {
            return None;
        }
        let has_port = |host: &str| host.rsplit_once(']').map_or(host, |(_, tail)| tail).contains(':');
        let hosts: Vec<String> = hosts
            .split(',')
            .map(|host| if has_port(host) { host.to_owned() } else { format!("{host}:{PORT}") })
            .collect();
        let login = if login.is_empty() { String::new() } else { format!("{login}@") };
        Some(Self {
            template: format!("{scheme}://{login}{}/{db}", hosts[0]),
            addresses: hosts.iter().map(|host| format!("redis://{host}")).collect(),
            master: master.to_owned(),
        })
    }

    /// Who looks for the master, and where it will be.
    pub(crate) fn scout(&self, tls: &TlsSettings) -> Result<(Scout, Arc<Site>), BadAddress> {
        let dialer = Dialer::new(&self.template, tls)?;
        let plain = TlsSettings::default();
        let sentinels = self.addresses.iter().map(|url| Ok(Dialer::new(url, &plain)?.spot()?.client));
        let sentinels = sentinels.collect::<Result<Vec<_>, BadAddress>>()?;
        let call = Arc::new(Notify::new());
        let site = Site::unknown(call.clone());
        Ok((
            Scout::Sentinels {
                sentinels,
                master: self.master.clone(),
                dialer: Box::new(dialer),
                site: site.clone(),
                call,
            },
            site,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart() {
        let read = |url: &str| Sentinels::of(url).map(|read| read.map(|it| (it.template, it.addresses, it.master)));
        let (template, addresses, master) = read("rediss+sentinel://u:p@a:1,[::1],b/orders/3").unwrap().unwrap();
        assert_eq!((template.as_str(), master.as_str()), ("rediss://u:p@a:1/3", "orders"));
        assert_eq!(addresses, ["redis://a:1", "redis://[::1]:26379", "redis://b:26379"]);
        assert!(read("redis://a:1").is_none());
        for bad in [
            "redis+sentinel://a",
            "redis+sentinel://a/",
            "redis+sentinel:///m",
            "redis+sentinel://a,/m",
            "redis+sentinel://a/m/x",
        ] {
            assert!(read(bad).unwrap().is_err(), "{bad}");
        }
    }
}
