//! The field names that the gateway acts on, looked up case-insensitively by a perfect hash, and
//! sets of them as bits of two words.

use std::fmt;

macro_rules! known {
    ($($variant:ident = $text:literal),+ $(,)?) => {
        /// A field name that the gateway acts on. Any other name is kept as text.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum KnownField { $($variant),+ }

        const ALL: &[KnownField] = &[$(KnownField::$variant),+];

        impl KnownField {
            /// All names, each at the index that it is as a number.
            pub(crate) const ALL: &[KnownField] = ALL;

            /// The name in lower case, as HTTP/2 sends it.
            pub(crate) const fn as_str(self) -> &'static str {
                match self { $(KnownField::$variant => $text),+ }
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
    CfConnectingIp = "cf-connecting-ip",
    CfConnectingIpv6 = "cf-connecting-ipv6",
    ClientCert = "client-cert",
    ClientCertChain = "client-cert-chain",
    ClientIp = "client-ip",
    CloudfrontForwardedProto = "cloudfront-forwarded-proto",
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
    FastlyClientIp = "fastly-client-ip",
    FlyClientIp = "fly-client-ip",
    Forwarded = "forwarded",
    ForwardedFor = "forwarded-for",
    FrontEndHttps = "front-end-https",
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
    Proxy = "proxy",
    ProxyAuthenticate = "proxy-authenticate",
    ProxyAuthenticationInfo = "proxy-authentication-info",
    ProxyAuthorization = "proxy-authorization",
    ProxyClientIp = "proxy-client-ip",
    ProxyConnection = "proxy-connection",
    ProxyStatus = "proxy-status",
    Range = "range",
    RateLimit = "ratelimit",
    RateLimitPolicy = "ratelimit-policy",
    RemoteUser = "remote-user",
    RetryAfter = "retry-after",
    Server = "server",
    SetCookie = "set-cookie",
    SslClientCert = "ssl-client-cert",
    SslClientSubjectDn = "ssl-client-subject-dn",
    SslClientVerify = "ssl-client-verify",
    SurrogateControl = "surrogate-control",
    Te = "te",
    Traceparent = "traceparent",
    Tracestate = "tracestate",
    Trailer = "trailer",
    TransferEncoding = "transfer-encoding",
    TrueClientIp = "true-client-ip",
    Upgrade = "upgrade",
    UserAgent = "user-agent",
    Vary = "vary",
    Via = "via",
    WlProxyClientIp = "wl-proxy-client-ip",
    XAzureClientIp = "x-azure-clientip",
    XClientIp = "x-client-ip",
    XClusterClientIp = "x-cluster-client-ip",
    XEnvoyExpectedRqTimeoutMs = "x-envoy-expected-rq-timeout-ms",
    XEnvoyExternalAddress = "x-envoy-external-address",
    XEnvoyOriginalPath = "x-envoy-original-path",
    XForwarded = "x-forwarded",
    XForwardedBy = "x-forwarded-by",
    XForwardedClientCert = "x-forwarded-client-cert",
    XForwardedFor = "x-forwarded-for",
    XForwardedHost = "x-forwarded-host",
    XForwardedMethod = "x-forwarded-method",
    XForwardedPath = "x-forwarded-path",
    XForwardedPort = "x-forwarded-port",
    XForwardedPrefix = "x-forwarded-prefix",
    XForwardedProto = "x-forwarded-proto",
    XForwardedProtocol = "x-forwarded-protocol",
    XForwardedScheme = "x-forwarded-scheme",
    XForwardedServer = "x-forwarded-server",
    XForwardedSsl = "x-forwarded-ssl",
    XForwardedTlsClientCert = "x-forwarded-tls-client-cert",
    XForwardedTlsClientCertInfo = "x-forwarded-tls-client-cert-info",
    XForwardedUri = "x-forwarded-uri",
    XHost = "x-host",
    XHttpHostOverride = "x-http-host-override",
    XHttpMethod = "x-http-method",
    XHttpMethodOverride = "x-http-method-override",
    XMethodOverride = "x-method-override",
    XOriginalForwardedFor = "x-original-forwarded-for",
    XOriginalHost = "x-original-host",
    XOriginalMethod = "x-original-method",
    XOriginalUri = "x-original-uri",
    XOriginalUrl = "x-original-url",
    XOriginatingIp = "x-originating-ip",
    XProxyUser = "x-proxy-user",
    XRealIp = "x-real-ip",
    XRemoteAddr = "x-remote-addr",
    XRemoteIp = "x-remote-ip",
    XRemoteUser = "x-remote-user",
    XRequestId = "x-request-id",
    XRewriteUrl = "x-rewrite-url",
    XScheme = "x-scheme",
    XScriptName = "x-script-name",
    XUrlScheme = "x-url-scheme",
}

/// Slots of the hash table: enough that a seed without collisions is found soon.
const SLOTS: usize = 2048;
/// Marks an empty slot: no name has this number.
const EMPTY_SLOT: u8 = u8::MAX;

/// The slot of a non-empty name, from its length and four of its letters in any case.
const fn slot(name: &[u8], seed: u32) -> usize {
    let (first, last) = (name[0] | 0x20, name[name.len() - 1] | 0x20);
    let (second, third) = (name[name.len() / 4] | 0x20, name[name.len() * 3 / 4] | 0x20);
    let letters = (first as u32) << 8 ^ (second as u32) << 12 ^ (third as u32) << 16 ^ (last as u32) << 24;
    let key = name.len() as u32 ^ letters;
    (key.wrapping_mul(seed) >> 21) as usize % SLOTS
}

/// Numbers of names by slot; `None` if two names collide.
const fn table(seed: u32) -> Option<[u8; SLOTS]> {
    let mut table = [EMPTY_SLOT; SLOTS];
    let mut number = 0;
    while number < ALL.len() {
        let slot = slot(ALL[number].as_str().as_bytes(), seed);
        if table[slot] != EMPTY_SLOT {
            return None;
        }
        table[slot] = number as u8;
        number += 1;
    }
    Some(table)
}

/// The first seed without collisions and its table, computed at compile time.
static NAMES: (u32, [u8; SLOTS]) = {
    let mut seed = 0x9e37_79b1;
    loop {
        if let Some(table) = table(seed) {
            break (seed, table);
        }
        seed = seed.wrapping_add(2);
    }
};

impl KnownField {
    /// Looks up a name, case-insensitively.
    pub(crate) fn of(name: &[u8]) -> Option<KnownField> {
        if name.is_empty() {
            return None;
        }
        let number = NAMES.1[slot(name, NAMES.0)];
        let known = *ALL.get(usize::from(number))?;
        matches_name(name, known.as_str().as_bytes()).then_some(known)
    }
}

/// Whether `name` equals `known`, case-insensitively. `known` has only lower-case letters and
/// hyphens. Compares eight bytes at a time.
fn matches_name(name: &[u8], known: &[u8]) -> bool {
    const LOWER_CASE_BITS: u64 = 0x2020_2020_2020_2020;
    if name.len() != known.len() {
        return false;
    }
    let (Some((first, _)), Some((known_first, _))) = (name.split_first_chunk::<8>(), known.split_first_chunk::<8>())
    else {
        return name.eq_ignore_ascii_case(known);
    };
    let is_equal = |a: &[u8; 8], b: &[u8; 8]| u64::from_le_bytes(*a) | LOWER_CASE_BITS == u64::from_le_bytes(*b);
    // The pieces overlap if the length is not a multiple of eight. Setting the bit also maps CR to
    // a hyphen: no name over HTTP/1.1 contains CR, and HTTP/2 compares the exact bytes.
    is_equal(first, known_first)
        && name.rchunks_exact(8).zip(known.rchunks_exact(8)).all(|(a, b)| match (a.try_into(), b.try_into()) {
            (Ok(a), Ok(b)) => is_equal(a, b),
            _ => false,
        })
}

/// Whether `name` is `pattern` in any case, or begins with what stands before a `*` at its end.
pub(crate) fn matches_pattern(name: &[u8], pattern: &[u8]) -> bool {
    match pattern.strip_suffix(b"*") {
        Some(prefix) => name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix)),
        None => name.eq_ignore_ascii_case(pattern),
    }
}

/// A set of known field names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KnownFieldSet([u64; 2]);

const _: () = assert!(ALL.len() <= 128, "a set is two words");

impl KnownFieldSet {
    pub(crate) const fn of(names: &[KnownField]) -> Self {
        let (mut set, mut at) = (KnownFieldSet([0; 2]), 0);
        while at < names.len() {
            set = set.with(names[at]);
            at += 1;
        }
        set
    }

    /// The known names that match `pattern`.
    pub(crate) fn matching(pattern: &str) -> Self {
        let matches = |known: &&KnownField| matches_pattern(known.as_str().as_bytes(), pattern.as_bytes());
        ALL.iter().filter(matches).fold(KnownFieldSet::default(), |set, known| set.with(*known))
    }

    pub(crate) const fn contains(self, known: KnownField) -> bool {
        self.0[known as usize / 64] >> (known as u32 % 64) & 1 != 0
    }

    pub(crate) const fn with(mut self, known: KnownField) -> Self {
        self.0[known as usize / 64] |= 1 << (known as u32 % 64);
        self
    }

    pub(crate) const fn union(self, other: KnownFieldSet) -> Self {
        KnownFieldSet([self.0[0] | other.0[0], self.0[1] | other.0[1]])
    }

    pub(crate) const fn intersects(self, other: KnownFieldSet) -> bool {
        self.0[0] & other.0[0] | self.0[1] & other.0[1] != 0
    }
}

impl fmt::Display for KnownField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_found_case_insensitively() {
        for known in ALL {
            assert_eq!(KnownField::of(known.as_str().to_uppercase().as_bytes()), Some(*known));
        }
        for other in ["hosts", "hose", "content-lengthy", "content-lengtg", "xontent-length", "transfer_encoding"] {
            assert_eq!(KnownField::of(other.as_bytes()), None, "{other}");
        }
        assert_eq!(KnownField::of(b"x-unknown"), None);
        assert_eq!(KnownField::of(b""), None);
    }
}
