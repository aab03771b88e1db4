//! Presets of response fields that tell browsers to be strict (`routes.security_headers`).
//!
//! A field that the response has already stays as it is: the application knows its own pages.

use crate::http::fields::Fields;
use crate::http::message::Scheme;

/// A preset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SecurityHeaders {
    /// Fields that suit every application.
    Basic,
    /// Fields for applications that load everything from their own origin.
    Strict,
}

/// Names of the software, which are removed.
const REMOVED: [&str; 4] = ["server", "x-powered-by", "x-aspnet-version", "x-aspnetmvc-version"];

const BASIC: [(&str, &str); 3] = [
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "SAMEORIGIN"),
    ("referrer-policy", "strict-origin-when-cross-origin"),
];

/// Inline styles stay allowed: pages of the gateway have them, as have most applications.
const STRICT: [(&str, &str); 7] = [
    ("x-content-type-options", "nosniff"),
    ("x-frame-options", "DENY"),
    ("referrer-policy", "no-referrer"),
    (
        "content-security-policy",
        "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; \
         base-uri 'self'; form-action 'self'; frame-ancestors 'none'",
    ),
    ("cross-origin-opener-policy", "same-origin"),
    ("permissions-policy", "camera=(), geolocation=(), microphone=(), payment=(), usb=()"),
    ("x-permitted-cross-domain-policies", "none"),
];

/// Says that no other site may load the response; not where `cors` permits some to.
const RESOURCE_POLICY: (&str, &str) = ("cross-origin-resource-policy", "same-origin");

impl SecurityHeaders {
    /// Adds the fields of the preset that `fields` lack. `scheme` is that of the client.
    pub(super) fn apply(self, fields: &mut Fields, scheme: Scheme, has_cors: bool) {
        if fields.iter().any(|field| is_removed(field.name)) {
            fields.retain(|field| !is_removed(field.name));
        }
        let (preset, transport) = match self {
            SecurityHeaders::Basic => (&BASIC[..], "max-age=31536000"),
            SecurityHeaders::Strict => (&STRICT[..], "max-age=31536000; includeSubDomains"),
        };
        let resource = (self == SecurityHeaders::Strict && !has_cors).then_some(&RESOURCE_POLICY);
        // Browsers ignore it over plaintext (RFC 6797 section 7.2).
        let transport = (scheme == Scheme::Https).then_some(("strict-transport-security", transport));
        for (name, value) in preset.iter().chain(resource).copied().chain(transport) {
            if fields.named(name.as_bytes()).next().is_none() {
                fields.push(name.as_bytes(), value.as_bytes());
            }
        }
    }
}

fn is_removed(name: &[u8]) -> bool {
    REMOVED.iter().any(|removed| name.eq_ignore_ascii_case(removed.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::fields::tests::fields;

    fn applied(preset: SecurityHeaders, received: &[(&str, &str)], scheme: Scheme, has_cors: bool) -> Vec<String> {
        let mut fields = fields(received);
        preset.apply(&mut fields, scheme, has_cors);
        let line = |name: &[u8], value: &[u8]| [name, b": ", value].concat();
        fields.iter().map(|field| String::from_utf8(line(field.name, field.value)).expect("ASCII")).collect()
    }

    #[test]
    fn fields_of_the_application_stay_and_names_of_software_go() {
        let received = [("Server", "x/1"), ("X-Frame-Options", "ALLOWALL"), ("X-Powered-By", "y"), ("A", "b")];
        let lines = applied(SecurityHeaders::Basic, &received, Scheme::Http, false);
        let expected = [
            "X-Frame-Options: ALLOWALL",
            "A: b",
            "x-content-type-options: nosniff",
            "referrer-policy: strict-origin-when-cross-origin",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn transport_security_needs_tls_and_the_resource_policy_no_cors() {
        let has = |scheme, has_cors, name: &str| {
            applied(SecurityHeaders::Strict, &[], scheme, has_cors).iter().any(|line| line.starts_with(name))
        };
        assert!(has(Scheme::Https, false, "strict-transport-security: max-age=31536000; includeSubDomains"));
        assert!(!has(Scheme::Http, false, "strict-transport-security"));
        assert!(has(Scheme::Http, false, "cross-origin-resource-policy"));
        assert!(!has(Scheme::Http, true, "cross-origin-resource-policy"));
        assert!(has(Scheme::Http, true, "content-security-policy: default-src 'self'"));
    }
}
