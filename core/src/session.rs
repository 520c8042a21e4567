//! The session protocol `hauberk/1`: what two agents say inside one mutual TLS connection.
//! `proto/SESSION.md` is its specification.
//!
//! ```text
//! frame   = type (1 byte) length (3 bytes, big endian) body (length bytes)
//! ```
//!
//! `frame.rs` knows headers and their limits, `message.rs` the bodies of control frames,
//! `machine.rs` what may come when, `proofs.rs` how often a peer may prove itself. Nothing here reads a socket or a clock, and nothing a peer says
//! is trusted for an allocation: every type has its own limit, checked on the four bytes of the
//! header, before any of the body is kept.

mod frame;
mod machine;
mod message;
mod proofs;

pub use frame::{ALPN, FrameError, FrameType, HEADER_LENGTH, Header, MAX_CONTROL, MAX_DATA};
pub use machine::{Event, Machine, Misuse, Received, Role};
pub use message::{Open, Reauthenticate, Refusal, RefusalCause, ResetCause};
pub use proofs::ProofAllowance;
