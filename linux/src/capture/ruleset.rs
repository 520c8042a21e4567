//! A description of the table: chains and rules as values, before the kernel sees them.

use super::expression::Expression;

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
    /// Rewrites addresses; sees the first packet of a connection only.
    Nat,
    /// Sees every packet; a change of mark makes the kernel route it again.
    Route,
    /// Sees every packet.
    Filter,
}

impl ChainKind {
    pub(super) fn name(self) -> &'static str {
        match self {
            ChainKind::Nat => "nat",
            ChainKind::Route => "route",
            ChainKind::Filter => "filter",
        }
    }
}

// `NF_INET_*` of `linux/netfilter.h`.
const PREROUTING: u32 = 0;
const INPUT: u32 = 1;
const OUTPUT: u32 = 3;

/// Ahead of the usual place of destination NAT (-100): the first chain to rewrite a connection
/// wins, and a service proxy on the same machine must not come before the mesh.
const BEFORE_DSTNAT: i32 = -105;
const MANGLE: i32 = -150;
const FILTER: i32 = 0;

impl Hook {
    pub(super) const NAT_OUTPUT: Hook =
        Hook { kind: ChainKind::Nat, number: OUTPUT, priority: BEFORE_DSTNAT };
    pub(super) const NAT_PREROUTING: Hook =
        Hook { kind: ChainKind::Nat, number: PREROUTING, priority: BEFORE_DSTNAT };
    pub(super) const ROUTE_OUTPUT: Hook =
        Hook { kind: ChainKind::Route, number: OUTPUT, priority: MANGLE };
    pub(super) const FILTER_OUTPUT: Hook =
        Hook { kind: ChainKind::Filter, number: OUTPUT, priority: FILTER };
    pub(super) const FILTER_INPUT: Hook =
        Hook { kind: ChainKind::Filter, number: INPUT, priority: FILTER };
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

    pub(super) fn named(name: String) -> Self {
        Self { name, hook: None, rules: Vec::new() }
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

/// The whole table, as it is to be.
///
/// Made by [`NamespaceRules::ruleset`](super::NamespaceRules::ruleset) and
/// [`HostRules::ruleset`](super::HostRules::ruleset).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    pub(super) chains: Vec<Chain>,
}

impl Ruleset {
    /// A stable number of the description: equal rules have equal numbers, across restarts and
    /// versions that make the same rules. It is also written into the installed table's comment.
    pub fn fingerprint(&self) -> u64 {
        let mut hash = Fnv::new();
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
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn part(&mut self, bytes: &[u8]) {
        let length = bytes.len().to_be_bytes();
        for byte in length.iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
