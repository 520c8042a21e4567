//! A machine that was off for longer than its certificate lives, one whose clock is wrong, and one that has lost its
//! identity: closed from the start by the state on their disk, and back without a restart.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use base64::{Engine, engine::general_purpose::STANDARD};
use hauberk_cli::lab::Running;
use hauberk_core::{svid::check_leaf, time::Timestamp};
use hauberk_linux::capture;
use hauberk_tests::mesh::{Mesh, PATIENCE, is};
use rcgen::KeyPair;
use rustls_pki_types::PrivatePkcs8KeyDer;
use serde_json::Value;

use crate::{
    identity::Forger,
    restart::{carries, refused},
};

crate::trials!(
    without_a_grace_a_machine_that_was_off_for_long_is_closed_until_it_has_a_token,
    within_the_grace_a_machine_that_was_off_for_long_comes_back_by_itself,
    a_machine_whose_clock_is_behind_is_closed_until_the_clock_is_right,
    a_machine_that_lost_its_identity_closes_what_its_state_says_and_takes_a_token_as_it_runs,
    a_token_of_another_machine_does_not_make_this_one_that_machine,
    a_token_replaces_an_identity_that_the_control_plane_refuses,
    a_pod_that_cannot_be_attested_stays_and_enforces,
);

/// Certificates of nodes and workloads that live for a moment.
const SHORT: [&str; 4] =
    ["--node-certificate-lifetime", "10s", "--workload-certificate-lifetime", "10s"];

const NODES: [&str; 2] = ["machine-a", "machine-b"];

/// The captured namespaces of the mesh.
const PLACES: [&str; 3] = ["web", "checkout", "ledger"];

/// Switches machines off, for longer than their certificates live. They come up again without any rule.
fn switch_off(mesh: &mut Mesh) -> anyhow::Result<()> {
    for machine in NODES {
        mesh.stop(machine);
    }
    mesh.wait("the end of their certificates", Duration::from_secs(30), |mesh| {
        let now = hauberk_tls::now().unix_millis();
        for node in mesh.status()?.nodes {
            ensure!(node.certificate_not_after_unix_ms < now, "{} has a good one", node.name);
        }
        Ok(())
    })?;
    forget_rules(mesh)
}

fn forget_rules(mesh: &Mesh) -> anyhow::Result<()> {
    PLACES.iter().try_for_each(|place| Ok(mesh.namespace(place)?.run(capture::remove)??))
}

/// Waits until the agents have put their rules in place.
fn wait_for_rules(mesh: &Mesh, places: &[&str]) -> anyhow::Result<()> {
    mesh.wait("the rules", PATIENCE, |mesh| {
        for place in places {
            let installed = mesh.namespace(place)?.run(capture::installed)??;
            ensure!(installed, "{place} is open");
        }
        Ok(())
    })
    .with_context(|| mesh.logs())
}

/// Nobody gets to the ledger, and nothing has got there.
fn closed(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<()> {
    for from in ["outside", "checkout", "web"] {
        refused(mesh, from)?;
    }
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "somebody came through");
    Ok(())
}

/// What the agent of a machine answers to a probe: the whole of it.
fn readiness(mesh: &Mesh, machine: &str) -> anyhow::Result<String> {
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, 9465));
    let ask = move || {
        let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    mesh.namespace(machine)?.run(ask)?
}

/// Waits until an agent says that it is not ready, for a reason with all these parts.
fn not_ready(mesh: &Mesh, machine: &str, parts: &[&str]) -> anyhow::Result<()> {
    mesh.wait("the reason", PATIENCE, |mesh| {
        let told = readiness(mesh, machine)?;
        let reason = told.lines().find(|line| line.starts_with("node_certificate: not ready: "));
        let reason = reason.with_context(|| told.clone())?;
        ensure!(told.starts_with("HTTP/1.1 503"), "{told}");
        ensure!(parts.iter().all(|part| reason.contains(part)), "{reason}");
        Ok(())
    })
    .with_context(|| mesh.logs())
}

fn ready(mesh: &Mesh, machine: &str) -> anyhow::Result<()> {
    mesh.wait("the agent", Duration::from_secs(40), |mesh| {
        let told = readiness(mesh, machine)?;
        ensure!(told.starts_with("HTTP/1.1 200"), "{told}");
        Ok(())
    })
    .with_context(|| mesh.logs())
}

fn data(mesh: &Mesh, machine: &str) -> PathBuf {
    mesh.folder().join(machine)
}

/// `hauberk join` as somebody types it on a machine whose agent runs: what it says.
fn join_beside(mesh: &Mesh, machine: &str, token: &str) -> anyhow::Result<std::process::Output> {
    let mut command = mesh.hauberk()?;
    command.args(["join", token, "--stop-with-stdin", "--data"]).arg(data(mesh, machine));
    mesh.output(machine, command.stdin(Stdio::null()))
}

/// Starts an agent that gets no token.
fn start(mesh: &Mesh, machine: &str, more: &[&str]) -> anyhow::Result<Running> {
    let mut command: Command = mesh.hauberk()?;
    command.args(["agent", "--stop-with-stdin", "--data"]).arg(data(mesh, machine));
    command.arg("--netns-dir").arg(mesh.folder().join("netns"));
    command.arg("--records").arg(mesh.records(machine)).args(more);
    mesh.spawn(machine, machine, &mut command)
}

fn expect_not_ready_records(mesh: &Mesh) -> anyhow::Result<()> {
    let record = mesh.record("machine-a", |record| is(record, "reason", "not_ready"))?;
    ensure!(is(&record, "decision", "deny") && is(&record, "side", "source"), "{record}");
    Ok(())
}

fn without_a_grace_a_machine_that_was_off_for_long_is_closed_until_it_has_a_token()
-> anyhow::Result<()> {
    let mut mesh = Mesh::start_with(&[&SHORT[..], &["--node-renewal-grace", "0"]].concat())?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    carries(&mesh, &listener)?;
    switch_off(&mut mesh)?;
    for machine in NODES {
        mesh.start_agent(machine, &[])?;
    }
    wait_for_rules(&mesh, &PLACES)?;
    closed(&mesh, &listener)?;
    expect_not_ready_records(&mesh)?;
    for machine in NODES {
        let expired = format!("the certificate of node {machine} expired at ");
        let mend = format!("hauberk token create --node {machine}");
        let parts = [&expired, "the clock of this machine says", &mend, "the last try: "];
        not_ready(&mesh, machine, &parts)?;
    }
    let status = String::from_utf8(mesh.ask(&["status"])?.stdout)?;
    let row = status.lines().map(str::trim_start).find(|line| line.starts_with("machine-a "));
    let row = row.with_context(|| status.clone())?;
    ensure!(row.contains(" expired "), "{status}");
    let check = String::from_utf8(mesh.ask(&["check"])?.stdout)?;
    ensure!(check.contains("node machine-a is away, and its certificate, which ended"), "{check}");
    ensure!(check.contains("is not renewed any more"), "{check}");
    ensure!(check.contains("hauberk token create --node NAME here"), "{check}");
    // It is not for want of time: they have asked, and were refused.
    closed(&mesh, &listener)?;

    let running = mesh.process("machine-a");
    let joined = join_beside(&mesh, "machine-a", &mesh.token("machine-a")?)?;
    let told = String::from_utf8_lossy(&joined.stderr).into_owned();
    ensure!(joined.status.success(), "{told}");
    ensure!(told.contains("joined; the agent that runs here goes on with it"), "{told}");
    let token = mesh.token("machine-b")?;
    mesh.stop("machine-b");
    mesh.start_agent("machine-b", &["--join-token", &token])?;
    for machine in NODES {
        ready(&mesh, machine)?;
    }
    mesh.wait("the mesh", PATIENCE, |mesh| carries(mesh, &listener))?;
    ensure!(mesh.process("machine-a") == running, "another agent runs");
    refused(&mesh, "web")?;
    refused(&mesh, "outside")?;
    // One that has a good identity is not given another.
    let joined = join_beside(&mesh, "machine-a", &mesh.token("machine-a")?)?;
    let told = String::from_utf8_lossy(&joined.stderr).into_owned();
    ensure!(!joined.status.success() && told.contains("another agent uses"), "{told}");
    Ok(())
}

fn within_the_grace_a_machine_that_was_off_for_long_comes_back_by_itself() -> anyhow::Result<()> {
    let mut mesh = Mesh::start_with(&SHORT)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    carries(&mesh, &listener)?;
    switch_off(&mut mesh)?;
    let check = String::from_utf8(mesh.ask(&["check"])?.stdout)?;
    ensure!(check.contains("may be renewed until"), "{check}");
    mesh.stop("control-plane");
    for machine in NODES {
        mesh.start_agent(machine, &[])?;
    }
    wait_for_rules(&mesh, &PLACES)?;
    closed(&mesh, &listener)?;
    expect_not_ready_records(&mesh)?;
    for machine in NODES {
        not_ready(&mesh, machine, &["expired at", "the last try: ask the control plane at"])?;
    }
    let running = NODES.map(|machine| mesh.process(machine));
    mesh.restart_control_plane()?;
    for machine in NODES {
        ready(&mesh, machine)?;
    }
    mesh.wait("the mesh", PATIENCE, |mesh| carries(mesh, &listener))?;
    ensure!(NODES.map(|machine| mesh.process(machine)) == running, "other agents run");
    refused(&mesh, "web")?;
    refused(&mesh, "outside")?;
    let log = fs::read_to_string(mesh.log("control-plane"))?;
    for machine in NODES {
        let told = log.lines().any(|line| {
            line.contains(" hauberk.audit: an expired node certificate was renewed")
                && line.contains(&format!("node=\"{machine}\""))
        });
        ensure!(told, "the renewal of {machine} was not audited:\n{log}");
    }
    // Nothing of it looks like a clone, and they go on as ever.
    mesh.wait_ready()?;
    ensure!(mesh.status()?.nodes.iter().all(|node| node.locked.is_empty()), "a node is locked");
    Ok(())
}

/// Gives a machine's node certificate another validity: its clock is as far away from the control plane's then.
fn redate(mesh: &Mesh, machine: &str, from: Duration) -> anyhow::Result<Timestamp> {
    let path = data(mesh, machine).join("node.json");
    let mut kept: Value = serde_json::from_slice(&fs::read(&path)?)?;
    let der = |value: &Value| -> anyhow::Result<Vec<u8>> {
        Ok(STANDARD.decode(value.as_str().context("not text")?)?)
    };
    let key = der(&kept["key"])?;
    let key = KeyPair::try_from(&PrivatePkcs8KeyDer::from(key.as_slice()))?;
    let facts = check_leaf(&der(&kept["chain"][0])?, hauberk_tls::now())?;
    let serial = hex(&facts.serial().to_string())?;
    let forger = Forger::with_the_key_of(mesh)?;
    let chain = forger.chain_for(&key, facts.id().as_str(), |parameters| {
        parameters.serial_number = Some(rcgen::SerialNumber::from_slice(&serial));
        parameters.not_before = time::OffsetDateTime::now_utc() + from;
        parameters.not_after = parameters.not_before + time::Duration::hours(1);
    })?;
    let chain = chain.iter().map(|certificate| Value::from(STANDARD.encode(certificate)));
    kept["chain"] = chain.collect();
    fs::write(&path, serde_json::to_vec(&kept)?)?;
    Ok(hauberk_tls::now().saturating_add(from))
}

fn hex(text: &str) -> anyhow::Result<Vec<u8>> {
    (0..text.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&text[at..at + 2], 16)?)).collect()
}

fn a_machine_whose_clock_is_behind_is_closed_until_the_clock_is_right() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("machine-b");
    fs::remove_dir_all(data(&mesh, "machine-b").join("workloads"))?;
    forget_rules(&mesh)?;
    let right = redate(&mesh, "machine-b", Duration::from_secs(12))?;
    mesh.start_agent("machine-b", &[])?;
    wait_for_rules(&mesh, &PLACES)?;
    closed(&mesh, &listener)?;
    let parts = [
        "the certificate of node machine-b is not valid before 20",
        "the clock of this machine says 20",
        ": set the clock",
    ];
    not_ready(&mesh, "machine-b", &parts)?;
    ensure!(hauberk_tls::now() < right, "this machine is too slow for this test");
    // The clock is right by now, as far as the agent can tell.
    ready(&mesh, "machine-b")?;
    mesh.wait("the mesh", PATIENCE, |mesh| carries(mesh, &listener))
}

fn a_machine_that_lost_its_identity_closes_what_its_state_says_and_takes_a_token_as_it_runs()
-> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("machine-a");
    fs::remove_file(data(&mesh, "machine-a").join("node.json"))?;
    forget_rules(&mesh)?;
    let mut agent = start(&mesh, "machine-a", &[])?;
    wait_for_rules(&mesh, &PLACES)?;
    // The certificates of its workloads are good, but it does not know whom to trust.
    closed(&mesh, &listener)?;
    expect_not_ready_records(&mesh)?;
    let parts = ["node machine-a has no certificate", "hauberk token create --node machine-a"];
    not_ready(&mesh, "machine-a", &parts)?;
    let joined = join_beside(&mesh, "machine-a", &mesh.token("machine-a")?)?;
    ensure!(joined.status.success(), "{}", String::from_utf8_lossy(&joined.stderr));
    ready(&mesh, "machine-a")?;
    mesh.wait("the mesh", PATIENCE, |mesh| carries(mesh, &listener))?;
    refused(&mesh, "web")?;
    ensure!(agent.ended().is_none(), "it ended");
    Ok(())
}

fn a_token_of_another_machine_does_not_make_this_one_that_machine() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-a");
    let node = data(&mesh, "machine-a").join("node.json");
    fs::remove_file(&node)?;
    let mut agent = start(&mesh, "machine-a", &[])?;
    not_ready(&mesh, "machine-a", &["node machine-a has no certificate"])?;
    let joined = join_beside(&mesh, "machine-a", &mesh.token("machine-b")?)?;
    let told = String::from_utf8_lossy(&joined.stderr).into_owned();
    ensure!(!joined.status.success(), "{told}");
    ensure!(told.contains("the control plane answered for node machine-b, and"), "{told}");
    ensure!(told.contains("is that of node machine-a; to make this machine another"), "{told}");
    ensure!(!node.exists(), "the identity of another node was kept");
    ensure!(agent.ended().is_none(), "it ended");
    Ok(())
}

fn a_token_replaces_an_identity_that_the_control_plane_refuses() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-a");
    mesh.stop("control-plane");
    // It knows of no node any more.
    fs::remove_file(mesh.folder().join("control-plane/store.redb"))?;
    mesh.restart_control_plane()?;
    let token = mesh.token("machine-a")?;
    mesh.start_agent("machine-a", &["--join-token", &token])?;
    mesh.wait("the node", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let node = status.nodes.iter().find(|node| node.name == "machine-a").context("no node")?;
        ensure!(node.joined && node.connected, "{node:?}");
        Ok(())
    })
    .with_context(|| mesh.logs())?;
    let log = fs::read_to_string(mesh.log("machine-a"))?;
    ensure!(log.contains("joining anew"), "{log}");
    // While the identity is good, a token changes nothing.
    let token = mesh.token("machine-a")?;
    mesh.stop("machine-a");
    mesh.start_agent("machine-a", &["--join-token", &token])?;
    mesh.wait("the message", PATIENCE, |mesh| {
        let log = fs::read_to_string(mesh.log("machine-a"))?;
        ensure!(log.contains("already joined, the join token is not needed"), "{log}");
        Ok(())
    })
}

fn a_pod_that_cannot_be_attested_stays_and_enforces() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("machine-b");
    fs::remove_file(data(&mesh, "machine-b").join("node.json"))?;
    forget_rules(&mesh)?;
    let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
    let (roots, token) = (mesh.folder().join("roots.pem"), mesh.folder().join("token"));
    let pem = STANDARD.encode(root);
    fs::write(&roots, format!("-----BEGIN CERTIFICATE-----\n{pem}\n-----END CERTIFICATE-----\n"))?;
    fs::write(&token, "a token")?;
    let arguments = [
        "--control-plane",
        "10.77.0.1:8443",
        "--trust-bundle",
        roots.to_str().context("a path")?,
        "--kubernetes-token",
        token.to_str().context("a path")?,
    ];
    let mut agent = start(&mesh, "machine-b", &arguments)?;
    wait_for_rules(&mesh, &["ledger"])?;
    refused(&mesh, "outside")?;
    refused(&mesh, "checkout")?;
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "somebody came through");
    let parts = [
        "node machine-b has no certificate",
        "the control plane has to attest this agent's pod",
        "this control plane is not one of a Kubernetes cluster",
    ];
    not_ready(&mesh, "machine-b", &parts)?;
    ensure!(agent.ended().is_none(), "it ended");
    Ok(())
}
