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
    #[error(
        "the store {0} is empty, as after an interrupted copy; restore a backup, or remove it to begin without nodes and tokens: then every machine joins anew"
    )]
    Empty(String),
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
    /// Since when the certificate before the current one is not good any more.
    #[serde(default)]
    pub(crate) superseded_unix_ms: Option<i64>,
    /// Why nothing is issued to this node until it joins anew.
    #[serde(default)]
    pub(crate) locked: Option<String>,
}

/// The last published state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Revision {
    /// When the numbering began, in seconds since the Unix epoch; zero before the first revision.
    #[serde(default)]
    pub(crate) epoch: u64,
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
    /// An older one. The node's own calls may still be on their way with it for a moment.
    Superseded,
    /// An older one, used after that moment: two hold the node's credential. The node has been locked
    /// by this very check.
    Cloned,
    /// The node was locked before, for the reason given.
    Locked(String),
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

    /// What a token is good for. Reads only: a guess writes nothing to the disk.
    pub(crate) fn look_at_token(
        &self,
        hash: &[u8; 32],
        now_unix_ms: i64,
    ) -> Result<Consumed, StoreError> {
        self.attempt(|database| {
            let tokens = database.begin_read()?.open_table(TOKENS)?;
            let found = tokens.get(hash.as_slice())?;
            let token = found.map(|bytes| decode::<Token>("token", bytes.value())).transpose()?;
            Ok(judge_token(token, now_unix_ms))
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
                judge_token(found, now_unix_ms)
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

    /// Whether a node may still use the certificate that it shows. The first use of a renewed one
    /// ends the old one; a use of an old one more than `grace_ms` after that locks the node.
    pub(crate) fn check_serial(
        &self,
        name: &str,
        shown: Shown<'_>,
        now_unix_ms: i64,
        grace_ms: i64,
    ) -> Result<SerialCheck, StoreError> {
        // Read only, as nearly every time.
        match self.node(name)? {
            None => return Ok(SerialCheck::UnknownNode),
            Some(node) if node.locked.is_none() && node.current_serial == shown.serial => {
                return Ok(SerialCheck::Good);
            }
            Some(_) => {}
        }
        self.attempt(|database| {
            let write = database.begin_write()?;
            let outcome = {
                let mut nodes = write.open_table(NODES)?;
                let node = nodes
                    .get(name)?
                    .map(|bytes| decode::<Node>("node", bytes.value()))
                    .transpose()?;
                let Some(mut node) = node else { return Ok(SerialCheck::UnknownNode) };
                let outcome = judge_serial(&mut node, shown, now_unix_ms, grace_ms);
                nodes.insert(name, encode(&node).as_slice())?;
                outcome
            };
            write.commit()?;
            Ok(outcome)
        })
    }

    /// As [`Self::check_serial`], of a certificate that has expired and is shown to be renewed. One that was
    /// superseded is only refused: whoever digs out an old one must not lock the node with it.
    pub(crate) fn check_lapsed(
        &self,
        name: &str,
        shown: Shown<'_>,
        now_unix_ms: i64,
    ) -> Result<SerialCheck, StoreError> {
        // For ever is within this grace.
        self.check_serial(name, shown, now_unix_ms, i64::MAX)
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

    /// Begins the numbering anew, as of this time in seconds: what comes is newer than all that was published.
    pub(crate) fn begin_epoch(&self, now: u64) -> Result<u64, StoreError> {
        let epoch = now.max(self.revision()?.epoch.saturating_add(1));
        self.save_revision(&Revision { epoch, ..Revision::default() })?;
        Ok(epoch)
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

/// A node's certificate, as it is shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shown<'a> {
    pub(crate) serial: &'a str,
    pub(crate) issued_unix_ms: i64,
}

fn judge_token(token: Option<Token>, now_unix_ms: i64) -> Consumed {
    match token {
        None => Consumed::Unknown,
        Some(token) if token.expires_unix_ms <= now_unix_ms => Consumed::Expired,
        Some(token) => Consumed::Good(token.node),
    }
}

fn judge_serial(
    node: &mut Node,
    Shown { serial, issued_unix_ms }: Shown<'_>,
    now_unix_ms: i64,
    grace_ms: i64,
) -> SerialCheck {
    if let Some(reason) = &node.locked {
        return SerialCheck::Locked(reason.clone());
    }
    if node.current_serial == serial {
        return SerialCheck::Good;
    }
    if node.next_serial.as_deref() == Some(serial) {
        node.current_serial = serial.to_owned();
        node.next_serial = None;
        node.superseded_unix_ms = Some(now_unix_ms);
        return SerialCheck::Good;
    }
    // From before the node joined anew: its credential may well be in foreign hands, which is why it did.
    if issued_unix_ms < node.joined_unix_ms {
        return SerialCheck::Superseded;
    }
    let since = node.superseded_unix_ms.unwrap_or(node.joined_unix_ms);
    if now_unix_ms.saturating_sub(since) <= grace_ms {
        return SerialCheck::Superseded;
    }
    node.locked = Some(format!(
        "its certificate {serial} was used although it had been renewed: two hold its credential"
    ));
    SerialCheck::Cloned
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
    let shown = path.display().to_string();
    if std::fs::metadata(path).is_ok_and(|metadata| metadata.len() == 0) {
        return Err(StoreError::Empty(shown));
    }
    // Without a look at all of it, an altered file shows somewhere in the middle of work. It is small.
    let database = Database::builder()
        .set_check_integrity_on_open(true)
        .create(path)
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    const GRACE: i64 = 30_000;

    /// A certificate of today.
    fn shown(serial: &str) -> Shown<'_> {
        Shown { serial, issued_unix_ms: i64::MAX }
    }

    fn store() -> (tempfile::TempDir, Store) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store.redb")).unwrap();
        (folder, store)
    }

    fn joined(serial: &str, at: i64) -> Node {
        Node {
            current_serial: serial.to_owned(),
            next_serial: None,
            not_after_unix_ms: at + 3_600_000,
            joined_unix_ms: at,
            superseded_unix_ms: None,
            locked: None,
        }
    }

    #[test]
    fn of_a_renewal_both_are_good_until_the_new_one_is_used() {
        let (_folder, store) = store();
        store.node_joined("a", &joined("one", 0)).unwrap();
        store.node_renewed("a", "two", 0).unwrap();
        let check = |serial, now| store.check_serial("a", shown(serial), now, GRACE).unwrap();
        assert_eq!(check("one", 1), SerialCheck::Good);
        assert_eq!(check("two", 100_000), SerialCheck::Good);
        assert_eq!(
            check("one", 100_000 + GRACE),
            SerialCheck::Superseded,
            "a late call of its own"
        );
        assert_eq!(check("two", 100_001 + GRACE), SerialCheck::Good);
    }

    #[test]
    fn a_renewal_whose_answer_was_lost_is_no_clone() {
        let (_folder, store) = store();
        store.node_joined("a", &joined("one", 0)).unwrap();
        store.node_renewed("a", "lost", 0).unwrap();
        store.node_renewed("a", "two", 0).unwrap();
        for serial in ["one", "two"] {
            let check = store.check_serial("a", shown(serial), 10 * GRACE, GRACE).unwrap();
            assert_eq!(check, SerialCheck::Good, "{serial}");
        }
    }

    #[test]
    fn a_clone_locks_the_node_until_it_joins_anew() {
        let (folder, store) = store();
        store.node_joined("a", &joined("one", 0)).unwrap();
        store.node_renewed("a", "two", 0).unwrap();
        let now = 100_000;
        assert_eq!(store.check_serial("a", shown("two"), now, GRACE).unwrap(), SerialCheck::Good);
        let later = now + GRACE + 1;
        assert_eq!(
            store.check_serial("a", shown("one"), later, GRACE).unwrap(),
            SerialCheck::Cloned
        );
        drop(store);
        let store = Store::open(&folder.path().join("store.redb")).unwrap();
        for serial in ["one", "two"] {
            let check = store.check_serial("a", shown(serial), later, GRACE).unwrap();
            assert!(matches!(check, SerialCheck::Locked(_)), "{serial}: {check:?}");
        }
        store.node_joined("a", &joined("three", later)).unwrap();
        assert_eq!(
            store.check_serial("a", shown("three"), later, GRACE).unwrap(),
            SerialCheck::Good
        );
        // Whoever still has the old credential gets nothing by it, not even the lock of the new one.
        let old = Shown { serial: "one", issued_unix_ms: 0 };
        let much_later = later + 10 * GRACE;
        let check = store.check_serial("a", old, much_later, GRACE).unwrap();
        assert_eq!(check, SerialCheck::Superseded);
        let check = store.check_serial("a", shown("three"), much_later, GRACE).unwrap();
        assert_eq!(check, SerialCheck::Good);
    }

    #[test]
    fn an_expired_certificate_is_good_if_it_was_not_superseded_and_never_locks() {
        let (_folder, store) = store();
        store.node_joined("a", &joined("one", 0)).unwrap();
        store.node_renewed("a", "two", 0).unwrap();
        let late = 100 * GRACE;
        let check = |serial| store.check_lapsed("a", shown(serial), late).unwrap();
        // The machine was switched off before the answer with the second came.
        assert_eq!(check("one"), SerialCheck::Good);
        // Or after it.
        assert_eq!(check("two"), SerialCheck::Good);
        // Which ends the first for good.
        assert_eq!(check("one"), SerialCheck::Superseded);
        let much_later = Shown { serial: "one", issued_unix_ms: i64::MAX };
        let again = store.check_lapsed("a", much_later, 10 * late).unwrap();
        assert_eq!(again, SerialCheck::Superseded);
        assert_eq!(store.node("a").unwrap().unwrap().locked, None);
        store.node_joined("a", &joined("three", 11 * late)).unwrap();
        assert_eq!(check("two"), SerialCheck::Superseded);
        assert_eq!(store.check_lapsed("b", shown("one"), 0).unwrap(), SerialCheck::UnknownNode);
    }

    #[test]
    fn a_token_is_good_once_and_not_after_its_end() {
        let (_folder, store) = store();
        let token = || Token { node: "a".to_owned(), expires_unix_ms: 100 };
        store.add_token(&[1; 32], &token()).unwrap();
        store.add_token(&[2; 32], &token()).unwrap();
        assert_eq!(store.consume_token(&[1; 32], 99).unwrap(), Consumed::Good("a".to_owned()));
        assert_eq!(store.consume_token(&[1; 32], 99).unwrap(), Consumed::Unknown);
        assert_eq!(store.consume_token(&[2; 32], 100).unwrap(), Consumed::Expired);
        assert_eq!(store.consume_token(&[2; 32], 99).unwrap(), Consumed::Unknown);
    }

    #[test]
    fn a_damaged_record_is_told_and_not_taken_for_none() {
        let (_folder, store) = store();
        store
            .attempt(|database| {
                let write = database.begin_write()?;
                write.open_table(NODES)?.insert("a", b"{".as_slice())?;
                write.commit()?;
                Ok(())
            })
            .unwrap();
        assert!(matches!(store.node("a"), Err(StoreError::Damaged("node", _))));
    }
}
