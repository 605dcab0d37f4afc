{{/* The learner's pod, of a StatefulSet or of a JobSet. */}}
{{- define "ergon.learnerPod" }}
{{- $ := .root }}
{{- $learner := $.Values.learner }}
{{- $many := gt (int $learner.nodes) 1 }}
{{- include "ergon.placement" . }}
terminationGracePeriodSeconds: {{ $learner.terminationGracePeriodSeconds }}
securityContext:
  {{- include "ergon.podSecurity" . | nindent 2 }}
{{- include "ergon.modelInit" . }}
containers:
  - name: learner
    image: {{ include "ergon.image" (dict "root" $ "image" "learner") }}
    imagePullPolicy: {{ $.Values.images.pullPolicy }}
    command: [sh, -uc]
    args:
      - |
        child= stopped=
        trap 'stopped=1; [ -z "$child" ] || kill -TERM $child' TERM INT
        {{- if $many }}
        python -m torch.distributed.run --nnodes={{ $learner.nodes }} --nproc-per-node={{ $learner.gpus }} --node-rank="$NODE_RANK" \
          --master-addr={{ include "ergon.learnerHost" $ }} --master-port=7720 -m learner --config /etc/ergon/run.toml &
        {{- else }}
        python -m learner --config /etc/ergon/run.toml &
        {{- end }}
        child=$!
        [ -z "$stopped" ] || kill -TERM $child
        wait $child; code=$?
        while kill -0 $child 2>/dev/null; do wait $child; code=$?; done
        {{- if eq $learner.workload "StatefulSet" }}
        [ -z "$stopped" ] && [ $code = 0 ] || exit $code
        # The run has finished. A StatefulSet would start the learner again, so it stays until it is scaled down or deleted.
        trap 'exit 0' TERM INT
        echo 'the run has finished; its results are in the volume of the learner'
        sleep infinity & wait $!
        {{- else }}
        # A learner that was told to stop ends well too, but its run has not finished: the JobSet is to start it again.
        [ -z "$stopped" ] || exit 143
        exit $code
        {{- end }}
    env:
      {{- include "ergon.env" $ | nindent 6 }}
      {{- include "ergon.modelEnv" $ | nindent 6 }}
      - {name: ERGON__BROKER__HOST, value: {{ $.Release.Name }}-broker}
      - {name: ERGON__WEIGHTS__HOST, value: 0.0.0.0}
      - {name: ERGON__WEIGHTS__PORT, value: "7710"}
      - {name: ERGON__LEARNER__RANKS, value: "{{ max 1 (int $learner.gpus) }}"}
      - {name: HF_HOME, value: /tmp/huggingface}
      - {name: TORCH_EXTENSIONS_DIR, value: /tmp/torch}
      - {name: TRITON_CACHE_DIR, value: /tmp/triton}
      {{- if $many }}
      - name: NODE_RANK
        valueFrom:
          fieldRef: {fieldPath: {{ .nodeRank | quote }}}
      {{- end }}
      {{- range $name, $value := $learner.nccl }}
      - {name: {{ $name }}, value: {{ $value | quote }}}
      {{- end }}
    ports:
      - {name: weights, containerPort: 7710}
      - {name: rendezvous, containerPort: 7720}
      - {name: metrics, containerPort: 9702}
    {{- if not $many }}
    startupProbe:
      httpGet: {path: /metrics, port: metrics}
      periodSeconds: 5
      failureThreshold: 240
    readinessProbe:
      httpGet: {path: /healthz, port: metrics}
      periodSeconds: 5
    {{- end }}
    resources: {{ include "ergon.resources" . }}
    securityContext:
      {{- include "ergon.containerSecurity" . | nindent 6 }}
    volumeMounts:
      {{- include "ergon.mounts" . | nindent 6 }}
      - {name: data, mountPath: /data}
      - {name: shm, mountPath: /dev/shm}
      - {name: model, mountPath: /model, readOnly: true}
volumes:
  {{- include "ergon.volumes" . | nindent 2 }}
  {{- include "ergon.modelVolume" $ | nindent 2 }}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ $learner.sharedMemory }}}
  - name: data
    persistentVolumeClaim: {claimName: {{ $.Release.Name }}-learner}
{{- end }}
