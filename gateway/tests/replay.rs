//! Replays the stored fuzzing corpus on the stable toolchain.

#[path = "../fuzz/cache_oracle.rs"]
mod cache_oracle;
#[path = "../fuzz/connection_oracle.rs"]
mod connection_oracle;
#[path = "../fuzz/frames_oracle.rs"]
mod frames_oracle;
#[path = "../fuzz/oracle.rs"]
mod oracle;

use std::panic::catch_unwind;
use std::path::Path;

/// Replays all inputs of a target; fails with the names of the inputs that fail.
fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let (mut replayed, mut failed) = (0, Vec::new());
    for entry in entries {
        let path = entry.expect("a readable entry").path();
        let data = std::fs::read(&path).expect("a readable file");
        replayed += 1;
        if catch_unwind(|| check(&data)).is_err() {
            failed.push(path.display().to_string());
        }
    }
    assert!(failed.is_empty(), "{} of {replayed} fail:\n{}", failed.len(), failed.join("\n"));
    assert!(replayed >= 20, "only {replayed} inputs in {}", dir.display());
}

#[test]
fn request_head_corpus_passes() {
    replay("request_head", oracle::request_head);
}

#[test]
fn response_head_corpus_passes() {
    replay("response_head", oracle::response_head);
}

#[test]
fn chunk_decoder_corpus_passes() {
    replay("chunk_decoder", oracle::chunk_decoder);
}

#[test]
fn cache_fields_corpus_passes() {
    replay("cache_fields", cache_oracle::cache_fields);
}

#[test]
fn stored_form_corpus_passes() {
    replay("stored_form", cache_oracle::stored_form);
}

#[test]
fn proxy_header_corpus_passes() {
    replay("proxy_header", connection_oracle::proxy_header);
}

#[test]
fn client_hello_corpus_passes() {
    replay("client_hello", connection_oracle::client_hello);
}

#[test]
fn frames_corpus_passes() {
    replay("frames", frames_oracle::frames);
}

/// Inputs of a simple generator: bytes of any kind, and instructions for frames.
#[test]
fn generated_frames_pass() {
    // More of them, and others: FRAMES_INPUTS=100000 FRAMES_SEED=7
    let variable = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
    let (inputs, seed) = (variable("FRAMES_INPUTS").unwrap_or(600), variable("FRAMES_SEED").unwrap_or(0));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut requests = 0;
    for number in 0..inputs {
        let mut data = vec![if number % 8 == 0 { 0x84 } else { (number % 5) as u8 }];
        for _ in 0..next() % 80 {
            let [kind, stream, flags, length, ..] = next().to_le_bytes();
            let count = length % 24;
            data.extend([kind, stream, flags, count]);
            data.extend((0..count).map(|_| next() as u8));
        }
        let checked = catch_unwind(|| frames_oracle::count_requests(&data));
        requests += checked.unwrap_or_else(|_| panic!("input {number} of seed {seed}: {data:?}")) as u64;
    }
    assert!(requests > inputs / 2, "{requests} requests");
}
