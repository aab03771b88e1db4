//! Sources of the addresses of an upstream. Each answers with all addresses that one item of the
//! configuration stands for, and with the time for which they are valid.
//!
//! A source that fails changes nothing: its last answer stays in use. It is asked again after a
//! growing delay, or when it says itself that it has another answer.

mod dns;
pub(crate) mod kubernetes;
mod sources;

use std::future::Future;
use std::time::Duration;

use tokio::time::{sleep, timeout};

pub(crate) use dns::DnsConfig;
pub(crate) use sources::EndpointSources;

use crate::endpoint::{EndpointAddress, EndpointTarget};
use crate::tasks::{self, TaskWait};

/// The shortest time between two lookups: that of the shortest TTL in common use.
const LOOKUP_INTERVAL_MIN: Duration = Duration::from_secs(1);
/// The longest time between two lookups. Some names have a TTL of days, by mistake.
const LOOKUP_INTERVAL_MAX: Duration = Duration::from_secs(3600);
/// Delay after the first failed lookup. Doubled with each further one.
const RETRY_DELAY_MIN: Duration = Duration::from_secs(1);
/// The longest delay after a failed lookup: what a name that is back waits for at most.
const RETRY_DELAY_MAX: Duration = Duration::from_secs(10);
/// Most addresses of one answer of DNS: more than a message over UDP holds, and as many connections
/// as one thread has to open in the worst case.
const TARGETS_MAX: usize = 1024;

/// All addresses of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SourceAnswer {
    pub(crate) targets: Vec<EndpointTarget>,
    /// When to ask again; `None`: never.
    pub(crate) valid_for: Option<Duration>,
}

/// Why a source has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("the name has no addresses")]
    NoRecords,
    #[error("no answer in time")]
    Timeout,
    #[error("not a host name")]
    Name,
    #[error("no name server: {0}")]
    Config(String),
    #[error("{0}")]
    Server(String),
}

/// A source of addresses.
pub(crate) trait EndpointSource {
    /// The event that a lookup waits for.
    fn waits_for(&self) -> TaskWait;

    /// Asks for all current addresses. Cancel safe.
    ///
    /// # Errors
    /// There is no answer now. The previous one stays in use.
    fn lookup(&mut self) -> impl Future<Output = Result<SourceAnswer, LookupError>>;

    /// Waits until the next lookup is due: for `delay`, unless the source learns of changes itself.
    fn wait(&mut self, delay: Duration) -> impl Future<Output = ()> {
        tasks::set_waiting_for(TaskWait::Timer);
        sleep(delay)
    }
}

/// A source whose address is in the configuration.
pub(crate) struct StaticSource(pub(crate) EndpointTarget);

impl StaticSource {
    /// The source of a numeric address.
    pub(crate) fn of(address: &EndpointAddress) -> Option<Self> {
        address.numeric().map(|address| StaticSource(EndpointTarget::at(address)))
    }
}

impl EndpointSource for StaticSource {
    fn waits_for(&self) -> TaskWait {
        TaskWait::Unnamed
    }

    async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
        Ok(SourceAnswer { targets: vec![self.0], valid_for: None })
    }
}

/// Exposes the metrics of the sources.
pub(crate) fn expose() {
    #[cfg(feature = "kubernetes")]
    kubernetes::expose();
}

/// Asks a source whenever its last answer has expired, and passes each result on. Returns when the
/// source will not change any more.
pub(crate) async fn follow<S: EndpointSource>(
    mut source: S,
    limit: Duration,
    mut on_result: impl FnMut(Result<Vec<EndpointTarget>, LookupError>),
) {
    let mut retry_delay = RETRY_DELAY_MIN;
    loop {
        tasks::set_waiting_for(source.waits_for());
        let answer = timeout(limit, source.lookup()).await.unwrap_or(Err(LookupError::Timeout));
        let delay = match answer {
            Ok(SourceAnswer { mut targets, valid_for }) => {
                targets.sort_unstable();
                targets.dedup();
                on_result(Ok(targets));
                retry_delay = RETRY_DELAY_MIN;
                let Some(valid_for) = valid_for else { return };
                valid_for.clamp(LOOKUP_INTERVAL_MIN, LOOKUP_INTERVAL_MAX)
            }
            Err(error) => {
                on_result(Err(error));
                let delay = retry_delay;
                retry_delay = (2 * delay).min(RETRY_DELAY_MAX);
                delay
            }
        };
        source.wait(delay).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    /// Answers from a list, and notes when it was asked.
    struct Listed(Vec<Result<SourceAnswer, LookupError>>, Vec<Duration>, Instant);

    impl EndpointSource for &mut Listed {
        fn waits_for(&self) -> TaskWait {
            TaskWait::NameServer
        }

        async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
            self.1.push(self.2.elapsed());
            self.0.remove(0)
        }
    }

    fn answer(seconds: Option<u64>) -> Result<SourceAnswer, LookupError> {
        let target = EndpointTarget::at(([127, 0, 0, 1], 80).into());
        Ok(SourceAnswer { targets: vec![target, target], valid_for: seconds.map(Duration::from_secs) })
    }

    #[tokio::test(start_paused = true)]
    async fn source_is_asked_when_its_answer_has_expired_and_less_often_while_it_fails() {
        let failed = || Err(LookupError::Timeout);
        let answers = vec![
            answer(Some(0)),
            answer(Some(30)),
            failed(),
            failed(),
            failed(),
            failed(),
            failed(),
            failed(),
            answer(Some(1_000_000)),
            answer(None),
        ];
        let mut source = Listed(answers, Vec::new(), Instant::now());
        let mut results = Vec::new();
        follow(&mut source, RETRY_DELAY_MAX, |result| results.push(result.map(|targets| targets.len()).ok())).await;
        let seconds: Vec<u64> = source.1.iter().map(Duration::as_secs).collect();
        assert_eq!(seconds, [0, 1, 31, 32, 34, 38, 46, 56, 66, 3_666]);
        assert_eq!(results.iter().flatten().collect::<Vec<_>>(), [&1; 4], "equal targets count once");
    }

    #[tokio::test(start_paused = true)]
    async fn source_without_an_answer_fails_after_the_limit() {
        struct Silent;
        impl EndpointSource for Silent {
            fn waits_for(&self) -> TaskWait {
                TaskWait::NameServer
            }

            async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
                std::future::pending().await
            }
        }
        let limit = Duration::from_secs(3);
        let mut failures = 0;
        let followed = follow(Silent, limit, |result| failures += u32::from(result.is_err()));
        // The lookups begin after 0, 4 and 9 seconds.
        assert!(timeout(Duration::from_secs(8), followed).await.is_err());
        assert_eq!(failures, 2);
    }
}
