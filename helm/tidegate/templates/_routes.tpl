{{/*
Constraints that the schema cannot express: the short and the long form exclude each other, and names must exist. A value of the short form
counts as set if it differs from the default in values.yaml.
*/}}
{{- define "tidegate.routes.check" -}}
{{- $c := .Values.config }}
{{- if and (regexMatch "\"kubernetes(\\+[a-z0-9]+)?://" (toJson (list $c.upstream.endpoints $c.upstreams))) (not .Values.discovery.kubernetes.enabled) (not (or $c.kubernetes.url $c.kubernetes.kubeconfig)) }}
{{- fail "an endpoint kubernetes://... needs the right to watch EndpointSlices: set discovery.kubernetes.enabled" }}
{{- end }}
{{- if or $c.upstreams $c.routes }}
{{- if not $c.routes }}
{{- fail "config.routes is empty: config.upstreams needs routes that lead to them, for example [{ name: everything, match: { path: /* }, upstream: NAME }]" }}
{{- end }}
{{- range $key, $value := dict "upstream.endpoints" $c.upstream.endpoints "upstream.extra" $c.upstream.extra "route.cost_by_status" $c.route.cost_by_status "route.extra" $c.route.extra }}
{{- if $value }}
{{- fail (printf "config.%s belongs to the short form (one upstream, one route), which config.upstreams and config.routes replace: move it there" $key) }}
{{- end }}
{{- end }}
{{- range $key, $pair := dict "upstream.balance" (list $c.upstream.balance "least-request") "upstream.timeout" (list $c.upstream.timeout "10s") "route.cost" (list (int $c.route.cost) 1) "cache.mode" (list $c.cache.mode "standard") "cache.stale_if_error" (list $c.cache.stale_if_error "10m") }}
{{- if ne (first $pair) (last $pair) }}
{{- fail (printf "config.%s belongs to the short form (one upstream, one route), which config.upstreams and config.routes replace: move it there" $key) }}
{{- end }}
{{- end }}
{{- include "tidegate.names.check" . }}
{{- else if not $c.upstream.endpoints }}
{{- fail "config.upstream.endpoints is empty: set it to the servers behind the gateway, for example --set 'config.upstream.endpoints={http://shop.default.svc:80}' (or set config.upstreams and config.routes, or config.raw)" }}
{{- end }}
{{- end }}

{{/* Names in config.routes: each is unique, its upstreams and limits exist. */}}
{{- define "tidegate.names.check" -}}
{{- $c := .Values.config }}
{{- $seen := list }}
{{- range $route := $c.routes }}
{{- if has .name $seen }}
{{- fail (printf "config.routes: two routes are named %s" .name) }}
{{- end }}
{{- $seen = append $seen .name }}
{{- range compact (list .upstream (dig "canary" "upstream" "" .) (dig "mirror" "upstream" "" .)) }}
{{- if not (hasKey $c.upstreams .) }}
{{- fail (printf "config.routes: %s names the upstream %s, which config.upstreams does not have" $route.name .) }}
{{- end }}
{{- end }}
{{- range .limits }}
{{- if not (hasKey $c.limits .) }}
{{- fail (printf "config.routes: %s names the limit %s, which config.limits does not have" $route.name .) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Sections of upstreams, routes and pages. */}}
{{- define "tidegate.routes" -}}
{{- $c := .Values.config }}
{{- with $c.pages }}

[pages]
{{- include "tidegate.keys" . }}
{{- end }}
{{- if $c.routes }}
{{- range $name, $upstream := $c.upstreams }}

[upstreams.{{ include "tidegate.key" $name }}]
{{- include "tidegate.keys" $upstream }}
{{- end }}
{{- range $c.routes }}

[[routes]]
name = {{ toJson .name }}
{{- include "tidegate.keys" (omit . "name") }}
{{- end }}
{{- else }}

[upstreams.main]
endpoints = {{ include "tidegate.value" $c.upstream.endpoints }}
balance = {{ toJson $c.upstream.balance }}
timeout = {{ toJson $c.upstream.timeout }}
{{- include "tidegate.keys" $c.upstream.extra }}

[[routes]]
name = "everything"
match = { path = "/*" }
upstream = "main"
{{- with $c.limits }}
limits = {{ keys . | sortAlpha | toJson }}
{{- end }}
cost = {{ int $c.route.cost }}
{{- with $c.route.cost_by_status }}
cost_by_status = {{ include "tidegate.value" . }}
{{- end }}
{{- if eq $c.cache.mode "off" }}
cache = { mode = "off" }
{{- else }}
cache = { mode = "standard", stale_if_error = {{ toJson $c.cache.stale_if_error }} }
{{- end }}
{{- include "tidegate.keys" $c.route.extra }}
{{- end }}
{{- end }}
