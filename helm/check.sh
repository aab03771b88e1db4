#!/usr/bin/env bash
# Lints the chart, renders it with each set of values in tidegate/ci, and runs `tidegate check` on the rendered configuration.
# Usage: helm/check.sh PATH-OF-TIDEGATE      (or TIDEGATE in the environment)
# Needs python3 and openssl. If helm is neither in ~/.cache/tidegate/bin nor on PATH, installs it there with Go.
set -euo pipefail

TIDEGATE=${1:-${TIDEGATE:-}}
[ -x "$TIDEGATE" ] || { echo "usage: $0 PATH-OF-TIDEGATE" >&2; exit 2; }
TIDEGATE=$(realpath "$TIDEGATE")
chart=$(cd "$(dirname "$0")/tidegate" && pwd)
bin=$HOME/.cache/tidegate/bin
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

helm=$(PATH=$bin:$PATH command -v helm || true)
if [ -z "$helm" ]; then
  echo "helm     installing into $bin"
  # An old Go does not build it, and a newer one may not reach the module proxy.
  if ! GOBIN=$bin go install helm.sh/helm/v4/cmd/helm@v4.3.1; then
    echo "SKIPPED: the chart was not checked, because $(go version) cannot build helm. Put helm on the PATH." >&2
    exit 0
  fi
  helm=$bin/helm
fi

fail() { echo "FAILED   $1" >&2; [ ! -f "$work/out" ] || cat "$work/out" >&2; exit 1; }

# expect_success NAME COMMAND...: the command must succeed; its output is shown only on failure.
expect_success() {
  local name=$1
  shift
  "$@" >"$work/out" 2>&1 || fail "$name"
  echo "ok       $name"
}

# rejects NAME MESSAGE ARGUMENT...: rendering with these arguments must fail with MESSAGE.
rejects() {
  local name=$1 message=$2
  shift 2
  if "$helm" template t "$chart" "$@" >"$work/out" 2>&1; then fail "$name: was accepted"; fi
  grep -qF -- "$message" "$work/out" || fail "$name: rejected without the message: $message"
  echo "ok       $name"
}

# Writes the files of the ConfigMap on standard input into a directory. The template writes tidegate.toml as a
# literal block, indented by four, and every other file as one JSON string.
extract_files() {
  python3 -c '
import json, pathlib, re, sys
into = pathlib.Path(sys.argv[1])
data = sys.stdin.read().split("\ndata:\n", 1)[1]
head, rest = data.split("  tidegate.toml: |\n", 1)
block, files = [], []
for line in rest.splitlines():
    if not files and (line.startswith("    ") or not line.strip()):
        block.append(line[4:])
    elif line.strip():
        files.append(line)
into.joinpath("tidegate.toml").write_text("\n".join(block).rstrip() + "\n")
for line in files:
    name, text = re.fullmatch(r"  ([^ :]+): (\".*\")", line).groups()
    into.joinpath(name).write_text(json.loads(text))
' "$1"
}

# Provides the inputs of the Deployment on standard input: prints NAME=VALUE for each of its variables, with a dummy value for those from a
# Secret, and creates the files of its Secrets in a directory, as copies of PAIR.crt, PAIR.key and PAIR.json.
provide_inputs() {
  python3 -c '
import pathlib, re, shutil, sys
into, pair = map(pathlib.Path, sys.argv[1:])
text = sys.stdin.read()
variables = text.split("\n          env:\n", 1)[1].split("\n          ports:\n", 1)[0]
for variable in re.split(r"(?m)^            - name: ", variables)[1:]:
    value = re.search(r"(?m)^              value: (.*)", variable)
    print(variable.split("\n", 1)[0] + "=" + (value[1].strip("\"\x27") if value else "dummy"))
for path in re.findall(r"(?m)^ +- \{ key: [^,]+, path: (\S+) \}$", text):
    into.joinpath(path).parent.mkdir(exist_ok=True)
    shutil.copy(pair.with_suffix(pathlib.Path(path).suffix), into / path)
' "$1" "$2"
}

expect_success "create a test certificate" openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 \
  -subj /CN=localhost -keyout "$work/pair.key" -out "$work/pair.crt"
# The public key as a JWK set: a P-256 public key in DER ends with the 32 bytes of each coordinate (RFC 5480 section 2.2).
openssl pkey -in "$work/pair.key" -pubout -outform DER | python3 -c '
import base64, json, sys
point = sys.stdin.buffer.read()[-64:]
x, y = (base64.urlsafe_b64encode(half).rstrip(b"=").decode() for half in (point[:32], point[32:]))
print(json.dumps({"keys": [{"kty": "EC", "crv": "P-256", "use": "sig", "kid": "check", "x": x, "y": y}]}))
' >"$work/pair.json"

for values in "$chart"/ci/*-values.yaml; do
  set=$(basename "$values" -values.yaml)
  dir=$work/$set
  mkdir "$dir"
  expect_success "$set: helm lint" "$helm" lint --strict "$chart" --values "$values"
  expect_success "$set: helm template" "$helm" template t "$chart" --values "$values"
  "$helm" template t "$chart" --values "$values" --show-only templates/configmap.yaml | extract_files "$dir" || fail "$set: no tidegate.toml in the ConfigMap"
  "$helm" template t "$chart" --values "$values" --show-only templates/deployment.yaml | provide_inputs "$dir" "$work/pair" >"$dir/variables" ||
    fail "$set: cannot parse the Deployment"
  mapfile -t variables <"$dir/variables"
  # Paths in the file are relative to its directory, which is also the container's working directory. Only the variables of the Deployment are set.
  expect_success "$set: tidegate check" env -C "$dir" -i "${variables[@]}" "$TIDEGATE" check tidegate.toml
done

# rejects_with NAME MESSAGE BASE: as rejects, for ci/BASE-values.yaml overridden by the values on standard input.
rejects_with() {
  cat >"$work/values.yaml"
  rejects "$1" "$2" --values "$chart/ci/$3-values.yaml" --values "$work/values.yaml"
}

# rejects_region NAME MESSAGE REGION: as rejects, for the region `default` as a flow mapping.
rejects_region() {
  rejects_with "$1" "$2" minimal <<<"config: { redis: { regions: { default: $3 } } }"
}

# rejects_token NAME MESSAGE JWT: as rejects, for identity.jwt as a flow mapping.
rejects_token() {
  rejects_with "$1" "$2" minimal <<<"config: { identity: { jwt: $3 } }"
}

# rejects_limit NAME MESSAGE RULE: as rejects, for the limit `all` as a flow mapping.
rejects_limit() {
  rejects_with "$1" "$2" minimal <<<"config: { limits: { all: $3 } }"
}

# renders SET LINE...: the configuration rendered from ci/SET-values.yaml must contain these lines.
renders() {
  local set=$1 line
  shift
  for line in "$@"; do
    grep -qxF -- "$line" "$work/$set/tidegate.toml" || { cp "$work/$set/tidegate.toml" "$work/out"; fail "$set: missing line: $line"; }
  done
  echo "ok       $set: rendered lines"
}

# contains NAME BASE TEXT...: the chart rendered from ci/BASE-values.yaml, overridden by the values on standard input, must contain these texts.
contains() {
  local name=$1 base=$2 text
  shift 2
  cat >"$work/values.yaml"
  "$helm" template t "$chart" --values "$chart/ci/$base-values.yaml" --values "$work/values.yaml" >"$work/out" 2>&1 || fail "$name"
  for text in "$@"; do [[ $(<"$work/out") == *"$text"* ]] || fail "$name: missing text: $text"; done
  echo "ok       $name"
}

renders full 'nodes = 12' 'slots = 32'
renders shared-limit 'nodes = 4'
renders redis-cluster 'nodes = 5' 'slots = 64' 'ca = "redis-tls/ca.crt"' \
  'cluster = ["rediss://tidegate:${REDIS_PASSWORD}@redis-0.redis.cache.svc:6379","rediss://tidegate:${REDIS_PASSWORD}@redis-1.redis.cache.svc:6379"]'
renders redis-tls 'nodes = 40' 'deadline = "10ms"' 'compress_from = "16KiB"' 'compression = "zstd"' 'hot_rate = "30000/m"' 'hot_copies = 3' 'cert = "redis-tls/tls.crt"' 'key = "redis-tls/tls.key"' \
  'remote_object_bytes = "2MiB"' 'key_ignore_query = ["utm_*", "fbclid"]'
renders redis-regions 'fallback = ["us_east","default"]' 'region = ["header:x-region","host:"]' 'region_default = "eu-west"' \
  'breaker = { error_ratio = 0.25, minimum = 50, open = "10s" }' 'device = ["header:x-device-id"]'
renders callers 'device = ["header:x-device-id","cookie:device","path:2"]' 'user = "header:x-user-id"' 'tier = "header:x-user-tier"' 'forwarded_field = "x-forwarded-for"' \
  'anonymous = 0.5' 'gold = 2' '"platinum.eu" = 3.2' \
  'exempt = ["10.1.0.0/16","fd00::/8","user:backup"]' 'denied = ["192.0.2.7","2001:db8::1","device:stolen"]' \
  'per_address = 0' 'percent = 0' 'keys = 16777216' 'headers = "policy"' '[limits."tenant.v1"]' 'tier = "key"' 'key = "header:x-tenant"' 'keys = 2000' \
  'headers = "none"' 'reserve = { anonymous = 0.5, "platinum.eu" = 0.05 }' 'limits = ["device","node","tenant.v1","user"]' \
  'cost = 2' 'cost_by_status = { 401 = 20, 403 = 5, 5xx = 3 }' 'degrade = { html = "busy.html", status = 500 }'

renders jwt 'tier = { jwt_claim = "https://id.example/plan" }' 'key = "claim:https://id.example/org"' 'limits = ["tenant","user"]' \
  'user = { jwt = { algorithms = ["ES256", "RS256"], audience = ["shop", "https://shop.example"], claim = "email", issuer = "https://id.example", keys = "jwt/jwks.json", leeway = "1m", token = "cookie:session" } }'

contains "token keys in a Secret" jwt '- secret:
                  name: "issuer"' '- { key: "keys", path: jwt/jwks.json }' <<<'{}'
contains "token keys in a ConfigMap" minimal '- configMap:
                  name: "issuer"' '- { key: "jwks.json", path: jwt/jwks.json }' \
  'user = { jwt = { algorithms = ["EdDSA"], claim = "sub", keys = "jwt/jwks.json", leeway = "30s", token = "bearer" } }' \
  <<<'config: { identity: { jwt: { configMapName: issuer, algorithms: [EdDSA] } } }'
contains "a user class from a proxy for a user from a token" jwt 'tier = "header:x-plan"' \
  <<<'config: { trusted_proxies: [10.0.0.0/8], identity: { tier: header:x-plan, jwt: { tierClaim: "" } } }'

rejects "no upstream" "config.upstream.endpoints is empty"
rejects "an unknown value" "replicas" --values "$chart/ci/minimal-values.yaml" --set replicas=3
rejects "a cluster limit without Redis" "a cluster limit needs config.redis.regions" --values "$chart/ci/minimal-values.yaml" \
  --set config.limits.all.tier=cluster,config.limits.all.rate=100/s,config.limits.all.burst=100
rejects_with "a device source of an unknown kind" "/config/identity/device/0" minimal <<<'config: { identity: { device: [query:id] } }'
rejects_with "a path segment above 32" "/config/identity/device/0" minimal <<<'config: { identity: { device: [path:33] } }'
rejects_with "a claim as device source" "/config/identity/device/0" jwt <<<'config: { identity: { device: [claim:device] } }'
rejects_with "a cookie as user source" "/config/identity/user" callers <<<'config: { identity: { user: cookie:user } }'
rejects_with "a user header without trusted proxies" "config.trusted_proxies" minimal <<<'config: { identity: { user: header:x-user-id } }'
rejects_with "a user class without a user" "config.identity.tier needs config.identity.user" callers <<<'config: { identity: { user: "" } }'
rejects_with "a typed identity key in extra" "/config/identity/extra/device" minimal <<<'config: { identity: { extra: { device: ["host:"] } } }'
rejects_token "tokens without an algorithm" "algorithms is empty" '{ secretName: s }'
rejects_token "unsigned tokens" "/config/identity/jwt/algorithms/0" '{ secretName: s, algorithms: [none] }'
rejects_token "tokens without keys" "set its secretName or configMapName" '{ algorithms: [ES256] }'
rejects_token "an audience without keys" "set its secretName or configMapName" '{ audience: [shop] }'
rejects_token "an issuer without keys" "set its secretName or configMapName" '{ issuer: "https://id.example" }'
rejects_token "token keys from both a Secret and a ConfigMap" "secretName and configMapName exclude each other" '{ secretName: s, configMapName: c, algorithms: [ES256] }'
rejects_token "a shared secret in a ConfigMap" "store it in a Secret" '{ configMapName: c, algorithms: [HS256] }'
rejects_token "HS algorithms with public-key algorithms" "cannot be combined" '{ secretName: s, algorithms: [HS256, ES256] }'
rejects_token "an audience that is not a list" "/config/identity/jwt/audience" '{ secretName: s, algorithms: [ES256], audience: shop }'
rejects_token "an empty audience" "/config/identity/jwt/audience/0" '{ secretName: s, algorithms: [ES256], audience: [""] }'
rejects_token "an empty user claim" "/config/identity/jwt/claim" '{ secretName: s, algorithms: [ES256], claim: "" }'
rejects_token "a leeway of an hour" "/config/identity/jwt/leeway" '{ secretName: s, algorithms: [ES256], leeway: 1h }'
rejects_token "a leeway 1 s above the maximum" "/config/identity/jwt/leeway" '{ secretName: s, algorithms: [ES256], leeway: 301s }'
rejects_token "a token in the query" "/config/identity/jwt/token" '{ secretName: s, algorithms: [ES256], token: "query:t" }'
rejects_token "a typed jwt key (audience) in extra" "/config/identity/jwt/extra/audience" '{ secretName: s, algorithms: [ES256], extra: { audience: [a] } }'
rejects_token "a typed jwt key (keys) in extra" "/config/identity/jwt/extra/keys" '{ secretName: s, algorithms: [ES256], extra: { keys: a } }'
rejects_with "a user from both a token and a header" "both name the user" callers <<<'config: { identity: { jwt: { secretName: s, algorithms: [ES256] } } }'
rejects_with "a user class from both a token and a header" "both name the user class" callers \
  <<<'config: { identity: { user: "", jwt: { secretName: s, algorithms: [ES256], tierClaim: tier } } }'
rejects_with "a weight of zero" "/config/tiers/gold" callers <<<'config: { tiers: { gold: 0 } }'
rejects_with "a weight below the minimum" "minimum" callers <<<'config: { tiers: { gold: 0.0000001 } }'
rejects_with "a malformed name of a user class" "invalid propertyName 'gold one'" callers <<<'config: { tiers: { "gold one": 2 } }'
rejects_limit "a key limit without a key" "missing property 'key'" '{ tier: key, rate: 1/s, burst: 1 }'
rejects_limit "a key in a user limit" "/config/limits/all/key" '{ tier: user, key: "host:", rate: 1/s, burst: 1 }'
rejects_limit "a key source of an unknown kind" "/config/limits/all/key" '{ tier: key, key: x-tenant, rate: 1/s, burst: 1 }'
rejects_limit "a claim without a name" "/config/limits/all/key" '{ tier: key, key: "claim:", rate: 1/s, burst: 1 }'
rejects_limit "a claim in a user limit" "/config/limits/all/key" '{ tier: user, key: "claim:org", rate: 1/s, burst: 1 }'
rejects_limit "a claim without tokens" "there is no token to read the claim from" '{ tier: key, key: "claim:org", rate: 1/s, burst: 1 }'
rejects_with "a claim with a user from a header" "there is no token to read the claim from" callers \
  <<<'config: { limits: { org: { tier: key, key: "claim:org", rate: 1/s, burst: 60 } } }'
rejects_limit "keys above the maximum" "maximum" '{ tier: device, keys: 16777217, rate: 1/s, burst: 1 }'
rejects_limit "keys in a node limit" "/config/limits/all/keys" '{ tier: node, keys: 5, rate: 1/s, burst: 1 }'
rejects_limit "per_address in a node limit" "/config/limits/all/per_address" '{ tier: node, per_address: 5, rate: 1/s, burst: 1 }'
rejects_limit "per_address without identity.device" "per_address needs config.identity.device" '{ tier: device, per_address: 5, rate: 1/s, burst: 1 }'
rejects_limit "per_address 0 without identity.device" "per_address needs config.identity.device" '{ tier: device, per_address: 0, rate: 1/s, burst: 1 }'
rejects_limit "per_address in a key limit" "/config/limits/all/per_address" '{ tier: key, key: "host:", per_address: 0, rate: 1/s, burst: 1 }'
rejects_with "the reserved limit name explain" "invalid propertyName 'explain'" minimal \
  <<<'config: { limits: { explain: { tier: node, rate: 1/s, burst: 1 } } }'
rejects_limit "a reserve in a device limit" "/config/limits/all/reserve" '{ tier: device, reserve: { standard: 0.5 }, rate: 1/s, burst: 1 }'
rejects_limit "a reserve of 1" "exclusiveMaximum" '{ tier: node, reserve: { standard: 1 }, rate: 1/s, burst: 1 }'
rejects_limit "a reserve for an unknown user class" "unknown user class gold" '{ tier: node, reserve: { gold: 0.5 }, rate: 1/s, burst: 1 }'
rejects_limit "an unknown value of headers" "/config/limits/all/headers" '{ tier: node, headers: some, rate: 1/s, burst: 1 }'
rejects_limit "a user limit without users" "no request has a user" '{ tier: user, rate: 1/s, burst: 1 }'
rejects_with "a host name in the deny list" "/config/access/denied/0" minimal <<<'config: { access: { denied: [localhost] } }'
rejects_with "an empty user ID in the allow list" "/config/access/exempt/0" callers <<<'config: { access: { exempt: ["user:"] } }'
rejects_with "an unknown access list" "additional properties 'allowed'" minimal <<<'config: { access: { allowed: [10.0.0.0/8] } }'
rejects_with "a denied device without identity.device" "device:stolen never matches" minimal <<<'config: { access: { denied: [device:stolen] } }'
rejects_with "an exempt device without identity.device" "device:own never matches" minimal <<<'config: { access: { exempt: [device:own] } }'
rejects_with "a denied user without users" "user:mallory never matches" minimal <<<'config: { access: { denied: [user:mallory] } }'
rejects_with "an exempt user without users" "user:backup never matches" minimal <<<'config: { access: { exempt: [user:backup] } }'
rejects_with "a cost of zero" "minimum" minimal <<<'config: { route: { cost: 0 } }'
rejects_with "a cost above a burst" "exceeds its burst" callers <<<'config: { route: { cost: 61 } }'
rejects_with "a cost of an unknown status class" "invalid propertyName '6xx'" minimal <<<'config: { route: { cost_by_status: { 6xx: 2 } } }'
rejects_with "a typed route key in extra" "/config/route/extra/cost" minimal <<<'config: { route: { extra: { cost: 2 } } }'
rejects_region "a region without servers" "'oneOf' failed" '{ slots: 4 }'
rejects_region "a region with endpoints and cluster" "subschemas 0, 1 matched" '{ endpoints: ["redis://a:6379"], cluster: ["redis://b:6379"] }'
rejects_region "an unknown key of a region" "additional properties 'slot'" '{ endpoints: ["redis://a:6379"], slot: 4 }'
rejects_region "too many slots" "maximum" '{ endpoints: ["redis://a:6379"], slots: 1025 }'
rejects_region "more endpoints than slots" "2 endpoints need at least as many slots" '{ endpoints: ["redis://a", "redis://b"], slots: 1 }'
rejects_region "an endpoint with an unknown scheme" "pattern" '{ endpoints: ["http://a:6379"] }'
rejects_region "a password in the ConfigMap" "pattern" '{ endpoints: ["redis://gate:s3cret@a:6379"] }'
rejects_region "a user without a password separator, which may be a password" "pattern" '{ endpoints: ["redis://s3cret@a:6379"] }'
rejects_region "a password as the default of a variable" "pattern" '{ endpoints: ["redis://:${REDIS_PASSWORD:-s3cret}@a:6379"] }'
rejects_region "a password from a file, which only a ConfigMap could contain" "pattern" '{ endpoints: ["redis://:${file:password}@a:6379"] }'
rejects_region "a password of a Sentinel master in the ConfigMap" "pattern" '{ endpoints: ["redis+sentinel://:s3cret@a,b/orders"] }'
rejects_region "Sentinels without a master" "pattern" '{ endpoints: ["redis+sentinel://a,b"] }'
rejects_region "disabled certificate verification" "pattern" '{ endpoints: ["rediss://a#insecure"] }'
rejects_region "a database in a cluster address" "pattern" '{ cluster: ["redis://a:6379/1"] }'
rejects_region "Sentinels in a cluster address" "pattern" '{ cluster: ["redis+sentinel://a,b/orders"] }'
rejects_region "a fallback to an unknown region" "unknown region eu" '{ endpoints: ["redis://a:6379"], fallback: [eu] }'
rejects_region "a fallback to the region itself" "names the region itself" '{ endpoints: ["redis://a:6379"], fallback: [default] }'
rejects_region "a password variable that is not set" 'refers to ${REDIS_PASSWORD}' '{ endpoints: ["redis://:${REDIS_PASSWORD}@a:6379"] }'
rejects_with "a limit without a burst" "missing property 'burst'" minimal <<<'config: { limits: { all: { tier: node, rate: 100/s } } }'
rejects_with "a region name in upper case" "additional properties 'EU'" minimal <<<'config: { redis: { regions: { EU: { endpoints: ["redis://a"] } } } }'
rejects_with "regions without default" "a region named default" minimal <<<'config: { redis: { regions: { eu: { endpoints: ["redis://a"] } } } }'
rejects_with "an unknown key of redis" "additional properties 'hot'" minimal <<<'config: { redis: { hot: 4 } }'
rejects_with "a typed redis key in extra" "/config/redis/extra/deadline" redis-tls <<<'config: { redis: { extra: { deadline: 5ms } } }'
rejects_with "a typed cache key (memory) in extra" "/config/cache/extra/memory" minimal <<<'config: { cache: { extra: { memory: 1GiB } } }'
rejects_with "a typed cache key (hot_rate) in extra" "/config/cache/extra/hot_rate" minimal <<<'config: { cache: { extra: { hot_rate: 9/s } } }'
rejects_with "a typed redis key (hot_copies) in extra" "/config/redis/extra/hot_copies" redis-tls <<<'config: { redis: { extra: { hot_copies: 2 } } }'
rejects_with "hot_copies above the maximum" "maximum" redis-tls <<<'config: { redis: { hot_copies: 65 } }'
rejects_with "a hot_rate of zero" "pattern" minimal <<<'config: { cache: { hot_rate: 0/s } }'
rejects_with "a null item in extra" "got null" minimal <<<'config: { cache: { extra: { key_fields: [null] } } }'
rejects_with "a login without regions" "need config.redis.regions" minimal <<<'config: { redis: { auth: { secretName: s } } }'
rejects_with "a login that no address uses" 'sets ${REDIS_PASSWORD}, which no address' full <<<'config: { redis: { auth: { secretName: s } } }'
rejects_with "certificates that no address uses" "begins with rediss" full <<<'config: { redis: { tls: { secretName: s } } }'
rejects_with "a TLS Secret without keys" "neither caKey nor certKey" redis-cluster <<<'config: { redis: { tls: { caKey: "" } } }'
rejects_with "a certificate without its key" "/config/redis/tls/keyKey" redis-cluster <<<'config: { redis: { tls: { certKey: tls.crt } } }'
rejects "autoscaling without a metric" "autoscaling needs a metric" --values "$chart/ci/minimal-values.yaml" \
  --set autoscaling.enabled=true,autoscaling.cpuPercent=0
echo "chart ok"
