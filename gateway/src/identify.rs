//! Identifies the caller of a request: address, device, user, user class, region and trace.
//!
//! A device is bound to its address and, on a TLS connection of the client itself, to the
//! fingerprint of its TLS stack. The address is the peer's or, behind trusted proxies, the
//! rightmost untrusted address of `X-Forwarded-For` or `Forwarded` (`forwarded`). User and user
//! class come from header fields that only trusted proxies may send, from a verified client
//! certificate, or from a signed token of any sender (`tokens`). Identity fields of untrusted
//! senders are removed. `[access]` is the allow list (exempt from limits) and the deny list
//! (rejected). Invariant: memory does not grow with client input; identifiers become keyed 128-bit
//! hashes (`subject_hasher`).

mod access;
pub(crate) mod cookie;
mod forwarded;
mod geoip;
#[cfg(test)]
#[path = "../tests/support/issuer.rs"]
pub(crate) mod issuer;
pub(crate) mod jwk_set;
mod key_set_fetch;
#[cfg(test)]
#[path = "../tests/support/mmdb.rs"]
pub(crate) mod mmdb;
mod random;
mod remote_key_set;
mod request_id;
mod subject_hasher;
mod token_cache;
pub(crate) mod auth;
#[cfg(test)]
mod tests;
pub mod tokens;
mod trace_parent;
mod b3;
mod trace;
mod untrusted_fields;

pub(crate) use access::{AccessConfig, AccessDecision, AccessEntry};
pub(crate) use forwarded::ForwardedField;
pub(crate) use geoip::{CountryCode, GeoArea, GeoDatabase, GeoIpConfig};

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;
use limiter::KeyHash;
use shard::Region;

use crate::http::fields::{Fields, KnownField, KnownFieldSet};
use crate::http::message::Request;
use crate::peer::ConnectionPeer;
use geoip::GeoPlace;
pub(crate) use key_set_fetch::KeySetUrl;
pub(crate) use remote_key_set::{RemoteKeySet, forget_age};
pub(crate) use request_id::{RequestId, RequestUuid, UuidText};
use subject_hasher::SubjectHasher;
use tokens::{TokenOutcome, TokenVerifier, VerifiedClaims, VerifiedIdentity};
use trace::TracePolicy;
pub use trace::TraceSampling;
pub(crate) use trace::{OutgoingSpan, Trace, TraceSource, write_trace};
use untrusted_fields::UntrustedFields;

/// The part of the request or of its connection from which one identity attribute is read.
#[derive(Clone, Debug, PartialEq)]
pub enum IdentitySource {
    /// `header:NAME`; the name is a valid field name in lower case.
    Header(String),
    /// `cookie:NAME`.
    Cookie(String),
    /// `host:`, the first label of the host.
    Host,
    /// `path:N`, the N-th path segment, counted from 1.
    Path(usize),
    /// Name of a claim of the token that `IdentityConfig::tokens` verifies; with dots, a member of
    /// a claim that is an object.
    Claim(String),
    /// `certificate:subject` or `certificate:san`, a name in the verified client certificate.
    Certificate(CertificateField),
    /// `ja4:`, the fingerprint of the client's TLS stack.
    Ja4,
    /// `geoip:`, the region of the country of the address.
    GeoIpRegion,
    /// `geoip:country`, the country of the address; as a region, its code in lower case.
    GeoIpCountry,
    /// `geoip:continent`, likewise.
    GeoIpContinent,
}

/// The name in a client certificate that identifies its holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateField {
    Subject,
    /// The subject alternative name.
    San,
}

/// Configuration of caller identification (`[identity]`).
#[derive(Clone, Debug, PartialEq)]
pub struct IdentityConfig {
    /// Networks whose `Forwarded`, `X-Forwarded-For` and identity headers are trusted; none by
    /// default.
    pub trusted_proxies: Vec<IpNet>,
    /// Field in which trusted proxies record the client address.
    pub forwarded_field: ForwardedField,
    /// Tried in order. If none is present, the device is the address alone.
    pub device: Vec<IdentitySource>,
    /// The user: a header that is accepted from `trusted_proxies` only, a name in the client's
    /// certificate, or a claim. `None`: every caller is anonymous.
    pub user: Option<IdentitySource>,
    /// The user class (`identity.tier`): a header or a claim, as for `user`. `None`: users are
    /// `standard`.
    pub user_class: Option<IdentitySource>,
    /// Verification of tokens, if the user is a claim.
    pub tokens: Option<tokens::TokenConfig>,
    /// Further claims that limits count by. Other claims are discarded after verification.
    pub claims: Vec<String>,
    /// Tried in order; if none is present, `region_default`.
    pub region: Vec<IdentitySource>,
    /// Region of callers without a configured region; `default` by default.
    pub region_default: Region,
    /// The regions that exist, sorted and without duplicates. Any other name counts as
    /// `region_default`.
    pub regions: Vec<Region>,
    /// Countries of addresses; `None`: no database.
    pub geoip: Option<GeoIpConfig>,
    /// Keys of limits with scope `key`, at most `LIMIT_KEYS_MAX`.
    pub keys: Vec<IdentitySource>,
    pub access: AccessConfig,
    /// Names of request fields that are removed unless a trusted proxy sends them, in lower case.
    pub untrusted_fields: Vec<String>,
    /// Whether a listener terminates TLS: the devices of an address then also differ by TLS stack.
    pub has_fingerprints: bool,
    /// Whether a route authenticates users itself.
    pub has_principals: bool,
    /// The share of new traces that are sampled; `None` without tracing.
    pub trace_sampling: Option<TraceSampling>,
    /// Whether requests have an id, which origin and client receive in `X-Request-Id`.
    pub request_id: bool,
    /// Whether a route writes the name of the user into a field (`{user}`).
    pub has_user_names: bool,
    /// Keys the hashes of subjects (`identity.secret`), the same on all gateways of a fleet. Empty:
    /// a random key of the process.
    pub secret: String,
}

/// Fields in which a proxy reports the request that it received.
const FORWARDING: KnownFieldSet = KnownFieldSet::of(&[
    KnownField::Forwarded,
    KnownField::XForwardedFor,
    KnownField::XForwardedHost,
    KnownField::XForwardedProto,
]);

/// Most distinct keys that limits count by. The bound exists because each is looked up in every
/// request.
pub(crate) const LIMIT_KEYS_MAX: usize = 8;
/// Index of the key in `Caller::keys` that is the address (IPv6: its /64) alone.
pub(crate) const ADDRESS_KEY_INDEX: u8 = 8;

impl Default for IdentityConfig {
    fn default() -> Self {
        IdentityConfig {
            trusted_proxies: Vec::new(),
            forwarded_field: ForwardedField::Either,
            device: Vec::new(),
            user: None,
            user_class: None,
            tokens: None,
            claims: Vec::new(),
            region: Vec::new(),
            region_default: Region::DEFAULT,
            regions: vec![Region::DEFAULT],
            geoip: None,
            keys: Vec::new(),
            access: AccessConfig::default(),
            untrusted_fields: untrusted_fields::default_list().map(str::to_owned).collect(),
            has_fingerprints: false,
            has_principals: false,
            trace_sampling: None,
            request_id: true,
            has_user_names: false,
            secret: String::new(),
        }
    }
}

impl IdentityConfig {
    /// Whether a request can have a user.
    pub(crate) fn has_users(&self) -> bool {
        self.user.is_some() || self.has_principals
    }

    /// Header fields that identify callers.
    pub(crate) fn fields(&self) -> impl Iterator<Item = &str> {
        let sources =
            self.device.iter().chain(&self.user).chain(&self.user_class).chain(&self.region).chain(&self.keys);
        let fields = sources.filter_map(|source| match source {
            IdentitySource::Header(name) => Some(&**name),
            IdentitySource::Cookie(_)
            | IdentitySource::Host
            | IdentitySource::Path(_)
            | IdentitySource::Claim(_)
            | IdentitySource::Certificate(_)
            | IdentitySource::Ja4
            | IdentitySource::GeoIpRegion
            | IdentitySource::GeoIpCountry
            | IdentitySource::GeoIpContinent => None,
        });
        fields.chain(self.tokens.as_ref().and_then(tokens::TokenConfig::field))
    }
}

/// Registers the metrics of this module.
pub(crate) fn expose() {
    auth::expose();
    remote_key_set::expose();
    tokens::expose();
}

/// Identified sender of a request: address, hashes of device, user and limit keys, user class,
/// region, trace and access.
#[derive(Clone, Debug)]
pub struct Caller {
    pub(crate) ip: IpAddr,
    pub(crate) device: KeyHash,
    pub user: Option<KeyHash>,
    /// The name of that user, where a route writes it into a field.
    pub(crate) user_name: Option<Arc<str>>,
    /// Index into the configured user classes.
    pub(crate) user_class: usize,
    pub(crate) region: Region,
    pub(crate) country: Option<CountryCode>,
    pub(crate) trace: Trace,
    /// Keys of limits with scope `key`, in the order of the configuration; the last is the address.
    pub(crate) keys: [Option<KeyHash>; LIMIT_KEYS_MAX + 1],
    pub(crate) access: AccessDecision,
    /// Whether the peer is a trusted proxy.
    pub(crate) is_trusted: bool,
}

/// Caller described by an operator for an explanation of limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallerDescription {
    pub(crate) ip: IpAddr,
    pub(crate) device: Option<String>,
    /// Fingerprint of the TLS stack, as in the access log; `None`: a connection in plaintext.
    pub(crate) fingerprint: Option<String>,
    pub(crate) user: Option<String>,
    /// In place of the user: the holder of a key or the user of a file of `routes.auth`.
    pub(crate) principal: Option<String>,
    /// Issuer of the user's token; `None`: the configured issuer.
    pub(crate) issuer: Option<String>,
    pub(crate) user_class: Option<String>,
    /// Rules with scope `key` and the value of each one's key.
    pub(crate) keys: Vec<(String, String)>,
}

impl Default for CallerDescription {
    fn default() -> Self {
        let ip = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
        let (device, fingerprint, user, principal, issuer, user_class) = (None, None, None, None, None, None);
        CallerDescription { ip, device, fingerprint, user, principal, issuer, user_class, keys: Vec::new() }
    }
}

/// Identifies the caller of each request according to the configuration.
pub struct CallerIdentifier {
    config: IdentityConfig,
    user_classes: Vec<String>,
    tokens: Option<TokenVerifier>,
    hasher: SubjectHasher,
    untrusted: UntrustedFields,
    lists: Option<access::AccessLists>,
    random: foldhash::fast::RandomState,
}

impl CallerIdentifier {
    /// `Caller::user_class` is an index into `user_classes`, which contains `anonymous` and
    /// `standard`.
    pub fn new(config: IdentityConfig, user_classes: Vec<String>) -> Self {
        CallerIdentifier::replacing(None, config, user_classes)
    }

    /// As [`Self::new`], for a reload: keeps the key set that `old` fetched.
    pub(crate) fn replacing(old: Option<&CallerIdentifier>, config: IdentityConfig, user_classes: Vec<String>) -> Self {
        let hasher = SubjectHasher::new(&config.secret);
        let identity = config.user.iter().chain(&config.user_class).filter_map(|source| match source {
            IdentitySource::Header(name) => Some(name),
            _ => None,
        });
        let untrusted = UntrustedFields::new(config.untrusted_fields.iter().chain(identity).map(|name| &**name));
        let lists = access::AccessLists::new(&config.access);
        let tokens = config.tokens.clone().map(|tokens| {
            // Everything that `extract_identity` reads.
            let extraction = (&config.user, config.has_user_names, &config.user_class, &config.claims, &user_classes);
            let extraction = format!("{:?}", (extraction, config.access.users(), &config.secret));
            TokenVerifier::new(tokens, &extraction, old.and_then(|old| old.tokens.as_ref()))
        });
        CallerIdentifier {
            config,
            user_classes,
            tokens,
            hasher,
            untrusted,
            lists,
            random: foldhash::fast::RandomState::default(),
        }
    }

    /// As [`Self::identify_peer`], for a connection of which only the canonical address is known.
    pub fn identify(&self, ip: IpAddr, request: &mut Request) -> Caller {
        self.identify_peer(&ConnectionPeer::from(ip), request)
    }

    /// Identifies the sender of `request`. Removes identity fields that an untrusted peer sent.
    pub(crate) fn identify_peer(&self, peer: &ConnectionPeer, request: &mut Request) -> Caller {
        let is_trusted = self.is_trusted_peer(peer);
        let ip = if is_trusted { self.client_address(&request.fields).unwrap_or(peer.ip) } else { peer.ip };
        if is_trusted {
            request.forwarded = request
                .fields
                .has_any(FORWARDING)
                .then(|| Box::new(self.config.forwarded_field.forwarding(&request.fields)));
        } else {
            request.forwarded = None;
            self.untrusted.remove(&mut request.fields);
        }
        let token_result = self.tokens.as_ref().map_or(Ok(None), |tokens| {
            // Invalid tokens are charged to the address alone, because the client chooses its
            // device id.
            let address = self.hasher.address(ip);
            tokens.verify_request(request, address, |claims| self.extract_identity(claims))
        });
        let rejection = token_result.as_ref().err().copied();
        let verified = token_result.as_ref().ok().and_then(Option::as_ref);
        // TLS stack and certificate of a proxy's connection belong to the proxy.
        let client = (!is_trusted).then_some(peer);
        let header_user = match &self.config.user {
            Some(IdentitySource::Claim(_)) | None => None,
            Some(source) => read_with_peer(source, request, client),
        };
        let user = match &self.config.user {
            Some(IdentitySource::Claim(_)) => verified.and_then(|verified| verified.user),
            _ => header_user.map(|user| self.hasher.value(user)),
        };
        let user_name = self.config.has_user_names.then(|| match &self.config.user {
            Some(IdentitySource::Claim(_)) => verified.and_then(|verified| verified.user_name.clone()),
            _ => header_user.map(|user| String::from_utf8_lossy(user).into()),
        });
        let device = self.config.device.iter().find_map(|source| read(source, request));
        let user_access = verified.map_or(AccessDecision::Unlisted, |verified| verified.access);
        let access = self
            .lists
            .as_ref()
            .map_or(AccessDecision::Unlisted, |lists| lists.classify(ip, device, header_user).and(user_access));
        let access = access.and(self.unverified_access(rejection, access));
        let place = self.place(ip);
        let keys = self.keys(ip, |_, source| match source {
            IdentitySource::GeoIpCountry => Some(self.hasher.value(place.country?.as_str().as_bytes())),
            IdentitySource::GeoIpContinent => Some(self.hasher.value(place.continent?.as_str().as_bytes())),
            IdentitySource::Claim(name) => {
                verified.and_then(|verified| self.claim_hash(verified.claims.as_deref(), name))
            }
            _ => Some(self.hasher.value(read_with_peer(source, request, client)?)),
        });
        let fingerprint = client.and_then(ConnectionPeer::fingerprint).map(|fingerprint| &fingerprint.stable.0[..]);
        let device = self.device(ip, device, fingerprint);
        let (user_class, region) = (self.user_class(user.is_some(), verified, request), self.region(request, &place));
        self.keep_region_fields(region, &mut request.fields);
        Caller {
            ip,
            device,
            user,
            user_name: user_name.flatten(),
            user_class,
            region,
            country: place.country,
            trace: trace::from_fields(&request.fields, TracePolicy { is_trusted, ..self.trace_policy() }),
            keys,
            access,
            is_trusted,
        }
    }

    /// Whether the caller may be reused for a later, identical request of the same peer. False with
    /// tokens: they expire, and each use is counted.
    pub(crate) fn is_cacheable(&self) -> bool {
        self.tokens.is_none()
    }

    /// Makes the principal of a route's authentication the user of a caller, in place of any other
    /// user: its name is one user, whichever route authenticated it. `None`: the class of users
    /// without one.
    pub(crate) fn set_principal(&self, caller: &mut Caller, name: &str, class: Option<&str>) {
        caller.user = Some(self.hasher.value(name.as_bytes()));
        caller.user_name = None;
        let class = class.and_then(|class| self.class_index(class.as_bytes()));
        caller.user_class = class.or_else(|| self.class_index(b"standard")).unwrap_or_default();
        if let Some(lists) = &self.lists {
            caller.access = caller.access.and(lists.classify_user(name.as_bytes()));
        }
    }

    /// Keyed hash of an address (IPv6: of its /64).
    pub(crate) fn address_hash(&self, ip: IpAddr) -> KeyHash {
        self.hasher.address(ip)
    }

    /// Gives a reused caller the trace of its next request: propagated by the client, or new.
    pub(crate) fn renew_trace(&self, caller: &mut Caller, request: &Request) {
        let is_trusted = caller.is_trusted;
        caller.trace = trace::from_fields(&request.fields, TracePolicy { is_trusted, ..self.trace_policy() });
    }

    /// The trace and the id of a request of `peer` that was refused: by its fields, as far as they
    /// are known.
    pub(crate) fn trace_of_refused(&self, fields: &Fields, peer: &ConnectionPeer) -> (Trace, Option<RequestId>) {
        let is_trusted = self.is_trusted_peer(peer);
        let trace = trace::from_fields(fields, TracePolicy { is_trusted, ..self.trace_policy() });
        let received = if is_trusted { RequestId::received(fields) } else { None };
        let id = self.id_in(&trace, received);
        (trace, id)
    }

    /// The policy for peers that are not trusted.
    fn trace_policy(&self) -> TracePolicy<'_> {
        TracePolicy { random: &self.random, sampling: self.config.trace_sampling, is_trusted: false }
    }

    /// The id of a request of `caller`: that of a trusted proxy, or a new one, which is also the id
    /// of a new trace. `None`: requests have no id.
    pub(crate) fn request_id(&self, caller: &Caller, request: &Request) -> Option<RequestId> {
        let received = if caller.is_trusted { RequestId::received(&request.fields) } else { None };
        self.id_in(&caller.trace, received)
    }

    fn id_in(&self, trace: &Trace, received: Option<RequestId>) -> Option<RequestId> {
        if !self.config.request_id {
            return None;
        }
        received.or_else(|| {
            Some(RequestId::Made(match trace {
                Trace { id, source: TraceSource::New, .. } => RequestUuid::from_u128(*id),
                _ => RequestUuid::new(SystemTime::now(), &self.random),
            }))
        })
    }

    /// The id of a request of which nothing is known.
    pub(crate) fn new_request_id(&self) -> Option<RequestId> {
        self.config.request_id.then(|| RequestId::Made(RequestUuid::new(SystemTime::now(), &self.random)))
    }

    /// Access of a caller whose token was not verified because of throttling.
    ///
    /// The origin still receives such a token and may accept it. A client that exhausted the budget
    /// of its address could otherwise evade its own user limits, or reach the origin although its
    /// user is denied; it receives 429. If the budget of all addresses is exhausted (a distributed
    /// flood), users with new tokens are treated as anonymous, unless some users are denied.
    fn unverified_access(&self, rejection: Option<TokenOutcome>, access: AccessDecision) -> AccessDecision {
        let denies_users = || self.lists.as_ref().is_some_and(access::AccessLists::denies_users);
        match rejection {
            // A caller exempt by address or device has no limits to evade.
            Some(TokenOutcome::ClientThrottled) if access != AccessDecision::Exempt || denies_users() => {
                AccessDecision::Unverified
            }
            Some(TokenOutcome::VerificationThrottled | TokenOutcome::KeysUnavailable) if denies_users() => {
                AccessDecision::Unverified
            }
            _ => AccessDecision::Unlisted,
        }
    }

    /// Converts a description into a caller. `keys` are pairs of key index and value. `None` if the
    /// user class does not exist.
    pub(crate) fn caller_from_description(
        &self,
        description: &CallerDescription,
        keys: &[(u8, &str)],
    ) -> Option<Caller> {
        let issuer = || description.issuer.as_deref().or_else(|| self.config.tokens.as_ref()?.issuer.as_deref());
        let user = description.user.as_deref().map(|user| match &self.config.user {
            Some(IdentitySource::Claim(name)) => self.hasher.claim(issuer().unwrap_or_default(), name, user),
            _ => self.hasher.value(user.as_bytes()),
        });
        let principal = description.principal.as_deref();
        let user = principal.map(|name| self.hasher.value(name.as_bytes())).or(user);
        let default = if user.is_some() { "standard" } else { "anonymous" };
        let user_class = description.user_class.as_deref().unwrap_or(default);
        let ip = description.ip.to_canonical();
        let (device, user_id) = (
            description.device.as_deref().map(str::as_bytes),
            principal.or(description.user.as_deref()).map(str::as_bytes),
        );
        let place = self.place(ip);
        let keys = self.keys(ip, |at, source| {
            let given = keys.iter().find(|(index, _)| usize::from(*index) == at).map(|(_, value)| *value);
            let code = |code: Option<CountryCode>| {
                let given = given.map(str::to_ascii_uppercase);
                given.or_else(|| Some(code?.as_str().to_owned())).map(|code| self.hasher.value(code.as_bytes()))
            };
            let value = || given.or_else(|| self.described_value(source, description));
            match source {
                IdentitySource::GeoIpCountry => code(place.country),
                IdentitySource::GeoIpContinent => code(place.continent),
                IdentitySource::Claim(name) => {
                    value().map(|value| self.hasher.claim(issuer().unwrap_or_default(), name, value))
                }
                _ => value().map(|value| self.hasher.value(value.as_bytes())),
            }
        });
        Some(Caller {
            ip,
            device: self.device(ip, device, description.fingerprint.as_deref().map(str::as_bytes)),
            user,
            user_name: None,
            user_class: self.class_index(user_class.as_bytes())?,
            region: self.config.region_default,
            country: place.country,
            trace: Trace::NONE,
            keys,
            access: self.lists.as_ref().map_or(AccessDecision::Unlisted, |lists| lists.classify(ip, device, user_id)),
            is_trusted: false,
        })
    }

    /// The value of a source that a description has under another name: the user and the device are
    /// read from sources, too. One of several sources of the device cannot be told from the others.
    fn described_value<'a>(&self, source: &IdentitySource, description: &'a CallerDescription) -> Option<&'a str> {
        let user = description.user.as_deref().filter(|_| self.config.user.as_ref() == Some(source));
        user.or_else(|| description.device.as_deref().filter(|_| self.config.device == [source.clone()]))
    }

    /// Country and continent of an address; none without a database.
    fn place(&self, ip: IpAddr) -> GeoPlace {
        self.config.geoip.as_ref().map(|geoip| geoip.place(ip)).unwrap_or_default()
    }

    /// The hash of a device: its id, if there is one, bound to address and TLS stack.
    fn device(&self, ip: IpAddr, id: Option<&[u8]>, fingerprint: Option<&[u8]>) -> KeyHash {
        match fingerprint {
            None => self.hasher.device(ip, id.as_slice()),
            // An id is never empty.
            Some(fingerprint) => self.hasher.device(ip, &[id.unwrap_or_default(), fingerprint]),
        }
    }

    fn keys(
        &self,
        ip: IpAddr,
        find: impl Fn(usize, &IdentitySource) -> Option<KeyHash>,
    ) -> [Option<KeyHash>; LIMIT_KEYS_MAX + 1] {
        let mut keys = [None; LIMIT_KEYS_MAX + 1];
        for ((at, source), key) in self.config.keys.iter().enumerate().zip(&mut keys) {
            *key = find(at, source);
        }
        keys[usize::from(ADDRESS_KEY_INDEX)] = Some(self.hasher.address(ip));
        keys
    }

    /// Hash of a configured claim of a verified token.
    fn claim_hash(&self, claims: Option<&[Option<KeyHash>]>, name: &str) -> Option<KeyHash> {
        let at = self.config.claims.iter().position(|claim| claim == name)?;
        *claims?.get(at)?
    }

    /// Extracts the configured attributes of a verified token.
    fn extract_identity(&self, claims: &VerifiedClaims) -> VerifiedIdentity {
        let issuer = claims.text("iss").unwrap_or_default();
        let hash = |name: &str| Some(self.hasher.claim(&issuer, name, &claims.text(name)?));
        let user_id = match &self.config.user {
            Some(IdentitySource::Claim(name)) => claims.text(name),
            _ => None,
        };
        let user = match &self.config.user {
            Some(IdentitySource::Claim(name)) => hash(name),
            _ => None,
        };
        // Of several, the class that `[tiers]` defines last.
        let user_class = match &self.config.user_class {
            Some(IdentitySource::Claim(name)) => {
                claims.texts(name).filter_map(|name| self.class_index(name.as_bytes())).max()
            }
            _ => None,
        };
        let access = match (&self.lists, &user_id) {
            (Some(lists), Some(user_id)) => lists.classify_user(user_id.as_bytes()),
            _ => AccessDecision::Unlisted,
        };
        let names = &self.config.claims;
        let claims = (!names.is_empty()).then(|| names.iter().map(|name| hash(name)).collect());
        let user_name = user_id.filter(|_| self.config.has_user_names).map(|name| name.into());
        VerifiedIdentity { user, user_name, user_class, access, claims }
    }

    /// Random number for span ids and jitter.
    pub(crate) fn random_u64(&self) -> u64 {
        random::random_u64(&self.random, 0)
    }

    /// Whether an address is in `identity.trusted_proxies`.
    fn is_trusted_peer(&self, peer: &ConnectionPeer) -> bool {
        peer.is_known() && self.is_trusted_proxy(peer.ip)
    }

    pub(crate) fn is_trusted_proxy(&self, ip: IpAddr) -> bool {
        self.config.trusted_proxies.iter().any(|network| network.contains(&ip))
    }

    fn client_address(&self, fields: &Fields) -> Option<IpAddr> {
        self.config.forwarded_field.client_address(fields, |ip| self.is_trusted_proxy(ip))
    }

    fn user_class(&self, is_user: bool, verified: Option<&VerifiedIdentity>, request: &Request) -> usize {
        let configured = match self.config.user_class.as_ref().filter(|_| is_user) {
            Some(IdentitySource::Claim(_)) => verified.and_then(|verified| verified.user_class),
            source => source.and_then(|source| read(source, request)).and_then(|name| self.class_index(name)),
        };
        let default = if is_user { "standard" } else { "anonymous" };
        configured.or_else(|| self.class_index(default.as_bytes())).unwrap_or(0)
    }

    fn class_index(&self, name: &[u8]) -> Option<usize> {
        self.user_classes.iter().position(|class| class.as_bytes() == name)
    }

    /// The name of the user class at `index`.
    pub(crate) fn user_class_name(&self, index: usize) -> &str {
        self.user_classes.get(index).map_or("", |name| name)
    }

    /// The key set that has to be fetched, if the keys of tokens have a URL.
    pub(crate) fn remote_key_set(&self) -> Option<&Arc<RemoteKeySet>> {
        self.tokens.as_ref()?.remote_keys()
    }

    /// Removes the fields that name another region than that of the request. The region is part of
    /// the cache key, so that an origin which reads such a field would respond for another key.
    fn keep_region_fields(&self, region: Region, fields: &mut Fields) {
        let names = self.config.region.iter().filter_map(|source| match source {
            IdentitySource::Header(name) => Some(name.as_bytes()),
            _ => None,
        });
        for name in names {
            let (mut lines, mut named) = (0, true);
            for value in fields.named(name) {
                lines += 1;
                named &= value == region.as_str().as_bytes();
            }
            if lines > 1 || !named {
                fields.retain(|field| !field.name.eq_ignore_ascii_case(name));
            }
        }
    }

    /// The regions that exist, in order.
    pub(crate) fn regions(&self) -> &[Region] {
        &self.config.regions
    }

    fn region(&self, request: &Request, place: &GeoPlace) -> Region {
        let is_configured = |region: &Region| self.regions().binary_search(region).is_ok();
        let of_area = |code: Option<CountryCode>| code?.region().filter(is_configured).map(Some);
        let region = self.config.region.iter().find_map(|source| match source {
            // An area without a region leaves it to the next source.
            IdentitySource::GeoIpRegion => self.config.geoip.as_ref()?.region(place).map(Some),
            IdentitySource::GeoIpCountry => of_area(place.country),
            IdentitySource::GeoIpContinent => of_area(place.continent),
            // The first source with a value decides, even if the value names no region.
            source => read(source, request).map(|name| Region::new(std::str::from_utf8(name).ok()?).ok()),
        });
        region.flatten().filter(is_configured).unwrap_or(self.config.region_default)
    }
}

fn read<'a>(source: &'a IdentitySource, request: &'a Request) -> Option<&'a [u8]> {
    let value = match source {
        IdentitySource::Header(name) => request.fields.named(name.as_bytes()).next(),
        IdentitySource::Cookie(name) => cookie::find(&request.fields, name.as_bytes()),
        IdentitySource::Host => request.host().split('.').next().map(str::as_bytes),
        IdentitySource::Path(segment) => request.path().split('/').nth(*segment).map(str::as_bytes),
        // Claims are read from the verified token; see `VerifiedIdentity`.
        IdentitySource::Claim(_) | IdentitySource::Certificate(_) | IdentitySource::Ja4 => None,
        // The country is looked up once for all sources; see `identify_peer`.
        IdentitySource::GeoIpRegion | IdentitySource::GeoIpCountry | IdentitySource::GeoIpContinent => None,
    };
    value.filter(|value| !value.is_empty())
}

/// As `read`, also from the connection of `peer`; `None`: the connection is not the client's own.
fn read_with_peer<'a>(
    source: &'a IdentitySource,
    request: &'a Request,
    peer: Option<&'a ConnectionPeer>,
) -> Option<&'a [u8]> {
    let text = match source {
        IdentitySource::Ja4 => peer?.fingerprint()?.ja4.as_str(),
        IdentitySource::Certificate(CertificateField::Subject) => &peer?.certificate()?.subject,
        IdentitySource::Certificate(CertificateField::San) => &peer?.certificate()?.san,
        _ => return read(source, request),
    };
    (!text.is_empty()).then_some(text.as_bytes())
}
