use std::{
    io::{ErrorKind, IoSliceMut, Read, Write},
    net::SocketAddr,
};

use hauberk_linux::{
    links,
    socket::{
        Received, outbound_socket, receive, transparent_socket, transparent_socket_other_port,
    },
};

use socket2::SockRef;

use crate::support::*;

fn captured_network() -> Network {
    let network = Network::new();
    network.in_workload(|| {
        // As strict as a distribution may have it.
        for interface in ["all", "default", "eth0", "lo"] {
            let path = format!("ipv4/conf/{interface}/rp_filter");
            links::sysctl(&path, "1").unwrap();
        }
        install(&RULES.ruleset().unwrap());
    });
    network
}

#[test]
fn the_application_sees_the_clients_address_and_both_directions_work() {
    let network = captured_network();
    for family in families() {
        let application = listen(&network.workload, family.any, 8080);
        let server = listen(&network.remote, family.any, 80);
        let to_application = SocketAddr::new(family.workload, 8080);
        let to_server = SocketAddr::new(family.remote, 80);
        // Both a client that exists on the link and one that is only routed.
        for address in [family.beyond, family.remote] {
            let source = SocketAddr::new(address, 45678);
            let mut inbound = network
                .in_workload(|| connect_socket(transparent_socket(source)?, to_application))
                .unwrap();
            let (mut accepted, peer) = accept(&application);
            assert_eq!(peer, source);
            assert_joined(&mut inbound, &mut accepted);

            // The agent's ordinary connections leave as ever, also to the very same client.
            let mut outbound = network
                .in_workload(|| connect_socket(outbound_socket(to_server)?, to_server))
                .unwrap();
            let (mut remote, _) = accept(&server);
            assert_joined(&mut outbound, &mut remote);
            assert_joined(&mut accepted, &mut inbound);
        }
    }
}

/// A read that gets less than it has room for is not always the last that there is.
#[test]
fn a_read_says_whether_there_is_more() {
    let network = captured_network();
    let [family, _] = families();
    let application = listen(&network.workload, family.any, 8080);
    let dialled = network
        .in_workload(|| {
            let source = SocketAddr::new(family.remote, 45678);
            connect_socket(transparent_socket(source)?, SocketAddr::new(family.workload, 8080))
        })
        .unwrap();
    let (peer, _) = accept(&application);
    let socket = SockRef::from(&peer);
    // In one packet: they are all there before the first is read.
    socket.set_tcp_cork(true).unwrap();
    (&peer).write_all(b"before").unwrap();
    assert_eq!(socket.send_out_of_band(b"!").unwrap(), 1);
    (&peer).write_all(b"after").unwrap();
    socket.set_tcp_cork(false).unwrap();
    let mut bytes = Vec::new();
    let mut ends = Vec::new();
    let mut one = [0; 1];
    // The peer's data are waited for: what is looked at is the read after it.
    dialled.set_nonblocking(false).unwrap();
    dialled.set_read_timeout(Some(PATIENCE)).unwrap();
    dialled.peek(&mut one).unwrap();
    while ends.last() != Some(&true) {
        let mut room = [0; 64];
        let received = receive(&dialled, &mut [IoSliceMut::new(&mut room)]).unwrap();
        assert!(received.bytes > 0, "an end that was not sent");
        bytes.extend_from_slice(&room[..received.bytes]);
        ends.push(received.is_all);
    }
    assert_eq!(bytes, b"before!after");
    assert_eq!(ends.iter().filter(|is_all| !**is_all).count() + 1, ends.len());
    assert!(ends.len() > 1, "one read got all of it: the kernel does not stop any more");
    let nothing = receive(&dialled, &mut [IoSliceMut::new(&mut [0; 64])]);
    assert_eq!(nothing.unwrap_err().kind(), ErrorKind::WouldBlock);

    (&peer).write_all(b"last").unwrap();
    drop(peer);
    dialled.peek(&mut one).unwrap();
    let last = receive(&dialled, &mut [IoSliceMut::new(&mut [0; 64])]).unwrap();
    assert_eq!(last.bytes, 4);
    assert_eq!((&dialled).read(&mut one).unwrap(), 0);
    let end = receive(&dialled, &mut [IoSliceMut::new(&mut [0; 64])]).unwrap();
    assert_eq!(end, Received { bytes: 0, is_all: false });
}

#[test]
fn an_application_that_does_not_listen_refuses() {
    let network = captured_network();
    for family in families() {
        let source = SocketAddr::new(family.beyond, 45678);
        let to = SocketAddr::new(family.workload, 8081);
        assert_refused(network.in_workload(|| connect_socket(transparent_socket(source)?, to)));
    }
}

#[test]
fn a_source_port_that_is_taken_is_given_up() {
    let network = captured_network();
    for family in families() {
        let taken = listen(&network.workload, family.workload, 4000);
        let application = listen(&network.workload, family.any, 8080);
        let source = taken.local_addr().unwrap();
        let to = SocketAddr::new(family.workload, 8080);
        let _inbound =
            network.in_workload(|| connect_socket(transparent_socket(source)?, to)).unwrap();
        let (_, peer) = accept(&application);
        assert_eq!(peer.ip(), source.ip());
        assert_ne!(peer.port(), source.port());
    }
}

#[test]
fn one_client_port_serves_several_application_ports() {
    let network = captured_network();
    for family in families() {
        let source = SocketAddr::new(family.beyond, 45678);
        let mut open = Vec::new();
        for port in [8080, 8081] {
            let application = listen(&network.workload, family.any, port);
            let to = SocketAddr::new(family.workload, port);
            let mut inbound =
                network.in_workload(|| connect_socket(transparent_socket(source)?, to)).unwrap();
            let (mut accepted, peer) = accept(&application);
            assert_eq!(peer, source);
            assert_joined(&mut inbound, &mut accepted);
            open.push((inbound, accepted));
        }
    }
}

#[test]
fn redirected_plaintext_is_passed_on_with_the_address_and_another_port() {
    let network = captured_network();
    for family in families() {
        let application = listen(&network.workload, family.any, 8080);
        let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
        let mut client = connect(&network.remote, family.workload, 8080).unwrap();
        let (mut accepted, source) = accept(&plaintext);
        let to = SocketAddr::new(family.workload, 8080);
        let mut inbound = network
            .in_workload(|| connect_socket(transparent_socket_other_port(source)?, to))
            .unwrap();
        let (mut served, peer) = accept(&application);
        assert_eq!(peer.ip(), source.ip());
        assert_ne!(peer.port(), source.port());
        assert_joined(&mut inbound, &mut served);
        assert_joined(&mut client, &mut accepted);
    }
}
