//! The body of an answer on its way out, wherever it comes from.

use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::denied::Denied;
use super::fetch::Answer;
use super::posted::Posted;
use crate::cache::fill::Reader;
use crate::http::body::{BodyError, Source};
use crate::http::fields::Fields;
use crate::http::h1::Written;
use crate::http::message::Response;
use crate::upstream::Tunnel;

/// Where an answer's bytes come from.
pub enum Body<'a> {
    Bytes(Bytes),
    Answer(Answer<'a>),
    Fill(Reader),
    Posted(Box<Posted<'a>>),
    /// With a head of its own.
    Denied(Rc<Denied>),
}

impl Body<'_> {
    pub const EMPTY: Body<'static> = Body::Bytes(Bytes::new());

    /// The upstream's connection, where it has switched protocols.
    pub fn into_tunnel(self) -> Option<Tunnel> {
        match self {
            Body::Answer(answer) => answer.into_tunnel(),
            Body::Bytes(_) | Body::Fill(_) | Body::Posted(_) | Body::Denied(_) => None,
        }
    }

    /// Moves a head of the body's own into `response`.
    pub fn settle(&mut self, response: &mut Response) {
        if let Body::Denied(denied) = self {
            let Denied { response: own, page, .. } = &**denied;
            response.status = own.status;
            response.fields.copy_from(&own.fields);
            response.length = own.length;
            *self = Body::Bytes(page.clone());
        }
    }

    /// Head and body as they were written before.
    pub fn written(&self) -> Option<&Written> {
        match self {
            Body::Denied(denied) => Some(&denied.written),
            _ => None,
        }
    }
}

impl Source for Body<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            Body::Bytes(_) | Body::Denied(_) => Poll::Ready(Ok(())),
            Body::Answer(answer) => answer.poll_fill(cx),
            Body::Fill(reader) => reader.poll_fill(cx),
            Body::Posted(answer) => answer.poll_fill(cx),
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            Body::Bytes(bytes) => bytes,
            // It has none before it is settled.
            Body::Denied(_) => &[],
            Body::Answer(answer) => answer.data(),
            Body::Fill(reader) => reader.data(),
            Body::Posted(answer) => answer.data(),
        }
    }

    fn whole(&self) -> Option<&[u8]> {
        match self {
            Body::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            Body::Bytes(bytes) => bytes.advance(count),
            Body::Denied(_) => {}
            Body::Answer(answer) => answer.consume(count),
            Body::Fill(reader) => reader.consume(count),
            Body::Posted(answer) => answer.consume(count),
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        match self {
            Body::Answer(answer) => answer.trailers(),
            Body::Fill(reader) => reader.trailers(),
            Body::Posted(answer) => answer.trailers(),
            Body::Bytes(_) | Body::Denied(_) => None,
        }
    }
}
