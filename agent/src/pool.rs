//! Idle sessions of one local workload, to be used again: a stream on one of them costs no handshake.
//!
//! Every workload has a pool of its own, so that no stream can come upon a session of another
//! identity. What comes out of it is checked again: the same own certificate and roots as when it was
//! made, a peer whose certificate has not ended, nothing said by the peer meanwhile. The lock is held
//! for a look-up, never across a handshake.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hauberk_core::identity::SpiffeId;
use hauberk_telemetry::metrics::{AgentMetrics, Direction, IdleSession};
use hauberk_tls::{CredentialSlot, TrustSlot, channel::CallerToken};

use crate::session::Session;

/// Idle sessions of one edge: what a burst of short connections leaves behind.
const MAX_OF_EDGE: usize = 256;

/// Idle sessions of all workloads of this node.
const MAX_OF_NODE: usize = 4_096;

/// A session that nobody used for this long is closed. Below the destination's patience
/// ([`crate::inbound::IDLE_TIMEOUT`]), so that the side closes that knows whether it needs it.
const MAX_IDLE: Duration = Duration::from_secs(60);

/// How long after a failure no spare session is made.
const WARM_PAUSE: Duration = Duration::from_secs(10);

/// A session is not used for new streams after this long, so that load spreads anew.
const MAX_AGE: Duration = Duration::from_secs(600);

/// How long after a session was made its token is told to the destination, which keeps it for as long.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3_600);

/// Tokens of one workload: as many as it has edges in use.
const MAX_TOKENS: usize = 1_024;

/// To whom a session leads.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Edge {
    pub(crate) destination: SpiffeId,
    /// The destination's agent.
    pub(crate) agent: SocketAddr,
}

/// The idle sessions of one workload.
pub(crate) struct Pool {
    own: Arc<CredentialSlot>,
    trust: Arc<TrustSlot>,
    metrics: AgentMetrics,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    edges: HashMap<Edge, OfEdge>,
    /// Those of the newest sessions, and when these were made.
    tokens: HashMap<Edge, (CallerToken, Instant)>,
    /// The workload has changed or is gone: nothing is kept any more.
    retired: bool,
}

#[derive(Default)]
struct OfEdge {
    /// The longest idle first.
    idle: Vec<Idle>,
    /// A spare one is being made.
    warming: bool,
    /// The last spare one could not be made: not again before this.
    warm_after: Option<Instant>,
}

struct Idle {
    session: Box<Session>,
    /// The port of its last stream.
    port: u16,
    since: Instant,
    _counted: IdleSession,
}

/// What the pool has for an edge.
pub(crate) struct Taken {
    /// A session to use.
    pub(crate) session: Option<Box<Session>>,
    /// The edge is in use and has no spare session left: one should be made, and the outcome told with
    /// [`Pool::put_spare`].
    pub(crate) warm: bool,
}

impl Pool {
    pub(crate) fn new(
        own: Arc<CredentialSlot>,
        trust: Arc<TrustSlot>,
        metrics: AgentMetrics,
    ) -> Self {
        Self { own, trust, metrics, state: Mutex::default() }
    }

    /// The session that was used last: the others may grow old.
    pub(crate) fn take(&self, edge: &Edge) -> Taken {
        let (own, trust, now) = (self.own.load(), self.trust.load(), hauberk_tls::now());
        let mut old = Vec::new();
        let mut state = self.lock();
        let Some(of_edge) = state.edges.get_mut(edge) else {
            // Warmed from its second use on: many edges are used once.
            state.edges.insert(edge.clone(), OfEdge::default());
            return Taken { session: None, warm: false };
        };
        let session = loop {
            match of_edge.idle.pop() {
                None => break None,
                Some(idle)
                    if idle.session.is_current(own.as_ref(), &trust, now)
                        && idle.session.made().elapsed() < MAX_AGE
                        && idle.session.is_quiet() =>
                {
                    break Some(idle.session);
                }
                Some(idle) => old.push(idle.session),
            }
        };
        let warm = session.is_some()
            && of_edge.idle.is_empty()
            && !of_edge.warming
            && of_edge.warm_after.is_none_or(|after| Instant::now() >= after);
        of_edge.warming |= warm;
        drop(state);
        old.into_iter().for_each(Session::close_idle);
        Taken { session, warm }
    }

    /// What makes the destination's agent know who calls before the handshake is over, if there was a session before.
    pub(crate) fn token(&self, edge: &Edge) -> Option<CallerToken> {
        let state = self.lock();
        let (token, made) = state.tokens.get(edge)?;
        (made.elapsed() < TOKEN_LIFETIME).then_some(*token)
    }

    /// Keeps the token of a new session for the next one.
    pub(crate) fn put_token(&self, edge: &Edge, token: CallerToken) {
        let mut state = self.lock();
        if state.tokens.len() < MAX_TOKENS || state.tokens.contains_key(edge) {
            state.tokens.insert(edge.clone(), (token, Instant::now()));
        }
    }

    /// Takes a session back after a stream to this port. Closes it if it is not fit for another
    /// stream, or there are enough.
    pub(crate) fn put(&self, edge: &Edge, session: Box<Session>, port: u16) {
        let (own, trust, now) = (self.own.load(), self.trust.load(), hauberk_tls::now());
        let fit = session.is_current(own.as_ref(), &trust, now)
            && session.made().elapsed() < MAX_AGE
            && session.is_quiet()
            && self.metrics.idle_sessions(Direction::Outbound) < MAX_OF_NODE;
        let mut state = self.lock();
        if fit && !state.retired {
            let of_edge = state.edges.entry(edge.clone()).or_default();
            if of_edge.idle.len() < MAX_OF_EDGE {
                let counted = self.metrics.session_idle(Direction::Outbound);
                of_edge.idle.push(Idle { session, port, since: Instant::now(), _counted: counted });
                return;
            }
        }
        drop(state);
        session.close_idle();
    }

    /// Takes a spare session, or that none could be made.
    pub(crate) fn put_spare(&self, edge: &Edge, session: Option<Box<Session>>, port: u16) {
        if let Some(of_edge) = self.lock().edges.get_mut(edge) {
            of_edge.warming = false;
            of_edge.warm_after = session.is_none().then(|| Instant::now() + WARM_PAUSE);
        }
        if let Some(session) = session {
            self.put(edge, session, port);
        }
    }

    /// Closes all sessions of an edge.
    pub(crate) fn forget(&self, edge: &Edge) {
        let of_edge = self.lock().edges.remove(edge);
        for idle in of_edge.into_iter().flat_map(|of_edge| of_edge.idle) {
            idle.session.close_idle();
        }
    }

    /// Closes all sessions, and from now on each that comes back.
    pub(crate) fn retire(&self) {
        let edges = {
            let mut state = self.lock();
            state.retired = true;
            std::mem::take(&mut state.edges)
        };
        for idle in edges.into_values().flat_map(|of_edge| of_edge.idle) {
            idle.session.close_idle();
        }
    }

    /// Closes what is too old, no longer current, or leads where `allows` says no.
    pub(crate) fn sweep(&self, allows: impl Fn(&Edge, u16) -> bool) {
        let (own, trust, now) = (self.own.load(), self.trust.load(), hauberk_tls::now());
        let mut old = Vec::new();
        let mut state = self.lock();
        state.tokens.retain(|_, (_, made)| made.elapsed() < TOKEN_LIFETIME);
        state.edges.retain(|edge, of_edge| {
            for idle in std::mem::take(&mut of_edge.idle) {
                let stays = idle.since.elapsed() < MAX_IDLE
                    && idle.session.made().elapsed() < MAX_AGE
                    && idle.session.is_current(own.as_ref(), &trust, now)
                    && idle.session.is_quiet()
                    && allows(edge, idle.port);
                if stays {
                    of_edge.idle.push(idle);
                } else {
                    old.push(idle.session);
                }
            }
            let pausing = of_edge.warm_after.is_some_and(|after| Instant::now() < after);
            !of_edge.idle.is_empty() || of_edge.warming || pausing
        });
        drop(state);
        old.into_iter().for_each(Session::close_idle);
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.retire();
    }
}
