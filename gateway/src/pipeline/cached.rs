//! The cache step: look up, join or lead a fill, store what may be stored, and answer from what is there.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use shard::{Doubt, Hit, KeyBuilder, KeyRef, Region, Remote, Tier};

use super::fetch::takes_trailers;
use super::shared::{Fetch, PART, drain};
use super::{Body, CONDITIONS, Passage};
use crate::cache::control::Control;
use crate::cache::fill::{Joined, Lead, Turn};
use crate::cache::policy;
use crate::cache::stored::{Meta, Object, Standing};
use crate::cache::{RoutePolicy, key};
use crate::error::Error;
use crate::http::fields::Known;
use crate::http::message::{Length, Request, Response, StatusCode};
use crate::identify::Caller;
use crate::respond::{self, CacheResult, Detail, Forward, Story};
use crate::route::Route;

/// How often a request looks again after a fill came to nothing, before it goes to the origin by itself.
const ROUNDS: usize = 3;

/// What a look into the stores found.
enum Found {
    Usable(Hit<Meta>),
    /// Past its freshness, or the request wants it validated.
    Stale(Hit<Meta>, Standing),
    /// Says whether the URI is stored for other request fields.
    Nothing(Forward),
    /// A part of it.
    Part(Hit<Meta>),
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
                    self.tell_place(&hit, caller.region, &builder.key());
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
                Found::Part(hit) => {
                    if let Some(body) = self.answer_from_part(&hit, request, response) {
                        self.story.cache = CacheResult::Hit;
                        self.tell_place(&hit, caller.region, &builder.key());
                        self.worker.builder.set(builder);
                        return Ok(body);
                    }
                    self.story.forward = Forward::Partial;
                }
                Found::Nothing(why) => self.story.forward = why,
            }
            if asked.only_if_cached {
                return Err(Error::OnlyIfCached);
            }
            // Of what is stored, the whole is validated and a part of it answered.
            if policy::wants_part(request) && self.stale.is_none() {
                break Lead::solo();
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
                Ok(Joined::Again) => self.waited(),
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
            Err((hit, region)) => {
                self.story.cache = CacheResult::Remote;
                self.tell_place(&hit, region, &builder.key());
                return Ok(self.answer_from(&hit, request, response));
            }
        };
        let fetch = Fetch::begin(self, policy, caller, request, builder.key().to_owned());
        if policy::wants_part(request) && self.stale.is_none() {
            // A part is fetched as it was asked for; waiting for the whole could take long.
            return self.part(route, fetch, request, response).await;
        }
        self.lead(route, fetch, lead, request, response).await
    }

    /// Looks into the local tier; leaves the key that was found, or that will be filled, in `builder`.
    fn look(&self, builder: &mut KeyBuilder, caller: &Caller, request: &Request, asked: &Control) -> Found {
        key::primary(builder, &self.site.cache, request, &caller.region);
        let mut hit = self.worker.view.local_at(&builder.key(), self.now);
        let mut why = Forward::UriMiss;
        if let Some(Meta::Varies { names, stamp, .. }) = hit.as_ref().map(|hit| &hit.meta) {
            let key = key::variant(builder, names, *stamp, &request.fields);
            hit = self.worker.view.local_at(&key, self.now);
            why = Forward::VaryMiss;
        }
        hit.map_or(Found::Nothing(why), |hit| judge(hit, asked, self.now))
    }

    /// Asks the region's shard before the origin, and then those of its neighbours. `Err` brings a hit and its region; the lead was
    /// released then.
    async fn ask_remote(
        &mut self,
        lead: Lead,
        builder: &mut KeyBuilder,
        caller: &Caller,
        request: &Request,
        asked: &Control,
    ) -> Result<Lead, (Hit<Meta>, Region)> {
        // Another node may have validated what is stale here.
        if asked.no_cache || self.story.cache == CacheResult::Pass {
            return Ok(lead);
        }
        for _ in 0..2 {
            let found = self.worker.view.remote(&caller.region, &builder.key()).await;
            self.waited();
            let Remote::Found(hit) = found else { break };
            if let Meta::Varies { names, stamp, .. } = &hit.meta {
                key::primary(builder, &self.site.cache, request, &caller.region);
                key::variant(builder, names, *stamp, &request.fields);
                continue;
            }
            match judge(hit, asked, self.now) {
                Found::Usable(hit) => {
                    lead.release();
                    return Err((hit, caller.region));
                }
                Found::Stale(hit, _) => {
                    let is_newer = |own: &Hit<Meta>| hit.age(self.now) < own.age(self.now);
                    if self.stale.as_ref().is_none_or(is_newer) {
                        self.stale = Some(hit);
                    }
                }
                Found::Nothing(_) | Found::Part(_) | Found::Pass => {}
            }
            break;
        }
        for region in self.worker.view.store().fallback(&caller.region) {
            let found = self.ask_neighbour(region, request, asked).await;
            self.waited();
            if let Some(hit) = found {
                lead.release();
                return Err((hit, *region));
            }
        }
        Ok(lead)
    }

    /// What another region has for the request, if it is fresh.
    async fn ask_neighbour(&self, region: &Region, request: &Request, asked: &Control) -> Option<Hit<Meta>> {
        let (view, mut builder) = (&self.worker.view, KeyBuilder::new());
        key::primary(&mut builder, &self.site.cache, request, region);
        for _ in 0..2 {
            let hit = match view.local(&builder.key()) {
                Some(hit) => hit,
                None => match view.remote(region, &builder.key()).await {
                    Remote::Found(hit) => hit,
                    Remote::Absent | Remote::Unavailable(_) | Remote::Off => return None,
                },
            };
            if let Meta::Varies { names, stamp, .. } = &hit.meta {
                key::variant(&mut builder, names, *stamp, &request.fields);
                continue;
            }
            return match judge(hit, asked, Instant::now()) {
                Found::Usable(hit) => Some(hit),
                Found::Stale(..) | Found::Nothing(_) | Found::Part(_) | Found::Pass => None,
            };
        }
        None
    }

    /// An answer from a stored object.
    pub(super) fn answer_from(&mut self, hit: &Hit<Meta>, request: &Request, response: &mut Response) -> Body<'static> {
        let Some(object) = policy::object(&hit.meta) else { return Body::EMPTY };
        let standing = object.standing_of(hit, self.now);
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
    pub(super) fn conditional(&self, request: &Request, response: &mut Response, body: Body<'static>) -> Body<'static> {
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

    fn tell_place(&mut self, hit: &Hit<Meta>, region: Region, key: &KeyRef<'_>) {
        let tier = match hit.tier() {
            Tier::Near => "near",
            Tier::Memory => "memory",
            Tier::Remote => "remote",
        };
        let slot = self.worker.view.store().slot(&region, key);
        self.story.detail = Detail::Place(tier, region, slot);
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
        // Whoever validated until now may have stored its answer between our look and this.
        let now = Instant::now();
        if self.worker.view.local_at(key, now).is_some_and(|stored| stored.age(now) < hit.age(now)) {
            return lead.release();
        }
        let (worker, site) = (Rc::clone(self.worker), Arc::clone(self.site));
        let (name, policy, caller) = (Arc::clone(&route.settings.name), policy.clone(), caller.clone());
        let (mut request, stale, peer, key) = (request.clone(), hit.clone(), *self.peer, key.to_owned());
        // What the client asked for itself is no business of the shared copy.
        request.fields.remove(Known::CacheControl);
        request.fields.remove(Known::Pragma);
        PART.into_iter().for_each(|known| request.fields.remove(known));
        request.method = http::Method::GET;
        tokio::task::spawn_local(async move {
            let Some(route) = site.routes.iter().find(|route| route.settings.name == name) else { return };
            let mut story = Story::default();
            let mut passage = Passage {
                worker: &worker,
                site: &site,
                peer: &peer,
                now: Instant::now(),
                story: &mut story,
                stale: Some(stale),
            };
            let mut response = Response::new(StatusCode::OK);
            let fetch = Fetch::begin(&passage, &policy, &caller, &request, key);
            let answer = passage.lead(route, fetch, lead, &request, &mut response).await;
            match answer {
                Ok(mut body) => drain(&mut body).await,
                Err(error) => tracing::debug!(%error, "validation in the background failed"),
            }
        });
    }
}

fn judge(hit: Hit<Meta>, asked: &Control, now: Instant) -> Found {
    let object = match &hit.meta {
        Meta::Object(object) | Meta::Part(object, _) => object,
        Meta::Pass => return Found::Pass,
        Meta::Varies { .. } => return Found::Nothing(Forward::UriMiss),
    };
    let standing = object.standing_of(&hit, now);
    let accepts_stale = asked.max_stale.is_some_and(|limit| standing.staleness() <= limit) && !object.forbids_stale;
    let accepts_stale = accepts_stale && !is_unwatched(&hit);
    let is_usable = policy::may_use(object, standing, asked) || (accepts_stale && !object.must_validate);
    let is_part = matches!(hit.meta, Meta::Part(..));
    match (is_usable && !asked.no_cache, is_part) {
        (true, false) => Found::Usable(hit),
        (false, false) => Found::Stale(hit, standing),
        (true, true) => Found::Part(hit),
        (false, true) => Found::Nothing(Forward::Stale),
    }
}

fn may_answer_while_validating(hit: &Hit<Meta>, standing: Standing, asked: &Control) -> bool {
    let Some(object) = policy::object(&hit.meta) else { return false };
    let is_plain = !asked.no_cache && asked.max_age.is_none() && asked.min_fresh.is_none();
    is_plain && !object.must_validate && !is_unwatched(hit) && standing.staleness() < object.stale_while_revalidate
}

/// Whether it may have been ended at its shard without this node having been told.
fn is_unwatched(hit: &Hit<Meta>) -> bool {
    hit.doubt(Instant::now()) == Some(Doubt::Unwatched)
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
