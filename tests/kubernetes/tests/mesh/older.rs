//! Connections that are older than the capture of their pods.

use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::Value;

use crate::{
    Test,
    install::{PATIENCE, everything},
    outage::{Live, network_of},
    pods::address,
    policy::{POLICY, get},
    replicas::{hauberk, told},
    transitions::{free, label},
    trouble::LEDGER,
};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "older_connections_are_counted_learned_and_closed",
    older_connections_are_counted_learned_and_closed,
)];

/// As the charts are installed here.
const CLOSED_AFTER: Duration = Duration::from_secs(10);

/// For one that is never idle.
const BUSY_GRACE: Duration = Duration::from_secs(10);

fn older_connections_are_counted_learned_and_closed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.delete(POLICY)?;
    let outcome = from_off_to_enforce(cluster).with_context(|| everything(cluster));
    // As the other tests want to find it.
    label(cluster, "hauberk.dev/mode=enforce")?;
    cluster.apply(POLICY)?;
    let arguments = ["delete", "accesspolicy", "--namespace=payments", "--ignore-not-found"];
    cluster.kubectl(&[arguments.as_slice(), &["learned-ledger"]].concat())?;
    outcome?;
    cluster.wait_until("the policy that was there before", PATIENCE, |cluster| {
        get(cluster, "checkout", LEDGER).map(drop)
    })
}

fn from_off_to_enforce(cluster: &Cluster) -> anyhow::Result<()> {
    let caller: IpAddr = address(cluster, "shop", "checkout")?.parse()?;
    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let network = network_of(cluster, "node-a", caller)?;
    let server = SocketAddr::new(ledger, 9000);
    label(cluster, "hauberk.dev/mode-")?;
    let mut idle = cluster.wait_until("pods without the mesh", PATIENCE, |cluster| {
        free(cluster, caller)?;
        let mut live = Live::open(&network, server)?;
        live.echo()?;
        Ok(live)
    })?;
    let mut busy = Live::open(&network, server)?;
    cluster.wait_until("no condition outside of the mesh", PATIENCE, |cluster| {
        ensure!(captured(cluster)?.is_none(), "{:?}", captured(cluster)?);
        Ok(())
    })?;

    label(cluster, "hauberk.dev/mode=audit")?;
    for pod in ["shop/checkout", "payments/ledger"] {
        cluster.wait_until("the older connections to be counted", PATIENCE, |cluster| {
            let found = workload(cluster, pod)?;
            ensure!(found["older"] == 2 && found["captured"] == true, "{found}");
            ensure!(found["older_closed"] == "-", "an audited one is not closed: {found}");
            Ok(())
        })?;
    }
    for one in [&mut idle, &mut busy] {
        one.echo().context("an older connection of an audited pod")?;
    }
    let status = told(cluster, &["status"])?;
    ensure!(status.contains("partly: 2 older connections in clear"), "{status}");
    let check = String::from_utf8(hauberk(cluster, &["check"])?.stdout)?;
    ensure!(check.contains("payments/ledger on node-b has 2 older connections"), "{check}");

    cluster.wait_until("the namespace's condition", PATIENCE, |cluster| {
        let told = captured(cluster)?.context("no condition")?;
        ensure!(
            told.starts_with("False OlderConnections: 2 connections of 1 pod in clear"),
            "{told}"
        );
        Ok(())
    })?;

    let learned = cluster.wait_until("what is older to be learned", PATIENCE, |cluster| {
        let learned = told(cluster, &["learn", "--namespace", "payments"])?;
        ensure!(learned.contains("ports: [9000]"), "{learned}");
        Ok(learned)
    })?;
    // What is older from tests before counts as well.
    let (before, _) = learned
        .split_once(" of them older than the capture, from who has the address")
        .with_context(|| learned.clone())?;
    let counted: u64 = before.rsplit(' ').next().unwrap_or_default().parse()?;
    ensure!(counted >= 2, "{learned}");
    let caller = "from: [{serviceAccount: {namespace: shop, name: checkout}}]";
    ensure!(learned.contains(caller), "no {caller:?} in\n{learned}");
    cluster.apply(&learned)?;

    label(cluster, "hauberk.dev/mode=enforce")?;
    let announced = cluster.wait_until("their end to be announced", PATIENCE, |cluster| {
        let found = workload(cluster, "payments/ledger")?;
        ensure!(found["older"] == 2 && found["older_closed"] != "-", "{found}");
        Ok(Instant::now())
    })?;
    idle.echo().context("an older connection, before its time")?;
    let closed = talk_until_closed(&mut busy)?;
    let took = closed.duration_since(announced);
    eprintln!("the busy one was closed {took:?} after it was announced");
    ensure!(took > CLOSED_AFTER / 2, "it was closed before its time");
    ensure!(idle.echo().is_err(), "the idle one goes on in clear");
    for pod in ["shop/checkout", "payments/ledger"] {
        cluster.wait_until("nothing older", PATIENCE, |cluster| {
            let found = workload(cluster, pod)?;
            ensure!(found["older"] == 0, "{found}");
            Ok(())
        })?;
    }
    // As people wait for it.
    let wait = ["wait", "namespace/shop", "namespace/payments", "--timeout=60s"];
    cluster.kubectl(&[wait.as_slice(), &["--for=condition=hauberk.dev/Captured"]].concat())?;
    let denied = told(cluster, &["denied"])?;
    ensure!(denied.contains("uncaptured"), "{denied}");
    // What opens it anew goes through the mesh, by what was learned, whatever port it had.
    for port in [idle.port()?, busy.port()?] {
        let mut anew = Live::open_from(&network, port, server).context("connect from its port")?;
        anew.echo().context("the same through the mesh")?;
    }
    let found = workload(cluster, "payments/ledger")?;
    ensure!(found["older"] == 0, "what is carried is taken for older: {found}");
    Ok(())
}

fn talk_until_closed(live: &mut Live) -> anyhow::Result<Instant> {
    let began = Instant::now();
    while began.elapsed() < CLOSED_AFTER + BUSY_GRACE + PATIENCE {
        if live.echo().is_err() {
            return Ok(Instant::now());
        }
        thread::sleep(Duration::from_millis(50));
    }
    bail!("it is open after {:?}", began.elapsed());
}

/// What the condition of `payments` says.
fn captured(cluster: &Cluster) -> anyhow::Result<Option<String>> {
    let namespace = cluster.kubectl_json(&["get", "namespace", "payments"])?;
    let conditions = namespace["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let ours = conditions.iter().find(|one| one["type"] == "hauberk.dev/Captured");
    Ok(ours.map(|one| {
        let word = |key: &str| one[key].as_str().unwrap_or("?").to_owned();
        format!("{} {}: {}", word("status"), word("reason"), word("message"))
    }))
}

fn workload(cluster: &Cluster, name: &str) -> anyhow::Result<Value> {
    let status: Value = serde_json::from_str(&told(cluster, &["status", "--output", "json"])?)?;
    let found = status["workloads"].as_array().context("no workloads")?;
    found.iter().find(|one| one["workload"] == name).cloned().context("no such workload")
}
