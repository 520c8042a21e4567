//! What closes this machine's workloads before there is an agent: at boot, before the network is up.
//!
//! It puts the capture rules in place without anywhere to lead connections to, so that they are refused. The
//! agent takes the place of these rules when it starts.

use std::{path::Path, process::ExitCode, sync::Arc};

use anyhow::Context as _;
use hauberk_core::policy::{Mode, ProcessSelector, resolve::MeshWorkload};
use hauberk_linux::{
    Netns,
    capture::{Before, HostRules, Ruleset},
};

use crate::{
    capture::{closed_host_rules, closed_namespace_rules},
    config::Args,
    context::MESH_PORT,
    handover, policy,
};

/// Closes what the workloads of this machine serve, and refuses what they send, by the state on disk. Does nothing
/// while an agent runs.
#[must_use]
pub fn close(args: &Args) -> ExitCode {
    match close_all(args) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn close_all(args: &Args) -> anyhow::Result<String> {
    let kept = policy::kept_state(&args.data).context(
        "nothing is closed: start the agent, which asks the control plane for the state anew and closes its workloads",
    )?;
    let Some((owner, snapshot)) = kept else {
        return Ok(format!("{} has no state yet; there is nothing to close", args.data.display()));
    };
    // For as long as the rules are put in place.
    let Ok(_own) = handover::own_folder(&args.data) else {
        return Ok("an agent runs; its rules are in force".to_owned());
    };
    let workloads: Vec<Arc<MeshWorkload>> = snapshot.on_node(&owner.node).cloned().collect();
    let mut closed = 0;
    let mut failed = Vec::new();
    let mut note = |what: String, outcome: anyhow::Result<()>| match outcome {
        Ok(()) => closed += 1,
        Err(error) => failed.push(format!("{what}: {error:#}")),
    };
    let on_host: Vec<_> = workloads
        .iter()
        .filter(|workload| workload.process.own_addresses().is_none())
        .cloned()
        .collect();
    if !on_host.is_empty() {
        note("the host".to_owned(), close_host(&on_host, &owner.node));
    }
    for workload in &workloads {
        if let ProcessSelector::NetworkNamespace { name, .. } = &workload.process {
            let path = args.netns_dir.join(name);
            // One that is made later is closed by the agent, or not used before.
            if path.exists() {
                note(workload.key(), close_namespace(&path, workload.mode, &owner.node));
            }
        }
    }
    if !failed.is_empty() {
        anyhow::bail!("{closed} places are closed, but not all: {}", failed.join("; "));
    }
    Ok(format!(
        "closed: {} workloads of {} in {closed} places, by revision {}; the agent opens them to those that may \
         connect",
        workloads.len(),
        owner.node,
        snapshot.revision
    ))
}

fn close_host(workloads: &[Arc<MeshWorkload>], node: &str) -> anyhow::Result<()> {
    let rules = HostRules {
        mesh_port: MESH_PORT,
        mesh_listener: None,
        plaintext_port: None,
        workloads: closed_host_rules(workloads),
    };
    install(&rules.ruleset()?.owned_by(node))
}

fn close_namespace(path: &Path, mode: Mode, node: &str) -> anyhow::Result<()> {
    let rules = closed_namespace_rules(mode).ruleset()?.owned_by(node);
    let netns = Netns::open(path).context("open its network namespace")?;
    netns.run(|| install(&rules))?
}

fn install(rules: &Ruleset) -> anyhow::Result<()> {
    rules.install(&Before::Unknown)?.whole()?;
    Ok(())
}
