//! The next agent's side: it finds the one that runs, takes its place, and tells it when that is done.

use std::{
    collections::HashMap,
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::pass::{self, Receiver};
use hauberk_telemetry::Health;
use tokio_util::sync::CancellationToken;

use super::{
    folder::{LOCK_RETRY, Lock, lock, lock_within},
    protocol::{END, PATIENCE, Passed, READY, SOCKET, Seat, TAKE, WAIT, in_folder, is_hello},
};

/// How long listeners of the agent before are kept that nobody has taken up.
const KEEP_UNCLAIMED: Duration = Duration::from_secs(60);

/// Between two tries to take the place of an agent that goes on.
const TAKE_RETRY: Duration = Duration::from_secs(1);

/// How often an agent without an identity tells the one that runs that it is still there.
const STILL_WAITING: Duration = Duration::from_secs(1);

/// Who was on the data folder before this agent.
pub(crate) enum Before {
    /// Nobody: it is this agent's now.
    Nobody(Lock),
    /// An agent, whose place is to be taken.
    Agent(Predecessor),
}

impl Before {
    /// Finds out; nothing if this agent is to stop meanwhile. One that has the folder and does not listen yet, or
    /// no longer, is waited for, if its place is to be taken.
    ///
    /// # Errors
    /// If another agent runs there, and its place is not to be taken or it answers with something else.
    pub(crate) async fn find(
        data: &Path,
        take_over: bool,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Self>> {
        let mut told = false;
        loop {
            if take_over {
                let found = tokio::task::block_in_place(|| Predecessor::find(data))
                    .context("take over from the agent that runs")?;
                if let Some(predecessor) = found {
                    return Ok(Some(Self::Agent(predecessor)));
                }
            }
            match lock(data) {
                Ok(own) => return Ok(Some(Self::Nobody(own))),
                Err(error) if !take_over => return Err(error),
                Err(error) if !told => {
                    told = true;
                    let error = format!("{error:#}");
                    tracing::info!(error, "waiting for the agent before to end");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = stop.cancelled() => return Ok(None),
                () = tokio::time::sleep(LOCK_RETRY) => {}
            }
        }
    }

    /// Its listener for metrics and probes.
    pub(crate) fn metrics(&mut self) -> Option<TcpListener> {
        match self {
            Self::Nobody(_) => None,
            Self::Agent(predecessor) => predecessor.metrics.take(),
        }
    }

    /// Gives this agent time to get an identity, `ready`, before it takes the place of one that runs: that one works
    /// with the certificate of the node that it has, and goes on. If there is no agent (any more), what is to be
    /// enforced comes first. Nothing if this agent is to stop meanwhile.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub(crate) async fn wait(
        self,
        data: &Path,
        ready: impl Future<Output = ()>,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<Self>> {
        let mut before = self;
        tokio::pin!(ready);
        loop {
            let Self::Agent(predecessor) = &before else { return Ok(Some(before)) };
            tokio::select! {
                biased;
                () = &mut ready => return Ok(Some(before)),
                () = stop.cancelled() => return Ok(None),
                () = predecessor.gone() => {}
            }
            tracing::info!("the agent that ran before is gone");
            let Some(found) = Self::find(data, true, stop).await? else { return Ok(None) };
            before = found;
        }
    }

    /// Takes its place: the data folder, and the listeners of the agent before if there is one. Nothing if this
    /// agent is to stop meanwhile.
    ///
    /// # Errors
    /// If the agent that runs does not let go of it.
    pub(crate) async fn take(
        self,
        data: &Path,
        stop: &CancellationToken,
    ) -> anyhow::Result<Option<(Lock, Inherited, Taken)>> {
        let mut before = self;
        loop {
            let predecessor = match before {
                Self::Nobody(own) => {
                    return Ok(Some((own, Inherited::default(), Taken::default())));
                }
                Self::Agent(predecessor) => predecessor,
            };
            let error = match tokio::task::block_in_place(|| predecessor.take()) {
                Ok((inherited, taken)) => {
                    return tokio::select! {
                        () = stop.cancelled() => Ok(None),
                        own = lock_within(data, PATIENCE) => Ok(Some((own?, inherited, taken))),
                    };
                }
                // It does not speak as this one does: another try would only disturb it.
                Err(error) if !error.chain().any(|cause| cause.is::<std::io::Error>()) => {
                    return Err(error.context(
                        "the agent that runs does not hand over as this one understands it; stop it first",
                    ));
                }
                Err(error) => format!("{error:#}"),
            };
            // It has ended, or goes on as if nobody had come.
            tracing::warn!(error, "the agent before has not handed over");
            let Some(found) = Self::find(data, true, stop).await? else { return Ok(None) };
            if let Self::Agent(_) = &found {
                tokio::time::sleep(TAKE_RETRY).await;
            }
            before = found;
        }
    }
}

/// Tells the agent before when the workloads are taken up, and holds the link for as long as this one runs. What
/// nobody has taken up is kept for a while: a workload may come yet.
pub(crate) async fn tell_when_ready(taken: Taken, inherited: Inherited, health: Health) {
    health.ready().await;
    taken.ready();
    tokio::time::sleep(KEEP_UNCLAIMED).await;
    inherited.close();
    std::future::pending().await
}

/// The agent that runs on a data folder, as its next one sees it.
pub(crate) struct Predecessor {
    link: Receiver,
    metrics: Option<TcpListener>,
}

impl Predecessor {
    /// Finds it; none if nobody listens in the folder.
    ///
    /// # Errors
    /// If it answers with something else.
    fn find(data: &Path) -> anyhow::Result<Option<Self>> {
        let stream = match in_folder(data, |path| UnixStream::connect(path)) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("connect to {}", data.join(SOCKET).display()));
            }
        };
        stream.set_read_timeout(Some(PATIENCE)).context("limit the wait for the other agent")?;
        let mut link = Receiver::new(stream);
        let metrics = match link.line() {
            Ok(Some(line)) if is_hello(&line) => link.file().map(TcpListener::from),
            // It stops at this moment, before it has let this agent in or after: then there is nobody.
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(None),
            Ok(Some(line)) => bail!(
                "the agent that runs there says {line:?}, which this one does not understand; stop it first"
            ),
            Err(error) => {
                return Err(error)
                    .context("the agent that runs there does not answer; stop it first");
            }
        };
        Ok(Some(Self { link, metrics }))
    }

    /// Done when it is gone, or waits for this one no longer. It is told now and then that this one waits.
    async fn gone(&self) {
        while tokio::task::block_in_place(|| pass::send(self.link.stream(), WAIT, None)).is_ok() {
            tokio::time::sleep(STILL_WAITING).await;
        }
    }

    /// Takes its place: from here on it keeps its hands off the folder and the rules. Blocks.
    ///
    /// # Errors
    /// If it went away in the middle, or could not do it.
    fn take(mut self) -> anyhow::Result<(Inherited, Taken)> {
        pass::send(self.link.stream(), TAKE, None).context("tell the other agent")?;
        let inherited = Inherited::default();
        loop {
            let line = self.link.line().context("the other agent's listeners")?;
            let line = line
                .ok_or(std::io::Error::from(std::io::ErrorKind::UnexpectedEof))
                .context("the other agent went away in the middle")?;
            if line == END {
                break;
            }
            let Passed::Listener(seat) = serde_json::from_str(&line)
                .with_context(|| format!("the other agent says {line:?}"))?
            else {
                bail!("the other agent passes its metrics' listener twice");
            };
            let file = self.link.file().with_context(|| format!("no listener came with {line}"))?;
            inherited.lock().insert(seat, file);
        }
        let stands_by = Arc::new(AtomicBool::new(true));
        Ok((inherited, Taken { link: Some(self.link), stands_by }))
    }
}

/// A predecessor whose place was taken, and who still takes connections until it is told.
#[derive(Default)]
pub(crate) struct Taken {
    link: Option<Receiver>,
    stands_by: Arc<AtomicBool>,
}

impl Taken {
    /// Whether there is a predecessor that takes its place back if this agent ends now. Told without the link,
    /// which somebody else has by then.
    pub(crate) fn stands_by(&self) -> Arc<AtomicBool> {
        self.stands_by.clone()
    }

    /// This agent has taken up its workloads. The link stays: the predecessor ends when it breaks, to be
    /// started anew.
    pub(crate) fn ready(&self) {
        self.stands_by.store(false, Ordering::Relaxed);
        let Some(link) = &self.link else { return };
        match pass::send(link.stream(), READY, None) {
            Ok(()) => tracing::info!("took the place of the agent before"),
            Err(error) => tracing::info!(%error, "the agent before is gone already"),
        }
    }
}

/// The listeners of a predecessor that nobody has taken up yet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inherited(Arc<Mutex<HashMap<Seat, OwnedFd>>>);

impl Inherited {
    /// The listener of this seat.
    pub(crate) fn claim(&self, seat: &Seat) -> Option<TcpListener> {
        self.claim_socket(seat).map(TcpListener::from)
    }

    /// The socket of this seat that is no listener.
    pub(crate) fn claim_socket(&self, seat: &Seat) -> Option<OwnedFd> {
        self.lock().remove(seat)
    }

    /// How many nobody has claimed.
    pub(crate) fn left(&self) -> usize {
        self.lock().len()
    }

    /// Those that nobody has claimed, for another process.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub(super) fn share(&self) -> std::io::Result<Vec<(Seat, OwnedFd)>> {
        let unclaimed = self.lock();
        unclaimed.iter().map(|(seat, socket)| Ok((seat.clone(), socket.try_clone()?))).collect()
    }

    /// Closes those that nobody has claimed.
    pub(super) fn close(&self) {
        self.lock().clear();
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, HashMap<Seat, OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
