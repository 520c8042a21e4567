use hauberk_linux::capture::{self, Drift, HostRules, HostWorkload, NamespaceRules, ProcessMatch};

use crate::support::*;

const RULES: NamespaceRules =
    NamespaceRules { outbound_port: OUTBOUND, plaintext_port: PLAINTEXT, mesh_port: MESH };

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
        ("nft add rule inet hauberk guard_input accept", Drift::RulesAltered(chain("guard_input"))),
        (
            "h=$(nft -a list chain inet hauberk prerouting | sed -n 's/.*:15006.*handle //p') && \
             nft replace rule inet hauberk prerouting handle $h \
             'tcp flags & (fin|syn|rst|ack) == syn redirect to :15007'",
            Drift::RulesAltered(chain("prerouting")),
        ),
        ("nft add chain inet hauberk extra", Drift::ChainUnknown(chain("extra"))),
        ("nft 'delete chain inet hauberk transparent'", Drift::ChainMissing(chain("transparent"))),
        (
            "nft 'chain inet hauberk guard_input { policy drop; }'",
            Drift::ChainAltered(chain("guard_input")),
        ),
        ("ip -6 rule del fwmark 0x4843 table 18502", Drift::PolicyRoutingMissing),
        ("ip route flush table 18502", Drift::PolicyRoutingMissing),
        ("ip rule add priority 1 prohibit", Drift::PolicyRoutingMissing),
    ];
    let network = Network::new();
    network.in_workload(|| {
        let ruleset = RULES.ruleset().unwrap();
        for (alteration, expected) in cases {
            ruleset.install().unwrap();
            assert_eq!(ruleset.drift().unwrap(), [], "before {alteration}");
            command(alteration);
            assert_eq!(ruleset.drift().unwrap(), [expected], "after {alteration}");
        }
        command("ip rule del priority 1");
        ruleset.install().unwrap();
        assert_eq!(ruleset.drift().unwrap(), []);
        capture::remove().unwrap();
    });
}

#[test]
fn rules_for_other_ports_differ_and_have_another_fingerprint() {
    let network = Network::new();
    let other = NamespaceRules { outbound_port: 16001, ..RULES };
    network.in_workload(|| {
        RULES.install().unwrap();
        let (ours, other) = (RULES.ruleset().unwrap(), other.ruleset().unwrap());
        assert_eq!(other.drift().unwrap(), [Drift::RulesAltered("output".to_owned())]);
        assert_ne!(ours.fingerprint(), other.fingerprint());
        let comment = format!("hauberk {:016x}", ours.fingerprint());
        assert!(command("nft list table inet hauberk").contains(&comment));
    });
}

#[test]
fn host_rules_come_back_as_they_were_sent() {
    let network = Network::new();
    let workload = |uid, outbound_port, service_ports| HostWorkload {
        process: Some(ProcessMatch::User(uid)),
        outbound_port: Some(outbound_port),
        service_ports,
    };
    let rules = HostRules {
        mesh_port: MESH,
        plaintext_port: Some(PLAINTEXT),
        workloads: vec![
            workload(1001, 15101, vec![8080, 8081]),
            workload(1002, 15102, vec![]),
            workload(1003, 15103, vec![9090]),
        ],
    };
    network.in_workload(|| {
        rules.install().unwrap();
        assert_eq!(rules.ruleset().unwrap().drift().unwrap(), []);
        rules.install().unwrap();
        assert_eq!(rules.ruleset().unwrap().drift().unwrap(), []);
    });
}
