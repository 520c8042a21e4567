//! One machine of the cluster: its namespaces, its disk, and the programs that run on it.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    panic,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use hauberk_linux::Netns;
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cgroups::{self, Cgroups},
    wire::Wire,
};

const SCRIPT: &str = include_str!("machine.sh");

/// Where the programs are found on a machine.
const PATH: &str = "/opt/kubernetes/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Moves itself to the machine's cgroups and becomes the program.
const IN_CGROUPS: &str = r#"
for file in /sys/fs/cgroup/system/cgroup.procs /sys/fs/cgroup/*/system/cgroup.procs; do
    if [ -e "$file" ]; then echo 0 >"$file"; fi
done
exec "$@"
"#;

/// How long a program may take to stop by itself. The API server would wait for all of its clients.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// How long the processes of a machine may take to die.
const DEATH_PATIENCE: Duration = Duration::from_secs(20);

/// How many lines of a log go into an error.
const LAST_LINES: usize = 25;

/// What of the host's `/etc` a machine gets a copy of.
const COPIED: [&str; 8] = [
    "alternatives",
    "group",
    "ld.so.cache",
    "nsswitch.conf",
    "passwd",
    "protocols",
    "services",
    "ssl",
];

/// A machine. Its files are as usual: `/etc`, `/opt` and `/var` are its disk and outlive a reboot,
/// `/usr` is the host's and read-only, everything else is new after every boot.
pub struct Machine {
    name: String,
    number: u8,
    folder: PathBuf,
    logs: PathBuf,
    programs: PathBuf,
    cluster: String,
    booted: Mutex<Option<Booted>>,
    children: Mutex<BTreeMap<String, Child>>,
}

struct Booted {
    init: Child,
    namespaces: Arc<Namespaces>,
    netns: Netns,
}

/// Open files of a process's namespaces; they live as long as these.
struct Namespaces {
    files: Vec<(File, CloneFlags)>,
}

impl Machine {
    /// A machine that is off. `folder` is the cluster's.
    pub(crate) fn create(
        folder: &Path,
        programs: &Path,
        cluster: &str,
        name: &str,
        number: u8,
    ) -> anyhow::Result<Self> {
        let machine = Self {
            name: name.to_owned(),
            number,
            folder: folder.join(name),
            logs: folder.join("logs"),
            programs: programs.to_owned(),
            cluster: cluster.to_owned(),
            booted: Mutex::new(None),
            children: Mutex::new(BTreeMap::new()),
        };
        for directory in ["/etc/kubernetes/pki", "/opt/kubernetes/bin", "/var/lib", "/var/log"] {
            fs::create_dir_all(machine.disk(directory))?;
        }
        fs::create_dir_all(&machine.logs)?;
        let tmp = machine.disk("/var/tmp");
        fs::create_dir(&tmp)?;
        fs::set_permissions(tmp, fs::Permissions::from_mode(0o1777))?;
        std::os::unix::fs::symlink("/run", machine.disk("/var/run"))?;
        for name in COPIED {
            let from = Path::new("/etc").join(name);
            if from.exists() {
                let copied =
                    Command::new("cp").arg("-a").arg(&from).arg(machine.disk("/etc")).status()?;
                if !copied.success() {
                    bail!("could not copy {}", from.display());
                }
            }
        }
        machine.write("/etc/hostname", &format!("{name}\n"))?;
        machine.write("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n")?;
        machine.write("/etc/resolv.conf", "")?;
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        machine.write("/etc/machine-id", &id.replace('-', ""))?;
        let script = machine.folder.join("machine.sh");
        fs::write(&script, SCRIPT)?;
        fs::set_permissions(script, fs::Permissions::from_mode(0o755))?;
        Ok(machine)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its number in the network; see [`crate::ipv4`].
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Where a file of the machine's disk, below `/etc`, `/opt` or `/var`, is on the host.
    #[must_use]
    pub fn disk(&self, path: &str) -> PathBuf {
        self.folder.join("disk").join(path.trim_start_matches('/'))
    }

    /// Writes a file to the machine's disk.
    pub(crate) fn write(&self, path: &str, text: &str) -> anyhow::Result<()> {
        let file = self.disk(path);
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&file, text).with_context(|| format!("write {}", file.display()))
    }

    /// Its network namespace.
    ///
    /// # Errors
    /// If it is off.
    pub fn netns(&self) -> anyhow::Result<Netns> {
        let booted = lock(&self.booted);
        Ok(booted.as_ref().with_context(|| format!("{} is off", self.name))?.netns.clone())
    }

    /// Switches it on. None of its programs is started.
    pub(crate) fn boot(&self, wire: &Wire) -> anyhow::Result<()> {
        let cgroups = Cgroups::create(&self.cluster, &self.name)?;
        let netns = wire.plug(&self.name, self.number)?;
        let log = self.log_file("boot")?;
        let mut command = Command::new(self.folder.join("machine.sh"));
        command
            .arg("join")
            .arg(&self.folder)
            .arg(&self.name)
            .arg(&self.programs)
            .args(cgroups.folders())
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C at the terminal is ours; the machine ends with us.
            .process_group(0);
        let mut init = netns.run(|| command.spawn())?.context("start a machine")?;
        let mut line = String::new();
        if let Some(stdout) = init.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let namespaces = if line == "ready\n" {
            Namespaces::of(init.id())
        } else {
            Err(anyhow::anyhow!("no sign of it"))
        };
        match namespaces {
            Ok(namespaces) => {
                *lock(&self.booted) =
                    Some(Booted { init, namespaces: Arc::new(namespaces), netns });
                Ok(())
            }
            Err(error) => {
                init.kill()?;
                init.wait()?;
                Err(error.context(format!("{} did not boot\n{}", self.name, self.log_end("boot"))))
            }
        }
    }

    /// Switches it off, as if the power went: all of its processes, mounts and network namespaces
    /// are gone, the disk is left as it was.
    pub(crate) fn switch_off(&self, wire: &Wire) -> anyhow::Result<()> {
        // Its init cannot end before our own children have been waited for.
        for (_, mut child) in std::mem::take(&mut *lock(&self.children)) {
            drop(child.kill());
            child.wait()?;
        }
        let Some(mut booted) = lock(&self.booted).take() else { return Ok(()) };
        booted.init.kill()?;
        booted.init.wait()?;
        let inside = booted.namespaces.pid_namespace();
        drop(booted);
        wire.unplug(&self.name)?;
        let deadline = Instant::now() + DEATH_PATIENCE;
        loop {
            let removed = cgroups::cluster_folders(&self.cluster)?
                .iter()
                .try_for_each(|group| cgroups::remove(&group.join(&self.name)));
            match removed {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| {
                        format!("{} has processes left, in {inside:?}", self.name)
                    });
                }
                Err(_) => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Runs `work` on a thread that is inside of the machine, with its files and its network. What it
    /// starts runs there, too.
    ///
    /// # Errors
    /// If the machine is off.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let namespaces = {
            let booted = lock(&self.booted);
            let booted = booted.as_ref().with_context(|| format!("{} is off", self.name))?;
            Arc::clone(&booted.namespaces)
        };
        namespaces.run(work)
    }

    /// Runs a program of the machine to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn output(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null());
        self.run(|| command.output())?.with_context(|| format!("run {arguments:?}"))
    }

    /// The same with a file as its standard input.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn output_of_file(&self, arguments: &[&str], input: File) -> anyhow::Result<Output> {
        let mut command = self.command(arguments);
        command.stdin(input);
        self.run(|| command.output())?.with_context(|| format!("run {arguments:?}"))
    }

    /// The same, for its output; fails if the program does.
    ///
    /// # Errors
    /// If it cannot be started or fails.
    pub fn text(&self, arguments: &[&str]) -> anyhow::Result<String> {
        succeeded(&format!("{} on {}", arguments.join(" "), self.name), &self.output(arguments)?)
    }

    /// A program of the machine, to be started by [`Self::run`].
    #[must_use]
    pub fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", IN_CGROUPS, "sh"])
            .args(arguments)
            .current_dir("/")
            .env_clear()
            .env("PATH", PATH)
            .env("HOME", "/root")
            .process_group(0);
        command
    }

    /// Starts a program that stays, under a name of its own.
    pub(crate) fn start(&self, name: &str, arguments: &[String]) -> anyhow::Result<()> {
        let log = self.log_file(name)?;
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = self.run(|| command.spawn())?.with_context(|| format!("start {name}"))?;
        lock(&self.children).insert(name.to_owned(), child);
        Ok(())
    }

    /// Stops a program that stays: first asks, then kills it.
    pub(crate) fn stop(&self, name: &str) -> anyhow::Result<()> {
        let child = lock(&self.children).remove(name);
        let Some(mut child) = child else { bail!("{name} does not run on {}", self.name) };
        kill(Pid::from_raw(child.id().try_into()?), Signal::SIGTERM)
            .with_context(|| format!("stop {name}"))?;
        let deadline = Instant::now() + STOP_PATIENCE;
        while child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                child.kill()?;
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whether a program that was started to stay runs.
    pub(crate) fn runs(&self, name: &str) -> anyhow::Result<bool> {
        match lock(&self.children).get_mut(name) {
            Some(child) => Ok(child.try_wait()?.is_none()),
            None => Ok(false),
        }
    }

    /// Fails if a program that was to stay has ended; with the end of its log.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let mut ended = None;
        for (name, child) in lock(&self.children).iter_mut() {
            if let Some(status) = child.try_wait()? {
                ended = Some((name.clone(), status));
            }
        }
        match ended {
            Some((name, status)) => {
                bail!("{name} on {} ended: {status}\n{}", self.name, self.log_end(&name))
            }
            None => Ok(()),
        }
    }

    /// The process number of a program that stays, such as `kubelet`.
    #[must_use]
    pub fn process(&self, name: &str) -> Option<u32> {
        lock(&self.children).get(name).map(Child::id)
    }

    /// The log file of a program that stays, such as `kubelet`.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{}-{name}.log", self.name))
    }

    /// The last lines of a log, under a heading.
    #[must_use]
    pub fn log_end(&self, name: &str) -> String {
        let text = fs::read(self.log(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.len().saturating_sub(LAST_LINES);
        let last = lines.get(first..).unwrap_or_default().join("\n");
        format!("--- the end of the log of {name} on {}\n{last}", self.name)
    }

    /// The ends of the logs of all programs that run.
    #[must_use]
    pub fn log_ends(&self) -> String {
        let names: Vec<String> = lock(&self.children).keys().cloned().collect();
        names.iter().map(|name| self.log_end(name)).collect::<Vec<_>>().join("\n")
    }

    /// The numbers of its namespaces, as `/proc` tells them.
    pub(crate) fn namespace_numbers(&self) -> Vec<u64> {
        let booted = lock(&self.booted);
        booted.as_ref().map(|booted| booted.namespaces.numbers()).unwrap_or_default()
    }

    fn log_file(&self, name: &str) -> anyhow::Result<File> {
        let path = self.log(name);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }
}

impl Namespaces {
    /// Those of a machine's first process, which itself is outside of the namespace of processes.
    fn of(process: u32) -> anyhow::Result<Self> {
        // The mounts come last: from there on, other paths hold.
        let kinds = [
            ("cgroup", CloneFlags::CLONE_NEWCGROUP),
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("net", CloneFlags::CLONE_NEWNET),
            ("pid_for_children", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        let mut files = Vec::new();
        for (name, flag) in kinds {
            let path = format!("/proc/{process}/ns/{name}");
            files.push((File::open(&path).with_context(|| format!("open {path}"))?, flag));
        }
        Ok(Self { files })
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("machine".to_owned()).spawn_scoped(
                scope,
                || -> anyhow::Result<T> {
                    // Root and working directory are shared with the other threads otherwise.
                    unshare(CloneFlags::CLONE_FS).context("leave the other threads' directory")?;
                    for (file, flag) in &self.files {
                        setns(file, *flag).with_context(|| format!("enter {flag:?}"))?;
                    }
                    Ok(work())
                },
            )?;
            match inside.join() {
                Ok(result) => result,
                Err(payload) => panic::resume_unwind(payload),
            }
        })
    }

    fn pid_namespace(&self) -> Option<u64> {
        self.numbers().get(4).copied()
    }

    fn numbers(&self) -> Vec<u64> {
        use std::os::unix::fs::MetadataExt;
        let metadata = self.files.iter().filter_map(|(file, _)| file.metadata().ok());
        metadata.map(|metadata| metadata.ino()).collect()
    }
}

/// A lock whose holder cannot leave anything half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A program's output as text, or an error that tells what it wrote.
pub(crate) fn succeeded(what: &str, output: &Output) -> anyhow::Result<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        bail!("{what}: {}\n{text}{errors}", output.status);
    }
    Ok(text)
}
