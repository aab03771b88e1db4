//! The answer to POST that says what GET would get (RFC 9110 section 9.3.3): stored on its way to the client.

use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::Method;
use shard::KeyBuilder;

use super::fetch::Answer;
use super::shared::{Fetch, Filling};
use super::{Body, Passage, Site, Worker};
use crate::cache::fill::Held;
use crate::cache::{key, policy, tags};
use crate::http::body::{BodyError, Source};
use crate::http::fields::Fields;
use crate::http::message::{Length, Request, Response};
use crate::identify::Caller;
use crate::route::Route;

/// An answer that is stored as its client takes it; where the client leaves, nothing is.
pub struct Posted<'a> {
    answer: Answer<'a>,
    length: Length,
    body: BytesMut,
    held: Held,
    filling: Option<Filling>,
    worker: Rc<Worker>,
    site: Arc<Site>,
}

impl Passage<'_> {
    /// To be called before a POST is forwarded whose answer may be stored.
    pub(super) fn post<'f>(&self, route: &'f Route, caller: &'f Caller, request: &Request) -> Option<Fetch<'f>> {
        let policy = route.settings.cache.as_ref().filter(|_| request.method == Method::POST)?;
        let mut builder = KeyBuilder::new();
        key::primary(&mut builder, &self.site.cache, request, &caller.region);
        Some(Fetch::begin(self, policy, caller, request, builder.key().to_owned()))
    }

    /// Ends what an unsafe request has changed, and stores its answer where that is what its target has become. Where another
    /// changed it meanwhile, nobody knows which came last, and nothing is stored.
    pub(super) fn changed<'a>(
        &mut self,
        post: Option<Fetch<'_>>,
        caller: &Caller,
        request: &Request,
        response: &Response,
        answer: Answer<'a>,
    ) -> Body<'a> {
        let view = &self.worker.view;
        let tags = [tags::address(&self.site.cache, request)];
        let post = post.filter(|post| view.still(&post.key.as_key(), &tags, post.since));
        self.invalidate(caller, request, response);
        let Some(mut post) = post.filter(|_| policy::is_answer_of_target(request, response)) else {
            return Body::Answer(answer);
        };
        // After its own change.
        post.since = view.since();
        let Ok(fit) = self.fit(&post, request, response) else { return Body::Answer(answer) };
        self.story.stored = true;
        let filling = post.filling(fit, None);
        if matches!(response.length, Length::Empty | Length::Known(0)) {
            filling.store(self.worker, self.site, Bytes::new());
            return Body::Answer(answer);
        }
        Body::Posted(Box::new(Posted {
            answer,
            length: response.length,
            body: BytesMut::new(),
            held: self.worker.fills.hold(),
            filling: Some(filling),
            worker: Rc::clone(self.worker),
            site: Arc::clone(self.site),
        }))
    }
}

impl Source for Posted<'_> {
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        ready!(self.answer.poll_fill(cx))?;
        // Stored before its end leaves, so that who hears of it finds it; and nobody asks for more once the length is reached.
        let data = self.answer.data();
        let is_end = data.is_empty() || self.length == Length::Known((self.body.len() + data.len()) as u64);
        if is_end && let Some(filling) = self.filling.take() {
            self.body.extend_from_slice(data);
            filling.store(&self.worker, &self.site, std::mem::take(&mut self.body).freeze());
        }
        Poll::Ready(Ok(()))
    }

    fn data(&self) -> &[u8] {
        self.answer.data()
    }

    fn consume(&mut self, count: usize) {
        if self.filling.is_some() {
            let settings = &self.site.cache;
            let fits = (self.body.len() + count) as u64 <= settings.object_bytes;
            if fits && self.held.grow(count as u64, settings.fill_bytes) {
                self.body.extend_from_slice(&self.answer.data()[..count]);
            } else {
                self.filling = None;
                self.held.give_back();
                self.body = BytesMut::new();
            }
        }
        self.answer.consume(count);
    }

    fn trailers(&self) -> Option<&Fields> {
        self.answer.trailers()
    }
}
