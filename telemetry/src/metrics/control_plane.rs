//! The control plane's metrics.

use std::time::SystemTime;

use prometheus::{IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};

use super::{Maker, MetricsError, Outcome, saturating, unix_seconds};

/// What became of a question of the Kubernetes API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Review {
    /// There was nothing to warn of.
    Quiet,
    /// The author was warned.
    Warned,
    /// Too little was known of the cluster yet to say anything.
    NotReady,
    /// It was no question, or too long.
    Refused,
}

impl Review {
    const ALL: [Self; 4] = [Self::Quiet, Self::Warned, Self::NotReady, Self::Refused];

    /// The word used in labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Warned => "warned",
            Self::NotReady => "not_ready",
            Self::Refused => "refused",
        }
    }
}

/// Everything a control plane counts. Clones share the metrics.
#[derive(Clone, Debug)]
pub struct ControlPlaneMetrics {
    registry: Registry,
    issued: IntCounterVec,
    agents_connected: IntGauge,
    state_revision: IntGauge,
    manifest_errors: IntGauge,
    manifest_last_good: IntGauge,
    join_attempts: IntCounterVec,
    nodes_locked: IntCounter,
    ca_expiry: IntGaugeVec,
    reviews: IntCounterVec,
}

impl ControlPlaneMetrics {
    /// Metrics in a registry of their own.
    ///
    /// # Errors
    ///
    /// When a metric cannot be registered, which is a fault of this crate.
    pub fn new() -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let make = Maker(&registry);
        let metrics = Self {
            issued: make.counters(
                "hauberk_issued_certificates_total",
                "Requests for a certificate, by the kind of holder and whether one was issued \
                 (success) or refused (failure).",
                &["kind", "result"],
            )?,
            agents_connected: make.gauge(
                "hauberk_agents_connected",
                "Agents with a stream to this control plane right now.",
            )?,
            state_revision: make.gauge(
                "hauberk_state_revision",
                "Revision of the policy state handed to agents.",
            )?,
            manifest_errors: make.gauge(
                "hauberk_manifest_errors",
                "Manifests that are refused right now; the last good version of each is in force.",
            )?,
            manifest_last_good: make.gauge(
                "hauberk_manifest_last_good_timestamp_seconds",
                "Unix time at which the manifests were last read without an error.",
            )?,
            join_attempts: make.counters(
                "hauberk_join_attempts_total",
                "Attempts of a node to join, by result.",
                &["result"],
            )?,
            nodes_locked: make.counter(
                "hauberk_node_locks_total",
                "Nodes that were locked because two hold their credential.",
            )?,
            ca_expiry: make.gauges(
                "hauberk_ca_expiry_timestamp_seconds",
                "Unix time at which a certificate of the authority ends, by which one it is.",
                &["ca"],
            )?,
            reviews: make.counters(
                "hauberk_admission_reviews_total",
                "Questions of the Kubernetes API server about objects that are applied, by whether \
                 their authors were warned. No object is refused by them.",
                &["result"],
            )?,
            registry,
        };
        for review in Review::ALL {
            metrics.reviews.with_label_values(&[review.as_str()]);
        }
        for outcome in [Outcome::Success, Outcome::Failure] {
            metrics.join_attempts.with_label_values(&[outcome.as_str()]);
        }
        Ok(metrics)
    }

    /// The registry, for [`serve`](crate::serve).
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counts a request for a certificate; `kind` says for what, such as `workload` or `agent`.
    pub fn certificate_issued(&self, kind: &'static str, outcome: Outcome) {
        self.issued.with_label_values(&[kind, outcome.as_str()]).inc();
    }

    /// Sets how many agents have a stream.
    pub fn set_agents_connected(&self, agents: u64) {
        self.agents_connected.set(saturating(agents));
    }

    /// Sets the revision handed to agents.
    pub fn set_state_revision(&self, revision: u64) {
        self.state_revision.set(saturating(revision));
    }

    /// Notes a reading of the manifests at `now` that refused `errors` of them.
    pub fn manifests_read(&self, errors: u64, now: SystemTime) {
        self.manifest_errors.set(saturating(errors));
        if errors == 0 {
            self.manifest_last_good.set(unix_seconds(now));
        }
    }

    /// Counts an attempt to join.
    pub fn join_attempt(&self, outcome: Outcome) {
        self.join_attempts.with_label_values(&[outcome.as_str()]).inc();
    }

    /// Counts a node that was locked because its credential was cloned.
    pub fn node_locked(&self) {
        self.nodes_locked.inc();
    }

    /// Counts a question of the Kubernetes API server.
    pub fn admission_review(&self, review: Review) {
        self.reviews.with_label_values(&[review.as_str()]).inc();
    }

    /// Sets when a certificate of the authority ends; `ca` says which, such as `root`.
    pub fn set_ca_expiry(&self, ca: &'static str, not_after: SystemTime) {
        self.ca_expiry.with_label_values(&[ca]).set(unix_seconds(not_after));
    }
}
