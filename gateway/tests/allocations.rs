//! What one exchange takes from the allocator, counted over a whole gateway in this process.
//!
//! The client below allocates nothing while it asks, so that all that is counted is the gateway's. What belongs to no request
//! (timers, the wall clock of the runtime) is little and bounded by the slack.

mod support;

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use gateway::config::Config;
use gateway::server;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::{Dir, Origin, PATIENCE, Script, free_address, one_route};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const REQUESTS: usize = 1_000;
/// Allocations that belong to no request.
const SLACK: usize = 50;
/// Every 16th hit is told to the cache that all threads share, which allocates twice or thrice for that.
const HITS: usize = REQUESTS / 5 + SLACK;
/// What a denial says was written before.
const DENIALS: usize = SLACK;

/// Runs a gateway on a thread of this process, which ends with it.
fn start(config: &str) -> SocketAddr {
    let (dir, address) = (Dir::new(), free_address());
    let listens = format!(
        "version = 1\n[server]\nworkers = 1\n[log]\naccess = \"off\"\n[[listen]]\naddress = \"{address}\"\n\
         [admin]\naddress = \"{}\"\n",
        free_address()
    );
    let file = dir.write("tidegate.toml", &(listens + config));
    let (config, _) = Config::load(&file).unwrap_or_else(|report| panic!("{report}"));
    let (ready, bound) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let origin = server::Origin::File(dir.path().join("tidegate.toml"));
        server::run(config, origin, |_| ready.send(()).expect("the test waits")).expect("it runs");
    });
    bound.recv_timeout(PATIENCE).expect("it gets ready");
    address
}

/// Asks and reads one answer of `length` bytes.
fn exchange(stream: &mut TcpStream, request: &[u8], answer: &mut [u8]) {
    stream.write_all(request).expect("a live gateway");
    stream.read_exact(answer).expect("an answer");
}

/// Reads one answer with a known length; returns its bytes in all.
fn read_whole(stream: &mut TcpStream, answer: &mut [u8]) -> usize {
    let mut have = 0;
    loop {
        have += stream.read(&mut answer[have..]).expect("an answer");
        let text = String::from_utf8_lossy(&answer[..have]);
        let Some(head) = text.find("\r\n\r\n") else { continue };
        let lines = text[..head].lines().filter_map(|line| line.split_once(": "));
        let mut length = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length: usize = length.next_back().expect("a length").1.parse().expect("a number");
        if have == head + 4 + length {
            return have;
        }
    }
}

/// Allocations and reallocations of `REQUESTS` exchanges of one connection.
fn count(address: SocketAddr, target: &str, status: &str) -> usize {
    let mut stream = TcpStream::connect(address).expect("the gateway listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut answer = vec![0; 4_096];
    let mut length = 0;
    // Warm: stored, buffers taken, tables grown. The length is the same from then on.
    for _ in 0..50 {
        stream.write_all(request.as_bytes()).expect("a live gateway");
        length = read_whole(&mut stream, &mut answer);
        assert!(answer.starts_with(status.as_bytes()), "{:?}", String::from_utf8_lossy(&answer[..length]));
    }
    let region = Region::new(ALLOCATOR);
    for _ in 0..REQUESTS {
        exchange(&mut stream, request.as_bytes(), &mut answer[..length]);
    }
    let counted = region.change();
    assert!(answer.starts_with(status.as_bytes()));
    counted.allocations + counted.reallocations
}

#[test]
fn an_exchange_allocates_no_more_than_it_did() {
    let origin = Origin::start(|asked| match asked.target.as_str() {
        "/hit" => Script::ok(&[("Cache-Control", "max-age=3600"), ("Date", "Tue, 24 Nov 2099 00:00:00 GMT")], "body"),
        _ => Script::ok(&[("Cache-Control", "no-store")], "body"),
    });
    let denied = "[limits.few]\ntier = \"device\"\nrate = \"1/h\"\nburst = 1\n\
                  [[routes]]\nname = \"denied\"\nmatch = { path = \"/denied\" }\nupstream = \"origin\"\nlimits = [\"few\"]\n";
    let address = start(&one_route(origin.address, "", denied));
    TcpStream::connect(address)
        .and_then(|mut first| {
            first.write_all(b"GET /denied HTTP/1.1\r\nHost: a\r\n\r\n")?;
            first.read(&mut [0; 4_096])
        })
        .expect("the only one that passes");
    let figures = [("hit", "/hit", "HTTP/1.1 200"), ("denied", "/denied", "HTTP/1.1 429")]
        .map(|(name, target, status)| (name, count(address, target, status)));
    println!("allocations of {REQUESTS} exchanges: {figures:?}");
    let [(_, hits), (_, denials)] = figures;
    assert!(hits <= HITS && denials <= DENIALS, "{figures:?}");
}
