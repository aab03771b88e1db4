//! Floods of HTTP/2 frames and other clients: the 99th percentile of a client's times with and
//! without each kind of flood, on one thread of the gateway. A measurement, not run by default:
//!
//! ```sh
//! cargo build --release
//! TIDEGATE_PROGRAM=target/release/tidegate cargo test --test http2_floods -- --ignored --nocapture
//! ```

mod support;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use support::frames::{
    CANCEL, CONTINUATION, DATA, END_HEADERS, END_STREAM, Frame, FrameClient, HEADERS, PING, PRIORITY, RST_STREAM,
    SETTINGS, Server, WINDOW, WINDOW_UPDATE, get, head_block, request, status,
};
use support::{Origin, STEP_TIMEOUT, Script};

/// Each kind is measured in so many rounds of quiet and flood.
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_millis(600);

/// The frames of an attack on one connection: more than the gateway accepts.
fn floods() -> Vec<(&'static str, Vec<u8>)> {
    let streams = |count: u32, of: &dyn Fn(u32) -> Vec<Frame>| -> Vec<u8> {
        (0..count).flat_map(|number| of(1 + 2 * number)).flat_map(|frame| frame.bytes()).collect()
    };
    let reset = |stream| Frame::new(RST_STREAM, 0, stream).with(CANCEL.to_be_bytes());
    let overflow = |stream| Frame::new(WINDOW_UPDATE, 0, stream).with(0x7fff_ffff_u32.to_be_bytes());
    let within = |first: Frame, rest: Frame| [first.bytes(), rest.bytes().repeat(10_000)].concat();
    // Inserted into the table once, then referred to by one byte each.
    let mut long = head_block(&[(":method", "GET"), (":scheme", "https"), (":path", "/")]);
    long.extend([0x41, 0x7f, 0xa1, 0x1e]);
    long.extend([b'a'; 4000]);
    let references = move |stream| {
        let block = if stream == 1 { long.clone() } else { vec![0xbe; 16_000] };
        vec![Frame::new(HEADERS, END_HEADERS | END_STREAM, stream).with(block)]
    };
    vec![
        ("rapid reset", streams(2_000, &|stream| vec![get(stream, "/wait"), reset(stream)])),
        ("made to reset", streams(2_000, &|stream| vec![request(stream, "POST", "/wait"), overflow(stream)])),
        ("CONTINUATION", within(Frame::new(HEADERS, END_STREAM, 1), Frame::new(CONTINUATION, 0, 1).with([0x84; 1]))),
        ("PING", Frame::new(PING, 0, 0).with([0; 8]).bytes().repeat(10_000)),
        ("SETTINGS", Frame::new(SETTINGS, 0, 0).with([0, 4, 0, 0, 0xff, 0xff]).bytes().repeat(10_000)),
        ("WINDOW_UPDATE", Frame::new(WINDOW_UPDATE, 0, 0).with(1_u32.to_be_bytes()).bytes().repeat(10_000)),
        ("PRIORITY", Frame::new(PRIORITY, 0, 1).with([0, 0, 0, 0, 7]).bytes().repeat(10_000)),
        ("empty DATA", within(request(1, "POST", "/wait"), Frame::new(DATA, 0, 1))),
        ("header list", streams(150, &references)),
        ("requests", streams(100, &|stream| vec![get(stream, "/stored")])),
    ]
}

/// Times of requests, one at a time, as long as `ROUND`.
fn times(client: &mut FrameClient, next: &mut u32, into: &mut Vec<Duration>) {
    let start = Instant::now();
    while start.elapsed() < ROUND {
        let begin = Instant::now();
        client.send(&get(*next, "/stored"));
        assert_eq!(status(&client.response(*next)), 200);
        into.push(begin.elapsed());
        *next += 2;
        std::thread::sleep(Duration::from_micros(300));
    }
}

fn percentile(times: &mut [Duration], of_100: usize) -> Duration {
    times.sort();
    times[(times.len() * of_100 / 100).min(times.len() - 1)]
}

#[test]
#[ignore = "a measurement"]
fn others_are_served_during_each_kind_of_flood() {
    eprintln!("{:>14} {:>9} {:>9} {:>9} {:>9} {:>7}", "flood", "p50", "p50 with", "p99", "p99 with", "ended/s");
    for (name, bytes) in floods() {
        // Another one each time: the address is refused for a while after floods.
        let origin = Origin::start(|request| match &*request.target {
            "/wait" => Script::new().pause(Duration::from_millis(200)),
            _ => Script::ok(&[("Cache-Control", "max-age=600")], [b'x'; 1000]),
        });
        let server = Server::start(origin, "", "[server]\nworkers = 1\n");
        let (is_on, is_over, ended) = (AtomicBool::new(false), AtomicBool::new(false), AtomicUsize::new(0));
        let (mut quiet, mut flooded) = (Vec::new(), Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    if !is_on.load(Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let Ok(mut client) = FrameClient::try_connect_silent(server.gateway.address, &server.trusted)
                    else {
                        continue;
                    };
                    client.send_preface(WINDOW);
                    client.send_bytes(&bytes);
                    if name != "requests" {
                        client.closed_within(STEP_TIMEOUT);
                    }
                    ended.fetch_add(1, Relaxed);
                }
            });
            let mut client = FrameClient::connect(&server.gateway, &server.trusted, WINDOW);
            client.send(&Frame::new(WINDOW_UPDATE, 0, 0).with(0x7fff_0000_u32.to_be_bytes()));
            let mut next = 1;
            for _ in 0..ROUNDS {
                is_on.store(false, Relaxed);
                std::thread::sleep(Duration::from_millis(50));
                times(&mut client, &mut next, &mut quiet);
                is_on.store(true, Relaxed);
                times(&mut client, &mut next, &mut flooded);
            }
            is_over.store(true, Relaxed);
        });
        let per_second = ended.load(Relaxed) as f64 / (ROUND * ROUNDS as u32).as_secs_f64();
        let micros = |time: Duration| time.as_micros();
        eprintln!(
            "{name:>14} {:>6} us {:>6} us {:>6} us {:>6} us {per_second:>7.0}",
            micros(percentile(&mut quiet, 50)),
            micros(percentile(&mut flooded, 50)),
            micros(percentile(&mut quiet, 99)),
            micros(percentile(&mut flooded, 99)),
        );
    }
}
