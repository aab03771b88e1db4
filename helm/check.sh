#!/usr/bin/env bash
# Lints the chart, templates it with each set of values in tidegate/ci, and runs `tidegate check` on the configuration that comes out.
# Usage: helm/check.sh PATH-OF-TIDEGATE      (or TIDEGATE in the environment)
# Needs python3 and openssl; installs helm with Go into ~/.cache/tidegate/bin when it is on neither that path nor PATH.
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
  GOBIN=$bin go install helm.sh/helm/v4/cmd/helm@v4.3.1
  helm=$bin/helm
fi

fail() { echo "FAILED   $1" >&2; [ ! -f "$work/out" ] || cat "$work/out" >&2; exit 1; }

# quiet WHAT COMMAND...: one line for a command that must succeed, its output only when it does not.
quiet() {
  local what=$1
  shift
  "$@" >"$work/out" 2>&1 || fail "$what"
  echo "ok       $what"
}

# refuses WHAT MESSAGE ARGUMENT...: templating with these arguments must fail and say MESSAGE.
refuses() {
  local what=$1 message=$2
  shift 2
  if "$helm" template t "$chart" "$@" >"$work/out" 2>&1; then fail "$what: was accepted"; fi
  grep -qF -- "$message" "$work/out" || fail "$what: refused without saying: $message"
  echo "ok       $what"
}

# Writes what the ConfigMap on standard input holds as files into a directory. The template writes tidegate.toml as a
# literal block, indented by four, and every other file as one JSON string.
extract() {
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

# What the Deployment on standard input takes from elsewhere: prints NAME=VALUE for each of its variables, with a made-up value where a Secret
# holds it, and makes the files of its Secrets in a directory, as copies of PAIR.crt, PAIR.key and PAIR.json.
supply() {
  python3 -c '
import pathlib, re, shutil, sys
into, pair = map(pathlib.Path, sys.argv[1:])
text = sys.stdin.read()
variables = text.split("\n          env:\n", 1)[1].split("\n          ports:\n", 1)[0]
for variable in re.split(r"(?m)^            - name: ", variables)[1:]:
    value = re.search(r"(?m)^              value: (.*)", variable)
    print(variable.split("\n", 1)[0] + "=" + (value[1].strip("\"\x27") if value else "made-up"))
for path in re.findall(r"(?m)^ +- \{ key: [^,]+, path: (\S+) \}$", text):
    into.joinpath(path).parent.mkdir(exist_ok=True)
    shutil.copy(pair.with_suffix(pathlib.Path(path).suffix), into / path)
' "$1" "$2"
}

quiet "a certificate to check with" openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 \
  -subj /CN=localhost -keyout "$work/pair.key" -out "$work/pair.crt"
# Its key as a JWK set: a public key of P-256 in DER ends with the 32 bytes of each coordinate (RFC 5480 section 2.2).
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
  quiet "$set: helm lint" "$helm" lint --strict "$chart" --values "$values"
  quiet "$set: helm template" "$helm" template t "$chart" --values "$values"
  "$helm" template t "$chart" --values "$values" --show-only templates/configmap.yaml | extract "$dir" || fail "$set: no tidegate.toml in the ConfigMap"
  "$helm" template t "$chart" --values "$values" --show-only templates/deployment.yaml | supply "$dir" "$work/pair" >"$dir/variables" ||
    fail "$set: the Deployment is of another form"
  mapfile -t variables <"$dir/variables"
  # The paths in the file are relative to its directory, which is the container's working directory too. No variable but the Deployment's is set.
  quiet "$set: tidegate check" env -C "$dir" -i "${variables[@]}" "$TIDEGATE" check tidegate.toml
done

# refuses_with WHAT MESSAGE BASE: the same for the values in ci/BASE-values.yaml with those on standard input over them.
refuses_with() {
  cat >"$work/values.yaml"
  refuses "$1" "$2" --values "$chart/ci/$3-values.yaml" --values "$work/values.yaml"
}

# refuses_region WHAT MESSAGE REGION: the same for the region `default` as a flow mapping.
refuses_region() {
  refuses_with "$1" "$2" minimal <<<"config: { redis: { regions: { default: $3 } } }"
}

# refuses_token WHAT MESSAGE JWT: the same for identity.jwt as a flow mapping.
refuses_token() {
  refuses_with "$1" "$2" minimal <<<"config: { identity: { jwt: $3 } }"
}

# refuses_limit WHAT MESSAGE RULE: the same for the limit `all` as a flow mapping.
refuses_limit() {
  refuses_with "$1" "$2" minimal <<<"config: { limits: { all: $3 } }"
}

# renders SET LINE...: the configuration of ci/SET-values.yaml holds these lines.
renders() {
  local set=$1 line
  shift
  for line in "$@"; do
    grep -qxF -- "$line" "$work/$set/tidegate.toml" || { cp "$work/$set/tidegate.toml" "$work/out"; fail "$set: has no line: $line"; }
  done
  echo "ok       $set: says what its values say"
}

# templates WHAT BASE TEXT...: the chart made with ci/BASE-values.yaml and the values on standard input over them has these texts.
templates() {
  local what=$1 base=$2 text
  shift 2
  cat >"$work/values.yaml"
  "$helm" template t "$chart" --values "$chart/ci/$base-values.yaml" --values "$work/values.yaml" >"$work/out" 2>&1 || fail "$what"
  for text in "$@"; do [[ $(<"$work/out") == *"$text"* ]] || fail "$what: has nowhere: $text"; done
  echo "ok       $what"
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

templates "keys of tokens in a Secret" jwt '- secret:
                  name: "issuer"' '- { key: "keys", path: jwt/jwks.json }' <<<'{}'
templates "keys of tokens in a ConfigMap" minimal '- configMap:
                  name: "issuer"' '- { key: "jwks.json", path: jwt/jwks.json }' \
  'user = { jwt = { algorithms = ["EdDSA"], claim = "sub", keys = "jwt/jwks.json", leeway = "30s", token = "bearer" } }' \
  <<<'config: { identity: { jwt: { configMapName: issuer, algorithms: [EdDSA] } } }'
templates "a tier of a proxy for a user of a token" jwt 'tier = "header:x-plan"' \
  <<<'config: { trusted_proxies: [10.0.0.0/8], identity: { tier: header:x-plan, jwt: { tierClaim: "" } } }'

refuses "no upstream" "config.upstream.endpoints is empty"
refuses "an unknown value" "replicas" --values "$chart/ci/minimal-values.yaml" --set replicas=3
refuses "a cluster limit without Redis" "a cluster limit needs config.redis.regions" --values "$chart/ci/minimal-values.yaml" \
  --set config.limits.all.tier=cluster,config.limits.all.rate=100/s,config.limits.all.burst=100
refuses_with "a device by something else" "/config/identity/device/0" minimal <<<'config: { identity: { device: [query:id] } }'
refuses_with "a segment that is not looked at" "/config/identity/device/0" minimal <<<'config: { identity: { device: [path:33] } }'
refuses_with "a device by a claim" "/config/identity/device/0" jwt <<<'config: { identity: { device: [claim:device] } }'
refuses_with "a user by what everybody could say" "/config/identity/user" callers <<<'config: { identity: { user: cookie:user } }'
refuses_with "a user without a proxy that is believed" "config.trusted_proxies" minimal <<<'config: { identity: { user: header:x-user-id } }'
refuses_with "a tier without a user" "the tier of a user" callers <<<'config: { identity: { user: "" } }'
refuses_with "a typed key of the identity among further ones" "/config/identity/extra/device" minimal <<<'config: { identity: { extra: { device: ["host:"] } } }'
refuses_token "tokens without an algorithm" "algorithms is empty" '{ secretName: s }'
refuses_token "tokens that are not signed" "/config/identity/jwt/algorithms/0" '{ secretName: s, algorithms: [none] }'
refuses_token "tokens without keys" "set its secretName or configMapName" '{ algorithms: [ES256] }'
refuses_token "an audience without keys" "set its secretName or configMapName" '{ audience: [shop] }'
refuses_token "an issuer without keys" "set its secretName or configMapName" '{ issuer: "https://id.example" }'
refuses_token "keys of tokens from two places" "not from both" '{ secretName: s, configMapName: c, algorithms: [ES256] }'
refuses_token "a secret for everybody to read" "put it into a Secret" '{ configMapName: c, algorithms: [HS256] }'
refuses_token "secrets beside public keys" "do not go together" '{ secretName: s, algorithms: [HS256, ES256] }'
refuses_token "an audience that is no list" "/config/identity/jwt/audience" '{ secretName: s, algorithms: [ES256], audience: shop }'
refuses_token "an audience of nobody" "/config/identity/jwt/audience/0" '{ secretName: s, algorithms: [ES256], audience: [""] }'
refuses_token "a user by no claim" "/config/identity/jwt/claim" '{ secretName: s, algorithms: [ES256], claim: "" }'
refuses_token "clocks that are an hour apart" "/config/identity/jwt/leeway" '{ secretName: s, algorithms: [ES256], leeway: 1h }'
refuses_token "clocks that are a second too far apart" "/config/identity/jwt/leeway" '{ secretName: s, algorithms: [ES256], leeway: 301s }'
refuses_token "a token in the address" "/config/identity/jwt/token" '{ secretName: s, algorithms: [ES256], token: "query:t" }'
refuses_token "an audience among further keys" "/config/identity/jwt/extra/audience" '{ secretName: s, algorithms: [ES256], extra: { audience: [a] } }'
refuses_token "a typed key of tokens among further ones" "/config/identity/jwt/extra/keys" '{ secretName: s, algorithms: [ES256], extra: { keys: a } }'
refuses_with "a user from a token and a header" "both name the user" callers <<<'config: { identity: { jwt: { secretName: s, algorithms: [ES256] } } }'
refuses_with "a tier from a token and a header" "both name the tier" callers \
  <<<'config: { identity: { user: "", jwt: { secretName: s, algorithms: [ES256], tierClaim: tier } } }'
refuses_with "a tier of no weight" "/config/tiers/gold" callers <<<'config: { tiers: { gold: 0 } }'
refuses_with "a tier of too little weight" "minimum" callers <<<'config: { tiers: { gold: 0.0000001 } }'
refuses_with "a tier's name in other letters" "invalid propertyName 'gold one'" callers <<<'config: { tiers: { "gold one": 2 } }'
refuses_limit "a limit by a key without the key" "missing property 'key'" '{ tier: key, rate: 1/s, burst: 1 }'
refuses_limit "a key of another tier" "/config/limits/all/key" '{ tier: user, key: "host:", rate: 1/s, burst: 1 }'
refuses_limit "a key by something else" "/config/limits/all/key" '{ tier: key, key: x-tenant, rate: 1/s, burst: 1 }'
refuses_limit "a claim without a name" "/config/limits/all/key" '{ tier: key, key: "claim:", rate: 1/s, burst: 1 }'
refuses_limit "a claim of another tier" "/config/limits/all/key" '{ tier: user, key: "claim:org", rate: 1/s, burst: 1 }'
refuses_limit "a claim where there are no tokens" "there is no token that would have this claim" '{ tier: key, key: "claim:org", rate: 1/s, burst: 1 }'
refuses_with "a claim where a header names the user" "there is no token that would have this claim" callers \
  <<<'config: { limits: { org: { tier: key, key: "claim:org", rate: 1/s, burst: 60 } } }'
refuses_limit "more keys than there may be" "maximum" '{ tier: device, keys: 16777217, rate: 1/s, burst: 1 }'
refuses_limit "keys of what all share" "/config/limits/all/keys" '{ tier: node, keys: 5, rate: 1/s, burst: 1 }'
refuses_limit "an address's share of what is no device" "/config/limits/all/per_address" '{ tier: node, per_address: 5, rate: 1/s, burst: 1 }'
refuses_limit "an address of which each is one device" "set config.identity.device" '{ tier: device, per_address: 5, rate: 1/s, burst: 1 }'
refuses_limit "any share of an address of which each is one device" "set config.identity.device" '{ tier: device, per_address: 0, rate: 1/s, burst: 1 }'
refuses_limit "an address's share of a key" "/config/limits/all/per_address" '{ tier: key, key: "host:", per_address: 0, rate: 1/s, burst: 1 }'
refuses_with "a limit by a name that explanations have" "invalid propertyName 'explain'" minimal \
  <<<'config: { limits: { explain: { tier: node, rate: 1/s, burst: 1 } } }'
refuses_limit "a reserve within one device" "/config/limits/all/reserve" '{ tier: device, reserve: { standard: 0.5 }, rate: 1/s, burst: 1 }'
refuses_limit "a reserve of everything" "exclusiveMaximum" '{ tier: node, reserve: { standard: 1 }, rate: 1/s, burst: 1 }'
refuses_limit "a reserve for a tier that is none" "there is no tier gold" '{ tier: node, reserve: { gold: 0.5 }, rate: 1/s, burst: 1 }'
refuses_limit "other words for what clients are told" "/config/limits/all/headers" '{ tier: node, headers: some, rate: 1/s, burst: 1 }'
refuses_limit "a limit of users where nobody is one" "nobody is a user" '{ tier: user, rate: 1/s, burst: 1 }'
refuses_with "a denied name of a machine" "/config/access/denied/0" minimal <<<'config: { access: { denied: [localhost] } }'
refuses_with "an exempt user of no name" "/config/access/exempt/0" callers <<<'config: { access: { exempt: ["user:"] } }'
refuses_with "a list of another kind" "additional properties 'allowed'" minimal <<<'config: { access: { allowed: [10.0.0.0/8] } }'
refuses_with "a denied device where there is none" "device:stolen is nobody" minimal <<<'config: { access: { denied: [device:stolen] } }'
refuses_with "an exempt device where there is none" "device:own is nobody" minimal <<<'config: { access: { exempt: [device:own] } }'
refuses_with "a denied user where there is none" "user:mallory is nobody" minimal <<<'config: { access: { denied: [user:mallory] } }'
refuses_with "an exempt user where there is none" "user:backup is nobody" minimal <<<'config: { access: { exempt: [user:backup] } }'
refuses_with "a request that costs nothing" "minimum" minimal <<<'config: { route: { cost: 0 } }'
refuses_with "a request that costs more than a burst" "more than its burst" callers <<<'config: { route: { cost: 61 } }'
refuses_with "a cost of what is no status" "invalid propertyName '6xx'" minimal <<<'config: { route: { cost_by_status: { 6xx: 2 } } }'
refuses_with "a typed key of the route among further ones" "/config/route/extra/cost" minimal <<<'config: { route: { extra: { cost: 2 } } }'
refuses_region "a region of nothing" "'oneOf' failed" '{ slots: 4 }'
refuses_region "a region of endpoints and a cluster" "subschemas 0, 1 matched" '{ endpoints: ["redis://a:6379"], cluster: ["redis://b:6379"] }'
refuses_region "an unknown key of a region" "additional properties 'slot'" '{ endpoints: ["redis://a:6379"], slot: 4 }'
refuses_region "too many slots" "maximum" '{ endpoints: ["redis://a:6379"], slots: 1025 }'
refuses_region "more endpoints than slots" "2 endpoints need at least as many slots" '{ endpoints: ["redis://a", "redis://b"], slots: 1 }'
refuses_region "an endpoint of another kind" "pattern" '{ endpoints: ["http://a:6379"] }'
refuses_region "a password in the ConfigMap" "pattern" '{ endpoints: ["redis://gate:s3cret@a:6379"] }'
refuses_region "a user alone, which may be a password" "pattern" '{ endpoints: ["redis://s3cret@a:6379"] }'
refuses_region "a default that is a password" "pattern" '{ endpoints: ["redis://:${REDIS_PASSWORD:-s3cret}@a:6379"] }'
refuses_region "a password from a file, which only a ConfigMap could hold" "pattern" '{ endpoints: ["redis://:${file:password}@a:6379"] }'
refuses_region "a password of Sentinel's master in the ConfigMap" "pattern" '{ endpoints: ["redis+sentinel://:s3cret@a,b/orders"] }'
refuses_region "Sentinels without a master" "pattern" '{ endpoints: ["redis+sentinel://a,b"] }'
refuses_region "a certificate that is not checked" "pattern" '{ endpoints: ["rediss://a#insecure"] }'
refuses_region "a database of a cluster" "pattern" '{ cluster: ["redis://a:6379/1"] }'
refuses_region "Sentinels of a cluster" "pattern" '{ cluster: ["redis+sentinel://a,b/orders"] }'
refuses_region "a neighbour without a store" "there is no region eu" '{ endpoints: ["redis://a:6379"], fallback: [eu] }'
refuses_region "a region that is its own neighbour" "names the region itself" '{ endpoints: ["redis://a:6379"], fallback: [default] }'
refuses_region "a password that nothing gives" 'refers to ${REDIS_PASSWORD}' '{ endpoints: ["redis://:${REDIS_PASSWORD}@a:6379"] }'
refuses_with "a limit without a burst" "missing property 'burst'" minimal <<<'config: { limits: { all: { tier: node, rate: 100/s } } }'
refuses_with "a region's name in capitals" "additional properties 'EU'" minimal <<<'config: { redis: { regions: { EU: { endpoints: ["redis://a"] } } } }'
refuses_with "regions without the default" "a region named default" minimal <<<'config: { redis: { regions: { eu: { endpoints: ["redis://a"] } } } }'
refuses_with "an unknown key of redis" "additional properties 'hot'" minimal <<<'config: { redis: { hot: 4 } }'
refuses_with "a typed key among further ones" "/config/redis/extra/deadline" redis-tls <<<'config: { redis: { extra: { deadline: 5ms } } }'
refuses_with "a typed key of the cache among further ones" "/config/cache/extra/memory" minimal <<<'config: { cache: { extra: { memory: 1GiB } } }'
refuses_with "hot keys among further ones of the cache" "/config/cache/extra/hot_rate" minimal <<<'config: { cache: { extra: { hot_rate: 9/s } } }'
refuses_with "copies among further keys of redis" "/config/redis/extra/hot_copies" redis-tls <<<'config: { redis: { extra: { hot_copies: 2 } } }'
refuses_with "more copies than there may be" "maximum" redis-tls <<<'config: { redis: { hot_copies: 65 } }'
refuses_with "hot from nothing on" "pattern" minimal <<<'config: { cache: { hot_rate: 0/s } }'
refuses_with "a further key of no value" "got null" minimal <<<'config: { cache: { extra: { key_fields: [null] } } }'
refuses_with "a login without regions" "need config.redis.regions" minimal <<<'config: { redis: { auth: { secretName: s } } }'
refuses_with "a login that no address uses" 'gives ${REDIS_PASSWORD}, which no address' full <<<'config: { redis: { auth: { secretName: s } } }'
refuses_with "certificates that no address uses" "begins with rediss" full <<<'config: { redis: { tls: { secretName: s } } }'
refuses_with "certificates by no key" "neither caKey nor certKey" redis-cluster <<<'config: { redis: { tls: { caKey: "" } } }'
refuses_with "a certificate without its key" "/config/redis/tls/keyKey" redis-cluster <<<'config: { redis: { tls: { certKey: tls.crt } } }'
refuses "autoscaling on nothing" "autoscaling needs something to scale on" --values "$chart/ci/minimal-values.yaml" \
  --set autoscaling.enabled=true,autoscaling.cpuPercent=0
echo "chart ok"
