//! The wire format between control plane, agents and the command line: generated messages in
//! [`v1`], and conversions into the types of `hauberk-core` in [`convert`] that take a message whole
//! or refuse it whole. No business rules, and no default that grants anything.

/// The generated messages and services.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::as_conversions)]
pub mod v1 {
    include!("gen/hauberk.v1.rs");
}

/// The messages of the container runtime that agents ask (`proto/cri/runtime.proto`).
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::as_conversions)]
pub mod cri {
    include!("gen/runtime.v1.rs");
}

pub mod convert;
pub mod state;
pub mod token;
