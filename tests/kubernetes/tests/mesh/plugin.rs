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

use crate::{Test, agents, install::everything};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "whoever_rewrites_the_network_of_a_node_is_answered_at_once",
    whoever_rewrites_the_network_of_a_node_is_answered_at_once,
)];

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
