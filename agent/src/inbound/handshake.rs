//! From a connection of another agent to a session, if there is room for it.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hauberk_core::policy::Reason;
use hauberk_telemetry::{Side, metrics::Outcome};
use hauberk_tls::{
    HandshakeFailure,
    limiter::{Caller, RateLimited},
};
use rustls::ServerConfig;
use tokio::net::TcpStream;

use crate::{
    capture::Locals,
    context::Context,
    session::{self, HANDSHAKE_TIMEOUT, New, SessionError},
};

/// Shakes hands, and says in whose room the session is from now on.
pub(super) async fn handshake(
    context: &Context,
    locals: &Locals,
    tls: Arc<ServerConfig>,
    stream: TcpStream,
    from: SocketAddr,
) -> Result<(New, Arc<Caller>), SessionError> {
    let (started, mut waited) = (Instant::now(), Duration::ZERO);
    let shaking = shake(context, locals, tls, stream, from, &mut waited);
    let session = match tokio::time::timeout(HANDSHAKE_TIMEOUT, shaking).await {
        Ok(Ok(session)) => session,
        // It did not come to anything, and says nothing about how long one takes.
        Ok(Err(displaced)) => return Err(displaced.into()),
        // Most of the time it waited for us, and not we for it.
        Err(_) if waited > HANDSHAKE_TIMEOUT / 2 => Err(SessionError::Refused(HandshakeFailure {
            reason: Reason::RateLimited,
            by_peer: false,
            detail: format!("waited {waited:.1?} for its turn among too many handshakes"),
        })),
        Err(_) => Err(SessionError::TimedOut),
    };
    context.metrics.observe_handshake_wait(waited);
    context.metrics.observe_handshake(
        Side::Destination,
        Outcome::from(&session),
        started.elapsed().saturating_sub(waited),
    );
    let session = session?;
    let caller = caller_of(context, &session, from);
    context.handshakes.remember(session.facts().token(), &caller, hauberk_tls::now());
    Ok((session, caller))
}

/// Shakes hands, unless the connection has to give way to others before that is over.
async fn shake(
    context: &Context,
    locals: &Locals,
    tls: Arc<ServerConfig>,
    mut stream: TcpStream,
    from: SocketAddr,
    waited: &mut Duration,
) -> Result<Result<New, SessionError>, RateLimited> {
    let mut admission = context.handshakes.enter(from.ip());
    let greeting = match admission.unless_displaced(session::greeting(&mut stream)).await? {
        Ok(greeting) => greeting,
        Err(error) => return Ok(Err(error)),
    };
    admission.heard(greeting.token.as_ref(), hauberk_tls::now());
    let turns = admission.turns(waited);
    let accepting = async {
        let name = greeting.server_name.as_deref();
        locals.wait_for_certificate(name).await;
        let own = name.and_then(|name| locals.names.find(name)?.load());
        let trust = context.trust.load();
        let records_per_key = context.records_per_key;
        session::accept(stream, greeting, tls, own, trust, records_per_key, turns).await
    };
    admission.unless_displaced(accepting).await
}

/// Whose room a session takes.
fn caller_of(context: &Context, session: &New, from: SocketAddr) -> Arc<Caller> {
    let (snapshot, id) = (context.snapshot(), session.facts().peer().id());
    // A certificate that is used elsewhere than at home takes none of the room of its node.
    let node = snapshot.node_of(id, from.ip()).cloned();
    Arc::new(Caller::proven(id.clone(), node, from.ip()))
}
