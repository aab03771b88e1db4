//! The body of a response to a client, whatever its source.

use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};

use super::context::RequestContext;
use super::forward::UpstreamBody;
use super::pieced_body::PiecedBody;
use super::prebuilt_429::Prebuilt429;
use super::shared_body::SharedBody;
use super::store_post::StorePostResponse;
use crate::compress::CompressedBody;
use crate::http::body::{BodyError, BodySource};
use crate::http::buffer::ReadSize;
use crate::http::fields::Fields;
use crate::http::h1::SerializedResponse;
use crate::http::h2::TunnelBody;
use crate::http::message::Response;
use crate::identify::{RequestId, RequestUuid, UuidText};
use crate::upstream::Tunnel;

/// The source of a response's bytes.
pub(crate) enum ResponseBody<'b> {
    Bytes(Bytes),
    /// Boxed: most responses have none, and all of them are moved several times.
    Upstream(Box<UpstreamBody<'b>>),
    Fill(SharedBody),
    /// A stored part and the rest of it, which are not stored together.
    Pieced(Box<PiecedBody>),
    StorePost(Box<StorePostResponse<'b>>),
    Compressed(Box<CompressedBody<ResponseBody<'b>>>),
    /// A whole response, head included, and the id that it has where the response has a
    /// placeholder.
    Prebuilt(Rc<Prebuilt429>, Option<RequestUuid>),
    /// The upstream's side of a tunnel.
    Tunnel(Box<TunnelBody>),
}

impl ResponseBody<'_> {
    pub(crate) const EMPTY: ResponseBody<'static> = ResponseBody::Bytes(Bytes::new());

    /// The upstream's connection, after the upstream has switched protocols.
    pub(crate) fn into_tunnel(self) -> Option<Tunnel> {
        match self {
            ResponseBody::Upstream(body) => body.into_tunnel(),
            _ => None,
        }
    }

    /// Lets the client of `context` continue alone if it falls behind the other readers of a shared
    /// fetch.
    pub(super) fn allow_continuation(&mut self, context: &RequestContext<'_>) {
        if let ResponseBody::Fill(body) = self {
            body.allow_continuation(context);
        }
    }

    /// Copies the head of a prebuilt response into `response`.
    pub(crate) fn unpack_head(&mut self, response: &mut Response) {
        if let ResponseBody::Prebuilt(prebuilt, id) = self {
            let Prebuilt429 { response: own, page, .. } = &**prebuilt;
            response.status = own.status;
            response.fields.copy_from(&own.fields);
            response.length = own.length;
            *self = ResponseBody::Bytes(match id {
                None => page.clone(),
                Some(id) => {
                    RequestId::Made(*id).write(&mut response.fields);
                    prebuilt.page_with(*id)
                }
            });
        }
    }

    /// Head and body as HTTP/1.1 bytes, where they are prebuilt, and the id that replaces their
    /// placeholder.
    pub(crate) fn serialized(&self) -> Option<(&SerializedResponse, Option<UuidText>)> {
        match self {
            ResponseBody::Prebuilt(prebuilt, id) => Some((&prebuilt.serialized, id.map(RequestUuid::text))),
            _ => None,
        }
    }
}

impl BodySource for ResponseBody<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match self {
            ResponseBody::Bytes(_) | ResponseBody::Prebuilt(..) => Poll::Ready(Ok(())),
            ResponseBody::Upstream(body) => body.poll_fill(cx),
            ResponseBody::Fill(body) => body.poll_fill(cx),
            ResponseBody::Pieced(body) => body.poll_fill(cx),
            ResponseBody::StorePost(body) => body.poll_fill(cx),
            ResponseBody::Compressed(body) => body.poll_fill(cx),
            ResponseBody::Tunnel(body) => body.poll_fill(cx),
        }
    }

    fn data(&self) -> &[u8] {
        match self {
            ResponseBody::Bytes(bytes) => bytes,
            // `unpack_head` turns it into `Bytes` before its body is read.
            ResponseBody::Prebuilt(..) => &[],
            ResponseBody::Upstream(body) => body.data(),
            ResponseBody::Fill(body) => body.data(),
            ResponseBody::Pieced(body) => body.data(),
            ResponseBody::StorePost(body) => body.data(),
            ResponseBody::Compressed(body) => body.data(),
            ResponseBody::Tunnel(body) => body.data(),
        }
    }

    fn set_read_size(&mut self, size: ReadSize) {
        match self {
            ResponseBody::Upstream(body) => body.set_read_size(size),
            ResponseBody::Fill(body) => body.set_read_size(size),
            ResponseBody::Pieced(body) => body.set_read_size(size),
            ResponseBody::Tunnel(body) => body.set_read_size(size),
            ResponseBody::Compressed(body) => body.set_read_size(size),
            ResponseBody::Bytes(_) | ResponseBody::StorePost(_) | ResponseBody::Prebuilt(..) => {}
        }
    }

    fn complete_body(&self) -> Option<&[u8]> {
        match self {
            ResponseBody::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    fn consume(&mut self, count: usize) {
        match self {
            ResponseBody::Bytes(bytes) => bytes.advance(count),
            ResponseBody::Prebuilt(..) => {}
            ResponseBody::Upstream(body) => body.consume(count),
            ResponseBody::Fill(body) => body.consume(count),
            ResponseBody::Pieced(body) => body.consume(count),
            ResponseBody::StorePost(body) => body.consume(count),
            ResponseBody::Compressed(body) => body.consume(count),
            ResponseBody::Tunnel(body) => body.consume(count),
        }
    }

    fn take_bytes(&mut self, max: usize) -> Bytes {
        match self {
            ResponseBody::Bytes(bytes) => bytes.split_to(bytes.len().min(max)),
            ResponseBody::Fill(body) => body.take_bytes(max),
            ResponseBody::Pieced(body) => body.take_bytes(max),
            ResponseBody::Upstream(body) => body.take_bytes(max),
            ResponseBody::StorePost(body) => body.take_bytes(max),
            ResponseBody::Compressed(body) => body.take_bytes(max),
            ResponseBody::Prebuilt(..) => Bytes::new(),
            ResponseBody::Tunnel(body) => body.take_bytes(max),
        }
    }

    fn may_have_trailers(&self) -> bool {
        match self {
            ResponseBody::Upstream(body) => body.may_have_trailers(),
            ResponseBody::Fill(body) => body.may_have_trailers(),
            ResponseBody::StorePost(body) => body.may_have_trailers(),
            // The length of a compressed body is not known.
            ResponseBody::Compressed(_) => false,
            ResponseBody::Bytes(_) | ResponseBody::Pieced(_) | ResponseBody::Prebuilt(..) | ResponseBody::Tunnel(_) => {
                false
            }
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        match self {
            ResponseBody::Upstream(body) => body.trailers(),
            ResponseBody::Fill(body) => body.trailers(),
            ResponseBody::StorePost(body) => body.trailers(),
            ResponseBody::Compressed(body) => body.trailers(),
            ResponseBody::Bytes(_) | ResponseBody::Pieced(_) | ResponseBody::Prebuilt(..) | ResponseBody::Tunnel(_) => {
                None
            }
        }
    }
}
