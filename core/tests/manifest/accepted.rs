use std::{collections::BTreeMap, time::Duration};

use hauberk_core::{
    manifest::{Located, check_set, parse},
    policy::{
        AccessPolicy, Expectation, Guardrail, GuardrailPeers, GuardrailPorts, Machine, Mode,
        Object, PeerSelector, ProcessSelector, Target, Workload,
    },
};

use super::{object, policy};

const POLICY: &str = include_str!("../manifests/policy.yaml");
const HOSTS: &str = include_str!("../manifests/hosts.yaml");

#[test]
fn the_example_of_the_design_converts_field_by_field() {
    let objects = parse("policy.yaml", POLICY).unwrap();
    let policy = only_policy(objects);
    assert_eq!(policy.name.to_string(), "payments/ledger");
    assert_eq!(policy.owner.runbook.as_deref(), Some("https://runbooks.example/ledger"));
    let labels = BTreeMap::from([("app".to_owned(), "ledger".to_owned())]);
    assert_eq!(policy.target, Target::Selector(labels));
    assert_eq!(policy.mode, Mode::Enforce);
    let [rule] = policy.rules.as_slice() else { panic!("{:?}", policy.rules) };
    assert_eq!(rule.name.as_str(), "checkout");
    assert_eq!(rule.reason.as_deref(), Some("PAY-142 order capture"));
    assert_eq!(rule.ports, [5432].into());
    let from = [
        PeerSelector::ServiceAccount {
            namespace: "shop".parse().unwrap(),
            name: "checkout".parse().unwrap(),
        },
        PeerSelector::Machine { name: "batch-01".parse().unwrap() },
        PeerSelector::SpiffeId("spiffe://partner.example/ns/x/sa/y".parse().unwrap()),
        PeerSelector::AnyIn { namespace: "reporting".parse().unwrap() },
    ];
    assert_eq!(rule.from, from);
    assert_eq!(rule.not_after, Some("2027-01-31T00:00:00Z".parse().unwrap()));
    assert_eq!(rule.expected_every, Some(Duration::from_secs(90 * 86_400)));
    let expected: Vec<Expectation> = policy.tests.iter().map(|test| test.expect).collect();
    assert_eq!(expected, [Expectation::Allow, Expectation::Deny]);
}

#[test]
fn every_other_kind_converts_and_knows_its_line() {
    let objects = parse("hosts.yaml", HOSTS).unwrap();
    check_set(&objects).unwrap();
    let lines: Vec<usize> = objects.iter().map(|object| object.line).collect();
    assert_eq!(lines, [2, 12, 22, 31, 40]);
    assert!(objects.iter().all(|object| object.source == "hosts.yaml"));
    let values: Vec<Object> = objects.into_iter().map(|object| object.value).collect();
    let [
        Object::Guardrail(Guardrail { ports: GuardrailPorts::All, denies, .. }),
        Object::Guardrail(Guardrail { ports: GuardrailPorts::Only(ports), .. }),
        Object::Machine(Machine { addresses, workload: Some(own), .. }),
        Object::Workload(Workload { labels, process: ledger, .. }),
        Object::Workload(Workload { process: cron, .. }),
    ] = values.as_slice()
    else {
        panic!("{values:#?}")
    };
    assert!(matches!(denies, GuardrailPeers::UnlessFrom(peers) if peers.len() == 1));
    assert_eq!(*ports, [5432, 5433].into());
    assert_eq!(addresses.len(), 2);
    assert_eq!(own.selector, ProcessSelector::User("1000".to_owned()));
    assert_eq!(own.mode, Mode::Audit);
    assert_eq!(labels["example.org/tier"], "");
    let cgroup = "system.slice/ledger.service".to_owned();
    assert_eq!(ledger.selector, ProcessSelector::Cgroup(cgroup));
    let (name, addresses) = ("cron_1".to_owned(), ["10.0.1.5".parse().unwrap()].into());
    assert_eq!(cron.selector, ProcessSelector::NetworkNamespace { name, addresses });
    assert!(cron.ports.is_empty());
}

#[test]
fn the_order_of_rules_is_that_of_their_names() {
    let rule = |name| format!("{{name: {name}, ports: [1], from: [{{machine: a}}]}}");
    let rules = format!("[{}, {}]", rule("b"), rule("a"));
    let policy = only_policy(parse("a.yaml", &with_rules(&rules)).unwrap());
    let names: Vec<&str> = policy.rules.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn a_policy_without_any_rule_says_so_and_denies_everybody() {
    assert!(only_policy(parse("a.yaml", &with_rules("[]")).unwrap()).rules.is_empty());
}

#[test]
fn empty_documents_windows_line_ends_and_a_byte_order_mark_change_nothing() {
    let plain = parse("a.yaml", POLICY).unwrap();
    for (name, text) in [
        ("empty documents", format!("---\n---\n# nothing\n---\nnull\n---\n{POLICY}")),
        ("windows line ends", POLICY.replace('\n', "\r\n")),
        ("byte order mark", format!("\u{feff}{POLICY}")),
    ] {
        let objects = parse("a.yaml", &text).unwrap_or_else(|errors| panic!("{name}: {errors:?}"));
        assert_eq!(objects[0].value, plain[0].value, "{name}");
    }
    assert_eq!(parse("a.yaml", "").unwrap(), []);
}

#[test]
fn tests_ignore_expiry_and_cover_a_whole_namespace_when_the_rule_does() {
    let rule = "{name: a, ports: [1], from: [{anyIn: {namespace: b}}], \
                notAfter: 2001-01-01T00:00:00Z}";
    let spec = |from, expect| {
        policy(&format!(
            "{{owner: {{team: a, contact: b}}, target: {{machine: c}}, rules: [{rule}], \
             tests: [{{from: {{{from}}}, port: 1, expect: {expect}}}]}}"
        ))
    };
    for (from, expect) in [
        ("serviceAccount: {namespace: b, name: x}", "allow"),
        ("serviceAccount: {namespace: c, name: x}", "deny"),
        ("machine: b", "deny"),
        ("spiffeId: spiffe://foreign.example/ns/b/sa/x", "deny"),
    ] {
        parse("a.yaml", &spec(from, expect)).unwrap_or_else(|errors| panic!("{from}: {errors:?}"));
    }
}

#[test]
fn names_that_old_yaml_takes_for_switches_are_names() {
    for name in ["n", "y", "on", "off", "yes", "no"] {
        let text = object("Machine", &format!("{{name: {name}}}"), "{}");
        let objects = parse("a.yaml", &text).unwrap_or_else(|errors| panic!("{errors:?}"));
        let Object::Machine(machine) = &objects[0].value else { panic!("{objects:?}") };
        assert_eq!(machine.name.as_str(), name);
    }
}

#[test]
fn a_user_may_be_a_number_without_quotes() {
    let spec = "{machine: a, serviceAccount: b, process: {user: 1000}, ports: []}";
    let objects = parse("a.yaml", &object("Workload", "{name: a, namespace: b}", spec)).unwrap();
    let Object::Workload(workload) = &objects[0].value else { panic!("{objects:?}") };
    assert_eq!(workload.process.selector, ProcessSelector::User("1000".to_owned()));
}

fn with_rules(rules: &str) -> String {
    policy(&format!("{{owner: {{team: a, contact: b}}, target: {{machine: c}}, rules: {rules}}}"))
}

fn only_policy(objects: Vec<Located<Object>>) -> AccessPolicy {
    match <[Located<Object>; 1]>::try_from(objects) {
        Ok([Located { value: Object::AccessPolicy(policy), .. }]) => policy,
        other => panic!("{other:?}"),
    }
}
