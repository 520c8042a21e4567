//! What owners declare, already validated: every value of these types came out of a manifest that
//! converted whole ([`crate::manifest`]) or off the wire by a conversion that did.
//!
//! Nothing here is empty where emptiness could be read as "all": a rule has at least one port and
//! at least one peer, a selector at least one label.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

use crate::{
    identity::{ResourceName, SpiffeId},
    time::Timestamp,
};

/// Which kind of object a [`PolicyRef`] names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// An [`AccessPolicy`].
    AccessPolicy,
    /// A [`Guardrail`].
    Guardrail,
}

/// The name of a policy object as people write it: `payments/ledger`, or `pci` for cluster-scoped kinds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PolicyRef {
    /// What it names.
    pub kind: PolicyKind,
    /// The namespace, for namespaced kinds.
    pub namespace: Option<ResourceName>,
    /// The object's name.
    pub name: ResourceName,
}

impl fmt::Display for PolicyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        write!(f, "{}", self.name)
    }
}

/// Who answers for an endpoint or a guardrail.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The team's name.
    pub team: String,
    /// Where to reach it, for example a chat channel.
    pub contact: String,
    /// A link to what to do when it breaks.
    pub runbook: Option<String>,
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.team, self.contact)
    }
}

/// Whether denials are carried out or only recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// What is not allowed is refused.
    Enforce,
    /// What is not allowed passes and is recorded as `would_deny`.
    Audit,
}

impl Mode {
    /// The word used in manifests and records.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "Enforce",
            Self::Audit => "Audit",
        }
    }
}

/// A policy of a destination's owner, about destinations in its own namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessPolicy {
    /// Its name.
    pub name: PolicyRef,
    /// Who answers for the destination.
    pub owner: Owner,
    /// Which destinations it is about.
    pub target: Target,
    /// Whether denials are carried out.
    pub mode: Mode,
    /// What is allowed; names are unique and sorted.
    pub rules: Vec<Rule>,
    /// Examples the owner wants held.
    pub tests: Vec<PolicyTest>,
}

/// Which workloads of the policy's namespace are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// Those that carry all of these labels; never empty.
    Selector(BTreeMap<String, String>),
    /// Those that run as this service account.
    ServiceAccount(ResourceName),
    /// The machine of this name.
    Machine(ResourceName),
}

/// One permission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Unique in its policy.
    pub name: ResourceName,
    /// Why it exists.
    pub reason: Option<String>,
    /// At least one.
    pub ports: BTreeSet<u16>,
    /// At least one, ORed.
    pub from: Vec<PeerSelector>,
    /// When it ends.
    pub not_after: Option<Timestamp>,
    /// How often it is expected to be used, so that rare use is not mistaken for none.
    pub expected_every: Option<Duration>,
}

/// Who may connect.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerSelector {
    /// A service account of a namespace.
    ServiceAccount {
        /// Its namespace.
        namespace: ResourceName,
        /// Its name.
        name: ResourceName,
    },
    /// A machine.
    Machine {
        /// Its name.
        name: ResourceName,
    },
    /// An exact SPIFFE ID, of this or a federated trust domain.
    SpiffeId(SpiffeId),
    /// Every service account of a namespace.
    AnyIn {
        /// The namespace.
        namespace: ResourceName,
    },
}

/// An example in a policy: asked of the decision whenever the policy is read
/// ([`failed_tests`](crate::policy::examples::failed_tests)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyTest {
    /// Who connects; never [`PeerSelector::AnyIn`].
    pub from: PeerSelector,
    /// To which port.
    pub port: u16,
    /// What must come out.
    pub expect: Expectation,
}

/// What a [`PolicyTest`] expects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expectation {
    /// The rules of this policy allow it.
    Allow,
    /// They do not.
    Deny,
}

/// A denial by the platform team that no owner can override.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guardrail {
    /// Its name.
    pub name: PolicyRef,
    /// Who answers for it.
    pub owner: Owner,
    /// Why it exists.
    pub reason: Option<String>,
    /// Which destinations it protects.
    pub target: GuardrailTarget,
    /// Which ports.
    pub ports: GuardrailPorts,
    /// Whom it denies.
    pub denies: GuardrailPeers,
}

/// The destinations a guardrail protects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardrailTarget {
    /// Every workload of a namespace.
    Namespace(ResourceName),
    /// A service account.
    ServiceAccount {
        /// Its namespace.
        namespace: ResourceName,
        /// Its name.
        name: ResourceName,
    },
    /// A machine.
    Machine(ResourceName),
}

/// The ports a guardrail speaks about; "all" is always spelt out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardrailPorts {
    /// All of them.
    All,
    /// These; never empty.
    Only(BTreeSet<u16>),
}

/// Whom a guardrail denies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardrailPeers {
    /// These; never empty.
    From(Vec<PeerSelector>),
    /// Everybody but these; never empty.
    UnlessFrom(Vec<PeerSelector>),
}

/// A host with an agent on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name; also the name of its node identity.
    pub name: ResourceName,
    /// Where its agent takes mesh traffic for processes of the host; may be empty when every
    /// workload has addresses of its own.
    pub addresses: BTreeSet<std::net::IpAddr>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// A process that speaks for the machine itself, if one does.
    pub workload: Option<Process>,
}

/// A process on a machine, and the ports it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// How the kernel tells it apart.
    pub selector: ProcessSelector,
    /// The ports it serves; may be empty for a mere client.
    pub ports: BTreeSet<u16>,
    /// What happens to traffic that is not allowed.
    pub mode: Mode,
}

/// How the kernel tells a process apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ProcessSelector {
    /// The Unix user it runs as.
    User(String),
    /// The cgroup it runs in, relative to the root of the cgroup2 tree.
    Cgroup(String),
    /// The named network namespace it runs in, and the addresses it has there.
    NetworkNamespace {
        /// The name, as of `ip netns`.
        name: String,
        /// Never empty.
        addresses: BTreeSet<std::net::IpAddr>,
    },
    /// The pod of this UID, in its network namespace. No manifest says so: the control plane knows it of
    /// the Kubernetes API.
    Pod {
        /// The pod's `metadata.uid`.
        uid: String,
        /// The pod's addresses; empty until it has some.
        addresses: BTreeSet<std::net::IpAddr>,
        /// The ports that the kubelet of its node probes.
        probe_ports: BTreeSet<u16>,
        /// Its service account is gone: it stays captured, and is nobody.
        orphaned: bool,
    },
}

/// The longest Unix user name, as of useradd.
const MAX_USER: usize = 32;

/// The longest UID of a pod. Kubernetes' own are 36 characters, those of static pods 32.
const MAX_POD_UID: usize = 64;

/// The longest file name: a network namespace is a file in a folder, a cgroup a directory.
const MAX_FILE_NAME: usize = 255;

/// The namespace that would make a workload's key that of a machine.
pub const RESERVED_NAMESPACE: &str = "machine";

impl ProcessSelector {
    /// Whether a text names exactly one Unix user: a name, or a number that everybody writes that
    /// way.
    #[must_use]
    pub fn is_user(text: &str) -> bool {
        let is_name = (1..=MAX_USER).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && text.trim_end_matches('$').chars().all(is_file_character);
        let canonical = text == "0" || !text.starts_with(['0', '+', '-']);
        // The highest number means "no user" to the kernel.
        is_name || (canonical && text.parse::<u32>().is_ok_and(|number| number < u32::MAX))
    }

    /// Whether a text is the path of a cgroup below the root.
    #[must_use]
    pub fn is_cgroup(text: &str) -> bool {
        let is_directory =
            |name: &str| !matches!(name, "" | "." | "..") && name.len() <= MAX_FILE_NAME;
        text.split('/').all(is_directory) && !text.chars().any(char::is_control)
    }

    /// Whether a text is the name of a network namespace, and no path: it becomes one below the
    /// agent's folder.
    #[must_use]
    pub fn is_network_namespace(text: &str) -> bool {
        !matches!(text, "" | "." | "..")
            && text.len() <= MAX_FILE_NAME
            && text.chars().all(is_file_character)
    }
}

impl ProcessSelector {
    /// Whether a text can be the UID of a pod.
    #[must_use]
    pub fn is_pod_uid(text: &str) -> bool {
        (1..=MAX_POD_UID).contains(&text.len())
            && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    }

    /// Whether these are the same processes. What is known of them may differ: a pod gets its addresses after it was
    /// captured.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Pod { uid, .. }, Self::Pod { uid: of_other, .. }) => uid == of_other,
            (
                Self::NetworkNamespace { name, .. },
                Self::NetworkNamespace { name: of_other, .. },
            ) => name == of_other,
            (
                Self::User(_) | Self::Cgroup(_) | Self::NetworkNamespace { .. } | Self::Pod { .. },
                _,
            ) => self == other,
        }
    }

    /// The addresses of a network namespace of its own; none for a process of a host, which has its
    /// machine's.
    #[must_use]
    pub fn own_addresses(&self) -> Option<&BTreeSet<std::net::IpAddr>> {
        match self {
            Self::User(_) | Self::Cgroup(_) => None,
            Self::NetworkNamespace { addresses, .. } | Self::Pod { addresses, .. } => {
                Some(addresses)
            }
        }
    }
}

fn is_file_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// A workload outside Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Its namespace.
    pub namespace: ResourceName,
    /// Its name.
    pub name: ResourceName,
    /// What selectors see.
    pub labels: BTreeMap<String, String>,
    /// The service account that makes its identity.
    pub service_account: ResourceName,
    /// The machine it runs on.
    pub machine: ResourceName,
    /// Which process it is there.
    pub process: Process,
}

/// One object of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// A policy of a destination's owner.
    AccessPolicy(AccessPolicy),
    /// A denial that no owner can override.
    Guardrail(Guardrail),
    /// A host.
    Machine(Machine),
    /// A workload.
    Workload(Workload),
}
