//! The sections of the document, one file each: keys, types, ranges and defaults.
//!
//! Each section checks its own values. `check` checks constraints between sections, which is why
//! locations are kept with the values.

mod formats;
mod access;
mod bounds;
mod auth;
mod tokens;
mod files;
mod secrets;
mod geoip;
mod identity;
mod kubernetes;
mod limits;
mod cache;
mod draft;
mod listen;
mod redis;
mod route_actions;
mod route_targets;
mod routes;
mod server;
mod spans;
mod upstreams;

pub(super) use draft::{ConfigDraft, RouteReferences};
pub(super) use formats::parse_endpoint;
pub(super) use route_actions::unkeyed_variable;

use std::time::Duration;

use super::model::Config;
use super::table_reader::TableReader;
use crate::accept::ListenConfig;
use crate::identify::TraceSampling;
use crate::limit::LimitConfig;
use crate::route::{RouteConfig, TemplateVariable};

/// Reads the whole document.
pub(super) fn read(root: &TableReader<'_>) -> ConfigDraft {
    server::version(root);
    let (listen, listen_at): (Vec<_>, Vec<_>) = listen::listeners(root).into_iter().unzip();
    let (admin, admin_at) = listen::admin(root);
    let server = server::server(root);
    let (mut http, accept) = listen::limits_http(root);
    http.paths = server.paths;
    let (mut identify, proxy_dependent) = identity::read(root);
    identify.has_principals = root.has_in_any("routes", "auth");
    identify.access = access::read(root, &identify);
    identify.has_fingerprints = listen.iter().any(|listen| listen.tls.is_some());
    let weights = limits::weights(root);
    let mut cache = cache::read(root);
    cache.paths = server.paths;
    let redis = redis::read(root, cache.remote_object_bytes);
    let (rules, rules_at) = limits::rules(root, &weights, &mut identify).into_iter().unzip();
    let dns = upstreams::dns(root);
    let kubernetes = kubernetes::read(root);
    let mut upstreams = upstreams::read(root);
    kubernetes::complete(&kubernetes, &mut upstreams, root);
    let (upstreams, upstreams_at) = upstreams.into_iter().unzip();
    let (mut routes, route_names): (Vec<RouteConfig>, Vec<_>) = routes::read(root).into_iter().unzip();
    if !cache.heuristic {
        let without = routes.iter_mut().zip(&route_names).filter(|(_, names)| !names.has_heuristic);
        without.filter_map(|(route, _)| route.cache.as_mut()).for_each(|policy| policy.heuristic_max = Duration::ZERO);
    }
    let mut edits = routes.iter().filter_map(|route| route.edits.as_deref());
    identify.has_user_names = edits.any(|edits| edits.uses(TemplateVariable::User));
    http.route_body_bytes = routes.iter().filter_map(|route| route.body_bytes).max().unwrap_or(0);
    server::unavailable(root);
    let tracing = spans::read(root);
    identify.trace_sampling = tracing.as_ref().map(|tracing| TraceSampling::new(tracing.ratio));
    ConfigDraft {
        config: Config {
            server,
            listen: if listen.is_empty() { vec![ListenConfig::default()] } else { listen },
            admin,
            http,
            accept,
            identify,
            limit: LimitConfig { weights, rules, nodes: redis.nodes },
            remote: redis.remote,
            cache,
            dns,
            kubernetes: kubernetes.config,
            upstreams,
            pages: routes::pages(root),
            routes,
            log: server::log(root),
            tracing,
            document: None,
            files: Vec::new(),
        },
        listen: listen_at,
        admin: admin_at,
        proxy_dependent,
        identity_user: root.location_of(&["identity", "user"]),
        identity_region: root.location_of(&["identity", "region"]),
        identity_geoip: root.location_of(&["identity", "geoip"]),
        identity_secret: root.location_of(&["identity", "secret"]),
        regions: redis.regions,
        regions_at: redis.at,
        redis_secret: root.location_of(&["redis", "secret"]),
        uri_bytes: root.location_of(&["limits_http", "uri_bytes"]),
        object_bytes: root.location_of(&["cache", "object_bytes"]),
        remote_object_bytes: root.location_of(&["cache", "remote_object_bytes"]),
        zone: root.location_of(&["server", "zone"]),
        tiers: root.location_of(&["tiers"]),
        pages: root.location_of(&["pages"]),
        exempt: root.location_of(&["access", "exempt"]),
        limits: root.location_of(&["limits"]),
        rules: rules_at,
        upstreams: upstreams_at,
        routes: route_names,
    }
}
