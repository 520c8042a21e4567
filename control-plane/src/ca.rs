//! The certificate authority: an own root, an online intermediate under it, and what it issues.

mod authority;
mod issuer;

pub(crate) use authority::{Authority, CaError};
pub(crate) use issuer::{BACKDATE, Issued};
