//! Who is calling: address, device, user, tier, region and trace, and whose word is taken for them.
//!
//! The address is the peer's, or the first one from the right of `X-Forwarded-For` or `Forwarded` that is not a trusted
//! proxy. User and tier are believed from trusted proxies alone; their fields are removed from everybody else's requests.
//! `[access]` lists whom no limit holds, and whom nothing is answered.
//!
//! Invariant: nothing here grows with what clients send; identifiers become 64-bit hashes.

mod access;

pub use access::{Access, Entry, Settings as AccessSettings};

use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;
use limiter::KeyHash;
use shard::Region;

use crate::http::fields::{Field, Fields, Known};
use crate::http::message::Request;
use crate::http::text;

/// Where one part of a caller's identity is read from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// `header:NAME`; the name is a valid field name in lower case.
    Header(String),
    /// `cookie:NAME`.
    Cookie(String),
    /// `host:`, the first label of the host.
    Host,
    /// `path:N`, the N-th segment of the path, counted from 1.
    Path(usize),
}

/// How callers are identified (`[identity]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Networks whose `Forwarded`, `X-Forwarded-For` and identity headers are believed; none by default.
    pub trusted_proxies: Vec<IpNet>,
    /// Tried in order; where none is present, the address and the TLS fingerprint alone make the device.
    pub device: Vec<Source>,
    /// The user, believed from `trusted_proxies` only; `None`: every caller is anonymous.
    pub user: Option<Source>,
    /// The tier of the user, likewise; `None`: users are `standard`.
    pub tier: Option<Source>,
    /// Tried in order; where none is present, `region_default`.
    pub region: Vec<Source>,
    /// The region of callers that name none; `default` by default.
    pub region_default: Region,
    /// What limits of tier `key` count by, at most `KEYS_MAX`.
    pub keys: Vec<Source>,
    pub access: AccessSettings,
}

/// Different keys that limits count by: each is looked for in every request.
pub const KEYS_MAX: usize = 8;
/// The place among a caller's keys of its address (IPv6: its /64) alone.
pub const ADDRESS_KEY: u8 = 8;

impl Default for Settings {
    fn default() -> Self {
        Settings {
            trusted_proxies: Vec::new(),
            device: Vec::new(),
            user: None,
            tier: None,
            region: Vec::new(),
            region_default: Region::DEFAULT,
            keys: Vec::new(),
            access: AccessSettings::default(),
        }
    }
}

impl Settings {
    /// The fields by which callers are identified.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        let sources = self.device.iter().chain(&self.user).chain(&self.tier).chain(&self.region).chain(&self.keys);
        sources.filter_map(|source| match source {
            Source::Header(name) => Some(&**name),
            Source::Cookie(_) | Source::Host | Source::Path(_) => None,
        })
    }
}

/// Most bytes of an identifier that count; what is longer is cut before it is hashed.
const IDENTIFIER_MAX: usize = 256;

/// A W3C trace: its id, and whether the caller brought it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    pub id: u128,
    pub brought: bool,
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// Who sent a request.
#[derive(Clone, Debug)]
pub struct Caller {
    pub ip: IpAddr,
    pub device: KeyHash,
    pub user: Option<KeyHash>,
    /// Index into the configured tiers.
    pub tier: usize,
    pub region: Region,
    pub trace: Trace,
    /// What limits of tier `key` count by, in the order of the settings; the last is the address.
    pub keys: [Option<KeyHash>; KEYS_MAX + 1],
    pub access: Access,
    /// Whether the peer is a trusted proxy.
    pub is_trusted: bool,
}

/// A caller as an operator describes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub ip: IpAddr,
    pub device: Option<String>,
    pub user: Option<String>,
    pub tier: Option<String>,
    /// Rules of tier `key`, and the value that each would count by.
    pub keys: Vec<(String, String)>,
}

impl Default for Described {
    fn default() -> Self {
        let ip = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        Described { ip, device: None, user: None, tier: None, keys: Vec::new() }
    }
}

/// Reads callers off requests by the configured rules.
pub struct Identity {
    settings: Settings,
    tiers: Vec<String>,
    /// The same in every gateway of a fleet, so that a rule's percentage picks the same subjects everywhere. The tables
    /// of the limiter hash again with a key of their own.
    hasher: foldhash::quality::FixedState,
    lists: Option<access::Lists>,
    random: foldhash::fast::RandomState,
}

impl Identity {
    /// `tiers` are the names whose indexes callers carry; it holds `anonymous` and `standard`.
    pub fn new(settings: Settings, tiers: Vec<String>) -> Self {
        let hasher = foldhash::quality::FixedState::with_seed(0x7469_6465_6761_7465);
        let lists = access::Lists::of(&settings.access);
        Identity { settings, tiers, hasher, lists, random: foldhash::fast::RandomState::default() }
    }

    /// Identifies the sender of `request` behind `peer`, and removes identity fields it had no right to send.
    pub fn caller(&self, peer: IpAddr, request: &mut Request) -> Caller {
        let peer = peer.to_canonical();
        let is_trusted = self.trusts(peer);
        let ip = if is_trusted { self.forwarded_for(&request.fields).unwrap_or(peer) } else { peer };
        if !is_trusted {
            self.drop_identity(&mut request.fields);
        }
        let user = self.settings.user.as_ref().and_then(|source| read(source, request));
        let device = self.settings.device.iter().find_map(|source| read(source, request));
        let access = self.lists.as_ref().map_or(Access::Ordinary, |lists| lists.judge(ip, device, user));
        let keys = self.keys(ip, self.settings.keys.iter().map(|source| read(source, request)));
        let (device, user) = (self.hash(Some(ip), device.unwrap_or_default()), user.map(|user| self.hash(None, user)));
        Caller {
            ip,
            device,
            user,
            tier: self.tier(user.is_some(), request),
            region: self.region(request),
            trace: trace(&request.fields, &self.random),
            keys,
            access,
            is_trusted,
        }
    }

    /// The caller that an operator describes, `keys` by their places; `None` where there is no such tier.
    pub fn described(&self, who: &Described, keys: &[(u8, &str)]) -> Option<Caller> {
        let user = who.user.as_ref().map(|user| self.hash(None, user.as_bytes()));
        let default = if user.is_some() { "standard" } else { "anonymous" };
        let tier = who.tier.as_deref().unwrap_or(default);
        let ip = who.ip.to_canonical();
        let given =
            |at: usize| keys.iter().find(|(place, _)| usize::from(*place) == at).map(|(_, value)| value.as_bytes());
        let (device, user_id) = (who.device.as_deref().map(str::as_bytes), who.user.as_deref().map(str::as_bytes));
        Some(Caller {
            ip,
            device: self.hash(Some(ip), device.unwrap_or_default()),
            user,
            tier: self.tiers.iter().position(|known| known == tier)?,
            region: self.settings.region_default,
            trace: Trace { id: 0, brought: false },
            keys: self.keys(ip, (0..self.settings.keys.len()).map(given)),
            access: self.lists.as_ref().map_or(Access::Ordinary, |lists| lists.judge(ip, device, user_id)),
            is_trusted: false,
        })
    }

    fn keys<'a>(&self, ip: IpAddr, values: impl Iterator<Item = Option<&'a [u8]>>) -> [Option<KeyHash>; KEYS_MAX + 1] {
        let mut keys = [None; KEYS_MAX + 1];
        for (key, value) in keys.iter_mut().zip(values) {
            *key = value.map(|value| self.hash(None, value));
        }
        keys[usize::from(ADDRESS_KEY)] = Some(self.hash(Some(ip), b""));
        keys
    }

    /// A number for spans and jitter.
    pub fn fresh(&self) -> u64 {
        fresh(&self.random, 0)
    }

    fn trusts(&self, ip: IpAddr) -> bool {
        self.settings.trusted_proxies.iter().any(|network| network.contains(&ip))
    }

    /// The rightmost address that is not a trusted proxy; the leftmost if all are; `None` where the chain is unreadable.
    fn forwarded_for(&self, fields: &Fields) -> Option<IpAddr> {
        let known = if fields.has(Known::Forwarded) { Known::Forwarded } else { Known::XForwardedFor };
        let hops: Vec<&[u8]> = fields.members(known).collect();
        let mut last = None;
        for hop in hops.into_iter().rev() {
            let text = std::str::from_utf8(hop).ok()?;
            let text = if known == Known::Forwarded { forwarded_parameter(text)? } else { text };
            let Some(ip) = parse_address(text) else { return last };
            last = Some(ip);
            if !self.trusts(ip) {
                break;
            }
        }
        last
    }

    fn drop_identity(&self, fields: &mut Fields) {
        let names = [&self.settings.user, &self.settings.tier].into_iter().flatten();
        for source in names {
            if let Source::Header(name) = source {
                fields.retain(|field: Field<'_>| !field.name.eq_ignore_ascii_case(name.as_bytes()));
            }
        }
    }

    fn tier(&self, is_user: bool, request: &Request) -> usize {
        let asked = self.settings.tier.as_ref().filter(|_| is_user).and_then(|source| read(source, request));
        let named = asked.and_then(|name| self.tiers.iter().position(|tier| tier.as_bytes() == name));
        let default = if is_user { "standard" } else { "anonymous" };
        named.or_else(|| self.tiers.iter().position(|tier| tier == default)).unwrap_or(0)
    }

    fn region(&self, request: &Request) -> Region {
        let named = self.settings.region.iter().find_map(|source| read(source, request));
        let region = named.and_then(|name| std::str::from_utf8(name).ok()).and_then(|name| Region::new(name).ok());
        region.unwrap_or(self.settings.region_default)
    }

    fn hash(&self, ip: Option<IpAddr>, id: &[u8]) -> KeyHash {
        let mut hasher = self.hasher.build_hasher();
        match ip {
            Some(IpAddr::V4(ip)) => hasher.write(&ip.octets()),
            Some(IpAddr::V6(ip)) => hasher.write(&network_of(ip)),
            None => hasher.write(b"user"),
        }
        hasher.write(&id[..id.len().min(IDENTIFIER_MAX)]);
        KeyHash(hasher.finish())
    }
}

/// The /64 of an address: one customer's whole range counts as one.
fn network_of(ip: Ipv6Addr) -> [u8; 8] {
    let octets = ip.octets();
    std::array::from_fn(|at| octets[at])
}

fn read<'a>(source: &'a Source, request: &'a Request) -> Option<&'a [u8]> {
    let value = match source {
        Source::Header(name) => request.fields.named(name.as_bytes()).next(),
        Source::Cookie(name) => cookie(&request.fields, name.as_bytes()),
        Source::Host => request.host().split('.').next().map(str::as_bytes),
        Source::Path(segment) => request.path().split('/').nth(*segment).map(str::as_bytes),
    };
    value.filter(|value| !value.is_empty())
}

fn cookie<'a>(fields: &'a Fields, name: &[u8]) -> Option<&'a [u8]> {
    fields.all(Known::Cookie).flat_map(|line| line.split(|byte| *byte == b';')).find_map(|pair| {
        let pair = pair.trim_ascii();
        let (key, value) = pair.split_at(pair.iter().position(|byte| *byte == b'=')?);
        (key == name).then_some(&value[1..])
    })
}

/// The `for` parameter of one `Forwarded` element (RFC 7239 section 5.2).
fn forwarded_parameter(element: &str) -> Option<&str> {
    element.split(';').find_map(|pair| {
        let (name, value) = pair.trim().split_once('=')?;
        name.eq_ignore_ascii_case("for").then_some(value.trim_matches('"'))
    })
}

/// An address with or without a port, IPv6 with or without brackets.
fn parse_address(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(address, _)| address);
    let without_port = || text.rsplit_once(':').map(|(address, _)| address);
    bracketed.unwrap_or(text).parse().ok().or_else(|| without_port()?.parse().ok()).map(|ip: IpAddr| ip.to_canonical())
}

/// The caller's trace id (W3C Trace Context, version 00), or a new one.
fn trace(fields: &Fields, random: &foldhash::fast::RandomState) -> Trace {
    let brought = fields.get(Known::Traceparent).and_then(parse_traceparent);
    let id = brought.unwrap_or_else(|| u128::from(fresh(random, 1)) << 64 | u128::from(fresh(random, 2)));
    Trace { id, brought: brought.is_some() }
}

fn parse_traceparent(value: &[u8]) -> Option<u128> {
    let text = std::str::from_utf8(value).ok()?;
    let is_shaped =
        text.len() == 55 && text.starts_with("00-") && text.as_bytes()[35] == b'-' && text.as_bytes()[52] == b'-';
    let is_hex = |part: &str| part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    if !is_shaped || !is_hex(&text[3..35]) || !is_hex(&text[36..52]) || !is_hex(&text[53..]) {
        return None;
    }
    let parent = u64::from_str_radix(&text[36..52], 16).ok()?;
    u128::from_str_radix(&text[3..35], 16).ok().filter(|id| *id != 0 && parent != 0)
}

/// A number nobody has seen before; unpredictable enough for trace ids, not for secrets.
fn fresh(random: &foldhash::fast::RandomState, salt: u64) -> u64 {
    use std::cell::Cell;
    thread_local!(static COUNT: Cell<u64> = const { Cell::new(0) });
    let count = COUNT.get().wrapping_add(1);
    COUNT.set(count);
    let mut hasher = random.build_hasher();
    hasher.write_u64(count);
    hasher.write_u64(salt);
    hasher.write_usize(std::ptr::from_ref(&salt).addr());
    hasher.finish() | 1
}

/// What the origin is told of the trace: the caller's own field, or a new one.
pub fn write_trace(trace: Trace, span: u64, fields: &mut Fields) {
    if !trace.brought {
        fields.remove(Known::Traceparent);
        fields.add_with(Known::Traceparent, |text| {
            text.extend_from_slice(b"00-");
            text::push_hex(text, (trace.id >> 64) as u64);
            text::push_hex(text, trace.id as u64);
            text.push(b'-');
            text::push_hex(text, span);
            text.extend_from_slice(b"-01");
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(settings: Settings) -> Identity {
        let tiers = ["anonymous", "standard", "platinum"].map(str::to_owned).to_vec();
        Identity::new(settings, tiers)
    }

    fn request(lines: &[(&str, &str)]) -> Request {
        let mut request = Request::default();
        for (name, value) in lines {
            request.fields.push(name.as_bytes(), value.as_bytes());
        }
        request
    }

    fn trusting() -> Settings {
        Settings {
            trusted_proxies: vec!["10.0.0.0/8".parse().expect("a network")],
            user: Some(Source::Header("x-user-id".into())),
            tier: Some(Source::Header("x-user-tier".into())),
            device: vec![Source::Header("x-device-id".into()), Source::Cookie("device".into())],
            region: vec![Source::Header("x-region".into())],
            ..Settings::default()
        }
    }

    #[test]
    fn strangers_cannot_claim_an_address_a_user_or_a_tier() {
        let mut request = request(&[("X-Forwarded-For", "1.2.3.4"), ("X-User-Id", "bob"), ("x-user-tier", "platinum")]);
        let caller = identity(trusting()).caller(IpAddr::from([203, 0, 113, 9]), &mut request);
        assert_eq!(caller.ip, IpAddr::from([203, 0, 113, 9]));
        assert_eq!((caller.user, caller.tier), (None, 0));
        assert!(request.fields.named(b"x-user-id").next().is_none());
    }

    #[test]
    fn the_rightmost_untrusted_hop_is_the_caller() {
        let chain = "6.6.6.6, 198.51.100.7, 10.1.1.1";
        for lines in [
            [("x-forwarded-for", chain)],
            [("forwarded", "for=6.6.6.6, for=\"198.51.100.7:80\";proto=http, for=10.1.1.1")],
        ] {
            let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
            assert_eq!(caller.ip, IpAddr::from([198, 51, 100, 7]));
        }
        let caller =
            identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&[("x-forwarded-for", "junk")]));
        assert_eq!(caller.ip, IpAddr::from([10, 0, 0, 1]));
    }

    #[test]
    fn trusted_proxies_name_user_and_tier() {
        let lines = [("x-user-id", "bob"), ("x-user-tier", "platinum"), ("x-region", "eu")];
        let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines));
        assert_eq!((caller.user.is_some(), caller.tier, caller.region.as_str()), (true, 2, "eu"));
        let caller = identity(trusting()).caller(IpAddr::from([10, 0, 0, 1]), &mut request(&lines[..1]));
        assert_eq!(caller.tier, 1);
    }

    #[test]
    fn a_device_is_bound_to_its_network() {
        let identity = identity(trusting());
        let device = |ip: &str, lines: &[(&str, &str)]| {
            identity.caller(ip.parse().expect("an address"), &mut request(lines)).device
        };
        assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.9", &[("x-device-id", "b")]));
        assert_ne!(device("203.0.113.9", &[("x-device-id", "a")]), device("203.0.113.8", &[("x-device-id", "a")]));
        assert_eq!(device("2001:db8::1", &[]), device("2001:db8::2", &[]));
        assert_eq!(
            device("203.0.113.9", &[("cookie", "x=1; device=a")]),
            device("203.0.113.9", &[("x-device-id", "a")])
        );
        let long = "x".repeat(64 << 10);
        assert_eq!(
            device("203.0.113.9", &[("x-device-id", &long)]),
            device("203.0.113.9", &[("x-device-id", &long[..256])])
        );
    }

    #[test]
    fn traces_are_kept_or_made() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let caller = identity(trusting()).caller(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", parent)]));
        assert_eq!(caller.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
        for bad in ["00-00000000000000000000000000000000-b7ad6b7169203331-01", "junk", &parent.to_uppercase()] {
            let caller = identity(trusting()).caller(IpAddr::from([1, 1, 1, 1]), &mut request(&[("traceparent", bad)]));
            assert!(!caller.trace.brought && caller.trace.id != 0);
        }
    }
}
