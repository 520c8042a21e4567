//! The hash of a state is the same for the same state and another for every other one, and a delta
//! leads from one state to exactly the next.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod messages;

use std::collections::{BTreeMap, HashMap};

use hauberk_proto::{
    convert::Resource,
    state::{delta, state_hash},
    v1::{self, mesh_workload::Process, resource::Kind},
};
use messages::{
    CHECKOUT, LEDGER, PARTNER, all_ports, any_in, backend_with, deny_from, deny_unless_from, exact,
    guardrail_with, node_with, only_ports, owner, policy_with, rule_with, service_with,
    workload_with,
};
use prost::Message;
use sha2::{Digest, Sha256};

type State = BTreeMap<String, v1::Resource>;

/// Each resource under its own key, as agents hold them.
fn state(resources: impl IntoIterator<Item = v1::Resource>) -> State {
    let keyed =
        |message: v1::Resource| (Resource::try_from(message.clone()).unwrap().key(), message);
    resources.into_iter().map(keyed).collect()
}

fn everything() -> [v1::Resource; 3] {
    [workload_with(|_| {}), policy_with(|_| {}), guardrail_with(|_| {})]
}

fn under(key: &str, resource: v1::Resource) -> State {
    State::from([(key.to_owned(), resource)])
}

/// Encodes to the two bytes `0a 00`.
fn two_bytes() -> v1::Resource {
    v1::Resource { kind: Some(Kind::Workload(v1::MeshWorkload::default())) }
}

/// The hash as its documentation has it, over encodings as they come.
fn hash_by_the_book(key: &str, encoding: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for bytes in [key.as_bytes(), encoding] {
        hash.update(u64::try_from(bytes.len()).unwrap().to_be_bytes());
        hash.update(bytes);
    }
    hash.finalize().into()
}

#[test]
fn the_order_in_which_resources_come_does_not_matter() {
    let wanted = state_hash(&state(everything()));
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let resources = order.map(|place| everything()[place].clone());
        assert_eq!(state_hash(&state(resources)), wanted, "{order:?}");
    }
}

/// All under one key, so that it is the field that tells.
#[test]
fn every_change_of_a_field_changes_the_hash() {
    let mut cases = vec![("no kind", v1::Resource { kind: None })];
    cases.extend(changed_workloads());
    cases.extend(changed_policies());
    cases.extend(changed_guardrails());
    cases.extend(changed_services());
    let mut seen = HashMap::new();
    for (name, message) in cases {
        let other = seen.insert(state_hash(&under("k", message)), name);
        assert_eq!(other, None, "{name} has the same hash");
    }
}

fn changed_workloads() -> Vec<(&'static str, v1::Resource)> {
    vec![
        ("workload", workload_with(|_| {})),
        ("namespace", workload_with(|message| message.namespace = "shop".to_owned())),
        ("no namespace", workload_with(|message| message.namespace.clear())),
        ("name", workload_with(|message| message.name = "ledger-2".to_owned())),
        ("identity", workload_with(|message| message.spiffe_id = CHECKOUT.to_owned())),
        ("node", workload_with(|message| message.node = "db-02".to_owned())),
        ("address", workload_with(|message| message.addresses[0] = "10.0.0.6".to_owned())),
        ("fewer addresses", workload_with(|message| message.addresses.truncate(1))),
        ("port", workload_with(|message| message.ports[0] = 2)),
        ("fewer ports", workload_with(|message| message.ports.truncate(1))),
        ("mode", workload_with(|message| message.mode = v1::Mode::Audit.into())),
        (
            "network namespace",
            workload_with(|message| {
                message.process = Some(Process::NetworkNamespace("ledger-2".to_owned()));
            }),
        ),
        (
            "user",
            workload_with(|message| message.process = Some(Process::User("ledger".to_owned()))),
        ),
        (
            "cgroup",
            workload_with(|message| message.process = Some(Process::Cgroup("ledger".to_owned()))),
        ),
        ("no process", workload_with(|message| message.process = None)),
    ]
}

fn changed_policies() -> Vec<(&'static str, v1::Resource)> {
    vec![
        ("policy", policy_with(|_| {})),
        ("policy namespace", policy_with(|message| message.namespace = "shop".to_owned())),
        ("policy name", policy_with(|message| message.name = "other".to_owned())),
        ("no owner", policy_with(|message| message.owner = None)),
        (
            "team",
            policy_with(|message| {
                message.owner = Some(v1::Owner { team: "other".to_owned(), ..owner() });
            }),
        ),
        (
            "contact",
            policy_with(|message| {
                message.owner = Some(v1::Owner { contact: "other".to_owned(), ..owner() });
            }),
        ),
        (
            "runbook",
            policy_with(|message| {
                message.owner = Some(v1::Owner { runbook: "other".to_owned(), ..owner() });
            }),
        ),
        ("policy mode", policy_with(|message| message.mode = v1::Mode::Enforce.into())),
        ("destination", policy_with(|message| message.destination = CHECKOUT.to_owned())),
        ("fewer rules", policy_with(|message| message.rules.truncate(1))),
        ("no rules", policy_with(|message| message.rules.clear())),
        ("rule name", rule_with(|rule| rule.name = "other".to_owned())),
        ("rule port", rule_with(|rule| rule.ports[0] = 8444)),
        ("more rule ports", rule_with(|rule| rule.ports.push(8444))),
        ("peer trust domain", rule_with(|rule| rule.peers[0] = any_in("other", "payments"))),
        ("peer namespace", rule_with(|rule| rule.peers[0] = any_in("prod.example", "shop"))),
        ("exact peer", rule_with(|rule| rule.peers[0] = exact(CHECKOUT))),
        ("other exact peer", rule_with(|rule| rule.peers[0] = exact(PARTNER))),
        ("more peers", rule_with(|rule| rule.peers.push(exact(CHECKOUT)))),
        ("end", rule_with(|rule| rule.not_after_unix_ms = Some(1))),
        // Zero is what protobuf leaves out of plain numbers: then it would be "no end".
        ("end at zero", rule_with(|rule| rule.not_after_unix_ms = Some(0))),
    ]
}

fn changed_guardrails() -> Vec<(&'static str, v1::Resource)> {
    let peers = || vec![exact(CHECKOUT), any_in("prod.example", "payments")];
    vec![
        ("guardrail", guardrail_with(|_| {})),
        ("guardrail name", guardrail_with(|message| message.name = "other".to_owned())),
        ("no guardrail owner", guardrail_with(|message| message.owner = None)),
        ("reason", guardrail_with(|message| message.reason = "other".to_owned())),
        ("no reason", guardrail_with(|message| message.reason.clear())),
        (
            "guardrail destination",
            guardrail_with(|message| message.destination = Some(exact(LEDGER))),
        ),
        ("no guardrail destination", guardrail_with(|message| message.destination = None)),
        ("guardrail port", guardrail_with(|message| message.ports = only_ports(vec![2, 65_535]))),
        ("fewer guardrail ports", guardrail_with(|message| message.ports = only_ports(vec![1]))),
        ("empty guardrail ports", guardrail_with(|message| message.ports = only_ports(vec![]))),
        ("all ports", guardrail_with(|message| message.ports = all_ports())),
        ("no guardrail ports", guardrail_with(|message| message.ports = None)),
        ("deny from", guardrail_with(|message| message.denies = deny_from(peers()))),
        (
            "fewer spared",
            guardrail_with(|message| message.denies = deny_unless_from(vec![exact(CHECKOUT)])),
        ),
        ("none spared", guardrail_with(|message| message.denies = deny_unless_from(vec![]))),
        ("none denied", guardrail_with(|message| message.denies = deny_from(vec![]))),
        ("no denial", guardrail_with(|message| message.denies = None)),
    ]
}

fn changed_services() -> Vec<(&'static str, v1::Resource)> {
    let other = || "other".to_owned();
    vec![
        ("service", service_with(|_| {})),
        ("service namespace", service_with(|message| message.namespace = other())),
        ("service name", service_with(|message| message.name = other())),
        ("service address", service_with(|message| message.addresses[0] = other())),
        ("service port", service_with(|message| message.ports[0].port = 81)),
        ("no backend", service_with(|message| message.ports[0].backends.clear())),
        ("any node", service_with(|message| message.own_node_only = false)),
        ("no affinity", service_with(|message| message.affinity_seconds = 0)),
        ("backend address", backend_with(|message| message.address = other())),
        ("backend port", backend_with(|message| message.port = 81)),
        ("fewer nodes", backend_with(|message| message.for_nodes.truncate(1))),
        ("other zone", backend_with(|message| message.for_zones[0] = other())),
        ("no zone", backend_with(|message| message.for_zones.clear())),
        (
            "a zone in place of a node",
            backend_with(|message| message.for_zones.extend(message.for_nodes.pop())),
        ),
        ("node", node_with(|_| {})),
        ("node name", node_with(|message| message.name = other())),
        ("zone", node_with(|message| message.zone = other())),
        ("no port of nodes", service_with(|message| message.ports[0].node_port = 0)),
        ("another address", node_with(|message| message.addresses[0] = other())),
        ("fewer addresses", node_with(|message| message.addresses.truncate(1))),
    ]
}

/// Agents of the version before know none of the fields about nodes and zones, and refuse a state that has
/// any: one in which no service asks for them must have none.
#[test]
fn a_service_that_asks_for_nothing_is_as_it_was() {
    let plain = service_with(|service| {
        service.own_node_only = false;
        service.affinity_seconds = 0;
        service.ports[0].node_port = 0;
        let backend = &mut service.ports[0].backends[0];
        backend.for_nodes.clear();
        backend.for_zones.clear();
    });
    let Some(Kind::Service(service)) = &plain.kind else { panic!("no service") };
    let wanted: [&[u8]; 6] = [
        b"\x0a\x04shop",
        b"\x12\x03web",
        b"\x1a\x0910.96.0.1",
        // Port 80, and of its backend the address and the port 8080.
        b"\x22\x11\x08\x50\x12\x0d",
        b"\x0a\x0810.0.0.2",
        b"\x10\x90\x3f",
    ];
    assert_eq!(service.encode_to_vec(), wanted.concat());
    // As it is read and written again.
    assert_eq!(Resource::try_from(plain.clone()).unwrap().message(), plain);
}

#[test]
fn each_set_of_resources_and_keys_has_a_hash_of_its_own() {
    let [workload, policy, guardrail] = everything();
    let cases = [
        ("nothing", state([])),
        ("one", state([workload.clone()])),
        ("two", state([workload.clone(), policy.clone()])),
        ("two others", state([policy.clone(), guardrail.clone()])),
        ("all", state(everything())),
        ("another key", under("k", workload.clone())),
        ("yet another key", under("l", workload.clone())),
        ("an empty key", under("", workload)),
        (
            "two keys",
            State::from([("k".to_owned(), policy.clone()), ("l".to_owned(), guardrail.clone())]),
        ),
        ("exchanged", State::from([("k".to_owned(), guardrail), ("l".to_owned(), policy)])),
    ];
    let mut seen = HashMap::new();
    for (name, state) in cases {
        let other = seen.insert(state_hash(&state), name);
        assert_eq!(other, None, "{name} has the same hash");
    }
}

#[test]
fn bytes_that_move_between_keys_and_values_change_the_hash() {
    let nothing = || v1::Resource { kind: None };
    let cases = [
        ("from the value to the key", under("ab", two_bytes()), under("ab\n\0", nothing())),
        (
            "from both resources into one key",
            State::from([("a".to_owned(), two_bytes()), ("b".to_owned(), nothing())]),
            State::from([("a\n\0b".to_owned(), nothing())]),
        ),
        (
            "from the first resource and the second key into one key",
            State::from([("a".to_owned(), two_bytes()), ("b".to_owned(), two_bytes())]),
            under("a\n\0b", two_bytes()),
        ),
        (
            "from one key to its neighbour",
            State::from([("a".to_owned(), nothing()), ("bc".to_owned(), nothing())]),
            State::from([("ab".to_owned(), nothing()), ("c".to_owned(), nothing())]),
        ),
    ];
    for (name, one, other) in cases {
        let joined = |state: &State| -> Vec<u8> {
            state
                .iter()
                .flat_map(|(key, value)| [key.as_bytes(), &value.encode_to_vec()].concat())
                .collect()
        };
        // Else the case would show nothing.
        assert_eq!(joined(&one), joined(&other), "{name}");
        assert_ne!(state_hash(&one), state_hash(&other), "{name}");
    }
}

/// Computed elsewhere. Agents and control planes of different versions must agree, or every update
/// is refused: whoever changes the hash changes the protocol.
#[test]
fn the_hash_is_the_one_of_the_other_versions() {
    let cases = [
        (State::new(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (
            under("ab", two_bytes()),
            "78b56d670df8cd1b56ba87ec104cd61c966bb0ee480ed650448b2457191c78d2",
        ),
    ];
    for (state, wanted) in cases {
        let hash: String = state_hash(&state).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hash, wanted);
    }
}

/// A newer control plane may say more of a rule, such as a further condition. Protobuf drops what
/// it does not know, and what is left would allow more than was meant. Only the hash tells: it was
/// made with that field, and no agent enforces a state whose hash is not the one announced.
#[test]
fn a_field_that_this_version_does_not_know_does_not_pass_in_silence() {
    // A field with a length below 128, which takes one byte.
    let field = |number: u8, bytes: &[u8]| {
        let mut out = vec![(number << 3) | 2, u8::try_from(bytes.len()).unwrap()];
        out.extend(bytes);
        out
    };
    let rule = v1::Rule { name: "web".to_owned(), ports: vec![80], ..v1::Rule::default() };
    let known = rule.encode_to_vec();
    let newer = [known.clone(), field(15, b"only on Mondays")].concat();
    // The rule is field 6 of a policy, which is field 2 of a resource.
    let [known, newer] = [known, newer].map(|rule| field(2, &field(6, &rule)));
    let read = v1::Resource::decode(newer.as_slice()).unwrap();
    assert_eq!(read, v1::Resource::decode(known.as_slice()).unwrap());
    assert_eq!(state_hash(&under("k", read.clone())), hash_by_the_book("k", &known));
    assert_ne!(state_hash(&under("k", read)), hash_by_the_book("k", &newer));
}

/// As agents do it: what is gone goes, the rest comes under its own key.
fn apply(before: &State, (upserts, removals): (Vec<v1::Resource>, Vec<String>)) -> State {
    let mut after = before.clone();
    after.retain(|key, _| !removals.contains(key));
    after.extend(state(upserts));
    after
}

#[test]
fn a_delta_leads_from_any_state_to_any_other() {
    let [workload, policy, guardrail] = everything();
    let changed = workload_with(|message| message.ports.clear());
    let renamed = workload_with(|message| message.name = "ledger-2".to_owned());
    let states = [
        state([]),
        state(everything()),
        state([workload.clone()]),
        state([policy.clone(), guardrail.clone()]),
        state([changed, policy.clone(), guardrail]),
        state([renamed, workload, policy]),
    ];
    for before in &states {
        for after in &states {
            assert_eq!(apply(before, delta(before, after)), *after);
        }
    }
}

#[test]
fn a_delta_has_what_changed_and_nothing_else() {
    let [workload, policy, guardrail] = everything();
    let all = state(everything());
    assert_eq!(delta(&all, &all), (vec![], vec![]));
    let changed = workload_with(|message| message.ports.clear());
    let after = state([changed.clone(), policy.clone(), guardrail.clone()]);
    assert_eq!(delta(&all, &after), (vec![changed], vec![]));
    let after = state([policy, guardrail]);
    assert_eq!(delta(&all, &after), (vec![], vec!["workload:payments/ledger-1".to_owned()]));
    assert_eq!(delta(&after, &all), (vec![workload], vec![]));
}
