{{/* Non-empty if the values have verification keys of tokens. */}}
{{- define "tidegate.jwt" -}}
{{- with .Values.config.identity.jwt }}
{{- .url | default .secretName | default .configMapName }}
{{- end }}
{{- end }}

{{/* Non-empty if a request can have a user: by identity, or by the credentials of a route. */}}
{{- define "tidegate.user" -}}
{{- .Values.config.identity.user | default (include "tidegate.jwt" .) }}
{{- range append .Values.config.routes .Values.config.route.extra }}
{{- if hasKey . "auth" }} auth{{ end }}
{{- end }}
{{- end }}

{{/* Constraints that the schema cannot express: sources without effect, and contradictions. */}}
{{- define "tidegate.identity.check" -}}
{{- $id := .Values.config.identity }}
{{- if and $id.secretName $id.extra.secret }}
{{- fail "config.identity: secretName and extra.secret exclude each other" }}
{{- end }}
{{- if and (hasPrefix "certificate:" $id.user) (not (or .Values.tls.clientCA.secretName .Values.tls.clientCA.configMapName)) }}
{{- fail "config.identity.user is a name in the certificate of a client: set tls.clientCA" }}
{{- end }}
{{- if and (or (hasPrefix "header:" $id.user) $id.tier) (not .Values.config.trusted_proxies) }}
{{- fail "config.identity.user and tier are headers that are accepted from trusted proxies only: set config.trusted_proxies" }}
{{- end }}
{{- if and $id.tier (not (include "tidegate.user" .)) }}
{{- fail "config.identity.tier needs config.identity.user: a user class applies to users only" }}
{{- end }}
{{- if include "tidegate.jwt" . }}
{{- if gt (list $id.jwt.url $id.jwt.secretName $id.jwt.configMapName | compact | len) 1 }}
{{- fail "config.identity.jwt: url, secretName and configMapName exclude each other" }}
{{- end }}
{{- if not $id.jwt.algorithms }}
{{- fail "config.identity.jwt.algorithms is empty: list the accepted signature algorithms, such as ES256" }}
{{- end }}
{{- $secrets := regexMatch "HS" (toJson $id.jwt.algorithms) }}
{{- if and $secrets (regexMatch "RS|PS|ES|Ed" (toJson $id.jwt.algorithms)) }}
{{- fail "config.identity.jwt.algorithms: HS algorithms (shared secret) and public-key algorithms cannot be combined" }}
{{- end }}
{{- if and (not $id.jwt.secretName) $secrets }}
{{- fail "config.identity.jwt: the key of HS algorithms is secret: store it in a Secret (secretName)" }}
{{- end }}
{{- if $id.user }}
{{- fail "config.identity.user and config.identity.jwt both name the user: set one of them" }}
{{- end }}
{{- if and $id.tier $id.jwt.tierClaim }}
{{- fail "config.identity.tier and config.identity.jwt.tierClaim both name the user class: set one of them" }}
{{- end }}
{{- else if or $id.jwt.algorithms $id.jwt.tierClaim $id.jwt.audience $id.jwt.issuer $id.jwt.extra }}
{{- fail "config.identity.jwt needs verification keys: set its url, secretName or configMapName" }}
{{- end }}
{{- end }}

{{/* The sections [identity] and [tiers]. */}}
{{- define "tidegate.identity" -}}
{{- $id := .Values.config.identity -}}
[identity]
trusted_proxies = {{ toJson .Values.config.trusted_proxies }}
device = {{ toJson $id.device }}
{{- if include "tidegate.jwt" . }}
{{- $own := dict "keys" ($id.jwt.url | default "jwt/jwks.json") }}
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
{{- if $id.secretName }}
secret = "${IDENTITY_SECRET}"
{{- end }}
{{- include "tidegate.keys" $id.extra }}
{{- with .Values.config.tiers }}

[tiers]
{{- include "tidegate.keys" . }}
{{- end }}
{{- end }}
