//! One incoming connection: over the mesh, where it is proven and decided, or in clear, where it is
//! refused.

mod handshake;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use hauberk_core::{
    policy::{Denial, Reason},
    session::{Event, Open, Refusal, RefusalCause},
};
use hauberk_linux::{owner, socket::reset_on_close};
use hauberk_telemetry::{Side, metrics::Direction, record::Path};
use hauberk_tls::limiter::{Caller, Share};
use rustls::ServerConfig;
use tokio::net::TcpStream;

use crate::{
    authorize::{self, Asked, without_policy},
    capture::{CapturedConnection, Locals},
    context::{Context, Local, canonical, connection_id, is_own_address},
    forward::{Forward, Outcome},
    passthrough,
    policy::{Found, Snapshot},
    relay::{Application, Relay},
    report::Report,
    session::{ProofRefused, Session, SessionError},
};
use handshake::handshake;

/// A session on which no stream comes for this long is closed. Longer than the caller's agent keeps
/// one, so that this side's end only meets those that forgot theirs.
pub(crate) const IDLE_TIMEOUT: Duration = Duration::from_secs(90);

/// Idle sessions of all callers together, so that they leave files for everything else. Above it, the one is closed
/// that has been idle for longest of the identity with most, at the node with most.
pub(crate) const MAX_IDLE: usize = 8_192;

/// Those of one identity of one node. An honest agent keeps 256 for one of its workloads and one of ours.
pub(crate) const MAX_IDLE_OF_IDENTITY: usize = 1_024;

/// How often an idle session is held against what is current.
const IDLE_LOOK: Duration = Duration::from_secs(5);

/// Carries the streams of one session of another agent.
pub(crate) async fn serve_mesh(
    context: &Arc<Context>,
    locals: &Locals,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
) {
    let shaken = Box::pin(handshake(context, locals, tls, stream, from)).await;
    let (mut session, caller) = match shaken {
        Ok(shaken) => shaken,
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
    let mut last = None;
    loop {
        // In boxes of their own: an open stream has no room for the wait for it, nor the other way round.
        let next = next_stream(context, locals, &mut session, &caller, last.as_ref());
        let next = Box::pin(next).await;
        let open = match next {
            Next::Stream(open) => open,
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
                broken(context, &session, from, refused);
                return;
            }
        };
        let over = match Box::pin(admit(context, locals, session, &caller, from, open)).await {
            Admitted::Stream(stream) => Box::pin(stream.carry()).await,
            Admitted::Not(session) => session.map(|session| (session, None)),
        };
        let Some((again, asked)) = over else { return };
        (session, last) = (again, asked);
    }
}

/// The caller's agent broke the protocol between streams.
fn broken(context: &Context, session: &Session, from: SocketAddr, refused: ProofRefused) {
    let mut report = Report::new(context, Side::Destination, connection_id(), Some(from), None);
    report.tls(session.tls());
    report.source(session.peer().id(), None);
    report.denied(&without_policy(refused.reason, ""), Some(refused.detail));
}

/// The agent stops: a moment for the goodbye to leave.
async fn stopped(context: &Context) {
    context.stopping.cancelled().await;
    tokio::time::sleep(Duration::from_millis(50)).await;
}

enum Next {
    Stream(Box<Open>),
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
    Stream(Box<Stream<'a>>),
    /// Refused, or failed. The session, if another stream may come on it.
    Not(Option<Box<Session>>),
}

/// A stream that was taken.
pub(crate) struct Stream<'a> {
    report: Report<'a>,
    relay: Box<Relay>,
    forward: Forward<'a>,
    _share: Share,
}

impl Stream<'_> {
    /// To its end. The session and what was asked on it, if another stream may come on it.
    pub(crate) async fn carry(self: Box<Self>) -> Option<(Box<Session>, Option<Asked>)> {
        let Self { mut report, relay, mut forward, _share } = *self;
        match forward.run(relay, &mut report).await {
            Outcome::Over(session) => Some((session?, Some(forward.permit.asked()))),
            // Only a destination takes no streams, and that is us.
            Outcome::NotTaken(_) => None,
        }
    }
}

/// Decides about the stream, and connects to the application.
async fn admit<'a>(
    context: &'a Arc<Context>,
    locals: &Locals,
    mut session: Box<Session>,
    caller: &Arc<Caller>,
    from: SocketAddr,
    open: Box<Open>,
) -> Admitted<'a> {
    let wanted = canonical(open.original_destination);
    let mut report =
        Report::new(context, Side::Destination, open.connection_id, Some(from), Some(wanted));
    report.tls(session.tls());
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let claimed = canonical(open.source_address);
    let client = caller_address(&snapshot, &session, claimed, from);
    report.addresses(client, wanted);
    let workload = snapshot.by_identity(session.peer().id(), Some(client.ip()));
    report.source(session.peer().id(), workload);

    let local = match find_local(&snapshot, locals, &session, wanted, from) {
        Ok(local) => local,
        Err(denial) => return refuse(session, &denial, &mut report).await,
    };
    report.destination(&local.workload.identity, Some(&local.workload));
    let checked =
        authorize::check(&snapshot, session.peer().id(), &local.workload.identity, wanted.port());
    drop(snapshot);
    let permit = match checked {
        Ok(permit) => permit,
        Err(denial) => return refuse(session, &denial, &mut report).await,
    };
    let Some(share) = locals.streams.take(caller) else {
        let mend = format!("{caller} has too many connections open here; let it close some");
        let denial = without_policy(Reason::RateLimited, mend);
        return refuse(session, &denial, &mut report).await;
    };
    let counters = report.permitted(&permit);
    let dialled = local.place.dial_as(client, wanted).await;
    let application = match dialled {
        Ok(application) => application,
        Err(error) => {
            report.closed("unreachable", Some(format!("the application: {error}")));
            let refusal = Refusal {
                cause: RefusalCause::Unreachable,
                policy: String::new(),
                rule: String::new(),
                owner: String::new(),
                nearest_miss: String::new(),
                mend: format!("nothing answers at {wanted}: {error}"),
            };
            return answer_no(session, &refusal).await;
        }
    };
    if let Err(error) = session.accept() {
        report.closed("session_failed", Some(error.to_string()));
        drop(reset_on_close(&application));
        return Admitted::Not(None);
    }
    let relay = Relay::new(Application::connected(application), session, counters);
    report.opened(Path::Mtls);
    let forward = Forward::new(context, local, permit, snapshots);
    Admitted::Stream(Box::new(Stream { report, relay, forward, _share: share }))
}

/// The caller's real address as its agent tells it, if the directory has that address for this
/// very identity; else where the session comes from. An agent can lie only within its own
/// workloads' addresses.
fn caller_address(
    snapshot: &Snapshot,
    session: &Session,
    claimed: SocketAddr,
    from: SocketAddr,
) -> SocketAddr {
    if snapshot.owns_address(session.peer().id(), claimed.ip()) { claimed } else { from }
}

/// The workload that lives at the wanted address, must be the one that the session was made with,
/// and must live behind this very listener.
fn find_local(
    snapshot: &Snapshot,
    locals: &Locals,
    session: &Session,
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
    if session.server_name() != Some(local.workload.identity.server_name().as_str()) {
        return Err(without_policy(
            Reason::IdentityMismatch,
            format!("the session is not for {}, who lives at {wanted}", local.workload.identity),
        ));
    }
    Ok(local)
}

async fn refuse<'a>(
    session: Box<Session>,
    denial: &Denial,
    report: &mut Report<'_>,
) -> Admitted<'a> {
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
    answer_no(session, &refusal).await
}

/// Tells the caller's agent why not.
async fn answer_no<'a>(mut session: Box<Session>, refusal: &Refusal) -> Admitted<'a> {
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
    let (_snapshots, snapshot) = context.snapshots().await;
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
    let pass = match (probe, &local) {
        (Some(probe), _) => Ok(probe),
        (None, Some(local)) => authorize::pass_audited(&snapshot, &local.workload, denial),
        (None, None) => Err(denial),
    };
    drop(snapshot);
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
