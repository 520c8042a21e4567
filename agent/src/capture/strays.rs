//! Network namespaces that have rules of ours and are no workload's.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use hauberk_linux::{Netns, capture};

/// One of them.
pub(super) struct Stray {
    pub(super) path: PathBuf,
    netns: Netns,
}

impl Stray {
    /// Gives it its plain network back.
    pub(super) fn release(&self) {
        match self.netns.run(capture::remove).and_then(|result| result) {
            Ok(()) => tracing::info!(
                namespace = %self.path.display(),
                "it was captured for a workload that is gone, and is free now"
            ),
            Err(error) => tracing::warn!(
                %error, namespace = %self.path.display(),
                "the capture rules of a workload that is gone could not be removed"
            ),
        }
    }
}

/// Those in a folder of named namespaces that this node has captured, but for the known ones and the agent's own. Asks the
/// kernel, and waits for its answers.
pub(super) fn find(node: &str, folder: &Path, known: &HashSet<u64>) -> Vec<Stray> {
    // The host's may have a name there, too; what is captured of it is looked after elsewhere.
    let Ok(host) = Netns::current() else { return Vec::new() };
    // Without such a folder there is none.
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let strays = entries.filter_map(|entry| {
        let path = entry.path();
        // It may be gone already, or be no namespace.
        let netns = Netns::open(&path).ok()?;
        if netns == host || known.contains(&netns.inode()) {
            return None;
        }
        let ours = netns.run(|| capture::is_owned_by(node)).and_then(|result| result).ok()?;
        ours.then_some(Stray { path, netns })
    });
    strays.collect()
}

/// The same for the host, of which no process is a workload.
pub(super) fn release_host(node: &str) {
    let removed = capture::is_owned_by(node)
        .and_then(|ours| if ours { capture::remove().map(|()| true) } else { Ok(false) });
    match removed {
        Ok(false) => {}
        Ok(true) => {
            tracing::info!("the host was captured for workloads that are gone, and is free now")
        }
        Err(error) => {
            tracing::warn!(%error, "the host's capture rules could not be looked at or removed");
        }
    }
}
