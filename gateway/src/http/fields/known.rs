//! Field names that the gateway acts on, found in any letter case by one multiplication, and sets of them in one word.

use std::fmt;

macro_rules! known {
    ($($variant:ident = $text:literal),+ $(,)?) => {
        /// A field name the gateway acts on; any other name is kept as text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Known { $($variant),+ }

        const ALL: &[Known] = &[$(Known::$variant),+];

        impl Known {
            /// The name in lower case, as HTTP/2 sends it.
            pub const fn as_str(self) -> &'static str {
                match self { $(Known::$variant => $text),+ }
            }
        }
    };
}

known! {
    Accept = "accept",
    AcceptEncoding = "accept-encoding",
    AcceptLanguage = "accept-language",
    AcceptRanges = "accept-ranges",
    Age = "age",
    Allow = "allow",
    Authorization = "authorization",
    CacheControl = "cache-control",
    CacheStatus = "cache-status",
    CdnCacheControl = "cdn-cache-control",
    Connection = "connection",
    ContentEncoding = "content-encoding",
    ContentLanguage = "content-language",
    ContentLength = "content-length",
    ContentLocation = "content-location",
    ContentRange = "content-range",
    ContentType = "content-type",
    Cookie = "cookie",
    Date = "date",
    ETag = "etag",
    Expect = "expect",
    Expires = "expires",
    Forwarded = "forwarded",
    Host = "host",
    IfMatch = "if-match",
    IfModifiedSince = "if-modified-since",
    IfNoneMatch = "if-none-match",
    IfRange = "if-range",
    IfUnmodifiedSince = "if-unmodified-since",
    KeepAlive = "keep-alive",
    LastModified = "last-modified",
    Location = "location",
    MaxForwards = "max-forwards",
    Pragma = "pragma",
    ProxyAuthenticate = "proxy-authenticate",
    ProxyAuthenticationInfo = "proxy-authentication-info",
    ProxyAuthorization = "proxy-authorization",
    ProxyConnection = "proxy-connection",
    ProxyStatus = "proxy-status",
    Range = "range",
    RateLimit = "ratelimit",
    RateLimitPolicy = "ratelimit-policy",
    RetryAfter = "retry-after",
    Server = "server",
    SetCookie = "set-cookie",
    SurrogateControl = "surrogate-control",
    Te = "te",
    Traceparent = "traceparent",
    Trailer = "trailer",
    TransferEncoding = "transfer-encoding",
    Upgrade = "upgrade",
    UserAgent = "user-agent",
    Vary = "vary",
    Via = "via",
    XForwardedFor = "x-forwarded-for",
    XForwardedHost = "x-forwarded-host",
    XForwardedPort = "x-forwarded-port",
    XForwardedProto = "x-forwarded-proto",
    XOriginalUrl = "x-original-url",
    XRealIp = "x-real-ip",
    XRewriteUrl = "x-rewrite-url",
}

/// Slots of the table of names: so many that some seed puts each name into a slot of its own.
const SLOTS: usize = 1024;
/// No name has this number.
const NOBODY: u8 = u8::MAX;

/// A slot for a name that is not empty, from its length and three of its letters, in any case.
const fn slot(name: &[u8], seed: u32) -> usize {
    let (first, third, last) = (name[0] | 0x20, name[name.len() * 3 / 4] | 0x20, name[name.len() - 1] | 0x20);
    let key = name.len() as u32 ^ (first as u32) << 8 ^ (third as u32) << 16 ^ (last as u32) << 24;
    (key.wrapping_mul(seed) >> 22) as usize % SLOTS
}

/// Numbers of names by slot, or nothing where two names share one.
const fn table(seed: u32) -> Option<[u8; SLOTS]> {
    let mut table = [NOBODY; SLOTS];
    let mut number = 0;
    while number < ALL.len() {
        let slot = slot(ALL[number].as_str().as_bytes(), seed);
        if table[slot] != NOBODY {
            return None;
        }
        table[slot] = number as u8;
        number += 1;
    }
    Some(table)
}

/// The first seed that keeps all names apart, and its table; found when this is compiled.
static NAMES: (u32, [u8; SLOTS]) = {
    let mut seed = 0x9e37_79b1;
    loop {
        if let Some(table) = table(seed) {
            break (seed, table);
        }
        seed = seed.wrapping_add(2);
    }
};

impl Known {
    /// Finds a name in any letter case.
    pub fn of(name: &[u8]) -> Option<Known> {
        if name.is_empty() {
            return None;
        }
        let number = NAMES.1[slot(name, NAMES.0)];
        let known = *ALL.get(usize::from(number))?;
        is_same(name, known.as_str().as_bytes()).then_some(known)
    }
}

/// Whether `name` is `known`, which has small letters and hyphens alone, in any letter case; eight bytes at a time.
fn is_same(name: &[u8], known: &[u8]) -> bool {
    const SMALL: u64 = 0x2020_2020_2020_2020;
    if name.len() != known.len() {
        return false;
    }
    let (Some((first, _)), Some((own, _))) = (name.split_first_chunk::<8>(), known.split_first_chunk::<8>()) else {
        return name.eq_ignore_ascii_case(known);
    };
    let is_equal = |a: &[u8; 8], b: &[u8; 8]| u64::from_le_bytes(*a) | SMALL == u64::from_le_bytes(*b);
    // The pieces overlap where the length is no multiple of eight. Setting the bit makes a hyphen of CR too, which is in no name.
    is_equal(first, own)
        && name.rchunks_exact(8).zip(known.rchunks_exact(8)).all(|(a, b)| match (a.try_into(), b.try_into()) {
            (Ok(a), Ok(b)) => is_equal(a, b),
            _ => false,
        })
}

/// A set of known names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KnownSet(u64);

const _: () = assert!(ALL.len() <= 64, "a set is one word");

impl KnownSet {
    pub const fn of(names: &[Known]) -> Self {
        let (mut set, mut at) = (0, 0);
        while at < names.len() {
            set |= 1 << names[at] as u8;
            at += 1;
        }
        KnownSet(set)
    }

    pub const fn has(self, known: Known) -> bool {
        self.0 & 1 << known as u8 != 0
    }

    pub const fn and(self, known: Known) -> Self {
        KnownSet(self.0 | 1 << known as u8)
    }

    pub const fn or(self, other: KnownSet) -> Self {
        KnownSet(self.0 | other.0)
    }

    pub const fn meets(self, other: KnownSet) -> bool {
        self.0 & other.0 != 0
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_name_is_found_in_any_case() {
        for known in ALL {
            assert_eq!(Known::of(known.as_str().to_uppercase().as_bytes()), Some(*known));
        }
        for unlike in ["hosts", "hose", "content-lengthy", "content-lengtg", "xontent-length", "transfer_encoding"] {
            assert_eq!(Known::of(unlike.as_bytes()), None, "{unlike}");
        }
        assert_eq!(Known::of(b"x-unknown"), None);
        assert_eq!(Known::of(b""), None);
    }
}
