//! Manifests: whole or not at all, and every mistake with its place and its mend.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use hauberk_core::{
    manifest::{check_set, parse},
    policy::{Object, Target},
};
use proptest::prelude::*;

const GOOD: &str = "\
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: ledger, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments', runbook: https://example.org/ledger}
  target: {selector: {matchLabels: {app: ledger}}}
  mode: Enforce
  rules:
  - name: checkout
    reason: PAY-142 order capture
    ports: [5432]
    from:
    - serviceAccount: {namespace: shop, name: checkout}
    - machine: {name: batch-01}
    - spiffeId: spiffe://partner.example/ns/x/sa/y
    - anyIn: {namespace: reporting}
    notAfter: 2027-01-31T00:00:00Z
    expectedEvery: 90d
  tests:
  - {from: {serviceAccount: {namespace: shop, name: checkout}}, port: 5432, expect: allow}
  - {from: {serviceAccount: {namespace: shop, name: web}}, port: 5432, expect: deny}
";

const AWFUL: &str = "\
apiVersion: hauberk.dev/v1
kind: AccessPolicy
metadata: {name: Ledger}
spec:
  owner: {team: payments}
  target: {selector: {matchLabels: {}}, serviceAccount: ledger}
  mode: enforce
  rules:
  - name: one
    ports: []
    from: []
  - name: one
    ports: [0, 70000, '80', 443, 443]
    form: [{machine: {name: x}}]
    notAfter: tomorrow
    expectedEvery: 3 weeks
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: w, namespace: n}
spec:
  machine: m
  serviceAccount: w
  process: {user: w, networkNamespace: ../w}
  addresses: [127.0.0.1]
  ports: [80]
---
apiVersion: hauberk.dev/v1alpha1
kind: Policy
metadata: {name: p}
spec: {}
";

#[test]
fn the_documented_example_converts() {
    let objects = parse("good.yaml", GOOD).unwrap();
    let [object] = &objects[..] else { panic!("{objects:?}") };
    let Object::AccessPolicy(policy) = &object.value else { panic!("{object:?}") };
    assert!(matches!(&policy.target, Target::Selector(labels) if labels["app"] == "ledger"));
    assert_eq!(policy.rules[0].from.len(), 4);
    assert_eq!(policy.rules[0].expected_every.unwrap().as_secs(), 90 * 86_400);
}

#[test]
fn every_mistake_is_told_with_place_and_mend() {
    let errors = parse("awful.yaml", AWFUL).unwrap_err();
    let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(text.join("\n"));
}

#[test]
fn a_policy_whose_own_test_fails_is_refused() {
    let text = GOOD.replace("port: 5432, expect: deny", "port: 5432, expect: allow");
    let errors = parse("p.yaml", &text).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert_eq!(errors[0].path, "spec.tests[1]");
    assert!(errors[0].problem.contains("no rule of this policy allows it"), "{}", errors[0]);
}

#[test]
fn yaml_itself_is_refused_with_its_place() {
    let cases = [
        ("a key twice", "apiVersion: a\napiVersion: b\n"),
        ("a tab", "spec:\n\tx: 1\n"),
        ("an open bracket", "spec: [1, 2\n"),
    ];
    for (name, text) in cases {
        let errors = parse("y.yaml", text).unwrap_err();
        assert_eq!(errors.len(), 1, "{name}: {errors:?}");
    }
    let bomb = "a: &a [x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\n\
                c: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: &d [*c,*c,*c,*c,*c,*c,*c,*c]\n\
                e: &e [*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e,*e,*e,*e,*e,*e]\n";
    assert!(parse("bomb.yaml", bomb).is_err());
}

#[test]
fn objects_that_clash_name_each_others_place() {
    let text = "\
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: m}
spec: {addresses: [10.0.0.1]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: a, namespace: n}
spec: {machine: m, serviceAccount: a, process: {user: u}, ports: [80]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: b, namespace: n}
spec: {machine: m, serviceAccount: b, process: {user: u}, ports: [80]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: c, namespace: n}
spec: {machine: q, serviceAccount: c, process: {networkNamespace: c}, addresses: [10.0.0.1], ports: []}
";
    let errors = check_set(&parse("set.yaml", text).unwrap()).unwrap_err();
    let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
    insta::assert_snapshot!(text.join("\n"));
}

proptest! {
    #[test]
    fn no_text_makes_the_parser_panic(text in any::<String>()) {
        let _outcome = parse("x.yaml", &text);
    }

    #[test]
    fn a_damaged_manifest_never_yields_an_empty_list(
        place in 0..GOOD.len(),
        length in 0_usize..30,
        with in "[ -~\n]{0,6}",
    ) {
        let end = (place + length).min(GOOD.len());
        let text = format!("{}{with}{}", &GOOD[..place], &GOOD[end..]);
        for object in parse("x.yaml", &text).unwrap_or_default() {
            if let Object::AccessPolicy(policy) = object.value {
                for rule in policy.rules {
                    prop_assert!(!rule.ports.is_empty() && !rule.from.is_empty());
                }
            }
        }
    }
}
