//! Range requests of objects that are not stored as a whole: answered from a stored part that holds
//! the range, else forwarded as requested.

use shard::CacheHit;

use super::context::{CONDITIONS, RequestContext};
use super::fetch::Fetch;
use super::response_body::ResponseBody;
use crate::cache::extent::Extent;
use crate::cache::fill::FillLeader;
use crate::cache::policy::{self, NoStoreReason};
use crate::cache::stored::CacheMeta;
use crate::error::Error;
use crate::http::fields::KnownField;
use crate::http::message::{Response, StatusCode};
use crate::http::request_body::RequestBody;
use crate::record::{CacheDetail, CacheResult};
use crate::respond;

impl RequestContext<'_> {
    /// The requested ranges, where a stored part holds all of them.
    pub(super) fn response_from_part(&mut self, hit: &CacheHit<CacheMeta>) -> Option<ResponseBody<'static>> {
        let CacheMeta::Partial(object, extent) = &hit.meta else { return None };
        let has_condition = CONDITIONS.iter().any(|condition| self.request.fields.has(*condition));
        if !policy::wants_range(self.request) || has_condition {
            return None;
        }
        self.response.fields.copy_from(&object.fields);
        let body = policy::apply_range_to_partial(self.request, *extent, hit.body(), self.response)?;
        let freshness = object.freshness_at(hit, self.now, self.cache_policy());
        self.record.freshness = Some(freshness);
        respond::write_age(freshness.age, &mut self.response.fields);
        Some(ResponseBody::Bytes(body))
    }

    /// Forwards a range request and stores the response: a 206 as a part, a 200 as the whole
    /// object.
    pub(super) async fn fetch_part(&mut self, fetch: Fetch) -> Result<ResponseBody<'static>, Error> {
        if self.record.cache != CacheResult::Pass {
            self.record.cache = CacheResult::Miss;
        }
        let mut copy = self.request.clone();
        self.reduce(&mut copy);
        let source = self.forward(Some(&mut copy), RequestBody::Empty).await?;
        if self.response.status == StatusCode::OK {
            return Ok(self.store_or_pass(fetch, FillLeader::solo(), source));
        }
        self.record.detail = CacheDetail::Reason(NoStoreReason::Range.as_str());
        let extent = Extent::from_content_range(self.response);
        let Some(extent) = extent.filter(|extent| extent.length <= self.snapshot.cache.object_bytes) else {
            return Ok(ResponseBody::Upstream(Box::new(source)));
        };
        // Its head is that of the whole object except for `Content-Range` (RFC 9111 section 3.4).
        let mut whole = Response { status: StatusCode::OK, ..self.response.clone() };
        whole.fields.remove(KnownField::ContentRange);
        let plan = match self.store_plan_for(&fetch, &whole) {
            Ok(plan) => plan,
            Err(reason) => {
                self.record.detail = CacheDetail::Reason(reason.as_str());
                return Ok(ResponseBody::Upstream(Box::new(source)));
            }
        };
        self.record.detail = CacheDetail::None;
        self.record.stored = true;
        Ok(self.fill(fetch.pending_entry(self.caller.region, plan, Some(extent)), FillLeader::solo(), source))
    }
}
