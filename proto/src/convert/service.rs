use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    time::Duration,
};

use hauberk_core::policy::{Hints, MeshNode, MeshService, Reach};

use super::{
    ConvertError,
    workload::{address, name, port},
};
use crate::v1;

/// The message of a service.
#[must_use]
pub fn service_message(service: &MeshService) -> v1::Service {
    v1::Service {
        namespace: service.namespace.to_string(),
        name: service.name.to_string(),
        addresses: service.addresses.iter().map(ToString::to_string).collect(),
        ports: service
            .ports
            .iter()
            .map(|(port, backends)| v1::ServicePort {
                port: u32::from(*port),
                node_port: node_port(service, *port),
                backends: backends
                    .iter()
                    .map(|(backend, hints)| v1::Backend {
                        address: backend.ip().to_string(),
                        port: u32::from(backend.port()),
                        for_nodes: hints.nodes.iter().map(ToString::to_string).collect(),
                        for_zones: hints.zones.iter().cloned().collect(),
                    })
                    .collect(),
            })
            .collect(),
        own_node_only: match service.reach {
            Reach::Cluster => false,
            Reach::Node => true,
        },
        affinity_seconds: service
            .affinity
            .map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX)),
    }
}

fn node_port(service: &MeshService, port: u16) -> u32 {
    let found = service.node_ports.iter().find(|(_, own)| **own == port);
    found.map_or(0, |(node_port, _)| u32::from(*node_port))
}

/// Reads a service.
///
/// # Errors
/// If any field is missing or malformed.
pub fn service(message: v1::Service) -> Result<MeshService, ConvertError> {
    let addresses = message
        .addresses
        .iter()
        .map(|text| address("service.addresses", text))
        .collect::<Result<BTreeSet<_>, _>>()?;
    if addresses.is_empty() {
        return Err(ConvertError::missing("service.addresses"));
    }
    let (mut ports, mut node_ports) = (BTreeMap::new(), BTreeMap::new());
    for message in message.ports {
        let number = port("service.ports.port", message.port)?;
        if message.node_port != 0 {
            let node_port = port("service.ports.node_port", message.node_port)?;
            if node_ports.insert(node_port, number).is_some() {
                let text = format!("the port {node_port} stands twice");
                return Err(ConvertError::new("service.ports.node_port", text));
            }
        }
        let mut backends = BTreeMap::new();
        for message in message.backends {
            let (backend, hints) = backend(message)?;
            if backends.insert(backend, hints).is_some() {
                let text = format!("the backend {backend} stands twice");
                return Err(ConvertError::new("service.ports.backends", text));
            }
        }
        if ports.insert(number, backends).is_some() {
            let text = format!("the port {number} stands twice");
            return Err(ConvertError::new("service.ports.port", text));
        }
    }
    Ok(MeshService {
        namespace: name("service.namespace", &message.namespace)?,
        name: name("service.name", &message.name)?,
        addresses,
        ports,
        node_ports,
        reach: if message.own_node_only { Reach::Node } else { Reach::Cluster },
        affinity: match message.affinity_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        },
    })
}

fn backend(message: v1::Backend) -> Result<(SocketAddr, Hints), ConvertError> {
    let field = "service.ports.backends";
    let backend = SocketAddr::new(address(field, &message.address)?, port(field, message.port)?);
    let nodes = message.for_nodes.iter().map(|text| name("service.ports.backends.for_nodes", text));
    let zones =
        message.for_zones.into_iter().map(|text| zone("service.ports.backends.for_zones", text));
    let hints =
        Hints { nodes: nodes.collect::<Result<_, _>>()?, zones: zones.collect::<Result<_, _>>()? };
    Ok((backend, hints))
}

/// The message of a node.
#[must_use]
pub fn node_message(node: &MeshNode) -> v1::Node {
    v1::Node {
        name: node.name.to_string(),
        zone: node.zone.clone().unwrap_or_default(),
        addresses: node.addresses.iter().map(ToString::to_string).collect(),
    }
}

/// Reads a node.
///
/// # Errors
/// If a field is missing or malformed.
pub fn node(message: v1::Node) -> Result<MeshNode, ConvertError> {
    let addresses = message.addresses.iter().map(|text| address("node.addresses", text));
    Ok(MeshNode {
        name: name("node.name", &message.name)?,
        zone: Some(message.zone).filter(|zone| !zone.is_empty()),
        addresses: addresses.collect::<Result<_, _>>()?,
    })
}

/// No zone has an empty name.
fn zone(field: &str, text: String) -> Result<String, ConvertError> {
    if text.is_empty() { Err(ConvertError::missing(field)) } else { Ok(text) }
}
