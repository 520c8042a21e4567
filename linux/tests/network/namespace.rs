use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use hauberk_linux::{
    capture::{self, Before, NamespaceRules, Unroutable},
    socket::{linger_on_close, outbound_socket, reset_on_close, transparent_socket},
};

use crate::support::*;

fn captured_network() -> Network {
    let network = Network::new();
    network.in_workload(|| install(&RULES.ruleset().unwrap()));
    network
}

#[test]
fn what_leaves_is_redirected_with_its_original_destination() {
    let network = captured_network();
    for family in families() {
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        for (address, port) in [(family.remote, 80), (family.beyond, 443)] {
            let mut client = connect(&network.workload, address, port).unwrap();
            let (mut accepted, _) = accept(&agent);
            let destination = accepted.local_addr().unwrap();
            assert_eq!(destination, SocketAddr::new(address, port));
            assert_joined(&mut client, &mut accepted);
        }
    }
}

#[test]
fn the_agents_own_sockets_pass() {
    let network = captured_network();
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        let to = SocketAddr::new(family.remote, 80);
        let mut client = network.in_workload(|| connect_socket(outbound_socket(to)?, to)).unwrap();
        let (mut accepted, peer) = accept(&server);
        assert_eq!(peer.ip(), family.workload);
        assert_joined(&mut client, &mut accepted);
        assert!(nobody_came(&agent));
    }
}

#[test]
fn what_comes_in_is_redirected_and_the_mesh_port_is_not() {
    let network = captured_network();
    for family in families() {
        let application = listen(&network.workload, family.any, 8080);
        let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
        let mesh = listen_captured(&network.workload, family, MESH_LISTENER);

        let mut client = connect(&network.remote, family.workload, 8080).unwrap();
        let (mut accepted, peer) = accept(&plaintext);
        assert_eq!(peer, client.local_addr().unwrap());
        let expected = SocketAddr::new(family.workload, 8080);
        assert_eq!(accepted.local_addr().unwrap(), expected);
        assert_joined(&mut client, &mut accepted);
        assert!(nobody_came(&application));

        let mut client = connect(&network.remote, family.workload, MESH).unwrap();
        let (mut accepted, _) = accept(&mesh);
        assert_joined(&mut client, &mut accepted);
    }
}

#[test]
fn the_agents_ports_dialled_from_outside_show_as_their_own_destination() {
    let network = captured_network();
    for family in families() {
        let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
        let outbound = listen_captured(&network.workload, family, OUTBOUND);
        for port in [OUTBOUND, PLAINTEXT] {
            let _client = connect(&network.remote, family.workload, port).unwrap();
            let (accepted, _) = accept(&plaintext);
            let expected = SocketAddr::new(family.workload, port);
            assert_eq!(accepted.local_addr().unwrap(), expected);
        }
        assert!(nobody_came(&outbound));
    }
}

#[test]
fn loopback_and_the_own_address_are_left_alone() {
    let network = captured_network();
    for family in families() {
        let application = listen(&network.workload, family.any, 8080);
        for address in [family.loopback, family.workload] {
            let mut client = connect(&network.workload, address, 8080).unwrap();
            let (mut accepted, peer) = accept(&application);
            assert_eq!(peer.ip(), address);
            assert_joined(&mut client, &mut accepted);
        }
    }
}

#[test]
fn without_the_agent_everything_is_refused() {
    let network = captured_network();
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let application = listen(&network.workload, family.any, 8080);
        assert_refused(connect(&network.workload, family.remote, 80));
        assert_refused(connect(&network.remote, family.workload, 8080));
        assert!(nobody_came(&server));
        assert!(nobody_came(&application));
    }
}

#[test]
fn connections_older_than_the_rules_and_udp_are_left_alone() {
    let network = Network::new();
    let mut pairs = Vec::new();
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let client = connect(&network.workload, family.remote, 80).unwrap();
        pairs.push((client, accept(&server).0));
        let application = listen(&network.workload, family.any, 8080);
        let client = connect(&network.remote, family.workload, 8080).unwrap();
        pairs.push((client, accept(&application).0));
    }
    network.in_workload(|| install(&RULES.ruleset().unwrap()));
    for (client, server) in &mut pairs {
        assert_joined(client, server);
        assert_joined(server, client);
    }

    for family in families() {
        let server = network.in_remote(|| UdpSocket::bind((family.remote, 53)).unwrap());
        let client = network.in_workload(|| UdpSocket::bind((family.any, 0)).unwrap());
        client.send_to(b"ping", (family.remote, 53)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 8];
        let (length, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"ping"[..], family.workload));
    }
}

#[test]
fn an_attempt_that_began_before_the_rules_does_not_slip_through() {
    let network = Network::new();
    let family = families()[0];
    // The neighbour is known: an opening that waits for the answer to an ARP request has passed
    // all rules already, and would arrive with the other machine's drop rule gone.
    let known = listen(&network.remote, family.any, 81);
    connect(&network.workload, family.remote, 81).unwrap();
    drop(known);
    // Connection tracking runs and holds the attempt before our rules are there.
    network.in_workload(|| {
        // It does so only once a rule needs it.
        command(
            "nft 'table inet other { chain c { type nat hook output priority 0; \
             tcp dport 1 redirect to :2; }; }'",
        )
    });
    network.in_remote(|| {
        command(
            "nft 'table inet drops { chain c { type filter hook input priority 0; \
             tcp dport 80 tcp flags syn drop; }; }'",
        )
    });
    let server = listen(&network.remote, family.any, 80);
    let attempt = network.in_workload(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let to = SocketAddr::new(family.remote, 80);
        // Under way: answered by nobody yet.
        assert!(socket.connect(&to.into()).is_err());
        std::io::Result::Ok(socket)
    });
    network.in_workload(|| install(&RULES.ruleset().unwrap()));
    network.in_remote(|| command("nft delete table inet drops"));
    // The kernel repeats the opening after one second, then two.
    assert!(accept_within(&server, std::time::Duration::from_secs(4)).is_none());
    drop(attempt);
}

#[test]
fn rules_are_replaced_without_a_window() {
    let network = captured_network();
    let family = families()[0];
    let server = listen(&network.remote, family.any, 80);
    let agent = listen_captured(&network.workload, family, OUTBOUND);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let client = scope.spawn(|| {
            network.in_workload(|| {
                let mut attempts = 0;
                while !done.load(Ordering::Relaxed) {
                    let to = SocketAddr::new(family.remote, 80);
                    let stream = std::net::TcpStream::connect_timeout(&to, PATIENCE).unwrap();
                    // Its port is free again at once, or there would be none left before long.
                    socket2::SockRef::from(&stream)
                        .set_linger(Some(std::time::Duration::ZERO))
                        .unwrap();
                    attempts += 1;
                }
                attempts
            })
        });
        let drain = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let accepted = accept_within(&agent, std::time::Duration::from_millis(20));
                // Closed in order: a reset would be taken for a refusal.
                if let Some((stream, _)) = accepted {
                    linger_on_close(&stream).unwrap();
                }
            }
        });
        for _ in 0..200 {
            network.in_workload(|| install(&RULES.ruleset().unwrap()));
        }
        done.store(true, Ordering::Relaxed);
        assert!(client.join().unwrap() > 10);
        drain.join().unwrap();
    });
    assert!(nobody_came(&server));
}

#[test]
fn removal_leaves_nothing() {
    let network = Network::new();
    network.in_workload(|| {
        capture::remove().unwrap();
        let before = state();
        assert!(!capture::installed().unwrap());
        for _ in 0..2 {
            install(&RULES.ruleset().unwrap());
            assert!(capture::installed().unwrap());
        }
        assert_ne!(state(), before);
        for _ in 0..2 {
            capture::remove().unwrap();
            assert_eq!(state(), before);
            assert!(!capture::installed().unwrap());
        }
    });
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let mut client = connect(&network.workload, family.remote, 80).unwrap();
        assert_joined(&mut client, &mut accept(&server).0);
    }
}

#[test]
fn a_namespace_without_ipv6_is_captured_too() {
    let network = Network::new();
    network.in_workload(|| {
        hauberk_linux::links::sysctl("ipv6/conf/all/disable_ipv6", "1").unwrap();
        install(&RULES.ruleset().unwrap());
        assert_eq!(RULES.ruleset().unwrap().drift().unwrap(), []);
        capture::remove().unwrap();
    });
}

/// As in one that is being made or taken down: nothing gets anywhere, and nothing is wrong with the rules.
#[test]
fn a_namespace_without_loopback_is_closed_until_it_has_one() {
    let network = Network::new();
    let rules = RULES.ruleset().unwrap();
    network.in_workload(|| {
        command("ip link set lo down");
        install(&rules);
        assert_eq!(rules.drift().unwrap(), []);
    });
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        assert!(connect(&network.workload, family.remote, 80).is_err());
        assert!(nobody_came(&server));
    }
    network.in_workload(|| {
        command("ip link set lo up");
        assert_ne!(rules.drift().unwrap(), []);
        install(&rules);
        assert_eq!(rules.drift().unwrap(), []);
    });
    for family in families() {
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        let mut client = connect(&network.workload, family.remote, 80).unwrap();
        assert_joined(&mut client, &mut accept(&agent).0);
    }
}

/// For an agent that counts them, and closes those on which nobody waits for an answer.
#[test]
fn open_connections_that_are_older_are_told_with_their_direction_and_rest() {
    let network = Network::new();
    let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        let client = connect(&network.workload, family.remote, 80).unwrap();
        outgoing.push((client, accept(&server).0));
        if let IpAddr::V4(remote) = family.remote {
            // An IPv6 socket's connection of IPv4.
            let client = connect(&network.workload, remote.to_ipv6_mapped().into(), 80).unwrap();
            outgoing.push((client, accept(&server).0));
        }
        let application = listen(&network.workload, family.any, 8080);
        let client = connect(&network.remote, family.workload, 8080).unwrap();
        incoming.push((client, accept(&application).0, application));
    }
    let told = || network.in_workload(|| capture::open_older().unwrap());
    assert!(told().is_none(), "without rules nothing is older than them");
    let rules = RULES.ruleset().unwrap();
    network.in_workload(|| install(&rules));
    let incoming_ends = incoming.iter_mut().map(|(client, server, _)| (client, server));
    let outgoing_ends = outgoing.iter_mut().map(|(client, server)| (client, server));
    for (client, server) in outgoing_ends.chain(incoming_ends) {
        client.write_all(b"ask").unwrap();
        server.read_exact(&mut [0; 3]).unwrap();
        // For longer than a tick of the kernel's clock.
        thread::sleep(Duration::from_millis(15));
        server.write_all(b"say").unwrap();
        client.read_exact(&mut [0; 3]).unwrap();
    }
    let all = told().unwrap();
    let directions: Vec<_> = all.iter().map(|one| one.incoming).collect();
    assert_eq!(directions.iter().filter(|incoming| **incoming).count(), incoming.len());
    assert_eq!(all.len(), outgoing.len() + incoming.len());
    thread::sleep(Duration::from_millis(50));
    let is_idle =
        |one: &capture::OpenOlder| one.idle().is_some_and(|idle| idle >= Duration::from_millis(40));
    assert!(told().unwrap().iter().all(is_idle), "all have been answered");
    outgoing[0].0.write_all(b"asked").unwrap();
    incoming[0].0.write_all(b"asked").unwrap();
    thread::sleep(Duration::from_millis(50));
    let waiting: Vec<_> = told().unwrap().into_iter().filter(|one| !is_idle(one)).collect();
    let waiting: Vec<_> = waiting.iter().map(|one| (one.incoming, one.socket.local)).collect();
    let of = |incoming| waiting.iter().filter(|one| one.0 == incoming).count();
    assert_eq!((of(false), of(true)), (1, 1), "two wait for an answer: {waiting:?}");
    // One that an application has closed is on its way out, and nobody's any more; the rules leave it alone until its end.
    drop((outgoing, incoming));
    assert_eq!(told().unwrap().len(), 0);
    network.in_workload(|| command("nft delete table inet hauberk"));
    assert!(told().is_none(), "nobody knows of any");
}

/// The kernel still has the rest of an answer to send: the rules have to leave that alone, and it is nobody's to close.
#[test]
fn an_older_connection_that_drains_is_neither_open_nor_over() {
    let network = Network::new();
    let family = families()[0];
    let application = listen(&network.workload, family.any, 8080);
    let mut client = connect(&network.remote, family.workload, 8080).unwrap();
    let (mut served, _) = accept(&application);
    network.in_workload(|| install(&RULES.ruleset().unwrap()));
    served.set_nonblocking(true).unwrap();
    let mut written = 0;
    while let Ok(length) = served.write(&[1; 65_536]) {
        written += length;
    }
    assert!(written > 100_000, "only {written} bytes wait");
    drop(served);
    let state = || {
        network.in_workload(|| {
            let open = capture::open_older().unwrap().unwrap().len();
            (open, capture::closed_older().unwrap().len())
        })
    };
    assert_eq!(state(), (0, 0));
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), written);
    drop(client);
    let began = std::time::Instant::now();
    while state() != (0, 1) {
        assert!(began.elapsed() < PATIENCE, "{:?}", state());
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn older_connections_are_known_to_the_kernel_and_forgotten_when_they_end() {
    let network = Network::new();
    let family = families()[0];
    let server = listen(&network.remote, family.any, 80);
    let mut older = connect(&network.workload, family.remote, 80).unwrap();
    let (mut accepted, _) = accept(&server);
    let rules = RULES.ruleset().unwrap();
    let installed = network.in_workload(|| install(&rules));
    assert_eq!(installed.older.len(), 1);
    assert_eq!(installed.older[0].remote, SocketAddr::new(family.remote, 80));
    assert_eq!(network.in_workload(|| capture::older().unwrap()), installed.older);
    // Another agent finds it there, and does not take what was opened since for one.
    network.in_workload(|| {
        command("nft insert rule inet hauberk output accept");
        let again = install(&rules);
        assert_eq!(again.older, installed.older);
        assert!(again.cut.is_empty());
    });
    assert_joined(&mut older, &mut accepted);
    drop((older, accepted));
    network.in_workload(|| {
        command("nft insert rule inet hauberk output accept");
        assert!(install(&rules).older.is_empty());
    });
}

/// Both are opened before the rules, and are open only after them: the other end's last word is late.
#[test]
fn connections_that_are_half_open_are_left_alone_too() {
    let network = Network::new();
    let [family, _] = families();
    let application = listen(&network.workload, family.any, 8080);
    let server = listen(&network.remote, family.any, 80);
    // Known to each other: nobody asks for an address from here on.
    assert_joined(
        &mut connect(&network.remote, family.workload, 8080).unwrap(),
        &mut accept(&application).0,
    );
    network.in_remote(|| {
        command(
            "nft 'table inet late { chain output { type filter hook output priority 0; \
             tcp flags & (syn|ack) == ack drop; }; }'",
        )
    });
    let mut incoming = connect(&network.remote, family.workload, 8080).unwrap();
    assert!(nobody_came(&application));
    // An answer waits for the address of whom it is for, and no longer.
    let hardware = || command("ip -o link show eth0 | sed 's/.*ether \\([^ ]*\\).*/\\1/'");
    let (address, gateway) = (network.in_workload(hardware), network.in_remote(hardware));
    network.in_workload(|| {
        command(&format!("ip neigh replace {} lladdr {} dev eth0", family.remote, gateway.trim()));
        hauberk_linux::links::sysctl("ipv4/conf/eth0/arp_ignore", "8").unwrap();
    });
    network.in_remote(|| command("ip neigh flush dev eth0"));
    let to = SocketAddr::new(family.remote, 80);
    let opening = network.in_workload(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let begun = socket.connect(&to.into()).map_err(|error| error.raw_os_error());
        assert_eq!(begun, Err(Some(nix::libc::EINPROGRESS)));
        std::io::Result::Ok(socket)
    });
    let opening = opening.unwrap();
    let began = std::time::Instant::now();
    let rules = RULES.ruleset().unwrap();
    network.in_workload(|| install(&rules));
    network.in_remote(|| {
        command("nft delete table inet late");
        command(&format!("ip neigh replace {} lladdr {} dev eth0", family.workload, address.trim()))
    });
    let took = began.elapsed();
    assert!(
        took < Duration::from_millis(900),
        "its first packet is sent again after a second: {took:?}"
    );
    let (mut served, _) = accept(&server);
    opening.set_nonblocking(false).unwrap();
    let mut outgoing = TcpStream::from(opening);
    outgoing.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_joined(&mut outgoing, &mut served);
    incoming.write_all(b"ask").unwrap();
    let (mut accepted, _) = accept(&application);
    accepted.read_exact(&mut [0; 3]).unwrap();
    assert_joined(&mut incoming, &mut accepted);
}

/// Its caller has the port of a connection that was there before the rules, and is over.
#[test]
fn what_the_agent_opens_to_an_application_is_no_older_connection() {
    let network = Network::new();
    let mut older = Vec::new();
    for family in families() {
        let application = listen(&network.workload, family.any, 8080);
        let client = connect(&network.remote, family.workload, 8080).unwrap();
        let (served, peer) = accept(&application);
        older.push((family, application, client, served, peer));
    }
    network.in_workload(|| install(&RULES.ruleset().unwrap()));
    for (family, application, client, served, caller) in older {
        reset_on_close(&client).unwrap();
        drop(client);
        drop(served);
        let to = SocketAddr::new(family.workload, 8080);
        let dialled =
            network.in_workload(|| connect_socket(transparent_socket(caller)?, to)).unwrap();
        let (mut served, peer) = accept(&application);
        assert_eq!(peer, caller);
        assert_joined(&mut { dialled }, &mut served);
    }
}

/// What was opened while the rules were missing is ended, and told.
#[test]
fn what_was_opened_without_the_rules_is_cut() {
    let network = Network::new();
    let rules = RULES.ruleset().unwrap();
    let family = families()[0];
    let server = listen(&network.remote, family.any, 80);
    network.in_workload(|| install(&rules));
    network.in_workload(capture::remove).unwrap();
    let mut intruder = connect(&network.workload, family.remote, 80).unwrap();
    let (mut accepted, _) = accept(&server);
    assert_joined(&mut intruder, &mut accepted);
    let installed = network.in_workload(|| rules.install(&Before::Known(&rules, &[])).unwrap());
    let cut: Vec<_> = installed.cut.iter().map(|socket| socket.remote).collect();
    assert_eq!(cut, [SocketAddr::new(family.remote, 80)]);
    let error = std::io::Read::read(&mut intruder, &mut [0]).expect_err("it goes on");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionAborted);
}

/// A workload that leaves the mesh: what the agent carries lives, and nobody who comes after has to do with it.
#[test]
fn what_is_captured_lives_while_it_is_let_go_and_what_is_new_is_left_alone() {
    let network = captured_network();
    let captured = RULES.ruleset().unwrap();
    let rules = NamespaceRules { letting_go: true, unroutable: Unroutable::Pass, ..RULES };
    let rules = rules.ruleset().unwrap();
    let mut living = Vec::new();
    for family in families() {
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        let outgoing = connect(&network.workload, family.remote, 80).unwrap();
        living.push((outgoing, accept(&agent).0));
        let mesh = listen_captured(&network.workload, family, MESH_LISTENER);
        let incoming = connect(&network.remote, family.workload, MESH).unwrap();
        living.push((incoming, accept(&mesh).0));
    }
    let installed =
        network.in_workload(|| rules.install(&Before::Known(&captured, &[])).unwrap().whole());
    assert!(installed.unwrap().older.is_empty());
    assert!(network.in_workload(|| rules.drift().unwrap()).is_empty());
    let mut new = Vec::new();
    for family in families() {
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        let plaintext = listen_captured(&network.workload, family, PLAINTEXT);
        let mesh = listen_captured(&network.workload, family, MESH_LISTENER);
        let server = listen(&network.remote, family.any, 80);
        let application = listen(&network.workload, family.any, 8080);
        for (from, to, listener) in [
            (&network.workload, (family.remote, 80), &server),
            (&network.remote, (family.workload, 8080), &application),
        ] {
            let mut client = connect(from, to.0, to.1).unwrap();
            let (mut accepted, peer) = accept(listener);
            assert_eq!(peer, client.local_addr().unwrap());
            assert_joined(&mut client, &mut accepted);
            new.push((client, accepted));
        }
        // Another agent learns that nobody of the mesh is here.
        assert_refused(connect(&network.remote, family.workload, MESH));
        assert!([agent, plaintext, mesh].iter().all(|listener| nobody_came(listener)));
    }
    for (client, server) in living.iter_mut().chain(&mut new) {
        assert_joined(client, server);
    }
    assert!(network.in_workload(|| capture::captured_are_open().unwrap()));
    // What was left alone goes on when it is captured anew, and when the rules are gone.
    network.in_workload(|| captured.install(&Before::Known(&rules, &[])).unwrap());
    network.in_workload(|| rules.install(&Before::Known(&captured, &[])).unwrap());
    for (client, server) in living.iter_mut().chain(&mut new) {
        assert_joined(client, server);
    }
    drop(living);
    assert!(!network.in_workload(|| capture::captured_are_open().unwrap()));
    network.in_workload(capture::remove).unwrap();
    for (client, server) in &mut new {
        assert_joined(client, server);
    }
}

/// Ports are used again long before the kernel has forgotten who had them.
#[test]
fn what_has_the_ends_of_a_captured_connection_that_is_over_is_none() {
    let network = captured_network();
    let captured = RULES.ruleset().unwrap();
    let rules = NamespaceRules { letting_go: true, unroutable: Unroutable::Pass, ..RULES };
    let rules = rules.ruleset().unwrap();
    for family in families() {
        let agent = listen_captured(&network.workload, family, OUTBOUND);
        let client = connect(&network.workload, family.remote, 80).unwrap();
        let (accepted, _) = accept(&agent);
        assert!(network.in_workload(|| capture::captured_are_open().unwrap()));
        let from = client.local_addr().unwrap();
        // The agent's end waits for what may be late.
        linger_on_close(&accepted).unwrap();
        drop(accepted);
        drop(client);
        network.in_workload(|| rules.install(&Before::Known(&captured, &[])).unwrap());
        let server = listen(&network.remote, family.any, 80);
        let to = SocketAddr::new(family.remote, 80);
        let again = || {
            let socket = socket2::Socket::new(
                socket2::Domain::for_address(to),
                socket2::Type::STREAM,
                None,
            )?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
            connect_socket(socket, to)
        };
        let mut client = network.in_workload(again).unwrap();
        let (mut accepted, peer) = accept(&server);
        assert_eq!(peer, from);
        assert_joined(&mut client, &mut accepted);
        assert!(!network.in_workload(|| capture::captured_are_open().unwrap()));
        network.in_workload(|| capture::remove().unwrap());
        assert_joined(&mut client, &mut accepted);
        network.in_workload(|| install(&captured));
    }
}

/// There is room for so many only.
#[test]
fn those_that_were_left_alone_are_forgotten_once_they_are_closed() {
    let network = Network::new();
    let rules = NamespaceRules { letting_go: true, unroutable: Unroutable::Pass, ..RULES };
    network.in_workload(|| install(&rules.ruleset().unwrap()));
    let mut staying = Vec::new();
    for family in families() {
        let server = listen(&network.remote, family.any, 80);
        for stays in [true, false] {
            let client = connect(&network.workload, family.remote, 80).unwrap();
            let (accepted, _) = accept(&server);
            if stays {
                staying.push((client, accepted));
            } else {
                // With nothing left of it at either end.
                reset_on_close(&client).unwrap();
                drop((client, accepted));
            }
        }
    }
    network.in_workload(|| {
        assert_eq!(capture::older().unwrap().len(), 4);
        let closed = capture::closed_older().unwrap();
        assert_eq!(closed.len(), 2, "{closed:?}");
        capture::forget_older(&closed).unwrap();
        // A second time, as if rules had done it meanwhile.
        capture::forget_older(&closed).unwrap();
        assert_eq!(capture::older().unwrap().len(), 2);
    });
    for (client, server) in &mut staying {
        assert_joined(client, server);
    }
}

#[test]
fn equal_or_zero_ports_are_refused() {
    for (outbound_port, plaintext_port, mesh_port) in [(1, 1, 2), (1, 2, 1), (2, 1, 1), (0, 1, 2)] {
        let rules = NamespaceRules {
            outbound_port: Some(outbound_port),
            plaintext_port: Some(plaintext_port),
            mesh_port,
            ..RULES
        };
        assert!(rules.ruleset().is_err(), "{rules:?}");
    }
}
