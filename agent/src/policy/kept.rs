//! The last good state on disk, and whose it is: an agent that has nothing else knows by it which node it is on, and
//! what to close there.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::Context;
use hauberk_core::identity::TrustDomain;
use hauberk_proto::{convert::Resource, state::delta, v1};
use hauberk_tls::files::{read_private, write_private};
use prost::Message;

use super::Snapshot;

/// Whose state it is.
#[derive(Debug, Clone)]
pub(crate) struct Owner {
    pub(crate) node: String,
    pub(crate) trust_domain: TrustDomain,
}

/// What is in the file.
#[derive(Clone, PartialEq, Message)]
struct File {
    #[prost(string, tag = "1")]
    node: String,
    #[prost(string, tag = "2")]
    trust_domain: String,
    /// The whole state.
    #[prost(message, optional, tag = "3")]
    state: Option<v1::StateUpdate>,
}

/// Where the data folder has it.
pub(super) fn path(data: &Path) -> PathBuf {
    data.join("state.bin")
}

/// When it was written.
pub(super) fn written(path: &Path) -> SystemTime {
    let modified = std::fs::metadata(path).and_then(|file| file.modified());
    modified.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The state, as `node` sees it or else the node that it was kept for; none if there is no file.
///
/// # Errors
/// If the file is not as it was written.
pub(super) fn load(path: &Path, node: Option<&str>) -> anyhow::Result<Option<(Owner, Snapshot)>> {
    let Some(bytes) = read_private(path)? else { return Ok(None) };
    let damaged = || format!("{} is damaged", path.display());
    let file = File::decode(bytes.as_slice()).with_context(damaged)?;
    let owner =
        Owner { node: file.node, trust_domain: file.trust_domain.parse().with_context(damaged)? };
    let update = file.state.context("it has no state").with_context(damaged)?;
    let mut resources = BTreeMap::new();
    for message in update.upserts {
        let key = Resource::try_from(message.clone()).with_context(damaged)?.key();
        resources.insert(key, message);
    }
    let node = node.unwrap_or(&owner.node);
    let snapshot = Snapshot::build(node, update.revision, resources, &update.state_hash)
        .with_context(damaged)?;
    Ok(Some((owner, snapshot.of_epoch(update.epoch))))
}

/// Whose state the data folder has, if it is good.
///
/// # Errors
/// As [`load`].
pub(crate) fn owner(data: &Path) -> anyhow::Result<Option<Owner>> {
    Ok(load(&path(data), None)?.map(|(owner, _)| owner))
}

/// The state of a data folder, and whose it is; none if there is no file.
///
/// # Errors
/// As [`load`].
pub(crate) fn state(data: &Path) -> anyhow::Result<Option<(Owner, Snapshot)>> {
    load(&path(data), None)
}

/// Forgets it: it is of another installation.
///
/// # Errors
/// If the file cannot be removed.
pub(crate) fn forget(data: &Path) -> anyhow::Result<()> {
    let path = path(data);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Writes a state for a restart.
///
/// # Errors
/// If the disk does not take it.
pub(super) fn save(path: &Path, owner: &Owner, snapshot: &Snapshot) -> anyhow::Result<()> {
    let (upserts, _) = delta(&BTreeMap::new(), &snapshot.resources);
    let file = File {
        node: owner.node.clone(),
        trust_domain: owner.trust_domain.to_string(),
        state: Some(v1::StateUpdate {
            revision: snapshot.revision,
            full: true,
            upserts,
            removals: Vec::new(),
            state_hash: snapshot.state_hash.to_vec(),
            made_at_unix_ms: 0,
            epoch: snapshot.epoch,
        }),
    };
    Ok(write_private(path, &file.encode_to_vec())?)
}
