//! Binding what owners declare to identities, rule by rule: who is meant, who is not, and what is
//! said of a name that nobody has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on panics")]

use std::{collections::BTreeSet, net::IpAddr};

use hauberk_core::{
    identity::{SpiffeId, TrustDomain},
    manifest::parse,
    policy::{
        GuardrailPorts, Hints, MeshService, Mode, Object, ProcessSelector, Reach,
        resolve::{
            Declared, MeshWorkload, PeerMatch, ResolveError, Resolved, ResolvedGuardrail,
            ResolvedPeers, ResolvedPolicy, ResolvedRule, resolve, settle_addresses,
        },
        service_ports::note_service_ports,
    },
    time::Timestamp,
};

/// Two machines, one of which speaks for itself, and workloads in two namespaces.
const MESH: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: host, labels: {app: ledger}}
spec: {addresses: [10.0.0.1, 'fd00::1']}
---
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: batch, labels: {app: ledger}}
spec: {addresses: [10.0.0.2], process: {cgroup: batch.slice}, ports: [22], mode: Audit}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger-1, namespace: payments, labels: {app: ledger, tier: db, team: pay}}
spec: {machine: host, serviceAccount: ledger, process: {user: ledger}, ports: [5432, 5433]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger-2, namespace: payments, labels: {app: ledger}}
spec:
  machine: batch
  serviceAccount: ledger
  process: {networkNamespace: ledger}
  addresses: [10.0.1.2]
  ports: [5432]
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: report, namespace: payments, labels: {app: report, team: pay}}
spec: {machine: elsewhere, serviceAccount: report, process: {user: report}, ports: []}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: batch, namespace: payments}
spec: {machine: host, serviceAccount: cron, process: {user: cron}, ports: []}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger, namespace: shop, labels: {app: ledger, tier: db}}
spec: {machine: host, serviceAccount: ledger, process: {user: shop-ledger}, ports: [80]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: checkout, namespace: shop}
spec: {machine: host, serviceAccount: checkout, process: {user: checkout}, ports: [80]}
";

const LEDGER: &str = "spiffe://example.org/ns/payments/sa/ledger";
const REPORT: &str = "spiffe://example.org/ns/payments/sa/report";
const SHOP_LEDGER: &str = "spiffe://example.org/ns/shop/sa/ledger";
const CHECKOUT: &str = "spiffe://example.org/ns/shop/sa/checkout";
const BATCH: &str = "spiffe://example.org/machine/batch";

const NOBODY: &str = "spec.target matches no workload, so the policy allows nothing";

fn td(text: &str) -> TrustDomain {
    text.parse().unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn anybody_in(namespace: &str) -> PeerMatch {
    PeerMatch::AnyIn { trust_domain: td("example.org"), namespace: namespace.parse().unwrap() }
}

fn addresses(texts: &[&str]) -> BTreeSet<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn declared(texts: &[&str]) -> Declared {
    let mut declared = Declared::default();
    for text in texts {
        let objects = parse("a.yaml", text).unwrap_or_else(|errors| panic!("{errors:#?}\n{text}"));
        for object in objects {
            match object.value {
                Object::AccessPolicy(policy) => declared.policies.push(policy),
                Object::Guardrail(guardrail) => declared.guardrails.push(guardrail),
                Object::Machine(machine) => declared.machines.push(machine),
                Object::Workload(workload) => declared.workloads.push(workload),
            }
        }
    }
    declared
}

/// The mesh above with one more object.
fn with(object: &str) -> Resolved {
    resolve(&declared(&[MESH, object]), &td("example.org")).unwrap()
}

fn policy(namespace: &str, target: &str, rules: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\n\
         metadata: {{name: p, namespace: {namespace}}}\n\
         spec: {{owner: {{team: a, contact: b}}, target: {{{target}}}, rules: {rules}}}\n"
    )
}

fn guardrail(spec: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1\nkind: Guardrail\nmetadata: {{name: g}}\n\
         spec: {{owner: {{team: a, contact: b}}, {spec}}}\n"
    )
}

fn problems(resolved: &Resolved) -> Vec<(String, &str)> {
    let unresolved = resolved.unresolved.iter();
    unresolved.map(|one| (one.policy.to_string(), one.problem.as_str())).collect()
}

#[test]
fn a_target_means_workloads_of_the_policys_own_namespace_and_machines_by_name_only() {
    let cases: &[(&str, &str, &str, &[&str])] = &[
        // Two workloads of one identity are one destination, and the machine's label is none.
        ("a label", "payments", "selector: {matchLabels: {app: ledger}}", &[LEDGER]),
        ("all labels", "payments", "selector: {matchLabels: {app: ledger, tier: db}}", &[LEDGER]),
        ("several", "payments", "selector: {matchLabels: {team: pay}}", &[LEDGER, REPORT]),
        ("one label of two", "payments", "selector: {matchLabels: {app: report, tier: db}}", &[]),
        ("another value", "payments", "selector: {matchLabels: {app: web}}", &[]),
        ("a key nobody has", "payments", "selector: {matchLabels: {zone: a}}", &[]),
        ("another namespace", "shop", "selector: {matchLabels: {app: ledger}}", &[SHOP_LEDGER]),
        ("only a foreign label", "shop", "selector: {matchLabels: {team: pay}}", &[]),
        ("an empty namespace", "edge", "selector: {matchLabels: {app: ledger}}", &[]),
        ("a service account", "payments", "serviceAccount: ledger", &[LEDGER]),
        ("that of another namespace", "shop", "serviceAccount: ledger", &[SHOP_LEDGER]),
        ("a foreign service account", "payments", "serviceAccount: checkout", &[]),
        ("the name of a workload", "payments", "serviceAccount: ledger-1", &[]),
        ("a machine", "payments", "machine: batch", &[BATCH]),
        ("a machine from anywhere", "edge", "machine: batch", &[BATCH]),
        ("a machine without a process", "payments", "machine: host", &[]),
        ("a machine nobody declared", "payments", "machine: db", &[]),
        ("a workload as a machine", "payments", "machine: report", &[]),
    ];
    for (name, namespace, target, wanted) in cases {
        let resolved = with(&policy(namespace, target, "[]"));
        let bound: Vec<&str> =
            resolved.policies.iter().map(|policy| policy.destination.as_str()).collect();
        assert_eq!(&bound, wanted, "{name}");
        let told = problems(&resolved);
        if wanted.is_empty() {
            assert_eq!(told, [(format!("{namespace}/p"), NOBODY)], "{name}");
        } else {
            assert_eq!(told, [], "{name}");
        }
    }
}

#[test]
fn each_destination_gets_the_whole_policy() {
    let text = "
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: p, namespace: payments}
spec:
  owner: {team: a, contact: b, runbook: c}
  target: {selector: {matchLabels: {team: pay}}}
  mode: Audit
  rules:
  - {name: b, ports: [2, 1], from: [{anyIn: {namespace: shop}}]}
  - {name: a, ports: [3], from: [{machine: batch}], notAfter: 2027-01-31T00:00:00Z}
";
    let from = declared(&[text]).policies.remove(0);
    let rule = |name: &str, ports: &[u16], peer, not_after: Option<&str>| ResolvedRule {
        name: name.parse().unwrap(),
        ports: ports.iter().copied().collect(),
        peers: vec![peer],
        not_after: not_after.map(|end| end.parse().unwrap()),
    };
    let policy = |destination: &str| ResolvedPolicy {
        policy: from.name.clone(),
        owner: from.owner.clone(),
        mode: Mode::Audit,
        destination: id(destination),
        rules: vec![
            rule("a", &[3], PeerMatch::Exact(id(BATCH)), Some("2027-01-31T00:00:00Z")),
            rule("b", &[1, 2], anybody_in("shop"), None),
        ],
    };
    assert_eq!(with(text).policies, [policy(LEDGER), policy(REPORT)]);
}

/// A CronJob has no pod between two runs, and a Deployment may have none for a while.
#[test]
fn a_service_account_that_exists_resolves_without_a_workload() {
    let policy = |target: &str, from: &str| {
        format!(
            "apiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: p, namespace: payments}}\n\
             spec: {{owner: {{team: t, contact: c}}, target: {{serviceAccount: {target}}},\n  \
             rules: [{{name: r, ports: [1], from: [{from}]}}]}}\n"
        )
    };
    let unresolved = |target: &str, from: &str| {
        let mut declared = declared(&[MESH, &policy(target, from)]);
        let name = |text: &str| text.parse().unwrap();
        declared.service_accounts =
            [(name("shop"), name("nightly")), (name("payments"), name("standby"))].into();
        let resolved = resolve(&declared, &td("example.org")).unwrap();
        resolved.unresolved.into_iter().map(|one| one.problem).collect::<Vec<_>>()
    };
    let job = "serviceAccount: {namespace: shop, name: nightly}";
    assert_eq!(unresolved("ledger", &format!("{{{job}}}")), Vec::<String>::new());
    assert_eq!(unresolved("standby", &format!("{{{job}}}")), Vec::<String>::new());
    assert_eq!(unresolved("ledger", "{anyIn: {namespace: shop}}"), Vec::<String>::new());
    // The same name elsewhere is another one.
    let other = unresolved("ledger", "{serviceAccount: {namespace: payments, name: nightly}}");
    assert_eq!(other.len(), 1, "{other:?}");
    let other = unresolved("standby", "{serviceAccount: {namespace: payments, name: nightly}}");
    assert_eq!(other.len(), 1, "also while nobody has the target: {other:?}");
    let other = unresolved("nightly", &format!("{{{job}}}"));
    assert_eq!(other, ["spec.target matches no workload, so the policy allows nothing"]);
}

#[test]
fn a_peer_that_nobody_is_stays_in_the_rule_and_is_told() {
    let unknown = |peer: &str| format!("rule r allows {peer}, which no registered workload has");
    let anybody =
        |namespace: &str| format!("any service account of namespace {namespace} in example.org");
    let cases: [(&str, &str, Vec<String>, Vec<String>); 12] = [
        (
            "a registered service account",
            "serviceAccount: {namespace: shop, name: checkout}",
            vec![CHECKOUT.to_owned()],
            vec![],
        ),
        (
            "an unknown service account",
            "serviceAccount: {namespace: shop, name: web}",
            vec!["spiffe://example.org/ns/shop/sa/web".to_owned()],
            vec![unknown("spiffe://example.org/ns/shop/sa/web")],
        ),
        (
            "the service account of another namespace",
            "serviceAccount: {namespace: payments, name: checkout}",
            vec!["spiffe://example.org/ns/payments/sa/checkout".to_owned()],
            vec![unknown("spiffe://example.org/ns/payments/sa/checkout")],
        ),
        ("a machine", "machine: batch", vec![BATCH.to_owned()], vec![]),
        (
            "a machine without a process",
            "machine: host",
            vec!["spiffe://example.org/machine/host".to_owned()],
            vec![unknown("spiffe://example.org/machine/host")],
        ),
        (
            "a SPIFFE ID of our own",
            "spiffeId: spiffe://example.org/ns/shop/sa/checkout",
            vec![CHECKOUT.to_owned()],
            vec![],
        ),
        (
            "an unknown SPIFFE ID of our own",
            "spiffeId: spiffe://example.org/any/path",
            vec!["spiffe://example.org/any/path".to_owned()],
            vec![unknown("spiffe://example.org/any/path")],
        ),
        (
            "a node, which is no workload",
            "spiffeId: spiffe://example.org/node/host",
            vec!["spiffe://example.org/node/host".to_owned()],
            vec![unknown("spiffe://example.org/node/host")],
        ),
        (
            "a SPIFFE ID of others, whose registry is not here",
            "spiffeId: spiffe://partner.example/ns/x/sa/y",
            vec!["spiffe://partner.example/ns/x/sa/y".to_owned()],
            vec![],
        ),
        ("a namespace", "anyIn: {namespace: shop}", vec![anybody("shop")], vec![]),
        (
            "a namespace without workloads",
            "anyIn: {namespace: edge}",
            vec![anybody("edge")],
            vec![unknown(&anybody("edge"))],
        ),
        (
            "the same twice, in any order",
            "anyIn: {namespace: shop}}, {machine: batch}, \
             {spiffeId: spiffe://example.org/ns/shop/sa/checkout}, \
             {serviceAccount: {namespace: shop, name: checkout}",
            vec![BATCH.to_owned(), CHECKOUT.to_owned(), anybody("shop")],
            vec![],
        ),
    ];
    for (name, from, peers, told) in cases {
        let rules = format!("[{{name: r, ports: [80], from: [{{{from}}}]}}]");
        let resolved = with(&policy("payments", "serviceAccount: ledger", &rules));
        let bound: Vec<String> =
            resolved.policies[0].rules[0].peers.iter().map(ToString::to_string).collect();
        assert_eq!(bound, peers, "{name}");
        let told: Vec<(String, &str)> =
            told.iter().map(|problem| ("payments/p".to_owned(), problem.as_str())).collect();
        assert_eq!(problems(&resolved), told, "{name}");
    }
}

#[test]
fn each_rule_with_an_unknown_peer_is_told_once_however_many_destinations_there_are() {
    let rules = "[{name: a, ports: [1], from: [{machine: x}, {machine: y}]}, \
                 {name: b, ports: [1], from: [{machine: x}]}]";
    let target = "selector: {matchLabels: {team: pay}}";
    let told = |resolved: &Resolved| -> Vec<String> {
        problems(resolved).into_iter().map(|(_, problem)| problem.to_owned()).collect()
    };
    let unknown = |rule: &str, machine: &str| {
        format!(
            "rule {rule} allows spiffe://example.org/machine/{machine}, which no registered \
             workload has"
        )
    };
    assert_eq!(
        told(&with(&policy("payments", target, rules))),
        [unknown("a", "x"), unknown("a", "y"), unknown("b", "x")]
    );
    // Without a destination the rules allow nothing anyway.
    assert_eq!(told(&with(&policy("edge", target, rules))), [NOBODY]);
}

#[test]
fn a_namespace_as_peer_is_its_workloads_in_our_trust_domain_and_nobody_else() {
    let cases = [
        ("a workload of it", CHECKOUT, true),
        ("one that is not registered", "spiffe://example.org/ns/shop/sa/x", true),
        ("another namespace", LEDGER, false),
        ("a namespace that begins alike", "spiffe://example.org/ns/shop-2/sa/checkout", false),
        ("another trust domain", "spiffe://partner.example/ns/shop/sa/checkout", false),
        ("a machine of its name", "spiffe://example.org/machine/shop", false),
        ("a node of its name", "spiffe://example.org/node/shop", false),
        ("the control plane", "spiffe://example.org/control-plane", false),
        ("more path behind it", "spiffe://example.org/ns/shop/sa/checkout/x", false),
        ("the namespace itself", "spiffe://example.org/ns/shop", false),
    ];
    for (name, caller, wanted) in cases {
        assert_eq!(anybody_in("shop").matches(&id(caller)), wanted, "{name}");
    }
    assert!(PeerMatch::Exact(id(LEDGER)).matches(&id(LEDGER)));
    assert!(!PeerMatch::Exact(id(LEDGER)).matches(&id(REPORT)));
}

#[test]
fn a_rule_is_in_force_until_its_end_and_not_at_it() {
    let mut rule = ResolvedRule {
        name: "r".parse().unwrap(),
        ports: [80].into(),
        peers: vec![PeerMatch::Exact(id(LEDGER))],
        not_after: Some(Timestamp::from_unix_millis(1_000)),
    };
    for (now, wanted) in [(i64::MIN, true), (999, true), (1_000, false), (i64::MAX, false)] {
        assert_eq!(rule.in_force(Timestamp::from_unix_millis(now)), wanted, "at {now}");
    }
    rule.not_after = None;
    assert!(rule.in_force(Timestamp::MAX));
}

#[test]
fn a_guardrail_is_bound_to_whom_it_protects_and_whom_it_denies() {
    let only = |ports: &[u16]| GuardrailPorts::Only(ports.iter().copied().collect());
    let exact = |text: &str| PeerMatch::Exact(id(text));
    let cases = [
        (
            "a namespace, all ports, all but some",
            "reason: card data, target: {namespace: payments}, allPorts: true, \
             denyUnlessFrom: [{anyIn: {namespace: payments}}, {machine: batch}]",
            anybody_in("payments"),
            GuardrailPorts::All,
            ResolvedPeers::UnlessFrom(vec![anybody_in("payments"), exact(BATCH)]),
        ),
        (
            "a service account, some ports, some callers",
            "reason: card data, target: {serviceAccount: {namespace: payments, name: ledger}}, \
             ports: [5433, 5432], denyFrom: [{serviceAccount: {namespace: shop, name: checkout}}, \
             {spiffeId: spiffe://partner.example/ns/x/sa/y}]",
            exact(LEDGER),
            only(&[5432, 5433]),
            ResolvedPeers::From(vec![exact(CHECKOUT), exact("spiffe://partner.example/ns/x/sa/y")]),
        ),
        (
            // It denies, so a name that nobody has widens nothing and is no warning.
            "a machine and callers that nobody declared",
            "reason: card data, target: {machine: db}, ports: [22], denyFrom: [{machine: gone}]",
            exact("spiffe://example.org/machine/db"),
            only(&[22]),
            ResolvedPeers::From(vec![exact("spiffe://example.org/machine/gone")]),
        ),
    ];
    for (name, spec, destination, ports, denies) in cases {
        let text = guardrail(spec);
        let from = declared(&[text.as_str()]).guardrails.remove(0);
        let resolved = with(&text);
        let wanted = ResolvedGuardrail {
            policy: from.name,
            owner: from.owner,
            reason: Some("card data".to_owned()),
            destination,
            ports,
            denies,
        };
        assert_eq!(resolved.guardrails, [wanted], "{name}");
        assert_eq!(resolved.unresolved, [], "{name}");
    }
}

#[test]
fn a_workload_has_its_identity_its_addresses_and_a_key_of_its_own() {
    let own = addresses(&["10.0.1.2"]);
    let user = |name: &str| ProcessSelector::User(name.to_owned());
    let workload = |namespace: Option<&str>, name: &str, identity, node: &str| MeshWorkload {
        namespace: namespace.map(|namespace| namespace.parse().unwrap()),
        name: name.parse().unwrap(),
        identity: id(identity),
        node: node.parse().unwrap(),
        addresses: addresses(&["10.0.0.1", "fd00::1"]),
        ports: BTreeSet::new(),
        mode: Mode::Enforce,
        process: user(name),
    };
    let (payments, shop) = (Some("payments"), Some("shop"));
    let cron = "spiffe://example.org/ns/payments/sa/cron";
    let wanted = [
        MeshWorkload {
            ports: [5432, 5433].into(),
            process: user("ledger"),
            ..workload(payments, "ledger-1", LEDGER, "host")
        },
        // In a network namespace it has addresses of its own, and not those of its machine.
        MeshWorkload {
            addresses: own.clone(),
            ports: [5432].into(),
            process: ProcessSelector::NetworkNamespace {
                name: "ledger".to_owned(),
                addresses: own,
            },
            ..workload(payments, "ledger-2", LEDGER, "batch")
        },
        // Of a machine that nobody declared, nobody knows an address.
        MeshWorkload {
            addresses: BTreeSet::new(),
            ..workload(payments, "report", REPORT, "elsewhere")
        },
        MeshWorkload { process: user("cron"), ..workload(payments, "batch", cron, "host") },
        MeshWorkload {
            ports: [80].into(),
            process: user("shop-ledger"),
            ..workload(shop, "ledger", SHOP_LEDGER, "host")
        },
        MeshWorkload { ports: [80].into(), ..workload(shop, "checkout", CHECKOUT, "host") },
        MeshWorkload {
            addresses: addresses(&["10.0.0.2"]),
            ports: [22].into(),
            mode: Mode::Audit,
            process: ProcessSelector::Cgroup("batch.slice".to_owned()),
            ..workload(None, "batch", BATCH, "batch")
        },
    ];
    let resolved = resolve(&declared(&[MESH]), &td("example.org")).unwrap();
    assert_eq!(resolved.workloads, wanted);
    let keys: Vec<String> = resolved.workloads.iter().map(MeshWorkload::key).collect();
    let wanted = [
        "payments/ledger-1",
        "payments/ledger-2",
        "payments/report",
        "payments/batch",
        "shop/ledger",
        "shop/checkout",
        "machine/batch",
    ];
    assert_eq!(keys, wanted);
}

/// When the manifest is read, nobody knows that the partner is we ourselves.
#[test]
fn a_test_that_only_fails_in_our_own_trust_domain_refuses_everything() {
    let rules = "[{name: r, ports: [80], \
                 from: [{serviceAccount: {namespace: shop, name: checkout}}]}], \
                 tests: [{from: {spiffeId: spiffe://example.org/ns/shop/sa/checkout}, port: 80, \
                 expect: deny}]";
    let text = policy("payments", "serviceAccount: ledger", rules);
    let declared = declared(&[MESH, text.as_str()]);
    let refused = resolve(&declared, &td("example.org")).unwrap_err();
    assert!(matches!(&refused, ResolveError::Test { test, .. } if test.number == 0), "{refused:?}");
    assert_eq!(
        refused.to_string(),
        "AccessPolicy payments/p: spec.tests[0]: the test fails: \
         spiffe://example.org/ns/shop/sa/checkout on port 80 should be denied, but the rule \"r\" \
         allows it; mend: correct that rule, or expect allow"
    );
    assert!(resolve(&declared, &td("other.example")).is_ok());
}

#[test]
fn an_address_that_two_claim_stays_with_the_first_and_nobody_refuses_the_rest() {
    let workload =
        |name: &str, process: ProcessSelector, addresses: &[&str], ports: &[u16]| MeshWorkload {
            namespace: Some("shop".parse().unwrap()),
            name: name.parse().unwrap(),
            identity: format!("spiffe://example.org/ns/shop/sa/{name}").parse().unwrap(),
            node: "a".parse().unwrap(),
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            ports: ports.iter().copied().collect(),
            mode: Mode::Enforce,
            process,
        };
    let pod = |name: &str, own: &[&str]| {
        let addresses = own.iter().map(|text| text.parse().unwrap()).collect();
        let (uid, probe_ports) = (name.to_owned(), BTreeSet::new());
        let process = ProcessSelector::Pod { uid, addresses, probe_ports, orphaned: false };
        workload(name, process, own, &[])
    };
    let user = |name: &str, own: &[&str], ports: &[u16]| {
        workload(name, ProcessSelector::User(name.to_owned()), own, ports)
    };
    let mut workloads = vec![
        pod("first", &["10.0.0.1", "fd00::1"]),
        pod("second", &["10.0.0.1", "fd00::2"]),
        user("taker", &["fd00::2", "10.0.0.9"], &[80]),
        user("beside", &["10.0.0.9"], &[81]),
        user("again", &["10.0.0.9"], &[81]),
    ];
    let notes = settle_addresses(&mut workloads);
    let left = |at: usize| -> Vec<String> {
        workloads[at].addresses.iter().map(ToString::to_string).collect()
    };
    assert_eq!(left(0), ["10.0.0.1", "fd00::1"]);
    assert_eq!(left(1), ["fd00::2"]);
    assert_eq!(left(2), ["10.0.0.9"]);
    assert_eq!(left(3), ["10.0.0.9"]);
    assert_eq!(left(4), Vec::<String>::new());
    assert_eq!(workloads[1].process.own_addresses(), Some(&workloads[1].addresses));
    assert_eq!(
        notes,
        [
            "shop/second claims the address 10.0.0.1, which shop/first has",
            "shop/taker claims the address fd00::2, which shop/second has",
            "shop/again claims the address 10.0.0.9, which shop/beside has",
        ]
    );
}

#[test]
fn a_pod_that_gets_its_addresses_is_the_same_processes() {
    use hauberk_core::policy::ProcessSelector;
    let pod = |uid: &str, addresses: &[&str]| ProcessSelector::Pod {
        uid: uid.to_owned(),
        addresses: addresses.iter().map(|address| address.parse().unwrap()).collect(),
        probe_ports: std::collections::BTreeSet::new(),
        orphaned: false,
    };
    assert!(pod("a", &[]).is_same_as(&pod("a", &["10.0.0.1"])));
    assert!(!pod("a", &[]).is_same_as(&pod("b", &[])));
    assert!(!pod("a", &[]).is_same_as(&ProcessSelector::User("a".to_owned())));
    assert!(
        !ProcessSelector::User("a".to_owned()).is_same_as(&ProcessSelector::User("b".to_owned()))
    );
}

#[test]
fn a_rule_about_the_port_of_a_service_is_told_of_that_of_its_pods() {
    let service = |port: u16, backends: &[&str]| MeshService {
        namespace: "payments".parse().unwrap(),
        name: "db".parse().unwrap(),
        addresses: addresses(&["10.96.0.1"]),
        ports: [(
            port,
            backends.iter().map(|text| (text.parse().unwrap(), Hints::default())).collect(),
        )]
        .into(),
        node_ports: [].into(),
        reach: Reach::Cluster,
        affinity: None,
    };
    let about = "is that of Service payments/db; its pods listen on 5432, and rules are about the pods' ports";
    let about = format!("rule r allows port 80, which {about}");
    let (there, elsewhere) = ("10.0.1.2:5432", "10.0.9.9:5432");
    let cases: [(&str, &str, u16, &[&str], bool); 6] = [
        ("the service's port", "[80]", 80, &[there], true),
        ("the pods' port", "[5432]", 80, &[there], false),
        ("both", "[80, 5432]", 80, &[there], false),
        ("another service's", "[80]", 80, &[elsewhere], false),
        ("no service's", "[80]", 81, &[there], false),
        ("one that is the same for some", "[80]", 80, &[there, "10.0.1.2:80"], false),
    ];
    for (name, ports, port, backends, is_told) in cases {
        let rules = format!(
            "[{{name: r, ports: {ports}, from: [{{serviceAccount: {{namespace: shop, name: checkout}}}}]}}]"
        );
        let mut resolved = with(&policy("payments", "serviceAccount: ledger", &rules));
        note_service_ports(&mut resolved, &[service(port, backends)]);
        let wanted = is_told.then(|| ("payments/p".to_owned(), about.as_str()));
        assert_eq!(problems(&resolved), wanted.into_iter().collect::<Vec<_>>(), "{name}");
    }
}
