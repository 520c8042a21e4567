//! One good message of each kind, written by hand: for tests to break and to change.

use hauberk_proto::v1::{
    self,
    guardrail::{Denies, Ports},
    mesh_workload::Process,
    peer,
    resource::Kind,
};

pub(crate) const LEDGER: &str = "spiffe://prod.example/ns/payments/sa/ledger";
pub(crate) const CHECKOUT: &str = "spiffe://prod.example/ns/shop/sa/checkout";
pub(crate) const PARTNER: &str = "spiffe://partner.example/any/path";

/// The good workload after a change.
pub(crate) fn workload_with(change: impl FnOnce(&mut v1::MeshWorkload)) -> v1::Resource {
    let mut message = v1::MeshWorkload {
        namespace: "payments".to_owned(),
        name: "ledger-1".to_owned(),
        spiffe_id: LEDGER.to_owned(),
        node: "db-01".to_owned(),
        addresses: vec!["10.0.0.5".to_owned(), "fd00::5".to_owned()],
        ports: vec![1, 65_535],
        mode: v1::Mode::Enforce.into(),
        process: Some(Process::NetworkNamespace("ledger".to_owned())),
    };
    change(&mut message);
    v1::Resource { kind: Some(Kind::Workload(message)) }
}

/// The good policy after a change.
pub(crate) fn policy_with(change: impl FnOnce(&mut v1::DestinationPolicy)) -> v1::Resource {
    let rules = vec![
        v1::Rule {
            name: "callers".to_owned(),
            ports: vec![80, 8443],
            peers: vec![exact(CHECKOUT), exact(PARTNER)],
            not_after_unix_ms: Some(1_800_000_000_000),
        },
        v1::Rule {
            name: "neighbours".to_owned(),
            ports: vec![8443],
            peers: vec![any_in("prod.example", "payments")],
            not_after_unix_ms: None,
        },
    ];
    let mut message = v1::DestinationPolicy {
        namespace: "payments".to_owned(),
        name: "ledger".to_owned(),
        owner: Some(owner()),
        mode: v1::Mode::Audit.into(),
        destination: LEDGER.to_owned(),
        rules,
    };
    change(&mut message);
    v1::Resource { kind: Some(Kind::Policy(message)) }
}

/// The good policy after a change of its last rule.
pub(crate) fn rule_with(change: impl FnOnce(&mut v1::Rule)) -> v1::Resource {
    policy_with(|policy| change(policy.rules.last_mut().unwrap()))
}

/// The good guardrail after a change.
pub(crate) fn guardrail_with(change: impl FnOnce(&mut v1::Guardrail)) -> v1::Resource {
    let mut message = v1::Guardrail {
        name: "pci".to_owned(),
        owner: Some(owner()),
        reason: "cardholder data".to_owned(),
        destination: Some(any_in("prod.example", "payments")),
        ports: only_ports(vec![1, 65_535]),
        denies: deny_unless_from(vec![exact(CHECKOUT), any_in("prod.example", "payments")]),
    };
    change(&mut message);
    v1::Resource { kind: Some(Kind::Guardrail(message)) }
}

/// The good service after a change.
pub(crate) fn service_with(change: impl FnOnce(&mut v1::Service)) -> v1::Resource {
    let mut message = v1::Service {
        namespace: "shop".to_owned(),
        name: "web".to_owned(),
        addresses: vec!["10.96.0.1".to_owned()],
        ports: vec![v1::ServicePort {
            port: 80,
            node_port: 30_080,
            backends: vec![v1::Backend {
                address: "10.0.0.2".to_owned(),
                port: 8080,
                for_nodes: vec!["db-01".to_owned(), "db-02".to_owned()],
                for_zones: vec!["zone-A".to_owned()],
            }],
        }],
        own_node_only: true,
        affinity_seconds: 10_800,
    };
    change(&mut message);
    v1::Resource { kind: Some(Kind::Service(message)) }
}

/// The good service after a change of its only backend.
pub(crate) fn backend_with(change: impl FnOnce(&mut v1::Backend)) -> v1::Resource {
    service_with(|service| change(&mut service.ports[0].backends[0]))
}

/// The good node after a change.
pub(crate) fn node_with(change: impl FnOnce(&mut v1::Node)) -> v1::Resource {
    let mut message = v1::Node {
        name: "db-01".to_owned(),
        zone: "zone-A".to_owned(),
        addresses: vec!["192.0.2.1".to_owned(), "fd00::1".to_owned()],
    };
    change(&mut message);
    v1::Resource { kind: Some(Kind::Node(message)) }
}

pub(crate) fn owner() -> v1::Owner {
    v1::Owner {
        team: "ledger team".to_owned(),
        contact: "#ledger".to_owned(),
        runbook: "https://runbooks.example/ledger".to_owned(),
    }
}

pub(crate) fn exact(id: &str) -> v1::Peer {
    v1::Peer { kind: Some(peer::Kind::SpiffeId(id.to_owned())) }
}

pub(crate) fn any_in(trust_domain: &str, namespace: &str) -> v1::Peer {
    let (trust_domain, namespace) = (trust_domain.to_owned(), namespace.to_owned());
    v1::Peer { kind: Some(peer::Kind::AnyIn(v1::AnyIn { trust_domain, namespace })) }
}

pub(crate) fn only_ports(ports: Vec<u32>) -> Option<Ports> {
    Some(Ports::OnlyPorts(v1::Ports { ports }))
}

pub(crate) fn all_ports() -> Option<Ports> {
    Some(Ports::AllPorts(v1::AllPorts {}))
}

pub(crate) fn deny_from(peers: Vec<v1::Peer>) -> Option<Denies> {
    Some(Denies::DenyFrom(v1::Peers { peers }))
}

pub(crate) fn deny_unless_from(peers: Vec<v1::Peer>) -> Option<Denies> {
    Some(Denies::DenyUnlessFrom(v1::Peers { peers }))
}
