//! The condition `hauberk.dev/Captured` of each namespace that is in the mesh, written by one replica.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::{ProcessSelector, resolve::MeshWorkload},
    time::Timestamp,
};
use hauberk_kubernetes::{
    Captured, Enforced, NamespaceCapture, NodeCaptures, change, write_change,
};
use hauberk_proto::v1::resource::Kind;

use super::{Published, StatusWriter};

/// Between two looks.
const PACE: Duration = Duration::from_secs(3);

/// How long pods may be missing, or an agent not be heard, before that is said: a pod that has just started is told of a
/// moment later, and an agent finds another replica within a quarter of a minute.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long an agent may take for a revision. One that is behind for longer may speak of pods that are gone.
const SETTLING: Duration = Duration::from_secs(10);

/// Between two changes that say the same in other words, and after the API server has refused one.
const RETRY: Duration = Duration::from_secs(60);

/// What is to be remembered between two looks, of the replica that leads.
#[derive(Default)]
pub(super) struct Namespaces {
    looked: Option<Instant>,
    /// Since when something is missing of these.
    incomplete: BTreeMap<String, Instant>,
    written: BTreeMap<String, Instant>,
    /// A revision that agents should have by now, and the next one that will be.
    settled: u64,
    epoch: u64,
    settling: Option<(Instant, u64)>,
    refused: BTreeMap<String, Instant>,
}

impl Namespaces {
    /// Writes what has changed, if it is time to look.
    pub(super) async fn write(
        &mut self,
        writer: &StatusWriter,
        agents: &Enforced,
        captures: &NodeCaptures,
    ) {
        if self.looked.is_some_and(|last| last.elapsed() < PACE) {
            return;
        }
        self.looked = Some(Instant::now());
        let Some(known) = writer.cluster.captured() else { return };
        // What agents know of: a label that is not published yet has nobody captured, and nobody to be captured.
        let published = writer.publisher.current();
        if published.revision == 0 {
            return;
        }
        if std::mem::replace(&mut self.epoch, published.epoch) != published.epoch {
            (self.settled, self.settling) = (0, None);
        }
        let enrolled = enrolled(&published);
        self.incomplete.retain(|namespace, _| enrolled.contains(namespace.as_str()));
        self.written.retain(|_, since| since.elapsed() < RETRY);
        self.refused.retain(|_, since| since.elapsed() < RETRY);
        match self.settling {
            Some((since, revision)) if since.elapsed() >= SETTLING => {
                self.settled = revision;
                self.settling = Some((Instant::now(), published.revision));
            }
            Some(_) => {}
            None => self.settling = Some((Instant::now(), published.revision)),
        }
        let is_behind = |node: &str| agents.get(node).is_none_or(|has| *has < self.settled);
        let found = Found::all(&published, captures, is_behind);
        for (namespace, known) in &known {
            let wanted = if enrolled.contains(namespace.as_str()) {
                let found = found.get(namespace.as_str()).copied().unwrap_or_default();
                if found.missing + found.unheard > 0 {
                    let since =
                        self.incomplete.entry(namespace.clone()).or_insert_with(Instant::now);
                    if since.elapsed() < PATIENCE {
                        continue;
                    }
                } else {
                    self.incomplete.remove(namespace);
                }
                Some(found.tell())
            } else {
                None
            };
            let Some(change) = change(known.as_ref(), wanted.as_ref()) else { continue };
            if self.refused.contains_key(namespace)
                || (change.is_wording && self.written.contains_key(namespace))
            {
                continue;
            }
            match write_change(&writer.client, namespace, &change).await {
                Ok(()) => drop(self.written.insert(namespace.clone(), Instant::now())),
                Err(error) => {
                    tracing::warn!(namespace, %error, "its condition could not be written");
                    self.refused.insert(namespace.clone(), Instant::now());
                }
            }
        }
    }
}

/// The namespaces whose pods are in the mesh.
fn enrolled(published: &Published) -> BTreeSet<&str> {
    let namespaces = published.resources.values().filter_map(|resource| match &resource.kind {
        Some(Kind::Namespace(namespace)) if namespace.enrolled => Some(namespace.name.as_str()),
        Some(_) | None => None,
    });
    namespaces.collect()
}

/// How the workloads of a namespace stand.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Found {
    /// Their agents have not captured them.
    missing: u64,
    /// Their agents are not heard, or have an older state.
    unheard: u64,
    told: NamespaceCapture,
}

impl Found {
    /// Of all namespaces with workloads. Compared node by node, and only where the agent has the
    /// present state, so that what is left of one pod does not stand for another.
    fn all<'a>(
        published: &'a Published,
        captures: &NodeCaptures,
        is_behind: impl Fn(&str) -> bool,
    ) -> BTreeMap<&'a str, Self> {
        let mut registered: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        let is_pod =
            |workload: &&MeshWorkload| matches!(workload.process, ProcessSelector::Pod { .. });
        for workload in published.workloads.iter().filter(is_pod) {
            if let Some(namespace) = &workload.namespace {
                let place = (namespace.as_str(), workload.node.as_str());
                *registered.entry(place).or_default() += 1;
            }
        }
        let mut found: BTreeMap<&str, Self> = BTreeMap::new();
        for ((namespace, node), count) in registered {
            let of_namespace = found.entry(namespace).or_default();
            match captures.get(node).filter(|_| !is_behind(node)) {
                None => of_namespace.unheard += count,
                Some(capture) => {
                    let told = capture.namespaces.get(namespace).copied().unwrap_or_default();
                    of_namespace.missing += count.saturating_sub(told.captured);
                    of_namespace.told.add(&told);
                }
            }
        }
        found
    }

    fn tell(&self) -> Captured {
        let Self { missing, unheard, told } = self;
        let said = |holds, reason, message| Captured { holds, reason, message };
        if *missing > 0 {
            let message = match missing {
                1 => "1 pod is not captured; hauberk status says why".to_owned(),
                count => format!("{count} pods are not captured; hauberk status says why"),
            };
            return said(Some(false), "NotCaptured", message);
        }
        if told.older > 0 {
            let connections = match told.older {
                1 => "1 connection".to_owned(),
                count => format!("{count} connections"),
            };
            let pods = match told.with_older {
                1 => "1 pod".to_owned(),
                count => format!("{count} pods"),
            };
            let mut message = format!("{connections} of {pods} in clear, older than the capture");
            if told.closed_unix_ms > 0 {
                let from = Timestamp::from_unix_millis(told.closed_unix_ms);
                message.push_str(&format!(", closed from {from}"));
            }
            return said(Some(false), "OlderConnections", message);
        }
        if *unheard > 0 {
            let message = match unheard {
                1 => "the agent of 1 pod is not heard, or is behind".to_owned(),
                count => format!("the agents of {count} pods are not heard, or are behind"),
            };
            return said(None, "NotHeard", message);
        }
        said(Some(true), "Captured", "all of its pods are captured".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_to_be_open_comes_before_what_is_not_known() {
        let told = NamespaceCapture { captured: 3, older: 12, with_older: 2, closed_unix_ms: 0 };
        let one = NamespaceCapture { older: 1, with_older: 1, closed_unix_ms: 1_000, ..told };
        let found = [
            Found { missing: 1, unheard: 1, told },
            Found { missing: 0, unheard: 1, told },
            Found { missing: 0, unheard: 0, told: one },
            Found { missing: 0, unheard: 2, told: NamespaceCapture::default() },
            Found::default(),
        ];
        let text: Vec<_> = found
            .iter()
            .map(Found::tell)
            .map(|told| format!("{:?} {}: {}", told.holds, told.reason, told.message))
            .collect();
        insta::assert_snapshot!(text.join("\n"), @r"
        Some(false) NotCaptured: 1 pod is not captured; hauberk status says why
        Some(false) OlderConnections: 12 connections of 2 pods in clear, older than the capture
        Some(false) OlderConnections: 1 connection of 1 pod in clear, older than the capture, closed from 1970-01-01T00:00:01Z
        None NotHeard: the agents of 2 pods are not heard, or are behind
        Some(true) Captured: all of its pods are captured
        ");
    }
}
