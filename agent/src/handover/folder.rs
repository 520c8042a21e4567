//! The lock of the data folder: whoever has it may write there, and changes the rules.

use std::{path::Path, time::Duration};

use anyhow::Context;

/// How often it is tried whether the data folder is free.
pub(super) const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Whoever has it, has the data folder.
pub(crate) type Lock = nix::fcntl::Flock<std::fs::File>;

/// Two agents on one data folder would fight over rules and certificates.
///
/// # Errors
/// If another agent has it.
pub(super) fn lock(data: &Path) -> anyhow::Result<Lock> {
    let path = data.join("lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(
        |(_, error)| {
            anyhow::anyhow!(
                "another agent uses {} ({error}); stop it first, or give --take-over",
                data.display()
            )
        },
    )
}

/// Whether another agent has the data folder.
pub(crate) fn is_taken(data: &Path) -> bool {
    data.join("lock").exists() && lock(data).is_err()
}

/// Waits for the lock, but not longer than this.
///
/// # Errors
/// If another agent still has it then.
pub(super) async fn lock_within(data: &Path, patience: Duration) -> anyhow::Result<Lock> {
    let free = async {
        loop {
            if let Ok(own) = lock(data) {
                return own;
            }
            tokio::time::sleep(LOCK_RETRY).await;
        }
    };
    match tokio::time::timeout(patience, free).await {
        Ok(own) => Ok(own),
        // Once more, to say what stands in the way.
        Err(_) => lock(data),
    }
}
