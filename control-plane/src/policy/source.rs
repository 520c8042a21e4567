//! The manifest folder: every file of it, whole, or every error of it.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use hauberk_core::{
    manifest::{self, Located, ManifestError},
    policy::{Object, resolve::Declared},
};

/// The longest single manifest; one longer is no manifest.
const MAX_FILE: u64 = 1024 * 1024;

/// The most files, so that a wrong folder is told at once.
const MAX_FILES: usize = 10_000;

/// The manifests of a folder, accepted whole.
#[derive(Debug)]
pub(crate) struct Folder {
    /// Name and text, in the order of the names.
    pub(crate) files: Vec<(String, String)>,
    pub(crate) declared: Declared,
}

/// Why a folder is not accepted. Nothing of it is used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("read {path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{} has more than {MAX_FILES} manifests; is it the right folder?", .0.display())]
    TooMany(PathBuf),
    #[error("{} is longer than 1 MiB; split it", .0.display())]
    TooLong(PathBuf),
    #[error("{} is not UTF-8 text", .0.display())]
    NotText(PathBuf),
    #[error("{} errors in the manifests", .0.len())]
    Manifest(Vec<ManifestError>),
}

impl ReadError {
    /// One line an error.
    pub(crate) fn lines(&self) -> Vec<String> {
        match self {
            Self::Manifest(errors) => errors.iter().map(ToString::to_string).collect(),
            Self::Io { .. } | Self::TooMany(_) | Self::TooLong(_) | Self::NotText(_) => {
                vec![self.to_string()]
            }
        }
    }
}

/// Reads every `.yaml` and `.yml` file of the folder and its subfolders: name and text, in the order of
/// the names.
pub(crate) fn read_folder(folder: &Path) -> Result<Vec<(String, String)>, ReadError> {
    let mut paths = Vec::new();
    collect(folder, &mut paths)?;
    if paths.len() > MAX_FILES {
        return Err(ReadError::TooMany(folder.to_owned()));
    }
    paths.sort();
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let name = path.strip_prefix(folder).unwrap_or(&path).display().to_string();
        files.push((name, read_file(&path)?));
    }
    Ok(files)
}

impl Folder {
    /// Converts the files, all or none.
    pub(crate) fn parse(files: Vec<(String, String)>) -> Result<Self, ReadError> {
        let mut objects: Vec<Located<Object>> = Vec::new();
        let mut errors = Vec::new();
        for (name, text) in &files {
            match manifest::parse(name, text) {
                Ok(found) => objects.extend(found),
                Err(found) => errors.extend(found),
            }
        }
        if errors.is_empty()
            && let Err(found) = manifest::check_set(&objects)
        {
            errors = found;
        }
        if !errors.is_empty() {
            return Err(ReadError::Manifest(errors));
        }
        let mut declared = Declared::default();
        for object in objects {
            match object.value {
                Object::AccessPolicy(policy) => declared.policies.push(policy),
                Object::Guardrail(guardrail) => declared.guardrails.push(guardrail),
                Object::Machine(machine) => declared.machines.push(machine),
                Object::Workload(workload) => declared.workloads.push(workload),
            }
        }
        Ok(Self { files, declared })
    }
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), ReadError> {
    let failed = |source| ReadError::Io { path: folder.to_owned(), source };
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        // Hidden ones are editors' swap files, and the ..data links of mounted ConfigMaps.
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if hidden || paths.len() > MAX_FILES {
            continue;
        }
        let metadata =
            fs::metadata(&path).map_err(|source| ReadError::Io { path: path.clone(), source })?;
        if metadata.is_dir() {
            collect(&path, paths)?;
        } else if path.extension().is_some_and(|end| end == "yaml" || end == "yml") {
            paths.push(path);
        }
    }
    Ok(())
}

fn read_file(path: &Path) -> Result<String, ReadError> {
    let failed = |source| ReadError::Io { path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > MAX_FILE {
        return Err(ReadError::TooLong(path.to_owned()));
    }
    let bytes = fs::read(path).map_err(failed)?;
    String::from_utf8(bytes).map_err(|_| ReadError::NotText(path.to_owned()))
}
