//! A connection is answered when the agent says so, and not earlier.

use std::{
    io,
    net::{SocketAddr, TcpStream},
    os::fd::AsFd,
    thread,
    time::Duration,
};

use hauberk_linux::{
    capture::{Hold, NamespaceRules, Opening, Unroutable},
    socket::{self, Peer},
};

use crate::support::*;

struct Agent {
    network: Network,
    hold: Hold,
    listeners: Vec<std::net::TcpListener>,
}

impl Agent {
    fn start() -> Self {
        let network = Network::new();
        let rules = NamespaceRules {
            outbound_port: Some(OUTBOUND),
            plaintext_port: None,
            mesh_listener: None,
            mesh_port: MESH,
            unroutable: Unroutable::Refuse,
            letting_go: false,
        };
        network.in_workload(|| install(&rules.ruleset().unwrap()));
        let (hold, listeners) = network.in_workload(|| {
            let listen = |family: Addresses| {
                let address = SocketAddr::new(family.loopback, OUTBOUND);
                socket::listen_captured(address, Peer::Application).unwrap()
            };
            (Hold::start(OUTBOUND, OUTBOUND).unwrap(), families().map(listen).into_iter().collect())
        });
        Self { network, hold, listeners }
    }

    /// Begins to connect, and gives what is held of it.
    fn connecting(&self, to: SocketAddr) -> (thread::JoinHandle<io::Result<TcpStream>>, Opening) {
        let netns = self.network.workload.clone();
        let client = thread::spawn(move || connect(&netns, to.ip(), to.port()));
        let mut held = self.held(PATIENCE);
        assert_eq!(held.len(), 1, "{held:?}");
        let opening = held.remove(0);
        assert_eq!(opening.wanted, to);
        (client, opening)
    }

    fn held(&self, patience: Duration) -> Vec<Opening> {
        let mut poll = [nix::poll::PollFd::new(self.hold.as_fd(), nix::poll::PollFlags::POLLIN)];
        let patience = u16::try_from(patience.as_millis()).unwrap();
        nix::poll::poll(&mut poll, patience).unwrap();
        self.hold.take().unwrap().0
    }
}

#[test]
fn a_connection_is_answered_when_it_is_released() {
    let agent = Agent::start();
    for (family, listener) in families().into_iter().zip(&agent.listeners) {
        let to = SocketAddr::new(family.beyond, 443);
        let (client, opening) = agent.connecting(to);
        assert!(nobody_came(listener) && !client.is_finished());
        agent.hold.release(&opening).unwrap();
        let (mut accepted, from) = accept(listener);
        let mut client = client.join().unwrap().unwrap();
        assert_eq!((from, accepted.local_addr().unwrap()), (opening.from, to));
        assert_eq!(client.local_addr().unwrap(), opening.from);
        assert_joined(&mut client, &mut accepted);
        assert_eq!(agent.held(Duration::from_millis(50)), [], "only the first packet is held");
    }
}

#[test]
fn a_refused_connection_looks_like_one_to_a_port_without_a_listener() {
    let agent = Agent::start();
    for (family, listener) in families().into_iter().zip(&agent.listeners) {
        let (client, opening) = agent.connecting(SocketAddr::new(family.remote, 80));
        agent.hold.refuse(&opening).unwrap();
        assert_refused(client.join().unwrap());
        assert!(nobody_came(listener));
    }
}

/// Its kernel asks again, so that nothing depends on a packet that is lost.
#[test]
fn a_connection_that_waits_is_held_again() {
    let agent = Agent::start();
    let (client, opening) = agent.connecting(SocketAddr::new(families()[0].remote, 80));
    // After one second.
    let again = agent.held(PATIENCE);
    assert_eq!(
        again.first().map(|again| (again.from, again.wanted)),
        Some((opening.from, opening.wanted))
    );
    agent.hold.release(&opening).unwrap();
    let _accepted = accept(&agent.listeners[0]);
    client.join().unwrap().unwrap();
}

/// Whoever has the application's port meanwhile does not get its connection.
#[test]
fn what_is_released_too_late_joins_nobody() {
    let agent = Agent::start();
    let to = SocketAddr::new(families()[0].remote, 80);
    let connecting = || {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.bind(&SocketAddr::new(families()[0].workload, 40_000).into()).unwrap();
        assert!(socket.connect(&to.into()).is_err());
        socket
    };
    let first = agent.network.in_workload(connecting);
    let mut held = agent.held(PATIENCE);
    let opening = held.remove(0);
    drop(first);
    let second = agent.network.in_workload(connecting);
    agent.hold.release(&opening).unwrap();
    assert!(nobody_came(&agent.listeners[0]));
    assert!(second.peer_addr().is_err(), "it is not connected");
}

#[test]
fn a_group_has_one_listener() {
    let agent = Agent::start();
    let error = agent.network.in_workload(|| Hold::start(OUTBOUND, OUTBOUND)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
}

/// Two agents, of which one takes the other's place: either takes what is held, and lets it go to itself.
#[test]
fn a_hold_that_is_shared_gives_each_connection_to_one_of_the_two() {
    let agent = Agent::start();
    let family = families()[0];
    let (own, next) = agent.network.in_workload(|| {
        let arrivals = SocketAddr::new(family.loopback, OUTBOUND + 1);
        let listener = socket::listen_captured(arrivals, Peer::Application).unwrap();
        (listener, Hold::inherit(agent.hold.share().unwrap(), OUTBOUND + 1).unwrap())
    });
    let (client, opening) = agent.connecting(SocketAddr::new(family.remote, 80));
    assert_eq!(next.take().unwrap().0, [], "it is taken");
    next.release(&opening).unwrap();
    let (mut accepted, from) = accept(&own);
    assert_eq!(from, opening.from);
    assert_joined(&mut client.join().unwrap().unwrap(), &mut accepted);
    let Agent { network, hold, listeners } = agent;
    drop(hold);
    let client = thread::spawn({
        let netns = network.workload.clone();
        move || connect(&netns, family.remote, 80)
    });
    let mut poll = [nix::poll::PollFd::new(next.as_fd(), nix::poll::PollFlags::POLLIN)];
    nix::poll::poll(&mut poll, 5_000u16).unwrap();
    let opening = next.take().unwrap().0.remove(0);
    next.release(&opening).unwrap();
    let _accepted = accept(&own);
    client.join().unwrap().unwrap();
    assert!(nobody_came(&listeners[0]));
}
