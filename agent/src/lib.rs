//! The per-node agent: captures the TCP connections of its workloads, carries them to other agents in
//! mutual TLS, and lets through what the policy allows.
//!
//! The way of one connection: `outbound.rs` on the caller's node, `inbound.rs` on the destination's.

pub mod app;
pub mod config;

mod authorize;
mod capture;
mod context;
mod forward;
mod handshakes;
mod identity;
mod inbound;
mod outbound;
mod passthrough;
mod policy;
mod pool;
mod relay;
mod report;
mod session;
