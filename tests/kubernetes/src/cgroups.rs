//! The machines' cgroups: in every hierarchy of the host, one group a cluster, one below a machine.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};

/// What kubelet cannot do without.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

/// The group of one machine in each hierarchy.
#[derive(Clone, Debug)]
pub(crate) struct Cgroups {
    folders: Vec<PathBuf>,
}

/// The mount points of the host's hierarchies.
///
/// # Errors
/// If there are none, or a controller that kubelet needs is missing.
pub(crate) fn hierarchies() -> anyhow::Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read the mounts")?;
    let mut places = Vec::new();
    let mut controllers = Vec::new();
    for line in mounts.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let (Some(place), Some(kind), Some(options)) =
            (head.split(' ').nth(4), tail.split(' ').next(), tail.split(' ').next_back())
        else {
            continue;
        };
        if !place.starts_with("/sys/fs/cgroup") || !matches!(kind, "cgroup" | "cgroup2") {
            continue;
        }
        let place = PathBuf::from(place);
        if places.contains(&place) {
            continue;
        }
        controllers.extend(options.split(',').map(str::to_owned));
        let text = fs::read_to_string(place.join("cgroup.controllers")).unwrap_or_default();
        controllers.extend(text.split_whitespace().map(str::to_owned));
        places.push(place);
    }
    let missing: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|wanted| !controllers.iter().any(|found| found == wanted))
        .collect();
    if !missing.is_empty() {
        bail!("cgroup controllers that are not mounted below /sys/fs/cgroup: {missing:?}");
    }
    Ok(places)
}

/// The groups of a cluster, by its name.
pub(crate) fn cluster_folders(cluster: &str) -> anyhow::Result<Vec<PathBuf>> {
    Ok(hierarchies()?.into_iter().map(|place| place.join(cluster)).collect())
}

impl Cgroups {
    /// Makes the groups of a machine, and in each one `system` for the processes that are in no pod.
    pub(crate) fn create(cluster: &str, machine: &str) -> anyhow::Result<Self> {
        let mut folders = Vec::new();
        for group in cluster_folders(cluster)? {
            let folder = group.join(machine);
            for place in [&group, &folder] {
                pass_controllers_on(place);
                create(place)?;
            }
            prefer(&group)?;
            create(&folder.join("system"))?;
            folders.push(folder);
        }
        Ok(Self { folders })
    }

    /// The machine's group in each hierarchy.
    pub(crate) fn folders(&self) -> &[PathBuf] {
        &self.folders
    }
}

/// Removes a group and all below it. Fails while there are processes in one.
pub(crate) fn remove(folder: &Path) -> std::io::Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}

/// Version 2: what a group's parent does not pass on cannot be used in it. The machine's own group does
/// so for its pods as soon as no process is left in it: see `machine.sh`.
fn pass_controllers_on(folder: &Path) {
    let Some(parent) = folder.parent() else { return };
    let file = parent.join("cgroup.subtree_control");
    let (Ok(available), Ok(passed_on)) =
        (fs::read_to_string(parent.join("cgroup.controllers")), fs::read_to_string(&file))
    else {
        return;
    };
    for controller in CONTROLLERS {
        let has = |list: &str| list.split_whitespace().any(|found| found == controller);
        if has(&available) && !has(&passed_on) {
            // If it cannot be passed on, kubelet says so.
            drop(fs::write(&file, format!("+{controller}")));
        }
    }
}

/// A cluster goes before whatever else runs beside it, which its patience is not made for: what nice values say
/// does not count between groups.
fn prefer(group: &Path) -> anyhow::Result<()> {
    for (file, most) in [("cpu.shares", "10240"), ("cpu.weight", "1000")] {
        let file = group.join(file);
        if file.exists() {
            fs::write(&file, most).with_context(|| format!("write {}", file.display()))?;
        }
    }
    Ok(())
}

fn create(folder: &Path) -> anyhow::Result<()> {
    let parent = folder.parent().context("a group without a parent")?;
    if !folder.exists() {
        fs::create_dir(folder).with_context(|| format!("make the cgroup {}", folder.display()))?;
    }
    // Version 1: a new group has no processors and no memory, and takes no process until it has.
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if let Ok(have) = fs::read_to_string(parent.join(file))
            && !folder.join("cgroup.controllers").exists()
        {
            fs::write(folder.join(file), have.trim())
                .with_context(|| format!("give {} its {file}", folder.display()))?;
        }
    }
    Ok(())
}
