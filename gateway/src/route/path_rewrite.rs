//! The path that a route gives its origin instead of the public one.
//!
//! Route, limits, cache key and purges keep the public path.

use super::template::{Template, TemplateValues};

/// How the path is rewritten. The query stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PathRewrite {
    /// Removes this prefix of whole segments.
    StripPrefix(String),
    /// Replaces the path.
    Replace(Template),
}

impl PathRewrite {
    /// The path for the origin. `matched` is `path` as routes compare it.
    pub(crate) fn path(&self, path: &str, matched: &str, values: &TemplateValues<'_>) -> String {
        match self {
            PathRewrite::StripPrefix(prefix) => {
                let rest = path.strip_prefix(prefix.as_str()).or_else(|| matched.strip_prefix(prefix.as_str()));
                with_slash(rest.unwrap_or(path))
            }
            PathRewrite::Replace(template) => {
                with_slash(&String::from_utf8(template.render(values)).unwrap_or_else(|_| path.to_owned()))
            }
        }
    }
}

/// `path` with one slash at its beginning: with two, an origin could take the first segment for a
/// host.
fn with_slash(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}
