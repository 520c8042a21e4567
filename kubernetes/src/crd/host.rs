//! Machine and Workload: hosts outside of Kubernetes, and what runs on them.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::shared::{Mode, Name, Port, Status};

/// An IP address.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[schemars(transparent)]
pub struct Address(
    #[schemars(length(min = 2, max = 45), regex(pattern = r"^[0-9a-fA-F.:]+$"))] pub String,
);

/// A host outside of Kubernetes with an agent on it.
#[derive(Debug, Clone, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "hauberk.dev",
    version = "v1alpha1",
    kind = "Machine",
    plural = "machines",
    shortname = "hma",
    category = "hauberk",
    status = "Status",
    doc = "A host outside of Kubernetes with a Hauberk agent on it.",
    printcolumn = r#"{"name": "Addresses", "type": "string", "jsonPath": ".spec.addresses"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.process) || (!has(self.ports) && !has(self.mode))")
    .message("ports and mode are about a process, and process is missing"))]
#[x_kube(validation = Rule::new("!has(self.process) || has(self.ports)")
    .message("name the ports of the process, or [] for one that only calls"))]
pub struct MachineSpec {
    /// Where its agent takes mesh traffic for processes of the host.
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<Address>>,
    /// A process that speaks for the machine itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<HostProcess>,
    /// The ports that the process serves.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<Port>>,
    /// What happens to traffic of the process that is not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// How the kernel tells a process of a host apart: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.user) != has(self.cgroup)")
    .message("name exactly one of user and cgroup"))]
pub struct HostProcess {
    /// The Unix user it runs as: a name, or a number in quotes.
    #[schemars(length(min = 1, max = 32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The cgroup it runs in, below the root of the cgroup2 tree, such as system.slice/ledger.service.
    #[schemars(length(min = 1, max = 4096))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
}

/// A workload on a machine outside of Kubernetes. Pods need none: they are known.
#[derive(Debug, Clone, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "hauberk.dev",
    version = "v1alpha1",
    kind = "Workload",
    plural = "workloads",
    namespaced,
    shortname = "hwl",
    category = "hauberk",
    status = "Status",
    doc = "A workload on a machine outside of Kubernetes.",
    printcolumn = r#"{"name": "Machine", "type": "string", "jsonPath": ".spec.machine"}"#,
    printcolumn = r#"{"name": "Service Account", "type": "string", "jsonPath": ".spec.serviceAccount"}"#,
    printcolumn = r#"{"name": "Mode", "type": "string", "jsonPath": ".spec.mode"}"#,
    printcolumn = r#"{"name": "Accepted", "type": "string", "jsonPath": ".status.conditions[?(@.type=='Accepted')].status"}"#,
    printcolumn = r#"{"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}"#
)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new("has(self.process.networkNamespace) == has(self.addresses)")
    .message("a process with a network namespace of its own has addresses of its own; every other has its machine's"))]
pub struct WorkloadSpec {
    /// The machine it runs on.
    pub machine: Name,
    /// The service account that makes its identity.
    pub service_account: Name,
    /// How the kernel tells it apart.
    pub process: Process,
    /// The addresses of its network namespace.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "set"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Vec<Address>>,
    /// The ports it serves, or [] for one that only calls.
    #[schemars(length(max = 256), extend("x-kubernetes-list-type" = "set"))]
    pub ports: Vec<Port>,
    /// What happens to traffic that is not allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

/// How the kernel tells a process apart: exactly one of the fields.
#[derive(Debug, Clone, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[x_kube(validation = Rule::new(
    "[has(self.user), has(self.cgroup), has(self.networkNamespace)].filter(x, x).size() == 1"
).message("name exactly one of user, cgroup and networkNamespace"))]
pub struct Process {
    /// The Unix user it runs as: a name, or a number in quotes.
    #[schemars(length(min = 1, max = 32))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The cgroup it runs in, below the root of the cgroup2 tree.
    #[schemars(length(min = 1, max = 4096))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The name of its network namespace, as `ip netns` shows it.
    #[schemars(length(min = 1, max = 255), regex(pattern = r"^[A-Za-z0-9._-]+$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_namespace: Option<String>,
}
