//! Addresses that stand for others.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
};

use crate::identity::ResourceName;

/// Addresses at which nobody lives: a connection to one of their ports goes to one of the backends, and
/// whether it may is decided about that one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshService {
    /// Its namespace.
    pub namespace: ResourceName,
    /// Its name.
    pub name: ResourceName,
    /// Never empty.
    pub addresses: BTreeSet<IpAddr>,
    /// Its ports, and the backends of each that are ready; maybe none.
    pub ports: BTreeMap<u16, BTreeSet<SocketAddr>>,
}
