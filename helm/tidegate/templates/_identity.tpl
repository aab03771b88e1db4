{{/* Whether the values have the keys that tokens are verified with: text or nothing. */}}
{{- define "tidegate.jwt" -}}
{{- with .Values.config.identity.jwt }}
{{- .secretName | default .configMapName }}
{{- end }}
{{- end }}

{{/* Whether a request can have a user: text or nothing. */}}
{{- define "tidegate.user" -}}
{{- .Values.config.identity.user | default (include "tidegate.jwt" .) }}
{{- end }}

{{/* What the schema cannot see: what would never be believed, or never match. */}}
{{- define "tidegate.identity.check" -}}
{{- $id := .Values.config.identity }}
{{- if and (or $id.user $id.tier) (not .Values.config.trusted_proxies) }}
{{- fail "config.identity.user and tier are headers that only config.trusted_proxies are believed: name those networks" }}
{{- end }}
{{- if and $id.tier (not (include "tidegate.user" .)) }}
{{- fail "config.identity.tier is the tier of a user: set config.identity.user, too" }}
{{- end }}
{{- if include "tidegate.jwt" . }}
{{- if and $id.jwt.secretName $id.jwt.configMapName }}
{{- fail "config.identity.jwt has its keys from secretName or from configMapName, not from both" }}
{{- end }}
{{- if not $id.jwt.algorithms }}
{{- fail "config.identity.jwt.algorithms is empty: name what tokens may be signed with, such as ES256" }}
{{- end }}
{{- $secrets := regexMatch "HS" (toJson $id.jwt.algorithms) }}
{{- if and $secrets (regexMatch "RS|PS|ES|Ed" (toJson $id.jwt.algorithms)) }}
{{- fail "config.identity.jwt.algorithms: those with a secret (HS) and those with public keys do not go together" }}
{{- end }}
{{- if and $id.jwt.configMapName $secrets }}
{{- fail "config.identity.jwt: HS algorithms verify with what they sign with: put it into a Secret (secretName)" }}
{{- end }}
{{- if $id.user }}
{{- fail "config.identity.user and config.identity.jwt both name the user: set one of them" }}
{{- end }}
{{- if and $id.tier $id.jwt.tierClaim }}
{{- fail "config.identity.tier and config.identity.jwt.tierClaim both name the tier: set one of them" }}
{{- end }}
{{- else if or $id.jwt.algorithms $id.jwt.tierClaim $id.jwt.audience $id.jwt.issuer $id.jwt.extra }}
{{- fail "config.identity.jwt needs the keys that tokens are verified with: set its secretName or configMapName" }}
{{- end }}
{{- end }}

{{/* The sections [identity] and [tiers]. */}}
{{- define "tidegate.identity" -}}
{{- $id := .Values.config.identity -}}
[identity]
trusted_proxies = {{ toJson .Values.config.trusted_proxies }}
device = {{ toJson $id.device }}
{{- if include "tidegate.jwt" . }}
{{- $own := dict "keys" "jwt/jwks.json" }}
{{- range $key := list "algorithms" "claim" "audience" "issuer" "leeway" "token" }}
{{- with get $id.jwt $key }}
{{- $_ := set $own $key . }}
{{- end }}
{{- end }}
user = {{ include "tidegate.value" (dict "jwt" (merge $own $id.jwt.extra)) }}
{{- end }}
{{- with $id.user }}
user = {{ toJson . }}
{{- end }}
{{- with $id.tier }}
tier = {{ toJson . }}
{{- end }}
{{- with $id.jwt.tierClaim }}
tier = { jwt_claim = {{ toJson . }} }
{{- end }}
region = {{ toJson $id.region }}
region_default = {{ toJson $id.region_default }}
{{- include "tidegate.keys" $id.extra }}
{{- with .Values.config.tiers }}

[tiers]
{{- include "tidegate.keys" . }}
{{- end }}
{{- end }}
