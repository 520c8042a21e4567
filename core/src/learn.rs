//! Policies from connections that were seen: they allow exactly those, and nothing else.
//!
//! Edges come in, policies go out, and as text they are manifests that [`crate::manifest`] and the
//! custom resources take. What no policy can speak about goes out as well: nothing is dropped
//! silently.

mod text;

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    net::IpAddr,
};

pub use text::{json, yaml};

use crate::{
    identity::{IdentityKind, ResourceName, SpiffeId},
    policy::{Mode, Owner, PeerSelector, Target},
    time::Timestamp,
};

/// The most rules of one policy, and the most ports of one rule, as in custom resources.
const MAX_RULES: usize = 256;
const MAX_PORTS: usize = 256;

/// Where policies about machines go, which have no namespace: every cluster has this one.
const NAMESPACE_OF_MACHINES: &str = "default";

/// One end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum End {
    /// Somebody of the mesh.
    Identity(SpiffeId),
    /// Somebody outside of it. An address identifies nobody: it is for people to read.
    Address(IpAddr),
}

/// What became of the connections of an edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Outcome {
    /// They passed, only because somebody is audited and not enforced.
    WouldDeny,
    /// They were refused for want of a rule.
    Denied,
    /// They are older than the capture, and pass in clear. Nobody has proven anything: the caller is who has its
    /// address.
    Older,
}

/// Who connects to whom on which port, and no policy allows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Edge {
    /// Who connects.
    pub source: End,
    /// To whom.
    pub destination: End,
    /// To which port of it.
    pub port: u16,
    /// What became of it.
    pub outcome: Outcome,
}

impl Edge {
    /// Both ends, if both are of the mesh: only then a policy can allow it.
    #[must_use]
    pub fn identities(&self) -> Option<(&SpiffeId, &SpiffeId)> {
        match (&self.source, &self.destination) {
            (End::Identity(source), End::Identity(destination)) => Some((source, destination)),
            (End::Address(_), _) | (_, End::Address(_)) => None,
        }
    }
}

/// How often an edge was seen, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Its connections.
    pub count: u64,
    /// When the first of them was opened.
    pub first: Timestamp,
    /// When the last of them was opened.
    pub last: Timestamp,
}

impl Seen {
    /// One connection.
    #[must_use]
    pub fn once(at: Timestamp) -> Self {
        Self { count: 1, first: at, last: at }
    }

    /// Adds other connections.
    pub fn add(&mut self, others: &Self) {
        self.count = self.count.saturating_add(others.count);
        self.stretch(others);
    }

    /// Joins what somebody else has heard of the same connections: none is counted twice.
    pub fn join(&mut self, same: &Self) {
        self.count = self.count.max(same.count);
        self.stretch(same);
    }

    fn stretch(&mut self, other: &Self) {
        self.first = self.first.min(other.first);
        self.last = self.last.max(other.last);
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.count {
            1 => write!(f, "1 connection, at {}", self.last),
            count => write!(f, "{count} connections, the last at {}", self.last),
        }
    }
}

/// What is known of the policies that are there.
#[derive(Debug, Clone, Default)]
pub struct Existing {
    /// Each as `namespace/name`: none of them is replaced.
    pub names: BTreeSet<String>,
    /// Who answers for a destination, and the mode of its policies.
    pub owners: BTreeMap<SpiffeId, (Owner, Mode)>,
}

/// A policy that allows what was seen of one destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LearnedPolicy {
    /// That of the destination.
    pub namespace: ResourceName,
    /// One that no other policy has: a DNS label.
    pub name: ResourceName,
    /// Who answers for the destination; none if no policy says so yet.
    pub owner: Option<Owner>,
    /// That of the destination's other policies, so that one more does not begin to enforce.
    pub mode: Mode,
    /// The destination.
    pub target: Target,
    /// At least one; in the order of their names.
    pub rules: Vec<LearnedRule>,
}

/// What is allowed to one caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LearnedRule {
    /// Unique in its policy: a DNS label.
    pub name: ResourceName,
    /// At least one.
    pub ports: BTreeSet<u16>,
    /// The caller.
    pub from: PeerSelector,
    /// What it rests on, over all ports.
    pub seen: Seen,
    /// How many of these connections are older than the capture ([`Outcome::Older`]).
    pub older: u64,
}

/// What comes of edges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Learned {
    /// One for each destination, more if it has very many callers; always in the same order.
    pub policies: Vec<LearnedPolicy>,
    /// Those that no manifest can name: an end is no workload and no machine.
    pub unspeakable: Vec<Edge>,
}

/// What would allow these edges, beside the policies that are there.
#[must_use]
pub fn learn(seen: &BTreeMap<Edge, Seen>, existing: &Existing) -> Learned {
    let mut learned = Learned::default();
    let mut destinations: BTreeMap<&SpiffeId, Destination<'_>> = BTreeMap::new();
    for (edge, seen) in seen {
        if note(&mut destinations, edge, *seen).is_none() {
            learned.unspeakable.push(edge.clone());
        }
    }
    let mut taken = existing.names.clone();
    for (id, Destination { place, callers }) in destinations {
        let (owner, mode) = match existing.owners.get(id) {
            Some((owner, mode)) => (Some(owner.clone()), *mode),
            None => (None, Mode::Enforce),
        };
        let full = |name: &ResourceName| format!("{}/{name}", place.namespace);
        for rules in rules(callers.into_values()).chunks(MAX_RULES) {
            let name = unused(&place.name, |name| taken.contains(&full(name)));
            taken.insert(full(&name));
            learned.policies.push(LearnedPolicy {
                namespace: place.namespace.clone(),
                name,
                owner: owner.clone(),
                mode,
                target: place.target.clone(),
                rules: rules.to_vec(),
            });
        }
    }
    learned
}

struct Destination<'a> {
    place: Place,
    callers: BTreeMap<&'a SpiffeId, Caller>,
}

/// How a manifest speaks about a destination.
struct Place {
    namespace: ResourceName,
    target: Target,
    /// Of the policy.
    name: ResourceName,
}

struct Caller {
    from: PeerSelector,
    /// Of the rule.
    name: ResourceName,
    ports: BTreeSet<u16>,
    seen: Seen,
    older: u64,
}

/// Notes an edge with its destination; nothing if no manifest can name both of its ends.
fn note<'a>(
    destinations: &mut BTreeMap<&'a SpiffeId, Destination<'a>>,
    edge: &'a Edge,
    seen: Seen,
) -> Option<()> {
    let (source, destination) = edge.identities()?;
    let place = place(destination)?;
    let (from, name) = caller(source, destination)?;
    let known = destinations
        .entry(destination)
        .or_insert_with(|| Destination { place, callers: BTreeMap::new() });
    let older = if edge.outcome == Outcome::Older { seen.count } else { 0 };
    match known.callers.entry(source) {
        Entry::Vacant(entry) => {
            entry.insert(Caller { from, name, ports: BTreeSet::from([edge.port]), seen, older });
        }
        Entry::Occupied(mut entry) => {
            let caller = entry.get_mut();
            caller.ports.insert(edge.port);
            caller.seen.add(&seen);
            caller.older = caller.older.saturating_add(older);
        }
    }
    Some(())
}

fn place(destination: &SpiffeId) -> Option<Place> {
    match destination.kind() {
        IdentityKind::Workload { namespace, service_account } => Some(Place {
            namespace: namespace.parse().ok()?,
            target: Target::ServiceAccount(service_account.parse().ok()?),
            name: ResourceName::label_of(&format!("learned-{service_account}")),
        }),
        IdentityKind::Machine { name } => Some(Place {
            namespace: ResourceName::label_of(NAMESPACE_OF_MACHINES),
            target: Target::Machine(name.parse().ok()?),
            name: ResourceName::label_of(&format!("learned-machine-{name}")),
        }),
        IdentityKind::Node { .. } | IdentityKind::ControlPlane | IdentityKind::Other => None,
    }
}

/// How a rule names a caller, and is named after it.
fn caller(source: &SpiffeId, destination: &SpiffeId) -> Option<(PeerSelector, ResourceName)> {
    // What a name alone means is of the destination's own trust domain.
    let is_ours = source.trust_domain() == destination.trust_domain();
    let foreign = || {
        let (_, name) = source.as_str().split_once("://").unwrap_or_default();
        (PeerSelector::SpiffeId(source.clone()), ResourceName::label_of(name))
    };
    match source.kind() {
        IdentityKind::Workload { namespace, service_account } => {
            let rule = ResourceName::label_of(&format!("{namespace}-{service_account}"));
            // Of a foreign one, too: no manifest takes an ID with other names.
            let namespace: ResourceName = namespace.parse().ok()?;
            let name: ResourceName = service_account.parse().ok()?;
            Some(if is_ours {
                (PeerSelector::ServiceAccount { namespace, name }, rule)
            } else {
                foreign()
            })
        }
        IdentityKind::Machine { name } if is_ours => {
            let rule = ResourceName::label_of(&format!("machine-{name}"));
            Some((PeerSelector::Machine { name: name.parse().ok()? }, rule))
        }
        IdentityKind::Machine { .. }
        | IdentityKind::Node { .. }
        | IdentityKind::ControlPlane
        | IdentityKind::Other => Some(foreign()),
    }
}

/// The rules of one destination, in the order of their names.
fn rules(callers: impl Iterator<Item = Caller>) -> Vec<LearnedRule> {
    let mut rules: BTreeMap<ResourceName, LearnedRule> = BTreeMap::new();
    for Caller { from, name, ports, seen, older } in callers {
        let ports: Vec<u16> = ports.into_iter().collect();
        for some in ports.chunks(MAX_PORTS) {
            let name = unused(&name, |name| rules.contains_key(name));
            let ports = some.iter().copied().collect();
            let rule = LearnedRule { name: name.clone(), ports, from: from.clone(), seen, older };
            rules.insert(name, rule);
        }
    }
    rules.into_values().collect()
}

/// The name, or the first one with a number that nobody has.
fn unused(name: &ResourceName, is_taken: impl Fn(&ResourceName) -> bool) -> ResourceName {
    let (mut unused, mut number) = (name.clone(), 1_usize);
    while is_taken(&unused) {
        number += 1;
        unused = name.numbered(number);
    }
    unused
}
