//! The compress phase: the body in the content coding that the client prefers.
//!
//! A complete body is compressed once, and its form is kept beside it; one above `INLINE_BYTES` off
//! the thread. A body that is still arriving is compressed in pieces, for each client by itself.
//! While too much is being compressed, bodies are sent as they are.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::context::RequestContext;
use super::response_body::ResponseBody;
use crate::compress::{self, CompressConfig, CompressedBody, Effort, FlushPolicy};
use crate::http::compressed_forms::{self, CompressedForm, CompressedForms, ContentCoding};
use crate::http::fields::KnownField;
use crate::http::message::{Method, StatusCode};
use crate::label;
use crate::metrics::{self, Counters};
use crate::record::CacheResult;

/// A longer body is compressed off the thread: this many bytes take about a millisecond.
const INLINE_BYTES: usize = 16 << 10;
/// Bodies that are compressed off the threads at one time. Others are sent as they are meanwhile.
const WHOLE_MAX: usize = 4;

static WHOLE: Semaphore = Semaphore::const_new(WHOLE_MAX);

label! {
    /// Why a response that is compressed for others was sent as it is.
    CompressionSkip, "reason", {
        /// It may carry a secret.
        Credentials = "credentials",
        /// Too much is being compressed.
        Busy = "busy",
        /// The form is not smaller.
        NotSmaller = "not_smaller",
    }
}

static RESPONSES: LazyLock<Counters<ContentCoding>> = LazyLock::new(Counters::default);
static SKIPPED: LazyLock<Counters<CompressionSkip>> = LazyLock::new(Counters::default);

/// Registers the metrics of this module.
pub(super) fn expose() {
    compress::expose();
    metrics::expose_counters("tidegate_compressed_responses", "Compressed responses by coding.", &RESPONSES);
    let help = "Responses of routes that compress, which were sent as they are.";
    metrics::expose_counters("tidegate_compression_skipped", help, &SKIPPED);
    let help = "Bytes of compressed forms that are kept beside stored bodies.";
    metrics::expose_gauge_with("tidegate_compression_kept_bytes", help, |emit| {
        emit(&[], compressed_forms::kept_bytes() as f64);
    });
}

impl RequestContext<'_> {
    /// The body in the coding that the client prefers, with the head that belongs to it, where the
    /// route compresses the response.
    pub(super) async fn compress<'b>(&mut self, body: ResponseBody<'b>, config: &CompressConfig) -> ResponseBody<'b> {
        let forms = self.response.forms.take();
        if !self.record.has_one_coding && config.is_one_of_several(self.response) {
            compress::mark_variant(&mut self.response.fields);
        }
        if self.response.status == StatusCode::NOT_MODIFIED {
            if self.has_weak_form() {
                compress::describe_form(&mut self.response.fields);
            }
            return body;
        }
        if !config.applies_to(self.response) {
            return body;
        }
        let Some(coding) = compress::preferred_coding(&self.request.fields, &config.codings) else { return body };
        if !config.credentials && !self.is_shared() && CompressConfig::may_carry_secret(self.request, self.response) {
            SKIPPED.inc(CompressionSkip::Credentials);
            return body;
        }
        let is_head = self.request.method == Method::HEAD;
        let body = match body {
            ResponseBody::Fill(mut shared) => match shared.take_whole() {
                Some(bytes) => ResponseBody::Bytes(bytes),
                None => ResponseBody::Fill(shared),
            },
            body => body,
        };
        let body = match body {
            ResponseBody::Bytes(bytes) => {
                return match self.whole_form(forms, (bytes.clone(), coding)).await {
                    Some(form) => {
                        RESPONSES.inc(coding);
                        compress::write_coding(coding, Some(form.len() as u64), self.response);
                        ResponseBody::Bytes(form)
                    }
                    None => ResponseBody::Bytes(bytes),
                };
            }
            body if is_head => {
                compress::write_coding(coding, None, self.response);
                return body;
            }
            body => body,
        };
        match CompressedBody::new(body, (coding, self.flush_policy()), self.peer) {
            Ok(compressed) => {
                RESPONSES.inc(coding);
                compress::write_coding(coding, None, self.response);
                ResponseBody::Compressed(Box::new(compressed))
            }
            Err(body) => {
                SKIPPED.inc(CompressionSkip::Busy);
                body
            }
        }
    }

    /// Notes whether all clients get the content of a complete response in the same coding, before
    /// the response becomes a 304 or a 206, which do not tell its type.
    pub(super) fn note_coding(&mut self) {
        if let Some(config) = &self.route().config.compress {
            self.record.has_one_coding = !config.applies_to(self.response);
        }
    }

    /// Whether others get the response too, so that it holds no secret of this client. One that
    /// varies by credentials is for those who have them.
    fn is_shared(&self) -> bool {
        let names_credentials =
            |name: &[u8]| name.eq_ignore_ascii_case(b"cookie") || name.eq_ignore_ascii_case(b"authorization");
        if self.response.fields.members(KnownField::Vary).any(names_credentials) {
            return false;
        }
        self.record.stored
            || matches!(
                self.record.cache,
                CacheResult::Hit
                    | CacheResult::Stale
                    | CacheResult::Revalidated
                    | CacheResult::Collapsed
                    | CacheResult::Remote
            )
    }

    /// Whether the client holds a compressed form: it repeats the weak form of the validator.
    fn has_weak_form(&self) -> bool {
        let Some(tag) = self.response.fields.get(KnownField::ETag) else { return false };
        let weak = [b"W/", tag].concat();
        self.request.fields.members(KnownField::IfNoneMatch).any(|member| member == weak)
    }

    fn flush_policy(&self) -> FlushPolicy {
        let media_type = self.response.fields.get(KnownField::ContentType).unwrap_or_default();
        let is_event_stream =
            media_type.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"));
        if is_event_stream { FlushPolicy::EachPiece } else { FlushPolicy::OnPause }
    }

    /// The form of a complete body: as it is kept, or made now. `None`: the body is sent as it is.
    async fn whole_form(
        &self,
        forms: Option<Arc<CompressedForms>>,
        (body, coding): (Bytes, ContentCoding),
    ) -> Option<Bytes> {
        match forms.as_ref().map_or(CompressedForm::Absent, |forms| forms.get(coding)) {
            CompressedForm::Known(form) => return Some(form),
            CompressedForm::NotSmaller => {
                SKIPPED.inc(CompressionSkip::NotSmaller);
                return None;
            }
            CompressedForm::Absent => {}
        }
        let forms = forms.unwrap_or_default();
        let Some(in_progress) = forms.begin(coding) else {
            SKIPPED.inc(CompressionSkip::Busy);
            return None;
        };
        // Half of the cache's memory for forms, all together.
        let limit = self.snapshot.cache.memory_bytes / 2;
        // A form that cannot be kept is made for one response.
        let effort = if compressed_forms::kept_bytes() < limit { Effort::High } else { Effort::Low };
        let compress = move |body: &Bytes| {
            compress::count_input(body.len());
            let form = compress::compress_whole(coding, body, effort).map(Bytes::from);
            in_progress.keep(form.clone(), limit);
            form
        };
        let form = if body.len() <= INLINE_BYTES {
            compress(&body)
        } else {
            let Ok(permit) = WHOLE.try_acquire() else {
                SKIPPED.inc(CompressionSkip::Busy);
                return None;
            };
            // Completes also if the request is dropped, so that the form is kept.
            let running = tokio::task::spawn_blocking(move || {
                let form = compress(&body);
                drop(permit);
                form
            });
            running.await.ok().flatten()
        };
        if form.is_none() {
            SKIPPED.inc(CompressionSkip::NotSmaller);
        }
        form
    }
}
