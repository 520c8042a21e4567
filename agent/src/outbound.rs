//! One outgoing connection of a local workload: where it wants to go, whether it may, and who is there.

use std::{
    io::ErrorKind,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::{
    policy::{Backends, Denial, Reason, resolve::MeshWorkload},
    session::{Open, Refusal},
};
use hauberk_linux::socket::reset_on_close;
use hauberk_telemetry::{
    Side,
    metrics::{Direction, Outcome as Handshake, SessionKind},
};
use hauberk_tls::with_caller_token;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, sync::watch};

use crate::{
    authorize::{self, Pass, Permit, not_ready, without_policy},
    capture::Waiting,
    context::{Context, Local, MESH_PORT, connection_id, is_own_address},
    forward::{Carried, Forward, Outcome},
    local_edge::LocalEdge,
    mux, passthrough,
    policy::{Found, Snapshot},
    pool::Edge,
    relay::Application,
    report::Report,
    services::{Asked, Chosen},
    session::{self, HANDSHAKE_TIMEOUT, New, Session, SessionError, Trunk},
    trunks::{Mover, Obtained, obtain},
};

/// Sessions that are tried for one connection: each one before the last had a destination that went
/// away before it saw the stream.
const ATTEMPTS: usize = 3;

/// Handshakes that are tried for one connection, while the destination's agent lets them go.
const HANDSHAKES: u32 = 8;

/// The pause before the third of them, doubled before each further one: less than a second in all.
const HANDSHAKES_PAUSE: Duration = Duration::from_millis(10);

/// What is to become of a captured connection.
enum Decision<'a> {
    /// Over a session.
    Carry(Box<Way<'a>>),
    /// To another workload of this node, without one.
    Local(Box<LocalWay<'a>>),
    /// On without the mesh.
    Pass(Box<PassWay>),
    /// It is refused; the application's connection is dropped.
    Refused,
}

/// All that a connection over sessions needs.
struct Way<'a> {
    /// Not while a relay has it.
    application: Option<Application>,
    open: Open,
    edge: Edge,
    chosen: Option<Chosen>,
    forward: Forward<'a>,
}

struct LocalWay<'a> {
    application: Box<Waiting>,
    edge: LocalEdge<'a>,
    permit: Permit,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Counts for as long as this lives.
    _chosen: Option<Chosen>,
}

struct PassWay {
    application: Box<Waiting>,
    /// Where it goes.
    to: SocketAddr,
    pass: Pass,
    /// Counts for as long as this lives.
    _chosen: Option<Chosen>,
}

/// Carries one connection that a local application wants to its end, or refuses it.
pub(crate) async fn serve(context: &Arc<Context>, local: &Arc<Local>, application: Box<Waiting>) {
    let id = connection_id();
    let (from, wanted) = (application.from(), application.wanted());
    let mut report = Report::new(context, Side::Source, id, Some(from), Some(wanted));
    context.metrics.connection_captured(Direction::Outbound);
    // In boxes that are gone by the time bytes flow: an open connection has only what it needs.
    match Box::pin(decide(context, local, application, id, &mut report)).await {
        Decision::Refused => {}
        Decision::Carry(way) => carry(context, local, way, &mut report).await,
        Decision::Local(way) => Box::pin(way.carry(&mut report)).await,
        Decision::Pass(way) => Box::pin(way.carry(context, local, &mut report)).await,
    }
}

/// Refuses what was dialled to the agent's own port, which no capture rule led there.
pub(crate) fn refuse_dialled(
    context: &Context,
    local: Option<&Local>,
    stream: &TcpStream,
    from: SocketAddr,
) {
    context.metrics.connection_captured(Direction::Outbound);
    let mut report = Report::new(context, Side::Source, connection_id(), Some(from), None);
    if let Some(local) = local {
        report.source(&local.workload.identity, Some(&local.workload));
    }
    let mend = "this is the agent's own port; connect to the destination's address, and the connection is taken up on \
                its way";
    report.denied(&without_policy(Reason::UnknownDestination, mend), None);
    // It may be gone already.
    drop(reset_on_close(stream));
}

async fn decide<'a>(
    context: &'a Arc<Context>,
    local: &'a Arc<Local>,
    application: Box<Waiting>,
    id: [u8; 16],
    report: &mut Report<'_>,
) -> Decision<'a> {
    report.source(&local.workload.identity, Some(&local.workload));
    let (from, wanted) = (application.from(), application.wanted());
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    if let Some(pass) = authorize::pass_let_go(&snapshot, &context.node, &local.workload) {
        return Decision::Pass(Box::new(PassWay { application, to: wanted, pass, _chosen: None }));
    }
    // Before workloads: nobody takes a service's place by claiming its address.
    let service = snapshot.service(wanted);
    let asked = Asked { service: wanted, caller: from.ip() };
    let chosen = service.and_then(|backends| context.balancer.choose(backends, asked));
    let target = chosen.as_ref().map_or(wanted, |chosen| chosen.backend);
    let found = match (service, &chosen) {
        (Some(_), None) => Found::Unknown,
        (Some(_) | None, _) => match snapshot.find(target) {
            // Over loopback, and at addresses of this host that nobody registered.
            Found::Unknown if local.is_on_host() && is_own_address(target.ip()) => {
                snapshot.on_this_host(target.port()).map_or(Found::Unknown, Found::Workload)
            }
            found => found,
        },
    };
    let destination: Arc<MeshWorkload> = match found {
        Found::Workload(destination) => destination.clone(),
        found @ (Found::UndeclaredPort | Found::Unknown) => {
            let denial = match service {
                Some(backends) if snapshot.revision > 0 => {
                    of_service(backends, wanted, target, &context.node)
                }
                Some(_) | None => unknown(&found, wanted, snapshot.revision),
            };
            return match authorize::pass_audited(&snapshot, &local.workload, denial) {
                Ok(pass) => Decision::Pass(Box::new(PassWay {
                    application,
                    to: wanted,
                    pass,
                    _chosen: chosen,
                })),
                Err(denial) => {
                    report.denied(&denial, None);
                    Decision::Refused
                }
            };
        }
    };
    report.destination(&destination.identity, Some(&destination));
    report.goes_to(target);
    let (source, port) = (&local.workload.identity, target.port());
    let permit = match authorize::check(&snapshot, source, &destination.identity, port) {
        Ok(permit) => permit,
        Err(denial) => {
            report.denied(&denial, None);
            return Decision::Refused;
        }
    };
    let neighbour = context
        .neighbours
        .as_ref()
        .filter(|_| snapshot.owns_address(source, from.ip()))
        .and_then(|neighbours| neighbours.find(&destination));
    drop(snapshot);
    if !local.has_certificate().await {
        let denial = not_ready("the workload has no certificate yet");
        let snapshot = snapshots.borrow().clone();
        return match authorize::pass_audited(&snapshot, &local.workload, denial) {
            Ok(pass) => {
                Decision::Pass(Box::new(PassWay { application, to: target, pass, _chosen: chosen }))
            }
            Err(denial) => {
                report.denied(&denial, None);
                Decision::Refused
            }
        };
    }
    let edge = Edge {
        destination: destination.identity.clone(),
        agent: SocketAddr::new(target.ip(), MESH_PORT),
    };
    if let Some(destination) = neighbour {
        let (source, wanted) = (local, target);
        let edge = LocalEdge { context, source, destination, id, from, wanted };
        let way = LocalWay { application, edge, permit, snapshots, _chosen: chosen };
        return Decision::Local(Box::new(way));
    }
    let open = Open {
        connection_id: id,
        // The agent takes part in no trace of its own yet.
        trace_id: [0; 16],
        original_destination: target,
        source_address: from,
    };
    let mover = Box::new(Mover {
        context: context.clone(),
        local: local.clone(),
        edge: edge.clone(),
        port: target.port(),
    });
    let forward = Forward::new(context, local.clone(), permit, snapshots).moving_with(mover);
    let application = Some(Application::waiting(application));
    Decision::Carry(Box::new(Way { application, open, edge, chosen, forward }))
}

impl LocalWay<'_> {
    async fn carry(self: Box<Self>, report: &mut Report<'_>) {
        let way = *self;
        way.edge.carry(way.application, way.permit, way.snapshots, report).await;
    }
}

impl PassWay {
    async fn carry(self: Box<Self>, context: &Context, local: &Local, report: &mut Report<'_>) {
        let way = *self;
        passthrough::outbound(context, local, way.application, way.to, way.pass, report).await;
    }
}

async fn carry(
    context: &Arc<Context>,
    local: &Arc<Local>,
    mut way: Box<Way<'_>>,
    report: &mut Report<'_>,
) {
    let (mut attempt, mut gone) = (0, 0);
    while attempt < ATTEMPTS {
        let obtained = obtain(context, local, &way.edge, way.port()).await;
        if obtained.as_ref().err().is_some_and(gave_way) {
            gone += 1;
            if gone < HANDSHAKES {
                Box::pin(pause(gone)).await;
                continue;
            }
        }
        attempt += 1;
        let obtained = match obtained {
            Ok(obtained) => obtained,
            Err(error) => return Box::pin(way.give_up(context, local, &error, report)).await,
        };
        let reused = obtained.reused;
        let carried = match way.open(context, obtained, report) {
            Ok(carried) => carried,
            Err(NotOpened::Gone) => continue,
            Err(NotOpened::Told) => return,
        };
        match way.forward.run(carried, report).await {
            Outcome::Over(Some(session)) => {
                local.pool.put(&way.edge, session, way.port());
                return;
            }
            Outcome::Unanswered => {
                // Its machine may be gone, and no session to it can be told from a good one.
                local.trunks.distrust(&way.edge);
                local.pool.forget(&way.edge);
                return;
            }
            Outcome::Over(None) => {
                if reused && !report.is_open() {
                    // The destination's machine may have gone without a word, and all sessions with it.
                    local.pool.forget(&way.edge);
                }
                return;
            }
            Outcome::NotTaken(again) => way.application = Some(again),
            Outcome::Refused(application, reason, refusal) => {
                way.application = Some(application);
                return Box::pin(way.refused(context, local, reason, &refusal, report)).await;
            }
        }
    }
    let text =
        format!("the destination's agent went away {ATTEMPTS} times before it took the stream");
    report.closed("unreachable", Some(text));
}

/// Before another handshake, after so many were let go.
async fn pause(gone: u32) {
    if let Some(doublings) = gone.checked_sub(2) {
        tokio::time::sleep(HANDSHAKES_PAUSE * 2u32.saturating_pow(doublings)).await;
    }
}

/// There is no stream.
enum NotOpened {
    /// The record says why.
    Told,
    /// The session ended just now.
    Gone,
}

impl Way<'_> {
    fn port(&self) -> u16 {
        self.open.original_destination.port()
    }

    /// There is no session. Goes around the mesh if that is allowed.
    async fn give_up(
        mut self: Box<Self>,
        context: &Context,
        local: &Local,
        error: &SessionError,
        report: &mut Report<'_>,
    ) {
        if let Some(chosen) = &self.chosen {
            chosen.failed();
        }
        let (reason, may_be_ahead) = match error {
            SessionError::Refused(failure) => (failure.reason, false),
            SessionError::Io(_) | SessionError::Closed => (Reason::NotReady, true),
            SessionError::TimedOut | SessionError::Protocol(_) => (Reason::NotReady, false),
        };
        let denial = without_policy(reason, format!("the destination's agent: {error}"));
        if !self.goes_around(context, local, denial, may_be_ahead, report).await {
            failed(error, &self.forward.permit, report);
        }
    }

    /// The destination's agent does not take it. Goes around the mesh if that agent does not know the destination, and that
    /// is allowed.
    async fn refused(
        mut self: Box<Self>,
        context: &Context,
        local: &Local,
        reason: Reason,
        refusal: &Refusal,
        report: &mut Report<'_>,
    ) {
        let is_unknown = matches!(
            reason,
            Reason::UnknownDestination | Reason::IdentityMismatch | Reason::NotReady
        );
        let denial = without_policy(reason, refusal.mend.clone());
        if !is_unknown || !self.goes_around(context, local, denial, true, report).await {
            report.denied_by_peer(reason, refusal);
        }
    }

    /// Carries the connection without the mesh to its end, if its workload is only audited, or has left the mesh, which
    /// the other agent may know before this one. Whether it did.
    async fn goes_around(
        &mut self,
        context: &Context,
        local: &Local,
        denial: Denial,
        may_be_ahead: bool,
        report: &mut Report<'_>,
    ) -> bool {
        let mut snapshots = context.subscribe();
        let snapshot = snapshots.borrow_and_update().clone();
        let is_permitted = self.forward.permit.renew(&snapshot).is_ok();
        let pass = match authorize::pass_audited(&snapshot, &local.workload, denial) {
            Ok(pass) => Some(pass).filter(|_| is_permitted),
            Err(_) if may_be_ahead && authorize::may_leave(&local.workload) => {
                authorize::left_soon(&mut snapshots, &context.node, &local.workload).await
            }
            Err(_) => None,
        };
        match (pass, self.application.take()) {
            (Some(pass), Some(Application::Waiting(application))) => {
                let to = self.open.original_destination;
                passthrough::outbound(context, local, application, to, pass, report).await;
                true
            }
            (_, application) => {
                self.application = application;
                false
            }
        }
    }

    /// Asks for a stream on the session.
    fn open(
        &mut self,
        context: &Context,
        obtained: Obtained,
        report: &mut Report<'_>,
    ) -> Result<Carried, NotOpened> {
        let permit = &self.forward.permit;
        let Obtained { mux, reused } = obtained;
        report.tls(mux.tls());
        if *mux.peer() != self.edge.destination {
            let detail = format!("{} answered for {}", mux.peer(), self.edge.destination);
            report.denied(&without_policy(Reason::IdentityMismatch, ""), Some(detail));
            return Err(NotOpened::Told);
        }
        let stream = mux.open(&self.open).map_err(|_| NotOpened::Gone)?;
        let kind = if reused { SessionKind::Reused } else { SessionKind::New };
        context.metrics.stream_opened(kind);
        let application = self.application.take().ok_or(NotOpened::Told)?;
        let counters = report.permitted(permit);
        Ok(Carried::Stream(mux::Relay::new(application, stream, counters)))
    }
}

/// A session for many streams at a time.
pub(crate) async fn multiplexed(
    context: &Context,
    local: &Local,
    edge: &Edge,
) -> Result<Box<Trunk>, SessionError> {
    match connect(context, local, edge, &local.identity.client_tls).await? {
        New::Multiplexed(trunk) => Ok(trunk),
        // It was not offered.
        New::Dedicated(_) => Err(SessionError::Closed),
    }
}

/// A session for one stream after another: one that is idle, or a new one.
pub(crate) async fn dedicated(
    context: &Context,
    local: &Local,
    edge: &Edge,
) -> Result<Box<Session>, SessionError> {
    if let Some(mut session) = local.pool.take(edge) {
        session.come_here();
        return Ok(session);
    }
    match connect(context, local, edge, &local.identity.dedicated_tls).await? {
        New::Dedicated(session) if *session.peer().id() == edge.destination => Ok(session),
        // It is another's, or was not offered.
        New::Dedicated(_) | New::Multiplexed(_) => Err(SessionError::Closed),
    }
}

/// Shakes hands with the destination's agent.
async fn connect(
    context: &Context,
    local: &Local,
    edge: &Edge,
    config: &Arc<ClientConfig>,
) -> Result<New, SessionError> {
    let stream = local.place.dial(edge.agent).await?;
    let name = ServerName::try_from(edge.destination.server_name())
        .map_err(|error| SessionError::Io(std::io::Error::other(error)))?;
    let config = match local.pool.token(edge) {
        Some(token) => with_caller_token(config, token),
        None => config.clone(),
    };
    let started = Instant::now();
    let handshake = session::connect(
        stream,
        config,
        name,
        local.identity.slot.load(),
        context.trust.load(),
        context.records_per_key,
    );
    let session = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .unwrap_or(Err(SessionError::TimedOut));
    context.metrics.observe_handshake(Side::Source, Handshake::from(&session), started.elapsed());
    if let Ok(session) = &session {
        local.pool.put_token(edge, session.facts().token());
    }
    session
}

/// Whether the destination's agent let the handshake go without a word, as it does when too many are under way
/// (ADR 15): the next one is the newest again. The application waits meanwhile.
fn gave_way(error: &SessionError) -> bool {
    match error {
        SessionError::Closed => true,
        SessionError::Io(error) => {
            matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof)
        }
        SessionError::Refused(_) | SessionError::TimedOut | SessionError::Protocol(_) => false,
    }
}

/// No session, or no stream on it.
fn failed(error: &SessionError, permit: &Permit, report: &mut Report<'_>) {
    match error {
        SessionError::Refused(failure) => {
            report.denied(&without_policy(failure.reason, ""), Some(failure.detail.clone()));
        }
        SessionError::Io(_)
        | SessionError::TimedOut
        | SessionError::Protocol(_)
        | SessionError::Closed => {
            let _counters = report.permitted(permit);
            report.closed("unreachable", Some(format!("the destination's agent: {error}")));
        }
    }
}

/// A service whose backend is not in the mesh, or which has none for this node.
fn of_service(backends: &Backends, wanted: SocketAddr, target: SocketAddr, node: &str) -> Denial {
    let mend = match (backends.first.is_empty(), backends.out_of_reach) {
        (true, 0) => {
            format!("the service at {wanted} has no endpoint that is ready; see to its pods")
        }
        (true, count) => format!(
            "the service at {wanted} has internalTrafficPolicy: Local, and no endpoint that is ready on \
             {node}, but {count} elsewhere; run a pod of it there, or set the policy to Cluster"
        ),
        (false, _) => format!(
            "the service at {wanted} leads to {target}, which is not in the mesh; label its namespace \
             hauberk.dev/mode: audit or enforce"
        ),
    };
    without_policy(Reason::UnknownDestination, mend)
}

fn unknown(found: &Found<'_>, wanted: SocketAddr, revision: u64) -> Denial {
    if revision == 0 {
        return not_ready("the agent has no policy yet");
    }
    let mend = match found {
        Found::UndeclaredPort => format!(
            "no workload of the machine at {} declares port {}; add it to spec.ports of the one that serves it",
            wanted.ip(),
            wanted.port()
        ),
        Found::Unknown | Found::Workload(_) => format!(
            "no workload has the address {}; put it into the mesh: a pod by its namespace's label hauberk.dev/mode, \
             anything else by a Workload or Machine manifest",
            wanted.ip()
        ),
    };
    without_policy(Reason::UnknownDestination, mend)
}
