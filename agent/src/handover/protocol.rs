//! What the two agents say to each other: lines of JSON and words, some with a listener.

use std::{
    net::SocketAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// The socket's name in the data folder.
pub(super) const SOCKET: &str = "handover.sock";

/// What is said may change with it. Two that do not understand each other do not try.
pub(super) const VERSION: u32 = 1;

/// The next one's words.
pub(super) const TAKE: &str = "take";
/// It has no identity yet, and is still there.
pub(super) const WAIT: &str = "wait";
pub(super) const READY: &str = "ready";

/// The predecessor's last word.
pub(super) const END: &str = "end";

/// How long the predecessor may take to stop what it does and pass its listeners on.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

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

/// What the predecessor says, each with a listener.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Passed {
    Metrics { version: u32 },
    Listener(Seat),
}

pub(super) fn is_hello(line: &str) -> bool {
    matches!(serde_json::from_str(line), Ok(Passed::Metrics { version: VERSION }))
}

/// Does something with the socket's path, by way of the open folder: a socket's path may be 107 bytes long,
/// and a folder's 4,095.
pub(super) fn in_folder<T>(
    data: &Path,
    act: impl FnOnce(&Path) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let folder = std::fs::File::open(data)?;
    act(&PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd())))
}
