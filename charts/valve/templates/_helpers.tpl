{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* Names, labels and parts of pods that every component uses. A component is operator, agent or
device-plugin; helpers that need one take (list $ "component"). */}}

{{- define "valve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: the operator puts a policy's name behind it. */}}
{{- define "valve.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "valve.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "valve.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "valve.componentName" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%s" (include "valve.fullname" $root) (index . 1) -}}
{{- end -}}

{{/* Labels that never change: a Deployment's selector is immutable. */}}
{{- define "valve.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "valve.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "valve.labels" -}}
{{- $root := index . 0 -}}
{{ include "valve.selectorLabels" . }}
app.kubernetes.io/part-of: valve
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of pods: no version in them, so that an upgrade that changes nothing of a pod restarts none. */}}
{{- define "valve.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "valve.selectorLabels" . }}
app.kubernetes.io/part-of: valve
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Labels of what the operator makes from a template. */}}
{{- define "valve.madeByOperator" -}}
{{ include "valve.podLabels" . }}
app.kubernetes.io/managed-by: valve-operator
{{- end -}}

{{/* (list $ .Values.operator.image) */}}
{{- define "valve.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $name := $image.repository -}}
{{- with $root.Values.image.registry -}}{{- $name = printf "%s/%s" . $name -}}{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (coalesce $image.tag $root.Values.image.tag $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* (list $ "operator" .Values.operator.serviceAccount) */}}
{{- define "valve.serviceAccountName" -}}
{{- $root := index . 0 -}}
{{- $account := index . 2 -}}
{{- if $account.create -}}
{{- default (include "valve.componentName" (list $root (index . 1))) $account.name -}}
{{- else -}}
{{- required (printf "%s.serviceAccount.create is false: name the account in %s.serviceAccount.name" (index . 1) (index . 1)) $account.name -}}
{{- end -}}
{{- end -}}

{{- define "valve.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Environment of a program that talks to the API server. */}}
{{- define "valve.apiServerEnv" -}}
{{- with .Values.apiServer.host -}}
- name: KUBERNETES_SERVICE_HOST
  value: {{ . | quote }}
{{- end }}
{{- with .Values.apiServer.port }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What every container gets that is not the node agent's. */}}
{{- define "valve.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "valve.webhookName" -}}
{{- include "valve.componentName" (list . "webhook") -}}
{{- end -}}

{{- define "valve.webhookSecret" -}}
{{- if eq .Values.webhook.certificate.source "secret" -}}
{{- required "webhook.certificate.source is secret: name a kubernetes.io/tls secret in webhook.certificate.existingSecret" .Values.webhook.certificate.existingSecret -}}
{{- else -}}
{{- printf "%s-tls" (include "valve.webhookName" .) -}}
{{- end -}}
{{- end -}}

{{/* Fails where the Prometheus operator's API is asked for and missing. (list $ "podMonitor") */}}
{{- define "valve.needMonitoringApi" -}}
{{- $root := index . 0 -}}
{{- if not (or $root.Values.monitoring.assumeApi ($root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}
{{- fail (printf "monitoring.%s.enabled is true, but the cluster does not serve monitoring.coreos.com/v1: install the Prometheus operator first, set monitoring.%s.enabled=false, or, if you render without a cluster, monitoring.assumeApi=true" (index . 1) (index . 1)) -}}
{{- end -}}
{{- end -}}
