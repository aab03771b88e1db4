-- Prints one machine-readable line after wrk's own report. No code runs per request, so that the load is not slowed.

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    "report requests=%d bytes=%d microseconds=%d p50=%d p99=%d status=%d connect=%d read=%d write=%d timeout=%d",
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
