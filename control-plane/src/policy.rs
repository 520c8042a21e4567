//! From manifests to what agents enforce: read whole, resolved, published as revisions.

mod judge;
mod kubernetes;
mod namespaces;
mod publish;
mod source;
mod status;
mod taints;
mod warnings;

pub(crate) use kubernetes::{Follower, HEALTH_CHECK};
pub(crate) use publish::{Emptied, Published, Publisher, Version, chain, seconds};
pub(crate) use source::{Folder, read_folder};
pub(crate) use status::StatusWriter;
pub(crate) use warnings::warnings;
