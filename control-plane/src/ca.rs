//! The certificate authority: an own root, an online intermediate under it, and what it issues.

mod authority;
mod issuer;

pub(crate) use authority::{Authority, CaError, keep_root, root_files};
pub(crate) use issuer::{BACKDATE, Issued};
