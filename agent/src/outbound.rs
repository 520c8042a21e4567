//! One outgoing connection of a local workload: where it wants to go, whether it may, and who is there.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use hauberk_core::{
    policy::{Denial, Mode, Reason, resolve::MeshWorkload},
    session::{Open, RefusalCause},
};
use hauberk_linux::socket::{original_destination, reset_on_close, tune_accepted};
use hauberk_telemetry::{
    Side,
    metrics::{Direction, Outcome},
};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use crate::{
    authorize::{self, not_ready, without_policy},
    context::{Context, Local, MESH_PORT, canonical, connection_id},
    forward::Forward,
    passthrough,
    policy::Found,
    report::Report,
    session::{HANDSHAKE_TIMEOUT, Session, SessionError},
};

/// Carries one captured connection to its end.
pub(crate) async fn serve(
    context: &Context,
    local: &Local,
    application: TcpStream,
    from: SocketAddr,
) {
    context.metrics.connection_captured(Direction::Outbound);
    let id = connection_id();
    let wanted = original_destination(&application).map(canonical).ok();
    let mut report = Report::new(context, Side::Source, id, Some(canonical(from)), wanted);
    report.source(&local.workload.identity, Some(&local.workload));
    let refused = match wanted {
        // Dialled directly, not captured: there is nowhere to go.
        None => Some(application),
        Some(wanted) if application.local_addr().is_ok_and(|own| canonical(own) == wanted) => {
            Some(application)
        }
        Some(wanted) => {
            carry(context, local, application, canonical(from), wanted, id, &mut report).await
        }
    };
    if let Some(application) = refused {
        // A reset, so that the application sees a refusal and not an empty answer.
        drop(reset_on_close(&application));
    }
}

/// Returns the application's connection if it is to be refused.
async fn carry(
    context: &Context,
    local: &Local,
    application: TcpStream,
    from: SocketAddr,
    wanted: SocketAddr,
    id: [u8; 16],
    report: &mut Report<'_>,
) -> Option<TcpStream> {
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    let destination: Arc<MeshWorkload> = match snapshot.find(wanted) {
        Found::Workload(destination) => destination.clone(),
        found @ (Found::UndeclaredPort | Found::Unknown) => {
            let denial = unknown(&found, wanted, snapshot.revision);
            return match local.workload.mode {
                Mode::Audit if snapshot.revision > 0 => {
                    let counters = report.audited(&denial);
                    passthrough::outbound(context, local, application, wanted, counters, report)
                        .await;
                    None
                }
                Mode::Audit | Mode::Enforce => {
                    report.denied(&denial, None);
                    Some(application)
                }
            };
        }
    };
    report.destination(&destination.identity, Some(&destination));
    let permit = match authorize::check(
        &snapshot,
        &local.workload.identity,
        &destination.identity,
        wanted.port(),
    ) {
        Ok(permit) => permit,
        Err(denial) => {
            report.denied(&denial, None);
            return Some(application);
        }
    };
    if !local.has_certificate().await {
        report.denied(&not_ready("the workload has no certificate yet"), None);
        return Some(application);
    }
    let mut session = match connect(context, local, &destination, wanted, report).await {
        Ok(session) => session,
        Err(error) => {
            failed(&error, &permit, report);
            return Some(application);
        }
    };
    if *session.peer.id() != destination.identity {
        let detail = format!("{} answered for {}", session.peer.id(), destination.identity);
        report.denied(&without_policy(Reason::IdentityMismatch, ""), Some(detail));
        return Some(application);
    }
    let open = Open { connection_id: id, original_destination: wanted, source_address: from };
    if let Err(error) = session.open(&open).await {
        failed(&error, &permit, report);
        return Some(application);
    }
    let counters = report.permitted(&permit);
    report.opened();
    // Best effort: the connection works without them.
    drop(tune_accepted(&application));
    let forward = Forward { context, local, application, session, snapshots, counters };
    forward.run(permit, report).await;
    None
}

async fn connect(
    context: &Context,
    local: &Local,
    destination: &MeshWorkload,
    wanted: SocketAddr,
    report: &mut Report<'_>,
) -> Result<Session, SessionError> {
    let stream = local.place.dial(SocketAddr::new(wanted.ip(), MESH_PORT)).await?;
    let name = ServerName::try_from(destination.identity.server_name())
        .map_err(|error| SessionError::Io(std::io::Error::other(error)))?;
    let own = local.identity.slot.load();
    let started = Instant::now();
    let connector = TlsConnector::from(local.identity.client_tls.clone());
    let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, connector.connect(name, stream)).await;
    let session = match handshake {
        Err(_) => Err(SessionError::TimedOut),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(stream)) => {
            Session::new(TlsStream::Client(stream), own.as_deref(), &context.trust.load(), true)
        }
    };
    context.metrics.observe_handshake(Side::Source, Outcome::from(&session), started.elapsed());
    if let Ok(session) = &session {
        report.tls(session.tls.clone());
    }
    session
}

/// No session, or no stream on it.
fn failed(error: &SessionError, permit: &authorize::Permit, report: &mut Report<'_>) {
    match error {
        SessionError::Denied(refusal) => match refusal.cause {
            RefusalCause::Denied(reason) => report.denied_by_peer(reason, refusal),
            RefusalCause::Unreachable => {
                let _counters = report.permitted(permit);
                report.closed("unreachable", Some(refusal.mend.clone()));
            }
        },
        SessionError::Refused(failure) => {
            report.denied(&without_policy(failure.reason, ""), Some(failure.detail.clone()));
        }
        SessionError::Io(_) | SessionError::TimedOut | SessionError::Protocol(_) => {
            let _counters = report.permitted(permit);
            report.closed("unreachable", Some(format!("the destination's agent: {error}")));
        }
    }
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
            "no workload has the address {}; register the destination with a Workload or Machine manifest",
            wanted.ip()
        ),
    };
    without_policy(Reason::UnknownDestination, mend)
}
