use hauberk_linux::capture::{
    self, Drift, HostRules, HostWorkload, NamespaceRules, ProcessMatch, Unroutable,
};

use crate::support::*;

#[test]
fn every_alteration_is_told_and_repaired_by_installing_again() {
    let chain = |name: &str| name.to_owned();
    let cases = [
        ("nft delete table inet hauberk", Drift::TableMissing),
        ("nft 'add table inet hauberk { flags dormant; }'", Drift::TableDormant),
        ("nft flush chain inet hauberk output", Drift::RulesAltered(chain("output"))),
        (
            "nft insert rule inet hauberk output tcp dport 22 accept",
            Drift::RulesAltered(chain("output")),
        ),
        ("nft add rule inet hauberk leaving accept", Drift::RulesAltered(chain("leaving"))),
        ("nft insert rule inet hauberk undecided drop", Drift::RulesAltered(chain("undecided"))),
        (
            "h=$(nft -a list chain inet hauberk prerouting | grep -m1 15006 | sed 's/.*handle //') && \
             nft replace rule inet hauberk prerouting handle $h \
             'meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:15007 accept'",
            Drift::RulesAltered(chain("prerouting")),
        ),
        ("nft add chain inet hauberk extra", Drift::ChainUnknown(chain("extra"))),
        (
            "nft 'flush chain inet hauberk leaving; delete chain inet hauberk leaving'",
            Drift::ChainMissing(chain("leaving")),
        ),
        (
            "nft 'chain inet hauberk leaving { policy drop; }'",
            Drift::ChainAltered(chain("leaving")),
        ),
        ("ip -6 rule del fwmark 0x4843 table 18502", Drift::PolicyRoutingMissing),
        ("ip rule del ipproto tcp table 18502", Drift::PolicyRoutingMissing),
        ("ip route flush table 18502", Drift::RoutesOutdated),
        ("sysctl -qw net.ipv4.conf.eth0.src_valid_mark=0", Drift::SettingChanged("src_valid_mark")),
        ("ip rule add priority 1 prohibit", Drift::PolicyRoutingMissing),
    ];
    let network = Network::new();
    network.in_workload(|| {
        let ruleset = RULES.ruleset().unwrap();
        for (alteration, expected) in cases {
            install(&ruleset);
            assert_eq!(ruleset.drift().unwrap(), [], "before {alteration}");
            command(alteration);
            assert_eq!(ruleset.drift().unwrap(), [expected], "after {alteration}");
        }
        command("ip rule del priority 1");
        install(&ruleset);
        assert_eq!(ruleset.drift().unwrap(), []);
        capture::remove().unwrap();
    });
}

#[test]
fn rules_for_other_ports_differ_and_have_another_fingerprint() {
    let network = Network::new();
    let other = NamespaceRules { outbound_port: Some(16001), ..RULES };
    network.in_workload(|| {
        install(&RULES.ruleset().unwrap());
        let (ours, other) = (RULES.ruleset().unwrap(), other.ruleset().unwrap());
        let altered =
            ["from_loopback", "output"].map(|chain| Drift::RulesAltered(chain.to_owned()));
        assert_eq!(other.drift().unwrap(), altered);
        assert_ne!(ours.fingerprint(), other.fingerprint());
        let comment = format!("hauberk {:016x}", ours.fingerprint());
        assert!(command("nft list table inet hauberk").contains(&comment));
    });
}

#[test]
fn host_rules_come_back_as_they_were_sent() {
    let network = Network::new();
    let workload = |uid, outbound_port, service_ports| HostWorkload {
        name: format!("user {uid}"),
        process: Some(ProcessMatch::User(uid)),
        outbound_port: Some(outbound_port),
        service_ports,
        unroutable: Unroutable::Refuse,
    };
    let rules = HostRules {
        mesh_port: MESH,
        mesh_listener: Some(MESH_LISTENER),
        plaintext_port: Some(PLAINTEXT),
        workloads: vec![
            workload(1001, 15101, vec![8080, 8081]),
            workload(1002, 15102, vec![]),
            workload(1003, 15103, vec![9090]),
        ],
    };
    network.in_workload(|| {
        install(&rules.ruleset().unwrap());
        assert_eq!(rules.ruleset().unwrap().drift().unwrap(), []);
        install(&rules.ruleset().unwrap());
        assert_eq!(rules.ruleset().unwrap().drift().unwrap(), []);
    });
}
