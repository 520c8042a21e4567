//! Many streams on one session, and those that move out of it because they have much to say.

use std::{
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
    session::{
        ALPN, ALPN_MULTIPLEXED, Continue, Event, INITIAL_CREDIT, Machine, Multiplex, OfStream,
        Open, Refusal, RefusalCause, ResetCause, Role,
    },
};
use hauberk_tests::mesh::{CHECKOUT, Mesh, PATIENCE, is};
use hauberk_tls::{
    Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot,
    channel::{Channel, Handshake, Opened, Progress},
    mesh_client_config,
};
use rustls_pki_types::ServerName;

use crate::{
    identity::Forger,
    policy::{expect_refused, is_cut},
    sessions::{echoed, echoing, end},
};

crate::trials!(
    connections_at_once_share_a_session,
    a_stream_with_much_to_say_moves_and_a_small_one_does_not,
    a_stream_moves_that_is_half_closed,
    an_answer_with_much_to_say_moves,
    an_application_that_does_not_read_holds_up_nobody_else,
    many_streams_at_once_arrive_unchanged,
    a_destination_carries_on_with_nobody_elses_stream,
    a_session_that_sends_more_than_is_taken_is_given_up,
    streams_of_one_session_are_decided_each_by_itself,
    a_stream_that_was_not_answered_is_opened_again,
    a_destination_that_does_not_answer_gets_new_sessions_of_all_threads,
    a_caller_that_opens_all_the_time_is_cut_when_its_certificate_ends,
    a_caller_that_does_not_end_what_was_refused_is_given_up,
);

/// More than moves a stream, many times.
const MUCH: usize = 8 << 20;

fn moved(mesh: &Mesh) -> anyhow::Result<f64> {
    mesh.metric("machine-a", "hauberk_streams_moved_total", &[])
}

fn made(mesh: &Mesh) -> anyhow::Result<f64> {
    mesh.metric(
        "machine-b",
        "hauberk_handshake_duration_seconds_count",
        &["side=\"destination\"", "result=\"success\""],
    )
}

/// Bytes that are nowhere the same for long.
fn bytes(seed: u8, length: usize) -> Vec<u8> {
    let mut state = u32::from(seed) | 0x9e37_0100;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    })
    .take(length)
    .collect()
}

/// A connection and the server's end of it.
fn pair(mesh: &Mesh, listener: &TcpListener) -> anyhow::Result<(TcpStream, TcpStream)> {
    let client = mesh.connect("checkout", listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(PATIENCE))?;
        end.set_write_timeout(Some(PATIENCE))?;
    }
    Ok((client, server))
}

/// Sends all of it, while it is read at the other end.
fn carry(mut from: &TcpStream, mut to: &TcpStream, sent: &[u8]) -> anyhow::Result<()> {
    thread::scope(|scope| {
        let sending = scope.spawn(move || from.write_all(sent));
        let mut got = vec![0; sent.len()];
        let read = to.read_exact(&mut got);
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("send")?;
        read.context("receive")?;
        ensure!(got == sent, "other bytes came than were sent");
        Ok(())
    })
}

fn connections_at_once_share_a_session() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let before = made(&mesh)?;
    // The very first ones, too, which all want a session that is not there yet.
    let clients: anyhow::Result<Vec<TcpStream>> = thread::scope(|scope| {
        let opening: Vec<_> =
            (0..50).map(|_| scope.spawn(|| echoed(&mesh, "checkout", to))).collect();
        opening
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
            .collect()
    });
    let clients = clients?;
    let made = made(&mesh)? - before;
    // One for each thread that carries connections.
    let cores = thread::available_parallelism()?.get() as f64;
    let said = format!("{made} handshakes for {} connections, {cores} cores", clients.len());
    ensure!(made >= 1.0 && made <= cores, "{said}");
    clients.into_iter().try_for_each(end)?;
    ensure!(moved(&mesh)? == 0.0, "a byte is not much");
    Ok(())
}

fn a_stream_with_much_to_say_moves_and_a_small_one_does_not() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (client, server) = pair(&mesh, &listener)?;
    let beside = pair(&mesh, &listener)?;
    for round in 0..4 {
        carry(&client, &server, &bytes(round, MUCH))?;
        carry(&server, &client, &bytes(round + 10, MUCH))?;
        carry(&beside.0, &beside.1, &bytes(round, 100))?;
        carry(&beside.1, &beside.0, &bytes(round, 10_000))?;
    }
    ensure!(moved(&mesh)? == 1.0, "{} streams have moved", moved(&mesh)?);
    // And it ends as it should.
    client.shutdown(Shutdown::Write)?;
    ensure!((&server).read(&mut [0])? == 0, "no end came");
    carry(&server, &client, b"the last")?;
    drop(server);
    ensure!((&client).read(&mut [0])? == 0, "no end came");
    let sent = (4 * MUCH) as u64;
    for (machine, ours, theirs) in [("machine-a", sent, sent + 8), ("machine-b", sent + 8, sent)] {
        let record = mesh.record(machine, |record| is(record, "close_reason", "complete"))?;
        ensure!(record["bytes_sent"] == ours && record["bytes_received"] == theirs, "{record}");
    }
    // The session that carried on takes another one.
    let (client, server) = pair(&mesh, &listener)?;
    let before = made(&mesh)?;
    carry(&client, &server, &bytes(1, MUCH))?;
    ensure!(moved(&mesh)? == 2.0, "{} streams have moved", moved(&mesh)?);
    ensure!(made(&mesh)? - before == 0.0, "the session was not used again");
    Ok(())
}

fn a_stream_moves_that_is_half_closed() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    for server_is_done in [false, true] {
        let before = moved(&mesh)?;
        let (client, server) = pair(&mesh, &listener)?;
        let (done, talks) = if server_is_done { (&server, &client) } else { (&client, &server) };
        carry(done, talks, b"the only word")?;
        done.shutdown(Shutdown::Write)?;
        let mut quiet = talks;
        ensure!(quiet.read(&mut [0])? == 0, "no end came");
        carry(talks, done, &bytes(3, MUCH)).with_context(|| {
            let records = ["machine-a", "machine-b"].map(|machine| mesh.record(machine, |_| true));
            format!("the server is done: {server_is_done}; {records:?}\n{}", mesh.logs())
        })?;
        ensure!(moved(&mesh)? - before == 1.0, "it has not moved");
        talks.shutdown(Shutdown::Write)?;
        let mut end = done;
        ensure!(end.read(&mut [0])? == 0, "no end came");
        let from = client.local_addr()?.to_string();
        for machine in ["machine-a", "machine-b"] {
            mesh.record(machine, |record| {
                is(record, "close_reason", "complete") && is(&record["src"], "addr", &from)
            })?;
        }
    }
    let odd = |record: &&serde_json::Value| !is(record, "close_reason", "complete");
    for machine in ["machine-a", "machine-b"] {
        let records = mesh.all_records(machine)?;
        ensure!(records.iter().find(odd).is_none(), "{records:?}");
    }
    Ok(())
}

/// Also if it is not read for a while. Only the destination knows that it has much to say.
fn an_answer_with_much_to_say_moves() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let (client, server) = pair(&mesh, &listener)?;
    let answer = bytes(5, 4 * MUCH);
    thread::scope(|scope| {
        let sending = scope.spawn(|| (&server).write_all(&answer));
        thread::sleep(Duration::from_millis(500));
        // What the client says meanwhile is not held up by what it does not read.
        carry(&client, &server, &bytes(6, 1_000))?;
        let mut got = vec![0; answer.len()];
        (&client).read_exact(&mut got).context("the answer")?;
        ensure!(got == answer, "other bytes came than were sent");
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(())
    })?;
    ensure!(moved(&mesh)? == 1.0, "{} streams have moved", moved(&mesh)?);
    Ok(())
}

fn an_application_that_does_not_read_holds_up_nobody_else() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let to = echoing(&mesh, 5432)?;
    let held_up = pair(&mesh, &listener)?;
    held_up.0.set_write_timeout(Some(Duration::from_millis(300)))?;
    let mut written = 0;
    // Until nothing of it is taken any more.
    while let Ok(count) = (&held_up.0).write(&bytes(0, 64 * 1024)) {
        written += count;
    }
    for _ in 0..20 {
        end(echoed(&mesh, "checkout", to)?)?;
    }
    let mut got = 0;
    let mut room = vec![0; 64 * 1024];
    while got < written {
        got += (&held_up.1).read(&mut room)?;
    }
    ensure!(got == written, "{got} bytes came of {written}");
    Ok(())
}

fn many_streams_at_once_arrive_unchanged() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..40u8)
            .map(|number| {
                let mesh = &mesh;
                scope.spawn(move || -> anyhow::Result<()> {
                    let mut client = echoed(mesh, "checkout", to)?;
                    for round in 0..20 {
                        let sent = bytes(number, 1 + 997 * usize::from(round % 7u8));
                        client.write_all(&sent)?;
                        let mut got = vec![0; sent.len()];
                        client.read_exact(&mut got)?;
                        ensure!(got == sent, "client {number} got other bytes in round {round}");
                    }
                    end(client)
                })
            })
            .collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().map_err(|_| anyhow::anyhow!("panicked"))?)
    })
}

/// An agent that we did not write, with a certificate of a workload.
struct Caller {
    stream: TcpStream,
    channel: Channel,
    name: [u8; 16],
    came: Vec<u8>,
    plain: Vec<u8>,
}

impl Caller {
    fn connect(mesh: &Mesh, identity: &str, protocol: &[u8]) -> anyhow::Result<Self> {
        Self::connect_for(mesh, identity, protocol, time::Duration::minutes(5))
    }

    /// With a certificate that ends then.
    fn connect_for(
        mesh: &Mesh,
        identity: &str,
        protocol: &[u8],
        lifetime: time::Duration,
    ) -> anyhow::Result<Self> {
        let leaf = Forger::with_the_key_of(mesh)?.leaf(identity, |leaf| {
            leaf.not_after = time::OffsetDateTime::now_utc() + lifetime;
        })?;
        let (chain, key) = leaf.chain_and_key();
        let credential = Credential::new(chain, &PrivateKey::from_pkcs8(key), hauberk_tls::now())?;
        let to: SpiffeId = "spiffe://example.org/ns/payments/sa/ledger".parse()?;
        let root = fs::read(mesh.folder().join("control-plane/ca/root.crt.der"))?;
        let trust =
            TrustBundle::new(to.trust_domain().clone(), vec![root.into()], hauberk_tls::now())?;
        let slot = CredentialSlot::new(identity.parse()?);
        ensure!(slot.store(credential).is_ok(), "the certificate is not {identity}'s");
        let config = mesh_client_config(slot, TrustSlot::new(trust.clone()), &[protocol])?;
        let server_name = ServerName::try_from(to.server_name())?;
        let mut handshake = Handshake::client(Arc::new(config), server_name)?;
        let mut stream = mesh.connect("outside", mesh.ledger(15_008))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (mut out, mut buffer) = (Vec::new(), [0; 8192]);
        let mut progress = handshake.advance(&[], &mut out)?;
        while progress != Progress::Done {
            stream.write_all(&out)?;
            out.clear();
            let count = stream.read(&mut buffer)?;
            ensure!(count > 0, "the handshake was not answered");
            progress = handshake.advance(&buffer[..count], &mut out)?;
        }
        stream.write_all(&out)?;
        let established = handshake.finish(&trust, hauberk_tls::now())?;
        Ok(Self {
            stream,
            channel: established.channel,
            name: established.name,
            came: established.ciphertext,
            plain: established.plaintext,
        })
    }

    fn say(&mut self, frames: &[u8]) -> anyhow::Result<()> {
        let mut records = Vec::new();
        self.channel.seal(frames, &mut records)?;
        Ok(self.stream.write_all(&records)?)
    }

    /// More plain bytes.
    fn listen(&mut self) -> anyhow::Result<()> {
        loop {
            let mut room = [0; 32 * 1024];
            match self.channel.open(&self.came, &mut room)? {
                Opened::Data { used, length } => {
                    self.came.drain(..used);
                    self.plain.extend_from_slice(&room[..length]);
                    if length > 0 {
                        return Ok(());
                    }
                }
                Opened::Closed => bail!("the session was closed"),
                Opened::Incomplete => {
                    let count = self.stream.read(&mut room)?;
                    ensure!(count > 0, "the session was closed");
                    self.came.extend_from_slice(&room[..count]);
                }
            }
        }
    }

    /// What comes next of a session with many streams, data left out.
    fn next(&mut self, session: &mut Multiplex) -> anyhow::Result<(u32, &'static str)> {
        loop {
            while self.plain.is_empty() {
                self.listen()?;
            }
            let came = session.receive(&self.plain)?;
            let word = came.event.map(|(stream, event)| {
                let word = match event {
                    OfStream::Accept => "accept",
                    OfStream::Refuse(Refusal { cause: RefusalCause::Denied(_), .. }) => "denied",
                    OfStream::Refuse(_) => "unreachable",
                    OfStream::Fin => "fin",
                    OfStream::Moved => "moved",
                    OfStream::Reset(ResetCause::Application) => "reset",
                    OfStream::Data(_) | OfStream::Credit => "",
                    _ => "something else",
                };
                (stream, word)
            });
            let used = came.used;
            self.plain.drain(..used);
            if let Some((stream, word)) = word.filter(|(_, word)| !word.is_empty()) {
                return Ok((stream, word));
            }
        }
    }

    /// Whether the destination carries on with this stream here.
    fn is_taken(&mut self, session: &mut Machine, of: &Continue) -> anyhow::Result<bool> {
        let mut out = Vec::new();
        session.carry_on(of, &mut out)?;
        self.say(&out)?;
        loop {
            while self.plain.is_empty() {
                self.listen()?;
            }
            let came = session.receive(&self.plain)?;
            let answer = match came.event {
                Some(Event::Accept) => Some(true),
                Some(Event::Refuse(_)) => Some(false),
                Some(other) => bail!("got {other:?}"),
                None => None,
            };
            let used = came.used;
            self.plain.drain(..used);
            if let Some(taken) = answer {
                if !taken {
                    let mut out = Vec::new();
                    session.reset(ResetCause::Answer, &mut out);
                    self.say(&out)?;
                }
                return Ok(taken);
            }
        }
    }
}

const OF_CHECKOUT: &str = "spiffe://example.org/ns/shop/sa/checkout";
const OF_WEB: &str = "spiffe://example.org/ns/shop/sa/web";

fn wish(id: u8, to: SocketAddr) -> Open {
    Open {
        connection_id: [id; 16],
        trace_id: [0; 16],
        original_destination: to,
        source_address: SocketAddr::new(ipv4(CHECKOUT), 41_000 + u16::from(id)),
    }
}

fn a_destination_carries_on_with_nobody_elses_stream() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut shared = Caller::connect(&mesh, OF_CHECKOUT, ALPN_MULTIPLEXED)?;
    let mut session = Multiplex::new(Role::Source);
    let mut out = Vec::new();
    let stream = session.open(&wish(1, listener.local_addr()?), &mut out)?;
    shared.say(&out)?;
    ensure!(shared.next(&mut session)? == (stream, "accept"), "it was not taken");
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;

    let right = Continue { session: shared.name, stream };
    // Whoever has the name, and another identity.
    let mut stranger = Caller::connect(&mesh, OF_WEB, ALPN)?;
    let mut of_stranger = Machine::new(Role::Source);
    ensure!(!stranger.is_taken(&mut of_stranger, &right)?, "it was somebody else's");
    // The same identity, and a name that is none, or a stream that is none.
    let mut dedicated = Caller::connect(&mesh, OF_CHECKOUT, ALPN)?;
    let mut carrying = Machine::new(Role::Source);
    for wrong in [
        Continue { session: [7; 16], ..right },
        Continue { stream: stream + 1, ..right },
        Continue { stream: 0, ..right },
    ] {
        ensure!(!dedicated.is_taken(&mut carrying, &wrong)?, "{wrong:?} was taken");
    }
    // The stream does not mind, and goes on with the right one. Nobody can have it twice.
    ensure!(dedicated.is_taken(&mut carrying, &right)?, "it was not taken");
    let mut second = Caller::connect(&mesh, OF_CHECKOUT, ALPN)?;
    ensure!(!second.is_taken(&mut Machine::new(Role::Source), &right)?, "it was taken twice");
    let mut out = Vec::new();
    session.moved(stream, &mut out)?;
    shared.say(&out)?;
    ensure!(shared.next(&mut session)? == (stream, "moved"), "the answers do not come here");
    let mut frames = carrying.data(5)?.to_vec();
    frames.extend_from_slice(b"hello");
    carrying.fin(&mut frames)?;
    dedicated.say(&frames)?;
    let mut said = String::new();
    server.read_to_string(&mut said)?;
    ensure!(said == "hello", "got {said:?}");
    Ok(())
}

fn a_session_that_sends_more_than_is_taken_is_given_up() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let mut caller = Caller::connect(&mesh, OF_CHECKOUT, ALPN_MULTIPLEXED)?;
    let mut session = Multiplex::new(Role::Source);
    let mut out = Vec::new();
    let stream = session.open(&wish(2, listener.local_addr()?), &mut out)?;
    caller.say(&out)?;
    ensure!(caller.next(&mut session)? == (stream, "accept"), "it was not taken");
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    // In one frame, so that no credit comes in between.
    let length = INITIAL_CREDIT + 1;
    let [_, a, b, c] = length.to_be_bytes();
    let [d, e, f, g] = stream.to_be_bytes();
    let mut frame = vec![4, a, b, c, d, e, f, g];
    frame.extend(vec![0; length as usize]);
    // It may be gone before all of it is out.
    drop(caller.say(&frame));
    is_cut(&mut server)?;
    let record = mesh.record("machine-b", |record| is(record, "close_reason", "protocol_error"))?;
    let detail = record["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("65537 bytes of a stream, at most 65536"), "{record}");
    Ok(())
}

fn streams_of_one_session_are_decided_each_by_itself() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let listener = mesh.listen("ledger", mesh.ledger(8080))?;
    let forbidden = mesh.listen("ledger", mesh.ledger(9999))?;
    forbidden.set_nonblocking(true)?;
    let mut caller = Caller::connect(&mesh, OF_CHECKOUT, ALPN_MULTIPLEXED)?;
    let mut session = Multiplex::new(Role::Source);
    let mut out = Vec::new();
    let first = session.open(&wish(3, listener.local_addr()?), &mut out)?;
    let second = session.open(&wish(4, forbidden.local_addr()?), &mut out)?;
    let nobody = session.open(&wish(5, mesh.ledger(5432)), &mut out)?;
    caller.say(&out)?;
    let mut answers = Vec::new();
    while answers.len() < 3 {
        answers.push(caller.next(&mut session)?);
    }
    answers.sort_unstable();
    ensure!(
        answers == [(first, "accept"), (second, "denied"), (nobody, "unreachable")],
        "{answers:?}"
    );
    ensure!(forbidden.accept().is_err(), "the application saw a stream that was refused");
    let (mut server, _) = listener.accept()?;
    server.set_read_timeout(Some(PATIENCE))?;
    let mut out = session.data(first, 2)?.to_vec();
    out.extend_from_slice(b"ok");
    caller.say(&out)?;
    let mut got = [0; 2];
    server.read_exact(&mut got)?;
    ensure!(&got == b"ok", "got {got:?}");
    for (id, decision) in [(3u8, "allow"), (4, "deny"), (5, "allow")] {
        let id = format!("{id:02x}").repeat(16);
        if decision == "deny" || id.starts_with("05") {
            let record = mesh.record("machine-b", |record| is(record, "conn_id", &id))?;
            ensure!(is(&record, "decision", decision), "{record}");
        }
    }
    Ok(())
}

/// What goes out on a session whose other end has died meanwhile goes out once more, since nothing was answered.
fn a_stream_that_was_not_answered_is_opened_again() -> anyhow::Result<()> {
    let mut mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    end(echoed(&mesh, "checkout", to)?)?;
    // Whoever has the session answers no more, and its machine does not say so yet.
    let agent = mesh.process("machine-b").context("no agent")?;
    let agent = nix::unistd::Pid::from_raw(agent.cast_signed());
    nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGSTOP)?;
    thread::scope(|scope| {
        let reused = || mesh.metric("machine-a", "hauberk_streams_opened_total", &["\"reused\""]);
        let before = reused()?;
        let client = scope.spawn(|| echoed(&mesh, "checkout", to));
        mesh.wait("the stream", PATIENCE, |_| {
            ensure!(reused()? > before, "it is not opened");
            Ok(())
        })?;
        nix::sys::signal::kill(agent, nix::sys::signal::Signal::SIGKILL)?;
        // Until somebody answers again there.
        let client = client.join().map_err(|_| anyhow::anyhow!("the client panicked"))?;
        match client {
            Ok(client) => end(client),
            // No agent was there in time; then it was tried, and refused as unreachable.
            Err(error) => {
                let record =
                    mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
                let detail = record["detail"].as_str().unwrap_or_default();
                ensure!(
                    detail.contains("Connection refused") || detail.contains("went away"),
                    "{error:#}: {record}"
                );
                Ok(())
            }
        }
    })?;
    mesh.kill("machine-b");
    mesh.start_agent("machine-b", &[])?;
    mesh.wait_ready()?;
    end(echoed(&mesh, "checkout", to)?)
}

/// Its sessions may be those of a machine that is gone, whichever thread has them: nobody comes on them any more.
fn a_destination_that_does_not_answer_gets_new_sessions_of_all_threads() -> anyhow::Result<()> {
    // So many that each of the threads, as many as there are cores, has some.
    const CONNECTIONS: usize = 16;
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let sessions = || mesh.metric("machine-a", "hauberk_streams_opened_total", &["\"new\""]);
    let open =
        || (0..CONNECTIONS).map(|_| echoed(&mesh, "checkout", to)).collect::<Result<Vec<_>, _>>();
    let mut before = open()?;
    let first = sessions()?;
    // It is waited for longer than a usual client of these tests waits.
    let patient = || Ok(mesh.namespace("checkout")?.run(|| TcpStream::connect(to))??);
    mesh.while_held_up("machine-b", || expect_refused(patient()))?;
    let record = mesh.record("machine-a", |record| is(record, "close_reason", "unreachable"))?;
    let detail = record["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("did not answer in time"), "{record}");
    drop(open()?);
    let again = sessions()? - first;
    println!("{first} sessions before, {again} after");
    ensure!(
        (again - first).abs() < f64::EPSILON,
        "{first} sessions before, {again} new ones after"
    );
    // The open ones go on: it was there all the time.
    before.iter_mut().try_for_each(|client| {
        client.write_all(b"x")?;
        Ok(client.read_exact(&mut [0])?)
    })
}

/// Throws away what comes for so long. Whether the session stands.
fn stands(caller: &mut Caller, pause: Duration) -> anyhow::Result<bool> {
    caller.stream.set_read_timeout(Some(pause))?;
    let mut room = [0; 16 * 1024];
    loop {
        match caller.stream.read(&mut room) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) => return Ok(error.kind() == ErrorKind::WouldBlock),
        }
    }
}

fn a_caller_that_opens_all_the_time_is_cut_when_its_certificate_ends() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let lifetime = time::Duration::seconds(4);
    let mut caller = Caller::connect_for(&mesh, OF_CHECKOUT, ALPN_MULTIPLEXED, lifetime)?;
    let mut session = Multiplex::new(Role::Source);
    let since = Instant::now();
    // More often than a session is looked at, however soon its certificate ends.
    while since.elapsed() < Duration::from_secs(12) {
        let mut out = Vec::new();
        let stream = session.open(&wish(9, to), &mut out)?;
        session.reset(stream, ResetCause::Application, &mut out);
        if caller.say(&out).is_err() || !stands(&mut caller, Duration::from_millis(10))? {
            break;
        }
    }
    let lasted = since.elapsed();
    ensure!(lasted > Duration::from_secs(2), "it was cut after {lasted:?}");
    ensure!(lasted < Duration::from_secs(8), "it was cut after {lasted:?}");
    mesh.record("machine-b", |record| is(record, "reason", "expired_cert")).map(drop)
}

fn a_caller_that_does_not_end_what_was_refused_is_given_up() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let mut caller = Caller::connect(&mesh, OF_CHECKOUT, ALPN_MULTIPLEXED)?;
    let mut session = Multiplex::new(Role::Source);
    let mut out = Vec::new();
    let refused = session.open(&wish(7, mesh.ledger(9999)), &mut out)?;
    let kept = session.open(&wish(8, to), &mut out)?;
    caller.say(&out)?;
    let mut answers = [caller.next(&mut session)?, caller.next(&mut session)?];
    answers.sort_unstable();
    ensure!(answers == [(refused, "denied"), (kept, "accept")], "{answers:?}");
    // An answer that the network delays is waited for, as long as for anything else.
    let since = Instant::now();
    ensure!(stands(&mut caller, Duration::from_secs(20))?, "given up after {:?}", since.elapsed());
    ensure!(!stands(&mut caller, Duration::from_secs(25))?, "it stands with an end that is owed");
    Ok(())
}
