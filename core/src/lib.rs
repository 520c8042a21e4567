//! Pure decisions of Hauberk: who somebody is, what a certificate proves, who may connect, when a
//! certificate is renewed, which identity a workload may have, and what the frames between two
//! agents mean.
//!
//! Nothing here does IO, reads a clock, starts a task or logs. Time and chance come in as
//! arguments; refusals come out as values that name the reason.

pub mod admission;
pub mod identity;
pub mod manifest;
pub mod policy;
pub mod rotation;
pub mod session;
pub mod svid;
pub mod time;
