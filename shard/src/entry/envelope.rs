//! Owns the serialised form of an entry: a fixed header, a MAC, the metadata (postcard) and the
//! body. docs/remote-format.md specifies the layout and has a test vector.
//!
//! The flags tell how the body is encoded (`compression`). The MAC is keyed BLAKE3 over all other
//! bytes; without a secret the key is fixed, and the MAC then detects damage only. It costs about
//! 0.4 ms per MiB on the thread that reads or writes.
//!
//! Refuses everything that is not exactly an envelope for the requested key, before it allocates
//! memory for it.
//! Invariant: bytes that decode were encoded for this key and region by a holder of the secret.

use super::compression::BodyEncoding;
use super::{Compression, Entry, EntryMeta, EntryParts, EpochSnapshot};
use crate::clock::ClockReading;
use crate::key::Digest;
use bytes::Bytes;
use std::time::Duration;

const MAGIC: [u8; 4] = *b"TGEN";
const VERSION: u8 = 2;
const MAC_OFFSET: usize = 80;
const HEADER_BYTES: usize = 112;

/// Bodies from this size are compressed on the blocking pool: compressing this much takes a
/// fraction of a millisecond.
const BLOCKING_COMPRESS_BYTES: usize = 64 << 10;

/// The same bound for bodies that are not compressed, whose MAC is the only cost.
const BLOCKING_MAC_BYTES: usize = 512 << 10;

/// Length of the prefix that identifies the revision of an entry: it includes the first 8 bytes of
/// the MAC.
pub(crate) const REVISION_BYTES: usize = MAC_OFFSET + 8;
/// The bytes of the MAC.
pub(crate) const MAC_RANGE: std::ops::Range<usize> = MAC_OFFSET..HEADER_BYTES;

/// Metadata is a response's header section and some dates: the gateway accepts header sections of
/// up to 16 KiB.
const META_BYTES_MAX: usize = 64 * 1024;

/// Most bytes of an envelope besides its body.
const OVERHEAD_BYTES_MAX: usize = HEADER_BYTES + META_BYTES_MAX;

/// Why bytes are not a valid envelope of the requested entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvelopeError {
    #[error("shorter than an envelope's header")]
    Truncated,
    #[error("not an envelope")]
    Magic,
    #[error("another version of the envelope, or of the metadata")]
    Version,
    #[error("authenticated with another secret")]
    Secret,
    #[error("larger than the limit")]
    Oversize,
    #[error("inconsistent lengths")]
    Length,
    #[error("an entry of another key")]
    Key,
    #[error("the MAC does not match")]
    Mac,
    #[error("the metadata does not decode")]
    Meta,
    #[error("the body does not decompress")]
    Body,
}

impl EnvelopeError {
    /// Whether the reason is a fleet that runs two releases, secrets or limits at once, rather than
    /// damage. Such an entry is a plain miss: the connection is kept, and the entry is left to the
    /// nodes that can read it.
    pub(crate) fn is_incompatible(self) -> bool {
        matches!(self, Self::Version | Self::Secret | Self::Oversize)
    }
}

/// The metadata or the body exceeds a limit, or the metadata does not serialise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the entry does not fit an envelope")]
pub(crate) struct EncodeError;

/// Encodes and decodes envelopes: the keys derived from the configured secret, and the limits.
pub(crate) struct EnvelopeCodec {
    mac_key: [u8; 32],
    secret_id: [u8; 4],
    body_bytes_max: usize,
    compression: CompressionConfig,
}

/// Which bodies are compressed, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CompressionConfig {
    pub(crate) algorithm: Compression,
    /// Minimum size of a body to compress.
    pub(crate) min_bytes: usize,
}

/// The body's encoding and the lengths of the parts, from an envelope's header.
struct EnvelopeLengths {
    encoding: BodyEncoding,
    meta: usize,
    /// Encoded length, as stored.
    body: usize,
    decoded_body: usize,
}

impl EnvelopeCodec {
    pub(crate) fn new(secret: &str, body_bytes_max: usize, compression: CompressionConfig) -> Self {
        let secret_id = blake3::derive_key("tidegate shard envelope 1: mark of the secret", secret.as_bytes());
        Self {
            mac_key: blake3::derive_key("tidegate shard envelope 1: mac", secret.as_bytes()),
            secret_id: [secret_id[0], secret_id[1], secret_id[2], secret_id[3]],
            body_bytes_max: body_bytes_max.min(u32::MAX as usize),
            compression,
        }
    }

    pub(crate) fn body_bytes_max(&self) -> usize {
        self.body_bytes_max
    }

    /// Length of the longest envelope that is accepted.
    pub(crate) fn envelope_bytes_max(&self) -> usize {
        self.body_bytes_max.saturating_add(OVERHEAD_BYTES_MAX)
    }

    /// `now` is the clock of the server that will hold the entry.
    pub(crate) fn encode<M: EntryMeta>(
        &self,
        digest: &Digest,
        entry: &Entry<M>,
        now: ClockReading,
    ) -> Result<Vec<u8>, EncodeError> {
        let meta = postcard::to_stdvec(&entry.meta).map_err(|_| EncodeError)?;
        if meta.len() > META_BYTES_MAX || entry.body.len() > self.body_bytes_max {
            return Err(EncodeError);
        }
        let compressed =
            if self.should_compress(entry) { self.compression.algorithm.compress(&entry.body) } else { None };
        let (encoding, body) =
            compressed.as_ref().map_or((BodyEncoding::Plain, &*entry.body), |(encoding, body)| (*encoding, &**body));
        let mut out = Vec::with_capacity(HEADER_BYTES + meta.len() + body.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, encoding as u8]);
        out.extend_from_slice(&M::SCHEMA.to_le_bytes());
        out.extend_from_slice(&self.secret_id);
        out.extend_from_slice(digest.as_bytes());
        let age = u64::try_from(entry.age(now.instant).as_millis()).unwrap_or(u64::MAX);
        out.extend_from_slice(&now.unix_ms.saturating_sub(age).to_le_bytes());
        out.extend_from_slice(&(entry.ttl.as_millis() as u64).to_le_bytes());
        let number = entry.fill_epoch().map_or(0, EpochSnapshot::purge_number);
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&(entry.body.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; HEADER_BYTES - MAC_OFFSET]);
        out.extend_from_slice(&meta);
        out.extend_from_slice(body);
        let mac = self.mac(&out);
        out[MAC_OFFSET..HEADER_BYTES].copy_from_slice(mac.as_bytes());
        entry.set_revision(u64_at(&out, MAC_OFFSET));
        Ok(out)
    }

    /// Whether `encode` takes so long that it belongs on the blocking pool.
    pub(crate) fn needs_blocking_encode<M: EntryMeta>(&self, entry: &Entry<M>) -> bool {
        entry.body.len() >= if self.should_compress(entry) { BLOCKING_COMPRESS_BYTES } else { BLOCKING_MAC_BYTES }
    }

    /// Bytes processed to decode an envelope: its own, or those of the decompressed body.
    pub(crate) fn decoded_bytes(&self, envelope: &[u8]) -> usize {
        let decoded_body =
            if envelope.len() < HEADER_BYTES { 0 } else { u32_at(envelope, 76).min(self.body_bytes_max) };
        envelope.len().max(decoded_body)
    }

    /// Whether `first` is the beginning of a longer envelope whose header is acceptable.
    pub(crate) fn is_incomplete<M: EntryMeta>(&self, digest: &Digest, first: &[u8]) -> bool {
        self.parse_header::<M>(digest, first)
            .is_ok_and(|lengths| HEADER_BYTES + lengths.meta + lengths.body > first.len())
    }

    fn should_compress<M: EntryMeta>(&self, entry: &Entry<M>) -> bool {
        self.compression.algorithm != Compression::Off
            && entry.body.len() >= self.compression.min_bytes
            && entry.meta.is_compressible()
    }

    /// Returns the entry in `envelope` and the number of the last purge that its node knew, or
    /// `None` if the envelope is valid and the entry has expired. The body is a slice of `envelope`
    /// unless it was compressed.
    pub(crate) fn decode<M: EntryMeta>(
        &self,
        digest: &Digest,
        envelope: &Bytes,
        now: ClockReading,
    ) -> Result<Option<(Entry<M>, u64)>, EnvelopeError> {
        let lengths = self.verify::<M>(digest, envelope)?;
        let body_offset = HEADER_BYTES + lengths.meta;
        let meta = match postcard::take_from_bytes(&envelope[HEADER_BYTES..body_offset]) {
            Ok((meta, [])) => meta,
            _ => return Err(EnvelopeError::Meta),
        };
        let stored = envelope.slice(body_offset..body_offset + lengths.body);
        let body = match lengths.encoding {
            BodyEncoding::Plain => stored,
            encoding => encoding.decode(&stored, lengths.decoded_body).ok_or(EnvelopeError::Body)?.into(),
        };
        let ttl = Duration::from_millis(u64_at(envelope, 52));
        let entry = Entry::from_remote(EntryParts { meta, body, ttl }, u64_at(envelope, 44), now);
        Ok(entry.map(|entry| {
            entry.set_revision(u64_at(envelope, MAC_OFFSET));
            (entry, u64_at(envelope, 60))
        }))
    }

    /// The revision of the entry in an envelope, from its first `REVISION_BYTES` bytes.
    pub(crate) fn revision(header: &[u8]) -> Option<u64> {
        (header.len() >= REVISION_BYTES && header[..4] == MAGIC).then(|| u64_at(header, MAC_OFFSET))
    }

    /// Checks everything except the metadata.
    fn verify<M: EntryMeta>(&self, digest: &Digest, bytes: &[u8]) -> Result<EnvelopeLengths, EnvelopeError> {
        let lengths = self.parse_header::<M>(digest, bytes)?;
        if bytes.len() != HEADER_BYTES + lengths.meta + lengths.body {
            return Err(EnvelopeError::Length);
        }
        // Comparing two `blake3::Hash` takes constant time.
        let mac: [u8; 32] = bytes[MAC_OFFSET..HEADER_BYTES].try_into().expect("the range is 32 bytes long");
        if self.mac(bytes) != blake3::Hash::from_bytes(mac) {
            return Err(EnvelopeError::Mac);
        }
        Ok(lengths)
    }

    /// Checks the header alone, for which the first bytes of an envelope suffice.
    fn parse_header<M: EntryMeta>(&self, digest: &Digest, bytes: &[u8]) -> Result<EnvelopeLengths, EnvelopeError> {
        if bytes.len() < HEADER_BYTES {
            return Err(EnvelopeError::Truncated);
        }
        if bytes[..4] != MAGIC {
            return Err(EnvelopeError::Magic);
        }
        if bytes[4] != VERSION || bytes[6..8] != M::SCHEMA.to_le_bytes() {
            return Err(EnvelopeError::Version);
        }
        let encoding = BodyEncoding::from_flags(bytes[5]).ok_or(EnvelopeError::Version)?;
        if bytes[8..12] != self.secret_id {
            return Err(EnvelopeError::Secret);
        }
        if bytes[12..44] != digest.as_bytes()[..] {
            return Err(EnvelopeError::Key);
        }
        let lengths = EnvelopeLengths {
            encoding,
            meta: u32_at(bytes, 68),
            body: u32_at(bytes, 72),
            decoded_body: u32_at(bytes, 76),
        };
        if lengths.meta > META_BYTES_MAX || lengths.body.max(lengths.decoded_body) > self.body_bytes_max {
            return Err(EnvelopeError::Oversize);
        }
        if encoding == BodyEncoding::Plain && lengths.body != lengths.decoded_body {
            return Err(EnvelopeError::Length);
        }
        Ok(lengths)
    }

    fn mac(&self, envelope: &[u8]) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.mac_key)
            .update(&envelope[..MAC_OFFSET])
            .update(&envelope[HEADER_BYTES..])
            .finalize()
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("the range is 8 bytes long"))
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("the range is 4 bytes long")) as usize
}

#[cfg(test)]
mod tests {
    use super::super::tests::TestMeta;
    use super::*;
    use crate::key::{KeyBuilder, Region};
    use proptest::prelude::*;
    use std::time::Instant;

    const BODY_BYTES_MAX: usize = 4096;
    const UNCOMPRESSED: CompressionConfig = CompressionConfig { algorithm: Compression::Off, min_bytes: 0 };
    const COMPRESSED: CompressionConfig = CompressionConfig { algorithm: Compression::Lz4, min_bytes: 100 };

    fn digest(name: &str) -> Digest {
        KeyBuilder::new().part(name.as_bytes()).key().digest(&Region::DEFAULT)
    }

    fn entry(body: Vec<u8>) -> Entry<TestMeta> {
        Entry::new(TestMeta("text/plain".into()), body.into(), Duration::from_secs(60), Instant::now())
    }

    fn decode(codec: &EnvelopeCodec, bytes: Vec<u8>) -> Result<Option<Entry<TestMeta>>, EnvelopeError> {
        let decoded = codec.decode(&digest("a"), &Bytes::from(bytes), ClockReading::from_system())?;
        Ok(decoded.map(|(entry, _)| entry))
    }

    fn decode_error(codec: &EnvelopeCodec, bytes: Vec<u8>) -> Option<EnvelopeError> {
        decode(codec, bytes).err()
    }

    #[test]
    fn entry_of_another_key_region_secret_or_schema_is_rejected() {
        let codec = EnvelopeCodec::new("s", BODY_BYTES_MAX, UNCOMPRESSED);
        let envelope = codec.encode(&digest("a"), &entry(vec![1; 10]), ClockReading::from_system()).unwrap();
        let eu = KeyBuilder::new().part(b"a").key().digest(&Region::new("eu").unwrap());
        for wrong in [digest("b"), eu] {
            let rejected = codec.decode::<TestMeta>(&wrong, &envelope.clone().into(), ClockReading::from_system());
            assert_eq!(rejected.err(), Some(EnvelopeError::Key));
        }
        assert_eq!(
            decode_error(&EnvelopeCodec::new("t", BODY_BYTES_MAX, UNCOMPRESSED), envelope.clone()),
            Some(EnvelopeError::Secret)
        );
        assert_eq!(
            decode_error(&EnvelopeCodec::new("", BODY_BYTES_MAX, UNCOMPRESSED), envelope.clone()),
            Some(EnvelopeError::Secret)
        );
        let mut newer = envelope;
        newer[6] = 2;
        assert_eq!(decode_error(&codec, newer), Some(EnvelopeError::Version));
    }

    #[test]
    fn entry_over_the_limit_is_neither_encoded_nor_decoded() {
        let (small, large) = (
            EnvelopeCodec::new("s", BODY_BYTES_MAX, UNCOMPRESSED),
            EnvelopeCodec::new("s", BODY_BYTES_MAX * 2, UNCOMPRESSED),
        );
        assert!(small.encode(&digest("a"), &entry(vec![0; BODY_BYTES_MAX + 1]), ClockReading::from_system()).is_err());
        let envelope =
            large.encode(&digest("a"), &entry(vec![0; BODY_BYTES_MAX + 1]), ClockReading::from_system()).unwrap();
        assert_eq!(decode_error(&small, envelope), Some(EnvelopeError::Oversize));
    }

    #[test]
    fn decoding_does_not_copy_the_body() {
        let codec = EnvelopeCodec::new("", BODY_BYTES_MAX, UNCOMPRESSED);
        let envelope =
            Bytes::from(codec.encode(&digest("a"), &entry(vec![7; 100]), ClockReading::from_system()).unwrap());
        let (entry, _) =
            codec.decode::<TestMeta>(&digest("a"), &envelope, ClockReading::from_system()).unwrap().unwrap();
        assert!(envelope.as_ptr_range().contains(&entry.body.as_ptr()));
    }

    #[test]
    fn expired_entry_is_no_error() {
        let codec = EnvelopeCodec::new("", BODY_BYTES_MAX, UNCOMPRESSED);
        let then =
            ClockReading { unix_ms: ClockReading::from_system().unix_ms - 62_000, ..ClockReading::from_system() };
        let envelope = codec.encode(&digest("a"), &entry(vec![]), then).unwrap();
        assert!(decode(&codec, envelope).unwrap().is_none());
    }

    fn textual(body: Vec<u8>) -> Entry<TestMeta> {
        Entry::new(TestMeta("compressible".into()), body.into(), Duration::from_secs(60), Instant::now())
    }

    #[test]
    fn compressible_bodies_above_the_minimum_size_are_compressed() {
        let codecs = [Compression::Lz4, Compression::Zstd].map(|compression| {
            EnvelopeCodec::new("s", BODY_BYTES_MAX, CompressionConfig { algorithm: compression, ..COMPRESSED })
        });
        for (codec, other) in [(&codecs[0], &codecs[1]), (&codecs[1], &codecs[0])] {
            assert_text_is_compressed(codec, other);
        }
    }

    fn assert_text_is_compressed(codec: &EnvelopeCodec, other: &EnvelopeCodec) {
        let text = b"all work and no play ".repeat(100);
        let noise: Vec<u8> = (0..2_000u64).map(|n| (xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes())) as u8).collect();
        let size =
            |entry: &Entry<TestMeta>| codec.encode(&digest("a"), entry, ClockReading::from_system()).unwrap().len();
        assert!(size(&textual(text.clone())) < 400 && size(&entry(text.clone())) > text.len());
        assert!(size(&textual(noise.clone())) > noise.len() && size(&textual(vec![b'a'; 99])) > 99 + HEADER_BYTES);
        let envelope = codec.encode(&digest("a"), &textual(text.clone()), ClockReading::from_system()).unwrap();
        assert_eq!(
            decode(other, envelope).unwrap().unwrap().body,
            text,
            "a codec decodes both encodings, whichever it writes"
        );
    }

    /// A body with the right MAC that announces a small length and decompresses to more.
    #[test]
    fn body_that_decompresses_to_another_length_is_rejected() {
        let codec = EnvelopeCodec::new("s", BODY_BYTES_MAX, COMPRESSED);
        let mut envelope =
            codec.encode(&digest("a"), &textual(vec![b'a'; BODY_BYTES_MAX]), ClockReading::from_system()).unwrap();
        for decoded_body in [0u32, 100, BODY_BYTES_MAX as u32 - 1] {
            envelope[76..80].copy_from_slice(&decoded_body.to_le_bytes());
            let mac = codec.mac(&envelope);
            envelope[MAC_OFFSET..HEADER_BYTES].copy_from_slice(mac.as_bytes());
            assert_eq!(decode_error(&codec, envelope.clone()), Some(EnvelopeError::Body), "{decoded_body}");
        }
        envelope[76..80].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(decode_error(&codec, envelope), Some(EnvelopeError::Oversize));
    }

    #[test]
    fn format_matches_the_documented_test_vector() {
        let documented = include_str!("../../../docs/remote-format.md");
        let block =
            documented.split("```").find(|block| block.starts_with("hex\n")).expect("the page has a test vector");
        let hex: String = block[3..].split_whitespace().collect();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let stored = ClockReading { unix_ms: 1_800_000_000_000, ..ClockReading::from_system() };
        let entry = Entry::new(TestMeta("text/plain".into()), "hello".into(), Duration::from_secs(60), stored.instant);
        let key = KeyBuilder::new().part(b"http").part(b"shop.example").part(b"/").key().to_owned();
        let digest = key.as_key().digest(&Region::DEFAULT);
        let envelope =
            EnvelopeCodec::new("secret", BODY_BYTES_MAX, UNCOMPRESSED).encode(&digest, &entry, stored).unwrap();
        let shown: Vec<String> =
            envelope.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(envelope, bytes, "\n{}\n", shown.join("\n"));
    }

    proptest! {
        #[test]
        fn encoded_entry_round_trips(
            text in ".{0,40}", body in prop::collection::vec(any::<u8>(), 0..BODY_BYTES_MAX), secret in ".{0,8}",
            ttl_ms in 1u64..1 << 40,
        ) {
            let codec = EnvelopeCodec::new(&secret, BODY_BYTES_MAX, UNCOMPRESSED);
            let stored = Entry::new(TestMeta(text), body.into(), Duration::from_millis(ttl_ms), Instant::now());
            let envelope = codec.encode(&digest("a"), &stored, ClockReading::from_system()).unwrap();
            let back = decode(&codec, envelope).unwrap().unwrap();
            prop_assert_eq!((&back.meta, &back.body), (&stored.meta, &stored.body));
            prop_assert_eq!((back.ttl, back.weight), (stored.ttl, stored.weight));
        }

        #[test]
        fn any_damage_is_rejected(
            body in prop::collection::vec(any::<u8>(), 0..200), secret in ".{0,4}", at in any::<prop::sample::Index>(),
            flip in 1u8..=255, cut in any::<prop::sample::Index>(), more in prop::collection::vec(any::<u8>(), 1..50),
        ) {
            let codec = EnvelopeCodec::new(&secret, BODY_BYTES_MAX, UNCOMPRESSED);
            let envelope = codec.encode(&digest("a"), &entry(body), ClockReading::from_system()).unwrap();
            let mut flipped = envelope.clone();
            flipped[at.index(envelope.len())] ^= flip;
            prop_assert!(decode(&codec, flipped).is_err());
            prop_assert!(decode(&codec, envelope[..cut.index(envelope.len())].to_vec()).is_err());
            prop_assert!(decode(&codec, [envelope, more].concat()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let codec = EnvelopeCodec::new("", BODY_BYTES_MAX, UNCOMPRESSED);
            prop_assert!(decode(&codec, bytes.clone()).is_err());
            let header = [&MAGIC[..], &[VERSION, 0, 1, 0], &codec.secret_id, digest("a").as_bytes()].concat();
            prop_assert!(decode(&codec, [header, bytes].concat()).is_err());
        }
    }
}
