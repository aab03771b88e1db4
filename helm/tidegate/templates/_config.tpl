{{/*
tidegate.toml. Strings are written by toJson: a JSON string is a TOML basic string.
*/}}
{{- define "tidegate.toml" -}}
{{- $c := .Values.config }}
{{- if $c.raw }}
{{- trim $c.raw }}
{{- else }}
{{- include "tidegate.routes.check" . }}
{{- include "tidegate.identity.check" . }}
{{- include "tidegate.redis.check" . }}
{{- include "tidegate.limits.check" . -}}
version = 1

[server]
node = "${HOSTNAME:-tidegate}"
drain_timeout = "{{ int $c.drainSeconds }}s"
{{- if not (hasKey $c.server "workers") }}
workers = {{ include "tidegate.workers" . }}
{{- end }}
{{- include "tidegate.keys" $c.server }}

[[listen]]
address = "0.0.0.0:{{ int .Values.ports.http }}"
proxy_protocol = {{ toJson $c.proxy_protocol }}
{{- if kindIs "bool" $c.http2 }}
http2 = {{ $c.http2 }}
{{- end }}
{{- include "tidegate.tls" . }}

[admin]
address = "0.0.0.0:{{ int .Values.ports.admin }}"
token = "${ADMIN_TOKEN:-}"
{{- with $c.limits_http }}

[limits_http]
{{- include "tidegate.keys" . }}
{{- end }}

{{ include "tidegate.identity" . }}
{{- if or $c.redis.regions $c.redis.nodes }}

{{ include "tidegate.redis" . }}
{{- end }}

[cache]
memory = {{ toJson $c.cache.memory }}
hot_rate = {{ toJson $c.cache.hot_rate }}
{{- include "tidegate.keys" $c.cache.extra }}
{{- include "tidegate.limits" . }}
{{- with $c.dns }}

[dns]
{{- include "tidegate.keys" . }}
{{- end }}
{{- with $c.kubernetes }}

[kubernetes]
{{- include "tidegate.keys" . }}
{{- end }}
{{- include "tidegate.routes" . }}

[log]
level = {{ toJson $c.log.level }}
access = {{ toJson $c.log.access }}
{{- include "tidegate.keys" $c.log.extra }}
{{- if $c.tracing.otlp }}

[tracing]
otlp = {{ toJson $c.tracing.otlp }}
ratio = {{ $c.tracing.ratio }}
{{- include "tidegate.keys" $c.tracing.extra }}
{{- else if $c.tracing.extra }}
{{- fail "config.tracing.extra has no effect without config.tracing.otlp" }}
{{- end }}
{{- end }}
{{- end }}

{{/* The listener with TLS. */}}
{{- define "tidegate.tls" -}}
{{- $tls := .Values.tls }}
{{- $certificates := include "tidegate.certificates" . | trim }}
{{- $client := $tls.clientCA }}
{{- if and $client.secretName $client.configMapName }}
{{- fail "tls.clientCA: secretName and configMapName exclude each other" }}
{{- end }}
{{- if and (or $client.secretName $client.configMapName) (not $certificates) }}
{{- fail "tls.clientCA needs a certificate of the gateway: set tls.secretName, tls.secrets or tls.certManager" }}
{{- end }}
{{- if $certificates }}

[[listen]]
address = "0.0.0.0:{{ int .Values.ports.https }}"
proxy_protocol = {{ toJson .Values.config.proxy_protocol }}
{{- if kindIs "bool" .Values.config.http2 }}
http2 = {{ .Values.config.http2 }}
{{- end }}
[listen.tls]
certificates = [
{{- range splitList "\n" $certificates }}
{{- $directory := splitList " " . | last }}
  { cert = "{{ $directory }}/tls.crt", key = "{{ $directory }}/tls.key" },
{{- end }}
]
min_version = {{ toJson $tls.minVersion }}
{{- if or $client.secretName $client.configMapName }}
client_ca = "client-ca/ca.crt"
client_auth = {{ toJson $client.auth }}
{{- if $client.crlKey }}
client_crl = "client-ca/crl.pem"
{{- end }}
{{- end }}
{{- end }}
{{- end }}
