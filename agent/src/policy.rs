//! What this node enforces: the snapshot that every decision reads, and its sole writer.

mod clock;
mod kept;
mod snapshot;
mod subscribe;

pub(crate) use kept::{Owner, forget as forget_kept, owner as kept_owner, state as kept_state};
pub(crate) use snapshot::{Found, Snapshot};
pub(crate) use subscribe::{Enforcer, POLICY_CHECK, Subscription};
