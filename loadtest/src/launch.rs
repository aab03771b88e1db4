//! How each peer starts: its command line, and its configuration from a template in peers/.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use crate::client::Connection;
use crate::failure::{Failure, Result};
use crate::peer::Peer;
use crate::process::{Running, Scratch};
use crate::tools::{SERVER_CORE, Tool, Tools};
use crate::workload::{Source, Workload};

const NGINX: &str = include_str!("../peers/nginx.conf");
const HAPROXY: &str = include_str!("../peers/haproxy.cfg");
const VARNISH: &str = include_str!("../peers/varnish.vcl");
const VARNISH_DENIED: &str = include_str!("../peers/varnish-denied.vcl");
const TIDEGATE: &str = include_str!("../peers/tidegate.toml");

/// What Varnish would write into its shared memory log for a request of these workloads. The other peers have their access logs
/// switched off; this is the same, and a quarter of its CPU time on a hit.
const VARNISH_LOG: &str = "-ReqStart,-ReqMethod,-ReqURL,-ReqProtocol,-ReqHeader,-ReqUnset,-RespProtocol,-RespStatus,\
    -RespReason,-RespHeader,-RespUnset,-BereqMethod,-BereqURL,-BereqProtocol,-BereqHeader,-BereqUnset,-BerespProtocol,\
    -BerespStatus,-BerespReason,-BerespHeader,-BerespUnset,-Timestamp,-VCL_call,-VCL_return,-VCL_use,-Begin,-End,-Link,-Hit,\
    -HitMiss,-HitPass,-ReqAcct,-BereqAcct,-TTL,-Storage,-Fetch_Body,-Length,-Filters,-BackendOpen,-BackendClose";
/// Varnish's threads beyond those that connections need.
const VARNISH_SPARE_THREADS: usize = 100;

/// nginx's upstream connections kept open; more where the load has more connections.
const KEEPALIVE_MIN: usize = 64;
const START_PATIENCE: Duration = Duration::from_secs(20);
/// A target that no peer caches, limits or refuses.
const READY: &str = "/pass/ready";

/// What a peer needs to know to start.
pub(crate) struct Setting<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a Scratch,
    pub(crate) tidegate: &'a Path,
    pub(crate) origin: SocketAddr,
    pub(crate) workload: Workload,
}

/// A peer that answers.
pub(crate) struct Started {
    pub(crate) peer: Peer,
    pub(crate) address: SocketAddr,
    pub(crate) process: Running,
}

impl Setting<'_> {
    /// Starts a peer and waits until it answers.
    pub(crate) fn start(&self, peer: Peer) -> Result<Started> {
        let [address, admin] = free_addresses()?;
        let command = match peer {
            Peer::Nginx | Peer::NginxNosendfile | Peer::NginxOpenfiles => self.nginx(peer, address),
            Peer::Haproxy => self.haproxy(address),
            Peer::Varnish => self.varnish(address),
            Peer::Tidegate => self.tidegate(address, admin),
            Peer::LimitAnswer => self.limit_answer(address),
            Peer::LimitRelay => self.limit_relay(address),
        }?;
        let mut process = Running::start(peer.name(), command, self.scratch)?;
        process.await_ready(START_PATIENCE, || {
            let answer = Connection::open(address).and_then(|mut connection| connection.get(READY));
            // A constant answer may be a denial; whether answers are right is found out later.
            answer.is_ok_and(|answer| answer.status < 500)
        })?;
        Ok(Started { peer, address, process })
    }

    /// Why a peer cannot take part, if so.
    pub(crate) fn obstacle(&self, peer: Peer) -> Result<Option<String>> {
        if peer != Peer::Varnish || self.workload.source() != Source::Limit {
            return Ok(None);
        }
        let mut compile = Command::new(self.tools.path(Tool::Varnishd));
        compile.arg("-C").arg("-n").arg(self.scratch.path().join("compile.d")).arg("-f").arg(self.vcl()?);
        let status = compile.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let compiles = status.map_err(Failure::io("cannot start varnishd"))?.success();
        Ok((!compiles).then(|| "it cannot limit without its vmod vsthrottle (Debian: varnish-modules)".to_owned()))
    }

    fn nginx(&self, peer: Peer, address: SocketAddr) -> Result<Command> {
        let directory = self.directory(peer)?;
        let open_files = match peer {
            // All keys of any workload, for the whole run: the best case of this cache.
            Peer::NginxOpenfiles => "open_file_cache max=20000 inactive=1h; open_file_cache_valid 1h;",
            _ => "",
        };
        let text = fill(
            NGINX,
            &[
                ("DIRECTORY", &directory.display().to_string()),
                ("SENDFILE", if peer == Peer::Nginx { "on" } else { "off" }),
                ("OPEN_FILES", open_files),
                ("ORIGIN", &self.origin.to_string()),
                ("CONNECTIONS", &self.workload.connections().max(KEEPALIVE_MIN).to_string()),
                ("LISTEN", &address.to_string()),
            ],
        );
        let file = self.scratch.write(&format!("{}.conf", peer.name()), &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Nginx));
        // -e as well: until it has read its configuration, nginx writes to a log that only root may open.
        command.arg("-p").arg(&directory).arg("-e").arg(directory.join("nginx.log")).arg("-c").arg(file);
        Ok(command)
    }

    fn haproxy(&self, address: SocketAddr) -> Result<Command> {
        let text = fill(HAPROXY, &[("LISTEN", &address.to_string()), ("ORIGIN", &self.origin.to_string())]);
        let file = self.scratch.write("haproxy.cfg", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Haproxy));
        command.arg("-db").arg("-f").arg(file);
        Ok(command)
    }

    fn varnish(&self, address: SocketAddr) -> Result<Command> {
        // A busy connection holds a thread, and passing on holds one more for the origin's side.
        let threads = 2 * self.workload.connections() + VARNISH_SPARE_THREADS;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Varnishd));
        command.args(["-F", "-j", "none", "-T", "none", "-s", "malloc,256m", "-a", &address.to_string()]);
        command.arg("-n").arg(self.directory(Peer::Varnish)?).arg("-f").arg(self.vcl()?);
        for parameter in [
            "thread_pools=1",
            &format!("thread_pool_min={threads}"),
            "timeout_idle=3600",
            // Longer than any answer takes here: a thread stays with its connection, which is the cheapest.
            "timeout_linger=1",
            "backend_idle_timeout=3600",
            &format!("vsl_mask={VARNISH_LOG}"),
        ] {
            command.arg("-p").arg(parameter);
        }
        Ok(command)
    }

    fn vcl(&self) -> Result<PathBuf> {
        let template = if self.workload.source() == Source::Limit { VARNISH_DENIED } else { VARNISH };
        let (host, port) = (self.origin.ip().to_string(), self.origin.port().to_string());
        self.scratch.write("varnish.vcl", &fill(template, &[("HOST", &host), ("PORT", &port)]))
    }

    fn tidegate(&self, address: SocketAddr, admin: SocketAddr) -> Result<Command> {
        let values =
            [("LISTEN", address.to_string()), ("ADMIN", admin.to_string()), ("ORIGIN", self.origin.to_string())];
        let text = fill(TIDEGATE, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("tidegate.toml", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tidegate);
        command.arg("run").arg("--config").arg(file);
        Ok(command)
    }

    fn limit_answer(&self, address: SocketAddr) -> Result<Command> {
        let (status, body_bytes) = match self.workload.source() {
            // The shortest denial there is.
            Source::Limit => (429, 0),
            Source::Cache | Source::Origin => (200, self.workload.body_bytes()),
        };
        let mut command = self.tools.pinned(SERVER_CORE, &this_program()?);
        command.args(["limit-answer", "--listen", &address.to_string(), "--target", self.workload.base()]);
        command.args(["--status", &status.to_string(), "--body-bytes", &body_bytes.to_string()]);
        Ok(command)
    }

    fn limit_relay(&self, address: SocketAddr) -> Result<Command> {
        let mut command = self.tools.pinned(SERVER_CORE, &this_program()?);
        command.args(["limit-relay", "--listen", &address.to_string(), "--upstream", &self.origin.to_string()]);
        Ok(command)
    }

    fn directory(&self, peer: Peer) -> Result<PathBuf> {
        let directory = self.scratch.path().join(format!("{}.d", peer.name()));
        fs::create_dir(&directory).map_err(Failure::io(format!("cannot create {}", directory.display())))?;
        Ok(directory)
    }
}

pub(crate) fn this_program() -> Result<PathBuf> {
    env::current_exe().map_err(Failure::io("cannot find this program"))
}

/// `template` with each `@NAME@` replaced.
pub(crate) fn fill(template: &str, values: &[(&str, &str)]) -> String {
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
        for (template, names) in [
            (NGINX, ["DIRECTORY", "SENDFILE", "OPEN_FILES", "ORIGIN", "CONNECTIONS", "LISTEN"].as_slice()),
            (HAPROXY, &["LISTEN", "ORIGIN"]),
            (VARNISH, &["HOST", "PORT"]),
            (VARNISH_DENIED, &["HOST", "PORT"]),
            (TIDEGATE, &["LISTEN", "ADMIN", "ORIGIN"]),
        ] {
            let values: Vec<(&str, &str)> = names.iter().map(|name| (*name, "x")).collect();
            assert!(blanks(template) > 0, "{template}");
            assert_eq!(blanks(&fill(template, &values)), 0, "{template}");
        }
    }

    #[test]
    fn free_addresses_differ() {
        let [one, other] = free_addresses().expect("two ports");
        assert_ne!(one, other);
    }
}
