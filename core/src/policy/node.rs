//! Nodes of a cluster, as far as agents need to know them.

use std::{collections::BTreeSet, net::IpAddr};

use crate::identity::ResourceName;

/// Where a node is, and what its addresses are: services may ask that connections stay near, and have ports on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshNode {
    /// Its name.
    pub name: ResourceName,
    /// The zone that it is in, if a service asks for zones. Not empty.
    pub zone: Option<String>,
    /// Its addresses, if a service has ports on nodes.
    pub addresses: BTreeSet<IpAddr>,
}
