//! Reads elements in DER (X.690), bounded by the slice.

/// Tag of a SEQUENCE.
pub(super) const SEQUENCE: u8 = 0x30;
/// Tag of an INTEGER.
pub(super) const INTEGER: u8 = 0x02;

/// Reads elements from the start of a slice.
pub(super) struct Der<'a>(pub(super) &'a [u8]);

impl<'a> Der<'a> {
    /// Tag and content of the next element.
    pub(super) fn element(&mut self) -> Option<(u8, &'a [u8])> {
        let [tag, first, rest @ ..] = self.0 else { return None };
        let (length, rest) = match first {
            0..=0x7f => (usize::from(*first), rest),
            // A certificate has fewer than 2^24 bytes.
            0x81..=0x83 => {
                let (length, rest) = rest.split_at_checked(usize::from(first & 0x0f))?;
                (length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)), rest)
            }
            _ => return None,
        };
        let (content, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((*tag, content))
    }

    /// The content of the next element, which has this tag.
    pub(super) fn content(&mut self, expected: u8) -> Option<&'a [u8]> {
        self.element().and_then(|(tag, content)| (tag == expected).then_some(content))
    }
}
