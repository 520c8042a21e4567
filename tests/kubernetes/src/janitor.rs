//! Takes away what does not go by itself with the processes: the cgroups and the folder. A program of
//! its own, as it must outlive this one when that is killed.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, bail};

/// Waits for the end of its standard input; then tries for half a minute, as the last processes of a
/// machine take a moment to die.
const SCRIPT: &str = r#"
folder="$1"
shift
cat >/dev/null
tries=0
while [ $tries -lt 300 ]; do
    left=no
    for cgroup; do
        [ ! -d "$cgroup" ] && continue
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null
        [ -d "$cgroup" ] && left=yes
    done
    rm -rf --one-file-system "$folder" 2>/dev/null
    [ -d "$folder" ] && left=yes
    [ $left = no ] && exit 0
    tries=$((tries + 1))
    sleep 0.1
done
exit 1
"#;

/// The program that cleans up.
pub(crate) struct Janitor {
    child: Child,
}

impl Janitor {
    /// Starts it, for a folder and for cgroups that need not be there yet.
    pub(crate) fn start(folder: &Path, cgroups: &[PathBuf]) -> anyhow::Result<Self> {
        let child = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "janitor"])
            .arg(folder)
            .args(cgroups)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the clean-up")?;
        Ok(Self { child })
    }

    /// Lets it clean up, and waits for it.
    pub(crate) fn clean(&mut self) -> anyhow::Result<()> {
        drop(self.child.stdin.take());
        let status = self.child.wait().context("wait for the clean-up")?;
        if !status.success() {
            bail!("the clean-up left something behind");
        }
        Ok(())
    }
}
