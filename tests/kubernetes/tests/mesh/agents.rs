//! The agents, seen from their nodes: what they write and count, and nodes without them.

use std::fs;

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::Value;

use crate::install::PATIENCE;

const DAEMON_SET: [&str; 2] = ["--namespace=hauberk-system", "daemonset/hauberk-agent"];

/// Every line that the agents of a node have written, each behind the time at which it was. From the node's
/// disk: needs no API server, and has what an agent wrote before it was started anew.
pub(crate) fn lines(cluster: &Cluster, node: &str) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for pod in fs::read_dir(cluster.node(node)?.disk("/var/log/pods"))? {
        let pod = pod?;
        if !pod.file_name().to_string_lossy().starts_with("hauberk-system_hauberk-agent-") {
            continue;
        }
        let Ok(files) = fs::read_dir(pod.path().join("agent")) else { continue };
        for file in files {
            let text = fs::read_to_string(file?.path()).unwrap_or_default();
            lines.extend(text.lines().map(str::to_owned));
        }
    }
    Ok(lines)
}

/// Waits for a record of a connection, of a node's agent, for which `wanted` holds.
pub(crate) fn record(
    cluster: &Cluster,
    node: &str,
    wanted: impl Fn(&Value) -> bool,
) -> anyhow::Result<Value> {
    cluster.wait_until("the record", PATIENCE, |cluster| {
        let lines = lines(cluster, node)?;
        // The runtime's time, stream and tag stand before what was written.
        let written = lines.iter().filter_map(|line| line.splitn(4, ' ').nth(3));
        let mut records = written
            .filter_map(|text| serde_json::from_str::<Value>(text).ok())
            .filter(|record| record["type"] == "hauberk.connection");
        records.find(&wanted).with_context(|| format!("not among {} lines", lines.len()))
    })
}

/// Fails unless the agent has held a pod's start until it was captured, since then. That is what nothing but
/// the plugin, and nothing but its question, makes it do.
pub(crate) fn was_held(
    cluster: &Cluster,
    node: &str,
    namespace: &str,
    pod: &str,
    since: &str,
) -> anyhow::Result<()> {
    let uid = uid(cluster, namespace, pod)?;
    let lines = lines(cluster, node)?;
    let about = |line: &&String| line.contains("\"a pod starts\"") && line.contains(&uid);
    let told: Vec<&String> = lines.iter().filter(about).collect();
    if !told.iter().any(|line| line.as_str() > since && line.contains("\"Captured\"")) {
        bail!("{pod} started without its agent's leave since {since:?}: {told:#?}");
    }
    Ok(())
}

pub(crate) fn uid(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    let namespace = format!("--namespace={namespace}");
    cluster.kubectl(&["get", "pod", &namespace, pod, "--output=jsonpath={.metadata.uid}"])
}

/// A page that is asked for from a node's own network.
pub(crate) fn page(cluster: &Cluster, node: &str, url: &str) -> anyhow::Result<String> {
    let command = ["timeout", "5", "busybox", "wget", "-q", "-O", "-", url];
    cluster.node(node)?.text(&command)
}

/// Takes the agents off all nodes, and waits until they are gone.
pub(crate) fn send_away(cluster: &Cluster) -> anyhow::Result<()> {
    let nowhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"yes"}}}}}"#;
    cluster.kubectl(&[["patch"].as_slice(), &DAEMON_SET, &["--patch", nowhere]].concat())?;
    cluster.wait_until("the agents to go", PATIENCE, |cluster| {
        let left = cluster.kubectl(&[
            "get",
            "pods",
            "--namespace=hauberk-system",
            "--selector=app.kubernetes.io/component=agent",
            "--output=name",
        ])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })
}

/// Undoes [`send_away`], and waits until they are ready.
pub(crate) fn bring_back(cluster: &Cluster) -> anyhow::Result<()> {
    let everywhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}"#;
    cluster.kubectl(&[["patch"].as_slice(), &DAEMON_SET, &["--patch", everywhere]].concat())?;
    let status = ["rollout", "status", "--timeout=60s"];
    cluster.kubectl(&[status.as_slice(), &DAEMON_SET].concat()).map(drop)
}
