//! The taint of nodes without a ready agent: while a node has it, no further pod is sent there that does not tolerate it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Taint};
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
};
use serde_json::json;

/// The key of the taint.
pub const AGENT_NOT_READY: &str = "hauberk.dev/agent-not-ready";

/// The agents' pods.
pub(crate) const AGENT_PODS: &str =
    "app.kubernetes.io/name=hauberk,app.kubernetes.io/component=agent";

/// The taints of a node.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct NodeTaints {
    all: Vec<Taint>,
    version: Option<String>,
    created_unix_ms: i64,
    /// Nobody's pods go there, for reasons of others.
    is_closed: bool,
}

impl NodeTaints {
    pub(crate) fn new(node: Node) -> Self {
        let version = node.resource_version();
        let created = node.creation_timestamp().map_or(0, |time| time.0.as_millisecond());
        let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
        let is_ready = conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True");
        let spec = node.spec.unwrap_or_default();
        let all = spec.taints.unwrap_or_default();
        let keeps_away = |taint: &Taint| {
            !is_ours(taint) && matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
        };
        Self {
            is_closed: !is_ready || spec.unschedulable == Some(true) || all.iter().any(keeps_away),
            all,
            version,
            created_unix_ms: created,
        }
    }

    fn is_tainted(&self) -> bool {
        self.all.iter().any(is_ours)
    }
}

fn is_ours(taint: &Taint) -> bool {
    taint.key == AGENT_NOT_READY
}

/// A pod of an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AgentPod {
    node: Option<String>,
    is_ready: bool,
}

impl AgentPod {
    pub(crate) fn new(pod: Pod) -> Self {
        let conditions = pod.status.and_then(|status| status.conditions).unwrap_or_default();
        let is_ready = conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True");
        Self {
            node: pod.spec.as_ref().and_then(meant_for),
            is_ready: is_ready && pod.metadata.deletion_timestamp.is_none(),
        }
    }
}

/// Where a pod of a DaemonSet runs, or is to run.
fn meant_for(spec: &PodSpec) -> Option<String> {
    if spec.node_name.is_some() {
        return spec.node_name.clone();
    }
    let required = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = required.required_during_scheduling_ignored_during_execution.as_ref()?;
    let fields = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter());
    let name = fields.flatten().find(|field| field.key == "metadata.name")?;
    name.values.as_ref()?.first().cloned()
}

/// A node, and whether pods of the mesh may be sent there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NodeAgents {
    /// Whether it has the taint.
    pub is_tainted: bool,
    /// Whether nobody's pods go there whatever this taint is: it is not ready, or cordoned, or has another taint.
    pub is_closed: bool,
    /// When it was made, in milliseconds since the Unix epoch.
    pub created_unix_ms: i64,
    /// Whether an agent runs there, or is to run: one that the DaemonSet leaves out has none.
    pub has_agent: bool,
    /// Whether one is ready.
    pub is_ready: bool,
}

/// All nodes, by name.
pub(crate) fn by_node<'a>(
    nodes: &BTreeMap<String, NodeTaints>,
    agents: impl Iterator<Item = &'a AgentPod>,
) -> BTreeMap<String, NodeAgents> {
    let of = |taints: &NodeTaints| NodeAgents {
        is_tainted: taints.is_tainted(),
        is_closed: taints.is_closed,
        created_unix_ms: taints.created_unix_ms,
        ..NodeAgents::default()
    };
    let mut found: BTreeMap<_, _> =
        nodes.iter().map(|(name, taints)| (name.clone(), of(taints))).collect();
    for agent in agents {
        if let Some(node) = agent.node.as_ref().and_then(|name| found.get_mut(name)) {
            node.has_agent = true;
            node.is_ready |= agent.is_ready;
        }
    }
    found
}

/// Gives a node the taint, or takes it away. Returns whether it did: if the node has changed since it was looked at, nothing
/// happens.
///
/// # Errors
/// If the API server refuses. A node that is gone is none.
pub(crate) async fn write(
    client: &Client,
    name: &str,
    known: &NodeTaints,
    tainted: bool,
) -> Result<bool, kube::Error> {
    let mut taints: Vec<Taint> = known.all.iter().filter(|one| !is_ours(one)).cloned().collect();
    if tainted {
        taints.push(Taint {
            key: AGENT_NOT_READY.to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        });
    }
    // The list is replaced whole: what others have changed meanwhile would be lost.
    let patch = json!({
        "metadata": {"resourceVersion": known.version},
        "spec": {"taints": taints},
    });
    let api: Api<Node> = Api::all(client.clone());
    match api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(error)) if error.is_not_found() || error.is_conflict() => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    fn pod(node: &serde_json::Value, ready: &str, leaving: bool) -> AgentPod {
        let deleted = leaving.then_some("2026-01-02T03:04:05Z");
        let pod = json!({
            "metadata": {"name": "agent", "deletionTimestamp": deleted},
            "spec": node,
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        });
        AgentPod::new(serde_json::from_value(pod).unwrap())
    }

    #[test]
    fn a_node_is_ready_when_one_of_its_agents_is() {
        let node = |taints: serde_json::Value| {
            let node = json!({
                "metadata": {"name": "a", "creationTimestamp": "1970-01-01T00:00:01Z"},
                "spec": {"taints": taints},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            });
            NodeTaints::new(serde_json::from_value(node).unwrap())
        };
        let nodes = ["a", "b", "c", "d"].map(|name| {
            let taints = match name {
                "b" => json!([{"key": AGENT_NOT_READY, "effect": "NoSchedule"}]),
                "d" => json!([{"key": "other", "effect": "NoSchedule"}]),
                _ => json!([{"key": "other", "effect": "PreferNoSchedule"}]),
            };
            (name.to_owned(), node(taints))
        });
        let on = |name: &str| json!({"containers": [], "nodeName": name});
        // As DaemonSets have it before the scheduler has placed the pod.
        let waiting = json!({"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["c"]}]}]}}}});
        let agents = [
            pod(&on("a"), "False", false),
            pod(&on("a"), "True", false),
            pod(&on("b"), "True", true),
            pod(&waiting, "False", false),
            pod(&on("elsewhere"), "True", false),
        ];
        let found = by_node(&nodes.into(), agents.iter());
        let told = |is_tainted, has_agent, is_ready| NodeAgents {
            is_tainted,
            is_closed: false,
            created_unix_ms: 1_000,
            has_agent,
            is_ready,
        };
        let wanted = [
            ("a", told(false, true, true)),
            ("b", told(true, true, false)),
            ("c", told(false, true, false)),
            ("d", NodeAgents { is_closed: true, ..told(false, false, false) }),
        ];
        assert_eq!(found, wanted.map(|(name, told)| (name.to_owned(), told)).into());
    }
}
