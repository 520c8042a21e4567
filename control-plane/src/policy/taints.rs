//! Keeps pods away from nodes whose agent is not ready, by a taint. One replica does so.
//!
//! A pod that starts without an agent is captured later than it runs, or does not start at all: the CNI plugin sees to that, once an
//! agent has put it there. The taint is for the time before, and for everybody else's pods on a node in trouble. It never
//! closes the last node that is open: then it is the mesh that is in trouble, and other people's pods must go somewhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use hauberk_kubernetes::NodeAgents;

use super::StatusWriter;

/// How long an agent that was ready may be away. Agents that start anew are back before.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a node may have no agent at all before it counts as one that is to have none.
const NONE: Duration = Duration::from_secs(15);

/// A node that has been there for so long when this replica begins is not new: its agent was ready once.
const NEW_MS: i64 = 120_000;

/// After the API server has refused a change.
const RETRY: Duration = Duration::from_secs(30);

/// What is to be remembered between two looks, of the replica that leads.
#[derive(Default)]
pub(super) struct Taints {
    has_looked: bool,
    /// Nodes whose agent was ready once.
    known: BTreeSet<String>,
    /// Since when a node's agent is not ready, or there is none, which is not the same.
    since: BTreeMap<String, (bool, Instant)>,
    refused: BTreeMap<String, Instant>,
    /// Most agents are not ready, or no node would be open, and that was said.
    holds_back: bool,
}

impl Taints {
    /// Gives and takes what is to be given and taken.
    pub(super) async fn write(&mut self, writer: &StatusWriter) {
        let Some(nodes) = writer.cluster.node_agents() else { return };
        let is_over =
            !writer.taints_nodes || writer.cluster.is_retiring() || writer.cluster.is_ending();
        self.refused.retain(|_, since| since.elapsed() < RETRY);
        let changes = if is_over {
            self.since.clear();
            let tainted = nodes.iter().filter(|(_, node)| node.is_tainted);
            tainted.map(|(name, _)| (name.clone(), false)).collect()
        } else {
            self.decide(&nodes, Instant::now(), hauberk_tls::now().unix_millis())
        };
        for (node, tainted) in changes {
            if self.refused.contains_key(&node) {
                continue;
            }
            match writer.cluster.taint(&writer.client, &node, tainted).await {
                Ok(true) if tainted => tracing::warn!(
                    node,
                    "the agent of this node is not ready: no further pods are sent there"
                ),
                Ok(true) => tracing::info!(node, "pods are sent to this node again"),
                // It has changed since; the next look knows.
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(node, %error, "its taint could not be changed");
                    self.refused.insert(node, Instant::now());
                }
            }
        }
    }

    /// Which nodes are to have the taint from now on, or to have it no more.
    fn decide(
        &mut self,
        nodes: &BTreeMap<String, NodeAgents>,
        now: Instant,
        now_unix_ms: i64,
    ) -> Vec<(String, bool)> {
        if !std::mem::replace(&mut self.has_looked, true) {
            let there = nodes
                .iter()
                .filter(|(_, node)| now_unix_ms.saturating_sub(node.created_unix_ms) > NEW_MS);
            self.known.extend(there.map(|(name, _)| name.clone()));
        }
        self.known.retain(|node| nodes.contains_key(node));
        self.since.retain(|node, _| nodes.contains_key(node));
        let ready = nodes.iter().filter(|(_, node)| node.is_ready);
        self.known.extend(ready.map(|(name, _)| name.clone()));
        // Those of before alone: many may come at once.
        let known =
            nodes.iter().filter(|(name, node)| node.has_agent && self.known.contains(*name));
        let (known, away) = known.fold((0, 0), |(known, away), (_, node)| {
            (known + 1, away + usize::from(!node.is_ready))
        });
        let most = away * 2 > known;
        let open =
            nodes.values().filter(|node| !node.is_closed && (node.is_ready || !node.has_agent));
        let is_any_open = open.count() > 0;
        let holds_back = most || !is_any_open;
        if holds_back && !self.holds_back {
            tracing::warn!(
                away,
                of = known,
                is_any_open,
                "no further node is kept free of pods: too many agents are not ready"
            );
        }
        self.holds_back = holds_back;
        let mut changes = Vec::new();
        for (name, node) in nodes {
            let wanted = is_any_open && self.wants(name, node, most, now);
            if wanted != node.is_tainted {
                changes.push((name.clone(), wanted));
            }
        }
        changes
    }

    fn wants(&mut self, name: &str, node: &NodeAgents, most: bool, now: Instant) -> bool {
        if node.is_ready {
            self.since.remove(name);
            return false;
        }
        let entry = self.since.entry(name.to_owned()).or_insert((node.has_agent, now));
        if entry.0 != node.has_agent {
            *entry = (node.has_agent, now);
        }
        let lasted = now.saturating_duration_since(entry.1);
        if !node.has_agent {
            return node.is_tainted && lasted < NONE;
        }
        // A node that is new has nothing that would hold a pod.
        node.is_tainted || !self.known.contains(name) || (!most && lasted >= PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: NodeAgents = NodeAgents {
        is_tainted: false,
        is_closed: false,
        created_unix_ms: 0,
        has_agent: true,
        is_ready: true,
    };
    const AWAY: NodeAgents = NodeAgents { is_ready: false, ..READY };
    const TAINTED: NodeAgents = NodeAgents { is_tainted: true, ..AWAY };
    const NONE_THERE: NodeAgents = NodeAgents { has_agent: false, ..TAINTED };
    /// A node of the control plane: nobody's pods go there.
    const CLOSED: NodeAgents = NodeAgents { is_closed: true, ..READY };

    fn nodes(all: &[(&str, NodeAgents)]) -> BTreeMap<String, NodeAgents> {
        all.iter().map(|(name, node)| ((*name).to_owned(), *node)).collect()
    }

    fn change(names: &[&str], tainted: bool) -> Vec<(String, bool)> {
        names.iter().map(|name| ((*name).to_owned(), tainted)).collect()
    }

    #[test]
    fn an_agent_that_was_ready_has_a_while_and_a_new_node_has_none() {
        let mut taints = Taints::default();
        let begin = Instant::now();
        let mut at = |seconds, all: &[(&str, NodeAgents)]| {
            taints.decide(&nodes(all), begin + Duration::from_secs(seconds), 1_000_000)
        };
        assert_eq!(at(0, &[("a", READY), ("b", READY)]), []);
        assert_eq!(at(1, &[("a", READY), ("b", AWAY)]), []);
        // Those that come, however many.
        let many = [("a", READY), ("b", READY), ("c", AWAY), ("d", AWAY), ("e", AWAY)];
        assert_eq!(at(2, &many), change(&["c", "d", "e"], true));
        assert_eq!(at(3, &[("a", READY), ("b", AWAY)]), []);
        assert_eq!(at(7, &[("a", READY), ("b", AWAY)]), []);
        assert_eq!(at(8, &[("a", READY), ("b", AWAY)]), change(&["b"], true));
        assert_eq!(at(9, &[("a", READY), ("b", TAINTED)]), []);
        let back = NodeAgents { is_tainted: true, ..READY };
        assert_eq!(at(10, &[("a", READY), ("b", back)]), change(&["b"], false));
        // The DaemonSet makes another pod, or none any more.
        assert_eq!(at(20, &[("a", READY), ("b", NONE_THERE)]), []);
        assert_eq!(at(34, &[("a", READY), ("b", NONE_THERE)]), []);
        assert_eq!(at(35, &[("a", READY), ("b", NONE_THERE)]), change(&["b"], false));
    }

    #[test]
    fn a_replica_that_begins_knows_old_nodes_and_gives_them_a_while() {
        let mut taints = Taints::default();
        let young = NodeAgents { created_unix_ms: 990_000, ..AWAY };
        let all = nodes(&[("a", READY), ("b", AWAY), ("c", young)]);
        assert_eq!(taints.decide(&all, Instant::now(), 1_000_000), change(&["c"], true));
    }

    #[test]
    fn where_most_agents_are_away_no_further_node_is_closed_and_never_the_last_one() {
        let mut taints = Taints::default();
        let now = Instant::now();
        let mut at = |seconds, all: &[(&str, NodeAgents)]| {
            taints.decide(&nodes(all), now + Duration::from_secs(seconds), 1_000_000)
        };
        let most = [("a", TAINTED), ("b", AWAY), ("c", READY)];
        assert_eq!(at(0, &most), []);
        assert_eq!(at(9, &most), []);
        assert_eq!(at(10, &[("a", READY), ("b", AWAY)]), change(&["b"], true));
        // One worker, or all but the closed ones: what is closed opens.
        let last = [("a", CLOSED), ("b", TAINTED)];
        assert_eq!(at(20, &last), change(&["b"], false));
        assert_eq!(at(30, &[("a", CLOSED), ("b", AWAY)]), []);
        // A node that has no agent takes pods, too.
        let other = NodeAgents { is_tainted: false, ..NONE_THERE };
        assert_eq!(at(40, &[("a", other), ("b", TAINTED)]), []);
    }
}
