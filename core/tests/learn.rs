//! Learned policies allow what was seen and nothing else, asked of the same reader and the same
//! decision as everything.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};

use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    learn::{Edge, End, Existing, Learned, LearnedPolicy, Outcome, Seen, json, learn, yaml},
    manifest::{check_set, parse},
    policy::{
        AccessPolicy, DecisionTable, Mode, Object, Owner, Process, ProcessSelector, Request,
        Target, Verdict, Workload,
        resolve::{Declared, resolve},
    },
    time::Timestamp,
};
use proptest::prelude::*;

const NOW: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_unix_seconds(seconds)
}

fn id(path: &str) -> SpiffeId {
    format!("spiffe://example.org/{path}").parse().unwrap()
}

fn edge(source: &SpiffeId, destination: &SpiffeId, port: u16) -> Edge {
    Edge {
        source: End::Identity(source.clone()),
        destination: End::Identity(destination.clone()),
        port,
        outcome: Outcome::WouldDeny,
    }
}

fn seen(edges: impl IntoIterator<Item = Edge>) -> BTreeMap<Edge, Seen> {
    edges.into_iter().map(|edge| (edge, Seen::once(at(NOW)))).collect()
}

fn learned(edges: impl IntoIterator<Item = Edge>) -> Vec<LearnedPolicy> {
    let Learned { policies, unspeakable } = learn(&seen(edges), &Existing::default());
    assert_eq!(unspeakable, []);
    policies
}

fn text(policies: &[LearnedPolicy]) -> String {
    policies.iter().map(yaml).collect()
}

/// The policies of a text, as the control plane reads them.
fn read(text: &str) -> Vec<AccessPolicy> {
    let objects = parse("learned.yaml", text).unwrap_or_else(|errors| panic!("{errors:?}\n{text}"));
    check_set(&objects).unwrap();
    let policies = objects.into_iter().map(|object| match object.value {
        Object::AccessPolicy(policy) => policy,
        other => panic!("{other:?}"),
    });
    policies.collect()
}

/// Names that some YAML reader takes for numbers, switches or nothing.
const NAMES: [&str; 8] = ["shop", "1", "1.5", "true", "no", "null", "a.b", "0x1f"];

fn workload(namespace: &str, name: &str) -> Workload {
    Workload {
        namespace: namespace.parse().unwrap(),
        name: name.parse().unwrap(),
        labels: BTreeMap::new(),
        service_account: name.parse().unwrap(),
        machine: "host".parse().unwrap(),
        process: Process {
            selector: ProcessSelector::User("somebody".to_owned()),
            ports: BTreeSet::new(),
            mode: Mode::Enforce,
        },
    }
}

/// Every name of `NAMES` in every namespace of them, under these policies.
fn table(policies: Vec<AccessPolicy>) -> DecisionTable {
    let names = NAMES.iter().flat_map(|space| NAMES.iter().map(move |name| workload(space, name)));
    let declared = Declared { workloads: names.collect(), policies, ..Declared::default() };
    let trust_domain: TrustDomain = "example.org".parse().unwrap();
    let resolved = resolve(&declared, &trust_domain).unwrap();
    assert_eq!(resolved.unresolved, []);
    let postures = resolved.workloads.iter().map(|known| (known.identity.clone(), known.mode));
    let postures: Vec<_> = postures.collect();
    DecisionTable::build(resolved.policies, resolved.guardrails, postures)
}

fn allows(table: &DecisionTable, source: &SpiffeId, destination: &SpiffeId, port: u16) -> bool {
    let verdict = table.decide(Request { source, destination, port, now: at(NOW) });
    matches!(verdict, Verdict::Allow(_))
}

#[test]
fn a_learned_policy_reads_like_this() {
    let (web, batch) = (id("ns/shop/sa/web"), id("machine/batch-01"));
    let ledger = id("ns/payments/sa/ledger");
    let mut edges = seen([edge(&web, &ledger, 5432), edge(&batch, &ledger, 5432)]);
    let often = Seen { count: 12, first: at(NOW - 60), last: at(NOW + 60) };
    edges.insert(edge(&web, &ledger, 80), often);
    let partner: SpiffeId = "spiffe://partner.example/ns/x/sa/y".parse().unwrap();
    edges.extend(seen([edge(&partner, &batch, 22)]));
    let policies = learn(&edges, &Existing::default()).policies;
    assert_eq!(
        text(&policies),
        "---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: learned-machine-batch-01, namespace: default}
spec:
  # Fill in who answers for it.
  owner: {team: default, contact: unknown}
  target: {machine: batch-01}
  rules:
  # 1 connection, at 2027-01-15T08:00:00Z
  - name: partner-example-ns-x-sa-y-HASH
    ports: [22]
    from: [{spiffeId: \"spiffe://partner.example/ns/x/sa/y\"}]
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: learned-ledger, namespace: payments}
spec:
  # Fill in who answers for it.
  owner: {team: payments, contact: unknown}
  target: {serviceAccount: ledger}
  rules:
  # 1 connection, at 2027-01-15T08:00:00Z
  - name: machine-batch-01
    ports: [5432]
    from: [{machine: batch-01}]
  # 13 connections, the last at 2027-01-15T08:01:00Z
  - name: shop-web
    ports: [80, 5432]
    from: [{serviceAccount: {namespace: shop, name: web}}]
"
        .replace("HASH", &policies[0].rules[0].name.as_str()[26..])
    );
}

#[test]
fn the_owner_and_the_mode_are_those_of_the_policies_that_are_there() {
    let ledger = id("ns/payments/sa/ledger");
    let owner = Owner {
        team: "pay \"and\" more".to_owned(),
        contact: "#payments".to_owned(),
        runbook: Some("https://runbooks.example/a\\b".to_owned()),
    };
    let existing = Existing {
        names: BTreeSet::from(["payments/learned-ledger".to_owned()]),
        owners: BTreeMap::from([(ledger.clone(), (owner.clone(), Mode::Audit))]),
    };
    let found = learn(&seen([edge(&id("ns/shop/sa/web"), &ledger, 80)]), &existing);
    let read = read(&text(&found.policies));
    let [policy] = read.as_slice() else { panic!("{read:?}") };
    assert_eq!((&policy.owner, policy.mode), (&owner, Mode::Audit));
    // That one is not replaced.
    assert_eq!(policy.name.to_string(), "payments/learned-ledger-2");
}

#[test]
fn names_are_dns_labels_of_their_own_and_stay_the_same() {
    let long = "a".repeat(200);
    let names = ["a-b", "a.b", "a", long.as_str(), "machine-m"];
    let destinations = names.iter().map(|name| id(&format!("ns/default/sa/{name}")));
    let callers = [id("ns/a/sa/b-c"), id("ns/a-b/sa/c"), id("ns/a.b/sa/c"), id("machine/m")];
    let edges: Vec<Edge> = destinations
        .chain([id("machine/m")])
        .flat_map(|destination| callers.clone().map(|caller| edge(&caller, &destination, 80)))
        .collect();
    let policies = learned(edges.clone());
    assert_eq!(policies.len(), 6);
    let is_label = |name: &str| {
        (1..=63).contains(&name.len())
            && name.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '-'))
            && !name.starts_with('-')
            && !name.ends_with('-')
    };
    let full: BTreeSet<String> =
        policies.iter().map(|policy| format!("{}/{}", policy.namespace, policy.name)).collect();
    assert_eq!(full.len(), policies.len(), "{full:?}");
    for policy in &policies {
        assert!(is_label(policy.name.as_str()), "{}", policy.name);
        let rules: BTreeSet<&str> = policy.rules.iter().map(|rule| rule.name.as_str()).collect();
        assert_eq!(rules.len(), callers.len(), "{rules:?}");
        assert!(rules.iter().copied().all(is_label), "{rules:?}");
    }
    assert_eq!(learned(edges.into_iter().rev()), policies);
}

#[test]
fn nothing_is_longer_than_a_custom_resource_may_be() {
    let ledger = id("ns/payments/sa/ledger");
    let callers = (0..300).map(|number| edge(&id(&format!("ns/shop/sa/c{number}")), &ledger, 80));
    let web = id("ns/shop/sa/web");
    let ports = (1..=600).map(|port| edge(&web, &ledger, port));
    let policies = learned(callers.chain(ports));
    let names: Vec<&str> = policies.iter().map(|policy| policy.name.as_str()).collect();
    assert_eq!(names, ["learned-ledger", "learned-ledger-2"]);
    let rules: Vec<_> = policies.iter().flat_map(|policy| &policy.rules).collect();
    assert_eq!(rules.len(), 303);
    assert!(policies.iter().all(|policy| policy.rules.len() <= 256));
    assert!(rules.iter().all(|rule| rule.ports.len() <= 256));
    let ports: usize = rules.iter().map(|rule| rule.ports.len()).sum();
    assert_eq!(ports, 900);
    assert_eq!(read(&text(&policies)).len(), 2);
}

#[test]
fn what_no_manifest_can_name_is_told() {
    let (web, ledger) = (id("ns/shop/sa/web"), id("ns/payments/sa/ledger"));
    let odd = [
        edge(&web, &id("node/db-01"), 80),
        edge(&web, &id("ns/Payments/sa/ledger"), 80),
        edge(&id("ns/shop/sa/Web"), &ledger, 80),
        Edge { source: End::Address("10.0.0.9".parse().unwrap()), ..edge(&web, &ledger, 80) },
        Edge { destination: End::Address("fd00::9".parse().unwrap()), ..edge(&web, &ledger, 80) },
    ];
    let all = odd.iter().cloned().chain([edge(&web, &ledger, 80)]);
    let found = learn(&seen(all), &Existing::default());
    let told: BTreeSet<Edge> = found.unspeakable.into_iter().collect();
    assert_eq!(told, BTreeSet::from(odd));
    assert_eq!(found.policies.len(), 1);
}

#[test]
fn what_passed_and_what_was_denied_make_one_rule() {
    let (web, ledger) = (id("ns/shop/sa/web"), id("ns/payments/sa/ledger"));
    let passed = edge(&web, &ledger, 80);
    let denied = Edge { outcome: Outcome::Denied, ..passed.clone() };
    let policies = learned([passed, denied]);
    let [policy] = policies.as_slice() else { panic!("{policies:?}") };
    let [rule] = policy.rules.as_slice() else { panic!("{:?}", policy.rules) };
    assert_eq!((rule.ports.len(), rule.seen.count), (1, 2));
}

fn any_id() -> impl Strategy<Value = SpiffeId> {
    let name = || prop::sample::select(NAMES.to_vec());
    (name(), name()).prop_map(|(namespace, name)| id(&format!("ns/{namespace}/sa/{name}")))
}

proptest! {
    #[test]
    fn exactly_what_was_seen_is_allowed(
        edges in prop::collection::vec((any_id(), any_id(), 1_u16..4), 0..12),
    ) {
        let policies = learned(edges.iter().map(|(from, to, port)| edge(from, to, *port)));
        let read = read(&text(&policies));
        // Programs get the same policies as people.
        let values: Vec<AccessPolicy> =
            policies.iter().flat_map(|policy| self::read(&json(policy).to_string())).collect();
        prop_assert_eq!(&values, &read);
        for (policy, learned) in read.iter().zip(&policies) {
            prop_assert_eq!(&policy.name.name, &learned.name);
            let is_account = matches!(policy.target, Target::ServiceAccount(_));
            prop_assert!(is_account);
        }
        let table = table(read);
        let ids: Vec<SpiffeId> = NAMES
            .iter()
            .flat_map(|space| NAMES.iter().map(move |name| id(&format!("ns/{space}/sa/{name}"))))
            .collect();
        let wanted: BTreeSet<_> = edges.iter().cloned().collect();
        for source in &ids {
            for destination in edges.iter().map(|(_, to, _)| to).chain(&ids[..3]) {
                for port in 1..5 {
                    let question = (source.clone(), destination.clone(), port);
                    let allowed = allows(&table, source, destination, port);
                    prop_assert_eq!(allowed, wanted.contains(&question), "{:?}", question);
                }
            }
        }
    }
}
