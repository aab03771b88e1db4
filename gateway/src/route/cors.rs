//! Cross-origin resource sharing, decided by the gateway (Fetch standard, section 3.3).
//!
//! The gateway is the authority: fields of the origin's response with these names are replaced.
//! Invariant: a response for one origin is never taken for one for another by a cache behind the
//! gateway, because it has `Vary: Origin` unless it is the same for all.

use std::time::Duration;

use crate::http::fields::Fields;
use crate::http::message::{Method, Request, Response, StatusCode};
use crate::http::text;

/// An origin that may read responses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum OriginPattern {
    /// `*`.
    Any,
    /// `https://app.example`, in lower case.
    Exact(String),
    /// `https://*.app.example`: every subdomain, as the text before and after the `*`.
    Subdomains(String, String),
}

impl OriginPattern {
    fn matches(&self, origin: &[u8]) -> bool {
        match self {
            OriginPattern::Any => true,
            OriginPattern::Exact(exact) => origin.eq_ignore_ascii_case(exact.as_bytes()),
            OriginPattern::Subdomains(before, after) => {
                let origin = origin.to_ascii_lowercase();
                let label = origin.strip_prefix(before.as_bytes()).and_then(|rest| rest.strip_suffix(after.as_bytes()));
                label.is_some_and(|label| {
                    let is_of_host = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
                    !label.is_empty() && label.iter().all(is_of_host)
                })
            }
        }
    }
}

/// The permissions of other origins on a route (`routes.cors`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CorsPolicy {
    pub(crate) origins: Vec<OriginPattern>,
    pub(crate) methods: Vec<Method>,
    /// Request fields that a script may send; empty: those that the preflight asks for.
    pub(crate) headers: Vec<String>,
    /// Response fields that a script may read, besides the safelisted ones.
    pub(crate) expose: Vec<String>,
    pub(crate) credentials: bool,
    pub(crate) max_age: Duration,
}

impl CorsPolicy {
    /// Whether a request is a preflight (Fetch standard, section 3.3.2), which the gateway answers.
    pub(crate) fn is_preflight(request: &Request) -> bool {
        request.method == Method::OPTIONS
            && first(&request.fields, b"origin").is_some()
            && first(&request.fields, b"access-control-request-method").is_some()
    }

    /// Writes the response to a preflight. Without permission it has no permission fields, so that
    /// the browser does not send the request.
    pub(crate) fn write_preflight(&self, request: &Request, response: &mut Response) {
        *response = Response::new(StatusCode::NO_CONTENT);
        let fields = &mut response.fields;
        fields.push(b"vary", b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers");
        let wanted = first(&request.fields, b"access-control-request-method").unwrap_or_default();
        let is_method_allowed = self.methods.iter().any(|method| method.as_str().as_bytes() == wanted);
        if !is_method_allowed || !self.write_permission(request, fields) {
            return;
        }
        let methods: Vec<&str> = self.methods.iter().map(Method::as_str).collect();
        fields.push(b"access-control-allow-methods", methods.join(", ").as_bytes());
        let asked = first(&request.fields, b"access-control-request-headers");
        if !self.headers.is_empty() {
            fields.push(b"access-control-allow-headers", self.headers.join(", ").as_bytes());
        } else if let Some(asked) = asked.filter(|asked| asked.iter().all(|byte| matches!(byte, b' '..=b'~'))) {
            fields.push(b"access-control-allow-headers", asked);
        }
        let mut age = Vec::new();
        text::push_number(&mut age, self.max_age.as_secs());
        fields.push(b"access-control-max-age", &age);
    }

    /// Adds the permission to the response to a request that is no preflight.
    pub(crate) fn write(&self, request: &Request, fields: &mut Fields) {
        const OWNED: [&[u8]; 3] =
            [b"access-control-allow-origin", b"access-control-allow-credentials", b"access-control-expose-headers"];
        fields.retain(|field| !OWNED.iter().any(|name| field.name.eq_ignore_ascii_case(name)));
        if !self.is_same_for_all() {
            fields.push(b"vary", b"Origin");
        }
        if self.write_permission(request, fields) && !self.expose.is_empty() {
            fields.push(b"access-control-expose-headers", self.expose.join(", ").as_bytes());
        }
    }

    fn is_same_for_all(&self) -> bool {
        !self.credentials && self.origins.contains(&OriginPattern::Any)
    }

    /// Allows the origin of `request` to read the response, if it may.
    fn write_permission(&self, request: &Request, fields: &mut Fields) -> bool {
        let Some(origin) = first(&request.fields, b"origin") else { return false };
        if !self.origins.iter().any(|pattern| pattern.matches(origin)) {
            return false;
        }
        fields.push(b"access-control-allow-origin", if self.is_same_for_all() { b"*" } else { origin });
        if self.credentials {
            fields.push(b"access-control-allow-credentials", b"true");
        }
        true
    }
}

fn first<'f>(fields: &'f Fields, name: &'static [u8]) -> Option<&'f [u8]> {
    fields.named(name).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subdomains_are_whole_labels_of_the_same_scheme() {
        let pattern = OriginPattern::Subdomains("https://".into(), ".app.example".into());
        for origin in ["https://a.app.example", "https://A.b.APP.example"] {
            assert!(pattern.matches(origin.as_bytes()), "{origin}");
        }
        for origin in [
            "http://a.app.example",
            "https://app.example",
            "https://.app.example.evil",
            "https://evil/.app.example",
            "https://evil.example#.app.example",
            "https://a@evil.app.example:1",
            "https://evil.example?x.app.example",
            "null",
        ] {
            assert!(!pattern.matches(origin.as_bytes()), "{origin}");
        }
    }
}
