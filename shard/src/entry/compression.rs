//! Owns how bodies become shorter on their way to Redis, and whole again.
//!
//! Refuses to give out more than was announced. Invariant: whatever a store is set to, it reads both forms.

use std::cell::RefCell;
use std::io;
use zstd::bulk::{Compressor, Decompressor};

/// How bodies are compressed on their way to Redis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// Whole again in a third of zstd's time, and half as large again (docs/adr/0011-lz4-for-entries.md).
    #[default]
    Lz4,
    Zstd,
    Off,
}

/// The fastest of zstd's levels that are worth having: each body is compressed by each node that fills.
const LEVEL: i32 = 1;

/// The forms in which a body may be stored, by their flags in an envelope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Plain = 0,
    Zstd = 1,
    Lz4 = 2,
}

impl Form {
    /// `None` for flags that this release does not know.
    pub(super) fn of(flags: u8) -> Option<Self> {
        [Self::Plain, Self::Zstd, Self::Lz4].into_iter().find(|form| *form as u8 == flags)
    }

    /// A body that was stored in this form; `None` where it is none, or has not `plain_bytes`.
    pub(super) fn open(self, stored: &[u8], plain_bytes: usize) -> Option<Vec<u8>> {
        let plain = match self {
            Self::Plain => stored.to_vec(),
            Self::Zstd => zstd_here(|zstd| zstd.decompressor.decompress(stored, plain_bytes))?,
            Self::Lz4 => lz4_flex::block::decompress(stored, plain_bytes).ok()?,
        };
        (plain.len() == plain_bytes).then_some(plain)
    }
}

impl Compression {
    /// The body in its new form, where that saves an eighth of it.
    pub(super) fn shorten(self, body: &[u8]) -> Option<(Form, Vec<u8>)> {
        let (form, short) = match self {
            Self::Off => return None,
            Self::Zstd => (Form::Zstd, zstd_here(|zstd| zstd.compressor.compress(body))?),
            Self::Lz4 => (Form::Lz4, lz4_flex::block::compress(body)),
        };
        (short.len() <= body.len() / 8 * 7).then_some((form, short))
    }
}

/// What zstd needs to work, made once for each thread: making it costs as much as decompressing 10 KiB.
struct Zstd {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
}

/// `None` where it fails, or cannot be had.
fn zstd_here<T>(work: impl FnOnce(&mut Zstd) -> io::Result<T>) -> Option<T> {
    thread_local! {
        static ZSTD: RefCell<Option<Zstd>> = const { RefCell::new(None) };
    }
    ZSTD.with_borrow_mut(|zstd| {
        if zstd.is_none() {
            *zstd = Some(Zstd { compressor: Compressor::new(LEVEL).ok()?, decompressor: Decompressor::new().ok()? });
        }
        work(zstd.as_mut()?).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_shortened_comes_back_and_nothing_else_does(
            word in prop::collection::vec(any::<u8>(), 1..20), times in 50usize..200, cut in any::<prop::sample::Index>(),
        ) {
            let body = word.repeat(times);
            for how in [Compression::Lz4, Compression::Zstd] {
                let (form, short) = how.shorten(&body).expect("it repeats itself");
                prop_assert_eq!(form.open(&short, body.len()), Some(body.clone()));
                prop_assert_eq!(form.open(&short, body.len() + 1), None);
                prop_assert_eq!(form.open(&short, body.len() - 1), None);
                prop_assert_eq!(form.open(&short[..cut.index(short.len())], body.len()), None);
            }
            prop_assert!(Compression::Off.shorten(&body).is_none());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), plain in 0usize..100_000) {
            for form in [Form::Lz4, Form::Zstd] {
                let opened = form.open(&bytes, plain);
                prop_assert!(opened.is_none_or(|opened| opened.len() == plain));
            }
        }
    }
}
