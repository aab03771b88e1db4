{{/* A key in TOML, quoted where it has to be. */}}
{{- define "tidegate.key" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}
{{- . }}
{{- else }}
{{- toJson . }}
{{- end }}
{{- end }}

{{/* A value in TOML. A text, a number, true and false are written as in JSON; a map is an inline table. */}}
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

{{/* A map as the keys of a section, each on a line of its own. They belong before the tables of that section. */}}
{{- define "tidegate.keys" -}}
{{- range $key, $value := . }}
{{ include "tidegate.key" $key }} = {{ include "tidegate.value" $value }}
{{- end }}
{{- end }}
