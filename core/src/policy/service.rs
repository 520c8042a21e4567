//! Addresses that stand for others, and which of their backends a node asks first.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use crate::identity::ResourceName;

/// Addresses at which nobody lives: a connection to one of their ports goes to one of the backends, and
/// whether it may is decided about that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshService {
    /// Its namespace.
    pub namespace: ResourceName,
    /// Its name.
    pub name: ResourceName,
    /// Never empty.
    pub addresses: BTreeSet<IpAddr>,
    /// Its ports, and the backends of each that are ready, with whom they are for; maybe none.
    pub ports: BTreeMap<u16, BTreeMap<SocketAddr, Hints>>,
    /// The ports that it has on every node, each with the one of its own that it leads to.
    pub node_ports: BTreeMap<u16, u16>,
    /// How far connections to it go.
    pub reach: Reach,
    /// For how long after its last connection a caller stays with its backend, if it does.
    pub affinity: Option<Duration>,
}

/// A port that a service has on every node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodePort {
    /// Its number.
    pub port: u16,
    /// The address family.
    pub is_ipv4: bool,
}

/// How far connections to a service go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// To all of its backends.
    Cluster,
    /// To those whose hints name the caller's own node, and to no others.
    Node,
}

/// Whom a backend is for. One without any is for nobody in particular.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// Nodes, by their names.
    pub nodes: BTreeSet<ResourceName>,
    /// Zones. No name is empty.
    pub zones: BTreeSet<String>,
}

/// The backends of one address and port, as one node sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Backends {
    /// Those that its connections go to.
    pub first: BTreeSet<SocketAddr>,
    /// Those that are tried while all of the first have just failed.
    pub others: BTreeSet<SocketAddr>,
    /// How many more are ready, on other nodes, of a service that keeps connections on their own.
    pub out_of_reach: usize,
    /// For how long after its last connection a caller stays with its backend, if it does.
    pub affinity: Option<Duration>,
}

impl MeshService {
    /// Whether it matters to it which node is in which zone.
    pub fn asks_for_zones(&self) -> bool {
        self.ports.values().flat_map(BTreeMap::values).any(|hints| !hints.zones.is_empty())
    }

    /// Each address and port, with the backends of the same address family: the application's own
    /// address is of that family, and its peer sees it.
    pub fn seen_from(
        &self,
        node: &str,
        zone: Option<&str>,
    ) -> impl Iterator<Item = (SocketAddr, Backends)> {
        self.ports.iter().flat_map(move |(port, backends)| {
            self.addresses.iter().map(move |address| {
                let backends = self.alike(backends, address.is_ipv4(), node, zone);
                (SocketAddr::new(*address, *port), backends)
            })
        })
    }

    /// The same for its ports on nodes, each for the addresses of one family. They lead to all backends, as with
    /// kube-proxy for callers within the cluster.
    pub fn node_ports_seen_from(
        &self,
        node: &str,
        zone: Option<&str>,
    ) -> impl Iterator<Item = (NodePort, Backends)> {
        let known =
            self.node_ports.iter().filter_map(|(port, own)| Some((port, self.ports.get(own)?)));
        known.flat_map(move |(port, backends)| {
            [true, false].map(move |is_ipv4| {
                let place = NodePort { port: *port, is_ipv4 };
                (place, self.alike(backends, is_ipv4, node, zone))
            })
        })
    }

    /// Its backends of one address family.
    fn alike(
        &self,
        backends: &BTreeMap<SocketAddr, Hints>,
        is_ipv4: bool,
        node: &str,
        zone: Option<&str>,
    ) -> Backends {
        let alike = backends.iter().filter(move |(backend, _)| backend.is_ipv4() == is_ipv4);
        let seen = Backends::seen_from(node, zone, self.reach, alike);
        Backends { affinity: self.affinity, ..seen }
    }
}

impl Backends {
    /// By kube-proxy's rules: hints count only if all backends have them, and one is for this node, or else
    /// for its zone. If not, nobody may be left without a backend, and all are asked alike.
    fn seen_from<'a>(
        node: &str,
        zone: Option<&str>,
        reach: Reach,
        all: impl Iterator<Item = (&'a SocketAddr, &'a Hints)> + Clone,
    ) -> Self {
        let for_node = |hints: &Hints| hints.nodes.contains(node);
        let for_zone = |hints: &Hints| zone.is_some_and(|zone| hints.zones.contains(zone));
        let mut hints = all.clone().map(|(_, hints)| hints);
        let by_node =
            hints.clone().all(|hints| !hints.nodes.is_empty()) && hints.clone().any(for_node);
        let by_zone = hints.clone().all(|hints| !hints.zones.is_empty()) && hints.any(for_zone);
        let is_first = |hints: &Hints| match reach {
            Reach::Node => for_node(hints),
            Reach::Cluster if by_node => for_node(hints),
            Reach::Cluster if by_zone => for_zone(hints),
            Reach::Cluster => true,
        };
        let mut seen = Self::default();
        for (backend, hints) in all {
            if is_first(hints) {
                seen.first.insert(*backend);
            } else {
                match reach {
                    Reach::Cluster => {
                        seen.others.insert(*backend);
                    }
                    Reach::Node => seen.out_of_reach += 1,
                }
            }
        }
        seen
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    fn hints(nodes: &[&str], zones: &[&str]) -> Hints {
        Hints {
            nodes: nodes.iter().map(|name| name.parse().unwrap()).collect(),
            zones: zones.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    fn backend(number: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, number], 8080))
    }

    /// What it shows, the hints of all backends, the caller's zone; the first and the others.
    type Case<'a> = (&'a str, Vec<Hints>, Option<&'a str>, &'a [u8], &'a [u8]);

    /// Backends from 1 on, in this order.
    fn service(reach: Reach, all: &[Hints]) -> MeshService {
        let backends: BTreeMap<_, _> = (1..).map(backend).zip(all.iter().cloned()).collect();
        MeshService {
            namespace: "shop".parse().unwrap(),
            name: "web".parse().unwrap(),
            addresses: ["10.96.0.1".parse().unwrap()].into(),
            ports: [(80, backends)].into(),
            node_ports: BTreeMap::new(),
            reach,
            affinity: None,
        }
    }

    /// As node `a` in this zone sees them: the first, the others, and how many are out of reach.
    fn seen(service: &MeshService, zone: Option<&str>) -> (Vec<u8>, Vec<u8>, usize) {
        let mut places = service.seen_from("a", zone);
        let (address, backends) = places.next().unwrap();
        assert_eq!(address, SocketAddr::from(([10, 96, 0, 1], 80)));
        assert!(places.next().is_none());
        let numbers = |set: &BTreeSet<SocketAddr>| {
            let number = |number: &u8| set.contains(&backend(*number));
            let numbers: Vec<u8> = (1..=9).filter(number).collect();
            assert_eq!(numbers.len(), set.len());
            numbers
        };
        (numbers(&backends.first), numbers(&backends.others), backends.out_of_reach)
    }

    #[test]
    fn hints_count_if_all_backends_have_them_and_one_is_for_the_caller() {
        let none = || hints(&[], &[]);
        let zone = |name: &str| hints(&[], &[name]);
        let both = |node: &str, zone: &str| hints(&[node], &[zone]);
        let (x, y) = (Some("x"), Some("y"));
        let cases: [Case<'_>; 14] = [
            ("no backend", vec![], x, &[], &[]),
            ("no hints", vec![none(), none()], x, &[1, 2], &[]),
            ("the own zone", vec![zone("x"), zone("y"), zone("x")], x, &[1, 3], &[2]),
            ("the other zone", vec![zone("x"), zone("y"), zone("x")], y, &[2], &[1, 3]),
            ("a zone without any", vec![zone("x"), zone("y")], Some("z"), &[1, 2], &[]),
            ("a node without a zone", vec![zone("x"), zone("y")], None, &[1, 2], &[]),
            ("one without a hint", vec![zone("x"), zone("y"), none()], x, &[1, 2, 3], &[]),
            ("one for several zones", vec![hints(&[], &["x", "y"]), zone("x")], y, &[1], &[2]),
            ("all of the own zone", vec![zone("x"), zone("x")], x, &[1, 2], &[]),
            (
                "the own node before the zone",
                vec![both("a", "x"), both("b", "x"), both("c", "y")],
                x,
                &[1],
                &[2, 3],
            ),
            ("the own node in no zone", vec![both("a", "x"), both("b", "x")], None, &[1], &[2]),
            (
                "the zone, as none is on the own node",
                vec![both("b", "x"), both("c", "y")],
                x,
                &[1],
                &[2],
            ),
            (
                "the zone, as one has no node",
                vec![both("a", "y"), zone("x"), both("b", "x")],
                x,
                &[2, 3],
                &[1],
            ),
            ("neither", vec![both("b", "y"), both("c", "y")], x, &[1, 2], &[]),
        ];
        for (name, all, zone, first, others) in cases {
            let wanted = (first.to_vec(), others.to_vec(), 0);
            assert_eq!(seen(&service(Reach::Cluster, &all), zone), wanted, "{name}");
        }
    }

    #[test]
    fn a_service_that_keeps_to_the_node_has_no_others() {
        let node = |name: &str| hints(&[name], &[]);
        let cases: [(&str, Vec<Hints>, &[u8], usize); 5] = [
            ("no backend", vec![], &[], 0),
            ("one here", vec![node("a"), node("b"), node("c")], &[1], 2),
            ("two here", vec![node("a"), node("a")], &[1, 2], 0),
            ("none here", vec![node("b"), node("c")], &[], 2),
            ("one of no known node", vec![node("a"), hints(&[], &[])], &[1], 1),
        ];
        for (name, all, first, out_of_reach) in cases {
            let wanted = (first.to_vec(), vec![], out_of_reach);
            assert_eq!(seen(&service(Reach::Node, &all), Some("x")), wanted, "{name}");
        }
    }

    #[test]
    fn only_backends_of_the_address_family_count_and_only_their_hints() {
        let four: SocketAddr = "10.0.0.2:8080".parse().unwrap();
        let (six, far): (SocketAddr, SocketAddr) =
            ("[fd01::2]:8080".parse().unwrap(), "[fd01::3]:8080".parse().unwrap());
        let backends =
            [(four, Hints::default()), (six, hints(&[], &["x"])), (far, hints(&[], &["y"]))];
        let service = MeshService {
            addresses: ["10.96.0.1".parse().unwrap(), "fd00::1".parse().unwrap()].into(),
            ports: [(80, backends.into())].into(),
            ..service(Reach::Cluster, &[])
        };
        assert!(service.asks_for_zones());
        let places: BTreeMap<_, _> = service.seen_from("a", Some("x")).collect();
        let of = |text: &str| places[&text.parse::<SocketAddr>().unwrap()].clone();
        assert_eq!(of("10.96.0.1:80"), Backends { first: [four].into(), ..Backends::default() });
        let wanted = Backends { first: [six].into(), others: [far].into(), ..Backends::default() };
        assert_eq!(of("[fd00::1]:80"), wanted);
        let affinity = Some(Duration::from_secs(60));
        let service = MeshService { affinity, ..service };
        assert!(service.seen_from("a", None).all(|(_, backends)| backends.affinity == affinity));
    }

    #[test]
    fn a_port_on_nodes_leads_where_the_services_own_does() {
        let (four, six): (SocketAddr, SocketAddr) =
            ("10.0.0.2:8080".parse().unwrap(), "[fd01::2]:8080".parse().unwrap());
        let backends = [(four, Hints::default()), (six, Hints::default())];
        let service = MeshService {
            ports: [(80, backends.into())].into(),
            // One leads to a port that it has not.
            node_ports: [(30_080, 80), (30_081, 81)].into(),
            ..service(Reach::Cluster, &[])
        };
        let places: Vec<_> = service.node_ports_seen_from("a", None).collect();
        let wanted = [(true, four), (false, six)].map(|(is_ipv4, backend)| {
            let backends = Backends { first: [backend].into(), ..Backends::default() };
            (NodePort { port: 30_080, is_ipv4 }, backends)
        });
        assert_eq!(places, wanted);
    }
}
