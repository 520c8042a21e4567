//! Binds what owners declare to identities: selectors become SPIFFE IDs, names become exact peers.
//!
//! The control plane does this, so that an agent never sees a label: it gets policies about
//! identities, and nothing to look up. A target that matches no workload binds to nothing and is
//! reported; it never widens.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use super::{
    AccessPolicy, Guardrail, GuardrailPeers, GuardrailPorts, GuardrailTarget, Machine, Mode, Owner,
    PeerSelector, PolicyRef, ProcessSelector, Rule, Target, Workload,
    examples::{FailedTest, failed_tests},
};
use crate::{
    identity::{IdentityKind, ResourceName, SpiffeId, SpiffeIdError, TrustDomain},
    time::Timestamp,
};

/// A policy bound to one destination identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedPolicy {
    /// The policy it came from.
    pub policy: PolicyRef,
    /// Who answers for the destination.
    pub owner: Owner,
    /// Whether denials are carried out.
    pub mode: Mode,
    /// The destination.
    pub destination: SpiffeId,
    /// What is allowed.
    pub rules: Vec<ResolvedRule>,
}

/// A rule about identities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedRule {
    /// Its name.
    pub name: ResourceName,
    /// At least one.
    pub ports: BTreeSet<u16>,
    /// At least one, ORed.
    pub peers: Vec<PeerMatch>,
    /// When it ends.
    pub not_after: Option<Timestamp>,
}

impl ResolvedRule {
    /// Whether the rule has not ended.
    #[must_use]
    pub fn in_force(&self, now: Timestamp) -> bool {
        self.not_after.is_none_or(|end| now < end)
    }
}

/// Which identities are meant.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerMatch {
    /// This one.
    Exact(SpiffeId),
    /// Every service account of a namespace of a trust domain.
    AnyIn {
        /// The trust domain.
        trust_domain: TrustDomain,
        /// The namespace.
        namespace: ResourceName,
    },
}

impl PeerMatch {
    /// Whether it covers `id`.
    #[must_use]
    pub fn matches(&self, id: &SpiffeId) -> bool {
        match self {
            Self::Exact(exact) => exact == id,
            Self::AnyIn { trust_domain, namespace } => match id.kind() {
                IdentityKind::Workload { namespace: of, .. } => {
                    of == namespace.as_str() && id.trust_domain() == trust_domain
                }
                IdentityKind::Machine { .. }
                | IdentityKind::Node { .. }
                | IdentityKind::ControlPlane
                | IdentityKind::Other => false,
            },
        }
    }
}

impl fmt::Display for PeerMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(id) => write!(f, "{id}"),
            Self::AnyIn { trust_domain, namespace } => {
                write!(f, "any service account of namespace {namespace} in {trust_domain}")
            }
        }
    }
}

/// A guardrail about identities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedGuardrail {
    /// The guardrail it came from.
    pub policy: PolicyRef,
    /// Who answers for it.
    pub owner: Owner,
    /// Why it exists.
    pub reason: Option<String>,
    /// The destinations.
    pub destination: PeerMatch,
    /// The ports.
    pub ports: GuardrailPorts,
    /// Whom it denies.
    pub denies: ResolvedPeers,
}

/// Whom a guardrail denies, as identities.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResolvedPeers {
    /// These.
    From(Vec<PeerMatch>),
    /// Everybody but these.
    UnlessFrom(Vec<PeerMatch>),
}

/// A workload as the mesh knows it: who it is, where it is reached, how its node recognises it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshWorkload {
    /// The namespace it is shown under; none for a machine that speaks for itself.
    pub namespace: Option<ResourceName>,
    /// Its name.
    pub name: ResourceName,
    /// Its identity.
    pub identity: SpiffeId,
    /// The machine it runs on.
    pub node: ResourceName,
    /// Where it is reached.
    pub addresses: BTreeSet<IpAddr>,
    /// What it serves.
    pub ports: BTreeSet<u16>,
    /// What happens to traffic that is not allowed.
    pub mode: Mode,
    /// How its node recognises it.
    pub process: ProcessSelector,
}

impl MeshWorkload {
    /// `namespace/name`, or `machine/name` for a machine, or `namespace/name@uid` for a pod: unique in a
    /// mesh, and no other pod's that has the name after it.
    #[must_use]
    pub fn key(&self) -> String {
        match &self.process {
            ProcessSelector::Pod { uid, .. } => format!("{}@{uid}", self.shown()),
            ProcessSelector::User(_)
            | ProcessSelector::Cgroup(_)
            | ProcessSelector::NetworkNamespace { .. } => self.shown(),
        }
    }

    /// Whether it has the right to its identity. One that has not stays captured, and may do nothing.
    #[must_use]
    pub fn is_entitled(&self) -> bool {
        match &self.process {
            ProcessSelector::Pod { orphaned, .. } => !orphaned,
            ProcessSelector::User(_)
            | ProcessSelector::Cgroup(_)
            | ProcessSelector::NetworkNamespace { .. } => true,
        }
    }

    /// As people write it: `namespace/name`, or `machine/name` for a machine.
    #[must_use]
    pub fn shown(&self) -> String {
        match &self.namespace {
            Some(namespace) => format!("{namespace}/{}", self.name),
            None => format!("machine/{}", self.name),
        }
    }
}

/// Something that resolves, but surely not as its author meant it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unresolved {
    /// The policy.
    pub policy: PolicyRef,
    /// What is unknown, and what follows from it.
    pub problem: String,
}

/// Everything that agents enforce, bound to identities.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolved {
    /// The workloads.
    pub workloads: Vec<MeshWorkload>,
    /// The policies.
    pub policies: Vec<ResolvedPolicy>,
    /// The guardrails.
    pub guardrails: Vec<ResolvedGuardrail>,
    /// What was unknown. Never widens anything.
    pub unresolved: Vec<Unresolved>,
}

/// What owners declare, sorted by kind.
#[derive(Debug, Clone, Default)]
pub struct Declared {
    /// The machines.
    pub machines: Vec<Machine>,
    /// The workloads.
    pub workloads: Vec<Workload>,
    /// The policies.
    pub policies: Vec<AccessPolicy>,
    /// The guardrails.
    pub guardrails: Vec<Guardrail>,
    /// Service accounts that are known to exist, each with its namespace, whether a workload has them now or not: that of a
    /// job between two runs, for one. Those of the workloads need not be among them.
    pub service_accounts: BTreeSet<(ResourceName, ResourceName)>,
}

impl Declared {
    fn has_namespace(&self, namespace: &ResourceName) -> bool {
        self.service_accounts.iter().any(|(of, _)| of == namespace)
    }

    fn has_account(&self, namespace: &str, name: &str) -> bool {
        self.service_accounts
            .iter()
            .any(|(of, known)| of.as_str() == namespace && known.as_str() == name)
    }
}

/// Why nothing is resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// An identity that cannot be built from its names.
    #[error("{object}: no SPIFFE ID can be made of it")]
    Name {
        /// The object.
        object: String,
        /// What is wrong with the ID.
        #[source]
        source: SpiffeIdError,
    },
    /// A test of a policy that does not hold in this trust domain.
    #[error("AccessPolicy {policy}: {test}")]
    Test {
        /// The policy.
        policy: PolicyRef,
        /// The first of its tests that does not hold.
        test: FailedTest,
    },
}

/// Binds everything to identities of `trust_domain`.
///
/// The tests of policies are asked again here: when a manifest is read, nobody knows yet whether a
/// SPIFFE ID in it is one of our own.
///
/// # Errors
/// If a name makes no valid SPIFFE ID (too long, for one), or a test of a policy fails: nothing is
/// resolved then.
pub fn resolve(declared: &Declared, trust_domain: &TrustDomain) -> Result<Resolved, ResolveError> {
    let mut resolved = Resolved::default();
    let mut labels: Vec<&BTreeMap<String, String>> = Vec::new();
    let addresses: BTreeMap<&ResourceName, &BTreeSet<IpAddr>> =
        declared.machines.iter().map(|machine| (&machine.name, &machine.addresses)).collect();
    for workload in &declared.workloads {
        resolved.workloads.push(mesh_workload(workload, &addresses, trust_domain)?);
        labels.push(&workload.labels);
    }
    for machine in &declared.machines {
        if let Some(workload) = mesh_machine(machine, trust_domain)? {
            resolved.workloads.push(workload);
            labels.push(&machine.labels);
        }
    }
    for policy in &declared.policies {
        if let Some(test) = failed_tests(policy, trust_domain)?.into_iter().next() {
            return Err(ResolveError::Test { policy: policy.name.clone(), test });
        }
        bind_policy(policy, declared, &labels, trust_domain, &mut resolved)?;
    }
    for guardrail in &declared.guardrails {
        let bound = bind_guardrail(guardrail, trust_domain)?;
        resolved.guardrails.push(bound);
    }
    Ok(resolved)
}

/// Takes addresses from workloads that others have already, so that no agent has to refuse the state for
/// them: a network namespace's own are nobody else's, and a host's are told apart by ports. The first of the
/// list keeps what it has. Returns what was taken, for people.
pub fn settle_addresses(workloads: &mut [MeshWorkload]) -> Vec<String> {
    enum Owner {
        Whole(String),
        Ports(BTreeMap<u16, String>),
    }
    let mut owners: BTreeMap<IpAddr, Owner> = BTreeMap::new();
    let mut notes = Vec::new();
    for workload in workloads {
        let (name, whole) = (workload.shown(), workload.process.own_addresses().is_some());
        let ports = workload.ports.clone();
        workload.addresses.retain(|address| {
            let holder = match (owners.get_mut(address), whole) {
                (None, true) => {
                    owners.insert(*address, Owner::Whole(name.clone()));
                    return true;
                }
                (None, false) => {
                    let ports = ports.iter().map(|port| (*port, name.clone())).collect();
                    owners.insert(*address, Owner::Ports(ports));
                    return true;
                }
                (Some(Owner::Ports(taken)), false) => {
                    match ports.iter().find_map(|port| taken.get(port)) {
                        Some(holder) => holder.clone(),
                        None => {
                            taken.extend(ports.iter().map(|port| (*port, name.clone())));
                            return true;
                        }
                    }
                }
                (Some(Owner::Ports(taken)), true) => {
                    taken.values().next().cloned().unwrap_or_default()
                }
                (Some(Owner::Whole(holder)), _) => holder.clone(),
            };
            notes.push(format!("{name} claims the address {address}, which {holder} has"));
            false
        });
        if let ProcessSelector::NetworkNamespace { addresses, .. }
        | ProcessSelector::Pod { addresses, .. } = &mut workload.process
        {
            addresses.clone_from(&workload.addresses);
        }
    }
    notes
}

fn mesh_workload(
    workload: &Workload,
    machines: &BTreeMap<&ResourceName, &BTreeSet<IpAddr>>,
    trust_domain: &TrustDomain,
) -> Result<MeshWorkload, ResolveError> {
    let identity = SpiffeId::workload(
        trust_domain,
        workload.namespace.as_str(),
        workload.service_account.as_str(),
    )
    .map_err(|source| ResolveError::Name {
        object: format!("Workload {}/{}", workload.namespace, workload.name),
        source,
    })?;
    let addresses = match workload.process.selector.own_addresses() {
        Some(addresses) => addresses.clone(),
        None => machines.get(&workload.machine).map(|set| (*set).clone()).unwrap_or_default(),
    };
    Ok(MeshWorkload {
        namespace: Some(workload.namespace.clone()),
        name: workload.name.clone(),
        identity,
        node: workload.machine.clone(),
        addresses,
        ports: workload.process.ports.clone(),
        mode: workload.process.mode,
        process: workload.process.selector.clone(),
    })
}

fn mesh_machine(
    machine: &Machine,
    trust_domain: &TrustDomain,
) -> Result<Option<MeshWorkload>, ResolveError> {
    let Some(process) = &machine.workload else { return Ok(None) };
    let identity = machine_id(trust_domain, &machine.name)?;
    Ok(Some(MeshWorkload {
        namespace: None,
        name: machine.name.clone(),
        identity,
        node: machine.name.clone(),
        addresses: machine.addresses.clone(),
        ports: process.ports.clone(),
        mode: process.mode,
        process: process.selector.clone(),
    }))
}

fn machine_id(trust_domain: &TrustDomain, name: &ResourceName) -> Result<SpiffeId, ResolveError> {
    SpiffeId::machine(trust_domain, name.as_str())
        .map_err(|source| ResolveError::Name { object: format!("Machine {name}"), source })
}

fn bind_policy(
    policy: &AccessPolicy,
    declared: &Declared,
    labels: &[&BTreeMap<String, String>],
    trust_domain: &TrustDomain,
    resolved: &mut Resolved,
) -> Result<(), ResolveError> {
    let destinations: BTreeSet<SpiffeId> = resolved
        .workloads
        .iter()
        .zip(labels)
        .filter(|(workload, labels)| targets(policy, workload, labels))
        .map(|(workload, _)| workload.identity.clone())
        .collect();
    let is_between_runs = match &policy.target {
        Target::ServiceAccount(name) => policy
            .name
            .namespace
            .as_ref()
            .is_some_and(|namespace| declared.has_account(namespace.as_str(), name.as_str())),
        Target::Machine(_) | Target::Selector(_) => false,
    };
    if destinations.is_empty() && !is_between_runs {
        resolved.unresolved.push(Unresolved {
            policy: policy.name.clone(),
            problem: "spec.target matches no workload, so the policy allows nothing".to_owned(),
        });
        return Ok(());
    }
    let mut rules = Vec::new();
    for rule in &policy.rules {
        let rule = bind_rule(rule, trust_domain)?;
        note_unknown_peers(policy, &rule, declared, trust_domain, resolved);
        rules.push(rule);
    }
    resolved.policies.extend(destinations.into_iter().map(|destination| ResolvedPolicy {
        policy: policy.name.clone(),
        owner: policy.owner.clone(),
        mode: policy.mode,
        destination,
        rules: rules.clone(),
    }));
    Ok(())
}

/// An owner speaks about destinations of its own namespace only. Machines have no namespace: a
/// policy about a machine names it outright.
fn targets(
    policy: &AccessPolicy,
    workload: &MeshWorkload,
    labels: &BTreeMap<String, String>,
) -> bool {
    match &policy.target {
        Target::Machine(name) => workload.namespace.is_none() && workload.name == *name,
        Target::ServiceAccount(name) => {
            workload.namespace == policy.name.namespace
                && matches!(workload.identity.kind(), IdentityKind::Workload { service_account, .. }
                    if service_account == name.as_str())
        }
        Target::Selector(wanted) => {
            workload.namespace == policy.name.namespace
                && !wanted.is_empty()
                && wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
        }
    }
}

pub(super) fn bind_rule(
    rule: &Rule,
    trust_domain: &TrustDomain,
) -> Result<ResolvedRule, ResolveError> {
    let mut peers = bind_peers(&rule.from, trust_domain)?;
    peers.sort();
    peers.dedup();
    Ok(ResolvedRule {
        name: rule.name.clone(),
        ports: rule.ports.clone(),
        peers,
        not_after: rule.not_after,
    })
}

/// Of other trust domains there is no registry here.
fn note_unknown_peers(
    policy: &AccessPolicy,
    rule: &ResolvedRule,
    declared: &Declared,
    trust_domain: &TrustDomain,
    resolved: &mut Resolved,
) {
    let exists = |id: &SpiffeId| match id.kind() {
        IdentityKind::Workload { namespace, service_account } => {
            declared.has_account(namespace, service_account)
        }
        IdentityKind::Machine { .. }
        | IdentityKind::Node { .. }
        | IdentityKind::ControlPlane
        | IdentityKind::Other => false,
    };
    for peer in &rule.peers {
        let unknown = match peer {
            PeerMatch::Exact(id) => id.trust_domain() == trust_domain && !exists(id),
            PeerMatch::AnyIn { namespace, .. } => !declared.has_namespace(namespace),
        };
        if unknown && !resolved.workloads.iter().any(|workload| peer.matches(&workload.identity)) {
            resolved.unresolved.push(Unresolved {
                policy: policy.name.clone(),
                problem: format!(
                    "rule {} allows {peer}, which no registered workload has",
                    rule.name
                ),
            });
        }
    }
}

fn bind_peers(
    peers: &[PeerSelector],
    trust_domain: &TrustDomain,
) -> Result<Vec<PeerMatch>, ResolveError> {
    peers.iter().map(|peer| bind_peer(peer, trust_domain)).collect()
}

/// The identity or identities that a peer selector means in `trust_domain`.
///
/// # Errors
/// If its names make no valid SPIFFE ID.
pub fn bind_peer(
    peer: &PeerSelector,
    trust_domain: &TrustDomain,
) -> Result<PeerMatch, ResolveError> {
    Ok(match peer {
        PeerSelector::ServiceAccount { namespace, name } => PeerMatch::Exact(
            SpiffeId::workload(trust_domain, namespace.as_str(), name.as_str()).map_err(
                |source| ResolveError::Name {
                    object: format!("serviceAccount {namespace}/{name}"),
                    source,
                },
            )?,
        ),
        PeerSelector::Machine { name } => PeerMatch::Exact(machine_id(trust_domain, name)?),
        PeerSelector::SpiffeId(id) => PeerMatch::Exact(id.clone()),
        PeerSelector::AnyIn { namespace } => {
            PeerMatch::AnyIn { trust_domain: trust_domain.clone(), namespace: namespace.clone() }
        }
    })
}

fn bind_guardrail(
    guardrail: &Guardrail,
    trust_domain: &TrustDomain,
) -> Result<ResolvedGuardrail, ResolveError> {
    let destination = match &guardrail.target {
        GuardrailTarget::Namespace(namespace) => {
            PeerMatch::AnyIn { trust_domain: trust_domain.clone(), namespace: namespace.clone() }
        }
        GuardrailTarget::ServiceAccount { namespace, name } => bind_peer(
            &PeerSelector::ServiceAccount { namespace: namespace.clone(), name: name.clone() },
            trust_domain,
        )?,
        GuardrailTarget::Machine(name) => PeerMatch::Exact(machine_id(trust_domain, name)?),
    };
    let denies = match &guardrail.denies {
        GuardrailPeers::From(peers) => ResolvedPeers::From(bind_peers(peers, trust_domain)?),
        GuardrailPeers::UnlessFrom(peers) => {
            ResolvedPeers::UnlessFrom(bind_peers(peers, trust_domain)?)
        }
    };
    Ok(ResolvedGuardrail {
        policy: guardrail.name.clone(),
        owner: guardrail.owner.clone(),
        reason: guardrail.reason.clone(),
        destination,
        ports: guardrail.ports.clone(),
        denies,
    })
}
