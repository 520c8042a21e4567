//! Two ends of a multiplexed session over loopback, each step taken when the test says so.

use std::{net::Ipv4Addr, sync::Arc, task::Poll, time::Duration};

use hauberk_core::{
    identity::SpiffeId,
    session::{ALPN, ALPN_MULTIPLEXED, Open},
};
use hauberk_telemetry::{
    AgentMetrics, EdgeCounters, EdgeLabels,
    metrics::{Direction, WorkloadLabels},
    record::Decision,
};
use hauberk_tls::{
    ByServerName, Credential, CredentialSlot, PrivateKey, TrustBundle, TrustSlot,
    limiter::HandshakeLimiter, mesh_client_config, mesh_server_config,
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

use super::{
    Fate, Mux, Relay,
    driver::{Driver, Event},
};
use crate::{
    relay::{Application, End},
    session::{self, New, SessionError},
};

const CHECKOUT: &str = "spiffe://example.org/ns/shop/sa/checkout";
const LEDGER: &str = "spiffe://example.org/ns/payments/sa/ledger";

/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// Long enough for a small step over loopback that does happen.
const SHORT: Duration = Duration::from_millis(20);

/// Long enough for a step that does happen.
const MOMENT: Duration = Duration::from_millis(100);

/// One end of a session.
struct Side {
    mux: Arc<Mux>,
    driver: Driver,
}

/// Both ends of a new session of that kind.
async fn made(protocol: &[u8]) -> (New, New) {
    made_over(connected().await, protocol).await
}

async fn made_over((near, mut far): (TcpStream, TcpStream), protocol: &[u8]) -> (New, New) {
    let key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let root = ca.self_signed(&key).unwrap().der().clone();
    let issuer = Issuer::from_ca_cert_der(&root, key).unwrap();
    let (checkout, ledger) = (slot(CHECKOUT, &issuer), slot(LEDGER, &issuer));
    let domain = LEDGER.parse::<SpiffeId>().unwrap().trust_domain().clone();
    let bundle = TrustBundle::new(domain, vec![root], hauberk_tls::now()).unwrap();
    let trust = TrustSlot::new(bundle);
    let names = ByServerName::default();
    names.store([ledger.clone()]);
    let client = mesh_client_config(checkout.clone(), trust.clone(), &[protocol]).unwrap();
    let server = mesh_server_config(Arc::new(names), trust.clone(), &[protocol]).unwrap();

    let name = LEDGER.parse::<SpiffeId>().unwrap().server_name();
    let name = ServerName::try_from(name).unwrap();
    let calling = async {
        let (own, trust) = (checkout.load(), trust.load());
        let made = session::connect(near, Arc::new(client), name, own, trust, u64::MAX).await;
        let mut made = made.ok().unwrap();
        // The end of its handshake goes out with its first frame, otherwise.
        match &mut made {
            New::Dedicated(session) => session.flush().await.ok().unwrap(),
            New::Multiplexed(trunk) => {
                let flushed = std::future::poll_fn(|cx| trunk.link.poll_unsent(cx)).await;
                flushed.ok().unwrap();
            }
        }
        made
    };
    let limiter = HandshakeLimiter::new();
    let called = async {
        let mut admission = limiter.enter(Ipv4Addr::LOCALHOST.into());
        let greeting = session::greeting(&mut far).await.ok().unwrap();
        admission.heard(None, hauberk_tls::now());
        let mut waited = Duration::ZERO;
        let turns = admission.turns(&mut waited);
        let (own, trust) = (ledger.load(), trust.load());
        let accepting =
            session::accept(far, greeting, Arc::new(server), own, trust, u64::MAX, turns);
        accepting.await.ok().unwrap()
    };
    tokio::join!(calling, called)
}

async fn both_ends() -> (Side, Side) {
    let (source, destination) = made(ALPN_MULTIPLEXED).await;
    (side(source), side(destination))
}

fn side(made: New) -> Side {
    let New::Multiplexed(trunk) = made else { panic!("no multiplexed session was made") };
    let (mux, driver) = Mux::of(trunk, &AgentMetrics::new().unwrap());
    Side { mux, driver }
}

fn slot(id: &str, issuer: &Issuer<'_, KeyPair>) -> Arc<CredentialSlot> {
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    parameters.is_ca = IsCa::ExplicitNoCa;
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    parameters.not_before = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    parameters.not_after = time::OffsetDateTime::now_utc() + time::Duration::minutes(5);
    let leaf = parameters.signed_by(&key, issuer).unwrap().der().clone();
    let key = PrivateKey::from_pkcs8(key.serialize_der());
    let slot = CredentialSlot::new(id.parse().unwrap());
    slot.store(Credential::new(vec![leaf], &key, hauberk_tls::now()).unwrap()).unwrap();
    slot
}

async fn connected() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    (near, far)
}

fn wish() -> Open {
    let address = (Ipv4Addr::LOCALHOST, 1).into();
    Open {
        connection_id: [1; 16],
        trace_id: [0; 16],
        original_destination: address,
        source_address: address,
    }
}

fn counters() -> EdgeCounters {
    AgentMetrics::new().unwrap().edge(&EdgeLabels {
        direction: Direction::Outbound,
        decision: Decision::Allow,
        reason: "",
        src: WorkloadLabels::default(),
        dst: WorkloadLabels::default(),
        dst_port: 1,
        policy: "",
    })
}

impl Side {
    /// Lets its driver do what there is to do.
    async fn drive(&mut self) {
        let ended = tokio::time::timeout(MOMENT, self.driver.run()).await;
        assert!(ended.is_err(), "nothing but bytes was expected");
    }

    /// Lets what was said out, and takes nothing.
    async fn drive_without_reading(&mut self) {
        let flushed = std::future::poll_fn(|cx| self.driver.poll_out(cx));
        drop(tokio::time::timeout(MOMENT, flushed).await);
    }

    async fn event(&mut self) -> Result<Event, SessionError> {
        tokio::time::timeout(PATIENCE, self.driver.run()).await.expect("nothing happened")
    }
}

#[tokio::test]
async fn an_answer_that_is_there_before_anybody_waits_for_it_is_taken() {
    let (mut source, mut destination) = both_ends().await;
    let stream = source.mux.open(&wish()).unwrap();
    source.drive().await;
    let Ok(Event::Open(_, taken)) = destination.event().await else { panic!("no stream came") };
    taken.accept().unwrap();
    destination.drive().await;
    source.drive().await;
    let (application, _) = connected().await;
    let mut relay = Relay::new(Application::connected(application), stream, counters());
    assert!(relay.awaits_answer());
    let fate = tokio::time::timeout(PATIENCE, relay.run()).await.expect("it waits");
    assert!(matches!(fate, Fate::Accepted));
    assert!(!relay.awaits_answer());
}

#[tokio::test]
async fn nothing_is_opened_on_a_session_that_has_come_to_its_end() {
    let (mut source, _destination) = both_ends().await;
    source.mux.retire();
    assert!(matches!(source.event().await, Ok(Event::Done)));
    // Before it has said goodbye.
    assert!(source.mux.open(&wish()).is_err());
    assert!(source.mux.is_over());
}

#[tokio::test]
async fn what_was_said_last_arrives_though_the_session_ends_with_it() {
    let (mut source, mut destination) = both_ends().await;
    let stream = source.mux.open(&wish()).unwrap();
    source.drive().await;
    let Ok(Event::Open(_, taken)) = destination.event().await else { panic!("no stream came") };
    taken.accept().unwrap();
    let (near, mut caller) = connected().await;
    let (far, mut called) = connected().await;
    let mut calls = Relay::new(Application::connected(near), stream, counters());
    let mut answers = Relay::new(Application::connected(far), taken, counters());
    caller.write_all(b"question").await.unwrap();
    caller.shutdown().await.unwrap();
    called.write_all(b"answer").await.unwrap();
    called.shutdown().await.unwrap();
    destination.driver.go_away();
    let source_side = async {
        assert!(matches!(calls.run().await, Fate::Accepted));
        assert!(matches!(calls.run().await, Fate::End(End::Complete)));
        drop(calls);
    };
    let destination_side = async {
        assert!(matches!(answers.run().await, Fate::End(End::Complete)));
        drop(answers);
    };
    let closing = async {
        assert!(matches!(destination.driver.run().await, Ok(Event::Done)));
        destination.driver.close().await;
    };
    let reading = async {
        assert!(matches!(source.driver.run().await, Ok(Event::Done) | Err(SessionError::Closed)));
        source.driver.close().await;
    };
    let all = async { tokio::join!(source_side, destination_side, closing, reading) };
    tokio::time::timeout(PATIENCE, all).await.expect("somebody waits");
    let (mut question, mut answer) = (Vec::new(), Vec::new());
    called.read_to_end(&mut question).await.unwrap();
    caller.read_to_end(&mut answer).await.unwrap();
    assert_eq!((question.as_slice(), answer.as_slice()), (&b"question"[..], &b"answer"[..]));
}

/// A stream that was taken, between an application at each end.
struct Carried {
    source: Side,
    destination: Side,
    near: Box<Relay>,
    far: Box<Relay>,
    caller: TcpStream,
    called: TcpStream,
}

async fn carried() -> Carried {
    carried_over(both_ends().await).await
}

async fn carried_over((mut source, mut destination): (Side, Side)) -> Carried {
    let stream = source.mux.open(&wish()).unwrap();
    source.drive().await;
    let Ok(Event::Open(_, taken)) = destination.event().await else { panic!("no stream came") };
    taken.accept().unwrap();
    let ((near, caller), (far, called)) = (connected().await, connected().await);
    let mut near = Relay::new(Application::connected(near), stream, counters());
    let far = Relay::new(Application::connected(far), taken, counters());
    destination.drive().await;
    source.drive().await;
    assert!(matches!(near.run().await, Fate::Accepted));
    Carried { source, destination, near, far, caller, called }
}

#[tokio::test]
async fn a_stream_that_moves_nowhere_is_at_its_end() {
    for answered in [false, true] {
        let Carried { mut source, mut destination, near, mut far, called, .. } = carried().await;
        if answered {
            drop(called);
            assert!(tokio::time::timeout(MOMENT, far.run()).await.is_err(), "it is half over");
            destination.drive().await;
        }
        // Without having asked that a dedicated session carries on.
        near.stream_says_moved();
        source.drive().await;
        destination.drive().await;
        let fate = tokio::time::timeout(PATIENCE, far.run()).await.expect("it waits");
        assert!(matches!(fate, Fate::End(End::Truncated)), "answered: {answered}");
    }
}

#[tokio::test]
async fn a_stream_whose_move_is_not_answered_is_at_its_end() {
    let mut carried = carried().await;
    let near = &mut carried.near;
    let (New::Dedicated(asking), New::Dedicated(asked)) = made(ALPN).await else {
        panic!("no dedicated session was made")
    };
    let (sender, coming) = oneshot::channel();
    assert!(sender.send(asking).is_ok());
    near.wait_for_tail(coming);
    assert!(tokio::time::timeout(MOMENT, near.run()).await.is_err(), "it waits for the answer");
    // It may have carried on meanwhile.
    drop(asked);
    let fate = tokio::time::timeout(PATIENCE, near.run()).await.expect("it waits");
    assert!(matches!(fate, Fate::End(End::Truncated | End::SessionFailed(_))));
}

#[tokio::test]
async fn what_came_before_a_session_broke_is_delivered_and_then_its_end() {
    let Carried { mut source, mut destination, mut near, mut far, mut caller, mut called } =
        carried().await;
    called.write_all(b"half an answer").await.unwrap();
    assert!(tokio::time::timeout(MOMENT, far.run()).await.is_err(), "it goes on");
    destination.drive().await;
    source.drive().await;
    drop(destination);
    let broke = source.event().await.err().expect("it has ended");
    source.driver.end(&broke);
    let fate = tokio::time::timeout(PATIENCE, near.run()).await.expect("it waits");
    assert!(matches!(fate, Fate::End(End::Truncated | End::SessionFailed(_))));
    let mut heard = [0; 14];
    caller.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"half an answer");
}

#[tokio::test]
async fn a_peer_that_asks_and_does_not_read_is_given_up() {
    let (mut source, mut destination) = both_ends().await;
    for _ in 0..2 {
        // More than the kernel takes for a peer that does not read.
        destination.mux.lock().out.resize(super::MOST_UNREAD + 1, 0);
        let waits = tokio::time::timeout(MOMENT, destination.driver.run()).await;
        assert!(waits.is_err(), "it is given up for what it has asked before");
    }
    let _stream = source.mux.open(&wish()).unwrap();
    source.drive_without_reading().await;
    let error = destination.event().await.err().expect("it is given up");
    assert!(
        matches!(error, SessionError::Io(error) if error.to_string().contains("does not read"))
    );
}

#[tokio::test]
async fn a_stream_without_a_credit_holds_up_no_other() {
    let (mut source, mut destination) = both_ends().await;
    let (mut near_ends, mut far_ends) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let stream = source.mux.open(&wish()).unwrap();
        source.drive().await;
        let Ok(Event::Open(_, taken)) = destination.event().await else { panic!("none came") };
        taken.accept().unwrap();
        let ((near, caller), (far, called)) = (connected().await, connected().await);
        near_ends.push((Relay::new(Application::connected(near), stream, counters()), caller));
        far_ends.push((Relay::new(Application::connected(far), taken, counters()), called));
    }
    let [(mut first, mut talks), (mut second, mut asks)] =
        <[_; 2]>::try_from(near_ends).ok().unwrap();
    // Of the first, nobody takes what comes.
    let [_not_polled, (mut answers, mut hears)] = <[_; 2]>::try_from(far_ends).ok().unwrap();
    let bytes = vec![7; 1024 * 1024];
    let talking = async {
        talks.write_all(&bytes).await.unwrap();
        std::future::pending::<()>().await;
    };
    let carried = async {
        loop {
            tokio::select! {
                fate = first.run() => assert!(matches!(fate, Fate::Accepted | Fate::Bulk)),
                fate = second.run() => assert!(matches!(fate, Fate::Accepted)),
                _ = answers.run() => panic!("it goes on"),
                _ = source.driver.run() => panic!("it goes on"),
                _ = destination.driver.run() => panic!("it goes on"),
            }
        }
    };
    let exchange = async {
        // So that the first has said all that it may.
        tokio::time::sleep(MOMENT).await;
        for _ in 0..10 {
            asks.write_all(b"question").await.unwrap();
            let mut heard = [0; 8];
            hears.read_exact(&mut heard).await.unwrap();
            assert_eq!(&heard, b"question");
        }
    };
    let exchanged = tokio::select! {
        () = exchange => true,
        () = talking => false,
        () = carried => false,
        () = tokio::time::sleep(PATIENCE) => false,
    };
    assert!(exchanged, "the other one was held up");
    assert_eq!(first.sent, 65_536, "as much as its credit");
    assert!(matches!(poll_once(&mut first).await, Poll::Pending));
}

async fn poll_once(relay: &mut Relay) -> Poll<()> {
    tokio::time::timeout(MOMENT, relay.run()).await.map_or(Poll::Pending, |_| Poll::Ready(()))
}

/// Bytes by bytes, until the session takes it that nobody else speaks.
async fn speak_alone(carried: &mut Carried) {
    let Carried { source, destination, near, far, caller, called } = carried;
    for _ in 0..10 {
        caller.write_all(b"x").await.unwrap();
        assert!(tokio::time::timeout(SHORT, near.run()).await.is_err(), "it is open");
        assert!(tokio::time::timeout(SHORT, source.driver.run()).await.is_err(), "it is open");
        assert!(tokio::time::timeout(SHORT, destination.driver.run()).await.is_err(), "it is open");
        assert!(tokio::time::timeout(SHORT, far.run()).await.is_err(), "it is open");
        called.read_exact(&mut [0]).await.unwrap();
    }
}

#[tokio::test]
async fn who_speaks_alone_waits_for_nobody() {
    let mut carried = carried().await;
    speak_alone(&mut carried).await;
    let Carried { source: _source, mut destination, mut near, mut far, mut caller, mut called } =
        carried;
    // The driver of its session is asleep from here on.
    caller.write_all(b"question").await.unwrap();
    assert!(tokio::time::timeout(MOMENT, near.run()).await.is_err(), "it is open");
    destination.drive().await;
    assert!(tokio::time::timeout(MOMENT, far.run()).await.is_err(), "it is open");
    let mut question = [0; 8];
    let read = tokio::time::timeout(PATIENCE, called.read_exact(&mut question)).await;
    read.expect("nothing came").unwrap();
    assert_eq!(&question, b"question");
}

#[tokio::test]
async fn what_the_network_does_not_take_at_once_is_sent_by_the_driver() {
    let (near, far) = connected().await;
    // As small as the kernel makes them: less than a stream may say without being asked for more.
    socket2::SockRef::from(&near).set_send_buffer_size(1).unwrap();
    socket2::SockRef::from(&far).set_recv_buffer_size(1).unwrap();
    let (source, destination) = made_over((near, far), ALPN_MULTIPLEXED).await;
    let mut carried = carried_over((side(source), side(destination))).await;
    speak_alone(&mut carried).await;
    let Carried { mut source, mut destination, mut near, mut far, mut caller, mut called } =
        carried;
    let said = vec![7; 48 * 1024];
    caller.write_all(&said).await.unwrap();
    assert!(tokio::time::timeout(MOMENT, near.run()).await.is_err(), "it is open");
    assert!(source.driver.is_held_up(), "the network has taken everything");
    let mut heard = vec![0; said.len()];
    let everybody = async {
        tokio::select! {
            _ = source.driver.run() => panic!("it goes on"),
            _ = destination.driver.run() => panic!("it goes on"),
            _ = near.run() => panic!("it goes on"),
            _ = far.run() => panic!("it goes on"),
            read = called.read_exact(&mut heard) => read.unwrap(),
        }
    };
    tokio::time::timeout(PATIENCE, everybody).await.expect("something is left behind");
    assert_eq!(heard, said);
}
