//! What whoever applies an object is told at once.

use std::{
    io::{Seek, Write},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    control_plane::scale,
    install::{PATIENCE, everything},
    policy::{POLICY, condition, ledger_policy},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("a_mode_that_is_none_is_refused", a_mode_that_is_none_is_refused),
    ("a_peer_that_nobody_is_is_warned_of", a_peer_that_nobody_is_is_warned_of),
    (
        "a_rule_about_a_services_port_is_warned_of_with_that_of_its_pods",
        a_rule_about_a_services_port_is_warned_of_with_that_of_its_pods,
    ),
    (
        "an_example_that_fails_is_warned_of_with_what_holds_instead",
        an_example_that_fails_is_warned_of_with_what_holds_instead,
    ),
    (
        "the_control_plane_fills_in_two_fields_and_no_more",
        the_control_plane_fills_in_two_fields_and_no_more,
    ),
    (
        "without_a_control_plane_policies_are_stored_without_delay",
        without_a_control_plane_policies_are_stored_without_delay,
    ),
];

/// What `kubectl apply` writes to standard error: warnings.
fn told(cluster: &Cluster, manifests: &str, more: &[&str]) -> anyhow::Result<String> {
    let mut file = tempfile::tempfile()?;
    file.write_all(manifests.as_bytes())?;
    file.rewind()?;
    let mut command = cluster.control_command("kubectl");
    command.args(["apply", "--filename=-"]).args(more).stdin(file);
    let output = cluster.in_control(&mut command)?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{text}");
    Ok(text)
}

fn a_mode_that_is_none_is_refused(cluster: &Cluster) -> anyhow::Result<()> {
    let label = |namespace: &str, mode: &str| {
        let mode = format!("hauberk.dev/mode={mode}");
        let label = ["label", "--overwrite", "--dry-run=server", "namespace", namespace, &mode];
        cluster.kubectl(&label)
    };
    for mode in ["enforce", "audit", "off", "Enforce", "Audit", "Off"] {
        label("shop", mode)?;
    }
    for mode in ["audti", "ENFORCE", ""] {
        let said = label("shop", mode).err().with_context(|| format!("{mode:?} was taken"))?;
        let wanted =
            format!("label hauberk.dev/mode: \"{mode}\" is none of enforce, audit and off");
        ensure!(format!("{said:#}").contains(&wanted), "{said:#}");
    }
    for mode in ["enforce", "audit"] {
        let said = label("hauberk-system", mode).err().context("the mesh is in the mesh")?;
        let wanted = "the mesh itself runs in this namespace, and cannot be in the mesh";
        ensure!(format!("{said:#}").contains(wanted), "{said:#}");
    }
    label("hauberk-system", "off")?;
    let new = "{apiVersion: v1, kind: Namespace, metadata: {name: new, labels: {hauberk.dev/mode: audti}}}";
    let said = told(cluster, new, &["--dry-run=server"]).err().context("a new one was taken")?;
    ensure!(format!("{said:#}").contains("is none of enforce, audit and off"), "{said:#}");
    // What has nothing to do with the mode is nobody's business.
    cluster.kubectl(&["label", "--dry-run=server", "namespace", "hauberk-system", "a=b"]).map(drop)
}

/// A policy that allows somebody who is not there.
fn stranger(name: &str) -> String {
    POLICY
        .replace("name: ledger, namespace", &format!("name: {name}, namespace"))
        .replace("{namespace: shop, name: checkout}", "{namespace: shop, name: nobody}")
}

/// The API server knows the webhook, and gets its warnings.
pub(crate) fn warns(cluster: &Cluster) -> anyhow::Result<()> {
    let warned = cluster.wait_until("a warning", PATIENCE, |cluster| {
        let text = told(cluster, &stranger("tried"), &["--dry-run=server"])?;
        ensure!(text.contains("ResolvedRefs=False"), "no warning: {text:?}");
        Ok(())
    });
    warned.with_context(|| everything(cluster))
}

fn a_peer_that_nobody_is_is_warned_of(cluster: &Cluster) -> anyhow::Result<()> {
    warns(cluster)?;
    let text = told(cluster, &stranger("warned"), &[])?;
    let problem = "rule checkout allows spiffe://test.example/ns/shop/sa/nobody, which no registered workload has";
    let wanted = format!("Warning: AccessPolicy payments/warned: ResolvedRefs=False: {problem}\n");
    ensure!(text == wanted, "{text}");
    // It is stored, and its status says the same.
    cluster.wait_until("the status", PATIENCE, |cluster| {
        let policy =
            cluster.kubectl_json(&["get", "accesspolicy", "--namespace=payments", "warned"])?;
        let (status, message) = condition(&policy, "ResolvedRefs")?;
        ensure!(status == "False" && message == problem, "{status}: {message}");
        Ok(())
    })?;
    cluster.kubectl(&["delete", "accesspolicy", "--namespace=payments", "warned"])?;
    let good = POLICY.replace("name: ledger, namespace", "name: good, namespace");
    let text = told(cluster, &good, &["--dry-run=server"])?;
    ensure!(text.is_empty(), "a good policy is warned of: {text}");
    Ok(())
}

fn a_rule_about_a_services_port_is_warned_of_with_that_of_its_pods(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    warns(cluster)?;
    let policy = POLICY.replace("name: ledger, namespace", "name: misled, namespace");
    let text = told(cluster, &policy.replace("[8080]", "[80]"), &["--dry-run=server"])?;
    let problem = "rule checkout allows port 80, which is that of Service payments/ledger; its pods listen on 8080, and \
                   rules are about the pods' ports";
    let wanted = format!("Warning: AccessPolicy payments/misled: ResolvedRefs=False: {problem}\n");
    ensure!(text == wanted, "{text}");
    Ok(())
}

fn an_example_that_fails_is_warned_of_with_what_holds_instead(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    warns(cluster)?;
    cluster.apply(POLICY)?;
    cluster.wait_until("the good policy", PATIENCE, |cluster| {
        let policy = ledger_policy(cluster)?;
        let (status, message) = condition(&policy, "Accepted")?;
        ensure!(status == "True", "{message}");
        let (seen, is) =
            (&policy["status"]["observedGeneration"], &policy["metadata"]["generation"]);
        ensure!(seen == is, "generation {is}, seen {seen}");
        Ok(())
    })?;
    let failing = format!(
        "{POLICY}  tests:\n  - {{from: {{serviceAccount: {{namespace: shop, name: web}}}}, port: 8080, expect: allow}}\n"
    );
    let text = told(cluster, &failing, &[])?;
    for wanted in [
        "Accepted=False: spec.tests[0]: the test fails: service account shop/web on port 8080",
        "Programmed=False: it was not accepted; the version that was accepted before stays in force",
    ] {
        let wanted = format!("Warning: AccessPolicy payments/ledger: {wanted}");
        ensure!(text.contains(&wanted), "no {wanted:?} in\n{text}");
    }
    let stored = ledger_policy(cluster)?;
    ensure!(stored["spec"]["tests"][0]["expect"] == "allow", "it was not stored: {stored:#}");
    cluster.apply(POLICY)?;
    Ok(())
}

fn the_control_plane_fills_in_two_fields_and_no_more(cluster: &Cluster) -> anyhow::Result<()> {
    warns(cluster)?;
    let configuration = |more: &[&str]| {
        let first = [more, &["validatingwebhookconfiguration", "hauberk-control-plane"]].concat();
        cluster.kubectl(&first)
    };
    let webhooks = || configuration(&["get", "--output=jsonpath={.webhooks}"]);
    let before = webhooks()?;
    for change in [
        r#"[{"op": "replace", "path": "/webhooks/0/rules/0/apiGroups", "value": ["*"]}]"#,
        r#"[{"op": "replace", "path": "/webhooks/0/rules/0/resources", "value": ["secrets"]}]"#,
        r#"[{"op": "replace", "path": "/webhooks/0/failurePolicy", "value": "Fail"}]"#,
        r#"[{"op": "replace", "path": "/webhooks/0/clientConfig/service/name", "value": "other"}]"#,
        r#"[{"op": "remove", "path": "/webhooks/0/clientConfig/service"},
            {"op": "add", "path": "/webhooks/0/clientConfig/url", "value": "https://192.0.2.1/"}]"#,
        r#"[{"op": "remove", "path": "/webhooks/0"}]"#,
    ] {
        let account = "--as=system:serviceaccount:hauberk-system:hauberk-control-plane";
        let patched = configuration(&["patch", account, "--type=json", "--patch", change]);
        let refusal = patched.err().with_context(|| format!("it was taken: {change}"))?;
        let refusal = format!("{refusal:#}");
        ensure!(
            refusal.contains("ValidatingAdmissionPolicy 'hauberk-control-plane'"),
            "{change}: {refusal}"
        );
    }
    ensure!(webhooks()? == before, "something was changed: {}", webhooks()?);
    Ok(())
}

fn without_a_control_plane_policies_are_stored_without_delay(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    scale(cluster, 0)?;
    let started = Instant::now();
    let text = told(cluster, &stranger("alone"), &[]);
    let took = started.elapsed();
    scale(cluster, 1)?;
    let text = text?;
    ensure!(text.is_empty(), "who warned? {text}");
    eprintln!("stored in {took:?} without a control plane");
    ensure!(took < Duration::from_secs(8), "kubectl apply took {took:?}");
    cluster.kubectl(&["delete", "accesspolicy", "--namespace=payments", "alone"])?;
    // The next one takes up where the last one was.
    warns(cluster)
}
