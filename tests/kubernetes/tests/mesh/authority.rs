//! A CA that somebody brings: it takes the place of the own one, and another one takes its place, while pods
//! talk. In clusters of their own, whose certificates live for seconds: a root waits for as long as they live.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Test, admission,
    install::{self, CHARTS, PATIENCE, everything},
    policy::{self, POLICY, get},
    replicas::told,
};

pub(crate) const TESTS: &[(&str, Test)] =
    &[("a_brought_ca_comes_and_goes_and_nobody_notices", a_brought_ca_comes_and_goes)];

const NAMESPACE: &str = "--namespace=hauberk-system";
const CONTROL_PLANE: &str = "--selector=app.kubernetes.io/component=control-plane";

/// Until a root that is new may issue, and until an old one is forgotten: two and a half lives of a certificate,
/// and some looks.
const ROTATION: Duration = Duration::from_secs(180);

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

/// CAs in a folder, made with `openssl`.
struct Authorities(TempDir);

impl Authorities {
    fn file(&self, name: &str, end: &str) -> PathBuf {
        self.0.path().join(format!("{name}.{end}"))
    }

    fn text(&self, name: &str, end: &str) -> anyhow::Result<String> {
        let path = self.file(name, end);
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }

    /// Makes `<name>.crt` and `<name>.key`, a root or below another one, as cert-manager does by default: RSA, its
    /// key in PKCS#1.
    fn make(&self, name: &str, upper: Option<&str>) -> anyhow::Result<()> {
        let (key, certificate) = (self.file(name, "key"), self.file(name, "crt"));
        run(Command::new("openssl")
            .args(["genrsa", "-traditional", "-out"])
            .arg(&key)
            .arg("2048"))?;
        let configuration = self.file(name, "cnf");
        let text = format!(
            "[req]\nprompt = no\ndistinguished_name = subject\nx509_extensions = extensions\n\
             [subject]\nCN = {name}\n[extensions]\n\
             basicConstraints = critical, CA:TRUE\n\
             keyUsage = critical, digitalSignature, keyEncipherment, keyCertSign\n\
             subjectKeyIdentifier = hash\n"
        );
        fs::write(&configuration, text)?;
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-new", "-days", "3", "-config"]).arg(&configuration);
        command.arg("-key").arg(&key).arg("-out").arg(&certificate);
        if let Some(upper) = upper {
            command.arg("-CA").arg(self.file(upper, "crt"));
            command.arg("-CAkey").arg(self.file(upper, "key"));
        }
        run(&mut command).map(|_| ())
    }

    /// The Secret that cert-manager would write, with the key of `key`.
    fn secret(&self, name: &str, key: &str, root: &str) -> anyhow::Result<String> {
        let secret = json!({
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "kubernetes.io/tls",
            "metadata": {"name": "mesh-ca", "namespace": "hauberk-system"},
            "stringData": {
                "tls.crt": self.text(name, "crt")?,
                "tls.key": self.text(key, "key")?,
                "ca.crt": self.text(root, "crt")?,
            },
        });
        Ok(secret.to_string())
    }

    /// Fails unless the certificate that a pod shows leads to this root and to no other.
    fn leads_to(&self, root: &str, chain: &[String]) -> anyhow::Result<()> {
        let (leaf, rest) = chain.split_first().context("no certificate")?;
        fs::write(self.file("leaf", "pem"), leaf)?;
        fs::write(self.file("rest", "pem"), rest.concat())?;
        let mut command = Command::new("openssl");
        command.args(["verify", "-no-CApath", "-no-CAstore", "-CAfile"]);
        command.arg(self.file(root, "crt")).arg("-untrusted").arg(self.file("rest", "pem"));
        run(command.arg(self.file("leaf", "pem"))).map(|_| ())
    }
}

fn run(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let (out, err) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{command:?}: {}: {out}{err}", output.status);
    Ok(out)
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

/// That both ends of the connection are under this root.
fn wait_root(cluster: &Cluster, authorities: &Authorities, root: &str) -> anyhow::Result<()> {
    cluster.wait_until(&format!("the pods' certificates under {root}"), ROTATION, |cluster| {
        for (node, pod) in [("node-a", "shop/checkout"), ("node-b", "payments/ledger")] {
            let chain = chain_of(cluster, node, pod)?;
            authorities.leads_to(root, &chain).with_context(|| pod.to_owned())?;
        }
        Ok(())
    })
}

fn a_brought_ca_comes_and_goes(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", "http://ledger.payments/")?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })?;
    let authorities = Authorities(tempfile::tempdir()?);
    authorities.make("first-root", None)?;
    authorities.make("first-mesh", Some("first-root"))?;
    authorities.make("second-root", None)?;

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
        let outcome = bring(cluster, &authorities).and_then(|()| change(cluster, &authorities));
        over.store(true, Ordering::Relaxed);
        outcome
    })
    .with_context(|| everything(cluster))?;
    let (failed, tried) = (failed.into_inner(), tried.into_inner());
    eprintln!("{failed} of {tried} connections failed");
    ensure!(failed == 0 && tried > 100, "{failed} of {tried} connections failed");
    ensure!(get(cluster, "web", "http://ledger.payments/").is_err(), "nobody allowed it");
    Ok(())
}

/// From the own root to an intermediate below another one.
fn bring(cluster: &Cluster, authorities: &Authorities) -> anyhow::Result<()> {
    let own = published(cluster)?;
    ensure!(own.len() == 1, "{own:?}");
    cluster.apply(&authorities.secret("first-mesh", "first-mesh", "first-root")?)?;
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
    let first = one_line(&authorities.text("first-root", "crt")?);
    ensure!(both.contains(&own[0]) && both.contains(&first), "{both:?}");
    for (verb, may) in [("get", true), ("update", false), ("patch", false), ("delete", false)] {
        let account = "--as=system:serviceaccount:hauberk-system:hauberk-control-plane";
        let answer =
            cluster.kubectl(&["auth", "can-i", verb, "secret/mesh-ca", NAMESPACE, account]);
        ensure!(answer.is_ok() == may, "{verb}: {answer:?}");
    }
    wait_root(cluster, authorities, "first-root")
}

/// Renewed with a mistake, then with another root, while one replica of two is lost.
fn change(cluster: &Cluster, authorities: &Authorities) -> anyhow::Result<()> {
    cluster.apply(&authorities.secret("second-root", "first-mesh", "second-root")?)?;
    cluster.wait_until("what is wrong", PATIENCE, |cluster| {
        let status = told(cluster, &["status"])?;
        let wanted = "tls.key is not the key of the first certificate of tls.crt";
        ensure!(status.contains(wanted) && status.contains("mesh-ca"), "{status}");
        Ok(())
    })?;
    cluster.apply(&authorities.secret("second-root", "second-root", "second-root")?)?;
    let second = one_line(&authorities.text("second-root", "crt")?);
    cluster.wait_until("the next root in the bundle", PATIENCE, |cluster| {
        let roots = published(cluster)?;
        ensure!(roots.contains(&second) && roots.len() > 1, "{roots:?}");
        Ok(())
    })?;
    let names = cluster.kubectl(&[
        "get",
        "pods",
        NAMESPACE,
        CONTROL_PLANE,
        "--output=jsonpath={.items[*].metadata.name}",
    ])?;
    let lost = names.split_whitespace().next().context("no control plane")?;
    cluster.kubectl(&["delete", "pod", NAMESPACE, "--grace-period=0", "--force", lost])?;
    // What the other one handed over is enough to be ready with.
    cluster.kubectl(&[
        "rollout",
        "status",
        NAMESPACE,
        "--timeout=60s",
        "deployment/hauberk-control-plane",
    ])?;
    wait_root(cluster, authorities, "second-root")?;
    cluster.wait_until("the old roots to go", ROTATION, |cluster| {
        let roots = published(cluster)?;
        ensure!(roots == [second.clone()], "{} roots", roots.len());
        Ok(())
    })?;
    // Whoever has only the new root takes the webhook's certificate, too.
    admission::warns(cluster).context("the roots have changed")
}
