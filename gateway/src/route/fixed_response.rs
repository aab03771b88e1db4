//! Responses that a route gives without an upstream: a redirect, or a fixed text.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;

use super::template::{Template, TemplateValues};
use crate::http::compressed_forms::CompressedForms;
use crate::http::message::{BodyLength, Response};

/// The action of a route on a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RouteAction {
    /// Forwards it to the upstream, or answers from the cache.
    Forward,
    Redirect(Redirect),
    Respond(FixedResponse),
}

/// A redirect (RFC 9110 section 15.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Redirect {
    pub(crate) to: Template,
    pub(crate) status: StatusCode,
}

/// A response with a fixed body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FixedResponse {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
    /// Empty: none.
    pub(crate) content_type: String,
    pub(crate) forms: Arc<CompressedForms>,
}

impl RouteAction {
    /// Writes the head and returns the body; `None` for a route that forwards.
    pub(crate) fn answer(&self, values: &TemplateValues<'_>, response: &mut Response) -> Option<Bytes> {
        match self {
            RouteAction::Forward => None,
            RouteAction::Redirect(Redirect { to, status }) => {
                *response = Response::new(*status);
                response.length = BodyLength::Known(0);
                response.fields.push(b"location", &location(to.render(values)));
                Some(Bytes::new())
            }
            RouteAction::Respond(FixedResponse { status, body, content_type, forms }) => {
                *response = Response::new(*status);
                response.forms = Some(Arc::clone(forms));
                let is_bodiless = matches!(status.as_u16(), 204 | 304);
                response.length = if is_bodiless { BodyLength::Empty } else { BodyLength::Known(body.len() as u64) };
                // A 205 has no content to describe (RFC 9110 section 15.3.6).
                if !content_type.is_empty() && !is_bodiless && *status != StatusCode::RESET_CONTENT {
                    response.fields.push(b"content-type", content_type.as_bytes());
                }
                Some(if is_bodiless { Bytes::new() } else { body.clone() })
            }
        }
    }
}

/// A target that begins with several slashes would name another host (RFC 3986 section 4.2).
fn location(mut target: Vec<u8>) -> Vec<u8> {
    let slashes = target.iter().take_while(|byte| matches!(byte, b'/' | b'\\')).count();
    if slashes > 1 {
        target.drain(..slashes - 1);
        target[0] = b'/';
    }
    target
}
