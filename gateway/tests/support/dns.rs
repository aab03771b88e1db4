//! A name server over UDP whose records a test changes while it runs.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::lock;

/// Interval at which the server checks whether the test has ended.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;
const A: u16 = 1;
const AAAA: u16 = 28;
const SRV: u16 = 33;

/// A record of a name.
#[derive(Clone, Debug)]
pub enum DnsRecord {
    Address(IpAddr),
    Service { priority: u16, port: u16, target: String },
}

/// The answer to the queries for a name.
#[derive(Clone, Debug)]
pub enum DnsAnswer {
    /// Records with a TTL in seconds.
    Records(u32, Vec<DnsRecord>),
    ServerFailure,
    /// Records with a TTL in seconds; no answer to queries for other kinds of records.
    OnlyRecords(u32, Vec<DnsRecord>),
    /// No answer at all.
    Silence,
    /// An address with a TTL of one second, that long after the first query for the name. Later
    /// queries get no answer.
    Late(Duration, IpAddr),
}

#[derive(Default)]
struct Shared {
    answers: Mutex<HashMap<String, DnsAnswer>>,
    queries: AtomicUsize,
    /// The names and kinds of queries that get a late answer.
    answered_late: Mutex<HashSet<(String, u16)>>,
    is_stopped: AtomicBool,
}

/// The name server. It ends with the test.
pub struct DnsServer {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl DnsServer {
    pub fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
        socket.set_read_timeout(Some(POLL_INTERVAL)).expect("an option of every socket");
        let address = socket.local_addr().expect("a bound port");
        let shared = Arc::new(Shared::default());
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut query = [0; 1_500];
            while !serving.is_stopped.load(Ordering::SeqCst) {
                let Ok((length, peer)) = socket.recv_from(&mut query) else { continue };
                let Some((delay, response)) = respond(&serving, &query[..length]) else { continue };
                let reply = socket.try_clone().expect("a second handle of the socket");
                let send = move || drop(reply.send_to(&response, peer));
                if delay.is_zero() {
                    send();
                } else {
                    std::thread::spawn(move || {
                        std::thread::sleep(delay);
                        send();
                    });
                }
            }
        });
        DnsServer { address, shared }
    }

    /// Sets the answer to queries for a name. Names without an answer do not exist.
    pub fn set(&self, name: &str, answer: DnsAnswer) {
        lock(&self.shared.answers).insert(name.to_owned(), answer);
    }

    /// Sets the addresses of a name, with a TTL of one second.
    pub fn set_addresses(&self, name: &str, addresses: &[&str]) {
        let records = addresses.iter().map(|text| DnsRecord::Address(text.parse().expect("an address")));
        self.set(name, DnsAnswer::Records(1, records.collect()));
    }

    /// Number of queries so far.
    pub fn queries(&self) -> usize {
        self.shared.queries.load(Ordering::SeqCst)
    }

    /// A `[dns]` section with this server.
    pub fn section(&self) -> String {
        section(&[self], "1s")
    }
}

/// A `[dns]` section with these servers, in that order.
pub fn section(servers: &[&DnsServer], timeout: &str) -> String {
    let servers: Vec<String> = servers.iter().map(|server| format!("\"{}\"", server.address)).collect();
    format!("[dns]\nservers = [{}]\ntimeout = \"{timeout}\"\n", servers.join(", "))
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        self.shared.is_stopped.store(true, Ordering::SeqCst);
    }
}

/// The response to a query and its delay, `None` if there is to be none (RFC 1035 section 4).
fn respond(shared: &Shared, query: &[u8]) -> Option<(Duration, Vec<u8>)> {
    let (name, end) = read_name(query, 12)?;
    let kind = u16::from_be_bytes([*query.get(end)?, *query.get(end + 1)?]);
    shared.queries.fetch_add(1, Ordering::SeqCst);
    let answer = lock(&shared.answers).get(&name.to_ascii_lowercase()).cloned();
    let is_partial = matches!(answer, Some(DnsAnswer::OnlyRecords(..)));
    let delay = if let Some(DnsAnswer::Late(delay, _)) = answer { delay } else { Duration::ZERO };
    let (code, ttl, records) = match answer {
        Some(DnsAnswer::Late(_, ip)) => {
            if !lock(&shared.answered_late).insert((name, kind)) {
                return None;
            }
            (0, 1, vec![DnsRecord::Address(ip)])
        }
        Some(DnsAnswer::Silence) => return None,
        Some(DnsAnswer::ServerFailure) => (SERVER_FAILURE, 0, Vec::new()),
        Some(DnsAnswer::Records(ttl, records) | DnsAnswer::OnlyRecords(ttl, records)) => (0, ttl, records),
        None => (NO_SUCH_NAME, 0, Vec::new()),
    };
    let records = records.iter().map(|record| match record {
        DnsRecord::Address(IpAddr::V4(ip)) => (A, ip.octets().to_vec()),
        DnsRecord::Address(IpAddr::V6(ip)) => (AAAA, ip.octets().to_vec()),
        DnsRecord::Service { priority, port, target } => {
            let numbers = [*priority, 0, *port].map(u16::to_be_bytes).concat();
            (SRV, [numbers, write_name(target)].concat())
        }
    });
    let records: Vec<_> = records.filter(|(known, _)| *known == kind).collect();
    if is_partial && records.is_empty() {
        return None;
    }
    let mut response = query[..2].to_vec();
    // A response, recursion desired and available.
    response.extend([0x81, 0x80 | code, 0, 1, 0, u8::try_from(records.len()).expect("few records"), 0, 0, 0, 0]);
    response.extend_from_slice(&query[12..end + 4]);
    for (kind, data) in records {
        // The name is that of the question.
        response.extend([0xC0, 12]);
        response.extend(kind.to_be_bytes());
        response.extend(1_u16.to_be_bytes());
        response.extend(ttl.to_be_bytes());
        response.extend(u16::try_from(data.len()).expect("short data").to_be_bytes());
        response.extend(data);
    }
    Some((delay, response))
}

/// The name at `at`, without a dot at its end, and the offset after it.
fn read_name(message: &[u8], mut at: usize) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1;
        if length == 0 {
            return Some((labels.join("."), at));
        }
        labels.push(String::from_utf8_lossy(message.get(at..at + length)?).into_owned());
        at += length;
    }
}

fn write_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).expect("a short label"));
        bytes.extend_from_slice(label.as_bytes());
    }
    bytes.push(0);
    bytes
}
