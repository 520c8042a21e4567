//! The decision: what it says, and what no change may do to it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use hauberk_core::{
    identity::SpiffeId,
    policy::{
        DecisionTable, GuardrailPorts, Mode, Owner, PolicyKind, PolicyRef, Reason, Request,
        Verdict,
        resolve::{PeerMatch, ResolvedGuardrail, ResolvedPeers, ResolvedPolicy, ResolvedRule},
    },
    time::Timestamp,
};
use proptest::prelude::*;

const NOW: i64 = 1_800_000_000_000;

fn id(namespace: u8, name: u8) -> SpiffeId {
    format!("spiffe://example.org/ns/n{namespace}/sa/s{name}").parse().unwrap()
}

fn owner() -> Owner {
    Owner { team: "t".to_owned(), contact: "c".to_owned(), runbook: None }
}

fn named(kind: PolicyKind, name: &str) -> PolicyRef {
    let namespace = (kind == PolicyKind::AccessPolicy).then(|| "n0".parse().unwrap());
    PolicyRef { kind, namespace, name: name.parse().unwrap() }
}

fn rule(name: &str, ports: &[u16], peers: Vec<PeerMatch>) -> ResolvedRule {
    ResolvedRule {
        name: name.parse().unwrap(),
        ports: ports.iter().copied().collect(),
        peers,
        not_after: None,
    }
}

fn policy(name: &str, destination: SpiffeId, rules: Vec<ResolvedRule>) -> ResolvedPolicy {
    ResolvedPolicy {
        policy: named(PolicyKind::AccessPolicy, name),
        owner: owner(),
        mode: Mode::Enforce,
        destination,
        rules,
    }
}

fn guardrail(destination: PeerMatch, denies: ResolvedPeers) -> ResolvedGuardrail {
    ResolvedGuardrail {
        policy: named(PolicyKind::Guardrail, "g"),
        owner: owner(),
        reason: None,
        destination,
        ports: GuardrailPorts::All,
        denies,
    }
}

fn ask(table: &DecisionTable, source: &SpiffeId, destination: &SpiffeId, port: u16) -> Verdict {
    let now = Timestamp::from_unix_millis(NOW);
    table.decide(Request { source, destination, port, now })
}

/// Every identity of the small world is registered.
fn build(policies: Vec<ResolvedPolicy>, guardrails: Vec<ResolvedGuardrail>) -> DecisionTable {
    let all = (0..10).flat_map(|namespace| (0..10).map(move |name| id(namespace, name)));
    DecisionTable::build(policies, guardrails, all.map(|id| (id, Mode::Enforce)))
}

fn reason(verdict: &Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Allow(_) => None,
        Verdict::WouldDeny(denial) | Verdict::Deny(denial) => Some(denial.reason),
    }
}

#[test]
fn each_denial_has_its_own_reason_and_a_mend() {
    let destination = id(0, 0);
    let mut ended = rule("ended", &[70], vec![PeerMatch::Exact(id(1, 1))]);
    ended.not_after = Some(Timestamp::from_unix_millis(NOW));
    let rules = vec![rule("web", &[80], vec![PeerMatch::Exact(id(1, 1))]), ended];
    let table = build(
        vec![policy("p", destination.clone(), rules), policy("q", id(9, 9), vec![])],
        vec![guardrail(
            PeerMatch::Exact(id(9, 9)),
            ResolvedPeers::From(vec![PeerMatch::Exact(id(6, 6))]),
        )],
    );
    let cases = [
        ("no policy", id(1, 1), id(5, 5), 80, Reason::NoPolicy),
        ("other port", id(1, 1), destination.clone(), 81, Reason::NoMatchingRule),
        ("other caller", id(1, 2), destination.clone(), 80, Reason::NoMatchingRule),
        ("ended at this very moment", id(1, 1), destination.clone(), 70, Reason::GrantExpired),
        ("guardrail", id(6, 6), id(9, 9), 80, Reason::Guardrail),
        ("policy without rules", id(1, 1), id(9, 9), 80, Reason::NoMatchingRule),
    ];
    for (name, source, destination, port, wanted) in cases {
        let Verdict::Deny(denial) = ask(&table, &source, &destination, port) else {
            panic!("{name}: not denied");
        };
        assert_eq!(denial.reason, wanted, "{name}");
        assert!(!denial.mend.is_empty(), "{name}");
    }
    assert_eq!(reason(&ask(&table, &id(1, 1), &destination, 80)), None);
}

#[test]
fn audit_lets_through_only_if_every_policy_of_the_destination_says_so() {
    let mut audited = policy("p", id(0, 0), vec![]);
    audited.mode = Mode::Audit;
    let only = build(vec![audited.clone()], vec![]);
    assert!(matches!(ask(&only, &id(1, 1), &id(0, 0), 80), Verdict::WouldDeny(_)));
    let enforced = policy("q", id(0, 0), vec![]);
    let both = build(vec![audited.clone(), enforced], vec![]);
    assert!(matches!(ask(&both, &id(1, 1), &id(0, 0), 80), Verdict::Deny(_)));
    let any = guardrail(
        PeerMatch::Exact(id(0, 0)),
        ResolvedPeers::UnlessFrom(vec![PeerMatch::Exact(id(2, 2))]),
    );
    let guarded = build(vec![audited], vec![any]);
    assert!(matches!(ask(&guarded, &id(1, 1), &id(0, 0), 80), Verdict::Deny(_)));
}

#[test]
fn an_identity_that_is_not_registered_is_denied_whatever_a_rule_says() {
    let peers = || {
        vec![
            PeerMatch::Exact(id(1, 1)),
            PeerMatch::AnyIn {
                trust_domain: "example.org".parse().unwrap(),
                namespace: "n1".parse().unwrap(),
            },
            PeerMatch::Exact("spiffe://partner.example/ns/x/sa/y".parse().unwrap()),
        ]
    };
    let policies = vec![policy("p", id(0, 0), vec![rule("web", &[80], peers())])];
    let table = DecisionTable::build(policies, vec![], [(id(0, 0), Mode::Enforce)]);
    let Verdict::Deny(denial) = ask(&table, &id(1, 1), &id(0, 0), 80) else {
        panic!("not denied");
    };
    assert_eq!(denial.reason, Reason::NoMatchingRule);
    assert!(denial.mend.contains("no registered workload is"), "{}", denial.mend);
    // Another trust domain keeps its own registry.
    let partner = "spiffe://partner.example/ns/x/sa/y".parse().unwrap();
    assert_eq!(reason(&ask(&table, &partner, &id(0, 0), 80)), None);
}

fn peers() -> impl Strategy<Value = PeerMatch> {
    prop_oneof![
        (0_u8..3, 0_u8..3).prop_map(|(namespace, name)| PeerMatch::Exact(id(namespace, name))),
        (0_u8..3).prop_map(|namespace| PeerMatch::AnyIn {
            trust_domain: "example.org".parse().unwrap(),
            namespace: format!("n{namespace}").parse().unwrap(),
        }),
    ]
}

fn rules() -> impl Strategy<Value = Vec<ResolvedRule>> {
    let one = (prop::collection::btree_set(80_u16..84, 1..3), prop::collection::vec(peers(), 1..3));
    prop::collection::vec(one, 0..4).prop_map(|rules| {
        let numbered = rules.into_iter().enumerate();
        numbered
            .map(|(number, (ports, peers))| {
                let ports: Vec<u16> = ports.into_iter().collect();
                rule(&format!("r{number}"), &ports, peers)
            })
            .collect()
    })
}

fn policies() -> impl Strategy<Value = Vec<ResolvedPolicy>> {
    prop::collection::vec(((0_u8..2, 0_u8..2), rules()), 0..4).prop_map(|policies| {
        let numbered = policies.into_iter().enumerate();
        numbered
            .map(|(number, ((namespace, name), rules))| {
                policy(&format!("p{number}"), id(namespace, name), rules)
            })
            .collect()
    })
}

fn guardrails() -> impl Strategy<Value = Vec<ResolvedGuardrail>> {
    let denies = (any::<bool>(), prop::collection::vec(peers(), 1..3)).prop_map(|(from, list)| {
        if from { ResolvedPeers::From(list) } else { ResolvedPeers::UnlessFrom(list) }
    });
    prop::collection::vec((peers(), denies), 0..3).prop_map(|list| {
        list.into_iter().map(|(destination, denies)| guardrail(destination, denies)).collect()
    })
}

/// All questions over a small world.
fn questions() -> Vec<(SpiffeId, SpiffeId, u16)> {
    let mut all = Vec::new();
    for source in 0..9 {
        for destination in 0..4 {
            for port in 80..84 {
                all.push((id(source / 3, source % 3), id(destination / 2, destination % 2), port));
            }
        }
    }
    all
}

fn allowed(table: &DecisionTable) -> Vec<bool> {
    questions().iter().map(|(s, d, p)| matches!(ask(table, s, d, *p), Verdict::Allow(_))).collect()
}

/// What the table must say, read straight off the lists.
fn allowed_by_reading(policies: &[ResolvedPolicy], guardrails: &[ResolvedGuardrail]) -> Vec<bool> {
    let one = |(source, destination, port): &(SpiffeId, SpiffeId, u16)| {
        let denied = guardrails.iter().any(|g| {
            g.destination.matches(destination)
                && match &g.denies {
                    ResolvedPeers::From(list) => list.iter().any(|p| p.matches(source)),
                    ResolvedPeers::UnlessFrom(list) => !list.iter().any(|p| p.matches(source)),
                }
        });
        let rule = policies.iter().filter(|p| p.destination == *destination).any(|p| {
            p.rules.iter().any(|rule| {
                rule.ports.contains(port) && rule.peers.iter().any(|peer| peer.matches(source))
            })
        });
        rule && !denied
    };
    questions().iter().map(one).collect()
}

proptest! {
    #[test]
    fn the_index_says_what_the_lists_say(policies in policies(), guardrails in guardrails()) {
        let table = build(policies.clone(), guardrails.clone());
        prop_assert_eq!(allowed(&table), allowed_by_reading(&policies, &guardrails));
    }

    #[test]
    fn the_order_never_matters(policies in policies(), guardrails in guardrails()) {
        let forward = build(policies.clone(), guardrails.clone());
        let backward = build(
            policies.into_iter().rev().collect(),
            guardrails.into_iter().rev().collect());
        for (source, destination, port) in questions() {
            prop_assert_eq!(
                reason(&ask(&forward, &source, &destination, port)),
                reason(&ask(&backward, &source, &destination, port))
            );
        }
    }

    #[test]
    fn adding_a_guardrail_never_widens(
        policies in policies(),
        before in guardrails(),
        added in guardrails(),
    ) {
        let less = build(policies.clone(), before.clone());
        let more = build(policies, before.into_iter().chain(added).collect());
        for (less, more) in allowed(&less).into_iter().zip(allowed(&more)) {
            prop_assert!(less || !more);
        }
    }

    #[test]
    fn removing_a_policy_never_widens(policies in policies(), guardrails in guardrails()) {
        let all = build(policies.clone(), guardrails.clone());
        let fewer = policies.into_iter().skip(1).collect();
        let fewer = build(fewer, guardrails);
        for (all, fewer) in allowed(&all).into_iter().zip(allowed(&fewer)) {
            prop_assert!(all || !fewer);
        }
    }
}
