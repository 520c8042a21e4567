//! The state that agents enforce, as revisions. The sole writer of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    policy::{
        DecisionTable, MeshNamespace, MeshNode, MeshService,
        resolve::{MeshWorkload, Resolved, resolve},
    },
    time::Timestamp,
};
use hauberk_proto::{convert::Resource, state::state_hash, v1};
use hauberk_telemetry::ControlPlaneMetrics;
use notify::Watcher;
use tokio::sync::watch;

use super::{Folder, read_folder};
use crate::store::{Revision, Store, StoreError};

/// Changes that come together (an editor's write and rename, a `kubectl apply` of a folder) make one
/// revision.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// File systems without change notices, and notices that were lost, are caught up with at this pace.
const RESCAN: Duration = Duration::from_secs(10);

/// What manifests without any workload mean while the last good ones have some.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Emptied {
    /// A mount that is missing, or a sync that failed: agents would open every protected port for it. The last good
    /// manifests stay in force.
    Refused,
    /// The operator has confirmed it.
    Confirmed,
}

/// Which state is the newer one: the later epoch, and within one the higher revision.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Version {
    /// When the numbering of the revisions began, in seconds since the Unix epoch.
    pub(crate) epoch: u64,
    /// Zero if there is no state.
    pub(crate) revision: u64,
}

/// One revision.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) epoch: u64,
    pub(crate) revision: u64,
    pub(crate) made_at: Timestamp,
    pub(crate) resources: BTreeMap<String, v1::Resource>,
    pub(crate) state_hash: [u8; 32],
    pub(crate) table: DecisionTable,
    pub(crate) workloads: Vec<MeshWorkload>,
    /// In order.
    pub(crate) machines: Vec<String>,
    pub(crate) warnings: Vec<String>,
    /// Those of them that are about identities of several workloads.
    pub(crate) shared_identities: Vec<String>,
    /// Each as `namespace/name`, those that bind to nothing included.
    pub(crate) policy_names: BTreeSet<String>,
    pub(crate) policies: usize,
    pub(crate) guardrails: usize,
}

impl Published {
    pub(crate) fn version(&self) -> Version {
        Version { epoch: self.epoch, revision: self.revision }
    }

    /// The registered workload of a key such as `payments/ledger` or `machine/db-01`.
    pub(crate) fn workload(&self, key: &str) -> Option<&MeshWorkload> {
        self.workloads.iter().find(|workload| workload.key() == key)
    }

    /// The registered workload that people call so: by its key, or by that of a pod without the UID.
    pub(crate) fn named(&self, name: &str) -> Option<&MeshWorkload> {
        self.workloads.iter().find(|workload| workload.shown() == name || workload.key() == name)
    }

    /// Whether a machine, or a node of the cluster, is in the mesh.
    pub(crate) fn has_machine(&self, name: &str) -> bool {
        self.machines.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
    }

    /// Whether an identity is registered.
    pub(crate) fn by_identity(&self, id: &SpiffeId) -> Option<&MeshWorkload> {
        self.workloads.iter().find(|workload| workload.identity == *id)
    }
}

/// How many objects there are of a kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Counts {
    pub(crate) policies: usize,
    pub(crate) guardrails: usize,
}

/// A state that has no number yet.
pub(crate) struct State {
    resolved: Resolved,
    machines: Vec<String>,
    counts: Counts,
    resources: BTreeMap<String, v1::Resource>,
    pub(crate) warnings: Vec<String>,
    /// Those of them that are about identities of several workloads.
    pub(crate) shared_identities: Vec<String>,
    pub(crate) hash: [u8; 32],
}

impl State {
    pub(crate) fn new(
        resolved: Resolved,
        services: Vec<MeshService>,
        namespaces: Vec<MeshNamespace>,
        nodes: Vec<MeshNode>,
        mut machines: Vec<String>,
        counts: Counts,
    ) -> Self {
        machines.sort();
        let resources = resources(&resolved, services, namespaces, nodes);
        let warnings = resolved
            .unresolved
            .iter()
            .map(|unresolved| format!("AccessPolicy {}: {}", unresolved.policy, unresolved.problem))
            .collect();
        Self {
            hash: state_hash(&resources),
            resolved,
            machines,
            counts,
            resources,
            warnings,
            shared_identities: Vec::new(),
        }
    }
}

pub(crate) struct Publisher {
    /// None if somebody else puts the state in force.
    folder: Option<PathBuf>,
    trust_domain: TrustDomain,
    store: Arc<Store>,
    metrics: Arc<ControlPlaneMetrics>,
    sender: watch::Sender<Arc<Published>>,
    errors: Mutex<Vec<String>>,
    /// The files as they were read last, and whether they are in force.
    seen: Mutex<Option<Seen>>,
}

struct Seen {
    files: Vec<(String, String)>,
    in_force: bool,
}

impl Publisher {
    /// Reads the folder, or the last good manifests if it has errors. Without a folder there is no state
    /// until one is [put](Self::put). `emptied` is about the folder as it is now: one that loses its workloads later
    /// is refused in any case.
    pub(crate) fn start(
        folder: Option<PathBuf>,
        emptied: Emptied,
        trust_domain: TrustDomain,
        store: Arc<Store>,
        metrics: Arc<ControlPlaneMetrics>,
    ) -> Result<Arc<Self>, StoreError> {
        let empty = Published {
            epoch: 0,
            revision: 0,
            made_at: hauberk_tls::now(),
            resources: BTreeMap::new(),
            state_hash: [0; 32],
            table: DecisionTable::default(),
            workloads: Vec::new(),
            machines: Vec::new(),
            warnings: Vec::new(),
            shared_identities: Vec::new(),
            policy_names: BTreeSet::new(),
            policies: 0,
            guardrails: 0,
        };
        let publisher = Arc::new(Self {
            folder,
            trust_domain,
            store,
            metrics,
            sender: watch::channel(Arc::new(empty)).0,
            errors: Mutex::default(),
            seen: Mutex::default(),
        });
        if let Some(folder) = &publisher.folder
            && !publisher.reload(folder, emptied)?
        {
            publisher.fall_back()?;
        }
        Ok(publisher)
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Published>> {
        self.sender.subscribe()
    }

    pub(crate) fn current(&self) -> Arc<Published> {
        self.sender.borrow().clone()
    }

    /// The errors of the folder as it is; empty if it is in force.
    pub(crate) fn errors(&self) -> Vec<String> {
        self.errors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Watches the folder until the program ends.
    pub(crate) async fn watch(self: Arc<Self>) {
        let Some(folder) = self.folder.clone() else { return };
        let (changed, mut changes) = tokio::sync::mpsc::channel::<()>(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Our own reading is noticed too, and is no change.
            if event.is_ok_and(|event| event.kind.is_access()) {
                return;
            }
            // A full channel already says that something changed.
            let _full = changed.try_send(());
        });
        let mut watcher = match watcher {
            Ok(watcher) => Some(watcher),
            Err(error) => {
                tracing::warn!(%error, "no change notices, the manifests are read every 10 s");
                None
            }
        };
        if let Some(watcher) = &mut watcher
            && let Err(error) = watcher.watch(&folder, notify::RecursiveMode::Recursive)
        {
            tracing::warn!(%error, folder = %folder.display(),
                "the manifest folder cannot be watched, it is read every 10 s");
        }
        loop {
            tokio::select! {
                Some(()) = changes.recv() => tokio::time::sleep(DEBOUNCE).await,
                () = tokio::time::sleep(RESCAN) => {}
            }
            let (publisher, folder) = (self.clone(), folder.clone());
            let reloaded =
                tokio::task::spawn_blocking(move || publisher.reload(&folder, Emptied::Refused))
                    .await;
            match reloaded {
                Ok(Ok(_)) => {}
                // People see it in the status as well, and it is tried again at the next look.
                Ok(Err(error)) => self.set_errors(vec![format!(
                    "the manifests are good but could not be stored: {}",
                    chain(&error)
                )]),
                Err(error) => tracing::error!(%error, "reading the manifests failed"),
            }
        }
    }

    /// Puts the folder in force if it is whole. Returns whether it is.
    fn reload(&self, folder: &Path, emptied: Emptied) -> Result<bool, StoreError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let files = match read_folder(folder) {
            Ok(files) => files,
            Err(error) => {
                *seen = None;
                self.set_errors(error.lines());
                return Ok(false);
            }
        };
        if let Some(before) = &*seen
            && before.files == files
        {
            return Ok(before.in_force);
        }
        // What cannot be stored is tried again.
        *seen = None;
        let refused = match Folder::parse(files.clone()) {
            Ok(folder) => self.publish(&folder, emptied)?,
            Err(error) => error.lines(),
        };
        let in_force = refused.is_empty();
        self.set_errors(refused);
        *seen = Some(Seen { files, in_force });
        Ok(in_force)
    }

    /// Puts the last good manifests in force. Without any, nothing is: agents go on with what they have from before, and
    /// one that has nothing allows nothing. An empty state would tell them to open every port.
    fn fall_back(&self) -> Result<(), StoreError> {
        let files = self.store.manifests()?;
        if files.is_empty() {
            tracing::warn!("there are no good manifests yet; agents get no state until there are");
            return Ok(());
        }
        // They are the last good ones, whatever is in them.
        let refused = match Folder::parse(files) {
            Ok(folder) => self.publish(&folder, Emptied::Confirmed)?,
            Err(error) => error.lines(),
        };
        if refused.is_empty() {
            tracing::warn!("the last good manifests are in force");
            return Ok(());
        }
        // A newer version may refuse what an older one took.
        let stored = refused.iter().map(|line| {
            format!(
                "the last good manifests are not accepted any more, so agents get no state: {line}"
            )
        });
        let mut errors = self.errors();
        errors.extend(stored);
        self.set_errors(errors);
        Ok(())
    }

    /// What people should mend; empty if everything is in force.
    pub(crate) fn set_errors(&self, lines: Vec<String>) {
        self.metrics
            .manifests_read(u64::try_from(lines.len()).unwrap_or(u64::MAX), SystemTime::now());
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        if *errors == lines {
            return;
        }
        for line in &lines {
            tracing::error!(error = %line,
                "the manifests are not taken, the last good state stays in force");
        }
        if lines.is_empty() {
            tracing::info!("the manifests are accepted again");
        }
        *errors = lines;
    }

    /// Puts manifests in force, or says why not.
    fn publish(&self, folder: &Folder, emptied: Emptied) -> Result<Vec<String>, StoreError> {
        let declared = &folder.declared;
        let resolved = match resolve(declared, &self.trust_domain) {
            Ok(resolved) => resolved,
            Err(error) => return Ok(vec![chain(&error)]),
        };
        let kept = self.store.manifests()?;
        if resolved.workloads.is_empty()
            && let Some(before) = self.workloads_of(&kept)
        {
            match emptied {
                Emptied::Refused => return Ok(vec![lost_all(&before)]),
                Emptied::Confirmed => tracing::warn!(target: "hauberk.audit", last_good = before,
                    "the manifests have no workload any more, and --allow-empty confirms it: nothing is protected"),
            }
        }
        // Kept before it is in force: a restart must not find something older as the last good.
        if kept != folder.files {
            self.store.save_manifests(&folder.files)?;
        }
        let machines = declared.machines.iter().map(|machine| machine.name.to_string()).collect();
        let counts =
            Counts { policies: declared.policies.len(), guardrails: declared.guardrails.len() };
        self.publish_resolved(resolved, machines, counts)?;
        Ok(Vec::new())
    }

    /// How many workloads manifests have that were good once, in words; nothing if they have none.
    fn workloads_of(&self, files: &[(String, String)]) -> Option<String> {
        if files.is_empty() {
            return None;
        }
        let declared = Folder::parse(files.to_vec()).ok().map(|folder| folder.declared);
        match declared.and_then(|declared| resolve(&declared, &self.trust_domain).ok()) {
            Some(resolved) => match resolved.workloads.len() {
                0 => None,
                1 => Some("1 workload".to_owned()),
                count => Some(format!("{count} workloads")),
            },
            // A newer version may refuse what an older one took; agents enforce it all the same.
            None => Some("workloads that this version cannot read".to_owned()),
        }
    }

    fn publish_resolved(
        &self,
        resolved: Resolved,
        machines: Vec<String>,
        counts: Counts,
    ) -> Result<(), StoreError> {
        let state = State::new(resolved, Vec::new(), Vec::new(), Vec::new(), machines, counts);
        let kept = self.store.revision()?;
        let hex = hex::encode(state.hash);
        let version = |kept: &Revision| Version { epoch: kept.epoch, revision: kept.number };
        if kept.epoch > 0 && kept.state_hash == hex {
            self.put(version(&kept), state);
            return Ok(());
        }
        let epoch = if kept.epoch > 0 { kept.epoch } else { seconds(hauberk_tls::now()) };
        let next = Revision { epoch, number: kept.number.saturating_add(1), state_hash: hex };
        self.store.save_revision(&next)?;
        self.put(version(&next), state);
        Ok(())
    }

    /// Puts a state in force under its number.
    pub(crate) fn put(&self, version: Version, state: State) {
        let Version { epoch, revision } = version;
        self.metrics.set_state_revision(revision);
        let before = self.current();
        if before.version() == version
            && before.machines == state.machines
            && before.warnings == state.warnings
        {
            return;
        }
        let State { resolved, machines, counts, resources, warnings, shared_identities, hash } =
            state;
        if before.version() != version {
            tracing::info!(
                epoch,
                revision,
                workloads = resolved.workloads.len(),
                policies = counts.policies,
                guardrails = counts.guardrails,
                "published a revision"
            );
        }
        let entitled = resolved.workloads.iter().filter(|workload| workload.is_entitled());
        let postures: Vec<_> = entitled.map(|w| (w.identity.clone(), w.mode)).collect();
        self.sender.send_replace(Arc::new(Published {
            epoch,
            revision,
            made_at: hauberk_tls::now(),
            policy_names: policy_names(&resolved),
            resources,
            state_hash: hash,
            table: DecisionTable::build(resolved.policies, resolved.guardrails, postures),
            workloads: resolved.workloads,
            machines,
            warnings,
            shared_identities,
            policies: counts.policies,
            guardrails: counts.guardrails,
        }));
    }
}

/// As epochs have it.
pub(crate) fn seconds(time: Timestamp) -> u64 {
    u64::try_from(time.unix_millis() / 1000).unwrap_or(0)
}

/// Why manifests without a workload are not taken.
fn lost_all(before: &str) -> String {
    format!(
        "the folder has no workload any more, and the last good manifests have {before}: a missing mount and a \
         failed sync look the same; restore the files, or start the control plane once with --allow-empty to \
         confirm it"
    )
}

fn policy_names(resolved: &Resolved) -> BTreeSet<String> {
    let bound = resolved.policies.iter().map(|policy| &policy.policy);
    let unbound = resolved.unresolved.iter().map(|unresolved| &unresolved.policy);
    bound.chain(unbound).map(ToString::to_string).collect()
}

fn resources(
    resolved: &Resolved,
    services: Vec<MeshService>,
    namespaces: Vec<MeshNamespace>,
    nodes: Vec<MeshNode>,
) -> BTreeMap<String, v1::Resource> {
    let workloads = resolved.workloads.iter().cloned().map(Resource::Workload);
    let policies = resolved.policies.iter().cloned().map(Resource::Policy);
    let guardrails = resolved.guardrails.iter().cloned().map(Resource::Guardrail);
    workloads
        .chain(policies)
        .chain(guardrails)
        .chain(services.into_iter().map(Resource::Service))
        .chain(namespaces.into_iter().map(Resource::Namespace))
        .chain(nodes.into_iter().map(Resource::Node))
        .map(|resource| (resource.key(), resource.message()))
        .collect()
}

pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
