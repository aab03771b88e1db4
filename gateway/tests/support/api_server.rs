//! An API server of Kubernetes over TLS, as far as lists and watches of EndpointSlices need one: it
//! keeps a history of versions, and fails as a test says.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use super::tls_origin::Authority;
use super::{TempDir, lock};

/// Interval at which a watch looks for the end of the test.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How the server fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApiFault {
    #[default]
    None,
    /// Every request gets this status, with this `Retry-After` unless it is empty.
    Status(u16, &'static str),
    /// Every watch gets this status.
    WatchStatus(u16),
    /// Requests get no response.
    Silence,
    /// Watches get a head and nothing more, whatever their time.
    Stall,
    /// Lists are no JSON.
    Garbage,
    /// Lists never end.
    Endless,
}

/// A request as the server saw it.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    pub path: String,
    pub query: BTreeMap<String, String>,
    pub token: Option<String>,
    /// The status of the response; 0: there was none.
    pub status: u16,
}

impl ApiRequest {
    pub fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }

    pub fn version(&self) -> Option<u64> {
        self.query.get("resourceVersion")?.parse().ok()
    }
}

#[derive(Default)]
struct ApiState {
    /// By namespace and name.
    slices: BTreeMap<(String, String), Value>,
    version: u64,
    /// Lines of watches with their versions.
    history: Vec<(u64, Value)>,
    /// Versions below are too old.
    oldest: u64,
    token: String,
    fault: ApiFault,
    /// Slices of one page; 0: as many as the client asks for.
    page: usize,
    /// The number of times that all watches were closed.
    closings: usize,
    open_watches: usize,
    requests: Vec<ApiRequest>,
    is_stopped: bool,
}

type Shared = Arc<(Mutex<ApiState>, Condvar)>;

/// The server. It ends with the test.
pub struct ApiServer {
    pub address: SocketAddr,
    shared: Shared,
    authority: Authority,
}

impl ApiServer {
    pub fn start() -> Self {
        Self::start_at(SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    pub fn start_at(address: SocketAddr) -> Self {
        let authority = Authority::new("cluster");
        let (chain, key) = authority.sign("127.0.0.1", |_| {}).into_parts();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.expect("versions").with_no_client_auth().with_single_cert(chain, key);
        let config = Arc::new(config.expect("a usable certificate"));
        let listener = TcpListener::bind(address).expect("a free port");
        let address = listener.local_addr().expect("a bound port");
        let state = ApiState { version: 1, token: "first".to_owned(), ..ApiState::default() };
        let shared: Shared = Arc::new((Mutex::new(state), Condvar::new()));
        let served = Arc::clone(&shared);
        std::thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                if lock(&served.0).is_stopped {
                    return;
                }
                let (config, served) = (Arc::clone(&config), Arc::clone(&served));
                std::thread::spawn(move || drop(serve(socket, config, &served)));
            }
        });
        ApiServer { address, shared, authority }
    }

    /// A section `kubernetes` that reaches this server, with its files in `dir`.
    pub fn section(&self, dir: &TempDir, keys: &str) -> String {
        dir.write("cluster-ca.crt", &self.authority.pem());
        dir.write("token", "first\n");
        format!(
            "[kubernetes]\nurl = \"https://{}\"\nca = \"cluster-ca.crt\"\ntoken_file = \"token\"\n{keys}\n",
            self.address
        )
    }

    pub fn pem(&self) -> String {
        self.authority.pem()
    }

    fn change(&self, change: impl FnOnce(&mut ApiState)) {
        change(&mut lock(&self.shared.0));
        self.shared.1.notify_all();
    }

    /// Adds or replaces a slice of the service that its label names.
    pub fn set(&self, slice: Value) {
        self.change(|state| {
            let key = key_of(&slice);
            let kind = if state.slices.contains_key(&key) { "MODIFIED" } else { "ADDED" };
            let slice = state.record(kind, slice);
            state.slices.insert(key, slice);
        });
    }

    pub fn delete(&self, name: &str) {
        self.change(|state| {
            let key = state.slices.keys().find(|key| key.1 == name).cloned().expect("a slice of this name");
            let slice = state.slices.remove(&key).expect("a slice");
            state.record("DELETED", slice);
        });
    }

    /// Sends a line to all watches, as it is.
    pub fn send_event(&self, event: Value) {
        self.change(|state| {
            state.version += 1;
            state.history.push((state.version, event));
        });
    }

    /// Closes all watches: the responses end.
    pub fn close_watches(&self) {
        self.change(|state| state.closings += 1);
    }

    /// All versions up to now are too old from now on. Changes `slices` without an event.
    pub fn compact(&self, slice: Value) {
        self.change(|state| {
            state.version += 10;
            state.slices.insert(key_of(&slice), slice);
            (state.oldest, state.history) = (state.version, Vec::new());
        });
    }

    pub fn fail(&self, fault: ApiFault) {
        self.change(|state| state.fault = fault);
    }

    pub fn set_token(&self, token: &str) {
        self.change(|state| state.token = token.to_owned());
    }

    pub fn set_page(&self, slices: usize) {
        self.change(|state| state.page = slices);
    }

    pub fn requests(&self) -> Vec<ApiRequest> {
        lock(&self.shared.0).requests.clone()
    }

    pub fn lists(&self) -> usize {
        self.requests().iter().filter(|request| !request.is_watch()).count()
    }

    pub fn watches(&self) -> Vec<ApiRequest> {
        self.requests().into_iter().filter(ApiRequest::is_watch).collect()
    }

    /// Watches that are open now.
    pub fn open_watches(&self) -> usize {
        lock(&self.shared.0).open_watches
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.change(|state| state.is_stopped = true);
        // Wakes the listener.
        drop(TcpStream::connect_timeout(&self.address, Duration::from_millis(200)));
    }
}

impl ApiState {
    /// Gives `slice` the next version and appends an event.
    fn record(&mut self, kind: &str, mut slice: Value) -> Value {
        self.version += 1;
        slice["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.history.push((self.version, json!({ "type": kind, "object": slice })));
        slice
    }
}

fn key_of(slice: &Value) -> (String, String) {
    let text = |key: &str| slice["metadata"][key].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

/// A slice of `service` in the namespace `default`, with ready endpoints at the port `http`.
pub fn slice(name: &str, service: &str, addresses: &[SocketAddr]) -> Value {
    let endpoints: Vec<Value> = addresses.iter().map(|address| endpoint(&address.ip().to_string(), true)).collect();
    let port = addresses.first().map(|address| json!([{ "name": "http", "port": address.port(), "protocol": "TCP" }]));
    json!({
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": if addresses.iter().any(SocketAddr::is_ipv6) { "IPv6" } else { "IPv4" },
        "ports": port,
        "endpoints": endpoints,
    })
}

/// An endpoint of a slice.
pub fn endpoint(address: &str, is_ready: bool) -> Value {
    json!({
        "addresses": [address],
        "conditions": { "ready": is_ready, "serving": is_ready, "terminating": false },
    })
}

fn serve(socket: TcpStream, config: Arc<ServerConfig>, shared: &Shared) -> io::Result<()> {
    let connection = ServerConnection::new(config).map_err(io::Error::other)?;
    let mut stream = BufReader::new(StreamOwned::new(connection, socket));
    loop {
        let Some(request) = read_request(&mut stream)? else { return Ok(()) };
        let fault = lock(&shared.0).fault;
        if let ApiFault::Silence = fault {
            note(shared, request, 0);
            wait_until(shared, |state| state.is_stopped || state.fault != ApiFault::Silence);
            return Ok(());
        }
        let is_allowed = request.token.as_ref() == Some(&lock(&shared.0).token);
        let stream = stream.get_mut();
        let (status, retry_after) = match fault {
            _ if !is_allowed => (401, ""),
            ApiFault::Status(status, retry_after) => (status, retry_after),
            ApiFault::WatchStatus(status) if request.is_watch() => (status, ""),
            _ => (200, ""),
        };
        match (status, request.is_watch()) {
            (200, false) => list(stream, shared, request)?,
            (200, true) => watch(stream, shared, request)?,
            _ => {
                note(shared, request, status);
                refuse(stream, status, retry_after)?;
            }
        }
    }
}

fn note(shared: &Shared, request: ApiRequest, status: u16) {
    lock(&shared.0).requests.push(ApiRequest { status, ..request });
}

fn read_request(stream: &mut impl BufRead) -> io::Result<Option<ApiRequest>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let target = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    let field = lines
        .iter()
        .find_map(|line| line.split_once(": ").filter(|(name, _)| name.eq_ignore_ascii_case("authorization")));
    let token = field.and_then(|(_, value)| value.strip_prefix("Bearer ")).map(str::to_owned);
    Ok(Some(ApiRequest { path: path.to_owned(), query, token, status: 0 }))
}

fn refuse(stream: &mut impl Write, status: u16, retry_after: &str) -> io::Result<()> {
    let body = json!({ "kind": "Status", "code": status, "message": format!("refused with {status}") }).to_string();
    let retry_after = if retry_after.is_empty() { String::new() } else { format!("Retry-After: {retry_after}\r\n") };
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{retry_after}Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    stream.flush()
}

/// Whether a slice belongs to the service of a request.
fn is_selected(request: &ApiRequest, slice: &Value) -> bool {
    let namespace = slice["metadata"]["namespace"].as_str().unwrap_or_default();
    let service = slice["metadata"]["labels"]["kubernetes.io/service-name"].as_str().unwrap_or_default();
    request.path == format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices")
        && request.query.get("labelSelector").is_some_and(|it| *it == format!("kubernetes.io/service-name={service}"))
}

fn list(stream: &mut impl Write, shared: &Shared, request: ApiRequest) -> io::Result<()> {
    let body = {
        let state = lock(&shared.0);
        let limit: usize = request.query.get("limit").and_then(|limit| limit.parse().ok()).unwrap_or(usize::MAX);
        let limit = if state.page == 0 { limit } else { state.page };
        let from: usize = request.query.get("continue").and_then(|from| from.parse().ok()).unwrap_or(0);
        let selected: Vec<Value> =
            state.slices.values().filter(|slice| is_selected(&request, slice)).cloned().collect();
        let next = if from + limit < selected.len() { (from + limit).to_string() } else { String::new() };
        let items: Vec<Value> = selected.into_iter().skip(from).take(limit).collect();
        match state.fault {
            ApiFault::Garbage => "<html>".to_owned(),
            ApiFault::Endless => String::new(),
            _ => json!({
                "kind": "EndpointSliceList",
                "metadata": { "resourceVersion": state.version.to_string(), "continue": next },
                "items": items,
            })
            .to_string(),
        }
    };
    let is_endless = body.is_empty();
    note(shared, request, 200);
    if is_endless {
        write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        loop {
            chunk(stream, &[b' '; 1 << 16])?;
        }
    }
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    stream.flush()
}

fn chunk(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    write!(stream, "{:x}\r\n", bytes.len())?;
    stream.write_all(bytes)?;
    stream.write_all(b"\r\n")?;
    stream.flush()
}

/// Counts a watch while it is open.
struct OpenWatch<'s>(&'s Shared);

impl Drop for OpenWatch<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).open_watches -= 1;
    }
}

fn watch(stream: &mut impl Write, shared: &Shared, request: ApiRequest) -> io::Result<()> {
    let seconds = request.query.get("timeoutSeconds").and_then(|text| text.parse().ok()).unwrap_or(60);
    let ends_at = Instant::now() + Duration::from_secs(seconds);
    let mut version = request.version().unwrap_or(0);
    let (is_gone, closings) = {
        let mut state = lock(&shared.0);
        state.open_watches += 1;
        (version < state.oldest, state.closings)
    };
    let _open = OpenWatch(shared);
    note(shared, request.clone(), 200);
    write!(stream, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    stream.flush()?;
    if is_gone {
        let status = json!({ "kind": "Status", "code": 410, "message": "too old resource version" });
        chunk(stream, format!("{}\n", json!({ "type": "ERROR", "object": status })).as_bytes())?;
        return chunk(stream, b"");
    }
    loop {
        let events: Vec<(u64, Value)> = {
            let state = lock(&shared.0);
            if state.is_stopped {
                return Ok(());
            }
            let is_over = Instant::now() >= ends_at && state.fault != ApiFault::Stall;
            if is_over || state.closings > closings {
                drop(state);
                return chunk(stream, b"");
            }
            match state.fault {
                ApiFault::Stall => Vec::new(),
                _ => state.history.iter().filter(|(at, _)| *at > version).cloned().collect(),
            }
        };
        if events.is_empty() {
            let state = lock(&shared.0);
            drop(shared.1.wait_timeout(state, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner));
        }
        for (at, event) in events {
            version = at;
            let is_other =
                event["object"]["metadata"]["labels"].is_object() && !is_selected(&request, &event["object"]);
            if !is_other {
                // In two parts, as a network may deliver them.
                let line = format!("{event}\n");
                let (first, second) = line.as_bytes().split_at(line.len() / 2);
                chunk(stream, first)?;
                chunk(stream, second)?;
            }
        }
    }
}

fn wait_until(shared: &Shared, is_reached: impl Fn(&ApiState) -> bool) {
    let mut state = lock(&shared.0);
    while !is_reached(&state) {
        state = shared.1.wait_timeout(state, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
    }
}
