//! Owns what the bus keeps on a server and the scripts that change it: each is one command, so that nothing is half done.
//!
//! ```text
//! tg:{bus}:events   stream: n (number), to (`*` or a node), what (see `Purge::told`), from (member)
//! tg:{bus}:tags     sorted set: what was purged last, with the number of that purge
//! tg:{bus}:state    hash: last (the highest number), floor (of the purges that were forgotten, the last)
//! tg:{bus}:nodes    hash: member -> position in the stream, milliseconds of its last sign of life
//! tg:{bus}:notices  hash: name -> version, until (milliseconds of the server's clock), text
//! ```
//! Numbers are microseconds of the server's clock and never go back; a purge has the same number on all servers.
//!
//! Refuses to keep more than the bounds below; what is forgotten is taken for purged.

use crate::entry::TAGS_MAX;

pub(super) const EVENTS: &str = "tg:{bus}:events";
pub(super) const TAGS: &str = "tg:{bus}:tags";
pub(super) const STATE: &str = "tg:{bus}:state";
pub(super) const NODES: &str = "tg:{bus}:nodes";
pub(super) const NOTICES: &str = "tg:{bus}:notices";

pub(super) const BUS: &str = "tg:{bus}:";
pub(super) const BUS_TAG: &str = "bus";

/// Events that are kept, about: whoever was away for more asks for the tags.
pub(super) const EVENTS_MAX: usize = 10_000;
pub(super) const TAGS_KEPT: usize = TAGS_MAX;

/// A node without a sign of life for so long no longer belongs to the fleet.
pub(super) const FORGET_MS: u64 = 600_000;

/// KEYS events, state, tags; ARGV number or 0, the highest number known, what, to, from, most events, most tags.
/// Returns the number and the event's id, which is empty where the server knew.
pub(super) const TELL: &str = r"
local clock = redis.call('TIME')
local last = tonumber(redis.call('HGET', KEYS[2], 'last') or '0')
local n = tonumber(ARGV[1])
if n == 0 then
  n = math.max(clock[1] * 1000000 + clock[2], last + 1, tonumber(ARGV[2]) + 1)
elseif ARGV[4] == '*' then
  local known = redis.call('ZSCORE', KEYS[3], ARGV[3])
  if known and tonumber(known) >= n then return {string.format('%.0f', n), ''} end
end
local number = string.format('%.0f', n)
if n > last then redis.call('HSET', KEYS[2], 'last', number) end
if ARGV[4] == '*' then
  redis.call('ZADD', KEYS[3], number, ARGV[3])
  while redis.call('ZCARD', KEYS[3]) > tonumber(ARGV[7]) do
    local forgotten = redis.call('ZPOPMIN', KEYS[3])
    redis.call('HSET', KEYS[2], 'floor', string.format('%.0f', tonumber(forgotten[2])))
  end
end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[6], '*',
  'n', number, 'to', ARGV[4], 'what', ARGV[3], 'from', ARGV[5])
return {number, id}
";

/// KEYS nodes, state, tags, events; ARGV member, position, milliseconds after which a member is forgotten, the highest number that
/// this server was known to have. Returns `last`.
/// Where the server has lost its memory, all that bears a tag and is older than what was known is taken for purged.
pub(super) const BEAT: &str = r"
local clock = redis.call('TIME')
local ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
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

/// KEYS events, notices; ARGV name, version, text, for how many milliseconds it holds, to, from, `what`, most events, most notices.
/// Returns the event's id, which is empty where the server knew this one or a later one. What is said to one node is not kept. What is
/// over is kept for as long as anything lasts: as the last word, it keeps an older one from being said again.
pub(super) const SAY: &str = r"
local clock = redis.call('TIME')
local ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function ends(kept) return tonumber(string.match(kept, '^%d+ (%d+) ') or '0') end
local said = ARGV[2] .. ' ' .. string.format('%.0f', ms + ARGV[4]) .. ' ' .. ARGV[3]
if ARGV[5] == '*' then
  local known = redis.call('HGET', KEYS[2], ARGV[1])
  if known and tonumber(string.match(known, '^%d+') or '0') >= tonumber(ARGV[2]) then return '' end
  local all = redis.call('HGETALL', KEYS[2])
  local count = #all / 2
  local is_full = count >= tonumber(ARGV[9])
  for i = 1, #all, 2 do
    local over = ms - ends(all[i + 1])
    if over > 691200000 or (is_full and over >= 0) then
      redis.call('HDEL', KEYS[2], all[i])
      count = count - 1
    end
  end
  if count >= tonumber(ARGV[9]) and not known then return redis.error_reply('ERR too many notices') end
  redis.call('HSET', KEYS[2], ARGV[1], said)
end
return redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[8], '*',
  'n', '0', 'to', ARGV[5], 'what', ARGV[7], 'from', ARGV[6], 'name', ARGV[1], 'said', said)
";
