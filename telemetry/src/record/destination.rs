//! Where record lines go, and what happens when they cannot.
//!
//! A line is written whole, or it counts as not written. What a full disk cut short
//! is closed with a line break before the next line, so that one lost record never spoils another.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Bytes that one call writes to a file.
const AT_ONCE: usize = 64 * 1024;

/// Bytes that others cannot write into, who write to the same pipe (`PIPE_BUF`).
const AT_ONCE_TO_PIPE: usize = 4096;

/// Where record lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Standard output.
    Stdout,
    /// Appended to a file, made with mode 0600 as records say who talks to whom. After the file
    /// is renamed or removed (log rotation), a new one is made within a second.
    File(PathBuf),
}

impl std::fmt::Display for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stdout => f.write_str("standard output"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// An open destination.
#[derive(Debug)]
pub(super) struct Output {
    file: File,
    /// None for standard output, which is never opened again.
    path: Option<PathBuf>,
    /// Whether the last line was cut short.
    torn: bool,
}

impl Output {
    pub(super) fn open(destination: &Destination) -> io::Result<Self> {
        match destination {
            Destination::Stdout => {
                // A descriptor of our own: std's buffer would take lines that a full pipe or
                // disk refuses later, and they could not be counted then.
                let file = File::from(io::stdout().as_fd().try_clone_to_owned()?);
                Ok(Self { file, path: None, torn: false })
            }
            Destination::File(path) => {
                let (file, torn) = open_file(path)?;
                Ok(Self { file, path: Some(path.clone()), torn })
            }
        }
    }

    /// How many bytes of lines are best written at once, if one alone is not longer.
    pub(super) fn at_once(&self) -> usize {
        if self.path.is_some() { AT_ONCE } else { AT_ONCE_TO_PIPE }
    }

    /// Writes lines, each of which must end in a line break. How many bytes of them were written.
    pub(super) fn write_lines(&mut self, lines: &[u8]) -> (usize, io::Result<()>) {
        if self.torn {
            if let Err(error) = self.file.write_all(b"\n") {
                return (0, Err(error));
            }
            self.torn = false;
        }
        let mut used = 0;
        while let Some(rest) = lines.get(used..).filter(|rest| !rest.is_empty()) {
            match self.file.write(rest) {
                Ok(0) => return (used, Err(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    used += written;
                    self.torn = lines.get(..used).is_some_and(|done| !done.ends_with(b"\n"));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (used, Err(error)),
            }
        }
        (used, Ok(()))
    }

    /// Opens the path again when the open file is no longer the one found there.
    pub(super) fn follow_rotation(&mut self) -> io::Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let open = self.file.metadata()?;
        let moved = match fs::metadata(path) {
            Ok(found) => (found.dev(), found.ino()) != (open.dev(), open.ino()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => return Err(error),
        };
        if moved {
            (self.file, self.torn) = open_file(path)?;
        }
        Ok(())
    }
}

/// Opens for appending, and says whether an earlier process left a line cut short.
fn open_file(path: &Path) -> io::Result<(File, bool)> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    let metadata = file.metadata()?;
    let torn = metadata.is_file() && metadata.len() > 0 && !ends_in_line_break(path);
    Ok((file, torn))
}

/// A file that may be written and not read counts as cut short: an empty line does no harm.
fn ends_in_line_break(path: &Path) -> bool {
    let last_byte = || -> io::Result<u8> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::End(-1))?;
        let mut byte = [0];
        file.read_exact(&mut byte)?;
        Ok(byte[0])
    };
    last_byte().is_ok_and(|byte| byte == b'\n')
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_new_file_is_for_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        Output::open(&Destination::File(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_line_cut_short_does_not_spoil_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        fs::write(&path, "{\"a\":1}\n{\"b\":").unwrap();
        let mut output = Output::open(&Destination::File(path.clone())).unwrap();
        output.write_lines(b"{\"c\":3}\n").1.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\"a\":1}\n{\"b\":\n{\"c\":3}\n");
    }

    #[test]
    fn a_rotated_file_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("records.jsonl");
        let mut output = Output::open(&Destination::File(path.clone())).unwrap();
        output.write_lines(b"1\n").1.unwrap();
        fs::rename(&path, folder.path().join("records.jsonl.1")).unwrap();
        output.follow_rotation().unwrap();
        output.write_lines(b"2\n").1.unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
    }
}
