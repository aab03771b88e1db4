//! The encoders: of whole bodies, which are compressed once, and of bodies in pieces.

use std::io::{self, Write};

use crate::http::compressed_forms::ContentCoding;

/// How much time a body is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effort {
    /// For a form that is made once and sent many times.
    High,
    /// For one response.
    Low,
}

impl Effort {
    fn zstd(self) -> i32 {
        if self == Effort::High { 9 } else { 1 }
    }

    fn brotli(self) -> u32 {
        if self == Effort::High { 6 } else { 3 }
    }

    fn gzip(self) -> flate2::Compression {
        flate2::Compression::new(if self == Effort::High { 7 } else { 4 })
    }
}

/// Binary logarithm of the window of an encoder of pieces: 64 KiB, so that it needs a few hundred
/// KiB of memory.
const STREAM_WINDOW: u32 = 16;
/// Binary logarithm of the window of whole bodies: 4 MiB, which every client supports (RFC 9659
/// section 3 allows 8 MiB for zstd).
const WHOLE_WINDOW: u32 = 22;
const BROTLI_BUFFER: usize = 4 << 10;

/// Compresses `body`; `None`: the result would not be smaller.
pub(crate) fn compress_whole(coding: ContentCoding, body: &[u8], effort: Effort) -> Option<Vec<u8>> {
    let out = Vec::with_capacity(body.len() / 3 + 64);
    let written = match coding {
        ContentCoding::Zstd => zstd::stream::write::Encoder::new(out, effort.zstd()).and_then(|mut encoder| {
            encoder.window_log(WHOLE_WINDOW)?;
            encoder.set_pledged_src_size(Some(body.len() as u64))?;
            encoder.write_all(body)?;
            encoder.finish()
        }),
        ContentCoding::Brotli => {
            let mut encoder = brotli::CompressorWriter::new(out, BROTLI_BUFFER, effort.brotli(), WHOLE_WINDOW);
            encoder.write_all(body).map(|()| encoder.into_inner())
        }
        ContentCoding::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(out, effort.gzip());
            encoder.write_all(body).and_then(|()| encoder.finish())
        }
    };
    written.ok().filter(|out| out.len() < body.len())
}

/// Compresses a body in pieces. Output collects until `take` takes it.
pub(crate) enum StreamEncoder {
    Zstd(Box<zstd::stream::write::Encoder<'static, Vec<u8>>>),
    Brotli(Box<brotli::CompressorWriter<Vec<u8>>>),
    Gzip(Box<flate2::write::GzEncoder<Vec<u8>>>),
    /// After the end of the body.
    Finished(Vec<u8>),
}

impl StreamEncoder {
    /// # Errors
    /// The library refuses its parameters, or has no memory.
    pub(crate) fn new(coding: ContentCoding) -> io::Result<Self> {
        let out = Vec::new();
        Ok(match coding {
            ContentCoding::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, Effort::Low.zstd())?;
                encoder.window_log(STREAM_WINDOW)?;
                StreamEncoder::Zstd(Box::new(encoder))
            }
            ContentCoding::Brotli => {
                let encoder = brotli::CompressorWriter::new(out, BROTLI_BUFFER, Effort::Low.brotli(), STREAM_WINDOW);
                StreamEncoder::Brotli(Box::new(encoder))
            }
            ContentCoding::Gzip => {
                StreamEncoder::Gzip(Box::new(flate2::write::GzEncoder::new(out, Effort::Low.gzip())))
            }
        })
    }

    /// Compresses the next piece of the body.
    ///
    /// # Errors
    /// The library failed.
    pub(crate) fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.writer().map_or(Ok(()), |writer| writer.write_all(piece))
    }

    /// Makes all that was written readable for the client.
    ///
    /// # Errors
    /// The library failed.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.writer().map_or(Ok(()), Write::flush)
    }

    /// Ends the body.
    ///
    /// # Errors
    /// The library failed.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let rest = match std::mem::replace(self, StreamEncoder::Finished(Vec::new())) {
            StreamEncoder::Zstd(encoder) => encoder.finish()?,
            StreamEncoder::Brotli(encoder) => encoder.into_inner(),
            StreamEncoder::Gzip(encoder) => encoder.finish()?,
            StreamEncoder::Finished(rest) => rest,
        };
        *self = StreamEncoder::Finished(rest);
        Ok(())
    }

    /// Takes the output so far.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        match self {
            StreamEncoder::Zstd(encoder) => std::mem::take(encoder.get_mut()),
            StreamEncoder::Brotli(encoder) => std::mem::take(encoder.get_mut()),
            StreamEncoder::Gzip(encoder) => std::mem::take(encoder.get_mut()),
            StreamEncoder::Finished(rest) => std::mem::take(rest),
        }
    }

    fn writer(&mut self) -> Option<&mut dyn Write> {
        match self {
            StreamEncoder::Zstd(encoder) => Some(&mut **encoder),
            StreamEncoder::Brotli(encoder) => Some(&mut **encoder),
            StreamEncoder::Gzip(encoder) => Some(&mut **encoder),
            StreamEncoder::Finished(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use proptest::prelude::*;

    use super::*;
    use crate::metrics::Label as _;

    fn decompressed(coding: ContentCoding, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        match coding {
            ContentCoding::Zstd => zstd::stream::read::Decoder::new(bytes)?.read_to_end(&mut out)?,
            ContentCoding::Brotli => brotli::Decompressor::new(bytes, 4096).read_to_end(&mut out)?,
            ContentCoding::Gzip => flate2::read::GzDecoder::new(bytes).read_to_end(&mut out)?,
        };
        Ok(out)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn pieces_become_the_body(pieces in prop::collection::vec("[a-c]{0,400}", 0..8), at in 0usize..3) {
            let coding = ContentCoding::ALL[at];
            let mut encoder = StreamEncoder::new(coding).expect("an encoder");
            let mut out = Vec::new();
            for piece in &pieces {
                encoder.write(piece.as_bytes()).expect("written");
                encoder.flush().expect("flushed");
                out.extend(encoder.take());
            }
            encoder.finish().expect("finished");
            out.extend(encoder.take());
            prop_assert_eq!(decompressed(coding, &out).expect("valid"), pieces.concat().into_bytes());
        }
    }

    #[test]
    fn flushed_output_is_readable_before_the_end() {
        for coding in ContentCoding::ALL {
            let mut encoder = StreamEncoder::new(*coding).expect("an encoder");
            encoder.write(b"data: one\n\n").expect("written");
            encoder.flush().expect("flushed");
            let out = encoder.take();
            let mut read = vec![0; 11];
            let exact = match coding {
                ContentCoding::Zstd => {
                    zstd::stream::read::Decoder::new(&*out).and_then(|mut d| d.read_exact(&mut read))
                }
                ContentCoding::Brotli => brotli::Decompressor::new(&*out, 4096).read_exact(&mut read),
                ContentCoding::Gzip => flate2::read::GzDecoder::new(&*out).read_exact(&mut read),
            };
            exact.unwrap_or_else(|error| panic!("{coding:?}: {error}"));
            assert_eq!(read, b"data: one\n\n");
        }
    }

    #[test]
    fn whole_bodies_are_compressed_only_if_that_makes_them_smaller() {
        let text = "the same words again ".repeat(2_000);
        for coding in ContentCoding::ALL {
            let form = compress_whole(*coding, text.as_bytes(), Effort::High).expect("smaller");
            assert!(form.len() * 20 < text.len(), "{coding:?}: {}", form.len());
            assert_eq!(decompressed(*coding, &form).expect("valid"), text.as_bytes());
            assert_eq!(compress_whole(*coding, b"abc", Effort::Low), None);
        }
    }
}
