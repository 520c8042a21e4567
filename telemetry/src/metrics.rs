//! What is counted, under which names.
//!
//! Labels come from closed sets or from the names of workloads and policies; addresses and
//! identifiers never become labels. Vectors over edges are capped, and the children a connection
//! needs are resolved once, so that counting a byte is one atomic addition.

mod agent;
mod capped;
mod control_plane;
mod edge;

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry,
};

pub use self::agent::{AgentMetrics, IdleSession, OpenConnection, RenewalStep, SessionKind};
pub use self::capped::{CappedVec, DEFAULT_SERIES_CAP, OVERFLOW, Series};
pub use self::control_plane::{ControlPlaneMetrics, Review};
pub use self::edge::{EdgeCounters, EdgeLabels, WorkloadLabels};

/// Which way a connection goes, seen from this agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// To a workload on this node.
    Inbound,
    /// From a workload on this node.
    Outbound,
}

impl Direction {
    /// The word used in labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }
}

/// How something that can fail went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// As meant.
    Success,
    /// Not.
    Failure,
}

impl Outcome {
    /// The word used in labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
        }
    }
}

impl<T, E> From<&Result<T, E>> for Outcome {
    fn from(result: &Result<T, E>) -> Self {
        if result.is_ok() { Self::Success } else { Self::Failure }
    }
}

/// A metric cannot be registered: its name or a label is malformed or taken.
#[derive(Debug, thiserror::Error)]
#[error("register metric {name}")]
pub struct MetricsError {
    name: String,
    #[source]
    source: prometheus::Error,
}

/// A registry with CPU time, memory, open files and start time of this process.
///
/// Apart from the other registries, because agent and control plane may share a process and a
/// page must not list these twice.
///
/// # Errors
///
/// When the collector cannot be registered.
pub fn process_registry() -> Result<Registry, MetricsError> {
    let registry = Registry::new();
    add(&registry, "process", ProcessCollector::for_self())?;
    Ok(registry)
}

fn add(
    registry: &Registry,
    name: &str,
    collector: impl Collector + 'static,
) -> Result<(), MetricsError> {
    registry
        .register(Box::new(collector))
        .map_err(|source| MetricsError { name: name.to_owned(), source })
}

/// Makes metrics in a registry, naming the one that fails.
struct Maker<'a>(&'a Registry);

impl Maker<'_> {
    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, MetricsError> {
        self.register(name, IntCounter::new(name, help))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, MetricsError> {
        self.register(name, IntGauge::new(name, help))
    }

    fn float_gauge(&self, name: &str, help: &str) -> Result<Gauge, MetricsError> {
        self.register(name, Gauge::new(name, help))
    }

    fn counters(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<IntCounterVec, MetricsError> {
        self.register(name, IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, MetricsError> {
        self.register(name, IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str) -> Result<Histogram, MetricsError> {
        let options = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec());
        self.register(name, Histogram::with_opts(options))
    }

    fn histograms(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
    ) -> Result<HistogramVec, MetricsError> {
        let options = HistogramOpts::new(name, help).buckets(LATENCY_BUCKETS.to_vec());
        self.register(name, HistogramVec::new(options, labels))
    }

    fn capped<S: Series>(
        &self,
        name: &str,
        help: &str,
        labels: &[&str],
        cap: usize,
    ) -> Result<CappedVec<S>, MetricsError> {
        self.register(name, CappedVec::new(Opts::new(name, help), labels, cap))
    }

    fn register<C: Collector + Clone + 'static>(
        &self,
        name: &str,
        made: prometheus::Result<C>,
    ) -> Result<C, MetricsError> {
        let collector = made.map_err(|source| MetricsError { name: name.to_owned(), source })?;
        add(self.0, name, collector.clone())?;
        Ok(collector)
    }
}

/// Seconds, 100 µs to 10 s: a handshake on one machine is near the start, one that is near the
/// end is about to be given up.
const LATENCY_BUCKETS: [f64; 16] = [
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// Resolves children of a histogram up front, for a label from a closed set.
fn child(vector: &HistogramVec, labels: &[&str]) -> Histogram {
    vector.with_label_values(labels)
}

/// Whole seconds since 1970, as timestamp metrics have it. Earlier times are 0.
fn unix_seconds(time: SystemTime) -> i64 {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    saturating(seconds)
}

fn saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
