//! The cost of features that are off, on for other routes, and on: instructions of the gateway's
//! process for a request, counted by callgrind.

use std::fmt::Write as _;
use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use crate::error::{LoadtestError, Result};
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::instructions::CountedProcess;
use crate::process::template::fill_template;
use crate::process::tools::{LOAD_CORE, Tools, this_program};
use crate::scenarios::testbed::as_f64;
use crate::servers::free_address::free_addresses;

/// Of the gateway below callgrind.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
const STEP_TIMEOUT: Duration = Duration::from_secs(20);
/// Requests before the count: they fill the caches and grow the buffers.
const WARM_UP: usize = 200;
const REQUESTS: usize = 2_000;

const CONFIGURATION: &str = include_str!("../../peers/features.toml");

/// A configuration: its name, keys of both measured routes, and further tables.
struct Features {
    name: &'static str,
    route: &'static str,
    rest: String,
}

fn features() -> Vec<Features> {
    // Nothing is exported.
    let tracing = "[tracing]\notlp = \"http://127.0.0.1:9\"\nratio = 0.0\n".to_owned();
    let features = |name, route, rest| Features { name, route, rest };
    vec![
        features("nothing configured", "", String::new()),
        features("all of them, for other routes", "", OTHER_ROUTES.to_owned()),
        features("tracing, no request sampled", "", tracing),
        features("access log", "", "[log]\naccess = \"@LOG@\"\n".to_owned()),
        features(
            "header rules",
            "headers = { request = { set = { x-region = \"{region}\" }, remove = [\"cookie\"] }, \
             response = { set = { strict-transport-security = \"max-age=31536000\" }, remove = [\"server\"] } }",
            String::new(),
        ),
        features("CORS", "cors = { origins = [\"https://app.example\"] }", String::new()),
        features("compression", "compress = [\"zstd\", \"br\", \"gzip\"]", String::new()),
        features("access lists", "allow = [\"127.0.0.0/8\", \"10.0.0.0/8\"]", String::new()),
        features(
            "a limit by device and one by node",
            "limits = [\"device\", \"node\"]",
            "[limits.device]\ntier = \"device\"\nrate = \"1000000/s\"\nburst = 1000000\n\
             [limits.node]\ntier = \"node\"\nrate = \"1000000/s\"\nburst = 1000000\n"
                .to_owned(),
        ),
    ]
}

/// Each feature that acts on requests or responses, on a route that no request has.
const OTHER_ROUTES: &str = r#"
[limits.other]
tier = "device"
rate = "10/s"
burst = 10
[[routes]]
name = "redirect"
match = { host = "www.example", path = "/*", scheme = "http" }
redirect = { to = "https://{host}{uri}" }
[[routes]]
name = "respond"
match = { path = "/robots.txt" }
respond = { body = "User-agent: *\n" }
[[routes]]
name = "conditions"
match = { path = "/conditions/*", headers = { x-canary = "1" }, query = { beta = "*" } }
upstream = "origin"
[[routes]]
name = "acts"
match = { path = "/acts/*" }
upstream = "origin"
strip_prefix = "/acts"
body_bytes = "1MiB"
timeout = "1s"
headers = { request = { set = { x-region = "{region}" } }, response = { set = { x-user = "{user}" } } }
cors = { origins = ["https://app.example"], credentials = true }
compress = ["zstd", "br", "gzip"]
security_headers = "strict"
allow = ["10.0.0.0/8"]
limits = ["other"]
canary = { upstream = "origin", percent = 5 }
mirror = { upstream = "origin", percent = 10 }
degrade = { status = 503, retry_after = "5s" }
"#;

/// A kind of request to both measured routes.
#[derive(Clone, Copy)]
enum Kind {
    /// A hit whose head is the same as the previous one of its connection.
    RepeatedHit,
    /// A hit whose head differs from the previous one.
    Hit,
    PassThrough,
}

impl Kind {
    const ALL: [Kind; 3] = [Kind::RepeatedHit, Kind::Hit, Kind::PassThrough];

    fn request(self, number: usize) -> String {
        let (target, turn) = match self {
            Kind::RepeatedHit => ("/hit/a", 0),
            Kind::Hit => ("/hit/a", number % 2),
            Kind::PassThrough => ("/pass/a", number % 2),
        };
        format!(
            "GET {target} HTTP/1.1\r\nHost: www.example\r\nUser-Agent: features/{turn}\r\n\
             Accept: text/html,application/xhtml+xml\r\nAccept-Language: en-GB,en;q=0.5\r\n\r\n"
        )
    }
}

/// Counts the instructions of a request with each configuration; returns a table.
pub(crate) fn run(tools: &Tools, tidegate: &Path) -> Result<String> {
    let mut out = String::from(
        "## features\n\nInstructions of the gateway for a request with five fields over HTTP/1.1, outside the kernel, and their ratio to \
         those with nothing configured.\n\n\
         | configuration | hit, head as before | hit | pass-through |\n|---|---|---|---|\n",
    );
    let mut first = None;
    for features in features() {
        eprintln!("{}", features.name);
        let counts = measure(&features, tools, tidegate)?;
        let base = *first.get_or_insert(counts);
        let cells: Vec<String> =
            counts.iter().zip(base).map(|(count, base)| format!("{count:.0} ({:.2})", count / base)).collect();
        writeln!(out, "| {} | {} |", features.name, cells.join(" | ")).expect("writing to a string does not fail");
    }
    Ok(out)
}

/// Instructions per request of each kind.
fn measure(features: &Features, tools: &Tools, tidegate: &Path) -> Result<[f64; 3]> {
    let scratch = ScratchDirectory::named("features")?;
    let [address, admin, origin] = free_addresses()?;
    let mut command = tools.pinned(LOAD_CORE, &this_program()?);
    command.args(["origin", "--listen", &origin.to_string()]);
    let mut origin_process = ChildProcess::start("origin", command, &scratch)?;
    origin_process.await_ready(READY_TIMEOUT, || TcpStream::connect(origin).is_ok())?;
    let [address_text, admin, origin] = [address, admin, origin].map(|address| address.to_string());
    let log = scratch.path().join("access.log").display().to_string();
    let access = if features.rest.contains("[log]") { "" } else { "[log]\naccess = \"off\"\n" };
    let template = format!("{CONFIGURATION}\n{access}{}", features.rest);
    let values = [
        ("LISTEN", address_text.as_str()),
        ("ADMIN", &admin),
        ("ORIGIN", &origin),
        ("ROUTE", features.route),
        ("LOG", &log),
    ];
    let file = scratch.write("gateway.toml", &fill_template(&template, &values))?;
    let file = file.display().to_string();
    let mut gateway = CountedProcess::start("gateway", (tidegate, &["run", "--config", &file]), tools, &scratch)?;
    gateway.process().await_ready(READY_TIMEOUT, || TcpStream::connect(address).is_ok())?;
    let failed = || LoadtestError::io(format!("a request with {}", features.name));
    let mut client = RawClient::open(address).map_err(failed())?;
    let mut counts = [0.0; 3];
    for (count, kind) in counts.iter_mut().zip(Kind::ALL) {
        let mut requests =
            |requests| (0..requests).try_for_each(|number| client.exchange(&kind.request(number))).map_err(failed());
        requests(WARM_UP)?;
        let instructions = gateway.count(|| requests(REQUESTS))?;
        *count = as_f64(instructions) / as_f64(REQUESTS as u64);
    }
    Ok(counts)
}

/// One connection, one request at a time.
struct RawClient {
    stream: TcpStream,
    received: Vec<u8>,
}

impl RawClient {
    fn open(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(STEP_TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(RawClient { stream, received: vec![0; 64 << 10] })
    }

    /// Sends a request and reads its response, which must be a 200 with `Content-Length`.
    fn exchange(&mut self, request: &str) -> std::io::Result<()> {
        let invalid = |text: &[u8]| std::io::Error::other(format!("not expected: {}", String::from_utf8_lossy(text)));
        self.stream.write_all(request.as_bytes())?;
        let mut length = 0;
        loop {
            let count = self.stream.read(&mut self.received[length..])?;
            if count == 0 {
                return Err(invalid(&self.received[..length]));
            }
            length += count;
            let received = &self.received[..length];
            let Some(head) = received.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
            let lower = String::from_utf8_lossy(&received[..head]).to_ascii_lowercase();
            let body =
                lower.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
            if !lower.starts_with("http/1.1 200 ") {
                return Err(invalid(received));
            }
            let Some(body) = body else { return Err(invalid(received)) };
            if length >= head + 4 + body {
                return Ok(());
            }
        }
    }
}
