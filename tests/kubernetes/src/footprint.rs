//! What a cluster is known by on the host, to see whether anything of it is left.

use std::{fmt, fs, os::unix::fs::MetadataExt, path::PathBuf};

/// The marks of one cluster. They can be looked for after it is gone.
#[derive(Clone, Debug)]
pub struct Footprint {
    pub(crate) folder: PathBuf,
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) namespaces: Vec<u64>,
}

impl fmt::Display for Footprint {
    /// One line, for [`Footprint::parse`] in another process.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.folder.display())?;
        self.cgroups.iter().try_for_each(|cgroup| write!(f, "\t{}", cgroup.display()))?;
        self.namespaces.iter().try_for_each(|number| write!(f, "\t{number}"))
    }
}

impl Footprint {
    /// Reads what another process has displayed.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut parts = line.split('\t');
        let folder = PathBuf::from(parts.next()?);
        let (cgroups, namespaces): (Vec<&str>, Vec<&str>) =
            parts.partition(|part| part.starts_with('/'));
        Some(Self {
            folder,
            cgroups: cgroups.into_iter().map(PathBuf::from).collect(),
            namespaces: namespaces
                .into_iter()
                .map(|part| part.parse().ok())
                .collect::<Option<_>>()?,
        })
    }

    /// What is still there: processes in its namespaces, mounts of its folder, cgroups, the folder.
    #[must_use]
    pub fn remains(&self) -> Vec<String> {
        let mut remains = Vec::new();
        let folder = self.folder.display().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let process = entry.path();
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            // Threads can be in namespaces that their process is not in.
            for task in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
                for kind in ["cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "uts"] {
                    let number = fs::metadata(task.path().join("ns").join(kind)).map(|m| m.ino());
                    if number.is_ok_and(|number| self.namespaces.contains(&number)) {
                        let process = process.display();
                        remains.push(format!("{process} ({}) in a {kind}", name.trim()));
                    }
                }
            }
            let mounts = fs::read_to_string(process.join("mountinfo")).unwrap_or_default();
            if mounts.contains(&folder) {
                remains.push(format!("a mount of {folder}, seen by {}", process.display()));
            }
        }
        let places = self.cgroups.iter().chain([&self.folder]);
        remains
            .extend(places.filter(|place| place.exists()).map(|place| place.display().to_string()));
        remains
    }
}
