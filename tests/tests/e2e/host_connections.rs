//! Connections of workloads that are processes of a host, told by user and by cgroup: nothing of them leaves in clear and
//! nothing gets stuck, as with network namespaces.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_linux::pass::Receiver;
use hauberk_tests::mesh::{Mesh, OUTSIDE, PATIENCE, is};

use crate::{
    capture::{
        SECRET, answer_everybody, expect, flush_under_attack, outlive_connection_tracking, shell,
        unheard,
    },
    programs::Process,
};

crate::trials!(
    connections_of_users_outlive_their_entries_in_connection_tracking,
    connections_of_cgroups_outlive_their_entries_in_connection_tracking,
    flushed_rules_let_nothing_of_users_through,
    flushed_rules_let_nothing_into_cgroups,
    what_a_user_opens_while_rules_are_missing_goes_nowhere,
    what_a_cgroup_opens_while_rules_are_missing_is_cut_and_recorded,
    what_is_opened_over_loopback_while_rules_are_missing_is_cut_and_recorded,
    what_is_opened_under_audit_while_rules_are_missing_goes_on_and_is_recorded,
    sockets_bound_to_an_interface_are_recorded_with_their_workload,
    what_is_older_than_a_host_s_workloads_is_closed_but_for_undeclared_ports,
);

const MACHINE_B: u8 = 3;
const PORT: u16 = 7070;

/// Makes sockets, and passes them to the test. Whose they are is told by who made them.
const SOCKET_MAKER: &str = "
import socket, sys
test = socket.socket(fileno=0)
listener = None
for line in sys.stdin:
    what, address, port = line.split()
    try:
        if what == 'listen':
            made = listener = socket.create_server((address, int(port)))
        elif what == 'accept':
            made, _ = listener.accept()
        else:
            made = socket.create_connection((address, int(port)), timeout=5)
            made.settimeout(None)
        socket.send_fds(test, [b'made\\n'], [made.fileno()])
        if made is not listener:
            made.close()
    except OSError as error:
        test.send(f'{error}\\n'.encode())
";

/// A program that is a workload.
struct Program {
    child: Child,
    answers: Receiver,
}

impl Program {
    fn start(mesh: &Mesh, machine: &str, process: &Process) -> anyhow::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(PATIENCE))?;
        let mut command = process.command("python3");
        command.args(["-c", SOCKET_MAKER]).stdin(Stdio::from(OwnedFd::from(theirs)));
        let child = mesh.namespace(machine)?.run(|| command.spawn())??;
        Ok(Self { child, answers: Receiver::new(ours) })
    }

    fn make(&mut self, what: &str, at: SocketAddr) -> anyhow::Result<OwnedFd> {
        self.answers
            .stream()
            .write_all(format!("{what} {} {}\n", at.ip(), at.port()).as_bytes())?;
        let line = self.answers.line()?.context("the program has ended")?;
        self.answers.file().with_context(|| format!("{what} {at}: {line}"))
    }

    fn connect(&mut self, to: SocketAddr) -> anyhow::Result<TcpStream> {
        patient(self.make("connect", to)?)
    }

    fn accept(&mut self, at: SocketAddr) -> anyhow::Result<TcpStream> {
        patient(self.make("accept", at)?)
    }
}

fn patient(socket: OwnedFd) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// How a host's workloads are told apart.
#[derive(Clone, Copy)]
enum By {
    User,
    Cgroup,
}

impl By {
    fn process(self, name: &str, user: u32) -> anyhow::Result<Process> {
        match self {
            Self::User => Ok(Process::User(user)),
            Self::Cgroup => Process::in_cgroup(name),
        }
    }
}

/// Both workloads, and the policy that allows the caller.
fn manifest(mode: &str, caller: &Process, store: &Process) -> String {
    let workload = |name: &str, machine: &str, process: &Process, ports: &str| {
        format!(
            "---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: jobs, labels: {{app: {name}}}}}
spec:
  machine: {machine}
  serviceAccount: {name}
  process: {}
  mode: {mode}
  ports: [{ports}]
",
            process.selector()
        )
    };
    workload("caller", "machine-a", caller, "")
        + &workload("store", "machine-b", store, "7070")
        + "---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: store, namespace: jobs}
spec:
  owner: {team: jobs, contact: '#jobs'}
  target: {selector: {matchLabels: {app: store}}}
  rules:
  - name: caller
    ports: [7070]
    from: [{serviceAccount: {namespace: jobs, name: caller}}]
"
}

/// A caller on machine-a, and a store on machine-b that it may reach.
struct Pair {
    // The programs end first, or their cgroups would stay.
    caller: Program,
    store: Program,
    caller_process: Process,
    _store_process: Process,
    mesh: Mesh,
}

impl Pair {
    fn start(by: By) -> anyhow::Result<Self> {
        Self::start_in(by, "Enforce")
    }

    fn start_in(by: By, mode: &str) -> anyhow::Result<Self> {
        let mesh = Mesh::start()?;
        let before = mesh.wait_revision(0)?;
        let caller_process = by.process("caller", 4444)?;
        let store_process = by.process("store", 4343)?;
        let manifest = manifest(mode, &caller_process, &store_process);
        mesh.write_manifest("jobs.yaml", &manifest)?;
        mesh.wait_revision(before)?;
        mesh.wait_ready()?;
        let caller = Program::start(&mesh, "machine-a", &caller_process)?;
        let mut store = Program::start(&mesh, "machine-b", &store_process)?;
        store.make("listen", Self::target())?;
        Ok(Self { caller, store, caller_process, _store_process: store_process, mesh })
    }

    fn target() -> SocketAddr {
        SocketAddr::new(ipv4(MACHINE_B), PORT)
    }

    /// A connection from one to the other, and the other's end of it.
    fn joined(&mut self) -> anyhow::Result<(TcpStream, TcpStream)> {
        let mut client = self.caller.connect(Self::target())?;
        client.write_all(b"hello")?;
        let mut server = self.store.accept(Self::target())?;
        expect(&mut server, b"hello")?;
        Ok((client, server))
    }
}

fn outlive(by: By) -> anyhow::Result<()> {
    let mut pair = Pair::start(by)?;
    let connections = [pair.joined()?, pair.joined()?, pair.joined()?];
    outlive_connection_tracking(&pair.mesh, ["machine-a", "machine-b"], connections)
}

fn connections_of_users_outlive_their_entries_in_connection_tracking() -> anyhow::Result<()> {
    outlive(By::User)
}

fn connections_of_cgroups_outlive_their_entries_in_connection_tracking() -> anyhow::Result<()> {
    outlive(By::Cgroup)
}

/// Flushes nftables on a machine again and again. What is open goes on, without a word in clear.
fn flush_under(machines: &[&str], pair: &mut Pair) -> anyhow::Result<()> {
    let (mut client, mut server) = pair.joined()?;
    let elsewhere = SocketAddr::new(ipv4(MACHINE_B), 7071);
    unheard(&pair.mesh, || {
        flush_under_attack(&pair.mesh, "machine-b", "machine-b", Pair::target())?;
        for machine in machines.iter().cycle().take(10) {
            shell(&pair.mesh, machine, "nft flush ruleset")?;
            client.write_all(SECRET)?;
            expect(&mut server, SECRET)?;
            server.write_all(SECRET)?;
            expect(&mut client, SECRET)?;
        }
        Ok(())
    })?;
    drop((client, server));
    // What nobody declared is as open as ever.
    answer_everybody(pair.mesh.listen("machine-b", elsewhere)?);
    pair.mesh.connect("outside", elsewhere)?;
    pair.joined().map(drop)
}

fn flushed_rules_let_nothing_of_users_through() -> anyhow::Result<()> {
    flush_under(&["machine-a", "machine-b"], &mut Pair::start(By::User)?)
}

/// Only into them: routing cannot tell what a cgroup sends.
fn flushed_rules_let_nothing_into_cgroups() -> anyhow::Result<()> {
    flush_under(&["machine-b"], &mut Pair::start(By::Cgroup)?)
}

/// Connects while the rules of a machine are flushed and its agent is held up, and waits until they are back.
fn without_rules<T>(
    mesh: &Mesh,
    machine: &str,
    connect: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<anyhow::Result<T>> {
    let connected = mesh.while_held_up(machine, || {
        shell(mesh, machine, "nft flush ruleset")?;
        Ok(connect())
    })?;
    let resumed = Instant::now();
    mesh.wait("the rules", PATIENCE, |mesh| {
        let installed = mesh.namespace(machine)?.run(hauberk_linux::capture::installed)??;
        ensure!(installed, "they are not back");
        Ok(())
    })?;
    println!("back after {:?}", resumed.elapsed());
    Ok(connected)
}

fn what_a_user_opens_while_rules_are_missing_goes_nowhere() -> anyhow::Result<()> {
    let mut pair = Pair::start(By::User)?;
    let to = SocketAddr::new(ipv4(OUTSIDE), 80);
    let outside = pair.mesh.listen("outside", to)?;
    outside.set_nonblocking(true)?;
    let connected = without_rules(&pair.mesh, "machine-a", || pair.caller.connect(to))?;
    ensure!(connected.is_err(), "it is connected");
    ensure!(outside.accept().is_err(), "it went out as it is");
    pair.joined().map(drop)
}

fn what_a_cgroup_opens_while_rules_are_missing_is_cut_and_recorded() -> anyhow::Result<()> {
    let mut pair = Pair::start(By::Cgroup)?;
    let to = SocketAddr::new(ipv4(OUTSIDE), 80);
    let _outside = pair.mesh.listen("outside", to)?;
    let connected = without_rules(&pair.mesh, "machine-a", || pair.caller.connect(to))?;
    is_cut(connected.context("a cgroup is not closed meanwhile")?, ErrorKind::ConnectionAborted)?;
    let record = pair.mesh.record("machine-a", |record| is(record, "reason", "uncaptured"))?;
    ensure!(record["src"]["workload"] == "caller", "{record}");
    pair.joined().map(drop)
}

fn what_is_opened_over_loopback_while_rules_are_missing_is_cut_and_recorded() -> anyhow::Result<()>
{
    for by in [By::User, By::Cgroup] {
        let mut pair = Pair::start(by)?;
        let (mut client, mut server) = pair.joined()?;
        let mesh = &pair.mesh;
        let connected =
            without_rules(mesh, "machine-b", || mesh.connect("machine-b", Pair::target()))?;
        is_cut(connected.context("loopback is not closed meanwhile")?, ErrorKind::ConnectionReset)?;
        let record = mesh.record("machine-b", |record| is(record, "reason", "uncaptured"))?;
        ensure!(record["dst"]["workload"] == "store", "{record}");
        // What the agent carries over the same loopback goes on.
        client.write_all(SECRET)?;
        expect(&mut server, SECRET)?;
    }
    Ok(())
}

/// Audit cuts nothing, not even then.
fn what_is_opened_under_audit_while_rules_are_missing_goes_on_and_is_recorded() -> anyhow::Result<()>
{
    let mut pair = Pair::start_in(By::Cgroup, "Audit")?;
    let to = SocketAddr::new(ipv4(OUTSIDE), 80);
    let outside = pair.mesh.listen("outside", to)?;
    let mut client = without_rules(&pair.mesh, "machine-a", || pair.caller.connect(to))?
        .context("no way out")?;
    let (mut far, _) = outside.accept()?;
    far.set_read_timeout(Some(PATIENCE))?;
    let record = pair.mesh.record("machine-a", |record| is(record, "reason", "uncaptured"))?;
    ensure!(is(&record, "decision", "would_deny"), "{record}");
    ensure!(record["src"]["workload"] == "caller", "{record}");
    let mut local =
        without_rules(&pair.mesh, "machine-b", || pair.mesh.connect("machine-b", Pair::target()))?
            .context("no way in")?;
    let mut served = pair.store.accept(Pair::target())?;
    let record = pair.mesh.record("machine-b", |record| is(record, "reason", "uncaptured"))?;
    ensure!(is(&record, "decision", "would_deny"), "{record}");
    for (one, other) in [(&mut client, &mut far), (&mut local, &mut served)] {
        for _ in 0..3 {
            one.write_all(b"there")?;
            expect(other, b"there")?;
            other.write_all(b"back")?;
            expect(one, b"back")?;
        }
    }
    Ok(())
}

fn is_cut(mut stream: TcpStream, how: ErrorKind) -> anyhow::Result<()> {
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == how => Ok(()),
        other => bail!("it goes on: {other:?}"),
    }
}

fn sockets_bound_to_an_interface_are_recorded_with_their_workload() -> anyhow::Result<()> {
    for by in [By::User, By::Cgroup] {
        let pair = Pair::start(by)?;
        let outside = pair.mesh.listen("outside", SocketAddr::new(ipv4(OUTSIDE), 80))?;
        outside.set_nonblocking(true)?;
        let mut curl = pair.caller_process.command("curl");
        curl.args(["-sS", "--interface", "if!eth0", "--max-time", "20", "http://10.77.0.99/"]);
        let output = pair.mesh.output("machine-a", &mut curl)?;
        ensure!(!output.status.success(), "{output:?}");
        ensure!(outside.accept().is_err(), "it went out as it is");
        let record = pair.mesh.record("machine-a", |record| is(record, "reason", "uncaptured"))?;
        ensure!(record["src"]["workload"] == "caller", "{record}");
    }
    Ok(())
}

/// What users opened before anybody declared them is closed when they are enforced. What comes in on a port that nobody
/// declared is no business of the mesh, whoever listens.
fn what_is_older_than_a_host_s_workloads_is_closed_but_for_undeclared_ports() -> anyhow::Result<()>
{
    let mesh = Mesh::start_with_agents(&[], &["--older-connections=0s"])?;
    let before = mesh.wait_revision(0)?;
    let [caller_process, store_process] = [Process::User(4444), Process::User(4343)];
    let mut caller = Program::start(&mesh, "machine-a", &caller_process)?;
    let mut store = Program::start(&mesh, "machine-b", &store_process)?;
    let mut exporter = Program::start(&mesh, "machine-b", &store_process)?;
    let undeclared = SocketAddr::new(ipv4(MACHINE_B), 9187);
    store.make("listen", Pair::target())?;
    exporter.make("listen", undeclared)?;
    let mut older = (caller.connect(Pair::target())?, store.accept(Pair::target())?);
    let mut scraped = (mesh.connect("outside", undeclared)?, exporter.accept(undeclared)?);
    let talk = |(one, other): &mut (TcpStream, TcpStream)| {
        one.write_all(b"asked")?;
        expect(other, b"asked")?;
        other.write_all(b"answered")?;
        expect(one, b"answered")
    };
    talk(&mut older)?;
    talk(&mut scraped)?;
    mesh.write_manifest("jobs.yaml", &manifest("Enforce", &caller_process, &store_process))?;
    mesh.wait_revision(before)?;
    mesh.wait_ready()?;
    match older.0.read(&mut [0]) {
        Err(error)
            if [ErrorKind::ConnectionReset, ErrorKind::ConnectionAborted]
                .contains(&error.kind()) => {}
        other => bail!("it goes on: {other:?}"),
    }
    // By whichever agent looked first: the reset is the end of it for the other one.
    let recorded = |machine: &str| -> anyhow::Result<bool> {
        let text = std::fs::read_to_string(mesh.records(machine)).unwrap_or_default();
        Ok(text.lines().any(|line| line.contains("\"uncaptured\"")))
    };
    mesh.wait("the record", PATIENCE, |_| {
        ensure!(recorded("machine-a")? || recorded("machine-b")?, "nobody has recorded it");
        Ok(())
    })?;
    // For longer than it takes to look at everything again.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        talk(&mut scraped).context("on a port that nobody declared")?;
        std::thread::sleep(Duration::from_millis(1_200));
    }
    // What is opened anew goes through the mesh.
    let mut pair = Pair { caller, store, caller_process, _store_process: store_process, mesh };
    pair.joined().map(drop)
}
