//! Stops, crashes and damage: closed, never open, and healed afterwards.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_tests::mesh::{LEDGER, Mesh, PATIENCE, is, ledger_policy};

use crate::policy::{expect_refused, is_cut, open, still_carries};

crate::trials!(
    an_agent_without_control_plane_enforces_from_disk,
    a_killed_agent_fails_closed_and_heals,
    a_killed_agent_leaves_no_open_connection_hanging,
    a_restarted_control_plane_keeps_its_identity_and_revision,
    cleanup_removes_every_rule,
    removed_rules_come_back,
    a_damaged_state_file_opens_nothing,
    a_damaged_node_identity_opens_nothing_and_a_token_mends_it,
    damaged_workload_certificates_open_nothing_and_are_replaced,
    a_damaged_file_of_the_control_plane_is_told_with_its_mend,
    a_damaged_intermediate_is_made_anew_under_the_same_root,
    a_full_disk_for_records_stops_no_connection,
    a_full_disk_of_an_agent_keeps_no_change_from_being_enforced,
    a_full_disk_of_the_control_plane_changes_nothing_and_heals,
    sigterm_drains_open_connections,
    a_stop_that_removes_the_rules_resets_what_is_open_first,
    the_usual_limit_on_open_files_is_raised,
    a_control_plane_from_an_older_backup_rolls_nothing_back,
    a_network_that_is_cut_and_comes_back_heals,
);

pub(crate) fn carries(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<()> {
    let mut client = mesh.connect("checkout", listener.local_addr()?)?;
    client.write_all(b"x")?;
    listener.set_nonblocking(true)?;
    let mut accepted = None;
    // A try that met an agent still starting is lost; the caller tries again.
    mesh.wait("the connection", std::time::Duration::from_secs(2), |_| {
        let (stream, from) = listener.accept()?;
        // An earlier try's, which came through after it was given up.
        ensure!(from == client.local_addr()?, "{from} is not this try's");
        accepted = Some((stream, from));
        Ok(())
    })
    .with_context(|| mesh.logs())?;
    let (mut server, _) = accepted.context("none")?;
    server.set_nonblocking(false)?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_exact(&mut [0])?;
    server.write_all(b"y")?;
    Ok(client.read_exact(&mut [0])?)
}

pub(crate) fn refused(mesh: &Mesh, from: &str) -> anyhow::Result<()> {
    let Ok(mut stream) = mesh.connect(from, mesh.ledger(8080)) else { return Ok(()) };
    if stream.write_all(b"x").is_err() {
        return Ok(());
    }
    match stream.read(&mut [0]) {
        Err(_) => Ok(()),
        Ok(count) => bail!("{from} was not refused, {count} bytes came"),
    }
}

fn an_agent_without_control_plane_enforces_from_disk() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("control-plane");
    for machine in ["machine-a", "machine-b"] {
        mesh.stop(machine);
        mesh.start_agent(machine, &[])?;
    }
    mesh.wait("the agents", PATIENCE, |mesh| carries(mesh, &listener))?;
    refused(&mesh, "web")?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    Ok(())
}

fn a_killed_agent_fails_closed_and_heals() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    carries(&mesh, &listener)?;
    mesh.kill("machine-b");
    // Neither over the mesh, nor in clear, from inside or outside.
    refused(&mesh, "checkout")?;
    refused(&mesh, "outside")?;
    mesh.kill("machine-a");
    refused(&mesh, "checkout")?;
    ensure!(listener.accept().is_err(), "somebody came through");
    for machine in ["machine-a", "machine-b"] {
        mesh.start_agent(machine, &[])?;
    }
    mesh.wait("the agents", PATIENCE, |mesh| carries(mesh, &listener))
}

fn a_killed_agent_leaves_no_open_connection_hanging() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    for machine in ["machine-a", "machine-b"] {
        listener.set_nonblocking(false)?;
        let mut ends = open(&mesh, &listener, "checkout")?;
        still_carries(&mut ends)?;
        mesh.kill(machine);
        // The kernel closes what the agent had open: in order if nothing was unread, else by a reset.
        for (name, end) in [("checkout", &mut ends.0), ("the ledger", &mut ends.1)] {
            match end.read(&mut [0]) {
                Ok(0) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
                outcome => bail!("{machine} was killed, and {name} has {outcome:?}"),
            }
        }
        mesh.start_agent(machine, &[])?;
        mesh.wait("the agent", PATIENCE, |mesh| carries(mesh, &listener))?;
    }
    Ok(())
}

fn a_restarted_control_plane_keeps_its_identity_and_revision() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
    let revision = mesh.wait_revision(0)?;
    mesh.kill("control-plane");
    carries(&mesh, &listener)?;
    mesh.restart_control_plane()?;
    mesh.wait_ready()?;
    ensure!(fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))? == root, "another root");
    ensure!(mesh.status()?.revision == revision, "the revision changed without a change");
    mesh.write_manifest("ledger.yaml", &ledger_policy("  mode: Audit\n"))?;
    mesh.wait_revision(revision)?;
    Ok(())
}

fn rules(mesh: &Mesh, namespace: &str) -> anyhow::Result<bool> {
    Ok(mesh.namespace(namespace)?.run(hauberk_linux::capture::installed)??)
}

fn cleanup_removes_every_rule() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    for machine in ["machine-a", "machine-b"] {
        mesh.stop(machine);
    }
    for namespace in ["web", "checkout", "ledger"] {
        ensure!(rules(&mesh, namespace)?, "{namespace} was opened by a stop");
    }
    let mut command = mesh.hauberk()?;
    command.args(["agent", "--netns-dir"]).arg(mesh.folder().join("netns")).arg("cleanup");
    mesh.run("outside", &mut command)?;
    for namespace in ["web", "checkout", "ledger"] {
        ensure!(!rules(&mesh, namespace)?, "{namespace} still has rules");
    }
    let _listener = mesh.listen("ledger", mesh.ledger(8080))?;
    drop(mesh.connect("outside", mesh.ledger(8080))?);
    Ok(())
}

fn removed_rules_come_back() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    mesh.namespace("ledger")?.run(hauberk_linux::capture::remove)??;
    mesh.wait("the rules", PATIENCE, |mesh| {
        ensure!(rules(mesh, "ledger")?, "still missing");
        // It is told once they are back.
        let log = fs::read_to_string(mesh.log("machine-b"))?;
        ensure!(log.contains("the capture rules were altered, they are restored"), "{log}");
        Ok(())
    })
}

fn a_damaged_state_file_opens_nothing() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("machine-a");
    mesh.stop("machine-b");
    mesh.stop("control-plane");
    for machine in ["machine-a", "machine-b"] {
        let path = mesh.folder().join(machine).join("state.bin");
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x55;
        fs::write(&path, bytes)?;
        mesh.start_agent(machine, &[])?;
    }
    mesh.wait("the message", PATIENCE, |mesh| {
        let log = fs::read_to_string(mesh.log("machine-a"))?;
        ensure!(log.contains("the state on disk is not used"), "{log}");
        Ok(())
    })?;
    refused(&mesh, "checkout")?;
    refused(&mesh, "web")?;
    mesh.restart_control_plane()?;
    mesh.wait_ready()?;
    mesh.wait("the agents", PATIENCE, |mesh| carries(mesh, &listener))
}

/// How a file is found after a crash, or on a bad disk.
type Damage = fn(&[u8]) -> Vec<u8>;

fn cut_short(bytes: &[u8]) -> Vec<u8> {
    bytes[..bytes.len() / 2].to_vec()
}

fn altered(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| byte ^ 0x55).collect()
}

/// As [`altered`], but for the first page: it looks whole until it is read.
fn altered_inside(bytes: &[u8]) -> Vec<u8> {
    let (first, rest) = bytes.split_at(4096);
    [first, altered(rest).as_slice()].concat()
}

/// Damages a file. Gives what was in it.
fn damage(path: &Path, how: Damage) -> anyhow::Result<Vec<u8>> {
    let good = fs::read(path).with_context(|| path.display().to_string())?;
    fs::write(path, how(&good))?;
    Ok(good)
}

/// Starts a program that is to refuse that, and gives what it says. One that does not would stop with
/// its standard input.
fn says_no(mesh: &Mesh, namespace: &str, command: &mut Command) -> anyhow::Result<String> {
    let output = mesh.output(namespace, command.arg("--stop-with-stdin").stdin(Stdio::null()))?;
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "it started:\n{told}");
    Ok(told)
}

fn a_damaged_node_identity_opens_nothing_and_a_token_mends_it() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let data = mesh.folder().join("machine-a");
    let path = data.join("node.json");
    for how in [cut_short as Damage, altered] {
        mesh.stop("machine-a");
        damage(&path, how)?;
        fs::write(mesh.log("machine-a"), "")?;
        mesh.start_agent("machine-a", &[])?;
        mesh.wait("the message", PATIENCE, |mesh| {
            let told = fs::read_to_string(mesh.log("machine-a"))?;
            ensure!(told.contains(&format!("{} is damaged", path.display())), "{told}");
            let mend = "join anew with a token (`hauberk token create --node machine-a`";
            ensure!(told.contains(mend), "{told}");
            Ok(())
        })?;
        refused(&mesh, "checkout")?;
        refused(&mesh, "web")?;
        mesh.stop("machine-a");
        let token = mesh.token("machine-a")?;
        mesh.start_agent("machine-a", &["--join-token", &token])?;
        mesh.wait("the agent", PATIENCE, |mesh| carries(mesh, &listener))?;
        refused(&mesh, "web")?;
    }
    Ok(())
}

fn damaged_workload_certificates_open_nothing_and_are_replaced() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("control-plane");
    let cases: [(&str, &str, Damage); 2] = [
        ("machine-a", "shop__checkout.json", cut_short),
        ("machine-b", "payments__ledger.json", altered),
    ];
    for (machine, file, how) in cases {
        mesh.stop(machine);
        damage(&mesh.folder().join(machine).join("workloads").join(file), how)?;
        mesh.start_agent(machine, &[])?;
    }
    for (machine, file, _) in cases {
        mesh.wait("the message", PATIENCE, |mesh| {
            let log = fs::read_to_string(mesh.log(machine))?;
            let told = log.lines().any(|line| {
                line.contains("the kept certificate is not used, asking for another")
                    && line.contains(&format!("{file} is damaged"))
            });
            ensure!(told, "{machine}:\n{log}");
            Ok(())
        })?;
    }
    // Nobody can give them others now.
    refused(&mesh, "checkout")?;
    refused(&mesh, "web")?;
    mesh.restart_control_plane()?;
    // They have asked in vain by now, and ask less and less often.
    mesh.wait("the certificates", Duration::from_secs(40), |mesh| carries(mesh, &listener))
        .with_context(|| mesh.logs())
}

fn a_damaged_file_of_the_control_plane_is_told_with_its_mend() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("control-plane");
    let data = mesh.folder().join("control-plane");
    // Without an intermediate, the root's key is needed at once.
    let intermediate = data.join("ca/intermediate.key.der");
    let aside = data.join("ca/aside");
    fs::rename(&intermediate, &aside)?;
    let cases: [(&str, Damage, &str); 7] = [
        ("store.redb", cut_short, "move it away and restore a backup"),
        ("store.redb", altered, "move it away and restore a backup"),
        ("store.redb", altered_inside, "move it away and restore a backup"),
        ("ca/root.crt.der", cut_short, "restore the folder from a backup"),
        ("ca/root.crt.der", altered, "restore the folder from a backup"),
        ("ca/root.key.der", cut_short, "restore the folder from a backup"),
        ("ca/root.key.der", altered, "restore the folder from a backup"),
    ];
    for (number, (file, how, mend)) in cases.into_iter().enumerate() {
        let path = data.join(file);
        let good = damage(&path, how)?;
        let mut command = mesh.hauberk()?;
        command.args(["control-plane", "--trust-domain", "example.org", "--listen", "127.0.0.1:0"]);
        command.arg("--data").arg(&data).arg("--manifests").arg(mesh.manifests());
        let told = says_no(&mesh, "control", &mut command)
            .with_context(|| format!("case {number}, {file}"))?;
        let named = told.contains(&path.display().to_string()) && told.contains(mend);
        ensure!(named, "case {number}, {file}:\n{told}");
        // The agents go on as before, and no further.
        carries(&mesh, &listener)?;
        refused(&mesh, "web")?;
        fs::write(&path, good)?;
    }
    fs::rename(&aside, &intermediate)?;
    mesh.restart_control_plane()?;
    mesh.wait_ready()?;
    carries(&mesh, &listener)
}

fn a_damaged_intermediate_is_made_anew_under_the_same_root() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let folder = mesh.folder().join("control-plane/ca");
    let root = fs::read(folder.join("root.crt.der"))?;
    let mut made_anew = 0;
    for file in ["intermediate.crt.der", "intermediate.key.der"] {
        for how in [cut_short as Damage, altered] {
            mesh.stop("control-plane");
            damage(&folder.join(file), how)?;
            mesh.restart_control_plane().with_context(|| mesh.logs())?;
            made_anew += 1;
            let log = fs::read_to_string(mesh.log("control-plane"))?;
            let told: Vec<&str> = log
                .lines()
                .filter(|line| line.contains("the intermediate is not usable and is made anew"))
                .collect();
            ensure!(told.len() == made_anew, "{log}");
            ensure!(told.last().is_some_and(|line| line.contains(file)), "{file}:\n{log}");
        }
    }
    ensure!(fs::read(folder.join("root.crt.der"))? == root, "another root");
    // What the new one signs is good to an agent that has only certificates of the old one.
    mesh.stop("machine-a");
    fs::remove_dir_all(mesh.folder().join("machine-a/workloads"))?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait("the certificates", Duration::from_secs(30), |mesh| carries(mesh, &listener))?;
    mesh.wait_ready()
}

fn a_full_disk_for_records_stops_no_connection() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.stop("machine-a");
    drop(fs::remove_file(mesh.records("machine-a")));
    std::os::unix::fs::symlink("/dev/full", mesh.records("machine-a"))?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait_ready()?;
    carries(&mesh, &listener)?;
    mesh.wait("the count", PATIENCE, |mesh| {
        let lost = mesh.metric("machine-a", "hauberk_records_lost_total", &[])?;
        ensure!(lost >= 1.0, "counted {lost}");
        Ok(())
    })
}

fn sigterm_drains_open_connections() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"a")?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_exact(&mut [0])?;
    let process = mesh.process("machine-b").context("no agent")?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(i32::try_from(process)?),
        nix::sys::signal::Signal::SIGTERM,
    )?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    // The open one goes on to its end, new ones are refused.
    client.write_all(b"b")?;
    server.read_exact(&mut [0])?;
    refused(&mesh, "checkout")?;
    server.write_all(b"bye")?;
    drop(server);
    let mut rest = String::new();
    client.read_to_string(&mut rest)?;
    ensure!(rest == "bye", "got {rest:?}");
    drop(client);
    mesh.stop("machine-b");
    let record = mesh.record("machine-b", |record| is(record, "close_reason", "complete"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    Ok(())
}

fn the_usual_limit_on_open_files_is_raised() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-b");
    let mut shell = std::process::Command::new("sh");
    let hauberk = mesh.hauberk()?;
    shell
        .args(["-c", "ulimit -S -n 64 && exec \"$@\"", "sh"])
        .arg(hauberk.get_program())
        .args(hauberk.get_args())
        .args(["agent", "--stop-with-stdin", "--data"])
        .arg(mesh.folder().join("machine-b"))
        .arg("--netns-dir")
        .arg(mesh.folder().join("netns"))
        .arg("--records")
        .arg(mesh.records("machine-b"));
    let _agent = mesh.spawn("machine-b", "machine-b", &mut shell)?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut open = Vec::new();
    for _ in 0..100 {
        let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
        client.write_all(b"x")?;
        let (mut server, _) = listener.accept()?;
        server.read_exact(&mut [0])?;
        open.push((client, server));
    }
    Ok(())
}

fn a_control_plane_from_an_older_backup_rolls_nothing_back() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let old = mesh.wait_revision(0)?;
    mesh.stop("control-plane");
    let store = mesh.folder().join("control-plane/store.redb");
    let backup = fs::read(&store)?;
    mesh.restart_control_plane()?;
    // The backup has the workload web without permission; so has the next state, with one rule less.
    let nothing = ledger_policy("").replace("  - name: checkout", "  - name: nobody");
    mesh.write_manifest("ledger.yaml", &nothing.replace("name: checkout}", "name: web}"))?;
    let new = mesh.wait_revision(old)?;
    mesh.stop("control-plane");
    fs::write(&store, backup)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(""))?;
    mesh.restart_control_plane()?;
    mesh.wait("the refusal", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let refused =
            status.nodes.iter().all(|node| node.refused.contains("restored from a backup"));
        ensure!(refused && status.revision < new, "{status:?}");
        Ok(())
    })?;
    // What was taken away stays taken away.
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    refused(&mesh, "checkout")?;

    // Until somebody says that the backup counts, whatever its numbers are.
    mesh.stop("control-plane");
    mesh.start_control_plane(&["--new-epoch"])?;
    mesh.wait("the backup's permission", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let taken = status
            .nodes
            .iter()
            .all(|node| node.refused.is_empty() && node.enforced_revision == status.revision);
        ensure!(taken && status.revision < new, "{status:?}");
        Ok(())
    })?;
    carries(&mesh, &listener)
}

fn a_network_that_is_cut_and_comes_back_heals() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    carries(&mesh, &listener)?;
    let ends = [hauberk_cli::lab::CONTROL_PLANE, 3, LEDGER];
    mesh.cut(&ends)?;
    listener.set_nonblocking(true)?;
    // Told in bounded time, not left hanging.
    let patience = Duration::from_secs(30);
    let (checkout, to) = (mesh.namespace("checkout")?, mesh.ledger(8080));
    let lost = checkout.run(|| std::net::TcpStream::connect_timeout(&to, patience))?;
    expect_refused(lost.map_err(Into::into))?;
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    mesh.mend(&ends)?;
    mesh.wait("the network", PATIENCE, |mesh| carries(mesh, &listener))?;
    mesh.wait_ready()
}

fn a_stop_that_removes_the_rules_resets_what_is_open_first() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-a");
    mesh.start_agent("machine-a", &["--remove-rules-on-stop", "--drain", "1s"])?;
    mesh.wait_ready()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"a")?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.read_exact(&mut [0])?;
    mesh.stop("machine-a");
    for end in [&mut client, &mut server] {
        is_cut(end)?;
    }
    ensure!(!rules(&mesh, "checkout")?, "the rules are still there");
    Ok(())
}

/// Moves a program's data folder onto a small disk of its own.
fn small_disk(mesh: &Mesh, name: &str) -> anyhow::Result<std::path::PathBuf> {
    use nix::mount::{MsFlags, mount};
    let folder = mesh.folder().join(name);
    let aside = mesh.folder().join("aside");
    fs::rename(&folder, &aside)?;
    fs::create_dir(&folder)?;
    mount(Some("small"), &folder, Some("tmpfs"), MsFlags::empty(), Some("size=4m,mode=0700"))?;
    mesh.run(
        "outside",
        std::process::Command::new("cp").arg("-a").arg(aside.join(".")).arg(&folder),
    )?;
    Ok(folder)
}

fn fill(folder: &std::path::Path) -> anyhow::Result<std::path::PathBuf> {
    let path = folder.join("full");
    let mut file = fs::File::create(&path)?;
    let block = [0; 4096];
    while file.write_all(&block).is_ok() {}
    Ok(path)
}

fn a_full_disk_of_an_agent_keeps_no_change_from_being_enforced() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("machine-a");
    let disk = small_disk(&mesh, "machine-a")?;
    mesh.start_agent("machine-a", &[])?;
    mesh.wait_ready()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    carries(&mesh, &listener)?;
    let before = mesh.wait_revision(0)?;
    let filled = fill(&disk)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("8080", "8081"))?;
    let after = mesh.wait_revision(before)?;
    refused(&mesh, "checkout")?;
    let log = fs::read_to_string(mesh.log("machine-a"))?;
    ensure!(log.contains("could not be kept for a restart"), "{log}");
    fs::remove_file(filled)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(""))?;
    mesh.wait_revision(after)?;
    carries(&mesh, &listener)
}

fn a_full_disk_of_the_control_plane_changes_nothing_and_heals() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    mesh.stop("control-plane");
    let disk = small_disk(&mesh, "control-plane")?;
    mesh.restart_control_plane()?;
    mesh.wait_ready()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let before = mesh.wait_revision(0)?;
    let filled = fill(&disk)?;
    // More text than the store has room for, and a rule less.
    let padding = "# a long comment\n".repeat(40_000);
    mesh.write_manifest("ledger.yaml", &(ledger_policy("").replace("8080", "8081") + &padding))?;
    mesh.wait("the error", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let told = status.manifest_errors.iter().any(|text| text.contains("could not be stored"));
        ensure!(told && status.revision == before, "{status:?}");
        Ok(())
    })?;
    carries(&mesh, &listener)?;
    fs::remove_file(filled)?;
    // Nobody has to touch anything: the next look at the folder takes it.
    mesh.wait_revision(before)?;
    refused(&mesh, "checkout")?;
    ensure!(mesh.status()?.manifest_errors.is_empty(), "{:?}", mesh.status()?);
    mesh.token("machine-a").map(drop)
}
