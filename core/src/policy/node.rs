//! Nodes of a cluster, as far as agents need to know them.

use crate::identity::ResourceName;

/// Where a node is: services may ask that its connections stay near.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshNode {
    /// Its name.
    pub name: ResourceName,
    /// The zone that it is in. Not empty.
    pub zone: String,
}
