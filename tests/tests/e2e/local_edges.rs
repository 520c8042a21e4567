//! Connections between two workloads of one machine: in TLS as all others, or under `verified-local`
//! without, and then proven, decided, cut and recorded all the same.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_linux::packets::{CaptureOptions, PacketCapture};
use hauberk_tests::mesh::{CHECKOUT, Mesh, WEB, addresses, is};
use serde_json::Value;

use crate::{
    policy::{expect_refused, is_cut, still_carries},
    relay::{answers_lost, pairs_exchanged},
};

crate::trials!(
    local_edges_go_through_tls_by_default,
    a_verified_local_edge_is_proven_decided_and_recorded,
    a_verified_local_edge_carries_bulk_half_close_and_resets,
    a_policy_change_cuts_a_verified_local_edge,
    a_verified_local_edge_lives_and_ends_with_its_certificates,
    a_verified_local_edge_delivers_an_answer_before_the_end_of_the_upload,
    a_verified_local_edge_keeps_the_order_of_connections,
);

const VERIFIED: &[&str] = &["--local-edges", "verified-local"];
const SECRET: &[u8] = b"what-neither-wire-nor-bridge-may-see";

/// `checkout`, which lives on the same machine, lets `web` in.
const POLICY: &str = "apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: checkout, namespace: shop}
spec:
  owner: {team: shop, contact: '#shop-oncall'}
  target: {selector: {matchLabels: {app: checkout}}}
  rules:
  - name: web
    ports: [8080]
    from: [{serviceAccount: {namespace: shop, name: web}}]
";

fn checkout() -> SocketAddr {
    SocketAddr::new(ipv4(CHECKOUT), 8080)
}

fn allow(mesh: &Mesh) -> anyhow::Result<u64> {
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("checkout.yaml", POLICY)?;
    mesh.wait_revision(before)
}

/// Both ends of a connection of `web` to `checkout`.
fn open(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let mut client = mesh.connect("web", listener.local_addr()?)?;
    client.write_all(b"a")?;
    let (mut server, seen) = listener.accept()?;
    server.set_read_timeout(Some(hauberk_tests::mesh::PATIENCE))?;
    ensure!(seen == client.local_addr()?, "checkout saw {seen}");
    server.read_exact(&mut [0])?;
    Ok((client, server))
}

/// The records of one connection, the caller's side first. Both are of machine-a.
fn both_records(mesh: &Mesh, close: &str) -> anyhow::Result<[Value; 2]> {
    let of = |side: &str| {
        mesh.record("machine-a", |record| {
            is(record, "side", side)
                && is(record, "close_reason", close)
                && is(&record["dst"], "workload", "checkout")
        })
    };
    let (source, destination) = (of("source")?, of("destination")?);
    ensure!(source["conn_id"] == destination["conn_id"], "{source} {destination}");
    Ok([source, destination])
}

fn local_edges_go_through_tls_by_default() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    allow(&mesh)?;
    let listener = mesh.listen("checkout", checkout())?;
    let ends = open(&mesh, &listener)?;
    drop(ends);
    for record in both_records(&mesh, "complete")? {
        ensure!(is(&record, "path", "mtls"), "{record}");
        ensure!(is(&record["tls"], "version", "TLSv1.3"), "{record}");
    }
    Ok(())
}

fn a_verified_local_edge_is_proven_decided_and_recorded() -> anyhow::Result<()> {
    let mesh = Mesh::start_with_agents(&[], VERIFIED)?;
    expect_refused(mesh.connect("web", checkout()))?;
    let denied = mesh.record("machine-a", |record| is(&record["dst"], "workload", "checkout"))?;
    ensure!(is(&denied, "decision", "deny") && denied["path"].is_null(), "{denied}");
    allow(&mesh)?;
    let capture = mesh.wire().run(|| PacketCapture::start(&CaptureOptions::default()))??;
    for (destination, source) in addresses(CHECKOUT).into_iter().zip(addresses(WEB)) {
        let listener = mesh.listen("checkout", SocketAddr::new(destination, 8080))?;
        let (mut client, mut server) = open(&mesh, &listener)?;
        ensure!(client.local_addr()?.ip() == source, "web called from another address");
        client.write_all(SECRET)?;
        server.read_exact(&mut vec![0; SECRET.len()])?;
        server.write_all(b"x")?;
        client.read_exact(&mut [0])?;
    }
    for record in both_records(&mesh, "complete")? {
        ensure!(is(&record, "path", "verified_local") && record["tls"].is_null(), "{record}");
        ensure!(is(&record, "decision", "allow") && is(&record, "rule", "web"), "{record}");
        ensure!(is(&record["src"], "workload", "web"), "{record}");
        let (sent, received) = (SECRET.len() as u64 + 1, 1);
        let expected =
            if is(&record, "side", "source") { (sent, received) } else { (received, sent) };
        let told = (record["bytes_sent"].as_u64(), record["bytes_received"].as_u64());
        ensure!(told == (Some(expected.0), Some(expected.1)), "{record}");
    }
    let counted =
        mesh.metric("machine-a", "hauberk_streams_opened_total", &["session=\"verified_local\""])?;
    ensure!((counted - 2.0).abs() < f64::EPSILON, "counted {counted}");
    // Not even between the two workloads' own networks.
    let captured = capture.stop()?;
    ensure!(captured.is_complete() && captured.lost() == 0, "the capture is not whole");
    ensure!(!captured.contains(SECRET), "the payload left the loopback interfaces");
    // Another port of the same workload is as closed as ever, and what is elsewhere goes through TLS.
    expect_refused(mesh.connect("web", SocketAddr::new(ipv4(CHECKOUT), 8081)))?;
    let ledger = mesh.listen("ledger", mesh.ledger(8080))?;
    let elsewhere = crate::policy::open(&mesh, &ledger, "checkout")?;
    drop(elsewhere);
    let record = mesh.record("machine-a", |record| is(&record["dst"], "workload", "ledger"))?;
    ensure!(is(&record, "path", "mtls"), "{record}");
    Ok(())
}

fn a_verified_local_edge_carries_bulk_half_close_and_resets() -> anyhow::Result<()> {
    const LENGTH: usize = 256 << 20;
    let mesh = Mesh::start_with_agents(&[], VERIFIED)?;
    allow(&mesh)?;
    let listener = mesh.listen("checkout", checkout())?;
    let (mut client, mut server) = open(&mesh, &listener)?;
    // The whole length there, its end, and only then the whole length back.
    let echo = thread::spawn(move || -> anyhow::Result<()> {
        // Longer than all buffers on the way: whoever sends must wait.
        thread::sleep(Duration::from_millis(300));
        read_pattern(&mut server, LENGTH).context("at the server")?;
        write_pattern(&mut server, LENGTH)
    });
    write_pattern(&mut client, LENGTH)?;
    client.shutdown(Shutdown::Write)?;
    read_pattern(&mut client, LENGTH).context("at the client")?;
    echo.join().unwrap()?;
    drop(client);
    let [source, _] = both_records(&mesh, "complete")?;
    let length = LENGTH as u64;
    ensure!(source["bytes_sent"].as_u64() == Some(length + 1), "{source}");
    ensure!(source["bytes_received"].as_u64() == Some(length), "{source}");

    let (client, mut server) = open(&mesh, &listener)?;
    socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    is_cut(&mut server)?;
    mesh.record("machine-a", |record| is(record, "close_reason", "application_reset"))?;
    mesh.record("machine-a", |record| is(record, "close_reason", "peer_application_reset"))?;
    Ok(())
}

/// Bytes that tell a lost, doubled or exchanged block.
fn pattern(block: usize) -> Vec<u8> {
    (0..65_536).map(|place| (place * 7 + block * 13 + place / 251) as u8).collect()
}

fn write_pattern(stream: &mut TcpStream, length: usize) -> anyhow::Result<()> {
    for block in 0..length / 65_536 {
        stream.write_all(&pattern(block))?;
    }
    Ok(())
}

/// Exactly the pattern, and then the end.
fn read_pattern(stream: &mut TcpStream, length: usize) -> anyhow::Result<()> {
    let mut got = vec![0; 65_536];
    for block in 0..length / 65_536 {
        stream.read_exact(&mut got)?;
        ensure!(got == pattern(block), "block {block} is another");
    }
    ensure!(stream.read(&mut got)? == 0, "bytes came after the last one");
    Ok(())
}

fn a_policy_change_cuts_a_verified_local_edge() -> anyhow::Result<()> {
    let mesh = Mesh::start_with_agents(&[], VERIFIED)?;
    let allowed = allow(&mesh)?;
    let listener = mesh.listen("checkout", checkout())?;
    let mut ends = open(&mesh, &listener)?;
    still_carries(&mut ends)?;
    mesh.remove_manifest("checkout.yaml")?;
    for end in [&mut ends.0, &mut ends.1] {
        is_cut(end)?;
    }
    mesh.wait_revision(allowed)?;
    for record in both_records(&mesh, "policy_revoked")? {
        ensure!(is(&record, "reason", "policy_revoked"), "{record}");
    }
    expect_refused(mesh.connect("web", checkout()))
}

fn a_verified_local_edge_lives_and_ends_with_its_certificates() -> anyhow::Result<()> {
    const LIFETIME: Duration = Duration::from_secs(10);
    let lifetime = ["--workload-certificate-lifetime", "10s"];
    let mut mesh = Mesh::start_with_agents(&lifetime, VERIFIED)?;
    allow(&mesh)?;
    let listener = mesh.listen("checkout", checkout())?;
    let mut ends = open(&mesh, &listener)?;
    let over_one_lifetime = Instant::now() + LIFETIME + Duration::from_secs(2);
    while Instant::now() < over_one_lifetime {
        still_carries(&mut ends).context("while certificates are renewed")?;
        thread::sleep(Duration::from_millis(100));
    }
    mesh.kill("control-plane");
    is_cut(&mut ends.0)?;
    for record in both_records(&mesh, "expired_cert")? {
        ensure!(is(&record, "reason", "expired_cert"), "{record}");
    }
    expect_refused(mesh.connect("web", checkout()))
}

fn a_verified_local_edge_delivers_an_answer_before_the_end_of_the_upload() -> anyhow::Result<()> {
    let mesh = Mesh::start_with_agents(&[], VERIFIED)?;
    allow(&mesh)?;
    let lost = answers_lost(&mesh, "web", checkout())?;
    ensure!(lost == 0, "{lost} answers were lost\n{}", mesh.logs());
    Ok(())
}

fn a_verified_local_edge_keeps_the_order_of_connections() -> anyhow::Result<()> {
    const PAIRS: usize = 300;
    let mesh = Mesh::start_with_agents(&[], VERIFIED)?;
    allow(&mesh)?;
    let listener = mesh.listen("checkout", checkout())?;
    let exchanged = pairs_exchanged(&mesh, "web", &listener, PAIRS)?;
    ensure!(exchanged == 0, "{exchanged} of {PAIRS} pairs were accepted in the other order");
    Ok(())
}
