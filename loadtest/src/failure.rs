//! Why a command of `loadtest` ends early. Messages tell a person what to do next.

use std::io;

pub(crate) type Result<T> = std::result::Result<T, Failure>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("missing: {tools}; on Debian: apt-get install {packages}")]
    Missing { tools: String, packages: String },
    #[error("there is no tidegate at {path}: cargo build --release -p gateway, or give --tidegate PATH")]
    NoTidegate { path: String },
    #[error("one core is available, and two are needed: servers on core 0, load and origin on core 1")]
    OneCore,
    #[error("{doing}: {source}")]
    Io { doing: String, source: io::Error },
    #[error("{name} is not ready; its log ends:\n{log}")]
    NotReady { name: String, log: String },
    #[error("{peer} is wrong at {target}: {what}")]
    Wrong { peer: String, target: String, what: String },
    #[error("wrk failed: {0}")]
    Load(String),
    #[error("unexpected text in {file}: {text}")]
    Unexpected { file: String, text: String },
    #[error("{path} cannot be added to: {source}; remove it or give another --write")]
    Record { path: String, source: serde_json::Error },
    #[error("interrupted")]
    Interrupted,
}

impl Failure {
    /// For `map_err` on I/O: `doing` is what was tried.
    pub(crate) fn io(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
        let doing = doing.into();
        move |source| Failure::Io { doing, source }
    }
}
