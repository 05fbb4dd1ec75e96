{{/* asmodel.toml: what is under `settings`, and what the chart decides. */}}

{{- define "asmodel.settings" -}}
{{- $v := .Values -}}
{{- $all := deepCopy $v.settings -}}
{{- $_ := set $all "host" $v.listenAddress -}}
{{- $_ := set $all "port" $v.containerPort -}}
{{- $_ := set $all "drain_seconds" $v.shutdown.drainSeconds -}}

{{- if and $v.embeddedModel.enabled (not (dig "upstreams" "default" nil $all)) -}}
{{- $model := dict "kind" "embedded" "path" "/opt/models/SmolLM2-135M-Instruct.Q4_1.gguf" -}}
{{- $_ := set $all "upstreams" (merge (dict "default" $model) (dig "upstreams" dict $all)) -}}
{{- end -}}

{{- $keys := dict -}}
{{- range fromJsonArray (include "asmodel.holders" .) -}}
{{- $_ := set $keys . (printf "env:%s" (include "asmodel.holderVariable" .)) -}}
{{- end -}}
{{- $_ := set $all "keys" $keys -}}

{{- $cache := merge (dict "kind" $v.cache.kind) $v.cache.options (dig "cache" dict $all) -}}
{{- if eq $v.cache.kind "disk" -}}
{{- $_ := set $cache "path" "/var/lib/asmodel/cache/asmodel" -}}
{{- else if eq $v.cache.kind "redis" -}}
{{- $_ := set $cache "url" (ternary "env:CACHE_URL" $v.cache.redis.url (ne $v.cache.redis.existingSecret "")) -}}
{{- end -}}
{{- $_ := set $all "cache" $cache -}}

{{- /* A response that one pod keeps is none of another's: a client that goes on from it would be told so at random. */ -}}
{{- if and (gt (include "asmodel.most" . | int) 1) (not (dig "store" "kind" "" $all)) -}}
{{- $_ := set $all "store" (merge (dict "kind" "off") (dig "store" dict $all)) -}}
{{- end -}}

{{- $metrics := dict "open" $v.metrics.open -}}
{{- if not $v.metrics.open -}}{{- $_ := set $metrics "key" "env:METRICS_KEY" -}}{{- end -}}
{{- $_ := set $all "metrics" $metrics -}}
{{- $_ := set $all "log" (merge (dig "log" dict $all) (dict "format" "json")) -}}
{{- $_ := set $all "traces" (merge (dict "path" "/var/lib/asmodel/state/asmodel/traces.sqlite") (dig "traces" dict $all)) -}}
{{- include "asmodel.toml" (dict "path" "" "table" $all) -}}
{{- end }}

{{/* A table as TOML: what is no table first, then each table under its header. JSON's strings are TOML's too. */}}
{{- define "asmodel.toml" -}}
{{- $path := .path -}}
{{- range $name, $value := .table -}}
{{- if not (or (kindIs "map" $value) (kindIs "invalid" $value)) }}
{{ include "asmodel.tomlKey" $name }} = {{ include "asmodel.tomlValue" $value }}
{{- end -}}
{{- end -}}
{{- range $name, $value := .table -}}
{{- if kindIs "map" $value -}}
{{- $below := printf "%s%s" $path (include "asmodel.tomlKey" $name) }}

[{{ $below }}]
{{- include "asmodel.toml" (dict "path" (printf "%s." $below) "table" $value) -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "asmodel.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end }}

{{- define "asmodel.tomlValue" -}}
{{- if kindIs "map" . -}}
{ {{- range $i, $name := keys . | sortAlpha }}{{ if $i }}, {{ end }} {{ include "asmodel.tomlKey" $name }} = {{ include "asmodel.tomlValue" (get $ $name) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{ range $i, $item := . }}{{ if $i }}, {{ end }}{{ include "asmodel.tomlValue" $item }}{{ end }}]
{{- else -}}
{{ toJson . }}
{{- end -}}
{{- end }}

{{/* Folders of programs in the container, each once. JSON. */}}
{{- define "asmodel.programFolders" -}}
{{- $folders := list -}}
{{- if .Values.programs.files }}{{ $folders = append $folders "/programs/files" }}{{ end -}}
{{- range .Values.programs.configMaps }}{{ $folders = append $folders (printf "/programs/%s" .) }}{{ end -}}
{{- if .Values.programs.volume }}{{ $folders = append $folders "/programs/volume" }}{{ end -}}
{{- with .Values.programs.imageFolder }}{{ $folders = append $folders . }}{{ end -}}
{{- toJson $folders -}}
{{- end }}
