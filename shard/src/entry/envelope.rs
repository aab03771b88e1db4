//! Owns the bytes of an entry outside the process: a fixed head, a MAC, the metadata (postcard), the body.
//!
//! ```text
//!  0 magic "TGEN"    8 secret's mark     44 stored, unix ms     60 last purge known     80 MAC (32)
//!  4 version        12 key digest (32)   52 keep, ms            68 metadata length     112 metadata, body
//!  5 flags, 6 schema                                            72 body length, as stored; 76 as it is
//! ```
//! All integers are little endian; docs/remote-format.md has a test vector. Flags say how the body is stored (`compression`).
//! The MAC is keyed BLAKE3 over everything else; without a secret its key is a fixed one, which still finds damage. It costs
//! about 0.4 ms per MiB on the thread that reads or writes.
//!
//! Refuses whatever is not exactly an envelope for the key that was asked for, before anything is allocated for it.
//! Invariant: bytes that decode are those that were encoded, for this key and region, by a holder of the secret.

use super::compression::Form;
use super::{Compression, Entry, Meta, Since};
use crate::clock::Now;
use crate::key::Digest;
use bytes::Bytes;
use std::time::Duration;

const MAGIC: [u8; 4] = *b"TGEN";
const VERSION: u8 = 2;
const MAC_AT: usize = 80;
const HEAD: usize = 112;

/// Compressing so much takes a fraction of a millisecond; more is done beside the thread.
const WORK: usize = 64 << 10;

/// The same for a body that only its MAC is computed of.
const WORK_PLAIN: usize = 512 << 10;

/// What it takes to tell two editions of an entry apart: the beginning of the MAC is enough.
pub(crate) const EDITION_BYTES: usize = MAC_AT + 8;

/// Metadata is a response's head and some dates: the gateway lets heads through up to 16 KiB.
const META_MAX: usize = 64 * 1024;

/// How much longer than its body an envelope may be.
const EXTRA_MAX: usize = HEAD + META_MAX;

/// Why bytes are not the entry that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Corrupt {
    #[error("shorter than an envelope's head")]
    Truncated,
    #[error("not an envelope")]
    Magic,
    #[error("another version of the envelope, or of the metadata")]
    Version,
    #[error("sealed with another secret")]
    Secret,
    #[error("larger than entries may be")]
    Oversize,
    #[error("lengths do not add up")]
    Length,
    #[error("the entry of another key")]
    Key,
    #[error("the MAC does not match")]
    Mac,
    #[error("the metadata does not decode")]
    Meta,
    #[error("the body does not decompress")]
    Body,
}

impl Corrupt {
    /// Whether this is a fleet that runs two releases, secrets or limits at once, rather than damage: a plain miss, which says
    /// nothing against the connection and leaves the entry to those who can read it.
    pub(crate) fn is_foreign(self) -> bool {
        matches!(self, Self::Version | Self::Secret | Self::Oversize)
    }
}

/// Metadata that does not fit an envelope, or does not serialise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the entry does not fit an envelope")]
pub(crate) struct Unsealable;

/// The keys derived from the configured secret, and the limit on bodies.
pub(crate) struct Seal {
    key: [u8; 32],
    mark: [u8; 4],
    body_bytes_max: usize,
    packing: Packing,
}

/// What is compressed, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    pub(crate) compression: Compression,
    /// Bodies that are as large are, where that may help.
    pub(crate) from: usize,
}

struct Lengths {
    form: Form,
    meta: usize,
    /// As stored.
    body: usize,
    plain: usize,
}

impl Seal {
    pub(crate) fn new(secret: &str, body_bytes_max: usize, packing: Packing) -> Self {
        let mark = blake3::derive_key("tidegate shard envelope 1: mark of the secret", secret.as_bytes());
        Self {
            key: blake3::derive_key("tidegate shard envelope 1: mac", secret.as_bytes()),
            mark: [mark[0], mark[1], mark[2], mark[3]],
            body_bytes_max: body_bytes_max.min(u32::MAX as usize),
            packing,
        }
    }

    pub(crate) fn body_bytes_max(&self) -> usize {
        self.body_bytes_max
    }

    /// The longest envelope this seal accepts.
    pub(crate) fn envelope_bytes_max(&self) -> usize {
        self.body_bytes_max.saturating_add(EXTRA_MAX)
    }

    /// `now` is that of the server which is to hold it.
    pub(crate) fn encode<M: Meta>(&self, digest: &Digest, entry: &Entry<M>, now: Now) -> Result<Vec<u8>, Unsealable> {
        let meta = postcard::to_stdvec(&entry.meta).map_err(|_| Unsealable)?;
        if meta.len() > META_MAX || entry.body.len() > self.body_bytes_max {
            return Err(Unsealable);
        }
        let short = if self.compresses(entry) { self.packing.compression.shorten(&entry.body) } else { None };
        let (form, body) = short.as_ref().map_or((Form::Plain, &*entry.body), |(form, body)| (*form, &**body));
        let mut out = Vec::with_capacity(HEAD + meta.len() + body.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, form as u8]);
        out.extend_from_slice(&M::SCHEMA.to_le_bytes());
        out.extend_from_slice(&self.mark);
        out.extend_from_slice(digest.as_bytes());
        let age = u64::try_from(entry.age(now.instant).as_millis()).unwrap_or(u64::MAX);
        out.extend_from_slice(&now.unix_ms.saturating_sub(age).to_le_bytes());
        out.extend_from_slice(&(entry.keep.as_millis() as u64).to_le_bytes());
        let number = entry.since().map_or(0, Since::number);
        out.extend_from_slice(&number.to_le_bytes());
        out.extend_from_slice(&(meta.len() as u32).to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&(entry.body.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; HEAD - MAC_AT]);
        out.extend_from_slice(&meta);
        out.extend_from_slice(body);
        let mac = self.mac(&out);
        out[MAC_AT..HEAD].copy_from_slice(mac.as_bytes());
        entry.set_edition(u64_at(&out, MAC_AT));
        Ok(out)
    }

    /// Whether `encode` will take long enough to be done elsewhere.
    pub(crate) fn is_work<M: Meta>(&self, entry: &Entry<M>) -> bool {
        entry.body.len() >= if self.compresses(entry) { WORK } else { WORK_PLAIN }
    }

    /// How many bytes it takes to open an envelope: its own, or those of what it decompresses to.
    pub(crate) fn opened_bytes(&self, envelope: &[u8]) -> usize {
        let plain = if envelope.len() < HEAD { 0 } else { u32_at(envelope, 76).min(self.body_bytes_max) };
        envelope.len().max(plain)
    }

    /// Whether `first` is the beginning of an envelope that is longer, and that nothing in its head speaks against.
    pub(crate) fn is_cut<M: Meta>(&self, digest: &Digest, first: &[u8]) -> bool {
        self.head::<M>(digest, first).is_ok_and(|lengths| HEAD + lengths.meta + lengths.body > first.len())
    }

    fn compresses<M: Meta>(&self, entry: &Entry<M>) -> bool {
        self.packing.compression != Compression::Off
            && entry.body.len() >= self.packing.from
            && entry.meta.is_compressible()
    }

    /// The entry in `envelope` and the last purge that its node knew, or `None` where it is sound and its time is over. The body
    /// is a slice of `envelope`.
    pub(crate) fn decode<M: Meta>(
        &self,
        digest: &Digest,
        envelope: &Bytes,
        now: Now,
    ) -> Result<Option<(Entry<M>, u64)>, Corrupt> {
        let lengths = self.checked::<M>(digest, envelope)?;
        let body_at = HEAD + lengths.meta;
        let meta = match postcard::take_from_bytes(&envelope[HEAD..body_at]) {
            Ok((meta, [])) => meta,
            _ => return Err(Corrupt::Meta),
        };
        let stored = envelope.slice(body_at..body_at + lengths.body);
        let body = match lengths.form {
            Form::Plain => stored,
            form => form.open(&stored, lengths.plain).ok_or(Corrupt::Body)?.into(),
        };
        let keep = Duration::from_millis(u64_at(envelope, 52));
        let received = Entry::received(meta, body, keep, u64_at(envelope, 44), now);
        Ok(received.map(|entry| {
            entry.set_edition(u64_at(envelope, MAC_AT));
            (entry, u64_at(envelope, 60))
        }))
    }

    /// Which edition of an entry an envelope is, as `Entry::edition` has it, by its first `EDITION_BYTES` bytes.
    pub(crate) fn edition(head: &[u8]) -> Option<u64> {
        (head.len() >= EDITION_BYTES && head[..4] == MAGIC).then(|| u64_at(head, MAC_AT))
    }

    /// Everything that can be known without looking into the metadata.
    fn checked<M: Meta>(&self, digest: &Digest, bytes: &[u8]) -> Result<Lengths, Corrupt> {
        let lengths = self.head::<M>(digest, bytes)?;
        if bytes.len() != HEAD + lengths.meta + lengths.body {
            return Err(Corrupt::Length);
        }
        // Comparing two `blake3::Hash` takes the same time wherever they differ.
        let mac: [u8; 32] = bytes[MAC_AT..HEAD].try_into().expect("the range is 32 bytes long");
        if self.mac(bytes) != blake3::Hash::from_bytes(mac) {
            return Err(Corrupt::Mac);
        }
        Ok(lengths)
    }

    /// Everything that the head alone says, of which the first bytes of an envelope are enough.
    fn head<M: Meta>(&self, digest: &Digest, bytes: &[u8]) -> Result<Lengths, Corrupt> {
        if bytes.len() < HEAD {
            return Err(Corrupt::Truncated);
        }
        if bytes[..4] != MAGIC {
            return Err(Corrupt::Magic);
        }
        if bytes[4] != VERSION || bytes[6..8] != M::SCHEMA.to_le_bytes() {
            return Err(Corrupt::Version);
        }
        let form = Form::of(bytes[5]).ok_or(Corrupt::Version)?;
        if bytes[8..12] != self.mark {
            return Err(Corrupt::Secret);
        }
        if bytes[12..44] != digest.as_bytes()[..] {
            return Err(Corrupt::Key);
        }
        let lengths = Lengths { form, meta: u32_at(bytes, 68), body: u32_at(bytes, 72), plain: u32_at(bytes, 76) };
        if lengths.meta > META_MAX || lengths.body.max(lengths.plain) > self.body_bytes_max {
            return Err(Corrupt::Oversize);
        }
        if form == Form::Plain && lengths.body != lengths.plain {
            return Err(Corrupt::Length);
        }
        Ok(lengths)
    }

    fn mac(&self, envelope: &[u8]) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.key).update(&envelope[..MAC_AT]).update(&envelope[HEAD..]).finalize()
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
    use super::super::tests::Note;
    use super::*;
    use crate::key::{KeyBuilder, Region};
    use proptest::prelude::*;
    use std::time::Instant;

    const LIMIT: usize = 4096;
    const PLAIN: Packing = Packing { compression: Compression::Off, from: 0 };
    const SHORT: Packing = Packing { compression: Compression::Lz4, from: 100 };

    fn digest(name: &str) -> Digest {
        KeyBuilder::new().part(name.as_bytes()).key().digest(&Region::DEFAULT)
    }

    fn entry(body: Vec<u8>) -> Entry<Note> {
        Entry::new(Note("text/plain".into()), body.into(), Duration::from_secs(60), Instant::now())
    }

    fn decode(seal: &Seal, bytes: Vec<u8>) -> Result<Option<Entry<Note>>, Corrupt> {
        let decoded = seal.decode(&digest("a"), &Bytes::from(bytes), Now::read())?;
        Ok(decoded.map(|(entry, _)| entry))
    }

    fn refusal(seal: &Seal, bytes: Vec<u8>) -> Option<Corrupt> {
        decode(seal, bytes).err()
    }

    #[test]
    fn the_entry_of_another_key_region_secret_or_schema_is_refused() {
        let seal = Seal::new("s", LIMIT, PLAIN);
        let sealed = seal.encode(&digest("a"), &entry(vec![1; 10]), Now::read()).unwrap();
        let eu = KeyBuilder::new().part(b"a").key().digest(&Region::new("eu").unwrap());
        for wrong in [digest("b"), eu] {
            let refused = seal.decode::<Note>(&wrong, &sealed.clone().into(), Now::read());
            assert_eq!(refused.err(), Some(Corrupt::Key));
        }
        assert_eq!(refusal(&Seal::new("t", LIMIT, PLAIN), sealed.clone()), Some(Corrupt::Secret));
        assert_eq!(refusal(&Seal::new("", LIMIT, PLAIN), sealed.clone()), Some(Corrupt::Secret));
        let mut newer = sealed;
        newer[6] = 2;
        assert_eq!(refusal(&seal, newer), Some(Corrupt::Version));
    }

    #[test]
    fn an_entry_over_the_limit_is_neither_made_nor_read() {
        let (small, large) = (Seal::new("s", LIMIT, PLAIN), Seal::new("s", LIMIT * 2, PLAIN));
        assert!(small.encode(&digest("a"), &entry(vec![0; LIMIT + 1]), Now::read()).is_err());
        let sealed = large.encode(&digest("a"), &entry(vec![0; LIMIT + 1]), Now::read()).unwrap();
        assert_eq!(refusal(&small, sealed), Some(Corrupt::Oversize));
    }

    #[test]
    fn the_body_is_not_copied() {
        let seal = Seal::new("", LIMIT, PLAIN);
        let sealed = Bytes::from(seal.encode(&digest("a"), &entry(vec![7; 100]), Now::read()).unwrap());
        let (entry, _) = seal.decode::<Note>(&digest("a"), &sealed, Now::read()).unwrap().unwrap();
        assert!(sealed.as_ptr_range().contains(&entry.body.as_ptr()));
    }

    #[test]
    fn the_time_over_is_no_damage() {
        let seal = Seal::new("", LIMIT, PLAIN);
        let then = Now { unix_ms: Now::read().unix_ms - 62_000, ..Now::read() };
        let sealed = seal.encode(&digest("a"), &entry(vec![]), then).unwrap();
        assert!(decode(&seal, sealed).unwrap().is_none());
    }

    fn textual(body: Vec<u8>) -> Entry<Note> {
        Entry::new(Note("compressible".into()), body.into(), Duration::from_secs(60), Instant::now())
    }

    #[test]
    fn text_is_compressed_from_a_size_on_and_what_gains_nothing_is_not() {
        let seals = [Compression::Lz4, Compression::Zstd]
            .map(|compression| Seal::new("s", LIMIT, Packing { compression, ..SHORT }));
        for (seal, other) in [(&seals[0], &seals[1]), (&seals[1], &seals[0])] {
            text_is_compressed(seal, other);
        }
    }

    fn text_is_compressed(seal: &Seal, other: &Seal) {
        let text = b"all work and no play ".repeat(100);
        let noise: Vec<u8> = (0..2_000u64).map(|n| (xxhash_rust::xxh3::xxh3_64(&n.to_le_bytes())) as u8).collect();
        let size = |entry: &Entry<Note>| seal.encode(&digest("a"), entry, Now::read()).unwrap().len();
        assert!(size(&textual(text.clone())) < 400 && size(&entry(text.clone())) > text.len());
        assert!(size(&textual(noise.clone())) > noise.len() && size(&textual(vec![b'a'; 99])) > 99 + HEAD);
        let sealed = seal.encode(&digest("a"), &textual(text.clone()), Now::read()).unwrap();
        assert_eq!(decode(other, sealed).unwrap().unwrap().body, text, "whatever it stores itself");
    }

    /// A body that says it is small and decompresses to something large, sealed with the right secret.
    #[test]
    fn what_decompresses_to_another_length_is_refused() {
        let seal = Seal::new("s", LIMIT, SHORT);
        let mut sealed = seal.encode(&digest("a"), &textual(vec![b'a'; LIMIT]), Now::read()).unwrap();
        for plain in [0u32, 100, LIMIT as u32 - 1] {
            sealed[76..80].copy_from_slice(&plain.to_le_bytes());
            let mac = seal.mac(&sealed);
            sealed[MAC_AT..HEAD].copy_from_slice(mac.as_bytes());
            assert_eq!(refusal(&seal, sealed.clone()), Some(Corrupt::Body), "{plain}");
        }
        sealed[76..80].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(refusal(&seal, sealed), Some(Corrupt::Oversize));
    }

    #[test]
    fn the_format_is_the_one_that_is_documented() {
        let documented = include_str!("../../../docs/remote-format.md");
        let block = documented.split("```").find(|block| block.starts_with("hex\n")).expect("the vector is there");
        let hex: String = block[3..].split_whitespace().collect();
        let bytes: Vec<u8> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
        let stored = Now { unix_ms: 1_800_000_000_000, ..Now::read() };
        let entry = Entry::new(Note("text/plain".into()), "hello".into(), Duration::from_secs(60), stored.instant);
        let key = KeyBuilder::new().part(b"http").part(b"shop.example").part(b"/").key().to_owned();
        let digest = key.as_key().digest(&Region::DEFAULT);
        let sealed = Seal::new("secret", LIMIT, PLAIN).encode(&digest, &entry, stored).unwrap();
        let shown: Vec<String> =
            sealed.chunks(32).map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect()).collect();
        assert_eq!(sealed, bytes, "\n{}\n", shown.join("\n"));
    }

    proptest! {
        #[test]
        fn what_is_encoded_comes_back(
            text in ".{0,40}", body in prop::collection::vec(any::<u8>(), 0..LIMIT), secret in ".{0,8}", keep_ms in 1u64..1 << 40,
        ) {
            let seal = Seal::new(&secret, LIMIT, PLAIN);
            let stored = Entry::new(Note(text), body.into(), Duration::from_millis(keep_ms), Instant::now());
            let back = decode(&seal, seal.encode(&digest("a"), &stored, Now::read()).unwrap()).unwrap().unwrap();
            prop_assert_eq!((&back.meta, &back.body), (&stored.meta, &stored.body));
            prop_assert_eq!((back.keep, back.weight), (stored.keep, stored.weight));
        }

        #[test]
        fn damage_of_any_kind_is_refused(
            body in prop::collection::vec(any::<u8>(), 0..200), secret in ".{0,4}", at in any::<prop::sample::Index>(),
            flip in 1u8..=255, cut in any::<prop::sample::Index>(), more in prop::collection::vec(any::<u8>(), 1..50),
        ) {
            let seal = Seal::new(&secret, LIMIT, PLAIN);
            let sealed = seal.encode(&digest("a"), &entry(body), Now::read()).unwrap();
            let mut flipped = sealed.clone();
            flipped[at.index(sealed.len())] ^= flip;
            prop_assert!(decode(&seal, flipped).is_err());
            prop_assert!(decode(&seal, sealed[..cut.index(sealed.len())].to_vec()).is_err());
            prop_assert!(decode(&seal, [sealed, more].concat()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let seal = Seal::new("", LIMIT, PLAIN);
            prop_assert!(decode(&seal, bytes.clone()).is_err());
            prop_assert!(decode(&seal, [&MAGIC[..], &[VERSION, 0, 1, 0], &seal.mark, digest("a").as_bytes(), &bytes].concat()).is_err());
        }
    }
}
