//! The cache step: look up, join or lead a fill, store what may be stored, and answer from what is there.

use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use shard::{CacheKey, Entry, Hit, KeyBuilder, KeyRef, Now, Reach, Region, Remote, Tier};

use super::fetch::{Answer, takes_trailers};
use super::{Body, CONDITIONS, Passage, Site, Worker};
use crate::cache::control::Control;
use crate::cache::fill::{Feed, Joined, Lead, Turn};
use crate::cache::policy::{self, NoStore, PASS_FOR};
use crate::cache::stored::{Meta, Object, Standing, Variants};
use crate::cache::{RoutePolicy, key};
use crate::error::Error;
use crate::http::body::{RequestBody, Source};
use crate::http::fields::Known;
use crate::http::message::{Length, Request, Response, StatusCode};
use crate::identify::Caller;
use crate::respond::{self, CacheResult, Detail, Forward, Story};
use crate::route::Route;

/// How often a request looks again after a fill came to nothing, before it goes to the origin by itself.
const ROUNDS: usize = 3;
/// How long a key counts as uncacheable after a server error: long enough to let a crowd through, short enough to recover.
const PASS_AFTER_ERROR: Duration = Duration::from_secs(1);

/// Fields by which a client asks for a part: a shared fetch is for the whole.
const PART: [Known; 2] = [Known::Range, Known::IfRange];

/// What a look into the stores found.
enum Found {
    Usable(Hit<Meta>),
    /// Past its freshness, or the request wants it validated.
    Stale(Hit<Meta>, Standing),
    /// Says whether the URI is stored for other request fields.
    Nothing(Forward),
    /// Known to be uncacheable.
    Pass,
}

impl Passage<'_> {
    /// Answers a request that the cache may answer.
    pub(super) async fn cached(
        &mut self,
        route: &Route,
        policy: &RoutePolicy,
        caller: &Caller,
        request: &mut Request,
        response: &mut Response,
    ) -> Result<Body<'static>, Error> {
        let asked = Self::asked(request);
        let mut builder = self.worker.builder.take();
        let mut round = 0;
        let lead = loop {
            let found = self.look(&mut builder, caller, request, &asked);
            if self.site.cache.tells_key {
                self.story.key = Some(key::told(&builder.key()));
            }
            match found {
                Found::Usable(hit) => {
                    self.story.cache = CacheResult::Hit;
                    self.tell_place(&hit, caller, &builder.key());
                    self.worker.builder.set(builder);
                    return Ok(self.answer_from(&hit, request, response));
                }
                Found::Stale(hit, standing) => {
                    if may_answer_while_validating(&hit, standing, &asked) {
                        self.validate_aside(route, policy, caller, request, &hit, &builder.key());
                        self.story.cache = CacheResult::Stale;
                        return Ok(self.answer_from(&hit, request, response));
                    }
                    self.story.forward = if standing.is_fresh() { Forward::Request } else { Forward::Stale };
                    self.stale = Some(hit);
                }
                Found::Pass => {
                    self.story.cache = CacheResult::Pass;
                    self.story.forward = Forward::Miss;
                    break Lead::solo();
                }
                Found::Nothing(why) => self.story.forward = why,
            }
            if asked.only_if_cached {
                return Err(Error::OnlyIfCached);
            }
            // Of what is stored, the whole is validated and a part of it answered.
            if policy::wants_part(request) && self.stale.is_none() {
                // A part is fetched as it was asked for; waiting for the whole could take long.
                self.worker.builder.set(builder);
                self.story.cache = CacheResult::Miss;
                self.story.detail = Detail::Reason(NoStore::Range.as_str());
                return self.forward(route, caller, request, RequestBody::Empty, response).await.map(Body::Answer);
            }
            round += 1;
            if round > ROUNDS || is_alone(request, &asked) {
                break Lead::solo();
            }
            let mut joiner = match self.worker.fills.enter(&builder.key()) {
                Turn::Lead(lead) => break lead,
                Turn::Alone => break Lead::solo(),
                Turn::Join(joiner) => joiner,
            };
            let patience = route.upstream.settings().timeout;
            match tokio::time::timeout(patience, joiner.wait()).await {
                Err(_) => break Lead::solo(),
                Ok(Joined::Lead(lead)) => break lead,
                Ok(Joined::Again) => {}
                Ok(Joined::Failed(kind)) => return Err(Error::Shared(kind)),
                Ok(Joined::Stream(shared, mut reader)) => {
                    reader.take_trailers(takes_trailers(request));
                    response.clone_from(&shared);
                    self.story.cache = CacheResult::Collapsed;
                    return Ok(self.conditional(request, response, Body::Fill(reader)));
                }
            }
        };
        let lead = match self.ask_remote(lead, &mut builder, caller, request, &asked).await {
            Ok(lead) => lead,
            Err(hit) => {
                self.story.cache = CacheResult::Remote;
                self.tell_place(&hit, caller, &builder.key());
                return Ok(self.answer_from(&hit, request, response));
            }
        };
        let key = builder.key().to_owned();
        self.lead(route, policy, caller, request, response, lead, &key).await
    }

    /// Looks into the local tier; leaves the key that was found, or that will be filled, in `builder`.
    fn look(&self, builder: &mut KeyBuilder, caller: &Caller, request: &Request, asked: &Control) -> Found {
        key::primary(builder, &self.site.cache, request, &caller.region);
        let mut hit = self.worker.view.local(&builder.key());
        let mut why = Forward::UriMiss;
        if let Some(Meta::Varies { names, stamp, .. }) = hit.as_ref().map(|hit| &hit.meta) {
            let key = key::variant(builder, names, *stamp, &request.fields);
            hit = self.worker.view.local(&key);
            why = Forward::VaryMiss;
        }
        hit.map_or(Found::Nothing(why), |hit| judge(hit, asked))
    }

    /// Asks the region's shard before the origin. `Err` brings a hit; the lead was released then.
    async fn ask_remote(
        &mut self,
        lead: Lead,
        builder: &mut KeyBuilder,
        caller: &Caller,
        request: &Request,
        asked: &Control,
    ) -> Result<Lead, Hit<Meta>> {
        // Another node may have validated what is stale here.
        if asked.no_cache || self.story.cache == CacheResult::Pass {
            return Ok(lead);
        }
        for _ in 0..2 {
            let Remote::Found(hit) = self.worker.view.remote(&caller.region, &builder.key()).await else { break };
            if let Meta::Varies { names, stamp, .. } = &hit.meta {
                key::primary(builder, &self.site.cache, request, &caller.region);
                key::variant(builder, names, *stamp, &request.fields);
                continue;
            }
            match judge(hit, asked) {
                Found::Usable(hit) => {
                    lead.release();
                    return Err(hit);
                }
                Found::Stale(hit, _) => {
                    let is_newer = |own: &Hit<Meta>| hit.stored_unix_ms > own.stored_unix_ms;
                    if self.stale.as_ref().is_none_or(is_newer) {
                        self.stale = Some(hit);
                    }
                }
                Found::Nothing(_) | Found::Pass => {}
            }
            break;
        }
        Ok(lead)
    }

    /// Fetches from the origin on behalf of all who wait.
    #[expect(clippy::too_many_arguments, reason = "the parts of one fetch; a struct for one call would hide them")]
    async fn lead(
        &mut self,
        route: &Route,
        policy: &RoutePolicy,
        caller: &Caller,
        request: &mut Request,
        response: &mut Response,
        lead: Lead,
        key: &CacheKey,
    ) -> Result<Body<'static>, Error> {
        let key = key.as_key();
        let asked = Self::asked(request);
        let mut validated =
            self.stale.clone().filter(|hit| policy::object(&hit.meta).is_some_and(Object::has_validator));
        let since = self.worker.view.since(&key);
        let sent = Instant::now();
        let exchange = match self.exchange(route, caller, request, response, &mut validated).await {
            Ok(exchange) => exchange,
            Err(error) => {
                if !matches!(error.kind(), crate::error::Kind::ClientGone) {
                    // An open breaker answers the next at once, and no better.
                    let is_final = error.kind() == crate::error::Kind::BreakerOpen;
                    if is_final { lead.fail_all(error.kind()) } else { lead.fail(error.kind()) }
                }
                return Err(error);
            }
        };
        let (settings, delay) = (&self.site.cache, sent.elapsed());
        let random = self.site.identity.fresh();
        let judge = |response: &Response| {
            let mut fit = policy::judge(request, &asked, response, policy, settings, SystemTime::now(), delay)?;
            fit.0.lifetime = policy::jittered(fit.0.lifetime, policy.ttl_jitter_percent, random);
            Ok(fit)
        };
        if response.status == StatusCode::NOT_MODIFIED
            && let Some(hit) = &validated
            && let Some(object) = policy::object(&hit.meta)
        {
            *response = policy::freshen(object, response);
            self.story.cache = CacheResult::Revalidated;
            let body = hit.body().clone();
            response.length = Length::Known(body.len() as u64);
            if let Ok(fit) = judge(response) {
                self.store_again(caller, &key, fit, &body, since);
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
            lead.fail_all(crate::error::Kind::Upstream);
            self.story.degraded = "stale";
            self.story.detail = Detail::Reason("origin_error");
            return Ok(body);
        }
        if self.story.cache != CacheResult::Pass {
            self.story.cache = CacheResult::Miss;
        }
        if request.method == http::Method::HEAD {
            if let Some(hit) = self.stale.clone() {
                self.learn_from_head(caller, request, response, &key, &hit, judge, since);
            }
            lead.release();
            self.story.detail = Detail::Reason(NoStore::Method.as_str());
            return Ok(self.conditional(request, response, Body::Answer(exchange)));
        }
        let fit = judge(response).and_then(|fit| self.check_size(response).map(|()| fit));
        let place = fit.and_then(|(object, keep)| Ok((object, keep, self.place(caller, request, response, &key)?)));
        let (object, keep, place) = match place {
            Ok(fit) => fit,
            Err(reason) => {
                self.mark_uncacheable(&lead, caller, &key, response);
                lead.release();
                self.story.detail = Detail::Reason(reason.as_str());
                return Ok(self.conditional(request, response, Body::Answer(exchange)));
            }
        };
        self.story.stored = true;
        let (key, lead) = match place {
            None => (key.to_owned(), lead),
            // Nobody knew that this key varies so: those who wait look again, each for a variant of its own.
            Some(place) => {
                lead.release();
                (place, Lead::solo())
            }
        };
        let filling = Filling { object, keep, since, key, region: caller.region };
        Ok(self.fill(filling, lead, exchange, request, response))
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
    #[expect(clippy::too_many_arguments, reason = "the parts of one exchange; a struct for one call would hide them")]
    fn learn_from_head(
        &mut self,
        caller: &Caller,
        request: &Request,
        response: &Response,
        key: &KeyRef<'_>,
        hit: &Hit<Meta>,
        judge: impl Fn(&Response) -> Result<(Object, Duration), NoStore>,
        since: shard::Since,
    ) {
        let Some(object) = policy::object(&hit.meta) else { return };
        if response.status != StatusCode::OK || request.fields.has(Known::Authorization) {
            return;
        }
        let body = hit.body().clone();
        if !policy::agrees(object, body.len() as u64, response) {
            self.worker.view.remove(&caller.region, key);
        } else if let Ok(fit) = judge(&policy::freshen(object, response)) {
            self.store_again(caller, key, fit, &body, since);
        }
    }

    /// Stores what is stored already with a new head.
    fn store_again(
        &self,
        caller: &Caller,
        key: &KeyRef<'_>,
        (object, keep): (Object, Duration),
        body: &bytes::Bytes,
        since: shard::Since,
    ) {
        let entry = Entry::new(Meta::Object(object), body.clone(), keep, Now::read()).begun(since);
        self.worker.view.insert(&caller.region, key, entry, self.reach(body.len()));
    }

    /// Stores the body as it passes: at once where it is here already, else in a task that also serves all who join.
    fn fill(
        &self,
        filling: Filling,
        lead: Lead,
        answer: Answer<'static>,
        request: &Request,
        response: &mut Response,
    ) -> Body<'static> {
        let (feed, mut reader) = lead.open(response.clone());
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

    /// An answer from a stored object.
    pub(super) fn answer_from(&mut self, hit: &Hit<Meta>, request: &Request, response: &mut Response) -> Body<'static> {
        let Some(object) = policy::object(&hit.meta) else { return Body::EMPTY };
        let standing = object.standing(hit.age(Instant::now()));
        self.story.standing = Some(standing);
        response.status = StatusCode::from_u16(object.status).unwrap_or(StatusCode::OK);
        response.fields.copy_from(&object.fields);
        response.length = Length::Known(hit.body().len() as u64);
        respond::write_age(standing.age, &mut response.fields);
        if policy::is_not_modified(&request.fields, object) && response.status == StatusCode::OK {
            not_modified(response);
            return Body::EMPTY;
        }
        Body::Bytes(policy::cut(request, hit.body().clone(), response))
    }

    /// Turns a full answer into 304 where the client's own conditions say so.
    fn conditional(&self, request: &Request, response: &mut Response, body: Body<'static>) -> Body<'static> {
        let has_condition = CONDITIONS.iter().any(|condition| request.fields.has(*condition));
        if !has_condition || response.status != StatusCode::OK {
            return body;
        }
        let object = Object { fields: response.fields.clone(), status: 200, ..Object::default() };
        if !policy::is_not_modified(&request.fields, &object) {
            return body;
        }
        not_modified(response);
        if let Body::Fill(_) = &body {
            // The condition was the client's; the object is everybody's, and its fill goes on only while somebody reads.
            let mut body = body;
            tokio::task::spawn_local(async move { drain(&mut body).await });
        }
        Body::EMPTY
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
    fn mark_uncacheable(&self, lead: &Lead, caller: &Caller, key: &KeyRef<'_>, response: &Response) {
        let is_error = response.status.is_server_error();
        if lead.is_solo() || (self.stale.is_some() && is_error) {
            return;
        }
        let keep = if is_error { PASS_AFTER_ERROR } else { PASS_FOR };
        let entry = Entry::new(Meta::Pass, bytes::Bytes::new(), keep, Now::read());
        self.worker.view.insert(&caller.region, key, entry, Reach::Local);
    }

    /// Where an answer belongs that was fetched for `key`: there (`None`), or at the key of a variant by fields that nobody knew
    /// of until now (RFC 9111 section 4.1).
    ///
    /// # Errors
    /// It varies by too much, or has too many variants already.
    fn place(
        &self,
        caller: &Caller,
        request: &Request,
        response: &Response,
        key: &KeyRef<'_>,
    ) -> Result<Option<CacheKey>, NoStore> {
        let mut names = key::vary(&response.fields).ok_or(NoStore::Vary)?;
        let mut builder = KeyBuilder::new();
        key::primary(&mut builder, &self.site.cache, request, &caller.region);
        let mark = self.worker.view.local(&builder.key());
        if let Some(hit) = &mark
            && let Meta::Varies { names: known, stamp, variants } = &hit.meta
        {
            if names.iter().all(|name| known.contains(name)) {
                let place = key::variant(&mut builder, known, *stamp, &request.fields);
                if variants.admit(place.hash(), self.site.cache.variants) {
                    return Ok((place != *key).then(|| place.to_owned()));
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
            return Ok((builder.key() != *key).then(|| builder.key().to_owned()));
        }
        key::primary(&mut builder, &self.site.cache, request, &caller.region);
        let stamp = self.site.identity.fresh();
        let variants = Variants::default();
        let meta = Meta::Varies { names: names.clone(), stamp, variants: variants.clone() };
        let entry = Entry::new(meta, bytes::Bytes::new(), key::VARIES_FOR, Now::read());
        self.worker.view.insert(&caller.region, &builder.key(), entry, Reach::Shared);
        let place = key::variant(&mut builder, &names, stamp, &request.fields);
        variants.admit(place.hash(), self.site.cache.variants);
        Ok(Some(place.to_owned()))
    }

    fn tell_place(&mut self, hit: &Hit<Meta>, caller: &Caller, key: &KeyRef<'_>) {
        let tier = match hit.tier() {
            Tier::Near => "near",
            Tier::Memory => "memory",
            Tier::Remote => "remote",
        };
        let place = self.worker.view.store().placement(&caller.region, key);
        self.story.detail = Detail::Place(tier, caller.region, place.slot);
    }

    /// Answers stale now and validates in a task of its own, unless one does already (RFC 5861 section 3).
    fn validate_aside(
        &self,
        route: &Route,
        policy: &RoutePolicy,
        caller: &Caller,
        request: &Request,
        hit: &Hit<Meta>,
        key: &KeyRef<'_>,
    ) {
        let Some(lead) = self.worker.fills.lead_if_free(key) else { return };
        let (worker, site) = (Rc::clone(self.worker), Arc::clone(self.site));
        let (name, policy, caller) = (Arc::clone(&route.settings.name), policy.clone(), caller.clone());
        let (mut request, stale, peer, key) = (request.clone(), hit.clone(), self.peer, key.to_owned());
        // What the client asked for itself is no business of the shared copy.
        request.fields.remove(Known::CacheControl);
        request.fields.remove(Known::Pragma);
        PART.into_iter().for_each(|known| request.fields.remove(known));
        request.method = http::Method::GET;
        tokio::task::spawn_local(async move {
            let Some(route) = site.routes.iter().find(|route| route.settings.name == name) else { return };
            let mut story = Story::default();
            let mut passage = Passage { worker: &worker, site: &site, peer, story: &mut story, stale: Some(stale) };
            let mut response = Response::new(StatusCode::OK);
            let answer = passage.lead(route, &policy, &caller, &mut request, &mut response, lead, &key).await;
            match answer {
                Ok(mut body) => drain(&mut body).await,
                Err(error) => tracing::debug!(%error, "validation in the background failed"),
            }
        });
    }
}

/// Reads a body that nobody wants, so that its fill completes.
async fn drain(body: &mut Body<'static>) {
    while let Ok(()) = poll_fn(|cx| body.poll_fill(cx)).await {
        let count = body.data().len();
        if count == 0 {
            return;
        }
        body.consume(count);
    }
}

fn judge(hit: Hit<Meta>, asked: &Control) -> Found {
    let Meta::Object(object) = &hit.meta else {
        return if matches!(hit.meta, Meta::Pass) { Found::Pass } else { Found::Nothing(Forward::UriMiss) };
    };
    let standing = object.standing(hit.age(Instant::now()));
    let accepts_stale = asked.max_stale.is_some_and(|limit| standing.staleness() <= limit) && !object.forbids_stale;
    let is_usable = policy::may_use(object, standing, asked) || (accepts_stale && !object.must_validate);
    if is_usable && !asked.no_cache { Found::Usable(hit) } else { Found::Stale(hit, standing) }
}

fn may_answer_while_validating(hit: &Hit<Meta>, standing: Standing, asked: &Control) -> bool {
    let Some(object) = policy::object(&hit.meta) else { return false };
    let is_plain = !asked.no_cache && asked.max_age.is_none() && asked.min_fresh.is_none();
    is_plain && !object.must_validate && standing.staleness() < object.stale_while_revalidate
}

/// Requests whose answer others may not share by their own doing: they neither lead nor wait.
fn is_alone(request: &Request, asked: &Control) -> bool {
    asked.no_store || request.fields.has(Known::Authorization) || request.method != http::Method::GET
}

/// RFC 9110 section 15.4.5: the fields of the full answer, without those of its content.
fn not_modified(response: &mut Response) {
    response.status = StatusCode::NOT_MODIFIED;
    response.length = Length::Empty;
    for content in [Known::ContentType, Known::ContentEncoding, Known::ContentLanguage, Known::ContentRange] {
        response.fields.remove(content);
    }
}

/// A body on its way into the cache.
struct Filling {
    object: Object,
    keep: Duration,
    since: shard::Since,
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
        if let Some(body) = feed.body() {
            let reach = if body.len() as u64 <= site.cache.remote_object_bytes { Reach::Shared } else { Reach::Local };
            let entry = Entry::new(Meta::Object(self.object), body, self.keep, Now::read()).begun(self.since);
            worker.view.insert(&self.region, &self.key.as_key(), entry, reach);
        }
        feed.complete(answer.all_trailers());
    }
}
