{{/* What the gateway, its check and its test share: image, variables, files. */}}

{{- define "tidegate.image" -}}
image: {{ .Values.image.repository }}{{ with .Values.image.digest }}@{{ . }}{{ else }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{ end }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: ["ALL"]
{{- end }}

{{- define "tidegate.securityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- $sysctls := .Values.sysctls }}
{{- with .Values.somaxconn }}
{{- $sysctls = append $sysctls (dict "name" "net.core.somaxconn" "value" (int . | toString)) }}
{{- end }}
{{- with $sysctls }}
sysctls:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A variable from a Secret. Takes a list: variable, Secret, key. */}}
{{- define "tidegate.secretVariable" }}
- name: {{ index . 0 }}
  valueFrom:
    secretKeyRef:
      name: {{ index . 1 | quote }}
      key: {{ index . 2 | quote }}
{{- end }}

{{- define "tidegate.env" -}}
- name: HOSTNAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- with .Values.admin }}
{{- if .secretName }}
{{- include "tidegate.secretVariable" (list "ADMIN_TOKEN" .secretName .secretKey) }}
{{- end }}
{{- end }}
{{- with .Values.config.identity }}
{{- if .secretName }}
{{- include "tidegate.secretVariable" (list "IDENTITY_SECRET" .secretName .secretKey) }}
{{- end }}
{{- end }}
{{- with .Values.config.redis }}
{{- if .secretName }}
{{- include "tidegate.secretVariable" (list "REDIS_SECRET" .secretName .secretKey) }}
{{- end }}
{{- if .auth.secretName }}
{{- with .auth.userKey }}
{{- include "tidegate.secretVariable" (list "REDIS_USER" $.Values.config.redis.auth.secretName .) }}
{{- end }}
{{- include "tidegate.secretVariable" (list "REDIS_PASSWORD" .auth.secretName .auth.passwordKey) }}
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tidegate.volumeMounts" -}}
- name: config
  mountPath: /etc/tidegate
  readOnly: true
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* A source of the projected volume. Takes a list: "secret" or "configMap", its name, and pairs of key and path. */}}
{{- define "tidegate.source" }}
- {{ index . 0 }}:
    name: {{ index . 1 | quote }}
    items:
      {{- range rest (rest .) }}
      - { key: {{ first . | quote }}, path: {{ last . }} }
      {{- end }}
{{- end }}

{{- define "tidegate.volumes" -}}
# One projected volume instead of several mounts: the gateway watches the directory, and nothing can be mounted inside the mount of a ConfigMap.
- name: config
  projected:
    defaultMode: 0440
    sources:
      - configMap:
          name: {{ include "tidegate.fullname" . }}
      {{- range include "tidegate.certificates" . | trim | splitList "\n" | compact }}
      {{- $directory := splitList " " . | last }}
      {{- include "tidegate.source" (list "secret" (splitList " " . | first) (list "tls.crt" (printf "%s/tls.crt" $directory)) (list "tls.key" (printf "%s/tls.key" $directory))) | trim | nindent 6 }}
      {{- end }}
      {{- with .Values.tls.clientCA }}
      {{- if or .secretName .configMapName }}
      {{- $files := list (list .caKey "client-ca/ca.crt") }}
      {{- if .crlKey }}
      {{- $files = append $files (list .crlKey "client-ca/crl.pem") }}
      {{- end }}
      {{- include "tidegate.source" (concat (list (ternary "secret" "configMap" (ne .secretName "")) (.secretName | default .configMapName)) $files) | trim | nindent 6 }}
      {{- end }}
      {{- end }}
      {{- with .Values.config.identity.jwt }}
      {{- if or .secretName .configMapName }}
      {{- include "tidegate.source" (list (ternary "secret" "configMap" (ne .secretName "")) (.secretName | default .configMapName) (list .keysKey "jwt/jwks.json")) | trim | nindent 6 }}
      {{- end }}
      {{- end }}
      {{- with .Values.config.redis.tls }}
      {{- if and .secretName (or .caKey .certKey) }}
      {{- $files := list }}
      {{- with .caKey }}
      {{- $files = append $files (list . "redis-tls/ca.crt") }}
      {{- end }}
      {{- if .certKey }}
      {{- $files = concat $files (list (list .certKey "redis-tls/tls.crt") (list .keyKey "redis-tls/tls.key")) }}
      {{- end }}
      {{- include "tidegate.source" (concat (list "secret" .secretName) $files) | trim | nindent 6 }}
      {{- end }}
      {{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The container that runs `tidegate check` on the configuration, without its name. */}}
{{- define "tidegate.check" -}}
{{ include "tidegate.image" . }}
workingDir: /etc/tidegate
args: ["check", "/etc/tidegate/tidegate.toml"{{ if .Values.configCheck.denyWarnings }}, "--deny-warnings"{{ end }}]
env:
  {{- include "tidegate.env" . | nindent 2 }}
{{- with .Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
volumeMounts:
  {{- include "tidegate.volumeMounts" . | nindent 2 }}
{{- end }}
