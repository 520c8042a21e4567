//! Idle dedicated sessions of one local workload, to be used again: a stream that moves to one of them costs no handshake.
//!
//! Every workload has a pool of its own, so that no stream can come upon a session of another
//! identity. What comes out of it is checked again: the same own certificate and roots as when it was
//! made, a peer whose certificate has not ended, nothing said by the peer meanwhile. The lock is held
//! for a look-up, never across a handshake.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hauberk_core::identity::SpiffeId;
use hauberk_telemetry::metrics::{AgentMetrics, Direction, IdleSession};
use hauberk_tls::{CredentialSlot, TrustSlot, channel::CallerToken};

use crate::session::Session;

/// Idle sessions of one edge: what many bulk transfers at once leave behind.
const MAX_OF_EDGE: usize = 256;

/// The same of all workloads of this node.
const MAX_OF_NODE: usize = 4_096;

/// A session that nobody used for this long is closed. Below the destination's patience
/// ([`crate::inbound::IDLE_TIMEOUT`]), so that the side closes that knows whether it needs it.
pub(crate) const MAX_IDLE: Duration = Duration::from_secs(60);

/// A session is not used for new streams after this long, so that load spreads anew.
pub(crate) const MAX_AGE: Duration = Duration::from_secs(600);

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
    of_node: OfNode,
    state: Mutex<State>,
}

/// How many idle sessions all pools of a node have.
#[derive(Clone, Default)]
pub(crate) struct OfNode(Arc<AtomicUsize>);

/// One of them.
struct Pooled(OfNode);

impl OfNode {
    /// One more, if there may be more.
    fn add(&self) -> Option<Pooled> {
        // Counted again when it is dropped.
        let pooled = Pooled(self.clone());
        (self.0.fetch_add(1, Ordering::Relaxed) < MAX_OF_NODE).then_some(pooled)
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct State {
    /// Of each edge, the longest idle first.
    edges: HashMap<Edge, Vec<Idle>>,
    /// Those of the newest sessions, and when these were made.
    tokens: HashMap<Edge, (CallerToken, Instant)>,
    /// The workload has changed or is gone: nothing is kept any more.
    retired: bool,
}

struct Idle {
    session: Box<Session>,
    /// The port of its last stream.
    port: u16,
    since: Instant,
    _counted: (Pooled, IdleSession),
}

impl Pool {
    pub(crate) fn new(
        own: Arc<CredentialSlot>,
        trust: Arc<TrustSlot>,
        metrics: AgentMetrics,
        of_node: OfNode,
    ) -> Self {
        Self { own, trust, metrics, of_node, state: Mutex::default() }
    }

    /// The session that was used last, if there is one: the others may grow old.
    pub(crate) fn take(&self, edge: &Edge) -> Option<Box<Session>> {
        let (own, trust, now) = (self.own.load(), self.trust.load(), hauberk_tls::now());
        let mut old = Vec::new();
        let mut state = self.lock();
        let of_edge = state.edges.get_mut(edge)?;
        let session = loop {
            match of_edge.pop() {
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
        drop(state);
        old.into_iter().for_each(Session::close_idle);
        session
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
            && session.is_quiet();
        let mut state = self.lock();
        if fit
            && !state.retired
            && let Some(pooled) = self.of_node.add()
        {
            let of_edge = state.edges.entry(edge.clone()).or_default();
            if of_edge.len() < MAX_OF_EDGE {
                let _counted = (pooled, self.metrics.session_idle(Direction::Outbound));
                of_edge.push(Idle { session, port, since: Instant::now(), _counted });
                return;
            }
        }
        drop(state);
        session.close_idle();
    }

    /// Closes all sessions of an edge.
    pub(crate) fn forget(&self, edge: &Edge) {
        let of_edge = self.lock().edges.remove(edge);
        for idle in of_edge.into_iter().flatten() {
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
        for idle in edges.into_values().flatten() {
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
            for idle in std::mem::take(of_edge) {
                let stays = idle.since.elapsed() < MAX_IDLE
                    && idle.session.made().elapsed() < MAX_AGE
                    && idle.session.is_current(own.as_ref(), &trust, now)
                    && idle.session.is_quiet()
                    && allows(edge, idle.port);
                if stays {
                    of_edge.push(idle);
                } else {
                    old.push(idle.session);
                }
            }
            !of_edge.is_empty()
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
