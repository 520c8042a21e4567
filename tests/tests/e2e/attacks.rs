//! What attackers try on the network, and that it fails for the right reason.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::{ipv4, ipv6};
use hauberk_core::session::{FrameType, HEADER_LENGTH, Header, Open};
use hauberk_linux::packets::{CaptureOptions, PacketCapture};
use hauberk_tests::mesh::{CHECKOUT, LEDGER, Mesh, PATIENCE, is, ledger_policy};

use crate::{
    identity::{Forger, client_hello, tls_attempt, tls_stream},
    policy::{is_cut, open, still_carries},
};

crate::trials!(
    plaintext_to_a_protected_port_is_refused_and_counted,
    plaintext_from_the_same_machine_is_refused_and_counted,
    the_listeners_of_the_agent_cannot_be_dialled_around,
    the_wire_shows_tls_13_and_no_byte_of_the_payload,
    a_peer_without_certificate_is_refused,
    a_certificate_of_a_foreign_root_is_refused,
    expired_and_malformed_certificates_are_refused_each_with_its_reason,
    silent_and_slow_peers_delay_nobody,
    ten_thousand_half_open_peers_cost_bounded_memory,
    a_peer_that_never_reads_costs_bounded_memory_and_leaves_nothing,
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

/// The record and the count of a connection in clear, of which this machine refused so many before.
fn refused_in_clear(
    mesh: &Mesh,
    machine: &str,
    target: SocketAddr,
    before: usize,
) -> anyhow::Result<()> {
    let record = mesh.record(machine, |record| {
        is(record, "reason", "plaintext")
            && record["original_dst"].as_str() == Some(&target.to_string())
    })?;
    ensure!(is(&record, "decision", "deny") && is(&record, "side", "destination"), "{record}");
    let counted =
        mesh.metric(machine, "hauberk_connections_denied_total", &["reason=\"plaintext\""])?;
    ensure!((counted - (before as f64 + 1.0)).abs() < f64::EPSILON, "counted {counted}");
    Ok(())
}

fn plaintext_to_a_protected_port_is_refused_and_counted() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for (count, address) in [ipv4(LEDGER), ipv6(LEDGER)].into_iter().enumerate() {
        let target = SocketAddr::new(address, 8080);
        let listener = mesh.listen("ledger", target)?;
        no_answer(mesh.connect("outside", target))?;
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "the application saw the intruder");
        refused_in_clear(&mesh, "machine-b", target, count)?;
    }
    Ok(())
}

/// From where the agent of the very same machine runs: that is no workload.
fn plaintext_from_the_same_machine_is_refused_and_counted() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    for (count, address) in [ipv4(CHECKOUT), ipv6(CHECKOUT)].into_iter().enumerate() {
        let target = SocketAddr::new(address, 8080);
        let listener = mesh.listen("checkout", target)?;
        no_answer(mesh.connect("machine-a", target))?;
        listener.set_nonblocking(true)?;
        ensure!(listener.accept().is_err(), "the application saw the intruder");
        refused_in_clear(&mesh, "machine-a", target, count)?;
    }
    Ok(())
}

/// Where the agent listens in a namespace.
fn agent_listeners(mesh: &Mesh, namespace: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let sockets = mesh.namespace(namespace)?.run(hauberk_linux::sockets::tcp_listeners)??;
    Ok(sockets.into_iter().filter(|socket| socket.is_agents()).map(|socket| socket.local).collect())
}

fn the_listeners_of_the_agent_cannot_be_dialled_around() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    listener.set_nonblocking(true)?;
    // A listener's port, and one that is nobody's.
    let ports = [agent_listeners(&mesh, "ledger")?.first().context("no listener")?.port(), 15_006];
    for (count, port) in ports.into_iter().enumerate() {
        let target = mesh.ledger(port);
        no_answer(mesh.connect("outside", target)).with_context(|| format!("port {port}"))?;
        // They lead nowhere but to the refusal of what comes in clear.
        refused_in_clear(&mesh, "machine-b", target, count)?;
    }
    // From inside, straight to the agent's own listeners: only the one for what the workload sends tells of it.
    for inside in agent_listeners(&mesh, "web")?.into_iter().filter(SocketAddr::is_ipv4) {
        no_answer(mesh.connect("web", inside))?;
    }
    ensure!(listener.accept().is_err(), "somebody came through");
    let record = mesh.record("machine-a", |record| record["src"]["workload"] == "web")?;
    ensure!(
        is(&record, "decision", "deny") && is(&record, "reason", "unknown_destination"),
        "{record}"
    );
    let counted = mesh.metric(
        "machine-a",
        "hauberk_connections_denied_total",
        &["reason=\"unknown_destination\"", "src_workload=\"web\""],
    )?;
    ensure!((counted - 1.0).abs() < f64::EPSILON, "counted {counted}");
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
    thread::sleep(Duration::from_millis(300));
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
        mesh.wait("the denial", PATIENCE, |mesh| {
            let text = std::fs::read_to_string(mesh.records("machine-b"))?;
            let last: serde_json::Value =
                serde_json::from_str(text.lines().nth(number).context("no record yet")?)?;
            ensure!(is(&last, "reason", reason), "{name}: wanted {reason}, got {last}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Connections from outside to the ledger's agent whose handshakes never end. Their namespace is
/// entered once for all of them.
fn half_open(mesh: &Mesh, count: u32) -> anyhow::Result<Vec<TcpStream>> {
    let agent = mesh.ledger(15_008);
    let peers = mesh.namespace("outside")?.run(|| -> std::io::Result<Vec<TcpStream>> {
        (0..count)
            .map(|number| {
                let mut peer = TcpStream::connect_timeout(&agent, PATIENCE)?;
                if number % 2 == 0 {
                    // The start of a ClientHello, and never the rest. The agent may have refused it
                    // already.
                    drop(peer.write_all(&[0x16, 0x03, 0x01, 0x02]));
                }
                Ok(peer)
            })
            .collect()
    })??;
    Ok(peers)
}

/// Sends the first words of a caller with everything in order, a byte at a time, until the other side
/// has had enough. How long that took. Says so when it has begun.
fn drip(mut peer: TcpStream, begun: &mpsc::Sender<()>) -> anyhow::Result<Duration> {
    const PACE: Duration = Duration::from_millis(100);
    const BOUND: Duration = Duration::from_secs(30);
    peer.set_nodelay(true)?;
    peer.set_read_timeout(Some(PACE))?;
    let started = Instant::now();
    for (number, byte) in client_hello()?.into_iter().enumerate() {
        if number == 3 {
            begun.send(())?;
        }
        ensure!(started.elapsed() < BOUND, "{number} bytes were read, and no end");
        if peer.write_all(&[byte]).is_err() {
            return Ok(started.elapsed());
        }
        match peer.read(&mut [0]) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) | Ok(0) => return Ok(started.elapsed()),
            Ok(_) => bail!("it was answered"),
        }
    }
    bail!("all of it was read")
}

fn silent_and_slow_peers_delay_nobody() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // Slow, but never silent. Before the others, so that it waits for no turn.
    let slow = mesh.connect("outside", mesh.ledger(15_008))?;
    let of_slow = slow.local_addr()?.to_string();
    let (begins, begun) = mpsc::channel();
    let slow = thread::spawn(move || drip(slow, &begins));
    begun.recv_timeout(PATIENCE)?;
    // More than one address may shake hands at once, and more than fit into a usual limit of files.
    let mut silent = half_open(&mesh, 1_500)?;
    let started = Instant::now();
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
    // A byte now and then buys no time.
    let took = slow.join().unwrap()?;
    let limit = Duration::from_secs(8)..Duration::from_secs(20);
    ensure!(limit.contains(&took), "a slow handshake was given up after {took:?}");
    let record = mesh
        .record("machine-b", |record| record["src"]["addr"].as_str() == Some(&of_slow))
        .context("the slow one")?;
    ensure!(is(&record, "decision", "deny") && is(&record, "reason", "no_client_cert"), "{record}");
    ensure!(is(&record, "detail", "the peer did not answer in time"), "{record}");
    Ok(())
}

/// What an agent holds at a time.
struct Held {
    machine: &'static str,
    files: usize,
    resident: u64,
}

impl Held {
    /// Files that come and go by themselves: a scrape, a look at the rules.
    const FILES: usize = 16;

    fn now(mesh: &Mesh, machine: &'static str) -> anyhow::Result<Self> {
        let (files, resident) = (mesh.open_files(machine)?, mesh.resident_bytes(machine)?);
        Ok(Self { machine, files, resident })
    }

    /// The connections that came since take less memory than this.
    fn memory_is_bounded(&self, mesh: &Mesh, limit: u64, connections: u32) -> anyhow::Result<()> {
        let grown = mesh.resident_bytes(self.machine)?.saturating_sub(self.resident);
        ensure!(
            grown < limit,
            "the agent of {} grew by {} MiB, {} bytes for each of {connections} connections",
            self.machine,
            grown >> 20,
            grown / u64::from(connections)
        );
        Ok(())
    }

    /// Waits until the files of all that came since are closed, but for so many sessions that are kept
    /// for the next connection.
    fn files_are_closed(&self, mesh: &Mesh, sessions: usize) -> anyhow::Result<()> {
        mesh.wait("the end of the last connection", Duration::from_secs(30), |mesh| {
            let (machine, before) = (self.machine, self.files);
            let files = mesh.open_files(machine)?;
            let most = before + Self::FILES + sessions;
            ensure!(files <= most, "{machine} has {files} files, {before} before");
            Ok(())
        })
    }
}

fn ten_thousand_half_open_peers_cost_bounded_memory() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit};
    const PEERS: u32 = 10_000;
    let (_, files) = getrlimit(Resource::RLIMIT_NOFILE)?;
    ensure!(
        files >= 12_000,
        "this test needs 12000 open files, the hard limit is {files}: raise it (ulimit -Hn)"
    );
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (mut client, mut server) = open(&mesh, &listener, "checkout")?;
    let before = Held::now(&mesh, "machine-b")?;
    let peers = half_open(&mesh, PEERS)?;
    mesh.wait("the agent to have seen all of them", Duration::from_secs(30), |mesh| {
        let held = u32::try_from(mesh.open_files("machine-b")?.saturating_sub(before.files))?;
        let denied = mesh.metric("machine-b", "hauberk_connections_denied_total", &[])?;
        // But for a few that are between the two.
        let all = f64::from(PEERS) - 16.0;
        ensure!(f64::from(held) + denied >= all, "{held} are held, {denied} were denied");
        Ok(())
    })?;
    before.memory_is_bounded(&mesh, 160 << 20, PEERS)?;

    // Those over what one address may have are refused, and others are served as before.
    let refused =
        mesh.metric("machine-b", "hauberk_connections_denied_total", &["reason=\"rate_limited\""])?;
    ensure!(refused > 0.0, "all of them wait");
    let record = mesh.record("machine-b", |record| is(record, "reason", "rate_limited"))?;
    ensure!(is(&record, "decision", "deny"), "{record}");
    let started = Instant::now();
    still_carries(&mut open(&mesh, &listener, "checkout")?)?;
    ensure!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());

    let changed = Instant::now();
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("8080", "8081"))?;
    for end in [&mut client, &mut server] {
        is_cut(end)?;
    }
    ensure!(changed.elapsed() < Duration::from_secs(5), "cut after {:?}", changed.elapsed());
    let record = mesh.record("machine-b", |record| is(record, "close_reason", "policy_revoked"))?;
    ensure!(is(&record, "reason", "policy_revoked"), "{record}");

    drop(peers);
    before.files_are_closed(&mesh, 0)
}

/// Sends until nothing has gone for a second: every buffer on the way is full.
fn fill(mut stream: &TcpStream) -> anyhow::Result<()> {
    // More than all sockets on the way may hold.
    const ENDLESS: usize = 128 << 20;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    let block = vec![0x5a; 64 * 1024];
    let mut sent = 0;
    while sent < ENDLESS {
        match stream.write(&block) {
            Ok(count) => sent += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("after {sent} bytes")),
        }
    }
    bail!("{sent} bytes went to a peer that reads none")
}

/// Far more than the buffers of the agents, far less than what is sent.
const UNREAD: u64 = 64 << 20;

fn a_peer_that_never_reads_costs_bounded_memory_and_leaves_nothing() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    applications_that_never_read(&mesh, &listener).context("applications")?;
    an_agent_that_never_reads(&mesh, &listener).context("an agent")
}

fn applications_that_never_read(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<()> {
    const AT_ONCE: u32 = 32;
    let agents = [Held::now(mesh, "machine-a")?, Held::now(mesh, "machine-b")?];
    let mut connections = Vec::new();
    for _ in 0..AT_ONCE {
        connections.push(open(mesh, listener, "checkout")?);
    }
    thread::scope(|scope| {
        let all = connections.iter().map(|(_, server)| scope.spawn(move || fill(server)));
        let all: Vec<_> = all.collect();
        all.into_iter().try_for_each(|one| one.join().unwrap())
    })?;
    for agent in &agents {
        agent.memory_is_bounded(mesh, UNREAD, AT_ONCE)?;
    }
    still_carries(&mut open(mesh, listener, "checkout")?)?;
    drop(connections);
    for agent in &agents {
        // Each connection had two files at each agent: its session and its application.
        agent.files_are_closed(mesh, usize::try_from(AT_ONCE)? + 1)?;
        mesh.wait("the count to go back", PATIENCE, |mesh| {
            let count = mesh.metric(agent.machine, "hauberk_open_connections", &[])?;
            ensure!(count.abs() < f64::EPSILON, "{} counts {count} open ones", agent.machine);
            Ok(())
        })?;
    }
    Ok(())
}

fn an_agent_that_never_reads(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<()> {
    let before = Held::now(mesh, "machine-b")?;
    // Everything about it is in order, but that it is not the agent that we wrote.
    let leaf =
        Forger::with_the_key_of(mesh)?.leaf("spiffe://example.org/ns/shop/sa/checkout", |_| {})?;
    let mut hostile = tls_stream(mesh, Some(leaf))?;
    let wish = Open {
        trace_id: [0; 16],
        connection_id: [7; 16],
        original_destination: listener.local_addr()?,
        source_address: SocketAddr::new(ipv4(CHECKOUT), 40_000),
    }
    .encode();
    hostile.write_all(&Header::encode(FrameType::Open, wish.len())?)?;
    hostile.write_all(&wish)?;
    let mut answer = [0; HEADER_LENGTH];
    hostile.read_exact(&mut answer)?;
    ensure!(Header::decode(answer)?.frame_type == FrameType::Accept, "got {answer:?}");
    let (mut server, _) = listener.accept()?;
    fill(&server)?;
    before.memory_is_bounded(mesh, UNREAD, 1)?;
    // It vanishes without a word, and the application is told so.
    socket2::SockRef::from(&hostile.sock).set_linger(Some(Duration::ZERO))?;
    drop(hostile);
    server.set_read_timeout(Some(PATIENCE))?;
    is_cut(&mut server)?;
    before.files_are_closed(mesh, 0)?;
    let record = mesh.record("machine-b", |record| is(record, "conn_id", &"07".repeat(16)))?;
    ensure!(
        is(&record, "decision", "allow") && is(&record, "close_reason", "session_failed"),
        "{record}"
    );
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
    let stream = mesh.namespace("web")?.run(move || -> std::io::Result<TcpStream> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(ipv4(12), 0).into())?;
        socket.connect(&target.into())?;
        Ok(socket.into())
    })?;
    if let Ok(mut stream) = stream {
        stream.set_read_timeout(Some(PATIENCE))?;
        ensure!(!matches!(stream.read(&mut [0]), Ok(count) if count > 0), "it got bytes");
    }
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(record["src"]["workload"] == "web", "{record}");
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    let counted = mesh.metric(
        "machine-a",
        "hauberk_connections_denied_total",
        &["reason=\"no_matching_rule\"", "src_workload=\"web\"", "dst_workload=\"ledger\""],
    )?;
    ensure!((counted - 1.0).abs() < f64::EPSILON, "counted {counted}");
    ensure!(listener.accept().is_err(), "it came through");
    Ok(())
}
