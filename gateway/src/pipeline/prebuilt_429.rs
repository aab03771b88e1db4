//! Prebuilt responses to requests that a limit denied.
//!
//! Denials of one rule with equal waits get the same response, so a flood is answered by copying.
//! Invariant: a prebuilt response is composed from its key and page format alone, and holds nothing
//! of one client: the id of a request is a placeholder, replaced in the copy.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;
use limiter::Denial;

use crate::degrade::{self, BodyFacts, PageFormat};
use crate::error::Error;
use crate::http::h1::SerializedResponse;
use crate::http::message::Response;
use crate::identify::{RequestId, RequestUuid};
use crate::limit::{self, DenialResponseKey, LimitHeaders};
use crate::record::RequestRecord;
use crate::respond;

/// Responses cached by a thread, about 60 KiB.
const SLOTS: usize = 64;

/// A direct-mapped cache of the responses that a thread composed last.
pub(crate) struct Prebuilt429Cache(RefCell<Vec<Prebuilt429Slot>>);

/// One slot of the cache: a response and what it was composed from.
#[derive(Default)]
struct Prebuilt429Slot {
    /// The inputs that the response was composed from; `None` while the slot is empty.
    key: Option<(DenialResponseKey, PageFormat, bool)>,
    /// The version of the `Date` field it was composed with: the slot expires with its second.
    date_version: Option<u64>,
    response: Rc<Prebuilt429>,
}

/// The response to a denial: its head, its page, and both in wire format.
#[derive(Clone, Default)]
pub(crate) struct Prebuilt429 {
    pub(super) response: Response,
    pub(super) page: Bytes,
    /// Head and body in the form that most clients get.
    pub(super) serialized: SerializedResponse,
}

impl Default for Prebuilt429Cache {
    fn default() -> Self {
        Prebuilt429Cache(RefCell::new((0..SLOTS).map(|_| Prebuilt429Slot::default()).collect()))
    }
}

impl Prebuilt429Cache {
    /// The response to the denial in `record`.
    pub(super) fn response(
        &self,
        denial: &Denial,
        format: PageFormat,
        (record, headers): (&RequestRecord, &LimitHeaders),
    ) -> Rc<Prebuilt429> {
        let response_key = headers.denial_response_key(denial);
        let mut slots = self.0.borrow_mut();
        let slot = &mut slots[response_key.slot_hash() as usize % SLOTS];
        let has_id = record.request_id.is_some();
        let (key, date_version) = (Some((response_key, format, has_id)), degrade::date_version());
        if slot.key != key || slot.date_version != date_version || date_version.is_none() {
            // Reuses the memory, unless a connection still sends the old response.
            Rc::make_mut(&mut slot.response).compose(format, record, headers);
            (slot.key, slot.date_version) = (key, date_version);
        }
        Rc::clone(&slot.response)
    }
}

impl Prebuilt429 {
    fn compose(&mut self, format: PageFormat, record: &RequestRecord, headers: &LimitHeaders) {
        let Prebuilt429 { response, page, serialized } = self;
        let status = Error::Limited.status();
        let retry_after = limit::retry_seconds(&record.verdict);
        let placeholder = record.request_id.is_some().then_some(RequestId::Made(RequestUuid::NIL));
        let facts = BodyFacts { status, retry_after, request_id: placeholder.as_ref() };
        *page = degrade::default_body(&Error::Limited, format, &facts);
        degrade::write_head(status, format, page, response);
        degrade::name_choice(&mut response.fields);
        respond::write_cache_status(record, &mut response.fields);
        headers.write(&record.verdict, &mut response.fields);
        if let Some(id) = &placeholder {
            id.write(&mut response.fields);
        }
        serialized.serialize(response, page, placeholder.is_some().then_some(&RequestUuid::NIL.text()));
    }

    /// The page with the id of one request.
    pub(super) fn page_with(&self, id: RequestUuid) -> Bytes {
        let placeholder = RequestUuid::NIL.text();
        let mut page = self.page.to_vec();
        if let Some(at) = page.windows(placeholder.len()).position(|window| window == placeholder) {
            page[at..at + placeholder.len()].copy_from_slice(&id.text());
        }
        page.into()
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;
    use std::time::{Duration, UNIX_EPOCH};

    use limiter::{Evaluations, LimitStatus, Quota, Rate, Rule, Scope, UserClass, Verdict};

    use super::*;
    use crate::degrade::PageLanguage;
    use crate::http::fields::KnownFieldSet;
    use crate::http::message::BodyLength;
    use crate::limit::{self, HeaderExposure, LimitConfig, RuleConfig};
    use crate::record::CacheDetail;

    fn quota() -> Quota {
        let rate = Rate::new(1, 60).expect("a rate");
        Quota::new(rate, NonZeroU32::MIN).expect("a quota")
    }

    fn headers(name: &str, exposure: HeaderExposure) -> LimitHeaders {
        let rule = Rule::new(name, Scope::Device, quota());
        let rules = vec![RuleConfig { rule, exposure, per_address: None }];
        let config = LimitConfig { rules, ..LimitConfig::default() };
        limit::build(&config, 0, false, None).expect("a rule").1
    }

    fn denial(remaining: u64, reset: u64, wait: u64) -> Denial {
        let limit_status = LimitStatus { rule: 0, quota: quota(), remaining, reset: Duration::from_secs(reset) };
        let retry_after = Duration::from_secs(wait);
        Denial { limit_status, retry_after, evaluations: Evaluations::default(), class: UserClass(0) }
    }

    /// Status, fields and body of the response.
    fn text(cache: &Prebuilt429Cache, denial: &Denial, headers: &LimitHeaders, format: PageFormat) -> String {
        let verdict = Verdict::Denied(*denial);
        let record = RequestRecord { verdict, detail: CacheDetail::Reason("limited"), ..RequestRecord::default() };
        let Prebuilt429 { response, page, .. } = &*cache.response(denial, format, (&record, headers));
        assert_eq!(response.length, BodyLength::Known(page.len() as u64));
        let mut text = format!("{}\n", response.status).into_bytes();
        response.fields.write_lines(&mut text, KnownFieldSet::default());
        text.extend_from_slice(page);
        String::from_utf8(text).expect("ASCII")
    }

    #[test]
    fn prebuilt_response_equals_a_new_one() {
        let exposures =
            [("few", HeaderExposure::Full), ("less", HeaderExposure::Full), ("few", HeaderExposure::Hidden)];
        let all_headers = exposures.map(|(name, exposure)| headers(name, exposure));
        let cache = Prebuilt429Cache::default();
        for second in [1_000, 1_000, 1_001] {
            degrade::update_date(UNIX_EPOCH + Duration::from_secs(second));
            for headers in &all_headers {
                for format in [PageFormat::Json, PageFormat::Html(PageLanguage::Chinese)] {
                    // More waits than there are slots; some share a slot.
                    for wait in (0..100).chain([u64::from(u32::MAX)]) {
                        let denial = denial(wait % 3, wait + 5, wait);
                        let new = text(&Prebuilt429Cache::default(), &denial, headers, format);
                        assert_eq!(text(&cache, &denial, headers, format), new);
                        assert!(new.contains(&format!("retry-after: {wait}\r\n")), "{new}");
                        assert!(new.contains(&format!("00:16:{} GMT\r\n", second - 960)), "{new}");
                    }
                }
            }
        }
        let json = |headers| text(&cache, &denial(0, 60, 1), headers, PageFormat::Json);
        let exposed = json(&all_headers[1]);
        assert!(exposed.contains("ratelimit: \"less\";r=0;t=60\r\n"), "{exposed}");
        assert!(!json(&all_headers[2]).contains("ratelimit"));
    }
}
