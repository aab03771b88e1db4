//! A complete response in wire format, prebuilt for responses that are sent repeatedly.

use super::send;
use crate::http::message::{BodyLength, Response};

/// Head and body for an HTTP/1.1 keep-alive connection and a request that is not HEAD.
#[derive(Clone, Debug, Default)]
pub(crate) struct SerializedResponse {
    text: Vec<u8>,
    pub(super) body_bytes: u64,
    /// Offsets of the id in the text, which each response replaces by its own.
    id_offsets: Vec<usize>,
}

/// Bytes of an id in the text.
const ID_BYTES: usize = 36;

impl SerializedResponse {
    /// Replaces the content by this head and body. `placeholder` stands where each response has
    /// its own id.
    pub(crate) fn serialize(&mut self, response: &Response, body: &[u8], placeholder: Option<&[u8; ID_BYTES]>) {
        self.text.clear();
        self.body_bytes = body.len() as u64;
        send::push_status_and_fields(&mut self.text, response);
        send::push_length(&mut self.text, BodyLength::Known(self.body_bytes));
        self.text.extend_from_slice(b"\r\n");
        self.text.extend_from_slice(body);
        self.id_offsets.clear();
        if let Some(placeholder) = placeholder {
            let offsets = self.text.windows(ID_BYTES).enumerate().filter(|(_, window)| *window == placeholder);
            self.id_offsets.extend(offsets.map(|(offset, _)| offset));
        }
    }

    /// Appends the response with `id`.
    pub(super) fn write(&self, id: Option<&[u8; ID_BYTES]>, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&self.text);
        if let Some(id) = id {
            for offset in &self.id_offsets {
                out[start + offset..][..ID_BYTES].copy_from_slice(id);
            }
        }
    }
}
