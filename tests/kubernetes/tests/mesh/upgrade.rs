//! Agents are replaced under connections.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;
use hauberk_linux::Netns;

use crate::{
    Test,
    install::{PATIENCE, everything},
    outage::{Live, network_of},
    pods::{address, hasty, server},
    policy::POLICY,
};

pub(crate) const TESTS: &[(&str, Test)] =
    &[("agents_are_replaced_and_no_connection_fails", agents_are_replaced_and_no_connection_fails)];

/// The least of new connections that say anything: several while each agent is replaced.
const ENOUGH: u64 = 200;

/// How long the chart gives open connections.
const DRAIN: Duration = Duration::from_secs(10);

struct Load<'a> {
    network: &'a Netns,
    echo: SocketAddr,
    over: AtomicBool,
    tried: AtomicU64,
    failed: AtomicU64,
}

impl Load<'_> {
    /// One new connection after the other.
    fn call(&self) {
        while !self.over.load(Ordering::Relaxed) {
            self.tried.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = Live::open(self.network, self.echo).and_then(|mut new| new.echo()) {
                self.failed.fetch_add(1, Ordering::Relaxed);
                eprintln!("{error:#}");
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// How long a connection lasts that was open before.
    fn hold(&self, mut live: Live) -> Duration {
        let since = Instant::now();
        while !self.over.load(Ordering::Relaxed) && live.echo().is_ok() {
            thread::sleep(Duration::from_millis(50));
        }
        since.elapsed()
    }
}

fn agents_are_replaced_and_no_connection_fails(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(&POLICY.replace("[8080]", "[8080, 9000]"))?;
    let ledger = address(cluster, "payments", "ledger")?;
    let caller = address(cluster, "shop", "checkout")?;
    let network = network_of(cluster, "node-a", caller.parse()?)?;
    let echo = SocketAddr::new(ledger.parse()?, 9000);
    let live = cluster.wait_until("the connection", PATIENCE, |_| {
        let mut live = Live::open(&network, echo)?;
        live.echo()?;
        Ok(live)
    })?;
    let before = names(cluster)?;
    let load = Load {
        network: &network,
        echo,
        over: AtomicBool::new(false),
        tried: AtomicU64::new(0),
        failed: AtomicU64::new(0),
    };
    let lasted = thread::scope(|scope| {
        let held = scope.spawn(|| load.hold(live));
        let callers = [(); 2].map(|()| scope.spawn(|| load.call()));
        let replaced = replace(cluster, &format!("http://{ledger}:8080/"));
        // What the last one that goes leaves behind would show now.
        thread::sleep(Duration::from_secs(3));
        load.over.store(true, Ordering::Relaxed);
        for caller in callers {
            drop(caller.join());
        }
        replaced?;
        held.join().map_err(|_| anyhow::anyhow!("the one that held a connection panicked"))
    })
    .with_context(|| everything(cluster))?;
    let (failed, tried) = (load.failed.into_inner(), load.tried.into_inner());
    eprintln!("{failed} of {tried} new connections failed; the one before lasted {lasted:?}");
    ensure!(failed == 0 && tried > ENOUGH, "{failed} of {tried} connections failed");
    ensure!(lasted > DRAIN, "the connection that was open before lasted {lasted:?} only");
    let after = names(cluster)?;
    ensure!(after.len() == 2 && before.iter().all(|name| !after.contains(name)), "{after:?}");
    cluster.apply(POLICY).map(drop)
}

/// Replaces all agents, and meanwhile starts a pod on each node.
fn replace(cluster: &Cluster, url: &str) -> anyhow::Result<()> {
    let agents = ["--namespace=hauberk-system", "daemonset/hauberk-agent"];
    cluster.kubectl(&[["rollout", "restart"].as_slice(), &agents].concat())?;
    let pods = [("upgrade-a", "node-a"), ("upgrade-b", "node-b")];
    let outside = server(cluster)?;
    for (name, node) in pods {
        cluster.apply(&hasty(name, node, outside, url))?;
    }
    cluster.kubectl(&[["rollout", "status", "--timeout=120s"].as_slice(), &agents].concat())?;
    for (name, node) in pods {
        cluster.wait_pod("shop", name, PATIENCE)?;
        let said = cluster.kubectl(&["logs", "--namespace=shop", name])?;
        ensure!(!said.contains("LEAKED"), "{name} was not captured: {said}");
        cluster.delete(&hasty(name, node, outside, url))?;
    }
    Ok(())
}

fn names(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let names = cluster.kubectl(&[
        "get",
        "pods",
        "--namespace=hauberk-system",
        "--selector=app.kubernetes.io/component=agent",
        "--output=jsonpath={.items[*].metadata.name}",
    ])?;
    Ok(names.split_whitespace().map(str::to_owned).collect())
}
