//! A CA that cert-manager makes: it takes the place of the own one, is renewed, and another one takes its place,
//! while pods talk. In a cluster of its own, whose certificates live for seconds: a root waits for as long as they
//! live.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::{Value, json};

use crate::{
    Test, admission,
    control_plane::{NAMESPACE, kill, pods, rolled_out, while_connecting},
    install::{self, CHARTS, PATIENCE},
    policy::{self, POLICY, get},
    replicas::told,
};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "a_ca_of_cert_manager_comes_and_changes_and_nobody_notices",
    a_ca_of_cert_manager_comes_and_changes,
)];

/// Until a root that is new may issue, and until an old one is forgotten: two and a half lives of a certificate,
/// and some looks. Until a renewed one may: two minutes, for clocks that are behind, and half a life.
const ROTATION: Duration = Duration::from_secs(300);

/// A cluster whose certificates live for half a minute.
pub(crate) fn start() -> anyhow::Result<Cluster> {
    let cluster = install::start_with(&[
        "--set=controlPlane.workloadCertificateLifetime=30s",
        "--set=controlPlane.nodeCertificateLifetime=30s",
        "--set=controlPlane.replicas=2",
    ])?;
    policy::place(&cluster)?;
    Ok(cluster)
}

/// Where the certificate that the chart's README shows gets its roots from: cert-manager's own documentation makes
/// one so.
fn root(name: &str) -> String {
    format!(
        "
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {{name: self-signed, namespace: hauberk-system}}
spec: {{selfSigned: {{}}}}
---
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {{name: {name}, namespace: hauberk-system}}
spec:
  isCA: true
  commonName: {name}.test.example
  secretName: {name}
  privateKey: {{algorithm: ECDSA, size: 256}}
  issuerRef: {{name: self-signed, kind: Issuer}}
---
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {{name: {name}, namespace: hauberk-system}}
spec: {{ca: {{secretName: {name}}}}}
"
    )
}

/// The certificate of the chart's README, word for word.
fn certificate() -> anyhow::Result<String> {
    let readme = fs::read_to_string(format!("{CHARTS}/hauberk/README.md"))?;
    let mut blocks = readme.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let block = blocks.find(|block| block.contains("kind: Certificate"));
    Ok(block.context("the chart's README shows no certificate")?.to_owned())
}

/// An entry of a Secret of Hauberk's namespace, as text.
fn entry(cluster: &Cluster, secret: &str, name: &str) -> anyhow::Result<String> {
    let path = format!("--output=go-template={{{{index .data \"{name}\" | base64decode}}}}");
    cluster.kubectl(&["get", "secret", NAMESPACE, secret, &path])
}

/// Fails unless a chain, leaf first, leads to this root and to no other.
fn leads_to(root: &str, chain: &[String]) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (leaf, rest) = chain.split_first().context("no certificate")?;
    let files = [("root", root), ("leaf", leaf), ("rest", &rest.concat())];
    for (name, text) in files {
        fs::write(folder.path().join(name), text)?;
    }
    let output = Command::new("openssl")
        .args(["verify", "-no-CApath", "-no-CAstore", "-CAfile", "root", "-untrusted", "rest"])
        .arg("leaf")
        .current_dir(folder.path())
        .output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{told}");
    Ok(())
}

/// The chain that a node has for a pod, PEM, leaf first.
fn chain_of(cluster: &Cluster, node: &str, pod: &str) -> anyhow::Result<Vec<String>> {
    let folder = cluster.node(node)?.disk("/var/lib/hauberk/agent/workloads");
    let of_pod = |path: &Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with(&format!("{}@", pod.replace('/', "__"))) && name.ends_with(".json")
    };
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if of_pod(&path) {
            let kept: Value = serde_json::from_slice(&fs::read(&path)?)?;
            let chain = kept["chain"].as_array().context("no chain")?;
            return chain.iter().map(|der| pem(der.as_str().context("no text")?)).collect();
        }
    }
    bail!("{node} has no certificate of {pod}")
}

/// A certificate in base64 as PEM.
fn pem(base64: &str) -> anyhow::Result<String> {
    let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
    for line in base64.as_bytes().chunks(64) {
        text.push_str(std::str::from_utf8(line)?);
        text.push('\n');
    }
    Ok(text + "-----END CERTIFICATE-----\n")
}

/// The roots that agents are told of, each in one line.
fn published(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let path = "--output=jsonpath={.data.roots\\.pem}";
    let bundle = cluster.kubectl(&["get", "configmap", NAMESPACE, "hauberk-trust-bundle", path])?;
    let roots = bundle.split("-----BEGIN CERTIFICATE-----").skip(1);
    Ok(roots.map(one_line).collect())
}

fn one_line(pem: &str) -> String {
    let lines = pem.lines().filter(|line| !line.starts_with('-'));
    lines.flat_map(str::split_whitespace).collect()
}

/// The ends of the connection that goes on all the time.
const ENDS: [(&str, &str); 2] = [("node-a", "shop/checkout"), ("node-b", "payments/ledger")];

/// That both ends of the connection are under this root.
fn wait_root(cluster: &Cluster, root: &str) -> anyhow::Result<()> {
    cluster.wait_until("the pods' certificates under the root", ROTATION, |cluster| {
        for (node, pod) in ENDS {
            leads_to(root, &chain_of(cluster, node, pod)?).with_context(|| pod.to_owned())?;
        }
        Ok(())
    })
}

fn a_ca_of_cert_manager_comes_and_changes(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", "http://ledger.payments/")?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })?;
    cluster.start_cert_manager()?;

    while_connecting(cluster, 100, || {
        bring(cluster).and_then(|()| renew(cluster)).and_then(|()| change(cluster))
    })
    .with_context(|| cluster.log_ends())?;
    ensure!(get(cluster, "web", "http://ledger.payments/").is_err(), "nobody allowed it");
    Ok(())
}

/// From the own root to an intermediate below another one.
fn bring(cluster: &Cluster) -> anyhow::Result<()> {
    let own = published(cluster)?;
    ensure!(own.len() == 1, "{own:?}");
    cluster.apply(&root("root-of-the-mesh"))?;
    cluster.apply(&certificate()?)?;
    let first = cluster.wait_until("the Secret of cert-manager", PATIENCE, |cluster| {
        ensure!(!entry(cluster, "mesh-ca", "tls.key")?.is_empty(), "no key");
        entry(cluster, "mesh-ca", "ca.crt")
    })?;
    ensure!(first == entry(cluster, "root-of-the-mesh", "tls.crt")?, "another root: {first}");
    let chart = format!("{CHARTS}/hauberk");
    cluster.helm(&[
        "upgrade",
        "hauberk",
        &chart,
        NAMESPACE,
        "--reuse-values",
        "--set=ca.existingSecret=mesh-ca",
        "--wait",
        "--timeout=120s",
    ])?;
    // Both are told of before the new one issues.
    let both = published(cluster)?;
    ensure!(both.contains(&own[0]) && both.contains(&one_line(&first)), "{both:?}");
    for (verb, may) in [("get", true), ("update", false), ("patch", false), ("delete", false)] {
        let account = "--as=system:serviceaccount:hauberk-system:hauberk-control-plane";
        let answer =
            cluster.kubectl(&["auth", "can-i", verb, "secret/mesh-ca", NAMESPACE, account]);
        ensure!(answer.is_ok() == may, "{verb}: {answer:?}");
    }
    wait_root(cluster, &first)
}

/// The same root signs another intermediate with another key, as before the end of the one before.
fn renew(cluster: &Cluster) -> anyhow::Result<()> {
    let before = entry(cluster, "mesh-ca", "tls.crt")?;
    // What somebody does who wants it at once: `cmctl renew`.
    let renewal = json!({"status": {"conditions": [
        {"type": "Issuing", "status": "True", "reason": "ManuallyTriggered", "message": "by hand"},
    ]}});
    cluster.kubectl(&[
        "patch",
        "certificate.cert-manager.io",
        NAMESPACE,
        "hauberk-ca-certificate",
        "--subresource=status",
        "--type=merge",
        &format!("--patch={renewal}"),
    ])?;
    let renewed = cluster.wait_until("the renewal", PATIENCE, |cluster| {
        let text = entry(cluster, "mesh-ca", "tls.crt")?;
        ensure!(text != before, "still the one before");
        Ok(one_line(&text))
    })?;
    cluster.wait_until("certificates under what was renewed", ROTATION, |cluster| {
        for (node, pod) in ENDS {
            let chain = chain_of(cluster, node, pod)?;
            let under = chain.iter().any(|certificate| one_line(certificate) == renewed);
            ensure!(under, "{pod}: {} certificates, none of them it", chain.len());
        }
        Ok(())
    })
}

/// A key that is not the certificate's; then another root, while one replica of two is lost.
fn change(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.stop_cert_manager()?;
    let other = cluster.kubectl(&[
        "get",
        "secret",
        NAMESPACE,
        "root-of-the-mesh",
        "--output=jsonpath={.data.tls\\.key}",
    ])?;
    let mistake = json!({"data": {"tls.key": other}});
    let mistake = format!("--patch={mistake}");
    cluster.kubectl(&["patch", "secret", NAMESPACE, "mesh-ca", "--type=merge", &mistake])?;
    cluster.wait_until("what is wrong", PATIENCE, |cluster| {
        let status = told(cluster, &["status"])?;
        let wanted = "tls.key is not the key of the first certificate of tls.crt";
        ensure!(status.contains(wanted) && status.contains("mesh-ca"), "{status}");
        Ok(())
    })?;

    cluster.apply(&root("second-root"))?;
    cluster.apply(&certificate()?.replace("{name: root-of-the-mesh,", "{name: second-root,"))?;
    cluster.start_cert_manager()?;
    let second = cluster.wait_until("the Secret under the next root", PATIENCE, |cluster| {
        let root = entry(cluster, "second-root", "tls.crt")?;
        ensure!(entry(cluster, "mesh-ca", "ca.crt")? == root, "still the one before");
        Ok(root)
    })?;
    cluster.wait_until("the next root in the bundle", PATIENCE, |cluster| {
        let roots = published(cluster)?;
        ensure!(roots.contains(&one_line(&second)) && roots.len() > 1, "{roots:?}");
        Ok(())
    })?;
    let replicas = pods(cluster)?;
    kill(cluster, replicas.first().context("no control plane")?)?;
    // What the other one handed over is enough to be ready with.
    rolled_out(cluster)?;
    wait_root(cluster, &second)?;
    cluster.wait_until("the old roots to go", ROTATION, |cluster| {
        let roots = published(cluster)?;
        ensure!(roots == [one_line(&second)], "{} roots", roots.len());
        Ok(())
    })?;
    // Whoever has only the new root takes the webhook's certificate, too.
    admission::warns(cluster).context("the roots have changed")
}
