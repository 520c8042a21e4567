//! What the API server knows that agents enforce, put together from its watches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use hauberk_core::identity::ResourceName;
use hauberk_core::policy::{MeshNamespace, MeshNode, MeshService, Mode, ProcessSelector, Workload};
use k8s_openapi::api::{
    core::v1::{ConfigMap, Namespace, NamespaceCondition, Node, Pod, Service, ServiceAccount},
    discovery::v1::EndpointSlice,
};
use kube::{
    Api, Client, ResourceExt,
    core::{ApiResource, DynamicObject},
    runtime::watcher,
};
use tokio::sync::watch;

use crate::{
    MODE_LABEL,
    captured::NamespaceFacts,
    crd,
    objects::ManifestObject,
    pods::PodFacts,
    replicas::{self, Reported},
    retire::{AGENTS, RETIRING},
    services::{ServiceFacts, SliceFacts},
    taints::{self, AGENT_PODS, AgentPod, NodeAgents, NodeTaints, by_node},
    watched::Watched,
};

/// The label of a node that names the zone it is in.
const ZONE: &str = "topology.kubernetes.io/zone";

/// The watches of a cluster.
pub struct Cluster {
    objects: Vec<Arc<Watched<ManifestObject>>>,
    pods: Arc<Watched<PodFacts>>,
    /// Each with whether it says that the mesh is about to be uninstalled.
    service_accounts: Arc<Watched<bool>>,
    /// Each with its label.
    namespaces: Arc<Watched<Option<String>>>,
    nodes: Arc<Watched<NodeFacts>>,
    services: Arc<Watched<ServiceFacts>>,
    slices: Arc<Watched<SliceFacts>>,
    /// What the replicas of the control plane say of their agents.
    replicas: Arc<Watched<Reported>>,
    /// What each says of itself.
    captured: Arc<Watched<NamespaceFacts>>,
    /// Where the mesh itself runs.
    own_namespace: String,
    /// For what keeps pods away from nodes without agents.
    taints: Arc<Watched<NodeTaints>>,
    agents: Arc<Watched<AgentPod>>,
    changed: watch::Receiver<u64>,
}

/// What all watches say together.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The custom resources.
    pub objects: Vec<ManifestObject>,
    /// The pods that are in the mesh.
    pub workloads: Vec<Workload>,
    /// The service accounts of the namespaces in the mesh, each with its namespace.
    pub service_accounts: BTreeSet<(ResourceName, ResourceName)>,
    /// The services that have an address of their own.
    pub services: Vec<MeshService>,
    /// All namespaces.
    pub namespaces: Vec<MeshNamespace>,
    /// The names of all nodes.
    pub nodes: Vec<String>,
    /// What services ask of nodes: zones, or addresses.
    pub places: Vec<MeshNode>,
    /// Service accounts that several workloads have, a sentence each: to policies they are one.
    pub shared_identities: Vec<String>,
    /// What people should know: pods that cannot be in the mesh, for one.
    pub notes: Vec<String>,
    /// The newest resource version of each kind: how much this snapshot has seen.
    pub seen: BTreeMap<String, u64>,
}

impl Cluster {
    /// Begins to follow everything. Needs a tokio runtime.
    #[must_use]
    pub fn follow(client: &Client, own_namespace: &str) -> Self {
        let (sender, changed) = watch::channel(0);
        // Of no concern for what is enforced.
        let (quiet, _) = watch::channel(0);
        let all = |resource: ApiResource| Api::<DynamicObject>::all_with(client.clone(), &resource);
        let object = |kind: &'static str, resource: ApiResource| {
            Watched::follow(kind, all(resource), sender.clone(), move |object| {
                ManifestObject::new(kind, object)
            })
        };
        Self {
            objects: vec![
                object("AccessPolicy", ApiResource::erase::<crd::AccessPolicy>(&())),
                object("Guardrail", ApiResource::erase::<crd::Guardrail>(&())),
                object("Machine", ApiResource::erase::<crd::Machine>(&())),
                object("Workload", ApiResource::erase::<crd::Workload>(&())),
            ],
            pods: Watched::follow("Pod", Api::<Pod>::all(client.clone()), sender.clone(), |pod| {
                PodFacts::new(pod)
            }),
            service_accounts: Watched::follow(
                "ServiceAccount",
                Api::<ServiceAccount>::all(client.clone()),
                sender.clone(),
                |account| account.annotations().get(RETIRING).is_some_and(|value| value == "true"),
            ),
            namespaces: Watched::follow(
                "Namespace",
                Api::<Namespace>::all(client.clone()),
                sender.clone(),
                |namespace| namespace.labels().get(MODE_LABEL).cloned(),
            ),
            nodes: Watched::follow(
                "Node",
                Api::<Node>::all(client.clone()),
                sender.clone(),
                NodeFacts::new,
            ),
            services: Watched::follow(
                "Service",
                Api::<Service>::all(client.clone()),
                sender.clone(),
                ServiceFacts::new,
            ),
            slices: Watched::follow(
                "EndpointSlice",
                Api::<EndpointSlice>::all(client.clone()),
                sender,
                SliceFacts::new,
            ),
            replicas: Watched::follow_some(
                "ConfigMap",
                Api::<ConfigMap>::namespaced(client.clone(), own_namespace),
                watcher::Config::default().labels(replicas::LABEL),
                quiet.clone(),
                |map| replicas::read(&map),
            ),
            // By itself: what is written there changes nothing that is enforced.
            captured: Watched::follow(
                "Namespace",
                Api::<Namespace>::all(client.clone()),
                quiet.clone(),
                |namespace| NamespaceFacts::new(&namespace),
            ),
            taints: Watched::follow(
                "Node",
                Api::<Node>::all(client.clone()),
                quiet.clone(),
                NodeTaints::new,
            ),
            agents: Watched::follow_some(
                "Pod",
                Api::<Pod>::namespaced(client.clone(), own_namespace),
                watcher::Config::default().labels(AGENT_PODS),
                quiet,
                AgentPod::new,
            ),
            own_namespace: own_namespace.to_owned(),
            changed,
        }
    }

    /// Counts up with each change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }

    /// The kinds whose objects have not been listed yet: until there are none, nothing is known.
    #[must_use]
    pub fn unlisted(&self) -> Vec<&'static str> {
        let mut kinds = Vec::new();
        let mut note = |what, listed: bool| {
            if !listed {
                kinds.push(what);
            }
        };
        for watched in &self.objects {
            note(watched.what(), watched.is_listed());
        }
        note(self.pods.what(), self.pods.is_listed());
        note(self.service_accounts.what(), self.service_accounts.is_listed());
        note(self.namespaces.what(), self.namespaces.is_listed());
        note(self.nodes.what(), self.nodes.is_listed());
        note(self.services.what(), self.services.is_listed());
        note(self.slices.what(), self.slices.is_listed());
        kinds
    }

    /// What all replicas have told of their agents, each by its ConfigMap, as `namespace/name`.
    #[must_use]
    pub fn reports(&self) -> BTreeMap<String, Reported> {
        self.replicas.read(|maps, _| maps.clone())
    }

    /// The conditions of all namespaces that say whether their pods are captured; nothing before they are listed.
    #[must_use]
    pub fn captured(&self) -> Option<BTreeMap<String, Option<NamespaceCondition>>> {
        let conditions = |all: &BTreeMap<String, NamespaceFacts>| {
            all.iter().map(|(name, facts)| (name.clone(), facts.condition.clone())).collect()
        };
        self.captured.is_listed().then(|| self.captured.read(|all, _| conditions(all)))
    }

    /// Whether the namespace of the mesh itself is being deleted.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.captured.read(|all, _| all.get(&self.own_namespace).is_some_and(|own| own.is_ending))
    }

    /// All nodes, and whether pods may be sent there; nothing before they and the agents' pods are listed.
    #[must_use]
    pub fn node_agents(&self) -> Option<BTreeMap<String, NodeAgents>> {
        let is_known = self.taints.is_listed()
            && self.agents.is_listed()
            // Which say whether the mesh goes on.
            && self.service_accounts.is_listed()
            && self.captured.is_listed();
        is_known.then(|| {
            self.taints
                .read(|nodes, _| self.agents.read(|agents, _| by_node(nodes, agents.values())))
        })
    }

    /// Gives a node the taint [`AGENT_NOT_READY`](crate::AGENT_NOT_READY), or takes it away. Returns whether it did: if the
    /// node has changed since it was looked at, nothing happens.
    ///
    /// # Errors
    /// If the API server refuses. A node that is gone is none.
    pub async fn taint(
        &self,
        client: &Client,
        node: &str,
        tainted: bool,
    ) -> Result<bool, kube::Error> {
        let known = self.taints.read(|nodes, _| nodes.get(node).cloned());
        match known {
            None => Ok(false),
            Some(known) => taints::write(client, node, &known, tainted).await,
        }
    }

    /// Whether the mesh is about to be uninstalled, and every pod is let go.
    #[must_use]
    pub fn is_retiring(&self) -> bool {
        let agents = format!("{}/{AGENTS}", self.own_namespace);
        self.service_accounts.read(|all, _| all.get(&agents) == Some(&true))
    }

    /// An object as it is now.
    #[must_use]
    pub fn object(&self, known: &ManifestObject) -> Option<ManifestObject> {
        let watched = self.objects.iter().find(|watched| watched.what() == known.kind)?;
        let key = match &known.namespace {
            Some(namespace) => format!("{namespace}/{}", known.name),
            None => known.name.clone(),
        };
        watched.read(|objects, _| objects.get(&key).cloned())
    }

    /// Lists everything of these kinds anew, so that it is known how new it is.
    pub fn list_anew(&self, kinds: &[String]) {
        let is = |what: &str| kinds.iter().any(|kind| kind == what);
        for watched in self.objects.iter().filter(|watched| is(watched.what())) {
            watched.list_anew();
        }
        if is(self.pods.what()) {
            self.pods.list_anew();
        }
        if is(self.service_accounts.what()) {
            self.service_accounts.list_anew();
        }
        if is(self.namespaces.what()) {
            self.namespaces.list_anew();
        }
        if is(self.services.what()) {
            self.services.list_anew();
        }
        if is(self.slices.what()) {
            self.slices.list_anew();
        }
        if is(self.nodes.what()) {
            self.nodes.list_anew();
        }
    }

    /// Whether the API server has a node of this name.
    #[must_use]
    pub fn has_node(&self, name: &str) -> bool {
        self.nodes.read(|nodes, _| nodes.contains_key(name))
    }

    /// Whether a pod of a service account runs on a node.
    #[must_use]
    pub fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        self.pods.read(|pods, _| {
            pods.values().any(|pod| {
                !pod.over
                    && pod.node.as_deref() == Some(node)
                    && pod.namespace == namespace
                    && pod.service_account.as_deref() == Some(service_account)
            })
        })
    }

    /// Everything, as it is now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for watched in &self.objects {
            watched.read(|objects, version| {
                snapshot.seen.insert(watched.what().to_owned(), version);
                snapshot.objects.extend(objects.values().cloned());
            });
        }
        self.service_accounts.read(|_, version| {
            snapshot.seen.insert("ServiceAccount".to_owned(), version);
        });
        let is_retiring = self.is_retiring();
        let modes = self.namespaces.read(|namespaces, version| {
            snapshot.seen.insert("Namespace".to_owned(), version);
            let mut modes = modes(namespaces, &self.own_namespace, &mut snapshot.notes);
            if is_retiring {
                modes.clear();
                snapshot.notes.push(format!(
                    "every pod is let go, since the mesh is about to be uninstalled; if it is not, kubectl annotate \
                     serviceaccount --namespace {} {AGENTS} {RETIRING}- puts it back in force",
                    self.own_namespace
                ));
            }
            snapshot.namespaces = namespaces
                .keys()
                .filter_map(|name| {
                    let enrolled = modes.contains_key(name);
                    Some(MeshNamespace { name: name.parse().ok()?, enrolled })
                })
                .collect();
            modes
        });
        let machines = snapshot.objects.iter().filter(|object| object.kind == "Machine");
        let of_machines: Vec<IpAddr> =
            machines.flat_map(|object| addresses(&object.text)).collect();
        let (mut of_pods, mut of_captured) = (Vec::new(), HashSet::new());
        self.pods.read(|pods, version| {
            snapshot.seen.insert("Pod".to_owned(), version);
            let there = pods.values().filter(|pod| !pod.over);
            for pod in there {
                of_pods.extend(pod.addresses.iter().copied());
                // The others have their node's.
                if !pod.host_network {
                    of_captured.extend(pod.addresses.iter().copied());
                }
            }
            self.service_accounts.read(|accounts, version| {
                // Whether they say that the mesh is retiring was read before.
                snapshot.seen.entry("ServiceAccount".to_owned()).or_insert(version);
                let exists = |pod: &PodFacts| {
                    pod.service_account.as_ref().is_some_and(|name| {
                        accounts.contains_key(&format!("{}/{name}", pod.namespace))
                    })
                };
                let in_mesh = accounts.keys().filter_map(|key| {
                    let (namespace, name) = key.split_once('/')?;
                    modes.contains_key(namespace).then_some(())?;
                    Some((namespace.parse().ok()?, name.parse().ok()?))
                });
                snapshot.service_accounts = in_mesh.collect();
                snapshot.workloads = workloads(pods.values(), &modes, exists, &mut snapshot.notes);
                let enrolled = pods.values().filter(|pod| modes.contains_key(&pod.namespace));
                snapshot.shared_identities = shared_identities(enrolled);
            });
        });
        snapshot.services = self.slices.read(|slices, version| {
            snapshot.seen.insert("EndpointSlice".to_owned(), version);
            let mut of: HashMap<(&str, &str), Vec<&SliceFacts>> = HashMap::new();
            for slice in slices.values() {
                if let Some(service) = slice.service() {
                    of.entry(service).or_default().push(slice);
                }
            }
            self.services.read(|services, version| {
                snapshot.seen.insert("Service".to_owned(), version);
                let own = services.values().flat_map(ServiceFacts::own_addresses);
                let taken: HashSet<IpAddr> = own.chain(of_pods).chain(of_machines).collect();
                let claims = first_claims(services.values());
                let resolve = |service: &ServiceFacts| {
                    let slices = of.get(&service.key()).map(Vec::as_slice).unwrap_or_default();
                    service.resolve(slices.iter().copied(), |address| {
                        let mut claimed = service.claims().filter(|claim| claim.ip() == *address);
                        let is_first = |claim| claims.get(&claim) == Some(&service.key());
                        taken.contains(address) || !claimed.all(is_first)
                    })
                };
                services.values().filter_map(resolve).collect()
            })
        });
        let zones = snapshot.services.iter().any(MeshService::asks_for_zones);
        let ports = snapshot.services.iter().any(|service| !service.node_ports.is_empty());
        // A node that says so does not become a pod, nor a service.
        let of_services = snapshot.services.iter().flat_map(|service| service.addresses.iter());
        of_captured.extend(of_services.copied());
        self.nodes.read(|nodes, version| {
            snapshot.nodes = nodes.keys().cloned().collect();
            // Always: who had seen them would be taken for one that is behind when no service asks any more.
            snapshot.seen.insert(self.nodes.what().to_owned(), version);
            let place = |(name, facts): (&String, &NodeFacts)| {
                let addresses = facts.addresses.iter().filter(|_| ports).copied();
                let addresses = addresses.filter(|one| !of_captured.contains(one)).collect();
                let zone = facts.zone.clone().filter(|_| zones);
                Some(MeshNode { name: name.parse().ok()?, zone, addresses })
            };
            let places = nodes.iter().filter_map(place);
            snapshot.places = places
                .filter(|place| place.zone.is_some() || !place.addresses.is_empty())
                .collect();
        });
        snapshot
    }
}

/// What is needed of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NodeFacts {
    zone: Option<String>,
    addresses: BTreeSet<IpAddr>,
}

impl NodeFacts {
    fn new(node: Node) -> Self {
        let zone = node.labels().get(ZONE).filter(|zone| !zone.is_empty()).cloned();
        let listed = node.status.and_then(|status| status.addresses).unwrap_or_default();
        let of_use = listed
            .into_iter()
            .filter(|one| matches!(one.type_.as_str(), "InternalIP" | "ExternalIP"));
        Self { zone, addresses: of_use.filter_map(|one| one.address.parse().ok()).collect() }
    }
}

/// Who has each address and port that services were given: the one that was made first.
fn first_claims<'a>(
    services: impl Iterator<Item = &'a ServiceFacts>,
) -> HashMap<SocketAddr, (&'a str, &'a str)> {
    let mut first: HashMap<SocketAddr, &ServiceFacts> = HashMap::new();
    for service in services {
        for claim in service.claims() {
            let one = first.entry(claim).or_insert(service);
            if service.precedence() < one.precedence() {
                *one = service;
            }
        }
    }
    first.into_iter().map(|(claim, service)| (claim, service.key())).collect()
}

/// The addresses of a machine, as far as its manifest can be read.
fn addresses(manifest: &str) -> Vec<IpAddr> {
    let manifest: serde_json::Value = serde_json::from_str(manifest).unwrap_or_default();
    let listed = manifest.pointer("/spec/addresses").and_then(serde_json::Value::as_array);
    let texts = listed.into_iter().flatten().filter_map(serde_json::Value::as_str);
    texts.filter_map(|text| text.parse().ok()).collect()
}

/// The namespaces that are in the mesh. The one of the mesh itself never is: agents could not reach the control plane, and
/// nobody could tell them to let it go.
fn modes(
    namespaces: &BTreeMap<String, Option<String>>,
    own: &str,
    notes: &mut Vec<String>,
) -> HashMap<String, Mode> {
    let mut modes = HashMap::new();
    for (name, label) in namespaces {
        if name == own {
            if label.as_deref().is_some_and(|label| !matches!(label, "off" | "Off")) {
                notes.push(format!(
                    "namespace {name}: label {MODE_LABEL} counts for nothing here, since the mesh itself runs in it; \
                     kubectl label namespace {name} {MODE_LABEL}- removes it"
                ));
            }
            continue;
        }
        let mode = match label.as_deref() {
            // Also as policies and workloads spell them.
            None | Some("off" | "Off") => continue,
            Some("enforce" | "Enforce") => Mode::Enforce,
            Some("audit" | "Audit") => Mode::Audit,
            Some(other) => {
                // Somebody wanted protection and misspelt it.
                notes.push(format!(
                    "namespace {name}: label {MODE_LABEL}: {other:?} is not enforce, audit or off; taken for \
                     enforce"
                ));
                Mode::Enforce
            }
        };
        modes.insert(name.clone(), mode);
    }
    modes
}

/// At most so many are named in a sentence.
const NAMED: usize = 4;

/// The service accounts that pods of several makers have.
fn shared_identities<'a>(pods: impl Iterator<Item = &'a PodFacts>) -> Vec<String> {
    let mut makers: BTreeMap<(&str, &str), BTreeSet<&str>> = BTreeMap::new();
    for pod in pods.filter(|pod| !pod.over && !pod.host_network && pod.node.is_some()) {
        if let Some(account) = &pod.service_account {
            let of_account = makers.entry((&pod.namespace, account)).or_default();
            of_account.insert(&pod.made_by);
        }
    }
    let shared = makers.into_iter().filter(|(_, makers)| makers.len() > 1);
    let sentence = |((namespace, account), makers): ((&str, &str), BTreeSet<&str>)| {
        let mut named: Vec<String> = makers.iter().take(NAMED).map(ToString::to_string).collect();
        if makers.len() > NAMED {
            named.push(format!("{} more", makers.len() - NAMED));
        }
        let last = named.pop().unwrap_or_default();
        format!(
            "service account {namespace}/{account} is that of {} and {last}: policies cannot tell them apart, and what \
             one may, all may; give each its own (spec.serviceAccountName)",
            named.join(", ")
        )
    };
    shared.map(sentence).collect()
}

fn workloads<'a>(
    pods: impl Iterator<Item = &'a PodFacts>,
    modes: &HashMap<String, Mode>,
    has_account: impl Fn(&PodFacts) -> bool,
    notes: &mut Vec<String>,
) -> Vec<Workload> {
    // An address passes to the next pod before the last one's object is gone: the newest has it.
    // One that has not been told to end has it, and of two such the newer. The other stays captured, without.
    let mut owners: HashMap<IpAddr, &PodFacts> = HashMap::new();
    let mut enrolled = Vec::new();
    for pod in pods {
        let Some(mode) = modes.get(&pod.namespace) else { continue };
        let orphaned = !has_account(pod);
        if orphaned && !pod.over {
            notes.push(format!(
                "pod {}/{}: its service account {} is gone, and its identity with it",
                pod.namespace,
                pod.name,
                pod.service_account.as_deref().unwrap_or("(none)")
            ));
        }
        match pod.workload(*mode, orphaned) {
            None => {}
            Some(Err(note)) => notes.push(note),
            Some(Ok(workload)) => {
                for address in &pod.addresses {
                    let owner = owners.entry(*address).or_insert(pod);
                    if (!pod.leaving, &pod.created) > (!owner.leaving, &owner.created) {
                        *owner = pod;
                    }
                }
                enrolled.push((pod, workload));
            }
        }
    }
    for (pod, workload) in &mut enrolled {
        if let ProcessSelector::Pod { addresses, .. } = &mut workload.process.selector {
            addresses.retain(|ip| owners.get(ip).is_some_and(|owner| owner.uid == pod.uid));
        }
    }
    enrolled.into_iter().map(|(_, workload)| workload).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    #[test]
    fn a_service_account_of_several_workloads_is_told_with_their_names() {
        let pod = |name: &str, account: &str, owner: serde_json::Value, hash: &str| {
            let pod = serde_json::json!({
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": name, "namespace": "shop", "uid": "1",
                    "labels": {"pod-template-hash": hash}, "ownerReferences": owner,
                },
                "spec": {"serviceAccountName": account, "nodeName": "one", "containers": []},
            });
            PodFacts::new(serde_json::from_value(pod).unwrap())
        };
        let by = |kind: &str, name: &str| serde_json::json!([{"kind": kind, "name": name, "controller": true, "apiVersion": "v1", "uid": "2"}]);
        let pods = [
            pod("front-6f-a", "default", by("ReplicaSet", "front-6f"), "6f"),
            // While it is rolled out.
            pod("front-7d-b", "default", by("ReplicaSet", "front-7d"), "7d"),
            pod("db-0", "default", by("StatefulSet", "db"), ""),
            pod("report-29410560-x", "report", by("Job", "report-29410560"), ""),
            pod("report-29410561-y", "report", by("Job", "report-29410561"), ""),
            pod("own-5c-z", "own", by("ReplicaSet", "own-5c"), "5c"),
            pod("shell", "own", serde_json::json!([]), ""),
        ];
        let end = "policies cannot tell them apart, and what one may, all may; give each its own \
                   (spec.serviceAccountName)";
        assert_eq!(
            shared_identities(pods.iter()),
            [
                format!(
                    "service account shop/default is that of Deployment front and StatefulSet db: {end}"
                ),
                format!(
                    "service account shop/own is that of Deployment own and pods by themselves: {end}"
                ),
            ]
        );
        let many: Vec<_> = (1..=9)
            .map(|n| pod(&format!("p{n}-0"), "default", by("StatefulSet", &format!("p{n}")), ""))
            .collect();
        let told = shared_identities(many.iter()).join("\n");
        assert!(
            told.contains(
                "StatefulSet p1, StatefulSet p2, StatefulSet p3, StatefulSet p4 and 5 more:"
            ),
            "{told}"
        );
    }

    #[test]
    fn of_two_services_with_one_address_the_first_has_it() {
        let service = |name: &str, day: &str, port: u16| {
            let service = serde_json::json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {
                    "name": name,
                    "namespace": "shop",
                    "creationTimestamp": format!("2026-01-{day}T00:00:00Z"),
                },
                "spec": {
                    "clusterIP": "10.96.0.1",
                    "externalIPs": ["192.0.2.1"],
                    "ports": [{"port": port, "protocol": "TCP"}],
                },
            });
            ServiceFacts::new(serde_json::from_value(service).unwrap())
        };
        let services =
            [service("late", "03", 80), service("web", "02", 80), service("a", "03", 81)];
        let first = first_claims(services.iter());
        let of = |port: u16| first[&SocketAddr::from(([192, 0, 2, 1], port))];
        assert_eq!((of(80), of(81)), (("shop", "web"), ("shop", "a")));
    }

    #[test]
    fn a_machines_addresses_are_read_from_its_manifest() {
        let found =
            addresses(r#"{"kind": "Machine", "spec": {"addresses": ["192.0.2.7", "fd00::7"]}}"#);
        let wanted = ["192.0.2.7", "fd00::7"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(found, wanted);
        assert!(addresses("{").is_empty() && addresses(r#"{"spec": {}}"#).is_empty());
    }

    fn modes_of(labels: &[(&str, Option<&str>)]) -> (Vec<(String, Mode)>, Vec<String>) {
        let mut notes = Vec::new();
        let namespaces =
            labels.iter().map(|(name, label)| ((*name).to_owned(), label.map(str::to_owned)));
        let found = modes(&namespaces.collect(), "hauberk-system", &mut notes);
        (found.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect(), notes)
    }

    #[test]
    fn a_mode_may_be_spelt_as_policies_spell_it() {
        for (label, mode) in [
            (None, None),
            (Some("off"), None),
            (Some("Off"), None),
            (Some("audit"), Some(Mode::Audit)),
            (Some("Audit"), Some(Mode::Audit)),
            (Some("enforce"), Some(Mode::Enforce)),
            (Some("Enforce"), Some(Mode::Enforce)),
        ] {
            let (found, notes) = modes_of(&[("shop", label)]);
            let wanted: Vec<_> = mode.map(|mode| ("shop".to_owned(), mode)).into_iter().collect();
            assert_eq!((found, notes), (wanted, Vec::<String>::new()), "{label:?}");
        }
    }

    #[test]
    fn a_mode_that_is_none_is_taken_for_enforce_and_told() {
        let (found, notes) = modes_of(&[("shop", Some("audti"))]);
        assert_eq!(found, [("shop".to_owned(), Mode::Enforce)]);
        let wanted = "namespace shop: label hauberk.dev/mode: \"audti\" is not enforce, audit or off; taken for enforce";
        assert_eq!(notes, [wanted]);
    }

    #[test]
    fn the_mesh_itself_is_never_in_the_mesh() {
        for label in ["enforce", "audit", "audti"] {
            let (found, notes) = modes_of(&[("hauberk-system", Some(label))]);
            assert!(found.is_empty(), "{label}");
            let mend = "kubectl label namespace hauberk-system hauberk.dev/mode- removes it";
            assert!(notes.len() == 1 && notes[0].ends_with(mend), "{notes:?}");
        }
        for label in [None, Some("off")] {
            assert_eq!(modes_of(&[("hauberk-system", label)]), (vec![], vec![]));
        }
    }
}
