//! The crate's error: which operation the kernel refused, and its answer as the source.

use std::{io, path::PathBuf};

use netlink_socket2::ReplyError;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. The text names the operation, the source carries the kernel's answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("{operation} failed")]
    System {
        /// What was attempted.
        operation: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("{operation} failed")]
    Netlink {
        /// What was attempted.
        operation: String,
        /// The kernel's answer, with its extended text.
        #[source]
        source: ReplyError,
    },
    /// The file is not a network namespace.
    #[error("{} is not a network namespace", path.display())]
    NotANetworkNamespace {
        /// The file.
        path: PathBuf,
    },
    /// A name that cannot be an interface's.
    #[error("{name:?} is not a valid interface name")]
    InvalidInterfaceName {
        /// The name given.
        name: String,
    },
    /// The thread inside the namespace has ended.
    #[error("the namespace thread {name} has ended")]
    WorkerEnded {
        /// The thread's name.
        name: String,
    },
    /// The closure given to a namespace thread panicked.
    #[error("a task panicked in the namespace thread {name}")]
    TaskPanicked {
        /// The thread's name.
        name: String,
    },
    /// The rules asked for contradict themselves.
    #[error("capture rules refused: {reason}")]
    InvalidRules {
        /// The contradiction, with the values concerned.
        reason: String,
    },
    /// No cgroup2 hierarchy is mounted.
    #[error("no cgroup2 hierarchy is mounted at any of {looked_at}")]
    NoCgroup2 {
        /// The folders tried.
        looked_at: String,
    },
    /// The cgroup named by a workload is missing.
    #[error("the cgroup {} does not exist", path.display())]
    NoSuchCgroup {
        /// The folder looked for.
        path: PathBuf,
    },
}

impl Error {
    /// The kernel's error number, where it gave one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Error::System { source, .. } => source.raw_os_error(),
            Error::Netlink { source, .. } => source.as_io_error().raw_os_error(),
            Error::NotANetworkNamespace { .. }
            | Error::InvalidInterfaceName { .. }
            | Error::WorkerEnded { .. }
            | Error::TaskPanicked { .. }
            | Error::InvalidRules { .. }
            | Error::NoCgroup2 { .. }
            | Error::NoSuchCgroup { .. } => None,
        }
    }
}

/// Names the operation of a failed system call.
pub(crate) trait Context<T> {
    fn context(self, operation: impl Into<String>) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, operation: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::System { operation: operation.into(), source })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, operation: impl Into<String>) -> Result<T> {
        self.map_err(io::Error::from).context(operation)
    }
}

impl<T> Context<T> for std::result::Result<T, ReplyError> {
    fn context(self, operation: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Netlink { operation: operation.into(), source })
    }
}

/// Turns the one expected refusal (it is there already, it is gone already) into success.
pub(crate) fn accept(result: Result<()>, expected: &[i32]) -> Result<()> {
    match result {
        Err(error) if error.raw_os_error().is_some_and(|code| expected.contains(&code)) => Ok(()),
        other => other,
    }
}
