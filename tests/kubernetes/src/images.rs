//! Images made of files, without a registry: a `docker-archive` that `ctr` imports.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::machine::succeeded;

/// The image of every pod's first container.
pub(crate) const PAUSE: &str = "hauberk.test/pause:1";

/// Debian's busybox, which is linked statically.
pub(crate) const BUSYBOX: &str = "/usr/bin/busybox";

/// An image. Nothing is in it but its files.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its name with a tag, such as `hauberk.test/agent:1`. Pods need `imagePullPolicy: Never`.
    pub name: String,
    /// Its files, by their absolute paths in the image.
    pub files: Vec<(String, Source)>,
    /// What a container runs, unless the pod says otherwise.
    pub entrypoint: Vec<String>,
    /// The environment, as `NAME=value`.
    pub environment: Vec<String>,
    /// The user, as in a pod's `runAsUser`; root if empty.
    pub user: String,
}

/// Where a file of an image comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A file of the host, with the mode that it gets.
    File(PathBuf, u32),
    /// A text, with the mode that the file gets.
    Text(String, u32),
    /// A symbolic link to this path.
    Link(String),
    /// An empty folder with this mode.
    Folder(u32),
}

/// An image of the name `hauberk.test/busybox:1` with all of busybox's commands in `/bin`.
///
/// # Errors
/// If busybox is not installed.
pub fn busybox() -> anyhow::Result<Image> {
    let output = Command::new(BUSYBOX).arg("--list").output().context("run busybox")?;
    let commands = succeeded("list busybox's commands", &output)?;
    let mut files = vec![
        ("/bin/busybox".to_owned(), Source::File(BUSYBOX.into(), 0o755)),
        ("/tmp".to_owned(), Source::Folder(0o1777)),
        ("/etc/passwd".to_owned(), Source::Text("root:x:0:0::/:/bin/sh\n".to_owned(), 0o644)),
        ("/etc/group".to_owned(), Source::Text("root:x:0:\n".to_owned(), 0o644)),
    ];
    for name in commands.lines().filter(|name| *name != "busybox") {
        files.push((format!("/bin/{name}"), Source::Link("busybox".to_owned())));
    }
    Ok(Image {
        name: "hauberk.test/busybox:1".to_owned(),
        files,
        entrypoint: vec!["/bin/sh".to_owned()],
        environment: vec!["PATH=/bin".to_owned()],
        user: String::new(),
    })
}

/// An image that does nothing: it holds a pod's namespaces.
pub(crate) fn pause() -> Image {
    Image {
        name: PAUSE.to_owned(),
        files: vec![("/busybox".to_owned(), Source::File(BUSYBOX.into(), 0o755))],
        entrypoint: ["/busybox", "sleep", "2147483647"].map(str::to_owned).to_vec(),
        environment: Vec::new(),
        user: String::new(),
    }
}

impl Image {
    /// The image that a Containerfile describes, of the files in the folder `context`: a program brings the
    /// shared libraries that it is linked to. Understands what a `FROM scratch` needs, and refuses the rest.
    ///
    /// # Errors
    /// If the Containerfile says anything else, or a file is missing.
    pub fn from_containerfile(
        name: &str,
        containerfile: &Path,
        context: &Path,
    ) -> anyhow::Result<Self> {
        let mut image = Self {
            name: name.to_owned(),
            files: Vec::new(),
            entrypoint: Vec::new(),
            environment: Vec::new(),
            user: String::new(),
        };
        let text = fs::read_to_string(containerfile)
            .with_context(|| format!("read {}", containerfile.display()))?;
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match line.split_once(' ') {
                Some(("FROM", "scratch")) => {}
                Some(("COPY", words)) => match words.split_once(' ') {
                    Some((from, to)) if to.starts_with('/') && !to.contains(' ') => {
                        image.add_program(to, &context.join(from))?;
                    }
                    Some(_) | None => bail!("{line:?} is not COPY FILE /PATH"),
                },
                Some(("USER", user)) => image.user = user.to_owned(),
                Some(("ENTRYPOINT", words)) => {
                    image.entrypoint = serde_json::from_str(words)
                        .with_context(|| format!("{line:?} is not ENTRYPOINT [\"WORD\"]"))?;
                }
                Some(_) | None => {
                    bail!("{line:?} is neither FROM scratch, COPY, USER nor ENTRYPOINT");
                }
            }
        }
        Ok(image)
    }

    /// Adds a program of the host with the shared libraries it is linked to, which keep their places.
    ///
    /// # Errors
    /// If one of them is missing.
    pub fn add_program(&mut self, path: &str, program: &Path) -> anyhow::Result<()> {
        self.files.push((path.to_owned(), Source::File(program.to_owned(), 0o755)));
        let output = Command::new("ldd").arg(program).output().context("run ldd")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if errors.contains("not a dynamic executable") {
            return Ok(());
        }
        let text = succeeded(&format!("ask for the libraries of {}", program.display()), &output)?;
        for line in text.lines() {
            if line.contains("not found") {
                bail!("{} needs a library: {line}", program.display());
            }
            // "name => /place (address)", or "/place (address)" for the loader.
            let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                continue;
            };
            let file = (library.to_owned(), Source::File(library.into(), 0o755));
            if !self.files.iter().any(|(path, _)| *path == file.0) {
                self.files.push(file);
            }
        }
        Ok(())
    }

    /// Writes the archive to a file in `folder`, and says which.
    ///
    /// # Errors
    /// If a file of it is missing, or cannot be written.
    pub fn archive(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let work = tempfile::Builder::new().prefix("image-").tempdir_in(folder)?;
        let tree = work.path().join("tree");
        let parts = work.path().join("parts");
        fs::create_dir(&tree)?;
        fs::create_dir(&parts)?;
        for (path, source) in &self.files {
            place(&tree, path, source)
                .with_context(|| format!("put {path} into the image {}", self.name))?;
        }
        let layer = parts.join("layer.tar");
        tar(&tree, &layer)?;
        let digest = Sha256::digest(fs::read(&layer)?);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let config = json!({
            "architecture": architecture()?,
            "os": "linux",
            "config": {
                "Entrypoint": self.entrypoint,
                "Env": self.environment,
                "User": self.user,
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        });
        fs::write(parts.join("config.json"), config.to_string())?;
        let manifest =
            json!([{"Config": "config.json", "RepoTags": [self.name], "Layers": ["layer.tar"]}]);
        fs::write(parts.join("manifest.json"), manifest.to_string())?;
        let archive = folder.join(format!("{}.tar", self.name.replace(['/', ':'], "-")));
        tar(&parts, &archive)?;
        Ok(archive)
    }
}

fn place(tree: &Path, path: &str, source: &Source) -> anyhow::Result<()> {
    if !path.starts_with('/') || path.contains("..") {
        bail!("it is not an absolute path");
    }
    let file = tree.join(path.trim_start_matches('/'));
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder)?;
    }
    let mode = match source {
        Source::File(from, mode) => {
            // A copy: the mode must not change at the source.
            fs::copy(from, &file).with_context(|| format!("copy {}", from.display()))?;
            *mode
        }
        Source::Text(text, mode) => {
            fs::write(&file, text)?;
            *mode
        }
        Source::Link(to) => return Ok(std::os::unix::fs::symlink(to, &file)?),
        Source::Folder(mode) => {
            fs::create_dir_all(&file)?;
            *mode
        }
    };
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(mode))?)
}

fn tar(folder: &Path, archive: &Path) -> anyhow::Result<()> {
    let output = Command::new("tar")
        .args(["--create", "--owner=0", "--group=0", "--numeric-owner", "--file"])
        .arg(archive)
        .arg("--directory")
        .arg(folder)
        .arg(".")
        .output()
        .context("run tar")?;
    succeeded("make an archive", &output).map(|_| ())
}

fn architecture() -> anyhow::Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no name for images of the architecture {other}"),
    }
}
