use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use hauberk_core::policy::MeshService;

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
                backends: backends
                    .iter()
                    .map(|backend| v1::Backend {
                        address: backend.ip().to_string(),
                        port: u32::from(backend.port()),
                    })
                    .collect(),
            })
            .collect(),
    }
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
    let mut ports = BTreeMap::new();
    for message in message.ports {
        let number = port("service.ports.port", message.port)?;
        let backends = message
            .backends
            .iter()
            .map(|backend| {
                let field = "service.ports.backends";
                Ok(SocketAddr::new(address(field, &backend.address)?, port(field, backend.port)?))
            })
            .collect::<Result<BTreeSet<_>, ConvertError>>()?;
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
    })
}
