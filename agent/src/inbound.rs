//! One incoming connection: over the mesh, where it is proven and decided, or in clear, where it is
//! refused.

mod handshake;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hauberk_core::{
    identity::SpiffeId,
    policy::{Denial, Reason},
    session::{Continue, Event, Open, Refusal, RefusalCause},
};
use hauberk_linux::{owner, socket::reset_on_close};
use hauberk_telemetry::{
    EdgeCounters, Side,
    metrics::Direction,
    record::{Path, TlsInfo},
};
use hauberk_tls::limiter::{Caller, Share};
use rustls::ServerConfig;
use tokio::{net::TcpStream, sync::oneshot};

use crate::{
    authorize::{self, Asked, without_policy},
    capture::{CapturedConnection, Locals},
    context::{Context, Local, canonical, connection_id, is_own_address},
    forward::{Carried, Forward, Outcome},
    mux::{self, Mux, tend_destination},
    passthrough,
    policy::{Found, Snapshot},
    relay::{Application, Relay},
    report::Report,
    session::{New, ProofRefused, Session, SessionError, Trunk},
};
use handshake::handshake;

/// A session on which no stream comes for this long is closed. Longer than the caller's agent keeps
/// one, so that this side's end only meets those that forgot theirs.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Idle sessions of all callers together, so that they leave files for everything else. Above it, the one is closed
/// that has been idle for longest of the identity with most, at the node with most.
pub(crate) const MAX_IDLE: usize = 8_192;

/// Those of one identity of one node. An honest agent keeps 256 for one of its workloads and one of ours, and one for each
/// of its cores.
pub(crate) const MAX_IDLE_OF_IDENTITY: usize = 1_024;

/// How often an idle session is held against what is current.
const IDLE_LOOK: Duration = Duration::from_secs(5);

/// Carries the streams of one session of another agent.
pub(crate) async fn serve_mesh(
    context: &Arc<Context>,
    locals: &Arc<Locals>,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
) {
    let shaken = Box::pin(handshake(context, locals, tls, stream, from)).await;
    let (session, caller) = match shaken {
        Ok((New::Dedicated(session), caller)) => (session, caller),
        Ok((New::Multiplexed(trunk), caller)) => {
            return Box::pin(serve_multiplexed(context, locals, trunk, &caller, from)).await;
        }
        Err(error) => {
            let (reason, detail) = match &error {
                SessionError::Refused(failure) => (failure.reason, failure.detail.clone()),
                SessionError::Io(_)
                | SessionError::TimedOut
                | SessionError::Protocol(_)
                | SessionError::Closed => (Reason::NoClientCert, error.to_string()),
            };
            let id = connection_id();
            let mut report = Report::new(context, Side::Destination, id, Some(from), None);
            report.denied(&without_policy(reason, ""), Some(detail));
            return;
        }
    };
    Box::pin(serve_dedicated(context, locals, session, &caller, from)).await;
}

/// Streams that come one after another.
async fn serve_dedicated(
    context: &Arc<Context>,
    locals: &Arc<Locals>,
    mut session: Box<Session>,
    caller: &Arc<Caller>,
    from: SocketAddr,
) {
    let mut last = None;
    loop {
        // In boxes of their own: an open stream has no room for the wait for it, nor the other way round.
        let next = next_stream(context, locals, &mut session, caller, last.as_ref());
        let next = Box::pin(next).await;
        let open = match next {
            Next::Stream(open) => open,
            Next::CarryOn(stream) => {
                // The stream has it, wherever that is.
                let lent = context.lanes.lent();
                let again = Box::pin(carry_on(context, session, &stream)).await;
                drop(lent);
                match again {
                    Some(again) => {
                        session = again;
                        session.come_here();
                        continue;
                    }
                    None => return,
                }
            }
            Next::Leave => {
                // The caller's agent may be gone.
                if session.go_away().is_ok() {
                    tokio::select! {
                        () = Box::pin(session.close()) => {}
                        () = stopped(context) => {}
                    }
                }
                return;
            }
            Next::Ended => {
                Box::pin(session.close()).await;
                return;
            }
            Next::Broken(refused) => {
                broken(context, (session.tls(), session.peer().id()), from, refused);
                return;
            }
        };
        let entrance = Entrance::Dedicated(session);
        let over = match Box::pin(admit(context, locals, entrance, caller, from, open)).await {
            Admitted::Stream(stream, carried) => {
                let (session, asked) = Box::pin(stream.carry(carried)).await;
                session.map(|session| (session, Some(asked)))
            }
            Admitted::Not(session) => session.map(|session| (session, None)),
        };
        let Some((again, asked)) = over else { return };
        (session, last) = (again, asked);
    }
}

/// Many streams at a time.
async fn serve_multiplexed(
    context: &Arc<Context>,
    locals: &Arc<Locals>,
    trunk: Box<Trunk>,
    caller: &Arc<Caller>,
    from: SocketAddr,
) {
    let (mux, driver) = Mux::of(trunk, &context.metrics);
    let own = mux.server_name().and_then(|name| locals.names.find(name));
    let last = Arc::new(Mutex::new(None::<Asked>));
    let still_wanted = |snapshot: &Snapshot| {
        let last = last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().is_none_or(|asked| asked.is_allowed(snapshot))
    };
    let opened = |open: Box<Open>, stream: mux::Stream| {
        let (context, locals, caller) = (context.clone(), locals.clone(), caller.clone());
        let last = last.clone();
        let counted = context.opened();
        // What their session says is theirs.
        let lanes = context.clone();
        lanes.lanes.here().carry(async move {
            let entrance = Entrance::Stream(stream);
            let admitted = Box::pin(admit(&context, &locals, entrance, &caller, from, open)).await;
            if let Admitted::Stream(stream, carried) = admitted {
                let (_, asked) = Box::pin(stream.carry(carried)).await;
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(asked);
            }
            drop(counted);
        });
    };
    let ended =
        tend_destination(context, driver, own, caller, IDLE_TIMEOUT, still_wanted, opened).await;
    if let Err(refused) = ended {
        broken(context, (mux.tls(), mux.peer()), from, refused);
    }
}

/// Carries on with a stream of a multiplexed session. The session, if another stream may come on it.
async fn carry_on(
    context: &Context,
    mut session: Box<Session>,
    stream: &Continue,
) -> Option<Box<Session>> {
    let found = context.multiplexes.find(&stream.session).filter(|mux| {
        mux.peer() == session.peer().id() && mux.server_name() == session.server_name()
    });
    if let Some(mux) = found {
        let (back, again) = oneshot::channel();
        match mux.carry_on(stream.stream, session, back).ok()? {
            None => return again.await.ok(),
            Some(unused) => session = unused,
        }
    }
    let refusal = unreachable("the stream is over".to_owned());
    match answer_no(Entrance::Dedicated(session), &refusal).await {
        Admitted::Not(session) => session,
        Admitted::Stream(..) => None,
    }
}

/// The caller's agent broke the protocol, outside of any stream.
fn broken(
    context: &Context,
    (tls, peer): (&Arc<TlsInfo>, &SpiffeId),
    from: SocketAddr,
    refused: ProofRefused,
) {
    let mut report = Report::new(context, Side::Destination, connection_id(), Some(from), None);
    report.tls(tls);
    report.source(peer, None);
    report.denied(&without_policy(refused.reason, ""), Some(refused.detail));
}

/// The agent stops: a moment for the goodbye to leave.
async fn stopped(context: &Context) {
    context.stopping.cancelled().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
}

enum Next {
    Stream(Box<Open>),
    /// It is to carry on with one of a multiplexed session.
    CarryOn(Continue),
    /// No further stream is wanted here.
    Leave,
    /// The caller's agent has closed the session.
    Ended,
    /// It broke the protocol, or could not prove itself anew.
    Broken(ProofRefused),
}

/// Waits for the next stream, as long as there may be one.
async fn next_stream(
    context: &Context,
    locals: &Locals,
    session: &mut Session,
    caller: &Arc<Caller>,
    last: Option<&Asked>,
) -> Next {
    let _counted = context.metrics.session_idle(Direction::Inbound);
    let mut slot = context.idle.enter(caller.clone());
    let mut snapshots = context.subscribe();
    let own = session.server_name().and_then(|name| locals.names.find(name));
    let idle = tokio::time::sleep(IDLE_TIMEOUT);
    tokio::pin!(idle);
    loop {
        // New roots or certificates, one that has ended, a workload that is gone: whoever still wants
        // to come proves itself anew.
        let (now, trust) = (hauberk_tls::now(), context.trust.load());
        let current = own.as_ref().and_then(|slot| slot.load());
        if !session.is_current(current.as_ref(), &trust, now)
            || session.machine.streams() == u32::MAX
        {
            return Next::Leave;
        }
        let look = session.peer().facts().not_after().since(now).min(IDLE_LOOK);
        let event = tokio::select! {
            biased;
            event = std::future::poll_fn(|cx| session.poll_event(cx)) => event,
            () = context.stopping.cancelled() => return Next::Leave,
            () = &mut idle => return Next::Leave,
            () = slot.displaced() => return Next::Leave,
            () = tokio::time::sleep(look) => continue,
            changed = snapshots.changed() => {
                let snapshot = snapshots.borrow_and_update().clone();
                let allowed = last.is_none_or(|asked| asked.is_allowed(&snapshot));
                if changed.is_err() || !allowed {
                    return Next::Leave;
                }
                continue;
            }
        };
        match event {
            Ok(Some(Event::Open(open))) => return Next::Stream(Box::new(open)),
            Ok(Some(Event::Continue(stream))) => return Next::CarryOn(stream),
            Ok(Some(Event::Reauthenticate(proof))) => {
                if let Err(refused) = session.take_proof(&proof, &trust, hauberk_tls::now()) {
                    return Next::Broken(refused);
                }
            }
            Ok(_) => {}
            Err(SessionError::Closed) => return Next::Ended,
            // An idle session that is reset takes nothing away from anybody.
            Err(SessionError::Io(_)) => return Next::Ended,
            Err(error) => {
                let (reason, detail) = (Reason::NotReady, error.to_string());
                return Next::Broken(ProofRefused { reason, detail });
            }
        }
    }
}

/// What became of the wish for a stream.
enum Admitted<'a> {
    Stream(Box<Stream<'a>>, Carried),
    /// Refused, or failed. The session, if another stream may come on it.
    Not(Option<Box<Session>>),
}

/// A stream that was taken.
pub(crate) struct Stream<'a> {
    report: Report<'a>,
    forward: Forward<'a>,
    _share: Share,
}

impl Stream<'_> {
    /// To its end. The session, if another stream may come on it, and what was asked.
    pub(crate) async fn carry(
        mut self: Box<Self>,
        carried: Carried,
    ) -> (Option<Box<Session>>, Asked) {
        // It stays in its box: moved out of it, it would be there twice for as long as it is open.
        let Self { report, forward, _share } = &mut *self;
        match forward.run(carried, report).await {
            Outcome::Over(session) => (session, forward.permit.asked()),
            // Only a destination answers, and takes no streams, and that is us.
            Outcome::NotTaken(_) | Outcome::Refused(..) | Outcome::Unanswered => {
                (None, forward.permit.asked())
            }
        }
    }
}

/// Where a stream comes in.
enum Entrance {
    Dedicated(Box<Session>),
    Stream(mux::Stream),
}

impl Entrance {
    fn peer(&self) -> &SpiffeId {
        match self {
            Self::Dedicated(session) => session.peer().id(),
            Self::Stream(stream) => stream.mux().peer(),
        }
    }

    fn tls(&self) -> &Arc<TlsInfo> {
        match self {
            Self::Dedicated(session) => session.tls(),
            Self::Stream(stream) => stream.mux().tls(),
        }
    }

    fn server_name(&self) -> Option<&str> {
        match self {
            Self::Dedicated(session) => session.server_name(),
            Self::Stream(stream) => stream.mux().server_name(),
        }
    }

    fn accept(&mut self) -> Result<(), SessionError> {
        match self {
            Self::Dedicated(session) => session.accept(),
            Self::Stream(stream) => stream.accept(),
        }
    }

    fn carry(self, application: Application, counters: EdgeCounters) -> Carried {
        match self {
            Self::Dedicated(session) => {
                Carried::Dedicated(Relay::new(application, session, counters))
            }
            Self::Stream(stream) => Carried::Stream(mux::Relay::new(application, stream, counters)),
        }
    }
}

/// Decides about the stream, and connects to the application.
async fn admit<'a>(
    context: &'a Arc<Context>,
    locals: &Locals,
    mut entrance: Entrance,
    caller: &Arc<Caller>,
    from: SocketAddr,
    open: Box<Open>,
) -> Admitted<'a> {
    let wanted = canonical(open.original_destination);
    let mut report =
        Report::new(context, Side::Destination, open.connection_id, Some(from), Some(wanted));
    report.tls(entrance.tls());
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let claimed = canonical(open.source_address);
    let client = caller_address(&snapshot, entrance.peer(), claimed, from);
    report.addresses(client, wanted);
    let workload = snapshot.by_identity(entrance.peer(), Some(client.ip()));
    report.source(entrance.peer(), workload);

    let local = match find_local(&snapshot, locals, &entrance, wanted, from) {
        Ok(local) => local,
        Err(denial) => return refuse(entrance, &denial, &mut report).await,
    };
    report.destination(&local.workload.identity, Some(&local.workload));
    let checked =
        authorize::check(&snapshot, entrance.peer(), &local.workload.identity, wanted.port());
    drop(snapshot);
    let permit = match checked {
        Ok(permit) => permit,
        Err(denial) => return refuse(entrance, &denial, &mut report).await,
    };
    let Some(share) = locals.streams.take(caller) else {
        let mend = format!("{caller} has too many connections open here; let it close some");
        let denial = without_policy(Reason::RateLimited, mend);
        return refuse(entrance, &denial, &mut report).await;
    };
    let counters = report.permitted(&permit);
    let dialled = local.place.dial_as(client, wanted).await;
    let application = match dialled {
        Ok(application) => application,
        Err(error) => {
            report.closed("unreachable", Some(format!("the application: {error}")));
            let refusal = unreachable(format!("nothing answers at {wanted}: {error}"));
            return answer_no(entrance, &refusal).await;
        }
    };
    if let Err(error) = entrance.accept() {
        report.closed("session_failed", Some(error.to_string()));
        drop(reset_on_close(&application));
        return Admitted::Not(None);
    }
    let carried = entrance.carry(Application::connected(application), counters);
    report.opened(Path::Mtls);
    let forward = Forward::new(context, local, permit, snapshots);
    Admitted::Stream(Box::new(Stream { report, forward, _share: share }), carried)
}

/// The caller's real address as its agent tells it, if the directory has that address for this
/// very identity; else where the session comes from. An agent can lie only within its own
/// workloads' addresses.
fn caller_address(
    snapshot: &Snapshot,
    peer: &SpiffeId,
    claimed: SocketAddr,
    from: SocketAddr,
) -> SocketAddr {
    if snapshot.owns_address(peer, claimed.ip()) { claimed } else { from }
}

/// The workload that lives at the wanted address, must be the one that the session was made with,
/// and must live behind this very listener.
fn find_local(
    snapshot: &Snapshot,
    locals: &Locals,
    entrance: &Entrance,
    wanted: SocketAddr,
    from: SocketAddr,
) -> Result<Arc<Local>, Denial> {
    if snapshot.revision == 0 {
        return Err(authorize::not_ready("the agent has no policy yet"));
    }
    let local = match snapshot.find(wanted) {
        Found::Workload(workload) => locals.get(&workload.key()).ok_or_else(|| {
            let text = format!("{} does not live here", workload.key());
            without_policy(Reason::UnknownDestination, text)
        })?,
        // Between two workloads of one host, addresses are good that mean something only there. Another host must
        // not reach what serves loopback alone.
        Found::UndeclaredPort | Found::Unknown => Some(wanted)
            .filter(|wanted| is_own_address(from.ip()) && is_own_address(wanted.ip()))
            .and_then(|wanted| locals.serving(wanted.port()))
            .filter(|local| local.is_on_host())
            .ok_or_else(|| {
                let text = format!("no workload here has the address {wanted}");
                without_policy(Reason::UnknownDestination, text)
            })?,
    };
    if entrance.server_name() != Some(local.workload.identity.server_name().as_str()) {
        return Err(without_policy(
            Reason::IdentityMismatch,
            format!("the session is not for {}, who lives at {wanted}", local.workload.identity),
        ));
    }
    Ok(local)
}

async fn refuse<'a>(entrance: Entrance, denial: &Denial, report: &mut Report<'_>) -> Admitted<'a> {
    report.denied(denial, None);
    let text = |value: Option<String>| value.unwrap_or_default();
    let refusal = Refusal {
        cause: RefusalCause::Denied(denial.reason),
        policy: text(denial.policy.as_ref().map(ToString::to_string)),
        rule: text(denial.nearest_miss.as_ref().map(|miss| miss.rule.to_string())),
        owner: text(denial.owner.as_ref().map(ToString::to_string)),
        nearest_miss: text(denial.nearest_miss.as_ref().map(ToString::to_string)),
        mend: denial.mend.clone(),
    };
    answer_no(entrance, &refusal).await
}

/// Allowed, but not to be had.
fn unreachable(mend: String) -> Refusal {
    Refusal {
        cause: RefusalCause::Unreachable,
        policy: String::new(),
        rule: String::new(),
        owner: String::new(),
        nearest_miss: String::new(),
        mend,
    }
}

/// Tells the caller's agent why not.
async fn answer_no<'a>(entrance: Entrance, refusal: &Refusal) -> Admitted<'a> {
    let mut session = match entrance {
        Entrance::Dedicated(session) => session,
        Entrance::Stream(stream) => {
            stream.refuse(refusal);
            return Admitted::Not(None);
        }
    };
    if session.refuse(refusal).is_err() || !session.settle().await {
        return Admitted::Not(None);
    }
    Admitted::Not(Some(session))
}

/// A connection that came in clear: refused, or let through and recorded if the workload is only
/// audited.
pub(crate) async fn serve_plaintext(
    context: &Context,
    locals: &Locals,
    captured: CapturedConnection,
) {
    let CapturedConnection { stream, from, wanted } = captured;
    context.metrics.connection_captured(Direction::Inbound);
    let mut report = Report::new(context, Side::Destination, connection_id(), Some(from), wanted);
    let (mut snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let local = wanted.and_then(|wanted| locals.serving(wanted.port()));
    if let Some(local) = &local {
        report.destination(&local.workload.identity, Some(&local.workload));
    }
    let denial = without_policy(
        Reason::Plaintext,
        "connect from a workload that is registered in the mesh, so that its agent carries the connection",
    );
    let probe = local.as_ref().zip(wanted).and_then(|(local, wanted)| {
        authorize::pass_probe(&snapshot, &local.workload, wanted.port(), || {
            owner::has_tcp_socket(from, wanted).unwrap_or_else(|error| {
                tracing::warn!(%error, "whose connection it is could not be asked");
                false
            })
        })
    });
    let from_mesh = snapshot.has_pod_at(from.ip());
    // Its rules may be about to know.
    let left = |local: &Local| authorize::pass_let_go(&snapshot, &context.node, &local.workload);
    let pass = match (probe.or_else(|| local.as_deref().and_then(left)), &local) {
        (Some(pass), _) => Ok(pass),
        (None, Some(local)) => authorize::pass_audited(&snapshot, &local.workload, denial),
        (None, None) => Err(denial),
    };
    drop(snapshot);
    let pass = match (pass, &local) {
        // Its caller's agent may know before this one that both have left the mesh.
        (Err(denial), Some(local)) if from_mesh && authorize::may_leave(&local.workload) => {
            let left = authorize::left_soon(&mut snapshots, &context.node, &local.workload);
            Box::pin(left).await.ok_or(denial)
        }
        (pass, _) => pass,
    };
    match (pass, local, wanted) {
        (Ok(pass), Some(local), Some(wanted)) => {
            let passing =
                passthrough::inbound(context, &local, stream, from, wanted, pass, &mut report);
            Box::pin(passing).await;
        }
        // Without a workload there is no pass.
        (Ok(_), ..) => drop(reset_on_close(&stream)),
        (Err(denial), ..) => {
            report.denied(&denial, None);
            drop(reset_on_close(&stream));
        }
    }
}
