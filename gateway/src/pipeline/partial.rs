//! Range requests of objects that are not stored as a whole: answered from a stored part that holds
//! the range, else forwarded as requested.

use std::future::poll_fn;

use shard::CacheHit;

use super::context::{CONDITIONS, RequestContext};
use super::fetch::{Fetch, is_answer_to_range};
use super::forward::UpstreamBody;
use super::pieced_body::PiecedBody;
use super::response_body::ResponseBody;
use crate::cache::extent::Extent;
use crate::cache::fill::FillLeader;
use crate::cache::missing::MissingPiece;
use crate::cache::policy::{self, NoStoreReason};
use crate::cache::range;
use crate::cache::stored::CacheMeta;
use crate::error::Error;
use crate::http::body::BodySource as _;
use crate::http::message::{BodyLength, Request, Response, StatusCode};
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
        let freshness = object.freshness_at(hit, self.now, self.cache_policy());
        respond::write_age(freshness.age, &mut self.response.fields);
        self.response.length = BodyLength::Known(extent.total);
        self.note_coding();
        let body = policy::apply_range_to_partial(self.request, *extent, hit.body(), self.response)?;
        self.record.freshness = Some(freshness);
        Some(ResponseBody::Bytes(body))
    }

    /// Whether the whole object, of which a part is stored, is small enough to be stored.
    pub(super) fn fits_store(&self, hit: &CacheHit<CacheMeta>) -> bool {
        !matches!(&hit.meta, CacheMeta::Partial(_, extent) if extent.total > self.snapshot.cache.object_bytes)
    }

    /// The piece that a stored part lacks for the response to this request, if that and the part
    /// are the response. `None` if the response will be too large to store: the stored bytes are
    /// then few of it, and the origin would wait for a slow client to read them first.
    pub(super) fn missing_piece(&self, hit: &CacheHit<CacheMeta>) -> Option<Box<MissingPiece>> {
        let CacheMeta::Partial(object, extent) = &hit.meta else { return None };
        let has_condition = CONDITIONS.iter().any(|condition| self.request.fields.has(*condition));
        if policy::wants_range(self.request) && has_condition {
            return None;
        }
        let piece = MissingPiece::of(self.request, (object, *extent, hit.body()))?;
        (piece.wanted().length <= self.snapshot.cache.object_bytes).then(|| Box::new(piece))
    }

    /// Requests the smaller one of two gaps around a stored part, and stores it with the part.
    /// Returns the piece that the response then lacks; `None` if the gap cannot be joined, and the
    /// response is to be fetched as a whole. Cancel safe: bytes that are not stored are lost.
    pub(super) async fn close_first_gap(
        &mut self,
        fetch: &Fetch,
        piece: Box<MissingPiece>,
    ) -> Result<Option<Box<MissingPiece>>, Error> {
        if !piece.is_first_of_two() {
            return Ok(Some(piece));
        }
        let mut copy = self.request.clone();
        CONDITIONS.into_iter().for_each(|known| copy.fields.remove(known));
        self.reduce(&mut copy);
        piece.write_range(&mut copy.fields);
        let mut received = self.forward(Some(&mut copy), RequestBody::Empty).await?;
        if !piece.is_in(self.response) {
            return Ok(None);
        }
        let whole = piece.whole_head(self.response);
        let Ok(plan) = self.store_plan_for(fetch, &whole) else { return Ok(None) };
        let mut missing = Vec::new();
        // To the end of its framing, so that the connection can be used again.
        while poll_fn(|cx| received.poll_fill(cx)).await.is_ok() && !received.data().is_empty() {
            missing.extend_from_slice(received.data());
            received.consume(received.data().len());
        }
        if missing.len() as u64 != piece.missing_bytes() {
            return Ok(None);
        }
        let (extent, bytes) = (piece.wanted(), piece.joined(&missing));
        let Some(entry) = fetch.part_entry(self.caller.region, plan, extent) else { return Ok(None) };
        let next = MissingPiece::of(self.request, (&entry.object, extent, &bytes)).map(Box::new);
        entry.store(self.worker, self.snapshot, bytes);
        Ok(next)
    }

    /// Forwards a range request and stores the response: a 206 as a part, a 200 as the whole
    /// object. With `piece`, only that is requested, unless the origin has another version.
    pub(super) async fn fetch_part(
        &mut self,
        fetch: Fetch,
        piece: Option<Box<MissingPiece>>,
    ) -> Result<ResponseBody<'static>, Error> {
        if self.record.cache != CacheResult::Pass {
            self.record.cache = CacheResult::Miss;
        }
        let mut copy = self.request.clone();
        self.reduce(&mut copy);
        let mut source = None;
        let piece = match piece {
            Some(piece) => self.close_first_gap(&fetch, piece).await?,
            None => None,
        };
        if let Some(piece) = piece {
            let mut for_piece = copy.clone();
            CONDITIONS.into_iter().for_each(|known| for_piece.fields.remove(known));
            piece.write_range(&mut for_piece.fields);
            let received = self.forward(Some(&mut for_piece), RequestBody::Empty).await?;
            if piece.is_in(self.response) {
                return Ok(self.complete(piece, (fetch, FillLeader::solo()), received));
            }
            if self.response.status == StatusCode::OK {
                return self.replace_part((fetch, copy), received).await;
            }
            // Any other answer is one to the piece only.
            source = (!is_answer_to_range(self.response.status)).then_some(received);
        }
        let source = match source {
            Some(source) => source,
            None => self.forward(Some(&mut copy), RequestBody::Empty).await?,
        };
        Ok(self.store_or_pass_part(fetch, source))
    }

    /// Answers with another version than that of the stored part, which the origin has sent as a
    /// whole. A client that asked for a range does not get a whole object that is too large to
    /// store: its own request is then forwarded.
    async fn replace_part(
        &mut self,
        (fetch, mut own): (Fetch, Request),
        whole: UpstreamBody<'static>,
    ) -> Result<ResponseBody<'static>, Error> {
        let object_bytes = self.snapshot.cache.object_bytes;
        if matches!(self.response.length, BodyLength::Known(length) if length <= object_bytes) {
            let key = fetch.key.clone();
            let body = self.store_or_pass(fetch, FillLeader::solo(), whole);
            if !self.record.stored {
                self.worker.view.remove(&self.caller.region, &key.as_key());
            }
            return Ok(body);
        }
        drop(whole);
        self.worker.view.remove(&self.caller.region, &fetch.key.as_key());
        // A fetch from before the removal stores nothing.
        let fetch = Fetch::begin(self, fetch.key);
        let source = self.forward(Some(&mut own), RequestBody::Empty).await?;
        Ok(self.store_or_pass_part(fetch, source))
    }

    /// Stores the response to a range request while it is sent: a 206 as a part, a 200 as the whole
    /// object.
    fn store_or_pass_part(&mut self, fetch: Fetch, source: UpstreamBody<'static>) -> ResponseBody<'static> {
        if self.response.status == StatusCode::OK {
            return self.store_or_pass(fetch, FillLeader::solo(), source);
        }
        self.record.detail = CacheDetail::Reason(NoStoreReason::Range.as_str());
        let extent = Extent::from_content_range(self.response);
        let Some(extent) = extent.filter(|extent| extent.length <= self.snapshot.cache.object_bytes) else {
            return ResponseBody::Upstream(Box::new(source));
        };
        // Its head is that of the whole object except for what describes the part (RFC 9111 section
        // 3.4).
        let mut whole = Response { status: StatusCode::OK, ..self.response.clone() };
        range::remove_content_fields(&mut whole.fields);
        let plan = match self.store_plan_for(&fetch, &whole) {
            Ok(plan) => plan,
            Err(reason) => {
                self.record.detail = CacheDetail::Reason(reason.as_str());
                return ResponseBody::Upstream(Box::new(source));
            }
        };
        self.record.detail = CacheDetail::None;
        self.record.stored = true;
        self.fill(
            fetch.pending_entry(self.caller.region, plan, Some(extent)),
            FillLeader::solo(),
            PiecedBody::whole(source),
        )
    }
}
