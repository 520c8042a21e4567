//! What a decision says: allowed by which rule, or denied for which reason, by whom, what came
//! nearest, and what the owner could change.

use std::fmt;

use super::{Mode, Owner, PolicyRef, Reason};
use crate::{
    identity::{IdentityKind, ResourceName, SpiffeId},
    time::Timestamp,
};

/// The outcome of a decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// A rule allows it.
    Allow(Allowed),
    /// Nothing allows it, but the destination is only audited: it passes and is recorded.
    WouldDeny(Denial),
    /// It is refused.
    Deny(Denial),
}

impl Verdict {
    /// The word used in metrics and records.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Allow(_) => "allow",
            Self::WouldDeny(_) => "would_deny",
            Self::Deny(_) => "deny",
        }
    }
}

/// The rule that allows a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// The policy it stands in.
    pub policy: PolicyRef,
    /// The rule.
    pub rule: ResourceName,
    /// Who answers for the destination.
    pub owner: Owner,
    /// When the permission ends by itself.
    pub until: Option<Timestamp>,
}

/// Why a connection is not allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denial {
    /// The reason, of the closed set.
    pub reason: Reason,
    /// The policy that speaks about the destination (the guardrail that denies, or the policy
    /// that came nearest).
    pub policy: Option<PolicyRef>,
    /// Whom to ask.
    pub owner: Option<Owner>,
    /// The rule that came nearest to allowing it.
    pub nearest_miss: Option<NearestMiss>,
    /// What its owner could change, in one line.
    pub mend: String,
}

/// Which rule came nearest, and what differed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NearestMiss {
    /// The rule.
    pub rule: ResourceName,
    /// What differed.
    pub differs: Difference,
}

/// What kept a rule from matching; ordered from the nearest to the farthest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// Caller and port match, but the rule is over.
    Expired {
        /// Since when.
        at: Timestamp,
    },
    /// The caller matches, the port does not.
    Port {
        /// The ports that the rule allows, a few of them.
        allowed: Vec<u16>,
    },
    /// The port matches, the caller does not.
    Caller {
        /// A caller that the rule allows.
        allowed: String,
    },
}

impl fmt::Display for NearestMiss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.differs {
            Difference::Expired { at } => {
                write!(f, "rule {} matches, but ended at {at}", self.rule)
            }
            Difference::Port { allowed } => {
                write!(f, "rule {} allows this caller, on other ports:", self.rule)?;
                for port in allowed {
                    write!(f, " {port}")?;
                }
                Ok(())
            }
            Difference::Caller { allowed } => {
                write!(f, "rule {} allows this port, for {allowed}", self.rule)
            }
        }
    }
}

/// How a caller is written in a rule's `from`.
#[must_use]
pub fn as_peer_yaml(id: &SpiffeId) -> String {
    match id.kind() {
        IdentityKind::Workload { namespace, service_account } => {
            format!("serviceAccount: {{namespace: {namespace}, name: {service_account}}}")
        }
        IdentityKind::Machine { name } => format!("machine: {{name: {name}}}"),
        IdentityKind::Node { .. } | IdentityKind::ControlPlane | IdentityKind::Other => {
            format!("spiffeId: {id}")
        }
    }
}

/// A mode as strict as its strictest part: `Audit` only if all parts are.
pub(super) fn strictest(modes: impl IntoIterator<Item = Mode>) -> Option<Mode> {
    modes.into_iter().reduce(|a, b| match (a, b) {
        (Mode::Audit, Mode::Audit) => Mode::Audit,
        (Mode::Enforce, _) | (_, Mode::Enforce) => Mode::Enforce,
    })
}
