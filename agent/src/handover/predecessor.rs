//! The side of the agent that runs: it waits for the next one, hands over to it, and takes its place back if
//! that one ends before it is ready.

use std::{
    net::{Shutdown, TcpListener},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::pass::{self, Receiver};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use super::{
    Inherited,
    folder::{Lock, lock, lock_within},
    protocol::{END, PATIENCE, Passed, READY, SOCKET, Seat, TAKE, VERSION, WAIT, in_folder},
};
use crate::{
    capture::Captured,
    duties::{OffDuty, OnDuty},
    pages::Pages,
};

/// The pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How long the next agent may say nothing. After that this one answers probes itself again.
const TAKE_PATIENCE: Duration = Duration::from_secs(120);

/// How long an agent that is told to stop goes on taking connections for the next one, which has not taken up
/// its workloads yet.
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// How much longer than a drain a next agent may take to end that was told to stop before it was ready: it waits
/// for the container runtime and for its records, and its drain may be another. Rules stand still meanwhile, and
/// nothing fails for it.
const END_PATIENCE: Duration = Duration::from_secs(60);

/// Why a replaced agent ends with an error: it has to be started anew.
const REPLACED: &str = "the agent that took this one's place went away; start this one again";

/// An agent that runs, until another one has taken its place or it is to stop.
pub(crate) struct Incumbent {
    pub(crate) data: PathBuf,
    pub(crate) successors: Successors,
    pub(crate) duties: OnDuty,
    /// What the agent before has left.
    pub(crate) inherited: Inherited,
    /// Tells the agent before that this one is ready, and holds the link to it.
    pub(crate) taken: AbortOnDropHandle<()>,
    pub(crate) drain: Duration,
}

/// How its time ends.
pub(crate) enum End {
    /// It is to stop.
    Stopped(OffDuty),
    /// Another agent has taken its place, and is ready.
    Replaced(OffDuty, Successor),
    /// Another agent has taken its place and ended too early, and it could not be taken back.
    Lost(anyhow::Error),
}

impl Incumbent {
    /// Runs until then. The lock of the data folder is there afterwards if no other agent has got it.
    ///
    /// # Errors
    /// If its captures have failed.
    pub(crate) async fn run(
        mut self,
        own: &mut Option<Lock>,
        pages: &mut Pages,
        stop: &CancellationToken,
    ) -> anyhow::Result<End> {
        loop {
            let Some(mut successor) = next_to_take(stop, &mut self.successors, pages).await else {
                // The agent before, if it is still there, has to go on without this one.
                self.taken.abort();
                drop(self.successors);
                return Ok(End::Stopped(self.duties.stop().await?));
            };
            tracing::info!("another agent takes this one's place");
            drop(self.successors);
            let mut off = self.duties.lay_down().await?;
            let handed =
                hand_over(&mut successor, off.captured(), &self.inherited, own, stop).await;
            let Err(error) = handed else { return Ok(End::Replaced(off, successor)) };
            // If it still waits for listeners, it sees by this that it gets none.
            drop(successor);
            let error = format!("{error:#}");
            tracing::warn!(error, "the next agent has not taken this one's place");
            if own.is_none() {
                // Whoever has the lock changes the rules. Connections are taken meanwhile, as they were before.
                let patience = self.drain.saturating_add(END_PATIENCE);
                let locked = tokio::select! {
                    biased;
                    () = stop.cancelled() => {
                        // Whose it is by now, has the rules to remove.
                        *own = lock(&self.data).ok();
                        return Ok(End::Stopped(off));
                    }
                    locked = lock_within(&self.data, patience) => locked,
                };
                match locked {
                    Ok(lock) => *own = Some(lock),
                    Err(error) => return Ok(End::Lost(error.context(REPLACED))),
                }
            }
            let resumed = match Successors::listen(&self.data) {
                Ok(successors) => off.take_up().await.map(|duties| (duties, successors)),
                Err(error) => Err(error),
            };
            match resumed {
                Ok((duties, successors)) => {
                    self.duties = duties;
                    self.successors = successors;
                }
                Err(error) => return Ok(End::Lost(error.context(REPLACED))),
            }
            answer(pages);
            tracing::info!("this agent has its place back");
        }
    }
}

/// The next agent, when it has an identity; nothing if this one is to stop. Until then it only answers probes.
async fn next_to_take(
    stop: &CancellationToken,
    successors: &mut Successors,
    pages: &mut Pages,
) -> Option<Successor> {
    loop {
        let mut successor = tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            successor = successors.next() => successor,
        };
        pages.close();
        let outcome = match successor.pass_metrics(pages.listener()) {
            Ok(()) => tokio::select! {
                biased;
                taking = successor.wants_to_take() => taking,
                () = stop.cancelled() => return None,
            },
            Err(error) => Err(error),
        };
        let Err(error) = outcome else { return Some(successor) };
        let error = format!("{error:#}");
        tracing::info!(error, "an agent that was to take this one's place did not");
        answer(pages);
    }
}

/// Answers probes again.
fn answer(pages: &mut Pages) {
    if let Err(error) = pages.open() {
        tracing::error!(error = format!("{error:#}"), "metrics are not served");
    }
}

/// Passes on what the next agent needs, and waits until it has taken it up: not for long if this one is to
/// stop. The listeners stay with this one as well.
async fn hand_over(
    successor: &mut Successor,
    captured: &Captured,
    inherited: &Inherited,
    own: &mut Option<Lock>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let mut listeners = captured.listeners().context("share the listeners")?;
    listeners.extend(inherited.share().context("share the listeners of the agent before")?);
    tokio::task::block_in_place(|| {
        successor.pass_listeners(&listeners)?;
        drop(own.take());
        successor.end()
    })?;
    let late = async {
        stop.cancelled().await;
        tokio::time::sleep(READY_PATIENCE).await;
    };
    tokio::select! {
        biased;
        ready = successor.is_ready() => ready?,
        () = late => tracing::warn!("stopping before the next agent has taken up its workloads"),
    }
    inherited.close();
    Ok(())
}

/// Where the next agent comes.
pub(crate) struct Successors {
    listener: UnixListener,
    _socket: Socket,
}

/// The socket's file, which goes when its agent does, if it is still that agent's.
struct Socket {
    data: PathBuf,
    inode: Option<u64>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        let path = self.data.join(SOCKET);
        if self.inode.is_some() && inode(&path) == self.inode {
            // A file that stays leads to nobody, which the next agent sees.
            drop(std::fs::remove_file(path));
        }
    }
}

fn inode(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    std::fs::symlink_metadata(path).ok().map(|found| found.ino())
}

impl Successors {
    /// Listens in the folder, in place of whoever did before.
    ///
    /// # Errors
    /// If the system refuses it.
    pub(crate) fn listen(data: &Path) -> anyhow::Result<Self> {
        let path = data.join(SOCKET);
        let listen = || {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            in_folder(data, |path| UnixListener::bind(path))
        };
        let listener = listen().with_context(|| format!("listen on {}", path.display()))?;
        let socket = Socket { data: data.to_owned(), inode: inode(&path) };
        Ok(Self { listener, _socket: socket })
    }

    /// The next agent, when it comes.
    async fn next(&mut self) -> Successor {
        loop {
            match self.accept().await {
                Ok(stream) => return Successor::new(stream),
                Err(error) => {
                    tracing::warn!(%error, "another agent was not let in");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                }
            }
        }
    }

    /// Descriptors come and go with plain blocking calls.
    async fn accept(&self) -> std::io::Result<UnixStream> {
        let stream = self.listener.accept().await?.0.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }
}

/// The next agent, as its predecessor sees it.
pub(crate) struct Successor {
    stream: UnixStream,
    words: mpsc::Receiver<String>,
}

impl Successor {
    fn new(stream: UnixStream) -> Self {
        let (sender, words) = mpsc::channel(1);
        if let Ok(reading) = stream.try_clone() {
            let reader = move || {
                let mut link = Receiver::new(reading);
                while let Ok(Some(word)) = link.line() {
                    if sender.blocking_send(word).is_err() {
                        return;
                    }
                }
            };
            // Without a reader there are no words, which is as if it were gone.
            drop(std::thread::Builder::new().name("successor".to_owned()).spawn(reader));
        }
        Self { stream, words }
    }

    /// Lets it answer probes.
    ///
    /// # Errors
    /// If it is gone.
    fn pass_metrics(&self, listener: &TcpListener) -> anyhow::Result<()> {
        // One that stops reading must not hold this one up.
        self.stream.set_write_timeout(Some(PATIENCE))?;
        let line = serde_json::to_string(&Passed::Metrics { version: VERSION })?;
        Ok(pass::send(&self.stream, &line, Some(listener.as_fd()))?)
    }

    /// Done when it wants to take this agent's place. It says now and then that it waits for an identity.
    ///
    /// # Errors
    /// If it is gone, or silent for too long.
    async fn wants_to_take(&mut self) -> anyhow::Result<()> {
        loop {
            match tokio::time::timeout(TAKE_PATIENCE, self.words.recv()).await {
                Err(_) => bail!("it has said nothing for {TAKE_PATIENCE:?}"),
                Ok(Some(word)) if word == WAIT => {}
                Ok(word) => return Self::demand(word, TAKE),
            }
        }
    }

    /// Done when it has taken up its workloads.
    ///
    /// # Errors
    /// If it is gone.
    async fn is_ready(&mut self) -> anyhow::Result<()> {
        let word = self.words.recv().await;
        Self::demand(word, READY)
    }

    /// Waits to be stopped. Whoever started this agent decides when it ends: one that ended by itself would be
    /// started again.
    ///
    /// # Errors
    /// If the next one is gone before that. Nobody takes connections then, since this one has closed its
    /// listeners and has let go of its workloads: it has to be started anew.
    pub(crate) async fn outlive(mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let gone = async { while self.words.recv().await.is_some() {} };
        tokio::select! {
            biased;
            () = stop.cancelled() => Ok(()),
            () = gone => bail!(REPLACED),
        }
    }

    fn demand(word: Option<String>, wanted: &str) -> anyhow::Result<()> {
        match word {
            Some(word) if word == wanted => Ok(()),
            Some(word) => bail!("the next agent says {word:?}"),
            None => bail!("the next agent is gone"),
        }
    }

    /// Passes the listeners on. Blocks.
    ///
    /// # Errors
    /// If it is gone.
    fn pass_listeners(&self, listeners: &[(Seat, OwnedFd)]) -> anyhow::Result<()> {
        for (seat, listener) in listeners {
            let line = serde_json::to_string(&Passed::Listener(seat.clone()))?;
            pass::send(&self.stream, &line, Some(listener.as_fd()))?;
        }
        Ok(())
    }

    /// All is passed on, and the folder is free.
    ///
    /// # Errors
    /// If it is gone.
    fn end(&self) -> anyhow::Result<()> {
        Ok(pass::send(&self.stream, END, None)?)
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        // Its reader has the stream, too, and would keep it open. It may be closed already.
        drop(self.stream.shutdown(Shutdown::Both));
    }
}
