//! Compressed forms of one complete body, made once and shared by all who are sent it.
//!
//! The forms live and end with the stored object. Invariant: the bytes of all forms of the process
//! stay within the limit that callers pass; a form above it is made for one response and not kept.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use crate::label;

label! {
    /// A content coding (RFC 9110 section 8.4.1) that the gateway applies.
    pub(crate) ContentCoding, "coding", {
        Zstd = "zstd",
        Brotli = "br",
        Gzip = "gzip",
    }
}

/// Bytes of all forms that are kept.
static KEPT: AtomicU64 = AtomicU64::new(0);

/// Bytes of compressed forms that this process keeps.
pub(crate) fn kept_bytes() -> u64 {
    KEPT.load(Relaxed)
}

/// The forms of one body, by coding.
#[derive(Debug, Default)]
pub(crate) struct CompressedForms {
    /// `None` inside: the form is not smaller than the body.
    forms: [OnceLock<Option<Bytes>>; 3],
    /// Bits of the codings whose form is being made.
    running: AtomicU8,
    kept: AtomicU64,
}

/// A form of a body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CompressedForm {
    Known(Bytes),
    /// The body is sent as it is.
    NotSmaller,
    /// It was not made yet, or not kept.
    Absent,
}

impl CompressedForms {
    pub(crate) fn get(&self, coding: ContentCoding) -> CompressedForm {
        match self.forms[coding as usize].get() {
            Some(Some(bytes)) => CompressedForm::Known(bytes.clone()),
            Some(None) => CompressedForm::NotSmaller,
            None => CompressedForm::Absent,
        }
    }

    /// Begins to make the form; `None` while another request makes it.
    pub(crate) fn begin(self: &Arc<Self>, coding: ContentCoding) -> Option<FormInProgress> {
        let bit = 1 << coding as u8;
        let is_first = self.running.fetch_or(bit, Relaxed) & bit == 0;
        is_first.then(|| FormInProgress { forms: Arc::clone(self), coding })
    }

    /// Keeps a form if all forms of the process stay within `limit` bytes. `None`: it is not
    /// smaller than the body.
    fn keep(&self, coding: ContentCoding, form: Option<Bytes>, limit: u64) {
        let bytes = form.as_ref().map_or(0, Bytes::len) as u64;
        let total = KEPT.fetch_add(bytes, Relaxed) + bytes;
        if (bytes > 0 && total > limit) || self.forms[coding as usize].set(form).is_err() {
            KEPT.fetch_sub(bytes, Relaxed);
            return;
        }
        self.kept.fetch_add(bytes, Relaxed);
    }
}

/// A form that is being made. It ends with the value, also by a panic.
pub(crate) struct FormInProgress {
    forms: Arc<CompressedForms>,
    coding: ContentCoding,
}

impl FormInProgress {
    /// Keeps the form, as `CompressedForms::keep` does.
    pub(crate) fn keep(&self, form: Option<Bytes>, limit: u64) {
        self.forms.keep(self.coding, form, limit);
    }
}

impl Drop for FormInProgress {
    fn drop(&mut self) {
        self.forms.running.fetch_and(!(1 << self.coding as u8), Relaxed);
    }
}

impl Drop for CompressedForms {
    fn drop(&mut self) {
        KEPT.fetch_sub(*self.kept.get_mut(), Relaxed);
    }
}

/// The forms of bodies are no part of what is configured or stored: all are equal.
impl PartialEq for CompressedForms {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for CompressedForms {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_kept_within_the_limit_and_released_with_their_body() {
        let before = kept_bytes();
        let forms = Arc::new(CompressedForms::default());
        let gzip = forms.begin(ContentCoding::Gzip).expect("the first");
        assert!(forms.begin(ContentCoding::Gzip).is_none());
        assert!(forms.begin(ContentCoding::Zstd).is_some(), "each coding is made by itself");
        gzip.keep(Some(Bytes::from_static(b"12345")), u64::MAX);
        drop(gzip);
        assert!(forms.begin(ContentCoding::Gzip).is_some());
        assert_eq!(forms.get(ContentCoding::Gzip), CompressedForm::Known(Bytes::from_static(b"12345")));
        forms.keep(ContentCoding::Brotli, Some(Bytes::from_static(b"12345")), 4);
        assert_eq!(forms.get(ContentCoding::Brotli), CompressedForm::Absent);
        forms.keep(ContentCoding::Zstd, None, 0);
        assert_eq!(forms.get(ContentCoding::Zstd), CompressedForm::NotSmaller);
        // A second form of one coding is dropped.
        forms.keep(ContentCoding::Gzip, Some(Bytes::from_static(b"1234567")), u64::MAX);
        assert_eq!(kept_bytes() - before, 5);
        drop(forms);
        assert_eq!(kept_bytes(), before);
    }
}
