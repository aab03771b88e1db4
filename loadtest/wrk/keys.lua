-- Asks for keys in random order: wrk ... -s loadtest/wrk/keys.lua URL -- 10000 requests URL/0 to URL/9999. A second number is the
-- share of requests, in percent, that are for the first key alone.
-- All requests are written out before the load starts; the order is the same in each run.

local requests, mostly = {}, 0

function init(args)
  local keys = tonumber(args[1]) or 10000
  for key = 0, keys - 1 do
    requests[key + 1] = wrk.format("GET", wrk.path .. "/" .. key)
  end
  mostly = tonumber(args[2]) or 0
  math.randomseed(1)
end

function request()
  if mostly > 0 and math.random(100) <= mostly then
    return requests[1]
  end
  return requests[math.random(#requests)]
end
