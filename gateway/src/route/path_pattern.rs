//! The paths that a route matches.

use std::borrow::Cow;

use crate::http::target;

/// The paths that a route matches, in the form of `target::matched_path`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum PathPattern {
    /// Exactly this path.
    Exact(String),
    /// `/orders/*`: `/orders/` and everything below it. Stored as `/orders/`. `/*` matches every
    /// path.
    Prefix(String),
}

impl PathPattern {
    pub(crate) fn matches(&self, path: &str) -> bool {
        match self {
            PathPattern::Exact(exact) => exact == path,
            // `OPTIONS *` has no path: only the route for `/*` matches it.
            PathPattern::Prefix(prefix) => prefix == "/" || path.starts_with(prefix.as_str()),
        }
    }

    /// The pattern as the configuration writes it.
    pub(crate) fn pattern(&self) -> String {
        match self {
            PathPattern::Exact(path) => path.clone(),
            PathPattern::Prefix(prefix) => format!("{prefix}*"),
        }
    }

    /// The part of a matching path that stands for the `*`. Without parameters of segments, if the
    /// beginning has some: `/v1;a/x` has the rest `x` of `/v1/*`.
    pub(crate) fn rest<'p>(&self, path: &'p str) -> Cow<'p, str> {
        let PathPattern::Prefix(prefix) = self else { return Cow::Borrowed("") };
        match path.strip_prefix(prefix.as_str()) {
            Some(rest) => Cow::Borrowed(rest),
            None => {
                let matched = target::matched_path(path);
                Cow::Owned(matched.strip_prefix(prefix.as_str()).unwrap_or_default().to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_matches_whole_segments() {
        let orders = PathPattern::Prefix("/orders/".into());
        assert!(orders.matches("/orders/") && orders.matches("/orders/1"));
        assert!(!orders.matches("/orders-old") && !orders.matches("/"));
        assert!(PathPattern::Prefix("/".into()).matches("*"));
    }

    #[test]
    fn rest_is_that_of_the_path_which_was_matched() {
        let v1 = PathPattern::Prefix("/v1/".into());
        assert_eq!(v1.rest("/v1/a/b"), "a/b");
        assert_eq!(v1.rest("/v1;s=1/secret"), "secret");
        assert_eq!(PathPattern::Exact("/v1".into()).rest("/v1"), "");
    }
}
