//! One agent takes the place of another on the same data folder, and no connection fails for it.
//!
//! The next agent connects to the socket in the data folder of the one that runs, its predecessor, and gets
//! the metrics' listener at once, so that probes ask the one that starts. When it has an identity it says
//! [`TAKE`]: the predecessor stops changing rules and files, passes its listeners on, lets go of the
//! folder, and says [`END`]. Both take connections from the same listeners then, until the next one has taken up its
//! workloads and says [`READY`]: from there on the predecessor only carries what it has, for as long as its drain
//! lasts. What happens when one of them dies in between is said at [`Successor::gone`].
//!
//! The folder is its owner's alone, and so is the socket.

use std::{
    collections::HashMap,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::pass::{self, Receiver};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// The socket's name in the data folder.
const SOCKET: &str = "handover.sock";

/// What is said may change with it. Two that do not understand each other do not try.
const VERSION: u32 = 1;

/// The next one's words.
const TAKE: &str = "take";
const READY: &str = "ready";

/// The predecessor's last word.
const END: &str = "end";

/// The pause after a failed accept, so that being out of descriptors does not spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How long the predecessor may take to stop what it does and pass its listeners on.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which listener: in which network namespace, for whom, at which address.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seat {
    /// The namespace's inode; none is the agent's own.
    pub(crate) namespace: Option<u64>,
    /// The workload whose outgoing connections arrive there, where the port alone tells it.
    pub(crate) workload: Option<String>,
    /// With port 0 if the kernel chose it.
    pub(crate) address: SocketAddr,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Passed {
    Metrics { version: u32 },
    Listener(Seat),
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

fn is_hello(line: &str) -> bool {
    matches!(serde_json::from_str(line), Ok(Passed::Metrics { version: VERSION }))
}

/// Does something with the socket's path, by way of the open folder: a socket's path may be 107 bytes long,
/// and a folder's 4,095.
fn in_folder<T>(data: &Path, act: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    let folder = std::fs::File::open(data)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd())))
}
