//! What the kinds have in common.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A name of a namespace, service account or machine.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(transparent)]
pub struct Name(
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))]
    pub String,
);

/// A text for people, on one line.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(transparent)]
pub struct Prose(
    #[schemars(
        length(min = 1, max = 1024),
        regex(pattern = r"^[^\x00-\x1f\x7f]*\S[^\x00-\x1f\x7f]*$")
    )]
    pub String,
);

/// A TCP port.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(transparent)]
pub struct Port(#[schemars(range(min = 1, max = 65535))] pub u16);

/// Who answers for an endpoint or a guardrail.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Owner {
    /// The team.
    pub team: Prose,
    /// Where to reach it, for example a chat channel.
    pub contact: Prose,
    /// A link to what to do when it breaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub runbook: Option<Prose>,
}

/// Whether what is not allowed is refused, or passes and is recorded as would_deny.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Refused.
    Enforce,
    /// Passes, and is recorded.
    Audit,
}

/// A service account of a namespace.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Name,
    /// Its name.
    pub name: Name,
}

/// A namespace, meaning every service account of it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AnyIn {
    /// The namespace.
    pub namespace: Name,
}

/// Who connects: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "[has(self.serviceAccount), has(self.machine), has(self.spiffeId), has(self.anyIn)].filter(x, x).size() == 1"
).message("name exactly one of serviceAccount, machine, spiffeId and anyIn"))]
pub struct Peer {
    /// A service account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account: Option<ServiceAccount>,
    /// A machine outside of Kubernetes, by its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Name>,
    /// An exact SPIFFE ID, of this or another trust domain.
    #[schemars(
        length(min = 10, max = 2048),
        regex(pattern = r"^spiffe://[a-z0-9._-]+/[A-Za-z0-9._/-]+$")
    )]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spiffe_id: Option<String>,
    /// Every service account of a namespace. A wildcard is always spelt out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub any_in: Option<AnyIn>,
}

/// What became of an object; written by the control plane.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The generation of the object that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Accepted: whether it was read whole. ResolvedRefs: whether all that it names is there.
    /// Programmed: whether every agent concerned enforces it.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// How many workloads it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub matched_workloads: Option<i64>,
    /// The agents that have to enforce it, and those that do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agents: Option<Agents>,
    /// The last version that was accepted, as text: in force for as long as a newer one is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_accepted: Option<String>,
}

/// Agents that have to enforce an object, and those that do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Agents {
    /// Connected agents of nodes that have a workload concerned.
    pub desired: i64,
    /// Those that enforce the revision in which it is in force.
    pub programmed: i64,
}
