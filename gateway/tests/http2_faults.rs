//! HTTP/2 clients that break the rules, and those that only seem to: what is counted, which streams
//! and connections end, and which must not.

mod support;

use std::time::{Duration, Instant};

use support::frames::{
    CONTINUATION, END_HEADERS, END_STREAM, Frame, HEADERS, RST_STREAM, Server, head_block, request, status,
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
