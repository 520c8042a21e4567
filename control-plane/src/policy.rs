//! From manifests to what agents enforce: read whole, resolved, published as revisions.

mod publish;
mod source;

pub(crate) use publish::{Published, Publisher, chain};
pub(crate) use source::{Folder, read_folder};
