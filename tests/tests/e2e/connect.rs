//! An application's `connect` tells it the truth: it succeeds when the destination has been reached, and fails when
//! it was refused or nobody is there.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::{ipv4, ipv6};
use hauberk_tests::mesh::{LEDGER, Mesh, OUTSIDE, PATIENCE, is};
use socket2::{Domain, Socket, Type};

use crate::policy::{expect_refused, open, still_carries};

crate::trials!(
    connect_succeeds_when_the_application_has_accepted,
    connect_waits_for_a_destination_that_is_slow,
    a_client_goes_on_to_the_second_address_when_the_first_is_refused,
    what_leaves_the_mesh_is_told_the_truth_too,
    a_client_that_gives_up_leaves_nothing_behind,
    connections_that_wait_are_refused_when_the_agent_stops,
);

/// Whether a port looks open to those who only connect and say nothing, as `nc -z` and many a script that waits for a
/// server does.
fn is_open(mesh: &Mesh, from: &str, target: SocketAddr) -> anyhow::Result<bool> {
    let mut bash = Command::new("bash");
    bash.args(["-c", &format!("exec 3<>/dev/tcp/{}/{}", target.ip(), target.port())]);
    let output = mesh.output(from, &mut bash)?;
    ensure!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    Ok(output.status.success())
}

fn connect_succeeds_when_the_application_has_accepted() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for address in [ipv4(LEDGER), ipv6(LEDGER)] {
        let target = SocketAddr::new(address, 8080);
        ensure!(!is_open(&mesh, "checkout", target)?, "nobody listens, and {target} looks open");
        expect_refused(mesh.connect("checkout", target))?;
        let listener = mesh.listen("ledger", target)?;
        listener.set_nonblocking(true)?;
        ensure!(is_open(&mesh, "checkout", target)?, "{target} looks closed");
        let client = mesh.connect("checkout", target)?;
        // They are in its queue already, in this order: without waiting.
        let (first, second) = (listener.accept()?, listener.accept()?);
        ensure!(second.1 == client.local_addr()?, "{first:?}, {second:?}");
        // Whom policy does not allow.
        ensure!(!is_open(&mesh, "web", target)?, "{target} looks open to whom it is not");
        ensure!(listener.accept().is_err(), "the application was reached");
    }
    let reasons = [("unreachable", "close_reason"), ("no_matching_rule", "reason")];
    for (word, field) in reasons {
        mesh.record("machine-a", |record| is(record, field, word))?;
    }
    Ok(())
}

/// Its queue is full, and its kernel answers nobody, as that of a host which is not there.
fn connect_waits_for_a_destination_that_is_slow() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let target = mesh.ledger(8080);
    let listener = mesh.listen("ledger", target)?;
    socket2::SockRef::from(&listener).listen(0)?;
    let first = mesh.connect("checkout", target)?;
    let started = Instant::now();
    let second = thread::scope(|scope| {
        let second = scope.spawn(|| mesh.connect("checkout", target));
        thread::sleep(Duration::from_millis(500));
        ensure!(!second.is_finished(), "it is connected to an application that did not answer");
        let (accepted, from) = listener.accept()?;
        ensure!(from == first.local_addr()?, "{from}");
        let second = second.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        drop(accepted);
        second.map(Some)
    })?;
    ensure!(second.is_some() && started.elapsed() >= Duration::from_millis(500));
    let (mut server, _) = listener.accept()?;
    let mut client = second.context("no connection")?;
    client.write_all(b"x")?;
    server.read_exact(&mut [0])?;
    Ok(())
}

fn a_client_goes_on_to_the_second_address_when_the_first_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    // By IPv4 only.
    let target = SocketAddr::new(ipv4(LEDGER), 8080);
    let listener = mesh.listen("ledger", target)?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The client may be gone.
            drop(stream.read(&mut [0; 1024]));
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"));
        }
    });
    let both = format!("ledger.test:8080:[{}],{}", ipv6(LEDGER), ipv4(LEDGER));
    for _ in 0..5 {
        let mut curl = Command::new("curl");
        curl.args(["-sS", "-m", "10", "--resolve", &both, "http://ledger.test:8080/"]);
        let answer = mesh.run("checkout", &mut curl)?;
        ensure!(answer == "ok", "{answer:?}");
    }
    Ok(())
}

fn what_leaves_the_mesh_is_told_the_truth_too() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let workloads = std::fs::read_to_string(mesh.manifests().join("workloads.yaml"))?;
    mesh.write_manifest(
        "workloads.yaml",
        &workloads.replace("  ports:", "  mode: Audit\n  ports:"),
    )?;
    mesh.wait_revision(before)?;
    let target = SocketAddr::new(ipv4(OUTSIDE), 8080);
    expect_refused(mesh.connect("checkout", target))?;
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
    ensure!(is(&record, "decision", "would_deny"), "{record}");
    let listener = mesh.listen("outside", target)?;
    let mut ends = (mesh.connect("checkout", target)?, listener.accept()?.0);
    still_carries(&mut ends)
}

fn a_client_that_gives_up_leaves_nothing_behind() -> anyhow::Result<()> {
    const CLIENTS: usize = 20;
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    mesh.cut(&[LEDGER])?;
    let attempts = mesh.namespace("checkout")?.run(|| {
        let attempt = || {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            match socket.connect(&SocketAddr::new(ipv4(LEDGER), 8080).into()) {
                Err(error) if error.raw_os_error() == Some(nix::libc::EINPROGRESS) => Ok(socket),
                Err(error) => Err(error),
                Ok(()) => Err(ErrorKind::AlreadyExists.into()),
            }
        };
        (0..CLIENTS).map(|_| attempt()).collect::<std::io::Result<Vec<Socket>>>()
    })??;
    mesh.wait("the connections that wait", PATIENCE, |mesh| {
        let outbound = ["direction=\"outbound\""];
        let taken = mesh.metric("machine-a", "hauberk_captured_connections_total", &outbound)?;
        ensure!(taken > CLIENTS as f64, "only {taken} were taken");
        Ok(())
    })?;
    drop(attempts);
    mesh.mend(&[LEDGER])?;
    let gave_up = |record: &serde_json::Value| is(record, "close_reason", "application_reset");
    mesh.wait("the records", PATIENCE, |mesh| {
        let records = mesh.all_records("machine-a")?.into_iter().filter(gave_up).count();
        ensure!(records == CLIENTS, "{records} of {CLIENTS} gave up");
        Ok(())
    })?;
    for machine in ["machine-a", "machine-b"] {
        mesh.wait("the end of all", PATIENCE, |mesh| {
            let open = mesh.metric(machine, "hauberk_open_connections", &[])?;
            ensure!(open == 0.0, "{open} are open at {machine}");
            Ok(())
        })?;
    }
    still_carries(&mut open_next(&mesh, &listener)?)
}

/// The next connection that carries something, past those that were given up.
fn open_next(
    mesh: &Mesh,
    listener: &std::net::TcpListener,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let client = mesh.connect("checkout", mesh.ledger(8080))?;
    loop {
        let (server, from) = listener.accept()?;
        if from == client.local_addr()? {
            server.set_read_timeout(Some(PATIENCE))?;
            return Ok((client, server));
        }
    }
}

fn connections_that_wait_are_refused_when_the_agent_stops() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    mesh.cut(&[LEDGER])?;
    let (checkout, to) = (mesh.namespace("checkout")?.clone(), mesh.ledger(8080));
    let client = thread::spawn(move || {
        checkout.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(60)))
    });
    mesh.wait("the connection", PATIENCE, |mesh| {
        let outbound = ["direction=\"outbound\""];
        let taken = mesh.metric("machine-a", "hauberk_captured_connections_total", &outbound)?;
        ensure!(taken >= 2.0, "it is not taken");
        Ok(())
    })?;
    mesh.stop("machine-a");
    let outcome = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))??;
    expect_refused(outcome.map_err(Into::into))
}
