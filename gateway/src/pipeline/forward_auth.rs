//! Asks the verification service of a route whether a request may pass.
//!
//! Limits come before it, the cache after it. Invariant: without an acceptance no request passes; a
//! service that fails or is late is no acceptance.

use std::future::poll_fn;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use limiter::MonotonicClock;
use tokio::time::Instant;

use super::context::{CONDITIONS, CurrentCaller, RANGE_FIELDS, RequestContext};
use super::degrade::count_failure;
use super::response_body::ResponseBody;
use crate::breaker::CallStart;
use crate::cache::control::CacheControl;
use crate::error::{Error, ErrorKind};
use crate::http::body::BodySource as _;
use crate::http::exchange_clock::ExchangeTimeouts;
use crate::http::fields::{Field, KnownField};
use crate::http::message::{BodyLength, Method, Request, Response};
use crate::http::request_body::RequestBody;
use crate::identify::Caller;
use crate::identify::auth::{self, AcceptedFields, AuthResult};
use crate::record::{CacheDetail, CacheResult};
use crate::route::ForwardAuth;
use crate::spans::Phase;
use crate::upstream::{KeptConnections, OutgoingRequest, UpstreamResponse};
use crate::{hop, identify};

static CLOCK: LazyLock<MonotonicClock> = LazyLock::new(MonotonicClock::start);

/// Most bytes of a denial that a client gets.
const DENIAL_BYTES_MAX: usize = 64 << 10;

/// Fields about the content of the request, which the service does not receive.
const CONTENT_FIELDS: [KnownField; 4] =
    [KnownField::ContentType, KnownField::ContentEncoding, KnownField::AcceptEncoding, KnownField::Expect];

/// The answer of a service.
struct ServiceAnswer {
    head: Response,
    body: Bytes,
}

impl RequestContext<'_> {
    /// Lets the service decide. `Some` is the body of its denial, whose head is in the context.
    pub(super) async fn authorize(&mut self, service: &ForwardAuth) -> Result<Option<ResponseBody<'static>>, Error> {
        self.enter(Phase::Authorize);
        let mut question = self.question(service);
        let key = question_key(&question);
        let accepted = match service.answers.get(&key, CLOCK.now()) {
            Some(accepted) => accepted,
            None => {
                identify::write_trace(self.caller.trace, self.outgoing_span(), &mut question.fields);
                if let Some(id) = &self.record.request_id {
                    id.write(&mut question.fields);
                }
                let answer =
                    self.ask(service, &question).await.inspect_err(|_| auth::count(AuthResult::Unavailable))?;
                self.update_now();
                if !answer.head.status.is_success() {
                    return Ok(Some(self.deny_by(answer)));
                }
                let accepted = accepted_fields(service, &answer.head);
                let ttl = lifetime(&answer.head);
                service.answers.put(&key, Arc::clone(&accepted), (CLOCK.now(), ttl));
                accepted
            }
        };
        auth::count(AuthResult::Valid);
        self.accept(service, &accepted);
        Ok(None)
    }

    /// The request for the service: that of the client without its body, and where it was for.
    fn question(&self, service: &ForwardAuth) -> Request {
        let mut question = self.request.clone();
        let removed = || CONTENT_FIELDS.into_iter().chain(CONDITIONS).chain(RANGE_FIELDS);
        removed().for_each(|known| question.fields.remove(known));
        (question.upgrade, question.length) = (None, BodyLength::Empty);
        hop::prepare_for_upstream(&mut question, self.peer);
        question.fields.set(KnownField::XForwardedMethod, self.request.method.as_str());
        question.fields.set(KnownField::XForwardedUri, &self.request.target);
        question.method = Method::GET;
        (question.received_path, question.origin_edits) = (None, None);
        question.authority.clone_from(&service.config.authority);
        question.set_target(&service.config.target);
        question
    }

    async fn ask(&self, service: &ForwardAuth, question: &Request) -> Result<ServiceAnswer, Error> {
        let unavailable = |reason: &str| {
            tracing::debug!(route = &*self.route().config.name, reason, "the verification service has no answer");
            Error::VerificationUnavailable
        };
        let (target, timeout) = (&service.target, service.config.timeout);
        let now = Instant::now();
        let (permit, change) = target.breaker.admit(CallStart::OnAdmission, now.into_std()).map_err(|change| {
            target.breaker.announce(change);
            unavailable("breaker")
        })?;
        target.breaker.announce(change);
        let outgoing = OutgoingRequest {
            request: question,
            kept: KeptConnections::Use,
            client: self.caller.ip,
            timeouts: ExchangeTimeouts { head: timeout, idle: timeout, total: Some(timeout) },
            now,
            total_at: Some(now + timeout),
            hedges: false,
            on_sent: &|| {},
            attempts: None,
        };
        let call = target.upstream.call(&outgoing, RequestBody::Empty).await;
        let is_answered = call.result.as_ref().is_ok_and(|answered| !answered.head.status.is_server_error());
        let (_, change) = permit.record(is_answered, std::time::Instant::now());
        target.breaker.announce(change);
        let answered = call.result.map_err(|_| unavailable("no response"))?;
        if !is_answered {
            return Err(unavailable("status"));
        }
        let UpstreamResponse { mut head, mut exchange } = answered;
        let (head, mut body) = (std::mem::take(&mut *head), BytesMut::new());
        loop {
            poll_fn(|cx| exchange.poll_fill(cx)).await.map_err(|_| unavailable("body"))?;
            let count = exchange.data().len();
            if count == 0 {
                return Ok(ServiceAnswer { head, body: body.freeze() });
            }
            if body.len() + count > DENIAL_BYTES_MAX {
                return Err(unavailable("size"));
            }
            body.extend_from_slice(exchange.data());
            exchange.consume(count);
        }
    }

    /// The response of the service, as the client gets it.
    fn deny_by(&mut self, ServiceAnswer { mut head, body }: ServiceAnswer) -> ResponseBody<'static> {
        auth::count(AuthResult::Unknown);
        if head.status.is_client_error() {
            count_failure(ErrorKind::Unauthorized);
            self.record.failure = Some(ErrorKind::Unauthorized);
            self.record.blame = Some(ErrorKind::Unauthorized.blame());
        }
        self.record.cache = CacheResult::Error;
        self.record.detail = CacheDetail::Reason("auth");
        hop::strip_response(&mut head);
        if !head.fields.has(KnownField::CacheControl) {
            head.fields.add(KnownField::CacheControl, "no-store");
        }
        head.length = BodyLength::Known(body.len() as u64);
        *self.response = head;
        ResponseBody::Bytes(body)
    }

    /// Writes the fields of an acceptance into the request for the origin.
    fn accept(&mut self, service: &ForwardAuth, accepted: &AcceptedFields) {
        let names = &service.config.fields;
        let is_named = |name: &[u8]| names.iter().any(|own| name.eq_ignore_ascii_case(own.as_bytes()));
        self.request.fields.retain(|field| !is_named(field.name));
        for (name, value) in accepted.iter().filter(|(name, _)| names.contains(name)) {
            self.request.fields.push(name.as_bytes(), value);
        }
        self.request.is_authenticated = true;
        let user = service.config.user.as_ref().and_then(|user| accepted.iter().find(|(name, _)| name == user));
        if let Some((_, user)) = user {
            let mut caller = Box::new(Caller::clone(&self.caller));
            caller.user_name = Some(String::from_utf8_lossy(user).into());
            self.caller = CurrentCaller::Authenticated(caller);
        }
        if self.request.origin_edits.is_some() {
            // A field may name the user.
            self.edit_request();
        }
    }
}

/// Everything that the service receives, without what differs between repetitions of a request.
fn question_key(question: &Request) -> Vec<u8> {
    let mut key = Vec::with_capacity(512);
    for field in question.fields.iter() {
        if !is_of_one_request(&field) {
            key.extend_from_slice(&field.name.to_ascii_lowercase());
            key.push(b':');
            key.extend_from_slice(field.value);
            key.push(b'\n');
        }
    }
    key
}

/// Whether the value differs for each request: its id and its trace, in both formats.
fn is_of_one_request(field: &Field<'_>) -> bool {
    match field.known {
        Some(known) => matches!(known, KnownField::Traceparent | KnownField::Tracestate | KnownField::XRequestId),
        None => {
            let starts_as_b3 = |start: &[u8]| start.eq_ignore_ascii_case(b"x-b3-");
            field.name.eq_ignore_ascii_case(b"b3") || field.name.get(..5).is_some_and(starts_as_b3)
        }
    }
}

fn accepted_fields(service: &ForwardAuth, head: &Response) -> AcceptedFields {
    let fields = &service.config.fields;
    let names = fields.iter().chain(service.config.user.iter().filter(|user| !fields.contains(user)));
    let lines = names.flat_map(|name| head.fields.named(name.as_bytes()).map(|value| (name.clone(), value.to_vec())));
    lines.collect()
}

/// How long the acceptance may be used again: as its `Cache-Control` says, and else not at all.
fn lifetime(head: &Response) -> Duration {
    let control = CacheControl::parse(&head.fields);
    if control.no_store || control.no_cache {
        return Duration::ZERO;
    }
    control.max_age.unwrap_or_default()
}
