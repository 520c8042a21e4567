//! Certificates: the node's, with which the agent speaks for itself, and the workloads', with which it
//! speaks for them. Keys are made here and never leave the node.

mod control_plane;
mod kept;
mod node;
mod rotate;
mod tend;

pub(crate) use control_plane::ControlPlane;
pub(crate) use kept::Kept;
pub(crate) use node::{Attestation, Node, PodToken, explain, open_node, roots};
pub(crate) use rotate::{Identities, LocalIdentity};
pub(crate) use tend::{NODE_CHECK, tend_or_follow};
