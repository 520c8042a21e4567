//! Services and their endpoints, as addresses that stand for others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use hauberk_core::{
    identity::ResourceName,
    policy::{Hints, MeshService, Reach},
};
use k8s_openapi::api::{
    core::v1::{LoadBalancerIngress, Service},
    discovery::v1::{Endpoint, EndpointSlice},
};
use kube::ResourceExt;

/// The label of an endpoint slice that names its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// How long a caller stays with its endpoint where the service does not say: the API server's default.
const AFFINITY: Duration = Duration::from_secs(10_800);

/// What is needed of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceFacts {
    namespace: String,
    name: String,
    addresses: BTreeSet<IpAddr>,
    /// Addresses that others gave it: external ones, and those of its load balancers.
    given: BTreeSet<IpAddr>,
    /// When it was made, as text that sorts.
    created: String,
    /// TCP ports by their names.
    ports: Vec<(String, u16)>,
    /// The ports of nodes, each with the one of these that it leads to.
    node_ports: BTreeMap<u16, u16>,
    reach: Reach,
    affinity: Option<Duration>,
}

/// What is needed of an endpoint slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    namespace: String,
    service: Option<String>,
    /// Those that are ready, and those that still serve while they end.
    endpoints: BTreeMap<IpAddr, EndpointFacts>,
    ports: Vec<(String, u16)>,
}

/// What is needed of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
struct EndpointFacts {
    /// Otherwise it ends, and serves until then.
    is_ready: bool,
    node: Option<ResourceName>,
    hints: Hints,
}

impl ServiceFacts {
    pub(crate) fn new(service: Service) -> Self {
        let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
        let created = service.creation_timestamp().map(|time| time.0.to_string());
        let spec = service.spec.unwrap_or_default();
        let status = service.status.and_then(|status| status.load_balancer);
        let balancers = status.and_then(|balancer| balancer.ingress).unwrap_or_default();
        // One that wants to see all traffic itself is not gone around.
        let is_address = |one: &LoadBalancerIngress| one.ip_mode.as_deref() != Some("Proxy");
        let balancers = balancers.into_iter().filter(is_address).filter_map(|one| one.ip);
        let given = spec.external_ips.unwrap_or_default().into_iter().chain(balancers);
        let listed = spec.cluster_ips.unwrap_or_default().into_iter().chain(spec.cluster_ip);
        let ports = spec.ports.unwrap_or_default();
        let number = |port: i32| u16::try_from(port).ok().filter(|number| *number > 0);
        let tcp = ports.iter().filter(|port| is_tcp(port.protocol.as_deref()));
        let on_nodes = tcp.filter_map(|port| Some((number(port.node_port?)?, number(port.port)?)));
        let node_ports = on_nodes.collect();
        let ports = ports.into_iter();
        Self {
            node_ports,
            namespace,
            name,
            // A headless one has "None".
            addresses: listed.filter_map(|text| text.parse().ok()).collect(),
            given: given.filter_map(|text| text.parse().ok()).collect(),
            created: created.unwrap_or_default(),
            ports: ports
                .filter(|port| is_tcp(port.protocol.as_deref()))
                .filter_map(|port| Some((port.name.unwrap_or_default(), number(port.port)?)))
                .collect(),
            reach: match spec.internal_traffic_policy.as_deref() {
                Some("Local") => Reach::Node,
                Some(_) | None => Reach::Cluster,
            },
            affinity: match spec.session_affinity.as_deref() {
                Some("ClientIP") => {
                    let client = spec.session_affinity_config.and_then(|config| config.client_ip);
                    let seconds = client.and_then(|client| client.timeout_seconds);
                    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok());
                    Some(seconds.map_or(AFFINITY, Duration::from_secs))
                }
                Some(_) | None => None,
            },
        }
    }

    /// The addresses and ports that others gave it.
    pub(crate) fn claims(&self) -> impl Iterator<Item = SocketAddr> {
        let ports = || self.ports.iter().map(|(_, port)| *port);
        self.given.iter().flat_map(move |ip| ports().map(|port| SocketAddr::new(*ip, port)))
    }

    /// Of two that claim the same, the first has it.
    pub(crate) fn precedence(&self) -> (&str, (&str, &str)) {
        (&self.created, self.key())
    }

    /// Its own addresses, which the cluster gave it.
    pub(crate) fn own_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.addresses.iter().copied()
    }

    /// The service with the endpoints of its slices; nothing if it has no address, or names that are none. An address
    /// that is given to it counts unless it `is_taken`: whoever may make services must not take a pod's place, nor that of
    /// another service.
    pub(crate) fn resolve<'a>(
        &self,
        slices: impl Iterator<Item = &'a SliceFacts> + Clone,
        is_taken: impl Fn(&IpAddr) -> bool,
    ) -> Option<MeshService> {
        // A headless one leads nowhere by itself, whatever else it was given.
        if self.addresses.is_empty() || self.ports.is_empty() {
            return None;
        }
        let given = self.given.iter().filter(|address| !is_taken(address));
        let addresses = self.addresses.iter().chain(given).copied().collect();
        let mut ports: BTreeMap<u16, BTreeMap<SocketAddr, Hints>> = BTreeMap::new();
        for (name, number) in &self.ports {
            // While an endpoint moves from one slice to another, it is in both: what is ready in one of them is.
            let mut found: BTreeMap<SocketAddr, &EndpointFacts> = BTreeMap::new();
            for slice in slices.clone() {
                let targets = slice.ports.iter().filter(|(target, _)| target == name);
                for (_, port) in targets {
                    for (ip, endpoint) in &slice.endpoints {
                        let entry = found.entry(SocketAddr::new(*ip, *port)).or_insert(endpoint);
                        if endpoint.is_ready && !entry.is_ready {
                            *entry = endpoint;
                        }
                    }
                }
            }
            let backends = ports.entry(*number).or_default();
            for (backend, endpoint) in &found {
                if endpoint.is_ready || self.is_last_resort(*backend, endpoint, &found) {
                    backends.insert(*backend, endpoint.hints(self.reach));
                }
            }
        }
        Some(MeshService {
            namespace: self.namespace.parse().ok()?,
            name: self.name.parse().ok()?,
            addresses,
            ports,
            node_ports: self.node_ports.clone(),
            reach: self.reach,
            affinity: self.affinity,
        })
    }

    /// Whether an endpoint that ends gets connections still: by kube-proxy's rules, while no other of its address family is
    /// ready, on its node where connections keep to that.
    fn is_last_resort(
        &self,
        backend: SocketAddr,
        endpoint: &EndpointFacts,
        all: &BTreeMap<SocketAddr, &EndpointFacts>,
    ) -> bool {
        !all.iter().any(|(other, facts)| {
            let is_near = match self.reach {
                Reach::Cluster => true,
                Reach::Node => facts.node == endpoint.node,
            };
            facts.is_ready && is_near && other.is_ipv4() == backend.is_ipv4()
        })
    }

    pub(crate) fn key(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl SliceFacts {
    pub(crate) fn new(slice: EndpointSlice) -> Self {
        let ports = slice.ports.clone().unwrap_or_default().into_iter();
        Self {
            namespace: slice.namespace().unwrap_or_default(),
            service: slice.labels().get(SERVICE_NAME).cloned(),
            ports: ports
                .filter(|port| is_tcp(port.protocol.as_deref()))
                .filter_map(|port| {
                    let number = u16::try_from(port.port?).ok().filter(|number| *number > 0)?;
                    Some((port.name.unwrap_or_default(), number))
                })
                .collect(),
            endpoints: {
                let of_use =
                    slice.endpoints.iter().filter(|one| is_ready(one) || still_serves(one));
                let mut addresses: Vec<_> = of_use
                    .flat_map(|one| one.addresses.iter().map(move |address| (address, one)))
                    .filter_map(|(text, one)| Some((text.parse().ok()?, EndpointFacts::new(one))))
                    .collect();
                // Where two have one address, as in a node's network, what is ready comes last, and stays.
                addresses.sort_by_key(|(_, one)| one.is_ready);
                addresses.into_iter().collect()
            },
        }
    }

    pub(crate) fn service(&self) -> Option<(&str, &str)> {
        self.service.as_deref().map(|name| (self.namespace.as_str(), name))
    }
}

impl EndpointFacts {
    fn new(endpoint: &Endpoint) -> Self {
        let hints = endpoint.hints.as_ref();
        let nodes = hints.and_then(|hints| hints.for_nodes.as_ref()).into_iter().flatten();
        let zones = hints.and_then(|hints| hints.for_zones.as_ref()).into_iter().flatten();
        Self {
            is_ready: is_ready(endpoint),
            node: endpoint.node_name.as_ref().and_then(|name| name.parse().ok()),
            hints: Hints {
                // What can be the name of no node is for nobody.
                nodes: nodes.filter_map(|node| node.name.parse().ok()).collect(),
                zones: zones
                    .map(|zone| zone.name.clone())
                    .filter(|name| !name.is_empty())
                    .collect(),
            },
        }
    }

    /// Whom it is for: where connections keep to their node, that is the one it runs on, whatever is hinted.
    fn hints(&self, reach: Reach) -> Hints {
        match reach {
            Reach::Cluster if self.is_ready => self.hints.clone(),
            // The last resort is everybody's.
            Reach::Cluster => Hints::default(),
            Reach::Node => {
                Hints { nodes: self.node.iter().cloned().collect(), zones: BTreeSet::new() }
            }
        }
    }
}

/// Absent means ready, by the API's own word.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|is| is.ready).unwrap_or(true)
}

/// It ends, and answers until then. Absent means that it serves, and that it does not end.
fn still_serves(endpoint: &Endpoint) -> bool {
    endpoint
        .conditions
        .as_ref()
        .is_some_and(|is| is.terminating == Some(true) && is.serving.unwrap_or(true))
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// With these fields beside the usual ones of its specification, and this status.
    fn service_with(fields: &Value, status: &Value) -> ServiceFacts {
        let mut service = json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80, "protocol": "TCP"}]},
            "status": status,
        });
        for (key, value) in fields.as_object().unwrap() {
            service["spec"][key] = value.clone();
        }
        ServiceFacts::new(serde_json::from_value(service).unwrap())
    }

    fn service(policy: &str) -> ServiceFacts {
        let fields = json!({"clusterIPs": ["10.96.0.1"], "internalTrafficPolicy": policy});
        service_with(&fields, &json!({}))
    }

    fn slice(endpoints: &Value) -> SliceFacts {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "web-1",
                "namespace": "shop",
                "labels": {"kubernetes.io/service-name": "web"},
            },
            "addressType": "IPv4",
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
            "endpoints": endpoints,
        });
        SliceFacts::new(serde_json::from_value(slice).unwrap())
    }

    /// On two nodes, one not ready; the last one as of a controller that knows no nodes.
    fn endpoints() -> SliceFacts {
        slice(&json!([
            {
                "addresses": ["10.0.0.1"],
                "nodeName": "a",
                "hints": {"forZones": [{"name": "x"}], "forNodes": [{"name": "a"}]},
            },
            {
                "addresses": ["10.0.0.2"],
                "nodeName": "b",
                "hints": {"forZones": [{"name": "y"}, {"name": ""}], "forNodes": [{"name": "*"}]},
            },
            {
                "addresses": ["10.0.0.3"],
                "conditions": {"ready": false},
                "nodeName": "a",
                "hints": {"forZones": [{"name": "x"}]},
            },
            {"addresses": ["10.0.0.4"]},
        ]))
    }

    fn hints(nodes: &[&str], zones: &[&str]) -> Hints {
        Hints {
            nodes: nodes.iter().map(|name| name.parse().unwrap()).collect(),
            zones: zones.iter().map(|name| (*name).to_owned()).collect(),
        }
    }

    /// Those of the service's only port, by the ends of their addresses.
    fn backends(service: &ServiceFacts, slices: &[SliceFacts]) -> Vec<(u8, Hints)> {
        let service = service.resolve(slices.iter(), |_| false).unwrap();
        assert_eq!(service.ports.len(), 1);
        let backends = service.ports[&80].iter();
        let ends = backends.map(|(backend, hints)| match backend.ip() {
            IpAddr::V4(ip) => (ip.octets()[3], hints.clone()),
            IpAddr::V6(ip) => panic!("{ip}"),
        });
        ends.collect()
    }

    #[test]
    fn addresses_that_a_service_was_given_are_its_own_unless_they_are_taken() {
        let given = json!(["192.0.2.1", "192.0.2.2"]);
        let status = json!({"loadBalancer": {"ingress": [
            {"ip": "192.0.2.3"},
            {"ip": "192.0.2.4", "ipMode": "VIP"},
            {"ip": "192.0.2.5", "ipMode": "Proxy"},
            {"hostname": "web.example.org"},
        ]}});
        let addresses = |fields: &Value| {
            // Another has the second.
            let is_taken = |address: &IpAddr| address.to_string() == "192.0.2.2";
            let service = service_with(fields, &status).resolve([endpoints()].iter(), is_taken);
            service.map(|service| service.addresses.iter().map(ToString::to_string).collect())
        };
        let wanted = ["10.96.0.1", "192.0.2.1", "192.0.2.3", "192.0.2.4"].map(str::to_owned);
        assert_eq!(addresses(&json!({"externalIPs": given})), Some(wanted.to_vec()));
        assert_eq!(addresses(&json!({"externalIPs": given, "clusterIP": "None"})), None);
    }

    #[test]
    fn a_service_says_how_long_a_caller_stays() {
        let affinity = |fields: &Value| service_with(fields, &json!({})).affinity;
        assert_eq!(affinity(&json!({})), None);
        assert_eq!(affinity(&json!({"sessionAffinity": "None"})), None);
        assert_eq!(affinity(&json!({"sessionAffinity": "ClientIP"})), Some(AFFINITY));
        let config = json!({"clientIP": {"timeoutSeconds": 90}});
        let of_client = json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": config});
        assert_eq!(affinity(&of_client), Some(Duration::from_secs(90)));
    }

    #[test]
    fn endpoints_that_are_ready_come_with_their_hints() {
        let service = service("Cluster");
        let wanted =
            vec![(1, hints(&["a"], &["x"])), (2, hints(&[], &["y"])), (4, Hints::default())];
        assert_eq!(backends(&service, &[endpoints()]), wanted);
        assert_eq!(service.reach, Reach::Cluster);
    }

    #[test]
    fn endpoints_of_a_service_that_keeps_to_the_node_are_for_the_node_they_run_on() {
        let service = service("Local");
        let wanted = vec![(1, hints(&["a"], &[])), (2, hints(&["b"], &[])), (4, Hints::default())];
        assert_eq!(backends(&service, &[endpoints()]), wanted);
        let resolved = service.resolve([endpoints()].iter(), |_| false).unwrap();
        assert_eq!(resolved.reach, Reach::Node);
        assert!(!resolved.asks_for_zones());
    }

    /// One endpoint, in words: ready, or ending and serving, or ending and not serving.
    fn endpoint(address: &str, node: &str, state: &str) -> Value {
        let (ready, serving, terminating) = match state {
            "ready" => (true, true, false),
            "serving" => (false, true, true),
            "ending" => (false, false, true),
            "starting" => (false, false, false),
            other => panic!("{other}"),
        };
        json!({
            "addresses": [address],
            "nodeName": node,
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
        })
    }

    fn ends(policy: &str, endpoints: &[Value]) -> Vec<u8> {
        let found = backends(&service(policy), &[slice(&json!(endpoints))]);
        found.into_iter().map(|(end, _)| end).collect()
    }

    #[test]
    fn endpoints_that_end_get_connections_while_nobody_else_can_and_they_serve() {
        let [ready, serving] = ["ready", "serving"].map(|state| endpoint("10.0.0.1", "a", state));
        let (other, ending) =
            (endpoint("10.0.0.2", "b", "serving"), endpoint("10.0.0.3", "b", "ending"));
        let starting = endpoint("10.0.0.4", "b", "starting");
        assert_eq!(ends("Cluster", &[ready.clone(), other.clone(), ending.clone()]), [1]);
        let without = [serving, other.clone(), ending.clone(), starting];
        assert_eq!(ends("Cluster", &without), [1, 2]);
        assert_eq!(ends("Cluster", std::slice::from_ref(&ending)), [0; 0]);
        // Where connections keep to their node, it is asked of each node.
        assert_eq!(ends("Local", &[ready, other, ending]), [1, 2]);
    }

    #[test]
    fn what_is_ready_at_an_address_counts_and_not_what_ends_there() {
        let [ready, serving] = ["ready", "serving"].map(|state| endpoint("10.0.0.1", "a", state));
        let other = endpoint("10.0.0.2", "a", "serving");
        for endpoints in [[&ready, &serving, &other], [&serving, &other, &ready]] {
            assert_eq!(ends("Cluster", &endpoints.map(Value::clone)), [1]);
        }
    }

    #[test]
    fn an_endpoint_of_another_family_is_no_other() {
        let six = slice(&json!([endpoint("fd00::1", "a", "ready")]));
        let four = slice(&json!([endpoint("10.0.0.1", "a", "serving")]));
        let resolved = service("Cluster").resolve([six, four].iter(), |_| false).unwrap();
        assert_eq!(resolved.ports[&80].len(), 2);
    }

    #[test]
    fn what_is_ready_in_one_slice_is_ready() {
        let slices =
            ["serving", "ready"].map(|state| slice(&json!([endpoint("10.0.0.1", "a", state)])));
        let other = slice(&json!([endpoint("10.0.0.2", "a", "serving")]));
        let [first, second] = slices;
        let found = backends(&service("Cluster"), &[first, other, second]);
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn an_endpoint_in_two_slices_is_one() {
        let again = slice(&json!([{"addresses": ["10.0.0.1"], "nodeName": "a"}]));
        let found = backends(&service("Cluster"), &[endpoints(), again]);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], (1, hints(&["a"], &["x"])));
    }
}
