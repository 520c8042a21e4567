//! Files that hold secrets: private modes demanded, whole or not at all.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
};

/// A file or folder that cannot be used safely.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{action} {}", path.display())]
    /// The system refused it.
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    #[error(
        "{0} has mode {mode:04o}, so others than its owner may use it; run: chmod {wanted:04o} {0}",
        path.display()
    )]
    /// Others than the owner may use it.
    LooseMode {
        /// The file or folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// The mode it should have.
        wanted: u32,
    },
    #[error(
        "{0} belongs to user {owner}, not to {us}, who runs this; run: chown {us} {0}",
        path.display()
    )]
    /// It is somebody else's.
    ForeignOwner {
        /// The file or folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        us: u32,
    },
}

fn io_error<'a>(
    action: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> FileError + use<'a> {
    move |source| FileError::Io { action, path: path.to_owned(), source }
}

/// Makes the folder with mode 0700, or demands that it has it.
///
/// # Errors
/// If the system refuses it, or others could use it.
pub fn private_folder(path: &Path) -> Result<(), FileError> {
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Ok(()) => demand_private(path, 0o700),
        Err(error) => Err(io_error("make the folder", path)(error)),
    }
}

/// Reads a file, `None` if it is missing; refuses one that others may read.
///
/// # Errors
/// If the system refuses it, or others could use it.
pub fn read_private(path: &Path) -> Result<Option<Vec<u8>>, FileError> {
    match fs::read(path) {
        Ok(bytes) => demand_private(path, 0o600).map(|()| Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path)(error)),
    }
}

/// Writes a file with mode 0600 so that a crash, a full disk or a power cut leaves the old one.
///
/// # Errors
/// If the system refuses it, or others could use it.
pub fn write_private(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let temporary = path.with_extension("new");
    let write = || {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        match path.parent() {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    };
    write().map_err(io_error("write", path))
}

fn demand_private(path: &Path, wanted: u32) -> Result<(), FileError> {
    let metadata = fs::metadata(path).map_err(io_error("look at", path))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::LooseMode { path: path.to_owned(), mode, wanted });
    }
    let us = nix::unistd::geteuid().as_raw();
    if metadata.uid() != us {
        return Err(FileError::ForeignOwner { path: path.to_owned(), owner: metadata.uid(), us });
    }
    Ok(())
}
