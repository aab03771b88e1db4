-- One line for a program to read, at the end of wrk's own report. Nothing runs per request: the load is not slowed.

function done(summary, latency)
  local errors = summary.errors
  print(string.format(
    "report requests=%d bytes=%d microseconds=%d p50=%d p99=%d status=%d connect=%d read=%d write=%d timeout=%d",
    summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect, errors.read, errors.write, errors.timeout))
end
