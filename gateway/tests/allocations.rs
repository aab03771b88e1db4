//! Counts the heap allocations of an exchange, over a complete gateway in this process.
//!
//! The client does not allocate while it sends requests, so all counted allocations are the
//! gateway's. Allocations outside of requests (timers, the runtime's clock) are few and covered by
//! `SLACK`.

mod support;

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use gateway::config::Config;
use gateway::server;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use support::{Origin, STEP_TIMEOUT, Script, TempDir, free_address, one_route};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const REQUESTS: usize = 1_000;
/// Allocations outside of requests.
const SLACK: usize = 50;
/// Every 16th hit is recorded in the shared cache, which allocates two or three times.
const HITS: usize = REQUESTS / 5 + SLACK;
/// 103 for a fetch that is shared and stored, those of the origin of this process included. One of
/// them is the future that can outlive its client.
const MISSES: usize = REQUESTS * 110;
/// The response of a denial is prebuilt.
const DENIALS: usize = SLACK;

/// Runs a gateway on a thread of this process.
fn start(config: &str) -> SocketAddr {
    let (dir, address) = (TempDir::new(), free_address());
    let listens = format!(
        "version = 1\n[server]\nworkers = 1\n[log]\naccess = \"off\"\n[[listen]]\naddress = \"{address}\"\n\
         [admin]\naddress = \"{}\"\n",
        free_address()
    );
    let file = dir.write("tidegate.toml", &(listens + config));
    let (config, _) = Config::load(&file).unwrap_or_else(|report| panic!("{report}"));
    let (ready, bound) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let source = (server::ConfigSource::File(dir.path().join("tidegate.toml")), server::StartMode::Fresh);
        server::run(config, source, |_| ready.send(()).expect("the test waits")).expect("the gateway runs");
    });
    bound.recv_timeout(STEP_TIMEOUT).expect("the gateway becomes ready");
    address
}

/// Sends a request and reads a response that fills `response`.
fn exchange(stream: &mut TcpStream, request: &[u8], response: &mut [u8]) {
    stream.write_all(request).expect("a live gateway");
    stream.read_exact(response).expect("a response");
}

/// Reads a response with a known length; returns its total bytes.
fn read_response(stream: &mut TcpStream, response: &mut [u8]) -> usize {
    let mut have = 0;
    loop {
        have += stream.read(&mut response[have..]).expect("a response");
        let text = String::from_utf8_lossy(&response[..have]);
        let Some(head) = text.find("\r\n\r\n") else { continue };
        let lines = text[..head].lines().filter_map(|line| line.split_once(": "));
        let mut length = lines.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let length: usize = length.next_back().expect("a length").1.parse().expect("a number");
        if have == head + 4 + length {
            return have;
        }
    }
}

/// Allocations and reallocations of `REQUESTS` exchanges on one connection.
fn count(address: SocketAddr, target: &str, status: &str) -> usize {
    let mut stream = TcpStream::connect(address).expect("the gateway listens");
    stream.set_read_timeout(Some(STEP_TIMEOUT)).expect("a socket");
    let request = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
    let mut response = vec![0; 4_096];
    let mut length = 0;
    // Warm-up: stores the response, fills the buffer pools, grows tables. The length is constant
    // afterwards.
    for _ in 0..50 {
        stream.write_all(request.as_bytes()).expect("a live gateway");
        length = read_response(&mut stream, &mut response);
        assert!(response.starts_with(status.as_bytes()), "{:?}", String::from_utf8_lossy(&response[..length]));
    }
    let region = Region::new(ALLOCATOR);
    for _ in 0..REQUESTS {
        exchange(&mut stream, request.as_bytes(), &mut response[..length]);
    }
    let counted = region.change();
    assert!(response.starts_with(status.as_bytes()));
    counted.allocations + counted.reallocations
}

#[test]
fn exchanges_stay_within_their_allocation_budget() {
    let origin = Origin::start(|request| match request.target.as_str() {
        "/hit" => Script::ok(&[("Cache-Control", "max-age=3600"), ("Date", "Tue, 24 Nov 2099 00:00:00 GMT")], "body"),
        // Stale at once: each request leads a fetch that is stored.
        "/miss" => Script::ok(&[("Cache-Control", "max-age=0"), ("ETag", "\"a\"")], "body"),
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
        .expect("the only request that is admitted");
    let targets =
        [("hit", "/hit", "HTTP/1.1 200"), ("miss", "/miss", "HTTP/1.1 200"), ("denied", "/denied", "HTTP/1.1 429")];
    let figures = targets.map(|(name, target, status)| (name, count(address, target, status)));
    println!("allocations of {REQUESTS} exchanges: {figures:?}");
    let [(_, hits), (_, misses), (_, denials)] = figures;
    assert!(hits <= HITS && misses <= MISSES && denials <= DENIALS, "{figures:?}");
}
