{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The DaemonSet of the device plugin, as the operator gets it. */}}
{{- define "valve.devicePluginDaemonSet" -}}
{{- $name := include "valve.componentName" (list $ "device-plugin") -}}
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: {{ $name }}
  labels:
    {{- include "valve.madeByOperator" (list $ "device-plugin") | nindent 4 }}
spec:
  revisionHistoryLimit: 3
  selector:
    matchLabels:
      {{- include "valve.selectorLabels" (list $ "device-plugin") | nindent 6 }}
  updateStrategy:
    {{- toYaml .Values.devicePlugin.updateStrategy | nindent 4 }}
  template:
    metadata:
      labels:
        {{- include "valve.podLabels" (list $ "device-plugin") | nindent 8 }}
        {{- with .Values.devicePlugin.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        kubectl.kubernetes.io/default-container: device-plugin
        {{- with .Values.devicePlugin.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      # No right in the API, so no token either: it talks to the kubelet and to the agent, over their sockets.
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: false
      {{- with include "valve.pullSecrets" . }}
      {{- . | nindent 6 }}
      {{- end }}
      priorityClassName: {{ .Values.devicePlugin.priorityClassName | quote }}
      terminationGracePeriodSeconds: {{ .Values.devicePlugin.terminationGracePeriodSeconds }}
      securityContext:
        seccompProfile: {type: RuntimeDefault}
      initContainers:
        # Puts this version's runtime library on the node, beside those that running pods have mounted.
        - name: install-runtime
          image: {{ include "valve.image" (list $ .Values.devicePlugin.image) }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [python3, -m, valve_deviceplugin, install-runtime]
          args: [--from=/usr/share/valve/runtime, "--to={{ .Values.node.libraryDir }}"]
          resources:
            requests: {cpu: 20m, memory: 64Mi, ephemeral-storage: 16Mi}
            limits: {memory: 128Mi, ephemeral-storage: 16Mi}
          securityContext:
            # Root, because the folder on the node is root's; without any capability.
            runAsUser: 0
            {{- include "valve.containerSecurity" . | nindent 12 }}
          volumeMounts:
            - {name: library, mountPath: {{ .Values.node.libraryDir }}}
      containers:
        - name: device-plugin
          image: {{ include "valve.image" (list $ .Values.devicePlugin.image) }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [python3, -m, valve_deviceplugin]
          args:
            - --node=$(NODE_NAME)
            - --agent-socket={{ .Values.node.runDir }}/agent.sock
            - --library={{ .Values.node.libraryDir }}/{{ .Chart.AppVersion }}
            - --kubelet-dir={{ .Values.node.kubeletDir }}
            - --state-dir={{ .Values.node.stateDir }}/device-plugin
            - --injection={{ .Values.devicePlugin.injection }}
            - --cdi-dir={{ .Values.node.cdiDir }}
            - --gpu-access={{ .Values.devicePlugin.gpuAccess }}
            - --metrics-address=0.0.0.0
            - --metrics-port={{ .Values.devicePlugin.ports.metrics }}
            - --log-level={{ .Values.devicePlugin.logLevel }}
            {{- with .Values.devicePlugin.extraArgs }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          env:
            - name: NODE_NAME
              valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
            {{- with .Values.devicePlugin.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: {{ .Values.devicePlugin.ports.metrics }}, protocol: TCP}
          readinessProbe:
            httpGet: {path: /healthz, port: metrics}
            periodSeconds: 5
          livenessProbe:
            httpGet: {path: /healthz, port: metrics}
            initialDelaySeconds: 30
            periodSeconds: 30
            timeoutSeconds: 5
          resources:
            {{- toYaml .Values.devicePlugin.resources | nindent 12 }}
          securityContext:
            # Root, because the kubelet's and the agent's sockets are root's; without any capability.
            runAsUser: 0
            {{- include "valve.containerSecurity" . | nindent 12 }}
          volumeMounts:
            - {name: device-plugins, mountPath: {{ .Values.node.kubeletDir }}/device-plugins}
            - {name: pod-resources, mountPath: {{ .Values.node.kubeletDir }}/pod-resources, readOnly: true}
            - {name: cdi, mountPath: {{ .Values.node.cdiDir }}{{ if ne .Values.devicePlugin.injection "cdi" }}, readOnly: true{{ end }}}
            - {name: run, mountPath: {{ .Values.node.runDir }}, readOnly: true}
            - {name: state, mountPath: {{ .Values.node.stateDir }}}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: library
          hostPath: {path: {{ .Values.node.libraryDir }}, type: DirectoryOrCreate}
        - name: state
          hostPath: {path: {{ .Values.node.stateDir }}, type: DirectoryOrCreate}
        - name: device-plugins
          hostPath: {path: {{ .Values.node.kubeletDir }}/device-plugins, type: Directory}
        - name: pod-resources
          hostPath: {path: {{ .Values.node.kubeletDir }}/pod-resources, type: Directory}
        - name: cdi
          hostPath: {path: {{ .Values.node.cdiDir }}, type: DirectoryOrCreate}
        - name: run
          hostPath: {path: {{ .Values.node.runDir }}, type: DirectoryOrCreate}
        - name: tmp
          emptyDir: {sizeLimit: 16Mi}
      {{- with .Values.devicePlugin.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- end -}}
