//! Keeps the rules of one place in force: it listens for the kernel's news of nftables, routing, addresses and
//! interfaces, and puts back what was altered within milliseconds. What was opened meanwhile is ended and
//! recorded.

use std::{
    net::SocketAddr,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use hauberk_linux::{
    NetnsWorker,
    capture::{Before, Connection, Installed, Monitor, Ruleset},
};
use tokio::{io::Interest, net::UnixDatagram};
use tokio_util::task::AbortOnDropHandle;

use super::{Locals, uncaptured};
use crate::{context::Context, handover::Replaced};

/// Between two looks that news has caused: other programs may change their own rules many times a second.
const QUIET: Duration = Duration::from_millis(5);

/// Where rules are put in place: the agent's own network namespace, or a workload's.
#[derive(Clone)]
pub(super) enum Site {
    Host,
    Namespace(Arc<NetnsWorker>),
}

impl Site {
    /// Does something there. Blocks.
    pub(super) fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> hauberk_linux::Result<T> + Send + 'static,
    ) -> anyhow::Result<T> {
        Ok(match self {
            Self::Host => work()?,
            Self::Namespace(worker) => worker.call(work)??,
        })
    }
}

/// When rules were found altered last, and how often that was.
#[derive(Clone, Debug, Default)]
pub(super) struct Restored {
    pub(super) count: u64,
    pub(super) at: Option<SystemTime>,
    pub(super) what: String,
}

/// The rules of one place.
pub(super) struct Guard {
    watch: Arc<Watch>,
    _task: AbortOnDropHandle<()>,
}

/// What the task shares with its owner.
struct Watch {
    context: Arc<Context>,
    site: Site,
    /// For people.
    name: String,
    locals: Arc<Locals>,
    replaced: Replaced,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    rules: Option<Ruleset>,
    older: Vec<Connection>,
    restored: Restored,
}

impl Guard {
    /// Begins to listen. Nothing is put in place yet.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub(super) fn start(
        context: &Arc<Context>,
        site: Site,
        name: String,
        locals: &Arc<Locals>,
        replaced: &Replaced,
    ) -> anyhow::Result<Self> {
        let monitor = site.call(Monitor::start)?;
        let [nftables, routing, reports] = monitor.sockets().map(|socket| waitable(&socket));
        let sockets = [nftables?, routing?, reports?];
        let watch = Arc::new(Watch {
            context: context.clone(),
            site,
            name,
            locals: locals.clone(),
            replaced: replaced.clone(),
            state: Mutex::default(),
        });
        let task = tokio::spawn(follow(watch.clone(), monitor, sockets));
        Ok(Self { watch, _task: AbortOnDropHandle::new(task) })
    }

    /// Puts these rules in place, unless they are. Blocks.
    ///
    /// # Errors
    /// If the kernel refuses them: what was in force stays so.
    pub(super) fn enforce(&self, wanted: &Ruleset) -> anyhow::Result<()> {
        self.watch.enforce(Some(wanted))
    }

    /// When they were restored last.
    pub(super) fn restored(&self) -> Restored {
        self.watch.lock().restored.clone()
    }
}

impl Watch {
    /// Puts these rules in place, or those that were; nothing happens if they are.
    fn enforce(&self, wanted: Option<&Ruleset>) -> anyhow::Result<()> {
        let mut state = self.lock();
        let Some(rules) = wanted.or(state.rules.as_ref()).cloned() else { return Ok(()) };
        let known = state.rules.as_ref().map(|rules| (rules.clone(), state.older.clone()));
        let same = state.rules.as_ref() == Some(&rules);
        let looked_at = rules.clone();
        let (drift, installed) = self.site.call(move || {
            let drift = looked_at.drift()?;
            if drift.is_empty() {
                return Ok((drift, None));
            }
            let before = match &known {
                Some((rules, older)) => Before::Known(rules, older),
                None => Before::Unknown,
            };
            Ok((drift, Some(looked_at.install(&before)?)))
        })?;
        state.rules = Some(rules);
        let Some(Installed { older, cut }) = installed else { return Ok(()) };
        state.older = older;
        if same {
            let what: Vec<_> = drift.iter().map(ToString::to_string).collect();
            let what = what.join(", ");
            tracing::warn!(
                place = self.name,
                what,
                cut = cut.len(),
                "the capture rules were altered, they are restored"
            );
            self.context.metrics.capture_restored();
            state.restored.count += 1;
            state.restored.at = Some(SystemTime::now());
            state.restored.what = what;
        }
        drop(state);
        for socket in &cut {
            uncaptured::cut(&self.context, &self.locals, socket);
        }
        Ok(())
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The runtime can wait for a socket of the kinds that it knows; of what kind it really is makes no difference to
/// that, and nothing else is asked of it.
fn waitable(socket: &BorrowedFd<'_>) -> std::io::Result<UnixDatagram> {
    let socket = std::os::unix::net::UnixDatagram::from(socket.try_clone_to_owned()?);
    socket.set_nonblocking(true)?;
    UnixDatagram::from_std(socket)
}

/// Waits until one of the sockets is readable, and takes what is there.
async fn news(
    monitor: &Monitor,
    [nftables, routing, reports]: &[UnixDatagram; 3],
) -> std::io::Result<(bool, Vec<(SocketAddr, SocketAddr)>)> {
    let ready = tokio::select! {
        ready = nftables.readable() => ready.map(|()| nftables),
        ready = routing.readable() => ready.map(|()| routing),
        ready = reports.readable() => ready.map(|()| reports),
    }?;
    let mut found = None;
    // That nothing is left is what makes the runtime wait again.
    let emptied: std::io::Result<()> = ready.try_io(Interest::READABLE, || {
        found = Some(monitor.drain().and_then(|concerned| Ok((concerned, monitor.reports()?))));
        Err(std::io::ErrorKind::WouldBlock.into())
    });
    match (found, emptied) {
        (Some(found), _) => found,
        (None, Err(error)) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error),
        (None, Ok(()) | Err(_)) => Ok((false, Vec::new())),
    }
}

async fn follow(watch: Arc<Watch>, monitor: Monitor, sockets: [UnixDatagram; 3]) {
    loop {
        let outcome = news(&monitor, &sockets).await;
        match outcome {
            Ok((concerned, unroutable)) => {
                for connection in unroutable {
                    let watch = watch.clone();
                    drop(tokio::task::spawn_blocking(move || watch.unroutable(&connection)));
                }
                if concerned && !watch.replaced.is_set() {
                    let watch = watch.clone();
                    let healed = tokio::task::spawn_blocking(move || {
                        if let Err(error) = watch.enforce(None) {
                            tracing::error!(
                                place = watch.name,
                                error = format!("{error:#}"),
                                "the capture rules were altered and could not be restored"
                            );
                        }
                    });
                    drop(healed.await);
                }
            }
            Err(error) => {
                // The slow look goes on.
                tracing::warn!(
                    place = watch.name,
                    error = format!("{error:#}"),
                    "no news of the network"
                );
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        tokio::time::sleep(QUIET).await;
    }
}

impl Watch {
    /// A captured connection cannot be led to the agent.
    fn unroutable(&self, (local, remote): &(SocketAddr, SocketAddr)) {
        uncaptured::unroutable(&self.context, &self.locals, &self.site, *local, *remote);
    }
}
