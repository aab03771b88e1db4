//! The kept fuzzing corpus, played on the stable toolchain: what a fuzzer once found interesting stays right.

#[path = "../fuzz/cached.rs"]
mod cached;
#[path = "../fuzz/oracle.rs"]
mod oracle;

use std::panic::catch_unwind;
use std::path::Path;

/// Plays every input of a target and names those that fail.
fn replay(target: &str, check: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let (mut played, mut failed) = (0, Vec::new());
    for entry in entries {
        let path = entry.expect("a readable entry").path();
        let data = std::fs::read(&path).expect("a readable file");
        played += 1;
        if catch_unwind(|| check(&data)).is_err() {
            failed.push(path.display().to_string());
        }
    }
    assert!(failed.is_empty(), "{} of {played} fail:\n{}", failed.len(), failed.join("\n"));
    assert!(played >= 20, "only {played} inputs in {}", dir.display());
}

#[test]
fn request_heads() {
    replay("request_head", oracle::request_head);
}

#[test]
fn answer_heads() {
    replay("answer_head", oracle::answer_head);
}

#[test]
fn chunked_bodies() {
    replay("chunk_decoder", oracle::chunk_decoder);
}

#[test]
fn fields_of_the_cache() {
    replay("cache_fields", cached::cache_fields);
}

#[test]
fn stored_forms() {
    replay("stored_form", cached::stored_form);
}
