//! Questions to the control plane, and their answers for people and programs.

use std::{future::Future, path::Path, process::ExitCode, time::Duration};

use anyhow::Context;
use comfy_table::{Table, presets};
use futures_util::StreamExt;
use hauberk_core::time::Timestamp;
use hauberk_proto::v1;
use hauberk_telemetry::record::RecordLine;
use serde_json::json;

use crate::{
    Asking, CheckArgs, DeniedArgs, Output, WhyArgs,
    control::{self, Client},
};

/// The answer of a policy that says no, so that scripts can tell.
const EXIT_DENIED: u8 = 1;

pub(crate) fn create_token(
    asking: &Asking,
    node: String,
    ttl: Duration,
) -> anyhow::Result<ExitCode> {
    let request = v1::CreateTokenRequest { node, ttl_seconds: ttl.as_secs() };
    let answer = ask_one(asking, |mut client| async move { client.create_token(request).await })?;
    let expires = time(answer.expires_at_unix_ms);
    match asking.output {
        Output::Json => println!("{}", json!({"token": answer.token, "expires_at": expires})),
        Output::Text => {
            println!("{}", answer.token);
            eprintln!("good once, until {expires}; on the machine run: hauberk join TOKEN");
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks one replica: what all of them know.
fn ask_one<T, F>(asking: &Asking, question: impl FnOnce(Client) -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
{
    control::run(async {
        let first = asking.way.clients().await?.into_iter().next().context("nobody to ask")?;
        control::answer(question(first).await)
    })
}

/// Asks for the status at a socket; for programs that wait for one.
pub(crate) fn get_status(socket: &Path) -> anyhow::Result<v1::GetStatusResponse> {
    control::run(async {
        let mut client = Client::new(control::connect(socket).await?);
        control::answer(client.get_status(v1::GetStatusRequest {}).await)
    })
}

/// Asks every replica: each knows the agents that are connected to it.
fn whole_status(asking: &Asking) -> anyhow::Result<v1::GetStatusResponse> {
    control::run(async {
        let mut statuses = Vec::new();
        for mut client in asking.way.clients().await? {
            statuses.push(control::answer(client.get_status(v1::GetStatusRequest {}).await)?);
        }
        merged(statuses).context("nobody to ask")
    })
}

/// The newest state, with what each replica knows of its own agents.
fn merged(statuses: Vec<v1::GetStatusResponse>) -> Option<v1::GetStatusResponse> {
    let mut statuses = statuses;
    statuses.sort_by_key(|status| status.revision);
    let mut whole = statuses.pop()?;
    for other in statuses {
        for node in &mut whole.nodes {
            let known = other.nodes.iter().find(|known| known.name == node.name);
            if let Some(known) = known.filter(|known| known.connected && !node.connected) {
                node.clone_from(known);
            }
        }
        for workload in &mut whole.workloads {
            let known = other.workloads.iter().find(|known| {
                (&known.workload, &known.node) == (&workload.workload, &workload.node)
            });
            let told = |known: &v1::WorkloadInfo| known.captured || !known.problem.is_empty();
            if let Some(known) = known.filter(|known| told(known) && !told(workload)) {
                workload.clone_from(known);
            }
        }
        for note in other.ca_notes {
            if !whole.ca_notes.contains(&note) {
                whole.ca_notes.push(note);
            }
        }
    }
    Some(whole)
}

pub(crate) fn status(asking: &Asking) -> anyhow::Result<ExitCode> {
    let status = whole_status(asking)?;
    match asking.output {
        Output::Json => println!("{}", status_json(&status)),
        Output::Text => print_status(&status, now()),
    }
    Ok(ExitCode::SUCCESS)
}

fn status_json(status: &v1::GetStatusResponse) -> serde_json::Value {
    json!({
        "trust_domain": status.trust_domain,
        "version": status.version,
        "revision": status.revision,
        "policies": status.policies,
        "guardrails": status.guardrails,
        "root_not_after": time(status.root_not_after_unix_ms),
        "intermediate_not_after": time(status.intermediate_not_after_unix_ms),
        "manifest_errors": status.manifest_errors,
        "warnings": status.warnings,
        "ca_notes": status.ca_notes,
        "nodes": status.nodes.iter().map(|node| json!({
            "name": node.name,
            "joined": node.joined,
            "connected": node.connected,
            "locked": node.locked,
            "enforced_revision": node.enforced_revision,
            "refused": node.refused,
            "certificate_not_after": time(node.certificate_not_after_unix_ms),
            "renewable_until": time(node.renewable_until_unix_ms),
            "last_seen": time(node.last_seen_unix_ms),
            "agent_version": node.agent_version,
            "open_connections": node.open_connections,
        })).collect::<Vec<_>>(),
        "workloads": status.workloads.iter().map(|workload| json!({
            "workload": workload.workload,
            "spiffe_id": workload.spiffe_id,
            "node": workload.node,
            "mode": mode(workload.mode),
            "addresses": workload.addresses,
            "ports": workload.ports,
            "captured": workload.captured,
            "problem": workload.problem,
            "restored": workload.restored,
            "restored_at": time(workload.restored_at_unix_ms),
            "restored_what": workload.restored_what,
            "certificate_not_after": time(workload.not_after_unix_ms),
            "serial": workload.serial,
        })).collect::<Vec<_>>(),
    })
}

fn print_status(status: &v1::GetStatusResponse, now: Timestamp) {
    println!(
        "trust domain {}, revision {}, {} policies, {} guardrails",
        status.trust_domain, status.revision, status.policies, status.guardrails
    );
    let mut nodes = table(&["NODE", "STATE", "ENFORCES", "CERTIFICATE UNTIL", "OPEN", "REFUSED"]);
    for node in &status.nodes {
        let state = match (node.joined, node.connected) {
            _ if !node.locked.is_empty() => "locked",
            (false, _) => "not joined",
            (true, false) if has_expired(node, now) => "expired",
            (true, false) => "away",
            (true, true) => "connected",
        };
        nodes.add_row([
            node.name.clone(),
            state.to_owned(),
            node.enforced_revision.to_string(),
            time(node.certificate_not_after_unix_ms),
            node.open_connections.to_string(),
            node.refused.clone(),
        ]);
    }
    println!("\n{nodes}");
    let mut workloads =
        table(&["WORKLOAD", "NODE", "IDENTITY", "MODE", "CAPTURED", "CERTIFICATE UNTIL"]);
    for workload in &status.workloads {
        let captured = match (workload.captured, workload.problem.as_str()) {
            (true, _) => "yes".to_owned(),
            (false, "") => "no".to_owned(),
            (false, problem) => format!("no: {problem}"),
        };
        workloads.add_row([
            workload.workload.clone(),
            workload.node.clone(),
            workload.spiffe_id.clone(),
            mode(workload.mode).to_owned(),
            captured,
            time(workload.not_after_unix_ms),
        ]);
    }
    println!("\n{workloads}");
    for error in &status.manifest_errors {
        println!("manifest error: {error}");
    }
    for warning in &status.warnings {
        println!("warning: {warning}");
    }
    for note in &status.ca_notes {
        println!("certificate authority: {note}");
    }
}

pub(crate) fn why(args: &WhyArgs) -> anyhow::Result<ExitCode> {
    let (destination, port) = args
        .destination
        .rsplit_once(':')
        .and_then(|(name, port)| Some((name, port.parse::<u16>().ok().filter(|port| *port > 0)?)))
        .with_context(|| {
            format!("{:?} is not DESTINATION:PORT, such as payments/ledger:5432", args.destination)
        })?;
    let request = v1::WhyRequest {
        source: args.source.clone(),
        destination: destination.to_owned(),
        port: port.into(),
    };
    let answer = ask_one(&args.asking, |mut client| async move { client.why(request).await })?;
    match args.asking.output {
        Output::Json => println!(
            "{}",
            json!({
                "source": answer.source_id,
                "destination": answer.destination_id,
                "port": port,
                "decision": answer.decision,
                "reason": answer.reason,
                "policy": answer.policy,
                "rule": answer.rule,
                "owner": answer.owner,
                "nearest_miss": answer.nearest_miss,
                "mend": answer.mend,
                "revision": answer.revision,
                "notes": answer.notes,
            })
        ),
        Output::Text => print_why(&answer, port),
    }
    Ok(if answer.decision == "deny" { ExitCode::from(EXIT_DENIED) } else { ExitCode::SUCCESS })
}

fn print_why(answer: &v1::WhyResponse, port: u16) {
    println!("{}: {} -> {}:{port}", answer.decision, answer.source_id, answer.destination_id);
    let lines = [
        ("reason", &answer.reason),
        ("policy", &answer.policy),
        ("rule", &answer.rule),
        ("nearest miss", &answer.nearest_miss),
        ("owner", &answer.owner),
        ("mend", &answer.mend),
    ];
    for (name, value) in lines {
        if !value.is_empty() {
            println!("  {name:<13} {value}");
        }
    }
    println!("  {:<13} {}", "revision", answer.revision);
    for note in &answer.notes {
        println!("  note: {note}");
    }
}

pub(crate) fn denied(args: &DeniedArgs) -> anyhow::Result<ExitCode> {
    let request = v1::DeniedRequest { follow: args.follow, limit: args.lines };
    let output = args.asking.output;
    control::run(async {
        let mut streams = Vec::new();
        for mut client in args.asking.way.clients().await? {
            streams.push(control::answer(client.denied(request).await)?);
        }
        let mut events = futures_util::stream::select_all(streams);
        while let Some(event) = events.next().await {
            let event = event.map_err(|status| anyhow::anyhow!("{}", status.message()))?;
            match output {
                Output::Json if event.record.is_empty() => {
                    println!("{}", json!({"suppressed": event.suppressed}));
                }
                Output::Json => println!("{}", event.record),
                Output::Text => println!("{}", denial_line(&event)),
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

fn denial_line(event: &v1::DeniedEvent) -> String {
    if event.record.is_empty() {
        return format!("… and {} more of the same", event.suppressed);
    }
    let Ok(RecordLine::Connection(record)) = RecordLine::parse(&event.record) else {
        return event.record.clone();
    };
    let name = |peer: &hauberk_telemetry::record::Peer| match (&peer.namespace, &peer.workload) {
        (Some(namespace), Some(workload)) => format!("{namespace}/{workload}"),
        (None, Some(workload)) => format!("machine/{workload}"),
        (_, None) => peer
            .spiffe_id
            .clone()
            .or_else(|| peer.addr.map(|address| address.ip().to_string()))
            .unwrap_or_else(|| "unknown".to_owned()),
    };
    let port = record.dst_port().map_or_else(String::new, |port| format!(":{port}"));
    let mut line = format!(
        "{}  {} -> {}{port}  {}",
        record.time,
        name(&record.src),
        name(&record.dst),
        record.reason.as_deref().unwrap_or("unknown"),
    );
    let more = [("rule", &record.nearest_miss), ("owner", &record.owner), ("mend", &record.mend)];
    for (label, value) in more {
        if let Some(value) = value {
            line.push_str(&format!("\n    {label}: {value}"));
        }
    }
    line
}

/// One finding of `hauberk check`.
struct Finding {
    problem: String,
    hint: &'static str,
}

pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let status = whole_status(&args.asking)?;
    let findings = findings(&status, args.expiry_warn, now());
    match args.asking.output {
        Output::Json => println!(
            "{}",
            json!(
                findings
                    .iter()
                    .map(|finding| json!({"problem": finding.problem, "hint": finding.hint}))
                    .collect::<Vec<_>>()
            )
        ),
        Output::Text if findings.is_empty() => println!("nothing is wrong"),
        Output::Text => {
            for finding in &findings {
                println!("✗ {}\n    hint: {}", finding.problem, finding.hint);
            }
        }
    }
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long `check` speaks of capture rules that somebody altered.
const RESTORED_SHOWN: Duration = Duration::from_secs(24 * 60 * 60);

/// Whether a node's last certificate is good no more. Those of a cluster have none that the registry keeps.
fn has_expired(node: &v1::NodeInfo, now: Timestamp) -> bool {
    let end = node.certificate_not_after_unix_ms;
    end != 0 && end <= now.unix_millis()
}

/// What to do about a node whose certificate has expired.
fn way_back(node: &v1::NodeInfo, now: Timestamp) -> &'static str {
    if node.renewable_until_unix_ms > now.unix_millis() {
        "start its agent and let it reach the control plane: it renews the certificate by itself until then"
    } else {
        "hauberk token create --node NAME here, hauberk join TOKEN there; its agent takes it up as it runs"
    }
}

fn now() -> Timestamp {
    Timestamp::from(std::time::SystemTime::now())
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
            "a name may be misspelt, a Workload manifest missing, or a pod not fit for the mesh",
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
                "hauberk token create --node NAME here, hauberk join TOKEN there",
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
                way_back(node, now),
            );
        } else if !node.connected {
            find(
                format!(
                    "node {} is away; it enforces revision {}",
                    node.name, node.enforced_revision
                ),
                "is its agent running, and does it reach the control plane?",
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
                "what it serves is refused until it is; so is what it sends, unless its user or cgroup is \
                 what is missing",
            );
        } else if workload.not_after_unix_ms <= now.unix_millis() {
            find(
                format!("{} has no valid certificate", workload.workload),
                "look at the log of its agent for failed renewals",
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

fn table(headers: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headers);
    table
}

fn time(unix_ms: i64) -> String {
    if unix_ms == 0 { "-".to_owned() } else { Timestamp::from_unix_millis(unix_ms).to_string() }
}

fn mode(mode: i32) -> &'static str {
    match v1::Mode::try_from(mode) {
        Ok(v1::Mode::Enforce) => "enforce",
        Ok(v1::Mode::Audit) => "audit",
        Ok(v1::Mode::Unspecified) | Err(_) => "unknown",
    }
}
