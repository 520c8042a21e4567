//! What a host must have for a cluster; all that is missing is told at once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::{cgroups, images::BUSYBOX, machine::succeeded, node};

/// The programs that `build-programs` makes.
const BUILT: [&str; 10] = [
    "cert-manager",
    "coredns",
    "helm",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-proxy",
    "kube-router",
    "kube-scheduler",
    "kubectl",
    "kubelet",
];

/// What the host must have in its path.
const INSTALLED: [&str; 16] = [
    "awk",
    "containerd",
    "containerd-shim-runc-v2",
    "ctr",
    "etcd",
    "ip",
    "ipset",
    "iptables",
    "mount",
    "nft",
    "openssl",
    "pivot_root",
    "runc",
    "tar",
    "umount",
    "unshare",
];

/// The folder of the built programs.
#[derive(Clone, Debug)]
pub struct Programs {
    folder: PathBuf,
}

impl Programs {
    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program of it, such as `kubectl` or `helm`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

/// Looks for everything that a cluster needs on this host.
///
/// # Errors
/// If anything is missing; with all of it, and how to get it.
pub fn locate() -> anyhow::Result<Programs> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("build-programs");
    let output = Command::new(&script)
        .arg("--where")
        .output()
        .with_context(|| format!("run {}", script.display()))?;
    let text = succeeded("look for the cluster's programs", &output)?;
    let programs = Programs { folder: PathBuf::from(text.trim()) };

    let mut missing = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        missing.push("root: a cluster cannot be made as another user".to_owned());
    }
    let unbuilt: Vec<&str> =
        BUILT.into_iter().filter(|name| !programs.path(name).is_file()).collect();
    if !unbuilt.is_empty() {
        missing.push(format!(
            "{} in {}: run {}",
            unbuilt.join(", "),
            programs.folder.display(),
            script.display()
        ));
    }
    let mut absent: Vec<String> =
        INSTALLED.into_iter().filter(|name| !in_path(name)).map(str::to_owned).collect();
    let plugins = node::CNI_NAMES.map(|name| format!("{}/{name}", node::CNI_PLUGINS));
    let files = plugins.into_iter().chain([BUSYBOX.to_owned()]);
    absent.extend(files.filter(|file| !Path::new(file).is_file()));
    if !absent.is_empty() {
        missing.push(format!(
            "{}: install the packages that {} --packages prints",
            absent.join(", "),
            script.display()
        ));
    }
    if !fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("\toverlay\n") {
        missing.push("the kernel's overlay filesystem".to_owned());
    }
    if let Err(error) = cgroups::hierarchies() {
        missing.push(format!("{error:#}"));
    }
    if !missing.is_empty() {
        bail!("this host cannot run a cluster; missing are\n  {}", missing.join("\n  "));
    }
    Ok(programs)
}

fn in_path(name: &str) -> bool {
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .any(|folder| Path::new(folder).join(name).is_file())
}
