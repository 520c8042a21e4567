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

{{- define "hauberk.controlPlane.address" -}}
hauberk-control-plane.{{ .Release.Namespace }}.svc:8443
{{- end }}
