//! A complete response in wire format, prebuilt for responses that are sent repeatedly.

use super::send;
use crate::http::message::{BodyLength, Response};

/// Head and body for an HTTP/1.1 keep-alive connection and a request that is not HEAD.
#[derive(Clone, Debug, Default)]
pub(crate) struct SerializedResponse {
    pub(super) text: Vec<u8>,
    pub(super) body_bytes: u64,
}

impl SerializedResponse {
    /// Replaces the content by this head and body.
    pub(crate) fn serialize(&mut self, response: &Response, body: &[u8]) {
        self.text.clear();
        self.body_bytes = body.len() as u64;
        send::push_status_and_fields(&mut self.text, response);
        send::push_length(&mut self.text, BodyLength::Known(self.body_bytes));
        self.text.extend_from_slice(b"\r\n");
        self.text.extend_from_slice(body);
    }
}
