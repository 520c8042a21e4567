//! Questions to the control plane, and their answers for people and programs.

use std::{collections::BTreeSet, future::Future, path::Path, process::ExitCode, time::Duration};

use anyhow::Context;
use comfy_table::{Table, presets};
use futures_util::StreamExt;
use hauberk_core::{
    clock::{ClockSkew, SkewVerdict},
    time::Timestamp,
};
use hauberk_proto::v1;
use hauberk_telemetry::record::RecordLine;
use serde_json::json;

use crate::{
    Asking, DeniedArgs, Output, WhyArgs,
    control::{self, Client},
    say::say,
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
        Output::Json => say!("{}", json!({"token": answer.token, "expires_at": expires})),
        Output::Text => {
            say!("{}", answer.token);
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
pub(crate) fn whole_status(asking: &Asking) -> anyhow::Result<v1::GetStatusResponse> {
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
        // Who has left a replica is known to it as it was then.
        let hears = |status: &v1::GetStatusResponse| -> BTreeSet<String> {
            let nodes = status.nodes.iter().filter(|node| node.connected);
            nodes.map(|node| node.name.clone()).collect()
        };
        let (here, there) = (hears(&whole), hears(&other));
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
            let is_heard_there = !here.contains(&workload.node) && there.contains(&workload.node);
            let is_told_there = |known: &&v1::WorkloadInfo| told(known) && !told(workload);
            if let Some(known) = known.filter(|known| is_heard_there || is_told_there(known)) {
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
        Output::Json => say!("{}", status_json(&status)),
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
            "clock_skew_ms": node.clock_skew_ms,
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
            "unreached": workload.unreached,
            "unreported": workload.unreported,
            "older": workload.older,
            "older_closed": time(workload.older_closed_unix_ms),
            "certificate_not_after": time(workload.not_after_unix_ms),
            "serial": workload.serial,
        })).collect::<Vec<_>>(),
    })
}

fn print_status(status: &v1::GetStatusResponse, now: Timestamp) {
    say!(
        "trust domain {}, revision {}, {} policies, {} guardrails",
        status.trust_domain,
        status.revision,
        status.policies,
        status.guardrails
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
    say!("\n{nodes}");
    let mut workloads =
        table(&["WORKLOAD", "NODE", "IDENTITY", "MODE", "CAPTURED", "CERTIFICATE UNTIL"]);
    for workload in &status.workloads {
        let captured = match (workload.captured, workload.problem.as_str()) {
            (true, _) if workload.older > 0 && workload.unreached.is_empty() => {
                format!("partly: {}", older(workload))
            }
            (true, _) if workload.older > 0 => {
                format!("partly: {}; not reached: {}", older(workload), workload.unreached)
            }
            (true, _) if workload.unreached.is_empty() => "yes".to_owned(),
            (true, _) => format!("yes, but not reached: {}", workload.unreached),
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
    say!("\n{workloads}");
    for error in &status.manifest_errors {
        say!("manifest error: {error}");
    }
    for warning in &status.warnings {
        say!("warning: {warning}");
    }
    for note in &status.ca_notes {
        say!("certificate authority: {note}");
    }
    for (node, skew) in clocks_off(status) {
        say!("clock: node {node} is {skew} the control plane");
    }
}

/// What is said of connections that are older than their workload's capture.
pub(crate) fn older(workload: &v1::WorkloadInfo) -> String {
    let what = match workload.older {
        1 => "1 older connection in clear".to_owned(),
        count => format!("{count} older connections in clear"),
    };
    match workload.older_closed_unix_ms {
        0 => what,
        from => format!("{what}, closed from {}", time(from)),
    }
}

/// The nodes whose clocks are further from the control plane's than is tolerated.
pub(crate) fn clocks_off(
    status: &v1::GetStatusResponse,
) -> impl Iterator<Item = (&str, ClockSkew)> {
    status.nodes.iter().filter_map(|node| {
        let skew = ClockSkew::from_millis(node.clock_skew_ms?);
        // What an agent said before it went away says nothing of now.
        let tolerated = !node.connected || skew.verdict() == SkewVerdict::Tolerated;
        (!tolerated).then_some((node.name.as_str(), skew))
    })
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
        Output::Json => say!(
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
    say!("{}: {} -> {}:{port}", answer.decision, answer.source_id, answer.destination_id);
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
            say!("  {name:<13} {value}");
        }
    }
    say!("  {:<13} {}", "revision", answer.revision);
    for note in &answer.notes {
        say!("  note: {note}");
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
                    say!("{}", json!({"suppressed": event.suppressed}));
                }
                Output::Json => say!("{}", event.record),
                Output::Text => say!("{}", denial_line(&event)),
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
    // A service leads to another port than its own, which is what rules name.
    let led = record.dst.addr.map(|address| address.port());
    let port = match (record.dst_port(), led) {
        (Some(port), Some(led)) if port != led => format!(":{port} (the pod's {led})"),
        (Some(port), _) => format!(":{port}"),
        (None, _) => String::new(),
    };
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

/// Whether a node's last certificate is good no more. Those of a cluster have none that the registry keeps.
pub(crate) fn has_expired(node: &v1::NodeInfo, now: Timestamp) -> bool {
    let end = node.certificate_not_after_unix_ms;
    end != 0 && end <= now.unix_millis()
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from(std::time::SystemTime::now())
}

fn table(headers: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headers);
    table
}

pub(crate) fn time(unix_ms: i64) -> String {
    if unix_ms == 0 { "-".to_owned() } else { Timestamp::from_unix_millis(unix_ms).to_string() }
}

fn mode(mode: i32) -> &'static str {
    match v1::Mode::try_from(mode) {
        Ok(v1::Mode::Enforce) => "enforce",
        Ok(v1::Mode::Audit) => "audit",
        Ok(v1::Mode::Unspecified) | Err(_) => "unknown",
    }
}
