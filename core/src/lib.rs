//! Pure decisions of Hauberk: who somebody is, what a certificate proves, who may connect, when a
//! certificate is renewed, which identity a workload may have, what the frames between two agents
//! mean, and which policies would allow what was seen.
//!
//! Nothing here does IO, reads a clock, starts a task or logs. Time and chance come in as
//! arguments; refusals come out as values that name the reason.

pub mod admission;
pub mod clock;
pub mod identity;
pub mod learn;
pub mod likeness;
pub mod manifest;
pub mod policy;
pub mod rotation;
pub mod session;
pub mod svid;
pub mod time;
