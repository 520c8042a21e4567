//! Pods, as workloads of the mesh.

use std::{collections::BTreeSet, net::IpAddr};

use hauberk_core::{
    identity::ResourceName,
    policy::{Mode, Process, ProcessSelector, RESERVED_NAMESPACE, Workload},
};
use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, Probe},
    apimachinery::pkg::{apis::meta::v1::ObjectMeta, util::intstr::IntOrString},
};
use kube::ResourceExt;

/// What is needed of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFacts {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    /// What it is a pod of, such as `Deployment checkout`.
    pub(crate) made_by: String,
    /// None for the shadow of a static pod, which a kubelet may make in any namespace.
    pub(crate) service_account: Option<String>,
    pub(crate) node: Option<String>,
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) host_network: bool,
    /// It has finished: its address may be another's by now.
    pub(crate) over: bool,
    /// It has been told to end.
    pub(crate) leaving: bool,
    pub(crate) created: Option<String>,
    pub(crate) probe_ports: BTreeSet<u16>,
}

impl PodFacts {
    pub(crate) fn new(pod: Pod) -> Self {
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let spec = pod.spec.unwrap_or_default();
        let probe_ports = probe_ports(&spec);
        let status = pod.status.unwrap_or_default();
        let listed = status.pod_ips.unwrap_or_default().into_iter().map(|address| address.ip);
        let addresses = listed.chain(status.pod_ip).filter_map(|text| text.parse().ok()).collect();
        Self {
            namespace,
            made_by: made_by(&pod.metadata),
            name,
            uid: sandbox_uid(&pod.metadata, spec.node_name.as_deref()),
            labels: pod.metadata.labels.unwrap_or_default(),
            service_account: spec.service_account_name,
            node: spec.node_name,
            addresses,
            host_network: spec.host_network.unwrap_or(false),
            over: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            probe_ports,
            leaving: pod.metadata.deletion_timestamp.is_some(),
            created: pod.metadata.creation_timestamp.map(|time| time.0.to_string()),
        }
    }

    /// The pod as a workload; nothing while it has no node, or when it has finished. It may have no address
    /// yet: its agent takes it up before it starts. An error says why it can be no workload.
    pub(crate) fn workload(&self, mode: Mode, orphaned: bool) -> Option<Result<Workload, String>> {
        let node = self.node.as_ref()?;
        if self.over {
            return None;
        }
        let shown = format!("pod {}/{}", self.namespace, self.name);
        if self.host_network {
            return Some(Err(format!(
                "{shown} uses its node's network: it is not in the mesh, and nobody can be told apart there"
            )));
        }
        if self.namespace == RESERVED_NAMESPACE {
            return Some(Err(format!(
                "{shown}: the namespace {RESERVED_NAMESPACE} stands for machines, its pods are not in the mesh"
            )));
        }
        let name = |text: &str| {
            text.parse::<ResourceName>().map_err(|error| format!("{shown}: {text:?}: {error}"))
        };
        let read = || {
            if !ProcessSelector::is_pod_uid(&self.uid) {
                return Err(format!("{shown}: {:?} is not a UID", self.uid));
            }
            Ok(Workload {
                namespace: name(&self.namespace)?,
                name: name(&self.name)?,
                labels: self.labels.clone(),
                service_account: name(self.service_account.as_deref().unwrap_or("none"))?,
                machine: name(node)?,
                process: Process {
                    selector: ProcessSelector::Pod {
                        uid: self.uid.clone(),
                        addresses: self.addresses.clone(),
                        probe_ports: self.probe_ports.clone(),
                        orphaned,
                    },
                    // A pod is its address: every port is its own.
                    ports: BTreeSet::new(),
                    mode,
                },
            })
        };
        Some(read())
    }
}

/// All pods that nothing made are together one maker: what starts them by itself gives each another name.
/// Pods of one Deployment have several ReplicaSets after another, those of a CronJob a Job each.
fn made_by(pod: &ObjectMeta) -> String {
    let owners = pod.owner_references.iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner.controller == Some(true)) else {
        return "pods by themselves".to_owned();
    };
    let hashes = ["pod-template-hash", "rollouts-pod-template-hash"];
    let hash = pod.labels.iter().flatten().find(|(key, _)| hashes.contains(&key.as_str()));
    let deployment = hash.and_then(|(_, hash)| owner.name.strip_suffix(&format!("-{hash}")));
    let numbered = owner.name.rsplit_once('-');
    let cron_job = numbered
        .filter(|(_, number)| number.len() >= 8 && number.bytes().all(|b| b.is_ascii_digit()));
    match (owner.kind.as_str(), deployment, cron_job) {
        ("ReplicaSet", Some(name), _) => format!("Deployment {name}"),
        ("Job", _, Some((name, _))) => format!("CronJob {name}"),
        (kind, _, _) => format!("{kind} {}", owner.name),
    }
}

/// The ports to which the kubelet connects, for probes and hooks of a pod's containers.
fn probe_ports(spec: &PodSpec) -> BTreeSet<u16> {
    // Init containers that stay, sidecars, have probes, too.
    let inits = spec.init_containers.iter().flatten();
    spec.containers.iter().chain(inits).flat_map(ports_of).collect()
}

fn ports_of(container: &Container) -> Vec<u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let probed = probes.into_iter().flatten().filter_map(|probe| match probe {
        Probe { http_get: Some(http), .. } => Some(http.port.clone()),
        Probe { tcp_socket: Some(tcp), .. } => Some(tcp.port.clone()),
        Probe { grpc: Some(grpc), .. } => Some(IntOrString::Int(grpc.port)),
        Probe { .. } => None,
    });
    let lifecycle = container.lifecycle.iter();
    let hooks = lifecycle.flat_map(|hooks| [&hooks.post_start, &hooks.pre_stop]).flatten();
    let called = hooks.filter_map(|hook| Some(hook.http_get.as_ref()?.port.clone()));
    probed.chain(called).filter_map(|port| number(port, container)).collect()
}

fn number(port: IntOrString, container: &Container) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => number,
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten();
            let mut named = named.filter(|port| port.name.as_deref() == Some(&name));
            named.next()?.container_port
        }
    };
    u16::try_from(number).ok().filter(|number| *number > 0)
}

/// The annotations of the shadow that a kubelet makes of a static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
const HASH: &str = "kubernetes.io/config.hash";

/// The UID that the container runtime knows a pod by: its own, but for the shadow of a static pod, whose
/// node knows it by another. Nobody but that node may say so.
fn sandbox_uid(meta: &ObjectMeta, node: Option<&str>) -> String {
    let annotation = |name: &str| meta.annotations.as_ref().and_then(|all| all.get(name)).cloned();
    let by_node = meta.owner_references.iter().flatten().any(|owner| {
        owner.kind == "Node" && owner.controller == Some(true) && Some(owner.name.as_str()) == node
    });
    let hash = annotation(MIRROR).and_then(|_| annotation(HASH)).filter(|_| by_node);
    hash.or_else(|| meta.uid.clone()).unwrap_or_default()
}
