//! NetworkPolicies beside the mesh, with an engine that enforces them: a connection needs the word of both.

use std::net::IpAddr;

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::Value;

use crate::{
    Test,
    admission::warns,
    agents,
    install::{CHARTS, PATIENCE, everything},
    pods::{address, hasty, idle, server, tries},
    policy::get,
    replicas::a_replica,
    trouble::{LEDGER, allowed},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    (
        "a_network_policy_must_let_the_mesh_port_in_and_holds_beside_it",
        a_network_policy_must_let_the_mesh_port_in_and_holds_beside_it,
    ),
    (
        "behind_its_own_network_policy_the_control_plane_does_its_work",
        behind_its_own_network_policy_the_control_plane_does_its_work,
    ),
];

/// The `checkout` of the shop three times more. They have not connected to anybody yet: an agent keeps what it has
/// with another one, and an engine lets what is open go on.
const NEWCOMERS: [(&str, &str); 3] = [
    ("newcomer", "{tier: front, egress: mesh}"),
    ("shut-in", "{tier: front, egress: plain}"),
    ("outsider", "{}"),
];

/// Who may connect to a port of the ledger: pods of the shop's front.
fn ledger_from_front(port: u16) -> String {
    format!(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: ledger, namespace: payments}}
spec:
  podSelector: {{matchLabels: {{app: ledger}}}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: shop}}}}
      podSelector: {{matchLabels: {{tier: front}}}}
    ports: [{{protocol: TCP, port: {port}}}]
"
    )
}

/// What a pod of the shop may reach: names, and a port in the ledger's namespace.
fn from_shop(pods: &str, port: u16) -> String {
    format!(
        "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: from-{pods}, namespace: shop}}
spec:
  podSelector: {{matchLabels: {{egress: {pods}}}}}
  policyTypes: [Egress]
  egress:
  - ports: [{{protocol: UDP, port: 53}}]
  - to:
    - namespaceSelector: {{matchLabels: {{kubernetes.io/metadata.name: payments}}}}
    ports: [{{protocol: TCP, port: {port}}}]
"
    )
}

/// Nobody may connect to the pods of a namespace.
const NOBODY_TO_LOOSE: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: loose}
spec: {podSelector: {}, policyTypes: [Ingress]}
";

/// Does something while NetworkPolicies are enforced; what a failed one leaves would make the next tests fail, too.
fn enforced(cluster: &Cluster, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let outcome = cluster.start_network_policies().and_then(|()| work());
    let outcome = outcome.with_context(|| everything(cluster));
    let deleted = cluster.kubectl(&["delete", "networkpolicies", "--all", "--all-namespaces"]);
    let stopped = cluster.stop_network_policies();
    outcome?;
    deleted?;
    stopped
}

/// What the server without the mesh says to a caller in the network of `node-a`.
fn in_clear(cluster: &Cluster) -> anyhow::Result<String> {
    let url = format!("http://{}/", server(cluster)?);
    cluster.node("node-a")?.text(&["timeout", "3", "busybox", "wget", "-q", "-O", "-", &url])
}

fn a_network_policy_must_let_the_mesh_port_in_and_holds_beside_it(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    allowed(cluster)?;
    let newcomers = NEWCOMERS.map(|(name, labels)| idle("shop", name, "checkout", labels)).concat();
    cluster.apply(&newcomers)?;
    for (name, _) in NEWCOMERS {
        cluster.wait_pod("shop", name, PATIENCE).with_context(|| everything(cluster))?;
    }
    enforced(cluster, || with_an_engine(cluster))?;
    // Without an engine, it is the mesh's word alone.
    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let text = get(cluster, "outsider", &format!("http://{ledger}:8080/"))?;
    ensure!(text == "the ledger\n", "{text}");
    cluster.delete(&newcomers)?;
    Ok(())
}

fn with_an_engine(cluster: &Cluster) -> anyhow::Result<()> {
    // That it does enforce.
    ensure!(in_clear(cluster)? == "loose words\n", "nobody reaches the server without the mesh");
    cluster.apply(NOBODY_TO_LOOSE)?;
    cluster.wait_until("the engine", PATIENCE, |cluster| {
        ensure!(in_clear(cluster).is_err(), "everybody still reaches the server");
        Ok(())
    })?;

    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let url = format!("http://{ledger}:8080/");
    // For the application's port alone, which is what somebody has who has no mesh yet.
    cluster.apply(&ledger_from_front(8080))?;
    // The engine has taken up one policy after the other: this one, when the next is.
    cluster.delete(NOBODY_TO_LOOSE)?;
    cluster.wait_until("the engine", PATIENCE, |cluster| {
        ensure!(in_clear(cluster)? == "loose words\n");
        Ok(())
    })?;
    unreachable_in_the_log(cluster, "newcomer", &url)?;

    cluster.apply(&ledger_from_front(15_008))?;
    cluster.apply(&from_shop("mesh", 15_008))?;
    cluster.apply(&from_shop("plain", 8080))?;
    cluster.wait_until("the way for the mesh", PATIENCE, |cluster| {
        let text = get(cluster, "newcomer", &url)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })?;
    // Its other address, and its service by name.
    let found = cluster.kubectl_json(&["get", "pod", "--namespace=payments", "ledger"])?;
    let second = found.pointer("/status/podIPs/1/ip").and_then(Value::as_str);
    let second = format!("http://[{}]:8080/", second.context("the ledger has one address")?);
    for url in [second.as_str(), LEDGER] {
        let text = get(cluster, "newcomer", url).with_context(|| url.to_owned())?;
        ensure!(text == "the ledger\n", "{url}: {text}");
    }
    // Who has the mesh's word and not the NetworkPolicy's: at the ledger, and on the way out.
    unreachable_in_the_log(cluster, "outsider", &url)?;
    unreachable_in_the_log(cluster, "shut-in", &url)?;
    // Who has the NetworkPolicy's word and not the mesh's.
    cluster.kubectl(&["label", "--namespace=shop", "pod", "web", "tier=front"])?;
    let before = denials(cluster)?;
    ensure!(get(cluster, "web", &url).is_err(), "the mesh allows it to nobody but the checkout");
    cluster.wait_until("the record of the denial", PATIENCE, |cluster| {
        ensure!(denials(cluster)? > before, "the mesh has denied nothing");
        Ok(())
    })?;
    cluster.kubectl(&["label", "--namespace=shop", "pod", "web", "tier-"])?;
    Ok(())
}

/// How often the mesh has denied the web a connection.
fn denials(cluster: &Cluster) -> anyhow::Result<usize> {
    let lines = agents::lines(cluster, "node-a")?;
    let denied = |line: &&String| {
        line.contains("\"decision\":\"deny\"") && line.contains("\"workload\":\"web\"")
    };
    Ok(lines.iter().filter(denied).count())
}

/// A pod that the mesh allows and a NetworkPolicy does not: it fails, and the record says of what.
fn unreachable_in_the_log(cluster: &Cluster, pod: &str, url: &str) -> anyhow::Result<()> {
    match cluster.exec("shop", pod, &["timeout", "20", "wget", "-q", "-O", "-", url]) {
        Ok(text) => bail!("{pod} came through a port that is shut: {text}"),
        Err(error) => ensure!(format!("{error:#}").contains("Connection refused"), "{error:#}"),
    }
    let record = agents::record(cluster, "node-a", |record| {
        record["src"]["workload"] == pod && record["side"] == "source"
    })?;
    ensure!(record["decision"] == "allow", "a NetworkPolicy was taken for a policy: {record:#}");
    ensure!(record["close_reason"] == "unreachable", "{record:#}");
    let detail = record["detail"].as_str().unwrap_or_default();
    ensure!(detail.starts_with("the destination's agent: "), "{record:#}");
    Ok(())
}

/// Installs the chart again, with or without its NetworkPolicy.
fn upgrade(cluster: &Cluster, enabled: bool) -> anyhow::Result<()> {
    let chart = format!("{CHARTS}/hauberk");
    let enabled = format!("--set=networkPolicy.enabled={enabled}");
    let arguments = ["upgrade", "hauberk", &chart, "--namespace=hauberk-system", "--reuse-values"];
    let more =
        ["--set=networkPolicy.metricsNamespaces={loose}", "--wait", "--timeout=90s", &enabled];
    cluster.helm(&[arguments.as_slice(), &more].concat()).map(drop)
}

fn behind_its_own_network_policy_the_control_plane_does_its_work(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    allowed(cluster)?;
    let outcome = enforced(cluster, || {
        upgrade(cluster, true)?;
        behind_its_own(cluster)
    });
    upgrade(cluster, false)?;
    outcome
}

fn behind_its_own(cluster: &Cluster) -> anyhow::Result<()> {
    let replica = a_replica(cluster)?;
    let ask = |namespace: &str, pod: &str| {
        let url = format!("http://{replica}:9464/readyz");
        cluster.exec(namespace, pod, &["timeout", "3", "wget", "-q", "-O", "-", &url])
    };
    // Without the mesh, in a namespace that nothing names.
    cluster.apply("{apiVersion: v1, kind: Namespace, metadata: {name: elsewhere}}")?;
    cluster.wait_until("the namespace's default account", PATIENCE, |cluster| {
        let account = ["get", "serviceaccount", "--namespace=elsewhere", "default"];
        cluster.kubectl(&account).map(drop)
    })?;
    cluster.apply(&idle("elsewhere", "it", "default", "{}"))?;
    cluster.wait_pod("elsewhere", "it", PATIENCE)?;
    cluster.wait_until("the engine", PATIENCE, |_| {
        ensure!(ask("elsewhere", "it").is_err(), "any namespace reads the metrics");
        ask("loose", "server").context("a namespace that may")
    })?;
    cluster.kubectl(&["delete", "namespace", "elsewhere"])?;

    // It goes on telling agents, and issues to pods that start.
    for node in ["node-a", "node-b"] {
        let name = format!("behind-on-{node}");
        cluster.apply(&hasty(&name, node, server(cluster)?, LEDGER))?;
        let log = tries(cluster, "shop", &name)?;
        ensure!(!log.contains("LEAKED"), "{name} is not in the mesh: {log}");
        cluster.kubectl(&["delete", "pod", "--namespace=shop", &name])?;
    }
    // The API server reaches its webhook.
    warns(cluster)?;
    allowed(cluster)
}
