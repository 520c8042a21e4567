//! One revision of the state, ready to be asked: decisions, and who lives at which address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hauberk_core::{
    identity::{ResourceName, SpiffeId},
    policy::{Backends, DecisionTable, NodePort, ProcessSelector, resolve::MeshWorkload},
};
use hauberk_proto::{
    convert::{ConvertError, Resource},
    state::state_hash,
    v1,
};

/// One revision of the state. Never changed: the next one replaces it.
#[derive(Debug, Default)]
pub(crate) struct Snapshot {
    /// When the numbering of the revisions began, in seconds since the Unix epoch.
    pub(crate) epoch: u64,
    /// Zero before there is any state: then nothing is allowed and the reason is `not_ready`.
    pub(crate) revision: u64,
    pub(crate) state_hash: [u8; 32],
    pub(crate) resources: BTreeMap<String, v1::Resource>,
    pub(crate) table: DecisionTable,
    workloads: Vec<Arc<MeshWorkload>>,
    by_address: HashMap<IpAddr, Address>,
    addresses_of: HashMap<SpiffeId, HashSet<IpAddr>>,
    /// The workloads that are processes of this very host, by the ports they serve.
    own_ports: HashMap<u16, usize>,
    /// As this node sees them.
    services: HashMap<SocketAddr, Backends>,
    /// The same for ports of nodes, and the addresses of all nodes.
    node_ports: HashMap<NodePort, Backends>,
    node_addresses: HashSet<IpAddr>,
    namespaces: HashMap<String, bool>,
}

#[derive(Debug)]
enum Address {
    /// A network namespace of its own: the address is the workload.
    Whole(usize),
    /// A host: the port tells the workload.
    Ports(HashMap<u16, usize>),
}

/// What the directory has for an address.
#[derive(Debug)]
pub(crate) enum Found<'a> {
    /// This workload.
    Workload(&'a Arc<MeshWorkload>),
    /// A machine of the mesh, but none of its declared ports.
    UndeclaredPort,
    /// Nothing.
    Unknown,
}

/// A state that cannot be enforced as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("resource {key}: {source}")]
    Convert { key: String, source: ConvertError },
    #[error("the state's hash is not the one announced")]
    Hash,
    #[error("{address} is claimed by {first} and {second}")]
    Address { address: String, first: String, second: String },
}

impl Snapshot {
    /// Converts a state whole, for the agent of this node, and checks that it is the one announced.
    pub(crate) fn build(
        node: &str,
        revision: u64,
        resources: BTreeMap<String, v1::Resource>,
        announced: &[u8],
    ) -> Result<Self, SnapshotError> {
        let hash = state_hash(&resources);
        if hash != announced {
            return Err(SnapshotError::Hash);
        }
        let (mut workloads, mut policies, mut guardrails) = (Vec::new(), Vec::new(), Vec::new());
        let (mut services, mut namespaces, mut zone) = (Vec::new(), HashMap::new(), None);
        let mut node_addresses = HashSet::new();
        for (key, message) in &resources {
            let resource = Resource::try_from(message.clone())
                .map_err(|source| SnapshotError::Convert { key: key.clone(), source })?;
            match resource {
                Resource::Workload(workload) => workloads.push(Arc::new(workload)),
                Resource::Policy(policy) => policies.push(policy),
                Resource::Guardrail(guardrail) => guardrails.push(guardrail),
                Resource::Namespace(namespace) => {
                    namespaces.insert(namespace.name.to_string(), namespace.enrolled);
                }
                Resource::Node(known) => {
                    node_addresses.extend(known.addresses);
                    if known.name.as_str() == node {
                        zone = known.zone;
                    }
                }
                Resource::Service(service) => services.push(service),
            }
        }
        let seen = services.iter().flat_map(|service| service.seen_from(node, zone.as_deref()));
        let on_nodes =
            services.iter().flat_map(|service| service.node_ports_seen_from(node, zone.as_deref()));
        let (node_ports, services) = (on_nodes.collect(), seen.collect());
        let entitled = workloads.iter().filter(|workload| workload.is_entitled());
        let postures: Vec<_> =
            entitled.map(|workload| (workload.identity.clone(), workload.mode)).collect();
        let mut snapshot = Self {
            epoch: 0,
            revision,
            state_hash: hash,
            resources,
            table: DecisionTable::build(policies, guardrails, postures),
            by_address: HashMap::new(),
            addresses_of: HashMap::new(),
            own_ports: HashMap::new(),
            services,
            node_ports,
            node_addresses,
            namespaces,
            workloads,
        };
        snapshot.index_addresses()?;
        for (place, workload) in snapshot.workloads.iter().enumerate() {
            if workload.node.as_str() == node && workload.process.own_addresses().is_none() {
                let ports = workload.ports.iter().map(|port| (*port, place));
                snapshot.own_ports.extend(ports);
            }
        }
        Ok(snapshot)
    }

    /// The same, of a numbering that began then.
    pub(crate) fn of_epoch(self, epoch: u64) -> Self {
        Self { epoch, ..self }
    }

    /// Whether it takes this one's place: it is of a later epoch, or of the same one and a later revision.
    pub(crate) fn is_older_than(&self, epoch: u64, revision: u64) -> bool {
        (self.epoch, self.revision) < (epoch, revision)
    }

    fn index_addresses(&mut self) -> Result<(), SnapshotError> {
        for (place, workload) in self.workloads.iter().enumerate() {
            self.addresses_of
                .entry(workload.identity.clone())
                .or_default()
                .extend(workload.addresses.iter().copied());
            for address in &workload.addresses {
                let clash = |other: usize, text: String| SnapshotError::Address {
                    address: text,
                    first: self.workloads.get(other).map(|w| w.key()).unwrap_or_default(),
                    second: workload.key(),
                };
                let whole = workload.process.own_addresses().is_some();
                match (self.by_address.get_mut(address), whole) {
                    (None, true) => {
                        self.by_address.insert(*address, Address::Whole(place));
                    }
                    (None, false) => {
                        let ports = workload.ports.iter().map(|port| (*port, place)).collect();
                        self.by_address.insert(*address, Address::Ports(ports));
                    }
                    (Some(Address::Ports(ports)), false) => {
                        for port in &workload.ports {
                            if let Some(other) = ports.insert(*port, place) {
                                return Err(clash(other, format!("{address}:{port}")));
                            }
                        }
                    }
                    (Some(Address::Whole(other)), _) => {
                        let other = *other;
                        return Err(clash(other, address.to_string()));
                    }
                    (Some(Address::Ports(ports)), true) => {
                        let other = ports.values().next().copied().unwrap_or(place);
                        return Err(clash(other, address.to_string()));
                    }
                }
            }
        }
        Ok(())
    }

    /// Who lives at an address.
    pub(crate) fn find(&self, address: SocketAddr) -> Found<'_> {
        let place = match self.by_address.get(&address.ip().to_canonical()) {
            None => return Found::Unknown,
            Some(Address::Whole(place)) => Some(place),
            Some(Address::Ports(ports)) => ports.get(&address.port()),
        };
        match place.and_then(|place| self.workloads.get(*place)) {
            Some(workload) => Found::Workload(workload),
            None => Found::UndeclaredPort,
        }
    }

    /// The workload that serves a port of this very host, at whatever address of it.
    pub(crate) fn on_this_host(&self, port: u16) -> Option<&Arc<MeshWorkload>> {
        self.own_ports.get(&port).and_then(|place| self.workloads.get(*place))
    }

    /// Whether this workload is still one of this node, under whatever name.
    pub(crate) fn has_on(&self, node: &str, workload: &MeshWorkload) -> bool {
        self.on_node(node).any(|one| {
            one.identity == workload.identity && one.process.is_same_as(&workload.process)
        })
    }

    /// Whether this pod, which was one of this node, is free: its namespace has left the mesh.
    pub(crate) fn has_let_go(&self, node: &str, workload: &MeshWorkload) -> bool {
        let ProcessSelector::Pod { .. } = workload.process else { return false };
        let namespace = workload.namespace.as_ref();
        namespace.is_some_and(|name| self.is_enrolled(name.as_str()) == Some(false))
            && !self.has_on(node, workload)
    }

    /// Whether an address is that of a pod of the mesh.
    pub(crate) fn has_pod_at(&self, address: IpAddr) -> bool {
        let workload = self.alone_at(address);
        workload.is_some_and(|one| matches!(one.process, ProcessSelector::Pod { .. }))
    }

    /// The workload that has an address for itself: a pod, or another network namespace.
    pub(crate) fn alone_at(&self, address: IpAddr) -> Option<&Arc<MeshWorkload>> {
        let Some(Address::Whole(place)) = self.by_address.get(&address.to_canonical()) else {
            return None;
        };
        self.workloads.get(*place)
    }

    /// The backends of the service whose address and port this is, or whose port of a node.
    pub(crate) fn service(&self, address: SocketAddr) -> Option<&Backends> {
        let on_node = || {
            let place = NodePort { port: address.port(), is_ipv4: address.is_ipv4() };
            self.node_ports.get(&place).filter(|_| self.node_addresses.contains(&address.ip()))
        };
        self.services.get(&address).or_else(on_node)
    }

    /// Whether the pods of a namespace are in the mesh; nothing if nobody has told of it.
    pub(crate) fn is_enrolled(&self, namespace: &str) -> Option<bool> {
        self.namespaces.get(namespace).copied()
    }

    /// The namespaces of the mesh, and the others.
    pub(crate) fn namespaces(&self) -> (BTreeSet<String>, BTreeSet<String>) {
        let (mesh, outside): (Vec<_>, Vec<_>) =
            self.namespaces.iter().partition(|(_, enrolled)| **enrolled);
        let names =
            |some: Vec<(&String, &bool)>| some.into_iter().map(|(name, _)| name.clone()).collect();
        (names(mesh), names(outside))
    }

    /// The workload that an identity and one of its addresses mean; for names in records.
    pub(crate) fn by_identity(
        &self,
        id: &SpiffeId,
        address: Option<IpAddr>,
    ) -> Option<&Arc<MeshWorkload>> {
        let mut named = self.workloads.iter().filter(|workload| workload.identity == *id);
        let first = named.next();
        let exact = address.and_then(|address| {
            first.into_iter().chain(named).find(|w| w.addresses.contains(&address))
        });
        exact.or(first)
    }

    /// The node on which this identity has this address, if it has.
    pub(crate) fn node_of(&self, id: &SpiffeId, address: IpAddr) -> Option<&ResourceName> {
        let address = address.to_canonical();
        let is_it = |workload: &&Arc<MeshWorkload>| {
            workload.identity == *id && workload.addresses.contains(&address)
        };
        // Most that have no such address are found out without a look at every workload.
        self.owns_address(id, address).then(|| self.workloads.iter().find(is_it))?.map(|w| &w.node)
    }

    /// Whether the directory has this address for this identity.
    pub(crate) fn owns_address(&self, id: &SpiffeId, address: IpAddr) -> bool {
        self.addresses_of.get(id).is_some_and(|set| set.contains(&address.to_canonical()))
    }

    /// Namespace, empty for machines, and name of every workload.
    pub(crate) fn names(&self) -> impl Iterator<Item = (String, String)> + '_ {
        self.workloads.iter().map(|workload| {
            let namespace = workload.namespace.as_ref().map(ToString::to_string);
            (namespace.unwrap_or_default(), workload.name.to_string())
        })
    }

    /// The workloads of a node.
    pub(crate) fn on_node<'a>(
        &'a self,
        node: &'a str,
    ) -> impl Iterator<Item = &'a Arc<MeshWorkload>> + 'a {
        self.workloads.iter().filter(move |workload| workload.node.as_str() == node)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use hauberk_core::policy::{Hints, MeshNode, MeshService, Reach};

    use super::*;

    #[test]
    fn a_node_is_told_by_the_state_in_which_zone_it_is() {
        let near: SocketAddr = "10.0.0.2:8080".parse().unwrap();
        let far: SocketAddr = "10.0.1.2:8080".parse().unwrap();
        let zone = |name: &str| Hints { zones: [name.to_owned()].into(), ..Hints::default() };
        let service = Resource::Service(MeshService {
            namespace: "shop".parse().unwrap(),
            name: "web".parse().unwrap(),
            addresses: ["10.96.0.1".parse().unwrap()].into(),
            ports: [(80, [(near, zone("x")), (far, zone("y"))].into())].into(),
            node_ports: [(30_080, 80)].into(),
            reach: Reach::Cluster,
            affinity: None,
        });
        let node = |name: &str, zone: &str| {
            Resource::Node(MeshNode {
                name: name.parse().unwrap(),
                zone: Some(zone.to_owned()),
                addresses: [format!("192.0.2.{}", name.len()).parse().unwrap()].into(),
            })
        };
        let resources: BTreeMap<String, v1::Resource> =
            [service, node("node-a", "x"), node("node-b", "y")]
                .iter()
                .map(|resource| (resource.key(), resource.message()))
                .collect();
        let hash = state_hash(&resources);
        let seen = |node: &str| {
            let snapshot = Snapshot::build(node, 1, resources.clone(), &hash).unwrap();
            let led = |text: &str| snapshot.service(text.parse().unwrap());
            // Nor any address that is not a node's, nor any other port of one.
            assert_eq!((led("192.0.2.9:30080"), led("192.0.2.6:30081")), (None, None));
            assert_eq!(led("192.0.2.6:30080"), led("10.96.0.1:80"));
            led("10.96.0.1:80").unwrap().clone()
        };
        let of = |first: &[SocketAddr], others: &[SocketAddr]| Backends {
            first: first.iter().copied().collect(),
            others: others.iter().copied().collect(),
            out_of_reach: 0,
            affinity: None,
        };
        assert_eq!(seen("node-a"), of(&[near], &[far]));
        assert_eq!(seen("node-b"), of(&[far], &[near]));
        assert_eq!(seen("node-c"), of(&[near, far], &[]));
    }
}
