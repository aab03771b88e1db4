//! The files of the dashboard, compiled in.
//!
//! Invariant: a page loads nothing from another origin, and no text of a peer is markup
//! (`CONTENT_POLICY` forbids both).

use crate::http::message::StatusCode;
use crate::simple_server::SimpleResponse;

/// Scripts and styles come from the files below alone, connections go to this origin alone, and no
/// page may frame the dashboard.
const CONTENT_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; \
                              connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                              require-trusted-types-for 'script'";

const SCRIPT: &str = "text/javascript; charset=utf-8";

/// Path, content type and text of each file.
const FILES: [(&str, &str, &str); 13] = [
    ("/", "text/html; charset=utf-8", include_str!("ui/index.html")),
    ("/ui/style.css", "text/css; charset=utf-8", include_str!("ui/style.css")),
    ("/ui/icon.svg", "image/svg+xml", include_str!("ui/icon.svg")),
    ("/ui/main.js", SCRIPT, include_str!("ui/main.js")),
    ("/ui/stream.js", SCRIPT, include_str!("ui/stream.js")),
    ("/ui/dom.js", SCRIPT, include_str!("ui/dom.js")),
    ("/ui/format.js", SCRIPT, include_str!("ui/format.js")),
    ("/ui/tables.js", SCRIPT, include_str!("ui/tables.js")),
    ("/ui/breakers.js", SCRIPT, include_str!("ui/breakers.js")),
    ("/ui/charts.js", SCRIPT, include_str!("ui/charts.js")),
    ("/ui/overview.js", SCRIPT, include_str!("ui/overview.js")),
    ("/ui/tools.js", SCRIPT, include_str!("ui/tools.js")),
    ("/ui/log.js", SCRIPT, include_str!("ui/log.js")),
];

/// The file at `path`.
pub(super) fn file(path: &str) -> Option<SimpleResponse> {
    let (_, content_type, text) = FILES.iter().find(|(known, _, _)| *known == path)?;
    let response = SimpleResponse::new(StatusCode::OK, content_type, *text);
    Some(response.with_named("content-security-policy", CONTENT_POLICY).with_named("referrer-policy", "no-referrer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_refer_to_each_other_only() {
        for (path, _, text) in FILES {
            let text = text.replace("http://www.w3.org/2000/svg", "").replace("placeholder=\"https://", "");
            for other in ["http://", "https://", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write"] {
                assert!(!text.contains(other), "{path} has {other}");
            }
            for reference in text.split("from \"./").skip(1).filter_map(|rest| rest.split('"').next()) {
                assert!(file(&format!("/ui/{reference}")).is_some(), "{path} imports {reference}");
            }
        }
        assert!(file("/ui/").is_none() && file("/ui/../ui/main.js").is_none());
    }
}
