//! One incoming connection: over the mesh, where it is proven and decided, or in clear, where it is
//! refused.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use hauberk_core::{
    policy::{Denial, Mode, Reason},
    session::{Refusal, RefusalCause},
};
use hauberk_linux::socket::{original_destination, reset_on_close, tune_accepted};
use hauberk_telemetry::{
    Side,
    metrics::{Direction, Outcome},
};
use hauberk_tls::HandshakeFailure;
use rustls::{ServerConfig, server::Acceptor};
use tokio::net::TcpStream;
use tokio_rustls::{LazyConfigAcceptor, TlsStream};

use crate::{
    authorize::{self, without_policy},
    capture::Locals,
    context::{Context, Local, canonical, connection_id},
    forward::Forward,
    passthrough,
    policy::{Found, Snapshot},
    report::Report,
    session::{HANDSHAKE_TIMEOUT, Session, SessionError},
};

/// Carries one connection of another agent to its end.
pub(crate) async fn serve_mesh(
    context: &Context,
    locals: &Locals,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
) {
    let mut report =
        Report::new(context, Side::Destination, connection_id(), Some(canonical(from)), None);
    // Best effort: the connection works without them.
    drop(tune_accepted(&stream));
    let mut session = match handshake(context, locals, tls, stream, canonical(from)).await {
        Ok(session) => session,
        Err(error) => {
            let (reason, detail) = match &error {
                SessionError::Refused(failure) => (failure.reason, failure.detail.clone()),
                SessionError::Io(_)
                | SessionError::TimedOut
                | SessionError::Protocol(_)
                | SessionError::Denied(_) => (Reason::NoClientCert, error.to_string()),
            };
            report.denied(&without_policy(reason, ""), Some(detail));
            return;
        }
    };
    report.tls(session.tls.clone());
    report.source(session.peer.id(), None);
    let open = match session.opened().await {
        Ok(open) => open,
        Err(error) => {
            report.denied(&without_policy(Reason::NotReady, ""), Some(error.to_string()));
            return;
        }
    };
    let wanted = canonical(open.original_destination);
    report.connection_id(open.connection_id);
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let claimed = canonical(open.source_address);
    let client = caller_address(&snapshot, &session, claimed, canonical(from));
    report.addresses(client, wanted);
    let caller = snapshot.by_identity(session.peer.id(), Some(client.ip()));
    report.source(session.peer.id(), caller.map(AsRef::as_ref));

    let local = match find_local(&snapshot, locals, &session, wanted) {
        Ok(local) => local,
        Err(denial) => {
            refuse(&mut session, &denial, &mut report).await;
            return;
        }
    };
    report.destination(&local.workload.identity, Some(&local.workload));
    let checked =
        authorize::check(&snapshot, session.peer.id(), &local.workload.identity, wanted.port());
    let permit = match checked {
        Ok(permit) => permit,
        Err(denial) => {
            refuse(&mut session, &denial, &mut report).await;
            return;
        }
    };
    let counters = report.permitted(&permit);
    let application = match local.place.dial_as(client, wanted).await {
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
            // The caller may be gone.
            drop(session.refuse(&refusal).await);
            return;
        }
    };
    if let Err(error) = session.accept().await {
        report.closed("session_failed", Some(error.to_string()));
        drop(reset_on_close(&application));
        return;
    }
    report.opened();
    let forward = Forward { context, local: &local, application, session, snapshots, counters };
    forward.run(permit, &mut report).await;
}

async fn handshake(
    context: &Context,
    locals: &Locals,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
) -> Result<Session, SessionError> {
    // Held through the handshake only.
    let Ok(_turn) = context.handshakes.turn(from.ip()).await else {
        return Err(SessionError::Refused(HandshakeFailure {
            reason: Reason::RateLimited,
            by_peer: false,
            detail: format!("too many handshakes of {} wait already", from.ip()),
        }));
    };
    let started = Instant::now();
    let accepting = async {
        let hello = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        locals.wait_for_certificate(hello.client_hello().server_name()).await;
        hello.into_stream(tls).await
    };
    let session = match tokio::time::timeout(HANDSHAKE_TIMEOUT, accepting).await {
        Err(_) => Err(SessionError::TimedOut),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(stream)) => {
            Session::new(TlsStream::Server(stream), None, &context.trust.load(), false)
        }
    };
    context.metrics.observe_handshake(
        Side::Destination,
        Outcome::from(&session),
        started.elapsed(),
    );
    session
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
    if snapshot.owns_address(session.peer.id(), claimed.ip()) { claimed } else { from }
}

/// The workload that lives at the wanted address, must be the one that the session was made with,
/// and must live behind this very listener.
fn find_local(
    snapshot: &Snapshot,
    locals: &Locals,
    session: &Session,
    wanted: SocketAddr,
) -> Result<Arc<Local>, Denial> {
    if snapshot.revision == 0 {
        return Err(authorize::not_ready("the agent has no policy yet"));
    }
    let Found::Workload(workload) = snapshot.find(wanted) else {
        return Err(without_policy(
            Reason::UnknownDestination,
            format!("no workload here has the address {wanted}"),
        ));
    };
    let local = locals.get(&workload.key()).ok_or_else(|| {
        without_policy(Reason::UnknownDestination, format!("{} does not live here", workload.key()))
    })?;
    let TlsStream::Server(stream) = &session.stream else {
        return Err(authorize::not_ready("the session is not an incoming one"));
    };
    let asked = stream.get_ref().1.server_name();
    if asked != Some(local.workload.identity.server_name().as_str()) {
        return Err(without_policy(
            Reason::IdentityMismatch,
            format!("the session is not for {}, who lives at {wanted}", local.workload.identity),
        ));
    }
    Ok(local)
}

async fn refuse(session: &mut Session, denial: &Denial, report: &mut Report<'_>) {
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
    // The caller may be gone.
    drop(session.refuse(&refusal).await);
}

/// A connection that came in clear: refused, or let through and recorded if the workload is only
/// audited.
pub(crate) async fn serve_plaintext(
    context: &Context,
    locals: &Locals,
    stream: TcpStream,
    from: SocketAddr,
) {
    context.metrics.connection_captured(Direction::Inbound);
    let from = canonical(from);
    let wanted = original_destination(&stream).map(canonical).ok();
    let mut report = Report::new(context, Side::Destination, connection_id(), Some(from), wanted);
    let (_snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let local = wanted.and_then(|wanted| match snapshot.find(wanted) {
        Found::Workload(workload) => locals.get(&workload.key()),
        Found::UndeclaredPort | Found::Unknown => None,
    });
    if let Some(local) = &local {
        report.destination(&local.workload.identity, Some(&local.workload));
    }
    let denial = without_policy(
        Reason::Plaintext,
        "connect from a workload that is registered in the mesh, so that its agent carries the connection",
    );
    match (local, wanted) {
        (Some(local), Some(wanted)) if local.workload.mode == Mode::Audit => {
            let counters = report.audited(&denial);
            passthrough::inbound(context, &local, stream, from, wanted, counters, &mut report)
                .await;
        }
        (Some(_) | None, _) => {
            report.denied(&denial, None);
            drop(reset_on_close(&stream));
        }
    }
}
