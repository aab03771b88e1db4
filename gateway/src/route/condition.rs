//! Conditions of a route besides host, path and method.

use crate::cache::key;
use crate::http::message::{Request, Scheme};

/// The value that a header field or a parameter of the query must have.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ValuePattern {
    /// `*`: present, with any value.
    Any,
    Exact(String),
    /// `a*`: a value that begins like this.
    Prefix(String),
}

impl ValuePattern {
    pub(crate) fn matches(&self, value: &[u8]) -> bool {
        match self {
            ValuePattern::Any => true,
            ValuePattern::Exact(exact) => value == exact.as_bytes(),
            ValuePattern::Prefix(prefix) => value.starts_with(prefix.as_bytes()),
        }
    }
}

/// Conditions that a request must fulfil, all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct RouteConditions {
    /// The scheme of the public URL.
    pub(crate) scheme: Option<Scheme>,
    /// Field names in lower case. One line of a field must match.
    pub(crate) headers: Vec<(String, ValuePattern)>,
    /// Names and values of the query, compared as they are written there.
    pub(crate) query: Vec<(String, ValuePattern)>,
}

impl RouteConditions {
    /// The number of conditions.
    pub(crate) fn len(&self) -> usize {
        usize::from(self.scheme.is_some()) + self.headers.len() + self.query.len()
    }

    pub(crate) fn matches(&self, request: &Request) -> bool {
        self.scheme.is_none_or(|scheme| scheme == key::scheme(request))
            && self
                .headers
                .iter()
                .all(|(name, pattern)| request.fields.named(name.as_bytes()).any(|value| pattern.matches(value)))
            && self.query.iter().all(|(name, pattern)| {
                parameters(request).any(|(found, value)| found == name && pattern.matches(value.as_bytes()))
            })
    }
}

/// Names and values of the query's parameters.
fn parameters(request: &Request) -> impl Iterator<Item = (&str, &str)> {
    request
        .query()
        .into_iter()
        .flat_map(|query| query.split('&'))
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}
