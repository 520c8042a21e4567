//! The way out. The last tests: nothing of the mesh is left after them.

use std::net::IpAddr;

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test, admission,
    install::{CHARTS, PATIENCE, everything, install},
    outage::network_of,
    plugin::is_tainted,
    pods::{address, idle},
    policy::{POLICY, get},
    replicas::{hauberk, told},
    transitions::Load,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("an_upgrade_and_a_rollback_keep_the_mesh", an_upgrade_and_a_rollback_keep_the_mesh),
    (
        "an_installation_whose_namespace_was_deleted_is_replaced",
        an_installation_whose_namespace_was_deleted_is_replaced,
    ),
    ("uninstalling_leaves_nothing_and_pods_talk", uninstalling_leaves_nothing_and_pods_talk),
];

const NAMESPACE: &str = "--namespace=hauberk-system";

fn holds(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", "http://ledger.payments/")?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })?;
    ensure!(get(cluster, "web", "http://ledger.payments/").is_err(), "nobody allowed it");
    Ok(())
}

fn an_upgrade_and_a_rollback_keep_the_mesh(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    holds(cluster)?;
    let root = |cluster: &Cluster| {
        cluster.kubectl(&["get", "secret", NAMESPACE, "hauberk-ca", "--output=jsonpath={.data}"])
    };
    let before = root(cluster)?;
    let chart = format!("{CHARTS}/hauberk");
    let upgrade =
        ["upgrade", "hauberk", &chart, NAMESPACE, "--reuse-values", "--wait", "--timeout=120s"];
    cluster
        .helm(
            &[
                upgrade.as_slice(),
                &["--set=agent.drain=2s", "--set=controlPlane.podLabels.round=two"],
            ]
            .concat(),
        )
        .with_context(|| everything(cluster))?;
    holds(cluster)?;
    admission::warns(cluster)?;
    cluster
        .helm(&["rollback", "hauberk", "1", NAMESPACE, "--wait", "--timeout=120s"])
        .with_context(|| everything(cluster))?;
    holds(cluster)?;
    admission::warns(cluster)?;
    ensure!(root(cluster)? == before, "the CA was made anew");
    Ok(())
}

/// Somebody deletes the mesh's namespace, with its CA. What was enforced stays closed, everything else goes on, and
/// whoever installs it again has to mend nothing.
fn an_installation_whose_namespace_was_deleted_is_replaced(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    holds(cluster)?;
    let before = told(cluster, &["status"])?;
    cluster.kubectl(&["delete", "namespace", "hauberk-system", "--timeout=120s"])?;
    for caller in ["checkout", "web"] {
        let reached = get(cluster, caller, "http://ledger.payments/");
        ensure!(reached.is_err(), "{caller} reaches an enforced pod: {reached:?}");
    }
    cluster.kubectl(&["create", "namespace", "newer"])?;
    for namespace in ["loose", "shop", "newer"] {
        // A new namespace has its service account a moment later.
        cluster.wait_until("a pod's object", PATIENCE, |cluster| {
            cluster.apply(&idle(namespace, "orphan", "default", "{}")).map(drop)
        })?;
    }
    cluster.wait_pod("loose", "orphan", PATIENCE)?;
    for (namespace, why) in [
        ("shop", "namespace shop is in the mesh; if Hauberk was removed"),
        ("newer", "namespace newer is newer than what the agent knew"),
    ] {
        cluster.wait_until("the reason why a pod does not start", PATIENCE, |cluster| {
            let about = format!("--namespace={namespace}");
            let events = cluster.kubectl(&["get", "events", &about, "--output=json"])?;
            ensure!(events.contains(why), "no {why:?} in {events}");
            Ok(())
        })?;
    }

    install(cluster, &[])?;
    holds(cluster)?;
    for namespace in ["shop", "newer"] {
        cluster.wait_pod(namespace, "orphan", PATIENCE)?;
    }
    let logs = cluster.kubectl(&[
        "logs",
        NAMESPACE,
        "--tail=-1",
        "--selector=app.kubernetes.io/component=agent",
    ])?;
    ensure!(logs.contains("is of another installation"), "{logs}");
    cluster
        .wait_until("nothing to be wrong", PATIENCE, |cluster| {
            let check = hauberk(cluster, &["check"])?;
            let text = String::from_utf8_lossy(&check.stdout).into_owned();
            ensure!(check.status.success(), "{text}");
            Ok(())
        })
        .with_context(|| format!("before:\n{before}\n{}", everything(cluster)))?;
    cluster.kubectl(&["delete", "namespace", "newer", "--timeout=60s"])?;
    for namespace in ["loose", "shop"] {
        let about = format!("--namespace={namespace}");
        cluster.kubectl(&["delete", "pod", &about, "orphan", "--grace-period=1"])?;
    }
    the_numbering_begins_anew(cluster)
}

/// What the replicas agree on is lost, or older than what agents know, as after a restored backup.
fn the_numbering_begins_anew(cluster: &Cluster) -> anyhow::Result<()> {
    let policy = POLICY.replace("[8080]", "[8081]");
    cluster.kubectl(&["delete", "configmap", NAMESPACE, "hauberk-state"])?;
    cluster.apply(&policy)?;
    cluster.wait_until("the policy of another epoch", PATIENCE, |cluster| {
        ensure!(get(cluster, "checkout", "http://ledger.payments/").is_err(), "it is not enforced");
        Ok(())
    })?;
    cluster.apply(POLICY)?;
    holds(cluster)
}

fn uninstalling_leaves_nothing_and_pods_talk(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    holds(cluster)?;
    let caller: IpAddr = address(cluster, "shop", "checkout")?.parse()?;
    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let network = network_of(cluster, "node-a", caller)?;
    let done = Load::during(&network, &[(ledger, 8080)], |load| {
        load.phase("uninstall", || {
            cluster.helm(&["uninstall", "hauberk", NAMESPACE, "--wait", "--timeout=300s"])?;
            // Helm does not wait for pods to end, and agents remove their rules when their connections have.
            cluster.wait_until("the agents' end", PATIENCE, |cluster| {
                let pods = cluster.kubectl(&["get", "pods", NAMESPACE, "--output=name"])?;
                ensure!(pods.trim().is_empty(), "{pods}");
                Ok(())
            })
        })
    })
    .with_context(|| everything(cluster))?;
    ensure!(done > 1_000, "only {done} requests were made");
    for name in ["node-a", "node-b"] {
        ensure!(!is_tainted(cluster, name)?, "{name} is tainted");
        let node = cluster.node(name)?;
        let rules = node.text(&[
            "sh",
            "-c",
            "nft list tables; for place in /run/netns/*; do nsenter --net=$place nft list tables; \
             nsenter --net=$place ip rule; done",
        ])?;
        ensure!(!rules.contains("hauberk") && !rules.contains("18502"), "{name}: {rules}");
        let network =
            node.text(&["sh", "-c", "cat /etc/cni/net.d/*; ls -A /etc/cni/net.d /opt/cni/bin"])?;
        ensure!(!network.contains("hauberk"), "{name}: {network}");
    }
    let text = get(cluster, "web", "http://ledger.payments/")?;
    ensure!(text == "the ledger\n", "pods do not talk: {text}");
    // Not even one that starts now has to do with it.
    cluster.apply(&idle("shop", "after", "default", "{}"))?;
    cluster.wait_pod("shop", "after", PATIENCE)?;
    ensure!(get(cluster, "after", "http://ledger.payments/")? == "the ledger\n");
    let left = cluster.kubectl(&[
        "get",
        "all,role,rolebinding,serviceaccount",
        NAMESPACE,
        "--output=name",
    ])?;
    ensure!(left.trim() == "serviceaccount/default", "{left}");
    let left = cluster.kubectl(&[
        "get",
        "clusterroles,clusterrolebindings,validatingwebhookconfigurations,\
         validatingadmissionpolicies,validatingadmissionpolicybindings",
        "--selector=app.kubernetes.io/name=hauberk",
        "--output=name",
    ])?;
    ensure!(left.trim().is_empty(), "{left}");
    let namespaces = cluster.kubectl(&["get", "namespaces", "--output=json"])?;
    ensure!(!namespaces.contains("hauberk.dev/Captured"), "a condition is left: {namespaces}");
    let webhooks = cluster.kubectl(&["get", "validatingwebhookconfigurations", "--output=name"])?;
    ensure!(!webhooks.contains("hauberk"), "{webhooks}");
    // What owners declared stays, and can be deleted without anybody's help.
    cluster.helm(&["uninstall", "hauberk-crds", NAMESPACE])?;
    cluster.kubectl(&["get", "accesspolicy", "--namespace=payments", "ledger"])?;
    let kinds = ["accesspolicies", "guardrails", "machines", "workloads"];
    let kinds = kinds.map(|kind| format!("{kind}.hauberk.dev"));
    let mut delete = vec!["delete", "--timeout=30s", "crd"];
    delete.extend(kinds.iter().map(String::as_str));
    cluster.kubectl(&delete)?;
    Ok(())
}
