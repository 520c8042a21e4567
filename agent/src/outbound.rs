//! One outgoing connection of a local workload: where it wants to go, whether it may, and who is there.

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Instant};

use hauberk_core::{
    policy::{Denial, Reason, resolve::MeshWorkload},
    session::Open,
};
use hauberk_linux::socket::{original_destination, reset_on_close, tune_local};
use hauberk_telemetry::{
    Side,
    metrics::{Direction, Outcome as Handshake, SessionKind},
};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;

use crate::{
    authorize::{self, Permit, not_ready, without_policy},
    context::{Context, Local, MESH_PORT, canonical, connection_id},
    forward::{Forward, Outcome},
    local_edge::LocalEdge,
    passthrough,
    policy::Found,
    pool::Edge,
    relay::{Application, Relay},
    report::Report,
    session::{self, HANDSHAKE_TIMEOUT, Session, SessionError},
};

/// Sessions that are tried for one connection: each one before the last had a destination that went
/// away before it saw the stream.
const ATTEMPTS: usize = 3;

/// Carries one captured connection to its end.
pub(crate) async fn serve(
    context: &Arc<Context>,
    local: &Arc<Local>,
    application: TcpStream,
    from: SocketAddr,
) {
    context.metrics.connection_captured(Direction::Outbound);
    let id = connection_id();
    let wanted = original_destination(&application).map(canonical).ok();
    let mut report = Report::new(context, Side::Source, id, Some(canonical(from)), wanted);
    report.source(&local.workload.identity, Some(&local.workload));
    let own = application.local_addr().map(canonical).ok();
    let refused = match wanted {
        Some(wanted) if own != Some(wanted) => {
            carry(context, local, application, canonical(from), wanted, id, &mut report).await
        }
        // Dialled directly, not captured: there is nowhere to go.
        None | Some(_) => {
            let mend = "this is the agent's own port; connect to the destination's address, and the \
                        connection is taken up on its way";
            report.denied(&without_policy(Reason::UnknownDestination, mend), None);
            Some(application)
        }
    };
    if let Some(application) = refused {
        // A reset, so that the application sees a refusal and not an empty answer.
        drop(reset_on_close(&application));
    }
}

/// Returns the application's connection if it is to be refused.
async fn carry(
    context: &Arc<Context>,
    local: &Arc<Local>,
    application: TcpStream,
    from: SocketAddr,
    wanted: SocketAddr,
    id: [u8; 16],
    report: &mut Report<'_>,
) -> Option<TcpStream> {
    let (snapshots, snapshot) = context.snapshots().await;
    report.revision(snapshot.revision);
    // Before workloads: nobody takes a service's place by claiming its address.
    let service = snapshot.service(wanted);
    let chosen = service.and_then(|backends| context.balancer.choose(backends));
    let target = chosen.as_ref().map_or(wanted, |chosen| chosen.backend);
    let destination: Arc<MeshWorkload> = match snapshot.find(target) {
        Found::Workload(destination) => destination.clone(),
        found @ (Found::UndeclaredPort | Found::Unknown) => {
            let denial = match service {
                Some(backends) if snapshot.revision > 0 => of_service(backends, wanted, target),
                Some(_) | None => unknown(&found, wanted, snapshot.revision),
            };
            return match authorize::pass_audited(&snapshot, &local.workload, denial) {
                Ok(pass) => {
                    drop(snapshot);
                    let passing =
                        passthrough::outbound(context, local, application, wanted, pass, report);
                    Box::pin(passing).await;
                    None
                }
                Err(denial) => {
                    report.denied(&denial, None);
                    Some(application)
                }
            };
        }
    };
    report.destination(&destination.identity, Some(&destination));
    report.asked(target.port());
    // Not held in a variable: it would have its place in every connection's future.
    let permit = match authorize::check(
        &snapshot,
        &local.workload.identity,
        &destination.identity,
        target.port(),
    ) {
        Ok(permit) => permit,
        Err(denial) => {
            report.denied(&denial, None);
            return Some(application);
        }
    };
    let neighbour = context
        .neighbours
        .as_ref()
        .filter(|_| snapshot.owns_address(&local.workload.identity, from.ip()))
        .and_then(|neighbours| neighbours.find(&destination));
    drop(snapshot);
    if !local.has_certificate().await {
        report.denied(&not_ready("the workload has no certificate yet"), None);
        return Some(application);
    }
    let open = Open {
        connection_id: id,
        // The agent takes part in no trace of its own yet.
        trace_id: [0; 16],
        original_destination: target,
        source_address: from,
    };
    // Best effort: the connection works without.
    drop(tune_local(&application));
    if let Some(neighbour) = neighbour {
        let edge =
            LocalEdge { context, source: local, destination: neighbour, id, from, wanted: target };
        return Box::pin(edge.carry(application, permit, snapshots, report)).await;
    }
    let edge = Edge {
        destination: destination.identity.clone(),
        agent: SocketAddr::new(target.ip(), MESH_PORT),
    };
    let (mut application, mut permit) = (Application::new(application), permit);
    for attempt in 1..=ATTEMPTS {
        // The last one does not depend on what the pool believes.
        let idle =
            if attempt < ATTEMPTS { idle(context, local, &edge, target.port()) } else { None };
        let reused = idle.is_some();
        let obtained = match idle {
            Some(session) => Ok(session),
            None => Box::pin(connect(context, local, &edge)).await,
        };
        let mut session = match obtained {
            Ok(session) => session,
            Err(error) => {
                if let Some(chosen) = &chosen {
                    chosen.failed();
                }
                failed(&error, &permit, report);
                return Some(application.stream);
            }
        };
        context.metrics.stream_opened(if reused { SessionKind::Reused } else { SessionKind::New });
        report.tls(session.tls());
        if *session.peer().id() != edge.destination {
            let detail = format!("{} answered for {}", session.peer().id(), edge.destination);
            report.denied(&without_policy(Reason::IdentityMismatch, ""), Some(detail));
            return Some(application.stream);
        }
        if let Err(error) = session.open(&open) {
            failed(&error, &permit, report);
            return Some(application.stream);
        }
        let relay = match Relay::new(application, session, report.permitted(&permit)) {
            Ok(relay) => relay,
            Err(error) => {
                failed(&error, &permit, report);
                return None;
            }
        };
        let forward = Forward { context, local, relay, snapshots: snapshots.clone() };
        match Box::pin(forward.run(permit, report)).await {
            Outcome::Over(Some(session)) => {
                local.pool.put(&edge, session, target.port());
                return None;
            }
            Outcome::Over(None) => {
                if reused && !report.is_open() {
                    // The destination's machine may have gone without a word, and all sessions with it.
                    local.pool.forget(&edge);
                }
                return None;
            }
            Outcome::NotTaken(again, still) => (application, permit) = (again, still),
        }
    }
    let text =
        format!("the destination's agent went away {ATTEMPTS} times before it took the stream");
    report.closed("unreachable", Some(text));
    Some(application.stream)
}

/// A session that is idle, if there is one. If it was the last, another one is made for the next
/// connection to this port.
fn idle(
    context: &Arc<Context>,
    local: &Arc<Local>,
    edge: &Edge,
    port: u16,
) -> Option<Box<Session>> {
    let taken = local.pool.take(edge);
    if taken.warm && !context.stopping.is_cancelled() {
        let (context, local, edge) = (context.clone(), local.clone(), edge.clone());
        tokio::spawn(async move {
            let made = async {
                let mut session = connect(&context, &local, &edge).await?;
                // The end of the handshake, which otherwise goes out with the first stream.
                session.flush().await?;
                Ok::<_, SessionError>(session)
            };
            let made = made.await.inspect_err(|error| {
                tracing::debug!(%error, agent = %edge.agent, "no spare session could be made");
            });
            local.pool.put_spare(&edge, made.ok(), port);
        });
    }
    taken.session
}

async fn connect(
    context: &Context,
    local: &Local,
    edge: &Edge,
) -> Result<Box<Session>, SessionError> {
    let stream = local.place.dial(edge.agent).await?;
    let name = ServerName::try_from(edge.destination.server_name())
        .map_err(|error| SessionError::Io(std::io::Error::other(error)))?;
    let started = Instant::now();
    let handshake = session::connect(
        stream,
        local.identity.client_tls.clone(),
        name,
        local.identity.slot.load(),
        context.trust.load(),
        context.records_per_key,
    );
    let session = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .unwrap_or(Err(SessionError::TimedOut));
    context.metrics.observe_handshake(Side::Source, Handshake::from(&session), started.elapsed());
    session
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

/// A service none of whose backends is in the mesh, or which has none.
fn of_service(backends: &BTreeSet<SocketAddr>, wanted: SocketAddr, target: SocketAddr) -> Denial {
    let mend = if backends.is_empty() {
        format!("the service at {wanted} has no endpoint that is ready; see to its pods")
    } else {
        format!(
            "the service at {wanted} leads to {target}, which is not in the mesh; label its namespace \
             hauberk.dev/mode: audit or enforce"
        )
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
            "no workload has the address {}; register the destination with a Workload or Machine manifest",
            wanted.ip()
        ),
    };
    without_policy(Reason::UnknownDestination, mend)
}
