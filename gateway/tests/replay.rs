//! Replays the stored fuzzing corpus on the stable toolchain.

#[path = "../fuzz/cache_oracle.rs"]
mod cache_oracle;
#[path = "../fuzz/connection_oracle.rs"]
mod connection_oracle;
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
