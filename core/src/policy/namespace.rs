//! Namespaces of a cluster, as far as agents need to know them.

use crate::identity::ResourceName;

/// Whether the pods of a namespace are in the mesh. An agent must know that of a pod that is about to start,
/// before anything else is known of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshNamespace {
    /// Its name.
    pub name: ResourceName,
    /// Whether its pods are in the mesh.
    pub enrolled: bool,
}
