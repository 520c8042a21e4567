//! Sessions between agents: used again without a handshake, decided anew for each stream, and given
//! up when nobody may or can use them any more, without a connection lost.

use std::{
    collections::BTreeSet,
    fs,
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::ipv4;
use hauberk_core::{
    identity::SpiffeId,
    policy::Reason,
    session::{
        ALPN, Event, Machine, Open, Reauthenticate, Refusal, RefusalCause, ResetCause, Role,
    },
};
use hauberk_tests::mesh::{CHECKOUT, LEDGER, Mesh, PATIENCE, is, ledger_policy};
use hauberk_tls::{
    Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot,
    channel::{CallerToken, Channel, Established, Handshake, Progress},
    mesh_client_config, with_caller_token,
};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::ServerName;
use serde_json::Value;

use crate::{
    identity::{Forger, tls_stream},
    policy::{WEB_RULE, expect_refused, is_cut, open, still_carries},
};

crate::trials!(
    the_next_connection_needs_no_handshake,
    a_second_stream_is_decided_like_the_first,
    sessions_of_two_identities_never_meet,
    a_policy_change_closes_idle_sessions,
    a_rotation_closes_idle_sessions,
    a_node_certificates_renewal_closes_no_session,
    a_failed_proof_is_a_bad_svid_whether_a_stream_is_open_or_not,
    proofs_without_end_are_cut_off,
    a_restarted_destination_costs_no_later_connection,
    a_frame_out_of_turn_ends_the_session,
    a_stream_that_is_opened_on_a_leaving_session_is_opened_again,
    a_client_that_resets_at_once_breaks_no_protocol,
    a_machine_that_vanishes_is_noticed,
);

/// The number of `machine-a` in the lab's networks.
const MACHINE_A: u8 = 2;

/// A server of the ledger that sends back what it gets. In threads of its own, so that a connection
/// that never comes fails the test instead of holding it up.
pub(crate) fn echoing(mesh: &Mesh, port: u16) -> anyhow::Result<SocketAddr> {
    let listener = mesh.listen("ledger", mesh.ledger(port))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count) = stream.read(&mut buffer) {
                    if count == 0 || stream.write_all(&buffer[..count]).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(address)
}

/// A connection whose first byte has come back.
pub(crate) fn echoed(mesh: &Mesh, from: &str, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut client = mesh.connect(from, to)?;
    client.write_all(b"x").context("the first byte")?;
    client.read_exact(&mut [0]).context("the echo of the first byte")?;
    Ok(client)
}

/// Ends a connection and waits for the other end's: its session is free for the next one then.
pub(crate) fn end(mut client: TcpStream) -> anyhow::Result<()> {
    client.shutdown(Shutdown::Write)?;
    let rest = client.read(&mut [0]).context("the end of the connection")?;
    ensure!(rest == 0, "bytes came that nobody sent");
    Ok(())
}

/// One connection, from its first byte to its last. Gives the client's address.
fn connection(mesh: &Mesh, from: &str, to: SocketAddr) -> anyhow::Result<SocketAddr> {
    let client = echoed(mesh, from, to)?;
    let address = client.local_addr()?;
    end(client)?;
    Ok(address)
}

/// Leaves an idle session behind that has carried so many connections at once.
pub(crate) fn warm(
    mesh: &Mesh,
    from: &str,
    to: SocketAddr,
    connections: u32,
) -> anyhow::Result<()> {
    at_once(mesh, from, to, connections)?;
    mesh.wait("the idle session", Duration::from_secs(2), |mesh| {
        let idle = idle_sessions(mesh)?;
        ensure!(idle >= 1.0, "{idle} sessions are idle");
        Ok(())
    })
}

fn at_once(mesh: &Mesh, from: &str, to: SocketAddr, connections: u32) -> anyhow::Result<()> {
    let clients: anyhow::Result<Vec<TcpStream>> =
        (0..connections).map(|_| echoed(mesh, from, to)).collect();
    clients?.into_iter().try_for_each(end)
}

/// What machine-a keeps for the next connection.
fn idle_sessions(mesh: &Mesh) -> anyhow::Result<f64> {
    mesh.metric("machine-a", "hauberk_idle_sessions", &[])
}

/// All of them are closed, long before they would be for their age.
fn idle_sessions_end(mesh: &Mesh) -> anyhow::Result<()> {
    mesh.wait("the end of the idle sessions", PATIENCE, |mesh| {
        let idle = idle_sessions(mesh)?;
        ensure!(idle == 0.0, "{idle} sessions are idle");
        Ok(())
    })
}

/// Connections of machine-a whose session was made for them (`new`) or idle before (`reused`).
fn streams(mesh: &Mesh, session: &str) -> anyhow::Result<f64> {
    let part = format!("session=\"{session}\"");
    mesh.metric("machine-a", "hauberk_streams_opened_total", &[&part])
}

/// Handshakes that machine-b was asked for, by their result.
fn handshakes(mesh: &Mesh, result: &str) -> anyhow::Result<f64> {
    let result = format!("result=\"{result}\"");
    let parts = ["side=\"destination\"", result.as_str()];
    mesh.metric("machine-b", "hauberk_handshake_duration_seconds_count", &parts)
}

/// Machine-b told of so many connections, and refused none. A session that is kept, given up, or
/// made in vain is nothing that anybody should be told of.
fn all_allowed(mesh: &Mesh, connections: usize) -> anyhow::Result<Vec<Value>> {
    let mut allowed = Vec::new();
    mesh.wait("the records", PATIENCE, |mesh| {
        let records = mesh.all_records("machine-b")?;
        if let Some(denied) = records.iter().find(|record| !is(record, "decision", "allow")) {
            bail!("somebody was refused: {denied}");
        }
        ensure!(records.len() >= connections, "{} of {connections} records", records.len());
        allowed = records;
        Ok(())
    })?;
    Ok(allowed)
}

fn serial(record: &Value) -> anyhow::Result<&str> {
    record["tls"]["peer_serial"].as_str().with_context(|| format!("no serial number: {record}"))
}

fn the_next_connection_needs_no_handshake() -> anyhow::Result<()> {
    const CONNECTIONS: usize = 20;
    let mesh = Mesh::start()?;
    let ledger = echoing(&mesh, 8080)?;
    let (made, failed) = (handshakes(&mesh, "success")?, handshakes(&mesh, "failure")?);
    let mut clients = BTreeSet::new();
    for _ in 0..CONNECTIONS {
        clients.insert(connection(&mesh, "checkout", ledger)?.to_string());
    }
    let idle = idle_sessions(&mesh)?;
    ensure!(idle == 1.0, "{idle} sessions are idle");
    let made = handshakes(&mesh, "success")? - made;
    ensure!(made == 1.0, "{made} handshakes for {CONNECTIONS} connections");
    let failed = handshakes(&mesh, "failure")? - failed;
    ensure!(failed == 0.0, "{failed} handshakes failed");
    let reused = streams(&mesh, "reused")?;
    ensure!(reused == 19.0, "{reused} of {CONNECTIONS} connections used a session again");
    // Nobody is taken for the one before it.
    let records = all_allowed(&mesh, CONNECTIONS)?;
    let texts = |value: fn(&Value) -> &Value| -> BTreeSet<String> {
        records.iter().filter_map(|record| value(record).as_str().map(str::to_owned)).collect()
    };
    let ids = texts(|record| &record["conn_id"]);
    ensure!(ids.len() == CONNECTIONS && records.len() == CONNECTIONS, "{} ids", ids.len());
    let seen = texts(|record| &record["src"]["addr"]);
    ensure!(seen == clients, "the ledger's agent saw {seen:?}, the clients are {clients:?}");
    for record in &records {
        ensure!(is(record, "close_reason", "complete") && record["bytes_sent"] == 1, "{record}");
    }
    Ok(())
}

/// An agent that we did not write, with a certificate of `checkout`: its TLS and its frames are in
/// order, but it says what it likes when it likes.
struct Caller {
    stream: StreamOwned<ClientConnection, TcpStream>,
    machine: Machine,
    /// What came and is not read yet.
    input: Vec<u8>,
}

/// What the ledger's agent says.
#[derive(Debug, PartialEq)]
enum Said {
    Accept,
    Refuse(Refusal),
    Data(Vec<u8>),
    Fin,
    Reset(ResetCause),
    SomethingElse,
}

fn wish(id: u8, to: SocketAddr) -> Open {
    Open {
        connection_id: [id; 16],
        trace_id: [0; 16],
        original_destination: to,
        // One of checkout's own, and another for each stream.
        source_address: SocketAddr::new(ipv4(CHECKOUT), 40_000 + u16::from(id)),
        // Each has no order but its own.
    }
}

/// What machine-b tells of the stream with this number.
fn told(mesh: &Mesh, id: u8) -> anyhow::Result<Value> {
    let id = format!("{id:02x}").repeat(16);
    mesh.record("machine-b", |record| is(record, "conn_id", &id))
}

impl Caller {
    fn connect(mesh: &Mesh) -> anyhow::Result<Self> {
        let leaf = Forger::with_the_key_of(mesh)?
            .leaf("spiffe://example.org/ns/shop/sa/checkout", |_| {})?;
        let stream = tls_stream(mesh, Some(leaf))?;
        Ok(Self { stream, machine: Machine::new(Role::Source), input: Vec::new() })
    }

    fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes)?;
        Ok(self.stream.flush()?)
    }

    /// Asks for a stream. Its first bytes do not wait for the answer.
    fn open(&mut self, id: u8, to: SocketAddr, early: &[u8]) -> anyhow::Result<()> {
        let mut frames = Vec::new();
        self.machine.open(&wish(id, to), &mut frames)?;
        frames.extend_from_slice(&self.machine.data(early.len())?);
        frames.extend_from_slice(early);
        self.send(&frames)
    }

    fn fin(&mut self) -> anyhow::Result<()> {
        let mut frame = Vec::new();
        self.machine.fin(&mut frame)?;
        self.send(&frame)
    }

    /// Ends its own direction of a stream that was refused.
    fn give_up(&mut self) -> anyhow::Result<()> {
        let mut frame = Vec::new();
        self.machine.reset(ResetCause::Answer, &mut frame);
        self.send(&frame)
    }

    fn hear(&mut self) -> anyhow::Result<Said> {
        loop {
            if self.input.is_empty() {
                let mut buffer = [0; 4096];
                let count = self.stream.read(&mut buffer)?;
                ensure!(count > 0, "the session was closed");
                self.input.extend_from_slice(&buffer[..count]);
            }
            let received = self.machine.receive(&self.input)?;
            let said = received.event.map(|event| match event {
                Event::Accept => Said::Accept,
                Event::Refuse(refusal) => Said::Refuse(refusal),
                Event::Data(bytes) => Said::Data(bytes.to_vec()),
                Event::Fin => Said::Fin,
                Event::Reset(cause) => Said::Reset(cause),
                Event::Open(_)
                | Event::Continue(_)
                | Event::Reauthenticate(_)
                | Event::GoingAway
                | Event::NotTaken => Said::SomethingElse,
            });
            let used = received.used;
            self.input.drain(..used);
            if let Some(said) = said {
                return Ok(said);
            }
        }
    }

    fn expects(&mut self, wanted: &Said) -> anyhow::Result<()> {
        let said = self.hear()?;
        ensure!(said == *wanted, "got {said:?}, wanted {wanted:?}");
        Ok(())
    }

    /// The other side ends the session, and soon.
    fn is_given_up(&mut self) -> anyhow::Result<()> {
        loop {
            // What it still says does not matter.
            let Err(error) = self.hear() else { continue };
            match error.downcast_ref::<std::io::Error>() {
                Some(late) if late.kind() == ErrorKind::WouldBlock => {
                    bail!("the session goes on");
                }
                Some(_) | None => return Ok(()),
            }
        }
    }

    /// A stream that is taken and ends well at both sides.
    fn whole_stream(&mut self, id: u8, listener: &TcpListener) -> anyhow::Result<()> {
        self.open(id, listener.local_addr()?, b"question")?;
        self.expects(&Said::Accept)?;
        let (mut server, _) = listener.accept()?;
        server.set_read_timeout(Some(PATIENCE))?;
        self.fin()?;
        let mut question = String::new();
        server.read_to_string(&mut question)?;
        ensure!(question == "question", "got {question:?}");
        server.write_all(b"!")?;
        drop(server);
        self.expects(&Said::Data(b"!".to_vec()))?;
        self.expects(&Said::Fin)?;
        ensure!(self.machine.is_reusable(), "the session is not free: {:?}", self.machine);
        Ok(())
    }
}

fn a_second_stream_is_decided_like_the_first() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    // Somebody listens there: only the decision keeps the stream out.
    let forbidden = mesh.listen("ledger", mesh.ledger(9999))?;
    forbidden.set_nonblocking(true)?;
    let mut caller = Caller::connect(&mesh)?;
    caller.whole_stream(1, &listener)?;
    caller.open(2, forbidden.local_addr()?, b"let me in")?;
    let said = caller.hear()?;
    let Said::Refuse(refusal) = &said else { bail!("it was not refused: {said:?}") };
    ensure!(refusal.cause == RefusalCause::Denied(Reason::NoMatchingRule), "{refusal:?}");
    ensure!(
        refusal.policy == "payments/ledger" && refusal.nearest_miss.contains("on other ports"),
        "{refusal:?}"
    );
    ensure!(forbidden.accept().is_err(), "the application saw a stream that was refused");
    caller.give_up()?;
    // A refusal costs the stream and not the session.
    caller.whole_stream(3, &listener)?;
    for id in [1, 3] {
        let record = told(&mesh, id)?;
        ensure!(
            is(&record, "decision", "allow") && is(&record, "close_reason", "complete"),
            "{record}"
        );
    }
    let record = told(&mesh, 2)?;
    ensure!(
        is(&record, "decision", "deny") && is(&record, "reason", "no_matching_rule"),
        "{record}"
    );
    ensure!(record["src"]["workload"] == "checkout", "{record}");
    ensure!(record["bytes_sent"] == 0 && record["bytes_received"] == 0, "{record}");
    Ok(())
}

fn sessions_of_two_identities_never_meet() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy(WEB_RULE))?;
    mesh.wait_revision(before)?;
    let ledger = echoing(&mesh, 8080)?;
    warm(&mesh, "checkout", ledger, 3)?;
    // The same machine, the same agent, the same destination, and sessions that wait for a stream.
    let new = streams(&mesh, "new")?;
    connection(&mesh, "web", ledger)?;
    let new = streams(&mesh, "new")? - new;
    ensure!(new == 1.0, "{new} sessions were made for web");
    let of = |machine: &str, workload: &str| {
        mesh.record(machine, |record| record["src"]["workload"] == workload)
    };
    let (here, there) = (of("machine-a", "web")?, of("machine-b", "web")?);
    ensure!(here["conn_id"] == there["conn_id"], "{here} {there}");
    ensure!(there["src"]["spiffe_id"] == "spiffe://example.org/ns/shop/sa/web", "{there}");
    ensure!(here["tls"]["local_serial"] == there["tls"]["peer_serial"], "{here} {there}");
    let checkout = of("machine-b", "checkout")?;
    ensure!(serial(&there)? != serial(&checkout)?, "{there} {checkout}");
    Ok(())
}

fn a_policy_change_closes_idle_sessions() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let before = mesh.wait_revision(0)?;
    let ledger = echoing(&mesh, 8080)?;
    warm(&mesh, "checkout", ledger, 3)?;
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("8080", "8081"))?;
    idle_sessions_end(&mesh)?;
    mesh.wait_revision(before)?;
    expect_refused(mesh.connect("checkout", ledger))?;
    let record = mesh.record("machine-a", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "no_matching_rule"), "{record}");
    // Nor did machine-b take their end for an attempt of anybody.
    all_allowed(&mesh, 3).map(drop)
}

fn a_rotation_closes_idle_sessions() -> anyhow::Result<()> {
    // As long as three or more certificates of a workload are in use.
    const LONG: Duration = Duration::from_secs(15);
    let mesh = Mesh::start_with(&["--workload-certificate-lifetime", "10s"])?;
    let ledger = echoing(&mesh, 8080)?;
    // A renewal may come right in between: then once more.
    mesh.wait("idle sessions", PATIENCE, |mesh| warm(mesh, "checkout", ledger, 3))?;
    idle_sessions_end(&mesh)?;
    let (new, reused) = (streams(&mesh, "new")?, streams(&mesh, "reused")?);
    let started = Instant::now();
    let mut connections = 0;
    while started.elapsed() < LONG {
        connection(&mesh, "checkout", ledger).with_context(|| {
            format!("connection {connections}, after {:?}\n{}", started.elapsed(), mesh.logs())
        })?;
        connections += 1;
        thread::sleep(Duration::from_millis(200));
    }
    let (new, reused) = (streams(&mesh, "new")? - new, streams(&mesh, "reused")? - reused);
    // Otherwise this is no test of sessions that are used again.
    ensure!(reused > new, "{reused} of {connections} connections used a session again");
    let records = all_allowed(&mesh, 3 + connections)?;
    let first = records.first().context("no record")?;
    let last = records.last().context("no record")?;
    ensure!(serial(first)? != serial(last)?, "a session outlived its certificate: {first} {last}");
    Ok(())
}

/// How often each agent has kept another node certificate, as seen by looking all the time.
struct NodeRenewals {
    kept: [Vec<u8>; 2],
    seen: [usize; 2],
}

impl NodeRenewals {
    fn read(mesh: &Mesh) -> anyhow::Result<[Vec<u8>; 2]> {
        let of = |machine: &str| fs::read(mesh.folder().join(machine).join("node.json"));
        Ok([of("machine-a")?, of("machine-b")?])
    }

    fn begin(mesh: &Mesh) -> anyhow::Result<Self> {
        Ok(Self { kept: Self::read(mesh)?, seen: [0; 2] })
    }

    /// The fewest of any agent.
    fn look(&mut self, mesh: &Mesh) -> anyhow::Result<usize> {
        let now = Self::read(mesh)?;
        for ((kept, now), seen) in self.kept.iter_mut().zip(now).zip(&mut self.seen) {
            if *kept != now {
                *kept = now;
                *seen += 1;
            }
        }
        Ok(self.seen[0].min(self.seen[1]))
    }
}

fn a_node_certificates_renewal_closes_no_session() -> anyhow::Result<()> {
    const RENEWALS: usize = 10;
    const LONG: Duration = Duration::from_secs(150);
    // Of the node only: a workload's renewal does close its idle sessions.
    let mesh = Mesh::start_with(&["--node-certificate-lifetime", "10s"])?;
    let ledger = echoing(&mesh, 8080)?;
    warm(&mesh, "checkout", ledger, 3)?;
    let (new, made) = (streams(&mesh, "new")?, handshakes(&mesh, "success")?);
    let mut renewals = NodeRenewals::begin(&mesh)?;
    let started = Instant::now();
    while renewals.look(&mesh)? < RENEWALS {
        ensure!(started.elapsed() < LONG, "{:?} renewals\n{}", renewals.seen, mesh.logs());
        // All at once, so that none of the sessions grows old; and not more often than needed.
        at_once(&mesh, "checkout", ledger, 3)?;
        thread::sleep(Duration::from_millis(200));
    }
    let (new, made) = (streams(&mesh, "new")? - new, handshakes(&mesh, "success")? - made);
    ensure!(new == 0.0, "{new} connections needed a session of their own");
    ensure!(made == 0.0, "{made} handshakes in {RENEWALS} renewals");
    Ok(())
}

fn a_failed_proof_is_a_bad_svid_whether_a_stream_is_open_or_not() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let false_proof = Reauthenticate {
        sequence: 1,
        // ecdsa_secp256r1_sha256
        scheme: 0x0403,
        signature: vec![0; 70],
        chain: vec![b"no certificate".to_vec()],
    };
    // On an idle session.
    let mut caller = Caller::connect(&mesh)?;
    caller.whole_stream(1, &listener)?;
    let mut frame = Vec::new();
    caller.machine.reauthenticate(&false_proof, &mut frame);
    caller.send(&frame)?;
    caller.is_given_up()?;
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "bad_svid"), "{record}");
    ensure!(
        is(&record["src"], "spiffe_id", "spiffe://example.org/ns/shop/sa/checkout"),
        "{record}"
    );
    // And while a stream is open.
    let mut caller = Caller::connect(&mesh)?;
    caller.open(2, listener.local_addr()?, b"a")?;
    caller.expects(&Said::Accept)?;
    caller.send(&frame)?;
    caller.is_given_up()?;
    let record = told(&mesh, 2)?;
    ensure!(is(&record, "close_reason", "bad_svid"), "{record}");
    Ok(())
}

/// Somebody with a certificate of checkout, who makes sessions with the ledger from outside, step by step.
pub(crate) struct RawCaller {
    config: Arc<ClientConfig>,
    trust: TrustBundle,
    credential: Credential,
    name: ServerName<'static>,
}

/// A handshake that has begun: the hello is out.
pub(crate) struct RawHandshake {
    stream: TcpStream,
    handshake: Handshake,
}

impl RawCaller {
    pub(crate) fn new(mesh: &Mesh) -> anyhow::Result<Self> {
        let forger = Forger::with_the_key_of(mesh)?;
        let leaf = forger.leaf("spiffe://example.org/ns/shop/sa/checkout", |_| {})?;
        let (chain, key) = leaf.chain_and_key();
        let credential = Credential::new(chain, &PrivateKey::from_pkcs8(key), hauberk_tls::now())?;
        let id: SpiffeId = "spiffe://example.org/ns/payments/sa/ledger".parse()?;
        let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
        let domain = id.trust_domain().clone();
        let trust = TrustBundle::new(domain, vec![root.into()], hauberk_tls::now())?;
        let slot = CredentialSlot::new("spiffe://example.org/ns/shop/sa/checkout".parse()?);
        ensure!(slot.store(credential.clone()).is_ok(), "the certificate is not checkout's");
        let config = mesh_client_config(slot, TrustSlot::new(trust.clone()), &[ALPN])?;
        let name = ServerName::try_from(id.server_name())?;
        Ok(Self { config: Arc::new(config), trust, credential, name })
    }

    pub(crate) fn begin(
        &self,
        mesh: &Mesh,
        token: Option<CallerToken>,
    ) -> anyhow::Result<RawHandshake> {
        let config = match token {
            Some(token) => with_caller_token(&self.config, token),
            None => self.config.clone(),
        };
        let mut handshake = Handshake::client(config, self.name.clone())?;
        let mut stream = mesh.connect("outside", mesh.ledger(15_008))?;
        let mut out = Vec::new();
        handshake.advance(&[], &mut out)?;
        stream.write_all(&out)?;
        Ok(RawHandshake { stream, handshake })
    }
}

impl RawHandshake {
    pub(crate) fn finish(self, caller: &RawCaller) -> anyhow::Result<(TcpStream, Established)> {
        let Self { mut stream, mut handshake } = self;
        let (mut buffer, mut out) = ([0; 4096], Vec::new());
        loop {
            let count = stream.read(&mut buffer)?;
            ensure!(count > 0, "the handshake was not answered");
            if handshake.advance(&buffer[..count], &mut out)? == Progress::Done {
                break;
            }
        }
        stream.write_all(&out)?;
        Ok((stream, handshake.finish(&caller.trust, hauberk_tls::now())?))
    }
}

/// An agent that we did not write, which has nothing to say but that it is who it is.
struct Prover {
    stream: TcpStream,
    channel: Channel,
    binding: [u8; 32],
    credential: Credential,
}

impl Prover {
    fn connect(mesh: &Mesh) -> anyhow::Result<Self> {
        let caller = RawCaller::new(mesh)?;
        let (stream, established) = caller.begin(mesh, None)?.finish(&caller)?;
        let (channel, binding) = (established.channel, established.binding);
        Ok(Self { stream, channel, binding, credential: caller.credential })
    }

    fn prove(&mut self, sequence: u32) -> anyhow::Result<()> {
        let proof = hauberk_tls::prove(&self.credential, &self.binding, true, sequence)?;
        let (mut frame, mut record) = (Vec::new(), Vec::new());
        Machine::new(Role::Source).reauthenticate(&proof, &mut frame);
        self.channel.seal(&frame, &mut record)?;
        Ok(self.stream.write_all(&record)?)
    }
}

fn proofs_without_end_are_cut_off() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let mut prover = Prover::connect(&mesh)?;
    // Each of them is good.
    let cut = (1..=1_000).find(|sequence| prover.prove(*sequence).is_err());
    let end = prover.stream.read(&mut [0; 512]);
    ensure!(cut.is_some() || !matches!(end, Ok(count) if count > 0), "they were all taken");
    let record = mesh.record("machine-b", |record| is(record, "decision", "deny"))?;
    ensure!(is(&record, "reason", "rate_limited"), "{record}");
    ensure!(
        is(&record["src"], "spiffe_id", "spiffe://example.org/ns/shop/sa/checkout"),
        "{record}"
    );
    Ok(())
}

/// The agent that was started has taken up its workloads. What the control plane says of them may
/// still be from before the restart.
fn is_back(mesh: &Mesh, machine: &str) -> anyhow::Result<()> {
    mesh.wait("the agent", PATIENCE, |mesh| {
        let captured = mesh.metric(machine, "hauberk_workloads", &["state=\"enrolled\""])?;
        ensure!(captured >= 1.0, "{machine} captures nothing");
        Ok(())
    })
}

fn a_restarted_destination_costs_no_later_connection() -> anyhow::Result<()> {
    type Ends = fn(&mut Mesh);
    let mut mesh = Mesh::start()?;
    let ledger = echoing(&mesh, 8080)?;
    // One says goodbye and the other does not.
    let ways: [(&str, u32, Ends); 2] = [
        ("stopped", 8, |mesh| mesh.stop("machine-b")),
        ("killed", 200, |mesh| mesh.kill("machine-b")),
    ];
    for (how, sessions, ends) in ways {
        warm(&mesh, "checkout", ledger, sessions)?;
        ends(&mut mesh);
        mesh.start_agent("machine-b", &[])?;
        // Not for longer than it takes: meanwhile the dead sessions are swept out.
        is_back(&mesh, "machine-b")?;
        for number in 0..30 {
            connection(&mesh, "checkout", ledger).with_context(|| {
                format!("connection {number} after it was {how}\n{}", mesh.logs())
            })?;
        }
        mesh.wait_ready()?;
    }
    Ok(())
}

fn a_frame_out_of_turn_ends_the_session() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let target = listener.local_addr()?;
    // As the first one of another session would be.
    let mut second_open = Vec::new();
    Machine::new(Role::Source).open(&wish(0x70, target), &mut second_open)?;
    let cases = [
        ("a second Open", second_open, "Open frame out of turn"),
        ("an unknown type", vec![0x63, 0, 0, 1, 0], "unknown frame type 99"),
        ("Data without data", vec![4, 0, 0, 0], "Data frame of 0 bytes, at least 1"),
    ];
    for (id, (name, frame, wanted)) in (0x71..).zip(cases) {
        let mut caller = Caller::connect(&mesh)?;
        caller.open(id, target, b"a")?;
        caller.expects(&Said::Accept)?;
        let (mut server, _) = listener.accept()?;
        server.set_read_timeout(Some(PATIENCE))?;
        server.read_exact(&mut [0])?;
        caller.send(&frame)?;
        is_cut(&mut server).context(name)?;
        caller.is_given_up().context(name)?;
        let record = told(&mesh, id)?;
        ensure!(is(&record, "close_reason", "protocol_error"), "{name}: {record}");
        let detail = record["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains(wanted), "{name}: {record}");
    }
    // Nobody else minds.
    still_carries(&mut open(&mesh, &listener, "checkout")?)
}

/// The ledger's agent has ended its side of a session, and the other machine has not heard of it:
/// what it said last is still on its way.
fn is_leaving_unheard(mesh: &Mesh) -> anyhow::Result<()> {
    let read = || fs::read_to_string("/proc/thread-self/net/tcp");
    let sockets = mesh.namespace("ledger")?.run(read)??;
    let leaving = sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next(), fields.nth(1));
        // The agents' port 15008, and FIN_WAIT1.
        local.is_some_and(|local| local.ends_with(":3AA0")) && state == Some("04")
    });
    ensure!(leaving, "no session is being left:\n{sockets}");
    Ok(())
}

fn a_stream_that_is_opened_on_a_leaving_session_is_opened_again() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let first = echoing(&mesh, 8080)?;
    let second = echoing(&mesh, 5432)?;
    warm(&mesh, "checkout", first, 1)?;
    let sessions = || Ok::<_, anyhow::Error>(streams(&mesh, "new")? + streams(&mesh, "reused")?);
    let before = sessions()?;
    // Machine-b leaves the session, whose last stream would no longer be allowed. Machine-a hears
    // neither of that policy nor, while the wire is cut, of the leaving.
    mesh.cut(&[MACHINE_A, LEDGER])?;
    mesh.write_manifest("ledger.yaml", &ledger_policy("").replace("8080", "8081"))?;
    mesh.wait("the leaving", PATIENCE, is_leaving_unheard)?;
    // So this one, which both allow, goes out on that very session. Machine-b's agent gives up being heard only
    // after two seconds.
    let reused = streams(&mesh, "reused")?;
    let mut client = thread::scope(|scope| {
        let client = scope.spawn(|| mesh.connect("checkout", second));
        mesh.wait("the stream", PATIENCE, |mesh| {
            ensure!(streams(mesh, "reused")? > reused, "it is not opened");
            Ok(())
        })?;
        mesh.mend(&[LEDGER])?;
        client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    client.write_all(b"once")?;
    client.shutdown(Shutdown::Write)?;
    let mut back = String::new();
    client.read_to_string(&mut back).with_context(|| mesh.logs())?;
    ensure!(back == "once", "got {back:?}");
    let tried = sessions()? - before;
    ensure!(tried == 2.0, "it went out on {tried} sessions, not on the old one and then another");
    // It is one connection to everybody.
    let to_second =
        |record: &Value| record["original_dst"].as_str() == Some(second.to_string().as_str());
    for machine in ["machine-a", "machine-b"] {
        let record = mesh.record(machine, to_second)?;
        ensure!(
            is(&record, "decision", "allow") && is(&record, "close_reason", "complete"),
            "{record}"
        );
        ensure!(record["bytes_sent"] == 4 && record["bytes_received"] == 4, "{record}");
        let records = mesh.all_records(machine)?.into_iter().filter(to_second).count();
        ensure!(records == 1, "{machine} tells of it {records} times");
    }
    Ok(())
}

fn a_client_that_resets_at_once_breaks_no_protocol() -> anyhow::Result<()> {
    // As checks of health do. The reset may come before, while or after the stream is opened.
    const CLIENTS: usize = 20;
    let mesh = Mesh::start()?;
    let ledger = echoing(&mesh, 8080)?;
    for _ in 0..CLIENTS {
        let client = mesh.connect("checkout", ledger)?;
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        drop(client);
    }
    // Each is over at machine-a when it tells of it.
    mesh.wait("the records", PATIENCE, |mesh| {
        let records = mesh.all_records("machine-a")?.len();
        ensure!(records == CLIENTS, "{records} of {CLIENTS} records");
        Ok(())
    })?;
    connection(&mesh, "checkout", ledger)?;
    // Whatever reached machine-b was allowed, and in turn.
    let records = all_allowed(&mesh, 1)?;
    let broken = records.iter().find(|record| is(record, "close_reason", "protocol_error"));
    ensure!(broken.is_none(), "the agents do not understand each other: {broken:?}");
    let failed = handshakes(&mesh, "failure")?;
    ensure!(failed == 0.0, "{failed} handshakes failed");
    Ok(())
}

fn a_machine_that_vanishes_is_noticed() -> anyhow::Result<()> {
    // Two looks of the agent, and some. The kernel would try for a quarter of an hour.
    const BOUND: Duration = Duration::from_secs(90);
    let mesh = Mesh::start()?;
    let ledger = echoing(&mesh, 8080)?;
    let mut client = echoed(&mesh, "checkout", ledger)?;
    mesh.cut(&[LEDGER])?;
    let cut = Instant::now();
    client.set_read_timeout(Some(Duration::from_millis(200)))?;
    let error = loop {
        ensure!(cut.elapsed() < BOUND, "the client was left hanging\n{}", mesh.logs());
        match client.write_all(b"x").and_then(|()| client.read(&mut [0])) {
            Ok(count) => bail!("the client got {count} bytes of a machine that is gone"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => break error,
        }
    };
    ensure!(error.kind() == ErrorKind::ConnectionReset, "got {error}");
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "session_failed"))?;
    ensure!(is(&record, "decision", "allow"), "{record}");
    mesh.mend(&[LEDGER])?;
    mesh.wait("the network", PATIENCE, |mesh| connection(mesh, "checkout", ledger).map(drop))
}
