//! Owns the ways a shard can fail to serve, classified once.
//!
//! Refuses to keep a message: what a server says may quote keys or passwords.
//! Invariant: every error of the client, and every error reply, is exactly one of these.

use redis::{ErrorKind, RedisError, ServerError, ServerErrorKind, Value};

/// Why a shard did not serve.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Fault {
    #[error("the shard's breaker is open")]
    Open,
    #[error("what was purged at the shard is not known at the moment")]
    Unwatched,
    #[error("this thread's last attempt to connect failed a moment ago")]
    Resting,
    #[error("the shard cannot be connected to")]
    Connect,
    #[error("no answer within the deadline")]
    Timeout,
    #[error("the connection broke")]
    Io,
    #[error("the answer is not the protocol")]
    Protocol,
    #[error("the server is loading its data, or busy")]
    Loading,
    #[error("the server has lost its master or its cluster")]
    MasterDown,
    #[error("another node of the cluster holds it now")]
    Moved,
    #[error("the server is a read-only replica")]
    ReadOnly,
    #[error("the server is out of memory")]
    OutOfMemory,
    #[error("credentials are missing, wrong or insufficient")]
    Denied,
    #[error("the server refused the command")]
    Refused,
}

impl Fault {
    pub const ALL: [Fault; 14] = [
        Fault::Open,
        Fault::Unwatched,
        Fault::Resting,
        Fault::Connect,
        Fault::Timeout,
        Fault::Io,
        Fault::Protocol,
        Fault::Loading,
        Fault::MasterDown,
        Fault::Moved,
        Fault::ReadOnly,
        Fault::OutOfMemory,
        Fault::Denied,
        Fault::Refused,
    ];

    /// The value of a metric's label.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Open => "open",
            Fault::Unwatched => "unwatched",
            Fault::Resting => "resting",
            Fault::Connect => "connect",
            Fault::Timeout => "timeout",
            Fault::Io => "io",
            Fault::Protocol => "protocol",
            Fault::Loading => "loading",
            Fault::MasterDown => "master_down",
            Fault::Moved => "moved",
            Fault::ReadOnly => "read_only",
            Fault::OutOfMemory => "out_of_memory",
            Fault::Denied => "denied",
            Fault::Refused => "refused",
        }
    }

    /// Whether it says something about the shard. Where nothing was tried it does not, and a refused command is an answer.
    pub(crate) fn is_evidence(self) -> bool {
        self.was_tried() && !matches!(self, Fault::Moved | Fault::Refused)
    }

    /// Whether the shard was asked at all.
    pub(crate) fn was_tried(self) -> bool {
        !matches!(self, Fault::Open | Fault::Unwatched | Fault::Resting)
    }

    /// Whether the connection is of no more use. A replica that refuses writes was the master when its name was resolved.
    pub(crate) fn ends_connection(self) -> bool {
        matches!(self, Fault::Io | Fault::Protocol | Fault::ReadOnly | Fault::Denied)
    }

    /// Whether what was asked for is probably at another address now.
    pub(crate) fn is_elsewhere(self) -> bool {
        matches!(self, Fault::Moved | Fault::ReadOnly | Fault::MasterDown | Fault::Timeout)
    }

    pub(crate) fn of(error: &RedisError) -> Self {
        match error.kind() {
            ErrorKind::Io => Fault::Io,
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => Fault::Protocol,
            ErrorKind::AuthenticationFailed => Fault::Denied,
            ErrorKind::Server(kind) => Self::of_kind(kind),
            _ => Self::of_code(error.code().unwrap_or_default()),
        }
    }

    /// What connecting failed with: whatever the network says there means that nobody answers.
    pub(crate) fn of_connecting(error: &RedisError) -> Self {
        match Self::of(error) {
            Fault::Io | Fault::Refused => Fault::Connect,
            fault => fault,
        }
    }

    /// The fault in a reply, if it is an error.
    pub(crate) fn in_reply(reply: &Value) -> Option<Self> {
        let Value::ServerError(error) = reply else { return None };
        Some(Self::of_reply(error))
    }

    fn of_reply(error: &ServerError) -> Self {
        error.kind().map_or_else(|| Self::of_code(error.code()), Self::of_kind)
    }

    fn of_kind(kind: ServerErrorKind) -> Self {
        match kind {
            ServerErrorKind::BusyLoading => Fault::Loading,
            ServerErrorKind::MasterDown | ServerErrorKind::ClusterDown => Fault::MasterDown,
            ServerErrorKind::ReadOnly => Fault::ReadOnly,
            ServerErrorKind::Moved | ServerErrorKind::Ask => Fault::Moved,
            ServerErrorKind::NoPerm => Fault::Denied,
            _ => Fault::Refused,
        }
    }

    fn of_code(code: &str) -> Self {
        match code {
            "OOM" => Fault::OutOfMemory,
            "NOAUTH" | "WRONGPASS" => Fault::Denied,
            "BUSY" => Fault::Loading,
            _ => Fault::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_servers_answer_is_told_apart() {
        for (reply, fault) in [
            ("LOADING Redis is loading the dataset in memory", Fault::Loading),
            ("BUSY Redis is busy running a script", Fault::Loading),
            ("MASTERDOWN Link with MASTER is down", Fault::MasterDown),
            ("CLUSTERDOWN The cluster is down", Fault::MasterDown),
            ("READONLY You can't write against a read only replica.", Fault::ReadOnly),
            ("OOM command not allowed when used memory > 'maxmemory'.", Fault::OutOfMemory),
            ("NOAUTH Authentication required.", Fault::Denied),
            ("NOPERM this user has no permissions", Fault::Denied),
            ("WRONGTYPE Operation against a key", Fault::Refused),
            ("MOVED 1 10.0.0.1:6379", Fault::Moved),
            ("ASK 1 10.0.0.1:6379", Fault::Moved),
        ] {
            let value = redis::parse_redis_value(format!("-{reply}\r\n").as_bytes()).unwrap();
            assert_eq!(Fault::in_reply(&value), Some(fault), "{reply}");
            assert_eq!(Fault::of(&value.extract_error().unwrap_err()), fault, "{reply}");
        }
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Fault::ALL.len());
    }
}
