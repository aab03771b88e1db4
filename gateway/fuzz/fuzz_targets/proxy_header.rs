#![no_main]

#[path = "../connection_oracle.rs"]
mod connection_oracle;

libfuzzer_sys::fuzz_target!(|data: &[u8]| connection_oracle::proxy_header(data));
