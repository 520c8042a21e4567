//! Keeps a flood of denials from drowning everything else, without losing count of it.
//!
//! Decides which denials are written verbatim and which are only counted. Counts are exact: what
//! is admitted plus what the summaries say is what came in. Reads no clock; the caller says when
//! a window ends.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::ConnectionRecord;

/// How many denials are written verbatim.
#[derive(Clone, Debug)]
pub struct FloodLimits {
    /// Denials of one edge written verbatim in a window; those after it are counted.
    pub verbatim: u64,
    /// Edges told apart in a window; those after it share one count.
    pub edges: usize,
    /// Length of a window.
    pub window: Duration,
}

impl Default for FloodLimits {
    fn default() -> Self {
        Self {
            // Enough to see a pattern; a caller that retries every second stays below it.
            verbatim: 50,
            // About 1 MiB of keys; a port scan fills it and then shares the overflow count.
            edges: 4096,
            window: Duration::from_secs(60),
        }
    }
}

/// Denials that are told apart: who asked for what, and why it was refused.
///
/// All fields are none in the count shared by the edges over the limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DenialEdge {
    /// SPIFFE ID of the caller; none when nothing was proven.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src: Option<String>,
    /// SPIFFE ID of the called workload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dst: Option<String>,
    /// Port that was called.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether this stands for all edges over the limit.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overflow: bool,
}

impl DenialEdge {
    /// The edge a record belongs to.
    #[must_use]
    pub fn of(record: &ConnectionRecord) -> Self {
        Self {
            src: record.src.spiffe_id.clone(),
            dst: record.dst.spiffe_id.clone(),
            port: record.dst_port(),
            reason: record.reason.clone(),
            overflow: false,
        }
    }

    fn shared() -> Self {
        Self { overflow: true, ..Self::default() }
    }
}

/// How many denials of one edge were counted instead of written in a window.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename = "hauberk.connection.summary")]
pub struct DenialSummary {
    /// When the window ended, RFC 3339 in UTC with milliseconds.
    pub time: String,
    /// When the window began, in the same form.
    pub since: String,
    /// Which denials.
    pub edge: DenialEdge,
    /// How many were not written, exactly.
    pub suppressed: u64,
}

/// What to do with a denial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Verbatim,
    Counted,
}

/// Counts of the window that runs now.
#[derive(Debug)]
pub(super) struct Flood {
    verbatim: u64,
    max_edges: usize,
    edges: HashMap<DenialEdge, u64>,
    overflow: u64,
}

impl Flood {
    pub(super) fn new(limits: &FloodLimits) -> Self {
        Self {
            verbatim: limits.verbatim,
            max_edges: limits.edges,
            edges: HashMap::new(),
            overflow: 0,
        }
    }

    pub(super) fn admit(&mut self, edge: DenialEdge) -> Verdict {
        let room = self.edges.len() < self.max_edges;
        let seen = match self.edges.get_mut(&edge) {
            Some(seen) => seen,
            None if room => self.edges.entry(edge).or_insert(0),
            None => &mut self.overflow,
        };
        *seen = seen.saturating_add(1);
        if *seen <= self.verbatim { Verdict::Verbatim } else { Verdict::Counted }
    }

    /// Ends the window: every edge with denials that were only counted, in a stable order.
    pub(super) fn end_window(&mut self) -> Vec<(DenialEdge, u64)> {
        let mut counted: Vec<_> = std::mem::take(&mut self.edges).into_iter().collect();
        counted.push((DenialEdge::shared(), std::mem::take(&mut self.overflow)));
        counted.retain_mut(|(_, seen)| {
            *seen = seen.saturating_sub(self.verbatim);
            *seen > 0
        });
        counted.sort_unstable();
        counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edge(port: u16) -> DenialEdge {
        DenialEdge { port: Some(port), ..DenialEdge::default() }
    }

    fn flood(verbatim: u64, edges: usize) -> Flood {
        Flood::new(&FloodLimits { verbatim, edges, window: Duration::from_secs(60) })
    }

    fn admit_many(flood: &mut Flood, port: u16, times: u64) -> u64 {
        let verdicts = (0..times).map(|_| flood.admit(edge(port)));
        u64::try_from(verdicts.filter(|verdict| *verdict == Verdict::Verbatim).count()).unwrap()
    }

    #[test]
    fn verbatim_and_suppressed_add_up_to_what_came_in() {
        let mut flood = flood(50, 10);
        for (port, times) in [(1, 49), (2, 50), (3, 51), (4, 10_000)] {
            assert_eq!(admit_many(&mut flood, port, times), times.min(50), "port {port}");
        }
        assert_eq!(flood.end_window(), [(edge(3), 1), (edge(4), 9_950)]);
    }

    #[test]
    fn edges_over_the_limit_share_one_exact_count() {
        let mut flood = flood(5, 2);
        for port in 1..=10 {
            admit_many(&mut flood, port, 6);
        }
        // Eight edges of six denials share the overflow, of which five are verbatim.
        let expected = [(edge(1), 1), (edge(2), 1), (DenialEdge::shared(), 43)];
        let mut counted = flood.end_window();
        counted.sort_by_key(|(edge, _)| edge.overflow);
        assert_eq!(counted, expected);
    }

    #[test]
    fn a_new_window_starts_from_nothing() {
        let mut flood = flood(1, 1);
        admit_many(&mut flood, 1, 3);
        admit_many(&mut flood, 2, 3);
        flood.end_window();
        assert_eq!(flood.end_window(), []);
        assert_eq!(flood.admit(edge(2)), Verdict::Verbatim);
    }
}
