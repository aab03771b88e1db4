{{/* A value in TOML. A text, a number, true and false are written as in JSON; a map is an inline table. */}}
{{- define "tidegate.value" -}}
{{- if kindIs "map" . }}
{{- $pairs := list }}
{{- range $key, $value := . }}
{{- $pairs = append $pairs (printf "%s = %s" (toJson $key) (include "tidegate.value" $value)) }}
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

{{/* The keys of an `extra` map, each on a line of its own. They belong before the tables of their section. */}}
{{- define "tidegate.extra" -}}
{{- range $key, $value := . }}
{{ toJson $key }} = {{ include "tidegate.value" $value }}
{{- end }}
{{- end }}
