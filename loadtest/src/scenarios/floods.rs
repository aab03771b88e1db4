//! Floods of HTTP/2 frames and another client: the percentiles of its times with and without each
//! kind of flood, on one thread of the gateway.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustls::ClientConfig;

use crate::error::{LoadtestError, Result};
use crate::process::child::{ChildProcess, ScratchDirectory};
use crate::process::tools::{LOAD_CORE, SERVER_CORE, Tools, this_program};
use crate::scenarios::h2_frames::{
    self, CONTINUATION, DATA, END_HEADERS, END_STREAM, FrameConnection, HEADERS, PING, PRIORITY, RST_STREAM, SETTINGS,
    WINDOW_UPDATE, frame, head_block,
};
use crate::servers::certificate::ServerCertificate;
use crate::servers::free_address::free_addresses;

const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Frames of a flood: more than the gateway accepts.
const FRAMES: usize = 10_000;

/// One kind of flood.
struct Flood {
    name: &'static str,
    /// The bytes that one connection sends.
    bytes: Vec<u8>,
    /// Whether the gateway ends the connection for it.
    is_ended: bool,
}

fn floods() -> Vec<Flood> {
    let request =
        |stream, flags, (method, path)| frame((HEADERS, END_HEADERS | flags), stream, &head_block(method, path));
    let streams = |count: u32, of: &dyn Fn(u32) -> Vec<u8>| (0..count).flat_map(|n| of(1 + 2 * n)).collect::<Vec<u8>>();
    let reset = |stream| frame((RST_STREAM, 0), stream, &8_u32.to_be_bytes());
    let overflow = |stream| frame((WINDOW_UPDATE, 0), stream, &0x7fff_ffff_u32.to_be_bytes());
    let repeated = |first: Vec<u8>, rest: Vec<u8>| [first, rest.repeat(FRAMES)].concat();
    // Inserted into the table once, then referred to by one byte each.
    let insertion = [head_block("GET", "/stored"), vec![0x41, 0x7f, 0xa1, 0x1e], vec![b'a'; 4_000]].concat();
    let references = |stream| {
        let block = if stream == 1 { insertion.clone() } else { vec![0xbe; 16_000] };
        frame((HEADERS, END_HEADERS | END_STREAM), stream, &block)
    };
    let flood = |name, bytes| Flood { name, bytes, is_ended: true };
    vec![
        flood("rapid reset", streams(2_000, &|id| [request(id, END_STREAM, ("GET", "/wait")), reset(id)].concat())),
        flood("made to reset", streams(2_000, &|id| [request(id, 0, ("POST", "/wait")), overflow(id)].concat())),
        flood("CONTINUATION", repeated(frame((HEADERS, END_STREAM), 1, &[]), frame((CONTINUATION, 0), 1, &[0x84]))),
        flood("PING", repeated(Vec::new(), frame((PING, 0), 0, &[0; 8]))),
        flood("SETTINGS", repeated(Vec::new(), frame((SETTINGS, 0), 0, &[0, 4, 0, 0, 0xff, 0xff]))),
        flood("WINDOW_UPDATE", repeated(Vec::new(), frame((WINDOW_UPDATE, 0), 0, &1_u32.to_be_bytes()))),
        flood("PRIORITY", repeated(Vec::new(), frame((PRIORITY, 0), 1, &[0, 0, 0, 0, 7]))),
        flood("empty DATA", repeated(request(1, 0, ("POST", "/wait")), frame((DATA, 0), 1, &[]))),
        flood("header list", streams(150, &references)),
        Flood {
            name: "100 requests each",
            bytes: streams(100, &|id| request(id, END_STREAM, ("GET", "/stored"))),
            is_ended: false,
        },
        Flood { name: "handshakes alone", bytes: Vec::new(), is_ended: false },
    ]
}

/// The programs of the scenario, and the length of its rounds.
pub(crate) struct FloodScenario<'a> {
    pub(crate) tools: &'a Tools,
    pub(crate) tidegate: &'a Path,
    pub(crate) rounds: usize,
    /// Of each round, without and with the flood.
    pub(crate) seconds: u64,
}

/// The times of one client, without and with a flood.
#[derive(Default)]
struct FloodTimes {
    quiet: Vec<Duration>,
    flooded: Vec<Duration>,
    /// Connections of the flood.
    connections: usize,
}

impl FloodScenario<'_> {
    pub(crate) fn run(&self) -> Result<String> {
        let mut out = String::from(
            "## floods\n\nOne client asks for a stored body of 1 KiB, one request at a time, while another one repeats \
             connections with a flood. Times in microseconds.\n\n\
             | flood | p50 | p50 with it | p99 | p99 with it | ratio of p99 | its connections/s |\n\
             |---|---|---|---|---|---|---|\n",
        );
        let config = h2_frames::client_config().map_err(|error| LoadtestError::Load(error.to_string()))?;
        for flood in floods() {
            // Another process each time: the address is refused for a while after floods.
            let mut times = self.measure(&flood, &config)?;
            let [p50, p50_with] = [&mut times.quiet, &mut times.flooded].map(|times| percentile(times, 50));
            let [p99, p99_with] = [&mut times.quiet, &mut times.flooded].map(|times| percentile(times, 99));
            let rate = times.connections as u64 / (self.seconds * self.rounds as u64).max(1);
            let ratio = p99_with / p99;
            writeln!(
                out,
                "| {} | {p50:.0} | {p50_with:.0} | {p99:.0} | {p99_with:.0} | {ratio:.1} | {rate} |",
                flood.name
            )
            .expect("writing to a string does not fail");
            eprintln!("{}: p99 {p99:.0} us, {p99_with:.0} us with the flood", flood.name);
        }
        Ok(out)
    }

    fn measure(&self, flood: &Flood, config: &Arc<ClientConfig>) -> Result<FloodTimes> {
        let scratch = ScratchDirectory::named("floods")?;
        let (address, _processes) = self.start(&scratch)?;
        let (is_on, is_over, ended) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
        let mut times = FloodTimes::default();
        let measured = thread::scope(|scope| {
            let flooding = scope.spawn(|| {
                // The client has the core first, so that its times are those of the gateway.
                self.tools.run_thread_when_idle()?;
                while !is_over.load(Relaxed) {
                    if !is_on.load(Relaxed) {
                        thread::sleep(Duration::from_millis(1));
                    } else if send_flood(flood, address, config).is_ok() {
                        ended.fetch_add(1, Relaxed);
                    }
                }
                Ok(())
            });
            let measured = self.measure_client(address, config, (&is_on, &mut times));
            is_over.store(true, Relaxed);
            flooding.join().expect("the thread does not panic")?;
            measured.map_err(LoadtestError::io(format!("the client beside {}", flood.name)))
        });
        times.connections = ended.load(Relaxed);
        measured.map(|()| times)
    }

    fn measure_client(
        &self,
        address: SocketAddr,
        config: &Arc<ClientConfig>,
        (is_on, times): (&AtomicBool, &mut FloodTimes),
    ) -> std::io::Result<()> {
        let mut client = FrameConnection::open(address, config)?;
        let mut stream = 1;
        for _ in 0..self.rounds {
            for is_flooded in [false, true] {
                is_on.store(is_flooded, Relaxed);
                thread::sleep(Duration::from_millis(50));
                let start = Instant::now();
                while start.elapsed() < Duration::from_secs(self.seconds) {
                    let begin = Instant::now();
                    let head = head_block("GET", "/stored");
                    client.send(&frame((HEADERS, END_HEADERS | END_STREAM), stream, &head))?;
                    client.read_response(stream)?;
                    let into = if is_flooded { &mut times.flooded } else { &mut times.quiet };
                    into.push(begin.elapsed());
                    stream += 2;
                    thread::sleep(Duration::from_micros(300));
                }
            }
        }
        Ok(())
    }

    /// Starts an origin and a gateway with one worker. Returns the address of its listener.
    fn start(&self, scratch: &ScratchDirectory) -> Result<(SocketAddr, [ChildProcess; 2])> {
        let [address, admin, origin] = free_addresses()?;
        let mut command = self.tools.pinned(LOAD_CORE, &this_program()?);
        command.args(["origin", "--listen", &origin.to_string()]);
        let mut origin_process = ChildProcess::start("origin", command, scratch)?;
        origin_process.await_ready(READY_TIMEOUT, || std::net::TcpStream::connect(origin).is_ok())?;
        let certificate = ServerCertificate::create(self.tools, scratch)?;
        let text = format!(
            "version = 1\n[server]\nworkers = 1\n[[listen]]\naddress = \"{address}\"\n[listen.tls]\n\
             certificates = [{{ cert = {:?}, key = {:?} }}]\n[admin]\naddress = \"{admin}\"\n[log]\naccess = \"off\"\n\
             [upstreams.origin]\nendpoints = [\"http://{origin}\"]\n[upstreams.silent]\nendpoints = [\"http://{}\"]\n\
             [[routes]]\nname = \"wait\"\nmatch = {{ path = \"/wait\" }}\nupstream = \"silent\"\n\
             [[routes]]\nname = \"stored\"\nmatch = {{ path = \"/*\" }}\nupstream = \"origin\"\n\
             cache = {{ mode = \"standard\" }}\n",
            certificate.certificate,
            certificate.key,
            silent_origin()?
        );
        let file = scratch.write("gateway.toml", &text)?;
        let mut command = self.tools.pinned(SERVER_CORE, self.tidegate);
        command.arg("run").arg("--config").arg(file);
        let mut gateway = ChildProcess::start("gateway", command, scratch)?;
        gateway.await_ready(READY_TIMEOUT, || std::net::TcpStream::connect(address).is_ok())?;
        Ok((address, [origin_process, gateway]))
    }
}

/// An origin that answers nothing, until the process ends.
fn silent_origin() -> Result<SocketAddr> {
    let failed = || LoadtestError::io("the silent origin cannot listen");
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed())?;
    let address = listener.local_addr().map_err(failed())?;
    thread::spawn(move || {
        // As many as connections are refused later: each flood has a gateway of its own.
        let mut held = std::collections::VecDeque::new();
        for stream in listener.incoming().flatten() {
            held.push_back(stream);
            if held.len() > 1_000 {
                held.pop_front();
            }
        }
    });
    Ok(address)
}

fn send_flood(flood: &Flood, address: SocketAddr, config: &Arc<ClientConfig>) -> std::io::Result<()> {
    let mut client = FrameConnection::open(address, config)?;
    // The gateway may end the connection before it has read everything.
    let _sent_or_ended = client.send(&flood.bytes);
    if flood.is_ended {
        client.read_to_end();
    }
    Ok(())
}

/// In microseconds; 0 without times.
fn percentile(times: &mut [Duration], of_100: usize) -> f64 {
    times.sort_unstable();
    let index = (times.len() * of_100 / 100).min(times.len().saturating_sub(1));
    times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
}
