//! Allow-lists: what is denied and why, and what a change does to connections that are open.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_tests::mesh::{Mesh, WEB, is, ledger_policy};

crate::trials!(
    an_identity_that_is_not_listed_is_denied_with_the_nearest_miss,
    a_port_that_is_not_listed_is_denied_with_the_nearest_miss,
    a_destination_without_policy_is_denied,
    an_address_outside_the_mesh_is_denied_from_inside,
    removing_a_rule_cuts_its_connections_and_no_others,
    a_workload_that_is_taken_out_of_the_registry_is_cut_off_at_once,
    a_guardrail_beats_an_allow,
    a_rule_that_ends_cuts_its_connections,
    a_manifest_with_errors_leaves_the_last_good_state_in_force,
    a_control_plane_at_rest_does_not_read_its_manifests_over_and_over,
    why_status_denied_and_check_tell_the_same,
    an_audited_workload_lets_through_and_tells_what_it_would_deny,
);

/// The application's view of a denial: a reset, and not one byte. It may show in connecting already,
/// or in writing, as fast as it comes.
pub(crate) fn expect_reset(stream: anyhow::Result<TcpStream>) -> anyhow::Result<()> {
    let mut outcome = match stream {
        Ok(mut stream) => stream.write_all(b"x").and_then(|()| stream.read(&mut [0])),
        Err(error) => Err(error.downcast::<std::io::Error>()?),
    };
    if matches!(&outcome, Err(error) if error.kind() == ErrorKind::BrokenPipe) {
        outcome = Err(ErrorKind::ConnectionReset.into());
    }
    match outcome {
        Err(error) => ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}"),
        Ok(count) => anyhow::bail!("got {count} bytes and no reset"),
    }
    Ok(())
}

fn an_identity_that_is_not_listed_is_denied_with_the_nearest_miss() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let _listener = mesh.listen("ledger", mesh.ledger(8080))?;
    expect_reset(mesh.connect("web", mesh.ledger(8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    ensure!(
        is(&record, "policy", "payments/ledger") && is(&record, "rule", "checkout"),
        "{record}"
    );
    ensure!(is(&record, "owner", "payments (#payments-oncall)"), "{record}");
    ensure!(record["mend"].as_str().is_some_and(|mend| mend.contains("name: web")), "{record}");
    let count = mesh.metric(
        "machine-a",
        "hauberk_connections_denied_total",
        &["reason=\"no_matching_rule\"", "src_workload=\"web\"", "dst_workload=\"ledger\""],
    )?;
    ensure!((count - 1.0).abs() < f64::EPSILON, "counted {count}");
    Ok(())
}

fn a_port_that_is_not_listed_is_denied_with_the_nearest_miss() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let _listener = mesh.listen("ledger", mesh.ledger(9999))?;
    expect_reset(mesh.connect("checkout", mesh.ledger(9999)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    let miss = record["nearest_miss"].as_str().unwrap_or_default();
    ensure!(miss.contains("on other ports"), "{record}");
    Ok(())
}

fn a_destination_without_policy_is_denied() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    expect_reset(mesh.connect("checkout", SocketAddr::new(ipv4(WEB), 8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_policy"), "{record}");
    Ok(())
}

fn an_address_outside_the_mesh_is_denied_from_inside() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let outside = SocketAddr::new(ipv4(hauberk_tests::mesh::OUTSIDE), 8080);
    let listener = mesh.listen("outside", outside)?;
    expect_reset(mesh.connect("checkout", outside))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "unknown_destination"), "{record}");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "the connection came through");
    Ok(())
}

/// A rule that lets `web` in.
pub(crate) const WEB_RULE: &str = "  - name: web
    ports: [8080]
    from: [{serviceAccount: {namespace: shop, name: web}}]
";

/// An open connection of a workload to the ledger, and its other end.
pub(crate) fn open(
    mesh: &Mesh,
    listener: &std::net::TcpListener,
    from: &str,
) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut client = mesh.connect(from, listener.local_addr()?)?;
    client.write_all(b"a")?;
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(hauberk_tests::mesh::PATIENCE))?;
    server.read_exact(&mut [0])?;
    Ok((client, server))
}

/// Bytes go both ways on it.
pub(crate) fn still_carries(ends: &mut (TcpStream, TcpStream)) -> anyhow::Result<()> {
    ends.0.write_all(b"b")?;
    ends.1.read_exact(&mut [0]).context("the other connection does not go on")?;
    ends.1.write_all(b"c")?;
    Ok(ends.0.read_exact(&mut [0])?)
}

fn removing_a_rule_cuts_its_connections_and_no_others() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(WEB_RULE))?;
    let with_web = mesh.wait_revision(before)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut stays = open(&mesh, &listener, "checkout")?;
    let (mut client, mut server) = open(&mesh, &listener, "web")?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(""))?;
    for end in [&mut client, &mut server] {
        let error = end.read(&mut [0]).expect_err("a reset");
        ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    }
    mesh.wait_revision(with_web)?;
    still_carries(&mut stays)?;
    for machine in ["machine-a", "machine-b"] {
        let record = mesh.record(machine, |record| is(record, "close_reason", "policy_revoked"))?;
        ensure!(is(&record, "reason", "policy_revoked"), "{record}");
        let cut = mesh.metric(
            machine,
            "hauberk_connections_terminated_total",
            &["reason=\"policy_revoked\"", "src_workload=\"web\""],
        )?;
        ensure!((cut - 1.0).abs() < f64::EPSILON, "{machine} counted {cut}");
    }
    expect_reset(mesh.connect("web", mesh.ledger(8080)))
}

fn a_workload_that_is_taken_out_of_the_registry_is_cut_off_at_once() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, mut server) = open(&mesh, &listener, "checkout")?;
    // The rule that names it stays; its certificate is good for an hour.
    let workloads = std::fs::read_to_string(mesh.manifests().join("workloads.yaml"))?;
    let (web, rest) = workloads
        .split_once(
            "---\napiVersion: hauberk.dev/v1alpha1\nkind: Workload\nmetadata: {name: checkout",
        )
        .context("checkout")?;
    let (_, ledger) = rest.split_once("---\n").context("ledger")?;
    mesh.write_manifest("workloads.yaml", &format!("{web}---\n{ledger}"))?;
    for end in [&mut client, &mut server] {
        let error = end.read(&mut [0]).expect_err("a reset");
        ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    }
    mesh.wait_revision(before)?;
    let record = mesh.record("machine-b", |record| is(record, "close_reason", "policy_revoked"))?;
    let detail = record["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("no registered workload is"), "{record}");
    let why =
        mesh.ask(&["why", "spiffe://example.org/ns/shop/sa/checkout", "payments/ledger:8080"])?;
    ensure!(why.status.code() == Some(1), "{why:?}");
    Ok(())
}

fn a_guardrail_beats_an_allow() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, _server) = open(&mesh, &listener, "checkout")?;
    mesh.write_manifest(
        "guardrail.yaml",
        "apiVersion: hauberk.dev/v1alpha1
kind: Guardrail
metadata: {name: payments-only}
spec:
  owner: {team: platform, contact: '#platform'}
  target: {namespace: payments}
  allPorts: true
  denyUnlessFrom: [{anyIn: {namespace: payments}}]
",
    )?;
    mesh.wait_revision(before)?;
    let error = client.read(&mut [0]).expect_err("a reset");
    ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    expect_reset(mesh.connect("checkout", mesh.ledger(8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(
        is(&record, "reason", "guardrail") && is(&record, "policy", "payments-only"),
        "{record}"
    );
    Ok(())
}

fn a_rule_that_ends_cuts_its_connections() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let end = hauberk_tls::now().saturating_add(std::time::Duration::from_secs(5));
    mesh.write_manifest(
        "ledger.yaml",
        &ledger_policy(&format!("{WEB_RULE}    notAfter: '{end}'\n")),
    )?;
    mesh.wait_revision(before)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, _server) = open(&mesh, &listener, "web")?;
    let error = client.read(&mut [0]).expect_err("a reset at the rule's end");
    ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    ensure!(hauberk_tls::now() >= end, "it was cut before its end");
    expect_reset(mesh.connect("web", mesh.ledger(8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "grant_expired"), "{record}");
    Ok(())
}

fn a_manifest_with_errors_leaves_the_last_good_state_in_force() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let revision = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // One good object and one that would widen if its unknown field were skipped.
    let text = ledger_policy(WEB_RULE) + "    fromm: []\n";
    mesh.write_manifest("ledger.yaml", &text)?;
    mesh.wait("the error", hauberk_tests::mesh::PATIENCE, |mesh| {
        let status = mesh.status()?;
        let told = status.manifest_errors.iter().any(|error| {
            error.contains("ledger.yaml:")
                && error.contains("spec.rules[1].fromm")
                && error.contains("did you mean from?")
        });
        ensure!(told && status.revision == revision, "{:?}", status.manifest_errors);
        Ok(())
    })?;
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    expect_reset(mesh.connect("web", mesh.ledger(8080)))?;
    // A restart with the broken folder goes on with the last good state as well.
    let mut mesh = mesh;
    mesh.stop("control-plane");
    mesh.restart_control_plane()?;
    ensure!(mesh.status()?.revision == revision, "{:?}", mesh.status()?);
    ensure!(mesh.status()?.policies == 1, "{:?}", mesh.status()?);
    Ok(())
}

/// Reading a file is an event of its folder too.
fn a_control_plane_at_rest_does_not_read_its_manifests_over_and_over() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let big = format!("# {}\n", "x".repeat(200_000));
    mesh.write_manifest("remarks.yaml", &big)?;
    // Until that has been read.
    std::thread::sleep(Duration::from_secs(2));
    let read = || -> anyhow::Result<u64> {
        let process = mesh.process("control-plane").context("no control plane")?;
        let io = fs::read_to_string(format!("/proc/{process}/io"))?;
        let line = io.lines().find_map(|line| line.strip_prefix("rchar: "));
        Ok(line.context("no rchar")?.parse()?)
    };
    let before = read()?;
    std::thread::sleep(Duration::from_secs(3));
    let more = read()? - before;
    // Once is the look that it takes every 10 s in any case.
    ensure!(more < 500_000, "it read {more} bytes in 3 s, its manifests have 200000");
    Ok(())
}

fn why_status_denied_and_check_tell_the_same() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let _listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let allowed = mesh.ask(&["why", "shop/checkout", "payments/ledger:8080"])?;
    ensure!(allowed.status.code() == Some(0), "{allowed:?}");
    ensure!(String::from_utf8_lossy(&allowed.stdout).starts_with("allow: "), "{allowed:?}");
    let denied = mesh.ask(&["why", "shop/web", "payments/ledger:8080", "-o", "json"])?;
    ensure!(denied.status.code() == Some(1), "{denied:?}");
    let answer: serde_json::Value = serde_json::from_slice(&denied.stdout)?;
    ensure!(
        is(&answer, "reason", "no_matching_rule") && is(&answer, "rule", "checkout"),
        "{answer}"
    );
    let unknown = mesh.ask(&["why", "shop/wev", "payments/ledger:8080"])?;
    ensure!(unknown.status.code() == Some(2), "{unknown:?}");
    ensure!(String::from_utf8_lossy(&unknown.stderr).contains("shop/web"), "{unknown:?}");
    let status = mesh.ask(&["status", "-o", "json"])?;
    let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
    ensure!(status["workloads"].as_array().is_some_and(|list| list.len() == 3), "{status}");
    let fine = mesh.ask(&["check"])?;
    ensure!(fine.status.success(), "{fine:?}");
    expect_reset(mesh.connect("web", mesh.ledger(8080)))?;
    mesh.wait("the denial", hauberk_tests::mesh::PATIENCE, |mesh| {
        let told = mesh.ask(&["denied"])?;
        let text = String::from_utf8_lossy(&told.stdout).into_owned();
        ensure!(text.contains("shop/web -> payments/ledger:8080  no_matching_rule"), "{text:?}");
        ensure!(text.contains("mend: in AccessPolicy payments/ledger"), "{text:?}");
        Ok(())
    })
}

fn an_audited_workload_lets_through_and_tells_what_it_would_deny() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let workloads = std::fs::read_to_string(mesh.manifests().join("workloads.yaml"))?;
    let (others, ledger) = workloads.rsplit_once("  ports: ").context("the ledger stands last")?;
    mesh.write_manifest("workloads.yaml", &format!("{others}  mode: Audit\n  ports: {ledger}"))?;
    mesh.wait_revision(before)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // Over the mesh without permission, and in clear from outside: both pass, both are told.
    let cases = [("web", "no_matching_rule"), ("outside", "plaintext")];
    for (from, reason) in cases {
        let mut ends = open(&mesh, &listener, from)?;
        still_carries(&mut ends)?;
        drop(ends);
        let record = mesh.record("machine-b", |record| is(record, "reason", reason))?;
        ensure!(is(&record, "decision", "would_deny"), "{record}");
    }
    Ok(())
}
