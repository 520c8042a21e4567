use std::{collections::BTreeSet, net::IpAddr};

use hauberk_core::{
    identity::{ResourceName, SpiffeId},
    policy::{Mode, ProcessSelector, RESERVED_NAMESPACE, resolve::MeshWorkload},
};

use super::ConvertError;
use crate::v1::{self, mesh_workload::Process};

/// The message of a workload.
#[must_use]
pub fn workload_message(workload: &MeshWorkload) -> v1::MeshWorkload {
    v1::MeshWorkload {
        namespace: workload.namespace.as_ref().map(ToString::to_string).unwrap_or_default(),
        name: workload.name.to_string(),
        spiffe_id: workload.identity.to_string(),
        node: workload.node.to_string(),
        addresses: workload.addresses.iter().map(ToString::to_string).collect(),
        ports: workload.ports.iter().copied().map(u32::from).collect(),
        mode: mode_message(workload.mode).into(),
        process: Some(match &workload.process {
            ProcessSelector::User(user) => Process::User(user.clone()),
            ProcessSelector::Cgroup(path) => Process::Cgroup(path.clone()),
            ProcessSelector::NetworkNamespace { name, .. } => {
                Process::NetworkNamespace(name.clone())
            }
            ProcessSelector::Pod { uid, probe_ports, orphaned, .. } => Process::Pod(v1::Pod {
                orphaned: *orphaned,
                uid: uid.clone(),
                probe_ports: probe_ports.iter().copied().map(u32::from).collect(),
            }),
        }),
    }
}

/// Reads a workload.
///
/// # Errors
/// If any field is missing, unknown or malformed.
pub fn workload(message: v1::MeshWorkload) -> Result<MeshWorkload, ConvertError> {
    let addresses = message
        .addresses
        .iter()
        .map(|text| address("workload.addresses", text))
        .collect::<Result<BTreeSet<_>, _>>()?;
    let process = match message.process.ok_or(ConvertError::missing("workload.process"))? {
        Process::User(user) if ProcessSelector::is_user(&user) => ProcessSelector::User(user),
        Process::User(text) => return Err(process(&text, "a Unix user")),
        Process::Cgroup(path) if ProcessSelector::is_cgroup(&path) => ProcessSelector::Cgroup(path),
        Process::Cgroup(text) => return Err(process(&text, "the path of a cgroup")),
        Process::NetworkNamespace(name) if !ProcessSelector::is_network_namespace(&name) => {
            return Err(process(&name, "the name of a network namespace"));
        }
        Process::NetworkNamespace(name) => {
            if addresses.is_empty() {
                return Err(ConvertError::missing("workload.addresses"));
            }
            ProcessSelector::NetworkNamespace { name, addresses: addresses.clone() }
        }
        Process::Pod(pod) if !ProcessSelector::is_pod_uid(&pod.uid) => {
            return Err(process(&pod.uid, "the UID of a pod"));
        }
        Process::Pod(_) if message.namespace.is_empty() => {
            return Err(ConvertError::missing("workload.namespace"));
        }
        Process::Pod(pod) => ProcessSelector::Pod {
            orphaned: pod.orphaned,
            uid: pod.uid,
            addresses: addresses.clone(),
            probe_ports: ports("workload.process.pod.probe_ports", &pod.probe_ports)?,
        },
    };
    let namespace = match message.namespace.as_str() {
        "" => None,
        RESERVED_NAMESPACE => {
            let text = format!("{RESERVED_NAMESPACE:?} stands for machines");
            return Err(ConvertError::new("workload.namespace", text));
        }
        text => Some(name("workload.namespace", text)?),
    };
    Ok(MeshWorkload {
        namespace,
        name: name("workload.name", &message.name)?,
        identity: spiffe_id("workload.spiffe_id", &message.spiffe_id)?,
        node: name("workload.node", &message.node)?,
        addresses,
        ports: ports("workload.ports", &message.ports)?,
        mode: mode("workload.mode", message.mode)?,
        process,
    })
}

fn process(text: &str, what: &str) -> ConvertError {
    ConvertError::new("workload.process", format!("{text:?} is not {what}"))
}

pub(super) fn name(field: &str, text: &str) -> Result<ResourceName, ConvertError> {
    text.parse().map_err(|error| ConvertError::new(field, format!("{text:?}: {error}")))
}

pub(super) fn address(field: &str, text: &str) -> Result<IpAddr, ConvertError> {
    text.parse().map_err(|_| ConvertError::new(field, format!("{text:?} is not an IP address")))
}

pub(super) fn spiffe_id(field: &str, text: &str) -> Result<SpiffeId, ConvertError> {
    text.parse().map_err(|error| ConvertError::new(field, format!("{text:?}: {error}")))
}

pub(super) fn ports(field: &str, ports: &[u32]) -> Result<BTreeSet<u16>, ConvertError> {
    ports.iter().map(|number| port(field, *number)).collect()
}

pub(super) fn port(field: &str, number: u32) -> Result<u16, ConvertError> {
    u16::try_from(number)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| ConvertError::new(field, format!("{number} is not a port")))
}

pub(super) fn some_ports(field: &str, list: &[u32]) -> Result<BTreeSet<u16>, ConvertError> {
    if list.is_empty() { Err(ConvertError::missing(field)) } else { ports(field, list) }
}

pub(super) fn mode_message(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Enforce => v1::Mode::Enforce,
        Mode::Audit => v1::Mode::Audit,
    }
}

pub(super) fn mode(field: &str, value: i32) -> Result<Mode, ConvertError> {
    match v1::Mode::try_from(value) {
        Ok(v1::Mode::Enforce) => Ok(Mode::Enforce),
        Ok(v1::Mode::Audit) => Ok(Mode::Audit),
        Ok(v1::Mode::Unspecified) | Err(_) => Err(ConvertError::missing(field)),
    }
}
