//! What the Kubernetes API says, as revisions that all replicas of the control plane agree on.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{identity::TrustDomain, policy::resolve::Unresolved};
use hauberk_kubernetes::{Agreement, Cluster, ManifestObject, Shared, Snapshot};
use hauberk_telemetry::{Health, State as HealthState};
use tokio::sync::watch;

use super::{
    Publisher, chain,
    judge::{Accepted, Errors, Matches, judge, state_of},
    publish::{State, Version},
    status::{ObjectState, matches},
};

/// Changes that come together make one revision.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// When agreeing failed, or another replica knows more, it is looked at again after this.
const RETRY: Duration = Duration::from_secs(1);

/// How often one looks whether the numbering is still the same.
const EPOCH_LOOK: Duration = Duration::from_secs(10);

/// Longer than any watch lags behind.
const BEHIND_FOR_LONG: Duration = Duration::from_secs(10);

/// The name of the health check.
pub(crate) const HEALTH_CHECK: &str = "kubernetes";

/// Follows the Kubernetes API and publishes.
pub(crate) struct Follower {
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) shared: Shared,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) health: Health,
    /// The text of each object, and the revision in which it is in force.
    pub(crate) since: BTreeMap<String, (String, u64)>,
    /// Since when another replica knows more.
    pub(crate) behind: Option<Instant>,
    /// What became of each.
    pub(crate) states: watch::Sender<Arc<Vec<ObjectState>>>,
}

impl Follower {
    /// Runs until the program ends.
    pub(crate) async fn run(mut self) {
        let mut changes = self.cluster.changes();
        loop {
            changes.mark_unchanged();
            let unlisted = self.cluster.unlisted();
            let settled = if unlisted.is_empty() {
                self.take_up().await
            } else {
                let text = format!("waiting for the first list of {}", unlisted.join(", "));
                self.health.set(HEALTH_CHECK, HealthState::NotReady(text));
                true
            };
            tokio::select! {
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    tokio::time::sleep(DEBOUNCE).await;
                }
                () = tokio::time::sleep(RETRY), if !settled => {}
                () = self.another_epoch(), if settled => {}
            }
        }
    }

    /// Done when somebody has made the replicas' numbering begin anew, by deleting what they agreed on.
    async fn another_epoch(&self) {
        loop {
            tokio::time::sleep(EPOCH_LOOK).await;
            let current = self.publisher.current();
            match self.shared.epoch().await {
                Ok(epoch) if current.revision > 0 && epoch != Some(current.epoch) => {
                    tracing::warn!(
                        "the numbering of the revisions begins anew: hauberk-state was deleted"
                    );
                    return;
                }
                // Whoever agrees on the next change tells of it.
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Returns whether there is nothing to try again.
    async fn take_up(&mut self) -> bool {
        let snapshot = self.cluster.snapshot();
        let (accepted, errors) = judge(&snapshot, &self.trust_domain);
        let lines: Vec<String> = errors.values().flatten().cloned().collect();
        let Some(Accepted { resolved, counts, taken }) = accepted else {
            // The last state stays in force until somebody mends the object.
            self.tell(&snapshot.objects, &errors, None, self.publisher.current().revision);
            self.publisher.set_errors(lines);
            return true;
        };
        let unresolved = resolved.unresolved.clone();
        let matched = matches(&resolved);
        let Snapshot {
            objects,
            services,
            namespaces,
            nodes,
            places,
            notes,
            seen,
            shared_identities,
            ..
        } = snapshot;
        let mut state = State::new(resolved, services, namespaces, places, nodes, counts);
        state.warnings.extend(notes.into_iter().chain(taken).chain(shared_identities.clone()));
        state.shared_identities = shared_identities;
        match self.shared.agree(&hex::encode(state.hash), &seen).await {
            Ok(Agreement::Revision { epoch, revision }) => {
                self.behind = None;
                if self.publisher.current().epoch != epoch {
                    // Its numbers mean nothing any more.
                    self.since.clear();
                }
                self.publisher.put(Version { epoch, revision }, state);
                self.publisher.set_errors(lines);
                self.tell(&objects, &errors, Some((&matched, &unresolved)), revision);
                self.health.set(HEALTH_CHECK, HealthState::Ready);
                true
            }
            Ok(Agreement::Behind(kinds)) => {
                tracing::debug!(?kinds, "another replica has seen more");
                self.cluster.list_anew(&kinds);
                let since = *self.behind.get_or_insert_with(Instant::now);
                if since.elapsed() > BEHIND_FOR_LONG {
                    let text =
                        "another replica has seen more of the Kubernetes API, for a long time";
                    tracing::warn!("{text}");
                    self.health.set(HEALTH_CHECK, HealthState::NotReady(text.to_owned()));
                }
                false
            }
            Err(error) => {
                let text = format!("the replicas' revision: {}", chain(&error));
                tracing::warn!(error = %chain(&error), "the revision could not be agreed on");
                if self.publisher.current().revision == 0 {
                    self.health.set(HEALTH_CHECK, HealthState::NotReady(text));
                }
                false
            }
        }
    }

    /// For the objects' statuses.
    fn tell(
        &mut self,
        objects: &[ManifestObject],
        errors: &Errors,
        resolved: Option<(&Matches, &[Unresolved])>,
        revision: u64,
    ) {
        let mut since = BTreeMap::new();
        let states = objects.iter().map(|object| {
            let source = object.source();
            let before = self.since.get(&source).filter(|(text, _)| *text == object.text);
            let first = before.map_or(revision, |(_, revision)| *revision);
            since.insert(source, (object.text.clone(), first));
            state_of(object, errors, resolved, first)
        });
        let states: Vec<ObjectState> = states.collect();
        self.since = since;
        self.states.send_replace(Arc::new(states));
    }
}
