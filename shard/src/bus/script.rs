//! Owns the bus's keys on a server and the scripts that change them. Each change is one command, so
//! that it is atomic.
//!
//! ```text
//! tg:{bus}:events   stream: n (number), to (`*` or node), what (see `encode_purge`), from (member)
//! tg:{bus}:tags     sorted set: the last purges, scored by their numbers
//! tg:{bus}:state    hash: last (highest number), floor (highest number of a discarded purge)
//! tg:{bus}:nodes    hash: member -> stream position, milliseconds of its last heartbeat
//! tg:{bus}:notices  hash: override name -> version, until (server clock, milliseconds), text
//! ```
//! Numbers are microseconds of the server's clock and never decrease; a purge has the same number
//! on all servers. The names of keys and fields are a wire format: two releases may run in one
//! fleet.
//!
//! Refuses to keep more than the bounds below; entries older than a discarded purge count as
//! purged.

use crate::entry::TAGS_MAX;

pub(super) const EVENTS_KEY: &str = "tg:{bus}:events";
pub(super) const TAGS_KEY: &str = "tg:{bus}:tags";
pub(super) const STATE_KEY: &str = "tg:{bus}:state";
pub(super) const NODES_KEY: &str = "tg:{bus}:nodes";
pub(super) const OVERRIDES_KEY: &str = "tg:{bus}:notices";

pub(super) const BUS_KEY_PREFIX: &str = "tg:{bus}:";
pub(super) const BUS_HASH_TAG: &str = "bus";

/// Approximate number of events that are kept: a node that missed more reads the tags.
pub(super) const EVENTS_MAX: usize = 10_000;
pub(super) const TAGS_KEPT_MAX: usize = TAGS_MAX;

/// A node without a heartbeat for so long is removed from the fleet.
pub(super) const NODE_EXPIRY_MS: u64 = 600_000;

/// KEYS: events, state, tags. ARGV: number or 0, the publisher's highest number, purge, to, from,
/// most events, most tags.
/// Returns the number and the event ID; the ID is empty if the server already had the purge.
pub(super) const PUBLISH_PURGE: &str = r"
local time = redis.call('TIME')
local last = tonumber(redis.call('HGET', KEYS[2], 'last') or '0')
local n = tonumber(ARGV[1])
if n == 0 then
  n = math.max(time[1] * 1000000 + time[2], last + 1, tonumber(ARGV[2]) + 1)
elseif ARGV[4] == '*' then
  local known = redis.call('ZSCORE', KEYS[3], ARGV[3])
  if known and tonumber(known) >= n then return {string.format('%.0f', n), ''} end
end
local number = string.format('%.0f', n)
if n > last then redis.call('HSET', KEYS[2], 'last', number) end
if ARGV[4] == '*' then
  redis.call('ZADD', KEYS[3], number, ARGV[3])
  while redis.call('ZCARD', KEYS[3]) > tonumber(ARGV[7]) do
    local discarded = redis.call('ZPOPMIN', KEYS[3])
    redis.call('HSET', KEYS[2], 'floor', string.format('%.0f', tonumber(discarded[2])))
  end
end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[6], '*',
  'n', number, 'to', ARGV[4], 'what', ARGV[3], 'from', ARGV[5])
return {number, id}
";

/// KEYS: nodes, state, tags, events. ARGV: member, position, milliseconds after which a member is
/// removed, the highest number that this server is known to have had.
/// Returns `last`. If the server lost its data, every tagged entry older than the known number
/// counts as purged.
pub(super) const HEARTBEAT: &str = r"
local time = redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. string.format('%.0f', ms))
redis.call('TOUCH', KEYS[2], KEYS[3], KEYS[4])
if ms % 60 == 0 then
  local nodes = redis.call('HGETALL', KEYS[1])
  for i = 1, #nodes, 2 do
    local seen = tonumber(string.match(nodes[i + 1], ' (%d+)$') or '0')
    if ms - seen > tonumber(ARGV[3]) then redis.call('HDEL', KEYS[1], nodes[i]) end
  end
end
local last = redis.call('HGET', KEYS[2], 'last') or '0'
if tonumber(last) < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[2], 'last', ARGV[4], 'floor', ARGV[4])
end
return last
";

/// KEYS: nodes. ARGV: pairs of a member and its last heartbeat.
/// Removes the members that have had no other heartbeat since.
pub(super) const REMOVE_ENDED: &str = r"
for i = 1, #ARGV, 2 do
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then redis.call('HDEL', KEYS[1], ARGV[i]) end
end
return ''
";

/// KEYS: events, overrides. ARGV: name, version, text, duration in milliseconds, to, from, `what`,
/// most events, most overrides, longest duration in milliseconds.
/// Returns the event ID, which is empty if the server already had this version or a later one. An
/// override for one node is not stored. An expired override is kept for the longest possible
/// duration: as the latest version, it prevents an older one from being republished.
pub(super) const PUBLISH_OVERRIDE: &str = r"
local time = redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
local function until_ms(value) return tonumber(string.match(value, '^%d+ (%d+) ') or '0') end
local stored = ARGV[2] .. ' ' .. string.format('%.0f', ms + ARGV[4]) .. ' ' .. ARGV[3]
if ARGV[5] == '*' then
  local known = redis.call('HGET', KEYS[2], ARGV[1])
  if known and tonumber(string.match(known, '^%d+') or '0') >= tonumber(ARGV[2]) then return '' end
  local all = redis.call('HGETALL', KEYS[2])
  local count = #all / 2
  local is_full = count >= tonumber(ARGV[9])
  for i = 1, #all, 2 do
    local expired_ms = ms - until_ms(all[i + 1])
    if expired_ms > tonumber(ARGV[10]) or (is_full and expired_ms >= 0) then
      redis.call('HDEL', KEYS[2], all[i])
      count = count - 1
    end
  end
  if count >= tonumber(ARGV[9]) and not known then return redis.error_reply('ERR too many overrides') end
  redis.call('HSET', KEYS[2], ARGV[1], stored)
end
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[8], '*',
  'n', '0', 'to', ARGV[5], 'what', ARGV[7], 'from', ARGV[6], 'name', ARGV[1], 'said', stored)
";
