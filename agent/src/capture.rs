//! Captures: which workloads of this node are in the mesh, and the listeners and rules that put them
//! there. One task reconciles what should be with what is, so that a namespace that appears late,
//! is made anew, or whose rules somebody removed, heals by itself.

mod board;
mod listeners;
mod locals;
mod place;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use hauberk_core::policy::{ProcessSelector, resolve::MeshWorkload};
use tokio::sync::watch;

pub(crate) use board::StatusBoard;
pub(crate) use locals::Locals;

use crate::{context::Context, identity::Identities, policy::Snapshot};
use place::{HostCapture, NamespaceCapture};

/// How often what is there is compared with what should be.
const RECONCILE: Duration = Duration::from_secs(2);

/// Reconciles until the agent stops.
pub(crate) struct Captures {
    pub(crate) context: Arc<Context>,
    pub(crate) identities: Identities,
    pub(crate) netns_dir: PathBuf,
    pub(crate) board: StatusBoard,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// What is captured now.
#[derive(Default)]
struct Current {
    namespaces: BTreeMap<String, NamespaceCapture>,
    host: Option<HostCapture>,
}

impl Captures {
    /// Runs until the agent stops taking connections. With `remove_rules` it then gives the
    /// workloads their plain network back; without, they stay cut off from it.
    pub(crate) async fn run(mut self, remove_rules: bool) {
        let mut current = Current::default();
        let mut known = false;
        loop {
            let snapshot = self.snapshots.borrow_and_update().clone();
            if snapshot.revision > 0 {
                self.reconcile(&snapshot, &mut current, known).await;
                known = true;
            }
            tokio::select! {
                () = self.context.stopping.cancelled() => break,
                changed = self.snapshots.changed() => if changed.is_err() { break },
                () = tokio::time::sleep(RECONCILE) => {}
            }
        }
        if remove_rules {
            for capture in current.namespaces.values() {
                capture.remove_rules();
            }
            if let Some(host) = &current.host {
                host.remove_rules();
            }
        }
    }

    async fn reconcile(&mut self, snapshot: &Snapshot, current: &mut Current, known: bool) {
        let node = self.context.node.clone();
        let wanted: Vec<Arc<MeshWorkload>> = snapshot.on_node(&node).cloned().collect();
        let keys: BTreeSet<String> = wanted.iter().map(|workload| workload.key()).collect();
        // Gone from the registry: its rules go too, or it would stay cut off for ever.
        current.namespaces.retain(|key, capture| {
            let stays = keys.contains(key);
            if !stays {
                capture.remove_rules();
                tracing::info!(workload = key, "no longer captured");
            }
            stays
        });
        self.identities.retain(|key| keys.contains(key));
        self.board.retain(&keys);

        let mut on_host = Vec::new();
        for workload in wanted {
            match &workload.process {
                ProcessSelector::NetworkNamespace { name, .. } => {
                    let name = name.clone();
                    self.namespace(&workload, &name, current);
                }
                ProcessSelector::User(_) | ProcessSelector::Cgroup(_) => on_host.push(workload),
            }
        }
        self.host(&on_host, current);
        if !known {
            tracing::info!(workloads = keys.len(), "took up the workloads of this node");
        }
        let (enrolled, unenrolled) = self.board.counts();
        self.context.metrics.set_workloads(enrolled, unenrolled);
    }

    fn namespace(&mut self, workload: &Arc<MeshWorkload>, name: &str, current: &mut Current) {
        let key = workload.key();
        let path = self.netns_dir.join(name);
        let outcome = match current.namespaces.get_mut(&key) {
            Some(capture) => match capture.still_there(&path) {
                Ok(true) => capture.update(workload, &mut self.identities),
                Ok(false) => {
                    current.namespaces.remove(&key);
                    Err(anyhow::anyhow!("the network namespace was made anew, taking it up again"))
                }
                Err(error) => Err(error),
            },
            None => NamespaceCapture::start(&self.context, workload, &path, &mut self.identities)
                .map(|capture| {
                    tracing::info!(workload = key, namespace = name, "captured");
                    current.namespaces.insert(key.clone(), capture);
                }),
        };
        self.note(workload, outcome);
    }

    fn host(&mut self, workloads: &[Arc<MeshWorkload>], current: &mut Current) {
        if workloads.is_empty() {
            if let Some(host) = current.host.take() {
                host.remove_rules();
            }
            return;
        }
        let host = match &mut current.host {
            Some(host) => host,
            None => match HostCapture::start(&self.context) {
                Ok(host) => current.host.insert(host),
                Err(error) => {
                    let text = format!("{error:#}");
                    for workload in workloads {
                        self.note(workload, Err(anyhow::anyhow!("{text}")));
                    }
                    return;
                }
            },
        };
        let outcomes = host.update(&self.context, workloads, &mut self.identities);
        for (workload, outcome) in workloads.iter().zip(outcomes) {
            self.note(workload, outcome);
        }
    }

    fn note(&mut self, workload: &MeshWorkload, outcome: anyhow::Result<()>) {
        let slot = self.identities.ensure(workload).ok().map(|identity| identity.slot.clone());
        let problem = outcome.err().map(|error| format!("{error:#}"));
        if self.board.set(&workload.key(), slot, problem.clone())
            && let Some(problem) = problem
        {
            tracing::warn!(
                workload = workload.key(),
                problem,
                "not captured; its connections are not carried"
            );
        }
    }
}
