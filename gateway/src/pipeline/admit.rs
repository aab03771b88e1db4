//! The admit phase: access lists, then limits. It never waits.

use limiter::Verdict;

use super::context::RequestContext;
use super::degrade::count_failure;
use super::respond::{count_response, count_result};
use super::response_body::ResponseBody;
use crate::error::{Error, ErrorKind};
use crate::identify::AccessDecision;
use crate::metrics::Label as _;
use crate::record::{CacheDetail, CacheResult};
use crate::{degrade, limit};

impl RequestContext<'_> {
    /// Decides whether the request may pass. `Some` is the body of the response that ends the
    /// request; its head is in the buffers, except that of a prebuilt response, which the body
    /// carries itself.
    pub(crate) fn admit(&mut self) -> Option<ResponseBody<'static>> {
        let error = match self.check_access() {
            Ok(()) => return None,
            Err(error) => error,
        };
        if let Some(denied) = self.deny() {
            return Some(denied);
        }
        let body = self.degrade(error);
        self.respond();
        self.charge_for_status();
        Some(body)
    }

    fn check_access(&mut self) -> Result<(), Error> {
        let route = self.route.ok_or(Error::NoRoute)?;
        match self.caller.access {
            AccessDecision::Unlisted => {
                self.record.verdict = limit::decide(&route.rules, self.caller, route.cost, self.now);
                limit::record_decision(&self.snapshot.limits, &self.record.verdict);
                if self.record.verdict.is_allowed() { Ok(()) } else { Err(Error::Limited) }
            }
            AccessDecision::Exempt => Ok(()),
            AccessDecision::Denied => Err(Error::Forbidden),
            AccessDecision::Unverified => Err(Error::VerificationThrottled),
        }
    }

    /// The prebuilt response to a request that a limit denied. The degrade ladder does not apply to
    /// it.
    fn deny(&mut self) -> Option<ResponseBody<'static>> {
        let Verdict::Denied(denial) = &self.record.verdict else { return None };
        count_failure(ErrorKind::Limited);
        count_result(CacheResult::Error);
        self.record.cache = CacheResult::Error;
        self.record.failure = Some(ErrorKind::Limited);
        self.record.detail = CacheDetail::Reason(ErrorKind::Limited.as_str());
        let format = degrade::page_format(&self.request.fields);
        let composed_from = (&*self.record, &self.snapshot.limits);
        let prebuilt = self.worker.prebuilt_429.response(denial, format, composed_from);
        self.response.status = prebuilt.response.status;
        count_response(self.route, self.record, self.response.status);
        Some(ResponseBody::Prebuilt(prebuilt))
    }

    /// Charges the additional cost of the response's status (`cost_by_status`).
    pub(super) fn charge_for_status(&self) {
        if self.caller.access == AccessDecision::Unlisted
            && let Some(route) = self.route
            && let Some(cost) = route.response_cost(self.response.status)
        {
            limit::charge(&route.rules, self.caller, cost);
        }
    }
}
