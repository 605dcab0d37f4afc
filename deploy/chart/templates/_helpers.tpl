{{/* What templates have in common. Every helper with a component takes (dict "root" $ "component" NAME). */}}

{{- define "ergon.run" -}}{{ .Values.run.name | default .Release.Name }}{{- end }}

{{- define "ergon.keys" -}}{{ .Values.keys.secretPrefix | default (printf "%s-keys" .Release.Name) }}{{- end }}

{{- define "ergon.sandboxNamespace" -}}{{ .Values.sandboxes.namespace | default (printf "%s-sandboxes" .Release.Name) }}{{- end }}

{{- define "ergon.image" -}}
{{- $images := .root.Values.images -}}
{{- $name := get $images .image -}}
{{- with $images.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ $name }}:{{ $images.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "ergon.selector" -}}
app.kubernetes.io/name: ergon
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{- define "ergon.labels" -}}
{{ include "ergon.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
ergon.dev/run: {{ include "ergon.run" .root }}
{{- end }}

{{/* Labels of pods: those of the release's version are left out, so that an upgrade restarts only what has changed. */}}
{{- define "ergon.podLabels" -}}
{{ include "ergon.selector" . }}
ergon.dev/run: {{ include "ergon.run" .root }}
{{- end }}

{{/* Processes read the TOML when they start. */}}
{{- define "ergon.podAnnotations" -}}
ergon.dev/settings: {{ .root.Values.run.config | sha256sum | trunc 16 | quote }}
{{- end }}

{{- define "ergon.queue" -}}
{{- with .Values.queueName }}
kueue.x-k8s.io/queue-name: {{ . }}
{{- end }}
{{- end }}

{{- define "ergon.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {{ .seccomp | default (dict "type" "RuntimeDefault") | toJson }}
{{- end }}

{{- define "ergon.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Of every pod: no token, no service links, where it may run. */}}
{{- define "ergon.placement" -}}
serviceAccountName: {{ .account | default .root.Release.Name }}
automountServiceAccountToken: {{ not (empty .account) }}
enableServiceLinks: false
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- $made := ternary (printf "%s-%s" .root.Release.Name (ternary "preemptible" "state" (eq .component "actor"))) "" .root.Values.priorityClasses.create }}
{{- with .values.priorityClassName | default $made }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
{{- with .values.affinity }}
affinity: {{ toJson . }}
{{- end }}
{{- end }}

{{- define "ergon.learnerHost" -}}
{{- if eq .Values.learner.workload "JobSet" -}}
{{ .Release.Name }}-learner-node-0-0.{{ .Release.Name }}-learner
{{- else -}}
{{ .Release.Name }}-learner-0.{{ .Release.Name }}-learner
{{- end -}}
{{- end }}

{{- define "ergon.lastRelay" -}}{{ .Release.Name }}-relay-{{ sub (len .Values.relays.levels) 1 }}{{- end }}

{{/* Settings of every process. What it binds is set at its own pod, after this. */}}
{{- define "ergon.env" -}}
- {name: ERGON__RUN__NAME, value: {{ include "ergon.run" . | quote }}}
- {name: ERGON__RUN__DIRECTORY, value: /data}
- {name: ERGON__SECURITY__MODE, value: curve}
- {name: ERGON__SECURITY__KEYS, value: /keys}
- {name: ERGON__METRICS__HOST, value: 0.0.0.0}
- {name: ERGON__METRICS__BROKER_PORT, value: "9700"}
- {name: ERGON__METRICS__RELAY_PORT, value: "9701"}
- {name: ERGON__METRICS__LEARNER_PORT, value: "9702"}
- {name: ERGON__METRICS__ACTOR_PORT, value: "9703"}
- {name: ERGON__BROKER__PORT, value: "7700"}
- {name: ERGON__WEIGHTS__RELAY_PORT, value: "7711"}
- {name: ERGON__LEARNER__MASTER_PORT, value: "7720"}
- {name: ERGON__ACTOR__DRAIN_S, value: "{{ .Values.actors.drainSeconds }}"}
- {name: ERGON__SUPERVISOR__GRACE_S, value: "{{ add .Values.actors.drainSeconds 10 }}"}
- {name: HOME, value: /tmp}
- {name: PYTHONUNBUFFERED, value: "1"}
- {name: PYTHONDONTWRITEBYTECODE, value: "1"}
{{- range $name, $value := .Values.run.env }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}

{{- define "ergon.modelEnv" -}}
{{- if .Values.model.existingClaim }}
- {name: ERGON__MODEL__PATH, value: {{ printf "/model/%s" .Values.model.path | trimSuffix "/" | quote }}}
{{- else }}
- {name: ERGON__MODEL__PATH, value: /model/current}
{{- end }}
{{- end }}

{{/* Volumes and mounts of every pod; a secret file is readable by its process alone. */}}
{{- define "ergon.volumes" -}}
- name: run
  configMap: {name: {{ .root.Values.run.existingConfigMap | default (printf "%s-run" .root.Release.Name) }}}
- name: keys
  secret: {secretName: {{ include "ergon.keys" .root }}-{{ .identity }}, defaultMode: 0440}
- name: tmp
  emptyDir: {}
{{- end }}

{{- define "ergon.mounts" -}}
- {name: run, mountPath: /etc/ergon, readOnly: true}
- {name: keys, mountPath: /keys, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "ergon.modelVolume" -}}
- name: model
  {{- if .Values.model.existingClaim }}
  persistentVolumeClaim: {claimName: {{ .Values.model.existingClaim }}, readOnly: true}
  {{- else }}
  emptyDir: {sizeLimit: {{ .Values.model.cacheSize }}}
  {{- end }}
{{- end }}

{{/* Makes the model that the run's TOML names, where no volume has it. */}}
{{- define "ergon.modelInit" -}}
{{- if not .root.Values.model.existingClaim }}
initContainers:
  - name: model
    image: {{ include "ergon.image" (dict "root" .root "image" .component) }}
    imagePullPolicy: {{ .root.Values.images.pullPolicy }}
    command: [sh, -euc]
    args:
      - |
        path=$(python -c 'import pathlib, broker.process.config as c; print(c.load_settings(pathlib.Path("/etc/ergon/run.toml")).model.path)')
        python -m learner.model --path "$path" --cache /model/cache > /tmp/made
        ln -sfn "$(tail -n 1 /tmp/made)" /model/current
    env:
      {{- include "ergon.env" .root | nindent 6 }}
    securityContext:
      {{- include "ergon.containerSecurity" . | nindent 6 }}
    resources: {{ toJson .resources }}
    volumeMounts:
      {{- include "ergon.mounts" . | nindent 6 }}
      - {name: model, mountPath: /model}
{{- end }}
{{- end }}

{{/* Ready: it can do its work. Alive: it answers at all, so that a broker with a full disk is not restarted for it. */}}
{{- define "ergon.probes" -}}
startupProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 5
  failureThreshold: {{ .startup | default 24 }}
readinessProbe:
  httpGet: {path: /healthz, port: metrics}
  periodSeconds: 5
livenessProbe:
  httpGet: {path: /metrics, port: metrics}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end }}

{{- define "ergon.resources" -}}
{{- $resources := deepCopy .values.resources -}}
{{- if .values.gpus -}}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" (toString .values.gpus)) ($resources.limits | default dict)) -}}
{{- end -}}
{{ toJson $resources }}
{{- end }}

{{/* Peers of network policies. */}}
{{- define "ergon.pods" -}}
- podSelector:
    matchLabels: {{- include "ergon.selector" . | nindent 6 }}
{{- end }}
{{- define "ergon.scraped" }}
- from:
    - namespaceSelector:
        matchLabels: {{- toYaml .root.Values.networkPolicy.monitoringNamespace | nindent 10 }}
  ports: [{port: metrics, protocol: TCP}]
{{- end }}

{{/* More at once, because the rule looks back itself and counts nobody who has just come; twice as many a minute at most. A
minute and no longer: the step from one replica to the least number, with which a run begins, counts as an increase, too. */}}
{{- define "ergon.scalingBehaviour" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies: [{type: Percent, value: 100, periodSeconds: 60}]
scaleDown:
  stabilizationWindowSeconds: {{ .scaling.cooldownSeconds }}
  policies: [{type: Percent, value: 25, periodSeconds: 120}]
{{- end }}
