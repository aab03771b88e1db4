-- Asks for keys in random order: wrk ... -s loadtest/wrk/keys.lua URL -- 10000 requests URL/0 to URL/9999.
-- All requests are written out before the load starts; the order is the same in each run.

local requests = {}

function init(args)
  local keys = tonumber(args[1]) or 10000
  for key = 0, keys - 1 do
    requests[key + 1] = wrk.format("GET", wrk.path .. "/" .. key)
  end
  math.randomseed(1)
end

function request()
  return requests[math.random(#requests)]
end
