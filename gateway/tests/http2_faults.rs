//! HTTP/2 clients that break the rules, and those that only seem to: what is counted, which streams
//! and connections end, and which must not.

mod support;

use std::time::{Duration, Instant};

use support::STEP_TIMEOUT;
use support::frames::{
    CONTINUATION, END_HEADERS, END_STREAM, ENHANCE_YOUR_CALM, Frame, HEADERS, PING, RST_STREAM, Server, WINDOW_UPDATE,
    head_block, request, status,
};

const PROTOCOL_ERROR: u32 = 1;

#[test]
fn references_in_trailers_to_one_long_field_cost_little() {
    let server = Server::echo("");
    let mut client = server.connect();
    // Inserted into the table once, then referred to by one byte each.
    let mut block =
        head_block(&[(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", "gate.test")]);
    block.extend([0x40, 3]);
    block.extend(b"x-a");
    block.extend([0x7f, 0xa1, 0x1e]);
    block.extend([b'a'; 4000]);
    client.send(&Frame::new(HEADERS, END_HEADERS | END_STREAM, 1).with(&block));
    assert_eq!(status(&client.response(1)), 200);
    let begin = Instant::now();
    for stream in (3..23).step_by(2) {
        let references = [0xbe; 16_000];
        let mut frames = request(stream, "POST", "/").bytes();
        frames.extend(Frame::new(HEADERS, END_STREAM, stream).with(references).bytes());
        for flags in [0, 0, END_HEADERS] {
            frames.extend(Frame::new(CONTINUATION, flags, stream).with(references).bytes());
        }
        client.send_bytes(&frames);
        let reset = client.expect(RST_STREAM);
        assert_eq!((reset.stream, reset.code()), (stream, PROTOCOL_ERROR));
    }
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(client.is_alive());
}

#[test]
fn heads_of_a_reset_stream_explain_no_other_frames() {
    let server = Server::echo("");
    let mut client = server.connect();
    let mut frames = request(1, "POST", "/").bytes();
    frames.extend(Frame::new(WINDOW_UPDATE, 0, 1).with(0_u32.to_be_bytes()).bytes());
    let ping = Frame::new(PING, 0, 0).with([0; 8]).bytes();
    let round = [Frame::new(HEADERS, END_HEADERS, 1).bytes(), ping.clone(), ping].concat();
    frames.extend(round.repeat(200));
    client.send_bytes(&frames);
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
    // The heads alone are a flood, too.
    let mut client = server.connect();
    let mut frames = request(1, "POST", "/").bytes();
    frames.extend(Frame::new(WINDOW_UPDATE, 0, 1).with(0_u32.to_be_bytes()).bytes());
    frames.extend(Frame::new(HEADERS, END_HEADERS, 1).bytes().repeat(200));
    client.send_bytes(&frames);
    assert_eq!(client.closed_within(STEP_TIMEOUT), Some(Some(ENHANCE_YOUR_CALM)));
}
