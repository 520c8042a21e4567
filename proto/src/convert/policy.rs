use hauberk_core::{
    policy::{
        GuardrailPorts, Owner, PolicyKind, PolicyRef,
        resolve::{PeerMatch, ResolvedGuardrail, ResolvedPeers, ResolvedPolicy, ResolvedRule},
    },
    time::Timestamp,
};

use super::{
    ConvertError,
    workload::{mode, mode_message, name, some_ports, spiffe_id},
};
use crate::v1::{self, guardrail::Denies, guardrail::Ports, peer::Kind};

/// The message of a policy.
#[must_use]
pub fn policy_message(policy: &ResolvedPolicy) -> v1::DestinationPolicy {
    v1::DestinationPolicy {
        namespace: policy.policy.namespace.as_ref().map(ToString::to_string).unwrap_or_default(),
        name: policy.policy.name.to_string(),
        owner: Some(owner_message(&policy.owner)),
        mode: mode_message(policy.mode).into(),
        destination: policy.destination.to_string(),
        rules: policy
            .rules
            .iter()
            .map(|rule| v1::Rule {
                name: rule.name.to_string(),
                ports: rule.ports.iter().copied().map(u32::from).collect(),
                peers: rule.peers.iter().map(peer_message).collect(),
                not_after_unix_ms: rule.not_after.map(Timestamp::unix_millis),
            })
            .collect(),
    }
}

/// Reads a policy.
///
/// # Errors
/// If any field is missing, empty, unknown or malformed.
pub fn policy(message: v1::DestinationPolicy) -> Result<ResolvedPolicy, ConvertError> {
    let rules = message.rules.into_iter().map(rule).collect::<Result<Vec<_>, _>>()?;
    Ok(ResolvedPolicy {
        policy: PolicyRef {
            kind: PolicyKind::AccessPolicy,
            namespace: Some(name("policy.namespace", &message.namespace)?),
            name: name("policy.name", &message.name)?,
        },
        owner: owner("policy.owner", message.owner)?,
        mode: mode("policy.mode", message.mode)?,
        destination: spiffe_id("policy.destination", &message.destination)?,
        rules,
    })
}

fn rule(message: v1::Rule) -> Result<ResolvedRule, ConvertError> {
    Ok(ResolvedRule {
        name: name("rule.name", &message.name)?,
        ports: some_ports("rule.ports", &message.ports)?,
        peers: some_peers("rule.peers", message.peers)?,
        not_after: message.not_after_unix_ms.map(Timestamp::from_unix_millis),
    })
}

/// The message of a guardrail.
#[must_use]
pub fn guardrail_message(guardrail: &ResolvedGuardrail) -> v1::Guardrail {
    let peers = |peers: &[PeerMatch]| v1::Peers { peers: peers.iter().map(peer_message).collect() };
    v1::Guardrail {
        name: guardrail.policy.name.to_string(),
        owner: Some(owner_message(&guardrail.owner)),
        reason: guardrail.reason.clone().unwrap_or_default(),
        destination: Some(peer_message(&guardrail.destination)),
        ports: Some(match &guardrail.ports {
            GuardrailPorts::All => Ports::AllPorts(v1::AllPorts {}),
            GuardrailPorts::Only(ports) => Ports::OnlyPorts(v1::Ports {
                ports: ports.iter().copied().map(u32::from).collect(),
            }),
        }),
        denies: Some(match &guardrail.denies {
            ResolvedPeers::From(list) => Denies::DenyFrom(peers(list)),
            ResolvedPeers::UnlessFrom(list) => Denies::DenyUnlessFrom(peers(list)),
        }),
    }
}

/// Reads a guardrail.
///
/// # Errors
/// If any field is missing, empty, unknown or malformed.
pub fn guardrail(message: v1::Guardrail) -> Result<ResolvedGuardrail, ConvertError> {
    let ports = match message.ports.ok_or(ConvertError::missing("guardrail.ports"))? {
        Ports::AllPorts(v1::AllPorts {}) => GuardrailPorts::All,
        Ports::OnlyPorts(list) => {
            GuardrailPorts::Only(some_ports("guardrail.only_ports", &list.ports)?)
        }
    };
    let denies = match message.denies.ok_or(ConvertError::missing("guardrail.denies"))? {
        Denies::DenyFrom(list) => {
            ResolvedPeers::From(some_peers("guardrail.deny_from", list.peers)?)
        }
        Denies::DenyUnlessFrom(list) => {
            ResolvedPeers::UnlessFrom(some_peers("guardrail.deny_unless_from", list.peers)?)
        }
    };
    let destination = message.destination.ok_or(ConvertError::missing("guardrail.destination"))?;
    Ok(ResolvedGuardrail {
        policy: PolicyRef {
            kind: PolicyKind::Guardrail,
            namespace: None,
            name: name("guardrail.name", &message.name)?,
        },
        owner: owner("guardrail.owner", message.owner)?,
        reason: Some(message.reason).filter(|reason| !reason.is_empty()),
        destination: peer("guardrail.destination", destination)?,
        ports,
        denies,
    })
}

fn owner_message(owner: &Owner) -> v1::Owner {
    v1::Owner {
        team: owner.team.clone(),
        contact: owner.contact.clone(),
        runbook: owner.runbook.clone().unwrap_or_default(),
    }
}

pub(super) fn owner(field: &str, message: Option<v1::Owner>) -> Result<Owner, ConvertError> {
    let message = message.ok_or(ConvertError::missing(field))?;
    Ok(Owner {
        team: message.team,
        contact: message.contact,
        runbook: Some(message.runbook).filter(|runbook| !runbook.is_empty()),
    })
}

fn peer_message(peer: &PeerMatch) -> v1::Peer {
    v1::Peer {
        kind: Some(match peer {
            PeerMatch::Exact(id) => Kind::SpiffeId(id.to_string()),
            PeerMatch::AnyIn { trust_domain, namespace } => Kind::AnyIn(v1::AnyIn {
                trust_domain: trust_domain.to_string(),
                namespace: namespace.to_string(),
            }),
        }),
    }
}

fn some_peers(field: &str, peers: Vec<v1::Peer>) -> Result<Vec<PeerMatch>, ConvertError> {
    if peers.is_empty() {
        return Err(ConvertError::missing(field));
    }
    peers.into_iter().map(|message| peer(field, message)).collect()
}

fn peer(field: &str, message: v1::Peer) -> Result<PeerMatch, ConvertError> {
    Ok(match message.kind.ok_or(ConvertError::missing(field))? {
        Kind::SpiffeId(text) => PeerMatch::Exact(spiffe_id(field, &text)?),
        Kind::AnyIn(any) => PeerMatch::AnyIn {
            trust_domain: any.trust_domain.parse().map_err(|error| {
                ConvertError::new(field, format!("{}: {error}", any.trust_domain))
            })?,
            namespace: name(field, &any.namespace)?,
        },
    })
}
