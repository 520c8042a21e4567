//! The side of the agent that runs: it waits for the next one, and hands over to it.

use std::{
    net::TcpListener,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::pass::{self, Receiver};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{
    Inherited, Lock,
    protocol::{END, PATIENCE, Passed, READY, SOCKET, Seat, TAKE, VERSION, in_folder},
};
use crate::{capture::Captured, pages::Pages};

/// The pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How long the next agent may take until it has an identity. After that this one answers probes itself again.
const TAKE_PATIENCE: Duration = Duration::from_secs(120);

/// How long an agent that is told to stop goes on taking connections for the next one, which has not taken up
/// its workloads yet.
const READY_PATIENCE: Duration = Duration::from_secs(5);

/// Until it is to stop, or another agent is to take its place.
pub(crate) async fn wait(
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
                () = tokio::time::sleep(TAKE_PATIENCE) => {
                    Err(anyhow::anyhow!("it has said nothing for {TAKE_PATIENCE:?}"))
                }
            },
            Err(error) => Err(error),
        };
        match outcome {
            Ok(()) => return Some(successor),
            Err(error) => {
                let error = format!("{error:#}");
                tracing::info!(error, "an agent that was to take this one's place did not");
                if let Err(error) = pages.open() {
                    tracing::error!(error = format!("{error:#}"), "metrics are not served");
                }
            }
        }
    }
}

/// Passes on what the next agent needs, and waits until it has taken it up: not for long if this one is to
/// stop.
pub(crate) async fn hand_over(
    mut successor: Successor,
    captured: &Captured,
    inherited: &Inherited,
    own: Lock,
    stop: &CancellationToken,
) -> anyhow::Result<Successor> {
    let mut listeners = captured.listeners().context("share the listeners")?;
    listeners.extend(inherited.rest());
    tokio::task::block_in_place(|| {
        successor.pass_listeners(&listeners)?;
        drop(own);
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
    Ok(successor)
}

/// Where the next agent comes.
pub(crate) struct Successors {
    arrivals: mpsc::Receiver<UnixStream>,
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
        let (sender, arrivals) = mpsc::channel(1);
        // A thread of its own: descriptors come with plain blocking calls, and it happens once.
        std::thread::Builder::new()
            .name("handover".to_owned())
            .spawn(move || {
                loop {
                    match listener.accept() {
                        Ok((stream, _)) => {
                            // Nobody is let in any more: whoever comes sees the end.
                            if sender.blocking_send(stream).is_err() {
                                return;
                            }
                        }
                        Err(error) => {
                            tracing::warn!(%error, "another agent was not let in");
                            std::thread::sleep(ACCEPT_RETRY);
                        }
                    }
                }
            })
            .context("start a thread")?;
        Ok(Self { arrivals, _socket: socket })
    }

    /// The next agent, when it comes.
    pub(crate) async fn next(&mut self) -> Successor {
        match self.arrivals.recv().await {
            Some(stream) => Successor::new(stream),
            // There is no thread: nobody will come.
            None => std::future::pending().await,
        }
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
    pub(crate) fn pass_metrics(&self, listener: &TcpListener) -> anyhow::Result<()> {
        // One that stops reading must not hold this one up.
        self.stream.set_write_timeout(Some(PATIENCE))?;
        let line = serde_json::to_string(&Passed::Metrics { version: VERSION })?;
        Ok(pass::send(&self.stream, &line, Some(listener.as_fd()))?)
    }

    /// Done when it wants to take this agent's place.
    ///
    /// # Errors
    /// If it is gone.
    pub(crate) async fn wants_to_take(&mut self) -> anyhow::Result<()> {
        self.says(TAKE).await
    }

    /// Done when it has taken up its workloads.
    ///
    /// # Errors
    /// If it is gone.
    pub(crate) async fn is_ready(&mut self) -> anyhow::Result<()> {
        self.says(READY).await
    }

    /// Done when it is gone. Before it wanted anything, this agent just goes on. After that the folder is no
    /// longer this agent's, nobody keeps the rules up, and, once the next one was ready, nobody takes connections:
    /// this agent ends with an error, and whoever runs it starts it anew.
    pub(crate) async fn gone(&mut self) {
        while self.words.recv().await.is_some() {}
    }

    async fn says(&mut self, wanted: &str) -> anyhow::Result<()> {
        match self.words.recv().await {
            Some(word) if word == wanted => Ok(()),
            Some(word) => bail!("the next agent says {word:?}"),
            None => bail!("the next agent is gone"),
        }
    }

    /// Passes the listeners on. Blocks.
    ///
    /// # Errors
    /// If it is gone.
    pub(crate) fn pass_listeners(&self, listeners: &[(Seat, OwnedFd)]) -> anyhow::Result<()> {
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
    pub(crate) fn end(&self) -> anyhow::Result<()> {
        Ok(pass::send(&self.stream, END, None)?)
    }
}
