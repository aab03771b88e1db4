//! The result of a fetch on behalf of every waiting request.
//!
//! The response is stored, refreshes what is stored, or marks the key as uncacheable.

use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use shard::{CacheHit, CacheKey, Entry, EpochSnapshot, InsertTarget, KeyBuilder, Region};

use super::context::RequestContext;
use super::fill_task::{FillEnd, FillFailure, FillTask, PendingEntry};
use super::forward::UpstreamBody;
use super::pieced_body::PiecedBody;
use super::response_body::ResponseBody;
use crate::cache::control::CacheControl;
use crate::cache::extent::Extent;
use crate::cache::fill::{FetchEnd, FillLeader};
use crate::cache::missing::MissingPiece;
use crate::cache::policy::{self, HIT_FOR_MISS_TTL, NoStoreReason};
use crate::cache::stored::{CacheMeta, CachedObject, VariantSet};
use crate::cache::{key, tags};
use crate::error::{Error, ErrorKind};
use crate::http::fields::KnownField;
use crate::http::message::{BodyLength, Response, StatusCode};
use crate::metrics::Label as _;
use crate::record::{CacheDetail, CacheResult};
use crate::spans::{BackgroundWork, WorkEnd};
use crate::tasks::{self, TaskKind};

/// One fetch of a cache key: its request directives, and the times and epoch at which it began.
pub(super) struct Fetch {
    pub(super) key: CacheKey,
    directives: CacheControl,
    pub(super) fill_epoch: EpochSnapshot,
    sent: Instant,
    /// Wall time at `sent`.
    sent_at: SystemTime,
    random: u64,
}

impl Fetch {
    pub(super) fn begin(context: &RequestContext<'_>, key: CacheKey) -> Self {
        let view = &context.worker.view;
        Fetch {
            key,
            directives: context.request_directives(),
            fill_epoch: view.epoch_snapshot(),
            sent: Instant::now(),
            sent_at: view.store().wall_time(),
            random: context.snapshot.identity.random_u64(),
        }
    }

    /// The entry of a part; `None` if it belongs to a variant, whose key is another one.
    pub(super) fn part_entry(&self, region: Region, plan: StorePlan, extent: Extent) -> Option<PendingEntry> {
        let StorePlan { object, ttl, variant_key } = plan;
        let (key, fill_epoch) = (self.key.clone(), self.fill_epoch);
        let entry = PendingEntry { object, extent: Some(extent), ttl, fill_epoch, key, region };
        variant_key.is_none().then_some(entry)
    }

    /// The entry that a body of this fetch becomes.
    pub(super) fn pending_entry(self, region: Region, plan: StorePlan, extent: Option<Extent>) -> PendingEntry {
        let StorePlan { object, ttl, variant_key } = plan;
        PendingEntry { object, extent, ttl, fill_epoch: self.fill_epoch, key: variant_key.unwrap_or(self.key), region }
    }
}

/// A fetch with the requests that wait for it, and the stored object that it validates.
pub(super) struct LedFetch {
    pub(super) fetch: Fetch,
    pub(super) leader: FillLeader,
    pub(super) validated: Option<CacheHit<CacheMeta>>,
    /// The piece that a stored part lacks for the response; the fetch is for this piece alone.
    pub(super) piece: Option<Box<MissingPiece>>,
}

impl LedFetch {
    pub(super) fn validated_object(&self) -> Option<&CachedObject> {
        self.validated.as_ref().and_then(|hit| policy::object(&hit.meta))
    }
}

/// The parts of a fill whose head has arrived.
struct FillStart {
    /// `None`: the body is shared and not stored.
    entry: Option<PendingEntry>,
    /// The head for joining requests.
    shared: Response,
    leader: FillLeader,
    source: PiecedBody,
}

/// The object that a response becomes, how long it is kept, and the key of its variant.
pub(super) struct StorePlan {
    object: CachedObject,
    ttl: Duration,
    /// The key of the variant, where it is not the key of the fetch.
    variant_key: Option<CacheKey>,
}

impl RequestContext<'_> {
    /// Ends a fetch with the head of its response, which is in the context, or with its failure.
    /// Continues with a fetch that is to be sent once more without conditions: a 304 that does not
    /// select the stored response is useless.
    pub(super) fn conclude(
        &mut self,
        led: LedFetch,
        source: Result<UpstreamBody<'static>, Error>,
    ) -> ControlFlow<Result<ResponseBody<'static>, Error>, LedFetch> {
        if source.is_ok()
            && self.response.status == StatusCode::NOT_MODIFIED
            && led.validated_object().is_some_and(|object| !policy::is_selected(object, self.response))
        {
            return ControlFlow::Continue(LedFetch { validated: None, ..led });
        }
        let LedFetch { fetch, leader, validated, piece } = led;
        match (source, piece) {
            (Ok(source), Some(piece)) if piece.is_in(self.response) => {
                ControlFlow::Break(Ok(self.complete(piece, (fetch, leader), source)))
            }
            // The piece of another version, or none: the whole object is fetched instead. A version
            // that `If-Range` does not name is sent as a whole at once.
            (Ok(_useless), Some(_)) if is_answer_to_range(self.response.status) => {
                ControlFlow::Continue(LedFetch { fetch, leader, validated, piece: None })
            }
            (source, _) => ControlFlow::Break(self.end_fetch((fetch, leader, validated), source)),
        }
    }

    /// Answers with the stored part and the piece that it lacked, whose head is in the context, and
    /// stores both while they are sent.
    pub(super) fn complete(
        &mut self,
        piece: Box<MissingPiece>,
        (fetch, leader): (Fetch, FillLeader),
        source: UpstreamBody<'static>,
    ) -> ResponseBody<'static> {
        if self.record.cache != CacheResult::Pass {
            self.record.cache = CacheResult::Miss;
        }
        let whole = piece.whole_head(self.response);
        // A range of all bytes is a range too: clients of media refuse a 200.
        let extent = policy::wants_range(self.request).then(|| piece.wanted());
        let plan = self.store_plan_for(&fetch, &whole);
        *self.response = whole;
        if let Some(Extent { first, length, total }) = extent {
            self.response.status = StatusCode::PARTIAL_CONTENT;
            let last = first + length - 1;
            self.response.fields.add(KnownField::ContentRange, format!("bytes {first}-{last}/{total}"));
        }
        let source = PiecedBody::between(source, piece.into_stored());
        match plan {
            Ok(plan) => {
                self.record.stored = true;
                let leader = if plan.variant_key.is_some() {
                    leader.end(FetchEnd::LookUpAgain);
                    FillLeader::solo()
                } else {
                    leader
                };
                self.fill(fetch.pending_entry(self.caller.region, plan, extent), leader, source)
            }
            Err(reason) => {
                self.record.detail = CacheDetail::Reason(reason.as_str());
                self.mark_uncacheable(&leader, &fetch);
                leader.end(FetchEnd::LookUpAgain);
                // No fill: its readers may be cut off for bodies that are stored.
                self.apply_conditions(ResponseBody::Pieced(Box::new(source)))
            }
        }
    }

    fn end_fetch(
        &mut self,
        (fetch, leader, validated): (Fetch, FillLeader, Option<CacheHit<CacheMeta>>),
        source: Result<UpstreamBody<'static>, Error>,
    ) -> Result<ResponseBody<'static>, Error> {
        let source = match source {
            Ok(source) => source,
            Err(error) => {
                end_failed(leader, error.kind(), self.record.requests_sent);
                return Err(error);
            }
        };
        if self.response.status == StatusCode::NOT_MODIFIED
            && let Some(hit) = &validated
            && let Some(object) = policy::object(&hit.meta)
        {
            *self.response = policy::freshen(object, self.response);
            return Ok(self.validated_response((&fetch, leader), hit.body().clone()));
        }
        if self.response.status.is_server_error()
            && let Some(body) = self.stale_response()
        {
            leader.end(FetchEnd::Fail(ErrorKind::Upstream));
            self.record.degraded = "stale";
            self.record.detail = CacheDetail::Reason("origin_error");
            return Ok(body);
        }
        if self.record.cache != CacheResult::Pass {
            self.record.cache = CacheResult::Miss;
        }
        if self.request.method == http::Method::HEAD {
            if let Some(hit) = self.stale.clone() {
                self.update_from_head(&fetch, &hit);
            }
            leader.end(FetchEnd::LookUpAgain);
            self.record.detail = CacheDetail::Reason(NoStoreReason::Method.as_str());
            return Ok(self.apply_conditions(ResponseBody::Upstream(Box::new(source))));
        }
        Ok(self.store_or_pass(fetch, leader, source))
    }

    /// The stored body under the head that the origin has validated, which is in the context. It is
    /// given to the waiting requests if it may be stored.
    fn validated_response(&mut self, (fetch, leader): (&Fetch, FillLeader), body: Bytes) -> ResponseBody<'static> {
        self.record.cache = CacheResult::Revalidated;
        self.response.length = BodyLength::Known(body.len() as u64);
        match self.evaluate_response(fetch, self.response) {
            Ok((object, ttl)) => {
                let shared = Response { fields: object.fields.clone(), forms: None, ..*self.response };
                self.store_again(fetch, (object, ttl), &body);
                self.record.stored = true;
                leader.publish_complete(shared, body.clone());
            }
            Err(reason) => {
                leader.end(FetchEnd::FetchAlone);
                self.record.detail = CacheDetail::Reason(reason.as_str());
            }
        }
        if policy::wants_range(self.request) {
            self.note_coding();
        }
        match self.apply_conditions(ResponseBody::Bytes(body)) {
            ResponseBody::Bytes(body) => ResponseBody::Bytes(policy::apply_range(self.request, body, self.response)),
            other => other,
        }
    }

    /// Stores a whole response while it is sent, or records why not.
    pub(super) fn store_or_pass(
        &mut self,
        fetch: Fetch,
        leader: FillLeader,
        source: UpstreamBody<'static>,
    ) -> ResponseBody<'static> {
        let plan = match self.store_plan(&fetch) {
            Ok(plan) => plan,
            Err(reason) => {
                self.record.detail = CacheDetail::Reason(reason.as_str());
                if self.response.status.is_server_error() {
                    return self.share_error(leader, source);
                }
                self.mark_uncacheable(&leader, &fetch);
                leader.end(FetchEnd::LookUpAgain);
                return self.apply_conditions(ResponseBody::Upstream(Box::new(source)));
            }
        };
        self.record.stored = true;
        let leader = if plan.variant_key.is_some() {
            // The key turns out to vary: the waiting requests look up again, each for its own
            // variant.
            leader.end(FetchEnd::LookUpAgain);
            FillLeader::solo()
        } else {
            leader
        };
        self.fill(fetch.pending_entry(self.caller.region, plan, None), leader, PiecedBody::whole(source))
    }

    /// Gives an error response that is not stored to the requests that wait for it, so that a
    /// failing origin does not receive one request for each of them. An error that may be meant for
    /// this client alone fails them instead.
    fn share_error(&mut self, leader: FillLeader, source: UpstreamBody<'static>) -> ResponseBody<'static> {
        if leader.has_waiting() && policy::is_shareable_error(self.response) {
            let shared = self.response.clone();
            let source = PiecedBody::whole(source);
            return self.start_fill(FillStart { entry: None, shared, leader, source });
        }
        leader.end(FetchEnd::Fail(ErrorKind::Upstream));
        self.apply_conditions(ResponseBody::Upstream(Box::new(source)))
    }

    /// Whether and how the response may be stored.
    pub(super) fn store_plan(&self, fetch: &Fetch) -> Result<StorePlan, NoStoreReason> {
        self.store_plan_for(fetch, self.response)
    }

    /// As `store_plan`, for a response that differs from the one that is sent.
    pub(super) fn store_plan_for(&self, fetch: &Fetch, response: &Response) -> Result<StorePlan, NoStoreReason> {
        let (object, ttl) = self.evaluate_response(fetch, response)?;
        if matches!(response.length, BodyLength::Known(length) if length > self.snapshot.cache.object_bytes) {
            return Err(NoStoreReason::TooLarge);
        }
        Ok(StorePlan { object, ttl, variant_key: self.variant_key(fetch, response)? })
    }

    /// The object that a response becomes and how long it is kept. Call it when the head
    /// has just arrived.
    fn evaluate_response(&self, fetch: &Fetch, response: &Response) -> Result<(CachedObject, Duration), NoStoreReason> {
        let policy = self.cache_policy();
        let delay = fetch.sent.elapsed();
        let candidate = policy::StoreCandidate {
            request: self.request,
            directives: &fetch.directives,
            response,
            received_at: fetch.sent_at + delay,
            delay,
        };
        let (mut object, ttl) = candidate.evaluate(policy, &self.snapshot.cache)?;
        object.lifetime = policy::with_jitter(object.lifetime, policy.ttl_jitter_percent, fetch.random);
        Ok((object, ttl))
    }

    /// Updates the stored response to GET from a response to HEAD, or removes it as outdated
    /// (RFC 9111 section 4.3.5). One that is stale stays, for an origin that fails, unless it could
    /// be served before its validation. One that was stored meanwhile is newer.
    fn update_from_head(&self, fetch: &Fetch, hit: &CacheHit<CacheMeta>) {
        let Some(object) = policy::object(&hit.meta) else { return };
        if self.response.status != StatusCode::OK || self.request.is_authorized() {
            return;
        }
        let (key, policy) = (fetch.key.as_key(), self.cache_policy());
        let current = self.worker.view.lookup_local_at(&key, self.now);
        if current.is_some_and(|current| current.age(self.now) < hit.age(self.now)) {
            return;
        }
        let body = hit.body();
        match policy::matches_head(object, body.len() as u64, self.response) {
            None => {}
            Some(false) => {
                let freshness = object.freshness_at(hit, self.now, policy);
                if freshness.is_fresh() || freshness.staleness() < object.stale_while_revalidate_under(policy) {
                    self.worker.view.remove(&self.caller.region, &key);
                }
            }
            Some(true) => {
                if let Ok(evaluated) = self.evaluate_response(fetch, &policy::freshen(object, self.response)) {
                    self.store_again(fetch, evaluated, body);
                }
            }
        }
    }

    /// Stores a stored body again under a new head.
    fn store_again(&self, fetch: &Fetch, (object, ttl): (CachedObject, Duration), body: &Bytes) {
        let is_shared = body.len() as u64 <= self.snapshot.cache.remote_object_bytes;
        let target = if is_shared { InsertTarget::LocalAndRemote } else { InsertTarget::Local };
        let entry =
            Entry::new(CacheMeta::Object(object), body.clone(), ttl, Instant::now()).with_fill_epoch(fetch.fill_epoch);
        self.worker.view.insert(&self.caller.region, &fetch.key.as_key(), entry, target);
    }

    /// Stores the body while it is sent: at once if it has arrived already, else in a task that
    /// also serves every joining request.
    pub(super) fn fill(
        &mut self,
        entry: PendingEntry,
        leader: FillLeader,
        source: PiecedBody,
    ) -> ResponseBody<'static> {
        // Joining requests get the stored head, without the fields that belong to this client
        // alone.
        let forms = self.route().config.compress.is_some().then(|| Arc::clone(entry.object.forms.get()));
        self.response.forms.clone_from(&forms);
        let shared = Response { fields: entry.object.fields.clone(), forms, ..*self.response };
        self.start_fill(FillStart { entry: Some(entry), shared, leader, source })
    }

    fn start_fill(&mut self, start: FillStart) -> ResponseBody<'static> {
        let FillStart { entry, shared, leader, source } = start;
        let is_solo = leader.is_solo();
        let budget_bytes = self.snapshot.cache.inflight_fetch_bytes;
        let (producer, reader) = leader.publish_head(shared, self.worker.fills.budget(), budget_bytes);
        let length = match self.response.length {
            BodyLength::Known(length) => Some(length),
            _ => None,
        };
        let (worker, snapshot) = (Rc::clone(self.worker), Arc::clone(self.snapshot));
        let traced = self.begin_work(BackgroundWork::Fill);
        let mut running = Box::pin(FillTask { entry, producer, source, length, worker, snapshot }.run());
        // Most small bodies arrive with their head: this one poll then ends the task, and none is
        // spawned.
        let waker = Waker::noop();
        if running.as_mut().poll(&mut Context::from_waker(waker)).is_pending() {
            match traced {
                None => tasks::spawn(TaskKind::Fill, async move {
                    running.await;
                }),
                Some((spans, report)) => tasks::spawn(TaskKind::Fill, async move {
                    let FillEnd { bytes, failure } = running.await;
                    let failure = failure.map_or("", FillFailure::as_str);
                    report.end(spans, WorkEnd { bytes, failure, ..WorkEnd::default() });
                }),
            }
        }
        let mut body = self.body_from_fill(reader);
        // The only reader is never behind another one.
        if !is_solo {
            body.allow_continuation(self);
        }
        body
    }

    /// Marks the key as uncacheable, so that requests neither queue for responses that cannot be
    /// shared nor get what was stored before. A lead that no request can join marks nothing: its
    /// own request may be the reason. Not for errors, which pass.
    fn mark_uncacheable(&self, leader: &FillLeader, fetch: &Fetch) {
        if leader.is_solo() {
            return;
        }
        let entry = Entry::new(CacheMeta::HitForMiss, Bytes::new(), HIT_FOR_MISS_TTL, Instant::now())
            .with_fill_epoch(fetch.fill_epoch);
        self.worker.view.insert(&self.caller.region, &fetch.key.as_key(), entry, InsertTarget::Local);
    }

    /// The key of the variant that the response belongs to; `None` where it is the key of the
    /// fetch. The response may name fields in `Vary` that were unknown at the time of the lookup
    /// (RFC 9111 section 4.1).
    ///
    /// # Errors
    /// The response varies by too many fields, the URI has too many variants, or it was invalidated
    /// during the fetch.
    fn variant_key(&self, fetch: &Fetch, response: &Response) -> Result<Option<CacheKey>, NoStoreReason> {
        let (config, region) = (&self.snapshot.cache, &self.caller.region);
        let (view, key) = (&self.worker.view, fetch.key.as_key());
        let mut names = key::vary_names(&response.fields).ok_or(NoStoreReason::Vary)?;
        let mut builder = KeyBuilder::new();
        key::write_primary(&mut builder, config, self.request, region);
        let vary_marker = view.lookup_local(&builder.key());
        if let Some(hit) = &vary_marker
            && let CacheMeta::Varies { names: known, nonce, variants, .. } = &hit.meta
        {
            // A marker that another request has stored since, after an invalidation that this fetch
            // began before: under it, the old response would count as a new one.
            if hit.is_younger_than(fetch.fill_epoch)
                && !view.is_unchanged_since(region, &builder.key(), &[], fetch.fill_epoch)
            {
                return Err(NoStoreReason::Invalidated);
            }
            if names.iter().all(|name| known.contains(name)) {
                let variant = key::write_variant(&mut builder, known, *nonce, self.request, self.peer);
                if variants.admit(variant.hash(), config.variants) {
                    return Ok((variant != key).then(|| variant.to_owned()));
                }
                if hit.age(Instant::now()) < key::VARIANTS_RESET_INTERVAL {
                    return Err(NoStoreReason::Variants);
                }
            }
            // One set of names for all responses of the URI, so that the marker stops changing.
            names.extend(known.iter().cloned());
            names.sort_unstable();
            names.dedup();
            if names.len() > key::VARY_MAX {
                return Err(NoStoreReason::Vary);
            }
        }
        if names.is_empty() {
            return Ok((builder.key() != key).then(|| builder.key().to_owned()));
        }
        key::write_primary(&mut builder, config, self.request, region);
        let nonce = self.snapshot.identity.random_u64();
        let variants = VariantSet::default();
        let tags = vec![tags::url_tag(config, self.request)];
        let meta = CacheMeta::Varies { names: names.clone(), nonce, tags, variants: variants.clone() };
        let entry =
            Entry::new(meta, Bytes::new(), key::VARY_MARKER_TTL, Instant::now()).with_fill_epoch(fetch.fill_epoch);
        view.insert(region, &builder.key(), entry, InsertTarget::LocalAndRemote);
        let variant = key::write_variant(&mut builder, &names, nonce, self.request, self.peer);
        variants.admit(variant.hash(), config.variants);
        Ok(Some(variant.to_owned()))
    }
}

/// Whether a status is an answer to a range request that is no answer to the same request without
/// its range.
pub(super) fn is_answer_to_range(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::PARTIAL_CONTENT
            | StatusCode::NOT_MODIFIED
            | StatusCode::PRECONDITION_FAILED
            | StatusCode::RANGE_NOT_SATISFIABLE
    )
}

/// Ends a fetch that has failed before the head of its response. One of the waiting requests
/// fetches again, unless the request was already sent twice, because a kept connection was closed.
pub(super) fn end_failed(leader: FillLeader, kind: ErrorKind, requests_sent: u32) {
    match kind {
        // The dropped leader hands over: nothing was learned about the origin.
        ErrorKind::ClientGone => drop(leader),
        // A second attempt would fail at once too, or make every waiting request wait for as long
        // again.
        ErrorKind::BreakerOpen
        | ErrorKind::ConcurrencyLimit
        | ErrorKind::Timeout
        | ErrorKind::TotalTimeout
        | ErrorKind::ConnectTimeout => {
            leader.end(FetchEnd::Fail(kind));
        }
        kind if requests_sent > 1 => leader.end(FetchEnd::Fail(kind)),
        kind => leader.end(FetchEnd::Retry(kind)),
    }
}
