//! Captures: which workloads of this node are in the mesh, and the listeners and rules that put them
//! there. One task reconciles what should be with what is, so that a namespace that appears late,
//! is made anew, or whose rules somebody removed, heals by itself.

mod board;
mod listeners;
mod locals;
mod place;
mod sandboxes;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::policy::{ProcessSelector, resolve::MeshWorkload};
use hauberk_telemetry::{Health, State as HealthState};
use tokio::sync::watch;

pub(crate) use board::StatusBoard;
pub(crate) use locals::Locals;
pub(crate) use sandboxes::netns_file;

use crate::{
    cni::{Installation, Starting},
    context::Context,
    departed::Departed,
    handover::{Inherited, Replaced, Seat},
    identity::Identities,
    policy::Snapshot,
};
use listeners::Accepting;
use place::{Departure, HostCapture, NamespaceCapture};
use sandboxes::Sandboxes;

/// How often what is there is compared with what should be.
const RECONCILE: Duration = Duration::from_secs(2);

/// How often cgroups are looked at: a service that is started anew has another one, which no rule knows yet.
const CGROUP_LOOK: Duration = Duration::from_millis(50);

/// How long the rules of a workload that is gone stay, for the resets of its connections. These are
/// cut at once.
const LEAVING: Duration = Duration::from_secs(2);

/// How long an agent waits, before it says that it is ready, for workloads that the one before had captured: a
/// container runtime may be slow to say where they are.
const TAKE_UP: Duration = Duration::from_secs(30);

/// The health check of what is captured: that it was looked at, and that what the agent before listened for is
/// taken up.
pub(crate) const CAPTURE_CHECK: &str = "captures";

/// Reconciles until the agent stops.
pub(crate) struct Captures {
    pub(crate) context: Arc<Context>,
    pub(crate) identities: Identities,
    pub(crate) netns_dir: PathBuf,
    pub(crate) cri_socket: PathBuf,
    pub(crate) starting: Starting,
    /// The CNI plugin, if this node has pods.
    pub(crate) installation: Option<Installation>,
    pub(crate) board: StatusBoard,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// What the agent before left.
    pub(crate) inherited: Inherited,
    /// Another agent looks after the rules.
    pub(crate) replaced: Replaced,
    pub(crate) health: Health,
    /// When it was looked for the first time what is to be captured.
    pub(crate) since: Option<Instant>,
    pub(crate) departed: Departed,
}

/// What is captured now.
#[derive(Default)]
pub(crate) struct Captured {
    namespaces: BTreeMap<String, NamespaceCapture>,
    host: Option<HostCapture>,
    /// The agent could not listen on the host: rules are there that only close.
    host_closed: bool,
    /// Those whose workload is gone, since when. The resets of their connections pass through the
    /// rules: without them the kernel would no longer translate the addresses, and the
    /// applications would wait for ever.
    leaving: BTreeMap<String, (NamespaceCapture, Instant)>,
    host_leaving: Option<Instant>,
}

impl Captured {
    /// The listeners, for the agent that takes this one's place. What is leaving is not its business any more.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub(crate) fn listeners(&self) -> std::io::Result<Vec<(Seat, OwnedFd)>> {
        let namespaces = self.namespaces.values().flat_map(NamespaceCapture::listeners);
        let host = self.host.iter().flat_map(HostCapture::listeners);
        namespaces.chain(host).map(Accepting::share).collect()
    }

    /// Takes no more connections, and closes the sessions that carry nothing.
    pub(crate) fn close(&mut self) {
        self.locals().for_each(Locals::retire_pools);
        let leaving = self.leaving.values_mut().map(|(capture, _)| capture);
        self.namespaces.values_mut().chain(leaving).for_each(NamespaceCapture::close);
        if let Some(host) = &mut self.host {
            host.close_listeners();
        }
    }

    /// Gives the workloads their plain network back.
    pub(crate) fn remove_rules(&self) {
        let leaving = self.leaving.values().map(|(capture, _)| capture);
        for capture in self.namespaces.values().chain(leaving) {
            capture.remove_rules();
        }
        if self.host.is_some() || self.host_closed {
            HostCapture::remove_rules();
        }
    }

    /// Who lives in each of the places.
    fn locals(&self) -> impl Iterator<Item = &Locals> {
        let namespaces = self.namespaces.values().map(NamespaceCapture::locals);
        namespaces.chain(self.host.as_ref().map(HostCapture::locals))
    }

    /// Workloads that are gone from the registry leave; those whose time is over have left.
    fn retain(&mut self, keys: &BTreeSet<String>, snapshot: &Snapshot) {
        let gone: Vec<String> =
            self.namespaces.keys().filter(|key| !keys.contains(*key)).cloned().collect();
        for key in gone {
            if let Some(capture) = self.namespaces.remove(&key) {
                capture.locals().retire_pools();
                self.leaving.insert(key, (capture, Instant::now()));
            }
        }
        let back: Vec<String> =
            self.leaving.keys().filter(|key| keys.contains(*key)).cloned().collect();
        for key in back {
            if let Some((capture, _)) = self.leaving.remove(&key) {
                self.namespaces.insert(key, capture);
            }
        }
        self.leaving.retain(|key, (capture, since)| {
            if since.elapsed() < LEAVING {
                return true;
            }
            match capture.departure(|namespace| snapshot.is_enrolled(namespace)) {
                Departure::Stays => return true,
                Departure::Free => capture.remove_rules(),
                Departure::Gone => {}
            }
            tracing::info!(workload = key, "no longer captured");
            false
        });
    }
}

/// Done when it is time, or earlier if a cgroup is not what it was.
async fn next_reconcile(current: &Captured) {
    let due = Instant::now() + RECONCILE;
    while Instant::now() < due && !current.host.as_ref().is_some_and(HostCapture::cgroups_differ) {
        tokio::time::sleep(CGROUP_LOOK).await;
    }
}

/// The UIDs of the pods of a node.
fn pods(snapshot: &Snapshot, node: &str) -> HashSet<String> {
    let uid = |workload: &Arc<MeshWorkload>| match &workload.process {
        ProcessSelector::Pod { uid, .. } => Some(uid.clone()),
        ProcessSelector::User(_)
        | ProcessSelector::Cgroup(_)
        | ProcessSelector::NetworkNamespace { .. } => None,
    };
    snapshot.on_node(node).filter_map(uid).collect()
}

impl Captures {
    /// Runs until the agent stops taking connections, or another one takes its place. What is captured then stays
    /// so: its rules are needed while connections drain, and if this agent has its place back, it goes on from
    /// there.
    pub(crate) async fn run(mut self, mut current: Captured) -> (Self, Captured) {
        let mut known = false;
        // A pod that starts before there is any state waits.
        self.look_after_plugin();
        let mut sandboxes = Sandboxes::new(self.cri_socket.clone(), self.netns_dir.clone());
        loop {
            let snapshot = self.snapshots.borrow_and_update().clone();
            if snapshot.revision > 0 {
                sandboxes.look_up(&pods(&snapshot, &self.context.node), &self.starting).await;
                // It asks the kernel about every namespace, and waits for its answers.
                tokio::task::block_in_place(|| {
                    self.reconcile(&snapshot, &sandboxes, &mut current, known);
                });
                known = true;
                self.note_ready();
                self.look_after_plugin();
                for (namespace, name) in self.departed.look(&snapshot, Instant::now()) {
                    self.context.metrics.forget(&namespace, &name);
                }
            }
            tokio::select! {
                () = self.context.stopping.cancelled() => return (self, current),
                () = self.replaced.wait_set() => return (self, current),
                changed = self.snapshots.changed() => {
                    if changed.is_err() { return (self, current) }
                }
                () = self.starting.news() => {}
                () = next_reconcile(&current) => {}
            }
        }
    }

    /// What the agent before listened for is taken up, or has had its time.
    fn note_ready(&mut self) {
        let since = *self.since.get_or_insert_with(Instant::now);
        let state = match self.inherited.left() {
            left if left > 0 && since.elapsed() < TAKE_UP => {
                let text = format!("{left} listeners of the agent before are not taken up yet");
                HealthState::NotReady(text)
            }
            _ => HealthState::Ready,
        };
        self.health.set(CAPTURE_CHECK, state);
    }

    fn reconcile(
        &mut self,
        snapshot: &Snapshot,
        sandboxes: &Sandboxes,
        current: &mut Captured,
        known: bool,
    ) {
        let node = self.context.node.clone();
        let wanted: Vec<Arc<MeshWorkload>> = snapshot.on_node(&node).cloned().collect();
        let keys: BTreeSet<String> = wanted.iter().map(|workload| workload.key()).collect();
        current.retain(&keys, snapshot);
        self.identities.retain(|key| keys.contains(key));
        self.board.retain(&keys);

        let mut on_host = Vec::new();
        for workload in wanted {
            match &workload.process {
                ProcessSelector::NetworkNamespace { name, .. } => {
                    let path = self.netns_dir.join(name);
                    self.namespace(&workload, &path, current);
                }
                ProcessSelector::Pod { uid, .. } => match sandboxes.path(uid) {
                    Ok(path) => self.namespace(&workload, path, current),
                    Err(error) => self.note(&workload, Err(error)),
                },
                ProcessSelector::User(_) | ProcessSelector::Cgroup(_) => on_host.push(workload),
            }
        }
        self.host(&on_host, current);
        if let Some(neighbours) = &self.context.neighbours {
            neighbours.store(current.locals().flat_map(Locals::all));
        }
        current.locals().for_each(|locals| locals.sweep_pools(snapshot));
        if !known {
            tracing::info!(workloads = keys.len(), "took up the workloads of this node");
        }
        let (enrolled, unenrolled) = self.board.counts();
        self.context.metrics.set_workloads(enrolled, unenrolled);
    }

    fn namespace(&mut self, workload: &Arc<MeshWorkload>, path: &Path, current: &mut Captured) {
        let key = workload.key();
        let outcome = match current.namespaces.get_mut(&key) {
            Some(capture) => match capture.still_there(path) {
                Ok(true) => capture.update(workload, &mut self.identities),
                Ok(false) => {
                    current.namespaces.remove(&key);
                    Err(anyhow::anyhow!("the network namespace was made anew, taking it up again"))
                }
                Err(error) => Err(error),
            },
            None => {
                let identities = &mut self.identities;
                NamespaceCapture::start(&self.context, workload, path, identities, &self.inherited)
                    .map(|capture| {
                        tracing::info!(workload = key, namespace = %path.display(), "captured");
                        current.namespaces.insert(key.clone(), capture);
                    })
            }
        };
        let netns = current.namespaces.get(&key).map(NamespaceCapture::inode);
        self.note_in(workload, outcome, netns);
    }

    fn host(&mut self, workloads: &[Arc<MeshWorkload>], current: &mut Captured) {
        if workloads.is_empty() {
            if std::mem::take(&mut current.host_closed) {
                HostCapture::remove_rules();
            }
            let Some(host) = &mut current.host else { return };
            let since = *current.host_leaving.get_or_insert_with(Instant::now);
            if since.elapsed() < LEAVING {
                host.update(&self.context, &[], &mut self.identities);
            } else {
                HostCapture::remove_rules();
                current.host = None;
            }
            return;
        }
        current.host_leaving = None;
        let host = match &mut current.host {
            Some(host) => host,
            None => match HostCapture::start(&self.context, &self.inherited) {
                Ok(host) => {
                    current.host_closed = false;
                    current.host.insert(host)
                }
                Err(error) => {
                    let mut text = format!("{error:#}");
                    current.host_closed = true;
                    if let Err(error) = HostCapture::close(workloads) {
                        text = format!("{text}; nor could its ports be closed: {error:#}");
                    }
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

    fn look_after_plugin(&mut self) {
        let Some(installation) = &self.installation else { return };
        match tokio::task::block_in_place(|| installation.ensure()) {
            Ok(false) => {}
            Ok(true) => tracing::info!("the CNI plugin is in place"),
            Err(error) => tracing::warn!(
                error = format!("{error:#}"),
                "the CNI plugin is not in place: pods start before they are captured"
            ),
        }
    }

    fn note(&mut self, workload: &MeshWorkload, outcome: anyhow::Result<()>) {
        self.note_in(workload, outcome, None);
    }

    fn note_in(
        &mut self,
        workload: &MeshWorkload,
        outcome: anyhow::Result<()>,
        netns: Option<u64>,
    ) {
        let slot = self.identities.ensure(workload).ok().map(|identity| identity.slot.clone());
        let problem = outcome.err().map(|error| format!("{error:#}"));
        if self.board.set(&workload.key(), slot, problem.clone(), netns)
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
