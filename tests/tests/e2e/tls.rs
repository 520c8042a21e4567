//! The handshake between two agents: whom a caller takes for its destination, to whom a session leads,
//! and what is not spoken at all.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_core::{
    identity::SpiffeId,
    policy::Reason,
    session::{ALPN, FrameType, HEADER_LENGTH, Header, Machine, Open, Refusal, RefusalCause, Role},
};
use hauberk_tests::mesh::{CHECKOUT, Mesh, PATIENCE, WEB, is};
use serde_json::Value;

use crate::{
    identity::{Forged, Forger, LEDGER, TlsStream, tls_stream, tls_stream_to},
    policy::expect_refused,
};

crate::trials!(
    a_destination_with_a_bad_certificate_is_refused_by_its_callers,
    a_session_carries_nothing_to_another_workload,
    a_caller_that_speaks_tls_12_is_refused,
    a_caller_without_our_protocol_is_refused,
);

const CHECKOUT_ID: &str = "spiffe://example.org/ns/shop/sa/checkout";
const WEB_ID: &str = "spiffe://example.org/ns/shop/sa/web";
const VAULT_ID: &str = "spiffe://example.org/ns/payments/sa/vault";

/// The number of `machine-b` in the lab's networks.
const MACHINE_B: u8 = 3;

/// What the application would get with a stream that we ask for.
const BYTES: &[u8] = b"bytes";

/// Asks for a stream on a session that we made ourselves, its first bytes right behind. The refusal;
/// none if the stream was taken.
pub(crate) fn asked(
    session: &mut TlsStream,
    id: u8,
    to: SocketAddr,
) -> anyhow::Result<Option<Refusal>> {
    let wish = Open {
        connection_id: [id; 16],
        trace_id: [0; 16],
        original_destination: to,
        source_address: SocketAddr::new(ipv4(CHECKOUT), 40_000 + u16::from(id)),
    };
    let mut machine = Machine::new(Role::Source);
    let mut frames = Vec::new();
    machine.open(&wish, &mut frames)?;
    frames.extend_from_slice(&machine.data(BYTES.len())?);
    frames.extend_from_slice(BYTES);
    session.write_all(&frames)?;
    let mut header = [0; HEADER_LENGTH];
    session.read_exact(&mut header)?;
    let header = Header::decode(header)?;
    if header.frame_type == FrameType::Accept {
        return Ok(None);
    }
    ensure!(header.frame_type == FrameType::Refuse, "got {header:?}");
    let mut body = vec![0; header.length];
    session.read_exact(&mut body)?;
    Ok(Some(Refusal::decode(&body)?))
}

/// What machine-b tells of whoever came from this address.
fn told_of(mesh: &Mesh, caller: SocketAddr) -> anyhow::Result<Value> {
    let caller = caller.to_string();
    mesh.record("machine-b", |record| record["src"]["addr"].as_str() == Some(&caller))
}

/// Waits for one caller and shows it this certificate. Tells whether it was taken.
fn shows(
    listener: &TcpListener,
    forged: Forged,
) -> anyhow::Result<mpsc::Receiver<anyhow::Result<()>>> {
    let (listener, config) = (listener.try_clone()?, Arc::new(forged.server_config()?));
    let (told, outcome) = mpsc::channel();
    // In a thread of its own, so that a caller that never comes fails the test.
    thread::spawn(move || {
        let handshake = || -> anyhow::Result<()> {
            let (mut caller, _) = listener.accept()?;
            caller.set_read_timeout(Some(PATIENCE))?;
            rustls::ServerConnection::new(config)?.complete_io(&mut caller)?;
            Ok(())
        };
        // Nobody may be waiting any more.
        drop(told.send(handshake()));
    });
    Ok(outcome)
}

fn a_destination_with_a_bad_certificate_is_refused_by_its_callers() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let (own, foreign) = (Forger::with_the_key_of(&mesh)?, Forger::foreign()?);
    // Somebody sits in the ledger's network, in the place of its agent.
    mesh.stop("machine-b");
    // Whose rules would refuse everybody in its stead.
    mesh.namespace("ledger")?.run(hauberk_linux::capture::remove)??;
    let listener = mesh.listen("ledger", mesh.ledger(15_008))?;
    let minute = time::Duration::minutes(1);
    let expired = own.leaf(LEDGER, |leaf| {
        leaf.not_after = time::OffsetDateTime::now_utc() - minute;
    })?;
    let of_ca = own.leaf(LEDGER, |leaf| {
        leaf.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    })?;
    let cases = [
        ("a foreign root", foreign.leaf(LEDGER, |_| {})?, "untrusted_root"),
        ("expired", expired, "expired_cert"),
        ("flagged as CA", of_ca, "bad_svid"),
        ("another workload's", own.leaf(WEB_ID, |_| {})?, "identity_mismatch"),
    ];
    for (name, forged, reason) in cases {
        let outcome = shows(&listener, forged)?;
        expect_refused(mesh.connect("checkout", mesh.ledger(8080))).context(name)?;
        let outcome = outcome.recv_timeout(PATIENCE).context(name)?;
        ensure!(outcome.is_err(), "{name}: the certificate was taken");
        let record = mesh.record("machine-a", |record| is(record, "reason", reason));
        let record = record.context(name)?;
        ensure!(is(&record, "decision", "deny"), "{name}: {record}");
        ensure!(record["dst"]["workload"] == "ledger", "{name}: {record}");
        ensure!(record["bytes_received"] == 0, "{name}: {record}");
    }
    // Nothing but their certificates kept them out.
    let outcome = shows(&listener, own.leaf(LEDGER, |_| {})?)?;
    // What sits there speaks no further.
    drop(mesh.connect("checkout", mesh.ledger(8080)));
    outcome.recv_timeout(PATIENCE)?.context("a good certificate was refused")
}

/// Two services of one machine, behind one listener of its agent. Both let checkout in.
const TWO_SERVICES: &str = "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: vault, namespace: payments}
spec: {machine: machine-b, serviceAccount: vault, process: {user: '4242'}, ports: [7001]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: safe, namespace: payments}
spec: {machine: machine-b, serviceAccount: safe, process: {user: '4343'}, ports: [7002]}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: vault, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {serviceAccount: vault}
  rules:
  - {name: checkout, ports: [7001], from: [{serviceAccount: {namespace: shop, name: checkout}}]}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: safe, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {serviceAccount: safe}
  rules:
  - {name: checkout, ports: [7002], from: [{serviceAccount: {namespace: shop, name: checkout}}]}
";

fn a_session_carries_nothing_to_another_workload() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("services.yaml", TWO_SERVICES)?;
    mesh.wait_revision(before)?;
    mesh.wait_ready().with_context(|| mesh.logs())?;
    let [vault, safe] = [7001, 7002].map(|port| SocketAddr::new(ipv4(MACHINE_B), port));
    let web = SocketAddr::new(ipv4(WEB), 8080);
    let at_vault = mesh.listen("machine-b", vault)?;
    let [at_safe, at_web] = [mesh.listen("machine-b", safe)?, mesh.listen("web", web)?];
    let forger = Forger::with_the_key_of(&mesh)?;
    let session_for_vault = || {
        let leaf = forger.leaf(CHECKOUT_ID, |_| {})?;
        let agent = SocketAddr::new(vault.ip(), 15_008);
        tls_stream_to(&mesh, Some(leaf), VAULT_ID, agent, &[ALPN])
    };

    // Whom it is for, it reaches.
    let mut session = session_for_vault()?;
    let refusal = asked(&mut session, 1, vault)?;
    ensure!(refusal.is_none(), "{refusal:?}");
    let (mut application, _) = at_vault.accept()?;
    application.set_read_timeout(Some(PATIENCE))?;
    let mut got = vec![0; BYTES.len()];
    application.read_exact(&mut got)?;
    ensure!(got == BYTES, "got {got:?}");

    let for_ledger = tls_stream(&mesh, Some(forger.leaf(CHECKOUT_ID, |_| {})?))?;
    let cases = [
        ("a neighbour", session_for_vault()?, 2, safe, Reason::IdentityMismatch, &at_safe),
        ("another machine's", for_ledger, 3, web, Reason::UnknownDestination, &at_web),
    ];
    for (name, mut session, id, target, reason, listener) in cases {
        let refusal = asked(&mut session, id, target).context(name)?;
        let refusal = refusal.with_context(|| format!("{name}: it was reached"))?;
        ensure!(refusal.cause == RefusalCause::Denied(reason), "{name}: {refusal:?}");
        let conn_id = format!("{id:02x}").repeat(16);
        let record = mesh.record("machine-b", |record| is(record, "conn_id", &conn_id))?;
        ensure!(
            is(&record, "decision", "deny") && is(&record, "reason", reason.as_str()),
            "{name}: {record}"
        );
        ensure!(record["src"]["workload"] == "checkout", "{name}: {record}");
        ensure!(record["bytes_sent"] == 0 && record["bytes_received"] == 0, "{name}: {record}");
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "{name}: its application saw the stream");
    }
    Ok(())
}

/// Bytes behind their length of so many bytes.
fn sized<const WIDTH: usize>(bytes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(bytes.len()).unwrap().to_be_bytes();
    let mut all = length[4 - WIDTH..].to_vec();
    all.extend_from_slice(bytes);
    all
}

/// The ClientHello of a client that speaks TLS 1.2 and nothing newer, with one more extension.
fn tls_12_hello(name: &str, extension: &[u8]) -> Vec<u8> {
    let mut host = vec![0];
    host.extend_from_slice(&sized::<2>(name.as_bytes()));
    let mut extensions = vec![0, 0];
    extensions.extend_from_slice(&sized::<2>(&sized::<2>(&host)));
    // The groups X25519 and P-256, points as they are, signatures with P-256 or RSA-PSS.
    extensions.extend_from_slice(b"\x00\x0a\x00\x06\x00\x04\x00\x1d\x00\x17");
    extensions.extend_from_slice(b"\x00\x0b\x00\x02\x01\x00");
    extensions.extend_from_slice(b"\x00\x0d\x00\x06\x00\x04\x04\x03\x08\x04");
    extensions.extend_from_slice(extension);
    // TLS 1.2, a random value, no session, ECDHE_ECDSA with AES-GCM, no compression.
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.extend_from_slice(b"\x00\x00\x04\xc0\x2b\xc0\x2c\x01\x00");
    hello.extend_from_slice(&sized::<2>(&extensions));
    let mut handshake = vec![1];
    handshake.extend_from_slice(&sized::<3>(&hello));
    let mut record = vec![22, 3, 1];
    record.extend_from_slice(&sized::<2>(&handshake));
    record
}

fn a_caller_that_speaks_tls_12_is_refused() -> anyhow::Result<()> {
    const PROTOCOL_VERSION: [u8; 7] = [21, 3, 3, 0, 2, 2, 70];
    let mesh = Mesh::start()?;
    let name = LEDGER.parse::<SpiffeId>()?.server_name();
    // As those say it that know of newer ones, and as the older do.
    for extension in [b"\x00\x2b\x00\x03\x02\x03\x03".as_slice(), b"".as_slice()] {
        let mut caller = mesh.connect("outside", mesh.ledger(15_008))?;
        caller.write_all(&tls_12_hello(&name, extension))?;
        let mut answer = Vec::new();
        // A reset behind the alert takes nothing from it.
        drop(caller.read_to_end(&mut answer));
        ensure!(answer == PROTOCOL_VERSION, "got {answer:?}");
        let record = told_of(&mesh, caller.local_addr()?)?;
        ensure!(is(&record, "decision", "deny") && is(&record, "reason", "plaintext"), "{record}");
        let detail = record["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains("peer is incompatible"), "{record}");
    }
    Ok(())
}

fn a_caller_without_our_protocol_is_refused() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let forger = Forger::with_the_key_of(&mesh)?;
    let cases: [(&str, &[&[u8]], &str); 2] = [
        ("none", &[], "the peer speaks neither hauberk/1 nor hauberk/2"),
        ("another", &[b"h2".as_slice()], "peer doesn't support any known protocol"),
    ];
    for (name, protocols, wanted) in cases {
        // Everything else about it is in order.
        let leaf = Some(forger.leaf(CHECKOUT_ID, |_| {})?);
        let mut session = tls_stream_to(&mesh, leaf, LEDGER, mesh.ledger(15_008), protocols)?;
        let outcome = asked(&mut session, 1, listener.local_addr()?);
        ensure!(outcome.is_err(), "{name}: it was answered {outcome:?}");
        let record = told_of(&mesh, session.sock.local_addr()?).context(name)?;
        ensure!(
            is(&record, "decision", "deny") && is(&record, "reason", "plaintext"),
            "{name}: {record}"
        );
        let detail = record["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains(wanted), "{name}: {record}");
    }
    listener.set_nonblocking(true)?;
    ensure!(listener.accept().is_err(), "the application saw a stream");
    Ok(())
}
