//! The next agent's side: it finds the one that runs, takes its place, and tells it when that is done.

use std::{
    collections::HashMap,
    net::TcpListener,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::pass::{self, Receiver};
use hauberk_telemetry::Health;

use super::protocol::{END, PATIENCE, Passed, READY, SOCKET, Seat, TAKE, in_folder, is_hello};

/// How long listeners of the agent before are kept that nobody has taken up.
const KEEP_UNCLAIMED: Duration = Duration::from_secs(60);

/// The listeners of the agent before, if it is still there.
pub(crate) fn take_place(predecessor: Option<Predecessor>) -> (Inherited, Taken) {
    let Some(predecessor) = predecessor else { return Default::default() };
    tokio::task::block_in_place(|| predecessor.take()).unwrap_or_else(|error| {
        let error = format!("{error:#}");
        tracing::warn!(error, "the agent before ended by itself");
        Default::default()
    })
}

/// Tells the agent before when the workloads are taken up, and holds the link for as long as this one runs. What
/// nobody has taken up is kept for a while: a workload may come yet.
pub(crate) async fn tell_when_ready(taken: Taken, inherited: Inherited, health: Health) {
    health.ready().await;
    taken.ready();
    tokio::time::sleep(KEEP_UNCLAIMED).await;
    drop(inherited.rest());
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
    pub(crate) fn find(data: &Path) -> anyhow::Result<Option<Self>> {
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
            // It stops at this moment: then there is nobody.
            Ok(None) => return Ok(None),
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

    /// Its listener for metrics and probes.
    pub(crate) fn metrics(&mut self) -> Option<TcpListener> {
        self.metrics.take()
    }

    /// Takes its place: from here on it keeps its hands off the folder and the rules. Blocks.
    ///
    /// # Errors
    /// If it went away in the middle. Then there are no listeners but those that this agent makes.
    pub(crate) fn take(mut self) -> anyhow::Result<(Inherited, Taken)> {
        pass::send(self.link.stream(), TAKE, None).context("tell the other agent")?;
        let inherited = Inherited::default();
        loop {
            let line = self.link.line().context("the other agent's listeners")?;
            let Some(line) = line else { bail!("the other agent went away in the middle") };
            if line == END {
                break;
            }
            let Passed::Listener(seat) = serde_json::from_str(&line)
                .with_context(|| format!("the other agent says {line:?}"))?
            else {
                bail!("the other agent passes its metrics' listener twice");
            };
            let file = self.link.file().with_context(|| format!("no listener came with {line}"))?;
            inherited.lock().insert(seat, TcpListener::from(file));
        }
        Ok((inherited, Taken { link: Some(self.link) }))
    }
}

/// A predecessor whose place was taken, and who still takes connections until it is told.
#[derive(Default)]
pub(crate) struct Taken {
    link: Option<Receiver>,
}

impl Taken {
    /// This agent has taken up its workloads. The link stays: the predecessor comes back when it breaks.
    pub(crate) fn ready(&self) {
        let Some(link) = &self.link else { return };
        match pass::send(link.stream(), READY, None) {
            Ok(()) => tracing::info!("took the place of the agent before"),
            Err(error) => tracing::info!(%error, "the agent before is gone already"),
        }
    }
}

/// The listeners of a predecessor that nobody has taken up yet.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inherited(Arc<Mutex<HashMap<Seat, TcpListener>>>);

impl Inherited {
    /// The listener of this seat.
    pub(crate) fn claim(&self, seat: &Seat) -> Option<TcpListener> {
        self.lock().remove(seat)
    }

    /// How many nobody has claimed.
    pub(crate) fn left(&self) -> usize {
        self.lock().len()
    }

    /// Those that nobody has claimed.
    pub(crate) fn rest(&self) -> Vec<(Seat, OwnedFd)> {
        let rest = std::mem::take(&mut *self.lock());
        rest.into_iter().map(|(seat, listener)| (seat, listener.into())).collect()
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, HashMap<Seat, TcpListener>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
