//! Leaves word of the cluster's namespaces for the plugin, which goes by it while no agent answers.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hauberk_cni::Namespaces;
use tokio::{sync::watch, task::spawn_blocking, time::timeout};

use crate::policy::Snapshot;

/// How often there is a sign of life, where nothing changes.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);

/// Its name in the data folder, which the host has at the same path.
const FILE: &str = "namespaces.json";

/// Where it is.
pub(crate) fn path(data: &Path) -> PathBuf {
    data.join(FILE)
}

/// Writes it again and again, until this is dropped. What cannot be kept up to date is taken away: by an old word, pods would
/// start that must not.
pub(crate) async fn leave_word(path: PathBuf, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
    let mut told: Option<(BTreeSet<String>, BTreeSet<String>)> = None;
    let mut has_failed = false;
    drop(Namespaces::clean(&path));
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let known = snapshot.namespaces();
        let is_due = told.as_ref() != Some(&known);
        if snapshot.revision > 0 && is_due {
            let (to, (mesh, outside)) = (path.clone(), known.clone());
            let written = spawn_blocking(move || Namespaces::new(mesh, outside)?.write(&to)).await;
            match written.map_err(Into::into).and_then(|written| written) {
                Ok(()) => (told, has_failed) = (Some(known), false),
                // Another agent that begins has taken it for what a dead one left.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let removed = Namespaces::remove(&path);
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(
                            %error,
                            path = %path.display(),
                            is_removed = removed.is_ok(),
                            "no word can be left for the CNI plugin: without an agent, no pod starts"
                        );
                    }
                }
            }
        } else if snapshot.revision == 0
            && let Err(error) = Namespaces::remove(&path)
        {
            tracing::warn!(%error, path = %path.display(), "an old word stays for the CNI plugin");
        }
        match timeout(SIGN_OF_LIFE, snapshots.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => told = None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use std::collections::BTreeMap;

    use hauberk_cni::Standing;
    use hauberk_proto::{state::state_hash, v1};

    use super::*;

    fn snapshot(revision: u64, namespaces: &[(&str, bool)]) -> Arc<Snapshot> {
        let resources: BTreeMap<_, _> = namespaces
            .iter()
            .map(|&(name, enrolled)| {
                let namespace = v1::Namespace { name: name.to_owned(), enrolled };
                let kind = v1::resource::Kind::Namespace(namespace);
                (format!("namespace:{name}"), v1::Resource { kind: Some(kind) })
            })
            .collect();
        let hash = state_hash(&resources);
        Arc::new(Snapshot::build("node-a", revision, resources, &hash).unwrap())
    }

    #[tokio::test]
    async fn the_plugin_finds_what_the_agent_knew_last() {
        let folder = tempfile::tempdir().unwrap();
        let path = path(folder.path());
        std::fs::write(&path, "an old word").unwrap();
        let (sender, snapshots) = watch::channel(Arc::new(Snapshot::default()));
        let writing = tokio::spawn(leave_word(path.clone(), snapshots));
        let standing = |name: &'static str| {
            let path = path.clone();
            async move {
                for _ in 0..500 {
                    match Namespaces::read(&path).and_then(|known| known.standing(name)) {
                        Ok(standing @ (Standing::Mesh | Standing::Outside)) => return standing,
                        Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                    }
                }
                panic!("nothing is known of {name}");
            }
        };
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!path.exists(), "without any state nothing is known");
        sender.send_replace(snapshot(1, &[("shop", true), ("other", false)]));
        assert_eq!(standing("shop").await, Standing::Mesh);
        assert_eq!(standing("other").await, Standing::Outside);
        sender.send_replace(snapshot(2, &[("shop", true), ("other", true), ("new", false)]));
        assert_eq!(standing("new").await, Standing::Outside);
        assert_eq!(standing("other").await, Standing::Mesh);
        writing.abort();
    }
}
