//! Tests of the public interface: snapshots of what people see, records on disk, a real server.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has failed")]

mod metrics;
mod records;
mod server;
