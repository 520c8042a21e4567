use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr},
};

use hauberk_linux::{
    Netns,
    capture::{self, Drift, HostRules, HostWorkload, ProcessMatch, Unroutable},
    links,
    socket::published_socket,
};

use crate::support::*;

const WEB: u16 = 8080;
const CONTAINER: &str = "10.8.0.2";

fn rules() -> HostRules {
    HostRules {
        mesh_port: MESH,
        mesh_listener: Some(MESH_LISTENER),
        plaintext_port: Some(PLAINTEXT),
        workloads: vec![HostWorkload {
            name: "web".to_owned(),
            process: Some(ProcessMatch::User(61_001)),
            outbound_port: Some(OUTBOUND),
            service_ports: vec![WEB],
            unroutable: Unroutable::Refuse,
        }],
    }
}

/// Another program's translation of a port, in all that comes in and goes out.
fn translate(to: &str) {
    for chain in ["prerouting", "output"] {
        command(&format!(
            "nft add table ip other && \
             nft 'add chain ip other {chain} {{ type nat hook {chain} priority -100; }}' && \
             nft 'add rule ip other {chain} tcp dport {WEB} fib daddr type local dnat to {to}'"
        ));
    }
}

/// A network with a container behind a bridge, in which web is captured.
fn with_container() -> (Network, Netns) {
    let network = Network::new();
    let container = add_container(&network);
    network.in_workload(|| install(&rules().ruleset().unwrap()));
    (network, container)
}

fn add_container(network: &Network) -> Netns {
    let container = Netns::create().unwrap();
    network.in_workload(|| {
        links::create_bridge("inner").unwrap();
        links::create_veth("port", "eth0", &container).unwrap();
        links::attach("port", "inner").unwrap();
        links::add_address("inner", "10.8.0.1".parse().unwrap(), 24).unwrap();
        links::set_up("port").unwrap();
        links::set_up("inner").unwrap();
    });
    let inside = || {
        links::add_address("eth0", CONTAINER.parse().unwrap(), 24).unwrap();
        links::set_up("eth0").unwrap();
        links::add_default_route("10.8.0.1".parse().unwrap()).unwrap();
    };
    container.run(inside).unwrap();
    container
}

fn follow(network: &Network) -> std::io::Result<std::net::TcpStream> {
    let to = SocketAddr::new(families()[0].workload, WEB);
    network.in_workload(|| connect_socket(published_socket(to)?, to))
}

#[test]
fn the_rules_translate_only_beside_other_translation() {
    let network = Network::new();
    let rules = rules().ruleset().unwrap();
    let translating = || command("nft list ruleset").matches("type nat").count();
    network.in_workload(|| {
        install(&rules);
        assert_eq!((rules.drift().unwrap(), translating()), (vec![], 0));
        assert!(!capture::is_translated().unwrap());
        translate(&format!("{CONTAINER}:80"));
        assert!(capture::is_translated().unwrap());
        let drift = rules.drift().unwrap();
        assert_eq!(drift, [Drift::TranslationOutdated]);
        assert!(drift[0].is_of_the_network());
        rules.fit_to_network().unwrap();
        assert_eq!((rules.drift().unwrap(), translating()), (vec![], 4));
        // Also when they are put in place anew.
        install(&rules);
        assert_eq!((rules.drift().unwrap(), translating()), (vec![], 4));
        command("nft delete table ip other");
        assert_eq!(rules.drift().unwrap(), [Drift::TranslationOutdated]);
        rules.fit_to_network().unwrap();
        assert_eq!((rules.drift().unwrap(), translating()), (vec![], 0));
    });
}

#[test]
fn what_is_captured_stays_so_beside_other_translation() {
    let (network, container) = with_container();
    let server = listen(&container, "0.0.0.0".parse().unwrap(), 80);
    let family = families()[0];
    network.in_workload(|| {
        translate(&format!("{CONTAINER}:80"));
        rules().ruleset().unwrap().fit_to_network().unwrap();
    });
    let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
    for netns in [&network.remote, &network.workload] {
        let _client = connect(netns, family.workload, WEB).unwrap();
        let (accepted, _) = accept(&plaintext);
        assert_eq!(accepted.local_addr().unwrap(), SocketAddr::new(family.workload, WEB));
    }
    // What the agent sends to an application here is no business of that translation either.
    let service = listen(&network.workload, family.any, WEB);
    let source = SocketAddr::new(family.beyond, 45678);
    let to = SocketAddr::new(family.workload, WEB);
    let dialled = || connect_socket(hauberk_linux::socket::transparent_socket(source)?, to);
    let mut inbound = network.in_workload(dialled).unwrap();
    assert_joined(&mut inbound, &mut accept(&service).0);
    assert!(nobody_came(&server));
}

/// Its caller is not served in clear any more, and neither does the container go on sending.
#[test]
fn what_was_led_to_a_container_before_the_rules_ends_at_both_sides() {
    let network = Network::new();
    let container = add_container(&network);
    network.in_workload(|| {
        links::sysctl("ipv4/ip_forward", "1").unwrap();
        translate(&format!("{CONTAINER}:80"));
    });
    let server = listen(&container, "0.0.0.0".parse().unwrap(), 80);
    let mut client = connect(&network.remote, families()[0].workload, WEB).unwrap();
    let (mut served, _) = accept(&server);
    assert_joined(&mut client, &mut served);
    network.in_workload(|| install(&rules().ruleset().unwrap()));
    served.write_all(b"in clear").unwrap();
    let error = served.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    client.set_read_timeout(Some(std::time::Duration::from_millis(200))).unwrap();
    assert!(client.read(&mut [0]).is_err(), "the client was answered");
    client.write_all(b"hello").unwrap();
    let error = client.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn the_agent_is_led_to_a_container_and_nowhere_else() {
    let (network, container) = with_container();
    let server = listen(&container, "0.0.0.0".parse().unwrap(), 80);
    let here = listen(&network.workload, families()[0].any, WEB);
    let fit = || rules().ruleset().unwrap().fit_to_network().unwrap();
    // Nothing leads it anywhere.
    assert_refused(follow(&network));
    network.in_workload(|| {
        translate(&format!("{CONTAINER}:80"));
        fit();
    });
    let mut client = follow(&network).unwrap();
    let (mut accepted, peer) = accept(&server);
    assert_eq!(peer.ip(), families()[0].workload);
    assert_joined(&mut client, &mut accepted);
    drop((client, accepted));
    // A bridge that is joined to a network, or behind which there is a router, leads off the machine.
    network.in_workload(|| {
        command(
            "ip link add outer type vxlan id 5 dstport 4789 local 10.9.0.2 && \
             ip link set outer master inner",
        );
        fit();
    });
    follow(&network).unwrap_err();
    network.in_workload(|| {
        command("ip link del outer");
        links::add_route("192.0.2.0".parse().unwrap(), 24, CONTAINER.parse().unwrap()).unwrap();
        fit();
    });
    follow(&network).unwrap_err();
    network.in_workload(|| {
        command("ip route del 192.0.2.0/24");
        fit();
    });
    follow(&network).unwrap();
    accept(&server);
    // Another machine.
    let remote: IpAddr = families()[0].remote;
    let elsewhere = listen(&network.remote, families()[0].any, 80);
    network.in_workload(|| {
        command("nft delete table ip other");
        translate(&format!("{remote}:80"));
        fit();
    });
    follow(&network).unwrap_err();
    assert!(nobody_came(&elsewhere) && nobody_came(&server) && nobody_came(&here));
}

/// One end of a pair whose other end is here, too, may lead on to anywhere.
#[test]
fn a_bridge_with_a_pair_into_this_very_namespace_leads_to_no_container() {
    let (network, _container) = with_container();
    let rules = rules().ruleset().unwrap();
    let leads = || {
        rules.fit_to_network().unwrap();
        command("nft list chain inet hauberk published").contains("oif \"inner\"")
    };
    network.in_workload(|| {
        translate(CONTAINER);
        assert!(leads(), "a bridge with containers only");
        command("ip link add here type veth peer name there && ip link set here master inner");
        assert!(!leads(), "a bridge that leads elsewhere");
        command("ip link del here");
        assert!(leads());
    });
}
