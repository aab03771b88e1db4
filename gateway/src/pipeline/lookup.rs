//! The lookup phase: local cache, join or lead a shared fetch, remote cache.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shard::{CacheHit, CacheLayer, KeyBuilder, KeyRef, Region, RemoteLookup, StaleReason};

use super::context::{CONDITIONS, RANGE_FIELDS, RequestContext};
use super::fetch::Fetch;
use super::response_body::ResponseBody;
use super::shared_body::SharedBody;
use crate::cache::control::CacheControl;
use crate::cache::fill::{FetchEnd, FillLeader, FillReader, JoinOutcome, JoinResult};
use crate::cache::languages;
use crate::cache::policy;
use crate::cache::stored::{CacheMeta, CachedObject, Freshness};
use crate::cache::{HonourClient, key};
use crate::error::Error;
use crate::http::fields::KnownField;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
use crate::record::{CacheDetail, CacheResult, ForwardReason};
use crate::respond;
use crate::spans::{BackgroundWork, Phase};
use crate::tasks::{self, TaskKind, TaskWait};

/// How often a request looks up again after a shared fetch had no response for it. After that it
/// goes to the origin by itself.
const LOOKUP_ROUNDS_MAX: usize = 3;

/// Least time between two validations of an object that clients demand, with
/// `honour_client = "limited"`.
const CLIENT_DEMAND_INTERVAL: Duration = Duration::from_secs(1);

/// Time for remote lookups and scheduling, in addition to the deadlines of a fetch.
const JOIN_SLACK: Duration = Duration::from_secs(1);

/// The content of one cache layer for the request: a usable object, a stale one, a part, nothing,
/// or the mark that the key is uncacheable.
enum LayerLookup {
    Usable(CacheHit<CacheMeta>),
    /// Past its freshness, or the request demands validation.
    Stale(CacheHit<CacheMeta>, Freshness),
    /// The reason says whether the URI is stored for other request fields.
    Miss(ForwardReason),
    /// A part of the object.
    Part(CacheHit<CacheMeta>),
    /// The key is marked as uncacheable.
    HitForMiss,
}

/// The result of a request's wait for the fetch of its key.
enum SharedFetch {
    /// This request fetches: for others too, or on its own.
    Lead(FillLeader),
    Response(ResponseBody<'static>),
    LookUpAgain,
}

impl RequestContext<'_> {
    /// Answers a request whose method and route allow a cached response.
    pub(super) async fn look_up(&mut self) -> Result<ResponseBody<'static>, Error> {
        self.enter(Phase::Lookup);
        let languages = &self.cache_policy().languages;
        if !languages.is_empty() {
            languages::normalise(languages, &mut self.request.fields);
        }
        let directives = self.request_directives();
        let mut builder = self.worker.key_builder.take();
        let (mut round, mut wait_until) = (0, None);
        let mut piece;
        let lead = loop {
            // That of an earlier round may have been purged since.
            piece = None;
            // Whether the whole object may be stored, as far as it is known.
            let mut will_store = true;
            let found = self.look_up_local(&mut builder, &directives);
            if self.snapshot.cache.exposes_key {
                self.record.key = Some(key::display(&builder.key()));
            }
            match found {
                LayerLookup::Usable(hit) => {
                    self.record.cache = CacheResult::Hit;
                    self.record_location(&hit, self.caller.region, &builder.key());
                    self.worker.key_builder.set(builder);
                    return Ok(self.response_from(&hit));
                }
                LayerLookup::Stale(hit, freshness) => {
                    if self.may_revalidate_in_background(&hit, freshness, &directives) {
                        self.revalidate_in_background(&hit, &builder.key());
                        self.record.cache = CacheResult::Stale;
                        return Ok(self.response_from(&hit));
                    }
                    let is_fresh = freshness.is_fresh();
                    self.record.forward = if is_fresh { ForwardReason::Request } else { ForwardReason::Stale };
                    self.stale = Some(hit);
                }
                LayerLookup::HitForMiss => {
                    self.record.cache = CacheResult::Pass;
                    self.record.forward = ForwardReason::Miss;
                    break FillLeader::solo();
                }
                LayerLookup::Part(hit) => {
                    if let Some(body) = self.response_from_part(&hit) {
                        self.record.cache = CacheResult::Hit;
                        self.record_location(&hit, self.caller.region, &builder.key());
                        self.worker.key_builder.set(builder);
                        return Ok(body);
                    }
                    self.record.forward = ForwardReason::Partial;
                    will_store = self.fits_store(&hit);
                    // The part is read after the epoch: if it is purged from here on, what it
                    // completes is not stored.
                    let epoch = self.worker.view.epoch_snapshot();
                    if let LayerLookup::Part(hit) = self.look_up_local(&mut builder, &directives) {
                        piece = self.missing_piece(&hit).map(|piece| (piece, epoch));
                    }
                }
                LayerLookup::Miss(reason) => self.record.forward = reason,
            }
            if directives.only_if_cached {
                return Err(Error::OnlyIfCached);
            }
            // A range request of a stored object validates the whole object, then answers the range
            // from it.
            if policy::wants_range(self.request) && self.stale.is_none() {
                break FillLeader::solo();
            }
            round += 1;
            if round > LOOKUP_ROUNDS_MAX || !will_store || is_unshareable(self.request, &directives) {
                break FillLeader::solo();
            }
            match self.share_fetch(&builder.key(), &mut wait_until).await? {
                SharedFetch::Lead(lead) => break lead,
                SharedFetch::Response(body) => return Ok(body),
                SharedFetch::LookUpAgain => self.update_now(),
            }
        };
        let lead = match self.look_up_remote(lead, &mut builder, &directives).await {
            Ok(lead) => lead,
            Err((hit, region)) => {
                self.record.cache = CacheResult::Remote;
                self.record_location(&hit, region, &builder.key());
                return Ok(self.response_from(&hit));
            }
        };
        let mut fetch = Fetch::begin(self, builder.key().to_owned());
        // A stored object that can be validated is not fetched again.
        let piece = piece.filter(|_| self.stale.is_none()).map(|(piece, epoch)| {
            fetch.fill_epoch = epoch;
            piece
        });
        if policy::wants_range(self.request) && self.stale.is_none() {
            // The range is forwarded as requested: waiting for the whole object could take long.
            // Boxed: it would nearly double the future of every request.
            return Box::pin(self.fetch_part(fetch, piece)).await;
        }
        self.lead_fetch(fetch, (lead, piece)).await
    }

    /// Joins the fetch of `key` and waits for its result, or leads a fetch. All rounds of a request
    /// wait until the same time, which the first one sets.
    async fn share_fetch(&mut self, key: &KeyRef<'_>, wait_until: &mut Option<Instant>) -> Result<SharedFetch, Error> {
        let (view, region) = (&self.worker.view, &self.caller.region);
        // A fetch from before a removal of the key is not joined.
        let is_current = |began| view.is_untouched_since(region, key, began);
        let joiner = match self.worker.fills.join_or_lead(key, view.epoch_snapshot(), is_current) {
            JoinResult::Lead(lead) => return Ok(SharedFetch::Lead(lead)),
            JoinResult::Bypass => return Ok(SharedFetch::Lead(FillLeader::solo())),
            JoinResult::Join(joiner) => joiner,
        };
        tasks::set_waiting_for(TaskWait::SharedFetch);
        let until = *wait_until.get_or_insert_with(|| Instant::now() + self.join_timeout());
        Ok(match joiner.wait(until.saturating_duration_since(Instant::now())).await {
            JoinOutcome::Lead(lead) => SharedFetch::Lead(lead),
            JoinOutcome::Bypass => SharedFetch::Lead(FillLeader::solo()),
            JoinOutcome::Retry => SharedFetch::LookUpAgain,
            JoinOutcome::Failed(kind) => return Err(Error::SharedFetch(kind)),
            JoinOutcome::TimedOut => return Err(Error::SharedFetchTimeout),
            JoinOutcome::Stream(shared, reader) => {
                self.response.clone_from(&shared);
                self.record.cache = CacheResult::Collapsed;
                let mut body = self.body_from_fill(reader);
                body.allow_continuation(self);
                SharedFetch::Response(body)
            }
        })
    }

    /// How long this request waits for the fetch of another one: for two attempts, each with its
    /// deadlines to connect and to the head of the response, and for the remote lookup before them.
    /// A shorter wait would give up when the fetch does, and send one request for each that waits.
    fn join_timeout(&self) -> Duration {
        let route = self.route();
        let target = route.target(self.request);
        (target.upstream.config().connect_timeout + route.timeouts(target).head) * 2 + JOIN_SLACK
    }

    /// Looks up the local cache. Leaves in `builder` the key that was found, or that will be
    /// filled.
    fn look_up_local(&self, builder: &mut KeyBuilder, directives: &CacheControl) -> LayerLookup {
        key::write_primary(builder, &self.snapshot.cache, self.request, &self.caller.region);
        let mut hit = self.worker.view.lookup_local_at(&builder.key(), self.now);
        let mut reason = ForwardReason::UriMiss;
        if let Some(CacheMeta::Varies { names, nonce, .. }) = hit.as_ref().map(|hit| &hit.meta) {
            let key = key::write_variant(builder, names, *nonce, self.request, self.peer);
            hit = self.worker.view.lookup_local_at(&key, self.now);
            reason = ForwardReason::VaryMiss;
        }
        hit.map_or(LayerLookup::Miss(reason), |hit| self.classify_hit(hit, directives, self.now))
    }

    /// Looks up the shard of the caller's region, then the fallback regions. `Err` carries a hit
    /// and its region, after the lead was released.
    async fn look_up_remote(
        &mut self,
        lead: FillLeader,
        builder: &mut KeyBuilder,
        directives: &CacheControl,
    ) -> Result<FillLeader, (CacheHit<CacheMeta>, Region)> {
        // For a stale local entry, too: another node may have validated the object.
        if directives.no_cache || self.record.cache == CacheResult::Pass {
            return Ok(lead);
        }
        let region = &self.caller.region.clone();
        for _ in 0..2 {
            tasks::set_waiting_for(TaskWait::Shard);
            let found = self.worker.view.lookup_remote(region, &builder.key()).await;
            self.update_now();
            let RemoteLookup::Found(hit) = found else { break };
            if let CacheMeta::Varies { names, nonce, .. } = &hit.meta {
                key::write_primary(builder, &self.snapshot.cache, self.request, region);
                key::write_variant(builder, names, *nonce, self.request, self.peer);
                continue;
            }
            match self.classify_hit(hit, directives, self.now) {
                LayerLookup::Usable(hit) => {
                    lead.end(FetchEnd::LookUpAgain);
                    return Err((hit, *region));
                }
                LayerLookup::Stale(hit, _) => {
                    let is_newer = |own: &CacheHit<CacheMeta>| hit.age(self.now) < own.age(self.now);
                    if self.stale.as_ref().is_none_or(is_newer) {
                        self.stale = Some(hit);
                    }
                }
                LayerLookup::Miss(_) | LayerLookup::Part(_) | LayerLookup::HitForMiss => {}
            }
            break;
        }
        for region in self.worker.view.store().fallback_regions(region) {
            // Boxed: few regions have another one to fall back to.
            let found = Box::pin(self.look_up_fallback(region, directives)).await;
            self.update_now();
            if let Some(hit) = found {
                lead.end(FetchEnd::LookUpAgain);
                return Err((hit, *region));
            }
        }
        Ok(lead)
    }

    /// A fresh response to the request that another region has stored.
    async fn look_up_fallback(&self, region: &Region, directives: &CacheControl) -> Option<CacheHit<CacheMeta>> {
        let (view, mut builder) = (&self.worker.view, KeyBuilder::new());
        key::write_primary(&mut builder, &self.snapshot.cache, self.request, region);
        for _ in 0..2 {
            let hit = match view.lookup_local(&builder.key()) {
                Some(hit) => hit,
                None => match view.lookup_remote(region, &builder.key()).await {
                    RemoteLookup::Found(hit) => hit,
                    RemoteLookup::Absent | RemoteLookup::Unavailable(_) | RemoteLookup::NotConfigured => return None,
                },
            };
            if let CacheMeta::Varies { names, nonce, .. } = &hit.meta {
                key::write_variant(&mut builder, names, *nonce, self.request, self.peer);
                continue;
            }
            return match self.classify_hit(hit, directives, Instant::now()) {
                LayerLookup::Usable(hit) => Some(hit),
                LayerLookup::Stale(..) | LayerLookup::Miss(_) | LayerLookup::Part(_) | LayerLookup::HitForMiss => None,
            };
        }
        None
    }

    /// The response from a stored object.
    pub(super) fn response_from(&mut self, hit: &CacheHit<CacheMeta>) -> ResponseBody<'static> {
        let Some(object) = policy::object(&hit.meta) else { return ResponseBody::EMPTY };
        let freshness = object.freshness_at(hit, self.now, self.cache_policy());
        self.record.freshness = Some(freshness);
        self.response.status = StatusCode::from_u16(object.status).unwrap_or(StatusCode::OK);
        self.response.fields.copy_from(&object.fields);
        self.response.length = BodyLength::Known(hit.body().len() as u64);
        if self.route().config.compress.is_some() {
            self.response.forms = Some(Arc::clone(object.forms.get()));
        }
        respond::write_age(freshness.age, &mut self.response.fields);
        if policy::is_not_modified(&self.request.fields, object) && self.response.status == StatusCode::OK {
            self.note_coding();
            not_modified(self.response);
            return ResponseBody::EMPTY;
        }
        if policy::wants_range(self.request) {
            self.note_coding();
        }
        ResponseBody::Bytes(policy::apply_range(self.request, hit.body().clone(), self.response))
    }

    /// The body of a shared fetch for this client.
    pub(super) fn body_from_fill(&mut self, mut reader: FillReader) -> ResponseBody<'static> {
        reader.accept_trailers(self.accepts_trailers());
        self.apply_conditions(ResponseBody::Fill(SharedBody::new(reader)))
    }

    /// Turns a full response into 304 where the client's own conditions demand it.
    pub(super) fn apply_conditions(&mut self, body: ResponseBody<'static>) -> ResponseBody<'static> {
        let has_condition = CONDITIONS.iter().any(|condition| self.request.fields.has(*condition));
        if !has_condition || self.response.status != StatusCode::OK {
            return body;
        }
        let object = CachedObject { fields: self.response.fields.clone(), status: 200, ..CachedObject::default() };
        if !policy::is_not_modified(&self.request.fields, &object) {
            return body;
        }
        self.note_coding();
        not_modified(self.response);
        if let ResponseBody::Fill(body) = body {
            // The condition was this client's, the object is for all.
            body.leave_to_store();
        }
        ResponseBody::EMPTY
    }

    /// The use that the request and the policy of its route allow of a stored object at `now`.
    fn classify_hit(&self, hit: CacheHit<CacheMeta>, directives: &CacheControl, now: Instant) -> LayerLookup {
        let policy = self.cache_policy();
        let object = match &hit.meta {
            CacheMeta::Object(object) | CacheMeta::Partial(object, _) => object,
            CacheMeta::HitForMiss => return LayerLookup::HitForMiss,
            CacheMeta::Varies { .. } => return LayerLookup::Miss(ForwardReason::UriMiss),
        };
        if !policy::is_allowed(object, policy) {
            return LayerLookup::Miss(ForwardReason::UriMiss);
        }
        let is_limited = self.snapshot.cache.honour_client == HonourClient::Limited;
        let without_demands;
        let directives = if is_limited && hit.age(now) < CLIENT_DEMAND_INTERVAL {
            without_demands = directives.without_demands();
            &without_demands
        } else {
            directives
        };
        let freshness = object.freshness_at(&hit, now, policy);
        let is_stale_enough = directives.max_stale.is_some_and(|limit| freshness.staleness() <= limit);
        let accepts_stale = is_stale_enough && !object.forbids_stale && !is_unsubscribed(&hit);
        let is_usable = policy::is_usable(object, freshness, directives) || (accepts_stale && !object.must_validate);
        let is_part = matches!(hit.meta, CacheMeta::Partial(..));
        match (is_usable && !directives.no_cache, is_part) {
            (true, false) => LayerLookup::Usable(hit),
            (false, false) => LayerLookup::Stale(hit, freshness),
            (true, true) => LayerLookup::Part(hit),
            (false, true) => LayerLookup::Miss(ForwardReason::Stale),
        }
    }

    /// Whether a stale response may be served while it is validated in the background.
    fn may_revalidate_in_background(
        &self,
        hit: &CacheHit<CacheMeta>,
        freshness: Freshness,
        directives: &CacheControl,
    ) -> bool {
        let Some(object) = policy::object(&hit.meta) else { return false };
        let has_demands = directives.no_cache || directives.max_age.is_some() || directives.min_fresh.is_some();
        let is_within_window = freshness.staleness() < object.stale_while_revalidate_under(self.cache_policy());
        !has_demands && !object.must_validate && !is_unsubscribed(hit) && is_within_window
    }

    fn record_location(&mut self, hit: &CacheHit<CacheMeta>, region: Region, key: &KeyRef<'_>) {
        let layer = match hit.layer() {
            CacheLayer::L1 => "l1",
            CacheLayer::L2 => "l2",
            CacheLayer::Remote => "remote",
        };
        let slot = self.worker.view.store().slot(&region, key);
        self.record.detail = CacheDetail::Location(layer, region, slot);
    }

    /// Validates a stale object in a task of its own, unless a fetch is under way (RFC 5861 section
    /// 3).
    fn revalidate_in_background(&self, hit: &CacheHit<CacheMeta>, key: &KeyRef<'_>) {
        let Some(lead) = self.worker.fills.try_lead(key, self.worker.view.epoch_snapshot()) else { return };
        // A validation that ended between our lookup and this point may have stored its response.
        let now = Instant::now();
        if self.worker.view.lookup_local_at(key, now).is_some_and(|stored| stored.age(now) < hit.age(now)) {
            return lead.end(FetchEnd::LookUpAgain);
        }
        let (mut detached, key) = (self.detached(BackgroundWork::Validation, Some(hit.clone())), key.to_owned());
        let request = &mut detached.request;
        // The client's own demands do not apply to the shared copy.
        request.fields.remove(KnownField::CacheControl);
        request.fields.remove(KnownField::Pragma);
        RANGE_FIELDS.into_iter().for_each(|known| request.fields.remove(known));
        request.method = http::Method::GET;
        tasks::spawn(TaskKind::BackgroundValidation, async move {
            let validate = async |context: &mut RequestContext<'_>| {
                let fetch = Fetch::begin(context, key);
                match context.lead_fetch(fetch, (lead, None)).await {
                    // A body that is not stored has no use.
                    Ok(ResponseBody::Fill(body)) => body.leave_to_store(),
                    Ok(_) => {}
                    Err(error) => {
                        context.record.failure = Some(error.kind());
                        tracing::debug!(%error, "background validation failed");
                    }
                }
            };
            detached.run(validate).await;
        });
    }
}

/// Whether this node has no subscription to the entry's shard and may have missed its invalidation.
fn is_unsubscribed(hit: &CacheHit<CacheMeta>) -> bool {
    hit.stale_reason(Instant::now()) == Some(StaleReason::SubscriptionGap)
}

/// Requests whose own fields forbid sharing their response: they neither lead nor wait.
fn is_unshareable(request: &Request, directives: &CacheControl) -> bool {
    directives.no_store || request.is_authorized() || request.method != http::Method::GET
}

/// Makes a full response a 304, without the fields of its content (RFC 9110 section 15.4.5).
fn not_modified(response: &mut Response) {
    response.status = StatusCode::NOT_MODIFIED;
    response.length = BodyLength::Empty;
    for content in
        [KnownField::ContentType, KnownField::ContentEncoding, KnownField::ContentLanguage, KnownField::ContentRange]
    {
        response.fields.remove(content);
    }
}
