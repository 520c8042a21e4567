//! Pods that start: none of them unprotected.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use serde_json::Value;

use crate::{
    Test,
    install::{PATIENCE, everything},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("a_pod_never_says_its_first_word_in_clear", a_pod_never_says_its_first_word_in_clear),
    (
        "probes_reach_their_port_and_nothing_else_does",
        probes_reach_their_port_and_nothing_else_does,
    ),
    ("without_an_agent_no_pod_of_a_node_starts", without_an_agent_no_pod_of_a_node_starts),
];

/// A namespace that is enforced from the start, with a server that nobody may connect to, and one of
/// another namespace without the mesh.
const PLACES: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {hauberk.dev/mode: enforce}}
---
apiVersion: v1
kind: Namespace
metadata: {name: loose}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: loose, labels: {app: server}}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo loose words >/www/index.html; exec httpd -f -h /www -p 8080']
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
";

/// The namespaces and the server of these tests.
pub(crate) fn place(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(PLACES)?;
    cluster.wait_pod("loose", "server", PATIENCE)?;
    Ok(())
}

/// Connects as soon as it runs, and as often as it can.
pub(crate) fn eager(name: &str, node: &str, url: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: strict}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'i=0; while [ $i -lt 40 ]; do timeout 2 wget -q -O - {url} && echo LEAKED; i=$((i+1)); done; echo done; exec sleep 1000000']
"
    )
}

pub(crate) fn address(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    let found = cluster.kubectl_json(&["get", "pod", "--namespace", namespace, pod])?;
    let address = found.pointer("/status/podIP").and_then(Value::as_str).context("no address")?;
    Ok(address.to_owned())
}

fn a_pod_never_says_its_first_word_in_clear(cluster: &Cluster) -> anyhow::Result<()> {
    let url = format!("http://{}:8080/", address(cluster, "loose", "server")?);
    let capture = cluster.wire().capture("node-b")?;
    cluster.apply(&eager("eager", "node-a", &url))?;
    if let Err(error) = cluster.wait_pod("strict", "eager", PATIENCE) {
        bail!("{error:#}\n{}", everything(cluster));
    }
    let log = cluster.wait_until("the pod's tries", PATIENCE, |cluster| {
        let log = cluster.kubectl(&["logs", "--namespace=strict", "eager"])?;
        ensure!(log.contains("done"), "{log}");
        Ok(log)
    })?;
    let captured = capture.stop()?;
    ensure!(!log.contains("LEAKED"), "it was not captured at once: {log}");
    ensure!(!captured.contains(b"loose words"), "the wire shows an answer");
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "eager"])?;
    Ok(())
}

fn probes_reach_their_port_and_nothing_else_does(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: strict}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo well >/www/index.html; httpd -f -h /www -p 8081 & exec httpd -f -h /www -p 8080']
    ports: [{name: health, containerPort: 8080}]
    readinessProbe: {httpGet: {path: /, port: health}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
",
    )?;
    if let Err(error) = cluster.wait_pod("strict", "probed", PATIENCE) {
        bail!("{error:#}\n{}", everything(cluster));
    }
    let address = address(cluster, "strict", "probed")?;
    let wget = |port: u16| format!("timeout 3 busybox wget -q -O - http://{address}:{port}/");
    // From the node itself the probe's port answers, and no other.
    let node = cluster.node("node-a")?;
    ensure!(node.text(&["sh", "-c", &wget(8080)])? == "well\n", "the probe's port");
    ensure!(node.text(&["sh", "-c", &wget(8081)]).is_err(), "a port that nobody probes");
    // From elsewhere none does.
    for port in [8080, 8081] {
        let refused = cluster.node("node-b")?.text(&["sh", "-c", &wget(port)]);
        ensure!(refused.is_err(), "port {port} answers another node");
        let refused = cluster.exec("loose", "server", &["sh", "-c", &wget(port)]);
        ensure!(refused.is_err(), "port {port} answers a pod without the mesh");
    }
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "probed"])?;
    Ok(())
}

fn without_an_agent_no_pod_of_a_node_starts(cluster: &Cluster) -> anyhow::Result<()> {
    let agents = ["--namespace=hauberk-system", "daemonset/hauberk-agent"];
    let nowhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"yes"}}}}}"#;
    cluster.kubectl(&[["patch"].as_slice(), &agents, &["--patch", nowhere]].concat())?;
    cluster.wait_until("the agents to go", PATIENCE, |cluster| {
        let left = cluster.kubectl(&[
            "get",
            "pods",
            "--namespace=hauberk-system",
            "--selector=app.kubernetes.io/component=agent",
            "--output=name",
        ])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })?;
    cluster.apply(&eager("orphan", "node-a", "http://127.0.0.1:1/"))?;
    let told = cluster.wait_until("the event", PATIENCE, |cluster| {
        let events = cluster.kubectl(&[
            "get",
            "events",
            "--namespace=strict",
            "--field-selector=involvedObject.name=orphan",
            "--output=jsonpath={.items[*].message}",
        ])?;
        ensure!(events.contains("Hauberk's agent on this node does not answer"), "{events}");
        Ok(events)
    })?;
    eprintln!("{told}");
    let phase = |cluster: &Cluster| {
        cluster.kubectl(&[
            "get",
            "pod",
            "--namespace=strict",
            "orphan",
            "--output=jsonpath={.status.phase}",
        ])
    };
    ensure!(phase(cluster)? == "Pending", "it runs without an agent");
    let everywhere = r#"{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":null}}}}}"#;
    cluster.kubectl(&[["patch"].as_slice(), &agents, &["--patch", everywhere]].concat())?;
    cluster.kubectl(&[["rollout", "status", "--timeout=60s"].as_slice(), &agents].concat())?;
    cluster.wait_pod("strict", "orphan", Duration::from_secs(120))?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "orphan"])?;
    Ok(())
}
