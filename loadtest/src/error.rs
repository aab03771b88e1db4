//! Errors that end a command of `loadtest`. Messages say what to do next.

use std::io;

/// Result of a step whose failure ends the command.
pub(crate) type Result<T> = std::result::Result<T, LoadtestError>;

/// Failure that ends a command; its text is the message that is printed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadtestError {
    #[error("missing: {tools}; on Debian: apt-get install {packages}")]
    Missing { tools: String, packages: String },
    #[error("no tidegate at {path}: run cargo build --release -p gateway, or pass --tidegate PATH")]
    NoTidegate { path: String },
    #[error("two cores are needed, but only one is available: servers run on core 0, load and origin on core 1")]
    OneCore,
    #[error("{action}: {source}")]
    Io { action: String, source: io::Error },
    #[error("{name} is not ready; end of its log:\n{log}")]
    NotReady { name: String, log: String },
    #[error("wrong response of {peer} at {target}: {difference}")]
    WrongResponse { peer: String, target: String, difference: String },
    #[error("the load generator failed: {0}")]
    Load(String),
    #[error("unexpected text in {file}: {text}")]
    Unexpected { file: String, text: String },
    #[error("cannot extend {path}: {source}; remove the file or pass another --write")]
    Record { path: String, source: serde_json::Error },
    /// An option whose value makes no sense.
    #[error("{0}")]
    Usage(String),
    #[error("interrupted")]
    Interrupted,
}

impl LoadtestError {
    /// For `map_err` on I/O errors; `action` is the message before the error.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> LoadtestError {
        let action = action.into();
        move |source| LoadtestError::Io { action, source }
    }
}
