use std::net::SocketAddr;

use hauberk_linux::{
    links,
    socket::{outbound_socket, transparent_socket, transparent_socket_other_port},
};

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
