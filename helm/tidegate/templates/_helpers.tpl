{{- define "tidegate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for the suffix of the admin Service. */}}
{{- define "tidegate.fullname" -}}
{{- $name := include "tidegate.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 57 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 57 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 57 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "tidegate.selector" -}}
app.kubernetes.io/name: {{ include "tidegate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tidegate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "tidegate.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "tidegate.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "tidegate.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/*
Number of replicas of the Deployment. With autoscaling, the current number in the cluster: another number would override the autoscaler, and
without a number the upgrade that removes the field resets it to 1.
*/}}
{{- define "tidegate.replicas" -}}
{{- if .Values.autoscaling.enabled }}
{{- $live := lookup "apps/v1" "Deployment" .Release.Namespace (include "tidegate.fullname" .) }}
{{- if $live }}
{{- $live.spec.replicas | int }}
{{- else }}
{{- .Values.autoscaling.minReplicas | int }}
{{- end }}
{{- else }}
{{- .Values.replicaCount | int }}
{{- end }}
{{- end }}

{{/*
tidegate.toml. Strings are written by toJson: a JSON string is a TOML basic string.
*/}}
{{- define "tidegate.toml" -}}
{{- $c := .Values.config }}
{{- if $c.raw }}
{{- trim $c.raw }}
{{- else }}
{{- if not $c.upstream.endpoints }}
{{- fail "config.upstream.endpoints is empty: set it to the servers behind the gateway, for example --set 'config.upstream.endpoints={http://shop.default.svc:80}' (or set config.raw)" }}
{{- end }}
{{- include "tidegate.identity.check" . }}
{{- include "tidegate.redis.check" . }}
{{- include "tidegate.limits.check" . -}}
version = 1

[server]
node = "${HOSTNAME:-tidegate}"
drain_timeout = "{{ int $c.drainSeconds }}s"

[[listen]]
address = "0.0.0.0:{{ int .Values.ports.http }}"
{{- if .Values.tls.secretName }}

[[listen]]
address = "0.0.0.0:{{ int .Values.ports.https }}"
[listen.tls]
certificates = [{ cert = "tls/tls.crt", key = "tls/tls.key" }]
min_version = {{ toJson .Values.tls.minVersion }}
{{- end }}

[admin]
address = "0.0.0.0:{{ int .Values.ports.admin }}"
token = "${ADMIN_TOKEN:-}"

{{ include "tidegate.identity" . }}
{{- if or $c.redis.regions $c.redis.nodes }}

{{ include "tidegate.redis" . }}
{{- end }}

[cache]
memory = {{ toJson $c.cache.memory }}
hot_rate = {{ toJson $c.cache.hot_rate }}
{{- include "tidegate.keys" $c.cache.extra }}
{{- include "tidegate.limits" . }}

[upstreams.main]
endpoints = {{ toJson $c.upstream.endpoints }}
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

[log]
level = {{ toJson $c.log.level }}
access = {{ toJson $c.log.access }}
{{- if $c.tracing.otlp }}

[tracing]
otlp = {{ toJson $c.tracing.otlp }}
ratio = {{ $c.tracing.ratio }}
{{- include "tidegate.keys" $c.tracing.extra }}
{{- end }}
{{- end }}
{{- end }}
