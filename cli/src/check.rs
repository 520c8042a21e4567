//! `hauberk check`: what is wrong with the mesh, by its status.

use std::{process::ExitCode, time::Duration};

use hauberk_core::{clock::SkewVerdict, time::Timestamp};
use hauberk_proto::v1;
use serde_json::json;

use crate::{
    CheckArgs, Output,
    operator::{clocks_off, has_expired, now, older, time, whole_status},
    say::say,
};

/// One finding of `hauberk check`.
struct Finding {
    problem: String,
    hint: &'static str,
}

/// What to do about a clock that is off.
const SET_CLOCK: &str = "set the clock of the node, or that of the control plane if every node is off; a clock that is \
                         behind by 2 minutes refuses new certificates, one that is ahead takes them for expired too \
                         early";

pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let status = whole_status(&args.asking)?;
    let findings = findings(&status, args.expiry_warn, now());
    match args.asking.output {
        Output::Json => say!(
            "{}",
            json!(
                findings
                    .iter()
                    .map(|finding| json!({"problem": finding.problem, "hint": finding.hint}))
                    .collect::<Vec<_>>()
            )
        ),
        Output::Text if findings.is_empty() => say!("nothing is wrong"),
        Output::Text => {
            for finding in &findings {
                say!("✗ {}\n    hint: {}", finding.problem, finding.hint);
            }
        }
    }
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long `check` speaks of capture rules that somebody altered.
const RESTORED_SHOWN: Duration = Duration::from_secs(24 * 60 * 60);

/// What to do about a node of a cluster whose agent is missing: it attests its node by itself.
const AGENT_POD: &str = "kubectl get pods --all-namespaces --selector=app.kubernetes.io/component=agent --output=wide \
                         shows its agent, kubectl logs what keeps it from the control plane";

/// What to do about a node whose certificate has expired.
fn way_back(node: &v1::NodeInfo, now: Timestamp, kubernetes: bool) -> &'static str {
    if kubernetes {
        AGENT_POD
    } else if node.renewable_until_unix_ms > now.unix_millis() {
        "start its agent and let it reach the control plane: it renews the certificate by itself until then"
    } else {
        "hauberk token create --node NAME here, hauberk join TOKEN there; its agent takes it up as it runs"
    }
}

fn findings(status: &v1::GetStatusResponse, warn: Duration, now: Timestamp) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |problem: String, hint| findings.push(Finding { problem, hint });
    for error in &status.manifest_errors {
        find(
            format!("manifest: {error}"),
            "correct it; until then the last good state is in force",
        );
    }
    for warning in &status.warnings {
        find(
            warning.clone(),
            if status.kubernetes {
                "it says what to mend; where a name is not known, it may be misspelt, or its namespace not labelled"
            } else {
                "a name may be misspelt, or a Workload manifest missing"
            },
        );
    }
    for note in &status.ca_notes {
        find(
            format!("certificate authority: {note}"),
            "mend what it says, or wait until the time that it names",
        );
    }
    for node in &status.nodes {
        if !node.locked.is_empty() {
            find(
                format!("node {} is locked: {}", node.name, node.locked),
                "find out who used its credential, then join it anew: hauberk token create --node \
                 NAME here, hauberk join TOKEN there",
            );
        } else if !node.joined {
            find(
                format!("node {} has not joined", node.name),
                if status.kubernetes {
                    AGENT_POD
                } else {
                    "hauberk token create --node NAME here, hauberk join TOKEN there"
                },
            );
        } else if !node.connected && has_expired(node, now) {
            let end = time(node.certificate_not_after_unix_ms);
            let until = match node.renewable_until_unix_ms {
                until if until > now.unix_millis() => {
                    format!("may be renewed until {}", time(until))
                }
                _ => "is not renewed any more".to_owned(),
            };
            find(
                format!(
                    "node {} is away, and its certificate, which ended at {end}, {until}",
                    node.name
                ),
                way_back(node, now, status.kubernetes),
            );
        } else if !node.connected {
            find(
                format!(
                    "node {} is away; it enforces revision {}",
                    node.name, node.enforced_revision
                ),
                if status.kubernetes {
                    AGENT_POD
                } else {
                    "is its agent running, and does it reach the control plane?"
                },
            );
        } else if node.enforced_revision != status.revision {
            find(
                format!(
                    "node {} enforces revision {}, not {} {}",
                    node.name, node.enforced_revision, status.revision, node.refused
                ),
                "wait a moment; if it stays, look at the agent's log",
            );
        }
    }
    for (node, skew) in clocks_off(status) {
        let problem = format!("the clock of node {node} is {skew} the control plane's");
        match skew.verdict() {
            SkewVerdict::Tolerated => {}
            SkewVerdict::Reported => find(problem, SET_CLOCK),
            SkewVerdict::RefusesFreshCertificates => {
                find(format!("{problem}: it refuses new certificates"), SET_CLOCK);
            }
        }
    }
    for workload in &status.workloads {
        if !workload.captured {
            let told = Some(workload.problem.as_str()).filter(|text| !text.is_empty());
            find(
                format!(
                    "{} on {} is not captured: {}",
                    workload.workload,
                    workload.node,
                    told.unwrap_or("its agent has not told of it yet")
                ),
                if status.kubernetes {
                    "its connections are refused until it is; the log of its node's agent says more"
                } else {
                    "what it serves is refused until it is; so is what it sends, unless its user or cgroup is \
                     what is missing"
                },
            );
        } else if workload.not_after_unix_ms <= now.unix_millis() {
            find(
                format!("{} has no valid certificate", workload.workload),
                "look at the log of its agent for failed renewals",
            );
        }
        if workload.older > 0 {
            let enforced = workload.mode == i32::from(v1::Mode::Enforce);
            let hint = match (enforced, workload.older_closed_unix_ms) {
                (true, 0) => {
                    "restart what opened them; agents close them if --older-connections (agent.olderConnections) is a \
                     time, and log it if they cannot"
                }
                (true, _) => {
                    "restart what opened them before that, if it cannot stand that they are closed"
                }
                (false, _) => {
                    "hauberk learn knows them by their addresses; restart what opened them, and the mesh carries them"
                }
            };
            find(
                format!("{} on {} has {}", workload.workload, workload.node, older(workload)),
                hint,
            );
        }
        if !workload.unreached.is_empty() {
            find(
                format!(
                    "what {} serves on {} could not be reached: {}",
                    workload.workload, workload.node, workload.unreached
                ),
                "start what serves the port; if a container does, see docs/machines.md, Ports of containers",
            );
        }
        if !workload.unreported.is_empty() {
            find(
                format!(
                    "connections of {} on {} that cannot be captured are not recorded: {}",
                    workload.workload, workload.node, workload.unreported
                ),
                "another program there listens to the group 18502 of nfnetlink_log (NFLOG), or the kernel has no \
                 nfnetlink_log; such connections are refused all the same, under Audit let through",
            );
        }
        let recently = now.saturating_sub(RESTORED_SHOWN).unix_millis();
        if workload.restored_at_unix_ms > recently {
            find(
                format!(
                    "the capture rules of {} on {} were altered and restored, {} times, last at {}: {}",
                    workload.workload,
                    workload.node,
                    workload.restored,
                    time(workload.restored_at_unix_ms),
                    workload.restored_what
                ),
                "find out which program changes nftables or routing there; hauberk denied shows what was cut",
            );
        }
    }
    let soon = now.saturating_add(warn).unix_millis();
    for (name, end) in [
        ("root", status.root_not_after_unix_ms),
        ("intermediate", status.intermediate_not_after_unix_ms),
    ] {
        if end < soon {
            find(
                format!("the CA's {name} certificate ends at {}", time(end)),
                "the intermediate renews by itself at half of its life; see the control plane's log",
            );
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use hauberk_core::clock::NOT_BEFORE_BACKDATE;

    use super::*;

    fn node(name: &str, clock_skew_ms: Option<i64>) -> v1::NodeInfo {
        v1::NodeInfo {
            name: name.to_owned(),
            joined: true,
            connected: true,
            enforced_revision: 1,
            clock_skew_ms,
            ..v1::NodeInfo::default()
        }
    }

    #[test]
    fn a_clock_that_is_off_is_found() {
        assert_eq!(NOT_BEFORE_BACKDATE, Duration::from_secs(120), "the hint names it");
        let away = v1::NodeInfo { connected: false, ..node("away", Some(90_000)) };
        let status = v1::GetStatusResponse {
            revision: 1,
            nodes: vec![
                node("right", Some(-400)),
                node("not-measured", None),
                node("ahead", Some(12_340)),
                node("behind", Some(-90_000)),
                node("far-behind", Some(-3_600_000)),
                away,
            ],
            root_not_after_unix_ms: i64::MAX,
            intermediate_not_after_unix_ms: i64::MAX,
            ..v1::GetStatusResponse::default()
        };
        let found = findings(&status, Duration::ZERO, Timestamp::UNIX_EPOCH);
        let text: Vec<String> = found
            .iter()
            .map(|finding| format!("{}\n    {}", finding.problem, finding.hint))
            .collect();
        insta::assert_snapshot!(text.join("\n"), @r"
        node away is away; it enforces revision 1
            is its agent running, and does it reach the control plane?
        the clock of node ahead is 12.3 s ahead of the control plane's
            set the clock of the node, or that of the control plane if every node is off; a clock that is behind by 2 minutes refuses new certificates, one that is ahead takes them for expired too early
        the clock of node behind is 90.0 s behind the control plane's
            set the clock of the node, or that of the control plane if every node is off; a clock that is behind by 2 minutes refuses new certificates, one that is ahead takes them for expired too early
        the clock of node far-behind is 3600.0 s behind the control plane's: it refuses new certificates
            set the clock of the node, or that of the control plane if every node is off; a clock that is behind by 2 minutes refuses new certificates, one that is ahead takes them for expired too early
        ");
    }
}
