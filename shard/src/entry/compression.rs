//! Owns the compression of bodies stored in Redis, and their decompression.
//!
//! Refuses to return more bytes than were announced.
//! Invariant: both compressed encodings can be read, whatever a store is configured to write.

use std::cell::RefCell;
use std::io;
use zstd::bulk::{Compressor, Decompressor};

/// Compression of bodies stored in Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Decompresses in a third of zstd's time; its output is half as large again
    /// (docs/adr/0011-lz4-for-entries.md).
    #[default]
    Lz4,
    Zstd,
    Off,
}

/// zstd's fastest useful level: every node that fills compresses the body.
const ZSTD_LEVEL: i32 = 1;

/// Encodings of a stored body; the values are the flags in an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BodyEncoding {
    Plain = 0,
    Zstd = 1,
    Lz4 = 2,
}

impl BodyEncoding {
    /// `None` for flags that this release does not know.
    pub(super) fn from_flags(flags: u8) -> Option<Self> {
        [Self::Plain, Self::Zstd, Self::Lz4].into_iter().find(|encoding| *encoding as u8 == flags)
    }

    /// Decodes a stored body. `None` if it is malformed or does not have `decoded_bytes`.
    pub(super) fn decode(self, stored: &[u8], decoded_bytes: usize) -> Option<Vec<u8>> {
        let decoded = match self {
            Self::Plain => stored.to_vec(),
            Self::Zstd => with_zstd(|zstd| zstd.decompressor.decompress(stored, decoded_bytes))?,
            Self::Lz4 => lz4_flex::block::decompress(stored, decoded_bytes).ok()?,
        };
        (decoded.len() == decoded_bytes).then_some(decoded)
    }
}

impl Compression {
    /// Compresses a body; `None` unless that saves at least an eighth.
    pub(super) fn compress(self, body: &[u8]) -> Option<(BodyEncoding, Vec<u8>)> {
        let (encoding, compressed) = match self {
            Self::Off => return None,
            Self::Zstd => (BodyEncoding::Zstd, with_zstd(|zstd| zstd.compressor.compress(body))?),
            Self::Lz4 => (BodyEncoding::Lz4, lz4_flex::block::compress(body)),
        };
        (compressed.len() <= body.len() / 8 * 7).then_some((encoding, compressed))
    }
}

/// zstd's contexts, created once per thread: creating them costs as much as decompressing 10 KiB.
struct ZstdContext {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

/// `None` if the operation fails or the contexts cannot be created.
fn with_zstd<T>(operation: impl FnOnce(&mut ZstdContext) -> io::Result<T>) -> Option<T> {
    thread_local! {
        static ZSTD: RefCell<Option<ZstdContext>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|zstd| {
        if zstd.is_none() {
            *zstd = Some(ZstdContext {
                compressor: Compressor::new(ZSTD_LEVEL).ok()?,
                decompressor: Decompressor::new().ok()?,
            });
        }
        operation(zstd.as_mut()?).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn compressed_body_round_trips_and_other_input_is_rejected(
            word in prop::collection::vec(any::<u8>(), 1..20), times in 50usize..200,
            cut in any::<prop::sample::Index>(),
        ) {
            let body = word.repeat(times);
            for compression in [Compression::Lz4, Compression::Zstd] {
                let (encoding, compressed) = compression.compress(&body).expect("repetitive text compresses");
                prop_assert_eq!(encoding.decode(&compressed, body.len()), Some(body.clone()));
                prop_assert_eq!(encoding.decode(&compressed, body.len() + 1), None);
                prop_assert_eq!(encoding.decode(&compressed, body.len() - 1), None);
                prop_assert_eq!(encoding.decode(&compressed[..cut.index(compressed.len())], body.len()), None);
            }
            prop_assert!(Compression::Off.compress(&body).is_none());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in prop::collection::vec(any::<u8>(), 0..300), decoded_bytes in 0usize..100_000,
        ) {
            for encoding in [BodyEncoding::Lz4, BodyEncoding::Zstd] {
                let decoded = encoding.decode(&bytes, decoded_bytes);
                prop_assert!(decoded.is_none_or(|decoded| decoded.len() == decoded_bytes));
            }
        }
    }
}
