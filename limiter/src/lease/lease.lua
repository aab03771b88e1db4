-- The treasury's half of the lease. Its semantics are written in lease.rs; bank.rs is its twin.
-- Numbers are doubles: every result is floored, every integer stays below 2^53.
local key, name = KEYS[1], 'n' .. ARGV[1]
local function number(index) return tonumber(ARGV[index]) end
local count, period, burst, expected = number(2), number(3), number(4), number(5)
local wanted, returned, held, demand = number(6), number(7), number(8), number(9)
local borrowed, told, uptime, leaving = number(10), number(11), number(12), ARGV[13] == '1'
local ordinary = math.min(number(14), demand)

local MICRO, STEP, SLACK, SWEEP = 1000000, 1000000, 20000, 50000
local YOUNG, KEEP, QUIET, REPLACED, FORGET, VALID_MS = 200000, 50000, 150000, 400000, 30000000, 1000
local FIRST_OF_DEMAND, FIRST_MIN, FIRST_MAX = 1250, 1000, 1000000
local BUCKET, RECORD = '>dddddddddddddd', '>dddddddd'
local floor, min, max, unpack, each = math.floor, math.min, math.max, struct.unpack, unpack
local pool = max(1, floor(burst / 2))
local afield = max(1, burst - pool)
local capacity = pool * MICRO
local rate = floor(count * MICRO / period)
local keep = min(KEEP, floor(capacity * period / (8 * count)))
local function part(of, micros) return floor(of * micros / MICRO) end

local time = redis.call('TIME')
local now = tonumber(time[1]) * MICRO + tonumber(time[2])
local stored = redis.call('HMGET', key, 'bucket', name)
local at, clock, swept, level, rest = now, 0, 0, 0, 0
local nodes, weights, ordinaries, shares, out, claims, quiet, most, joined = 0, 0, 0, 0, 0, 0, 0, 0, 0
if stored[1] and #stored[1] == 112 then
  at, clock, swept, level, rest, nodes, weights, ordinaries, shares, out, claims, quiet, most, joined =
    unpack(BUCKET, stored[1])
end
local is_new = at == now and clock == 0 and swept == 0
local mine = stored[2] and #stored[2] == 64 and stored[2]

-- Time passes.
local step = min(max(0, now - at), STEP)
if mine then
  local asked, _, _, _, _, _, _, was_up = unpack(RECORD, mine)
  step = min(step, max(0, asked + uptime - was_up + SLACK - clock))
end
clock = clock + step
local parts = step * count + rest
local gained = floor(parts / period)
rest = parts - gained * period
level = level + max(0, gained - part(quiet, step))
claims = claims + part(shares - quiet, step)

-- The silent are told from the others, and the replaced from the silent.
if clock - swept >= SWEEP then
  local before, together, excess, silent = swept, 0, 0, {}
  swept, nodes, weights, ordinaries, shares, out, claims, quiet = clock, 0, 0, 0, 0, 0, 0, 0
  local function add(weight, common, share, keeps)
    nodes, weights, ordinaries = nodes + 1, weights + weight, ordinaries + common
    shares, out = shares + share, out + keeps
  end
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    local field, value = fields[i], fields[i + 1]
    if field ~= 'bucket' then
      local asked, weight, common, share, credit, keeps, reported, was_up
      if #value == 64 then asked, weight, common, share, credit, keeps, reported, was_up = unpack(RECORD, value) end
      if not asked or clock - asked > FORGET then
        redis.call('HDEL', key, field)
        if field == name then mine = false end
      elseif clock - asked <= QUIET then
        add(weight, common, share, keeps)
        claims = claims + part(share, clock - asked)
        together = together + (asked > joined + SLACK and 1 or 0)
      elseif weight > 0 then
        silent[#silent + 1] = { field, asked, weight, common, share, keeps, credit, reported, was_up }
      end
    end
  end
  local is_whole, before_most = together >= max(expected, most), most
  most = clock - joined <= QUIET and max(most, together) or together
  for _, node in ipairs(silent) do
    local field, asked, weight, common, share, keeps, credit, reported, was_up = each(node)
    local kept_free = part(share, clock - asked - keep)
    if before - asked <= QUIET then excess = excess + kept_free end
    if is_whole and asked < joined and clock - asked > REPLACED then
      local value = struct.pack(RECORD, asked, 0, 0, 0, credit, 0, reported + floor(kept_free / MICRO), was_up)
      redis.call('HSET', key, field, value)
      if field == name then mine = value end
    else
      add(weight, common, share, keeps)
      claims, quiet = claims + part(share, keep), quiet + share
      most = max(most, before_most)
    end
  end
  level = max(level - excess, min(level, claims))
  redis.call('PEXPIRE', key, 60000)
end

-- The caller's account.
if not mine and not leaving and clock >= YOUNG then joined = clock end
local charge, credit = min(borrowed * MICRO, part(told, min(uptime, clock))), 0
if mine then
  local asked, weight, common, share, old, keeps, reported, was_up = unpack(RECORD, mine)
  local is_quiet = swept - asked > QUIET
  local earned = part(share, is_quiet and keep or clock - asked)
  local covered = is_quiet and part(share, max(0, uptime - was_up - keep)) or 0
  charge = max(0, max(0, borrowed - reported) * MICRO - covered)
  credit = old + earned + returned * MICRO - charge
  if weight > 0 then nodes = nodes - 1 end
  weights, ordinaries, shares, out = weights - weight, ordinaries - common, shares - share, out - keeps
  claims, quiet = max(0, claims - earned), quiet - (is_quiet and share or 0)
end
level = max(min(capacity, level + returned * MICRO) - charge, -capacity)

-- Its share and its grant.
local fleet = max(nodes + 1, expected)
local cap = max(1, floor(afield / fleet))
local weight = max(demand, floor(count * 1000 / period / (32 * fleet)), 1)
local unseen = clock < FORGET and max(0, expected - nodes - 1) or 0
local free = max(0, rate - shares)
local all, all_ordinary, first = weights + weight, ordinaries + ordinary, FIRST_MIN
if all_ordinary > 0 then
  local left = rate - FIRST_OF_DEMAND * (all - all_ordinary)
  first = left > 0 and floor(1000 * FIRST_OF_DEMAND * all_ordinary / left) or FIRST_MAX
  first = max(FIRST_MIN, min(first, FIRST_MAX))
end
local function weigh(of, common) return first * (of - common) + FIRST_MIN * common end
local by_demand = floor(rate * weigh(weight, ordinary) / weigh(all, all_ordinary))
by_demand = min(by_demand, free - floor(rate * unseen / expected))
local share = max(0, min(clock < YOUNG and told or by_demand, free))
local kept = max(share, min(told, free))
credit = max(min(cap * MICRO, credit), -cap * MICRO)
local available = min(max(credit, level - floor(capacity / 2)), level - claims)
local tokens = floor(min(wanted * MICRO, available) / MICRO)
tokens = max(0, min(tokens, cap - held, afield - out - held))
level = level - tokens * MICRO
credit = max(credit - tokens * MICRO, min(credit, 0))

-- What is remembered.
local seen = nodes + 1
if leaving then
  redis.call('HDEL', key, name)
else
  nodes, weights, ordinaries = nodes + 1, all, all_ordinary
  shares, out = shares + kept, out + held + tokens
  redis.call('HSET', key, name,
    struct.pack(RECORD, clock, weight, ordinary, kept, credit, held + tokens, borrowed, uptime))
end
redis.call('HSET', key, 'bucket',
  struct.pack(BUCKET, now, clock, swept, level, rest, nodes, weights, ordinaries, shares, out, claims, quiet, most,
    joined))
-- Until the first sweep.
if is_new then redis.call('PEXPIRE', key, 60000) end
return { tokens, VALID_MS, seen, share }
