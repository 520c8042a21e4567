//! Who and on which port: what policies and guardrails share.

use std::collections::BTreeSet;

use super::{objects::all, reader::Field};
use crate::{identity::ResourceName, policy::PeerSelector};

/// At least one peer.
pub(super) fn some_peers(field: &Field<'_>) -> Option<Vec<PeerSelector>> {
    all(field.some_list()?, |field| peer(&field))
}

pub(super) fn peer(field: &Field<'_>) -> Option<PeerSelector> {
    const KINDS: &[&str] = &["serviceAccount", "machine", "spiffeId", "anyIn"];
    let (which, chosen) = field.fields(KINDS)?.one_of(KINDS)?;
    match which {
        "serviceAccount" => namespaced_name(&chosen)
            .map(|(namespace, name)| PeerSelector::ServiceAccount { namespace, name }),
        "machine" => chosen.name_or_map().map(|name| PeerSelector::Machine { name }),
        "spiffeId" => chosen.spiffe_id().map(PeerSelector::SpiffeId),
        _ => chosen
            .fields(&["namespace"])?
            .required("namespace", "reporting", Field::name)
            .map(|namespace| PeerSelector::AnyIn { namespace }),
    }
}

pub(super) fn namespaced_name(field: &Field<'_>) -> Option<(ResourceName, ResourceName)> {
    let fields = field.fields(&["namespace", "name"])?;
    let namespace = fields.required("namespace", "shop", Field::name);
    let name = fields.required("name", "checkout", Field::name);
    Some((namespace?, name?))
}

/// At least one port.
pub(super) fn some_ports(field: &Field<'_>) -> Option<BTreeSet<u16>> {
    distinct_ports(field.some_list()?)
}

/// Any number of ports, none included: for processes that only call.
pub(super) fn ports(field: &Field<'_>) -> Option<BTreeSet<u16>> {
    distinct_ports(field.list()?)
}

fn distinct_ports(list: Vec<Field<'_>>) -> Option<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    all::<_, (), ()>(list, |field| {
        let port = field.port()?;
        if ports.insert(port) {
            return Some(());
        }
        field.wrong(format_args!("the port {port} stands twice"), "name it once")
    })?;
    Some(ports)
}
