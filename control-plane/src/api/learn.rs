//! What policies are learned from: the edges that agents told of, and how each stands now.

use std::collections::{BTreeMap, HashSet};

use hauberk_core::{
    identity::SpiffeId,
    learn::{Edge, End},
    policy::Request as Question,
};
use hauberk_proto::{
    convert::seen_message,
    v1::{self, Standing, resource::Kind},
};

use super::Shared;
use crate::{policy::Published, seen::Sighting};

pub(super) fn learn(shared: &Shared) -> v1::LearnResponse {
    let published = shared.publisher.current();
    let registered: HashSet<&SpiffeId> =
        published.workloads.iter().map(|workload| &workload.identity).collect();
    let sightings = shared.fleet.seen().sightings();
    let destinations = destinations(&published, &sightings);
    let edges = sightings
        .into_iter()
        .map(|Sighting { node, edge, seen, vouched }| {
            let (standing, policy) = standing(&published, &registered, &edge);
            v1::LearnedEdge {
                node,
                seen: Some(seen_message(&edge, &seen)),
                standing: standing.into(),
                policy,
                vouched,
            }
        })
        .collect();
    v1::LearnResponse {
        revision: published.revision,
        edges,
        gaps: shared.fleet.seen().gaps(),
        destinations,
        policies: published.policy_names.iter().cloned().collect(),
        shared_identities: published.shared_identities.clone(),
        forgotten_nodes: shared.fleet.seen().forgotten_nodes(),
    }
}

/// What the policies say of an edge now.
fn standing(
    published: &Published,
    registered: &HashSet<&SpiffeId>,
    edge: &Edge,
) -> (Standing, String) {
    let Some((source, destination)) = edge.identities() else {
        return (Standing::Open, String::new());
    };
    // Which policies bind to it, nobody can say.
    if !registered.contains(destination) {
        return (Standing::Gone, String::new());
    }
    let question = Question { source, destination, port: edge.port, now: hauberk_tls::now() };
    if let Some(guardrail) = published.table.guardrail_for(question) {
        return (Standing::Guarded, guardrail.to_string());
    }
    match published.table.rule_for(question) {
        Some(allowed) => (Standing::Allowed, allowed.policy.to_string()),
        None => (Standing::Open, String::new()),
    }
}

/// Who answers for the edges' destinations, as their policies say, and how strict those are.
fn destinations(published: &Published, sightings: &[Sighting]) -> Vec<v1::LearnedDestination> {
    let wanted: HashSet<&str> = sightings
        .iter()
        .filter_map(|one| match &one.edge.destination {
            End::Identity(id) => Some(id.as_str()),
            End::Address(_) => None,
        })
        .collect();
    let mut found: BTreeMap<&str, v1::LearnedDestination> = BTreeMap::new();
    for resource in published.resources.values() {
        let Some(Kind::Policy(policy)) = &resource.kind else { continue };
        if !wanted.contains(policy.destination.as_str()) {
            continue;
        }
        let known = found.entry(&policy.destination).or_insert_with(|| v1::LearnedDestination {
            spiffe_id: policy.destination.clone(),
            owner: policy.owner.clone(),
            mode: policy.mode,
        });
        if policy.mode != i32::from(v1::Mode::Audit) {
            known.mode = policy.mode;
        }
    }
    found.into_values().collect()
}
