//! The servers that are compared, their configurations (peers/ holds the templates) and how they start.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use clap::ValueEnum;

use crate::client::Connection;
use crate::failure::{Failure, Result};
use crate::process::{Running, SERVER_CORE, Scratch, Tools};

const NGINX: &str = include_str!("../peers/nginx.conf");
const TIDEGATE: &str = include_str!("../peers/tidegate.toml");

/// nginx's upstream connections kept open; more where the load has more connections.
const KEEPALIVE_MIN: usize = 64;
const START_PATIENCE: Duration = Duration::from_secs(10);
/// A target that no peer caches, limits or refuses.
const READY: &str = "/pass/ready";

/// A server that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Peer {
    /// Debian's settings and `keepalive_requests`
    Nginx,
    /// The same with `sendfile off`
    NginxNosendfile,
    /// The same with `sendfile off` and `open_file_cache`
    NginxOpenfiles,
    /// The defaults with one worker; always measured
    Tidegate,
}

/// What a peer needs to know to start.
pub(crate) struct Setting<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a Scratch,
    pub(crate) tidegate: &'a Path,
    pub(crate) origin: SocketAddr,
    pub(crate) connections: usize,
}

/// A peer that answers.
pub(crate) struct Started {
    pub(crate) peer: Peer,
    pub(crate) address: SocketAddr,
    pub(crate) process: Running,
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Nginx => "nginx",
            Peer::NginxNosendfile => "nginx-nosendfile",
            Peer::NginxOpenfiles => "nginx-openfiles",
            Peer::Tidegate => "tidegate",
        }
    }

    /// Starts the peer and waits until it answers.
    pub(crate) fn start(self, setting: &Setting<'_>) -> Result<Started> {
        let [address, admin] = free_addresses()?;
        let command = match self {
            Peer::Nginx | Peer::NginxNosendfile | Peer::NginxOpenfiles => self.nginx(setting, address)?,
            Peer::Tidegate => tidegate(setting, address, admin)?,
        };
        let mut process = Running::start(self.name(), command, setting.scratch)?;
        process.await_ready(START_PATIENCE, || {
            let answer = Connection::open(address).and_then(|mut connection| connection.get(READY));
            answer.is_ok_and(|answer| answer.status == 200)
        })?;
        Ok(Started { peer: self, address, process })
    }

    fn nginx(self, setting: &Setting<'_>, address: SocketAddr) -> Result<Command> {
        let directory = setting.scratch.path().join(format!("{}.d", self.name()));
        fs::create_dir(&directory).map_err(Failure::io(format!("cannot create {}", directory.display())))?;
        let text = fill(
            NGINX,
            &[
                ("DIRECTORY", &directory.display().to_string()),
                ("SENDFILE", if self == Peer::Nginx { "on" } else { "off" }),
                ("OPEN_FILES", self.open_files()),
                ("ORIGIN", &setting.origin.to_string()),
                ("CONNECTIONS", &setting.connections.max(KEEPALIVE_MIN).to_string()),
                ("LISTEN", &address.to_string()),
            ],
        );
        let file = setting.scratch.write(&format!("{}.conf", self.name()), &text)?;
        let mut command = setting.tools.pinned(SERVER_CORE, &setting.tools.nginx);
        // -e as well: until it has read its configuration, nginx writes to a log that only root may open.
        command.arg("-p").arg(&directory).arg("-e").arg(directory.join("nginx.log")).arg("-c").arg(file);
        Ok(command)
    }

    fn open_files(self) -> &'static str {
        match self {
            // All keys of any workload, for the whole run: the best case of this cache.
            Peer::NginxOpenfiles => "open_file_cache max=20000 inactive=1h; open_file_cache_valid 1h;",
            _ => "",
        }
    }
}

fn tidegate(setting: &Setting<'_>, address: SocketAddr, admin: SocketAddr) -> Result<Command> {
    let replacements =
        [("LISTEN", address.to_string()), ("ADMIN", admin.to_string()), ("ORIGIN", setting.origin.to_string())];
    let text = fill(TIDEGATE, &replacements.each_ref().map(|(name, value)| (*name, value.as_str())));
    let file = setting.scratch.write("tidegate.toml", &text)?;
    let mut command = setting.tools.pinned(SERVER_CORE, setting.tidegate);
    command.arg("run").arg("--config").arg(file);
    Ok(command)
}

/// `template` with each `@NAME@` replaced.
fn fill(template: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}

/// Addresses on loopback that are free now. All are held at once, so that they differ.
pub(crate) fn free_addresses<const N: usize>() -> Result<[SocketAddr; N]> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(Failure::io("no free port"));
    let held: Vec<TcpListener> = (0..N).map(|_| bind()).collect::<Result<_>>()?;
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for (address, listener) in addresses.iter_mut().zip(&held) {
        *address = listener.local_addr().map_err(Failure::io("a listener without address"))?;
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left of a template after its own explanation of `@NAME@`.
    fn blanks(text: &str) -> usize {
        text.replace("@NAME@", "").matches('@').count()
    }

    #[test]
    fn templates_have_no_blank_that_nobody_fills() {
        let nginx = ["DIRECTORY", "SENDFILE", "OPEN_FILES", "ORIGIN", "CONNECTIONS", "LISTEN"].map(|name| (name, "x"));
        assert_eq!(blanks(&fill(NGINX, &nginx)), 0);
        assert_eq!(blanks(&fill(TIDEGATE, &["LISTEN", "ADMIN", "ORIGIN"].map(|name| (name, "x")))), 0);
        assert!(blanks(NGINX) > 0 && blanks(TIDEGATE) > 0);
    }

    #[test]
    fn free_addresses_differ() {
        let [one, other] = free_addresses().expect("two ports");
        assert_ne!(one, other);
    }
}
