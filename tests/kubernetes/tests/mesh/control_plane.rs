//! The control plane's replicas: how many there are, and what comes of connections while something is done.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    install::{PATIENCE, everything},
    policy::get,
};

pub(crate) const NAMESPACE: &str = "--namespace=hauberk-system";
const SELECTOR: &str = "--selector=app.kubernetes.io/component=control-plane";
const DEPLOYMENT: &str = "deployment/hauberk-control-plane";

/// Waits until so many replicas are ready and no others are left; of none, until all have ended.
pub(crate) fn scale(cluster: &Cluster, replicas: u8) -> anyhow::Result<()> {
    cluster.kubectl(&["scale", NAMESPACE, DEPLOYMENT, &format!("--replicas={replicas}")])?;
    if replicas > 0 {
        return rolled_out(cluster);
    }
    cluster.wait_until("the control plane to go", PATIENCE, |cluster| {
        let left = pods(cluster)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

/// The pods of all replicas.
pub(crate) fn pods(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let names = "--output=jsonpath={.items[*].metadata.name}";
    let names = cluster.kubectl(&["get", "pods", NAMESPACE, SELECTOR, names])?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}

/// Loses a replica, without a word to it.
pub(crate) fn kill(cluster: &Cluster, pod: &str) -> anyhow::Result<()> {
    let at_once = ["--grace-period=0", "--force"];
    cluster.kubectl(&[["delete", "pod", NAMESPACE, pod].as_slice(), &at_once].concat()).map(drop)
}

/// Waits until all replicas that there should be are ready.
pub(crate) fn rolled_out(cluster: &Cluster) -> anyhow::Result<()> {
    cluster
        .kubectl(&["rollout", "status", NAMESPACE, "--timeout=90s", DEPLOYMENT])
        .map(drop)
        .with_context(|| everything(cluster))
}

/// Does something while an allowed pod connects again and again, and fails if one of these connections did, or
/// if there were not more than `least`.
pub(crate) fn while_connecting(
    cluster: &Cluster,
    least: u64,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (over, failed, tried) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                tried.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = get(cluster, "checkout", "http://ledger.payments/") {
                    failed.fetch_add(1, Ordering::Relaxed);
                    eprintln!("{error:#}");
                }
            }
        });
        let outcome = work();
        over.store(true, Ordering::Relaxed);
        outcome
    })
    .with_context(|| everything(cluster))?;
    let (failed, tried) = (failed.into_inner(), tried.into_inner());
    eprintln!("{failed} of {tried} connections failed");
    ensure!(failed == 0 && tried > least, "{failed} of {tried} connections failed");
    Ok(())
}
