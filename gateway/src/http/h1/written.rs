//! A whole answer as it is written on most connections, for one that is given again and again.

use super::send;
use super::server::write_start;
use crate::http::message::{Length, Response};

/// Head and body for a connection that stays open, to a request that wants both.
#[derive(Debug)]
pub struct Written {
    pub(super) text: Vec<u8>,
    pub(super) body_bytes: u64,
}

impl Written {
    /// `response` has a body of known length, and this is it.
    pub fn new(response: &Response, body: &[u8]) -> Self {
        let (mut text, body_bytes) = (Vec::new(), body.len() as u64);
        write_start(response, &mut text);
        send::push_length(&mut text, Length::Known(body_bytes));
        text.extend_from_slice(b"\r\n");
        text.extend_from_slice(body);
        Written { text, body_bytes }
    }
}
