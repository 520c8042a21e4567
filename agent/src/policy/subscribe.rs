//! The stream from the control plane. Sole writer of the snapshot: applies an update whole or refuses
//! it whole, never goes back to an older revision, keeps the last good state on disk.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use hauberk_proto::{
    convert::Resource,
    v1::{self, agent_report::Kind, state_client::StateClient},
};
use hauberk_telemetry::{
    Health, RecordSink, State as HealthState, metrics::AgentMetrics, record::Denial,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

use super::{Owner, Snapshot, clock, kept};
use crate::{
    capture::StatusBoard,
    edges::Edges,
    handover::Replaced,
    identity::{ControlPlane, explain},
};

/// The pause before the control plane is tried again, doubled up to the longest.
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LONGEST_RETRY: Duration = Duration::from_secs(10);

/// How often the agent tells how its certificates and captures stand.
const STATUS_PACE: Duration = Duration::from_secs(2);

/// How often it tells of connections that no policy allows.
const EDGES_PACE: Duration = Duration::from_secs(5);

/// Denials gathered for one report.
const DENIALS_A_REPORT: usize = 200;

/// The health check of the state.
pub(crate) const POLICY_CHECK: &str = "policy";

/// Holds the snapshot; the only one that writes it.
pub(crate) struct Enforcer {
    /// Whose agent this is.
    owner: Owner,
    sender: watch::Sender<Arc<Snapshot>>,
    path: PathBuf,
    metrics: AgentMetrics,
    health: Health,
    replaced: Replaced,
}

impl Enforcer {
    /// Starts from the last good state on disk, if there is one.
    /// Nothing is written there while another agent has replaced this one.
    pub(crate) fn open(
        owner: Owner,
        data: &Path,
        metrics: AgentMetrics,
        health: Health,
        replaced: Replaced,
    ) -> Self {
        let path = kept::path(data);
        let snapshot = match kept::load(&path, Some(&owner.node)) {
            Ok(Some((_, snapshot))) => {
                tracing::info!(
                    revision = snapshot.revision,
                    "enforcing the last good state from disk"
                );
                metrics.policy_restored(snapshot.revision, kept::written(&path));
                health.set(POLICY_CHECK, HealthState::Ready);
                snapshot
            }
            Ok(None) => Snapshot::default(),
            Err(error) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the state on disk is not used; nothing is allowed until the control plane sends it anew"
                );
                Snapshot::default()
            }
        };
        Self {
            owner,
            sender: watch::channel(Arc::new(snapshot)).0,
            path,
            metrics,
            health,
            replaced,
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.sender.subscribe()
    }

    /// Puts an update in force, or says why not.
    fn apply(&self, update: v1::StateUpdate) -> anyhow::Result<Arc<Snapshot>> {
        let current = self.sender.borrow().clone();
        let anew = update.epoch != current.epoch;
        let same = !anew && update.revision == current.revision;
        let is_newer = current.is_older_than(update.epoch, update.revision)
            || (same && (update.state_hash == current.state_hash || current.revision == 0));
        if !is_newer {
            anyhow::bail!(
                "revision {} of epoch {} is not newer than {} of {}, which is in force, and is another state; if the control \
                 plane was restored from a backup, let its numbering begin anew: start it once with --new-epoch, or in a \
                 cluster delete ConfigMap hauberk-state",
                update.revision,
                update.epoch,
                current.revision,
                current.epoch
            );
        }
        anyhow::ensure!(update.full || !anew, "the first update of an epoch is not full");
        if anew && current.revision > 0 {
            tracing::warn!(
                epoch = update.epoch,
                before = current.epoch,
                "the control plane is another one, or its numbering begins anew: what it said before is forgotten"
            );
        }
        let mut resources = if update.full { BTreeMap::new() } else { current.resources.clone() };
        for key in &update.removals {
            resources.remove(key);
        }
        for message in update.upserts {
            let key = Resource::try_from(message.clone())?.key();
            resources.insert(key, message);
        }
        let next =
            Snapshot::build(&self.owner.node, update.revision, resources, &update.state_hash)?;
        let next = Arc::new(next.of_epoch(update.epoch));
        if same && next.state_hash == current.state_hash {
            return Ok(current);
        }
        // On disk first: after a crash nothing older comes back.
        if !self.replaced.is_set() {
            self.keep(&next);
        }
        self.sender.send_replace(next.clone());
        let made = u64::try_from(update.made_at_unix_ms).unwrap_or(0);
        let made = SystemTime::UNIX_EPOCH + Duration::from_millis(made);
        let now = SystemTime::now();
        self.metrics.policy_enforced(
            next.revision,
            now,
            now.duration_since(made).unwrap_or_default(),
        );
        self.health.set(POLICY_CHECK, HealthState::Ready);
        tracing::info!(revision = next.revision, resources = next.resources.len(), "enforcing");
        Ok(next)
    }

    /// Takes up what another agent has kept on disk, if it is newer than what is in force, and else keeps that
    /// there. No stream may be open meanwhile.
    pub(crate) fn take_up(&self) {
        let current = self.sender.borrow().clone();
        match kept::load(&self.path, Some(&self.owner.node)) {
            Ok(Some((_, kept))) if current.is_older_than(kept.epoch, kept.revision) => {
                tracing::info!(revision = kept.revision, "enforcing what another agent has kept");
                self.metrics.policy_restored(kept.revision, kept::written(&self.path));
                self.sender.send_replace(Arc::new(kept));
                self.health.set(POLICY_CHECK, HealthState::Ready);
                return;
            }
            Ok(Some((_, kept)))
                if !kept.is_older_than(current.epoch, current.revision)
                    && kept.state_hash == current.state_hash =>
            {
                return;
            }
            Ok(_) => {}
            Err(error) => tracing::error!(
                error = format!("{error:#}"),
                "the state on disk is not used; what is in force stays in force"
            ),
        }
        if current.revision > 0 {
            self.keep(&current);
        }
    }

    /// Writes a state for a restart. A full disk must not keep a revocation from being enforced now.
    fn keep(&self, snapshot: &Snapshot) {
        if let Err(error) = kept::save(&self.path, &self.owner, snapshot) {
            tracing::error!(
                error = format!("{error:#}"),
                revision = snapshot.revision,
                "the new state is enforced but could not be kept for a restart"
            );
        }
    }
}

/// Keeps the stream open for as long as the agent runs.
#[derive(Clone)]
pub(crate) struct Subscription {
    pub(crate) enforcer: Arc<Enforcer>,
    pub(crate) control_plane: ControlPlane,
    pub(crate) metrics: AgentMetrics,
    pub(crate) records: RecordSink,
    pub(crate) edges: Arc<Edges>,
    pub(crate) status: StatusBoard,
    /// Counts up with each node certificate: a new one needs a new connection. The one before may be gone: an agent
    /// whose node has none that it can use calls nobody.
    pub(crate) node_renewed: watch::Receiver<u64>,
}

impl Subscription {
    pub(crate) async fn run(mut self) {
        let mut pause = FIRST_RETRY;
        loop {
            self.control_plane.usable().await;
            let begun = Instant::now();
            let outcome = self.stream().await;
            if begun.elapsed() > LONGEST_RETRY {
                // It worked for a while: the next trouble is another.
                pause = FIRST_RETRY;
            }
            self.metrics.control_plane_disconnected();
            match outcome {
                // Ended for a reason of our own: connect anew at once.
                Ok(()) => pause = FIRST_RETRY,
                Err(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "no control plane; what is in force stays in force"
                    );
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_RETRY);
                }
            }
        }
    }

    async fn stream(&mut self) -> anyhow::Result<()> {
        let (reports, outgoing) = mpsc::channel(8);
        let known = self.enforcer.sender.borrow().clone();
        let hello = v1::Hello {
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: known.revision,
            state_hash: known.state_hash.to_vec(),
            epoch: known.epoch,
        };
        reports.send(report(Kind::Hello(hello))).await?;
        let channel = self.control_plane.streaming_channel();
        let mut updates = StateClient::new(channel.clone())
            .max_decoding_message_size(256 * 1024 * 1024)
            .subscribe(ReceiverStream::new(outgoing))
            .await
            .map_err(|status| explain(&status).context(self.control_plane.address()))?
            .into_inner();
        self.metrics.control_plane_connected();
        tracing::info!(address = self.control_plane.address(), "connected to the control plane");
        self.node_renewed.mark_unchanged();
        let mut denials = self.records.follow_denials();
        let mut status_due = tokio::time::interval(STATUS_PACE);
        let mut edges_due = tokio::time::interval(EDGES_PACE);
        // A task of its own: its round trips must not wait for an update that is being applied.
        let clock = clock::watch(channel, self.status.clone(), self.metrics.clone());
        let _clock = AbortOnDropHandle::new(tokio::spawn(clock));
        // This replica may have forgotten what was told before, or be another.
        let mut told = 0;
        loop {
            tokio::select! {
                update = updates.message() => {
                    let Some(update) = update.map_err(|s| anyhow::anyhow!("{}", s.message()))? else {
                        anyhow::bail!("the control plane closed the stream");
                    };
                    let revision = update.revision;
                    match self.enforcer.apply(update) {
                        // The agent that replaced this one speaks for the node.
                        outcome if self.enforcer.replaced.is_set() => drop(outcome?),
                        Ok(applied) => {
                            let enforced = v1::Enforced {
                                revision: applied.revision,
                                state_hash: applied.state_hash.to_vec(),
                                epoch: applied.epoch,
                            };
                            reports.send(report(Kind::Enforced(enforced))).await?;
                        }
                        Err(error) => {
                            self.metrics.policy_refused();
                            let reason = format!("{error:#}");
                            tracing::error!(revision, reason, "an update is refused whole; what is in force stays");
                            reports.send(report(Kind::Refused(v1::Refused { revision, reason }))).await?;
                        }
                    }
                }
                Ok(()) = self.node_renewed.changed() => return Ok(()),
                // The agent that replaced this one speaks for the node.
                _ = status_due.tick(), if !self.enforcer.replaced.is_set() => {
                    reports.send(report(Kind::Status(self.status.report()))).await?;
                }
                _ = edges_due.tick() => {
                    for news in self.edges.news(&mut told) {
                        reports.send(report(Kind::Seen(news))).await?;
                    }
                }
                denial = denials.recv() => {
                    let message = gather(denial, &mut denials);
                    reports.send(report(Kind::Denials(message))).await?;
                }
            }
        }
    }
}

fn report(kind: Kind) -> v1::AgentReport {
    v1::AgentReport { kind: Some(kind) }
}

fn gather(
    first: Result<Denial, tokio::sync::broadcast::error::RecvError>,
    more: &mut tokio::sync::broadcast::Receiver<Denial>,
) -> v1::Denials {
    use tokio::sync::broadcast::error::{RecvError, TryRecvError};
    let mut message = v1::Denials::default();
    let mut take = |denial: Denial| match denial {
        Denial::Denied(record) => {
            if let Ok(json) = serde_json::to_string(record.as_ref()) {
                message.records.push(json);
            }
        }
        Denial::Suppressed(summary) => message.suppressed += summary.suppressed,
    };
    let mut missed = 0;
    match first {
        Ok(denial) => take(denial),
        Err(RecvError::Lagged(count)) => missed += count,
        Err(RecvError::Closed) => {}
    }
    for _ in 1..DENIALS_A_REPORT {
        match more.try_recv() {
            Ok(denial) => take(denial),
            Err(TryRecvError::Lagged(count)) => missed += count,
            Err(TryRecvError::Empty | TryRecvError::Closed) => break,
        }
    }
    message.suppressed += missed;
    message
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use hauberk_proto::state::{delta, state_hash};
    use hauberk_tls::files::write_private;

    use super::*;

    fn machine(name: &str) -> v1::Resource {
        let message = v1::MeshWorkload {
            namespace: String::new(),
            name: name.to_owned(),
            spiffe_id: format!("spiffe://example.org/machine/{name}"),
            node: name.to_owned(),
            addresses: Vec::new(),
            ports: Vec::new(),
            mode: v1::Mode::Enforce.into(),
            process: Some(v1::mesh_workload::Process::User("a".to_owned())),
        };
        v1::Resource { kind: Some(v1::resource::Kind::Workload(message)) }
    }

    fn state(names: &[&str]) -> BTreeMap<String, v1::Resource> {
        names.iter().map(|name| (format!("workload:machine/{name}"), machine(name))).collect()
    }

    fn owner(node: &str) -> Owner {
        Owner { node: node.to_owned(), trust_domain: "example.org".parse().unwrap() }
    }

    fn open(folder: &Path) -> Enforcer {
        Enforcer::open(
            owner("a"),
            folder,
            AgentMetrics::new().unwrap(),
            Health::new(&[POLICY_CHECK]),
            Replaced::default(),
        )
    }

    /// As the control plane sends it: everything, or what leads from one state to the next.
    fn update(revision: u64, before: Option<&[&str]>, after: &[&str]) -> v1::StateUpdate {
        let after = state(after);
        let (upserts, removals) = delta(&before.map(state).unwrap_or_default(), &after);
        v1::StateUpdate {
            revision,
            full: before.is_none(),
            upserts,
            removals,
            state_hash: state_hash(&after).to_vec(),
            made_at_unix_ms: 0,
            epoch: 1,
        }
    }

    #[test]
    fn a_state_whose_hash_is_not_the_announced_one_is_refused_whole() {
        let folder = tempfile::tempdir().unwrap();
        let enforcer = open(folder.path());
        enforcer.apply(update(1, None, &["a"])).unwrap();
        let with = |change: fn(&mut v1::StateUpdate), mut update: v1::StateUpdate| {
            change(&mut update);
            update
        };
        let cases = [
            ("another hash", with(|u| u.state_hash[0] ^= 1, update(2, None, &["b"]))),
            ("no hash", with(|u| u.state_hash.clear(), update(2, None, &["b"]))),
            ("half a hash", with(|u| u.state_hash.truncate(16), update(2, None, &["b"]))),
            ("one missing", with(|u| u.upserts.truncate(1), update(2, None, &["b", "c"]))),
            ("a full one as a delta", with(|u| u.full = false, update(2, None, &["b"]))),
            (
                "a delta as a full one",
                with(|u| u.full = true, update(2, Some(&["a"]), &["a", "b"])),
            ),
            ("a delta to another state", update(2, Some(&["a", "b"]), &["a", "b", "c"])),
            ("another state of this revision", update(1, None, &["b"])),
        ];
        for (name, update) in cases {
            let other = update.revision == 1;
            let refused = enforcer.apply(update).unwrap_err().to_string();
            let wanted = if other {
                "revision 1 of epoch 1 is not newer than 1 of 1"
            } else {
                "the state's hash is not the one announced"
            };
            assert!(refused.starts_with(wanted), "{name}: {refused}");
            for snapshot in [&enforcer, &open(folder.path())].map(|one| one.sender.borrow().clone())
            {
                assert_eq!((snapshot.revision, &snapshot.resources), (1, &state(&["a"])), "{name}");
            }
        }
    }

    #[test]
    fn a_delta_builds_on_what_is_in_force_and_outlives_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let enforcer = open(folder.path());
        enforcer.apply(update(1, None, &["a", "b"])).unwrap();
        enforcer.apply(update(2, Some(&["a", "b"]), &["b", "c"])).unwrap();
        for one in [&enforcer, &open(folder.path())] {
            let snapshot = one.sender.borrow().clone();
            assert_eq!((snapshot.revision, &snapshot.resources), (2, &state(&["b", "c"])));
        }
        let older = enforcer.apply(update(1, None, &["a", "b"])).unwrap_err().to_string();
        assert!(older.starts_with("revision 1 of epoch 1 is not newer than 2 of 1"), "{older}");
    }

    #[test]
    fn a_later_epoch_is_newer_whatever_its_revision_and_an_earlier_one_never() {
        let folder = tempfile::tempdir().unwrap();
        let enforcer = open(folder.path());
        let of = |epoch, update| v1::StateUpdate { epoch, ..update };
        let refused = |update| enforcer.apply(update).unwrap_err().to_string();
        enforcer.apply(of(5, update(609, None, &["a"]))).unwrap();
        let told = refused(of(0, update(610, None, &["b"])));
        assert!(told.starts_with("revision 610 of epoch 0 is not newer than 609 of 5"), "{told}");
        let told = refused(of(4, update(610, None, &["b"])));
        assert!(told.starts_with("revision 610 of epoch 4 is not newer than 609 of 5"), "{told}");
        assert!(told.contains("--new-epoch") && told.contains("hauberk-state"), "{told}");
        let told = refused(of(6, update(10, Some(&["a"]), &["b"])));
        assert_eq!(told, "the first update of an epoch is not full");
        for one in [&enforcer, &open(folder.path())] {
            let snapshot = one.sender.borrow().clone();
            assert_eq!((snapshot.epoch, snapshot.revision), (5, 609));
        }
        // Also one with the same number and content.
        for (epoch, revision) in [(6, 609), (7, 10), (7, 11)] {
            enforcer.apply(of(epoch, update(revision, None, &["a"]))).unwrap();
            for one in [&enforcer, &open(folder.path())] {
                let snapshot = one.sender.borrow().clone();
                assert_eq!((snapshot.epoch, snapshot.revision), (epoch, revision));
            }
        }
        // What another agent has kept counts alike.
        enforcer.sender.send_replace(Arc::new(Snapshot::default().of_epoch(6)));
        enforcer.take_up();
        assert_eq!(enforcer.sender.borrow().epoch, 7);
    }

    #[test]
    fn an_agent_that_has_its_place_back_keeps_the_newer_of_two_states() {
        let folder = tempfile::tempdir().unwrap();
        let (before, next) = (open(folder.path()), open(folder.path()));
        let kept = || {
            let kept = kept::load(&before.path, Some("a")).unwrap();
            kept.map(|(owner, snapshot)| (owner.node, snapshot.revision))
        };
        before.replaced.set();
        before.apply(update(1, None, &["a"])).unwrap();
        assert_eq!(kept(), None, "the folder is the next one's");
        before.take_up();
        assert_eq!(kept(), Some(("a".to_owned(), 1)));
        next.apply(update(2, None, &["a", "b"])).unwrap();
        before.take_up();
        let snapshot = before.sender.borrow().clone();
        assert_eq!((snapshot.revision, &snapshot.resources), (2, &state(&["a", "b"])));
        write_private(&before.path, b"damaged").unwrap();
        before.take_up();
        assert_eq!(kept(), Some(("a".to_owned(), 2)));
    }
}
