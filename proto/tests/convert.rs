//! A message becomes a resource whole or is refused whole, with the field and the reason.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod messages;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use hauberk_core::{
    identity::{ResourceName, SpiffeId},
    policy::{
        GuardrailPorts, Hints, MeshNode, MeshService, Mode, Owner, PolicyKind, PolicyRef,
        ProcessSelector, Reach,
        resolve::{
            MeshWorkload, PeerMatch, ResolvedGuardrail, ResolvedPeers, ResolvedPolicy, ResolvedRule,
        },
    },
    time::Timestamp,
};
use hauberk_proto::{
    convert::{ConvertError, Resource},
    v1::{self, mesh_workload::Process},
};
use messages::{
    CHECKOUT, LEDGER, PARTNER, all_ports, any_in, backend_with, deny_from, deny_unless_from, exact,
    guardrail_with, node_with, only_ports, policy_with, rule_with, service_with, workload_with,
};
use prost::Message;

fn name(text: &str) -> ResourceName {
    text.parse().unwrap()
}

fn id(text: &str) -> SpiffeId {
    text.parse().unwrap()
}

fn exactly(text: &str) -> PeerMatch {
    PeerMatch::Exact(id(text))
}

fn neighbours() -> PeerMatch {
    PeerMatch::AnyIn { trust_domain: "prod.example".parse().unwrap(), namespace: name("payments") }
}

fn owner() -> Owner {
    Owner {
        team: "ledger team".to_owned(),
        contact: "#ledger".to_owned(),
        runbook: Some("https://runbooks.example/ledger".to_owned()),
    }
}

/// What the good message of a workload means.
fn workload() -> MeshWorkload {
    let addresses = BTreeSet::from(["10.0.0.5".parse().unwrap(), "fd00::5".parse().unwrap()]);
    MeshWorkload {
        namespace: Some(name("payments")),
        name: name("ledger-1"),
        identity: id(LEDGER),
        node: name("db-01"),
        addresses: addresses.clone(),
        ports: BTreeSet::from([1, 65_535]),
        mode: Mode::Enforce,
        process: ProcessSelector::NetworkNamespace { name: "ledger".to_owned(), addresses },
    }
}

/// What the good message of a policy means.
fn policy() -> ResolvedPolicy {
    ResolvedPolicy {
        policy: PolicyRef {
            kind: PolicyKind::AccessPolicy,
            namespace: Some(name("payments")),
            name: name("ledger"),
        },
        owner: owner(),
        mode: Mode::Audit,
        destination: id(LEDGER),
        rules: vec![
            ResolvedRule {
                name: name("callers"),
                ports: BTreeSet::from([80, 8443]),
                peers: vec![exactly(CHECKOUT), exactly(PARTNER)],
                not_after: Some(Timestamp::from_unix_millis(1_800_000_000_000)),
            },
            ResolvedRule {
                name: name("neighbours"),
                ports: BTreeSet::from([8443]),
                peers: vec![neighbours()],
                not_after: None,
            },
        ],
    }
}

/// What the good message of a guardrail means.
fn guardrail() -> ResolvedGuardrail {
    ResolvedGuardrail {
        policy: PolicyRef { kind: PolicyKind::Guardrail, namespace: None, name: name("pci") },
        owner: owner(),
        reason: Some("cardholder data".to_owned()),
        destination: neighbours(),
        ports: GuardrailPorts::Only(BTreeSet::from([1, 65_535])),
        denies: ResolvedPeers::UnlessFrom(vec![exactly(CHECKOUT), neighbours()]),
    }
}

/// What the good message of a service means.
fn service() -> MeshService {
    let hints = Hints {
        nodes: BTreeSet::from([name("db-01"), name("db-02")]),
        zones: BTreeSet::from(["zone-A".to_owned()]),
    };
    MeshService {
        namespace: name("shop"),
        name: name("web"),
        addresses: BTreeSet::from(["10.96.0.1".parse().unwrap()]),
        ports: [(80, [("10.0.0.2:8080".parse().unwrap(), hints)].into())].into(),
        node_ports: [(30_080, 80)].into(),
        reach: Reach::Node,
        affinity: Some(Duration::from_secs(10_800)),
    }
}

/// What the good message of a node means.
fn node() -> MeshNode {
    MeshNode {
        name: name("db-01"),
        zone: Some("zone-A".to_owned()),
        addresses: BTreeSet::from(["192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap()]),
    }
}

/// A machine that speaks for itself, has no address and serves nothing: all that may be empty.
fn machine() -> MeshWorkload {
    MeshWorkload {
        namespace: None,
        name: name("db-01"),
        identity: id("spiffe://prod.example/machine/db-01"),
        addresses: BTreeSet::new(),
        ports: BTreeSet::new(),
        mode: Mode::Audit,
        process: ProcessSelector::Cgroup("system.slice/ledger.service".to_owned()),
        ..workload()
    }
}

/// A guardrail that takes the other side of each choice.
fn other_guardrail() -> ResolvedGuardrail {
    ResolvedGuardrail {
        owner: Owner { runbook: None, ..owner() },
        reason: None,
        destination: exactly(LEDGER),
        ports: GuardrailPorts::All,
        denies: ResolvedPeers::From(vec![neighbours(), exactly(PARTNER)]),
        ..guardrail()
    }
}

/// Messages written by hand and what they mean. A conversion there and back alone would not notice
/// two fields that are exchanged in both directions.
fn pairs() -> Vec<(&'static str, v1::Resource, Resource)> {
    vec![
        ("network namespace", workload_with(|_| {}), Resource::Workload(workload())),
        (
            "user",
            workload_with(|message| message.process = Some(Process::User("1000".to_owned()))),
            Resource::Workload(MeshWorkload {
                process: ProcessSelector::User("1000".to_owned()),
                ..workload()
            }),
        ),
        (
            "machine with a cgroup",
            workload_with(|message| {
                message.namespace.clear();
                message.name = "db-01".to_owned();
                message.spiffe_id = "spiffe://prod.example/machine/db-01".to_owned();
                message.addresses.clear();
                message.ports.clear();
                message.mode = v1::Mode::Audit.into();
                message.process = Some(Process::Cgroup("system.slice/ledger.service".to_owned()));
            }),
            Resource::Workload(machine()),
        ),
        ("policy", policy_with(|_| {}), Resource::Policy(policy())),
        (
            // It allows nothing.
            "policy without rules",
            policy_with(|message| {
                message.mode = v1::Mode::Enforce.into();
                message.rules.clear();
            }),
            Resource::Policy(ResolvedPolicy { mode: Mode::Enforce, rules: vec![], ..policy() }),
        ),
        ("guardrail", guardrail_with(|_| {}), Resource::Guardrail(guardrail())),
        (
            "guardrail with the other choices",
            guardrail_with(|message| {
                message.owner = Some(v1::Owner { runbook: String::new(), ..messages::owner() });
                message.reason.clear();
                message.destination = Some(exact(LEDGER));
                message.ports = all_ports();
                message.denies =
                    deny_from(vec![any_in("prod.example", "payments"), exact(PARTNER)]);
            }),
            Resource::Guardrail(other_guardrail()),
        ),
        ("service", service_with(|_| {}), Resource::Service(service())),
        (
            "service without backends",
            service_with(|message| {
                message.own_node_only = false;
                message.affinity_seconds = 0;
                message.ports[0].backends.clear();
                message.ports[0].node_port = 0;
            }),
            Resource::Service(MeshService {
                ports: BTreeMap::from([(80, BTreeMap::new())]),
                node_ports: BTreeMap::new(),
                reach: Reach::Cluster,
                affinity: None,
                ..service()
            }),
        ),
        ("node", node_with(|_| {}), Resource::Node(node())),
        (
            "node without anything",
            node_with(|message| {
                message.zone.clear();
                message.addresses.clear();
            }),
            Resource::Node(MeshNode { zone: None, addresses: BTreeSet::new(), ..node() }),
        ),
    ]
}

fn over_the_wire(message: &v1::Resource) -> v1::Resource {
    v1::Resource::decode(message.encode_to_vec().as_slice()).unwrap()
}

#[test]
fn each_resource_says_the_same_on_the_wire_and_off_it() {
    for (name, message, resource) in pairs() {
        assert_eq!(resource.message(), message, "{name}");
        assert_eq!(Resource::try_from(over_the_wire(&message)), Ok(resource), "{name}");
    }
}

#[test]
fn the_key_of_a_resource_is_its_kind_and_its_names() {
    let cases = [
        (Resource::Workload(workload()), "workload:payments/ledger-1"),
        (Resource::Workload(machine()), "workload:machine/db-01"),
        (
            Resource::Policy(policy()),
            "policy:payments/ledger:spiffe://prod.example/ns/payments/sa/ledger",
        ),
        (
            Resource::Guardrail(guardrail()),
            "guardrail:pci:any service account of namespace payments in prod.example",
        ),
        (
            Resource::Guardrail(other_guardrail()),
            "guardrail:pci:spiffe://prod.example/ns/payments/sa/ledger",
        ),
        (Resource::Service(service()), "service:shop/web"),
        (Resource::Node(node()), "node:db-01"),
    ];
    for (resource, key) in cases {
        assert_eq!(resource.key(), key);
    }
}

const MISSING: &str = "is missing or of an unknown kind";
const NO_NAME: &str = r#""": the name is empty: give 1 to 253 characters"#;
const NO_SUCH_NAME: &str =
    r#""P": the name "P" contains 'P': only a-z, 0-9, "-" and "." are allowed"#;
const ANY_NAME: &str = r#""*": the name "*" contains '*': only a-z, 0-9, "-" and "." are allowed"#;
const NO_ID: &str = r#""": "" does not begin with "spiffe://", in lower case"#;
const NO_SUCH_ID: &str = r#""*": "*" does not begin with "spiffe://", in lower case"#;
const ANY_ID: &str = "\"spiffe://prod.example/ns/*\": the path segment \"*\" contains '*': only \
                      a-z, A-Z, 0-9, \".\", \"_\" and \"-\" are allowed";
const NO_TRUST_DOMAIN: &str =
    r#": the trust domain is empty: write it after "spiffe://", like "spiffe://prod.example""#;
const ANY_TRUST_DOMAIN: &str =
    r#"*: the trust domain "*" contains '*': only a-z, 0-9, ".", "_" and "-" are allowed"#;

/// Cut to 16 bits, the third would be 8443 and the last 65535.
const NO_PORTS: [(u32, &str); 4] = [
    (0, "0 is not a port"),
    (65_536, "65536 is not a port"),
    (73_979, "73979 is not a port"),
    (u32::MAX, "4294967295 is not a port"),
];

/// The one that stands for none, and ones of other versions.
const NO_MODES: [i32; 3] = [0, 3, -1];

/// What would let everybody in if it were taken for a pattern or for all, and what is of no kind.
fn no_peers() -> [(&'static str, v1::Peer, &'static str); 8] {
    [
        ("peer of no kind", v1::Peer { kind: None }, MISSING),
        ("peer with an empty ID", exact(""), NO_ID),
        ("peer with no ID", exact("*"), NO_SUCH_ID),
        ("peer with a pattern of IDs", exact("spiffe://prod.example/ns/*"), ANY_ID),
        ("peers of an empty trust domain", any_in("", "shop"), NO_TRUST_DOMAIN),
        ("peers of any trust domain", any_in("*", "shop"), ANY_TRUST_DOMAIN),
        ("peers of an empty namespace", any_in("prod.example", ""), NO_NAME),
        ("peers of any namespace", any_in("prod.example", "*"), ANY_NAME),
    ]
}

/// What is broken, the message, and the field and the problem that the refusal must name.
type Case = (&'static str, v1::Resource, &'static str, &'static str);

fn broken_workloads() -> Vec<Case> {
    let mut cases = vec![
        (
            "bad namespace",
            workload_with(|message| message.namespace = "P".to_owned()),
            "workload.namespace",
            NO_SUCH_NAME,
        ),
        ("no name", workload_with(|message| message.name.clear()), "workload.name", NO_NAME),
        (
            "bad name",
            workload_with(|message| message.name = "P".to_owned()),
            "workload.name",
            NO_SUCH_NAME,
        ),
        (
            "no SPIFFE ID",
            workload_with(|message| message.spiffe_id.clear()),
            "workload.spiffe_id",
            NO_ID,
        ),
        (
            "bad SPIFFE ID",
            workload_with(|message| message.spiffe_id = "*".to_owned()),
            "workload.spiffe_id",
            NO_SUCH_ID,
        ),
        ("no node", workload_with(|message| message.node.clear()), "workload.node", NO_NAME),
        (
            "bad node",
            workload_with(|message| message.node = "P".to_owned()),
            "workload.node",
            NO_SUCH_NAME,
        ),
        (
            "empty address",
            workload_with(|message| message.addresses.push(String::new())),
            "workload.addresses",
            "\"\" is not an IP address",
        ),
        (
            "half an address",
            workload_with(|message| message.addresses.push("10.0.0".to_owned())),
            "workload.addresses",
            "\"10.0.0\" is not an IP address",
        ),
        (
            "whole network",
            workload_with(|message| message.addresses.push("10.0.0.0/8".to_owned())),
            "workload.addresses",
            "\"10.0.0.0/8\" is not an IP address",
        ),
        (
            "network namespace without addresses",
            workload_with(|message| message.addresses.clear()),
            "workload.addresses",
            MISSING,
        ),
        (
            "no process",
            workload_with(|message| message.process = None),
            "workload.process",
            MISSING,
        ),
    ];
    for (port, problem) in NO_PORTS {
        let message = workload_with(|message| message.ports.push(port));
        cases.push(("bad port", message, "workload.ports", problem));
    }
    for mode in NO_MODES {
        let message = workload_with(|message| message.mode = mode);
        cases.push(("bad mode", message, "workload.mode", MISSING));
    }
    cases
}

fn broken_policies() -> Vec<Case> {
    let mut cases = vec![
        (
            "no namespace",
            policy_with(|message| message.namespace.clear()),
            "policy.namespace",
            NO_NAME,
        ),
        (
            "bad namespace",
            policy_with(|message| message.namespace = "P".to_owned()),
            "policy.namespace",
            NO_SUCH_NAME,
        ),
        ("no name", policy_with(|message| message.name.clear()), "policy.name", NO_NAME),
        (
            "bad name",
            policy_with(|message| message.name = "P".to_owned()),
            "policy.name",
            NO_SUCH_NAME,
        ),
        ("no owner", policy_with(|message| message.owner = None), "policy.owner", MISSING),
        (
            "no destination",
            policy_with(|message| message.destination.clear()),
            "policy.destination",
            NO_ID,
        ),
        (
            "any destination",
            policy_with(|message| message.destination = "*".to_owned()),
            "policy.destination",
            NO_SUCH_ID,
        ),
        ("rule without name", rule_with(|rule| rule.name.clear()), "rule.name", NO_NAME),
        (
            "rule with a bad name",
            rule_with(|rule| rule.name = "P".to_owned()),
            "rule.name",
            NO_SUCH_NAME,
        ),
        // Neither may be read as "all".
        ("rule without ports", rule_with(|rule| rule.ports.clear()), "rule.ports", MISSING),
        ("rule without peers", rule_with(|rule| rule.peers.clear()), "rule.peers", MISSING),
    ];
    for (port, problem) in NO_PORTS {
        let message = rule_with(|rule| rule.ports.push(port));
        cases.push(("rule with a bad port", message, "rule.ports", problem));
    }
    for mode in NO_MODES {
        let message = policy_with(|message| message.mode = mode);
        cases.push(("bad mode", message, "policy.mode", MISSING));
    }
    for (name, peer, problem) in no_peers() {
        cases.push((name, rule_with(|rule| rule.peers.push(peer)), "rule.peers", problem));
    }
    cases
}

fn broken_guardrails() -> Vec<Case> {
    let mut cases = vec![
        ("no name", guardrail_with(|message| message.name.clear()), "guardrail.name", NO_NAME),
        (
            "bad name",
            guardrail_with(|message| message.name = "P".to_owned()),
            "guardrail.name",
            NO_SUCH_NAME,
        ),
        ("no owner", guardrail_with(|message| message.owner = None), "guardrail.owner", MISSING),
        (
            "no destination",
            guardrail_with(|message| message.destination = None),
            "guardrail.destination",
            MISSING,
        ),
        ("no ports", guardrail_with(|message| message.ports = None), "guardrail.ports", MISSING),
        (
            "empty ports",
            guardrail_with(|message| message.ports = only_ports(vec![])),
            "guardrail.only_ports",
            MISSING,
        ),
        ("no denial", guardrail_with(|message| message.denies = None), "guardrail.denies", MISSING),
        (
            "denial of nobody",
            guardrail_with(|message| message.denies = deny_from(vec![])),
            "guardrail.deny_from",
            MISSING,
        ),
        (
            "denial without exception",
            guardrail_with(|message| message.denies = deny_unless_from(vec![])),
            "guardrail.deny_unless_from",
            MISSING,
        ),
    ];
    for (port, problem) in NO_PORTS {
        let message = guardrail_with(|message| message.ports = only_ports(vec![8443, port]));
        cases.push(("bad port", message, "guardrail.only_ports", problem));
    }
    for (name, peer, problem) in no_peers() {
        let destination = Some(peer.clone());
        let message = guardrail_with(|message| message.destination = destination);
        cases.push((name, message, "guardrail.destination", problem));
        let denied = deny_from(vec![exact(CHECKOUT), peer.clone()]);
        let message = guardrail_with(|message| message.denies = denied);
        cases.push((name, message, "guardrail.deny_from", problem));
        let spared = deny_unless_from(vec![exact(CHECKOUT), peer]);
        let message = guardrail_with(|message| message.denies = spared);
        cases.push((name, message, "guardrail.deny_unless_from", problem));
    }
    cases
}

fn broken_services() -> Vec<Case> {
    let mut cases = vec![
        ("no name", service_with(|message| message.name.clear()), "service.name", NO_NAME),
        (
            "no address",
            service_with(|message| message.addresses.clear()),
            "service.addresses",
            MISSING,
        ),
        (
            "port that stands twice",
            service_with(|message| {
                message.ports.push(v1::ServicePort { node_port: 0, ..message.ports[0].clone() });
            }),
            "service.ports.port",
            "the port 80 stands twice",
        ),
        (
            "port of nodes that stands twice",
            service_with(|message| {
                message.ports.push(v1::ServicePort { port: 81, ..message.ports[0].clone() });
            }),
            "service.ports.node_port",
            "the port 30080 stands twice",
        ),
        (
            "backend that stands twice",
            service_with(|message| {
                let backends = &mut message.ports[0].backends;
                backends.push(backends[0].clone());
            }),
            "service.ports.backends",
            "the backend 10.0.0.2:8080 stands twice",
        ),
        (
            "backend without address",
            backend_with(|message| message.address.clear()),
            "service.ports.backends",
            "\"\" is not an IP address",
        ),
        (
            "backend for a node without a name",
            backend_with(|message| message.for_nodes.push(String::new())),
            "service.ports.backends.for_nodes",
            NO_NAME,
        ),
        (
            "backend for any node",
            backend_with(|message| message.for_nodes.push("*".to_owned())),
            "service.ports.backends.for_nodes",
            ANY_NAME,
        ),
        (
            "backend for a zone without a name",
            backend_with(|message| message.for_zones.push(String::new())),
            "service.ports.backends.for_zones",
            MISSING,
        ),
        ("node without name", node_with(|message| message.name.clear()), "node.name", NO_NAME),
    ];
    for (port, problem) in NO_PORTS {
        let message = backend_with(|message| message.port = port);
        cases.push(("backend with a bad port", message, "service.ports.backends", problem));
    }
    cases
}

#[test]
fn each_broken_message_is_refused_with_its_reason() {
    let mut cases: Vec<Case> =
        vec![("no kind", v1::Resource { kind: None }, "resource.kind", MISSING)];
    cases.extend(broken_workloads());
    cases.extend(broken_policies());
    cases.extend(broken_guardrails());
    cases.extend(broken_services());
    for (name, message, field, problem) in cases {
        let error = ConvertError { field: field.to_owned(), problem: problem.to_owned() };
        assert_eq!(error.to_string(), format!("{field}: {problem}"), "{name}");
        assert_eq!(Resource::try_from(message), Err(error), "{name}");
    }
}

/// The message as of a newer version with a further choice: field 15, an empty message.
fn of_a_newer_version<M: Message + Default>(message: &M) -> M {
    let mut bytes = message.encode_to_vec();
    bytes.extend([0x7a, 0x00]);
    M::decode(bytes.as_slice()).unwrap()
}

#[test]
fn a_choice_that_this_version_does_not_know_is_refused() {
    let cases = [
        (of_a_newer_version(&v1::Resource { kind: None }), "resource.kind"),
        (
            workload_with(|message| {
                message.process = None;
                *message = of_a_newer_version(message);
            }),
            "workload.process",
        ),
        (
            rule_with(|rule| rule.peers.push(of_a_newer_version(&v1::Peer { kind: None }))),
            "rule.peers",
        ),
        (
            guardrail_with(|message| {
                message.ports = None;
                *message = of_a_newer_version(message);
            }),
            "guardrail.ports",
        ),
        (
            guardrail_with(|message| {
                message.denies = None;
                *message = of_a_newer_version(message);
            }),
            "guardrail.denies",
        ),
    ];
    for (message, field) in cases {
        let error = ConvertError { field: field.to_owned(), problem: MISSING.to_owned() };
        assert_eq!(Resource::try_from(message), Err(error));
    }
}

/// Every number is an instant, so none is refused: a rule that has an end must keep one.
#[test]
fn an_end_is_never_read_as_no_end() {
    let cases = [
        ("no end", None, None),
        ("the zero of the wire", Some(0), Some(Timestamp::UNIX_EPOCH)),
        ("before the epoch", Some(-1), Some(Timestamp::from_unix_millis(-1))),
        ("before the calendar", Some(i64::MIN), Some(Timestamp::MIN)),
        ("after the calendar", Some(i64::MAX), Some(Timestamp::MAX)),
    ];
    for (name, millis, end) in cases {
        let message = rule_with(|rule| rule.not_after_unix_ms = millis);
        let Ok(Resource::Policy(policy)) = Resource::try_from(over_the_wire(&message)) else {
            panic!("{name}: no policy");
        };
        assert_eq!(policy.rules.last().unwrap().not_after, end, "{name}");
    }
}

/// The agent joins these texts to the folder of network namespaces and to the root of the cgroups.
/// An empty, absolute or climbing one leads elsewhere: `/proc/1/ns/net` is the machine itself, all
/// of which would speak as this workload. Manifests refuse them; the wire must as well.
#[test]
fn a_process_that_may_stand_for_more_than_one_is_refused() {
    let cases = [
        ("no user", Process::User(String::new())),
        ("no cgroup", Process::Cgroup(String::new())),
        ("root of the cgroups", Process::Cgroup("/".to_owned())),
        ("climbing cgroup", Process::Cgroup("system.slice/../..".to_owned())),
        ("no network namespace", Process::NetworkNamespace(String::new())),
        ("folder itself", Process::NetworkNamespace(".".to_owned())),
        ("folder above", Process::NetworkNamespace("..".to_owned())),
        ("climbing path", Process::NetworkNamespace("../../proc/1/ns/net".to_owned())),
        ("absolute path", Process::NetworkNamespace("/proc/1/ns/net".to_owned())),
    ];
    let mut taken = Vec::new();
    for (name, process) in cases {
        match Resource::try_from(workload_with(|message| message.process = Some(process))) {
            Ok(_) => taken.push(name),
            Err(error) => assert_eq!(error.field, "workload.process", "{name}"),
        }
    }
    assert!(taken.is_empty(), "taken: {taken:?}");
}

/// With one key for both, one of them silently replaces the other in the state. To refuse such a
/// namespace is as good as another key.
#[test]
fn a_workload_of_a_namespace_named_machine_does_not_take_the_place_of_a_machine() {
    let message = workload_with(|message| {
        message.namespace = "machine".to_owned();
        message.name = "db-01".to_owned();
        message.spiffe_id = "spiffe://prod.example/ns/machine/sa/db".to_owned();
    });
    match Resource::try_from(message) {
        Ok(resource) => assert_ne!(resource.key(), Resource::Workload(machine()).key()),
        Err(error) => assert_eq!(error.field, "workload.namespace"),
    }
}
