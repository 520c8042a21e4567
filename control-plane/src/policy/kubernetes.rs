//! What the Kubernetes API says, as revisions that all replicas of the control plane agree on.
//!
//! One bad object stops no other: an AccessPolicy that cannot be read is as it was before, or allows
//! nothing. Only for a Guardrail that was never read the whole state waits, since without it more would be
//! allowed than somebody wanted.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use hauberk_core::{
    identity::TrustDomain,
    manifest::{self, Located},
    policy::{
        Object,
        resolve::{Declared, ResolveError, Resolved, resolve},
    },
};
use hauberk_kubernetes::{Agreement, Cluster, ManifestObject, Shared, Snapshot};
use hauberk_telemetry::{Health, State as HealthState};

use super::{
    Publisher, chain,
    publish::{Counts, State},
};

/// Changes that come together make one revision.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// When agreeing failed, or another replica knows more, it is looked at again after this.
const RETRY: Duration = Duration::from_secs(1);

/// The name of the health check.
pub(crate) const HEALTH_CHECK: &str = "kubernetes";

/// Follows the Kubernetes API and publishes.
pub(crate) struct Follower {
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) shared: Shared,
    pub(crate) trust_domain: TrustDomain,
    pub(crate) health: Health,
    /// The last good version of each object, by its source.
    pub(crate) good: BTreeMap<String, Located<Object>>,
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
            }
        }
    }

    /// Returns whether there is nothing to try again.
    async fn take_up(&mut self) -> bool {
        let snapshot = self.cluster.snapshot();
        let (resolved, counts, errors) = match self.resolve(&snapshot) {
            Ok(resolved) => resolved,
            Err(errors) => {
                // The last state stays in force until somebody mends the object.
                self.publisher.set_errors(errors);
                return true;
            }
        };
        let mut state = State::new(resolved, snapshot.services, snapshot.nodes, counts);
        state.warnings.extend(snapshot.notes);
        let agreed = self.shared.agree(&hex::encode(state.hash), &snapshot.seen).await;
        match agreed {
            Ok(Agreement::Revision(revision)) => {
                self.publisher.put(revision, state);
                self.publisher.set_errors(errors);
                self.health.set(HEALTH_CHECK, HealthState::Ready);
                true
            }
            Ok(Agreement::Behind) => {
                tracing::debug!("another replica has seen more, waiting to catch up");
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

    /// Reads and resolves everything, leaving out what is wrong; the errors say what that is.
    fn resolve(
        &mut self,
        snapshot: &Snapshot,
    ) -> Result<(Resolved, Counts, Vec<String>), Vec<String>> {
        let mut errors = Vec::new();
        let mut objects = self.read(&snapshot.objects, &mut errors)?;
        // Such as a Workload of a machine that is not there: it is left out, and nothing else.
        while let Err(found) = manifest::check_set(&objects) {
            let before = objects.len();
            objects.retain(|object| !found.iter().any(|error| error.source == object.source));
            errors.extend(found.iter().map(ToString::to_string));
            if objects.len() == before {
                return Err(errors);
            }
        }
        let mut declared = Declared::default();
        for object in objects {
            match object.value {
                Object::AccessPolicy(policy) => declared.policies.push(policy),
                Object::Guardrail(guardrail) => declared.guardrails.push(guardrail),
                Object::Machine(machine) => declared.machines.push(machine),
                Object::Workload(workload) => declared.workloads.push(workload),
            }
        }
        declared.workloads.extend(snapshot.workloads.iter().cloned());
        loop {
            match resolve(&declared, &self.trust_domain) {
                Ok(resolved) => {
                    let counts = Counts {
                        policies: declared.policies.len(),
                        guardrails: declared.guardrails.len(),
                    };
                    return Ok((resolved, counts, errors));
                }
                Err(ResolveError::Test { policy, test }) => {
                    errors.push(format!("AccessPolicy {policy}: {test}"));
                    declared.policies.retain(|other| other.name != policy);
                }
                Err(error @ ResolveError::Name { .. }) => {
                    errors.push(chain(&error));
                    return Err(errors);
                }
            }
        }
    }

    fn read(
        &mut self,
        objects: &[ManifestObject],
        errors: &mut Vec<String>,
    ) -> Result<Vec<Located<Object>>, Vec<String>> {
        let mut read = BTreeMap::new();
        let mut unknown_guardrail = false;
        for object in objects {
            let source = object.source();
            match manifest::parse(&source, &object.text) {
                Ok(found) => read.extend(found.into_iter().map(|found| (source.clone(), found))),
                Err(found) => {
                    errors.extend(found.iter().map(ToString::to_string));
                    match self.good.get(&source) {
                        Some(good) => drop(read.insert(source, good.clone())),
                        None => unknown_guardrail |= object.kind == "Guardrail",
                    }
                }
            }
        }
        if unknown_guardrail {
            return Err(std::mem::take(errors));
        }
        self.good = read.clone();
        Ok(read.into_values().collect())
    }
}
