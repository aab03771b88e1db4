#![no_main]

#[path = "../frames_oracle.rs"]
mod frames_oracle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| frames_oracle::frames(data));
