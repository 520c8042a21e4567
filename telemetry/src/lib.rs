//! What Hauberk tells the people who run it: logs, connection records, metrics and health.
//!
//! This crate decides how things are written down, never what happened: decisions, reasons and
//! labels come in as plain strings and small enums, so that it depends on no other crate of the
//! workspace. It refuses to be a reason for a connection to wait: nothing here blocks a caller
//! on a disk, a pipe or a slow reader.

#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test that cannot go on should panic"))]

pub mod fields;
pub mod health;
pub mod log;
pub mod metrics;
pub mod process;
pub mod record;
pub mod server;

pub use health::{Health, State};
pub use log::{LogFormat, LogOptions};
pub use metrics::{AgentMetrics, ControlPlaneMetrics, EdgeCounters, EdgeLabels};
pub use record::{ConnectionRecord, Decision, RecordSink, Side};
pub use server::serve;
