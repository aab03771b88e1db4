//! Requests with unsafe methods: forward, invalidate what they change (RFC 9111 section 4.4), store
//! the response to POST where it is that of GET.

use std::rc::Rc;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http::Method;
use shard::KeyBuilder;

use super::context::RequestContext;
use super::fetch::Fetch;
use super::forward::UpstreamBody;
use super::response_body::ResponseBody;
use super::store_post::StorePostResponse;
use crate::cache::{key, policy, tags};
use crate::error::Error;
use crate::http::fields::KnownField;
use crate::http::message::{BodyLength, Request};
use crate::http::request_body::RequestBody;

impl<'c> RequestContext<'c> {
    /// Forwards the request and invalidates. A route for other methods may have stored the target,
    /// so this applies to routes that do not cache, too.
    pub(super) async fn unsafe_method<'b>(&mut self, body: RequestBody<'b>) -> Result<ResponseBody<'b>, Error> {
        let fetch = self.fetch_for_post();
        let body = self.forward(None, body).await?;
        Ok(self.after_unsafe_method(fetch, body))
    }

    /// The fetch under which the response to POST may be stored. Call it before the request
    /// is forwarded.
    fn fetch_for_post(&self) -> Option<Fetch> {
        self.route().config.cache.as_ref().filter(|_| self.request.method == Method::POST)?;
        let mut builder = KeyBuilder::new();
        key::write_primary(&mut builder, &self.snapshot.cache, self.request, &self.caller.region);
        Some(Fetch::begin(self, builder.key().to_owned()))
    }

    /// Invalidates, then stores the response where it is the new state of the target. If the target
    /// was invalidated during the request, the order of the two changes is unknown and nothing is
    /// stored.
    fn after_unsafe_method<'b>(&mut self, fetch: Option<Fetch>, body: UpstreamBody<'b>) -> ResponseBody<'b> {
        let view = &self.worker.view;
        let tags = [tags::url_tag(&self.snapshot.cache, self.request)];
        let fetch = fetch
            .filter(|fetch| view.is_unchanged_since(&self.caller.region, &fetch.key.as_key(), &tags, fetch.fill_epoch));
        self.invalidate();
        let config = &self.snapshot.cache;
        let Some(mut fetch) = fetch.filter(|_| policy::is_storable_post_response(config, self.request, self.response))
        else {
            return ResponseBody::Upstream(Box::new(body));
        };
        // The request's own invalidation does not apply to its response. One by another node since
        // the request was sent does, even if it is reported later.
        fetch.fill_epoch = view.epoch_snapshot().with_beginning_of(fetch.fill_epoch);
        let Ok(plan) = self.store_plan(&fetch) else { return ResponseBody::Upstream(Box::new(body)) };
        self.record.stored = true;
        let entry = fetch.pending_entry(self.caller.region, plan, None);
        if matches!(self.response.length, BodyLength::Empty | BodyLength::Known(0)) {
            entry.store(self.worker, self.snapshot, Bytes::new());
            return ResponseBody::Upstream(Box::new(body));
        }
        ResponseBody::StorePost(Box::new(StorePostResponse {
            source: body,
            length: self.response.length,
            body: BytesMut::new(),
            reservation: self.worker.fills.budget().reserve(),
            entry: Some(entry),
            worker: Rc::clone(self.worker),
            snapshot: Arc::clone(self.snapshot),
        }))
    }

    /// After a successful response: invalidates the target, and the URIs of the same origin that
    /// `Location` and `Content-Location` name (RFC 9111 section 4.4), in every configured region.
    fn invalidate(&self) {
        if !(self.response.status.is_success() || self.response.status.is_redirection()) {
            return;
        }
        let mut changed = self.request.clone();
        self.remove(&mut changed);
        for name in [KnownField::Location, KnownField::ContentLocation] {
            let uri = self.response.fields.get(name).and_then(|uri| std::str::from_utf8(uri).ok());
            if let Some(target) = uri.and_then(|uri| key::resolve_same_origin(&self.snapshot.cache, uri, self.request))
            {
                changed.set_target(&target);
                self.remove(&mut changed);
            }
        }
    }

    fn remove(&self, request: &mut Request) {
        let mut builder = KeyBuilder::new();
        let view = &self.worker.view;
        // The stored responses of a canary are those of another upstream for the same resource.
        for number in self.route().key_numbers() {
            request.key_route = number;
            for region in self.snapshot.identity.regions() {
                key::write_primary(&mut builder, &self.snapshot.cache, request, region);
                view.remove(region, &builder.key());
            }
        }
    }
}
