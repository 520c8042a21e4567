//! Captures: which workloads of this node are in the mesh, and the listeners and rules that put them
//! there. One task reconciles what should be with what is, so that a namespace that appears late,
//! is made anew, or whose rules somebody removed, heals by itself.

mod board;
mod guard;
mod hold;
mod host;
mod listeners;
mod locals;
mod namespace;
mod older;
mod sandboxes;
mod serve;
mod strays;
mod uncaptured;
mod users;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::policy::{Mode, ProcessSelector, resolve::MeshWorkload};
use hauberk_telemetry::{Health, State as HealthState};
use tokio::sync::watch;

pub(crate) use board::StatusBoard;
pub(crate) use hold::Waiting;
pub(crate) use host::closed_rules as closed_host_rules;
pub(crate) use listeners::CapturedConnection;
pub(crate) use locals::Locals;
pub(crate) use namespace::closed as closed_namespace_rules;
pub(crate) use sandboxes::netns_file;

use crate::{
    cni::Starting,
    context::Context,
    departed::Departed,
    handover::{Inherited, Replaced, Seat},
    identity::Identities,
    policy::Snapshot,
};
use guard::Condition;
use host::HostCapture;
use namespace::{Departure, NamespaceCapture};
use older::OlderCount;
use sandboxes::Sandboxes;
use users::UserNews;

/// How often what is there is compared with what should be.
const RECONCILE: Duration = Duration::from_secs(2);

/// How often cgroups are looked at: a service that is started anew has another one, which no rule knows yet.
const CGROUP_LOOK: Duration = Duration::from_millis(50);

/// How often it is looked for rules of ours where no workload is.
const STRAYS: Duration = Duration::from_secs(30);

/// How long the rules of a workload that is gone stay, for its connections to end. These are cut at once.
const REMOVAL_GRACE: Duration = Duration::from_secs(2);

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
    /// Where pods are, for a restart.
    pub(crate) kept_sandboxes: PathBuf,
    pub(crate) cri_socket: PathBuf,
    pub(crate) starting: Starting,
    /// Whether this node has pods, which a CNI plugin announces.
    pub(crate) has_plugin: bool,
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
    /// Those whose workload is gone, or is somewhere else now, since when. The resets of their connections pass
    /// through the rules.
    leaving: Vec<(String, NamespaceCapture, Instant)>,
    host_leaving: Option<Instant>,
    /// When it was looked for strays last.
    strays_looked: Option<Instant>,
}

impl Captured {
    /// The listeners, for the agent that takes this one's place. What is leaving is not its business any more.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub(crate) fn listeners(&self) -> std::io::Result<Vec<(Seat, OwnedFd)>> {
        let namespaces = self.namespaces.values().flat_map(NamespaceCapture::share);
        let host = self.host.iter().flat_map(HostCapture::share);
        namespaces.chain(host).collect()
    }

    /// Takes no more connections, and closes the sessions that carry nothing.
    pub(crate) fn close(&mut self) {
        self.locals().for_each(Locals::retire_pools);
        let leaving = self.leaving.iter_mut().map(|(_, capture, _)| capture);
        self.namespaces.values_mut().chain(leaving).for_each(NamespaceCapture::close);
        if let Some(host) = &mut self.host {
            host.close_listeners();
        }
    }

    /// Gives the workloads their plain network back.
    pub(crate) fn remove_rules(&mut self) {
        let leaving = std::mem::take(&mut self.leaving).into_iter().map(|(_, capture, _)| capture);
        std::mem::take(&mut self.namespaces)
            .into_values()
            .chain(leaving)
            .for_each(NamespaceCapture::remove_rules);
        if let Some(host) = self.host.take() {
            host.remove_rules();
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
            self.leave(&key);
        }
        let mut staying = Vec::new();
        for (key, mut capture, since) in std::mem::take(&mut self.leaving) {
            if keys.contains(&key) && !self.namespaces.contains_key(&key) {
                take_back(&key, &mut capture);
                self.namespaces.insert(key, capture);
                continue;
            }
            let departure = capture.departure(|namespace| snapshot.is_enrolled(namespace));
            let stays = match departure {
                Departure::Stays => {
                    take_back(&key, &mut capture);
                    true
                }
                Departure::Removed | Departure::Gone => since.elapsed() < REMOVAL_GRACE,
                // What is about to be carried, or waits for this agent to know what another one does, is seen at
                // the end of that time.
                Departure::LetGo => {
                    is_letting_go(&key, &mut capture) || since.elapsed() < REMOVAL_GRACE
                }
            };
            if stays {
                staying.push((key, capture, since));
                continue;
            }
            match departure {
                Departure::Gone => drop(capture),
                Departure::Removed | Departure::LetGo | Departure::Stays => capture.remove_rules(),
            }
            tracing::info!(workload = key, "no longer captured");
        }
        self.leaving = staying;
    }

    /// Pods that were let go and whose namespace is back in the mesh, or whose own is not known: not free any more, wherever
    /// the runtime says that they are.
    fn take_back(&mut self, snapshot: &Snapshot) {
        for (key, capture, _) in &mut self.leaving {
            match capture.departure(|namespace| snapshot.is_enrolled(namespace)) {
                Departure::Stays => take_back(key, capture),
                Departure::Removed | Departure::LetGo | Departure::Gone => {}
            }
        }
    }

    /// What is captured under this key is no place of its workload any more.
    fn leave(&mut self, key: &str) {
        if let Some(capture) = self.namespaces.remove(key) {
            capture.locals().retire_pools();
            self.leaving.push((key.to_owned(), capture, Instant::now()));
        }
    }

    /// Another workload is in this network namespace now: what leaves there has no say about its rules any more.
    fn make_way(&mut self, path: &Path) {
        let Ok(netns) = hauberk_linux::Netns::open(path) else { return };
        for (key, mut capture, since) in std::mem::take(&mut self.leaving) {
            if capture.inode() == netns.inode() {
                take_back(&key, &mut capture);
                tracing::info!(workload = key, "its network namespace is another workload's now");
                capture.retire();
            } else {
                self.leaving.push((key, capture, since));
            }
        }
    }

    /// A workload that has got another name is where it was: nothing about its connections has changed.
    fn rename(&mut self, wanted: &[(Arc<MeshWorkload>, PathBuf)], identities: &mut Identities) {
        for (workload, path) in wanted {
            let key = workload.key();
            if self.namespaces.contains_key(&key) {
                continue;
            }
            let is_wanted = |key: &str| wanted.iter().any(|(workload, _)| workload.key() == key);
            let old = self.namespaces.iter().find(|(old, capture)| {
                !is_wanted(old)
                    && capture.is_at(path)
                    && capture.still_there(path).unwrap_or(false)
                    && capture
                        .locals()
                        .all()
                        .iter()
                        .all(|l| l.workload.identity == workload.identity)
            });
            let Some(old) = old.map(|(old, _)| old.clone()) else { continue };
            if let Some(capture) = self.namespaces.remove(&old) {
                identities.rename(&old, workload);
                tracing::info!(
                    before = old,
                    workload = key,
                    "a captured workload has another name"
                );
                self.namespaces.insert(key, capture);
            }
        }
    }

    /// The namespaces that are captured.
    fn inodes(&self) -> HashSet<u64> {
        let leaving = self.leaving.iter().map(|(_, capture, _)| capture);
        self.namespaces.values().chain(leaving).map(NamespaceCapture::inode).collect()
    }
}

/// A pod whose namespace has left the mesh: what it opens from here on is none of our business, and what is carried
/// lives. Whether there is any of that.
fn is_letting_go(key: &str, capture: &mut NamespaceCapture) -> bool {
    match capture.let_go().and_then(|()| capture.carries()) {
        Ok(carries) => carries,
        Err(error) => {
            let error = format!("{error:#}");
            tracing::warn!(workload = key, error, "cannot be let go gently, it is set free");
            false
        }
    }
}

/// What was let go is captured again, before anything else is known of it.
fn take_back(key: &str, capture: &mut NamespaceCapture) {
    if let Err(error) = capture.take_back() {
        let error = format!("{error:#}");
        tracing::error!(workload = key, error, "is let go, and cannot be captured again");
    }
}

/// How many connections of each of these workloads are older than its capture; nothing of any if that is not known.
fn older_of<'a>(
    counts: anyhow::Result<BTreeMap<String, OlderCount>>,
    keys: impl IntoIterator<Item = &'a String>,
) -> BTreeMap<String, OlderCount> {
    match counts {
        Ok(counts) => {
            let of = |key: &String| (key.clone(), counts.get(key).copied().unwrap_or_default());
            keys.into_iter().map(of).collect()
        }
        Err(error) => {
            tracing::warn!(
                error = format!("{error:#}"),
                "which connections are older than the capture is not known"
            );
            BTreeMap::new()
        }
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
        let mut sandboxes = Sandboxes::new(
            self.cri_socket.clone(),
            self.netns_dir.clone(),
            self.kept_sandboxes.clone(),
        );
        let mut users = UserNews::listen();
        loop {
            let snapshot = self.snapshots.borrow_and_update().clone();
            if snapshot.revision > 0 {
                // Before the runtime is asked, which may take its time.
                tokio::task::block_in_place(|| current.take_back(&snapshot));
                sandboxes.look_up(&pods(&snapshot, &self.context.node), &self.starting).await;
                // It asks the kernel about every namespace, and waits for its answers.
                tokio::task::block_in_place(|| {
                    self.reconcile(&snapshot, &sandboxes, &mut current, known);
                });
                known = true;
                self.release_strays(&snapshot, &mut sandboxes, &mut current).await;
                self.note_ready(sandboxes.problem());
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
                () = users.next() => {}
                () = next_reconcile(&current) => {}
            }
        }
    }

    /// What the agent before listened for is taken up, or has had its time; and the runtime can be asked where pods are.
    /// Until then a rollout does not go on to the next node.
    fn note_ready(&mut self, unknown: Option<&str>) {
        let since = *self.since.get_or_insert_with(Instant::now);
        let state = match self.inherited.left() {
            left if left > 0 && since.elapsed() < TAKE_UP => {
                let text = format!("{left} listeners of the agent before are not taken up yet");
                HealthState::NotReady(text)
            }
            _ => match unknown {
                Some(problem) => HealthState::NotReady(format!(
                    "where pods of this node are is not known: {problem}"
                )),
                None => HealthState::Ready,
            },
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
        let in_namespaces: Vec<_> = wanted
            .iter()
            .filter_map(|workload| {
                Some((workload.clone(), self.namespace_path(workload, sandboxes)?.ok()?))
            })
            .collect();
        current.rename(&in_namespaces, &mut self.identities);
        current.retain(&keys, snapshot);
        self.identities.retain(|key| keys.contains(key));
        self.board.retain(&keys);

        let mut on_host = Vec::new();
        for workload in &wanted {
            match self.namespace_path(workload, sandboxes) {
                Some(Ok(path)) => self.namespace(workload, &path, current),
                Some(Err(error)) => self.note(workload, Err(error)),
                None => on_host.push(workload.clone()),
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
        self.context.metrics.set_capture_unreported(self.board.unreported());
        let older = |mode| {
            let of_mode = wanted.iter().filter(|workload| workload.mode == mode);
            of_mode.map(|workload| self.board.older(&workload.key()).open).sum()
        };
        self.context.metrics.set_older_connections(older(Mode::Enforce), older(Mode::Audit));
    }

    /// Where the network namespace of a workload is; nothing for one of the host's.
    fn namespace_path(
        &self,
        workload: &MeshWorkload,
        sandboxes: &Sandboxes,
    ) -> Option<anyhow::Result<PathBuf>> {
        match &workload.process {
            ProcessSelector::NetworkNamespace { name, .. } => Some(Ok(self.netns_dir.join(name))),
            ProcessSelector::Pod { uid, .. } => Some(sandboxes.path(uid)),
            ProcessSelector::User(_) | ProcessSelector::Cgroup(_) => None,
        }
    }

    fn namespace(&mut self, workload: &Arc<MeshWorkload>, path: &Path, current: &mut Captured) {
        let key = workload.key();
        // Its workload is elsewhere now: what was captured is let go, and where it is now is captured.
        if current.namespaces.get(&key).is_some_and(|capture| !capture.is_at(path)) {
            tracing::info!(workload = key, namespace = %path.display(), "its network namespace is another one now");
            current.leave(&key);
        }
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
                current.make_way(path);
                NamespaceCapture::start(
                    &self.context,
                    workload,
                    path,
                    &mut self.identities,
                    &self.inherited,
                    &self.replaced,
                )
                .map(|capture| {
                    tracing::info!(workload = key, namespace = %path.display(), "captured");
                    current.namespaces.insert(key.clone(), capture);
                })
            }
        };
        let Some(capture) = current.namespaces.get_mut(&key) else {
            self.note(workload, outcome);
            return;
        };
        // Said together: what is captured and has older connections must not pass for captured alone.
        let older = older_of(capture.look_at_older(), [&key]).remove(&key);
        let (netns, condition) = (Some(capture.inode()), capture.condition());
        self.note_in(workload, outcome, netns, condition, older);
    }

    fn host(&mut self, workloads: &[Arc<MeshWorkload>], current: &mut Captured) {
        if workloads.is_empty() {
            let Some(host) = &mut current.host else { return };
            let since = *current.host_leaving.get_or_insert_with(Instant::now);
            if since.elapsed() < REMOVAL_GRACE {
                // Their processes are captured still, while their connections end.
                host.locals().retire_pools();
            } else if let Some(host) = current.host.take() {
                host.remove_rules();
                tracing::info!(
                    "no workload is a process of this host any more; its rules are removed"
                );
            }
            return;
        }
        current.host_leaving = None;
        let host = match &mut current.host {
            Some(host) => host,
            None => match HostCapture::start(&self.context, &self.inherited, &self.replaced) {
                Ok(host) => current.host.insert(host),
                Err(error) => {
                    for workload in workloads {
                        self.note(workload, Err(anyhow::anyhow!("{error:#}")));
                    }
                    return;
                }
            },
        };
        let outcomes = host.update(&self.context, workloads, &mut self.identities);
        let condition = host.condition();
        let keys: Vec<String> = workloads.iter().map(|workload| workload.key()).collect();
        let older = older_of(host.look_at_older(), &keys);
        for ((workload, key), outcome) in workloads.iter().zip(&keys).zip(outcomes) {
            let older = older.get(key).copied();
            self.note_in(workload, outcome, None, condition.clone(), older);
            self.board.set_unreached(key, host.unreached(workload));
        }
    }

    /// Removes rules of ours from where no workload is, as after one that was removed while no agent ran.
    async fn release_strays(
        &self,
        snapshot: &Snapshot,
        sandboxes: &mut Sandboxes,
        current: &mut Captured,
    ) {
        let due = current.strays_looked.is_none_or(|last| last.elapsed() >= STRAYS);
        if !due {
            return;
        }
        current.strays_looked = Some(Instant::now());
        let mut here = snapshot.on_node(&self.context.node);
        let has_processes = here.any(|workload| workload.process.own_addresses().is_none());
        if current.host.is_none() && !has_processes {
            tokio::task::block_in_place(|| strays::release_host(&self.context.node));
        }
        let mut known = current.inodes();
        // What should be captured and could not be stays closed.
        for workload in snapshot.on_node(&self.context.node) {
            if let Some(Ok(path)) = self.namespace_path(workload, sandboxes)
                && let Ok(netns) = hauberk_linux::Netns::open(&path)
            {
                known.insert(netns.inode());
            }
        }
        let folder = self.netns_dir.clone();
        let found =
            tokio::task::block_in_place(|| strays::find(&self.context.node, &folder, &known));
        if found.is_empty() {
            return;
        }
        let has_pods = self.has_plugin || !pods(snapshot, &self.context.node).is_empty();
        let of_pods = if has_pods {
            match sandboxes.pod_namespaces().await {
                Ok(all) => Some(all),
                Err(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "whose the network namespaces are that are captured for no workload is not known; they stay closed"
                    );
                    return;
                }
            }
        } else {
            None
        };
        for stray in found {
            let free = match of_pods.as_ref().and_then(|all| all.get(&stray.path)) {
                // Only leaving the mesh frees a pod.
                Some(namespace) => snapshot.is_enrolled(namespace) == Some(false),
                None => true,
            };
            if free {
                tokio::task::block_in_place(|| stray.release());
            }
        }
    }

    fn note(&mut self, workload: &MeshWorkload, outcome: anyhow::Result<()>) {
        self.note_in(workload, outcome, None, Condition::default(), None);
    }

    fn note_in(
        &mut self,
        workload: &MeshWorkload,
        outcome: anyhow::Result<()>,
        netns: Option<u64>,
        condition: Condition,
        older: Option<OlderCount>,
    ) {
        let slot = self.identities.ensure(workload).ok().map(|identity| identity.slot.clone());
        let problem = outcome.err().map(|error| format!("{error:#}"));
        if self.board.set(&workload.key(), slot, problem.clone(), netns, condition, older)
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
