//! The multiplexed sessions of one local workload, one for each edge and thread that carries connections; and what makes dedicated ones for streams with
//! much to say.
//!
//! Every workload has its own, so that no stream can come upon a session of another identity. Whether one is still
//! current is asked again for each stream. All who want the first one of an edge wait for the same handshake, and no
//! lock is held meanwhile.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use hauberk_tls::{CredentialSlot, TrustSlot};
use tokio::sync::{oneshot, watch};

use crate::{
    context::{Context, Local},
    lanes::Lane,
    mux::{Mux, tend_source},
    outbound,
    pool::{Edge, MAX_AGE, MAX_IDLE},
    session::{Session, SessionError},
};

/// Those of one workload.
pub(crate) struct Trunks {
    own: Arc<CredentialSlot>,
    trust: Arc<TrustSlot>,
    /// Those of each thread that carries connections.
    lanes: Box<[Mutex<State>]>,
}

#[derive(Default)]
struct State {
    edges: HashMap<Edge, Trunk>,
    /// The workload has changed or is gone: nothing is kept any more.
    retired: bool,
}

enum Trunk {
    /// The handshake is under way.
    Making(watch::Receiver<Made>),
    Ready {
        mux: Arc<Mux>,
        /// The port of its last stream.
        port: u16,
    },
}

/// What came of it; nothing until it is known.
type Made = Option<Result<Arc<Mux>, Arc<SessionError>>>;

/// What there is for a stream.
pub(crate) struct Obtained {
    pub(crate) mux: Arc<Mux>,
    /// It has been there before.
    pub(crate) reused: bool,
}

enum Found {
    Obtained(Obtained),
    Making(watch::Receiver<Made>),
    Wanted(watch::Sender<Made>, watch::Receiver<Made>),
}

/// A multiplexed session, made now if there is none.
pub(crate) async fn obtain(
    context: &Arc<Context>,
    local: &Arc<Local>,
    edge: &Edge,
    port: u16,
) -> Result<Obtained, SessionError> {
    let coming = match local.trunks.find(edge, port) {
        Found::Obtained(obtained) => return Ok(obtained),
        Found::Making(coming) => coming,
        Found::Wanted(sender, coming) => {
            let making = make(context.clone(), local.clone(), edge.clone(), port, sender);
            // Not by whoever asked first, who may go away.
            tokio::spawn(making);
            coming
        }
    };
    Box::pin(made(coming)).await
}

async fn made(mut coming: watch::Receiver<Made>) -> Result<Obtained, SessionError> {
    match coming.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(Ok(mux))) => Ok(Obtained { mux: mux.clone(), reused: false }),
        Ok(Some(Err(error))) => Err(error.again()),
        // Whoever made it is gone without a word.
        Ok(None) | Err(_) => Err(SessionError::Closed),
    }
}

async fn make(
    context: Arc<Context>,
    local: Arc<Local>,
    edge: Edge,
    port: u16,
    sender: watch::Sender<Made>,
) {
    match outbound::multiplexed(&context, &local, &edge).await {
        Ok(trunk) => {
            let (mux, driver) = Mux::of(trunk, &context.metrics);
            let slot = local.identity.slot.clone();
            // What its streams said last leaves after they have ended.
            let counted = context.opened();
            local.trunks.put(&edge, mux.clone(), port);
            // First those who wait for it have their turn: while the agent stops, a session that carries nothing ends at
            // once. There may be nobody any more.
            drop(sender.send(Some(Ok(mux))));
            tokio::spawn(async move {
                tend_source(context, driver, slot, MAX_IDLE).await;
                drop(counted);
            });
        }
        Err(error) => {
            local.trunks.forget(&edge);
            drop(sender.send(Some(Err(Arc::new(error)))));
        }
    }
}

impl Trunks {
    /// For so many threads that carry connections.
    pub(crate) fn new(own: Arc<CredentialSlot>, trust: Arc<TrustSlot>, lanes: usize) -> Self {
        Self { own, trust, lanes: (0..lanes.max(1)).map(|_| Mutex::default()).collect() }
    }

    fn find(&self, edge: &Edge, to_port: u16) -> Found {
        let mut state = self.lock();
        match state.edges.get_mut(edge) {
            // Whoever makes it tells what came of it, or is gone without a word.
            Some(Trunk::Making(coming)) if coming.has_changed().is_ok() => {
                return Found::Making(coming.clone());
            }
            Some(Trunk::Making(_)) | None => {}
            Some(Trunk::Ready { mux, port }) => {
                if self.is_current(mux) {
                    *port = to_port;
                    return Found::Obtained(Obtained { mux: mux.clone(), reused: true });
                }
                mux.retire();
            }
        }
        let (sender, coming) = watch::channel(None);
        state.edges.insert(edge.clone(), Trunk::Making(coming.clone()));
        Found::Wanted(sender, coming)
    }

    fn is_current(&self, mux: &Mux) -> bool {
        let (own, trust, now) = (self.own.load(), self.trust.load(), hauberk_tls::now());
        mux.made().elapsed() < MAX_AGE
            && mux.may_open(|facts| facts.is_current(own.as_ref(), &trust, now))
    }

    fn put(&self, edge: &Edge, mux: Arc<Mux>, port: u16) {
        let mut state = self.lock();
        if state.retired {
            // Those who wait for it have it, and nobody else: it ends when it has carried nothing for a while.
            state.edges.remove(edge);
        } else {
            state.edges.insert(edge.clone(), Trunk::Ready { mux, port });
        }
    }

    fn forget(&self, edge: &Edge) {
        self.lock().edges.remove(edge);
    }

    /// No further stream comes on any of an edge: the next one finds out whether anybody is there.
    pub(crate) fn distrust(&self, edge: &Edge) {
        for mut state in self.all() {
            if let Some(trunk) = state.edges.remove(edge) {
                trunk.retire();
            }
        }
    }

    /// No further stream comes on any, from now on.
    pub(crate) fn retire(&self) {
        for mut state in self.all() {
            state.retired = true;
            for trunk in std::mem::take(&mut state.edges).into_values() {
                trunk.retire();
            }
        }
    }

    /// Closes what is no longer current, and what carries nothing and leads where `allows` says no.
    pub(crate) fn sweep(&self, allows: impl Fn(&Edge, u16) -> bool) {
        let stays = |edge: &Edge, trunk: &mut Trunk| {
            let stays = match trunk {
                Trunk::Making(coming) => coming.has_changed().is_ok(),
                Trunk::Ready { mux, port } => {
                    !mux.is_over()
                        && self.is_current(mux)
                        && (!mux.is_idle() || allows(edge, *port))
                }
            };
            if !stays {
                trunk.retire();
            }
            stays
        };
        for mut state in self.all() {
            state.edges.retain(stays);
        }
    }

    /// Those of the calling thread.
    fn lock(&self) -> MutexGuard<'_, State> {
        // There is always one.
        locked(&self.lanes[Lane::current().index().min(self.lanes.len() - 1)])
    }

    /// Those of all threads, one after another.
    fn all(&self) -> impl Iterator<Item = MutexGuard<'_, State>> {
        self.lanes.iter().map(locked)
    }
}

/// Plain data: a panic elsewhere leaves nothing half-changed in it.
fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Trunk {
    fn retire(&self) {
        match self {
            Self::Ready { mux, .. } => mux.retire(),
            Self::Making(_) => {}
        }
    }
}

impl Drop for Trunks {
    fn drop(&mut self) {
        self.retire();
    }
}

/// Makes dedicated sessions for streams of one edge.
pub(crate) struct Mover {
    pub(crate) context: Arc<Context>,
    pub(crate) local: Arc<Local>,
    pub(crate) edge: Edge,
    pub(crate) port: u16,
}

impl Mover {
    /// It has carried on.
    pub(crate) fn moved(&self) {
        self.context.metrics.stream_moved();
    }

    /// One that comes as soon as there is one, if it can be had.
    pub(crate) fn start(&self) -> oneshot::Receiver<Box<Session>> {
        let (sender, coming) = oneshot::channel();
        let (context, local) = (self.context.clone(), self.local.clone());
        let (edge, port) = (self.edge.clone(), self.port);
        tokio::spawn(async move {
            let made = async {
                let mut session = outbound::dedicated(&context, &local, &edge).await?;
                // The end of the handshake, which otherwise goes out with the first stream.
                session.flush().await?;
                Ok::<_, SessionError>(session)
            };
            match made.await {
                Ok(session) => {
                    // The stream may be over meanwhile.
                    if let Err(session) = sender.send(session) {
                        local.pool.put(&edge, session, port);
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, agent = %edge.agent, "no dedicated session could be made");
                }
            }
        });
        coming
    }
}
