-- Reports status classes and latency percentiles. Prints FAILED and exits with 1 if a response was not 2xx or a
-- connection failed.
-- wrk -t2 -c64 -d5s -s loadtest/wrk/hit.lua http://127.0.0.1:8080/fast

local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

-- Globals: each thread has its own environment, which the main thread reads at the end.
function init()
  status_1xx, status_2xx, status_3xx, status_4xx, status_5xx = 0, 0, 0, 0, 0
end

function response(status)
  if status < 200 then
    status_1xx = status_1xx + 1
  elseif status < 300 then
    status_2xx = status_2xx + 1
  elseif status < 400 then
    status_3xx = status_3xx + 1
  elseif status < 500 then
    status_4xx = status_4xx + 1
  else
    status_5xx = status_5xx + 1
  end
end

function done(summary, latency)
  local total, good = 0, 0
  local line = {}
  for _, class in ipairs({ "1xx", "2xx", "3xx", "4xx", "5xx" }) do
    local count = 0
    for _, thread in ipairs(threads) do
      count = count + thread:get("status_" .. class)
    end
    table.insert(line, string.format("%s %d", class, count))
    total = total + count
    if class == "2xx" then
      good = count
    end
  end
  print("status   " .. table.concat(line, ", "))

  line = {}
  for _, percentile in ipairs({ 50, 90, 99, 99.9 }) do
    table.insert(line, string.format("p%g %.2f ms", percentile, latency:percentile(percentile) / 1000))
  end
  print("latency  " .. table.concat(line, ", ") .. string.format(", max %.2f ms", latency.max / 1000))
  print(string.format("rate     %.0f requests/s", summary.requests / summary.duration * 1e6))

  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  if total == 0 or good < total or broken > 0 then
    print(string.format("FAILED   %d of %d responses were not 2xx; errors: connect %d, read %d, write %d, timeout %d",
      total - good, total, errors.connect, errors.read, errors.write, errors.timeout))
    io.stdout:flush()
    os.exit(1)
  end
end
