//! Pods, as workloads of the mesh.

use std::{collections::BTreeSet, net::IpAddr};

use hauberk_core::{
    identity::ResourceName,
    policy::{Mode, Process, ProcessSelector, RESERVED_NAMESPACE, Workload},
};
use k8s_openapi::{
    api::core::v1::{Container, Pod, PodSpec, Probe},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;

/// What is needed of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFacts {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    pub(crate) service_account: String,
    pub(crate) node: Option<String>,
    pub(crate) addresses: BTreeSet<IpAddr>,
    pub(crate) host_network: bool,
    /// It has finished: its address may be another's by now.
    pub(crate) over: bool,
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
            name,
            uid: pod.metadata.uid.unwrap_or_default(),
            labels: pod.metadata.labels.unwrap_or_default(),
            // The API server always writes it.
            service_account: spec.service_account_name.unwrap_or_else(|| "default".to_owned()),
            node: spec.node_name,
            addresses,
            host_network: spec.host_network.unwrap_or(false),
            over: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            probe_ports,
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
                service_account: name(&self.service_account)?,
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

/// The ports to which the probes of a pod's containers connect.
fn probe_ports(spec: &PodSpec) -> BTreeSet<u16> {
    // Init containers that stay, sidecars, have probes, too.
    let inits = spec.init_containers.iter().flatten();
    spec.containers.iter().chain(inits).flat_map(ports_of).collect()
}

fn ports_of(container: &Container) -> Vec<u16> {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    probes.into_iter().flatten().filter_map(|probe| probed_port(probe, container)).collect()
}

fn probed_port(probe: &Probe, container: &Container) -> Option<u16> {
    let port = match (&probe.http_get, &probe.tcp_socket, &probe.grpc) {
        (Some(http), ..) => http.port.clone(),
        (None, Some(tcp), _) => tcp.port.clone(),
        (None, None, Some(grpc)) => IntOrString::Int(grpc.port),
        (None, None, None) => return None,
    };
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
