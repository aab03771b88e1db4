-- The backend's side of the lease. docs/cluster-limits.md specifies it; server_model.rs is the
-- reference implementation. Numbers are doubles: every result is floored, every integer stays below
-- 2^53.
local key, name = KEYS[1], 'n' .. ARGV[1]
local function number(index) return tonumber(ARGV[index]) end
local count, period, burst, expected_nodes = number(2), number(3), number(4), number(5)
local requested, returned, held, demand = number(6), number(7), number(8), number(9)
local borrowed, reported_share, uptime, leaving = number(10), number(11), number(12), ARGV[13] == '1'
local ordinary = math.min(number(14), demand)

local MICRO, STEP_MAX, DELAY_SLACK, SWEEP_INTERVAL, WARM_UP = 1000000, 1000000, 20000, 50000, 200000
local RETENTION_MAX, SILENT_AFTER, REPLACED_AFTER, FORGOTTEN_AFTER = 50000, 150000, 400000, 30000000
local VALID_MS, PRIORITY_HEADROOM, PRIORITY_WEIGHT_MIN, PRIORITY_WEIGHT_MAX = 1000, 1250, 1000, 1000000
local BUCKET, RECORD = '>dddddddddddddd', '>dddddddd'
local floor, min, max, unpack, unpack_table = math.floor, math.min, math.max, struct.unpack, unpack
local pool = max(1, floor(burst / 2))
local outstanding_max = max(1, burst - pool)
local capacity = pool * MICRO
local rate = floor(count * MICRO / period)
local retention = min(RETENTION_MAX, floor(capacity * period / (8 * count)))
local function earned_at(of, micros) return floor(of * micros / MICRO) end

local time = redis.call('TIME')
local now = tonumber(time[1]) * MICRO + tonumber(time[2])
local stored = redis.call('HMGET', key, 'bucket', name)
local last_request, clock, last_sweep, level, remainder = now, 0, 0, 0, 0
local nodes, weights, ordinaries, shares, outstanding = 0, 0, 0, 0, 0
local claims, silent_shares, peak_nodes, last_join = 0, 0, 0, 0
if stored[1] and #stored[1] == 112 then
  last_request, clock, last_sweep, level, remainder, nodes, weights, ordinaries, shares, outstanding, claims,
    silent_shares, peak_nodes, last_join = unpack(BUCKET, stored[1])
end
local is_new = last_request == now and clock == 0 and last_sweep == 0
local record = stored[2] and #stored[2] == 64 and stored[2]

-- Step 2: advance the clock and refill the level.
local step = min(max(0, now - last_request), STEP_MAX)
if record then
  local node_request, _, _, _, _, _, _, node_uptime = unpack(RECORD, record)
  step = min(step, max(0, node_request + uptime - node_uptime + DELAY_SLACK - clock))
end
clock = clock + step
local parts = step * count + remainder
local gained = floor(parts / period)
remainder = parts - gained * period
level = level + max(0, gained - earned_at(silent_shares, step))
claims = claims + earned_at(shares - silent_shares, step)

-- Step 3: partition nodes into active, silent, and silent and replaced.
if clock - last_sweep >= SWEEP_INTERVAL then
  local before, active, excess, silent = last_sweep, 0, 0, {}
  last_sweep, nodes, weights, ordinaries, shares, outstanding, claims, silent_shares = clock, 0, 0, 0, 0, 0, 0, 0
  local function add(node_weight, node_ordinary, node_share, node_held)
    nodes, weights, ordinaries = nodes + 1, weights + node_weight, ordinaries + node_ordinary
    shares, outstanding = shares + node_share, outstanding + node_held
  end
  local fields = redis.call('HGETALL', key)
  for i = 1, #fields, 2 do
    local field, value = fields[i], fields[i + 1]
    if field ~= 'bucket' then
      local node_request, node_weight, node_ordinary, node_share, node_credit, node_held, node_borrowed, node_uptime
      if #value == 64 then
        node_request, node_weight, node_ordinary, node_share, node_credit, node_held, node_borrowed, node_uptime =
          unpack(RECORD, value)
      end
      if not node_request or clock - node_request > FORGOTTEN_AFTER then
        redis.call('HDEL', key, field)
        if field == name then record = false end
      elseif clock - node_request <= SILENT_AFTER then
        add(node_weight, node_ordinary, node_share, node_held)
        claims = claims + earned_at(node_share, clock - node_request)
        active = active + (node_request > last_join + DELAY_SLACK and 1 or 0)
      elseif node_weight > 0 then
        silent[#silent + 1] = { field, node_request, node_weight, node_ordinary, node_share, node_held, node_credit,
          node_borrowed, node_uptime }
      end
    end
  end
  local is_complete, peak_before = active >= max(expected_nodes, peak_nodes), peak_nodes
  peak_nodes = clock - last_join <= SILENT_AFTER and max(peak_nodes, active) or active
  for _, node in ipairs(silent) do
    local field, node_request, node_weight, node_ordinary, node_share, node_held, node_credit, node_borrowed,
      node_uptime = unpack_table(node)
    local withheld = earned_at(node_share, clock - node_request - retention)
    if before - node_request <= SILENT_AFTER then excess = excess + withheld end
    if is_complete and node_request < last_join and clock - node_request > REPLACED_AFTER then
      local value = struct.pack(RECORD, node_request, 0, 0, 0, node_credit, 0,
        node_borrowed + floor(withheld / MICRO), node_uptime)
      redis.call('HSET', key, field, value)
      if field == name then record = value end
    else
      add(node_weight, node_ordinary, node_share, node_held)
      claims, silent_shares = claims + earned_at(node_share, retention), silent_shares + node_share
      peak_nodes = max(peak_nodes, peak_before)
    end
  end
  level = max(level - excess, min(level, claims))
  redis.call('PEXPIRE', key, 60000)
end

-- Step 4: settle the caller's account.
if not record and not leaving and clock >= WARM_UP then last_join = clock end
local charge, credit = min(borrowed * MICRO, earned_at(reported_share, min(uptime, clock))), 0
if record then
  local node_request, node_weight, node_ordinary, node_share, node_credit, node_held, node_borrowed, node_uptime =
    unpack(RECORD, record)
  local is_silent = last_sweep - node_request > SILENT_AFTER
  local earned = earned_at(node_share, is_silent and retention or clock - node_request)
  local withheld = is_silent and earned_at(node_share, max(0, uptime - node_uptime - retention)) or 0
  charge = max(0, max(0, borrowed - node_borrowed) * MICRO - withheld)
  credit = node_credit + earned + returned * MICRO - charge
  if node_weight > 0 then nodes = nodes - 1 end
  weights, ordinaries = weights - node_weight, ordinaries - node_ordinary
  shares, outstanding = shares - node_share, outstanding - node_held
  claims, silent_shares = max(0, claims - earned), silent_shares - (is_silent and node_share or 0)
end
level = max(min(capacity, level + returned * MICRO) - charge, -capacity)

-- Step 5: its share.
local fleet = max(nodes + 1, expected_nodes)
local cap = max(1, floor(outstanding_max / fleet))
local weight = max(demand, floor(count * 1000 / period / (32 * fleet)), 1)
local unseen = clock < FORGOTTEN_AFTER and max(0, expected_nodes - nodes - 1) or 0
local free = max(0, rate - shares)
local all, all_ordinary, priority = weights + weight, ordinaries + ordinary, PRIORITY_WEIGHT_MIN
if all_ordinary > 0 then
  local left = rate - PRIORITY_HEADROOM * (all - all_ordinary)
  priority = left > 0 and floor(1000 * PRIORITY_HEADROOM * all_ordinary / left) or PRIORITY_WEIGHT_MAX
  priority = max(PRIORITY_WEIGHT_MIN, min(priority, PRIORITY_WEIGHT_MAX))
end
local function weigh(of, ordinary_part) return priority * (of - ordinary_part) + PRIORITY_WEIGHT_MIN * ordinary_part end
local by_demand = floor(rate * weigh(weight, ordinary) / weigh(all, all_ordinary))
by_demand = min(by_demand, free - floor(rate * unseen / expected_nodes))
local share = max(0, min(clock < WARM_UP and reported_share or by_demand, free))
local share_kept = max(share, min(reported_share, free))

-- Step 6: its grant.
credit = max(min(cap * MICRO, credit), -cap * MICRO)
local available = min(max(credit, level - floor(capacity / 2)), level - claims)
local tokens = floor(min(requested * MICRO, available) / MICRO)
tokens = max(0, min(tokens, cap - held, outstanding_max - outstanding - held))
level = level - tokens * MICRO
credit = max(credit - tokens * MICRO, min(credit, 0))

-- Step 7: store the record and the bucket.
local nodes_seen = nodes + 1
if leaving then
  redis.call('HDEL', key, name)
else
  nodes, weights, ordinaries = nodes + 1, all, all_ordinary
  shares, outstanding = shares + share_kept, outstanding + held + tokens
  redis.call('HSET', key, name,
    struct.pack(RECORD, clock, weight, ordinary, share_kept, credit, held + tokens, borrowed, uptime))
end
redis.call('HSET', key, 'bucket',
  struct.pack(BUCKET, now, clock, last_sweep, level, remainder, nodes, weights, ordinaries, shares, outstanding, claims,
    silent_shares, peak_nodes, last_join))
-- Expires the hash until the first sweep does.
if is_new then redis.call('PEXPIRE', key, 60000) end
return { tokens, VALID_MS, nodes_seen, share }
