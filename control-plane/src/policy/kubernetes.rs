//! What the Kubernetes API says, as revisions that all replicas of the control plane agree on.
//!
//! One bad object stops no other: a policy that is not accepted is as it was when it last was, which its status
//! keeps for every replica alike, or allows nothing and enforces. Only for a Guardrail that was never
//! accepted the whole state waits, since without it more would be allowed than somebody wanted.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    identity::TrustDomain,
    manifest::{self, Located},
    policy::{
        AccessPolicy, Mode, Object, PolicyRef, ProcessSelector,
        resolve::{
            Declared, MeshWorkload, ResolveError, Resolved, Unresolved, resolve, settle_addresses,
        },
    },
};
use hauberk_kubernetes::{Agreement, Cluster, ManifestObject, Shared, Snapshot};
use hauberk_telemetry::{Health, State as HealthState};
use tokio::sync::watch;

use super::{
    Publisher, chain,
    publish::{Counts, State},
    status::{ObjectState, matches, source_of},
};

/// Changes that come together make one revision.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// When agreeing failed, or another replica knows more, it is looked at again after this.
const RETRY: Duration = Duration::from_secs(1);

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

/// What is wrong with each object, by its source.
type Errors = BTreeMap<String, Vec<String>>;

/// What each policy is about.
type Matches = BTreeMap<PolicyRef, (usize, BTreeSet<String>)>;

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
        let (outcome, errors) = self.resolve(&snapshot);
        let lines: Vec<String> = errors.values().flatten().cloned().collect();
        let Some((resolved, counts, taken)) = outcome else {
            // The last state stays in force until somebody mends the object.
            self.tell(&snapshot.objects, &errors, None, self.publisher.current().revision);
            self.publisher.set_errors(lines);
            return true;
        };
        let unresolved = resolved.unresolved.clone();
        let matched = matches(&resolved);
        let Snapshot { objects, services, namespaces, nodes, notes, seen, .. } = snapshot;
        let mut state = State::new(resolved, services, namespaces, nodes, counts);
        state.warnings.extend(notes.into_iter().chain(taken));
        match self.shared.agree(&hex::encode(state.hash), &seen).await {
            Ok(Agreement::Revision(revision)) => {
                self.behind = None;
                self.publisher.put(revision, state);
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
            since.insert(source.clone(), (object.text.clone(), first));
            let is_policy = matches!(object.kind, "AccessPolicy" | "Guardrail");
            let matched = resolved.and_then(|(matched, _)| {
                matched
                    .iter()
                    .find(|(policy, _)| source_of(policy) == source)
                    .map(|(_, it)| it.clone())
            });
            ObjectState {
                errors: errors.get(&source).cloned().unwrap_or_default(),
                unresolved: resolved
                    .into_iter()
                    .flat_map(|(_, unresolved)| unresolved)
                    .filter(|unresolved| source_of(&unresolved.policy) == source)
                    .map(|unresolved| unresolved.problem.clone())
                    .collect(),
                since: first,
                matched: is_policy.then(|| matched.unwrap_or_default()),
                object: object.clone(),
            }
        });
        let states: Vec<ObjectState> = states.collect();
        self.since = since;
        self.states.send_replace(Arc::new(states));
    }

    /// Reads and resolves everything, leaving out what is wrong; the errors say what that is. Nothing if
    /// that would allow more than somebody wanted.
    fn resolve(&self, snapshot: &Snapshot) -> (Option<(Resolved, Counts, Vec<String>)>, Errors) {
        let mut errors = Errors::new();
        let Some(mut objects) = read(&snapshot.objects, &mut errors) else {
            return (None, errors);
        };
        // Such as a Workload of a machine that is not there: it is left out, and nothing else.
        while let Err(found) = manifest::check_set(&objects) {
            let before = objects.len();
            objects.retain(|object| !found.iter().any(|error| error.source == object.source));
            for error in &found {
                errors.entry(error.source.clone()).or_default().push(error.to_string());
            }
            if objects.len() == before {
                return (None, errors);
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
                Ok(mut resolved) => {
                    // Pods have what the API server says, before anybody's word.
                    let is_pod = |workload: &MeshWorkload| {
                        matches!(workload.process, ProcessSelector::Pod { .. })
                    };
                    resolved.workloads.sort_by_key(|workload| !is_pod(workload));
                    let taken = settle_addresses(&mut resolved.workloads);
                    // One that is left without any address is none that an agent would take.
                    resolved.workloads.retain(|workload| {
                        is_pod(workload)
                            || workload.process.own_addresses().is_none_or(|own| !own.is_empty())
                    });
                    let counts = Counts {
                        policies: declared.policies.len(),
                        guardrails: declared.guardrails.len(),
                    };
                    return (Some((resolved, counts, taken)), errors);
                }
                Err(ResolveError::Test { policy, test }) => {
                    let source = source_of(&policy);
                    let found = snapshot.objects.iter().find(|object| object.source() == source);
                    let last = found.and_then(last_accepted);
                    let again = errors.contains_key(&source);
                    errors.entry(source.clone()).or_default().push(format!("{source}: {test}"));
                    for known in declared.policies.iter_mut().filter(|known| known.name == policy) {
                        match &last {
                            Some(Object::AccessPolicy(last)) if !again => known.clone_from(last),
                            // Its examples go as well, or it would never end.
                            Some(_) | None => deny(known),
                        }
                    }
                }
                Err(error @ ResolveError::Name { .. }) => {
                    errors.entry(String::new()).or_default().push(chain(&error));
                    return (None, errors);
                }
            }
        }
    }
}

/// Reads every object. What is not accepted is as it was when it last was. Nothing if that would allow more
/// than somebody wanted.
fn read(objects: &[ManifestObject], errors: &mut Errors) -> Option<Vec<Located<Object>>> {
    let mut read = Vec::new();
    for object in objects {
        let source = object.source();
        match manifest::parse(&source, &object.text) {
            Ok(found) => read.extend(found),
            Err(found) => {
                let lines = found.iter().map(ToString::to_string);
                errors.entry(source.clone()).or_default().extend(lines);
                match last_accepted(object) {
                    Some(value) => read.push(Located { source, line: 1, value }),
                    None if object.kind == "Guardrail" => return None,
                    None => {}
                }
            }
        }
    }
    Some(read)
}

/// The object as it was when it was last accepted.
fn last_accepted(object: &ManifestObject) -> Option<Object> {
    let text = object.status.last_accepted.as_deref()?;
    let mut found = manifest::parse(&object.source(), text).ok()?.into_iter();
    found.next().map(|found| found.value)
}

/// What nobody has ever accepted allows nothing, and does not take enforcement away.
fn deny(policy: &mut AccessPolicy) {
    policy.rules = Vec::new();
    policy.tests = Vec::new();
    policy.mode = Mode::Enforce;
}
