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

{{/*
Name, labels and annotations of an object. Takes a dict: root; optionally suffix of the name, labels, annotations. Labels of the chart take
precedence, then those of the object, then common ones.
*/}}
{{- define "tidegate.metadata" -}}
name: {{ include "tidegate.fullname" .root }}{{ .suffix }}
labels:
  {{- $own := include "tidegate.labels" .root | fromYaml }}
  {{- toYaml (merge $own (default dict .labels) .root.Values.commonLabels) | nindent 2 }}
{{- with merge (deepCopy (default dict .annotations)) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "tidegate.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "tidegate.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* `autoscaling` or `keda` if one of them is enabled. */}}
{{- define "tidegate.scaler" -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled }}
{{- fail "autoscaling.enabled and keda.enabled exclude each other: both would set the number of pods" }}
{{- end }}
{{- range list "autoscaling" "keda" }}
{{- $scaler := get $.Values . }}
{{- if $scaler.enabled }}
{{- if gt (int $scaler.minReplicas) (int $scaler.maxReplicas) }}
{{- fail (printf "%s.minReplicas is above %s.maxReplicas" . .) }}
{{- end }}
{{- . }}
{{- end }}
{{- end }}
{{- end }}

{{/* Least or, with `most`, largest number of pods. Takes a dict: root, bound. */}}
{{- define "tidegate.pods" -}}
{{- $scaler := include "tidegate.scaler" .root }}
{{- if $scaler }}
{{- get (get .root.Values $scaler) .bound | int }}
{{- else }}
{{- .root.Values.replicaCount | int }}
{{- end }}
{{- end }}

{{/*
Number of replicas of the Deployment. With autoscaling, the current number in the cluster: another number would override the autoscaler, and
without a number the upgrade that removes the field resets it to 1.
*/}}
{{- define "tidegate.replicas" -}}
{{- $live := dict }}
{{- if include "tidegate.scaler" . }}
{{- $live = lookup "apps/v1" "Deployment" .Release.Namespace (include "tidegate.fullname" .) }}
{{- end }}
{{- if $live }}
{{- $live.spec.replicas | int }}
{{- else }}
{{- include "tidegate.pods" (dict "root" . "bound" "minReplicas") }}
{{- end }}
{{- end }}

{{/* Pairs of Secret and directory of its certificate, one per line. The first one is for clients that no other certificate matches. */}}
{{- define "tidegate.certificates" -}}
{{- $tls := .Values.tls }}
{{- $first := $tls.secretName }}
{{- if and $tls.certManager.enabled (not $first) }}
{{- $first = printf "%s-tls" (include "tidegate.fullname" .) }}
{{- end }}
{{- with $first }}
{{- . }} tls
{{ end }}
{{- range $tls.secrets }}
{{- if eq . $first }}
{{- fail (printf "tls.secrets: %s is the first certificate already" .) }}
{{- end }}
{{- . }} tls/{{ . }}
{{ end }}
{{- end }}

{{/* Worker threads: the CPU limit in whole cores, at least one; 0 (one per core) without a limit. */}}
{{- define "tidegate.workers" -}}
{{- $cpu := dig "limits" "cpu" "" .Values.resources | toString }}
{{- if regexMatch "^[0-9]+m$" $cpu }}
{{- max 1 (div (trimSuffix "m" $cpu | int) 1000) }}
{{- else if $cpu }}
{{- max 1 (float64 $cpu | floor | int) }}
{{- else }}
{{- 0 }}
{{- end }}
{{- end }}
