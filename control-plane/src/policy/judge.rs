//! What becomes of custom resources: which of them make the state, and what is wrong with the others.
//!
//! One bad object stops no other: a policy that is not accepted is as it was when it last was, which its status
//! keeps for every replica alike, or allows nothing and enforces. Only for a Guardrail that was never
//! accepted the whole state waits, since without it more would be allowed than somebody wanted.

use std::collections::{BTreeMap, BTreeSet};

use hauberk_core::{
    identity::TrustDomain,
    manifest::{self, Located},
    policy::{
        AccessPolicy, Mode, Object, PolicyRef, ProcessSelector,
        resolve::{
            Declared, MeshWorkload, ResolveError, Resolved, Unresolved, resolve, settle_addresses,
        },
        service_ports::note_service_ports,
    },
};
use hauberk_kubernetes::{ManifestObject, Snapshot};

use super::{
    chain,
    publish::Counts,
    status::{ObjectState, source_of},
};

/// What is wrong with each object, by its source.
pub(super) type Errors = BTreeMap<String, Vec<String>>;

/// What each policy is about.
pub(super) type Matches = BTreeMap<PolicyRef, (usize, BTreeSet<String>)>;

/// What is left when everything that is wrong is left out.
pub(super) struct Accepted {
    pub(super) resolved: Resolved,
    pub(super) counts: Counts,
    /// Addresses that two claim, for people.
    pub(super) taken: Vec<String>,
}

/// Reads and resolves everything, leaving out what is wrong; the errors say what that is. Nothing if
/// that would allow more than somebody wanted.
pub(super) fn judge(snapshot: &Snapshot, trust_domain: &TrustDomain) -> (Option<Accepted>, Errors) {
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
    declared.service_accounts.clone_from(&snapshot.service_accounts);
    loop {
        match resolve(&declared, trust_domain) {
            Ok(mut resolved) => {
                // Pods have what the API server says, before anybody's word.
                let is_pod = |workload: &MeshWorkload| {
                    matches!(workload.process, ProcessSelector::Pod { .. })
                };
                resolved.workloads.sort_by_key(|workload| !is_pod(workload));
                let taken = settle_addresses(&mut resolved.workloads);
                note_service_ports(&mut resolved, &snapshot.services);
                // One that is left without any address is none that an agent would take.
                resolved.workloads.retain(|workload| {
                    is_pod(workload)
                        || workload.process.own_addresses().is_none_or(|own| !own.is_empty())
                });
                let counts = Counts {
                    policies: declared.policies.len(),
                    guardrails: declared.guardrails.len(),
                };
                return (Some(Accepted { resolved, counts, taken }), errors);
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

/// What is known of an object, for its status; `since` is the revision in which it is in force as it is now.
pub(super) fn state_of(
    object: &ManifestObject,
    errors: &Errors,
    resolved: Option<(&Matches, &[Unresolved])>,
    since: u64,
) -> ObjectState {
    let source = object.source();
    let errors = errors.get(&source).cloned().unwrap_or_default();
    let is_policy = matches!(object.kind, "AccessPolicy" | "Guardrail");
    let matched = resolved.and_then(|(matched, _)| {
        matched.iter().find(|(policy, _)| source_of(policy) == source).map(|(_, it)| it.clone())
    });
    ObjectState {
        falls_back: !errors.is_empty() && last_accepted(object).is_some(),
        errors,
        unresolved: resolved
            .into_iter()
            .flat_map(|(_, unresolved)| unresolved)
            .filter(|unresolved| source_of(&unresolved.policy) == source)
            .map(|unresolved| unresolved.problem.clone())
            .collect(),
        since,
        matched: is_policy.then(|| matched.unwrap_or_default()),
        object: object.clone(),
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
