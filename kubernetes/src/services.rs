//! Services and their endpoints, as addresses that stand for others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use hauberk_core::policy::MeshService;
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use kube::ResourceExt;

/// The label of an endpoint slice that names its service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// What is needed of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceFacts {
    namespace: String,
    name: String,
    addresses: BTreeSet<IpAddr>,
    /// TCP ports by their names.
    ports: Vec<(String, u16)>,
}

/// What is needed of an endpoint slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    namespace: String,
    service: Option<String>,
    addresses: BTreeSet<IpAddr>,
    ports: Vec<(String, u16)>,
}

impl ServiceFacts {
    pub(crate) fn new(service: Service) -> Self {
        let (namespace, name) = (service.namespace().unwrap_or_default(), service.name_any());
        let spec = service.spec.unwrap_or_default();
        let listed = spec.cluster_ips.unwrap_or_default().into_iter().chain(spec.cluster_ip);
        let ports = spec.ports.unwrap_or_default().into_iter();
        Self {
            namespace,
            name,
            // A headless one has "None".
            addresses: listed.filter_map(|text| text.parse().ok()).collect(),
            ports: ports
                .filter(|port| is_tcp(port.protocol.as_deref()))
                .filter_map(|port| {
                    Some((
                        port.name.unwrap_or_default(),
                        u16::try_from(port.port).ok().filter(|number| *number > 0)?,
                    ))
                })
                .collect(),
        }
    }

    /// The service with the endpoints of its slices; nothing if it has no address of its own, or names
    /// that are none.
    pub(crate) fn resolve<'a>(
        &self,
        slices: impl Iterator<Item = &'a SliceFacts> + Clone,
    ) -> Option<MeshService> {
        if self.addresses.is_empty() || self.ports.is_empty() {
            return None;
        }
        let mut ports: BTreeMap<u16, BTreeSet<SocketAddr>> = BTreeMap::new();
        for (name, number) in &self.ports {
            let backends = ports.entry(*number).or_default();
            for slice in slices.clone() {
                let targets = slice.ports.iter().filter(|(target, _)| target == name);
                for (_, port) in targets {
                    backends.extend(slice.addresses.iter().map(|ip| SocketAddr::new(*ip, *port)));
                }
            }
        }
        Some(MeshService {
            namespace: self.namespace.parse().ok()?,
            name: self.name.parse().ok()?,
            addresses: self.addresses.clone(),
            ports,
        })
    }

    pub(crate) fn key(&self) -> (&str, &str) {
        (&self.namespace, &self.name)
    }
}

impl SliceFacts {
    pub(crate) fn new(slice: EndpointSlice) -> Self {
        let ready = |endpoint: &k8s_openapi::api::discovery::v1::Endpoint| {
            // Absent means ready, by the API's own word.
            endpoint.conditions.as_ref().and_then(|is| is.ready).unwrap_or(true)
        };
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
            addresses: slice
                .endpoints
                .iter()
                .filter(|endpoint| ready(endpoint))
                .flat_map(|endpoint| &endpoint.addresses)
                .filter_map(|text| text.parse().ok())
                .collect(),
        }
    }

    pub(crate) fn service(&self) -> Option<(&str, &str)> {
        self.service.as_deref().map(|name| (self.namespace.as_str(), name))
    }
}

fn is_tcp(protocol: Option<&str>) -> bool {
    protocol.is_none_or(|protocol| protocol == "TCP")
}
