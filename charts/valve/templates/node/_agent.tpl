{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The DaemonSet of the node agent, as the operator gets it. */}}
{{- define "valve.agentDaemonSet" -}}
{{- $name := include "valve.componentName" (list $ "agent") -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "valve.madeByOperator" (list $ "agent") | nindent 4 }}
spec:
  revisionHistoryLimit: 3
  selector:
    matchLabels:
      {{- include "valve.selectorLabels" (list $ "agent") | nindent 6 }}
  updateStrategy:
    {{- toYaml .Values.agent.updateStrategy | nindent 4 }}
  template:
    metadata:
      labels:
        {{- include "valve.podLabels" (list $ "agent") | nindent 8 }}
        {{- with .Values.agent.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        kubectl.kubernetes.io/default-container: agent
        {{- with .Values.agent.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      serviceAccountName: {{ include "valve.serviceAccountName" (list $ "agent" .Values.agent.serviceAccount) }}
      automountServiceAccountToken: true
      {{- with include "valve.pullSecrets" . }}
      {{- . | nindent 6 }}
      {{- end }}
      priorityClassName: {{ .Values.agent.priorityClassName | quote }}
      {{- with .Values.agent.runtimeClassName }}
      runtimeClassName: {{ . | quote }}
      {{- end }}
      terminationGracePeriodSeconds: {{ .Values.agent.terminationGracePeriodSeconds }}
      # The agent stops and continues the offline processes of the node and takes a tenant's identity from the
      # pid that the kernel names: it has to see every process.
      hostPID: true
      securityContext:
        seccompProfile: {type: RuntimeDefault}
      containers:
        - name: agent
          image: {{ include "valve.image" (list $ .Values.agent.image) }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [python3, -m, valve_cli.main, agent]
          args:
            - --node=$(NODE_NAME)
            {{- with .Values.agent.device }}
            - --device={{ . }}
            {{- end }}
            - --socket={{ .Values.node.runDir }}/agent.sock
            - --pod-resources={{ .Values.node.kubeletDir }}/pod-resources/kubelet.sock
            - --logs=/var/log
            - --allocations={{ .Values.node.stateDir }}/device-plugin
            - --metrics-address=0.0.0.0
            - --metrics-port={{ .Values.agent.ports.metrics }}
            {{- with .Values.agent.extraArgs }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          env:
            - name: NODE_NAME
              valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
            {{- if ne .Values.agent.device "cpu" }}
            # What NVIDIA's container runtime goes by: every GPU, its CUDA and NVML libraries.
            - {name: NVIDIA_VISIBLE_DEVICES, value: all}
            - {name: NVIDIA_DRIVER_CAPABILITIES, value: "compute,utility"}
            {{- end }}
            {{- with include "valve.apiServerEnv" . }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- with .Values.agent.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: {{ .Values.agent.ports.metrics }}, protocol: TCP}
          # Only for the pace of a rollout. No liveness probe: the agent ends by itself when it cannot go on, and
          # a probe that fails on a busy node would pause offline for nothing.
          readinessProbe:
            tcpSocket: {port: metrics}
            periodSeconds: 5
          resources:
            {{- toYaml .Values.agent.resources | nindent 12 }}
          securityContext:
            # The one privileged container of Valve. It signals and stops processes of other pods (CAP_KILL,
            # ptrace access), mounts huge-page tmpfs for device memory, raises its own scheduling priority, and on
            # GPU nodes opens every /dev/nvidia* and takes over control descriptors of other processes
            # (pidfd_getfd). No smaller set of capabilities covers the devices, which come and go.
            privileged: true
            runAsUser: 0
            readOnlyRootFilesystem: true
          volumeMounts:
            - {name: run, mountPath: {{ .Values.node.runDir }}}
            - {name: pod-resources, mountPath: {{ .Values.node.kubeletDir }}/pod-resources, readOnly: true}
            - {name: logs, mountPath: /var/log, readOnly: true}
            - {name: allocations, mountPath: {{ .Values.node.stateDir }}, readOnly: true}
            - {name: tmp, mountPath: /tmp}
            {{- with .Values.agent.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: run
          hostPath: {path: {{ .Values.node.runDir }}, type: DirectoryOrCreate}
        - name: pod-resources
          hostPath: {path: {{ .Values.node.kubeletDir }}/pod-resources, type: Directory}
        # Its links say which container id is which pod's: the kubelet makes them when it starts a container.
        - name: logs
          hostPath: {path: /var/log, type: Directory}
        # The device plugin's ledger: which pod has which GPU.
        - name: allocations
          hostPath: {path: {{ .Values.node.stateDir }}, type: DirectoryOrCreate}
        - name: tmp
          emptyDir: {sizeLimit: 64Mi}
        {{- with .Values.agent.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.agent.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}
