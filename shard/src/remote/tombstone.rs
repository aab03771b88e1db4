//! Owns tombstones: for each removal, a short-lived record in Redis beside the entry, in the same
//! slot, whether or not the entry exists.
//!
//! A delete of an absent key changes nothing at the server, so no node would learn of it, and a
//! fetch that began before the removal could store the old response afterwards. The tombstone
//! closes this gap in two ways. Setting it is a change, which the server reports to all nodes. A
//! store is a script that compares the beginning of its fill with the tombstone, at the server and
//! in one step, so that the order in which the commands of two nodes arrive does not matter.
//!
//! Both times are of the server's clock: the removal is dated when the server executes it, and a
//! fill with a time that the clock had certainly reached when it began
//! (`ServerClock::earliest_ms`). Removals of the storing process itself are compared by their
//! number instead, because its clock is too coarse for a fetch that follows a removal at once. A
//! tombstone therefore also has the time of the last removal by another process.
//!
//! Value: `PROCESS SEQUENCE REMOVED_MS OTHER_REMOVED_MS`, the process in hexadecimal, the others
//! decimal. `SEQUENCE` is the process's own number of the removal; `OTHER_REMOVED_MS` is 0 without
//! a removal by another process.
//!
//! Memory: about 200 bytes for each key that was removed within `TOMBSTONE_LIFETIME`, however
//! often. Refuses stores where a tombstone has a format that it does not know. Invariant: no fill
//! that began before a removal is stored after it, unless the server loses the tombstone.

use super::fault::ShardFault;
use crate::clock::ServerClock;
use crate::entry::{EpochSnapshot, InvalidationEpochs, MAC_RANGE};
use redis::{Pipeline, Value};
use std::time::{Duration, Instant};

/// Longer than a removal can be unknown to a node, and a store that the node sent before that can
/// be on its way. The server reports the removal within `REPORT_MAX`, or the node finds its
/// subscription lost and drops what it fetched before (see `bus`); a store is refused
/// `STORE_VALIDITY` after it was sent. The duration of a fetch is therefore not limited.
pub(crate) const TOMBSTONE_LIFETIME: Duration = Duration::from_secs(30);

/// Two unanswered heartbeats, each with its interval and its timeout, and a second to spare.
const REPORT_MAX: Duration = Duration::from_secs(5);

/// The network, or a server that stands still, can hold back a store for as long as it likes: the
/// sender has given it up, and the kernel still delivers it.
const STORE_VALIDITY: Duration = Duration::from_secs(15);

/// The rest is left to the differences of clocks.
const _: () = assert!(REPORT_MAX.as_secs() + STORE_VALIDITY.as_secs() + 10 <= TOMBSTONE_LIFETIME.as_secs());

/// `MULTI`, `SET`, the check, `EXEC`.
const TRANSACTION_COMMANDS: usize = 4;

/// Longest tombstone that is read: a process of 16 digits and three numbers of at most 20.
pub(crate) const TOMBSTONE_BYTES_MAX: usize = 80;

/// Larger envelopes are stored by a transaction, because the script engine copies its arguments
/// twice: a script costs 3 times as much as `SET` with 16 KiB, and a transaction 1.7 times.
const SCRIPTED_STORE_BYTES_MAX: usize = 4 << 10;

/// Another process's removal that preceded an own one by more is known: its server has reported it,
/// or the subscription has ended.
const REPORTED_AFTER_MS: u64 = 10_000;

/// KEYS: tombstone. ARGV: process, sequence, lifetime in milliseconds.
///
/// `GETRANGE` instead of `GET`, here and below, because it is among the documented permissions.
const REMOVE_SCRIPT: &str = r"
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local process, sequence, removed, other = string.match(redis.call('GETRANGE', KEYS[1], 0, -1), '^(%x+) (%d+) (%d+) (%d+)$')
if not process then
  sequence, other = ARGV[2], '0'
elseif process == ARGV[1] then
  sequence = string.format('%.0f', math.max(tonumber(sequence), tonumber(ARGV[2])))
else
  sequence, other = ARGV[2], removed
end
return redis.pcall('SET', KEYS[1], ARGV[1] .. ' ' .. sequence .. ' ' .. now .. ' ' .. other, 'PX', ARGV[3])
";

/// Lua: whether the store is late, or the tombstone KEYS[2] newer than its fill. ARGV: process,
/// number of deletes that the fill has seen, time at which it began, latest time of execution (0:
/// unlimited). The rule is that of [`Tombstone::is_newer_than`].
macro_rules! is_outdated {
    () => {
        r"
local function is_outdated()
  if ARGV[4] ~= '0' then
    local time = redis.call('TIME')
    if time[1] * 1000 + math.floor(time[2] / 1000) > tonumber(ARGV[4]) then return true end
  end
  local tombstone = redis.call('GETRANGE', KEYS[2], 0, -1)
  if tombstone == '' then return false end
  local process, sequence, removed, other = string.match(tombstone, '^(%x+) (%d+) (%d+) (%d+)$')
  if not process then return true end
  if process == ARGV[1] then
    if tonumber(sequence) > tonumber(ARGV[2]) then return true end
    removed = other
  end
  return removed ~= '0' and tonumber(removed) >= tonumber(ARGV[3])
end
"
    };
}

/// KEYS: entry, tombstone. ARGV: as `is_outdated`, then envelope, time to live in milliseconds, and
/// `NX` to keep an existing entry.
/// Returns 0 if the store is refused.
const STORE_SCRIPT: &str = concat!(
    is_outdated!(),
    r"
if is_outdated() then return 0 end
if ARGV[7] == 'NX' then return redis.pcall('SET', KEYS[1], ARGV[5], 'PX', ARGV[6], 'NX') end
return redis.pcall('SET', KEYS[1], ARGV[5], 'PX', ARGV[6])
"
);

/// KEYS: entry, tombstone. ARGV: as `is_outdated`, then the MAC of the stored envelope. Follows a
/// plain store in the same transaction. Returns 0 if the entry was deleted again. An entry that the
/// store has kept, because it may not replace one, has another MAC and stays.
const CHECK_SCRIPT: &str = concat!(
    is_outdated!(),
    r"
if not is_outdated() then return 1 end
if redis.call('GETRANGE', KEYS[1], 80, 111) ~= ARGV[5] then return 1 end
redis.call('UNLINK', KEYS[1])
return 0
"
);

const _: () = assert!(MAC_RANGE.start == 80 && MAC_RANGE.end == 112, "the range in `CHECK_SCRIPT`");

/// A tombstone as read from a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tombstone {
    process: u64,
    sequence: u64,
    removed_ms: u64,
    /// Last removal by another process than `process`; 0 for none.
    other_removed_ms: u64,
}

/// The beginning of a fill as it is compared with a tombstone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FillBeginning {
    process: u64,
    deletes: u64,
    /// By the server's clock; 0 if that is unknown, so that every removal by another process is
    /// newer.
    began_ms: u64,
}

impl FillBeginning {
    pub(crate) fn new(epochs: &InvalidationEpochs, fill_epoch: EpochSnapshot, clock: &ServerClock) -> Self {
        let began_ms = clock.earliest_ms(fill_epoch.began()).unwrap_or(0);
        Self { process: epochs.process(), deletes: fill_epoch.deletes(), began_ms }
    }
}

impl Tombstone {
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        let mut parts = str::from_utf8(value).ok()?.split(' ');
        let process = u64::from_str_radix(parts.next()?, 16).ok()?;
        let mut number = || parts.next()?.parse().ok();
        let (sequence, removed_ms, other_removed_ms) = (number()?, number()?, number()?);
        parts.next().is_none().then_some(Self { process, sequence, removed_ms, other_removed_ms })
    }

    /// Whether a removal may concern the response of this fill.
    pub(crate) fn is_newer_than(&self, fill: FillBeginning) -> bool {
        if self.process != fill.process {
            return self.removed_ms >= fill.began_ms;
        }
        self.sequence > fill.deletes || (self.other_removed_ms != 0 && self.other_removed_ms >= fill.began_ms)
    }

    /// Whether another process than this one removed the entry, and possibly only this tombstone
    /// reports it.
    pub(crate) fn reports_other_process(&self, process: u64) -> bool {
        let is_recent = self.other_removed_ms.saturating_add(REPORTED_AFTER_MS) > self.removed_ms;
        self.process != process || (self.other_removed_ms != 0 && is_recent)
    }
}

/// Adds the command that sets a tombstone for the removal `sequence` of `process`.
pub(crate) fn add_tombstone(pipeline: &mut Pipeline, tombstone_key: &str, (process, sequence): (u64, u64)) {
    pipeline.cmd("EVAL").arg(REMOVE_SCRIPT).arg(1).arg(tombstone_key);
    pipeline.arg(format!("{process:016x}")).arg(sequence).arg(TOMBSTONE_LIFETIME.as_millis() as u64);
}

/// The latest time by the server's clock at which a store that is sent now may be executed; 0 if
/// the clock is unknown. That of a subscribed shard is known.
pub(crate) fn latest_execution_ms(clock: &ServerClock) -> u64 {
    clock.earliest_ms(Instant::now()).map_or(0, |now| now.saturating_add(STORE_VALIDITY.as_millis() as u64))
}

/// An entry to store unless a tombstone is newer than its fill.
pub(crate) struct GuardedStore<'a> {
    pub(crate) key: &'a str,
    pub(crate) tombstone_key: &'a str,
    pub(crate) envelope: Vec<u8>,
    /// When the entry expires, in milliseconds from now.
    pub(crate) ttl_ms: u64,
    pub(crate) fill: FillBeginning,
    /// By the server's clock; see `latest_execution_ms`.
    pub(crate) latest_ms: u64,
    /// Whether an entry that exists is kept.
    pub(crate) is_retry: bool,
}

/// Adds the commands of a guarded store, a script or a transaction, and returns their number.
pub(crate) fn add_guarded_store(pipeline: &mut Pipeline, store: &GuardedStore<'_>) -> usize {
    let GuardedStore { key, tombstone_key, envelope, ttl_ms, fill, latest_ms, is_retry } = store;
    let is_scripted = envelope.len() <= SCRIPTED_STORE_BYTES_MAX;
    if !is_scripted {
        pipeline.cmd("MULTI");
        pipeline.cmd("SET").arg(*key).arg(&envelope[..]).arg("PX").arg(*ttl_ms);
        if *is_retry {
            pipeline.arg("NX");
        }
    }
    pipeline.cmd("EVAL").arg(if is_scripted { STORE_SCRIPT } else { CHECK_SCRIPT });
    pipeline.arg(2).arg(*key).arg(*tombstone_key);
    pipeline.arg(format!("{:016x}", fill.process)).arg(fill.deletes).arg(fill.began_ms).arg(*latest_ms);
    if is_scripted {
        pipeline.arg(&envelope[..]).arg(*ttl_ms).arg(if *is_retry { "NX" } else { "" });
        return 1;
    }
    pipeline.arg(&envelope[MAC_RANGE]);
    pipeline.cmd("EXEC");
    TRANSACTION_COMMANDS
}

/// Result of a guarded store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreOutcome {
    Stored,
    /// A tombstone is newer than the fill.
    Refused,
    /// A retry found an entry that another node has stored meanwhile.
    Kept,
    Failed(ShardFault),
}

/// The result of a guarded store by the replies to its commands.
pub(crate) fn store_outcome(replies: &[&Value]) -> StoreOutcome {
    // A command that is rejected when it is queued aborts the transaction; its own error comes
    // first.
    if let Some(fault) = replies.iter().find_map(|reply| ShardFault::from_reply(reply)) {
        return StoreOutcome::Failed(fault);
    }
    let results = match replies.last() {
        Some(Value::Array(results)) => results.as_slice(),
        Some(&result) => std::slice::from_ref(result),
        None => return StoreOutcome::Failed(ShardFault::Protocol),
    };
    if let Some(fault) = results.iter().find_map(ShardFault::from_reply) {
        return StoreOutcome::Failed(fault);
    }
    match (results.first(), results.last()) {
        (_, Some(Value::Int(0))) => StoreOutcome::Refused,
        (Some(Value::Nil), _) => StoreOutcome::Kept,
        (Some(_), _) => StoreOutcome::Stored,
        (None, _) => StoreOutcome::Failed(ShardFault::Protocol),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::TestServer;
    use super::*;

    fn tombstone(text: &str) -> Tombstone {
        Tombstone::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn only_complete_tombstones_are_parsed() {
        let expected = Tombstone { process: 0xab, sequence: 7, removed_ms: 1_000, other_removed_ms: 0 };
        assert_eq!(tombstone("00000000000000ab 7 1000 0"), expected);
        for text in ["", "ab 7 1000", "ab 7 1000 0 0", "xy 7 1000 0", "ab 7 -1 0", "ab  7 1000 0"] {
            assert_eq!(Tombstone::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn removal_by_another_process_is_compared_by_time_an_own_one_by_number() {
        let fill = |deletes, began_ms| FillBeginning { process: 1, deletes, began_ms };
        let other = tombstone("2 99 1000 0");
        assert!(other.is_newer_than(fill(0, 1_000)) && !other.is_newer_than(fill(0, 1_001)));
        assert!(other.is_newer_than(fill(99, 0)), "the beginning is unknown");
        let own = tombstone("1 7 5000 0");
        assert!(own.is_newer_than(fill(6, 9_000)) && !own.is_newer_than(fill(7, 1_000)));
        assert!(!own.is_newer_than(fill(7, 0)));
        let both = tombstone("1 7 5000 4000");
        assert!(both.is_newer_than(fill(7, 4_000)) && !both.is_newer_than(fill(7, 4_001)));
    }

    #[test]
    fn replies_of_scripts_and_transactions_are_outcomes() {
        let outcome = |text: &str| {
            let mut parser = redis::Parser::new();
            let mut bytes = text.as_bytes();
            // The parser reads ahead: it has the rest of the text after the first reply.
            let replies: Vec<Value> = std::iter::from_fn(|| parser.parse_value(&mut bytes).ok()).collect();
            store_outcome(&replies.iter().collect::<Vec<_>>())
        };
        let queued = "+OK\r\n+QUEUED\r\n+QUEUED\r\n";
        for (replies, expected) in [
            ("+OK\r\n", StoreOutcome::Stored),
            (":0\r\n", StoreOutcome::Refused),
            ("$-1\r\n", StoreOutcome::Kept),
            ("-OOM x\r\n", StoreOutcome::Failed(ShardFault::OutOfMemory)),
            (&format!("{queued}*2\r\n+OK\r\n:1\r\n"), StoreOutcome::Stored),
            (&format!("{queued}*2\r\n+OK\r\n:0\r\n"), StoreOutcome::Refused),
            (&format!("{queued}*2\r\n$-1\r\n:1\r\n"), StoreOutcome::Kept),
            (&format!("{queued}*2\r\n-LOADING x\r\n:1\r\n"), StoreOutcome::Failed(ShardFault::Loading)),
            ("+OK\r\n-MOVED 1 a:1\r\n+QUEUED\r\n-EXECABORT x\r\n", StoreOutcome::Failed(ShardFault::Moved)),
            (&format!("{queued}*0\r\n"), StoreOutcome::Failed(ShardFault::Protocol)),
        ] {
            assert_eq!(outcome(replies), expected, "{replies}");
        }
    }

    #[test]
    fn own_tombstone_reports_the_removal_by_another_process_that_it_replaced() {
        assert!(tombstone("2 1 5000 0").reports_other_process(1));
        assert!(!tombstone("1 1 5000 0").reports_other_process(1));
        assert!(tombstone("1 1 5000 4999").reports_other_process(1));
        assert!(!tombstone("1 1 20000 9000").reports_other_process(1), "it was reported long ago");
    }

    /// Sends a store to a server.
    fn outcome_of(connection: &mut redis::Connection, store: &GuardedStore<'_>) -> StoreOutcome {
        let mut pipeline = Pipeline::new();
        add_guarded_store(&mut pipeline, store);
        let (bytes, count) = (pipeline.get_packed_pipeline(), pipeline.len());
        let replies: Vec<Value> = redis::ConnectionLike::req_packed_commands(connection, &bytes, 0, count).unwrap();
        store_outcome(&replies.iter().collect::<Vec<_>>())
    }

    /// A partition of the network or a server that stands still delays the execution beyond the
    /// tombstone's life.
    #[test]
    fn a_store_that_is_executed_late_is_refused() {
        let server = TestServer::start();
        let mut connection = server.connect();
        let (seconds, micros): (u64, u64) = redis::cmd("TIME").query(&mut connection).unwrap();
        let now_ms = seconds * 1_000 + micros / 1_000;
        let (key, tombstone_key) = ("tg:{default:1}:00", "tg:{default:1}:tombstone:00");
        let fill = FillBeginning { process: 1, deletes: 0, began_ms: now_ms };
        for (envelope_bytes, is_retry) in [(100, false), (100, true), (10_000, false), (10_000, true)] {
            for (latest_ms, expected) in [
                (now_ms - 1, StoreOutcome::Refused),
                (now_ms + 60_000, StoreOutcome::Stored),
                (0, StoreOutcome::Stored),
            ] {
                let () = redis::cmd("DEL").arg(key).query(&mut connection).unwrap();
                let envelope = vec![b'x'; envelope_bytes];
                let store = GuardedStore { key, tombstone_key, envelope, ttl_ms: 60_000, fill, latest_ms, is_retry };
                assert_eq!(outcome_of(&mut connection, &store), expected, "{envelope_bytes} {latest_ms}");
                let exists: bool = redis::cmd("EXISTS").arg(key).query(&mut connection).unwrap();
                assert_eq!(exists, expected == StoreOutcome::Stored);
            }
        }
    }

    #[test]
    fn repeated_store_that_is_outdated_leaves_the_entry_of_another_node() {
        let server = TestServer::start();
        let mut connection = server.connect();
        let (key, tombstone_key) = ("tg:{default:1}:00", "tg:{default:1}:tombstone:00");
        let fill = FillBeginning { process: 1, deletes: 0, began_ms: 1_000 };
        let () = redis::cmd("SET").arg(tombstone_key).arg("2 1 5000 0").query(&mut connection).unwrap();
        for envelope_bytes in [100, 10_000] {
            let newer = vec![b'n'; envelope_bytes];
            let () = redis::cmd("SET").arg(key).arg(&newer).query(&mut connection).unwrap();
            let envelope = vec![b'x'; envelope_bytes];
            let store =
                GuardedStore { key, tombstone_key, envelope, ttl_ms: 60_000, fill, latest_ms: 0, is_retry: true };
            let outcome = outcome_of(&mut connection, &store);
            assert!(matches!(outcome, StoreOutcome::Kept | StoreOutcome::Refused), "{envelope_bytes}: {outcome:?}");
            let found: Vec<u8> = redis::cmd("GET").arg(key).query(&mut connection).unwrap();
            assert!(found == newer, "{envelope_bytes}");
        }
    }
}
