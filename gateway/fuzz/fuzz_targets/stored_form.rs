#![no_main]

#[path = "../cache_oracle.rs"]
mod cache_oracle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| cache_oracle::stored_form(data));
