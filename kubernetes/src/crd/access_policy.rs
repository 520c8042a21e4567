//! AccessPolicy.

use std::collections::BTreeMap;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::shared::{Mode, Name, Owner, Peer, Port, Prose, ServiceAccount, Status};

/// What the owner of a destination allows: who may connect to it, on which ports. Everything else is denied.
#[derive(Debug, Clone, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "hauberk.dev",
    version = "v1alpha1",
    kind = "AccessPolicy",
    plural = "accesspolicies",
    namespaced,
    shortname = "hap",
    category = "hauberk",
    status = "Status",
    doc = "Who may connect to a workload of its namespace, declared by the workload's owner.",
    printcolumn = r#"{"name": "Owner", "type": "string", "jsonPath": ".spec.owner.team"}"#,
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".spec.mode"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Programmed", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Programmed')].status"}"#,
    printcolumn = r#"{"name": "Workloads", "type": "integer", "jsonPath": ".status.matchedWorkloads"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AccessPolicySpec {
    /// Who answers for the destination.
    pub owner: Owner,
    /// Which workloads of this namespace it is about.
    pub target: Target,
    /// Enforce (as without it) refuses what is not allowed; Audit lets it pass and records it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// What is allowed, each with a name of its own; [] denies everybody. Their order does not matter.
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub rules: Vec<Permission>,
    /// Examples that must come out as they say, or the policy is not accepted.
    #[schemars(length(max = 256))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tests: Option<Vec<PolicyTest>>,
}

/// The destinations: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "[has(self.selector), has(self.serviceAccount), has(self.machine)].filter(x, x).size() == 1"
).message("name exactly one of selector, serviceAccount and machine"))]
pub struct Target {
    /// Pods and workloads of this namespace that carry all of these labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<Selector>,
    /// Those that run as this service account of this namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<Name>,
    /// The machine of this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
}

/// Labels; at least one, since nothing would be everything.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// All of them must match.
    #[schemars(extend("minProperties" = 1, "maxProperties" = 64))]
    pub match_labels: BTreeMap<String, String>,
}

/// One permission.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Permission {
    /// Unique in the policy.
    pub name: Name,
    /// Why it exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Prose>,
    /// The ports; at least one.
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub ports: Vec<Port>,
    /// Who may connect; at least one, any of them.
    #[schemars(length(min = 1, max = 256))]
    pub from: Vec<Peer>,
    /// When the permission ends. Connections that are open then are cut.
    #[schemars(extend("format" = "date-time"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// How often it is expected to be used, so that rare use is not mistaken for none: 30m, 12h, 90d.
    #[schemars(length(max = 20), regex(pattern = r"^[1-9][0-9]*[smhd]$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_every: Option<String>,
}

/// An example.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PolicyTest {
    /// Who connects.
    pub from: Caller,
    /// To which port.
    pub port: Port,
    /// What must come out.
    pub expect: Expectation,
}

/// One caller: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "[has(self.serviceAccount), has(self.machine), has(self.spiffeId)].filter(x, x).size() == 1"
).message("name exactly one of serviceAccount, machine and spiffeId"))]
pub struct Caller {
    /// A service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<ServiceAccount>,
    /// A machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
    /// An exact SPIFFE ID.
    #[schemars(
        length(min = 10, max = 2048),
        regex(pattern = r"^spiffe://[a-z0-9._-]+/[A-Za-z0-9._/-]+$")
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
}

/// What an example expects.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Expectation {
    /// The rules of this policy allow it.
    Allow,
    /// They do not.
    Deny,
}
