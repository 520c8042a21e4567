//! Allow-lists: what is denied and why, and what a change does to connections that are open.

use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_core::{
    policy::Reason,
    session::{Refusal, RefusalCause},
    time::Timestamp,
};
use hauberk_tests::mesh::{Mesh, PATIENCE, WEB, is, ledger_policy, workload};

use crate::{
    identity::{Forger, tls_stream},
    tls::asked,
};

crate::trials!(
    an_identity_that_is_not_listed_is_denied_with_the_nearest_miss,
    a_namesake_from_another_namespace_is_denied_with_the_nearest_miss,
    a_port_that_is_not_listed_is_denied_with_the_nearest_miss,
    a_destination_without_policy_is_denied,
    an_address_outside_the_mesh_is_denied_from_inside,
    what_the_source_denies_never_reaches_the_destination,
    a_caller_that_only_the_destination_refuses_is_told_why,
    removing_a_rule_cuts_its_connections_and_no_others,
    a_workload_that_is_taken_out_of_the_registry_is_cut_off_at_once,
    a_guardrail_beats_an_allow,
    a_rule_that_ends_cuts_its_connections,
    a_manifest_with_errors_leaves_the_last_good_state_in_force,
    an_owner_says_nothing_about_another_namespace,
    an_unknown_reference_denies_and_shows_in_the_status,
    a_control_plane_at_rest_does_not_read_its_manifests_over_and_over,
    why_status_denied_and_check_tell_the_same,
    an_audited_workload_lets_through_and_tells_what_it_would_deny,
    an_audited_policy_lets_the_mesh_through_and_nothing_in_clear,
    own_addresses_are_reached_without_the_mesh_as_why_says,
    status_counts_as_open_what_carries_something,
);

/// A captured application's view of a denial: `connect` fails, as if nobody listened.
pub(crate) fn expect_refused(stream: anyhow::Result<TcpStream>) -> anyhow::Result<()> {
    let Err(error) = stream else { anyhow::bail!("it is connected") };
    let error = error.downcast::<std::io::Error>()?;
    ensure!(error.kind() == ErrorKind::ConnectionRefused, "got {error}");
    Ok(())
}

/// The end of a connection that was open and silent is told of a reset.
pub(crate) fn is_cut(end: &mut TcpStream) -> anyhow::Result<()> {
    let told = end.read(&mut [0]);
    let reset = told.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
    ensure!(reset, "told {told:?}");
    Ok(())
}

/// The view of a caller without the mesh: a reset, and not one byte. It may show in connecting already,
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
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
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

/// What the ledger's agent answers to an agent with this identity, that asks without asking itself
/// first.
fn refused_by_the_ledger(mesh: &Mesh, id: &str) -> anyhow::Result<Refusal> {
    let leaf = Forger::with_the_key_of(mesh)?.leaf(id, |_| {})?;
    let mut session = tls_stream(mesh, Some(leaf))?;
    asked(&mut session, 1, mesh.ledger(8080))?.with_context(|| format!("{id} came in"))
}

fn a_namesake_from_another_namespace_is_denied_with_the_nearest_miss() -> anyhow::Result<()> {
    const NAMESAKE: u8 = 13;
    let mut mesh = Mesh::start()?;
    mesh.add("namesake", NAMESAKE)?;
    let before = mesh.wait_revision(0)?;
    let manifest = workload("dev", "checkout", "machine-a", NAMESAKE, "")
        .replace("networkNamespace: checkout", "networkNamespace: namesake");
    mesh.write_manifest("namesake.yaml", &manifest)?;
    mesh.wait_revision(before)?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    expect_refused(mesh.connect("namesake", mesh.ledger(8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(record["src"]["spiffe_id"] == "spiffe://example.org/ns/dev/sa/checkout", "{record}");
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    ensure!(
        is(&record, "policy", "payments/ledger") && is(&record, "rule", "checkout"),
        "{record}"
    );
    let miss = record["nearest_miss"].as_str().unwrap_or_default();
    ensure!(miss.contains("spiffe://example.org/ns/shop/sa/checkout"), "{record}");
    let mend = record["mend"].as_str().unwrap_or_default();
    ensure!(mend.contains("serviceAccount: {namespace: dev, name: checkout}"), "{record}");
    // Nor by the destination, whatever its own agent would let through.
    let refusal = refused_by_the_ledger(&mesh, "spiffe://example.org/ns/dev/sa/checkout")?;
    ensure!(refusal.cause == RefusalCause::Denied(Reason::NoMatchingRule), "{refusal:?}");
    ensure!(refusal.nearest_miss == miss, "{refusal:?}");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "it came through");
    Ok(())
}

fn a_port_that_is_not_listed_is_denied_with_the_nearest_miss() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let _listener = mesh.listen("ledger", mesh.ledger(9999))?;
    expect_refused(mesh.connect("checkout", mesh.ledger(9999)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    let miss = record["nearest_miss"].as_str().unwrap_or_default();
    ensure!(miss.contains("on other ports"), "{record}");
    Ok(())
}

fn a_destination_without_policy_is_denied() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    expect_refused(mesh.connect("checkout", SocketAddr::new(ipv4(WEB), 8080)))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_policy"), "{record}");
    Ok(())
}

fn an_address_outside_the_mesh_is_denied_from_inside() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let outside = SocketAddr::new(ipv4(hauberk_tests::mesh::OUTSIDE), 8080);
    let listener = mesh.listen("outside", outside)?;
    expect_refused(mesh.connect("checkout", outside))?;
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

fn what_the_source_denies_never_reaches_the_destination() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    let denied = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&denied, "reason", "no_matching_rule"), "{denied}");
    // When machine-b tells of one that came later, it has told of all before.
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    let allowed = mesh.record("machine-b", |record| is(record, "decision", "allow"))?;
    ensure!(allowed["src"]["workload"] == "checkout", "{allowed}");
    let records = mesh.all_records("machine-b")?;
    ensure!(records.len() == 1, "machine-b heard of it: {records:?}");
    // Nor did it shake hands with anybody else.
    let name = "hauberk_handshake_duration_seconds_count";
    let handshakes = mesh.metric("machine-b", name, &["side=\"destination\""])?;
    ensure!((handshakes - 1.0).abs() < f64::EPSILON, "{handshakes} handshakes");
    Ok(())
}

/// The number of `machine-a` in the lab's networks.
const MACHINE_A: u8 = 2;

fn a_caller_that_only_the_destination_refuses_is_told_why() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // Machine-a hears nothing of the narrower policy and lets its caller try.
    mesh.cut(&[MACHINE_A])?;
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("8080", "8081"))?;
    mesh.wait("machine-b's policy", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let node = status.nodes.iter().find(|node| node.name == "machine-b").context("no node")?;
        ensure!(
            status.revision > before && node.enforced_revision == status.revision,
            "{status:?}"
        );
        Ok(())
    })?;
    expect_refused(mesh.connect("checkout", mesh.ledger(8080)))?;
    let here = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    let there = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(here["conn_id"] == there["conn_id"], "{here} {there}");
    ensure!(here["policy_revision"] == before, "machine-a knows of it: {here}");
    ensure!(is(&here, "detail", "refused by the destination's agent"), "{here}");
    ensure!(is(&here, "close_reason", "denied"), "{here}");
    // Everything that the destination says of it, its owner and the remedy included.
    for (field, part) in [
        ("reason", "no_matching_rule"),
        ("policy", "payments/ledger"),
        ("rule", "checkout"),
        ("owner", "payments (#payments-oncall)"),
        ("nearest_miss", "on other ports"),
        ("mend", "in AccessPolicy payments/ledger, rule checkout, add to ports: 8080"),
    ] {
        let told = here[field].as_str().unwrap_or_default();
        ensure!(told.contains(part), "{field}: {here}");
        ensure!(here[field] == there[field], "{field}: {here} {there}");
    }
    let counted = mesh.metric(
        "machine-a",
        "hauberk_connections_denied_total",
        &["reason=\"no_matching_rule\"", "src_workload=\"checkout\"", "dst_workload=\"ledger\""],
    )?;
    ensure!((counted - 1.0).abs() < f64::EPSILON, "counted {counted}");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "it came through");
    Ok(())
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
        is_cut(end)?;
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
    expect_refused(mesh.connect("web", mesh.ledger(8080)))
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
    // The destination does not rely on the caller's agent, which may be the first to know.
    mesh.while_held_up("machine-a", || {
        mesh.write_manifest("workloads.yaml", &format!("{web}---\n{ledger}"))?;
        is_cut(&mut server)
    })?;
    is_cut(&mut client)?;
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
    is_cut(&mut client)?;
    expect_refused(mesh.connect("checkout", mesh.ledger(8080)))?;
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
    // A tenth after a whole second: whoever counts in those is 0.9 s late.
    let soon = hauberk_tls::now().saturating_add(Duration::from_secs(5));
    let end = Timestamp::from_unix_millis(soon.unix_millis() / 1000 * 1000 + 100);
    mesh.write_manifest(
        "ledger.yaml",
        &ledger_policy(&format!("{WEB_RULE}    notAfter: '{end}'\n")),
    )?;
    mesh.wait_revision(before)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, _server) = open(&mesh, &listener, "web")?;
    is_cut(&mut client)?;
    let cut = hauberk_tls::now();
    ensure!(cut >= end, "it was cut before its end");
    ensure!(cut.since(end) < Duration::from_millis(700), "it was cut {:?} late", cut.since(end));
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
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
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    // A restart with the broken folder goes on with the last good state as well.
    let mut mesh = mesh;
    mesh.stop("control-plane");
    mesh.restart_control_plane()?;
    ensure!(mesh.status()?.revision == revision, "{:?}", mesh.status()?);
    ensure!(mesh.status()?.policies == 1, "{:?}", mesh.status()?);
    Ok(())
}

/// What somebody of the namespace shop would like to say about the ledger, which is not theirs.
fn grab(target: &str) -> String {
    format!(
        "apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: grab, namespace: shop}}
spec:
  owner: {{team: shop, contact: '#shop'}}
  target: {target}
  mode: Audit
{}",
        WEB_RULE.replacen("  -", "  rules:\n  -", 1)
    )
}

fn an_owner_says_nothing_about_another_namespace() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let revision = mesh.wait_revision(0)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    for target in ["{selector: {matchLabels: {app: ledger}}}", "{serviceAccount: ledger}"] {
        mesh.write_manifest("grab.yaml", &grab(target))?;
        let told = "AccessPolicy shop/grab: spec.target matches no workload";
        mesh.wait("the warning", PATIENCE, |mesh| {
            let status = mesh.status()?;
            let warned = status.warnings.iter().any(|warning| warning.contains(told));
            ensure!(warned && status.revision == revision, "{target}: {status:?}");
            Ok(())
        })?;
        expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
        // The next one's warning is the same.
        mesh.remove_manifest("grab.yaml")?;
        mesh.wait("the end of the warning", PATIENCE, |mesh| {
            let status = mesh.status()?;
            ensure!(status.warnings.is_empty(), "{target}: {status:?}");
            Ok(())
        })?;
    }
    // To name the namespace is an error.
    mesh.write_manifest(
        "grab.yaml",
        &grab("{serviceAccount: {namespace: payments, name: ledger}}"),
    )?;
    mesh.wait("the error", PATIENCE, |mesh| {
        let status = mesh.status()?;
        let told = status.manifest_errors.iter().any(|error| {
            error.contains("grab.yaml:") && error.contains("spec.target.serviceAccount.namespace")
        });
        ensure!(told && status.revision == revision, "{status:?}");
        Ok(())
    })?;
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
    mesh.wait("the denials", PATIENCE, |mesh| {
        let records = mesh.all_records("machine-a")?;
        let by_its_owner = |record: &&serde_json::Value| {
            is(record, "decision", "deny") && is(record, "policy", "payments/ledger")
        };
        let denied = records.iter().filter(by_its_owner).count();
        ensure!(denied == 3 && records.len() == 3, "{records:?}");
        Ok(())
    })?;
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "it came through");
    Ok(())
}

fn an_unknown_reference_denies_and_shows_in_the_status() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let _listener = mesh.listen("ledger", mesh.ledger(8080))?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(&WEB_RULE.replace("web", "nobody")))?;
    mesh.wait_revision(before)?;
    let nobody = "spiffe://example.org/ns/shop/sa/nobody";
    let warning = format!(
        "AccessPolicy payments/ledger: rule nobody allows {nobody}, which no registered workload has"
    );
    for (question, code) in
        [(&["status"][..], 0), (&["status", "-o", "json"][..], 0), (&["check"][..], 1)]
    {
        let answer = mesh.ask(question)?;
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        ensure!(answer.status.code() == Some(code), "{question:?}: {answer:?}");
        ensure!(text.contains(&warning), "{question:?}: {text}");
    }
    // Whoever has a certificate of that name is still nobody.
    let refusal = refused_by_the_ledger(&mesh, nobody)?;
    ensure!(refusal.cause == RefusalCause::Denied(Reason::NoMatchingRule), "{refusal:?}");
    ensure!(refusal.mend.contains("no registered workload is"), "{refusal:?}");
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
    expect_refused(mesh.connect("web", mesh.ledger(8080)))?;
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

fn an_audited_policy_lets_the_mesh_through_and_nothing_in_clear() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let policy = ledger_policy("").replace("spec:\n", "spec:\n  mode: Audit\n");
    mesh.write_manifest("ledger.yaml", &policy)?;
    mesh.wait_revision(before)?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut ends = open(&mesh, &listener, "web")?;
    still_carries(&mut ends)?;
    drop(ends);
    let record = mesh.record("machine-b", |record| is(record, "reason", "no_matching_rule"))?;
    ensure!(is(&record, "decision", "would_deny"), "{record}");
    expect_reset(mesh.connect("outside", mesh.ledger(8080)))?;
    let record = mesh.record("machine-b", |record| is(record, "reason", "plaintext"))?;
    ensure!(is(&record, "decision", "deny"), "{record}");
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "the application saw who came in clear");
    Ok(())
}

fn own_addresses_are_reached_without_the_mesh_as_why_says() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut ends = open(&mesh, &listener, "ledger")?;
    still_carries(&mut ends)?;
    drop(ends);
    let why = mesh.ask(&["why", "payments/ledger", "payments/ledger:8080"])?;
    let text = String::from_utf8_lossy(&why.stdout).into_owned();
    ensure!(text.contains("a workload reaches its own addresses without the mesh"), "{text}");
    // The next one has a record, so that this one would have it by now.
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    mesh.record("machine-b", |record| is(record, "decision", "allow"))?;
    let own = |record: &serde_json::Value| record["src"]["workload"] == "ledger";
    ensure!(!mesh.all_records("machine-b")?.iter().any(own), "there is a record");
    Ok(())
}

fn status_counts_as_open_what_carries_something() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let counts = |wanted: u64| {
        mesh.wait("the count", PATIENCE, |mesh| {
            let status = mesh.ask(&["status", "-o", "json"])?;
            let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
            let nodes = status["nodes"].as_array().context("no nodes")?;
            ensure!(nodes.iter().all(|node| node["open_connections"] == wanted), "{status}");
            Ok(())
        })
    };
    let mut ends = open(&mesh, &listener, "checkout")?;
    counts(1)?;
    still_carries(&mut ends)?;
    drop(ends);
    // The session that carried it waits for the next one.
    counts(0)?;
    let idle = mesh.metric("machine-a", "hauberk_idle_sessions", &["outbound"])?;
    ensure!(idle >= 1.0, "{idle} sessions wait");
    Ok(())
}
