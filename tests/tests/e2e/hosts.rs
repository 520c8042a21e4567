//! What is closed on a host while its workloads cannot be captured.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_tests::mesh::{Mesh, PATIENCE, is};

use serde_json::Value;

use crate::programs::Process;

crate::trials!(
    a_service_port_stays_closed_while_its_cgroup_is_gone,
    a_host_on_which_the_agent_cannot_listen_stays_closed,
    another_programs_listeners_are_in_nobodys_way,
    whoever_takes_the_ports_of_a_stopped_agent_gets_nothing,
    a_host_that_was_only_closed_is_opened_when_its_workload_is_gone,
    a_cgroup_made_anew_is_captured_again,
);

/// The number of `machine-b` in the lab's networks.
const MACHINE_B: u8 = 3;
const PORT: u16 = 7070;

fn store(process: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: store, namespace: jobs, labels: {{app: store}}}}
spec:
  machine: machine-b
  serviceAccount: store
  process: {process}
  ports: [{PORT}]
"
    )
}

/// A process of machine-b that answers in clear to whoever comes.
fn answering(mesh: &Mesh) -> anyhow::Result<SocketAddr> {
    let address = SocketAddr::new(ipv4(MACHINE_B), PORT);
    let listener = mesh.listen("machine-b", address)?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // The caller may be gone.
            drop(stream.write_all(b"in clear"));
        }
    });
    Ok(address)
}

fn answer(mesh: &Mesh, from: &str, address: SocketAddr) -> anyhow::Result<()> {
    let mut stream: TcpStream = mesh.connect(from, address)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text == "in clear", "got {text:?}");
    Ok(())
}

/// From outside, and from a process of the machine itself that is no workload.
fn is_closed(mesh: &Mesh, address: SocketAddr) -> anyhow::Result<()> {
    for from in ["outside", "machine-b"] {
        ensure!(answer(mesh, from, address).is_err(), "{from} was answered in clear");
    }
    Ok(())
}

fn a_service_port_stays_closed_while_its_cgroup_is_gone() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let address = answering(&mesh)?;
    answer(&mesh, "outside", address)?;
    mesh.write_manifest("store.yaml", &store("{cgroup: hauberk-e2e-that-nobody-made}"))?;
    mesh.wait_revision(before)?;
    mesh.wait("the closed port", PATIENCE, |mesh| is_closed(mesh, address))?;
    let record = mesh.record("machine-b", |record| is(record, "reason", "plaintext"))?;
    ensure!(is(&record, "decision", "deny"), "{record}");
    let check = mesh.ask(&["check"])?;
    let text = String::from_utf8_lossy(&check.stdout).into_owned();
    ensure!(text.contains("jobs/store") && text.contains("is not captured"), "{text}");
    Ok(())
}

/// All ports that the agent would choose from, and all that the kernel would give it.
fn take_all_ports(mesh: &Mesh) -> anyhow::Result<Vec<TcpListener>> {
    mesh.namespace("machine-b")?
        .run(|| hauberk_linux::links::sysctl("ipv4/ip_local_port_range", "15100 15999"))??;
    let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
    (15_100..16_000).map(|port| mesh.listen("machine-b", any(port))).collect()
}

fn a_host_on_which_the_agent_cannot_listen_stays_closed() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let address = answering(&mesh)?;
    let taken = take_all_ports(&mesh)?;
    mesh.write_manifest("store.yaml", &store("{user: '4343'}"))?;
    mesh.wait_revision(before)?;
    mesh.wait("the closed port", PATIENCE, |mesh| is_closed(mesh, address))?;
    for listener in &taken {
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "somebody was led to a foreign program");
    }
    mesh.wait("the reason", PATIENCE, |mesh| {
        let text = mesh.ask(&["check"])?.stdout;
        let text = String::from_utf8_lossy(&text).into_owned();
        ensure!(text.contains("listen on any of the ports 15100 to 15999"), "{text}");
        Ok(())
    })?;
    drop(taken);
    mesh.namespace("machine-b")?
        .run(|| hauberk_linux::links::sysctl("ipv4/ip_local_port_range", "32768 60999"))??;
    captured(&mesh, "jobs/store")?;
    is_closed(&mesh, address)
}

fn captured(mesh: &Mesh, key: &str) -> anyhow::Result<()> {
    mesh.wait("the capture", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let found = status.workloads.iter().find(|workload| workload.workload == key);
        ensure!(found.is_some_and(|workload| workload.captured), "{status:?}");
        Ok(())
    })
}

/// Somebody without privileges takes the agent's ports while it is stopped: receives nothing, and keeps the agent
/// from nothing.
fn whoever_takes_the_ports_of_a_stopped_agent_gets_nothing() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let address = answering(&mesh)?;
    mesh.write_manifest("store.yaml", &store("{user: '4343'}"))?;
    mesh.wait_revision(before)?;
    captured(&mesh, "jobs/store")?;
    mesh.stop("machine-b");
    let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
    let taken: Vec<TcpListener> = (15_100..16_000)
        .map(|port| mesh.listen("machine-b", any(port)))
        .collect::<Result<_, _>>()?;
    is_closed(&mesh, address)?;
    for listener in &taken {
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "somebody was led to a foreign program");
    }
    mesh.start_agent("machine-b", &[])?;
    captured(&mesh, "jobs/store")?;
    is_closed(&mesh, address)
}

/// Ports that other designs need, and that of the agents themselves: whoever has them gets nothing, and the agent
/// captures all the same.
fn another_programs_listeners_are_in_nobodys_way() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let address = answering(&mesh)?;
    let taken = [15_001, 15_006, 15_008]
        .map(|port| mesh.listen("machine-b", SocketAddr::from(([0, 0, 0, 0], port))));
    mesh.write_manifest("store.yaml", &store("{user: '4343'}"))?;
    mesh.wait_revision(before)?;
    captured(&mesh, "jobs/store")?;
    is_closed(&mesh, address)?;
    for listener in taken {
        let listener = listener?;
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "somebody was led to a foreign program");
    }
    Ok(())
}

fn a_host_that_was_only_closed_is_opened_when_its_workload_is_gone() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let address = answering(&mesh)?;
    let _taken = take_all_ports(&mesh)?;
    mesh.write_manifest("store.yaml", &store("{user: '4343'}"))?;
    let with_store = mesh.wait_revision(before)?;
    mesh.wait("the closed port", PATIENCE, |mesh| is_closed(mesh, address))?;
    mesh.remove_manifest("store.yaml")?;
    mesh.wait_revision(with_store)?;
    mesh.wait("the open port", PATIENCE, |mesh| answer(mesh, "outside", address))
}

fn denied_of_batch(mesh: &Mesh) -> anyhow::Result<usize> {
    let records = mesh.all_records("machine-b")?;
    let of_batch = |record: &&Value| {
        is(&record["src"], "workload", "batch") && is(record, "reason", "unknown_destination")
    };
    Ok(records.iter().filter(of_batch).count())
}

fn a_cgroup_made_anew_is_captured_again() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let batch = Process::in_cgroup("anew")?;
    let workload = store(&batch.selector()).replace("store", "batch");
    mesh.write_manifest("batch.yaml", &workload)?;
    mesh.wait_revision(before)?;
    mesh.wait_ready()?;
    let listener =
        mesh.listen("outside", SocketAddr::new(ipv4(hauberk_tests::mesh::OUTSIDE), 80))?;
    listener.set_nonblocking(true)?;
    let refused = |mesh: &Mesh| -> anyhow::Result<()> {
        let mut curl = batch.command("curl");
        curl.args(["-sS", "--max-time", "4", "http://10.77.0.99/"]);
        let output = mesh.output("machine-b", &mut curl)?;
        ensure!(!output.status.success(), "it was served: {output:?}");
        ensure!(listener.accept().is_err(), "the connection went out as it was");
        Ok(())
    };
    mesh.wait("the capture", PATIENCE, |mesh| {
        refused(mesh)?;
        ensure!(denied_of_batch(mesh)? > 0, "nothing is told of it");
        Ok(())
    })?;
    // Each try was recorded once, and the last record may be on its way.
    let mut before = denied_of_batch(&mesh)?;
    mesh.wait("the last record", PATIENCE, |mesh| {
        thread::sleep(std::time::Duration::from_millis(500));
        let known = std::mem::replace(&mut before, denied_of_batch(mesh)?);
        ensure!(known == before, "{before} denials of batch");
        Ok(())
    })?;
    let Process::Cgroup(cgroup) = &batch else { bail!("no cgroup") };
    for round in 0..3 {
        mesh.wait("the end of the cgroup", PATIENCE, |_| Ok(fs::remove_dir(&cgroup.folder)?))?;
        fs::create_dir(&cgroup.folder)?;
        // Sooner than the agent's usual look.
        thread::sleep(std::time::Duration::from_millis(300));
        refused(&mesh).with_context(|| format!("round {round}: {}", mesh.logs()))?;
        // By the agent, which knows who it was.
        mesh.wait("the record", PATIENCE, |mesh| {
            let told = denied_of_batch(mesh)?;
            ensure!(told == before + round + 1, "{told} denials of batch");
            Ok(())
        })?;
    }
    Ok(())
}
