//! The second line: whose it is, and what of the network around it is news.

use std::time::Instant;

use hauberk_linux::capture::{self, Monitor};

use crate::support::*;

#[test]
fn what_is_installed_has_an_owner_also_when_nftables_is_flushed() {
    let network = Network::new();
    let rules = RULES.ruleset().unwrap();
    network.in_workload(|| {
        let owners = |names: [&str; 3]| names.map(|name| capture::is_owned_by(name).unwrap());
        let names = ["shop-01", "shop-02", ""];
        assert_eq!(owners(names), [false; 3], "nothing is installed");
        install(&rules.clone().owned_by("shop-01"));
        assert_eq!(owners(names), [true, false, false]);
        command("nft flush ruleset");
        assert!(capture::anything_installed().unwrap());
        assert_eq!(owners(names), [true, false, false], "flushed");
        // The machine has become another node.
        let other = rules.clone().owned_by("shop-02");
        install(&other);
        assert_eq!(other.drift().unwrap(), []);
        command("nft flush ruleset");
        assert_eq!(owners(names), [false, true, false], "another node's");
        capture::remove().unwrap();
        assert_eq!(owners(names), [false; 3], "removed");
    });
}

/// Once the network has come to rest: the kernel tells of a new link a moment later that it is up.
fn listen_for_news() -> Monitor {
    let deadline = Instant::now() + PATIENCE;
    while !command("ip -o link show eth0").contains("state UP") {
        assert!(Instant::now() < deadline, "eth0 does not come up");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let monitor = Monitor::start().unwrap();
    monitor.drain().unwrap();
    monitor
}

/// Tens of thousands, as on a router.
fn add_routes(command_line: &str, networks: impl Iterator<Item = String>) {
    let lines: String = networks.map(|network| format!("route add {network}\n")).collect();
    let file = std::env::temp_dir().join(format!("hauberk-routes-{}", std::process::id()));
    std::fs::write(&file, lines).unwrap();
    command(&format!("{command_line} {}", file.display()));
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn a_routers_routes_are_no_news() {
    const ROUTES: u32 = 30_000;
    let network = Network::new();
    let rules = RULES.ruleset().unwrap().owned_by("router");
    network.in_workload(|| {
        install(&rules);
        let monitor = listen_for_news();
        let address = |number: u32| std::net::Ipv4Addr::from(0x1600_0000 + number);
        let v4 = (0..ROUTES).map(|number| format!("{}/32 via 10.9.0.1", address(number)));
        add_routes("ip -batch", v4);
        let v6 = (0..ROUTES / 10).map(|number| format!("2a00:{number:x}::/32 via fd00:9::1"));
        add_routes("ip -6 -batch", v6);
        command("ip route del 22.0.0.1; ip route add 128.0.0.0/2 via 10.9.0.1");
        assert!(!monitor.drain().unwrap(), "routes of others are news");
        let started = Instant::now();
        assert_eq!(rules.drift().unwrap(), []);
        println!("a look takes {:?}", started.elapsed());
    });
}

#[test]
fn what_concerns_the_rules_is_news() {
    let network = Network::new();
    network.in_workload(|| {
        install(&RULES.ruleset().unwrap());
        let monitor = listen_for_news();
        for (change, is_news) in [
            ("ip route add 198.51.100.0/24 via 10.9.0.1", false),
            ("ip route add 198.51.100.0/24 via 10.9.0.1 table 1000", false),
            ("ip -6 route add 2a00::/16 via fd00:9::1", false),
            ("ip route del 198.51.100.0/24", false),
            // Our own table.
            ("ip route add 198.51.100.0/24 via 10.9.0.1 table 18502", true),
            ("ip route flush table 18502", true),
            ("ip -6 route flush table 18502", true),
            // The ways to elsewhere, by which source addresses are chosen.
            ("ip route replace default via 10.9.0.1 metric 5", true),
            ("ip route add 128.0.0.0/1 via 10.9.0.1", true),
            ("ip route add blackhole 192.0.2.0/24", true),
            ("ip route add 192.0.2.1 via 10.9.0.1", true),
            ("ip route add 192.0.2.2 via 10.9.0.1", false),
            ("ip -6 route del default", true),
            ("ip -6 route add 2000::/3 via fd00:9::1", true),
            ("ip -6 route add 2001:db8::/48 via fd00:9::1", true),
            // Everything else.
            ("ip rule add priority 5 from 198.51.100.7 lookup main", true),
            ("ip -6 rule del ipproto tcp table 18502", true),
            ("nft delete table inet hauberk", true),
            ("nft add table inet other", false),
            ("ip address add 10.9.0.7/24 dev eth0", true),
            ("ip link add br0 type bridge", true),
        ] {
            command(change);
            assert_eq!(monitor.drain().unwrap(), is_news, "{change}");
        }
    });
}
