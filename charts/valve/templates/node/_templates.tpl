{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{- define "valve.nodeTemplates" -}}
{{- $agent := fromYaml (include "valve.agentDaemonSet" .) -}}
{{- $plugin := fromYaml (include "valve.devicePluginDaemonSet" .) -}}
{{- $agent = mustMergeOverwrite $agent (dict "spec" (dict "template" (deepCopy .Values.agent.template))) -}}
{{- $plugin = mustMergeOverwrite $plugin (dict "spec" (dict "template" (deepCopy .Values.devicePlugin.template))) -}}
agent.yaml: |
  {{- toYaml $agent | nindent 2 }}
device-plugin.yaml: |
  {{- toYaml $plugin | nindent 2 }}
{{- end -}}
