{{/* What no schema can say: values that do not go together. All mistakes are told at once, before anything is made. */}}

{{- define "asmodel.checked" -}}
{{- $v := .Values -}}
{{- $wrong := list -}}

{{- $decided := dict "host" "listenAddress" "port" "containerPort" "keys" "clientKeys" "drain_seconds" "shutdown.drainSeconds" "program_folders" "programs" "metrics" "metrics" -}}
{{- range $name, $instead := $decided -}}
{{- if hasKey $v.settings $name -}}
{{- $wrong = append $wrong (printf "settings.%s is decided by the chart: set %s." $name $instead) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "kind" "path" "url" -}}
{{- if hasKey (dig "cache" dict $v.settings) $name -}}
{{- $wrong = append $wrong (printf "settings.cache.%s is decided by the chart: set cache.%s." $name (ternary "kind" "redis" (eq $name "kind"))) -}}
{{- end -}}
{{- end -}}
{{- range $place := list "traces" "recording" -}}
{{- if hasKey (dig $place dict $v.settings) "path" -}}
{{- $wrong = append $wrong (printf "settings.%s.path is decided by the chart: set persistence." $place) -}}
{{- end -}}
{{- end -}}

{{- $upstreams := dig "upstreams" dict $v.settings -}}
{{- if not (or $upstreams $v.embeddedModel.enabled) -}}
{{- $wrong = append $wrong "No upstream is set, so nothing could answer: name one under settings.upstreams (helm/examples has some), or set embeddedModel.enabled=true to try it with a small model of its own." -}}
{{- end -}}
{{- range $name, $upstream := $upstreams -}}
{{- $key := dig "api_key" "" $upstream -}}
{{- if and $key (not (hasPrefix "env:" $key)) -}}
{{- $wrong = append $wrong (printf "settings.upstreams.%s.api_key would stand in a ConfigMap for all to read: put the key into a Secret, name that as existingSecret, and write api_key: env:NAME_OF_ITS_ENTRY." $name) -}}
{{- end -}}
{{- if and (eq (dig "kind" "" $upstream) "embedded") (not $v.embeddedModel.enabled) -}}
{{- $wrong = append $wrong (printf "settings.upstreams.%s is the embedded model, which is in another image: set embeddedModel.enabled=true." $name) -}}
{{- end -}}
{{- end -}}

{{- $most := include "asmodel.most" . | int -}}
{{- if and (gt $most 1) (has $v.cache.kind (list "disk" "memory")) (not $v.cache.perReplica) -}}
{{- $wrong = append $wrong (printf "%d replicas with cache.kind=%s: each would have a cache of its own, and buy what another has bought. Set cache.kind=redis and cache.redis, or cache.perReplica=true if that is what you want." $most $v.cache.kind) -}}
{{- end -}}
{{- if and (gt $most 1) $v.persistence.enabled -}}
{{- $wrong = append $wrong (printf "%d replicas with persistence.enabled=true: a database on one volume must not be opened by several machines. Set cache.kind=redis and persistence.enabled=false." $most) -}}
{{- end -}}
{{- if and $v.persistence.existingClaim (not $v.persistence.enabled) -}}
{{- $wrong = append $wrong "persistence.existingClaim is set and persistence.enabled is not: set it too." -}}
{{- end -}}
{{- if $v.autoscaling.enabled -}}
{{- if gt (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas) -}}
{{- $wrong = append $wrong (printf "autoscaling.minReplicas is %d, and autoscaling.maxReplicas only %d." (int $v.autoscaling.minReplicas) (int $v.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if not (or $v.autoscaling.targetCPU $v.autoscaling.inFlight.target) -}}
{{- $wrong = append $wrong "autoscaling has nothing to go by: set autoscaling.targetCPU or autoscaling.inFlight.target." -}}
{{- end -}}
{{- if and $v.autoscaling.targetCPU (not (dig "requests" "cpu" "" $v.resources)) -}}
{{- $wrong = append $wrong "autoscaling.targetCPU is a part of resources.requests.cpu, which is not set." -}}
{{- end -}}
{{- end -}}

{{- if eq $v.cache.kind "redis" -}}
{{- if not (or $v.cache.redis.url $v.cache.redis.existingSecret) -}}
{{- $wrong = append $wrong "cache.kind=redis needs an address: cache.redis.url, or with a password cache.redis.existingSecret." -}}
{{- end -}}
{{- if and $v.cache.redis.url $v.cache.redis.existingSecret -}}
{{- $wrong = append $wrong "cache.redis.url and cache.redis.existingSecret are two addresses: set one of them." -}}
{{- end -}}
{{- if regexMatch "://[^/]*@" $v.cache.redis.url -}}
{{- $wrong = append $wrong "cache.redis.url holds a password, and would stand in a ConfigMap for all to read: put it into a Secret, and name that as cache.redis.existingSecret." -}}
{{- end -}}
{{- else if or $v.cache.redis.url $v.cache.redis.existingSecret -}}
{{- $wrong = append $wrong (printf "cache.redis is set and cache.kind is %s: set cache.kind=redis." $v.cache.kind) -}}
{{- end -}}
{{- range $name := list "kind" "path" "url" -}}
{{- if hasKey $v.cache.options $name -}}
{{- $wrong = append $wrong (printf "cache.options.%s has a value of its own: set cache.%s." $name (ternary "kind" "redis" (eq $name "kind"))) -}}
{{- end -}}
{{- end -}}

{{- $needed := add (int $v.shutdown.preStopSeconds) (int $v.shutdown.drainSeconds) 10 -}}
{{- if lt (include "asmodel.grace" . | int) (int $needed) -}}
{{- $wrong = append $wrong (printf "shutdown.gracePeriodSeconds is %d, and would cut streams: preStopSeconds and drainSeconds and 10 to close make %d. 0 works it out." (int $v.shutdown.gracePeriodSeconds) $needed) -}}
{{- end -}}

{{- if and $v.ingress.enabled (not $v.ingress.hosts) -}}
{{- $wrong = append $wrong "ingress.enabled needs ingress.hosts, as [{host: models.example.com}]." -}}
{{- end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) -}}
{{- $wrong = append $wrong "httpRoute.enabled needs httpRoute.parentRefs, the gateways that it belongs to, as [{name: public}]." -}}
{{- end -}}
{{- if and $v.service.nodePort (eq $v.service.type "ClusterIP") -}}
{{- $wrong = append $wrong "service.nodePort needs service.type NodePort or LoadBalancer." -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n\nasmodel: these values do not go together:\n  - %s\n" (join "\n  - " $wrong)) -}}
{{- end -}}
{{- end }}
