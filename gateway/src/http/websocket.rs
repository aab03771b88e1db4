//! The keys of a WebSocket handshake over HTTP/1.1 (RFC 6455 sections 4.1 and 4.2.2). A client of
//! HTTP/2 has none (RFC 8441 section 5), so that the gateway makes one for the origin.

use aws_lc_rs::{digest, rand};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// The protocol as `Upgrade` and `:protocol` name it.
pub(crate) const PROTOCOL: &str = "websocket";
/// The field with the key of a request.
pub(crate) const KEY: &str = "sec-websocket-key";
/// The field with the answer to the key.
pub(crate) const ACCEPT: &str = "sec-websocket-accept";

/// A key for one request; `None`: the system gives no random bytes.
pub(crate) fn new_key() -> Option<String> {
    let mut nonce = [0_u8; 16];
    rand::fill(&mut nonce).ok()?;
    Some(STANDARD.encode(nonce))
}

/// The answer that proves that an origin has understood a request with `key`.
pub(crate) fn accept(key: &[u8]) -> String {
    const SUFFIX: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &[key, SUFFIX].concat());
    STANDARD.encode(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_that_of_the_rfc() {
        assert_eq!(accept(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        assert_ne!(new_key(), new_key());
    }
}
