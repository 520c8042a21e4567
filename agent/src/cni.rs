//! The agent's end of the CNI plugin: no pod of the mesh starts before it is captured.
//!
//! `install.rs` puts the plugin and its entry in the node's network configuration in place, `keep.rs` keeps both there.
//! `namespaces.rs` leaves word for the plugin, for when no agent answers it.

mod install;
mod keep;
mod namespaces;

use std::{
    collections::HashMap,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use hauberk_cni::{Answer, Question};
use hauberk_core::policy::ProcessSelector;
use hauberk_linux::Netns;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Notify, watch},
};

pub(crate) use install::{Installation, uninstall};
pub(crate) use keep::Keeper;
pub(crate) use namespaces::{leave_word, path as namespaces_file};

use crate::{capture::StatusBoard, handover::Replaced, policy::Snapshot};

/// How long a pod's start waits for its capture. The plugin waits a little longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it is looked whether the pod is captured.
const LOOK: Duration = Duration::from_millis(20);

/// The longest question.
const MAX_QUESTION: u64 = 64 * 1024;

/// Network namespaces of pods that are starting, which the container runtime does not list yet.
#[derive(Clone, Default)]
pub(crate) struct Starting(Arc<State>);

#[derive(Default)]
struct State {
    /// By the pod's UID.
    namespaces: Mutex<HashMap<String, PathBuf>>,
    news: Notify,
}

impl Starting {
    /// Where a starting pod's namespace is.
    pub(crate) fn path(&self, uid: &str) -> Option<PathBuf> {
        self.lock().get(uid).cloned()
    }

    /// Done when there is another one.
    pub(crate) async fn news(&self) {
        self.0.news.notified().await;
    }

    fn add(&self, uid: &str, path: PathBuf) -> Started<'_> {
        self.lock().insert(uid.to_owned(), path);
        self.0.news.notify_one();
        Started { starting: self, uid: uid.to_owned() }
    }

    /// Plain data: a panic elsewhere leaves nothing half-changed in it.
    fn lock(&self) -> MutexGuard<'_, HashMap<String, PathBuf>> {
        self.0.namespaces.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Known as starting for as long as it lives; from then on the runtime knows it.
struct Started<'a> {
    starting: &'a Starting,
    uid: String,
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        self.starting.lock().remove(&self.uid);
    }
}

/// Answers the plugin.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) node: String,
    pub(crate) netns_dir: PathBuf,
    pub(crate) board: StatusBoard,
    pub(crate) starting: Starting,
    pub(crate) snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Another agent captures meanwhile.
    pub(crate) replaced: Replaced,
}

/// Listens where only root may connect.
pub(crate) fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    let listen = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        // In place of another agent's at once: no pod that starts finds nobody there.
        let new = path.with_extension("new");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&new)?;
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&new, path)?;
        Ok(listener)
    };
    listen().with_context(|| format!("listen for the CNI plugin on {}", path.display()))
}

impl Server {
    /// Runs until it is dropped.
    pub(crate) async fn run(self, listener: UnixListener) {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let server = self.clone();
                    tokio::spawn(async move {
                        if let Err(error) = server.serve(stream).await {
                            tracing::debug!(%error, "the CNI plugin went away");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a call of the CNI plugin was not accepted");
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    async fn serve(&self, stream: UnixStream) -> std::io::Result<()> {
        let (read, mut write) = stream.into_split();
        let mut line = String::new();
        BufReader::new(read.take(MAX_QUESTION)).read_line(&mut line).await?;
        let answer = match serde_json::from_str::<Question>(&line) {
            Ok(question) => {
                let answer = self.answer(&question).await;
                tracing::info!(
                    namespace = question.namespace,
                    pod = question.name,
                    uid = question.uid,
                    ?answer,
                    "a pod starts"
                );
                answer
            }
            Err(error) => Answer::Refused { reason: format!("the question is none: {error}") },
        };
        let mut line = serde_json::to_vec(&answer)?;
        line.push(b'\n');
        write.write_all(&line).await
    }

    async fn answer(&self, question: &Question) -> Answer {
        let path = match crate::capture::netns_file(&question.netns) {
            Ok(name) => self.netns_dir.join(name),
            Err(error) => return Answer::Refused { reason: format!("{error:#}") },
        };
        let netns = match Netns::open(&path) {
            Ok(netns) => netns.inode(),
            Err(error) => return Answer::Refused { reason: error.to_string() },
        };
        let _started = self.starting.add(&question.uid, path);
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let problem = match self.look(question, netns) {
                Ok(answer) => return answer,
                Err(problem) => problem,
            };
            if self.replaced.is_set() {
                let reason = "another agent takes this one's place; ask again".to_owned();
                return Answer::Refused { reason };
            }
            if tokio::time::Instant::now() >= deadline {
                return Answer::Refused { reason: problem };
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What stands in the way, or that nothing does.
    fn look(&self, question: &Question, netns: u64) -> Result<Answer, String> {
        let snapshot = self.snapshots.borrow().clone();
        match snapshot.is_enrolled(&question.namespace) {
            None if snapshot.revision == 0 => return Err("it has no policy yet".to_owned()),
            None => {
                return Err(format!("it does not know namespace {} yet", question.namespace));
            }
            Some(false) => return Ok(Answer::Outside),
            Some(true) => {}
        }
        let is_it = |process: &ProcessSelector| matches!(process, ProcessSelector::Pod { uid, .. } if *uid == question.uid);
        let pod = snapshot.on_node(&self.node).find(|workload| is_it(&workload.process));
        let Some(pod) = pod else {
            return Err("the control plane has not told it of this pod yet".to_owned());
        };
        // A sandbox that was made anew has another namespace than the one before.
        self.board.has_captured(&pod.key(), netns).map(|()| Answer::Captured)
    }
}
