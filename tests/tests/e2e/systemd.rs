//! The units of `packaging/systemd`, run by a real systemd: a machine that boots in namespaces of its own, in the network of
//! the lab's machine-b.

use std::{
    fs,
    io::Read,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_tests::mesh::{CHECKOUT, Mesh, PATIENCE, WEB, workload};

use crate::{
    capture::{answer_everybody, intrude, is_answered, store},
    programs::Process,
};

crate::trials!(a_machine_with_our_units_is_closed_from_boot_to_boot);

const MACHINE_B: u8 = 3;
const PORT: u16 = 7070;

/// With this the agent waits to be started until the test has looked around, and the journal can be read.
const HELD: &str = "[Service]
Environment=HAUBERK_RECORDS=/run/records.jsonl
ExecStartPre=/bin/sh -c 'until test -e /run/hauberk-may-start; do sleep 0.05; done'
";

/// A machine that runs.
struct Machine {
    child: Child,
    /// Its process 1.
    init: u32,
    cgroup: Process,
}

impl Machine {
    /// Boots. Its disk and units are in `folder`.
    fn boot(mesh: &Mesh, folder: &Path) -> anyhow::Result<Self> {
        let cgroup = Process::in_cgroup("machine")?;
        let root = folder.join("root");
        fs::create_dir_all(&root)?;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/systemd/boot");
        let mut command = cgroup.command("unshare");
        command
            .args(["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork"])
            .arg("--kill-child=SIGKILL")
            .arg(script)
            .arg(&root)
            .arg(folder.join("units"))
            .arg(mesh.data("machine-b"))
            .arg(std::env::current_exe()?)
            .stdin(Stdio::null());
        let log = fs::File::options().create(true).append(true).open(mesh.log("boot"))?;
        command.stdout(log.try_clone()?).stderr(log);
        let child = mesh.namespace("machine-b")?.run(|| command.spawn())??;
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let mut machine = Self { child, init: 0, cgroup };
        mesh.wait("the boot; it needs real root", PATIENCE, |_| {
            let init: u32 = fs::read_to_string(&children)?.trim().parse()?;
            let command = fs::read_to_string(format!("/proc/{init}/comm"))?;
            ensure!(command.trim() == "systemd", "process 1 is {command}");
            machine.init = init;
            Ok(())
        })?;
        Ok(machine)
    }

    /// A program in the machine, to its end.
    fn output(&self, line: &str) -> anyhow::Result<String> {
        let output = Command::new("nsenter")
            .arg(format!("--target={}", self.init))
            .args(["--all", "sh", "-c", line])
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{line}: {text}{}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(text)
    }

    /// Properties of a unit, in microseconds since the machine was started.
    fn time(&self, unit: &str, property: &str) -> anyhow::Result<u64> {
        let text = self.output(&format!("systemctl show --value -p {property} {unit}"))?;
        text.trim().parse().with_context(|| format!("{property} of {unit}: {text:?}"))
    }

    fn wait_active(&self, mesh: &Mesh, unit: &str) -> anyhow::Result<()> {
        mesh.wait(unit, PATIENCE, |_| self.output(&format!("systemctl is-active {unit}")).map(drop))
            .with_context(|| self.journal())
    }

    /// Until it has nothing left to do: `systemctl` does not wait for what one unit brings about for another.
    fn wait_idle(&self, mesh: &Mesh) -> anyhow::Result<()> {
        mesh.wait("the end of all jobs", PATIENCE, |_| {
            let jobs = self.output("systemctl list-jobs --no-legend")?;
            ensure!(jobs.trim().is_empty(), "{jobs}");
            Ok(())
        })
    }

    fn journal(&self) -> String {
        let text =
            self.output("systemctl --no-pager --failed; journalctl --no-pager -o short-monotonic | grep -v hauberk.connection");
        text.unwrap_or_else(|error| format!("{error:#}"))
    }

    /// Waits until it has shut itself down.
    fn reboot(mut self) -> anyhow::Result<()> {
        self.output("systemctl reboot --no-wall")?;
        let started = Instant::now();
        while self.child.try_wait()?.is_none() {
            ensure!(started.elapsed() < Duration::from_secs(30), "{}", self.journal());
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already; its process 1 and with it all others end with it.
        drop(self.child.kill());
        drop(self.child.wait());
        if let Process::Cgroup(cgroup) = &self.cgroup {
            remove_below(&cgroup.folder);
        }
    }
}

/// The cgroups that the machine has made.
fn remove_below(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            let deadline = Instant::now() + Duration::from_secs(1);
            while fs::remove_dir(entry.path()).is_err() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// The units as they are shipped, and what holds the agent up.
fn write_units(folder: &Path) -> anyhow::Result<()> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd");
    let units = folder.join("units");
    fs::create_dir_all(units.join("hauberk-agent.service.d"))?;
    for unit in ["hauberk-close.service", "hauberk-agent.service"] {
        fs::copy(shipped.join(unit), units.join(unit))?;
    }
    fs::write(units.join("hauberk-agent.service.d/held.conf"), HELD)?;
    Ok(())
}

/// Runs something while somebody tries to get in from outside. Nobody is answered.
fn under_attack(
    mesh: &Mesh,
    target: SocketAddr,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let done = AtomicBool::new(false);
    let (tries, answers) = thread::scope(|scope| {
        let intruder = scope.spawn(|| intrude(mesh, target, &done));
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        let found = intruder.join().map_err(|_| anyhow::anyhow!("the intruder panicked"))?;
        outcome?;
        found
    })?;
    ensure!(tries > 10, "only {tries} tries");
    ensure!(answers == 0, "{answers} of {tries} were answered in clear");
    Ok(())
}

/// The store of machine-b, and no workload in a network namespace there: such a machine has none.
fn manifests(mesh: &Mesh) -> anyhow::Result<()> {
    let on_a = workload("shop", "web", "machine-a", WEB, "")
        + &workload("shop", "checkout", "machine-a", CHECKOUT, "8080");
    mesh.write_manifest("workloads.yaml", &on_a)?;
    mesh.write_manifest("store.yaml", &store("4343", ""))?;
    mesh.remove_manifest("ledger.yaml")
}

fn is_captured(mesh: &Mesh, machine: &Machine) -> anyhow::Result<()> {
    mesh.wait("the capture", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let found = status.workloads.iter().find(|workload| workload.workload == "jobs/store");
        let node = status.nodes.iter().find(|node| node.name == "machine-b");
        ensure!(node.is_some_and(|node| node.connected), "machine-b is away");
        ensure!(found.is_some_and(|workload| workload.captured), "{status:?}");
        Ok(())
    })
    .with_context(|| machine.journal())
}

/// Before the network, after the firewall, and before the agent.
fn is_closed_at_boot(mesh: &Mesh, machine: &Machine) -> anyhow::Result<()> {
    machine.wait_active(mesh, "network-pre.target")?;
    machine.wait_active(mesh, "hauberk-close.service")?;
    let state = machine.output("systemctl is-active hauberk-agent || true")?;
    ensure!(state.trim() != "active", "the agent runs already");
    let closed = machine.time("hauberk-close.service", "ActiveEnterTimestampMonotonic")?;
    let begun = machine.time("hauberk-close.service", "ExecMainStartTimestampMonotonic")?;
    let network = machine.time("network-pre.target", "ActiveEnterTimestampMonotonic")?;
    let firewall = machine.time("nftables.service", "ActiveEnterTimestampMonotonic")?;
    ensure!(firewall <= begun, "nftables at {firewall}, closed from {begun} on");
    ensure!(closed <= network, "closed at {closed}, the network from {network} on");
    let told = machine.output("journalctl --no-pager -o cat -u hauberk-close.service")?;
    ensure!(told.contains("closed: 1 workloads of machine-b in 1 places"), "{told}");
    installed(mesh)
}

fn installed(mesh: &Mesh) -> anyhow::Result<()> {
    let installed = mesh.namespace("machine-b")?.run(hauberk_linux::capture::installed)??;
    ensure!(installed, "the rules are not in place");
    Ok(())
}

/// Nobody gets in over the host's own loopback either.
fn is_closed_within(mesh: &Mesh) -> anyhow::Result<()> {
    let address = SocketAddr::from(([127, 0, 0, 1], PORT));
    let Ok(mut stream) = mesh.connect("machine-b", address) else { return Ok(()) };
    ensure!(!matches!(stream.read(&mut [0]), Ok(1)), "answered over loopback");
    Ok(())
}

/// What an operator does to the services of a machine.
fn manage(mesh: &Mesh, machine: &Machine) -> anyhow::Result<()> {
    // With the agent.
    machine.output("systemctl restart nftables")?;
    mesh.wait("the rules", PATIENCE, installed)?;
    machine.output("systemctl restart hauberk-agent")?;
    is_captured(mesh, machine)?;
    // Without.
    machine.output("systemctl stop hauberk-agent")?;
    installed(mesh)?;
    for change in ["restart nftables", "reload nftables", "stop nftables", "start nftables"] {
        machine.output(&format!("systemctl {change}"))?;
        machine.wait_idle(mesh)?;
        if change != "stop nftables" {
            installed(mesh).with_context(|| format!("{change}\n{}", machine.journal()))?;
            is_closed_within(mesh).context(change)?;
        }
    }
    machine.output("systemctl start hauberk-agent")?;
    is_captured(mesh, machine)
}

fn a_machine_with_our_units_is_closed_from_boot_to_boot() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let target = SocketAddr::new(ipv4(MACHINE_B), PORT);
    manifests(&mesh)?;
    mesh.wait_revision(before)?;
    mesh.wait_ready()?;
    mesh.stop("machine-b");
    answer_everybody(mesh.listen("machine-b", SocketAddr::from(([0, 0, 0, 0], PORT)))?);
    let folder: PathBuf = mesh.folder().join("systemd");
    write_units(&folder)?;
    for _ in 0..2 {
        // The kernel of a machine that starts has nothing.
        mesh.namespace("machine-b")?.run(hauberk_linux::capture::remove)??;
        ensure!(is_answered(&mesh, target), "without any rule the port should be open");
        let machine = Machine::boot(&mesh, &folder)?;
        machine.wait_active(&mesh, "hauberk-close.service")?;
        under_attack(&mesh, target, || {
            is_closed_at_boot(&mesh, &machine)?;
            is_closed_within(&mesh)?;
            machine.output("touch /run/hauberk-may-start")?;
            is_captured(&mesh, &machine)?;
            manage(&mesh, &machine)?;
            machine.reboot()
        })?;
    }
    Ok(())
}
