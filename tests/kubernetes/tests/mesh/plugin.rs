//! Other programs that write a node's network configuration, as those that install networks do.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::Value;

use crate::{
    Test, agents,
    install::{PATIENCE, everything},
    outage::{container, ctr},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    (
        "whoever_rewrites_the_network_of_a_node_is_answered_at_once",
        whoever_rewrites_the_network_of_a_node_is_answered_at_once,
    ),
    (
        "no_further_pods_are_sent_to_a_node_whose_agent_fails",
        no_further_pods_are_sent_to_a_node_whose_agent_fails,
    ),
];

/// Far below the look that needs no news, which is every 2 s.
const AT_ONCE: Duration = Duration::from_millis(500);

fn whoever_rewrites_the_network_of_a_node_is_answered_at_once(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    let folder = cluster.node("node-a")?.disk("/etc/cni/net.d");
    let path = first(&folder)?;
    let chained = fs::read(&path)?;
    let mut network: Value = serde_json::from_slice(&chained)?;
    let plugins = network["plugins"].as_array_mut().context("no plugins")?;
    plugins.retain(|plugin| plugin["type"] != "hauberk-cni");
    let plain = serde_json::to_vec_pretty(&network)?;
    ensure!(plain != chained, "it is not chained to begin with");
    let before = restored(cluster)?;
    let mut times = Vec::new();
    let mut disturb = || -> anyhow::Result<()> {
        for _ in 0..5 {
            // As kindnet does: the same file, written anew.
            fs::write(&path, &plain)?;
            times.push(until_chained(&folder)?);
            // As Cilium does: its own comes first, and those of others have a name that nobody reads.
            let (own, aside) = (folder.join("05-other.conflist"), folder.join("aside.bak"));
            fs::rename(&path, &aside)?;
            fs::write(&own, &plain)?;
            times.push(until_chained(&folder)?);
            fs::rename(&own, &path)?;
            fs::remove_file(&aside)?;
        }
        Ok(())
    };
    let outcome = disturb();
    if !path.exists() {
        fs::write(&path, &chained)?;
    }
    outcome.with_context(|| everything(cluster))?;
    times.sort();
    eprintln!("answered after {times:?}");
    ensure!(times[times.len() / 2] < AT_ONCE, "{times:?}");
    let counted = restored(cluster)? - before;
    ensure!(counted >= 10.0, "{counted} of 10 were counted");
    ensure!(fs::read(&path)? == chained, "another entry than before");
    Ok(())
}

/// A pod that the scheduler places, and that may go to `node-b` alone.
const LATE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop}
spec:
  nodeSelector: {kubernetes.io/hostname: node-b}
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
";

fn no_further_pods_are_sent_to_a_node_whose_agent_fails(cluster: &Cluster) -> anyhow::Result<()> {
    ensure!(!is_tainted(cluster, "node-b")?, "it is tainted while its agent is ready");
    let began = Instant::now();
    while !is_tainted(cluster, "node-b")? {
        ensure!(began.elapsed() < PATIENCE, "no taint\n{}", everything(cluster));
        // Between two lives it has nothing to kill.
        drop(kill_agent(cluster, "node-b"));
        thread::sleep(Duration::from_millis(500));
    }
    eprintln!("tainted {:?} after the first crash", began.elapsed());
    let waits = waits_for_its_node(cluster);
    let back = cluster.wait_until("the agent to be back", PATIENCE * 2, |cluster| {
        ensure!(!is_tainted(cluster, "node-b")?, "it is tainted");
        Ok(())
    });
    let started = cluster.wait_pod("shop", "late", PATIENCE);
    cluster.kubectl(&["delete", "pod", "--namespace=shop", "late"])?;
    waits.and(back).and(started.map(drop)).with_context(|| everything(cluster))?;
    of_nodes_nothing_else_is_changed(cluster)
}

fn waits_for_its_node(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(LATE)?;
    cluster.wait_until("the scheduler's word", PATIENCE, |cluster| {
        let pod = cluster.kubectl_json(&["get", "pod", "--namespace=shop", "late"])?;
        let told = pod.pointer("/status/conditions").map(Value::to_string).unwrap_or_default();
        ensure!(told.contains("untolerated taint"), "{told}");
        Ok(())
    })
}

/// Whoever has the control plane's permissions.
fn of_nodes_nothing_else_is_changed(cluster: &Cluster) -> anyhow::Result<()> {
    let patched = |patch: &str| {
        let patch = format!("--patch={patch}");
        let own = "--as=system:serviceaccount:hauberk-system:hauberk-control-plane";
        cluster.kubectl(&["patch", "node", "node-b", "--type=merge", own, &patch])
    };
    for patch in [
        r#"{"metadata":{"labels":{"other":"label"}}}"#,
        r#"{"metadata":{"annotations":{"other":"annotation"}}}"#,
        r#"{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"gone","uid":"1"}]}}"#,
        r#"{"spec":{"unschedulable":true}}"#,
        r#"{"spec":{"taints":[{"key":"other","effect":"NoSchedule"}]}}"#,
        r#"{"spec":{"taints":[{"key":"hauberk.dev/agent-not-ready","effect":"NoExecute"}]}}"#,
    ] {
        let refused = patched(patch).map_err(|error| format!("{error:#}"));
        let told = |error: &String| error.contains("hauberk-node-taints");
        ensure!(refused.as_ref().is_err_and(told), "{patch}: {refused:?}");
    }
    // It takes away again what nobody needs.
    patched(
        r#"{"spec":{"taints":[{"key":"hauberk.dev/agent-not-ready","effect":"NoSchedule"}]}}"#,
    )?;
    cluster.wait_until("the taint to go", PATIENCE, |cluster| {
        ensure!(!is_tainted(cluster, "node-b")?, "it is tainted");
        Ok(())
    })
}

pub(crate) fn is_tainted(cluster: &Cluster, node: &str) -> anyhow::Result<bool> {
    let node = cluster.kubectl_json(&["get", "node", node])?;
    let taints = node.pointer("/spec/taints").and_then(Value::as_array);
    Ok(taints.into_iter().flatten().any(|taint| taint["key"] == "hauberk.dev/agent-not-ready"))
}

fn kill_agent(cluster: &Cluster, node: &str) -> anyhow::Result<()> {
    let pods = cluster.kubectl_json(&[
        "get",
        "pods",
        "--namespace=hauberk-system",
        "--selector=app.kubernetes.io/component=agent",
        &format!("--field-selector=spec.nodeName={node}"),
    ])?;
    let pod = pods["items"].as_array().and_then(|all| all.first()).context("no agent")?;
    ctr(cluster, node, &["tasks", "kill", "--signal=SIGKILL", &container(pod)?]).map(drop)
}

/// The configuration that the runtime takes.
fn first(folder: &Path) -> anyhow::Result<PathBuf> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "conflist") {
            paths.push(path);
        }
    }
    paths.sort();
    paths.into_iter().next().context("no network configuration")
}

fn until_chained(folder: &Path) -> anyhow::Result<Duration> {
    let began = Instant::now();
    loop {
        let text = fs::read_to_string(first(folder)?)?;
        if serde_json::from_str::<Value>(&text).is_ok() && text.contains("hauberk-cni") {
            return Ok(began.elapsed());
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "it is not chained: {text}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn restored(cluster: &Cluster) -> anyhow::Result<f64> {
    let page = agents::page(cluster, "node-a", "http://127.0.0.1:9465/metrics")?;
    let line = page.lines().find(|line| line.starts_with("hauberk_cni_plugin_restored_total"));
    Ok(line.and_then(|line| line.rsplit(' ').next()).context("no such metric")?.parse()?)
}
