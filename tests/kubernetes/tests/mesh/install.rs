//! The way in: a cluster with the mesh installed by Helm.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::{Cluster, Image, Options};

use crate::{AS_HAUBERK, Test};

pub(crate) const TESTS: &[(&str, Test)] = &[("helm_installs_the_mesh", helm_installs_the_mesh)];

/// How long a pod may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// How long certificates of workloads live: not so short that a control plane must not be away for a minute,
/// and not so long that no test would see one end.
pub(crate) const WORKLOAD_LIFETIME: Duration = Duration::from_secs(160);

pub(crate) const IMAGE: &str = "hauberk.test/hauberk:1";

pub(crate) const CHARTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../charts");

/// A cluster with the mesh in it, ready.
pub(crate) fn start() -> anyhow::Result<Cluster> {
    start_with(&[])
}

/// The same with more values for the chart.
pub(crate) fn start_with(values: &[&str]) -> anyhow::Result<Cluster> {
    let cluster = Cluster::start(Options { images: vec![image()?], ..Options::default() })?;
    install(&cluster, values)?;
    Ok(cluster)
}

/// Installs the mesh, as people do it.
pub(crate) fn install(cluster: &Cluster, values: &[&str]) -> anyhow::Result<()> {
    let chart = |name: &str| format!("{CHARTS}/{name}");
    let namespace = "--namespace=hauberk-system";
    let began = Instant::now();
    cluster.helm(&[
        "install",
        "hauberk-crds",
        &chart("hauberk-crds"),
        namespace,
        "--create-namespace",
    ])?;
    let image = format!("image.reference={IMAGE}");
    let chart = chart("hauberk");
    let lifetime = WORKLOAD_LIFETIME.as_secs();
    let lifetime = format!("controlPlane.workloadCertificateLifetime={lifetime}s");
    let install = [
        "install",
        "hauberk",
        &chart,
        namespace,
        "--set=trustDomain=test.example",
        "--set=agent.olderConnections=10s",
        "--set",
        &image,
        "--set",
        &lifetime,
        "--set=image.pullPolicy=Never",
        "--wait",
        "--timeout=90s",
    ];
    let installed = cluster.helm(&[install.as_slice(), values].concat());
    // Helm is content when all but one of the agents are there.
    let complete = installed.and_then(|_| {
        cluster.kubectl(&[
            "rollout",
            "status",
            namespace,
            "--timeout=60s",
            "daemonset/hauberk-agent",
        ])
    });
    if let Err(error) = complete {
        bail!("{error:#}\n{}", everything(cluster));
    }
    eprintln!("installed after {:?}", began.elapsed());
    Ok(())
}

/// What somebody would look at.
pub(crate) fn everything(cluster: &Cluster) -> String {
    let namespace = "--namespace=hauberk-system";
    let ask =
        |arguments: &[&str]| cluster.kubectl(arguments).unwrap_or_else(|error| error.to_string());
    [
        ask(&["get", "pods", "--all-namespaces", "--output=wide"]),
        ask(&["describe", "pods", namespace]),
        ask(&[
            "logs",
            namespace,
            "--tail=40",
            "--selector=app.kubernetes.io/component=control-plane",
        ]),
        ask(&["logs", namespace, "--tail=40", "--selector=app.kubernetes.io/component=agent"]),
    ]
    .join("\n")
}

/// This program in the image that the chart is for; without what only a debugger reads, which would be copied
/// around.
pub(crate) fn image() -> anyhow::Result<Image> {
    let folder = tempfile::tempdir()?.keep();
    strip(&std::env::current_exe()?, &folder.join("hauberk"))?;
    strip(&built("hauberk-cni")?, &folder.join("hauberk-cni"))?;
    let containerfile = Path::new(CHARTS).join("image/Containerfile");
    let mut image = Image::from_containerfile(IMAGE, &containerfile, &folder)?;
    image.entrypoint.push(AS_HAUBERK.to_owned());
    Ok(image)
}

/// Another program of the workspace, built as this one is.
fn built(name: &str) -> anyhow::Result<std::path::PathBuf> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--quiet", "--package", name])
        .status()
        .context("run cargo")?;
    ensure!(status.success(), "{name} could not be built: {status}");
    // target/debug/deps/mesh-…
    let own = std::env::current_exe()?;
    let folder =
        own.parent().and_then(Path::parent).context("this program is in no target folder")?;
    Ok(folder.join(name))
}

fn strip(program: &Path, to: &Path) -> anyhow::Result<()> {
    let status =
        Command::new("strip").arg("-o").arg(to).arg(program).status().context("run strip")?;
    ensure!(status.success(), "strip failed: {status}");
    Ok(())
}

fn helm_installs_the_mesh(cluster: &Cluster) -> anyhow::Result<()> {
    let agents = cluster.kubectl_json(&[
        "get",
        "daemonset",
        "--namespace=hauberk-system",
        "hauberk-agent",
    ])?;
    let ready = agents.pointer("/status/numberReady").and_then(serde_json::Value::as_i64);
    ensure!(ready == Some(2), "{agents:#}");
    let tested =
        cluster.helm(&["test", "hauberk", "--namespace=hauberk-system", "--timeout=60s"])?;
    ensure!(tested.contains("Succeeded"), "{tested}");
    Ok(())
}
