//! Who is calling: address, device, user, tier, region and trace, and whose word is taken for them.
//!
//! The address is the peer's, or the first one from the right of `X-Forwarded-For` or `Forwarded` that is not a trusted
//! proxy (`chain`). User and tier are believed from trusted proxies, in fields that are removed from everybody else's requests, or from a
//! signed token, whoever brings it (`tokens`). `[access]` lists whom no limit holds, and whom nothing is answered.
//! Invariant: nothing here grows with what clients send; identifiers become 64-bit hashes.

mod access;
mod chain;
#[cfg(test)]
#[path = "../tests/support/issuer.rs"]
pub(crate) mod issuer;
pub mod keys;
mod seen;
#[cfg(test)]
mod tests;
pub mod tokens;
mod trace;

pub use access::{Access, Entry, Settings as AccessSettings};
pub use chain::Written;

use std::hash::{BuildHasher, Hasher};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use limiter::KeyHash;
use shard::Region;

use crate::hop::Heard;
use crate::http::fields::{Field, Fields, Known};
use crate::http::message::Request;
use tokens::{Claims, Outcome, Tokens};
pub use trace::{Trace, write_trace};

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
    /// A claim of the token that `Settings::tokens` believes; its name, at the top level of the token.
    Claim(String),
}

/// How callers are identified (`[identity]`).
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Networks whose `Forwarded`, `X-Forwarded-For` and identity headers are believed; none by default.
    pub trusted_proxies: Vec<IpNet>,
    /// Where these write whom a request came from.
    pub forwarded_field: Written,
    /// Tried in order; where none is present, the address alone makes the device.
    pub device: Vec<Source>,
    /// The user: a header, believed from `trusted_proxies` only, or a claim; `None`: every caller is anonymous.
    pub user: Option<Source>,
    /// The tier of the user, likewise; `None`: users are `standard`.
    pub tier: Option<Source>,
    /// Tokens that are believed, where the user is a claim.
    pub tokens: Option<tokens::Settings>,
    /// Further claims, which limits count by; of no others anything is kept.
    pub claims: Vec<String>,
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
            forwarded_field: Written::Either,
            device: Vec::new(),
            user: None,
            tier: None,
            tokens: None,
            claims: Vec::new(),
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
        let fields = sources.filter_map(|source| match source {
            Source::Header(name) => Some(&**name),
            Source::Cookie(_) | Source::Host | Source::Path(_) | Source::Claim(_) => None,
        });
        fields.chain(self.tokens.as_ref().and_then(tokens::Settings::field))
    }
}

/// Registers the metrics of this module.
pub fn expose() {
    tokens::expose();
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

/// What is kept of a verified token.
#[derive(Clone, Debug)]
struct Facts {
    user: Option<KeyHash>,
    /// Index into the configured tiers.
    tier: Option<usize>,
    /// Whether the user is in a list.
    listed: Access,
    /// By their places in [`Settings::claims`].
    claims: Option<Arc<[Option<KeyHash>]>>,
}

/// A caller as an operator describes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    pub ip: IpAddr,
    pub device: Option<String>,
    pub user: Option<String>,
    /// Of the token that names the user; the configured one where nothing is said.
    pub issuer: Option<String>,
    pub tier: Option<String>,
    /// Rules of tier `key`, and the value that each would count by.
    pub keys: Vec<(String, String)>,
}

impl Default for Described {
    fn default() -> Self {
        let ip = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        Described { ip, device: None, user: None, issuer: None, tier: None, keys: Vec::new() }
    }
}

/// Reads callers off requests by the configured rules.
pub struct Identity {
    settings: Settings,
    tiers: Vec<String>,
    tokens: Option<Tokens>,
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
        let tokens = settings.tokens.clone().map(Tokens::new);
        Identity { settings, tiers, tokens, hasher, lists, random: foldhash::fast::RandomState::default() }
    }

    /// Identifies the sender of `request` behind `peer`, a canonical address, and removes identity fields it had no right to send.
    pub fn caller(&self, peer: IpAddr, request: &mut Request) -> Caller {
        let is_trusted = self.trusts(peer);
        let ip = if is_trusted { self.client(&request.fields).unwrap_or(peer) } else { peer };
        if !is_trusted {
            self.drop_identity(&mut request.fields);
        }
        let looked = self.tokens.as_ref().map_or(Ok(None), |tokens| {
            // Bad tokens count against the address alone: a device is whatever its sender says.
            let address = self.hash(Some(ip), b"");
            tokens.look(request, address, |claims| self.keep(claims))
        });
        let refused = looked.as_ref().err().copied();
        let facts = looked.as_ref().ok().and_then(Option::as_ref);
        let named = match &self.settings.user {
            Some(Source::Claim(_)) | None => None,
            Some(source) => read(source, request),
        };
        let user = match &self.settings.user {
            Some(Source::Claim(_)) => facts.and_then(|facts| facts.user),
            _ => named.map(|user| self.hash(None, user)),
        };
        let device = self.settings.device.iter().find_map(|source| read(source, request));
        let listed = facts.map_or(Access::Ordinary, |facts| facts.listed);
        let access = self.lists.as_ref().map_or(Access::Ordinary, |lists| lists.judge(ip, device, named).and(listed));
        let access = access.and(self.doubt(refused, access));
        let keys = self.keys(ip, |_, source| match source {
            Source::Claim(name) => facts.and_then(|facts| self.kept(facts.claims.as_deref(), name)),
            _ => Some(self.hash(None, read(source, request)?)),
        });
        let device = self.hash(Some(ip), device.unwrap_or_default());
        Caller {
            ip,
            device,
            user,
            tier: self.tier(user.is_some(), facts, request),
            region: self.region(request),
            trace: self.trace(request),
            keys,
            access,
            is_trusted,
        }
    }

    /// Whether requests that are the same, from the same peer, have the same sender at any time. Tokens expire, and are counted.
    pub fn is_steady(&self) -> bool {
        self.tokens.is_none()
    }

    /// The trace that a request belongs to.
    pub fn trace(&self, request: &Request) -> Trace {
        trace::of(&request.fields, &self.random)
    }

    /// A token that is good and was not looked at still says to the origin whose it is. Whoever has spent what his address may get wrong could
    /// so leave his own limits behind, and be heard although he is denied: he is to wait. Others have spent it in a flood from
    /// everywhere; then new users are anonymous, unless some are denied.
    fn doubt(&self, refused: Option<Outcome>, access: Access) -> Access {
        let denies_users = || self.lists.as_ref().is_some_and(access::Lists::denies_users);
        match refused {
            // Who is exempt by his address or device has no limits to leave behind.
            Some(Outcome::Unchecked) if access != Access::Exempt || denies_users() => Access::Unknown,
            Some(Outcome::Flooded) if denies_users() => Access::Unknown,
            _ => Access::Ordinary,
        }
    }

    /// The caller that an operator describes, `keys` by their places; `None` where there is no such tier.
    pub fn described(&self, who: &Described, keys: &[(u8, &str)]) -> Option<Caller> {
        let issuer = || who.issuer.as_deref().or_else(|| self.settings.tokens.as_ref()?.issuer.as_deref());
        let user = who.user.as_deref().map(|user| match &self.settings.user {
            Some(Source::Claim(name)) => self.claimed(issuer().unwrap_or_default(), name, user),
            _ => self.hash(None, user.as_bytes()),
        });
        let default = if user.is_some() { "standard" } else { "anonymous" };
        let tier = who.tier.as_deref().unwrap_or(default);
        let ip = who.ip.to_canonical();
        let (device, user_id) = (who.device.as_deref().map(str::as_bytes), who.user.as_deref().map(str::as_bytes));
        let keys = self.keys(ip, |at, source| {
            let (_, value) = keys.iter().find(|(place, _)| usize::from(*place) == at)?;
            match source {
                Source::Claim(name) => Some(self.claimed(issuer().unwrap_or_default(), name, value)),
                _ => Some(self.hash(None, value.as_bytes())),
            }
        });
        Some(Caller {
            ip,
            device: self.hash(Some(ip), device.unwrap_or_default()),
            user,
            tier: self.tiers.iter().position(|known| known == tier)?,
            region: self.settings.region_default,
            trace: Trace { id: 0, brought: false },
            keys,
            access: self.lists.as_ref().map_or(Access::Ordinary, |lists| lists.judge(ip, device, user_id)),
            is_trusted: false,
        })
    }

    fn keys(&self, ip: IpAddr, find: impl Fn(usize, &Source) -> Option<KeyHash>) -> [Option<KeyHash>; KEYS_MAX + 1] {
        let mut keys = [None; KEYS_MAX + 1];
        for ((at, source), key) in self.settings.keys.iter().enumerate().zip(&mut keys) {
            *key = find(at, source);
        }
        keys[usize::from(ADDRESS_KEY)] = Some(self.hash(Some(ip), b""));
        keys
    }

    /// The hash of a claim that was kept of a token.
    fn kept(&self, claims: Option<&[Option<KeyHash>]>, name: &str) -> Option<KeyHash> {
        let at = self.settings.claims.iter().position(|claim| claim == name)?;
        *claims?.get(at)?
    }

    /// Names are apart by their issuer, who alone keeps them apart from each other (RFC 7519 section 4.1.2), and from names in
    /// headers, which another authority gives: `ann` of a token and `ann` of a trusted proxy need not be one.
    fn claimed(&self, issuer: &str, name: &str, value: &str) -> KeyHash {
        let mut hasher = self.hasher.build_hasher();
        for part in ["claim", issuer, name, value] {
            hasher.write_u64(part.len() as u64);
            hasher.write(part.as_bytes());
        }
        KeyHash(hasher.finish())
    }

    /// What of a verified token is worth keeping.
    fn keep(&self, claims: &Claims) -> Facts {
        let issuer = claims.text("iss").unwrap_or_default();
        let hash = |name: &str| Some(self.claimed(&issuer, name, &claims.text(name)?));
        let named = match &self.settings.user {
            Some(Source::Claim(name)) => claims.text(name),
            _ => None,
        };
        let user = match &self.settings.user {
            Some(Source::Claim(name)) => hash(name),
            _ => None,
        };
        let tier = match &self.settings.tier {
            Some(Source::Claim(name)) => claims.text(name),
            _ => None,
        };
        let tier = tier.and_then(|name| self.tiers.iter().position(|tier| *tier == name));
        let listed = match (&self.lists, &named) {
            (Some(lists), Some(named)) => lists.judge_user(named.as_bytes()),
            _ => Access::Ordinary,
        };
        let asked = &self.settings.claims;
        let claims = (!asked.is_empty()).then(|| asked.iter().map(|name| hash(name)).collect());
        Facts { user, tier, listed, claims }
    }

    /// A number for spans and jitter.
    pub fn fresh(&self) -> u64 {
        trace::fresh(&self.random, 0)
    }

    fn trusts(&self, ip: IpAddr) -> bool {
        self.settings.trusted_proxies.iter().any(|network| network.contains(&ip))
    }

    fn client(&self, fields: &Fields) -> Option<IpAddr> {
        self.settings.forwarded_field.client(fields, |ip| self.trusts(ip))
    }

    /// What the peer says of the request before it came here, where that may be believed.
    pub fn heard(&self, caller: &Caller, request: &Request) -> Option<Heard> {
        caller.is_trusted.then(|| self.settings.forwarded_field.heard(&request.fields))
    }

    fn drop_identity(&self, fields: &mut Fields) {
        let names = [&self.settings.user, &self.settings.tier].into_iter().flatten();
        for source in names {
            if let Source::Header(name) = source {
                fields.retain(|field: Field<'_>| !field.name.eq_ignore_ascii_case(name.as_bytes()));
            }
        }
    }

    fn tier(&self, is_user: bool, facts: Option<&Facts>, request: &Request) -> usize {
        let named = match self.settings.tier.as_ref().filter(|_| is_user) {
            Some(Source::Claim(_)) => facts.and_then(|facts| facts.tier),
            source => {
                let asked = source.and_then(|source| read(source, request));
                asked.and_then(|name| self.tiers.iter().position(|tier| tier.as_bytes() == name))
            }
        };
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
        hasher.write(id);
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
        // It has no bytes in the request; see `Facts`.
        Source::Claim(_) => None,
    };
    value.filter(|value| !value.is_empty())
}

fn cookie<'a>(fields: &'a Fields, name: &[u8]) -> Option<&'a [u8]> {
    cookie_pairs(fields).find_map(|pair| cookie_value(pair, name))
}

fn cookie_pairs(fields: &Fields) -> impl Iterator<Item = &[u8]> {
    fields.all(Known::Cookie).flat_map(|line| line.split(|byte| *byte == b';')).map(<[u8]>::trim_ascii)
}

/// The value of a pair with this name.
fn cookie_value<'a>(pair: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (key, value) = pair.split_at(pair.iter().position(|byte| *byte == b'=')?);
    (key == name).then_some(&value[1..])
}
