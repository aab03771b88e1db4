//! The configuration before `check`: names are not resolved, and locations are kept for faults.

use super::super::fault::DocumentLocation;
use super::super::model::Config;
use super::super::read_context::Located;
use super::auth::NamedClasses;
use crate::endpoint::EndpointAddress;

/// A configuration with unresolved references, and the locations of values that `check` may report.
pub(in crate::config) struct ConfigDraft {
    /// Routes have upstream 0 and no limits until `check` has resolved their references.
    pub(in crate::config) config: Config,
    pub(in crate::config) listen: Vec<DocumentLocation>,
    pub(in crate::config) admin: DocumentLocation,
    /// Identity keys that have effect only with trusted proxies.
    pub(in crate::config) proxy_dependent: Vec<DocumentLocation>,
    pub(in crate::config) identity_user: DocumentLocation,
    pub(in crate::config) identity_region: DocumentLocation,
    pub(in crate::config) identity_geoip: DocumentLocation,
    pub(in crate::config) identity_secret: DocumentLocation,
    pub(in crate::config) regions: Option<Vec<Located<shard::Region>>>,
    pub(in crate::config) regions_at: DocumentLocation,
    pub(in crate::config) redis_secret: DocumentLocation,
    pub(in crate::config) uri_bytes: DocumentLocation,
    pub(in crate::config) object_bytes: DocumentLocation,
    pub(in crate::config) remote_object_bytes: DocumentLocation,
    pub(in crate::config) zone: DocumentLocation,
    pub(in crate::config) tiers: DocumentLocation,
    pub(in crate::config) pages: DocumentLocation,
    pub(in crate::config) exempt: DocumentLocation,
    pub(in crate::config) limits: DocumentLocation,
    pub(in crate::config) rules: Vec<DocumentLocation>,
    pub(in crate::config) upstreams: Vec<DocumentLocation>,
    pub(in crate::config) routes: Vec<RouteReferences>,
}

/// Names of upstream and limits in one route, with their locations, before they are resolved to
/// indexes.
pub(in crate::config) struct RouteReferences {
    pub(in crate::config) name: DocumentLocation,
    pub(in crate::config) matched: DocumentLocation,
    pub(in crate::config) path: DocumentLocation,
    pub(in crate::config) forward_path: DocumentLocation,
    pub(in crate::config) request_headers: DocumentLocation,
    pub(in crate::config) cost: DocumentLocation,
    pub(in crate::config) cost_by_status: DocumentLocation,
    pub(in crate::config) hedge: DocumentLocation,
    pub(in crate::config) redirect: DocumentLocation,
    pub(in crate::config) respond: DocumentLocation,
    pub(in crate::config) pages: DocumentLocation,
    pub(in crate::config) default_ttl: DocumentLocation,
    pub(in crate::config) ttl: DocumentLocation,
    pub(in crate::config) upstream: Option<Located<String>>,
    /// The upstreams of the canary and of the mirror.
    pub(in crate::config) canary: Option<Located<String>>,
    pub(in crate::config) mirror: Option<Located<String>>,
    pub(in crate::config) limits: Vec<Located<String>>,
    pub(in crate::config) key_classes: Option<NamedClasses>,
    /// The endpoint of the verification service.
    pub(in crate::config) service: Option<Located<EndpointAddress>>,
    /// Whether the route decides about heuristic lifetimes.
    pub(in crate::config) has_heuristic: bool,
}
