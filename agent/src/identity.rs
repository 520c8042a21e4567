//! Certificates: the node's, with which the agent speaks for itself, and the workloads', with which it
//! speaks for them. Keys are made here and never leave the node.

mod control_plane;
mod enroll;
mod found;
mod kept;
mod node;
mod rotate;
mod tend;
mod trouble;

pub(crate) use control_plane::{ControlPlane, explain};
pub(crate) use enroll::{PodToken, roots};
pub(crate) use kept::Kept;
pub(crate) use node::{Attestation, Node, forget_another, join_for_another};
pub(crate) use rotate::{Identities, LocalIdentity, forget as forget_workloads};
pub(crate) use tend::{NODE_CHECK, regain_beside, tend_or_follow};
