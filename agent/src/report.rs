//! What is told of a connection: exactly one closing record and its metrics, on every way out.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use hauberk_core::{
    identity::SpiffeId,
    learn::{Edge, End, Outcome},
    policy::{Allowed, Denial, Mode, Reason, resolve::MeshWorkload},
    session::Refusal,
};
use hauberk_telemetry::{
    ConnectionRecord, Decision, EdgeCounters, EdgeLabels, Side,
    metrics::{Direction, OpenConnection, WorkloadLabels},
    record::{Path, Peer, TlsInfo},
};

use crate::{
    authorize::{Pass, Permit, Permitted, Why},
    context::Context,
};

/// More than a probe says and hears, and longer than it lasts.
const LARGEST_PROBE: u64 = 16 * 1024;
const LONGEST_PROBE: Duration = Duration::from_secs(10);

/// Collects what becomes known of a connection, and tells it when it is dropped. Until then it only points
/// to what others hold: an open connection has no texts of its own.
pub(crate) struct Report<'a> {
    context: &'a Context,
    id: [u8; 16],
    time: SystemTime,
    started: Instant,
    side: Side,
    src: Party,
    dst: Party,
    client: Option<SocketAddr>,
    original_destination: Option<SocketAddr>,
    /// Where it goes, and what was decided about, where that is not what the application dialled.
    target: Option<Box<SocketAddr>>,
    tls: Option<Arc<TlsInfo>>,
    path: Option<Path>,
    revision: Option<u64>,
    decided: Decided,
    detail: Option<Box<str>>,
    ended: Option<&'static str>,
    terminated: Option<Reason>,
    sent: u64,
    received: u64,
    opened_after: Option<Duration>,
    counters: Option<EdgeCounters>,
    counted: bool,
    is_probe: bool,
    /// From the first byte that could pass.
    open: Option<OpenConnection>,
}

#[derive(Default)]
struct Party {
    id: Option<SpiffeId>,
    workload: Option<Arc<MeshWorkload>>,
}

/// What is decided so far.
enum Decided {
    /// Counts as denied: a way out that forgets to decide shows.
    Nothing,
    Permitted(Arc<Permitted>),
    WouldDeny(Box<Denial>),
    /// Nobody is asked: the node's kubelet, and workloads that have left the mesh.
    Unasked,
    Denied(Box<Denial>),
    DeniedByPeer(Reason, Box<Refusal>),
}

impl<'a> Report<'a> {
    pub(crate) fn new(
        context: &'a Context,
        side: Side,
        id: [u8; 16],
        client: Option<SocketAddr>,
        original_destination: Option<SocketAddr>,
    ) -> Self {
        Self {
            context,
            id,
            time: SystemTime::now(),
            started: Instant::now(),
            side,
            src: Party::default(),
            dst: Party::default(),
            client,
            original_destination,
            target: None,
            tls: None,
            path: None,
            revision: None,
            decided: Decided::Nothing,
            detail: None,
            ended: None,
            terminated: None,
            sent: 0,
            received: 0,
            opened_after: None,
            counters: None,
            counted: false,
            is_probe: false,
            open: None,
        }
    }

    pub(crate) fn source(&mut self, id: &SpiffeId, workload: Option<&Arc<MeshWorkload>>) {
        self.src = Party { id: Some(id.clone()), workload: workload.cloned() };
    }

    pub(crate) fn destination(&mut self, id: &SpiffeId, workload: Option<&Arc<MeshWorkload>>) {
        self.dst = Party { id: Some(id.clone()), workload: workload.cloned() };
    }

    pub(crate) fn addresses(&mut self, client: SocketAddr, original_destination: SocketAddr) {
        self.client = Some(client);
        self.original_destination = Some(original_destination);
    }

    /// It goes there, and the decision is about that port: a service leads to another address than its own.
    pub(crate) fn goes_to(&mut self, target: SocketAddr) {
        self.target =
            Some(target).filter(|_| self.original_destination != Some(target)).map(Box::new);
    }

    pub(crate) fn tls(&mut self, tls: &Arc<TlsInfo>) {
        self.tls = Some(tls.clone());
    }

    /// It goes on, as far as this side is asked; gives the counters for its bytes. It is counted once a
    /// first byte can pass, or when it ends before that.
    pub(crate) fn permitted(&mut self, permit: &Permit) -> EdgeCounters {
        self.revision = Some(permit.revision());
        self.decided = Decided::Permitted(permit.verdict().clone());
        self.resolve()
    }

    /// It passes without the mesh.
    pub(crate) fn passed(&mut self, pass: &Pass) -> EdgeCounters {
        // Whatever was tried before.
        self.tls = None;
        self.decided = match pass.why() {
            Why::Audited(denial) => Decided::WouldDeny(Box::new(denial.clone())),
            Why::Probe(_) => {
                self.detail = Some("a probe from the node".into());
                self.is_probe = true;
                Decided::Unasked
            }
            Why::LetGo => {
                self.detail = Some("the workload's namespace has left the mesh".into());
                Decided::Unasked
            }
        };
        self.resolve()
    }

    /// It is refused here.
    pub(crate) fn denied(&mut self, denial: &Denial, detail: Option<String>) {
        self.decided = Decided::Denied(Box::new(denial.clone()));
        self.detail = detail.map(String::into_boxed_str);
        self.ended = Some("denied");
        self.resolve();
        self.count();
        self.note_edge();
    }

    /// It is refused by the destination's agent.
    pub(crate) fn denied_by_peer(&mut self, reason: Reason, refusal: &Refusal) {
        self.decided = Decided::DeniedByPeer(reason, Box::new(refusal.clone()));
        self.detail = Some("refused by the destination's agent".into());
        self.ended = Some("denied");
        self.resolve();
        self.count();
    }

    pub(crate) fn revision(&mut self, revision: u64) {
        self.revision = Some(revision);
    }

    /// A first byte can pass from now on.
    pub(crate) fn opened(&mut self, path: Path) {
        self.path = Some(path);
        self.count();
        // Not earlier: what nobody answers is no connection to learn from.
        self.note_edge();
        let direction = self.direction();
        self.open = Some(self.context.metrics.connection_opened(direction));
        let elapsed = self.started.elapsed();
        self.opened_after = Some(elapsed);
        self.context.metrics.observe_open(direction, elapsed);
    }

    /// Whether a first byte could pass.
    pub(crate) fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// A live connection is cut, for a reason of the closed set.
    pub(crate) fn terminated(&mut self, reason: Reason, detail: String) {
        self.terminated = Some(reason);
        self.detail = Some(detail.into_boxed_str());
        self.ended = Some(reason.as_str());
        let (src, dst) = self.labels();
        self.context.metrics.connection_terminated(reason.as_str(), src, dst);
    }

    pub(crate) fn closed(&mut self, reason: &'static str, detail: Option<String>) {
        self.ended = Some(reason);
        if let Some(detail) = detail {
            self.detail = Some(detail.into_boxed_str());
        }
    }

    pub(crate) fn bytes(&mut self, sent: u64, received: u64) {
        self.sent = sent;
        self.received = received;
    }

    fn direction(&self) -> Direction {
        match self.side {
            Side::Source => Direction::Outbound,
            Side::Destination => Direction::Inbound,
        }
    }

    fn decision(&self) -> Decision {
        match &self.decided {
            Decided::Permitted(permitted) => match permitted.as_ref() {
                Permitted::Allowed(_) => Decision::Allow,
                Permitted::Audited(_) => Decision::WouldDeny,
            },
            Decided::WouldDeny(_) => Decision::WouldDeny,
            Decided::Unasked => Decision::Allow,
            Decided::Nothing | Decided::Denied(_) | Decided::DeniedByPeer(..) => Decision::Deny,
        }
    }

    /// Why not; none if it is allowed.
    fn reason(&self) -> Option<Reason> {
        match &self.decided {
            Decided::Nothing => Some(Reason::NotReady),
            Decided::DeniedByPeer(reason, _) => Some(*reason),
            Decided::Permitted(_)
            | Decided::WouldDeny(_)
            | Decided::Unasked
            | Decided::Denied(_) => self.denial().map(|denial| denial.reason),
        }
    }

    fn denial(&self) -> Option<&Denial> {
        match &self.decided {
            Decided::Permitted(permitted) => match permitted.as_ref() {
                Permitted::Audited(denial) => Some(denial),
                Permitted::Allowed(_) => None,
            },
            Decided::WouldDeny(denial) | Decided::Denied(denial) => Some(denial),
            Decided::Nothing | Decided::Unasked | Decided::DeniedByPeer(..) => None,
        }
    }

    fn allowed(&self) -> Option<&Allowed> {
        match &self.decided {
            Decided::Permitted(permitted) => match permitted.as_ref() {
                Permitted::Allowed(allowed) => Some(allowed),
                Permitted::Audited(_) => None,
            },
            Decided::Nothing
            | Decided::Unasked
            | Decided::WouldDeny(_)
            | Decided::Denied(_)
            | Decided::DeniedByPeer(..) => None,
        }
    }

    fn policy(&self) -> Option<String> {
        if let Some(allowed) = self.allowed() {
            return Some(allowed.policy.to_string());
        }
        match &self.decided {
            Decided::DeniedByPeer(_, refusal) => some(&refusal.policy),
            Decided::Permitted(_)
            | Decided::WouldDeny(_)
            | Decided::Unasked
            | Decided::Denied(_)
            | Decided::Nothing => self.denial()?.policy.as_ref().map(ToString::to_string),
        }
    }

    /// The counters of what is decided now.
    fn resolve(&mut self) -> EdgeCounters {
        let (src, dst) = self.labels();
        let counters = self.context.metrics.edge(&EdgeLabels {
            direction: self.direction(),
            decision: self.decision(),
            reason: self.reason().map_or("", Reason::as_str),
            src,
            dst,
            dst_port: self.original_destination.map_or(0, |address| address.port()),
            policy: self.policy().as_deref().unwrap_or(""),
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

    fn note_edge(&self) {
        if let Some(edge) = self.unallowed() {
            self.context.edges.note(edge, hauberk_tls::now());
        }
    }

    /// The edge, if no policy allows it and this is the side that tells of it: the destination's, for what passed
    /// inside of the mesh, and whichever refused.
    fn unallowed(&self) -> Option<Edge> {
        let outcome = match &self.decided {
            Decided::Permitted(permitted) => match (permitted.as_ref(), self.side) {
                (Permitted::Audited(_), Side::Destination) => Outcome::WouldDeny,
                (Permitted::Audited(_), Side::Source) | (Permitted::Allowed(_), _) => return None,
            },
            // What only waits for its agent needs no rule.
            Decided::WouldDeny(denial) if denial.reason == Reason::NotReady => return None,
            Decided::WouldDeny(_) => Outcome::WouldDeny,
            Decided::Denied(denial) if wants_a_rule(denial.reason) => Outcome::Denied,
            Decided::Nothing
            | Decided::Unasked
            | Decided::Denied(_)
            | Decided::DeniedByPeer(..) => {
                return None;
            }
        };
        let wanted = self.original_destination?;
        Some(Edge {
            source: self.src.end(self.client)?,
            destination: self.dst.end(Some(wanted))?,
            port: self.target.as_ref().map_or(wanted.port(), |target| target.port()),
            outcome,
        })
    }

    fn labels(&self) -> (WorkloadLabels<'_>, WorkloadLabels<'_>) {
        (self.src.labels(), self.dst.labels())
    }

    /// A probe that ends as others before is counted, and not recorded.
    fn is_old_news(&self) -> bool {
        let (Some(workload), Some(at)) = (&self.dst.workload, self.original_destination) else {
            return false;
        };
        let end = self.ended.unwrap_or("aborted");
        // Other processes of the node's own network pass for the kubelet: what does not look like a probe is recorded.
        let is_small = self.sent.saturating_add(self.received) <= LARGEST_PROBE
            && self.started.elapsed() <= LONGEST_PROBE;
        self.is_probe
            && self.terminated.is_none()
            && is_small
            && !self.context.probes.note(workload.key(), at.port(), end, Instant::now())
    }

    fn record(&mut self) -> ConnectionRecord {
        let id = hex::encode(self.id);
        let mut record = ConnectionRecord::new(id, self.time, self.side, self.decision());
        record.src = self.src.told(self.client);
        record.dst = self.dst.told(self.target.as_deref().copied().or(self.original_destination));
        let own = match self.side {
            Side::Source => &mut record.src,
            Side::Destination => &mut record.dst,
        };
        own.node.get_or_insert_with(|| self.context.node.clone());
        record.original_dst = self.original_destination;
        record.tls = self.tls.as_deref().cloned();
        record.path = self.path;
        record.mode = self.dst.workload.as_ref().map(|workload| match workload.mode {
            Mode::Enforce => "enforce".to_owned(),
            Mode::Audit => "audit".to_owned(),
        });
        record.policy = self.policy();
        if let Some(allowed) = self.allowed() {
            record.rule = Some(allowed.rule.to_string());
            record.owner = Some(allowed.owner.to_string());
        }
        match &self.decided {
            Decided::DeniedByPeer(_, refusal) => {
                record.rule = some(&refusal.rule);
                record.owner = some(&refusal.owner);
                record.nearest_miss = some(&refusal.nearest_miss);
                record.mend = some(&refusal.mend);
            }
            Decided::Permitted(_)
            | Decided::WouldDeny(_)
            | Decided::Unasked
            | Decided::Denied(_)
            | Decided::Nothing => {
                if let Some(denial) = self.denial() {
                    let miss = denial.nearest_miss.as_ref();
                    record.owner = denial.owner.as_ref().map(ToString::to_string);
                    record.rule = miss.map(|miss| miss.rule.to_string());
                    record.nearest_miss = miss.map(ToString::to_string);
                    record.mend = some(&denial.mend);
                }
            }
        }
        let reason = self.terminated.or(self.reason());
        record.reason = reason.map(|reason| reason.as_str().to_owned());
        record.detail = self.detail.take().map(String::from);
        record.policy_revision = self.revision;
        record.bytes_sent = self.sent;
        record.bytes_received = self.received;
        record.duration_ms = millis(self.started.elapsed());
        record.open_ms = self.opened_after.map(millis);
        record.close_reason = Some(self.ended.unwrap_or("aborted").to_owned());
        record
    }
}

impl Drop for Report<'_> {
    fn drop(&mut self) {
        if self.counters.is_none() {
            self.resolve();
        }
        self.count();
        if self.is_old_news() {
            return;
        }
        let record = self.record();
        self.context.records.submit(record);
    }
}

impl Party {
    fn end(&self, address: Option<SocketAddr>) -> Option<End> {
        match &self.id {
            Some(id) => Some(End::Identity(id.clone())),
            None => address.map(|address| End::Address(address.ip())),
        }
    }

    fn told(&self, address: Option<SocketAddr>) -> Peer {
        let workload = self.workload.as_ref();
        Peer {
            spiffe_id: self.id.as_ref().map(ToString::to_string),
            node: workload.map(|workload| workload.node.to_string()),
            namespace: workload
                .and_then(|workload| workload.namespace.as_ref())
                .map(ToString::to_string),
            workload: workload.map(|workload| workload.name.to_string()),
            addr: address,
        }
    }

    fn labels(&self) -> WorkloadLabels<'_> {
        let Some(workload) = &self.workload else { return WorkloadLabels::default() };
        WorkloadLabels {
            namespace: workload.namespace.as_ref().map_or("", |name| name.as_str()),
            name: workload.name.as_str(),
        }
    }
}

/// Whether a rule is all that is missing.
fn wants_a_rule(reason: Reason) -> bool {
    matches!(reason, Reason::NoPolicy | Reason::NoMatchingRule | Reason::GrantExpired)
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned()).filter(|text| !text.is_empty())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
