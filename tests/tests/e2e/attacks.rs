//! What attackers try on the network, and that it fails for the right reason.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::{ipv4, ipv6};
use hauberk_linux::packets::{CaptureOptions, PacketCapture};
use hauberk_tests::mesh::{LEDGER, Mesh, is};

use crate::identity::{Forger, tls_attempt};

crate::trials!(
    plaintext_to_a_protected_port_is_refused_and_counted,
    the_listeners_of_the_agent_cannot_be_dialled_around,
    the_wire_shows_tls_13_and_no_byte_of_the_payload,
    a_peer_without_certificate_is_refused,
    a_certificate_of_a_foreign_root_is_refused,
    expired_and_malformed_certificates_are_refused_each_with_its_reason,
    silent_and_slow_peers_delay_nobody,
    garbage_on_the_mesh_port_is_refused,
    a_workload_cannot_use_anothers_address,
);

/// Whoever comes in clear gets no byte, as fast or as slow as the refusal comes.
fn no_answer(stream: anyhow::Result<TcpStream>) -> anyhow::Result<()> {
    let Ok(mut stream) = stream else { return Ok(()) };
    if stream.write_all(b"GET / HTTP/1.0\r\n\r\n").is_err() {
        return Ok(());
    }
    match stream.read(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => bail!("it was left waiting"),
        Err(_) | Ok(0) => Ok(()),
        Ok(_) => bail!("it was answered"),
    }
}

fn plaintext_to_a_protected_port_is_refused_and_counted() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for (count, address) in [ipv4(LEDGER), ipv6(LEDGER)].into_iter().enumerate() {
        let target = SocketAddr::new(address, 8080);
        let listener = mesh.listen("ledger", target)?;
        no_answer(mesh.connect("outside", target))?;
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "the application saw the intruder");
        let record = mesh.record("machine-b", |record| {
            is(record, "reason", "plaintext")
                && record["original_dst"].as_str() == Some(&target.to_string())
        })?;
        ensure!(is(&record, "decision", "deny"), "{record}");
        let counted = mesh.metric(
            "machine-b",
            "hauberk_connections_denied_total",
            &["reason=\"plaintext\""],
        )?;
        ensure!((counted - (count as f64 + 1.0)).abs() < f64::EPSILON, "counted {counted}");
    }
    Ok(())
}

fn the_listeners_of_the_agent_cannot_be_dialled_around() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    listener.set_nonblocking(true)?;
    for port in [15_001, 15_006] {
        no_answer(mesh.connect("outside", mesh.ledger(port)))
            .with_context(|| format!("port {port}"))?;
    }
    // From inside, straight to the agent's own listener.
    let inside = SocketAddr::from(([127, 0, 0, 1], 15_001));
    no_answer(mesh.connect("web", inside))?;
    ensure!(listener.accept().is_err(), "somebody came through");
    Ok(())
}

fn the_wire_shows_tls_13_and_no_byte_of_the_payload() -> anyhow::Result<()> {
    const SECRET: &[u8] = b"the-payload-that-nobody-on-the-wire-may-read";
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let capture = mesh.wire().run(|| PacketCapture::start(&CaptureOptions::default()))??;
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(SECRET)?;
    let (mut server, _) = listener.accept()?;
    let mut got = vec![0; SECRET.len()];
    server.read_exact(&mut got)?;
    ensure!(got == SECRET, "the payload did not arrive");
    server.write_all(SECRET)?;
    client.read_exact(&mut got)?;
    drop((client, server));
    std::thread::sleep(Duration::from_millis(300));
    let captured = capture.stop()?;
    ensure!(captured.is_complete() && captured.lost() == 0, "the capture is not whole");
    ensure!(!captured.contains(SECRET), "the payload was on the wire in clear");
    ensure!(!captured.contains(b"spiffe://"), "an identity was on the wire in clear");
    let handshakes = captured.handshakes(15_008);
    let first = handshakes.first().context("no handshake was seen")?;
    let client = first.client.as_ref().context("no ClientHello")?;
    let server = first.server.as_ref().context("no ServerHello")?;
    ensure!(client.versions == [0x0304], "offered {:x?}", client.versions);
    ensure!(client.groups.first() == Some(&0x11ec), "offered {:x?}", client.groups);
    ensure!(server.version == 0x0304 && server.group == Some(0x11ec), "took {server:x?}");
    Ok(())
}

fn a_peer_without_certificate_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    tls_attempt(&mesh, None).expect_err("a peer without certificate came in");
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_client_cert"), "{record}");
    Ok(())
}

fn a_certificate_of_a_foreign_root_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let forger = Forger::foreign()?;
    let forged = forger.leaf("spiffe://example.org/ns/shop/sa/checkout", |_| {})?;
    tls_attempt(&mesh, Some(forged)).expect_err("a foreign certificate came in");
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "untrusted_root"), "{record}");
    Ok(())
}

type Change = fn(&mut rcgen::CertificateParams);

fn expired_and_malformed_certificates_are_refused_each_with_its_reason() -> anyhow::Result<()> {
    use rcgen::{ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType};
    let mesh = Mesh::start()?;
    // With the mesh's own CA key: what a broken or stolen issuer could make.
    let forger = Forger::with_the_key_of(&mesh)?;
    let cases: [(&str, &str, Change, &str); 8] = [
        (
            "expired",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                p.not_after = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
            },
            "expired_cert",
        ),
        (
            "not yet valid",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                p.not_before = time::OffsetDateTime::now_utc() + time::Duration::minutes(9);
            },
            "expired_cert",
        ),
        (
            "flagged as CA",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            },
            "bad_svid",
        ),
        (
            "two URIs",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                let second = "spiffe://example.org/ns/shop/sa/web".try_into().unwrap();
                p.subject_alt_names.push(SanType::URI(second));
            },
            "bad_svid",
        ),
        ("root path", "spiffe://example.org", |_| {}, "bad_svid"),
        (
            "may sign certificates",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                p.key_usages.push(KeyUsagePurpose::KeyCertSign);
            },
            "bad_svid",
        ),
        (
            "not for clients",
            "spiffe://example.org/ns/shop/sa/checkout",
            |p| {
                p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            },
            "bad_svid",
        ),
        (
            "other trust domain",
            "spiffe://elsewhere.org/ns/shop/sa/checkout",
            |_| {},
            "untrusted_root",
        ),
    ];
    for (number, (name, id, change, reason)) in cases.into_iter().enumerate() {
        let leaf = forger.leaf(id, change)?;
        tls_attempt(&mesh, Some(leaf)).err().with_context(|| format!("{name}: it came in"))?;
        mesh.wait("the denial", hauberk_tests::mesh::PATIENCE, |mesh| {
            let text = std::fs::read_to_string(mesh.records("machine-b"))?;
            let last: serde_json::Value =
                serde_json::from_str(text.lines().nth(number).context("no record yet")?)?;
            ensure!(is(&last, "reason", reason), "{name}: wanted {reason}, got {last}");
            Ok(())
        })?;
    }
    Ok(())
}

fn silent_and_slow_peers_delay_nobody() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut silent = Vec::new();
    // More than one address may shake hands at once, and more than fit into a usual limit of files.
    for number in 0..1_500 {
        let mut stream = mesh.connect("outside", mesh.ledger(15_008))?;
        if number % 2 == 0 {
            // The start of a ClientHello, and never the rest.
            stream.write_all(&[0x16, 0x03, 0x01, 0x02])?;
        }
        silent.push(stream);
    }
    let started = std::time::Instant::now();
    let mut client = mesh.connect("checkout", mesh.ledger(8080))?;
    client.write_all(b"x")?;
    let (mut server, _) = listener.accept()?;
    server.read_exact(&mut [0])?;
    // Far below the time that a handshake may take: nobody else waited for the silent ones.
    ensure!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
    // Each is given up after its time, and recorded.
    let mut first = silent.swap_remove(0);
    first.set_read_timeout(Some(Duration::from_secs(30)))?;
    ensure!(!matches!(first.read(&mut [0]), Ok(count) if count > 0), "a silent peer got bytes");
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_client_cert"), "{record}");
    Ok(())
}

fn garbage_on_the_mesh_port_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let mut stream = mesh.connect("outside", mesh.ledger(15_008))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: ledger\r\n\r\n")?;
    let mut answer = Vec::new();
    // An alert or a reset, never anything of the application.
    drop(stream.read_to_end(&mut answer));
    ensure!(answer.len() < 16, "got {answer:?}");
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "plaintext"), "{record}");
    Ok(())
}

fn a_workload_cannot_use_anothers_address() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    listener.set_nonblocking(true)?;
    // web takes checkout's address in its own namespace and calls from it: the identity stays web's.
    mesh.namespace("web")?.run(|| hauberk_linux::links::add_address("eth0", ipv4(12), 24))??;
    let target = mesh.ledger(8080);
    let stream = mesh.namespace("web")?.run(move || -> std::io::Result<std::net::TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(ipv4(12), 0).into())?;
        socket.connect(&target.into())?;
        Ok(socket.into())
    })?;
    if let Ok(mut stream) = stream {
        stream.set_read_timeout(Some(hauberk_tests::mesh::PATIENCE))?;
        ensure!(!matches!(stream.read(&mut [0]), Ok(count) if count > 0), "it got bytes");
    }
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(record["src"]["workload"] == "web", "{record}");
    ensure!(listener.accept().is_err(), "it came through");
    Ok(())
}
