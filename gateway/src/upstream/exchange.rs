//! An answer under way: its body as a source, and the connection it comes over, kept for the next request if it ends well.

use std::sync::Arc;
use std::task::{Context, Poll};

use super::pool;
use crate::endpoint::Visit;
use crate::http::body::{BodyError, RequestBody, Source};
use crate::http::fields::Fields;
use crate::http::h1::Link;

/// The body of an upstream's answer. While it is read, what is left of the request's body is sent.
pub struct Exchange<'a> {
    link: Option<Box<Link>>,
    trailers: Option<Box<Fields>>,
    body: RequestBody<'a>,
    visit: Visit,
}

/// A connection that speaks no HTTP any more; its endpoint counts it as in flight.
pub struct Tunnel {
    pub link: Box<Link>,
    _visit: Visit,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(link: Box<Link>, body: RequestBody<'a>, visit: Visit) -> Self {
        let mut exchange = Exchange { link: Some(link), trailers: None, body, visit };
        exchange.finish_if_idle();
        exchange
    }

    /// The endpoint that answered.
    pub fn endpoint(&self) -> Arc<str> {
        Arc::clone(&self.visit.endpoint().name)
    }

    /// The connection itself, after it has switched protocols.
    pub fn into_tunnel(self) -> Option<Tunnel> {
        self.link.map(|link| Tunnel { link, _visit: self.visit })
    }

    fn finish_if_idle(&mut self) {
        if let Some(mut link) = self.link.take_if(|link| link.is_idle()) {
            self.trailers = link.take_trailers();
            pool::give(link.address(), link);
        }
    }
}

impl Source for Exchange<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let Some(link) = &mut self.link else { return Poll::Ready(Ok(())) };
        let filled = link.poll_body(cx, &mut self.body);
        if matches!(filled, Poll::Ready(Ok(()))) && link.data().is_empty() {
            self.finish_if_idle();
        }
        if filled.is_pending() && self.body.poll_gone(cx).is_ready() {
            return Poll::Ready(Err(BodyError::ClientGone));
        }
        filled
    }

    fn data(&self) -> &[u8] {
        self.link.as_ref().map_or(&[], |link| link.data())
    }

    fn consume(&mut self, count: usize) {
        if let Some(link) = &mut self.link {
            link.consume(count);
            self.finish_if_idle();
        }
    }

    fn trailers(&self) -> Option<&Fields> {
        self.trailers.as_deref().or_else(|| self.link.as_ref()?.trailers())
    }
}
