//! What the node's agent knew last of the cluster's namespaces: by it pods start, or do not, while no agent answers.

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

/// Seconds since the boot, those of a sleeping machine included.
const UPTIME: &str = "/proc/uptime";

/// How the names of files end that are not whole yet.
const NEW: &str = "new";

/// How long the pods of a namespace that the agent did not know wait for it: it may be one of the mesh that is newer
/// than the agent's last word. Agents that start anew, or that are being upgraded, are back by then.
pub const UNKNOWN_WAITS: Duration = Duration::from_secs(300);

/// The namespaces, as of an agent's last sign of life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Namespaces {
    /// Those of the mesh: their pods start captured, or not at all.
    pub mesh: BTreeSet<String>,
    /// The others.
    pub outside: BTreeSet<String>,
    /// How many seconds after the boot the agent wrote this.
    alive: u64,
}

/// What they say of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is one of the mesh.
    Mesh,
    /// It is not.
    Outside,
    /// The agent did not know it, and may be back soon: for so long at most.
    Unknown(Duration),
    /// The agent did not know it, and has been away for long.
    NeverKnown,
}

impl Namespaces {
    /// As of now.
    ///
    /// # Errors
    /// If the kernel does not tell what time it is.
    pub fn new(mesh: BTreeSet<String>, outside: BTreeSet<String>) -> io::Result<Self> {
        Ok(Self { mesh, outside, alive: uptime()? })
    }

    /// Reads what an agent has written.
    ///
    /// # Errors
    /// If there is nothing, or nothing that could be read.
    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes it in one step: the plugin may read it at any moment.
    ///
    /// # Errors
    /// If the disk does not take it.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        // Two agents may be at it while one takes the other's place, each the first process of its container.
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let new = path.with_extension(format!("{}.{}", time.as_nanos(), NEW));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        let written = serde_json::to_writer(&mut file, self)
            .map_err(io::Error::from)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&new, path));
        if written.is_err() {
            drop(fs::remove_file(&new));
        }
        written
    }

    /// Takes away what agents have left beside it that were killed while they wrote.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn clean(path: &Path) -> io::Result<()> {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        for entry in fs::read_dir(path.parent().unwrap_or(path))? {
            let entry = entry?.path();
            let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(&format!("{stem}.")) && name.ends_with(&format!(".{NEW}")) {
                drop(fs::remove_file(&entry));
            }
        }
        Ok(())
    }

    /// Takes it away: nothing is known any more. That there is none is no error.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// What they say of one.
    ///
    /// # Errors
    /// If it is unknown, and the kernel does not tell what time it is.
    pub fn standing(&self, namespace: &str) -> io::Result<Standing> {
        if self.mesh.contains(namespace) {
            return Ok(Standing::Mesh);
        }
        if self.outside.contains(namespace) {
            return Ok(Standing::Outside);
        }
        Ok(self.unknown(uptime()?))
    }

    fn unknown(&self, uptime: u64) -> Standing {
        // One that was there before the last boot only had no time yet to be back. Where that cannot be told, it is
        // taken for younger than it is, and never for older.
        let away = Duration::from_secs(uptime.checked_sub(self.alive).unwrap_or(uptime));
        match UNKNOWN_WAITS.checked_sub(away) {
            Some(left) if !left.is_zero() => Standing::Unknown(left),
            Some(_) | None => Standing::NeverKnown,
        }
    }
}

fn uptime() -> io::Result<u64> {
    let text = fs::read_to_string(UPTIME)?;
    let seconds = text.split('.').next().and_then(|whole| whole.parse().ok());
    seconds.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{UPTIME}: {text:?}")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking, with the place")]
mod tests {
    use super::*;

    #[test]
    fn one_that_the_agent_did_not_know_waits_for_a_while_and_after_a_boot_again() {
        let mut known = Namespaces::new(BTreeSet::new(), BTreeSet::new()).unwrap();
        known.alive = 1_000;
        let left = |seconds| Standing::Unknown(Duration::from_secs(seconds));
        assert_eq!(known.unknown(1_000), left(300));
        assert_eq!(known.unknown(1_299), left(1));
        assert_eq!(known.unknown(1_300), Standing::NeverKnown);
        // It has booted since.
        assert_eq!(known.unknown(20), left(280));
        assert_eq!(known.unknown(301), Standing::NeverKnown);
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("namespaces.json");
        assert!(Namespaces::read(&path).is_err());
        let names = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect();
        let known = Namespaces::new(names(&["payments"]), names(&["default"])).unwrap();
        known.write(&path).unwrap();
        let read = Namespaces::read(&path).unwrap();
        assert_eq!(read, known);
        assert_eq!(read.standing("payments").unwrap(), Standing::Mesh);
        assert_eq!(read.standing("default").unwrap(), Standing::Outside);
        let fresh = read.standing("other").unwrap();
        let most = Standing::Unknown(UNKNOWN_WAITS);
        let less = Standing::Unknown(UNKNOWN_WAITS - Duration::from_secs(1));
        assert!(fresh == most || fresh == less, "{fresh:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "something is left beside it");
        fs::write(folder.path().join("namespaces.12.new"), "half").unwrap();
        fs::write(folder.path().join("other.12.new"), "another's").unwrap();
        Namespaces::clean(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        Namespaces::remove(&path).unwrap();
        Namespaces::remove(&path).unwrap();
        assert!(!path.exists());
        known.write(&path).unwrap();
        fs::write(&path, r#"{"mesh":[],"outside":[],"alive":1,"more":1}"#).unwrap();
        assert!(Namespaces::read(&path).is_err(), "what is not understood is not skipped");
    }
}
