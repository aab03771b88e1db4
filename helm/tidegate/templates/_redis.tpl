{{/* Largest number of gateways of this release; determines each one's share of a cluster limit while Redis is unavailable. */}}
{{- define "tidegate.fleet" -}}
{{- if .Values.config.redis.nodes }}
{{- .Values.config.redis.nodes | int }}
{{- else }}
{{- max 1 (include "tidegate.pods" (dict "root" . "bound" "maxReplicas") | int) }}
{{- end }}
{{- end }}

{{/* All addresses in config.redis.regions, one per line. */}}
{{- define "tidegate.redis.addresses" -}}
{{- range .Values.config.redis.regions }}
{{- range concat (.endpoints | default list) (.cluster | default list) }}
{{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Constraints that the schema cannot express: references between values. */}}
{{- define "tidegate.redis.check" -}}
{{- $redis := .Values.config.redis }}
{{- $addresses := include "tidegate.redis.addresses" . }}
{{- if and $redis.regions (not (hasKey $redis.regions "default")) }}
{{- fail "config.redis.regions needs a region named default: it serves all regions that are not listed" }}
{{- end }}
{{- if and (not $redis.regions) (or $redis.auth.secretName $redis.tls.secretName $redis.extra) }}
{{- fail "config.redis.auth, config.redis.tls and config.redis.extra need config.redis.regions" }}
{{- end }}
{{- range $name, $region := $redis.regions }}
{{- $endpoints := $region.endpoints | default list }}
{{- if gt (len $endpoints) (int ($region.slots | default 16)) }}
{{- fail (printf "config.redis.regions.%s: %d endpoints need at least as many slots (default: 16)" $name (len $endpoints)) }}
{{- end }}
{{- range $region.fallback }}
{{- if eq . $name }}
{{- fail (printf "config.redis.regions.%s.fallback names the region itself" $name) }}
{{- end }}
{{- if not (hasKey $redis.regions .) }}
{{- fail (printf "config.redis.regions.%s.fallback: unknown region %s: add it to config.redis.regions" $name .) }}
{{- end }}
{{- end }}
{{- end }}
{{- $given := list }}
{{- with $redis.auth }}
{{- if .secretName }}
{{- $given = append $given "REDIS_PASSWORD" }}
{{- if .userKey }}
{{- $given = append $given "REDIS_USER" }}
{{- end }}
{{- end }}
{{- end }}
{{- range $name := $given }}
{{- if not (contains (printf "${%s}" $name) $addresses) }}
{{- fail (printf "config.redis.auth sets ${%s}, which no address in config.redis.regions uses: write redis://USER:${REDIS_PASSWORD}@HOST:PORT" $name) }}
{{- end }}
{{- end }}
{{- range .Values.extraEnv }}
{{- $given = append $given .name }}
{{- end }}
{{- range $name := list "REDIS_USER" "REDIS_PASSWORD" }}
{{- if and (contains (printf "${%s}" $name) $addresses) (not (has $name $given)) }}
{{- fail (printf "config.redis.regions refers to ${%s}: set config.redis.auth, or the variable in extraEnv" $name) }}
{{- end }}
{{- end }}
{{- with $redis.tls }}
{{- if and .secretName (not .caKey) (not .certKey) }}
{{- fail "config.redis.tls.secretName is set, but neither caKey nor certKey" }}
{{- end }}
{{- if and .secretName (not (regexMatch "(?m)^(rediss|\\$)" $addresses)) }}
{{- fail "config.redis.tls is set, but no address in config.redis.regions begins with rediss" }}
{{- end }}
{{- end }}
{{- end }}

{{/* The section [redis]. */}}
{{- define "tidegate.redis" -}}
{{- $redis := .Values.config.redis -}}
[redis]
nodes = {{ include "tidegate.fleet" . }}
{{- if $redis.regions }}
deadline = {{ toJson $redis.deadline }}
compress_from = {{ toJson $redis.compress_from }}
hot_copies = {{ int $redis.hot_copies }}
secret = "${REDIS_SECRET:-}"
{{- include "tidegate.keys" $redis.extra }}
{{- with $redis.tls }}
{{- if .secretName }}

[redis.tls]
{{- if .caKey }}
ca = "redis-tls/ca.crt"
{{- end }}
{{- if .certKey }}
cert = "redis-tls/tls.crt"
key = "redis-tls/tls.key"
{{- end }}
{{- end }}
{{- end }}
{{- range $name, $region := $redis.regions }}

[redis.regions.{{ include "tidegate.key" $name }}]
{{- with $region.slots }}
slots = {{ int . }}
{{- end }}
{{- with $region.endpoints }}
endpoints = {{ toJson . }}
{{- end }}
{{- with $region.cluster }}
cluster = {{ toJson . }}
{{- end }}
{{- with $region.fallback }}
fallback = {{ toJson . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
