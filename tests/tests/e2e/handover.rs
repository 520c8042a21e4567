//! One agent takes another's place, while connections come and go.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_linux::Netns;
use hauberk_tests::mesh::{Mesh, PATIENCE, is};

use crate::policy::{open, still_carries};

crate::trials!(
    no_connection_fails_when_an_agent_takes_anothers_place,
    a_replaced_agent_carries_on_until_its_drain_is_over,
    a_replaced_agent_ends_when_the_one_after_it_does,
    a_next_agent_that_cannot_start_changes_nothing,
);

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
    mesh.start_agent(machine, &["--take-over", "--drain", "1s"])?;
    wait_for(mesh, machine, "took the place of the agent before")?;
    Ok(before)
}

fn wait_for(mesh: &Mesh, machine: &str, words: &str) -> anyhow::Result<()> {
    let log = mesh.log(machine);
    mesh.wait(words, PATIENCE, |_| {
        ensure!(std::fs::read_to_string(&log)?.contains(words), "not in the log");
        Ok(())
    })
}

fn no_connection_fails_when_an_agent_takes_anothers_place() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let to = mesh.ledger(8080);
    let listener = mesh.listen("ledger", to)?;
    let checkout = mesh.namespace("checkout")?.clone();
    let (done, closed) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|scope| {
        let server = scope.spawn(|| echo(&listener, &closed));
        let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| call(&checkout, to, &done))).collect();
        let replaced = (|| {
            // Caller's and destination's, each twice: the one that took over is taken over from.
            for machine in ["machine-a", "machine-b", "machine-a", "machine-b"] {
                thread::sleep(Duration::from_millis(200));
                let before = replace(&mut mesh, machine)?;
                thread::sleep(Duration::from_millis(200));
                drop(before);
            }
            thread::sleep(Duration::from_millis(200));
            anyhow::Ok(())
        })();
        done.store(true, Ordering::SeqCst);
        let counts: Vec<_> = callers.into_iter().map(|caller| caller.join()).collect();
        closed.store(true, Ordering::SeqCst);
        replaced?;
        server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        for count in counts {
            let count = count.map_err(|_| anyhow::anyhow!("a caller panicked"))??;
            println!("{count} connections");
            ensure!(count > 20, "only {count} connections were made meanwhile");
        }
        anyhow::Ok(())
    })?;
    // What the last ones do is told, and by them alone.
    mesh.wait_ready()?;
    mesh.wait("a policy that changes", PATIENCE, |mesh| {
        mesh.write_manifest("ledger.yaml", "")?;
        match exchange(&checkout, to) {
            Ok(()) => bail!("still allowed"),
            Err(_) => Ok(()),
        }
    })
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
    std::fs::write(&node, kept)?;
    ensure!(before.ended().is_none(), "the agent that ran does so no longer");
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    // Its metrics are its own again.
    let metrics = "127.0.0.1:9465".parse()?;
    mesh.wait("its answer", PATIENCE, |mesh| {
        mesh.get("machine-b", metrics, "/readyz").map(|_| ())
    })?;
    drop(replace_from(&mut mesh, before)?);
    still_carries(&mut open(&mesh, &listener, "checkout")?)
}

fn replace_from(
    mesh: &mut Mesh,
    before: hauberk_cli::lab::Running,
) -> anyhow::Result<hauberk_cli::lab::Running> {
    mesh.start_agent("machine-b", &["--take-over"])?;
    wait_for(mesh, "machine-b", "took the place of the agent before")?;
    Ok(before)
}
