//! Nothing leaves in clear and nothing gets stuck, whatever happens to the kernel's tables, in which order things
//! start, or to the workload meanwhile.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_linux::packets::{CaptureOptions, PacketCapture};
use hauberk_tests::mesh::{
    CHECKOUT, Mesh, OUTSIDE, PATIENCE, PORTS, WEB, is, ledger_policy, workload,
};

use crate::programs::Process;

crate::trials!(
    connections_outlive_their_entries_in_connection_tracking,
    flushed_rules_let_nothing_through_and_are_back_at_once,
    a_flushed_host_lets_nothing_through_and_heals,
    rules_that_are_flushed_while_they_are_restored_are_back_at_once,
    a_machine_that_boots_is_closed_before_its_agent_starts,
    users_that_two_workloads_claim_are_closed_alone,
    loopback_between_two_workloads_of_a_host_is_decided_at_both_ends,
    an_audited_server_is_reached_over_loopback,
    rules_of_a_workload_that_went_while_no_agent_ran_are_removed,
    routing_of_a_workload_that_went_while_no_agent_ran_is_released,
    a_host_that_has_a_name_among_namespaces_is_no_stray,
    a_workload_in_another_namespace_leaves_the_first_one_free,
    a_socket_bound_to_an_interface_is_refused_with_a_record,
    an_agent_that_is_not_told_of_bound_sockets_says_so,
    connections_end_before_the_capture_of_their_workload,
    a_renamed_workload_keeps_its_connections,
    only_the_agent_reaches_other_agents,
    a_user_made_after_its_workload_is_captured_at_once,
);

pub(crate) const SECRET: &[u8] = b"words-that-must-not-be-on-the-wire";

/// The number of `machine-b` in the lab's networks.
const MACHINE_B: u8 = 3;

pub(crate) fn shell(mesh: &Mesh, namespace: &str, line: &str) -> anyhow::Result<String> {
    mesh.run(namespace, Command::new("sh").args(["-c", line]))
}

/// Runs something while the wire is listened to, and fails if the secret was on it.
pub(crate) fn unheard(
    mesh: &Mesh,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let capture = mesh.wire().run(|| PacketCapture::start(&CaptureOptions::default()))??;
    work()?;
    let captured = capture.stop()?;
    ensure!(captured.is_complete() && captured.lost() == 0, "the capture is not whole");
    ensure!(!captured.contains(SECRET), "the secret was on the wire in clear");
    Ok(())
}

/// A connection from checkout to the ledger, and the ledger's end of it.
fn joined(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut client = mesh.connect("checkout", listener.local_addr()?)?;
    client.write_all(b"hello")?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    expect(&mut server, b"hello")?;
    Ok((client, server))
}

pub(crate) fn expect(stream: &mut TcpStream, wanted: &[u8]) -> anyhow::Result<()> {
    let mut got = vec![0; wanted.len()];
    stream.read_exact(&mut got)?;
    ensure!(got == wanted, "got {:?}", String::from_utf8_lossy(&got));
    Ok(())
}

fn connections_outlive_their_entries_in_connection_tracking() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let connections =
        [joined(&mesh, &listener)?, joined(&mesh, &listener)?, joined(&mesh, &listener)?];
    outlive_connection_tracking(&mesh, ["checkout", "ledger"], connections)
}

/// The kernel's entries end early, in the middle of a half-closed connection, and altogether.
pub(crate) fn outlive_connection_tracking(
    mesh: &Mesh,
    places: [&str; 2],
    connections: [(TcpStream, TcpStream); 3],
) -> anyhow::Result<()> {
    for namespace in places {
        // Somebody has connection tracking at work, with little patience.
        shell(
            mesh,
            namespace,
            "nft 'table inet other { chain c { type filter hook output priority 0; ct state new accept; }; }'; \
             for state in established fin_wait close_wait last_ack time_wait; do \
             echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_$state; done",
        )?;
    }
    unheard(mesh, || {
        let [(mut asking, mut answering), (mut told, mut telling), (mut idle, mut idle_server)] =
            connections;
        asking.shutdown(Shutdown::Write)?;
        telling.shutdown(Shutdown::Write)?;
        // Longer than the entries live.
        thread::sleep(Duration::from_secs(4));
        for namespace in places {
            shell(mesh, namespace, "conntrack -F 2>&1")?;
        }
        answering.write_all(SECRET)?;
        drop(answering);
        let mut answer = Vec::new();
        asking.read_to_end(&mut answer)?;
        ensure!(answer == SECRET, "the answer after half-close: {answer:?}");
        told.write_all(SECRET)?;
        drop(told);
        let mut rest = Vec::new();
        telling.read_to_end(&mut rest)?;
        ensure!(rest == SECRET, "what came after half-close: {rest:?}");
        for _ in 0..2 {
            idle.write_all(SECRET)?;
            expect(&mut idle_server, SECRET)?;
            idle_server.write_all(SECRET)?;
            expect(&mut idle, SECRET)?;
        }
        Ok(())
    })?;
    for machine in ["machine-a", "machine-b"] {
        mesh.wait("the end of all connections", PATIENCE, |mesh| {
            let open = mesh.metric(machine, "hauberk_open_connections", &[])?;
            ensure!(open < 0.5, "{open} connections of {machine} are open");
            Ok(())
        })?;
    }
    Ok(())
}

/// Answers everybody in clear, and counts them.
pub(crate) fn answer_everybody(listener: TcpListener) -> Arc<AtomicUsize> {
    let answered = Arc::new(AtomicUsize::new(0));
    let count = answered.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            count.fetch_add(1, Ordering::Relaxed);
            // The caller may be gone.
            drop(stream.write_all(SECRET));
        }
    });
    answered
}

/// Tries to connect in clear until it is told to stop; how often it was answered.
pub(crate) fn intrude(
    mesh: &Mesh,
    to: SocketAddr,
    until: &AtomicBool,
) -> anyhow::Result<(usize, usize)> {
    mesh.namespace("outside")?.run(|| {
        let (mut tries, mut answers) = (0, 0);
        while !until.load(Ordering::Relaxed) {
            tries += 1;
            let Ok(mut stream) = TcpStream::connect_timeout(&to, Duration::from_millis(50)) else {
                continue;
            };
            stream.set_read_timeout(Some(Duration::from_millis(20))).ok();
            let mut byte = [0];
            answers += usize::from(matches!(stream.read(&mut byte), Ok(1)));
        }
        Ok((tries, answers))
    })?
}

fn restored(mesh: &Mesh, machine: &str) -> anyhow::Result<f64> {
    mesh.metric(machine, "hauberk_capture_restored_total", &[])
}

/// Flushes nftables in a place again and again while somebody tries to get in. Nobody is answered.
pub(crate) fn flush_under_attack(
    mesh: &Mesh,
    place: &str,
    machine: &str,
    target: SocketAddr,
) -> anyhow::Result<()> {
    const FLUSHES: usize = 20;
    let before = restored(mesh, machine)?;
    let done = AtomicBool::new(false);
    let (tries, answers) = thread::scope(|scope| {
        let intruder = scope.spawn(|| intrude(mesh, target, &done));
        let flushed = (0..FLUSHES).try_for_each(|_| {
            shell(mesh, place, "nft flush ruleset")?;
            let flushed = Instant::now();
            while !mesh.namespace(place)?.run(hauberk_linux::capture::installed)?? {
                ensure!(flushed.elapsed() < PATIENCE, "the rules do not come back");
                thread::sleep(Duration::from_millis(1));
            }
            println!("back after {:?}", flushed.elapsed());
            anyhow::Ok(())
        });
        done.store(true, Ordering::Relaxed);
        let outcome = intruder.join().map_err(|_| anyhow::anyhow!("the intruder panicked"))?;
        flushed?;
        outcome
    })?;
    ensure!(tries > 10, "only {tries} tries");
    ensure!(answers == 0, "{answers} of {tries} were answered in clear");
    mesh.wait("the count", PATIENCE, |mesh| {
        let count = restored(mesh, machine)? - before;
        ensure!(count >= 1.0, "restored {count} times");
        Ok(())
    })?;
    mesh.wait("the finding", PATIENCE, |mesh| {
        let text = String::from_utf8_lossy(&mesh.ask(&["check"])?.stdout).into_owned();
        ensure!(text.contains("were altered and restored"), "{text}");
        Ok(())
    })
}

fn flushed_rules_let_nothing_through_and_are_back_at_once() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, mut server) = joined(&mesh, &listener)?;
    let elsewhere = mesh.listen("ledger", mesh.ledger(9999))?;
    unheard(&mesh, || {
        answer_everybody(elsewhere);
        flush_under_attack(&mesh, "ledger", "machine-b", mesh.ledger(9999))?;
        // What was open goes on, without a word in clear.
        for _ in 0..10 {
            shell(&mesh, "checkout", "nft flush ruleset")?;
            client.write_all(SECRET)?;
            expect(&mut server, SECRET)?;
            server.write_all(SECRET)?;
            expect(&mut client, SECRET)?;
        }
        Ok(())
    })?;
    drop((client, server));
    joined(&mesh, &listener).map(drop)
}

pub(crate) fn store(user: &str, more: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: store, namespace: jobs, labels: {{app: store}}}}
spec:
  machine: machine-b
  serviceAccount: store
  process: {{user: '{user}'}}
  ports: [7070]
  {more}
"
    )
}

/// A mesh with a workload on machine-b's own network, and somebody who answers on its port.
fn with_store(more: &str) -> anyhow::Result<(Mesh, SocketAddr)> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let target = SocketAddr::new(ipv4(MACHINE_B), 7070);
    mesh.write_manifest("store.yaml", &store("4343", more))?;
    mesh.wait_revision(before)?;
    mesh.wait_ready()?;
    Ok((mesh, target))
}

fn a_flushed_host_lets_nothing_through_and_heals() -> anyhow::Result<()> {
    let (mesh, target) = with_store("")?;
    answer_everybody(mesh.listen("machine-b", target)?);
    unheard(&mesh, || flush_under_attack(&mesh, "machine-b", "machine-b", target))
}

/// As when a firewall is restarted, which flushes twice or more: in the middle of healing, too.
fn rules_that_are_flushed_while_they_are_restored_are_back_at_once() -> anyhow::Result<()> {
    let (mesh, _) = with_store("")?;
    for _ in 0..10 {
        shell(&mesh, "machine-b", "for i in 1 2 3 4 5 6 7 8; do nft flush ruleset; done")?;
        let flushed = Instant::now();
        while !mesh.namespace("machine-b")?.run(hauberk_linux::capture::installed)?? {
            ensure!(flushed.elapsed() < PATIENCE, "the rules do not come back");
            thread::sleep(Duration::from_millis(1));
        }
        println!("back after {:?}", flushed.elapsed());
    }
    let log = std::fs::read_to_string(mesh.log("machine-b"))?;
    ensure!(!log.contains("could not be restored"), "it gave up for a while:\n{log}");
    Ok(())
}

/// Whether somebody outside is answered in clear.
pub(crate) fn is_answered(mesh: &Mesh, to: SocketAddr) -> bool {
    let Ok(mut stream) = mesh.connect("outside", to) else { return false };
    stream.set_read_timeout(Some(Duration::from_secs(2))).ok();
    matches!(stream.read(&mut [0]), Ok(1))
}

/// As a reboot leaves it: the state is on disk, the kernel has nothing, and the agent is not there yet.
fn a_machine_that_boots_is_closed_before_its_agent_starts() -> anyhow::Result<()> {
    let (mut mesh, target) = with_store("")?;
    answer_everybody(mesh.listen("machine-b", target)?);
    let outside = mesh.listen("outside", SocketAddr::new(ipv4(OUTSIDE), 80))?;
    outside.set_nonblocking(true)?;
    mesh.stop("machine-b");
    for place in ["machine-b", "ledger"] {
        mesh.namespace(place)?.run(hauberk_linux::capture::remove)??;
    }
    ensure!(is_answered(&mesh, target), "without any rule the port should be open");
    let data = mesh.data("machine-b");
    let mut close = mesh.hauberk()?;
    close
        .args(["agent", "--data"])
        .arg(&data)
        .arg("--netns-dir")
        .arg(mesh.netns_dir())
        .arg("close");
    let closed = mesh.run("machine-b", &mut close)?;
    ensure!(closed.starts_with("closed: 2 workloads of machine-b in 2 places"), "{closed}");
    ensure!(!is_answered(&mesh, target), "the port is open");
    ensure!(!is_answered(&mesh, mesh.ledger(8080)), "the ledger is open");
    let mut curl = Process::User(4343).command("curl");
    curl.args(["-sS", "--max-time", "3", "http://10.77.0.99/"]);
    let output = mesh.output("machine-b", &mut curl)?;
    ensure!(!output.status.success(), "{output:?}");
    ensure!(outside.accept().is_err(), "what the workload sends went out as it is");
    mesh.start_agent("machine-b", &[])?;
    mesh.wait_ready()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    joined(&mesh, &listener)?;
    ensure!(!is_answered(&mesh, target), "the port is open");
    Ok(())
}

fn users_that_two_workloads_claim_are_closed_alone() -> anyhow::Result<()> {
    let (mesh, target) = with_store("")?;
    let revision = mesh.wait_revision(0)?;
    answer_everybody(mesh.listen("machine-b", target)?);
    // One user by its number and by its name, which only that machine knows to be the same.
    mesh.write_manifest("store.yaml", &store("5", ""))?;
    let revision = mesh.wait_revision(revision)?;
    let other = store("games", "").replace("store", "second").replace("7070", "7171")
        + "---\n"
        + &store("4545", "").replace("store", "third").replace("7070", "15006");
    mesh.write_manifest("others.yaml", &other)?;
    mesh.wait_revision(revision)?;
    mesh.wait("the word on both", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let problem = |name: &str| {
            let found = status.workloads.iter().find(|workload| workload.workload == name);
            found.map(|workload| workload.problem.clone()).unwrap_or_default()
        };
        for name in ["jobs/store", "jobs/second"] {
            let text = problem(name);
            ensure!(
                text.contains("jobs/second and jobs/store are the same to the kernel"),
                "{name}: {text}"
            );
        }
        ensure!(problem("jobs/third").is_empty(), "{}", problem("jobs/third"));
        ensure!(problem("payments/ledger").is_empty(), "{}", problem("payments/ledger"));
        Ok(())
    })?;
    ensure!(!is_answered(&mesh, target), "the port is open");
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    joined(&mesh, &listener).map(drop)
}

/// What a caller of the store may be on machine-b.
fn caller(mode: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: caller, namespace: jobs}}
spec:
  machine: machine-b
  serviceAccount: caller
  process: {{user: '4444'}}
  ports: []
  mode: {mode}
"
    )
}

/// Says something to an address as a user of machine-b, and gives what came back.
fn ask_as(mesh: &Mesh, user: u32, address: IpAddr, port: u16) -> anyhow::Result<String> {
    let line = format!("exec 3<>/dev/tcp/{address}/{port} && head -c {} <&3", SECRET.len());
    let mut bash = Process::User(user).command("timeout");
    bash.args(["5", "bash", "-c", &line]).stderr(Stdio::null());
    Ok(String::from_utf8_lossy(&mesh.output("machine-b", &mut bash)?.stdout).into_owned())
}

fn loopback_addresses() -> [IpAddr; 4] {
    [
        Ipv4Addr::LOCALHOST.into(),
        Ipv4Addr::new(127, 0, 0, 5).into(),
        Ipv6Addr::LOCALHOST.into(),
        ipv4(MACHINE_B),
    ]
}

fn loopback_between_two_workloads_of_a_host_is_decided_at_both_ends() -> anyhow::Result<()> {
    let (mesh, _) = with_store("")?;
    let mut revision = mesh.wait_revision(0)?;
    // Of both families.
    answer_everybody(mesh.listen("machine-b", SocketAddr::from((Ipv6Addr::UNSPECIFIED, 7070)))?);
    for mode in ["Audit", "Enforce"] {
        mesh.write_manifest("caller.yaml", &caller(mode))?;
        revision = mesh.wait_revision(revision)?;
        mesh.wait_ready()?;
        for address in loopback_addresses() {
            let answer = ask_as(&mesh, 4444, address, 7070)?;
            ensure!(answer.is_empty(), "{mode} caller, {address}: {answer}");
        }
        // Of the destination, which decided. The caller's own side refuses first if it is enforced, too.
        mesh.record("machine-b", |record| {
            is(record, "decision", "deny")
                && is(record, "reason", "no_policy")
                && record["dst"]["workload"] == "store"
        })?;
    }
    mesh.write_manifest(
        "store-policy.yaml",
        "apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: store, namespace: jobs}
spec:
  owner: {team: jobs, contact: '#jobs'}
  target: {selector: {matchLabels: {app: store}}}
  rules:
  - name: caller
    ports: [7070]
    from: [{serviceAccount: {namespace: jobs, name: caller}}]
",
    )?;
    mesh.wait_revision(revision)?;
    for address in loopback_addresses() {
        let answer = ask_as(&mesh, 4444, address, 7070)?;
        ensure!(answer.as_bytes() == SECRET, "allowed, {address}: {answer:?}\n{}", mesh.logs());
    }
    mesh.record("machine-b", |record| {
        is(record, "side", "destination")
            && is(record, "decision", "allow")
            && is(record, "path", "mtls")
            && record["src"]["workload"] == "caller"
    })?;
    Ok(())
}

fn an_audited_server_is_reached_over_loopback() -> anyhow::Result<()> {
    let (mesh, target) = with_store("mode: Audit")?;
    // Of both families.
    answer_everybody(mesh.listen("machine-b", SocketAddr::from((Ipv6Addr::UNSPECIFIED, 7070)))?);
    for address in loopback_addresses() {
        // A health check of root's.
        let answer = ask_as(&mesh, 0, address, 7070)?;
        ensure!(answer.as_bytes() == SECRET, "{address}: {answer:?}");
    }
    ensure!(is_answered(&mesh, target), "from outside");
    mesh.record("machine-b", |record| {
        is(record, "decision", "would_deny")
            && record["dst"]["workload"] == "store"
            && record["src"]["addr"].as_str().is_some_and(|from| from.starts_with("127.0.0."))
    })?;
    Ok(())
}

fn is_free(mesh: &Mesh, namespace: &str) -> anyhow::Result<()> {
    mesh.wait("the plain network", Duration::from_secs(40), |mesh| {
        let left = mesh.namespace(namespace)?.run(hauberk_linux::capture::anything_installed)??;
        ensure!(!left, "{namespace} has rules still");
        Ok(())
    })?;
    let outside = mesh.listen("outside", SocketAddr::new(ipv4(OUTSIDE), 80))?;
    mesh.connect(namespace, outside.local_addr()?)?;
    outside.set_nonblocking(true)?;
    mesh.wait("the connection", PATIENCE, |_| {
        outside.accept()?;
        Ok(())
    })
}

fn rules_of_a_workload_that_went_while_no_agent_ran_are_removed() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.stop("machine-a");
    let left = workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
        + &workload("payments", "ledger", "machine-b", hauberk_tests::mesh::LEDGER, PORTS);
    mesh.write_manifest("workloads.yaml", &left)?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait_revision(before)?;
    is_free(&mesh, "web")?;
    let checkout = mesh.namespace("checkout")?.run(hauberk_linux::capture::installed)??;
    ensure!(checkout, "checkout is free, too");
    Ok(())
}

/// Nor is there a table any more that says whose the rules are. In a namespace, and on a host; what another node's agent
/// has put in place stays.
fn routing_of_a_workload_that_went_while_no_agent_ran_is_released() -> anyhow::Result<()> {
    let (mut mesh, _) = with_store("")?;
    let before = mesh.wait_revision(0)?;
    for machine in ["machine-a", "machine-b"] {
        mesh.stop(machine);
    }
    for place in ["web", "ledger", "machine-b"] {
        shell(&mesh, place, "nft flush ruleset")?;
    }
    // Nor does the agent remember anything.
    for machine in ["machine-a", "machine-b"] {
        std::fs::remove_file(mesh.data(machine).join("state.bin"))?;
    }
    let left = workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
        + &workload("payments", "ledger", "machine-b", hauberk_tests::mesh::LEDGER, PORTS);
    mesh.write_manifest("workloads.yaml", &left)?;
    mesh.remove_manifest("store.yaml")?;
    mesh.start_agent("machine-a", &[])?;
    is_free(&mesh, "web")?;
    // It ends only once it is through with what it found.
    mesh.stop("machine-a");
    for place in ["ledger", "machine-b"] {
        let left = mesh.namespace(place)?.run(hauberk_linux::capture::anything_installed)??;
        ensure!(left, "machine-a has released {place}, which is machine-b's");
    }
    mesh.start_agent("machine-b", &[])?;
    mesh.wait("the new revision", PATIENCE, |mesh| {
        let revision = mesh.status()?.revision;
        ensure!(revision > before, "{revision}");
        Ok(())
    })?;
    is_free(&mesh, "machine-b")?;
    let ledger = mesh.namespace("ledger")?.run(hauberk_linux::capture::installed)??;
    ensure!(ledger, "the ledger is free, too");
    Ok(())
}

/// As with `ip netns attach`, or Docker's folder. The lab has such names.
fn a_host_that_has_a_name_among_namespaces_is_no_stray() -> anyhow::Result<()> {
    let (mut mesh, _) = with_store("")?;
    mesh.stop("machine-b");
    mesh.start_agent("machine-b", &[])?;
    // It says so after it has looked for strays.
    mesh.wait("the agent", PATIENCE, |mesh| {
        mesh.get("machine-b", SocketAddr::from(([127, 0, 0, 1], 9465)), "/readyz").map(drop)
    })?;
    mesh.stop("machine-b");
    let log = std::fs::read_to_string(mesh.log("machine-b"))?;
    ensure!(!log.contains("captured for a workload that is gone"), "{log}");
    ensure!(!log.contains("were altered"), "{log}");
    Ok(())
}

fn a_workload_in_another_namespace_leaves_the_first_one_free() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.add("elsewhere", 31)?;
    let before = mesh.wait_revision(0)?;
    let moved = workload("shop", "web", "machine-a", 31, "")
        .replace("networkNamespace: web", "networkNamespace: elsewhere")
        + &workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
        + &workload("payments", "ledger", "machine-b", hauberk_tests::mesh::LEDGER, PORTS);
    mesh.write_manifest("workloads.yaml", &moved)?;
    mesh.wait_revision(before)?;
    is_free(&mesh, "web")?;
    mesh.wait("the new place", PATIENCE, |mesh| {
        ensure!(
            mesh.namespace("elsewhere")?.run(hauberk_linux::capture::installed)??,
            "not captured"
        );
        Ok(())
    })
}

fn a_socket_bound_to_an_interface_is_refused_with_a_record() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let outside = mesh.listen("outside", SocketAddr::new(ipv4(OUTSIDE), 80))?;
    outside.set_nonblocking(true)?;
    let started = Instant::now();
    let output = mesh.output(
        "web",
        Command::new("curl").args([
            "-sS",
            "--interface",
            "if!eth0",
            "--max-time",
            "20",
            "http://10.77.0.99/",
        ]),
    )?;
    ensure!(!output.status.success(), "{output:?}");
    ensure!(started.elapsed() < Duration::from_secs(10), "it took {:?}", started.elapsed());
    ensure!(outside.accept().is_err(), "it went out as it is");
    let record = mesh.record("machine-a", |record| is(record, "reason", "uncaptured"))?;
    ensure!(record["src"]["workload"] == "web", "{record}");
    Ok(())
}

/// The kernel tells one listener only, and here it is another program.
fn an_agent_that_is_not_told_of_bound_sockets_says_so() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-a");
    let taken = mesh.namespace("web")?.run(hauberk_linux::capture::Reports::start)??;
    mesh.start_agent("machine-a", &[])?;
    let unreported = |mesh: &Mesh| -> anyhow::Result<(f64, String)> {
        let metric = mesh.metric("machine-a", "hauberk_capture_unreported_workloads", &[])?;
        Ok((metric, String::from_utf8_lossy(&mesh.ask(&["check"])?.stdout).into_owned()))
    };
    let finding = "connections of shop/web on machine-a that cannot be captured are not recorded: \
                   listening for connections that cannot be captured failed: Operation not permitted";
    mesh.wait("the word on it", PATIENCE, |mesh| {
        let (metric, check) = unreported(mesh)?;
        ensure!((metric - 1.0).abs() < 0.5 && check.contains(finding), "{metric}\n{check}");
        Ok(())
    })?;
    let status: serde_json::Value =
        serde_json::from_slice(&mesh.ask(&["status", "-o", "json"])?.stdout)?;
    let workloads = status["workloads"].as_array().context("no workloads")?;
    let web = workloads.iter().find(|one| one["workload"] == "shop/web").context("no web")?;
    ensure!(web["unreported"].as_str().is_some_and(|why| why.contains("not permitted")), "{web}");
    drop(taken);
    mesh.wait("the end of it", PATIENCE, |mesh| {
        let (metric, check) = unreported(mesh)?;
        ensure!(metric < 0.5 && !check.contains("not recorded"), "{metric}\n{check}");
        Ok(())
    })?;
    let log = std::fs::read_to_string(mesh.log("machine-a"))?;
    let told = log.matches("the kernel does not report them").count();
    ensure!(told == 1, "told {told} times:\n{log}");
    Ok(())
}

/// Towards an audited destination, nothing but the workload's end cuts a connection.
fn connections_end_before_the_capture_of_their_workload() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let revision = mesh.wait_revision(0)?;
    let audited = workload("shop", "web", "machine-a", WEB, "")
        + &workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
        + &workload("payments", "ledger", "machine-b", hauberk_tests::mesh::LEDGER, PORTS)
        + "  mode: Audit\n";
    mesh.write_manifest("workloads.yaml", &audited)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("checkout", "nobody"))?;
    let revision = mesh.wait_revision(revision)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    unheard(&mesh, || {
        let (mut client, _server) = joined(&mesh, &listener)?;
        let gone = audited
            .replace("name: checkout, namespace: shop", "name: other, namespace: shop")
            .replace("networkNamespace: checkout", "networkNamespace: nowhere");
        mesh.write_manifest("workloads.yaml", &gone)?;
        mesh.wait_revision(revision)?;
        // It writes for as long as it can.
        let started = Instant::now();
        while client.write_all(SECRET).is_ok() {
            ensure!(started.elapsed() < PATIENCE, "the connection goes on");
            thread::sleep(Duration::from_millis(20));
        }
        println!("cut after {:?}", started.elapsed());
        is_free(&mesh, "checkout")
    })
}

fn a_renamed_workload_keeps_its_connections() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let revision = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, mut server) = joined(&mesh, &listener)?;
    let renamed = workload("shop", "web", "machine-a", WEB, "")
        + &workload("shop", "checkout", "machine-a", CHECKOUT, "8080")
            .replace("name: checkout, namespace", "name: till, namespace")
        + &workload("payments", "ledger", "machine-b", hauberk_tests::mesh::LEDGER, PORTS);
    mesh.write_manifest("workloads.yaml", &renamed)?;
    mesh.wait_revision(revision)?;
    // Longer than anything of the old name would stay.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(5) {
        client.write_all(SECRET)?;
        expect(&mut server, SECRET)?;
        thread::sleep(Duration::from_millis(50));
    }
    mesh.wait("the new name", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let found = status.workloads.iter().find(|workload| workload.workload == "shop/till");
        ensure!(found.is_some_and(|workload| workload.captured), "{status:?}");
        Ok(())
    })?;
    joined(&mesh, &listener).map(drop)
}

/// From here on this process and its children have users of their own, at the usual place.
fn own_users() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let copied = Command::new("cp").arg("-a").arg("/etc/.").arg(folder.path()).status()?;
    ensure!(copied.success(), "the copy of /etc failed");
    let none = None::<&str>;
    nix::mount::mount(Some(folder.path()), "/etc", none, nix::mount::MsFlags::MS_BIND, none)?;
    Ok(folder)
}

fn a_user_made_after_its_workload_is_captured_at_once() -> anyhow::Result<()> {
    let users = own_users()?;
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("store.yaml", &store("newcomer", ""))?;
    mesh.wait_revision(before)?;
    let problem = |mesh: &Mesh| -> anyhow::Result<String> {
        let status = mesh.status()?;
        let found = status.workloads.iter().find(|workload| workload.workload == "jobs/store");
        Ok(found.context("no store")?.problem.clone())
    };
    mesh.wait("the word on it", PATIENCE, |mesh| {
        let text = problem(mesh)?;
        ensure!(text.contains("this machine has no user \"newcomer\""), "{text}");
        Ok(())
    })?;
    let outside = mesh.listen("outside", SocketAddr::new(ipv4(OUTSIDE), 80))?;
    outside.set_nonblocking(true)?;
    // As useradd does: a new file takes the place of the old one.
    let passwd = users.path().join("passwd");
    let line = "newcomer:x:4747:4747::/nonexistent:/usr/sbin/nologin\n";
    let next = users.path().join("passwd+");
    std::fs::write(&next, std::fs::read_to_string(&passwd)? + line)?;
    std::fs::rename(&next, &passwd)?;
    // Sooner than the agent's usual look, and than a person could start anything.
    thread::sleep(Duration::from_millis(300));
    let answer = ask_as(&mesh, 4747, ipv4(OUTSIDE), 80)?;
    ensure!(answer.is_empty() && outside.accept().is_err(), "it went out as it is: {answer}");
    mesh.record("machine-b", |record| {
        record["src"]["workload"] == "store" && is(record, "reason", "unknown_destination")
    })?;
    // And a look-up that finds nothing for a while takes nothing away.
    std::fs::write(&passwd, std::fs::read_to_string(&passwd)?.replace(line, ""))?;
    thread::sleep(Duration::from_secs(3));
    let answer = ask_as(&mesh, 4747, ipv4(OUTSIDE), 80)?;
    ensure!(answer.is_empty() && outside.accept().is_err(), "it went out as it is: {answer}");
    nix::mount::umount2("/etc", nix::mount::MntFlags::MNT_DETACH)?;
    Ok(())
}

/// Or an ordinary user of a machine would take the room that its workloads have at other agents.
fn only_the_agent_reaches_other_agents() -> anyhow::Result<()> {
    let (mesh, _) = with_store("")?;
    let agent = mesh.ledger(15_008);
    if mesh.connect("machine-b", agent).is_ok() {
        bail!("somebody on a captured host who is not the agent reached an agent");
    }
    mesh.connect("outside", agent).context("from a machine that is not in the mesh").map(drop)
}
