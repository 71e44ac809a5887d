{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{/* The webhook's certificate when the chart makes it, as YAML with ca, crt, key (base64) and renewAfter (seconds
since 1970). Kept from the Secret in the cluster while it is good for 180 days more; made once per rendering, since
the Secret and both webhook configurations need the same one. */}}
{{- define "valve.chartCertificate" -}}
{{- if not (hasKey .Values.webhook "made") -}}
{{- $service := printf "%s.%s.svc" (include "valve.webhookName" .) .Release.Namespace -}}
{{- $old := lookup "v1" "Secret" .Release.Namespace (include "valve.webhookSecret" .) -}}
{{- $renewAfter := dig "metadata" "annotations" "valve.io/renew-after" "0" $old | int64 -}}
{{- if gt $renewAfter (now | unixEpoch | int64) -}}
{{- $_ := set .Values.webhook "made" (dict "ca" (index $old.data "ca.crt") "crt" (index $old.data "tls.crt") "key" (index $old.data "tls.key") "renewAfter" $renewAfter) -}}
{{- else -}}
{{- $days := int .Values.webhook.certificate.validityDays -}}
{{- $ca := genCA (printf "%s-ca" (include "valve.webhookName" .)) $days -}}
{{- $cert := genSignedCert $service nil (list $service (printf "%s.cluster.local" $service)) $days $ca -}}
{{- $after := now | dateModify (printf "+%dh" (mul 24 (sub $days 180))) | unixEpoch | int64 -}}
{{- $_ := set .Values.webhook "made" (dict "ca" (b64enc $ca.Cert) "crt" (b64enc $cert.Cert) "key" (b64enc $cert.Key) "renewAfter" $after) -}}
{{- end -}}
{{- end -}}
{{- toYaml .Values.webhook.made -}}
{{- end -}}

{{/* What both webhook configurations put below clientConfig. */}}
{{- define "valve.caBundle" -}}
{{- $source := .Values.webhook.certificate.source -}}
{{- if eq $source "chart" -}}
caBundle: {{ (fromYaml (include "valve.chartCertificate" .)).ca }}
{{- else if eq $source "secret" -}}
caBundle: {{ required "webhook.certificate.source is secret: put the CA that signed it into webhook.certificate.caBundle (PEM)" .Values.webhook.certificate.caBundle | b64enc }}
{{- end -}}
{{- end -}}

{{- define "valve.webhookMetadata" -}}
name: {{ include "valve.fullname" . }}
labels:
  {{- include "valve.labels" (list $ "operator") | nindent 2 }}
{{- if eq .Values.webhook.certificate.source "certManager" }}
annotations:
  cert-manager.io/inject-ca-from: {{ .Release.Namespace }}/{{ include "valve.webhookName" . }}
{{- end }}
{{- end -}}
