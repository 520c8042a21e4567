//! From an audited namespace to an enforced one, by the policies that were learned.

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    install::{PATIENCE, everything},
    policy::{POLICY, condition, get},
    replicas::told,
};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "an_audited_namespace_is_learned_and_enforced",
    an_audited_namespace_is_learned_and_enforced,
)];

const URL: &str = "http://ledger.payments/";

fn set_mode(cluster: &Cluster, mode: &str) -> anyhow::Result<()> {
    let mode = format!("hauberk.dev/mode={mode}");
    for namespace in ["shop", "payments"] {
        cluster.kubectl(&["label", "--overwrite", "namespace", namespace, &mode])?;
    }
    Ok(())
}

fn an_audited_namespace_is_learned_and_enforced(cluster: &Cluster) -> anyhow::Result<()> {
    let outcome = audit_and_learn(cluster).and_then(|learned| enforce(cluster, &learned));
    let outcome = outcome.with_context(|| everything(cluster));
    // As the other tests want to find it.
    set_mode(cluster, "enforce")?;
    cluster.apply(POLICY)?;
    let arguments = ["delete", "accesspolicy", "--namespace=payments", "--ignore-not-found"];
    cluster.kubectl(&[arguments.as_slice(), &["learned-ledger"]].concat())?;
    outcome?;
    cluster.wait_until("the policy that was there before", PATIENCE, |cluster| {
        get(cluster, "checkout", URL).map(drop)
    })
}

/// What `hauberk learn` writes after an audited connection through a service.
fn audit_and_learn(cluster: &Cluster) -> anyhow::Result<String> {
    cluster.delete(POLICY)?;
    set_mode(cluster, "audit")?;
    cluster.wait_until("the audited connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", URL)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })?;
    let learned = cluster.wait_until("what was seen", PATIENCE, |cluster| {
        let learned = told(cluster, &["learn", "--namespace", "payments"])?;
        ensure!(learned.contains("name: learned-ledger, namespace: payments"), "{learned}");
        Ok(learned)
    })?;
    for part in [
        "target: {serviceAccount: ledger}",
        // The pod's own port, not the service's.
        "ports: [8080]",
        "from: [{serviceAccount: {namespace: shop, name: checkout}}]",
    ] {
        ensure!(learned.contains(part), "no {part:?} in\n{learned}");
    }
    ensure!(!learned.contains("name: web"), "nobody of that name connected\n{learned}");
    Ok(learned)
}

fn enforce(cluster: &Cluster, learned: &str) -> anyhow::Result<()> {
    cluster.apply(learned)?;
    cluster.wait_until("the learned policy", PATIENCE, |cluster| {
        let arguments = ["get", "accesspolicy", "--namespace=payments", "learned-ledger"];
        let policy = cluster.kubectl_json(&arguments)?;
        for kind in ["Accepted", "ResolvedRefs", "Programmed"] {
            let (status, message) = condition(&policy, kind)?;
            ensure!(status == "True", "{kind}: {message}");
        }
        Ok(())
    })?;
    let left = told(cluster, &["learn", "--namespace", "payments"])?;
    ensure!(!left.contains("kind: AccessPolicy"), "it is allowed by now\n{left}");
    set_mode(cluster, "enforce")?;
    cluster.wait_until("the mesh to refuse", PATIENCE, |cluster| {
        if get(cluster, "web", URL).is_ok() {
            bail!("nothing is refused");
        }
        Ok(())
    })?;
    let text = get(cluster, "checkout", URL)?;
    ensure!(text == "the ledger\n", "{text}");
    ensure!(get(cluster, "web", URL).is_err(), "nobody allowed it");
    Ok(())
}
