{{/* What things are called, and how they are labelled. */}}

{{- define "asmodel.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 53 | trimSuffix "-" -}}
{{- end }}

{{- define "asmodel.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- else if contains (include "asmodel.name" .) .Release.Name -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "asmodel.name" .) | trunc 53 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{- define "asmodel.selector" -}}
app.kubernetes.io/name: {{ include "asmodel.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "asmodel.labels" -}}
{{ include "asmodel.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: asmodel
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "asmodel.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "asmodel.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "asmodel.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ $image.tag | default .Chart.AppVersion }}{{ if .Values.embeddedModel.enabled }}-embedded{{ end }}
{{- end -}}
{{- end }}

{{/* The Secret with the keys of clients, and the one with the key of the metrics. */}}
{{- define "asmodel.clientKeys" -}}
{{- .Values.clientKeys.existingSecret | default (printf "%s-keys" (include "asmodel.fullname" .)) -}}
{{- end }}

{{- define "asmodel.metricsSecret" -}}
{{- .Values.metrics.existingSecret | default (printf "%s-keys" (include "asmodel.fullname" .)) -}}
{{- end }}

{{- define "asmodel.metricsEntry" -}}
{{- if .Values.metrics.existingSecret }}{{ .Values.metrics.existingSecretKey }}{{ else }}metrics{{ end -}}
{{- end }}

{{/* Names of holders: those of the values, or the one of the Secret that the chart makes. JSON. */}}
{{- define "asmodel.holders" -}}
{{- if .Values.clientKeys.existingSecret }}{{ toJson .Values.clientKeys.holders }}{{ else }}["default"]{{ end -}}
{{- end }}

{{- define "asmodel.holderVariable" -}}
CLIENT_KEY_{{ . | upper | replace "-" "_" }}
{{- end }}

{{/* How many pods there may be at once. */}}
{{- define "asmodel.most" -}}
{{- if .Values.autoscaling.enabled }}{{ .Values.autoscaling.maxReplicas }}{{ else }}{{ .Values.replicas }}{{ end -}}
{{- end }}

{{- define "asmodel.grace" -}}
{{- $s := .Values.shutdown -}}
{{- if $s.gracePeriodSeconds }}{{ int $s.gracePeriodSeconds }}{{ else }}{{ add (int $s.preStopSeconds) (int $s.drainSeconds) 15 }}{{ end -}}
{{- end }}
