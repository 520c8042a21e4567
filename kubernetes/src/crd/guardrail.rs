//! Guardrail.

use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use super::shared::{Name, Owner, Peer, Port, Prose, ServiceAccount, Status};

/// A denial by the platform team that no owner's policy can override.
#[derive(Debug, Clone, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "hauberk.dev",
    version = "v1alpha1",
    kind = "Guardrail",
    plural = "guardrails",
    shortname = "hgr",
    category = "hauberk",
    status = "Status",
    doc = "A denial by the platform team that no AccessPolicy can override.",
    printcolumn = r#"{"name": "Owner", "type": "string", "jsonPath": ".spec.owner.team"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Programmed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Programmed')].status"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.ports) != has(self.allPorts)")
    .message("name exactly one of ports and allPorts"))]
#[x_kube(validation = Rule::new("has(self.denyFrom) != has(self.denyUnlessFrom)")
    .message("name exactly one of denyFrom and denyUnlessFrom"))]
#[x_kube(validation = Rule::new("!has(self.allPorts) || self.allPorts")
    .message("allPorts is true, or not there"))]
pub struct GuardrailSpec {
    /// Who answers for it.
    pub owner: Owner,
    /// Why it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Prose>,
    /// The destinations that it protects.
    pub target: Target,
    /// The ports; this, or allPorts.
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-list-type" = "set"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<Port>>,
    /// true for every port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_ports: Option<bool>,
    /// Whom it denies; this, or denyUnlessFrom.
    #[schemars(length(min = 1, max = 256))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_from: Option<Vec<Peer>>,
    /// It denies everybody but these.
    #[schemars(length(min = 1, max = 256))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deny_unless_from: Option<Vec<Peer>>,
}

/// The destinations: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "[has(self.__namespace__), has(self.serviceAccount), has(self.machine)].filter(x, x).size() == 1"
).message("name exactly one of namespace, serviceAccount and machine"))]
pub struct Target {
    /// Every workload of a namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<Name>,
    /// A service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<ServiceAccount>,
    /// A machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
}
