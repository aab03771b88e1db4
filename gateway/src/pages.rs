//! Pages for the gateway's own error responses, as templates that are compiled when the
//! configuration is loaded.
//!
//! Variables: `status`, `title`, `reason`, `message`, `language` (of `message`: `en` or `zh`),
//! `retry_after` (seconds; absent without a `Retry-After`), `route`, `request_id`. Values are
//! escaped for HTML.
//! Invariant: a template that fails for sample values is refused when it is loaded, so a request
//! never meets an undefined variable.

use std::sync::Arc;

use bytes::Bytes;
use http::StatusCode;
use minijinja::{Environment, UndefinedBehavior, context};

use crate::cache::StatusPattern;

/// Most bytes of a rendered page, against loops in a template.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// The facts of one response that a page may show.
pub(crate) struct PageFacts<'a> {
    pub(crate) status: StatusCode,
    /// The fixed word of the failure, as in the problem document.
    pub(crate) reason: &'a str,
    /// A sentence for readers.
    pub(crate) message: &'a str,
    /// Tag of the language of `message`, which `Accept-Language` prefers.
    pub(crate) language: &'a str,
    pub(crate) retry_after: Option<u64>,
    pub(crate) route: &'a str,
    /// Empty where requests have no id.
    pub(crate) request_id: &'a str,
}

/// The page of one status or class of statuses.
#[derive(Clone)]
pub(crate) struct ErrorPage {
    source: String,
    environment: Arc<Environment<'static>>,
}

/// The pages of a route, or of the gateway; single statuses come first.
pub(crate) type ErrorPages = Vec<(StatusPattern, ErrorPage)>;

/// The page for `status`: the first that matches.
pub(crate) fn find(pages: &[(StatusPattern, ErrorPage)], status: StatusCode) -> Option<&ErrorPage> {
    pages.iter().find(|(statuses, _)| statuses.matches(status.as_u16())).map(|(_, page)| page)
}

impl std::fmt::Debug for ErrorPage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ErrorPage({} bytes)", self.source.len())
    }
}

impl PartialEq for ErrorPage {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl ErrorPage {
    const NAME: &'static str = "page.html";

    /// Compiles a template.
    ///
    /// # Errors
    /// The fault with its line: of the syntax, or of a variable that does not exist.
    pub(crate) fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let explain = |error: &minijinja::Error| {
            let place = error.line().map(|line| format!("line {line}: ")).unwrap_or_default();
            format!("{place}{}", error.detail().map_or_else(|| error.kind().to_string(), str::to_owned))
        };
        environment.add_template_owned(Self::NAME, source.to_owned()).map_err(|error| explain(&error))?;
        let page = ErrorPage { source: source.to_owned(), environment: Arc::new(environment) };
        // A template may distinguish between responses with and without a time.
        for retry_after in [None, Some(5)] {
            let sample = PageFacts {
                status: StatusCode::SERVICE_UNAVAILABLE,
                reason: "timeout",
                message: "A sentence.",
                language: "en",
                retry_after,
                route: "route",
                request_id: "0123456789abcdef",
            };
            let text = page.try_render(&sample).map_err(|error| explain(&error))?;
            if text.len() > PAGE_BYTES_MAX {
                return Err(format!("the page has more than {PAGE_BYTES_MAX} bytes"));
            }
        }
        Ok(page)
    }

    /// The page for a response; `None` if the template fails, which it did not for other values.
    pub(crate) fn render(&self, facts: &PageFacts<'_>) -> Option<Bytes> {
        self.try_render(facts)
            .inspect_err(|error| tracing::error!(%error, "a page could not be rendered"))
            .ok()
            .map(Bytes::from)
    }

    fn try_render(&self, facts: &PageFacts<'_>) -> Result<String, minijinja::Error> {
        let PageFacts { status, reason, message, language, retry_after, route, request_id } = *facts;
        let title = status.canonical_reason().unwrap_or("Error");
        let status = status.as_u16();
        self.environment.get_template(Self::NAME)?.render(context! {
            status, title, reason, message, language, retry_after, route, request_id
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(retry_after: Option<u64>) -> PageFacts<'static> {
        PageFacts {
            status: StatusCode::TOO_MANY_REQUESTS,
            reason: "limited",
            message: "Wait.",
            language: "en",
            retry_after,
            route: "<a>",
            request_id: "abc",
        }
    }

    #[test]
    fn values_are_escaped_and_optional_ones_may_be_tested() {
        let page = ErrorPage::compile(
            "{{ status }} {{ title }} {{ route }} {{ request_id }}{% if retry_after %} again in {{ retry_after }} s{% endif %}",
        )
        .expect("a template");
        let text = |retry_after| page.render(&facts(retry_after)).expect("rendered");
        assert_eq!(text(Some(7)), "429 Too Many Requests &lt;a&gt; abc again in 7 s");
        assert_eq!(text(None), "429 Too Many Requests &lt;a&gt; abc");
    }

    #[test]
    fn faults_have_their_line() {
        for (source, expected) in [
            ("a\n{{ staus }}", "line 2"),
            ("{% if %}", "line 1"),
            ("\n\n{{ status", "line 3"),
            ("{% endfor %}", "line 1"),
        ] {
            let error = ErrorPage::compile(source).expect_err("a fault");
            assert!(error.starts_with(expected), "{source:?}: {error}");
        }
    }
}
