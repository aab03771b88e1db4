{{/* Constraints that the schema cannot express: references between values. */}}
{{- define "tidegate.limits.check" -}}
{{- $c := .Values.config }}
{{- $user := include "tidegate.user" . }}
{{- $jwt := include "tidegate.jwt" . }}
{{- $tiers := concat (list "anonymous" "standard") (keys $c.tiers) }}
{{- range $name, $rule := $c.limits }}
{{- if and (eq $rule.tier "cluster") (not $c.redis.regions) (not $c.redis.nodes) }}
{{- fail (printf "config.limits.%s: a cluster limit needs config.redis.regions, or config.redis.nodes to divide it without Redis" $name) }}
{{- end }}
{{- if and (eq $rule.tier "user") (not $user) }}
{{- fail (printf "config.limits.%s: no request has a user: set config.identity.user or jwt" $name) }}
{{- end }}
{{- if and (hasPrefix "claim:" (default "" $rule.key)) (not $jwt) }}
{{- fail (printf "config.limits.%s.key: there is no token to read the claim from: set config.identity.jwt" $name) }}
{{- end }}
{{- if and (hasKey $rule "per_address") (not $c.identity.device) }}
{{- fail (printf "config.limits.%s.per_address needs config.identity.device: without it, an address is one device" $name) }}
{{- end }}
{{- if gt (int $c.route.cost) (int $rule.burst) }}
{{- fail (printf "config.limits.%s: the cost of a request (config.route.cost), %d, exceeds its burst: every request would be denied" $name (int $c.route.cost)) }}
{{- end }}
{{- range $route := $c.routes }}
{{- if and (has $name (default list .limits)) (gt (int (default 1 .cost)) (int $rule.burst)) }}
{{- fail (printf "config.limits.%s: the cost of route %s, %d, exceeds its burst: every request would be denied" $name .name (int .cost)) }}
{{- end }}
{{- end }}
{{- range $tier, $part := $rule.reserve }}
{{- if not (has $tier $tiers) }}
{{- fail (printf "config.limits.%s.reserve: unknown user class %s: add it to config.tiers" $name $tier) }}
{{- end }}
{{- end }}
{{- end }}
{{- range concat $c.access.exempt $c.access.denied }}
{{- if and (hasPrefix "device:" .) (not $c.identity.device) }}
{{- fail (printf "config.access: %s never matches: set config.identity.device" .) }}
{{- end }}
{{- if and (hasPrefix "user:" .) (not $user) }}
{{- fail (printf "config.access: %s never matches: set config.identity.user or jwt" .) }}
{{- end }}
{{- end }}
{{- end }}

{{/* The section [access], and one section per limit. */}}
{{- define "tidegate.limits" -}}
{{- with .Values.config.access }}
{{- if or .exempt .denied }}

[access]
exempt = {{ toJson .exempt }}
denied = {{ toJson .denied }}
{{- end }}
{{- end }}
{{- range $name, $rule := .Values.config.limits }}

[limits.{{ include "tidegate.key" $name }}]
{{- include "tidegate.keys" $rule }}
{{- end }}
{{- end }}
