//! What a thief has of it: tokens, and the credential of a node.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;
use hauberk_tests::stolen::Stolen;
use hauberk_tls::signing_request;
use tonic::Code;

use crate::{
    Test, agents,
    install::{PATIENCE, everything},
    pods::{hasty, server},
    replicas::a_replica,
    trouble::allowed,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("stolen_tokens_attest_nothing", stolen_tokens_attest_nothing),
    (
        "a_stolen_node_certificate_gets_no_other_nodes_pods",
        a_stolen_node_certificate_gets_no_other_nodes_pods,
    ),
];

/// Tokens that are real, and not those of an agent's pod.
fn stolen_tokens_attest_nothing(cluster: &Cluster) -> anyhow::Result<()> {
    let token = cluster.kubectl(&[
        "create",
        "token",
        "--namespace=hauberk-system",
        "hauberk-agent",
        "--audience=hauberk",
    ])?;
    let other = cluster.kubectl(&[
        "create",
        "token",
        "--namespace=shop",
        "checkout",
        "--audience=hauberk",
    ])?;
    let audience =
        cluster.kubectl(&["create", "token", "--namespace=hauberk-system", "hauberk-agent"])?;
    let roots = cluster.kubectl(&[
        "get",
        "configmap",
        "--namespace=hauberk-system",
        "hauberk-trust-bundle",
        "--output=jsonpath={.data.roots\\.pem}",
    ])?;
    let folder = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> anyhow::Result<String> {
        let path = folder.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let roots = file("roots.pem", &roots)?;
    let service = a_replica(cluster)?;
    for (what, token, wanted) in [
        ("a token that is bound to no pod", token, "is not bound to a pod"),
        (
            "a token of another service account",
            other,
            "only system:serviceaccount:hauberk-system:hauberk-agent",
        ),
        ("a token for another audience", audience, "is not good for audience"),
    ] {
        let token = file("token", &token)?;
        let data = folder.path().join("data").display().to_string();
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.arg(crate::AS_HAUBERK).args([
            "agent",
            "--kubernetes-token",
            &token,
            "--trust-bundle",
            &roots,
            "--control-plane",
            &format!("{service}:8443"),
            "--data",
            &data,
            "--metrics=127.0.0.1:0",
        ]);
        let mut timed = std::process::Command::new("timeout");
        timed.arg("4").arg(command.get_program()).args(command.get_args());
        let output = cluster.in_control(&mut timed)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        ensure!(text.contains(wanted), "{what}: {text}");
    }
    Ok(())
}

/// Somebody outside of the cluster with all that the agent of `node-a` keeps on its node.
pub(crate) fn thief(cluster: &Cluster) -> anyhow::Result<Stolen> {
    let kept = fs::read(cluster.node("node-a")?.disk("/var/lib/hauberk/agent/node.json"))?;
    let address = SocketAddr::new(a_replica(cluster)?.parse()?, 8443);
    let connect = || TcpStream::connect_timeout(&address, PATIENCE);
    let stream = cluster.outside().run(connect)?.context("reach the control plane from outside")?;
    Stolen::open(&kept, stream)
}

/// What the mesh knows a pod by.
pub(crate) fn key(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    Ok(format!("{namespace}/{pod}@{}", agents::uid(cluster, namespace, pod)?))
}

/// Asks for a pod's certificate and demands that it is refused, for this reason.
pub(crate) fn is_refused(thief: &Stolen, workload: &str, reason: &str) -> anyhow::Result<()> {
    let refused = thief.issue(workload, signing_request()?.1).err();
    let status = refused.with_context(|| format!("the identity of {workload} was issued"))?;
    ensure!(status.code() == Code::PermissionDenied, "{workload}: {status}");
    ensure!(status.message().contains(reason), "{workload}: {status}");
    Ok(())
}

fn a_pod_that_is_gone_is_refused(cluster: &Cluster, thief: &Stolen) -> anyhow::Result<()> {
    let outside = server(cluster)?;
    let pod = hasty("gone", "node-a", outside, &format!("http://{outside}/"));
    cluster.apply(&pod)?;
    let gone = cluster.wait_until("its certificate", PATIENCE, |cluster| {
        let gone = key(cluster, "shop", "gone")?;
        thief.issue(&gone, signing_request()?.1).context("the pod lives")?;
        Ok(gone)
    })?;
    cluster.delete(&pod)?;
    cluster
        .wait_until("the refusal", PATIENCE, |_| is_refused(thief, &gone, "is not a live workload"))
}

fn a_stolen_node_certificate_gets_no_other_nodes_pods(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    let (own, foreign) = (key(cluster, "shop", "checkout")?, key(cluster, "payments", "ledger")?);
    let thief = thief(cluster)?;
    // What the node itself could ask for, so that nothing else is what refuses.
    let chain = thief.issue(&own, signing_request()?.1).context("a pod of the very node")?;
    let leaf = chain.first().context("no certificate")?;
    let text = String::from_utf8_lossy(leaf);
    ensure!(text.contains("spiffe://test.example/ns/shop/sa/checkout"), "another identity");

    let elsewhere = "lives on node \"node-b\", but node \"node-a\" asked for it";
    is_refused(&thief, &foreign, elsewhere)?;
    // Nor under another name, nor with the UID of another pod.
    let uid = agents::uid(cluster, "payments", "ledger")?;
    let mixed = format!("shop/checkout@{uid}");
    for workload in ["payments/ledger", mixed.as_str(), "machine/node-b"] {
        is_refused(&thief, workload, "is not a live workload")?;
    }
    let log = cluster.kubectl(&[
        "logs",
        "--namespace=hauberk-system",
        "--selector=app.kubernetes.io/component=control-plane",
        "--tail=-1",
    ])?;
    let told = ["\"an identity was refused\"", foreign.as_str(), "\"node-a\""];
    let audited = |line: &str| told.iter().all(|part| line.contains(part));
    ensure!(log.lines().any(audited), "the refusal was not audited:\n{log}");

    a_pod_that_is_gone_is_refused(cluster, &thief)?;

    // It lives no longer than the certificate.
    let refused = thief.renew(signing_request()?.1).err().context("it was renewed")?;
    ensure!(refused.code() == Code::PermissionDenied, "{refused}");
    ensure!(refused.message().contains("is attested by its agent's pod"), "{refused}");

    // And without an agent on the node it is good for nothing.
    agents::send_away(cluster)?;
    let worthless = cluster.wait_until("the certificate to be worthless", PATIENCE, |_| {
        is_refused(&thief, &own, "no agent of this mesh runs on node node-a")
    });
    agents::bring_back(cluster).with_context(|| everything(cluster))?;
    worthless?;
    allowed(cluster)
}
