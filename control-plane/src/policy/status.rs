//! What became of each custom resource, written into its status by one replica.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use hauberk_core::{
    policy::{PolicyKind, PolicyRef, resolve::Resolved},
    time::Timestamp,
};
use hauberk_kubernetes::{
    Client, Cluster, Enforced, ManifestObject, NamespaceCapture, NodeCapture, NodeCaptures, Report,
    Reported, Told, crd::Agents, status_of, write_status,
};
use tokio::sync::watch;

use super::{Publisher, namespaces::Namespaces, taints::Taints};
use crate::fleet::{Agent, Fleet};

/// At most so often: a status is for people and for tools that wait, not for enforcing.
const PACE: Duration = Duration::from_secs(1);

/// What is known of an object when a revision is made.
#[derive(Debug, Clone)]
pub(crate) struct ObjectState {
    pub(crate) object: ManifestObject,
    /// Why it is not accepted; empty if it is.
    pub(crate) errors: Vec<String>,
    /// If it is not accepted: whether a version that was accepted before is in force in its place.
    pub(crate) falls_back: bool,
    /// What it names that is not there.
    pub(crate) unresolved: Vec<String>,
    /// The revision in which it is in force as it is now.
    pub(crate) since: u64,
    /// How many workloads it is about, and on which nodes; nothing for kinds that are about none.
    pub(crate) matched: Option<(usize, BTreeSet<String>)>,
}

/// Writes what each object's status should be, the condition of each namespace of the mesh, and the taint of nodes without
/// an agent.
pub(crate) struct StatusWriter {
    pub(crate) client: Client,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) report: Report,
    pub(crate) leads: watch::Receiver<bool>,
    /// Whether nodes without a ready agent get a taint; else it is taken away where it is.
    pub(crate) taints_nodes: bool,
    pub(crate) objects: watch::Receiver<Arc<Vec<ObjectState>>>,
}

impl StatusWriter {
    /// Runs until the program ends.
    pub(crate) async fn run(self) {
        let mut reported: Option<Reported> = None;
        let (mut namespaces, mut taints) = (Namespaces::default(), Taints::default());
        loop {
            tokio::time::sleep(PACE).await;
            let own = report_of(self.fleet.agents(), self.publisher.current().epoch);
            if reported.as_ref() != Some(&own) {
                match self.report.write(&own).await {
                    Ok(()) => reported = Some(own.clone()),
                    Err(error) => tracing::warn!(error = %super::chain(&error),
                        "the other replicas are not told of this one's agents"),
                }
            }
            if *self.leads.borrow() {
                let reports = self.cluster.reports();
                // What has come back of its own is older than what it knows.
                let own_key = self.report.key();
                let others = reports.into_iter().filter(|(key, _)| *key != own_key);
                let (mut agents, mut captures) = (Enforced::new(), NodeCaptures::new());
                for one in others.map(|(_, report)| report).chain([own]) {
                    agents.extend(one.enforced);
                    for (node, capture) in one.captures {
                        let known = captures.get(&node);
                        // What a replica says that is gone, or that its agent has left, is there for a while.
                        if known.is_none_or(|known| known.since_unix_ms < capture.since_unix_ms) {
                            captures.insert(node, capture);
                        }
                    }
                }
                // First: it is about where everybody's pods go.
                taints.write(&self).await;
                self.write(&agents).await;
                namespaces.write(&self, &agents, &captures).await;
            } else {
                (namespaces, taints) = (Namespaces::default(), Taints::default());
            }
        }
    }

    async fn write(&self, agents: &Enforced) {
        let objects = self.objects.borrow().clone();
        for state in objects.iter() {
            // As it is now, to compare with: what was written a moment ago has come back by then.
            let Some(object) = self.cluster.object(&state.object) else { continue };
            if object.text != state.object.text {
                continue;
            }
            let (told, matched, counted) = tell(state, agents);
            if let Some(status) = status_of(&object, &told, matched, counted)
                && let Err(error) = write_status(&self.client, &object, &status).await
            {
                tracing::warn!(object = object.source(), %error, "its status could not be written");
            }
        }
    }
}

/// What this replica has of its agents.
fn report_of(agents: BTreeMap<String, Agent>, epoch: u64) -> Reported {
    let mut reported = Reported::default();
    for (node, agent) in agents.into_iter().filter(|(_, agent)| agent.streams > 0) {
        let mut capture = NodeCapture {
            since_unix_ms: agent.connected.map_or(0, Timestamp::unix_millis),
            ..NodeCapture::default()
        };
        reported.enforced.insert(node.clone(), agent.enforced_in(epoch));
        for workload in agent.status.workloads {
            let Some((namespace, _)) = workload.workload.split_once('/') else { continue };
            capture.namespaces.entry(namespace.to_owned()).or_default().add(&NamespaceCapture {
                captured: workload.captured.into(),
                older: workload.older,
                with_older: (workload.older > 0).into(),
                closed_unix_ms: workload.older_closed_unix_ms,
            });
        }
        reported.captures.insert(node, capture);
    }
    reported
}

/// The conditions of an object, how many workloads it is about, and how many agents enforce it.
pub(super) fn tell(
    state: &ObjectState,
    agents: &Enforced,
) -> (Vec<Told>, Option<i64>, Option<Agents>) {
    let said = |kind, holds, reason, message: String| Told { kind, holds, reason, message };
    let accepted = match state.errors.as_slice() {
        [] => said("Accepted", true, "Accepted", "it was read whole".to_owned()),
        errors => said("Accepted", false, "Invalid", errors.join("\n")),
    };
    let Some((workloads, nodes)) = &state.matched else { return (vec![accepted], None, None) };
    let resolved = match state.unresolved.as_slice() {
        [] => said("ResolvedRefs", true, "ResolvedRefs", "all that it names is there".to_owned()),
        missing => said("ResolvedRefs", false, "NotFound", missing.join("\n")),
    };
    let (mut programmed, mut waiting) = (0, Vec::new());
    for node in nodes {
        if agents.get(node).is_some_and(|revision| *revision >= state.since) {
            programmed += 1;
        } else {
            waiting.push(node.as_str());
        }
    }
    if !state.errors.is_empty() {
        let programmed = said("Programmed", false, "NotAccepted", instead(state).to_owned());
        return (vec![accepted, resolved, programmed], None, None);
    }
    let in_force = match (nodes.is_empty(), waiting.as_slice()) {
        (true, _) => {
            said("Programmed", false, "NoWorkload", "it is about no workload that runs".to_owned())
        }
        (false, []) => {
            let message = format!("all {programmed} agents concerned enforce it");
            said("Programmed", true, "Programmed", message)
        }
        (false, waiting) => {
            let message =
                format!("the agents of these nodes do not enforce it yet: {}", waiting.join(", "));
            said("Programmed", false, "Waiting", message)
        }
    };
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let counted = Agents { desired: count(nodes.len()), programmed };
    (vec![accepted, resolved, in_force], Some(count(*workloads)), Some(counted))
}

/// What holds in place of a policy that is not accepted.
fn instead(state: &ObjectState) -> &'static str {
    match (state.falls_back, state.object.kind) {
        (true, _) => "it was not accepted; the version that was accepted before stays in force",
        (false, "Guardrail") => {
            "it was not accepted, nor was any version before: nothing new takes effect until it is mended"
        }
        (false, _) => "it was not accepted, nor was any version before: it allows nothing",
    }
}

/// The workloads of each policy and guardrail, and their nodes.
pub(crate) fn matches(resolved: &Resolved) -> BTreeMap<PolicyRef, (usize, BTreeSet<String>)> {
    let mut found: BTreeMap<PolicyRef, (usize, BTreeSet<String>)> = BTreeMap::new();
    for policy in &resolved.policies {
        let entry = found.entry(policy.policy.clone()).or_default();
        for workload in &resolved.workloads {
            if workload.identity == policy.destination {
                entry.0 += 1;
                entry.1.insert(workload.node.to_string());
            }
        }
    }
    for guardrail in &resolved.guardrails {
        let entry = found.entry(guardrail.policy.clone()).or_default();
        for workload in &resolved.workloads {
            if guardrail.destination.matches(&workload.identity) {
                entry.0 += 1;
                entry.1.insert(workload.node.to_string());
            }
        }
    }
    found
}

/// The object that a policy came from.
pub(crate) fn source_of(policy: &PolicyRef) -> String {
    match policy.kind {
        PolicyKind::AccessPolicy => format!("AccessPolicy {policy}"),
        PolicyKind::Guardrail => format!("Guardrail {policy}"),
    }
}
