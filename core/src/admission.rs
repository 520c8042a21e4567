//! Which identity a node may ask for on behalf of a workload.
//!
//! A request never carries an identity: it names a workload, and the registry says which identity
//! that has and on which node it lives. So a stolen node gets the identities of its own workloads
//! and no others. This module decides on what the control plane has looked up; it looks up
//! nothing itself, and refuses whatever does not fit together.

use std::fmt;

use crate::identity::{IdentityKind, ResourceName, SpiffeId, TrustDomain};

/// A node whose certificate has been verified: its identity is that of a node, and its name is
/// the one in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttestedNode {
    id: SpiffeId,
}

/// Whether a node may still ask for anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeStanding {
    /// Nothing is held against it.
    Good,
    /// An operator has banned it, or a clone of it was seen.
    Banned,
}

/// What a node names when it asks on behalf of a workload.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKey {
    /// A workload with a namespace, on a machine.
    Namespaced {
        /// Its namespace.
        namespace: ResourceName,
        /// Its name.
        name: ResourceName,
    },
    /// A pod: this one, and none that has its name after it.
    Pod {
        /// Its namespace.
        namespace: ResourceName,
        /// Its name.
        name: ResourceName,
        /// Its UID.
        uid: String,
    },
    /// A workload registered on a machine.
    Machine {
        /// The name under which it is registered.
        name: ResourceName,
    },
}

/// What the registry says about a workload that is live now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredWorkload {
    /// The workload.
    pub key: WorkloadKey,
    /// The name of the node it lives on.
    pub node: String,
    /// The identity it is entitled to.
    pub identity: SpiffeId,
}

/// Why a node does not get the identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The caller's certificate is not that of a node.
    #[error("the caller {caller} is not a node: only agents ask on behalf of workloads")]
    CallerNotNode {
        /// The caller.
        caller: SpiffeId,
    },
    /// The node is banned.
    #[error("node {node:?} is banned: lift the ban or attest the node anew")]
    NodeBanned {
        /// The calling node.
        node: String,
    },
    /// The registry has no such workload, or none that is live.
    #[error("{key} is not a live workload: wait until it is scheduled, or register it")]
    UnknownWorkload {
        /// The workload asked for.
        key: WorkloadKey,
    },
    /// The registry's entry is for another workload than the one asked for.
    #[error("the registry entry is for {found}, but {requested} was asked for")]
    EntryMismatch {
        /// The workload asked for.
        requested: WorkloadKey,
        /// The entry's workload.
        found: WorkloadKey,
    },
    /// The workload lives on another node than the calling one.
    #[error("{key} lives on node {node:?}, but node {caller:?} asked for it")]
    OtherNode {
        /// The workload asked for.
        key: WorkloadKey,
        /// The node it lives on.
        node: String,
        /// The calling node.
        caller: String,
    },
    /// The entry's identity belongs to another trust domain than the node's.
    #[error("{identity} is not in the trust domain {trust_domain} of the calling node")]
    OtherTrustDomain {
        /// The entry's identity.
        identity: SpiffeId,
        /// The calling node's trust domain.
        trust_domain: TrustDomain,
    },
    /// The entry's identity is one that no workload may have.
    #[error("{identity} is the identity of a node or the control plane: {key} cannot have it")]
    PrivilegedIdentity {
        /// The workload asked for.
        key: WorkloadKey,
        /// The entry's identity.
        identity: SpiffeId,
    },
    /// The entry's identity has no form that such a workload can have.
    #[error(
        "{key} cannot have {identity}: a namespaced workload's is /ns/<its namespace>/sa/<service account>, a \
         machine workload's that or /machine/<name>"
    )]
    UnfittingIdentity {
        /// The workload asked for.
        key: WorkloadKey,
        /// The entry's identity.
        identity: SpiffeId,
    },
}

/// Decides which identity the calling node gets for the workload it names.
///
/// `registry_entry` is what the registry has for `request` after a live read: `None` when there
/// is no such workload, or when it has finished.
///
/// # Errors
/// The first rule that does not hold.
pub fn admit(
    caller: &AttestedNode,
    request: &WorkloadKey,
    registry_entry: Option<&RegisteredWorkload>,
    standing: NodeStanding,
) -> Result<SpiffeId, Refusal> {
    match standing {
        NodeStanding::Good => {}
        NodeStanding::Banned => return Err(Refusal::NodeBanned { node: caller.name().to_owned() }),
    }
    let entry = registry_entry.ok_or_else(|| Refusal::UnknownWorkload { key: request.clone() })?;
    if entry.key != *request {
        let (requested, found) = (request.clone(), entry.key.clone());
        return Err(Refusal::EntryMismatch { requested, found });
    }
    if entry.node != caller.name() {
        return Err(Refusal::OtherNode {
            key: request.clone(),
            node: entry.node.clone(),
            caller: caller.name().to_owned(),
        });
    }
    if entry.identity.trust_domain() != caller.id.trust_domain() {
        return Err(Refusal::OtherTrustDomain {
            identity: entry.identity.clone(),
            trust_domain: caller.id.trust_domain().clone(),
        });
    }
    check_identity_fits(request, &entry.identity)?;
    Ok(entry.identity.clone())
}

impl AttestedNode {
    /// The node with this verified identity.
    ///
    /// # Errors
    /// [`Refusal::CallerNotNode`] for an identity of any other kind.
    pub fn from_identity(id: SpiffeId) -> Result<Self, Refusal> {
        match id.kind() {
            IdentityKind::Node { .. } => Ok(Self { id }),
            IdentityKind::Workload { .. }
            | IdentityKind::Machine { .. }
            | IdentityKind::ControlPlane
            | IdentityKind::Other => Err(Refusal::CallerNotNode { caller: id }),
        }
    }

    /// The node's name: the last segment of its identity.
    pub fn name(&self) -> &str {
        self.id.path().rsplit('/').next().unwrap_or_default()
    }

    /// The node's identity.
    pub fn id(&self) -> &SpiffeId {
        &self.id
    }
}

impl fmt::Display for WorkloadKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Namespaced { namespace, name } => write!(f, "workload {namespace}/{name}"),
            Self::Pod { namespace, name, uid } => write!(f, "pod {namespace}/{name} ({uid})"),
            Self::Machine { name } => write!(f, "machine workload {name}"),
        }
    }
}

fn check_identity_fits(key: &WorkloadKey, identity: &SpiffeId) -> Result<(), Refusal> {
    let unfitting = || Refusal::UnfittingIdentity { key: key.clone(), identity: identity.clone() };
    match (key, identity.kind()) {
        (_, IdentityKind::Node { .. } | IdentityKind::ControlPlane) => {
            Err(Refusal::PrivilegedIdentity { key: key.clone(), identity: identity.clone() })
        }
        (
            WorkloadKey::Namespaced { namespace, .. } | WorkloadKey::Pod { namespace, .. },
            IdentityKind::Workload { namespace: named, .. },
        ) if namespace.as_str() == named => Ok(()),
        (
            WorkloadKey::Machine { .. },
            IdentityKind::Machine { .. } | IdentityKind::Workload { .. },
        ) => Ok(()),
        (
            WorkloadKey::Namespaced { .. } | WorkloadKey::Pod { .. },
            IdentityKind::Workload { .. } | IdentityKind::Machine { .. } | IdentityKind::Other,
        )
        | (WorkloadKey::Machine { .. }, IdentityKind::Other) => Err(unfitting()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
mod tests {
    use super::*;

    fn id(text: &str) -> SpiffeId {
        text.parse().unwrap()
    }

    fn node(name: &str) -> AttestedNode {
        AttestedNode::from_identity(id(&format!("spiffe://prod.example/node/{name}"))).unwrap()
    }

    fn pod(namespace: &str, name: &str) -> WorkloadKey {
        WorkloadKey::Namespaced {
            namespace: namespace.parse().unwrap(),
            name: name.parse().unwrap(),
        }
    }

    fn machine(name: &str) -> WorkloadKey {
        WorkloadKey::Machine { name: name.parse().unwrap() }
    }

    fn entry(key: WorkloadKey, node: &str, identity: &str) -> RegisteredWorkload {
        RegisteredWorkload { key, node: node.to_owned(), identity: id(identity) }
    }

    const WEB: &str = "spiffe://prod.example/ns/shop/sa/web";

    #[test]
    fn a_node_gets_the_identity_of_its_own_workload() {
        let cases = [
            ("pod", pod("shop", "web-1"), WEB),
            ("machine", machine("db"), "spiffe://prod.example/machine/db"),
            ("machine with a service account's identity", machine("db"), WEB),
        ];
        for (name, key, identity) in cases {
            let entry = entry(key.clone(), "a", identity);
            let admitted = admit(&node("a"), &key, Some(&entry), NodeStanding::Good);
            assert_eq!(admitted, Ok(id(identity)), "{name}");
        }
    }

    #[test]
    fn an_unknown_workload_is_refused() {
        let key = pod("shop", "web-1");
        let refusal = admit(&node("a"), &key, None, NodeStanding::Good).unwrap_err();
        assert_eq!(refusal, Refusal::UnknownWorkload { key });
    }

    #[test]
    fn a_workload_on_another_node_is_refused_naming_both_nodes() {
        let key = pod("shop", "web-1");
        let entry = entry(key.clone(), "b", WEB);
        let refusal = admit(&node("a"), &key, Some(&entry), NodeStanding::Good).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::OtherNode { key, node: "b".to_owned(), caller: "a".to_owned() }
        );
        assert_eq!(
            refusal.to_string(),
            r#"workload shop/web-1 lives on node "b", but node "a" asked for it"#
        );
    }

    #[test]
    fn a_banned_node_is_refused_before_anything_else_is_told() {
        let key = pod("shop", "web-1");
        let own = entry(key.clone(), "a", WEB);
        for entry in [Some(&own), None] {
            let refusal = admit(&node("a"), &key, entry, NodeStanding::Banned).unwrap_err();
            assert_eq!(refusal, Refusal::NodeBanned { node: "a".to_owned() });
        }
    }

    #[test]
    fn the_identity_of_a_node_or_the_control_plane_is_never_given_to_a_workload() {
        for identity in ["spiffe://prod.example/node/a", "spiffe://prod.example/control-plane"] {
            for key in [pod("shop", "web-1"), machine("db")] {
                let entry = entry(key.clone(), "a", identity);
                let refusal = admit(&node("a"), &key, Some(&entry), NodeStanding::Good);
                let identity = id(identity);
                assert_eq!(refusal, Err(Refusal::PrivilegedIdentity { key, identity }));
            }
        }
    }

    #[test]
    fn an_identity_that_does_not_fit_the_workload_is_refused() {
        let cases = [
            ("pod of another namespace", pod("other", "web-1"), WEB),
            ("pod as a machine", pod("shop", "web-1"), "spiffe://prod.example/machine/db"),
            ("pod with another path", pod("shop", "web-1"), "spiffe://prod.example/web"),
            ("machine with another path", machine("db"), "spiffe://prod.example/db"),
            ("the trust domain's own", machine("db"), "spiffe://prod.example"),
        ];
        for (name, key, identity) in cases {
            let entry = entry(key.clone(), "a", identity);
            let refusal = admit(&node("a"), &key, Some(&entry), NodeStanding::Good);
            let identity = id(identity);
            assert_eq!(refusal, Err(Refusal::UnfittingIdentity { key, identity }), "{name}");
        }
    }

    #[test]
    fn an_identity_of_another_trust_domain_is_refused() {
        let key = pod("shop", "web-1");
        let entry = entry(key.clone(), "a", "spiffe://other.example/ns/shop/sa/web");
        let refusal = admit(&node("a"), &key, Some(&entry), NodeStanding::Good).unwrap_err();
        let trust_domain = "prod.example".parse().unwrap();
        let identity = entry.identity;
        assert_eq!(refusal, Refusal::OtherTrustDomain { identity, trust_domain });
    }

    #[test]
    fn a_registry_entry_for_another_workload_is_refused() {
        let (requested, found) = (pod("shop", "web-1"), pod("shop", "web-2"));
        let entry = entry(found.clone(), "a", WEB);
        let refusal = admit(&node("a"), &requested, Some(&entry), NodeStanding::Good);
        assert_eq!(refusal, Err(Refusal::EntryMismatch { requested, found }));
    }

    #[test]
    fn only_a_node_can_be_the_caller() {
        for caller in [
            WEB,
            "spiffe://prod.example/machine/db",
            "spiffe://prod.example/control-plane",
            "spiffe://prod.example/node/a/b",
            "spiffe://prod.example",
        ] {
            let caller = id(caller);
            assert_eq!(
                AttestedNode::from_identity(caller.clone()),
                Err(Refusal::CallerNotNode { caller })
            );
        }
    }
}
