//! The control plane: a certificate authority for short-lived workload certificates, a registry of
//! who runs where, and the distribution of what agents enforce.

pub mod app;
pub mod config;

mod api;
mod attest;
mod ca;
mod custody;
mod fleet;
mod handshake;
mod issuance;
mod kubernetes;
mod policy;
mod seen;
mod serve;
mod store;
mod webhook;
