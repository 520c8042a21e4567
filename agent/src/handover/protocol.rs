//! What the two agents say to each other: lines of JSON and words, some with a listener.

use std::{
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// The socket's name in the data folder.
pub(super) const SOCKET: &str = "handover.sock";

/// What is said may change with it. Two that do not understand each other do not try.
pub(super) const VERSION: u32 = 3;

/// The next one's words.
pub(super) const TAKE: &str = "take";
/// It has no identity yet, and is still there.
pub(super) const WAIT: &str = "wait";
pub(super) const READY: &str = "ready";

/// The predecessor's last word.
pub(super) const END: &str = "end";

/// How long the predecessor may take to stop what it does and pass its listeners on.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// Which listener: in which network namespace, what for, of which family.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Seat {
    /// The namespace's inode; none is the agent's own.
    pub(crate) namespace: Option<u64>,
    pub(crate) role: Role,
    /// Of IPv6, rather than IPv4.
    pub(crate) v6: bool,
}

/// What arrives at a listener, or another socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Role {
    /// What a workload sends: of a host's workloads this one, of a namespace's its only one.
    Outbound(Option<String>),
    /// What is held for that: no listener, but the socket by which the kernel tells of it.
    Held(Option<String>),
    /// What was held and is let go. Never handed over: whoever held it gets it.
    Arrivals,
    /// What comes in without the mesh.
    Plaintext,
    /// Other agents.
    Mesh,
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
