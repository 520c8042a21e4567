//! The series one connection touches.

use prometheus::IntCounter;

use super::{CappedVec, Direction};
use crate::record::Decision;

/// Namespace and name of a workload; both empty when unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkloadLabels<'a> {
    /// Namespace.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
}

/// What is known about a connection once it is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeLabels<'a> {
    /// Which way it goes.
    pub direction: Direction,
    /// What was decided.
    pub decision: Decision,
    /// Why not, a word of the closed set of reasons; empty when allowed.
    pub reason: &'static str,
    /// The caller.
    pub src: WorkloadLabels<'a>,
    /// The called workload.
    pub dst: WorkloadLabels<'a>,
    /// Port that was called.
    pub dst_port: u16,
    /// Policy that decided, as `namespace/name`; empty when none did.
    pub policy: &'a str,
}

/// Ready counters of one connection: counting takes no lock and no look-up.
#[derive(Clone, Debug)]
pub struct EdgeCounters {
    connections: IntCounter,
    denied: Option<IntCounter>,
    bytes: Option<Bytes>,
}

#[derive(Clone, Debug)]
struct Bytes {
    sent: IntCounter,
    received: IntCounter,
}

impl EdgeCounters {
    /// Counts the connection, and its denial when it was denied or would have been.
    pub fn count_connection(&self) {
        self.connections.inc();
        if let Some(denied) = &self.denied {
            denied.inc();
        }
    }

    /// Adds bytes from the application on this side to its peer.
    pub fn add_sent(&self, bytes: u64) {
        if let Some(counters) = &self.bytes {
            counters.sent.inc_by(bytes);
        }
    }

    /// Adds bytes from the peer to the application on this side.
    pub fn add_received(&self, bytes: u64) {
        if let Some(counters) = &self.bytes {
            counters.received.inc_by(bytes);
        }
    }
}

/// The vectors over edges.
#[derive(Clone, Debug)]
pub(super) struct EdgeVectors {
    pub(super) connections: CappedVec<IntCounter>,
    pub(super) denied: CappedVec<IntCounter>,
    pub(super) terminated: CappedVec<IntCounter>,
    pub(super) bytes: CappedVec<IntCounter>,
}

pub(super) const CONNECTION_LABELS: [&str; 9] = [
    "direction",
    "decision",
    "reason",
    "src_namespace",
    "src_workload",
    "dst_namespace",
    "dst_workload",
    "dst_port",
    "policy",
];
pub(super) const TERMINATED_LABELS: [&str; 5] =
    ["reason", "src_namespace", "src_workload", "dst_namespace", "dst_workload"];
pub(super) const BYTES_LABELS: [&str; 6] =
    ["direction", "flow", "src_namespace", "src_workload", "dst_namespace", "dst_workload"];

impl EdgeVectors {
    pub(super) fn resolve(&self, labels: &EdgeLabels<'_>) -> EdgeCounters {
        let EdgeLabels { direction, decision, reason, src, dst, dst_port, policy } = *labels;
        let port = dst_port.to_string();
        let values = [
            direction.as_str(),
            decision.as_str(),
            reason,
            src.namespace,
            src.name,
            dst.namespace,
            dst.name,
            &port,
            policy,
        ];
        let bytes = |flow| {
            let direction = direction.as_str();
            self.bytes.with(&[direction, flow, src.namespace, src.name, dst.namespace, dst.name])
        };
        let both = || Bytes { sent: bytes("sent"), received: bytes("received") };
        // Only what can move is resolved: a series that stays 0 costs as much as any other.
        let (denied, bytes) = match decision {
            Decision::Allow => (None, Some(both())),
            Decision::WouldDeny => (Some(self.denied.with(&values)), Some(both())),
            Decision::Deny => (Some(self.denied.with(&values)), None),
        };
        EdgeCounters { connections: self.connections.with(&values), denied, bytes }
    }

    pub(super) fn terminated(
        &self,
        reason: &'static str,
        src: WorkloadLabels<'_>,
        dst: WorkloadLabels<'_>,
    ) {
        self.terminated.with(&[reason, src.namespace, src.name, dst.namespace, dst.name]).inc();
    }

    pub(super) fn forget(&self, namespace: &str, workload: &str) {
        for vector in [&self.connections, &self.denied, &self.terminated, &self.bytes] {
            vector.forget(namespace, workload);
        }
    }
}
