//! Owns the classification of the ways in which a shard can fail.
//!
//! Refuses to keep a message: a server's message may quote keys or passwords.
//! Invariant: every client error and every error reply maps to exactly one fault.

use redis::{ErrorKind, RedisError, ServerError, ServerErrorKind, Value};

/// Why a shard did not serve a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ShardFault {
    #[error("the shard's breaker is open")]
    Open,
    #[error("the shard's invalidations are not received at the moment")]
    Unsubscribed,
    #[error("this thread's connection is in backoff after a failed attempt to connect")]
    ConnectBackoff,
    #[error("the shard cannot be connected to")]
    Connect,
    #[error("no reply within the deadline")]
    Timeout,
    #[error("the connection broke")]
    Io,
    #[error("the reply violates the protocol")]
    Protocol,
    #[error("the reply is longer than any valid one")]
    ReplyTooLong,
    #[error("the server is loading its data, or busy")]
    Loading,
    #[error("the server has lost its master or its cluster")]
    MasterDown,
    #[error("another node of the cluster holds the key now")]
    Moved,
    #[error("the server is a read-only replica")]
    ReadOnly,
    #[error("the server is out of memory")]
    OutOfMemory,
    #[error("credentials are missing, wrong or insufficient")]
    Denied,
    #[error("the server rejected the command")]
    Refused,
}

impl ShardFault {
    pub const ALL: [ShardFault; 15] = [
        ShardFault::Open,
        ShardFault::Unsubscribed,
        ShardFault::ConnectBackoff,
        ShardFault::Connect,
        ShardFault::Timeout,
        ShardFault::Io,
        ShardFault::Protocol,
        ShardFault::ReplyTooLong,
        ShardFault::Loading,
        ShardFault::MasterDown,
        ShardFault::Moved,
        ShardFault::ReadOnly,
        ShardFault::OutOfMemory,
        ShardFault::Denied,
        ShardFault::Refused,
    ];

    /// Value of the metrics' `result` label.
    pub fn name(self) -> &'static str {
        match self {
            ShardFault::Open => "open",
            ShardFault::Unsubscribed => "unsubscribed",
            ShardFault::ConnectBackoff => "connect_backoff",
            ShardFault::Connect => "connect",
            ShardFault::Timeout => "timeout",
            ShardFault::Io => "io",
            ShardFault::Protocol => "protocol",
            ShardFault::ReplyTooLong => "reply_too_long",
            ShardFault::Loading => "loading",
            ShardFault::MasterDown => "master_down",
            ShardFault::Moved => "moved",
            ShardFault::ReadOnly => "read_only",
            ShardFault::OutOfMemory => "out_of_memory",
            ShardFault::Denied => "denied",
            ShardFault::Refused => "refused",
        }
    }

    /// Whether the breaker counts it. Faults without an attempt do not count, and a rejected
    /// command is a reply.
    pub(crate) fn is_breaker_failure(self) -> bool {
        self.was_attempted() && !matches!(self, ShardFault::Moved | ShardFault::Refused)
    }

    /// Whether a command was sent, or a connection attempted.
    pub(crate) fn was_attempted(self) -> bool {
        !matches!(self, ShardFault::Open | ShardFault::Unsubscribed | ShardFault::ConnectBackoff)
    }

    /// Whether the connection must be replaced. A replica that rejects writes was the master when
    /// its name was resolved.
    pub(crate) fn closes_connection(self) -> bool {
        matches!(
            self,
            ShardFault::Io
                | ShardFault::Protocol
                | ShardFault::ReplyTooLong
                | ShardFault::ReadOnly
                | ShardFault::Denied
        )
    }

    /// Whether the key or the master is probably at another address now.
    pub(crate) fn needs_rediscovery(self) -> bool {
        matches!(self, ShardFault::Moved | ShardFault::ReadOnly | ShardFault::MasterDown | ShardFault::Timeout)
    }

    pub(crate) fn from_error(error: &RedisError) -> Self {
        match error.kind() {
            ErrorKind::Io => ShardFault::Io,
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => ShardFault::Protocol,
            ErrorKind::AuthenticationFailed => ShardFault::Denied,
            ErrorKind::Server(kind) => Self::from_kind(kind),
            _ => Self::from_code(error.code().unwrap_or_default()),
        }
    }

    /// Classifies an error of a connection attempt: every network error means that the server is
    /// unreachable.
    pub(crate) fn from_connect_error(error: &RedisError) -> Self {
        match Self::from_error(error) {
            ShardFault::Io | ShardFault::Refused => ShardFault::Connect,
            fault => fault,
        }
    }

    /// The fault of an error reply; `None` for other replies.
    pub(crate) fn from_reply(reply: &Value) -> Option<Self> {
        let Value::ServerError(error) = reply else { return None };
        Some(Self::from_server_error(error))
    }

    fn from_server_error(error: &ServerError) -> Self {
        error.kind().map_or_else(|| Self::from_code(error.code()), Self::from_kind)
    }

    fn from_kind(kind: ServerErrorKind) -> Self {
        match kind {
            ServerErrorKind::BusyLoading => ShardFault::Loading,
            ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown => ShardFault::MasterDown,
            ServerErrorKind::ReadOnly => ShardFault::ReadOnly,
            ServerErrorKind::Moved | ServerErrorKind::Ask => ShardFault::Moved,
            ServerErrorKind::NoPerm => ShardFault::Denied,
            _ => ShardFault::Refused,
        }
    }

    fn from_code(code: &str) -> Self {
        match code {
            "OOM" => ShardFault::OutOfMemory,
            "NOAUTH" | "WRONGPASS" => ShardFault::Denied,
            "BUSY" => ShardFault::Loading,
            _ => ShardFault::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_replies_map_to_faults() {
        for (reply, fault) in [
            ("LOADING Redis is loading the dataset in memory", ShardFault::Loading),
            ("BUSY Redis is busy running a script", ShardFault::Loading),
            ("MASTERDOWN Link with MASTER is down", ShardFault::MasterDown),
            ("CLUSTERDOWN The cluster is down", ShardFault::MasterDown),
            ("READONLY You can't write against a read only replica.", ShardFault::ReadOnly),
            ("OOM command not allowed when used memory > 'maxmemory'.", ShardFault::OutOfMemory),
            ("NOAUTH Authentication required.", ShardFault::Denied),
            ("NOPERM this user has no permissions", ShardFault::Denied),
            ("WRONGTYPE Operation against a key", ShardFault::Refused),
            ("MOVED 1 10.0.0.1:6379", ShardFault::Moved),
            ("ASK 1 10.0.0.1:6379", ShardFault::Moved),
        ] {
            let value = redis::parse_redis_value(format!("-{reply}\r\n").as_bytes()).unwrap();
            assert_eq!(ShardFault::from_reply(&value), Some(fault), "{reply}");
            assert_eq!(ShardFault::from_error(&value.extract_error().unwrap_err()), fault, "{reply}");
        }
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = ShardFault::ALL.iter().map(|fault| fault.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ShardFault::ALL.len());
    }
}
