//! One agent takes another's place, while connections come and go.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_linux::{Netns, capture};
use hauberk_tests::mesh::{CHECKOUT, LEDGER, Mesh, PATIENCE, PORTS, WEB, is, workload};

use crate::policy::{expect_refused, expect_reset, open, still_carries};

crate::trials!(
    no_connection_fails_when_an_agent_takes_anothers_place,
    a_replaced_agent_carries_on_until_its_drain_is_over,
    a_replaced_agent_ends_when_the_one_after_it_does,
    a_next_agent_that_cannot_start_changes_nothing,
    a_next_agent_takes_over_once_it_has_an_identity,
    a_next_agent_that_waits_for_an_identity_closes_what_the_one_before_leaves,
    a_next_agent_that_ends_before_it_is_ready_costs_no_connection,
    a_next_agent_that_ends_early_takes_along_only_what_it_had,
);

/// What an agent says that has taken another's place, and is ready.
const TOOK: &str = "took the place of the agent before";

const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9465);

/// Answers every connection's first byte, until told.
fn echo(listener: &TcpListener, done: &AtomicBool) -> anyhow::Result<()> {
    listener.set_nonblocking(true)?;
    while !done.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                let mut byte = [0];
                // A caller that was refused shows on its own side.
                if stream.read_exact(&mut byte).is_ok() {
                    drop(stream.write_all(&byte));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn exchange(from: &Netns, to: SocketAddr) -> anyhow::Result<()> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))??;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"x")?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    ensure!(byte == *b"x", "got {byte:?}");
    Ok(())
}

/// New connections one after the other, until told: how many there were. The first that fails ends it.
fn call(from: &Netns, to: SocketAddr, done: &AtomicBool) -> anyhow::Result<usize> {
    let mut count = 0;
    while !done.load(Ordering::SeqCst) {
        exchange(from, to).with_context(|| format!("after {count} connections"))?;
        count += 1;
    }
    Ok(count)
}

/// Starts another agent for the machine, and returns the one before when it has been replaced.
fn replace(mesh: &mut Mesh, machine: &str) -> anyhow::Result<hauberk_cli::lab::Running> {
    let before = mesh.release(machine).context("no agent runs")?;
    // The one before may have taken a place itself.
    let told = std::fs::read_to_string(mesh.log(machine))?.matches(TOOK).count();
    mesh.start_agent(machine, &["--take-over", "--drain", "1s"])?;
    wait_for_times(mesh, machine, TOOK, told + 1)?;
    Ok(before)
}

fn wait_for(mesh: &Mesh, machine: &str, words: &str) -> anyhow::Result<()> {
    wait_for_times(mesh, machine, words, 1)
}

fn wait_for_times(mesh: &Mesh, machine: &str, words: &str, times: usize) -> anyhow::Result<()> {
    let log = mesh.log(machine);
    mesh.wait(words, PATIENCE, |_| {
        let count = std::fs::read_to_string(&log)?.matches(words).count();
        ensure!(count >= times, "{count} times in the log of {machine}, not {times}");
        Ok(())
    })
    .with_context(|| mesh.logs())
}

/// Does something while new connections come all the time, none of which may fail.
fn while_calling(
    mesh: &mut Mesh,
    act: impl FnOnce(&mut Mesh) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let to = mesh.ledger(8080);
    let listener = mesh.listen("ledger", to)?;
    let checkout = mesh.namespace("checkout")?.clone();
    let (done, closed) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let server = scope.spawn(|| echo(&listener, &closed));
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| call(&checkout, to, &done))).collect();
        let acted = act(mesh);
        done.store(true, Ordering::SeqCst);
        let counts: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
        closed.store(true, Ordering::SeqCst);
        acted?;
        server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        for count in counts {
            let count = count
                .map_err(|_| anyhow::anyhow!("a caller panicked"))?
                .with_context(|| told(mesh))?;
            println!("{count} connections");
            ensure!(count > 20, "only {count} connections were made meanwhile");
        }
        anyhow::Ok(())
    })
}

/// What the agents said of connections that did not go well, and did.
fn told(mesh: &Mesh) -> String {
    let mut text = mesh.logs();
    for machine in ["machine-a", "machine-b"] {
        for record in mesh.all_records(machine).unwrap_or_default() {
            if !is(&record, "close_reason", "complete") {
                text.push_str(&format!("{machine}: {record}\n"));
            }
        }
    }
    text
}

/// The agents that run now follow the control plane, and tell it so.
fn expect_a_change_to_be_enforced(mesh: &Mesh) -> anyhow::Result<()> {
    mesh.wait_ready()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("ledger.yaml", "")?;
    mesh.wait_revision(before)?;
    expect_refused(mesh.connect("checkout", mesh.ledger(8080)))?;
    mesh.record("machine-a", |record| is(record, "decision", "deny")).map(drop)
}

fn no_connection_fails_when_an_agent_takes_anothers_place() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    while_calling(&mut mesh, |mesh| {
        // Caller's and destination's, each twice: the one that took over is taken over from.
        for machine in ["machine-a", "machine-b", "machine-a", "machine-b"] {
            thread::sleep(Duration::from_millis(200));
            let before = replace(mesh, machine)?;
            thread::sleep(Duration::from_millis(200));
            drop(before);
        }
        thread::sleep(Duration::from_millis(200));
        Ok(())
    })?;
    expect_a_change_to_be_enforced(&mesh)
}

fn a_replaced_agent_carries_on_until_its_drain_is_over() -> anyhow::Result<()> {
    for machine in ["machine-a", "machine-b"] {
        let mut mesh = Mesh::start()?;
        let listener = mesh.listen("ledger", mesh.ledger(8080))?;
        let mut ends = open(&mesh, &listener, "checkout")?;
        let since = Instant::now();
        let mut before = replace(&mut mesh, machine)?;
        // The harness's agents drain for 10 s, which is the default.
        while since.elapsed() < Duration::from_secs(5) {
            still_carries(&mut ends)?;
            thread::sleep(Duration::from_millis(200));
        }
        let cut = ends.0.read(&mut [0]).err().context("the connection ended in order")?;
        ensure!(cut.kind() == std::io::ErrorKind::ConnectionReset, "{cut}");
        ensure!(since.elapsed() > Duration::from_secs(9), "cut after {:?}", since.elapsed());
        mesh.record(machine, |record| is(record, "close_reason", "draining"))?;
        // It waits to be stopped: one that ended by itself would be started again.
        thread::sleep(Duration::from_secs(2));
        ensure!(before.ended().is_none(), "it ended by itself");
        still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    }
    Ok(())
}

fn a_replaced_agent_ends_when_the_one_after_it_does() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut before = replace(&mut mesh, "machine-b")?;
    mesh.kill("machine-b");
    mesh.wait("the end of the agent before", PATIENCE, |_| {
        match before.ended() {
            None => bail!("it still runs"),
            Some(status) => ensure!(!status.success(), "it ended as if all were well"),
        }
        Ok(())
    })?;
    // As whoever runs it does then.
    mesh.start_agent("machine-b", &["--take-over"])?;
    mesh.wait_ready()?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)
}

fn a_next_agent_that_cannot_start_changes_nothing() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut before = mesh.release("machine-b").context("no agent runs")?;
    // Not asked to take over.
    mesh.start_agent("machine-b", &[])?;
    wait_for(&mesh, "machine-b", "stop it first, or give --take-over")?;
    // Asked to, and without an identity.
    let node = mesh.folder().join("machine-b").join("node.json");
    let kept = std::fs::read(&node)?;
    std::fs::write(&node, b"damaged")?;
    mesh.start_agent("machine-b", &["--take-over"])?;
    wait_for(&mesh, "machine-b", "node.json is damaged")?;
    // It waits, and answers probes in the meantime.
    let error = mesh.get("machine-b", METRICS, "/readyz").expect_err("it is ready");
    ensure!(error.to_string().contains("503"), "{error}");
    ensure!(before.ended().is_none(), "the agent that ran does so no longer");
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    let log = std::fs::read_to_string(mesh.log("machine-b"))?;
    ensure!(!log.contains("another agent takes this one's place"), "{log}");
    mesh.kill("machine-b");
    std::fs::write(&node, kept)?;
    // Its metrics are its own again.
    wait_for_answer(&mesh, "machine-b")?;
    drop(replace_from(&mut mesh, before)?);
    still_carries(&mut open(&mesh, &listener, "checkout")?)
}

/// Damages the identity of machine-b while its agent runs, and starts another one beside it. Gives the one that
/// runs, and what mends it.
fn wait_beside(
    mesh: &mut Mesh,
) -> anyhow::Result<(hauberk_cli::lab::Running, impl Fn() -> anyhow::Result<()> + use<>)> {
    let before = mesh.release("machine-b").context("no agent runs")?;
    let node = mesh.folder().join("machine-b").join("node.json");
    let kept = std::fs::read(&node)?;
    std::fs::write(&node, b"damaged")?;
    mesh.start_agent("machine-b", &["--take-over"])?;
    wait_for(mesh, "machine-b", "node.json is damaged")?;
    Ok((before, move || Ok(std::fs::write(&node, &kept)?)))
}

fn a_next_agent_takes_over_once_it_has_an_identity() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut before, mend) = wait_beside(&mut mesh)?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    mend()?;
    wait_for(&mesh, "machine-b", TOOK)?;
    ensure!(before.ended().is_none(), "the agent before ended by itself");
    drop(before);
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    mesh.wait_ready()
}

fn a_next_agent_that_waits_for_an_identity_closes_what_the_one_before_leaves() -> anyhow::Result<()>
{
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut before, mend) = wait_beside(&mut mesh)?;
    before.kill();
    mesh.namespace("ledger")?.run(capture::remove)??;
    mesh.wait("the rules", PATIENCE, |mesh| {
        let installed = mesh.namespace("ledger")?.run(capture::installed)??;
        ensure!(installed, "the ledger is open");
        Ok(())
    })
    .with_context(|| mesh.logs())?;
    expect_reset(mesh.connect("outside", mesh.ledger(8080)))?;
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "somebody came through");
    listener.set_nonblocking(false)?;
    mend()?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)
}

fn replace_from(
    mesh: &mut Mesh,
    before: hauberk_cli::lab::Running,
) -> anyhow::Result<hauberk_cli::lab::Running> {
    mesh.start_agent("machine-b", &["--take-over"])?;
    wait_for(mesh, "machine-b", TOOK)?;
    Ok(before)
}

fn wait_for_answer(mesh: &Mesh, machine: &str) -> anyhow::Result<()> {
    mesh.wait("its answer", PATIENCE, |mesh| mesh.get(machine, METRICS, "/readyz").map(drop))
}

fn a_next_agent_that_ends_before_it_is_ready_costs_no_connection() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    // The next ones find no state and get none: they take the place, take up nothing, and are never ready.
    mesh.stop("control-plane");
    let mut before = Vec::new();
    while_calling(&mut mesh, |mesh| {
        for machine in ["machine-a", "machine-b"] {
            let mut agent = mesh.release(machine).context("no agent runs")?;
            let state = mesh.folder().join(machine).join("state.bin");
            for round in 1..=2 {
                thread::sleep(Duration::from_millis(200));
                std::fs::remove_file(&state)?;
                mesh.start_agent(machine, &["--take-over"])?;
                // Told once the folder is its own; the first line is that of the agent before.
                wait_for_times(mesh, machine, "app: ready ", 1 + round)?;
                thread::sleep(Duration::from_millis(200));
                if round == 1 {
                    mesh.kill(machine);
                } else {
                    mesh.stop(machine);
                }
                wait_for_times(mesh, machine, "this agent has its place back", round)?;
                ensure!(agent.ended().is_none(), "the agent before of {machine} ended as well");
                ensure!(state.exists(), "the state in force is not kept for a restart");
                wait_for_answer(mesh, machine)?;
            }
            before.push(agent);
        }
        Ok(())
    })?;
    // It looks after the rules again.
    for namespace in ["checkout", "ledger"] {
        mesh.namespace(namespace)?.run(capture::remove)??;
        mesh.wait("the rules", PATIENCE, |mesh| {
            let installed = mesh.namespace(namespace)?.run(capture::installed)??;
            ensure!(installed, "the rules of {namespace} are still missing");
            Ok(())
        })?;
    }
    // And another one may take its place.
    mesh.restart_control_plane()?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    while_calling(&mut mesh, |mesh| {
        for machine in ["machine-a", "machine-b"] {
            mesh.start_agent(machine, &["--take-over"])?;
            wait_for(mesh, machine, TOOK)?;
        }
        thread::sleep(Duration::from_millis(200));
        drop(before);
        thread::sleep(Duration::from_millis(200));
        Ok(())
    })?;
    expect_a_change_to_be_enforced(&mesh)
}

fn a_next_agent_that_ends_early_takes_along_only_what_it_had() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let state = mesh.folder().join("machine-a").join("state.bin");
    // By an older state there is no web: nobody takes up what was listened for it, so that a next agent with
    // that state takes connections for half a minute and is not ready.
    let revision = mesh.wait_revision(0)?;
    let ledger = workload("payments", "ledger", "machine-b", LEDGER, PORTS);
    let checkout = workload("shop", "checkout", "machine-a", CHECKOUT, "8080");
    let web = workload("shop", "web", "machine-a", WEB, "");
    mesh.write_manifest("workloads.yaml", &format!("{ledger}{checkout}"))?;
    let revision = mesh.wait_revision(revision)?;
    let older = std::fs::read(&state)?;
    mesh.write_manifest("workloads.yaml", &format!("{ledger}{checkout}{web}"))?;
    mesh.wait_revision(revision)?;
    mesh.wait_ready()?;
    mesh.stop("control-plane");

    let mut before = mesh.release("machine-a").context("no agent runs")?;
    for round in 1..=2 {
        std::fs::write(&state, &older)?;
        mesh.start_agent("machine-a", &["--take-over", "--drain", "1s"])?;
        wait_for_times(&mesh, "machine-a", "app: ready ", 1 + round)?;
        let mut open_ones = Vec::new();
        let mut had = 0;
        // Either may take one; whose metrics are told is the next one.
        mesh.wait("connections of the next agent", PATIENCE, |mesh| {
            for _ in 0..8 {
                open_ones.push(open(mesh, &listener, "checkout")?);
            }
            // Whoever has carried something back has counted it.
            open_ones.iter_mut().try_for_each(still_carries)?;
            let open = mesh.metric("machine-a", "hauberk_open_connections", &["outbound"])?;
            ensure!(open > 0.0, "none of {}", open_ones.len());
            had = (1..=open_ones.len()).find(|count| f64_of(*count) >= open).unwrap_or(0);
            Ok(())
        })
        .with_context(|| mesh.logs())?;
        if round == 1 {
            mesh.kill("machine-a");
        } else {
            // By its drain, it lets go of what it has first.
            mesh.stop("machine-a");
        }
        wait_for_times(&mesh, "machine-a", "this agent has its place back", round)?;
        let all = open_ones.len();
        let broken = open_ones.iter_mut().filter_map(|ends| still_carries(ends).err()).count();
        ensure!(broken == had, "{broken} of {all} connections broke, and the next agent had {had}");
        ensure!(before.ended().is_none(), "the agent before ended as well");
        for _ in 0..20 {
            still_carries(&mut open(&mesh, &listener, "checkout")?)?;
        }
        let installed = mesh.namespace("web")?.run(capture::installed)??;
        ensure!(installed, "the web is not captured any more");
        ensure!(std::fs::read(&state)? != older, "the older state is what a restart would find");
    }
    mesh.restart_control_plane()?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    expect_a_change_to_be_enforced(&mesh)
}

fn f64_of(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::MAX, f64::from)
}
