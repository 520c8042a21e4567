//! The agent's metrics.

use std::time::{Duration, SystemTime};

use prometheus::{Gauge, Histogram, IntCounter, IntCounterVec, IntGauge, Registry};

use super::edge::{BYTES_LABELS, CONNECTION_LABELS, EdgeVectors, TERMINATED_LABELS};
use super::{
    CappedVec, DEFAULT_SERIES_CAP, Direction, EdgeCounters, EdgeLabels, Maker, MetricsError,
    Outcome, WorkloadLabels, child, saturating, unix_seconds,
};
use crate::record::Side;

/// Step of a certificate renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RenewalStep {
    /// Asking the control plane for a certificate.
    Call,
    /// Putting it to use.
    Install,
}

impl RenewalStep {
    /// The word used in labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Call => "call",
            Self::Install => "install",
        }
    }
}

/// Everything an agent counts. Clones share the metrics.
#[derive(Clone, Debug)]
pub struct AgentMetrics {
    registry: Registry,
    edges: EdgeVectors,
    open: PerDirection<IntGauge>,
    open_duration: PerDirection<Histogram>,
    captured: PerDirection<IntCounter>,
    moved: IntCounter,
    capture_restored: IntCounter,
    capture_unreported: IntGauge,
    plugin_restored: IntCounter,
    plugin_in_place: IntGauge,
    older_enforced: IntGauge,
    older_audited: IntGauge,
    handshakes: Handshakes,
    handshake_wait: Histogram,
    idle_sessions: PerDirection<IntGauge>,
    streams: Streams,
    keys_renewed: IntCounter,
    certificate_expiry: CappedVec<IntGauge>,
    renewals: IntCounterVec,
    trust_root_expiry: IntGauge,
    policy_revision: IntGauge,
    policy_lag: Gauge,
    policy_last_good: IntGauge,
    policy_updates: IntCounterVec,
    control_plane_connected: IntGauge,
    clock_skew: Gauge,
    enrolled: IntGauge,
    unenrolled: IntGauge,
    records_lost: IntCounter,
}

#[derive(Clone, Debug)]
struct PerDirection<T> {
    inbound: T,
    outbound: T,
}

impl<T> PerDirection<T> {
    fn resolve(of: impl Fn(&str) -> T) -> Self {
        Self {
            inbound: of(Direction::Inbound.as_str()),
            outbound: of(Direction::Outbound.as_str()),
        }
    }

    fn of(&self, direction: Direction) -> &T {
        match direction {
            Direction::Inbound => &self.inbound,
            Direction::Outbound => &self.outbound,
        }
    }
}

#[derive(Clone, Debug)]
struct Handshakes {
    source_success: Histogram,
    source_failure: Histogram,
    destination_success: Histogram,
    destination_failure: Histogram,
}

/// Where a connection found its session to the other agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SessionKind {
    /// It was made while it waited.
    New,
    /// It was there before.
    Reused,
    /// There was none: both workloads are on this node, under `verified-local`.
    VerifiedLocal,
}

impl SessionKind {
    /// The word used in labels.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Reused => "reused",
            Self::VerifiedLocal => "verified_local",
        }
    }
}

#[derive(Clone, Debug)]
struct Streams {
    new: IntCounter,
    reused: IntCounter,
    verified_local: IntCounter,
}

/// Counts as an idle session until it is dropped.
#[derive(Debug)]
#[must_use = "the session counts as idle only while this lives"]
pub struct IdleSession {
    gauge: IntGauge,
}

impl Drop for IdleSession {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Counts as an open connection until it is dropped.
#[derive(Debug)]
#[must_use = "the connection counts as open only while this lives"]
pub struct OpenConnection {
    gauge: IntGauge,
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl AgentMetrics {
    /// Metrics in a registry of their own, with the usual cap on series.
    ///
    /// # Errors
    ///
    /// When a metric cannot be registered, which is a fault of this crate.
    pub fn new() -> Result<Self, MetricsError> {
        Self::with_series_cap(DEFAULT_SERIES_CAP)
    }

    /// The same, with at most `cap` label sets in each vector over edges.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_series_cap(cap: usize) -> Result<Self, MetricsError> {
        let registry = Registry::new();
        let make = Maker(&registry);
        let edges = edge_vectors(&make, cap)?;
        let open = make.gauges(
            "hauberk_open_connections",
            "Connections relayed right now, by direction seen from this node.",
            &["direction"],
        )?;
        let open_duration = make.histograms(
            "hauberk_open_duration_seconds",
            "Seconds from accepting a connection until its first byte could pass, by direction.",
            &["direction"],
        )?;
        let captured = make.counters(
            "hauberk_captured_connections_total",
            "Connections of workloads led to the agent, by direction.",
            &["direction"],
        )?;
        let workloads = make.gauges(
            "hauberk_workloads",
            "Workloads on this node in the mesh (enrolled) and outside it (unenrolled).",
            &["state"],
        )?;
        let streams = make.counters(
            "hauberk_streams_opened_total",
            "Outgoing connections by the session to the other agent they went over: made while \
             they waited (new), there before (reused), or none, between two workloads of this node \
             (verified_local).",
            &["session"],
        )?;
        let idle_sessions = make.gauges(
            "hauberk_idle_sessions",
            "Sessions with other agents that carry nothing now, by the direction \
             of their connections.",
            &["direction"],
        )?;
        let older = make.gauges(
            "hauberk_older_connections",
            "Open connections of captured workloads that are older than their capture, and go on \
             in clear, by the mode of their workloads.",
            &["mode"],
        )?;
        let stream = |kind: SessionKind| streams.with_label_values(&[kind.as_str()]);
        let metrics = Self {
            edges,
            open: PerDirection::resolve(|direction| open.with_label_values(&[direction])),
            open_duration: PerDirection::resolve(|direction| child(&open_duration, &[direction])),
            moved: make.counter(
                "hauberk_streams_moved_total",
                "Outgoing connections that went on over a session of their own, since they had \
                 much to say.",
            )?,
            capture_restored: make.counter(
                "hauberk_capture_restored_total",
                "Times that capture rules were found altered by somebody else, and were restored.",
            )?,
            plugin_restored: make.counter(
                "hauberk_cni_plugin_restored_total",
                "Times that another program took the CNI plugin out of the node's network, and it was put back.",
            )?,
            plugin_in_place: make.gauge(
                "hauberk_cni_plugin_in_place",
                "Whether the CNI plugin is in the node's network: 1 if it is. 0 on a machine that has no pods.",
            )?,
            older_enforced: older.with_label_values(&["enforce"]),
            older_audited: older.with_label_values(&["audit"]),
            capture_unreported: make.gauge(
                "hauberk_capture_unreported_workloads",
                "Workloads whose connections that cannot be captured are not recorded.",
            )?,
            captured: PerDirection::resolve(|direction| captured.with_label_values(&[direction])),
            handshakes: handshakes(&make)?,
            handshake_wait: make.histogram(
                "hauberk_handshake_wait_seconds",
                "Seconds an incoming TLS handshake waited for its turn.",
            )?,
            idle_sessions: PerDirection::resolve(|direction| {
                idle_sessions.with_label_values(&[direction])
            }),
            streams: Streams {
                new: stream(SessionKind::New),
                reused: stream(SessionKind::Reused),
                verified_local: stream(SessionKind::VerifiedLocal),
            },
            keys_renewed: make.counter(
                "hauberk_session_keys_renewed_total",
                "Sending keys of sessions with other agents that were renewed before their cipher's \
                 limit, noted when a connection with a session of its own ends, and on a shared one every few seconds.",
            )?,
            certificate_expiry: make.capped(
                "hauberk_certificate_expiry_timestamp_seconds",
                "Unix time at which the certificate in use by a local workload ends.",
                &["workload_namespace", "workload"],
                cap,
            )?,
            renewals: make.counters(
                "hauberk_certificate_renewals_total",
                "Certificate renewals: the call to the control plane, and the install that \
                 follows it, by result.",
                &["kind", "result"],
            )?,
            trust_root_expiry: make.gauge(
                "hauberk_trust_root_expiry_timestamp_seconds",
                "Unix time at which the first of the trusted roots ends.",
            )?,
            policy_revision: make.gauge(
                "hauberk_policy_revision",
                "Revision of the policy state that is enforced.",
            )?,
            policy_lag: make.float_gauge(
                "hauberk_policy_lag_seconds",
                "Seconds from the making of the enforced policy revision until this agent \
                 enforced it.",
            )?,
            policy_last_good: make.gauge(
                "hauberk_policy_last_good_timestamp_seconds",
                "Unix time at which a policy state was last received and accepted; now minus \
                 this is the age of the enforced state.",
            )?,
            policy_updates: make.counters(
                "hauberk_policy_updates_total",
                "Policy states received, by whether they were accepted (success) or refused \
                 whole (failure).",
                &["result"],
            )?,
            control_plane_connected: make.gauge(
                "hauberk_control_plane_connected",
                "1 while the stream from the control plane is up, else 0.",
            )?,
            clock_skew: make.float_gauge(
                "hauberk_clock_skew_seconds",
                "Seconds by which this node's clock is ahead of the control plane's; negative if it \
                 is behind. 0 until it was measured.",
            )?,
            enrolled: workloads.with_label_values(&["enrolled"]),
            unenrolled: workloads.with_label_values(&["unenrolled"]),
            records_lost: make.counter(
                "hauberk_records_lost_total",
                "Connections for which no record could be written. Must stay 0.",
            )?,
            registry,
        };
        metrics.start_at_zero();
        Ok(metrics)
    }

    /// The registry, for [`serve`](crate::serve).
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Resolves the counters of one connection. Once a connection: this takes locks.
    #[must_use]
    pub fn edge(&self, labels: &EdgeLabels<'_>) -> EdgeCounters {
        self.edges.resolve(labels)
    }

    /// Counts a live connection that was cut, with a word of the closed set of reasons.
    pub fn connection_terminated(
        &self,
        reason: &'static str,
        src: WorkloadLabels<'_>,
        dst: WorkloadLabels<'_>,
    ) {
        self.edges.terminated(reason, src, dst);
    }

    /// Counts a connection as open for as long as the answer lives.
    pub fn connection_opened(&self, direction: Direction) -> OpenConnection {
        let gauge = self.open.of(direction).clone();
        gauge.inc();
        OpenConnection { gauge }
    }

    /// How many connections are open now, in both directions together.
    pub fn open_connections(&self) -> u64 {
        let open = [Direction::Inbound, Direction::Outbound].map(|of| self.open.of(of).get());
        u64::try_from(open.into_iter().sum::<i64>()).unwrap_or(0)
    }

    /// Counts a session as idle for as long as the answer lives.
    pub fn session_idle(&self, direction: Direction) -> IdleSession {
        let gauge = self.idle_sessions.of(direction).clone();
        gauge.inc();
        IdleSession { gauge }
    }

    /// Counts renewals of sending keys.
    pub fn keys_renewed(&self, count: u32) {
        if count > 0 {
            self.keys_renewed.inc_by(count.into());
        }
    }

    /// Counts an outgoing connection by the session it got, or that it needed none.
    pub fn stream_opened(&self, kind: SessionKind) {
        match kind {
            SessionKind::New => self.streams.new.inc(),
            SessionKind::Reused => self.streams.reused.inc(),
            SessionKind::VerifiedLocal => self.streams.verified_local.inc(),
        }
    }

    /// Counts an outgoing connection that has moved to a session of its own.
    pub fn stream_moved(&self) {
        self.moved.inc();
    }

    /// Notes how long an incoming handshake waited for its turn.
    pub fn observe_handshake_wait(&self, duration: Duration) {
        self.handshake_wait.observe(duration.as_secs_f64());
    }

    /// Counts a connection led to the agent.
    pub fn connection_captured(&self, direction: Direction) {
        self.captured.of(direction).inc();
    }

    /// Notes the time from accept until a first byte could pass.
    pub fn observe_open(&self, direction: Direction, duration: Duration) {
        self.open_duration.of(direction).observe(duration.as_secs_f64());
    }

    /// Notes the time a TLS handshake took.
    pub fn observe_handshake(&self, side: Side, outcome: Outcome, duration: Duration) {
        let histogram = match (side, outcome) {
            (Side::Source, Outcome::Success) => &self.handshakes.source_success,
            (Side::Source, Outcome::Failure) => &self.handshakes.source_failure,
            (Side::Destination, Outcome::Success) => &self.handshakes.destination_success,
            (Side::Destination, Outcome::Failure) => &self.handshakes.destination_failure,
        };
        histogram.observe(duration.as_secs_f64());
    }

    /// Sets when the certificate of a local workload ends.
    pub fn set_certificate_expiry(&self, workload: WorkloadLabels<'_>, not_after: SystemTime) {
        let child = self.certificate_expiry.with(&[workload.namespace, workload.name]);
        child.set(unix_seconds(not_after));
    }

    /// Counts a step of a certificate renewal.
    pub fn certificate_renewal(&self, step: RenewalStep, outcome: Outcome) {
        self.renewals.with_label_values(&[step.as_str(), outcome.as_str()]).inc();
    }

    /// Sets when the first of the trusted roots ends.
    pub fn set_trust_root_expiry(&self, not_after: SystemTime) {
        self.trust_root_expiry.set(unix_seconds(not_after));
    }

    /// Notes that a policy state was accepted at `now` and is enforced, `lag` after it was made.
    pub fn policy_enforced(&self, revision: u64, now: SystemTime, lag: Duration) {
        self.policy_revision.set(saturating(revision));
        self.policy_lag.set(lag.as_secs_f64());
        self.policy_last_good.set(unix_seconds(now));
        self.policy_updates.with_label_values(&[Outcome::Success.as_str()]).inc();
    }

    /// Notes that a state received at `received`, before a restart, is enforced again from disk.
    /// Counts no update, and its age goes on from where it was.
    pub fn policy_restored(&self, revision: u64, received: SystemTime) {
        self.policy_revision.set(saturating(revision));
        self.policy_last_good.set(unix_seconds(received));
    }

    /// Counts a policy state that was refused whole.
    pub fn policy_refused(&self) {
        self.policy_updates.with_label_values(&[Outcome::Failure.as_str()]).inc();
    }

    /// Sets that the stream from the control plane is up.
    pub fn control_plane_connected(&self) {
        self.control_plane_connected.set(1);
    }

    /// Sets that the stream from the control plane is down.
    pub fn control_plane_disconnected(&self) {
        self.control_plane_connected.set(0);
    }

    /// Sets by how many milliseconds this node's clock is ahead of the control plane's.
    pub fn set_clock_skew(&self, millis: i64) {
        let size = Duration::from_millis(millis.unsigned_abs()).as_secs_f64();
        self.clock_skew.set(if millis < 0 { -size } else { size });
    }

    /// Notes that capture rules were altered by somebody else, and are restored.
    pub fn capture_restored(&self) {
        self.capture_restored.inc();
    }

    /// Sets of how many workloads the agent is not told which connections cannot be captured.
    pub fn set_capture_unreported(&self, workloads: u64) {
        self.capture_unreported.set(saturating(workloads));
    }

    /// Notes that another program took the CNI plugin away, and that it is back.
    pub fn plugin_restored(&self) {
        self.plugin_restored.inc();
    }

    /// Sets whether the CNI plugin is in place.
    pub fn set_plugin_in_place(&self, is: bool) {
        self.plugin_in_place.set(is.into());
    }

    /// Sets how many open connections are older than the capture, of enforced and of audited workloads.
    pub fn set_older_connections(&self, enforced: u64, audited: u64) {
        self.older_enforced.set(saturating(enforced));
        self.older_audited.set(saturating(audited));
    }

    /// Sets how many workloads of this node are in the mesh, and how many are not.
    pub fn set_workloads(&self, enrolled: u64, unenrolled: u64) {
        self.enrolled.set(saturating(enrolled));
        self.unenrolled.set(saturating(unenrolled));
    }

    /// The counter for [`RecordSink::start`](crate::RecordSink::start).
    #[must_use]
    pub fn records_lost(&self) -> IntCounter {
        self.records_lost.clone()
    }

    /// Removes the series of a workload. Call it a minute after the workload is gone, so that
    /// its last values are scraped, and not when it has come back by then.
    pub fn forget(&self, namespace: &str, workload: &str) {
        self.edges.forget(namespace, workload);
        self.certificate_expiry.forget(namespace, workload);
    }

    /// A counter that appears with its first failure has no increase to alert on.
    fn start_at_zero(&self) {
        for outcome in [Outcome::Success, Outcome::Failure] {
            self.policy_updates.with_label_values(&[outcome.as_str()]);
            for step in [RenewalStep::Call, RenewalStep::Install] {
                self.renewals.with_label_values(&[step.as_str(), outcome.as_str()]);
            }
        }
    }
}

fn edge_vectors(make: &Maker<'_>, cap: usize) -> Result<EdgeVectors, MetricsError> {
    Ok(EdgeVectors {
        connections: make.capped(
            "hauberk_connections_total",
            "Connections decided, by decision (allow, deny, would_deny), reason and edge.",
            &CONNECTION_LABELS,
            cap,
        )?,
        denied: make.capped(
            "hauberk_connections_denied_total",
            "Connections denied, by reason and edge: by policy, TLS failure, wrong trust domain, \
             unknown destination or plaintext. With decision would_deny, let through in audit \
             mode.",
            &CONNECTION_LABELS,
            cap,
        )?,
        terminated: make.capped(
            "hauberk_connections_terminated_total",
            "Live connections cut because they are no longer allowed, by reason and edge.",
            &TERMINATED_LABELS,
            cap,
        )?,
        bytes: make.capped(
            "hauberk_connection_bytes_total",
            "Application bytes relayed, by flow seen from the application on this node: sent to \
             its peer or received from it.",
            &BYTES_LABELS,
            cap,
        )?,
    })
}

fn handshakes(make: &Maker<'_>) -> Result<Handshakes, MetricsError> {
    let vector = make.histograms(
        "hauberk_handshake_duration_seconds",
        "Seconds a TLS handshake took, by the side this agent was and the result.",
        &["side", "result"],
    )?;
    let of = |side: Side, outcome: Outcome| child(&vector, &[side.as_str(), outcome.as_str()]);
    Ok(Handshakes {
        source_success: of(Side::Source, Outcome::Success),
        source_failure: of(Side::Source, Outcome::Failure),
        destination_success: of(Side::Destination, Outcome::Success),
        destination_failure: of(Side::Destination, Outcome::Failure),
    })
}
