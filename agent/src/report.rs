//! What is told of a connection: exactly one closing record and its metrics, on every way out.

use std::{
    net::SocketAddr,
    time::{Duration, Instant, SystemTime},
};

use hauberk_core::{
    identity::SpiffeId,
    policy::{Denial, Mode, Reason, resolve::MeshWorkload},
    session::Refusal,
};
use hauberk_telemetry::{
    ConnectionRecord, Decision, EdgeCounters, EdgeLabels, Side,
    metrics::{Direction, OpenConnection, WorkloadLabels},
    record::{Peer, TlsInfo},
};

use crate::{
    authorize::{Permit, Permitted},
    context::Context,
};

/// Collects what becomes known of a connection, and tells it when it is dropped.
pub(crate) struct Report<'a> {
    context: &'a Context,
    record: ConnectionRecord,
    direction: Direction,
    started: Instant,
    counters: Option<EdgeCounters>,
    counted: bool,
    /// From the first byte that could pass.
    open: Option<OpenConnection>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(
        context: &'a Context,
        side: Side,
        connection_id: [u8; 16],
        client: Option<SocketAddr>,
        original_destination: Option<SocketAddr>,
    ) -> Self {
        let direction = match side {
            Side::Source => Direction::Outbound,
            Side::Destination => Direction::Inbound,
        };
        // Until something is decided it counts as denied: a way out that forgets to decide shows.
        let mut record = ConnectionRecord::new(
            hex::encode(connection_id),
            SystemTime::now(),
            side,
            Decision::Deny,
        );
        record.src.addr = client;
        record.original_dst = original_destination;
        record.dst.addr = original_destination;
        match side {
            Side::Source => record.src.node = Some(context.node.clone()),
            Side::Destination => record.dst.node = Some(context.node.clone()),
        }
        Self {
            context,
            record,
            direction,
            started: Instant::now(),
            counters: None,
            counted: false,
            open: None,
        }
    }

    pub(crate) fn source(&mut self, id: &SpiffeId, workload: Option<&MeshWorkload>) {
        name(&mut self.record.src, id, workload);
    }

    pub(crate) fn destination(&mut self, id: &SpiffeId, workload: Option<&MeshWorkload>) {
        name(&mut self.record.dst, id, workload);
        self.record.mode = workload.map(|workload| match workload.mode {
            Mode::Enforce => "enforce".to_owned(),
            Mode::Audit => "audit".to_owned(),
        });
    }

    pub(crate) fn addresses(&mut self, client: SocketAddr, original_destination: SocketAddr) {
        self.record.src.addr = Some(client);
        self.record.original_dst = Some(original_destination);
        self.record.dst.addr = Some(original_destination);
    }

    pub(crate) fn tls(&mut self, tls: &TlsInfo) {
        self.record.tls = Some(tls.clone());
    }

    /// It goes on, as far as this side is asked; gives the counters for its bytes. It is counted once a
    /// first byte can pass, or when it ends before that.
    pub(crate) fn permitted(&mut self, permit: &Permit) -> EdgeCounters {
        self.record.policy_revision = Some(permit.revision());
        let reason = match permit.verdict() {
            Permitted::Allowed(allowed) => {
                self.record.decision = Decision::Allow;
                self.record.policy = Some(allowed.policy.to_string());
                self.record.rule = Some(allowed.rule.to_string());
                self.record.owner = Some(allowed.owner.to_string());
                ""
            }
            Permitted::Audited(denial) => {
                self.record.decision = Decision::WouldDeny;
                self.denial(denial);
                denial.reason.as_str()
            }
        };
        self.resolve(reason)
    }

    /// It passes only because its workload is audited.
    pub(crate) fn audited(&mut self, denial: &Denial) -> EdgeCounters {
        self.record.decision = Decision::WouldDeny;
        self.denial(denial);
        self.resolve(denial.reason.as_str())
    }

    /// It is refused here.
    pub(crate) fn denied(&mut self, denial: &Denial, detail: Option<String>) {
        self.record.decision = Decision::Deny;
        self.record.detail = detail;
        self.denial(denial);
        self.record.close_reason = Some("denied".to_owned());
        self.resolve(denial.reason.as_str());
        self.count();
    }

    /// It is refused by the destination's agent.
    pub(crate) fn denied_by_peer(&mut self, reason: Reason, refusal: &Refusal) {
        let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
        self.record.decision = Decision::Deny;
        self.record.reason = Some(reason.as_str().to_owned());
        self.record.detail = Some("refused by the destination's agent".to_owned());
        self.record.policy = some(&refusal.policy);
        self.record.rule = some(&refusal.rule);
        self.record.owner = some(&refusal.owner);
        self.record.nearest_miss = some(&refusal.nearest_miss);
        self.record.mend = some(&refusal.mend);
        self.record.close_reason = Some("denied".to_owned());
        self.resolve(reason.as_str());
        self.count();
    }

    pub(crate) fn revision(&mut self, revision: u64) {
        self.record.policy_revision = Some(revision);
    }

    /// A first byte can pass from now on.
    pub(crate) fn opened(&mut self) {
        self.count();
        self.open = Some(self.context.metrics.connection_opened(self.direction));
        let elapsed = self.started.elapsed();
        self.record.open_ms = Some(millis(elapsed));
        self.context.metrics.observe_open(self.direction, elapsed);
    }

    /// Whether a first byte could pass.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// A live connection is cut, for a reason of the closed set.
    pub(crate) fn terminated(&mut self, reason: Reason, detail: String) {
        self.record.reason = Some(reason.as_str().to_owned());
        self.record.detail = Some(detail);
        self.record.close_reason = Some(reason.as_str().to_owned());
        let (src, dst) = self.labels();
        self.context.metrics.connection_terminated(reason.as_str(), src, dst);
    }

    pub(crate) fn closed(&mut self, reason: &str, detail: Option<String>) {
        self.record.close_reason = Some(reason.to_owned());
        if detail.is_some() {
            self.record.detail = detail;
        }
    }

    pub(crate) fn bytes(&mut self, sent: u64, received: u64) {
        self.record.bytes_sent = sent;
        self.record.bytes_received = received;
    }

    fn denial(&mut self, denial: &Denial) {
        self.record.reason = Some(denial.reason.as_str().to_owned());
        self.record.policy = denial.policy.as_ref().map(ToString::to_string);
        self.record.owner = denial.owner.as_ref().map(ToString::to_string);
        self.record.rule = denial.nearest_miss.as_ref().map(|miss| miss.rule.to_string());
        self.record.nearest_miss = denial.nearest_miss.as_ref().map(ToString::to_string);
        self.record.mend = Some(denial.mend.clone()).filter(|mend| !mend.is_empty());
    }

    /// The counters of what is decided now.
    fn resolve(&mut self, reason: &'static str) -> EdgeCounters {
        let (src, dst) = self.labels();
        let counters = self.context.metrics.edge(&EdgeLabels {
            direction: self.direction,
            decision: self.record.decision,
            reason,
            src,
            dst,
            dst_port: self.record.dst_port().unwrap_or(0),
            policy: self.record.policy.as_deref().unwrap_or(""),
        });
        self.counters = Some(counters.clone());
        counters
    }

    /// Once a connection.
    fn count(&mut self) {
        if let Some(counters) = &self.counters
            && !self.counted
        {
            counters.count_connection();
            self.counted = true;
        }
    }

    fn labels(&self) -> (WorkloadLabels<'_>, WorkloadLabels<'_>) {
        (labels(&self.record.src), labels(&self.record.dst))
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        if self.counters.is_none() {
            self.record.reason.get_or_insert_with(|| Reason::NotReady.as_str().to_owned());
            self.resolve(Reason::NotReady.as_str());
        }
        self.count();
        self.record.duration_ms = millis(self.started.elapsed());
        self.record.close_reason.get_or_insert_with(|| "aborted".to_owned());
        self.context.records.submit(self.record.clone());
    }
}

fn name(peer: &mut Peer, id: &SpiffeId, workload: Option<&MeshWorkload>) {
    peer.spiffe_id = Some(id.to_string());
    if let Some(workload) = workload {
        peer.node = Some(workload.node.to_string());
        peer.namespace = workload.namespace.as_ref().map(ToString::to_string);
        peer.workload = Some(workload.name.to_string());
    }
}

fn labels(peer: &Peer) -> WorkloadLabels<'_> {
    WorkloadLabels {
        namespace: peer.namespace.as_deref().unwrap_or(""),
        name: peer.workload.as_deref().unwrap_or(""),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
