//! A laboratory on one machine: network namespaces joined by a bridge stand for machines and
//! workloads, and the real programs run in them as children. Everything goes when the lab does. If its
//! process is killed, the namespaces still go, as nobody holds them any more, and the children, as their
//! standard input ends; only its folder under the temporary one stays.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use hauberk_linux::{Netns, links};
use hauberk_proto::v1;

use crate::operator;

/// How long a child may take to stop by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(20);

const BRIDGE: &str = "wire";

/// The number of the control plane's machine in the lab's networks.
pub const CONTROL_PLANE: u8 = 1;

/// The laboratory.
pub struct Lab {
    children: BTreeMap<String, Running>,
    namespaces: BTreeMap<String, Netns>,
    wire: Netns,
    program: Vec<OsString>,
    folder: tempfile::TempDir,
    control_plane_arguments: Vec<String>,
}

/// A child process. Stops with its handle.
pub struct Running {
    child: Child,
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT and SIGTERM do not end the process at once: [`interrupted`] tells of them, so
/// that what was made is taken down.
///
/// # Errors
/// If the signals cannot be listened for.
pub fn listen_for_interrupts() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        INTERRUPTED.store(true, Ordering::Relaxed);
    });
    Ok(())
}

/// An error once a signal has come.
///
/// # Errors
/// That one.
pub fn interrupted() -> anyhow::Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; nothing is left behind");
    }
    Ok(())
}

/// What a namespace number's addresses are.
#[must_use]
pub fn ipv4(number: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 77, 0, number))
}

/// The same for IPv6.
#[must_use]
pub fn ipv6(number: u8) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, number.into()))
}

/// Makes namespaces possible without root: enters a user namespace in which this process is root.
/// Must be called while the process has one thread. Returns whether it was needed.
///
/// # Errors
/// If the kernel does not allow it.
pub fn become_root() -> anyhow::Result<bool> {
    use nix::{sched::CloneFlags, unistd};
    let (user, group) = (unistd::geteuid(), unistd::getegid());
    if user.is_root() {
        return Ok(false);
    }
    nix::sched::unshare(CloneFlags::CLONE_NEWUSER).context(
        "make a user namespace; the kernel does not allow it to ordinary users here: run as root, \
         or allow unprivileged user namespaces",
    )?;
    fs::write("/proc/self/setgroups", "deny").context("set up the user namespace")?;
    fs::write("/proc/self/uid_map", format!("0 {user} 1")).context("set up the user namespace")?;
    fs::write("/proc/self/gid_map", format!("0 {group} 1")).context("set up the user namespace")?;
    Ok(true)
}

impl Lab {
    /// An empty lab. `program` is the `hauberk` command: a path, and arguments that come first.
    ///
    /// # Errors
    /// If namespaces cannot be made.
    pub fn new(program: Vec<OsString>) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("hauberk-").tempdir()?;
        for name in ["netns", "manifests", "logs"] {
            fs::create_dir(folder.path().join(name))?;
        }
        let wire = Netns::create().context("make a network namespace")?;
        wire.run(|| {
            links::create_bridge(BRIDGE)?;
            links::set_up(BRIDGE)
        })??;
        let mut lab = Self {
            children: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            wire,
            program,
            folder,
            control_plane_arguments: Vec::new(),
        };
        lab.add("control", CONTROL_PLANE)?;
        Ok(lab)
    }

    /// The lab's own folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where manifests go.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        self.folder.path().join("manifests")
    }

    /// The namespace of the wire between all the others.
    #[must_use]
    pub fn wire(&self) -> &Netns {
        &self.wire
    }

    /// A namespace on the wire, with the addresses [`ipv4`] and [`ipv6`] of `number`.
    ///
    /// # Errors
    /// If the kernel does not allow it.
    pub fn add(&mut self, name: &str, number: u8) -> anyhow::Result<Netns> {
        let netns = Netns::create()?;
        let end = format!("veth{number}");
        let inside = netns.clone();
        self.wire.run(|| {
            links::create_veth(&end, "eth0", &inside)?;
            links::attach(&end, BRIDGE)?;
            links::set_up(&end)
        })??;
        netns.run(|| {
            links::add_address("eth0", ipv4(number), 24)?;
            links::add_address("eth0", ipv6(number), 64)?;
            links::set_up("eth0")
        })??;
        std::os::unix::fs::symlink(netns.proc_path(), self.folder.path().join("netns").join(name))?;
        self.namespaces.insert(name.to_owned(), netns.clone());
        Ok(netns)
    }

    /// A namespace made before.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn namespace(&self, name: &str) -> anyhow::Result<&Netns> {
        self.namespaces.get(name).with_context(|| format!("the lab has no namespace {name}"))
    }

    /// Writes a manifest so that no half of it is ever seen.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_manifest(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let hidden = self.manifests().join(format!(".{name}"));
        fs::write(&hidden, text)?;
        Ok(fs::rename(hidden, self.manifests().join(name))?)
    }

    /// A program in one of the lab's namespaces, its output in a log file of that name.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(
        &self,
        namespace: &str,
        log: &str,
        command: &mut Command,
    ) -> anyhow::Result<Running> {
        let log = File::options().create(true).append(true).open(self.log(log))?;
        // A group of its own: Ctrl-C at the terminal is ours, the children stop with us.
        command.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).process_group(0);
        let child = self.namespace(namespace)?.run(|| command.spawn())?;
        Ok(Running { child: child.with_context(|| format!("start {command:?}"))? })
    }

    /// The log file of a child.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.folder.path().join("logs").join(format!("{name}.log"))
    }

    /// The `hauberk` command.
    ///
    /// # Errors
    /// If the lab was made without one.
    pub fn hauberk(&self) -> anyhow::Result<Command> {
        let (program, first) = self.program.split_first().context("no program")?;
        let mut command = Command::new(program);
        command.args(first);
        Ok(command)
    }

    /// Starts the control plane, with more arguments if wanted, and waits until it answers.
    ///
    /// # Errors
    /// If it does not.
    pub fn start_control_plane(&mut self, arguments: &[&str]) -> anyhow::Result<()> {
        self.control_plane_arguments = arguments.iter().map(|&text| text.to_owned()).collect();
        self.restart_control_plane()
    }

    /// Starts the control plane again as before.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn restart_control_plane(&mut self) -> anyhow::Result<()> {
        let address = SocketAddr::new(ipv4(CONTROL_PLANE), 8443);
        let mut command = self.hauberk()?;
        command
            .args(["control-plane", "--stop-with-stdin", "--trust-domain", "example.org"])
            .arg("--data")
            .arg(self.folder.path().join("control-plane"))
            .arg("--manifests")
            .arg(self.manifests())
            .arg("--listen")
            .arg(address.to_string())
            .args(&self.control_plane_arguments);
        let running = self.spawn("control", "control-plane", &mut command)?;
        self.children.insert("control-plane".to_owned(), running);
        self.wait("the control plane", Duration::from_secs(20), |lab| lab.status().map(|_| ()))
    }

    /// Joins a machine and starts its agent. A later call for the same machine starts it again.
    ///
    /// # Errors
    /// If it cannot.
    pub fn start_agent(&mut self, machine: &str, arguments: &[&str]) -> anyhow::Result<()> {
        self.start_agent_with(machine, arguments, &[])
    }

    /// The same, with more environment variables.
    ///
    /// # Errors
    /// If it cannot.
    pub fn start_agent_with(
        &mut self,
        machine: &str,
        arguments: &[&str],
        variables: &[(&str, OsString)],
    ) -> anyhow::Result<()> {
        let data = self.data(machine);
        let mut command = self.hauberk()?;
        command
            .args(["agent", "--stop-with-stdin"])
            .arg("--data")
            .arg(&data)
            .arg("--netns-dir")
            .arg(self.netns_dir())
            .arg("--records")
            .arg(self.records(machine))
            .args(arguments)
            .envs(variables.iter().cloned());
        if !data.join("node.json").exists() {
            command.env("HAUBERK_JOIN_TOKEN", self.token(machine)?);
        }
        let running = self.spawn(machine, machine, &mut command)?;
        self.children.insert(machine.to_owned(), running);
        Ok(())
    }

    /// An agent's data folder.
    #[must_use]
    pub fn data(&self, machine: &str) -> PathBuf {
        self.folder.path().join(machine)
    }

    /// Where agents find the lab's namespaces.
    #[must_use]
    pub fn netns_dir(&self) -> PathBuf {
        self.folder.path().join("netns")
    }

    /// Where an agent's records are.
    #[must_use]
    pub fn records(&self, machine: &str) -> PathBuf {
        self.folder.path().join("logs").join(format!("{machine}.records.jsonl"))
    }

    /// A join token, as people make it.
    ///
    /// # Errors
    /// If the control plane does not give one.
    pub fn token(&self, machine: &str) -> anyhow::Result<String> {
        let output = self
            .hauberk()?
            .args(["token", "create", "--node", machine, "--socket"])
            .arg(self.socket())
            .output()?;
        if !output.status.success() {
            bail!("token: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// The operator socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("control-plane").join("operator.sock")
    }

    /// What the control plane says of the mesh.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn status(&self) -> anyhow::Result<v1::GetStatusResponse> {
        operator::get_status(&self.socket())
    }

    /// Takes a child out of the lab's care: another one may be started in its name beside it.
    #[must_use]
    pub fn release(&mut self, name: &str) -> Option<Running> {
        self.children.remove(name)
    }

    /// Stops a child as an administrator does.
    pub fn stop(&mut self, name: &str) {
        self.children.remove(name);
    }

    /// Kills a child as the kernel does.
    pub fn kill(&mut self, name: &str) {
        if let Some(running) = self.children.get_mut(name) {
            running.kill();
        }
        self.children.remove(name);
    }

    /// The process number of a child.
    #[must_use]
    pub fn process(&self, name: &str) -> Option<u32> {
        self.children.get(name).map(|running| running.child.id())
    }

    /// Waits until every agent enforces the newest revision and every workload is captured and has
    /// its certificate.
    ///
    /// # Errors
    /// With what is still missing when the time is over.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        self.wait("the mesh", Duration::from_secs(30), |lab| {
            let status = lab.status()?;
            if let Some(error) = status.manifest_errors.first() {
                bail!("{error}");
            }
            for node in &status.nodes {
                if node.connected && node.enforced_revision != status.revision {
                    bail!("node {} does not enforce revision {}", node.name, status.revision);
                }
            }
            for workload in &status.workloads {
                let here = status.nodes.iter().any(|n| n.name == workload.node && n.connected);
                if !here || !workload.captured || workload.not_after_unix_ms == 0 {
                    bail!("{} is not ready: {}", workload.workload, workload.problem);
                }
            }
            Ok(())
        })
    }

    /// Tries again until it works.
    ///
    /// # Errors
    /// With the last error when the time is over.
    pub fn wait(
        &self,
        what: &str,
        patience: Duration,
        mut ready: impl FnMut(&Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            interrupted()?;
            match ready(self) {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > deadline => {
                    return Err(error.context(format!("{what} did not become ready")));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    /// An HTTP GET from a namespace: the body, or why there is none.
    ///
    /// # Errors
    /// If the connection fails, or the answer is not a 200.
    pub fn get(&self, from: &str, to: SocketAddr, path: &str) -> anyhow::Result<String> {
        self.namespace(from)?.run(|| http_get(to, path))?
    }
}

fn http_get(to: SocketAddr, path: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer is not HTTP")?;
    if !head.starts_with("HTTP/1.1 200") {
        bail!("{}", head.lines().next().unwrap_or("no answer"));
    }
    Ok(body.to_owned())
}

impl Running {
    /// Its process number.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Our own programs stop when their standard input ends; others get the signal.
        drop(self.child.stdin.take());
        if let Ok(id) = i32::try_from(self.child.id()) {
            // It may have ended already.
            let _gone = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(id),
                nix::sys::signal::Signal::SIGTERM,
            );
        }
        let deadline = Instant::now() + STOP_PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.kill();
    }
}
