//! Case `network-bound`: connections that arrive at once while the process cannot accept, and the
//! memory of idle ones.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;
use std::{fs, io::Write as _};

use socket2::{Domain, Protocol, Socket, Type};

use crate::case::gateway::{CaseContext, CaseGateway};
use crate::case::report::CaseReport;
use crate::error::{LoadtestError, Result};
use crate::interrupt::wait_for;
use crate::servers::scripted_origin::{OriginAnswer, ScriptedOrigin};

/// The backlog of the system in the field case.
const SMALL_BACKLOG: i32 = 128;
/// The second SYN of a connection is sent after 1 s.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(700);
/// Memory of an idle connection, kernel excluded.
const IDLE_BYTES_MAX: f64 = 16_384.0;

const CONFIG: &str = r#"
[log]
access = "off"
[limits_http]
connections_per_ip = 20000
[upstreams.origin]
endpoints = ["http://@ORIGIN@"]
[[routes]]
name = "all"
match = { path = "/*" }
upstream = "origin"
"#;

pub(crate) fn run(context: &CaseContext<'_>) -> Result<CaseReport> {
    let origin = ScriptedOrigin::start(|_| OriginAnswer::ok("ok\n").field("Cache-Control: max-age=60"));
    let origin = origin.map_err(LoadtestError::io("the origin does not start"))?;
    let gateway =
        CaseGateway::start(context, "network-bound", &CONFIG.replace("@ORIGIN@", &origin.address.to_string()))?;
    let somaxconn = somaxconn();
    // Fits the kernel's bound of each of the two listeners, and the descriptors of this process.
    let connections = context.pick(1_000, 3_000).min(somaxconn.max(256) - 100);
    let mut report = CaseReport::new(format!(
        "The gateway is stopped (SIGSTOP) while {connections} clients connect at once, and continues. The same number of clients \
         connects to a listener with a backlog of {SMALL_BACKLOG} that accepts nothing. net.core.somaxconn is {somaxconn}."
    ));
    gateway.client().get("/", "").map_err(LoadtestError::io("the gateway does not respond"))?;
    let memory_before = gateway.metric("process_resident_memory_bytes")?;
    let events = gateway.output().matches("\"event\":\"backlog_capped\"").count();
    let expected = usize::from(somaxconn < 65_535);
    report.check(
        "a kernel limit below 65,535 is logged once at the start",
        (format!("{events} events, limit {somaxconn}"), events.min(1) == expected),
    );
    let refused_by_small = small_backlog(connections)?;
    gateway.signal("STOP")?;
    let mut streams: Vec<TcpStream> = connect(gateway.address, connections);
    gateway.signal("CONT")?;
    report.check(
        "every connection waits in the backlog of the stopped gateway",
        (
            format!(
                "{} of {connections}; {} of {connections} with a backlog of 128",
                streams.len(),
                connections - refused_by_small
            ),
            streams.len() == connections,
        ),
    );
    let answered = streams.iter_mut().filter_map(|stream| answer(stream).ok()).count();
    report.check("and is answered after it", (format!("{answered} of {connections}"), answered == connections));
    let open = gauge(&gateway, connections)?;
    report.check(
        "`tidegate_connections`, by which the chart scales, has them all",
        (format!("{open:.0}"), open >= connections as f64),
    );
    let per_connection = (gateway.metric("process_resident_memory_bytes")? - memory_before) / connections as f64;
    report.check(
        "an idle connection holds less than 16 KiB of the process",
        (format!("{:.1} KiB", per_connection.max(0.0) / 1_024.0), per_connection < IDLE_BYTES_MAX),
    );
    drop(streams);
    let left =
        wait_for(Duration::from_secs(10), || Ok((gateway.metric("tidegate_connections ")? < 3.0).then_some(())))?;
    report.check(
        "the gauge falls when they have gone",
        (format!("{:.0}", gateway.metric("tidegate_connections ")?), left.is_some()),
    );
    Ok(report)
}

/// The gauge, which follows accepted connections.
fn gauge(gateway: &CaseGateway, connections: usize) -> Result<f64> {
    let is_reached = || Ok((gateway.metric("tidegate_connections ")? >= connections as f64).then_some(()));
    wait_for(Duration::from_secs(5), is_reached)?;
    gateway.metric("tidegate_connections ")
}

fn somaxconn() -> usize {
    let text = fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap_or_default();
    text.trim().parse().unwrap_or(4_096)
}

/// Established connections of as many attempts.
fn connect(address: SocketAddr, count: usize) -> Vec<TcpStream> {
    (0..count).map_while(|_| TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).ok()).collect()
}

/// Connections that a listener with the small backlog does not take.
fn small_backlog(count: usize) -> Result<usize> {
    let failed = || LoadtestError::io("a listener does not start");
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).map_err(failed())?;
    socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).map_err(failed())?;
    socket.listen(SMALL_BACKLOG).map_err(failed())?;
    let address = socket.local_addr().map_err(failed())?.as_socket();
    let address = address.ok_or_else(|| LoadtestError::Load("a listener without address".to_owned()))?;
    Ok(count - connect(address, count).len())
}

fn answer(stream: &mut TcpStream) -> std::io::Result<()> {
    use std::io::Read as _;
    stream.set_read_timeout(Some(crate::case::client::STEP_TIMEOUT))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
    let mut buffer = [0; 1_024];
    let length = stream.read(&mut buffer)?;
    if buffer[..length].starts_with(b"HTTP/1.1 200") { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}
