{{/* SPDX-License-Identifier: Apache-2.0 */}}
{{- define "valve.testHook" -}}
helm.sh/hook: test
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
