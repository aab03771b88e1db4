//! A whole answer as it is written on most connections, for one that is given again and again.

use super::send;
use crate::http::message::{Length, Response};

/// Head and body for a connection that stays open, to a request that wants both.
#[derive(Clone, Debug, Default)]
pub struct Written {
    pub(super) text: Vec<u8>,
    pub(super) body_bytes: u64,
}

impl Written {
    /// Becomes the answer with this head and body.
    pub fn write(&mut self, response: &Response, body: &[u8]) {
        self.text.clear();
        self.body_bytes = body.len() as u64;
        send::push_start(&mut self.text, response);
        send::push_length(&mut self.text, Length::Known(self.body_bytes));
        self.text.extend_from_slice(b"\r\n");
        self.text.extend_from_slice(body);
    }
}
