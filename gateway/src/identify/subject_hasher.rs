//! Hashes of the subjects of limits: devices, users, claims and addresses.
//!
//! Clients choose most of these values. With a public hash, a client could compute a device id that
//! shares the bucket of a chosen victim; the hash is therefore keyed with a secret.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::LazyLock;

use limiter::KeyHash;
use siphasher::sip128::{Hasher128 as _, SipHasher24};

/// The key of processes without `identity.secret`. One for the whole process, so that a reload
/// keeps the buckets of all subjects.
static PROCESS_KEY: LazyLock<[u8; 16]> = LazyLock::new(|| {
    let state = RandomState::new();
    let words: Vec<u8> = (0..4u64).flat_map(|word| state.hash_one(word).to_le_bytes()).collect();
    derived_key(&words)
});

/// The kind of a subject. Subjects of different kinds have different hashes, whatever their values.
#[derive(Clone, Copy)]
#[repr(u8)]
enum SubjectKind {
    Value = 1,
    Ipv4 = 2,
    /// The /64 prefix of an address.
    Ipv6 = 3,
    Claim = 4,
}

/// Hashes subjects with SipHash-2-4 to 128 bits, keyed with the secret of the fleet.
#[derive(Clone)]
pub(super) struct SubjectHasher {
    key: [u8; 16],
}

impl SubjectHasher {
    /// The key is derived from `secret`; the gateways of a fleet have the same one. An empty secret
    /// stands for a random key of this process.
    pub(super) fn new(secret: &str) -> Self {
        let key = if secret.is_empty() { *PROCESS_KEY } else { derived_key(secret.as_bytes()) };
        SubjectHasher { key }
    }

    /// The hash of a user or of the value of a limit key.
    pub(super) fn value(&self, value: &[u8]) -> KeyHash {
        self.hash(SubjectKind::Value, &[value])
    }

    /// The hash of an address (IPv6: its /64) alone.
    pub(super) fn address(&self, ip: IpAddr) -> KeyHash {
        self.device(ip, &[])
    }

    /// The hash of a device: its id, bound to the address and to the other parts of `id`.
    pub(super) fn device(&self, ip: IpAddr, id: &[&[u8]]) -> KeyHash {
        let mut hasher = match ip {
            IpAddr::V4(ip) => self.start(SubjectKind::Ipv4, &ip.octets()),
            IpAddr::V6(ip) => self.start(SubjectKind::Ipv6, &network_of(ip)),
        };
        id.iter().for_each(|part| write_part(&mut hasher, part));
        finish(&hasher)
    }

    /// The hash of a claim together with its issuer and name. A subject is unique only within its
    /// issuer (RFC 7519 section 4.1.2), and distinct from the same name in a header: user `ann` of
    /// a token and user `ann` of a trusted proxy may be two users.
    pub(super) fn claim(&self, issuer: &str, name: &str, value: &str) -> KeyHash {
        self.hash(SubjectKind::Claim, &[issuer.as_bytes(), name.as_bytes(), value.as_bytes()])
    }

    fn hash(&self, kind: SubjectKind, parts: &[&[u8]]) -> KeyHash {
        let mut hasher = self.start(kind, &[]);
        parts.iter().for_each(|part| write_part(&mut hasher, part));
        finish(&hasher)
    }

    /// `prefix` has one length for each kind.
    fn start(&self, kind: SubjectKind, prefix: &[u8]) -> SipHasher24 {
        let mut hasher = SipHasher24::new_with_key(&self.key);
        hasher.write_u8(kind as u8);
        hasher.write(prefix);
        hasher
    }
}

/// Writes a part after its length, so that different lists of parts give different bytes.
fn write_part(hasher: &mut SipHasher24, part: &[u8]) {
    hasher.write_u32(u32::try_from(part.len()).unwrap_or(u32::MAX));
    hasher.write(part);
}

fn finish(hasher: &SipHasher24) -> KeyHash {
    KeyHash(hasher.finish128().as_u128())
}

fn derived_key(secret: &[u8]) -> [u8; 16] {
    let key = blake3::derive_key("tidegate identify 2: subjects of limits", secret);
    key[..16].try_into().expect("a key has 32 bytes")
}

/// The /64 prefix of an address: a customer usually receives a /64, so it counts as one client.
fn network_of(ip: Ipv6Addr) -> [u8; 8] {
    let octets = ip.octets();
    std::array::from_fn(|at| octets[at])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that knows the program, and not its secret, cannot compute a colliding id: no key
    /// follows from the program alone.
    #[test]
    fn hashes_depend_on_the_secret() {
        let ip = IpAddr::from([192, 0, 2, 1]);
        let of = |secret: &str| {
            let hasher = SubjectHasher::new(secret);
            [hasher.device(ip, &[b"a"]), hasher.value(b"a"), hasher.address(ip), hasher.claim("i", "sub", "a")]
        };
        let (one, two, random) = (of("one"), of("two"), of(""));
        for (at, hash) in one.iter().enumerate() {
            assert_ne!(*hash, two[at]);
            assert_ne!(*hash, random[at]);
        }
        assert_eq!(one, of("one"), "the same on every gateway with this secret");
        assert_eq!(random, of(""), "a reload keeps the key of the process");
        let mut fixed = SipHasher24::new_with_key(&[0; 16]);
        fixed.write_u8(SubjectKind::Value as u8);
        write_part(&mut fixed, b"a");
        assert_ne!(random[1], finish(&fixed));
    }

    #[test]
    fn subjects_of_different_kinds_and_parts_differ() {
        let hasher = SubjectHasher::new("secret");
        // 117.115.101.114 is "user"; the /64 begins with 192.0.2.1.
        let (v4, v6) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([0xc000, 0x0201, 0x6162, 0x6364, 0, 0, 0, 1]));
        let all = [
            hasher.value(b"abcd"),
            hasher.device(IpAddr::from(*b"user"), &[b"abcd"]),
            hasher.address(v4),
            hasher.device(v4, &[b""]),
            hasher.device(v4, &[b"abcd"]),
            hasher.device(v4, &[b"ab", b"cd"]),
            hasher.address(v6),
            hasher.claim("", "", "abcd"),
            hasher.claim("a", "b", "cd"),
            hasher.claim("ab", "", "cd"),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(all[at + 1..].iter().all(|other| other != one), "{at}");
        }
        let neighbour = IpAddr::from([0xc000, 0x0201, 0x6162, 0x6364, 9, 9, 9, 9]);
        assert_eq!(hasher.address(v6), hasher.address(neighbour), "one /64 is one client");
    }
}
