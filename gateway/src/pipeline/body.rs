//! The body of an answer on its way out, wherever it comes from.

use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::fetch::Answer;
use super::posted::Posted;
use crate::cache::fill::Reader;
use crate::http::body::{BodyError, Source};
use crate::http::fields::Fields;
use crate::upstream::Tunnel;

/// Where an answer's bytes come from.
pub enum Body<'a> {
    Bytes(Bytes),
    Answer(Answer<'a>),
    Fill(Reader),
    Posted(Box<Posted<'a>>),
}

impl Body<'_> {
    pub const EMPTY: Body<'static> = Body::Bytes(Bytes::new());

    /// The upstream's connection, where it has switched protocols.
    pub fn into_tunnel(self) -> Option<Tunnel> {
        match self {
            Body::Answer(answer) => answer.into_tunnel(),
            Body::Bytes(_) | Body::Fill(_) | Body::Posted(_) => None,
        }
    }
}

impl Source for Body<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            Body::Bytes(_) => Poll::Ready(Ok(())),
            Body::Answer(answer) => answer.poll_fill(cx),
            Body::Fill(reader) => reader.poll_fill(cx),
            Body::Posted(answer) => answer.poll_fill(cx),
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            Body::Bytes(bytes) => bytes,
            Body::Answer(answer) => answer.data(),
            Body::Fill(reader) => reader.data(),
            Body::Posted(answer) => answer.data(),
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            Body::Bytes(bytes) => bytes.advance(count),
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
            Body::Bytes(_) => None,
        }
    }
}
