-- Capacity of any URL as one JSON document, the last line of standard output (wrk prints its own report before it):
--
--   wrk -t2 -c64 -d10s -s loadtest/wrk/capacity.lua http://127.0.0.1:8080/fast | tail -n 1
--   wrk -t2 -c64 -d10s -s loadtest/wrk/capacity.lua URL -- METHOD 'Name: value' @BODY
--
-- Arguments after `--`: a method in capitals, any number of fields, and a body after `@`. The exit status is 1 if a response was
-- not below 400 or a connection failed, and 2 after a wrong argument. The load is a closed loop: its latencies exclude the
-- requests that a stall delays; `loadtest knee` counts them.

local threads = {}
local FIELD = "^([%w!#$%%&'*+.^_`|~-]+):%s*(.-)%s*$"

function setup(thread)
  table.insert(threads, thread)
end

function init(args)
  for _, arg in ipairs(args) do
    local name, value = arg:match(FIELD)
    if name then
      wrk.headers[name] = value
    elseif arg:match("^%u+$") then
      wrk.method = arg
    elseif arg:sub(1, 1) == "@" then
      wrk.body = arg:sub(2)
    else
      io.stderr:write("capacity.lua: `" .. arg .. "` is no method in capitals, no field `Name: value` and no `@BODY`\n")
      os.exit(2)
    end
  end
  -- A global: the main thread, which reads it, has an environment of its own.
  method = wrk.method
  formatted = wrk.format()
end

function request()
  return formatted
end

-- One global for each status: each thread has its own environment, whose globals the main thread reads at the end.
function response(status)
  local name = "status_" .. status
  _G[name] = (_G[name] or 0) + 1
end

local function json_string(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return string.format("\\u%04x", c:byte()) end) .. '"'
end

function done(summary, latency)
  local total, good, statuses = 0, 0, {}
  for status = 100, 999 do
    local count = 0
    for _, thread in ipairs(threads) do
      count = count + (thread:get("status_" .. status) or 0)
    end
    if count > 0 then
      table.insert(statuses, string.format('"%d":%d', status, count))
      total = total + count
      good = good + (status < 400 and count or 0)
    end
  end
  local percentiles = {}
  for _, percentile in ipairs({ 50, 75, 90, 99, 99.9 }) do
    table.insert(percentiles, string.format('"p%g":%.3f', percentile, latency:percentile(percentile) / 1000))
  end
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  local seconds = summary.duration / 1e6
  local url = string.format("%s://%s:%s%s", wrk.scheme, wrk.host, wrk.port, wrk.path)
  print(string.format(
    '{"url":%s,"method":%s,"seconds":%.3f,"requests":%d,"responses":%d,"good":%d,"requests_per_second":%.1f,' ..
    '"bytes":%d,"bytes_per_second":%.0f,"latency_ms":{%s,"mean":%.3f,"max":%.3f},"statuses":{%s},' ..
    '"errors":{"connect":%d,"read":%d,"write":%d,"timeout":%d}}',
    json_string(url), json_string(threads[1]:get("method")), seconds, summary.requests, total, good, summary.requests / seconds,
    summary.bytes, summary.bytes / seconds, table.concat(percentiles, ","), latency.mean / 1000, latency.max / 1000,
    table.concat(statuses, ","), errors.connect, errors.read, errors.write, errors.timeout))
  io.stdout:flush()
  if total == 0 or good < total or broken > 0 then
    os.exit(1)
  end
end
