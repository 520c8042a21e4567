//! The certificate authority: an own root or a CA that somebody brought, an online intermediate under it,
//! what it issues, and which roots are trusted meanwhile.

mod authority;
mod brought;
mod handover;
mod issuer;
mod own;
mod roots;

pub(crate) use authority::{Authority, CaError, Signer};
pub(crate) use brought::{Brought, CERTIFICATE, KEY, ROOTS};
pub(crate) use issuer::Issued;
pub(crate) use own::{exists as own_exists, keep_root, open as open_own, root_files};
pub(crate) use roots::Roots;
