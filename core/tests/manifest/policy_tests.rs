//! The tests that a policy carries, and the decision of a mesh in which that policy is in force.

use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    manifest::parse,
    policy::{
        DecisionTable, Object, Request, Verdict,
        resolve::{Declared, resolve},
    },
    time::Timestamp,
};
use proptest::prelude::*;

use super::{object, policy};

/// A caller as a manifest writes it, and who that is in example.org.
type Caller = (String, SpiffeId);

/// Before the end of every rule here: tests do not look at it.
fn early() -> Timestamp {
    "2000-01-01T00:00:00Z".parse().unwrap()
}

fn service_account(namespace: u8, name: u8) -> Caller {
    (
        format!("serviceAccount: {{namespace: n{namespace}, name: s{name}}}"),
        format!("spiffe://example.org/ns/n{namespace}/sa/s{name}").parse().unwrap(),
    )
}

fn machine(number: u8) -> Caller {
    (
        format!("machine: m{number}"),
        format!("spiffe://example.org/machine/m{number}").parse().unwrap(),
    )
}

/// Of names that we have too, so that only the trust domain tells.
fn partner(namespace: u8, name: u8) -> Caller {
    let id = format!("spiffe://partner.example/ns/n{namespace}/sa/s{name}");
    (format!("spiffeId: {id}"), id.parse().unwrap())
}

fn callers() -> impl Strategy<Value = Caller> {
    prop_oneof![
        3 => (0_u8..3, 0_u8..3).prop_map(|(namespace, name)| service_account(namespace, name)),
        1 => (0_u8..3).prop_map(machine),
        1 => (0_u8..3, 0_u8..3).prop_map(|(namespace, name)| partner(namespace, name)),
    ]
}

fn peers() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => callers().prop_map(|(text, _)| text),
        1 => (0_u8..3).prop_map(|namespace| format!("anyIn: {{namespace: n{namespace}}}")),
    ]
}

/// The list of rules, as YAML.
fn rules() -> impl Strategy<Value = String> {
    let rule = (
        prop::collection::btree_set(80_u16..84, 1..3),
        prop::collection::vec(peers(), 1..3),
        prop::sample::select(&["", ", notAfter: 2001-01-01T00:00:00Z"][..]),
    );
    prop::collection::vec(rule, 0..5).prop_map(|rules| {
        let numbered = rules.into_iter().enumerate();
        let texts: Vec<String> = numbered
            .map(|(number, (ports, peers, end))| {
                let ports: Vec<u16> = ports.into_iter().collect();
                let from: Vec<String> = peers.iter().map(|peer| format!("{{{peer}}}")).collect();
                let from = from.join(", ");
                format!("{{name: r{number}, ports: {ports:?}, from: [{from}]{end}}}")
            })
            .collect();
        format!("[{}]", texts.join(", "))
    })
}

/// The destinations that a policy can have here, each with its identity.
const TARGETS: [(&str, &str); 3] = [
    ("selector: {matchLabels: {app: ledger}}", "spiffe://example.org/ns/payments/sa/ledger"),
    ("serviceAccount: ledger", "spiffe://example.org/ns/payments/sa/ledger"),
    ("machine: db", "spiffe://example.org/machine/db"),
];

/// Everybody who is named above is registered, and so are the destinations.
fn hosts() -> Vec<String> {
    let workload = |namespace: &str, name: &str| {
        let metadata = format!("{{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}");
        let process = format!("process: {{user: {namespace}-{name}}}, ports: [80]");
        object(
            "Workload",
            &metadata,
            &format!("{{machine: host, serviceAccount: {name}, {process}}}"),
        )
    };
    let mut hosts = vec![workload("payments", "ledger")];
    for namespace in ["n0", "n1", "n2"] {
        hosts.extend(["s0", "s1", "s2"].map(|name| workload(namespace, name)));
    }
    let machine = |name| {
        object("Machine", &format!("{{name: {name}}}"), "{process: {user: self}, ports: [80]}")
    };
    hosts.extend(["m0", "m1", "m2", "db"].map(machine));
    hosts
}

/// Whether a mesh with this policy lets the caller in.
fn decides(policy: &str, caller: &SpiffeId, destination: &str, port: u16) -> bool {
    let mut declared = Declared::default();
    for text in hosts().iter().map(String::as_str).chain([policy]) {
        for object in parse("a.yaml", text).unwrap() {
            match object.value {
                Object::AccessPolicy(policy) => declared.policies.push(policy),
                Object::Guardrail(guardrail) => declared.guardrails.push(guardrail),
                Object::Machine(machine) => declared.machines.push(machine),
                Object::Workload(workload) => declared.workloads.push(workload),
            }
        }
    }
    let trust_domain: TrustDomain = "example.org".parse().unwrap();
    let resolved = resolve(&declared, &trust_domain).unwrap();
    let postures: Vec<_> =
        resolved.workloads.iter().map(|one| (one.identity.clone(), one.mode)).collect();
    let table = DecisionTable::build(resolved.policies, resolved.guardrails, postures);
    let destination: SpiffeId = destination.parse().unwrap();
    let request = Request { source: caller, destination: &destination, port, now: early() };
    match table.decide(request) {
        Verdict::Allow(_) => true,
        Verdict::Deny(_) | Verdict::WouldDeny(_) => false,
    }
}

proptest! {
    #[test]
    fn a_test_of_a_policy_comes_out_as_the_decision_does(
        rules in rules(),
        (target, destination) in prop::sample::select(&TARGETS[..]),
        mode in prop::sample::select(&["Enforce", "Audit"][..]),
        (caller, id) in callers(),
        port in 80_u16..85,
    ) {
        let expecting = |expect: &str| {
            policy(&format!(
                "{{owner: {{team: a, contact: b}}, target: {{{target}}}, mode: {mode}, \
                 rules: {rules}, tests: [{{from: {{{caller}}}, port: {port}, expect: {expect}}}]}}"
            ))
        };
        let (allow, deny) = (expecting("allow"), expecting("deny"));
        let (right, wrong, allowed) = match parse("a.yaml", &allow) {
            Ok(_) => (allow, deny, true),
            Err(_) => (deny, allow, false),
        };
        prop_assert!(parse("a.yaml", &right).is_ok(), "{right}");
        let errors = parse("a.yaml", &wrong).unwrap_err();
        prop_assert_eq!(errors.len(), 1, "{:#?}", errors);
        prop_assert_eq!(&errors[0].path, "spec.tests[0]");
        prop_assert!(errors[0].problem.starts_with("the test fails: "), "{}", errors[0]);
        prop_assert_eq!(decides(&right, &id, destination, port), allowed, "{}", right);
    }
}

#[test]
fn every_failing_test_of_a_policy_is_told_at_its_place_beside_one_that_cannot_be_read() {
    let text = policy(
        "
  owner: {team: a, contact: b}
  target: {machine: db}
  rules:
  - {name: web, ports: [80, 81], from: [{machine: m0}, {anyIn: {namespace: n0}}]}
  tests:
  - {from: {machine: m0}, port: 80, expect: deny}
  - {from: {machine: m0}, port: 81, expect: allow}
  - {from: {machine: m0}, port: 82, expect: allow}
  - {from: {anyIn: {namespace: n0}}, port: 80, expect: allow}
  - {from: {serviceAccount: {namespace: n0, name: s0}}, port: 81, expect: deny}
  - {from: {machine: m1}, port: 80, expect: allow}
  - {from: {machine: m1}, port: 82, expect: allow}",
    );
    let errors = parse("a.yaml", &text).unwrap_err();
    let told: Vec<(usize, &str, &str)> =
        errors.iter().map(|error| (error.line, &*error.path, &*error.problem)).collect();
    let should =
        |caller: &str, outcome: &str| format!("the test fails: {caller} should be {outcome}");
    let allows = "denied, but the rule \"web\" allows it";
    let wanted = [
        (10, "spec.tests[0]", should("machine m0 on port 80", allows)),
        (
            12,
            "spec.tests[2]",
            should(
                "machine m0 on port 82",
                "allowed, but is denied: the rules with this caller have other ports",
            ),
        ),
        (13, "spec.tests[3].from", "anyIn is not one caller".to_owned()),
        (14, "spec.tests[4]", should("service account n0/s0 on port 81", allows)),
        (
            15,
            "spec.tests[5]",
            should(
                "machine m1 on port 80",
                "allowed, but is denied: the rules with this port have other callers",
            ),
        ),
        (
            16,
            "spec.tests[6]",
            should("machine m1 on port 82", "allowed, but is denied: no rule has this caller"),
        ),
    ];
    let wanted: Vec<(usize, &str, &str)> =
        wanted.iter().map(|(line, path, problem)| (*line, *path, problem.as_str())).collect();
    assert_eq!(told, wanted);
}
