//! Why a request to the API server has no usable answer.

use std::error::Error;
use std::time::Duration;

use super::metrics::ApiResult;

/// Bytes of a message of the server that are told.
const MESSAGE_BYTES_MAX: usize = 300;

#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    /// A file or setting of the access cannot be used.
    #[error("{0}")]
    Access(String),
    #[error("the API server is not reachable: {0}")]
    Unreachable(String),
    #[error("the API server has not answered in time")]
    Timeout,
    /// The connection broke inside of the body.
    #[error("the connection to the API server broke: {0}")]
    Broken(String),
    #[error("the watch is silent: the connection to the API server counts as dead")]
    Stalled,
    /// The version, or the place in a list, is not known any more.
    #[error("the version is too old (410)")]
    Gone,
    #[error("the API server does not accept the credentials (401): {0}")]
    Unauthorized(String),
    #[error("not allowed (403): {0}")]
    Forbidden(String),
    #[error("the API server answers with status {status}: {message}")]
    Status { status: u16, message: String, retry_after: Option<Duration> },
    #[error("the answer of the API server is larger than {0} bytes")]
    TooLarge(usize),
    #[error("the answer of the API server is malformed: {0}")]
    Malformed(String),
}

impl ApiError {
    /// The error for a status other than 200.
    pub(super) fn of_status(status: u16, message: &str, retry_after: Option<Duration>) -> Self {
        let message = excerpt(message);
        match status {
            401 => ApiError::Unauthorized(message),
            403 => ApiError::Forbidden(message),
            410 => ApiError::Gone,
            _ => ApiError::Status { status, message, retry_after },
        }
    }

    pub(super) fn result(&self) -> ApiResult {
        match self {
            ApiError::Access(_) => ApiResult::Access,
            ApiError::Unreachable(_) => ApiResult::Unreachable,
            ApiError::Timeout => ApiResult::Timeout,
            ApiError::Broken(_) => ApiResult::Broken,
            ApiError::Stalled => ApiResult::Stalled,
            ApiError::Gone => ApiResult::Gone,
            ApiError::Unauthorized(_) => ApiResult::Unauthorized,
            ApiError::Forbidden(_) => ApiResult::Forbidden,
            ApiError::Status { status: 429, .. } => ApiResult::Throttled,
            ApiError::Status { .. } => ApiResult::Status,
            ApiError::TooLarge(_) => ApiResult::TooLarge,
            ApiError::Malformed(_) => ApiResult::Malformed,
        }
    }

    /// The time that the server asks to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            ApiError::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// The first line of a message of the server, shortened.
fn excerpt(message: &str) -> String {
    let line = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no message");
    let end = line.char_indices().map(|(at, _)| at).take_while(|at| *at <= MESSAGE_BYTES_MAX).last().unwrap_or(0);
    if line.len() > MESSAGE_BYTES_MAX { format!("{}...", &line[..end]) } else { line.to_owned() }
}

/// An error and its causes in one line, without repetitions.
pub(super) fn error_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        cause = error.source();
    }
    excerpt(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_server_are_one_short_line() {
        let long = format!("\n {}\nsecond", "ä".repeat(400));
        let ApiError::Forbidden(message) = ApiError::of_status(403, &long, None) else { panic!("a 403") };
        assert!(message.len() < 310 && message.ends_with("..."), "{message}");
        assert_eq!(excerpt(""), "no message");
        assert!(matches!(ApiError::of_status(410, "", None), ApiError::Gone));
        assert_eq!(ApiError::of_status(429, "", None).result(), ApiResult::Throttled);
    }
}
