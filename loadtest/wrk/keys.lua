-- Requests keys in random order: `wrk ... -s loadtest/wrk/keys.lua URL -- 10000` requests URL/0 to URL/9999. An
-- optional second number is the percentage of requests for the first key.
-- All requests are formatted before the load starts; the order is the same in each run.

local requests, hot_percent = {}, 0

function init(args)
  local keys = tonumber(args[1]) or 10000
  for key = 0, keys - 1 do
    requests[key + 1] = wrk.format("GET", wrk.path .. "/" .. key)
  end
  hot_percent = tonumber(args[2]) or 0
  math.randomseed(1)
end

function request()
  if hot_percent > 0 and math.random(100) <= hot_percent then
    return requests[1]
  end
  return requests[math.random(#requests)]
end
