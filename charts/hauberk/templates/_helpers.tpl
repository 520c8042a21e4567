{{- define "hauberk.labels" -}}
app.kubernetes.io/name: hauberk
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "hauberk.controlPlane.selector" -}}
app.kubernetes.io/name: hauberk
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: control-plane
{{- end }}

{{- define "hauberk.agent.selector" -}}
app.kubernetes.io/name: hauberk
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: agent
{{- end }}

{{- /* Labels of pods: those of the chart, which selectors and others rely on, before those of the values. */ -}}
{{- define "hauberk.podLabels" -}}
{{- $labels := include "hauberk.labels" .root | fromYaml -}}
{{- $labels = merge $labels (dict "app.kubernetes.io/component" .component) .labels -}}
{{ toYaml $labels }}
{{- end }}

{{- /* The tolerations of pods of the mesh: those of the values, and of the taint that nodes without an agent have. */ -}}
{{- define "hauberk.tolerations" -}}
{{- $own := dict "key" "hauberk.dev/agent-not-ready" "operator" "Exists" -}}
{{ toYaml (append . $own) }}
{{- end }}

{{- define "hauberk.controlPlane.address" -}}
hauberk-control-plane.{{ .Release.Namespace }}.svc:8443
{{- end }}

{{- /* The Secret of a CA that somebody brings: not one that the control plane writes. */ -}}
{{- define "hauberk.ca.secret" -}}
{{- $name := (.Values.ca | default dict).existingSecret | default "" -}}
{{- if has $name (list "hauberk-ca" "hauberk-roots") -}}
{{- fail (printf "ca.existingSecret: %s is the control plane's own; bring the CA in a Secret of another name" $name) -}}
{{- end -}}
{{ $name }}
{{- end }}

{{- /* A duration such as 90s, 10m or 1h in seconds. */ -}}
{{- define "hauberk.seconds" -}}
{{- $unit := get (dict "s" 1 "m" 60 "h" 3600) (regexFind "[smh]$" .) -}}
{{- mul (regexFind "^[0-9]+" . | int64) $unit -}}
{{- end }}

{{- /* A certificate's lifetime, refused here rather than by a control plane that does not start. */ -}}
{{- define "hauberk.lifetime" -}}
{{- $lifetime := get .root.Values.controlPlane .name -}}
{{- $seconds := include "hauberk.seconds" $lifetime | int64 -}}
{{- if or (lt $seconds 10) (gt $seconds 86400) -}}
{{- fail (printf "controlPlane.%s: %s is not between 10s and 24h" .name $lifetime) -}}
{{- end -}}
{{ $lifetime }}
{{- end }}
