//! The part of a request by which consistent hashing selects an endpoint.

use std::net::IpAddr;

use crate::endpoint::hash_of;
use crate::http::message::Request;
use crate::identify::cookie;

/// The part of a request that decides (`[upstreams.X] hash_by`).
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum HashKey {
    /// Host, path and query: each endpoint sees a part of the objects.
    #[default]
    Url,
    /// The address of the client.
    Client,
    /// A field by its name in lower case; the client's address where it is absent.
    Header(String),
    /// A cookie, likewise.
    Cookie(String),
}

impl HashKey {
    pub(super) fn hash(&self, request: &Request, client: IpAddr) -> u64 {
        let value = match self {
            HashKey::Url => {
                return hash_of(request.authority.as_bytes()) ^ hash_of(request.target.as_bytes()).rotate_left(1);
            }
            HashKey::Client => None,
            HashKey::Header(name) => request
                .fields
                .iter()
                .find(|field| field.name.eq_ignore_ascii_case(name.as_bytes()))
                .map(|field| field.value),
            HashKey::Cookie(name) => cookie::find(&request.fields, name.as_bytes()),
        };
        match (value, client) {
            (Some(value), _) => hash_of(value),
            (None, IpAddr::V4(ip)) => hash_of(&ip.octets()),
            (None, IpAddr::V6(ip)) => hash_of(&ip.octets()),
        }
    }
}
