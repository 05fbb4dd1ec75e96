{{/* What the server's container has: its environment, its folders. */}}

{{- define "asmodel.env" -}}
- { name: ASMODEL_CONFIG, value: /etc/asmodel/asmodel.toml }
{{- with fromJsonArray (include "asmodel.programFolders" .) }}
- { name: ASMODEL_PROGRAM_FOLDERS, value: {{ toJson . | quote }} }
{{- end }}
- { name: HOME, value: /var/lib/asmodel }
- { name: XDG_CACHE_HOME, value: /var/lib/asmodel/cache }
- { name: XDG_STATE_HOME, value: /var/lib/asmodel/state }
{{- $secret := include "asmodel.clientKeys" . }}
{{- range fromJsonArray (include "asmodel.holders" .) }}
- name: {{ include "asmodel.holderVariable" . }}
  valueFrom: { secretKeyRef: { name: {{ $secret }}, key: {{ . }} } }
{{- end }}
{{- if not .Values.metrics.open }}
- name: METRICS_KEY
  valueFrom: { secretKeyRef: { name: {{ include "asmodel.metricsSecret" . }}, key: {{ include "asmodel.metricsEntry" . }} } }
{{- end }}
{{- with .Values.cache.redis.existingSecret }}
- name: CACHE_URL
  valueFrom: { secretKeyRef: { name: {{ . }}, key: {{ $.Values.cache.redis.existingSecretKey }} } }
{{- end }}
- name: POD_NAME
  valueFrom: { fieldRef: { fieldPath: metadata.name } }
- name: POD_NAMESPACE
  valueFrom: { fieldRef: { fieldPath: metadata.namespace } }
- name: NODE_NAME
  valueFrom: { fieldRef: { fieldPath: spec.nodeName } }
- { name: OTEL_SERVICE_NAME, value: {{ include "asmodel.fullname" . }} }
- name: OTEL_RESOURCE_ATTRIBUTES
  value: service.namespace=$(POD_NAMESPACE),k8s.namespace.name=$(POD_NAMESPACE),k8s.pod.name=$(POD_NAME),k8s.node.name=$(NODE_NAME)
{{- with .Values.telemetry }}
{{- if .endpoint }}
- { name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .endpoint | quote }} }
- { name: OTEL_TRACES_SAMPLER, value: parentbased_traceidratio }
- { name: OTEL_TRACES_SAMPLER_ARG, value: {{ .sampleRatio | quote }} }
- { name: OTEL_METRICS_EXPORTER, value: {{ ternary "otlp" "none" .metrics }} }
{{- end }}
{{- end }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "asmodel.envFrom" -}}
{{- with .Values.existingSecret }}
- secretRef: { name: {{ . }} }
{{- end }}
{{- with .Values.extraEnvFrom }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "asmodel.mounts" -}}
- { name: settings, mountPath: /etc/asmodel, readOnly: true }
- { name: data, mountPath: /var/lib/asmodel }
- { name: tmp, mountPath: /tmp }
{{- if .Values.programs.files }}
- { name: programs, mountPath: /programs/files, readOnly: true }
{{- end }}
{{- range $i, $name := .Values.programs.configMaps }}
- { name: programs-{{ $i }}, mountPath: /programs/{{ $name }}, readOnly: true }
{{- end }}
{{- if .Values.programs.volume }}
- { name: programs-volume, mountPath: /programs/volume, readOnly: true }
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "asmodel.volumes" -}}
- name: settings
  configMap: { name: {{ include "asmodel.fullname" . }}-settings }
- name: data
{{- if .Values.persistence.enabled }}
  persistentVolumeClaim: { claimName: {{ .Values.persistence.existingClaim | default (include "asmodel.fullname" .) }} }
{{- else }}
  emptyDir: { sizeLimit: {{ .Values.persistence.emptyDirSize }} }
{{- end }}
- name: tmp
  emptyDir: { sizeLimit: {{ .Values.tmpSize }} }
{{- if .Values.programs.files }}
- name: programs
  configMap: { name: {{ include "asmodel.fullname" . }}-programs }
{{- end }}
{{- range $i, $name := .Values.programs.configMaps }}
- name: programs-{{ $i }}
  configMap: { name: {{ $name }} }
{{- end }}
{{- with .Values.programs.volume }}
- name: programs-volume
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Before it is stopped a pod goes on answering, until every balancer has learned that it goes. */}}
{{- define "asmodel.preStop" -}}
{{- $seconds := int .Values.shutdown.preStopSeconds -}}
{{- if semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version -}}
sleep: { seconds: {{ $seconds }} }
{{- else -}}
exec: { command: [sleep, {{ $seconds | quote }}] }
{{- end -}}
{{- end }}
