//! The embedded store: join tokens, nodes, the last good manifests and the last revision. One file,
//! transactions synced to disk before anything is answered.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use hauberk_tls::files::FileError;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

/// SHA-256 of the secret → [`Token`], JSON.
const TOKENS: TableDefinition<'_, &[u8], &[u8]> = TableDefinition::new("tokens");
/// Node name → [`Node`], JSON.
const NODES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("nodes");
/// File name → text of the last manifests that were accepted whole.
const MANIFESTS: TableDefinition<'_, &str, &str> = TableDefinition::new("manifests");
/// `trust_domain`, and `revision` as [`Revision`], JSON.
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");

/// The store could not be used. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("open the store {0}; if it is damaged, stop, move it away and restore a backup")]
    Open(String, #[source] Box<redb::Error>),
    #[error("use the store")]
    Use(#[source] Box<redb::Error>),
    #[error("a record of the store is damaged: {0}")]
    Damaged(&'static str, #[source] serde_json::Error),
    #[error(transparent)]
    File(#[from] FileError),
}

/// redb has an error type for each step; to us they are one.
macro_rules! from_redb {
    ($($error:ty),+) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Use(Box::new(error.into()))
            }
        }
    )+};
}

from_redb!(redb::TransactionError, redb::TableError, redb::StorageError, redb::CommitError);

/// A join token that has not been used.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Token {
    pub(crate) node: String,
    pub(crate) expires_unix_ms: i64,
}

/// A machine that has joined.
///
/// Serials are kept in two phases: after a renewal both the old and the new certificate are good
/// until the new one is first used, so that a crash in between loses nobody; from then on the old
/// one is not, so that a copy of it shows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Node {
    pub(crate) current_serial: String,
    pub(crate) next_serial: Option<String>,
    pub(crate) not_after_unix_ms: i64,
    pub(crate) joined_unix_ms: i64,
}

/// The last published state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revision {
    pub(crate) number: u64,
    pub(crate) state_hash: String,
}

/// What became of a join token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Consumed {
    /// It was good, and is used up now. Holds the node it is for.
    Good(String),
    /// It was good once.
    Expired,
    /// It never was, or was used before.
    Unknown,
}

/// Whether a node certificate is one that the node may use.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SerialCheck {
    Good,
    Superseded,
    UnknownNode,
}

pub(crate) struct Store {
    path: PathBuf,
    /// `None` while it could not be opened again after a failure of the disk.
    database: RwLock<Option<Database>>,
}

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        // Demands a private file if there is one.
        drop(hauberk_tls::files::read_private(path)?);
        let database = open_database(path)?;
        Ok(Self { path: path.to_owned(), database: RwLock::new(Some(database)) })
    }

    /// Does some work on the database. After a failure of the disk, a full one for one, redb refuses
    /// everything until it is opened anew: that is done here, so that the control plane heals by
    /// itself as soon as the disk does.
    fn attempt<T>(
        &self,
        work: impl Fn(&Database) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if let Some(database) = &*self.database.read().unwrap_or_else(PoisonError::into_inner) {
            match work(database) {
                Err(StoreError::Use(error)) if matches!(*error, redb::Error::PreviousIo) => {}
                outcome => return outcome,
            }
        }
        let mut held = self.database.write().unwrap_or_else(PoisonError::into_inner);
        // Closed first: the file is locked while it is open.
        *held = None;
        let database = held.insert(open_database(&self.path)?);
        tracing::warn!("the store was opened anew after a failure of the disk");
        work(database)
    }

    /// Keeps the trust domain of the first start; gives back the one that is kept.
    pub(crate) fn trust_domain(&self, wanted: &str) -> Result<String, StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            let kept = {
                let mut meta = write.open_table(META)?;
                let kept = meta
                    .get("trust_domain")?
                    .map(|bytes| String::from_utf8_lossy(bytes.value()).into_owned());
                match kept {
                    Some(kept) => kept,
                    None => {
                        meta.insert("trust_domain", wanted.as_bytes())?;
                        wanted.to_owned()
                    }
                }
            };
            write.commit()?;
            Ok(kept)
        })
    }

    pub(crate) fn add_token(&self, hash: &[u8; 32], token: &Token) -> Result<(), StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            write.open_table(TOKENS)?.insert(hash.as_slice(), encode(token).as_slice())?;
            write.commit()?;
            Ok(())
        })
    }

    /// Uses a token up, atomically: of two that come with it, one gets it. Expired ones of the past
    /// go out on the way.
    pub(crate) fn consume_token(
        &self,
        hash: &[u8; 32],
        now_unix_ms: i64,
    ) -> Result<Consumed, StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            let outcome = {
                let mut tokens = write.open_table(TOKENS)?;
                let found = tokens
                    .remove(hash.as_slice())?
                    .map(|bytes| decode::<Token>("token", bytes.value()))
                    .transpose()?;
                tokens.retain(|_, bytes| {
                    serde_json::from_slice::<Token>(bytes)
                        .is_ok_and(|token| token.expires_unix_ms > now_unix_ms)
                })?;
                match found {
                    None => Consumed::Unknown,
                    Some(token) if token.expires_unix_ms <= now_unix_ms => Consumed::Expired,
                    Some(token) => Consumed::Good(token.node),
                }
            };
            write.commit()?;
            Ok(outcome)
        })
    }

    /// A node has joined, for the first time or anew: only this certificate is good from now on.
    pub(crate) fn node_joined(&self, name: &str, node: &Node) -> Result<(), StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            write.open_table(NODES)?.insert(name, encode(node).as_slice())?;
            write.commit()?;
            Ok(())
        })
    }

    /// A node gets another certificate; the one it has stays good until the new one is used.
    pub(crate) fn node_renewed(
        &self,
        name: &str,
        serial: &str,
        not_after_unix_ms: i64,
    ) -> Result<(), StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            {
                let mut nodes = write.open_table(NODES)?;
                let node = nodes
                    .get(name)?
                    .map(|bytes| decode::<Node>("node", bytes.value()))
                    .transpose()?;
                if let Some(mut node) = node {
                    node.next_serial = Some(serial.to_owned());
                    node.not_after_unix_ms = not_after_unix_ms;
                    nodes.insert(name, encode(&node).as_slice())?;
                }
            }
            write.commit()?;
            Ok(())
        })
    }

    /// Whether a node may still use the certificate with this serial; the first use of a renewed
    /// one ends the old one.
    pub(crate) fn check_serial(&self, name: &str, serial: &str) -> Result<SerialCheck, StoreError> {
        let Some(mut node) = self.node(name)? else { return Ok(SerialCheck::UnknownNode) };
        if node.next_serial.as_deref() == Some(serial) {
            node.current_serial = serial.to_owned();
            node.next_serial = None;
            self.node_joined(name, &node)?;
            return Ok(SerialCheck::Good);
        }
        Ok(if node.current_serial == serial { SerialCheck::Good } else { SerialCheck::Superseded })
    }

    pub(crate) fn node(&self, name: &str) -> Result<Option<Node>, StoreError> {
        self.attempt(|database| {
            let read = database.begin_read()?;
            let nodes = read.open_table(NODES)?;
            nodes.get(name)?.map(|bytes| decode("node", bytes.value())).transpose()
        })
    }

    pub(crate) fn save_manifests(&self, files: &[(String, String)]) -> Result<(), StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            {
                let mut manifests = write.open_table(MANIFESTS)?;
                manifests.retain(|_, _| false)?;
                for (name, text) in files {
                    manifests.insert(name.as_str(), text.as_str())?;
                }
            }
            write.commit()?;
            Ok(())
        })
    }

    pub(crate) fn manifests(&self) -> Result<Vec<(String, String)>, StoreError> {
        self.attempt(|database| {
            let read = database.begin_read()?;
            let manifests = read.open_table(MANIFESTS)?;
            let mut files = Vec::new();
            for entry in manifests.iter()? {
                let (name, text) = entry?;
                files.push((name.value().to_owned(), text.value().to_owned()));
            }
            Ok(files)
        })
    }

    pub(crate) fn revision(&self) -> Result<Revision, StoreError> {
        self.attempt(|database| {
            let read = database.begin_read()?;
            let meta = read.open_table(META)?;
            meta.get("revision")?
                .map_or(Ok(Revision::default()), |bytes| decode("revision", bytes.value()))
        })
    }

    pub(crate) fn save_revision(&self, revision: &Revision) -> Result<(), StoreError> {
        self.attempt(|database| {
            let write = database.begin_write()?;
            write.open_table(META)?.insert("revision", encode(revision).as_slice())?;
            write.commit()?;
            Ok(())
        })
    }
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
    let shown = path.display().to_string();
    let database = Database::create(path)
        .map_err(|error| StoreError::Open(shown.clone(), Box::new(error.into())))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(|error| {
        StoreError::Open(shown, Box::new(redb::StorageError::from(error).into()))
    })?;
    let write = database.begin_write()?;
    write.open_table(TOKENS)?;
    write.open_table(NODES)?;
    write.open_table(MANIFESTS)?;
    write.open_table(META)?;
    write.commit()?;
    Ok(database)
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // Plain structs of strings and numbers always encode.
    serde_json::to_vec(value).unwrap_or_default()
}

fn decode<T: for<'a> Deserialize<'a>>(what: &'static str, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Damaged(what, error))
}
