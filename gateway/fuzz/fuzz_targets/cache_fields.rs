#![no_main]

#[path = "../cached.rs"]
mod cached;

libfuzzer_sys::fuzz_target!(|data: &[u8]| cached::cache_fields(data));
