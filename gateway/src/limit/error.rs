//! Reasons for rejecting an admin query about limits.

/// Reason for rejecting an admin query.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AdminQueryError {
    #[error("unknown parameter `{0}`; known parameters: {1}")]
    UnknownParameter(String, &'static str),
    #[error(
        "give the duration, for=15m (at most 8 days), and the setting to override: mode=enforce, shadow or off, percent=0 to 100"
    )]
    MissingOverride,
    #[error("`{0}` is not {1}")]
    InvalidValue(String, &'static str),
    #[error("give the caller's address, ip=ADDRESS; optional: device=, user=, issuer=, user_class=, key=RULE:VALUE")]
    MissingAddress,
    #[error(transparent)]
    RegistryFull(#[from] shard::OverrideRegistryFull),
    #[error("there is no rule `{0}`")]
    UnknownRule(String),
    #[error("the fleet has no node `{node}`; its nodes: {nodes}")]
    UnknownNode { node: String, nodes: String },
    #[error("rule `{0}` does not count by a key")]
    NotKeyed(String),
}
