-- The treasury's half of the lease. Its semantics are written in lease.rs; bank.rs is its twin.
-- Numbers are doubles: every result is floored, every integer stays below 2^53.
local bucket = KEYS[1]
local node = 'n' .. ARGV[1]
local count, period = tonumber(ARGV[2]), tonumber(ARGV[3])
local burst, expected = tonumber(ARGV[4]), tonumber(ARGV[5])
local wanted, returned, held = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local demand, borrowed, leaving = tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11] == '1'

local MICRO, FORGET, VALID_MS = 1000000, 30000000, 1000
local floor, min, max = math.floor, math.min, math.max
local pool = max(1, floor(burst / 2))
local afield = max(1, burst - pool)
local capacity = pool * MICRO

local time = redis.call('TIME')
local now = tonumber(time[1]) * MICRO + tonumber(time[2])

local at, level, rest = now, 0, 0
local nodes, total, out, shares, claims = 1, 0, 0, 0, 0
local mine
local function earned(age, share) return floor(age * share / MICRO) end
local fields = redis.call('HGETALL', bucket)
for i = 1, #fields, 2 do
  local field, value = fields[i], fields[i + 1]
  if field == 'at' then at = tonumber(value)
  elseif field == 'level' then level = tonumber(value)
  elseif field == 'rest' then rest = tonumber(value)
  else
    local asked, weight, share, credit, keeps = 0, 0, 0, 0, 0
    if #value == 40 then asked, weight, share, credit, keeps = struct.unpack('>ddddd', value) end
    local age = max(0, now - asked)
    if age > FORGET then
      redis.call('HDEL', bucket, field)
    elseif field == node then
      mine = credit + earned(age, share)
    else
      nodes, total, out = nodes + 1, total + weight, out + keeps
      shares, claims = shares + share, claims + earned(age, share)
    end
  end
end

local elapsed = min(max(0, now - at), FORGET)
local parts = elapsed * count + rest
local gained = floor(parts / period)
rest = parts - gained * period
level = max(min(capacity, level + gained + returned * MICRO) - borrowed, -capacity)

local fleet = max(nodes, expected)
local weight = max(demand, floor(count * 1000 / period / (32 * fleet)), 1)
local rate = floor(count * MICRO / period)
local share = max(0, min(floor(rate * weight / (total + weight)), rate - shares))
local cap = max(1, floor(afield / fleet))
local credit = 0
if mine then
  credit = max(min(cap * MICRO, mine + returned * MICRO - borrowed), -cap * MICRO)
end

local available = max(credit, level - max(claims, floor(capacity / 2)))
local tokens = floor(min(wanted * MICRO, available, level) / MICRO)
tokens = max(0, min(tokens, cap - held, afield - out - held))
level = level - tokens * MICRO
credit = max(credit - tokens * MICRO, min(credit, 0))

local function whole(number) return string.format('%.0f', number) end
if leaving then
  redis.call('HDEL', bucket, node)
else
  local record = struct.pack('>ddddd', now, weight, share, credit, held + tokens)
  redis.call('HSET', bucket, node, record)
end
redis.call('HSET', bucket, 'at', whole(now), 'level', whole(level), 'rest', whole(rest))
redis.call('PEXPIRE', bucket, 2 * FORGET / 1000)
return { tokens, VALID_MS, nodes, share }
