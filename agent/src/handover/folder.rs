//! The lock of the data folder: whoever has it may write there, and changes the rules.

use std::{path::Path, time::Duration};

use anyhow::Context;
use tokio_util::sync::CancellationToken;

/// How often it is tried whether the data folder is free.
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Whoever has it, has the data folder.
pub(crate) type Lock = nix::fcntl::Flock<std::fs::File>;

/// Waits until the data folder is free, if this agent is to take the place of the one that has it; nothing if
/// it is to stop.
pub(crate) async fn lock_folder(
    data: &Path,
    take_over: bool,
    stop: &CancellationToken,
) -> anyhow::Result<Option<Lock>> {
    let mut told = false;
    loop {
        match lock(data) {
            Ok(own) => return Ok(Some(own)),
            Err(error) if !take_over => return Err(error),
            Err(error) if !told => {
                told = true;
                tracing::info!(error = format!("{error:#}"), "waiting for the agent before to end");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = stop.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOCK_RETRY) => {}
        }
    }
}

/// Two agents on one data folder would fight over rules and certificates.
fn lock(data: &Path) -> anyhow::Result<Lock> {
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
