//! The shared fetch: one request to the origin on behalf of all who wait, and what becomes of its answer: stored where it
//! belongs, freshening what is stored, or marked as nothing to wait for.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use shard::{CacheKey, Entry, Hit, KeyBuilder, Reach, Region, Since};

use super::fetch::{Answer, takes_trailers};
use super::{Body, CONDITIONS, Passage, Site, Worker};
use crate::cache::control::Control;
use crate::cache::fill::{Feed, Lead};
use crate::cache::part::{self, Extent};
use crate::cache::policy::{self, NoStore, PASS_FOR};
use crate::cache::stored::{Meta, Object, Variants};
use crate::cache::{RoutePolicy, Settings, key, tags};
use crate::error::{Error, Kind};
use crate::http::body::{RequestBody, Source};
use crate::http::fields::Known;
use crate::http::message::{Length, Request, Response, StatusCode};
use crate::identify::Caller;
use crate::respond::{CacheResult, Detail};
use crate::route::Route;

/// How long a key counts as uncacheable after a server error: long enough to let a crowd through, short enough to recover.
const PASS_AFTER_ERROR: Duration = Duration::from_secs(1);
/// Fields by which a client asks for a part: a shared fetch is for the whole.
pub(super) const PART: [Known; 2] = [Known::Range, Known::IfRange];

/// What one fetch is for, and since when it is under way.
pub(super) struct Fetch<'f> {
    pub(super) policy: &'f RoutePolicy,
    pub(super) caller: &'f Caller,
    pub(super) key: CacheKey,
    asked: Control,
    pub(super) since: Since,
    sent: Instant,
    /// What time it was then.
    sent_at: SystemTime,
    random: u64,
}

impl<'f> Fetch<'f> {
    pub(super) fn begin(
        passage: &Passage<'_>,
        policy: &'f RoutePolicy,
        caller: &'f Caller,
        request: &Request,
        key: CacheKey,
    ) -> Self {
        let since = passage.worker.view.since();
        let random = passage.site.identity.fresh();
        let (asked, sent, sent_at) = (Passage::asked(request), Instant::now(), passage.worker.view.store().wall_time());
        Fetch { policy, caller, key, asked, since, sent, sent_at, random }
    }

    /// Judges an answer whose head has just arrived.
    pub(super) fn judge(
        &self,
        settings: &Settings,
        request: &Request,
        response: &Response,
    ) -> Result<(Object, Duration), NoStore> {
        let delay = self.sent.elapsed();
        let now = self.sent_at + delay;
        let (mut object, keep) = policy::judge(request, &self.asked, response, self.policy, settings, now, delay)?;
        object.lifetime = policy::jittered(object.lifetime, self.policy.ttl_jitter_percent, self.random);
        Ok((object, keep))
    }

    /// What stores a body of this fetch.
    pub(super) fn filling(self, fit: Fit, extent: Option<Extent>) -> Filling {
        let Fit { object, keep, place } = fit;
        let (since, region) = (self.since, self.caller.region);
        Filling { object, extent, keep, since, key: place.unwrap_or(self.key), region }
    }
}

/// An answer that may be stored, for how long, and where, if not at the key it was fetched for.
pub(super) struct Fit {
    object: Object,
    keep: Duration,
    place: Option<CacheKey>,
}

impl Passage<'_> {
    /// Fetches from the origin on behalf of all who wait.
    pub(super) async fn lead(
        &mut self,
        route: &Route,
        fetch: Fetch<'_>,
        lead: Lead,
        request: &Request,
        response: &mut Response,
    ) -> Result<Body<'static>, Error> {
        let mut validated =
            self.stale.clone().filter(|hit| policy::object(&hit.meta).is_some_and(Object::has_validator));
        let exchange = match self.exchange(route, fetch.caller, request, response, &mut validated).await {
            Ok(exchange) => exchange,
            Err(error) => {
                if !matches!(error.kind(), Kind::ClientGone) {
                    // An open breaker answers the next at once, and no better.
                    let is_final = error.kind() == Kind::BreakerOpen;
                    if is_final { lead.fail_all(error.kind()) } else { lead.fail(error.kind()) }
                }
                return Err(error);
            }
        };
        if response.status == StatusCode::NOT_MODIFIED
            && let Some(hit) = &validated
            && let Some(object) = policy::object(&hit.meta)
        {
            *response = policy::freshen(object, response);
            self.story.cache = CacheResult::Revalidated;
            let body = hit.body().clone();
            response.length = Length::Known(body.len() as u64);
            if let Ok(fit) = fetch.judge(&self.site.cache, request, response) {
                self.store_again(&fetch, fit, &body);
                self.story.stored = true;
            }
            lead.release();
            return Ok(match self.conditional(request, response, Body::Bytes(body)) {
                Body::Bytes(body) => Body::Bytes(policy::cut(request, body, response)),
                other => other,
            });
        }
        if response.status.is_server_error()
            && let Some(body) = self.stale_answer(request, response)
        {
            lead.fail_all(Kind::Upstream);
            self.story.degraded = "stale";
            self.story.detail = Detail::Reason("origin_error");
            return Ok(body);
        }
        if self.story.cache != CacheResult::Pass {
            self.story.cache = CacheResult::Miss;
        }
        if request.method == http::Method::HEAD {
            if let Some(hit) = self.stale.clone() {
                self.learn_from_head(&fetch, request, response, &hit);
            }
            lead.release();
            self.story.detail = Detail::Reason(NoStore::Method.as_str());
            return Ok(self.conditional(request, response, Body::Answer(exchange)));
        }
        Ok(self.settle(fetch, lead, exchange, request, response))
    }

    /// Stores a whole answer as it passes, or says why not.
    pub(super) fn settle(
        &mut self,
        fetch: Fetch<'_>,
        lead: Lead,
        exchange: Answer<'static>,
        request: &Request,
        response: &mut Response,
    ) -> Body<'static> {
        let fit = match self.fit(&fetch, request, response) {
            Ok(fit) => fit,
            Err(reason) => {
                self.mark_uncacheable(&lead, &fetch, response);
                lead.release();
                self.story.detail = Detail::Reason(reason.as_str());
                return self.conditional(request, response, Body::Answer(exchange));
            }
        };
        self.story.stored = true;
        let lead = if fit.place.is_some() {
            // Nobody knew that this key varies so: those who wait look again, each for a variant of its own.
            lead.release();
            Lead::solo()
        } else {
            lead
        };
        self.fill(fetch.filling(fit, None), lead, exchange, request, response)
    }

    /// Whether and where an answer may be stored.
    pub(super) fn fit(&self, fetch: &Fetch<'_>, request: &Request, response: &Response) -> Result<Fit, NoStore> {
        let (object, keep) = fetch.judge(&self.site.cache, request, response)?;
        self.check_size(response)?;
        Ok(Fit { object, keep, place: self.place(fetch, request, response)? })
    }

    /// Asks the origin for the whole, on condition where `validated` has one. A 304 that speaks of something else than what is
    /// stored says nothing: it is asked once more, without condition.
    async fn exchange(
        &mut self,
        route: &Route,
        caller: &Caller,
        request: &Request,
        response: &mut Response,
        validated: &mut Option<Hit<Meta>>,
    ) -> Result<Answer<'static>, Error> {
        loop {
            let mut outgoing = request.clone();
            CONDITIONS.into_iter().chain(PART).for_each(|known| outgoing.fields.remove(known));
            let object = validated.as_ref().and_then(|hit| policy::object(&hit.meta));
            if let Some(object) = object {
                policy::make_conditional(object, &mut outgoing.fields);
            }
            let exchange = self.forward(route, caller, &mut outgoing, RequestBody::Empty, response).await?;
            let is_other = object.is_some_and(|object| !policy::is_selected(object, response));
            if response.status != StatusCode::NOT_MODIFIED || !is_other {
                return Ok(exchange);
            }
            *validated = None;
        }
    }

    /// What an answer to HEAD says of the answer to GET that is stored: it freshens it, or shows that it is outdated
    /// (RFC 9111 section 4.3.5).
    fn learn_from_head(&self, fetch: &Fetch<'_>, request: &Request, response: &Response, hit: &Hit<Meta>) {
        let Some(object) = policy::object(&hit.meta) else { return };
        if response.status != StatusCode::OK || request.fields.has(Known::Authorization) {
            return;
        }
        let body = hit.body();
        match policy::agrees(object, body.len() as u64, response) {
            None => {}
            Some(false) => self.worker.view.remove(&fetch.caller.region, &fetch.key.as_key()),
            Some(true) => {
                if let Ok(fit) = fetch.judge(&self.site.cache, request, &policy::freshen(object, response)) {
                    self.store_again(fetch, fit, body);
                }
            }
        }
    }

    /// Stores what is stored already with a new head.
    fn store_again(&self, fetch: &Fetch<'_>, (object, keep): (Object, Duration), body: &Bytes) {
        let entry = Entry::new(Meta::Object(object), body.clone(), keep, Instant::now()).begun(fetch.since);
        self.worker.view.insert(&fetch.caller.region, &fetch.key.as_key(), entry, self.reach(body.len()));
    }

    /// Stores the body as it passes: at once where it is here already, else in a task that also serves all who join.
    pub(super) fn fill(
        &self,
        filling: Filling,
        lead: Lead,
        answer: Answer<'static>,
        request: &Request,
        response: &mut Response,
    ) -> Body<'static> {
        // What others get is what is stored: without the fields that are this client's alone.
        let shared = Response { fields: filling.object.fields.clone(), ..*response };
        let (feed, mut reader) = lead.open(shared);
        reader.take_trailers(takes_trailers(request));
        let task = filling.run(Rc::clone(self.worker), Arc::clone(self.site), feed, answer);
        let mut task = Box::pin(task);
        // Most small bodies have arrived with their head: the task then ends here and none is spawned.
        let waker = Waker::noop();
        if task.as_mut().poll(&mut Context::from_waker(waker)).is_pending() {
            tokio::task::spawn_local(task);
        }
        self.conditional(request, response, Body::Fill(reader))
    }

    fn check_size(&self, response: &Response) -> Result<(), NoStore> {
        match response.length {
            Length::Known(length) if length > self.site.cache.object_bytes => Err(NoStore::TooLarge),
            _ => Ok(()),
        }
    }

    fn reach(&self, bytes: usize) -> Reach {
        if bytes as u64 <= self.site.cache.remote_object_bytes { Reach::Shared } else { Reach::Local }
    }

    /// Lets nobody queue for answers that cannot be shared, nor be answered by what was stored before them. A lead that nobody
    /// could join marks nothing: its request may be the reason. Neither does an error over what is stored, which may answer for it.
    fn mark_uncacheable(&self, lead: &Lead, fetch: &Fetch<'_>, response: &Response) {
        let is_error = response.status.is_server_error();
        if lead.is_solo() || (self.stale.is_some() && is_error) {
            return;
        }
        let keep = if is_error { PASS_AFTER_ERROR } else { PASS_FOR };
        let entry = Entry::new(Meta::Pass, Bytes::new(), keep, Instant::now()).begun(fetch.since);
        self.worker.view.insert(&fetch.caller.region, &fetch.key.as_key(), entry, Reach::Local);
    }

    /// Where an answer belongs that was fetched for `key`: there (`None`), or at the key of a variant by fields that nobody knew
    /// of until now (RFC 9111 section 4.1).
    ///
    /// # Errors
    /// It varies by too much, or has too many variants already.
    fn place(&self, fetch: &Fetch<'_>, request: &Request, response: &Response) -> Result<Option<CacheKey>, NoStore> {
        let (caller, key) = (fetch.caller, fetch.key.as_key());
        let mut names = key::vary(&response.fields).ok_or(NoStore::Vary)?;
        let mut builder = KeyBuilder::new();
        key::primary(&mut builder, &self.site.cache, request, &caller.region);
        let mark = self.worker.view.local(&builder.key());
        if let Some(hit) = &mark
            && let Meta::Varies { names: known, stamp, variants, .. } = &hit.meta
        {
            if names.iter().all(|name| known.contains(name)) {
                let place = key::variant(&mut builder, known, *stamp, &request.fields);
                if variants.admit(place.hash(), self.site.cache.variants) {
                    return Ok((place != key).then(|| place.to_owned()));
                }
                if hit.age(Instant::now()) < key::TURNOVER {
                    return Err(NoStore::Variants);
                }
            }
            // One set of names for all answers, however they differ: the mark comes to rest.
            names.extend(known.iter().cloned());
            names.sort_unstable();
            names.dedup();
            if names.len() > key::VARY_MAX {
                return Err(NoStore::Vary);
            }
        }
        if names.is_empty() {
            return Ok((builder.key() != key).then(|| builder.key().to_owned()));
        }
        key::primary(&mut builder, &self.site.cache, request, &caller.region);
        let stamp = self.site.identity.fresh();
        let variants = Variants::default();
        let tags = vec![tags::address(&self.site.cache, request)];
        let meta = Meta::Varies { names: names.clone(), stamp, tags, variants: variants.clone() };
        let entry = Entry::new(meta, Bytes::new(), key::VARIES_FOR, Instant::now()).begun(fetch.since);
        self.worker.view.insert(&caller.region, &builder.key(), entry, Reach::Shared);
        let place = key::variant(&mut builder, &names, stamp, &request.fields);
        variants.admit(place.hash(), self.site.cache.variants);
        Ok(Some(place.to_owned()))
    }
}

/// Reads a body that nobody wants, so that its fill completes.
pub(super) async fn drain(body: &mut Body<'static>) {
    while let Ok(()) = poll_fn(|cx| body.poll_fill(cx)).await {
        let count = body.data().len();
        if count == 0 {
            return;
        }
        body.consume(count);
    }
}

/// A body on its way into the cache.
pub(super) struct Filling {
    object: Object,
    /// Where the body lies in the whole, if it is a part.
    extent: Option<Extent>,
    keep: Duration,
    since: Since,
    key: CacheKey,
    region: Region,
}

impl Filling {
    /// Moves the body to its readers and, when it ended whole, into the store. Ends early when nobody reads any more.
    async fn run(self, worker: Rc<Worker>, site: Arc<Site>, mut feed: Feed, mut answer: Answer<'static>) {
        let mut is_kept = true;
        let mut held = worker.fills.hold();
        loop {
            let wanted = poll_fn(|cx| match feed.poll_wanted(cx) {
                Poll::Ready(true) => answer.poll_fill(cx).map(Some),
                Poll::Ready(false) => Poll::Ready(None),
                Poll::Pending => Poll::Pending,
            });
            match wanted.await {
                None => return,
                Some(Err(error)) => {
                    tracing::debug!(%error, "a fill was cut");
                    return;
                }
                Some(Ok(())) => {}
            }
            let data = answer.data();
            if data.is_empty() {
                break;
            }
            let fits = || feed.bytes() + data.len() as u64 <= site.cache.object_bytes;
            if is_kept && !(fits() && held.grow(data.len() as u64, site.cache.fill_bytes)) {
                is_kept = false;
                held.give_back();
                feed.overflow();
            }
            let count = data.len();
            feed.push(data);
            answer.consume(count);
        }
        if let Some(body) = feed.body()
            && self.extent.is_none_or(|extent| extent.length == body.len() as u64)
        {
            self.store(&worker, &site, body);
        }
        feed.complete(answer.all_trailers());
    }

    pub(super) fn store(self, worker: &Worker, site: &Site, body: Bytes) {
        let key = self.key.as_key();
        let (meta, body) = match self.extent {
            None => (Meta::Object(self.object), body),
            Some(extent) => {
                let stored = worker.view.local(&key);
                if stored.as_ref().is_some_and(|hit| matches!(hit.meta, Meta::Object(_))) {
                    // The whole has come meanwhile.
                    return;
                }
                let stored = stored.as_ref().and_then(|hit| match &hit.meta {
                    Meta::Part(object, extent) => Some((object, *extent, hit.body())),
                    _ => None,
                });
                part::combine(stored, (self.object, extent, body), site.cache.object_bytes)
            }
        };
        let is_shared = matches!(meta, Meta::Object(_)) && body.len() as u64 <= site.cache.remote_object_bytes;
        let reach = if is_shared { Reach::Shared } else { Reach::Local };
        let entry = Entry::new(meta, body, self.keep, Instant::now()).begun(self.since);
        worker.view.insert(&self.region, &key, entry, reach);
    }
}
