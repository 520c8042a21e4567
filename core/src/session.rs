//! The session protocols: what two agents say inside one mutual TLS connection. `proto/SESSION.md` is their
//! specification. A dedicated session, `hauberk/1`, carries one stream after another; a multiplexed one, `hauberk/2`,
//! many at a time, and leaves it to a dedicated one to carry on with a stream that has much to say.
//!
//! ```text
//! frame   = type (1 byte) length (3 bytes, big endian) [stream (4 bytes, multiplexed only)] body (length bytes)
//! ```
//!
//! `frame.rs` knows headers and their limits, `message.rs` the bodies of control frames, `reader.rs` takes frames apart,
//! `machine.rs` and `multiplex.rs` know what may come when, `proofs.rs` how often a peer may prove itself. Nothing here
//! reads a socket or a clock, and nothing a peer says is trusted for an allocation: every type has its own limit, checked
//! on the bytes of the header, before any of the body is kept.

mod frame;
mod machine;
mod message;
mod multiplex;
mod proofs;
mod reader;

pub use frame::{
    ALPN, ALPN_MULTIPLEXED, FrameError, FrameType, HEADER_LENGTH, Header, MAX_CONTROL, MAX_DATA,
    NUMBERED_HEADER_LENGTH,
};
pub use machine::{Event, Machine, Misuse, Received, Role};
pub use message::{Continue, Open, Reauthenticate, Refusal, RefusalCause, ResetCause};
pub use multiplex::{Came, INITIAL_CREDIT, MAX_AT_A_TIME, Multiplex, OfStream};
pub use proofs::ProofAllowance;
