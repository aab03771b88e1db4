#!/usr/bin/env bash
# Tests the chart on a real cluster, that of the current kubeconfig, in a namespace of its own that it removes at the end. Takes about 12 minutes.
# Usage: IMAGE=registry.example/tidegate:TAG helm/test-kubernetes.sh [STEP...]     without a step: all of them, in this order
#   install  rollout  eviction  reload  redis  discovery  autoscaling  api-server
#
# Needs kubectl, helm 4 and k6 on the PATH or in ~/.cache/tidegate/bin. The image has to be where the nodes find it.
#   BASE_URL             how this machine reaches the Service; empty: its cluster address or the port of a node, whichever answers
#   RATE                 requests/s of each of the two loads, with kept and with new connections; 60
#   REDIS_IMAGE          image with redis-server for the step redis; empty: redis:7-alpine. REDIS_COMMAND: its command; empty: redis-server
#   API_STOP, API_START  commands that stop and start the API server; without them, the step api-server and that of discovery are skipped
#   WRITE                a document with the markers of docs/kubernetes.md, into which the figures are written; empty: none
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
chart=$here/tidegate
PATH=$PATH:$HOME/.cache/tidegate/bin
IMAGE=${IMAGE:-tidegate:$(sed -n 's/^appVersion: "\(.*\)"/\1/p' "$chart/Chart.yaml")}
RATE=${RATE:-60}
REDIS_IMAGE=${REDIS_IMAGE:-redis:7-alpine}
REDIS_COMMAND=${REDIS_COMMAND:-redis-server}
for command in kubectl helm k6; do
  command -v "$command" >/dev/null || { echo "$0: $command is missing (k6: go install go.k6.io/k6@v1.8.1)" >&2; exit 2; }
done
kubectl version >/dev/null 2>&1 || { echo "$0: no cluster answers at the current kubeconfig" >&2; exit 2; }

ns=tidegate-test-$(od -An -N3 -tx1 /dev/urandom | tr -d ' ')
work=$(mktemp -d)
failures=0
kc() { timeout 150 kubectl --namespace "$ns" "$@"; }

clean_up() {
  local status=$?
  [ "$status" = 0 ] || kc get pods,events --sort-by=.metadata.creationTimestamp 2>/dev/null | tail -30 >&2 || true
  if [ -e "$work/api-stopped" ]; then bash -c "$API_START" || true; fi
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null || true
  timeout 60 helm uninstall gate --namespace "$ns" >/dev/null 2>&1 || true
  timeout 150 kubectl delete namespace "$ns" --wait=true >/dev/null 2>&1 || echo "namespace $ns is still there" >&2
  rm -rf "$work"
}
trap clean_up EXIT

# row STEP WHAT RESULT: a row of the report.
row() {
  printf '%-12s %-72s %s\n' "$1" "$2" "$3"
  echo "| $1 | $2 | $3 |" >>"$work/rows"
}
skip() { row "$1" "$2" "SKIPPED: $3"; }
# expect STEP WHAT ACTUAL WANTED: equal, or a failure of the test.
expect() {
  if [ "$3" = "$4" ]; then row "$1" "$2" "$3"; else
    row "$1" "$2" "FAILED: $3 instead of $4"
    failures=$((failures + 1))
  fi
}
seconds_since() { awk "BEGIN { printf \"%.1f s\", $(date +%s.%N) - $1 }"; }

# upgrade ARGUMENT...: changes the release; earlier changes stay.
upgrade() { timeout 200 helm upgrade gate "$chart" --namespace "$ns" --reuse-values --wait --timeout 180s "$@" >"$work/helm" 2>&1 || { cat "$work/helm" >&2; return 1; }; }

# load NAME SECONDS: starts both loads.
load() {
  local name
  for name in kept new; do
    local arguments=()
    [ $name = kept ] || arguments=(--no-connection-reuse)
    k6 run --quiet --address "" --log-output=stderr "${arguments[@]}" --env BASE_URL="$url" --env RATE="$RATE" --env SECONDS="$2" \
      "$here/steady.js" >"$work/$1-$name" 2>"$work/$1-$name.log" &
    echo $! >"$work/$1-$name.pid"
  done
  sleep 3
}
figure() { python3 -c 'import json,sys; print(json.loads(sys.stdin.readlines()[-1])[sys.argv[1]])' "$2" <"$work/$1"; }
# loaded STEP NAME WHAT: waits for both loads and reports them; no request may fail or be left out.
loaded() {
  local name
  for name in kept new; do
    wait "$(cat "$work/$2-$name.pid")" || true
    expect "$1" "$3, $name connections: $(figure "$2-$name" requests) requests, failed" "$(figure "$2-$name" failed)" 0
    head -3 "$work/$2-$name.log" >&2
  done
  # What the gateways say about failed requests.
  kc logs -l app.kubernetes.io/instance=gate,app.kubernetes.io/name=tidegate -c tidegate --tail=20000 2>/dev/null | grep '"status":5' | head -3 >&2 || true
}

# pods [TEMPLATE]: names, or another field, of the gateway's pods that are not about to end.
pods() {
  kc get pods -l app.kubernetes.io/instance=gate,app.kubernetes.io/name=tidegate \
    -o go-template="{{range .items}}{{if not .metadata.deletionTimestamp}}${1:-{{.metadata.name\}\}} {{end}}{{end}}"
}
ready_is() { [ "$(kc get deployment gate-tidegate -o jsonpath='{.status.readyReplicas}')" = "$1" ]; }
# metric POD NAME: the sum of the values of a metric.
metric() { timeout 10 kubectl get --raw "/api/v1/namespaces/$ns/pods/$1:9900/proxy/metrics" 2>/dev/null | awk -v name="$2" '$1 == name || index($1, name "{") == 1 { sum += $2; found = 1 } END { print found ? sum : "none" }'; }
metric_is() { [ "$(metric "$1" "$2")" = "$3" ]; }
# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.5
  done
}

install_step() {
  kubectl create namespace "$ns" >/dev/null
  kc apply -f - >/dev/null <<Y
apiVersion: apps/v1
kind: Deployment
metadata: { name: origin }
spec:
  replicas: 2
  selector: { matchLabels: { app: origin } }
  template:
    metadata: { labels: { app: origin } }
    spec:
      containers:
        - name: origin
          image: $IMAGE
          imagePullPolicy: IfNotPresent
          args: [demo, --listen, "0.0.0.0:8080", --admin, "127.0.0.1:9900"]
          readinessProbe: { httpGet: { path: /, port: 8080 }, periodSeconds: 1 }
          lifecycle: { preStop: { sleep: { seconds: 3 } } }
          resources: { requests: { cpu: 20m, memory: 64Mi } }
---
apiVersion: v1
kind: Service
metadata: { name: origin }
spec: { selector: { app: origin }, ports: [{ name: http, port: 80, targetPort: 8080 }] }
Y
  kc rollout status deployment/origin --timeout 120s >/dev/null || { echo "no pod of $IMAGE starts; set IMAGE" >&2; exit 1; }
  local started
  started=$(date +%s.%N)
  timeout 200 helm install gate "$chart" --namespace "$ns" --wait --timeout 180s --values - >/dev/null <<Y
image: { repository: "${IMAGE%:*}", tag: "${IMAGE##*:}" }
config:
  upstream: { endpoints: ["http://origin.$ns.svc:80"] }
  rollOnChange: false
  drainSeconds: 20
service: { type: NodePort }
helmTest: { path: / }
resources: { requests: { cpu: 50m, memory: 128Mi }, limits: { memory: 512Mi } }
Y
  row install "\`helm install --wait\`, 2 pods" "$(seconds_since "$started")"
  started=$(date +%s.%N)
  timeout 100 helm test gate --namespace "$ns" --timeout 90s >"$work/helm" 2>&1 && expect install "\`helm test\` ($(seconds_since "$started"))" passed passed || {
    cat "$work/helm" >&2
    expect install "\`helm test\`" failed passed
  }
}

# The first of the possible addresses that answers.
find_url() {
  url=${BASE_URL:-}
  [ -z "$url" ] || return 0
  local address port
  address=$(kc get service gate-tidegate -o jsonpath='{.spec.clusterIP}')
  port=$(kc get service gate-tidegate -o jsonpath='{.spec.ports[0].nodePort}')
  for url in "http://$address" "http://$(kubectl get nodes -o jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}'):$port"; do
    if curl -sf --max-time 3 -o /dev/null "$url/"; then return 0; fi
  done
  echo "the Service cannot be reached from this machine: set BASE_URL" >&2
  exit 1
}

rollout_step() {
  local started
  load rollout 75
  started=$(date +%s.%N)
  upgrade --set podAnnotations.round=two
  row rollout "rolling update of 2 pods by \`helm upgrade --wait\`" "$(seconds_since "$started")"
  sleep 2
  started=$(date +%s.%N)
  timeout 200 helm rollback gate --namespace "$ns" --wait --timeout 180s >/dev/null
  row rollout "\`helm rollback --wait\`" "$(seconds_since "$started")"
  kc rollout restart deployment/origin >/dev/null
  kc rollout status deployment/origin --timeout 60s >/dev/null
  loaded rollout rollout "update, rollback and a rollout of the origin at 2 x $RATE requests/s"
}

evict() { kubectl create --raw "/api/v1/namespaces/$ns/pods/$1/eviction" -f - >/dev/null 2>"$work/evicted" <<<"{\"apiVersion\":\"policy/v1\",\"kind\":\"Eviction\",\"metadata\":{\"name\":\"$1\",\"namespace\":\"$ns\"}}"; }
eviction_step() {
  local first second
  read -r first second < <(pods) || true
  load eviction 30
  evict "$first" && expect eviction "first of two pods, as a drain of its node evicts it" accepted accepted
  if evict "$second"; then expect eviction "second pod at once" accepted refused; else
    expect eviction "second pod at once, by the disruption budget" "$(grep -qi 'disruption budget' "$work/evicted" && echo refused || cat "$work/evicted")" refused
  fi
  wait_for 60 ready_is 2 || true
  if wait_for 60 evict "$second"; then expect eviction "second pod when a new one is ready" accepted accepted; else expect eviction "second pod when a new one is ready" refused accepted; fi
  loaded eviction eviction "both evictions at 2 x $RATE requests/s"
  kc rollout status deployment/gate-tidegate --timeout 90s >/dev/null
}

reload_is() { local pod; for pod in $(pods); do [ "$(metric "$pod" tidegate_config_last_reload_successful)" = "$1" ] || return 1; done; }
# Every pod answers /new with `new route`.
all_have_route() {
  local pod
  for pod in $(pods); do
    timeout 10 kubectl get --raw "/api/v1/namespaces/$ns/pods/$pod:8080/proxy/new" 2>/dev/null | grep -q 'new route' || return 1
  done
}
restarts() { pods '{{range .status.containerStatuses}}{{.restartCount}}{{end}}'; }
reload_step() {
  local before started
  before="$(pods) $(restarts)"
  load reload 220
  started=$(date +%s.%N)
  upgrade --set-json 'config.upstream.endpoints=[]' --set-json "config.upstreams={\"main\":{\"endpoints\":[\"http://origin.$ns.svc:80\"]}}" \
    --set-json 'config.routes=[{"name":"new","match":{"path":"/new"},"respond":{"body":"new route"}},{"name":"everything","match":{"path":"/*"},"upstream":"main","cache":{"mode":"off"}}]'
  if wait_for 130 all_have_route; then
    row reload "changed ConfigMap is in use in both pods" "$(seconds_since "$started")"
  else
    expect reload "changed ConfigMap is in use in both pods" no yes
  fi
  started=$(date +%s.%N)
  kc patch configmap gate-tidegate --type merge -p '{"data":{"tidegate.toml":"version = 1\n[server]\nnoode = \"x\"\n"}}' >/dev/null
  if wait_for 130 reload_is 0; then
    expect reload "broken ConfigMap: \`tidegate_config_last_reload_successful\` after $(seconds_since "$started")" 0 0
  else
    expect reload "broken ConfigMap: \`tidegate_config_last_reload_successful\`" 1 0
  fi
  expect reload "the old configuration still serves" "$(all_have_route && echo yes || echo no)" yes
  expect reload "log line of the fault" "$(kc logs "$(pods | cut -d' ' -f1)" -c tidegate --tail=20000 | grep -c -m1 'noode')" 1
  loaded reload reload "both reloads at 2 x $RATE requests/s"
  expect reload "same pods, no restart" "$([ "$before" = "$(pods) $(restarts)" ] && echo yes || echo no)" yes
  upgrade --force-conflicts
}

redis_step() {
  kc apply -f - >/dev/null <<Y
apiVersion: apps/v1
kind: Deployment
metadata: { name: redis }
spec:
  selector: { matchLabels: { app: redis } }
  template:
    metadata: { labels: { app: redis } }
    spec:
      containers:
        - name: redis
          image: $REDIS_IMAGE
          imagePullPolicy: IfNotPresent
          command: [$REDIS_COMMAND, --save, "", --appendonly, "no", --protected-mode, "no", --bind, "0.0.0.0"]
          readinessProbe: { tcpSocket: { port: 6379 }, periodSeconds: 1 }
          resources: { requests: { cpu: 20m, memory: 64Mi } }
---
apiVersion: v1
kind: Service
metadata: { name: redis }
spec: { selector: { app: redis }, ports: [{ port: 6379 }] }
Y
  if ! kc rollout status deployment/redis --timeout 60s >/dev/null 2>&1; then
    skip redis "Redis killed under load" "no pod of $REDIS_IMAGE starts; set REDIS_IMAGE"
    return
  fi
  upgrade --set config.rollOnChange=true --set-json "config.redis.regions={\"default\":{\"endpoints\":[\"redis://redis.$ns.svc:6379\"]}}"
  local pod
  load redis 40
  kc delete pod -l app=redis --grace-period=0 --force >/dev/null 2>&1
  sleep 6
  kc delete pod -l app=redis --grace-period=0 --force >/dev/null 2>&1
  loaded redis redis "Redis killed twice at 2 x $RATE requests/s"
  kc rollout status deployment/redis --timeout 60s >/dev/null
  pod=$(pods | cut -d' ' -f1)
  if wait_for 40 metric_is "$pod" tidegate_shard_breaker_open 0; then expect redis "Redis is read again, without a restart" yes yes; else expect redis "Redis is read again" no yes; fi
}

# Every gateway knows this many endpoints.
endpoints_are() { local pod; for pod in $(pods); do metric_is "$pod" tidegate_upstream_endpoints "$1" || return 1; done; }
# scale_origin COUNT: starts or ends pods of the origin, and reports when the gateways know it.
scale_origin() {
  local started
  kc scale deployment/origin --replicas "$1" >/dev/null
  kc rollout status deployment/origin --timeout 90s >/dev/null
  started=$(date +%s.%N)
  if wait_for 30 endpoints_are "$1"; then
    row discovery "origin scaled to $1: known to both gateways after its last pod was ready or ending" "$(seconds_since "$started")"
  else
    expect discovery "endpoints that both gateways know" "$(metric "$(pods | cut -d' ' -f1)" tidegate_upstream_endpoints)" "$1"
  fi
}
status_is() { [ "$(curl -s --max-time 5 -o /dev/null -w '%{http_code}' "$url/")" = "$1" ]; }
# The token of a gateway's service account: it may list EndpointSlices, and read nothing else.
rights() {
  local verb what
  for verb in get list watch; do
    for what in endpointslices.discovery.k8s.io secrets configmaps pods services; do
      kubectl auth can-i "$verb" "$what" --namespace "$ns" --as "system:serviceaccount:$ns:gate-tidegate" >/dev/null 2>&1 && printf '%s ' "$verb ${what%%.*}"
    done
  done
  true
}
discovery_step() {
  local started
  load discovery 100
  upgrade --set discovery.kubernetes.enabled=true --set-json 'config.upstream.endpoints=[]' \
    --set-json "config.upstreams={\"main\":{\"endpoints\":[\"kubernetes://origin.$ns:http\"]}}" \
    --set-json 'config.routes=[{"name":"everything","match":{"path":"/*"},"upstream":"main","cache":{"mode":"off"}}]' --set config.rollOnChange=true
  if wait_for 30 endpoints_are 2; then expect discovery "endpoints that both gateways know, by EndpointSlices" 2 2; else expect discovery "both gateways know 2 endpoints" no yes; fi
  expect discovery "rights of the gateways' service account" "$(rights)" 'list endpointslices watch endpointslices '
  scale_origin 4
  scale_origin 1
  scale_origin 2
  started=$(date +%s.%N)
  kc rollout restart deployment/origin >/dev/null
  kc rollout status deployment/origin --timeout 60s >/dev/null
  wait_for 30 endpoints_are 2 || true
  row discovery "rollout of the origin" "$(seconds_since "$started")"
  loaded discovery discovery "from the Service to its pods, origin 2, 4, 1, 2 pods and rolled, at 2 x $RATE requests/s"
  discovery_without_api
  discovery_from_nothing
}

# The last known endpoints stay in use.
discovery_without_api() {
  if [ -z "${API_STOP:-}" ] || [ -z "${API_START:-}" ]; then
    skip discovery "API server stopped under load" "set API_STOP and API_START"
    return
  fi
  local started
  load discovery-api 40
  touch "$work/api-stopped"
  bash -c "$API_STOP"
  sleep 20
  bash -c "$API_START"
  rm "$work/api-stopped"
  wait_for 60 kubectl get --raw /readyz >/dev/null 2>&1
  started=$(date +%s.%N)
  if wait_for 60 lookups_work; then row discovery "watched again after the API server was ready" "$(seconds_since "$started")"; else expect discovery "watched again" no yes; fi
  expect discovery "gateways that have logged \`lookup_failed\`" "$(for pod in $(pods); do kc logs "$pod" -c tidegate --tail=20000 | grep -c -m1 lookup_failed; done | awk "{ sum += \$1 } END { print sum }")" 2
  loaded discovery discovery-api "API server stopped for 20 s at 2 x $RATE requests/s"
  scale_origin 3
  scale_origin 2
}
lookups_work() { local pod; for pod in $(pods); do metric_is "$pod" tidegate_upstream_lookups_failing 0 || return 1; done; }

# Gateways that start while the Service has no pod.
discovery_from_nothing() {
  local started
  kc scale deployment/origin --replicas 0 >/dev/null
  kc wait --for=delete pod -l app=origin --timeout 90s >/dev/null 2>&1 || true
  started=$(date +%s.%N)
  kc rollout restart deployment/gate-tidegate >/dev/null
  kc rollout status deployment/gate-tidegate --timeout 90s >/dev/null
  row discovery "rollout of gateways whose upstream has no pod" "$(seconds_since "$started")"
  if wait_for 20 endpoints_are 0; then expect discovery "endpoints that both gateways know" 0 0; else expect discovery "both gateways know no endpoint" no yes; fi
  expect discovery "status of a request" "$(curl -s --max-time 5 -o /dev/null -w '%{http_code}' "$url/")" 503
  row discovery "response of the gateway, without an endpoint" "$(curl -s --max-time 5 -o /dev/null -w '%{time_total} s' "$url/")"
  kc scale deployment/origin --replicas 2 >/dev/null
  kc rollout status deployment/origin --timeout 90s >/dev/null
  started=$(date +%s.%N)
  if wait_for 30 status_is 200; then row discovery "first 200 after both pods of the origin were ready" "$(seconds_since "$started")"; else expect discovery "status with an origin" 503 200; fi
}

has_replicas() { [ "$(kc get deployment gate-tidegate -o jsonpath='{.spec.replicas}')" "$1" "$2" ]; }
has_metric() { kubectl get --raw "/apis/custom.metrics.k8s.io/$1/namespaces/$ns/pods/*/tidegate_requests_in_flight" 2>/dev/null | grep -q '"value"'; }
autoscaling_step() {
  local started
  if ! wait_for 40 has_metric v1beta2 && ! has_metric v1beta1; then
    skip autoscaling "2 to 4 pods on requests in flight" "this cluster has no custom metrics"
    return
  fi
  load autoscaling 100
  upgrade --set autoscaling.enabled=true,autoscaling.minReplicas=2,autoscaling.maxReplicas=4,autoscaling.cpuPercent=0,autoscaling.scaleDownSeconds=15 \
    --set-json 'autoscaling.metrics=[{"name":"tidegate_requests_in_flight","average":"20"}]'
  expect autoscaling "pods right after it is turned on" "$(kc get deployment gate-tidegate -o jsonpath='{.spec.replicas}')" 2
  started=$(date +%s.%N)
  timeout 120 k6 run --quiet --address "" --log-output=stderr --env BASE_URL="$url" --env RATE=60 --env SECONDS=40 --env SLOW=1 "$here/steady.js" >"$work/slow-load" 2>"$work/slow-load.log" &
  local slow=$!
  if wait_for 60 has_replicas -ge 4; then row autoscaling "90 requests in flight: 2 to 4 pods" "$(seconds_since "$started")"; else expect autoscaling "pods at 90 requests in flight" "$(kc get deployment gate-tidegate -o jsonpath='{.spec.replicas}')" 4; fi
  wait $slow || true
  expect autoscaling "slow requests ($(figure slow-load requests)), failed" "$(figure slow-load failed)" 0
  started=$(date +%s.%N)
  if wait_for 120 has_replicas -le 2; then row autoscaling "back to 2 pods after the load" "$(seconds_since "$started")"; else expect autoscaling "pods after the load" "$(kc get deployment gate-tidegate -o jsonpath='{.spec.replicas}')" 2; fi
  loaded autoscaling autoscaling "up and down at 2 x $RATE requests/s"
  upgrade --force-conflicts --set autoscaling.enabled=false
}

api_server_step() {
  if [ -z "${API_STOP:-}" ] || [ -z "${API_START:-}" ]; then
    skip api-server "API server stopped under load" "set API_STOP and API_START"
    return
  fi
  load api 30
  touch "$work/api-stopped"
  bash -c "$API_STOP"
  sleep 20
  bash -c "$API_START"
  rm "$work/api-stopped"
  loaded api-server api "API server stopped for 20 s at 2 x $RATE requests/s"
  wait_for 60 kubectl get --raw /readyz >/dev/null 2>&1
}

: >"$work/rows"
steps=("$@")
[ $# -gt 0 ] || steps=(rollout eviction reload redis discovery autoscaling api-server)
install_step
find_url
for step in "${steps[@]}"; do
  [ "$step" = install ] || "${step//-/_}_step"
done

if [ -n "${WRITE:-}" ]; then
  python3 - "$WRITE" "$work/rows" "$(kubectl version -o json | python3 -c 'import json,sys; print(json.load(sys.stdin)["serverVersion"]["gitVersion"])')" "$(kubectl get nodes --no-headers | wc -l)" "$(nproc)" <<'P'
import pathlib, sys
document, rows, version, nodes, cores = sys.argv[1:]
begin, end = "<!-- figures: written by helm/test-kubernetes.sh -->\n", "<!-- end of figures -->"
text = pathlib.Path(document).read_text()
before, rest = text.split(begin, 1)
after = rest.split(end, 1)[1]
about = f"Kubernetes {version}, nodes: {nodes}, load from a machine with {cores} cores.\n\n| step | what | result |\n|---|---|---|\n"
pathlib.Path(document).write_text(before + begin + about + pathlib.Path(rows).read_text() + end + after)
P
fi
[ "$failures" = 0 ] || { echo "$failures expectations failed" >&2; exit 1; }
echo "kubernetes ok"
