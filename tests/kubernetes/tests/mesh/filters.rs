//! A packet filter on a pod's node, with the effect that an engine of NetworkPolicies gives a policy for the
//! pod. No such engine runs in this cluster: its rules are written here.

use std::{fmt::Write, net::IpAddr};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test, agents,
    install::{PATIENCE, everything},
    pods::server,
    policy::get,
    trouble::allowed,
};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "a_packet_filter_on_the_node_must_let_the_mesh_port_in_and_no_other",
    a_packet_filter_on_the_node_must_let_the_mesh_port_in_and_no_other,
)];

/// One more `shop/checkout`, which has not connected to anybody yet: an agent keeps what it has with
/// another one, and a filter lets what is open go on.
const NEWCOMER: &str = "
apiVersion: v1
kind: Pod
metadata: {name: newcomer, namespace: shop}
spec:
  nodeName: node-a
  serviceAccountName: checkout
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
";

/// Drops all that is forwarded to these addresses but one TCP port, and what answers or goes on. What the node
/// itself sends, such as probes, is not forwarded, and engines let it pass, too.
fn only(port: u16, addresses: &[IpAddr]) -> anyhow::Result<String> {
    let mut rules = String::from(
        "table inet engine {
  chain forward {
    type filter hook forward priority 0; policy accept;
    ct state established,related accept
",
    );
    for address in addresses {
        let family = if address.is_ipv4() { "ip" } else { "ip6" };
        writeln!(rules, "    {family} daddr {address} tcp dport {port} accept")?;
        writeln!(rules, "    {family} daddr {address} drop")?;
    }
    rules.push_str("  }\n}\n");
    Ok(rules)
}

/// Does something while the filter is in force on `node-b`.
fn behind(
    cluster: &Cluster,
    rules: &str,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let node = cluster.node("node-b")?;
    node.text(&["sh", "-c", "printf %s \"$0\" | nft --file -", rules])?;
    let outcome = work();
    node.text(&["nft", "delete", "table", "inet", "engine"])?;
    outcome
}

fn addresses(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<Vec<IpAddr>> {
    let found = cluster.kubectl_json(&["get", "pod", "--namespace", namespace, pod])?;
    let listed = found["status"]["podIPs"].as_array().context("no addresses")?;
    let texts = listed.iter().filter_map(|address| address["ip"].as_str());
    texts.map(|text| text.parse::<IpAddr>().map_err(anyhow::Error::from)).collect()
}

fn a_packet_filter_on_the_node_must_let_the_mesh_port_in_and_no_other(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    allowed(cluster)?;
    cluster.apply(NEWCOMER)?;
    cluster.wait_pod("shop", "newcomer", PATIENCE).with_context(|| everything(cluster))?;
    let ledger = addresses(cluster, "payments", "ledger")?;
    let first = ledger.first().context("the ledger has no address")?;
    // By its address: of a service's other addresses it would be another connection.
    let url = format!("http://{first}:8080/");
    let ask = |cluster: &Cluster| -> anyhow::Result<()> {
        let text = get(cluster, "newcomer", &url)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    };

    // As a policy for the application's port alone, which is not what the mesh needs.
    behind(cluster, &only(8080, &ledger)?, || {
        let wget = ["timeout", "20", "wget", "-q", "-O", "-", url.as_str()];
        match cluster.exec("shop", "newcomer", &wget) {
            Ok(text) => bail!("it came through a port that is shut: {text}"),
            Err(error) => ensure!(format!("{error:#}").contains("reset by peer"), "{error:#}"),
        }
        let record = agents::record(cluster, "node-a", |record| {
            record["src"]["workload"] == "newcomer" && record["side"] == "source"
        })?;
        ensure!(record["decision"] == "allow", "a filter was taken for a policy: {record:#}");
        ensure!(record["close_reason"] == "unreachable", "{record:#}");
        let detail = record["detail"].as_str().unwrap_or_default();
        ensure!(detail == "the destination's agent: timed out", "{record:#}");
        Ok(())
    })?;

    let open = server(cluster)?;
    let in_clear = |cluster: &Cluster| {
        let command = ["timeout", "3", "busybox", "wget", "-q", "-O", "-"];
        let url = format!("http://{open}/");
        cluster.node("node-a")?.text(&[command.as_slice(), &[url.as_str()]].concat())
    };
    ensure!(in_clear(cluster)? == "loose words\n", "nobody reaches the server without the mesh");
    let both: Vec<IpAddr> =
        ledger.iter().copied().chain(addresses(cluster, "loose", "server")?).collect();
    behind(cluster, &only(15_008, &both)?, || {
        // It does filter.
        let refused = in_clear(cluster);
        ensure!(refused.is_err(), "the filter lets everything in: {refused:?}");
        ask(cluster)?;
        ensure!(get(cluster, "web", &url).is_err(), "nobody allowed it");
        Ok(())
    })?;
    ensure!(in_clear(cluster)? == "loose words\n", "the filter is still there");
    cluster.delete(NEWCOMER)?;
    Ok(())
}
