//! A description of the table: chains and rules as values, before the kernel sees them.

use std::collections::BTreeSet;

use super::{expression::Expression, older::Scope, second_line::Routing};
use crate::links::Family;

/// Where a base chain sits in the path of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    /// The chain's type.
    pub(super) kind: ChainKind,
    /// The hook's number, `NF_INET_*`.
    pub(super) number: u32,
    /// Its place among the chains of that hook: lower numbers go first.
    pub(super) priority: i32,
}

/// A base chain's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChainKind {
    /// Sees every packet; a change of mark makes the kernel route it again.
    Route,
    /// Sees every packet.
    Filter,
    /// Sees the first packet of each connection that the kernel tracks, and makes it track them.
    Nat,
}

impl ChainKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            ChainKind::Route => "route",
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
        }
    }
}

// `NF_INET_*` of `linux/netfilter.h`.
const PREROUTING: u32 = 0;
const FORWARD: u32 = 2;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;

/// Ahead of connection tracking (-200), which is to leave captured connections alone, and of everything else
/// that may mark a packet: here, an outgoing packet's mark is still its socket's.
const FIRST: i32 = -310;
const FILTER: i32 = 0;

/// Ahead of other programs' translation (-100), and as early as the kernel allows.
const FIRST_NAT: i32 = -199;

impl Hook {
    pub(super) const PREROUTING: Hook =
        Hook { kind: ChainKind::Filter, number: PREROUTING, priority: FIRST };
    pub(super) const ROUTE_OUTPUT: Hook =
        Hook { kind: ChainKind::Route, number: OUTPUT, priority: FIRST };
    pub(super) const FORWARD: Hook =
        Hook { kind: ChainKind::Filter, number: FORWARD, priority: FILTER };
    pub(super) const FILTER_OUTPUT: Hook =
        Hook { kind: ChainKind::Filter, number: OUTPUT, priority: FILTER };
    pub(super) const NAT_PREROUTING: Hook =
        Hook { kind: ChainKind::Nat, number: PREROUTING, priority: FIRST_NAT };
    pub(super) const NAT_OUTPUT: Hook =
        Hook { kind: ChainKind::Nat, number: OUTPUT, priority: FIRST_NAT };
    /// The first place where a packet that was routed by its mark shows its new interface.
    pub(super) const POSTROUTING: Hook =
        Hook { kind: ChainKind::Filter, number: POSTROUTING, priority: FILTER };
}

/// A chain: a base chain with a hook, or one that others go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) name: String,
    pub(super) hook: Option<Hook>,
    pub(super) rules: Vec<Rule>,
}

impl Chain {
    pub(super) fn at(name: &str, hook: Hook) -> Self {
        Self { name: name.to_owned(), hook: Some(hook), rules: Vec::new() }
    }

    pub(super) fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), hook: None, rules: Vec::new() }
    }

    /// Adds a rule of the given parts, which must all match from left to right.
    pub(super) fn rule(mut self, parts: impl IntoIterator<Item = Vec<Expression>>) -> Self {
        self.rules.push(Rule { expressions: parts.into_iter().flatten().collect() });
        self
    }

    pub(super) fn rules<P>(self, rules: impl IntoIterator<Item = P>) -> Self
    where
        P: IntoIterator<Item = Vec<Expression>>,
    {
        rules.into_iter().fold(self, Chain::rule)
    }
}

/// A rule: its expressions in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    pub(super) expressions: Vec<Expression>,
}

/// What a set has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SetContent {
    /// These ports.
    Ports(BTreeSet<u16>),
    /// Connections of a family, by both ends as the workload sees them. They come and go: the description has
    /// none of them.
    Connections(Family),
}

/// A named set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) name: &'static str,
    pub(super) content: SetContent,
}

/// The whole table, as it is to be, and the policy routing that belongs to it.
///
/// Made by [`NamespaceRules::ruleset`](super::NamespaceRules::ruleset) and
/// [`HostRules::ruleset`](super::HostRules::ruleset).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    pub(super) sets: Vec<Set>,
    pub(super) chains: Vec<Chain>,
    pub(super) routing: Routing,
    /// Whose connections are captured, and so which older ones are left alone.
    pub(super) scope: Scope,
    /// Who put the rules there.
    pub(super) owner: String,
}

impl Ruleset {
    /// The same, with the name of the agent that they belong to: it is written into the table's comment and, as a number,
    /// into the policy routing. It tells the rules of several agents on one machine apart
    /// ([`is_owned_by`](super::is_owned_by)).
    #[must_use]
    pub fn owned_by(self, owner: &str) -> Self {
        Self { owner: owner.to_owned(), ..self }
    }

    /// A stable number of the description: equal rules have equal numbers, across restarts and
    /// versions that make the same rules. It is also written into the installed table's comment.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::new();
        for set in &self.sets {
            hash.part(set.name.as_bytes());
            match &set.content {
                SetContent::Ports(ports) => {
                    ports.iter().for_each(|port| hash.part(&port.to_be_bytes()));
                }
                SetContent::Connections(family) => hash.part(&[family.number()]),
            }
        }
        hash.part(format!("{:?}", self.routing).as_bytes());
        for chain in &self.chains {
            hash.part(chain.name.as_bytes());
            if let Some(hook) = chain.hook {
                hash.part(hook.kind.name().as_bytes());
                hash.part(&hook.number.to_be_bytes());
                hash.part(&hook.priority.to_be_bytes());
            }
            for rule in &chain.rules {
                for expression in &rule.expressions {
                    hash.part(expression.name.as_bytes());
                    hash.part(&expression.attributes);
                }
                hash.part(b"");
            }
        }
        hash.0
    }
}

/// FNV-1a: stable, unlike the standard library's hasher, and not meant against an adversary,
/// who could write the comment as well. Drift is told from the rules themselves.
pub(super) struct Fnv(pub(super) u64);

impl Fnv {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn part(&mut self, bytes: &[u8]) {
        let length = bytes.len().to_be_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
