#!/usr/bin/env bash
# Starts `tidegate demo` on free loopback ports, runs k6 and wrk against it, and stops it. Exits with 1 if either fails.
# Usage: loadtest/run.sh PATH-OF-TIDEGATE
# Needs curl, python3 and wrk (Debian: apt-get install wrk). If k6 is neither in ~/.cache/tidegate/bin nor on
# PATH, installs it there with Go.
set -euo pipefail

TIDEGATE=${1:-${TIDEGATE:-}}
[ -x "$TIDEGATE" ] || { echo "usage: $0 PATH-OF-TIDEGATE" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
bin=$HOME/.cache/tidegate/bin

command -v wrk >/dev/null || { echo "wrk is missing (Debian: apt-get install wrk)" >&2; exit 2; }
k6=$(PATH=$bin:$PATH command -v k6 || true)
if [ -z "$k6" ]; then
  echo "installing k6 into $bin"
  GOBIN=$bin go install go.k6.io/k6@v1.8.1
  k6=$bin/k6
fi

work=$(mktemp -d)
demo=
# Stops the gateway that this script started, and no other process.
finish() {
  if [ -n "$demo" ]; then
    kill "$demo" 2>/dev/null || true
    for _ in {1..50}; do
      kill -0 "$demo" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$demo" 2>/dev/null || true
    wait "$demo" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# Both sockets are open at the same time, so that the two ports differ.
read -r port admin < <(python3 -c '
import socket
pair = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in pair))')

"$TIDEGATE" demo --listen "127.0.0.1:$port" --admin "127.0.0.1:$admin" >"$work/demo.log" 2>&1 &
demo=$!
ready=
for _ in {1..100}; do
  if curl -fsS -o /dev/null --max-time 1 "http://127.0.0.1:$admin/ready" 2>/dev/null; then ready=yes; break; fi
  kill -0 "$demo" 2>/dev/null || break
  sleep 0.1
done
if [ -z "$ready" ]; then
  echo "FAILED: tidegate demo is not ready on 127.0.0.1:$admin:" >&2
  tail -n 40 "$work/demo.log" >&2
  exit 1
fi

k6_result=ok
TARGET=http://127.0.0.1:$port K6_NO_USAGE_REPORT=true "$k6" run --quiet --address '' "$here/k6/gateway.js" || k6_result="FAILED (exit $?)"
wrk_result=ok
wrk -t2 -c64 -d5s -s "$here/wrk/hit.lua" "http://127.0.0.1:$port/fast" || wrk_result="FAILED (exit $?)"

echo
echo "k6   $k6_result"
echo "wrk  $wrk_result"
if ! kill -0 "$demo" 2>/dev/null; then
  echo "FAILED: the gateway exited during the run:" >&2
  tail -n 40 "$work/demo.log" >&2
  exit 1
fi
if [ "$k6_result" != ok ] || [ "$wrk_result" != ok ]; then exit 1; fi
