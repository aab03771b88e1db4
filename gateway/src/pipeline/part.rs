//! Parts of what is not stored as a whole: answered from a stored part where it has them, else fetched as they are asked for.

use shard::Hit;

use super::shared::Fetch;
use super::{Body, CONDITIONS, Passage};
use crate::cache::fill::Lead;
use crate::cache::part::Extent;
use crate::cache::policy::{self, NoStore};
use crate::cache::stored::Meta;
use crate::error::Error;
use crate::http::body::RequestBody;
use crate::http::fields::Known;
use crate::http::message::{Request, Response, StatusCode};
use crate::respond::{self, CacheResult, Detail};
use crate::route::Route;

impl Passage<'_> {
    /// The parts that `request` wants, where a stored part holds them all.
    pub(super) fn answer_from_part(
        &mut self,
        hit: &Hit<Meta>,
        request: &Request,
        response: &mut Response,
    ) -> Option<Body<'static>> {
        let Meta::Part(object, extent) = &hit.meta else { return None };
        let has_condition = CONDITIONS.iter().any(|condition| request.fields.has(*condition));
        if !policy::wants_part(request) || has_condition {
            return None;
        }
        response.fields.copy_from(&object.fields);
        let body = policy::cut_part(request, *extent, hit.body(), response)?;
        let standing = object.standing_of(hit, self.now);
        self.story.standing = Some(standing);
        respond::write_age(standing.age, &mut response.fields);
        Some(Body::Bytes(body))
    }

    /// Fetches what `request` asks for as it asks for it, and stores it: a part as a part, and a whole as the whole.
    pub(super) async fn part(
        &mut self,
        route: &Route,
        fetch: Fetch<'_>,
        request: &mut Request,
        response: &mut Response,
    ) -> Result<Body<'static>, Error> {
        if self.story.cache != CacheResult::Pass {
            self.story.cache = CacheResult::Miss;
        }
        let mut outgoing = request.clone();
        let exchange = self.forward(route, fetch.caller, &mut outgoing, RequestBody::Empty, response).await?;
        if response.status == StatusCode::OK {
            return Ok(self.settle(fetch, Lead::solo(), exchange, request, response));
        }
        self.story.detail = Detail::Reason(NoStore::Range.as_str());
        let extent = Extent::of(response);
        let Some(extent) = extent.filter(|extent| extent.length <= self.site.cache.object_bytes) else {
            return Ok(Body::Answer(exchange));
        };
        // Its head is that of the whole, but for where the part lies (RFC 9111 section 3.4).
        let mut whole = Response { status: StatusCode::OK, ..response.clone() };
        whole.fields.remove(Known::ContentRange);
        let fit = match self.fit(&fetch, request, &whole) {
            Ok(fit) => fit,
            Err(reason) => {
                self.story.detail = Detail::Reason(reason.as_str());
                return Ok(Body::Answer(exchange));
            }
        };
        self.story.detail = Detail::None;
        self.story.stored = true;
        Ok(self.fill(fetch.filling(fit, Some(extent)), Lead::solo(), exchange, request, response))
    }
}
