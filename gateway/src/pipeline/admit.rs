//! The admit phase: access lists, limits, authentication. It never waits: a password that has to be
//! verified is left to `authenticate`, which admits the request after that.

use bytes::Bytes;
use limiter::Verdict;

use super::context::{CurrentCaller, RequestContext};
use super::degrade::count_failure;
use super::respond::{count_response, count_result};
use super::response_body::ResponseBody;
use crate::degrade::{BodyFacts, PageFormat, PageLanguage};
use crate::error::{Error, ErrorKind};
use crate::http::grpc;
use crate::http::message::BodyLength;
use crate::identify::auth::{AuthResult, Authentication};
use crate::identify::{AccessDecision, Caller, RequestId, RequestUuid};
use crate::metrics::Label as _;
use crate::record::{CacheDetail, CacheResult};
use crate::route::CorsPolicy;
use crate::{degrade, identify, limit};

impl RequestContext<'_> {
    /// Decides whether the request may pass. `Some` is the body of the response that ends the
    /// request; its head is in the buffers, except that of a prebuilt response, which the body
    /// carries itself.
    pub(crate) fn admit(&mut self) -> Option<ResponseBody<'static>> {
        if self.route.is_some_and(|route| route.config.edits.is_some()) {
            // By the caller that is known now; `authenticate` admits the request again.
            self.edit_request();
        }
        // A browser sends a preflight without credentials.
        let is_preflight = self.cors().is_some() && CorsPolicy::is_preflight(self.request);
        if is_preflight {
            self.authentication = Authentication::NotRequired;
        }
        // Lists and limits judge the user that the password proves.
        let is_pending = self.authentication == Authentication::Pending;
        let decision = if self.is_misdirected {
            Err(Error::Misdirected)
        } else if is_pending {
            self.check_lists()
        } else {
            self.check_access()
        };
        let error = match decision.and_then(|()| self.check_authentication()) {
            Ok(()) if is_preflight => return self.answer_preflight(),
            Ok(()) => return None,
            Err(error) => error,
        };
        if let Some(denied) = self.deny() {
            return Some(denied);
        }
        let body = self.degrade(error);
        self.challenge();
        self.respond();
        self.charge_for_status();
        Some(body)
    }

    /// Verifies the password of a request that `admit` let pass without it, then admits the
    /// request. Cancel safe: a verification that runs is left to end.
    pub(super) async fn authenticate(&mut self) -> Option<ResponseBody<'static>> {
        if self.authentication != Authentication::Pending {
            return None;
        }
        let route = self.route();
        let authenticator = route.authenticator.as_ref()?;
        let address = self.snapshot.identity.address_hash(self.caller.ip);
        self.authentication = authenticator.verify(&self.request.fields, (self.caller.ip, address)).await;
        self.update_now();
        if let Some(principal) = self.authentication.principal() {
            let mut caller = Box::new(Caller::clone(&self.caller));
            let (name, class) = (authenticator.name(principal), authenticator.class(principal));
            self.snapshot.identity.set_principal(&mut caller, name, class);
            self.record.user_class = Some(caller.user_class);
            self.caller = CurrentCaller::Authenticated(caller);
            authenticator.remove_credentials(&mut self.request.fields);
            self.request.is_authenticated = true;
            self.record.principal = Some(principal);
        }
        self.admit()
    }

    fn cors(&self) -> Option<&CorsPolicy> {
        self.route?.config.edits.as_ref()?.cors.as_ref()
    }

    fn answer_preflight(&mut self) -> Option<ResponseBody<'static>> {
        self.route?.config.edits.as_ref()?.cors.as_ref()?.write_preflight(self.request, self.response);
        self.respond();
        Some(ResponseBody::EMPTY)
    }

    fn check_authentication(&self) -> Result<(), Error> {
        if let Some(result) = self.authentication.result() {
            identify::auth::count(result);
        }
        match self.authentication {
            Authentication::NotRequired | Authentication::Accepted(_) | Authentication::Pending => Ok(()),
            Authentication::Rejected(AuthResult::ClientThrottled) => Err(Error::AuthenticationThrottled),
            Authentication::Rejected(AuthResult::VerificationThrottled) => Err(Error::AuthenticationBusy),
            Authentication::Rejected(_) => Err(Error::Unauthorized),
        }
    }

    /// Tells the client which credentials the route demands (RFC 9110 section 15.5.2).
    fn challenge(&mut self) {
        let authenticator = self.route.and_then(|route| route.authenticator.as_ref());
        if self.record.failure == Some(ErrorKind::Unauthorized)
            && let Some(authenticator) = authenticator
        {
            self.response.fields.push(b"www-authenticate", authenticator.challenge().as_bytes());
        }
    }

    /// Decides by the lists alone, before a password is verified.
    fn check_lists(&self) -> Result<(), Error> {
        let clients = self.route.and_then(|route| route.config.clients.as_ref());
        if clients.is_some_and(|clients| !clients.permits(self.caller.ip)) {
            return Err(Error::Forbidden);
        }
        match self.caller.access {
            AccessDecision::Unlisted | AccessDecision::Exempt => Ok(()),
            AccessDecision::Denied => Err(Error::Forbidden),
            AccessDecision::Unverified => Err(Error::VerificationThrottled),
        }
    }

    fn check_access(&mut self) -> Result<(), Error> {
        let route = self.route.ok_or(Error::NoRoute)?;
        if route.config.clients.is_some() {
            self.check_lists()?;
        }
        if self.caller.access != AccessDecision::Unlisted {
            return self.check_lists();
        }
        self.record.verdict = limit::decide(&route.rules, &self.caller, route.cost, self.now);
        limit::record_decision(&self.snapshot.limits, &self.record.verdict);
        if self.record.verdict.is_allowed() { Ok(()) } else { Err(Error::Limited) }
    }

    /// The prebuilt response to a request that a limit denied. The degrade ladder does not apply to
    /// it.
    fn deny(&mut self) -> Option<ResponseBody<'static>> {
        let Verdict::Denied(denial) = &self.record.verdict else { return None };
        count_failure(ErrorKind::Limited);
        count_result(CacheResult::Error);
        self.record.cache = CacheResult::Error;
        self.record.failure = Some(ErrorKind::Limited);
        self.record.blame = Some(ErrorKind::Limited.blame());
        self.record.detail = CacheDetail::Reason(ErrorKind::Limited.as_str());
        let format = PageFormat::preferred(&self.request.fields);
        let id = match &self.record.request_id {
            Some(RequestId::Made(uuid)) => Some(*uuid),
            // That of a trusted proxy has any length; its placeholder is replaced below.
            Some(RequestId::Received(_)) => Some(RequestUuid::NIL),
            None => None,
        };
        let composed_from = (&*self.record, &self.snapshot.limits);
        let prebuilt = self.worker.prebuilt_429.response(denial, format, composed_from);
        self.response.status = prebuilt.response.status;
        count_response(self.route, self.record, self.response.status);
        let mut body = ResponseBody::Prebuilt(prebuilt, id);
        if grpc::is_call(self.request) {
            body.unpack_head(self.response);
            if let Some(id) = &self.record.request_id {
                id.write(&mut self.response.fields);
            }
            degrade::make_grpc(ErrorKind::Limited.as_str(), self.response);
            self.edit_response();
            return Some(ResponseBody::EMPTY);
        }
        let mut page = match format {
            PageFormat::Html(language) => self.denial_page(language),
            PageFormat::Json => None,
        };
        if let Some(RequestId::Received(_)) = &self.record.request_id {
            page = page.or_else(|| Some(self.default_denial_body(format)));
        }
        if page.is_some() || self.route.is_some_and(|route| route.config.edits.is_some()) {
            body.unpack_head(self.response);
            if let Some(id) = &self.record.request_id {
                id.write(&mut self.response.fields);
            }
            self.edit_response();
        }
        if let Some(page) = page {
            self.response.length = BodyLength::Known(page.len() as u64);
            body = ResponseBody::Bytes(page);
        }
        Some(body)
    }

    /// The configured page of a denial, if there is one.
    fn denial_page(&self, language: PageLanguage) -> Option<Bytes> {
        let wait = limit::retry_seconds(&self.record.verdict);
        self.error_responder().page(&Error::Limited, (self.response.status, wait), language)
    }

    #[cold]
    fn default_denial_body(&self, format: PageFormat) -> Bytes {
        let retry_after = limit::retry_seconds(&self.record.verdict);
        let facts =
            BodyFacts { status: self.response.status, retry_after, request_id: self.record.request_id.as_ref() };
        degrade::default_body(&Error::Limited, format, &facts)
    }

    /// Charges the additional cost of the response's status (`cost_by_status`).
    pub(super) fn charge_for_status(&self) {
        if self.caller.access == AccessDecision::Unlisted
            && let Some(route) = self.route
            && let Some(cost) = route.response_cost(self.response.status)
        {
            limit::charge(&route.rules, &self.caller, cost);
        }
    }
}
