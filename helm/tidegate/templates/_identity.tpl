{{/* What the schema cannot see: what would never be believed, or never match. */}}
{{- define "tidegate.identity.check" -}}
{{- $c := .Values.config }}
{{- $id := $c.identity }}
{{- if and (or $id.user $id.tier) (not $c.trusted_proxies) }}
{{- fail "config.identity.user and tier are headers that only config.trusted_proxies are believed: name those networks" }}
{{- end }}
{{- if and $id.tier (not $id.user) }}
{{- fail "config.identity.tier is the tier of a user: set config.identity.user, too" }}
{{- end }}
{{- end }}

{{/* The sections [identity] and [tiers]. */}}
{{- define "tidegate.identity" -}}
{{- $id := .Values.config.identity -}}
[identity]
trusted_proxies = {{ toJson .Values.config.trusted_proxies }}
device = {{ toJson $id.device }}
{{- with $id.user }}
user = {{ toJson . }}
{{- end }}
{{- with $id.tier }}
tier = {{ toJson . }}
{{- end }}
region = {{ toJson $id.region }}
region_default = {{ toJson $id.region_default }}
{{- include "tidegate.keys" $id.extra }}
{{- with .Values.config.tiers }}

[tiers]
{{- include "tidegate.keys" . }}
{{- end }}
{{- end }}
