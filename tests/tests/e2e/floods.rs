//! Floods from the very address of an agent, as behind one address translation or on a host that is not captured:
//! what a program there does to an agent's port costs the agent of the same address nothing.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_core::{identity::SpiffeId, session::ALPN};
use hauberk_linux::{
    Netns,
    packets::{CaptureOptions, PacketCapture},
    socket::outbound_socket,
};
use hauberk_tests::mesh::{Mesh, PATIENCE, is};
use rustls::{ClientConfig, ClientConnection};
use rustls_pki_types::ServerName;

use crate::{
    identity::{Forged, Forger, LEDGER, client_hello},
    sessions::{RawCaller, echoed, echoing, end, warm},
};

crate::trials!(
    silent_connections_from_an_agents_own_address_keep_out_nobody,
    unfinished_handshakes_from_an_agents_own_address_keep_out_nobody,
    failing_handshakes_without_end_from_an_agents_own_address_keep_out_nobody,
    a_caller_that_is_known_keeps_its_place_in_a_flood,
    a_source_tells_who_it_was_in_its_next_hello,
    the_idle_sessions_of_one_identity_take_no_room_of_anothers,
);

/// What the agents' own connections are made for, while a flood is there.
const CONNECTIONS: u32 = 20;

/// A handshake that says nothing more is given up after ten seconds. Whoever is served sooner waited for none.
const BEFORE_THE_FLOOD_ENDS: Duration = Duration::from_secs(8);

/// A connection from a namespace past its capture, from the address that its agent uses there.
fn dial(to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = outbound_socket(to)?;
    socket.set_nonblocking(false)?;
    socket.connect_timeout(&to.into(), Duration::from_secs(5))?;
    Ok(socket.into())
}

/// So many connections that say this, and nothing more.
pub(crate) fn flood(
    mesh: &Mesh,
    namespace: &str,
    to: SocketAddr,
    count: u32,
    words: &[u8],
) -> anyhow::Result<Vec<TcpStream>> {
    let peers = mesh.namespace(namespace)?.run(|| -> std::io::Result<Vec<TcpStream>> {
        (0..count)
            .map(|_| {
                let mut peer = dial(to)?;
                // It may have had to give way already.
                drop(peer.write_all(words));
                Ok(peer)
            })
            .collect()
    })??;
    Ok(peers)
}

/// All connections of the agent come through, each on a session of its own, as all stay open.
fn connections_come_through(mesh: &Mesh, to: SocketAddr, within: Duration) -> anyhow::Result<()> {
    let started = Instant::now();
    let clients: Vec<TcpStream> = (1..=CONNECTIONS)
        .map(|number| {
            let client = echoed(mesh, "checkout", to);
            client.with_context(|| {
                let told = mesh.record("machine-a", |_| true);
                format!("connection {number} of {CONNECTIONS}, of which the caller's agent says {told:?}")
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let took = started.elapsed();
    ensure!(took < within, "they took {took:?}: they waited for the flood");
    clients.into_iter().try_for_each(end)
}

/// Those of the flood that had to give way are told apart from those that failed.
fn some_had_to_give_way(mesh: &Mesh, detail: &str) -> anyhow::Result<()> {
    let record = mesh.record("machine-b", |record| is(record, "reason", "rate_limited"))?;
    ensure!(is(&record, "decision", "deny"), "{record}");
    let told = record["detail"].as_str().unwrap_or_default();
    ensure!(told.contains(detail), "{record}");
    let counted =
        mesh.metric("machine-b", "hauberk_connections_denied_total", &["reason=\"rate_limited\""])?;
    ensure!(counted > 0.0, "none is counted");
    Ok(())
}

fn silent_connections_from_an_agents_own_address_keep_out_nobody() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let flood = flood(&mesh, "checkout", mesh.ledger(15_008), 5_000, &[0x16, 0x03, 0x01, 0x02])?;
    connections_come_through(&mesh, to, BEFORE_THE_FLOOD_ENDS)?;
    drop(flood);
    some_had_to_give_way(&mesh, "before its handshake began")
}

fn unfinished_handshakes_from_an_agents_own_address_keep_out_nobody() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    let flood = unfinished(&mesh, "checkout")?;
    connections_come_through(&mesh, to, BEFORE_THE_FLOOD_ENDS)?;
    drop(flood);
    some_had_to_give_way(&mesh, "in its handshake")
}

/// Goes on until it is told to stop.
struct Attack {
    stop: Arc<AtomicBool>,
    tries: Arc<AtomicU32>,
    thread: thread::JoinHandle<anyhow::Result<()>>,
}

impl Attack {
    fn start(
        mesh: &Mesh,
        mut attempt: impl FnMut(TcpStream) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (stop, tries) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let place: Netns = mesh.namespace("checkout")?.clone();
        let agent = mesh.ledger(15_008);
        let (stopped, counted) = (stop.clone(), tries.clone());
        let thread = thread::spawn(move || {
            place.run(|| -> anyhow::Result<()> {
                while !stopped.load(Ordering::Relaxed) {
                    let stream = dial(agent)?;
                    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                    // So that it has a port for the next one.
                    socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
                    attempt(stream)?;
                    counted.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })?
        });
        Ok(Self { stop, tries, thread })
    }

    fn wait_for(&self, mesh: &Mesh, tries: u32) -> anyhow::Result<()> {
        mesh.wait("the attack", Duration::from_secs(60), |_| {
            let done = self.tries.load(Ordering::Relaxed);
            ensure!(done >= tries, "{done} tries of {tries}");
            Ok(())
        })
    }

    fn stop(self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

fn failing_handshakes_without_end_from_an_agents_own_address_keep_out_nobody() -> anyhow::Result<()>
{
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    // So that the agents know each other.
    let session = echoed(&mesh, "checkout", to)?;
    // One says hello and nothing more, on more connections than there is room for.
    let hello = client_hello()?;
    let mut held = VecDeque::new();
    let hellos = Attack::start(&mesh, move |mut stream| {
        // It may have had to give way already. Not sooner than it is answered: a flood that is faster than connections
        // are accepted fills the kernel's queue, where all callers are one.
        drop(stream.write_all(&hello).and_then(|()| stream.read(&mut [0])));
        held.push_back(stream);
        if held.len() > 3_000 {
            held.pop_front();
        }
        Ok(())
    })?;
    // The other goes on to the end, where it is found out.
    let leaf = Forger::foreign()?.leaf(LEDGER, |_| {})?;
    let config = Arc::new(Forged::client_config(Some(leaf), &[ALPN])?);
    let name = ServerName::try_from(LEDGER.parse::<SpiffeId>()?.server_name())?;
    let strangers = Attack::start(&mesh, move |stream| {
        let connection = ClientConnection::new(config.clone(), name.clone())?;
        let mut tls = rustls::StreamOwned::new(connection, stream);
        if matches!(tls.write(b"x").and_then(|_| tls.read(&mut [0])), Ok(count) if count > 0) {
            bail!("a stranger was answered");
        }
        Ok(())
    })?;
    hellos.wait_for(&mesh, 2_100)?;
    strangers.wait_for(&mesh, 20)?;
    let before = (hellos.tries.load(Ordering::Relaxed), strangers.tries.load(Ordering::Relaxed));
    connections_come_through(&mesh, to, Duration::from_secs(30))?;
    hellos.wait_for(&mesh, before.0 + 1)?;
    strangers.wait_for(&mesh, before.1 + 1)?;
    hellos.stop()?;
    strangers.stop()?;
    end(session)
}

/// Unfinished handshakes, of which an agent has no room for all.
fn unfinished(mesh: &Mesh, namespace: &str) -> anyhow::Result<Vec<TcpStream>> {
    flood(mesh, namespace, mesh.ledger(15_008), 3_000, &client_hello()?)
}

fn a_caller_that_is_known_keeps_its_place_in_a_flood() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let caller = RawCaller::new(&mesh)?;
    let (session, established) = caller.begin(&mesh, None)?.finish(&caller)?;
    mesh.wait("the session", PATIENCE, |mesh| {
        ensure!(idle(mesh)? >= 1.0, "it is not there yet");
        Ok(())
    })?;
    let known = caller.begin(&mesh, Some(established.token))?;
    let unknown = caller.begin(&mesh, None)?;
    let flood = unfinished(&mesh, "outside")?;
    some_had_to_give_way(&mesh, "in its handshake")?;
    let (mut known, _) = known.finish(&caller).context("the one with a token")?;
    mesh.wait("the second session", PATIENCE, |mesh| {
        ensure!(idle(mesh)? >= 2.0, "it is not there yet");
        Ok(())
    })?;
    known.set_nonblocking(true)?;
    let still_open = known.read(&mut [0]).expect_err("nobody says anything");
    ensure!(still_open.kind() == ErrorKind::WouldBlock, "{still_open}");
    // TLS 1.3 is over for the client before the other side has its last word.
    let refused = unknown.finish(&caller).and_then(|(mut stream, _)| Ok(stream.read(&mut [0])?));
    ensure!(!matches!(refused, Ok(count) if count > 0), "the one without a token was not refused");
    drop((session, flood));
    Ok(())
}

fn a_source_tells_who_it_was_in_its_next_hello() -> anyhow::Result<()> {
    const TOKEN: &[u8] = b"hauberk/1 caller ";
    let mut mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    for (number, has_token) in [(1, false), (2, true)] {
        let capture = mesh.wire().run(|| PacketCapture::start(&CaptureOptions::default()))??;
        end(echoed(&mesh, "checkout", to)?)?;
        let captured = capture.stop()?;
        ensure!(captured.is_complete(), "the capture is not whole");
        ensure!(!captured.handshakes(15_008).is_empty(), "session {number} was not seen");
        ensure!(captured.contains(TOKEN) == has_token, "session {number}");
        // The next connection needs another session.
        mesh.stop("machine-b");
        mesh.start_agent("machine-b", &[])?;
        mesh.wait_ready()?;
    }
    Ok(())
}

/// Above what an honest agent keeps for one of its workloads at one other agent.
const SESSIONS: u32 = 1_200;

/// What an agent keeps of one identity.
const KEPT: f64 = 1_024.0;

fn the_idle_sessions_of_one_identity_take_no_room_of_anothers() -> anyhow::Result<()> {
    let mesh = Mesh::start()?;
    let to = echoing(&mesh, 8080)?;
    warm(&mesh, "checkout", to, 1)?;
    let of_others = idle(&mesh)?;
    let sessions = sessions_of_web(&mesh)?;
    mesh.wait("the sessions", Duration::from_secs(10), |mesh| {
        let held = idle(mesh)? - of_others;
        ensure!(held <= KEPT, "{held} sessions of one identity are kept");
        ensure!(held >= KEPT / 2.0, "{held} sessions are there yet");
        Ok(())
    })?;
    let reused = || mesh.metric("machine-a", "hauberk_streams_opened_total", &["\"reused\""]);
    let before = reused()?;
    end(echoed(&mesh, "checkout", to)?)?;
    ensure!(reused()? > before, "the session of another identity had to go");
    drop(sessions);
    Ok(())
}

fn idle(mesh: &Mesh) -> anyhow::Result<f64> {
    mesh.metric("machine-b", "hauberk_idle_sessions", &["direction=\"inbound\""])
}

/// Sessions that somebody with the certificate of another workload makes, and leaves as they are.
fn sessions_of_web(mesh: &Mesh) -> anyhow::Result<Vec<TcpStream>> {
    let leaf =
        Forger::with_the_key_of(mesh)?.leaf("spiffe://example.org/ns/shop/sa/web", |_| {})?;
    let config: Arc<ClientConfig> = Arc::new(Forged::client_config(Some(leaf), &[ALPN])?);
    let name = ServerName::try_from(LEDGER.parse::<SpiffeId>()?.server_name())?;
    let agent = mesh.ledger(15_008);
    let made = mesh.namespace("outside")?.run(|| -> anyhow::Result<Vec<TcpStream>> {
        (0..SESSIONS)
            .map(|number| {
                let mut stream = TcpStream::connect_timeout(&agent, Duration::from_secs(5))?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                let mut tls = ClientConnection::new(config.clone(), name.clone())?;
                while tls.is_handshaking() {
                    tls.complete_io(&mut stream).with_context(|| format!("session {number}"))?;
                }
                while tls.wants_write() {
                    tls.write_tls(&mut stream)?;
                }
                Ok(stream)
            })
            .collect()
    })??;
    Ok(made)
}
