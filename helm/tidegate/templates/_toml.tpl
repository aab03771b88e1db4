{{/* A key in TOML, quoted if necessary. */}}
{{- define "tidegate.key" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}
{{- . }}
{{- else }}
{{- toJson . }}
{{- end }}
{{- end }}

{{/* A value in TOML. Strings, numbers and booleans have the syntax of JSON; a map is an inline table. */}}
{{- define "tidegate.value" -}}
{{- if kindIs "map" . }}
{{- $pairs := list }}
{{- range $key, $value := . }}
{{- $pairs = append $pairs (printf "%s = %s" (include "tidegate.key" $key) (include "tidegate.value" $value)) }}
{{- end }}
{{- printf "{ %s }" (join ", " $pairs) }}
{{- else if kindIs "slice" . }}
{{- $items := list }}
{{- range . }}
{{- $items = append $items (include "tidegate.value" .) }}
{{- end }}
{{- printf "[%s]" (join ", " $items) }}
{{- else }}
{{- toJson . }}
{{- end }}
{{- end }}

{{/* A map as the keys of a section, one per line. They must precede the tables of that section. */}}
{{- define "tidegate.keys" -}}
{{- range $key, $value := . }}
{{ include "tidegate.key" $key }} = {{ include "tidegate.value" $value }}
{{- end }}
{{- end }}
