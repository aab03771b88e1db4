#!/usr/bin/env bash
# Lints the chart, renders it with each set of values in tidegate/ci, validates the manifests, and runs `tidegate check` on the configuration.
# Usage: helm/check.sh PATH-OF-TIDEGATE      (or TIDEGATE in the environment)
#        helm/check.sh --install             installs what it needs, and ends
# Needs python3 and openssl. Installs helm (with Go) and the schemas of Kubernetes (from PyPI) in ~/.cache/tidegate, where they are missing; says
# SKIPPED where that is not possible.
set -euo pipefail

TIDEGATE=${1:-${TIDEGATE:-}}
[ "$TIDEGATE" = --install ] || [ -x "$TIDEGATE" ] || { echo "usage: $0 PATH-OF-TIDEGATE" >&2; exit 2; }
[ "$TIDEGATE" = --install ] || TIDEGATE=$(realpath "$TIDEGATE")
chart=$(cd "$(dirname "$0")/tidegate" && pwd)
bin=$HOME/.cache/tidegate/bin
schemas=$HOME/.cache/tidegate/chart-schemas
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "FAILED   $1" >&2; [ ! -f "$work/out" ] || cat "$work/out" >&2; exit 1; }

helm=$(PATH=$bin:$PATH command -v helm || true)
if [ -z "$helm" ]; then
  if ! command -v go >/dev/null; then
    echo 'SKIPPED: the chart was not checked, because neither helm nor go is installed.'
    exit 0
  fi
  echo "helm     installing into $bin (about 3 minutes, once)"
  if ! GOBIN=$bin go install helm.sh/helm/v4/cmd/helm@v4.3.2 >"$work/out" 2>&1; then
    grep -qE 'requires go|toolchain not available|unknown directive' "$work/out" || fail "install helm"
    echo "SKIPPED: the chart was not checked, because $(go version | cut -d' ' -f3) is too old to build helm. Put helm 4 on the PATH."
    exit 0
  fi
  helm=$bin/helm
fi

# The schemas of Kubernetes, as a Python package. Empty: they cannot be installed.
python=$schemas/bin/python
if ! "$python" -c 'import kubernetes_validate' 2>/dev/null; then
  echo "schemas  installing into $schemas"
  if ! { python3 -m venv "$schemas" && "$schemas/bin/pip" install --quiet --disable-pip-version-check kubernetes-validate==1.37.0; } >"$work/out" 2>&1; then
    python=
    echo 'SKIPPED: the manifests are not validated, because python3-venv or PyPI is not available.'
  fi
fi

[ "$TIDEGATE" != --install ] || exit 0

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
    print(variable.split("\n", 1)[0] + "=" + (value[1].strip("\"\x27") if value else "dummy-of-the-check"))
for path in re.findall(r"(?m)^ +- \{ key: [^,]+, path: (\S+) \}$", text):
    into.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
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

# An empty revocation list of the certificate, as PEM.
: >"$work/index"
echo '<!doctype html><title>Page</title>' >"$work/pair.html"
printf '[ca]\ndefault_ca = own\n[own]\ndatabase = %s\ndefault_md = sha256\ndefault_crl_days = 1\n' "$work/index" >"$work/ca.conf"
expect_success "create a revocation list" openssl ca -config "$work/ca.conf" -gencrl -keyfile "$work/pair.key" -cert "$work/pair.crt" -out "$work/pair.pem"

expect_success "README, schema and rules are current" python3 "$chart/../generate.py" "$TIDEGATE" --check

# part TEMPLATE: of the manifests on standard input, those of templates/TEMPLATE.
part() { awk -v source="# Source: tidegate/templates/$1" '/^---$/ { inside = 0 } inside; $0 == source { inside = 1 }'; }

# render SET VALUES...: renders the chart into $work/SET: the manifests, the files of its ConfigMap and Secrets, and the variables of the gateway.
render() {
  local dir=$work/$1
  shift
  mkdir "$dir"
  "$helm" template t "$chart" "$@" >"$dir/manifests" 2>"$work/out" || fail "${dir##*/}: helm template"
  part configmap.yaml <"$dir/manifests" | extract_files "$dir" || fail "${dir##*/}: no tidegate.toml in the ConfigMap"
  part deployment.yaml <"$dir/manifests" | provide_inputs "$dir" "$work/pair" >"$dir/variables" || fail "${dir##*/}: cannot parse the Deployment"
}

for values in "$chart"/ci/*-values.yaml; do
  set=$(basename "$values" -values.yaml)
  expect_success "$set: helm lint" "$helm" lint --strict "$chart" --values "$values"
  render "$set" --values "$values"
  [ -z "$python" ] || expect_success "$set: valid manifests" "$python" "$chart/../validate.py" <"$work/$set/manifests"
  mapfile -t variables <"$work/$set/variables"
  # Paths in the file are relative to its directory, which is also the container's working directory. Only the variables of the Deployment are set.
  expect_success "$set: tidegate check" env -C "$work/$set" -i "${variables[@]}" "$TIDEGATE" check tidegate.toml
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
rejects_token "tokens without keys" "set its url, secretName or configMapName" '{ algorithms: [ES256] }'
rejects_token "an audience without keys" "set its url, secretName or configMapName" '{ audience: [shop] }'
rejects_token "an issuer without keys" "set its url, secretName or configMapName" '{ issuer: "https://id.example" }'
rejects_token "token keys from both a Secret and a ConfigMap" "url, secretName and configMapName exclude each other" '{ secretName: s, configMapName: c, algorithms: [ES256] }'
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
  --set autoscaling.enabled=true,autoscaling.cpuPercent=0 --set-json 'autoscaling.metrics=[]'

# The long form: names, keys, units and contradictions.
rejects_routes() { rejects_with "$1" "$2" routes <<<"config: $3"; }
rejects_routes "both forms" "config.upstream.endpoints belongs to the short form" '{ upstream: { endpoints: ["http://a"] } }'
rejects_routes "a timeout of the short form" "config.upstream.timeout belongs to the short form" '{ upstream: { timeout: 3s } }'
rejects_routes "a cache mode of the short form" "config.cache.mode belongs to the short form" '{ cache: { mode: "off" } }'
rejects_with "upstreams without routes" "config.routes is empty" minimal <<<'config: { upstreams: { a: { endpoints: ["http://a"] } } }'
rejects_routes "two routes of one name" "two routes are named a" '{ routes: [{ name: a, match: { path: /a }, upstream: shop }, { name: a, match: { path: /b }, upstream: shop }] }'
rejects_routes "an unknown upstream" "a names the upstream shopp" '{ routes: [{ name: a, match: { path: /a }, upstream: shopp }] }'
rejects_with "an upstream with no endpoints key" "missing property 'endpoints'" routes <<<'config: { upstreams: { other: { retries: 1 } } }'
rejects_routes "an unknown upstream of a canary" "a names the upstream next" '{ routes: [{ name: a, match: { path: /a }, upstream: shop, canary: { upstream: next, percent: 5 } }] }'
rejects_routes "an unknown limit" "a names the limit all" '{ routes: [{ name: a, match: { path: /a }, upstream: shop, limits: [all] }] }'
rejects_routes "a route that leads nowhere" "'oneOf' failed" '{ routes: [{ name: a, match: { path: /a } }] }'
rejects_routes "a route with two ends" "subschemas 0, 2 matched" '{ routes: [{ name: a, match: { path: /a }, upstream: shop, respond: { body: x } }] }'
rejects_routes "a route without a match" "missing property 'match'" '{ routes: [{ name: a, upstream: shop }] }'
rejects_routes "an unknown key of a route" "additional properties 'methods'" '{ routes: [{ name: a, methods: [GET], match: { path: /a }, upstream: shop }] }'
rejects_routes "a cost of a route above a burst" "the cost of route a, 201, exceeds its burst" '{ routes: [{ name: a, match: { path: /a }, upstream: shop, limits: [device], cost: 201 }] }'
rejects_routes "an upstream without endpoints" "minItems" '{ upstreams: { shop: { endpoints: [] } } }'
rejects_routes "an endpoint without a scheme" "pattern" '{ upstreams: { shop: { endpoints: [shop.default.svc:80] } } }'
rejects_routes "an unknown key of an upstream" "additional properties 'timout'" '{ upstreams: { shop: { endpoints: ["http://a"], timout: 3s } } }'
rejects_routes "a duration without a unit" "/config/upstreams/shop/timeout" '{ upstreams: { shop: { endpoints: ["http://a"], timeout: 3 } } }'
rejects_routes "a duration in days" "pattern" '{ upstreams: { shop: { endpoints: ["http://a"], breaker: { open: 1d } } } }'
rejects_routes "a size in kilobytes" "/config/limits_http/body_bytes" '{ limits_http: { body_bytes: 64kB } }'
rejects_routes "an unknown key of limits_http" "additional properties 'body'" '{ limits_http: { body: 1MiB } }'
rejects_routes "workers above the maximum" "maximum" '{ server: { workers: 1025 } }'
rejects_routes "drain_timeout beside drainSeconds" "/config/server/drain_timeout" '{ server: { drain_timeout: 5s } }'
rejects_routes "an unknown key in extra" "additional properties 'objects'" '{ cache: { extra: { objects: 3 } } }'
rejects_routes "two keys for the hashes of callers" "secretName and extra.secret exclude each other" '{ identity: { extra: { secret: "${S}" } } }'
rejects_with "tracing without a collector" "config.tracing.extra has no effect" minimal <<<'config: { tracing: { extra: { query: true } } }'

rejects_routes "discovery without its rights" "set discovery.kubernetes.enabled" '{ upstreams: { shop: { endpoints: ["kubernetes://shop.default:http"] } } }'
rejects_routes "an unknown key of kubernetes" "additional properties 'token'" '{ kubernetes: { token: x } }'

# Objects.
rejects_object() { rejects_with "$1" "$2" minimal <<<"$3"; }
rejects_object "two autoscalers" "exclude each other" '{ autoscaling: { enabled: true }, keda: { enabled: true, prometheus: { serverAddress: "http://p" } } }'
rejects_object "KEDA without a trigger" "keda needs a trigger" '{ keda: { enabled: true } }'
rejects_object "fewer pods at most than at least" "keda.minReplicas is above keda.maxReplicas" '{ keda: { enabled: true, minReplicas: 20, prometheus: { serverAddress: "http://p" } } }'
rejects_object "node ports of a ClusterIP" "need service.type NodePort or LoadBalancer" '{ service: { nodePorts: { http: 30080 } } }'
rejects_object "source ranges without a load balancer" "need service.type LoadBalancer" '{ service: { type: NodePort, loadBalancerSourceRanges: [10.0.0.0/8] } }'
rejects_object "client certificates without TLS" "tls.clientCA needs a certificate of the gateway" '{ tls: { clientCA: { secretName: ca } } }'
rejects_object "one Secret as two certificates" "is the first certificate already" '{ tls: { secretName: a, secrets: [a] } }'
rejects_object "a Certificate without an issuer" "needs dnsNames and issuerRef.name" '{ tls: { certManager: { enabled: true, dnsNames: [a.example] } } }'
rejects_object "users by certificates without client certificates" "set tls.clientCA" '{ config: { identity: { user: "certificate:san" } } }'
rejects_object "an HTTPRoute without a Gateway" "httpRoute.parentRefs is empty" '{ httpRoute: { enabled: true } }'
rejects_object "discovery with the default account" "needs a service account of its own" '{ discovery: { kubernetes: { enabled: true } }, serviceAccount: { create: false } }'
rejects_object "two preStop hooks" "lifecycle.preStop and preStopSeconds exclude each other" '{ lifecycle: { preStop: { sleep: { seconds: 1 } } } }'
rejects_object "a mount inside the configuration" "/extraVolumeMounts/0/mountPath" '{ extraVolumeMounts: [{ name: a, mountPath: /etc/tidegate/a }] }'
rejects_object "an unknown option" "additional properties 'sidecar'" '{ sidecar: [] }'

# invalid NAME EXPRESSION: the validation refuses the manifests of ci/objects-values.yaml after this change by sed.
invalid() {
  [ -n "$python" ] || return 0
  sed -E "$2" "$work/objects/manifests" | "$python" "$chart/../validate.py" >"$work/out" 2>&1 && fail "$1: was accepted"
  echo "ok       $1"
}
expect_success "every kind is rendered" diff - <(sed -n 's/^kind: //p' "$work/objects/manifests" | sort -u | tr '\n' ' '; echo) \
  <<<'Certificate ConfigMap Deployment HTTPRoute Ingress NetworkPolicy Pod PodDisruptionBudget PodMonitor PrometheusRule Role RoleBinding ScaledObject Service ServiceAccount '
invalid "a misspelt field of a pod" 's/^( +)dnsPolicy:/\1dnsPolicies:/'
invalid "a text in place of a number" 's/^  minReplicaCount: 3/  minReplicaCount: "3"/'
invalid "a misspelt field of a PodMonitor" 's/podMetricsEndpoints/podMetricEndpoints/'
invalid "two objects of one name" 's/name: t-tidegate-admin/name: t-tidegate/'
contains "a pod's end fits into its grace period" minimal 'terminationGracePeriodSeconds: 45' 'drain_timeout = "30s"' <<<'{}'
contains "workers from a CPU limit in thousandths" minimal 'workers = 1' <<<'resources: { limits: { cpu: 1900m } }'
contains "workers from a CPU limit in cores" minimal 'workers = 4' <<<'resources: { limits: { cpu: 4 } }'
contains "workers of a small CPU limit" minimal 'workers = 1' <<<'resources: { limits: { cpu: "0.5" } }'
contains "workers by value" minimal 'workers = 3' <<<'{ resources: { limits: { cpu: 8 } }, config: { server: { workers: 3 } } }'
contains "no token without discovery" minimal 'automountServiceAccountToken: false' <<<'{}'
contains "a token with discovery" minimal '      automountServiceAccountToken: true' 'resources: [endpointslices]' 'verbs: [list, watch]' 'namespace: other' \
  <<<'discovery: { kubernetes: { enabled: true, namespaces: [other] } }'
contains "requests in flight first, CPU last" minimal 'name: tidegate_requests_in_flight
        target:
          type: AverageValue
          averageValue: "200"
    - type: Resource' <<<'autoscaling: { enabled: true }'
contains "a Certificate and its Secret" minimal 'kind: Certificate' 'secretName: t-tidegate-tls' 'name: "t-tidegate-tls"' 'cert = "tls/tls.crt"' \
  <<<'tls: { certManager: { enabled: true, dnsNames: [a.example], issuerRef: { name: ca } } }'
contains "an alert on refused reloads" objects 'alert: TidegateReloadRefused' 'tidegate_config_last_reload_successful == 0' <<<'{}'

# Whole configurations survive the chart: the gateway reads the same from what it renders.
# effective FILE: the effective configuration as JSON, without what the chart decides: ports, names of files, Secrets.
effective() {
  env ADMIN_TOKEN=dummy IDENTITY_SECRET=dummy-of-the-check REDIS_SECRET=dummy "$TIDEGATE" config print "$1" --defaults | python3 -c '
import json, sys, tomllib
config = tomllib.loads(sys.stdin.read())
for section, key in [("server", "node"), ("redis", "secret"), ("redis", "tls"), ("identity", "secret")]:
    config.get(section, {}).pop(key, None)
user = config.get("identity", {}).get("user")
if isinstance(user, dict) and not user["jwt"]["keys"].startswith("https://"):
    del user["jwt"]["keys"]
print(json.dumps({key: value for key, value in config.items() if key not in ("listen", "admin")}, indent=1, sort_keys=True))'
}
for file in "$chart"/../../docs/tidegate.example.toml "$chart"/../../docs/cookbook/*.toml; do
  name=$(basename "$file" .toml)
  python3 "$chart/../from_toml.py" "$file" >"$work/values.json" || fail "$name: from_toml.py"
  render "$name" --values "$work/values.json"
  cp "$file" "$work/$name/original.toml"
  for input in $(grep -v '^ *#' "$file" | grep -oE '"[a-z0-9/.-]+\.(crt|key|json|pem|html)"' | tr -d '"'); do
    mkdir -p "$work/$name/$(dirname "$input")"
    cp "$work/pair.${input##*.}" "$work/$name/$input"
  done
  { effective "$work/$name/original.toml" >"$work/original" && effective "$work/$name/tidegate.toml" >"$work/rendered"; } 2>"$work/out" || fail "$name: config print"
  expect_success "$name: the same through the chart" diff "$work/original" "$work/rendered"
done
echo "chart ok"
