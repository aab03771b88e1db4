//! Text with variables of a request, such as `https://{host}{uri}`: parsed at the start, rendered
//! for each request.
//!
//! Invariant: a rendered text holds no control character, whatever a client sends.

use std::borrow::Cow;
use std::net::IpAddr;

use super::path_pattern::PathPattern;
use crate::cache::key;
use crate::http::message::Request;
use crate::http::text;
use crate::identify::RequestId;

/// A variable of a template.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TemplateVariable {
    Scheme,
    /// Without its port.
    Host,
    /// Host and port.
    Authority,
    /// Path and query.
    Uri,
    Path,
    /// Without its question mark.
    Query,
    /// The part of the path that the `*` of the route matched.
    Rest,
    ClientIp,
    Region,
    Tier,
    /// Name of the user; empty for an anonymous caller.
    User,
    /// Empty where requests have no id.
    RequestId,
}

impl TemplateVariable {
    /// Every variable by its name.
    pub(crate) const ALL: [(&str, TemplateVariable); 12] = [
        ("scheme", TemplateVariable::Scheme),
        ("host", TemplateVariable::Host),
        ("authority", TemplateVariable::Authority),
        ("uri", TemplateVariable::Uri),
        ("path", TemplateVariable::Path),
        ("query", TemplateVariable::Query),
        ("rest", TemplateVariable::Rest),
        ("client_ip", TemplateVariable::ClientIp),
        ("region", TemplateVariable::Region),
        ("tier", TemplateVariable::Tier),
        ("user", TemplateVariable::User),
        ("request_id", TemplateVariable::RequestId),
    ];

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, variable)| *variable == self).map_or("", |(name, _)| name)
    }
}

/// A piece of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TemplatePart {
    Text(String),
    Variable(TemplateVariable),
    /// `?{query}`: nothing where the request has no query.
    QuestionMarkAndQuery,
}

/// A parsed text with variables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Template(Vec<TemplatePart>);

/// Why a text is not a template.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TemplateError {
    #[error("`{{` without `}}`; write `{{{{` for a brace")]
    Unclosed,
    #[error("`}}` without `{{`; write `}}}}` for a brace")]
    Unopened,
    #[error("unknown variable `{{{0}}}`")]
    UnknownVariable(String),
    #[error("control characters are not allowed")]
    ControlCharacter,
}

/// The values of the variables for one request.
pub(crate) struct TemplateValues<'a> {
    pub(crate) request: &'a Request,
    pub(crate) client_ip: IpAddr,
    pub(crate) region: &'a str,
    /// Name of the user class.
    pub(crate) tier: &'a str,
    pub(crate) user: &'a str,
    pub(crate) request_id: Option<&'a RequestId>,
    /// The path that the route matches.
    pub(crate) path: Option<&'a PathPattern>,
}

impl Template {
    /// Parses `text`. `{{` and `}}` are braces.
    ///
    /// # Errors
    /// The first fault.
    pub(crate) fn parse(text: &str) -> Result<Self, TemplateError> {
        if text.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(TemplateError::ControlCharacter);
        }
        let mut parts = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            plain.push_str(&rest[..at]);
            let (brace, after) = (rest.as_bytes()[at], &rest[at + 1..]);
            if let Some(after) = after.strip_prefix(char::from(brace)) {
                plain.push(char::from(brace));
                rest = after;
                continue;
            }
            if brace == b'}' {
                return Err(TemplateError::Unopened);
            }
            let (name, after) = after.split_once('}').ok_or(TemplateError::Unclosed)?;
            let known = TemplateVariable::ALL.iter().find(|(known, _)| *known == name);
            let (_, variable) = known.ok_or_else(|| TemplateError::UnknownVariable(name.to_owned()))?;
            let has_mark = *variable == TemplateVariable::Query && plain.ends_with('?');
            if has_mark {
                plain.pop();
            }
            if !plain.is_empty() {
                parts.push(TemplatePart::Text(std::mem::take(&mut plain)));
            }
            parts.push(if has_mark { TemplatePart::QuestionMarkAndQuery } else { TemplatePart::Variable(*variable) });
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(TemplatePart::Text(plain));
        }
        Ok(Template(parts))
    }

    /// The text as it was written.
    pub(crate) fn source(&self) -> String {
        let part = |part: &TemplatePart| match part {
            TemplatePart::Text(text) => text.replace('{', "{{").replace('}', "}}"),
            TemplatePart::Variable(variable) => format!("{{{}}}", variable.name()),
            TemplatePart::QuestionMarkAndQuery => "?{query}".to_owned(),
        };
        self.0.iter().map(part).collect()
    }

    /// Whether the text contains `variable`.
    pub(crate) fn uses(&self, variable: TemplateVariable) -> bool {
        self.0.contains(&TemplatePart::Variable(variable))
            || variable == TemplateVariable::Query && self.0.contains(&TemplatePart::QuestionMarkAndQuery)
    }

    pub(crate) fn render(&self, values: &TemplateValues<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        for part in &self.0 {
            match part {
                TemplatePart::Text(text) => out.extend_from_slice(text.as_bytes()),
                TemplatePart::Variable(variable) => values.push(*variable, &mut out),
                TemplatePart::QuestionMarkAndQuery => {
                    if values.request.query().is_some_and(|query| !query.is_empty()) {
                        out.push(b'?');
                        values.push(TemplateVariable::Query, &mut out);
                    }
                }
            }
        }
        out
    }
}

impl TemplateValues<'_> {
    fn push(&self, variable: TemplateVariable, out: &mut Vec<u8>) {
        let request = self.request;
        match variable {
            TemplateVariable::Scheme => out.extend_from_slice(key::scheme(request).as_str().as_bytes()),
            TemplateVariable::Host => push_clean(without_port(&key::public_authority(request)), out),
            TemplateVariable::Authority => push_clean(&key::public_authority(request), out),
            TemplateVariable::Uri => push_clean(&request.target, out),
            TemplateVariable::Path => push_clean(request.path(), out),
            TemplateVariable::Query => push_clean(request.query().unwrap_or_default(), out),
            TemplateVariable::Rest => {
                push_clean(&self.path.map_or(Cow::Borrowed(""), |path| path.rest(request.path())), out);
            }
            TemplateVariable::ClientIp => text::push_ip(out, self.client_ip),
            TemplateVariable::Region => push_clean(self.region, out),
            TemplateVariable::Tier => push_clean(self.tier, out),
            TemplateVariable::User => push_clean(self.user, out),
            TemplateVariable::RequestId => {
                if let Some(id) = self.request_id {
                    id.push(out);
                }
            }
        }
    }
}

fn without_port(authority: &str) -> &str {
    match authority.rfind(':') {
        Some(colon) if !authority[colon..].contains(']') => &authority[..colon],
        _ => authority,
    }
}

/// Appends `value` with control characters in percent-encoding.
fn push_clean(value: &str, out: &mut Vec<u8>) {
    for byte in value.bytes() {
        if byte.is_ascii_control() {
            out.extend_from_slice(format!("%{byte:02X}").as_bytes());
        } else {
            out.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::message::{Scheme, TrustedForwarding};

    fn rendered(text: &str, request: &Request) -> String {
        let values = TemplateValues {
            request,
            client_ip: IpAddr::from([10, 0, 0, 7]),
            region: "north",
            tier: "go\nld",
            user: "a\rb",
            request_id: None,
            path: Some(&PathPattern::Prefix("/v1/".into())),
        };
        String::from_utf8(Template::parse(text).expect("a template").render(&values)).expect("ASCII")
    }

    #[test]
    fn variables_are_those_of_the_request_and_its_caller() {
        let mut request = Request { authority: "shop.example:8080".into(), ..Request::default() };
        request.set_target("/v1/a/b?c=d");
        assert_eq!(rendered("https://{host}{uri}", &request), "https://shop.example/v1/a/b?c=d");
        assert_eq!(rendered("{scheme} {authority} {path} {query}", &request), "http shop.example:8080 /v1/a/b c=d");
        assert_eq!(rendered("/api/{rest}", &request), "/api/a/b");
        assert_eq!(
            rendered("{client_ip} {region} {tier} {user}{request_id}", &request),
            "10.0.0.7 north go%0Ald a%0Db"
        );
        assert_eq!(rendered("{{{rest}}} {{}}", &request), "{a/b} {}");
    }

    #[test]
    fn question_mark_before_an_absent_query_is_left_out() {
        for (target, texts) in [
            ("/a?b=c", ["/new?b=c", "/new?b=c&d", "/new?x=b=c", "?b=c"]),
            ("/a", ["/new", "/new&d", "/new?x=", ""]),
            ("/a?", ["/new", "/new&d", "/new?x=", ""]),
        ] {
            let mut request = Request::default();
            request.set_target(target);
            let templates = ["/new?{query}", "/new?{query}&d", "/new?x={query}", "?{query}"];
            assert_eq!(templates.map(|text| rendered(text, &request)), texts, "{target}");
        }
        assert!(Template::parse("?{query}").is_ok_and(|template| template.uses(TemplateVariable::Query)));
    }

    #[test]
    fn scheme_and_host_are_those_that_a_trusted_proxy_reports() {
        let forwarded = TrustedForwarding {
            forwarded_for: String::new(),
            proto: Some(b"https".to_vec()),
            host: Some(b"Shop.Example:443".to_vec()),
        };
        let request = Request {
            authority: "inside".into(),
            scheme: Scheme::Http,
            forwarded: Some(Box::new(forwarded)),
            ..Request::default()
        };
        assert_eq!(rendered("{scheme}://{host} {authority}", &request), "https://shop.example shop.example");
    }

    #[test]
    fn address_of_version_6_is_a_host() {
        let request = Request { authority: "[::1]:80".into(), ..Request::default() };
        assert_eq!(rendered("{host}", &request), "[::1]");
        let request = Request { authority: "[::1]".into(), ..Request::default() };
        assert_eq!(rendered("{host}", &request), "[::1]");
    }

    #[test]
    fn faults_are_named_and_the_source_is_kept() {
        for (text, error) in [
            ("{host", TemplateError::Unclosed),
            ("host}", TemplateError::Unopened),
            ("{hots}", TemplateError::UnknownVariable("hots".into())),
            ("a\r\nb", TemplateError::ControlCharacter),
        ] {
            assert_eq!(Template::parse(text), Err(error), "{text:?}");
        }
        for text in ["", "plain", "https://{host}{uri}", "{{{rest}}}", "/new?{query}", "?{query}?{query}"] {
            assert_eq!(Template::parse(text).map(|template| template.source()).as_deref(), Ok(text));
        }
    }
}
