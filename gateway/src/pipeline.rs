//! A request's life, from its head to its answer: identify, route, limit, cache, upstream, degrade, respond.
//!
//! `admit` goes as far as nobody has to be waited for; what it lets pass, `run` answers or fails. Every failure goes through degrade, every
//! answer through respond: the one exit. Only denials, of which there are floods, have one of their own.

mod body;
mod cached;
mod denied;
mod fetch;
mod part;
mod posted;
mod shared;
mod site;
mod visitor;

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Instant;

use limiter::Verdict;

pub use body::Body;
pub use denied::Denials;
pub use site::{Site, Worker};
pub use visitor::Visitor;

use crate::cache::control::Control;
use crate::cache::stored::Meta;
use crate::cache::{key, policy};
use crate::error::{Error, Kind};
use crate::event::Event;
use crate::http::body::{BodyError, RequestBody};
use crate::http::fields::Known;
use crate::http::message::{Request, Response};
use crate::identify::{Access, Caller};
use crate::metrics::{self, Counters, Label as _};
use crate::respond::{self, CacheResult, Detail, Forward, Story};
use crate::route::{Route, StatusClass};
use crate::{degrade, hop, limit};

static FAILURES: LazyLock<Counters<Kind>> = LazyLock::new(Counters::default);
static CACHE: LazyLock<Counters<CacheResult>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub fn expose() {
    metrics::expose_counters("tidegate_failures", "Requests without an answer from origin or cache.", &FAILURES);
    metrics::expose_counters("tidegate_cache_results", "How the cache took part in requests.", &CACHE);
}

/// Where a request came from, and when.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    pub peer: IpAddr,
    pub at: Instant,
}

/// One request under way: what every step needs, and what it tells.
pub struct Passage<'w> {
    pub(crate) worker: &'w Rc<Worker>,
    pub(crate) site: &'w Arc<Site>,
    pub(crate) peer: &'w IpAddr,
    /// When the request arrived, or what it last waited for was over: the clock is not read at every step.
    pub(crate) now: Instant,
    pub(crate) story: &'w mut Story,
    /// A stored object past its freshness that may stand in if the origin fails.
    pub(crate) stale: Option<shard::Hit<Meta>>,
}

/// Answers a request whose handling panicked.
pub fn panicked(site: &Site, request: &Request, response: &mut Response, story: &mut Story) -> Body<'static> {
    *story = Story { cache: CacheResult::Error, must_close: true, ..abandoned(site, request) };
    Event::RequestPanicked { route: site.routes.name(story.route) }.emit();
    FAILURES.inc(Kind::Panic);
    CACHE.inc(story.cache);
    let page = degrade::write(&Error::Panic, None, &request.fields, site.identity.fresh(), response);
    Body::Bytes(page)
}

/// Answers a request whose answer's body failed before anything of it had left.
pub fn broken(
    site: &Site,
    request: &Request,
    response: &mut Response,
    story: &mut Story,
    error: &BodyError,
) -> Body<'static> {
    let error = Error::from(error);
    FAILURES.inc(error.kind());
    CACHE.inc(CacheResult::Error);
    story.cache = CacheResult::Error;
    story.detail = Detail::Reason(error.reason());
    story.degraded = "page";
    (story.stored, story.standing, story.forwarded_status) = (false, None, None);
    let route = site.routes.find(request);
    let page = route.map(|route| &route.settings.degrade);
    let page = degrade::write(&error, page, &request.fields, site.identity.fresh(), response);
    respond::write_cache_status(story, &mut response.fields);
    if let Some(route) = route {
        route.counts.answers.inc(StatusClass::of(response.status));
        route.counts.degraded.inc();
    }
    Body::Bytes(page)
}

/// What can still be told of a request whose handling was dropped.
pub fn abandoned(site: &Site, request: &Request) -> Story {
    let route = site.routes.find(request).map(|route| route.index);
    Story { route, ..Story::default() }
}

impl<'w> Passage<'w> {
    pub fn new(worker: &'w Rc<Worker>, site: &'w Arc<Site>, arrival: &'w Arrival, story: &'w mut Story) -> Self {
        *story = Story::default();
        Passage { worker, site, peer: &arrival.peer, now: arrival.at, story, stale: None }
    }

    /// Takes the request as far as it gets without waiting for anybody: finds who sent it and its route, and asks its limits. Says
    /// whether it may pass; where it may not, `response` is filled, and so is `body`. Of a denial nothing but the status is in `response`.
    pub fn admit(
        &mut self,
        request: &mut Request,
        response: &mut Response,
        visitor: &mut Visitor,
        body: &mut Body<'_>,
    ) -> bool {
        let (caller, route) = visitor.meet(self.site, self.peer, request);
        self.story.trace = Some(caller.trace);
        self.story.ip = Some(caller.ip);
        let error = match route.map(|route| self.may_pass(route, caller)) {
            Some(Ok(())) => return true,
            Some(Err(error)) => error,
            None => Error::NoRoute,
        };
        if self.deny(route, request, response, body) {
            return false;
        }
        *body = self.degrade(error, route, request, response);
        self.respond(route, request, response);
        if let Some(route) = route {
            charge(route, caller, response);
        }
        false
    }

    fn may_pass(&mut self, route: &Route, caller: &Caller) -> Result<(), Error> {
        self.story.route = Some(route.index);
        match caller.access {
            Access::Ordinary => {
                self.story.verdict = limit::decide(&route.rules, caller, route.cost, self.now);
                limit::count(&self.site.limits, &self.story.verdict);
                if self.story.verdict.is_allowed() { Ok(()) } else { Err(Error::Limited) }
            }
            Access::Exempt => Ok(()),
            Access::Denied => Err(Error::Forbidden),
            Access::Unknown => Err(Error::Unchecked),
        }
    }

    /// Answers a request that was admitted: fills `response` and returns the body. Dropping the future gives up the request and closes
    /// its upstream connection, unless others wait for the same answer.
    pub async fn pass<'a>(
        &mut self,
        visitor: &Visitor,
        request: &mut Request,
        body: RequestBody<'a>,
        response: &mut Response,
    ) -> Body<'a> {
        let Some((caller, route)) = visitor.met(self.site) else {
            return self.degrade(Error::NoRoute, None, request, response);
        };
        let body = match self.run(route, caller, request, body, response).await {
            Ok(body) => body,
            Err(error) => self.degrade(error, Some(route), request, response),
        };
        self.respond(Some(route), request, response);
        charge(route, caller, response);
        body
    }
}

/// Charges what the answer's status costs beyond the request itself.
fn charge(route: &Route, caller: &Caller, response: &Response) {
    if caller.access == Access::Ordinary
        && let Some(cost) = route.cost_after(response.status)
    {
        limit::charge(&route.rules, caller, cost);
    }
}

impl Passage<'_> {
    async fn run<'a>(
        &mut self,
        route: &Route,
        caller: &Caller,
        request: &mut Request,
        body: RequestBody<'a>,
        response: &mut Response,
    ) -> Result<Body<'a>, Error> {
        if hop::ends_here(request) {
            return Ok(Body::Bytes(degrade::write_options(response)));
        }
        match &route.settings.cache {
            Some(cache) if policy::is_lookup(request) && !hop::offers_upgrade(request) => {
                self.cached(route, cache, caller, request, response).await
            }
            _ if !request.method.is_safe() => {
                self.story.forward = Forward::Method;
                // Another route, one for GET, may have stored what this changes.
                let post = self.post(route, caller, request);
                let answer = self.forward(route, caller, request, body, response).await?;
                Ok(self.changed(post, caller, request, response, answer))
            }
            _ => self.forward(route, caller, request, body, response).await.map(Body::Answer),
        }
    }

    /// The ladder below a failure: stale content, the route's page, a plain problem.
    fn degrade(
        &mut self,
        error: Error,
        route: Option<&Route>,
        request: &Request,
        response: &mut Response,
    ) -> Body<'static> {
        FAILURES.inc(error.kind());
        self.story.must_close = matches!(error.kind(), Kind::Client | Kind::Panic);
        if error.is_degradable()
            && let Some(body) = self.stale_answer(request, response)
        {
            self.story.degraded = "stale";
            self.story.detail = Detail::Reason(error.kind().as_str());
            degrade::write_reason(error.kind(), response);
            return body;
        }
        if error.is_degradable() {
            self.story.degraded = "page";
        }
        self.story.cache = CacheResult::Error;
        self.story.detail = Detail::Reason(error.reason());
        self.story.refused = error.refusal();
        let page = route.map(|route| &route.settings.degrade);
        let page = degrade::write(&error, page, &request.fields, self.site.identity.fresh(), response);
        Body::Bytes(page)
    }

    /// The answer to a request that a limit denied, if one did; nothing stands in for it.
    fn deny(&mut self, route: Option<&Route>, request: &Request, response: &mut Response, body: &mut Body<'_>) -> bool {
        let story = &mut *self.story;
        let Verdict::Denied(denial) = &story.verdict else { return false };
        FAILURES.inc(Kind::Limited);
        CACHE.inc(CacheResult::Error);
        story.cache = CacheResult::Error;
        story.detail = Detail::Reason(Kind::Limited.as_str());
        let form = degrade::form(&request.fields);
        let denied = self.worker.denials.answer(denial, form, story, &self.site.limits);
        response.status = denied.response.status;
        if let Some(route) = route {
            route.counts.answers.inc(StatusClass::of(response.status));
        }
        *body = Body::Denied(denied);
        true
    }

    /// Reads the clock again: time has passed.
    fn waited(&mut self) {
        self.now = Instant::now();
    }

    /// A stale object that may answer for a failing origin (RFC 5861 section 4).
    fn stale_answer(&mut self, request: &Request, response: &mut Response) -> Option<Body<'static>> {
        let hit = self.stale.take()?;
        self.waited();
        let object = policy::object(&hit.meta)?;
        let standing = object.standing_of(&hit, self.now);
        if object.must_validate || standing.staleness() > object.stale_if_error {
            return None;
        }
        self.story.cache = CacheResult::Stale;
        self.story.forwarded_status = None;
        Some(self.answer_from(&hit, request, response))
    }

    /// The single exit: what the gateway adds to every answer.
    fn respond(&mut self, route: Option<&Route>, request: &Request, response: &mut Response) {
        let story = &*self.story;
        CACHE.inc(story.cache);
        respond::write_cache_status(story, &mut response.fields);
        self.site.limits.write_verdict(&story.verdict, &mut response.fields);
        if self.site.cache.strip_targeted {
            self.site
                .cache
                .targeted
                .iter()
                .for_each(|name| response.fields.retain(|field| !field.name.eq_ignore_ascii_case(name.as_bytes())));
        }
        if story.cache != CacheResult::Error {
            hop::add_via(&mut response.fields, request.version);
        }
        if let Some(route) = route {
            route.counts.answers.inc(StatusClass::of(response.status));
            if !story.degraded.is_empty() {
                route.counts.degraded.inc();
            }
        }
    }

    /// A successful unsafe request ends what is stored for its target, and for what its answer names as created or changed on
    /// the same origin (RFC 9111 section 4.4), in every region that is configured or that something is stored for.
    fn invalidate(&self, caller: &Caller, request: &Request, response: &Response) {
        if !(response.status.is_success() || response.status.is_redirection()) {
            return;
        }
        let mut changed = request.clone();
        self.remove(caller, &changed);
        for named in [Known::Location, Known::ContentLocation] {
            let uri = response.fields.get(named).and_then(|uri| std::str::from_utf8(uri).ok());
            if let Some(target) = uri.and_then(|uri| key::same_origin(uri, request)) {
                changed.set_target(&target);
                self.remove(caller, &changed);
            }
        }
    }

    fn remove(&self, caller: &Caller, request: &Request) {
        let mut builder = shard::KeyBuilder::new();
        let view = &self.worker.view;
        let mut regions = view.store().regions();
        regions.insert(caller.region);
        for region in regions {
            key::primary(&mut builder, &self.site.cache, request, &region);
            view.remove(&region, &builder.key());
        }
    }

    /// The request's own cache directives, `Pragma` included.
    fn asked(request: &Request) -> Control {
        let mut asked = Control::of(&request.fields);
        asked.no_cache = policy::demands_validation(&request.fields, &asked);
        asked
    }
}

/// Fields that only make sense between the gateway and a client with the object: removed before a shared fetch.
pub(crate) const CONDITIONS: [Known; 2] = [Known::IfNoneMatch, Known::IfModifiedSince];
