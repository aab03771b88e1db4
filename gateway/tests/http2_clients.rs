//! HTTP/2 to the clients that exist: nghttp, h2load, curl, Go's net/http, Python's httpx, and
//! Chromium. A client that is not installed is skipped, loudly.

mod support;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use base64::Engine as _;
use socket2::{Domain, Socket, Type};
use support::frames::Server;
use support::{Origin, Process, ReceivedRequest, STEP_TIMEOUT, Script, TempDir, wait_for};

/// Programs that are built or installed once, outside the checkout.
fn cache() -> Option<PathBuf> {
    let path = PathBuf::from(std::env::var_os("HOME")?).join(".cache/tidegate");
    std::fs::create_dir_all(&path).ok()?;
    Some(path)
}

fn is_installed(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output();
    let is_found = found.is_ok_and(|output| output.status.success());
    if !is_found {
        eprintln!("SKIPPED: {program} is not installed.");
    }
    is_found
}

/// The output of a program, which must succeed.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = command.output().expect("an installed program");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn respond(request: &ReceivedRequest) -> Script {
    match &*request.target {
        "/large" => Script::ok(&[("Cache-Control", "no-store")], [b'x'; 300_000]),
        "/trailers" => Script::new()
            .send("HTTP/1.1 200 OK\r\nCache-Control: no-store\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n")
            .send("2\r\nok\r\n0\r\nX-Sum: 17\r\n\r\n"),
        "/up" => Script::ok(&[("Cache-Control", "no-store")], format!("{} bytes", request.body.len())),
        _ => Script::ok(&[("Cache-Control", "max-age=600")], "stored"),
    }
}

fn start() -> (Server, String) {
    let server = Server::start(Origin::start(respond), "", "[limits_http]\nbody_bytes = \"64MiB\"\n");
    let base = format!("https://{}", server.gateway.address);
    (server, base)
}

#[test]
fn nghttp_gets_every_response() {
    if !is_installed("nghttp") {
        return;
    }
    let (_server, base) = start();
    let urls = ["/stored/1", "/large", "/stored/2", "/trailers"].map(|path| format!("{base}{path}"));
    let text = output(Command::new("nghttp").args(["-nas", "--no-verify-peer", "--timeout=10"]).args(&urls));
    assert_eq!(text.lines().filter(|line| line.contains(" 200 ")).count(), 4, "{text}");
    let dir = TempDir::new();
    let file = dir.write("body", &"b".repeat(500_000));
    let upload = ["-v", "--no-verify-peer", "--timeout=10", "-d"];
    let text = output(Command::new("nghttp").args(upload).arg(file).arg(format!("{base}/up")));
    assert!(text.contains(":status: 200") && text.contains("500000 bytes"), "{text}");
}

#[test]
fn h2load_has_no_failure() {
    if !is_installed("h2load") {
        return;
    }
    let (_server, base) = start();
    let dir = TempDir::new();
    let file = dir.write("body", &"b".repeat(100_000));
    for (path, arguments) in [
        ("/stored/1", &["-n", "2000", "-c", "4", "-m", "32"][..]),
        ("/large", &["-n", "200", "-c", "4", "-m", "100"]),
        // Small windows: 16 KiB for a stream, 64 KiB for a connection.
        ("/large", &["-n", "50", "-c", "2", "-m", "10", "-w", "14", "-W", "16"]),
        ("/up", &["-n", "200", "-c", "4", "-m", "32", "-d"]),
        ("/up", &["-n", "200", "-c", "1", "-m", "100", "-d"]),
    ] {
        let mut command = Command::new("h2load");
        command.args(arguments);
        if arguments.contains(&"-d") {
            command.arg(&file);
        }
        let text = output(command.arg(format!("{base}{path}")));
        assert!(text.contains(" 0 failed, 0 errored, 0 timeout"), "{path}: {text}");
        let line = text.lines().find(|line| line.starts_with("status codes:")).unwrap_or_default();
        assert!(line.ends_with("2xx, 0 3xx, 0 4xx, 0 5xx"), "{path}: {text}");
    }
}

#[test]
fn curl_transfers_in_parallel() {
    if !is_installed("curl") {
        return;
    }
    let (_server, base) = start();
    let mut command = Command::new("curl");
    command.args([
        "-skZ",
        "--http2",
        "--max-time",
        "30",
        "--parallel-max",
        "50",
        "-w",
        "%{http_version} %{http_code},",
    ]);
    for number in 0..60 {
        let path = if number % 2 == 0 { "/large" } else { "/stored/3" };
        command.args(["-o", "/dev/null", &format!("{base}{path}")]);
    }
    assert_eq!(output(&mut command), "2 200,".repeat(60));
}

#[test]
fn curl_uploads_in_parallel() {
    if !is_installed("curl") {
        return;
    }
    let (server, base) = start();
    let dir = TempDir::new();
    let file = dir.write("body", &"b".repeat(200_000));
    let mut command = Command::new("curl");
    command.args([
        "-skZ",
        "--http2",
        "--max-time",
        "60",
        "--parallel-max",
        "100",
        "-w",
        "%{http_version} %{http_code},",
    ]);
    for _ in 0..100 {
        command.args(["-o", "/dev/null", "-T"]).arg(&file).arg(format!("{base}/up"));
    }
    assert_eq!(output(&mut command), "2 200,".repeat(100));
    assert_eq!(server.gateway.metric("tidegate_http2_streams_refused_total{memory=\"connection\"}"), 0.0);
}

#[test]
fn go_client_gets_every_response() {
    if !is_installed("go") {
        return;
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/http2.go");
    let Some(cache) = cache() else { return eprintln!("SKIPPED: there is no home directory.") };
    let program = cache.join("bin/http2-client-go");
    let is_newer = |path: &Path| path.metadata().and_then(|data| data.modified()).ok();
    if is_newer(&program) < is_newer(&source) {
        output(Command::new("go").args(["build", "-o"]).arg(&program).arg(&source).env("GO111MODULE", "off"));
    }
    let (server, base) = start();
    let text = output(Command::new(program).arg(base));
    let floods = ["control", "reset"]
        .map(|frames| server.gateway.metric(&format!("tidegate_http2_floods_total{{frames=\"{frames}\"}}")));
    let refused = server.gateway.metric("tidegate_http2_streams_refused_total{memory=\"connection\"}");
    assert!(text == "ok\n", "{floods:?}, {refused} refused: {text}");
}

#[test]
fn python_client_gets_every_response() {
    if !is_installed("python3") {
        return;
    }
    let Some(cache) = cache() else { return eprintln!("SKIPPED: there is no home directory.") };
    let venv = cache.join("http2-venv");
    let python = venv.join("bin/python");
    let can_import = || Command::new(&python).args(["-c", "import httpx, h2"]).output();
    if !can_import().is_ok_and(|output| output.status.success()) {
        let install = format!(
            "python3 -m venv {venv} && {venv}/bin/pip install --quiet --disable-pip-version-check 'httpx[http2]'",
            venv = venv.display()
        );
        let installed = Command::new("sh").args(["-c", &install]).output();
        if !installed.is_ok_and(|output| output.status.success()) {
            return eprintln!("SKIPPED: httpx cannot be installed from PyPI.");
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/http2.py");
    let (_server, base) = start();
    assert_eq!(output(Command::new(python).arg(source).arg(base)), "ok\n");
}

const IMAGES: usize = 150;
const SCRIPTS: usize = 30;
const STYLES: usize = 20;

/// A page whose images come first and whose scripts and styles are more urgent. It reports how its
/// resources were transferred, and the first message of a WebSocket.
fn page() -> String {
    let images: String = (0..IMAGES)
        .map(|number| format!("<img src=\"/image/{number}.svg\" alt=\"\" fetchpriority=\"low\">\n"))
        .collect();
    let styles: String = (0..STYLES)
        .map(|number| format!("<link rel=\"stylesheet\" href=\"/style/{number}.css\" fetchpriority=\"high\">\n"))
        .collect();
    let scripts: String = (0..SCRIPTS)
        .map(|number| format!("<script src=\"/script/{number}.js\" fetchpriority=\"high\"></script>\n"))
        .collect();
    format!(
        "<!doctype html><title>page</title>\n{images}{styles}{scripts}<script>
performance.setResourceTimingBufferSize(1000);
addEventListener('load', () => {{
  const resources = performance.getEntriesByType('resource').map(entry => ({{
    name: new URL(entry.name).pathname, protocol: entry.nextHopProtocol, status: entry.responseStatus,
    requested: entry.requestStart, ended: entry.responseEnd, bytes: entry.encodedBodySize,
  }}));
  const socket = new WebSocket('wss://' + location.host + '/socket');
  const report = message => fetch('/report', {{ method: 'POST', body: JSON.stringify({{ resources, message }}) }});
  socket.onmessage = event => report(event.data);
  socket.onerror = () => report('failed');
}});
</script>\n"
    )
}

fn respond_to_browser(request: &ReceivedRequest) -> Script {
    let stored = |kind: &str, body: &[u8]| {
        let fields = [("Cache-Control", "max-age=600"), ("Content-Type", kind)];
        Script::ok(&fields, body)
    };
    match request.target.split('/').nth(1).unwrap_or_default() {
        "" => stored("text/html", page().as_bytes()),
        "image" => {
            let padding = "x".repeat(100_000);
            let image =
                format!("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1\" height=\"1\"><!--{padding}--></svg>");
            stored("image/svg+xml", image.as_bytes())
        }
        "script" => stored("text/javascript", format!("// {}", "x".repeat(20_000)).as_bytes()),
        "style" => stored("text/css", format!("/* {} */", "x".repeat(20_000)).as_bytes()),
        "socket" => {
            let key = request.field("sec-websocket-key").unwrap_or_default();
            let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
            let hash = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
            let accept = base64::engine::general_purpose::STANDARD.encode(hash);
            let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n";
            Script::new().send(format!("{head}Sec-WebSocket-Accept: {accept}\r\n\r\n")).send(b"\x81\x05hello").hang()
        }
        _ => Script::reply(404, &[], ""),
    }
}

/// Bytes per second of the browser's link. The page takes two seconds of it, so that responses
/// wait for the link, whatever the load of the machine, and their order is the gateway's.
const LINK_RATE: u64 = 8 * 1024 * 1024;

/// An address whose connections reach `gateway`, which answers over a link of [`LINK_RATE`].
fn slow_link(gateway: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // Bytes in buffers of the system are past the gateway's decisions.
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
            socket.set_recv_buffer_size(64 * 1024).expect("a buffer");
            socket.connect(&gateway.into()).expect("the gateway listens");
            let server = TcpStream::from(socket);
            let upload = (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
            std::thread::spawn(move || relay(upload.0, upload.1, u64::MAX));
            std::thread::spawn(move || relay(server, client, LINK_RATE));
        }
    });
    address
}

/// Copies bytes until either side ends, at most `rate` of them per second.
fn relay(mut from: TcpStream, mut to: TcpStream, rate: u64) {
    let mut buffer = [0; 16 * 1024];
    let start = Instant::now();
    let mut sent = Duration::ZERO;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
        // Time that the link was idle is not made up for.
        sent = sent.max(start.elapsed()) + Duration::from_secs(1).mul_f64(length as f64 / rate as f64);
        std::thread::sleep(sent.saturating_sub(start.elapsed()));
    }
    // Either socket may be closed already.
    _ = from.shutdown(Shutdown::Both);
    _ = to.shutdown(Shutdown::Both);
}

/// The report of a browser that has loaded the page.
fn browse(server: &Server, base: &str) -> serde_json::Value {
    let profile = TempDir::new();
    let mut command = Command::new("chromium");
    command.args(["--headless=new", "--no-sandbox", "--disable-gpu", "--ignore-certificate-errors"]);
    command.args(["--no-first-run", "--disable-background-networking", "--disable-component-update"]);
    command.arg(format!("--user-data-dir={}", profile.path().display())).arg(format!("{base}/"));
    let mut browser = Process::start(&mut command);
    let report = || server.origin.requests().into_iter().rev().find(|request| request.target == "/report");
    wait_for(|| report().is_some(), 6 * STEP_TIMEOUT);
    browser.kill();
    serde_json::from_slice(&report().expect("a report").body).expect("JSON")
}

#[test]
fn chromium_loads_a_page_of_200_resources_by_priority() {
    if !is_installed("chromium") {
        return;
    }
    let log = "[log]\naccess = \"stdout\"\n";
    let server = Server::start(Origin::start(respond_to_browser), "", log);
    let base = format!("https://{}", slow_link(server.gateway.address));
    // The second visit gets everything from the gateway's cache, so that only the gateway decides
    // on the order.
    browse(&server, &base);
    let report = browse(&server, &base);
    let resources = report["resources"].as_array().expect("a list");
    assert_eq!(resources.len(), IMAGES + SCRIPTS + STYLES);
    for resource in resources {
        assert!(resource["protocol"] == "h2" && resource["status"] == 200, "{resource}");
        assert!(resource["bytes"].as_u64() > Some(20_000), "{resource}");
    }
    let mean = |kind: &str, what: &str| {
        let times: Vec<f64> = resources
            .iter()
            .filter(|resource| resource["name"].as_str().is_some_and(|name| name.starts_with(kind)))
            .filter_map(|resource| resource[what].as_f64())
            .collect();
        times.iter().sum::<f64>() / times.len() as f64
    };
    let [image, script, style] = ["/image", "/script", "/style"].map(|kind| mean(kind, "ended"));
    let [asked_image, asked_script, asked_style] = ["/image", "/script", "/style"].map(|kind| mean(kind, "requested"));
    eprintln!(
        "requested and ended after, ms: images {asked_image:.0} {image:.0}, scripts {asked_script:.0} {script:.0}, \
         styles {asked_style:.0} {style:.0}"
    );
    let priority = |target: &str| {
        let requests = server.origin.requests();
        let request = requests.iter().find(|request| request.target == target).expect("a request");
        request.field("priority").unwrap_or_default().to_owned()
    };
    eprintln!("{:?}", ["/image/3.svg", "/script/3.js", "/style/3.css"].map(priority));
    assert!(script < image && style < image, "images {image}, scripts {script}, styles {style}");
    assert!(script - asked_script < image - asked_image, "images {image}, scripts {script}, styles {style}");
    // The WebSocket is a stream of the same connection.
    assert_eq!(report["message"], "hello");
    let lines = || server.gateway.access_log(1);
    let is_socket = |line: &serde_json::Value| line["path"].as_str().is_some_and(|path| path.starts_with("/socket"));
    let start = Instant::now();
    while !lines().iter().any(is_socket) && start.elapsed() < STEP_TIMEOUT {
        std::thread::sleep(Duration::from_millis(20));
    }
    let socket = lines().into_iter().find(is_socket).expect("a line of the tunnel");
    assert!(socket["version"] == "2.0" && socket["status"] == 200, "{socket}");
}
