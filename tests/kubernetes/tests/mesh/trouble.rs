//! What happens to the cluster, and what must hold all the same.

use std::{thread, time::Duration};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    install::{PATIENCE, everything},
    pods::{address, eager},
    policy::{POLICY, get},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("a_pod_deleted_by_force_stays_captured", a_pod_deleted_by_force_stays_captured),
    (
        "a_control_plane_that_missed_a_deletion_goes_on",
        a_control_plane_that_missed_a_deletion_goes_on,
    ),
    ("stolen_tokens_attest_nothing", stolen_tokens_attest_nothing),
    ("a_node_port_does_not_pass_for_a_probe", a_node_port_does_not_pass_for_a_probe),
    ("a_pod_without_its_service_account_is_nobody", a_pod_without_its_service_account_is_nobody),
    (
        "without_the_api_server_what_was_decided_holds",
        without_the_api_server_what_was_decided_holds,
    ),
    ("a_restarted_container_runtime_is_asked_again", a_restarted_container_runtime_is_asked_again),
    ("after_a_reboot_no_pod_talks_unprotected", after_a_reboot_no_pod_talks_unprotected),
];

/// Runs a command of a node in the network of the pod with this address; needs no API server.
fn in_pod(cluster: &Cluster, node: &str, address: &str, command: &str) -> anyhow::Result<String> {
    let script = format!(
        "for place in /run/netns/*; do \
           if nsenter --net=$place ip addr | grep -q ' {address}/'; then \
             exec nsenter --net=$place {command}; \
           fi; \
         done; echo no pod has {address} >&2; exit 9"
    );
    cluster.node(node)?.text(&["sh", "-c", &script])
}

const LEDGER: &str = "http://ledger.payments/";

/// Served and probed on one port, and reachable on every node from outside.
const OPEN_TO_ALL: &str = "
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: payments, labels: {app: front}}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo the front >/www/index.html; exec httpd -f -h /www -p 8080']
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: payments}
spec: {type: NodePort, selector: {app: front}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
";

fn a_node_port_does_not_pass_for_a_probe(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(OPEN_TO_ALL)?;
    cluster.wait_pod("payments", "front", PATIENCE)?;
    let ask = |node: &str| -> anyhow::Result<bool> {
        let url = format!(
            "http://{}:30080/",
            cluster.node(node).map(|node| hauberk_kubernetes_tests::ipv4(node.number()))?
        );
        let output = cluster.outside().run(|| {
            std::process::Command::new("timeout")
                .args(["3", "busybox", "wget", "-q", "-O", "-", &url])
                .output()
        })??;
        Ok(output.stdout == b"the front\n")
    };
    // The pod's own node translates the caller's address to one of its own.
    for node in ["node-b", "node-a"] {
        ensure!(!ask(node)?, "a caller without the mesh came in through {node}'s NodePort");
    }
    cluster.kubectl(&[
        "label",
        "--overwrite",
        "namespace",
        "payments",
        "hauberk.dev/mode=audit",
    ])?;
    cluster.wait_until("the audited port", PATIENCE, |_| {
        ensure!(ask("node-b")?, "no answer");
        Ok(())
    })?;
    cluster.kubectl(&[
        "label",
        "--overwrite",
        "namespace",
        "payments",
        "hauberk.dev/mode=enforce",
    ])?;
    cluster.delete(OPEN_TO_ALL)?;
    Ok(())
}

fn allowed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", LEDGER)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })
}

fn a_pod_without_its_service_account_is_nobody(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    cluster.kubectl(&["delete", "serviceaccount", "--namespace=shop", "checkout"])?;
    let why = cluster.wait_until("the refusal", PATIENCE, |cluster| {
        match get(cluster, "checkout", LEDGER) {
            Ok(text) => bail!("still answered: {text}"),
            Err(error) => Ok(error),
        }
    })?;
    eprintln!("{why:#}");
    // It stays captured: nothing goes out in clear either.
    thread::sleep(Duration::from_secs(4));
    ensure!(get(cluster, "checkout", LEDGER).is_err(), "it talks without an identity");
    let account =
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: checkout, namespace: shop}}";
    cluster.apply(account)?;
    allowed(cluster)
}

fn a_pod_deleted_by_force_stays_captured(cluster: &Cluster) -> anyhow::Result<()> {
    let url = format!("http://{}:8080/", address(cluster, "loose", "server")?);
    cluster.apply(&eager("ghost", "node-a", &url))?;
    cluster.wait_pod("strict", "ghost", PATIENCE)?;
    let ghost = address(cluster, "strict", "ghost")?;
    let wget = format!("timeout 3 busybox wget -q -O - {url}");
    // Nobody on the node hears of it: the pod's object is gone, and the pod is not.
    cluster.stop_kubelet("node-a")?;
    let outcome = (|| {
        cluster.kubectl(&[
            "delete",
            "pod",
            "--namespace=strict",
            "ghost",
            "--force",
            "--grace-period=0",
        ])?;
        thread::sleep(Duration::from_secs(6));
        in_pod(cluster, "node-a", &ghost, "true").context("the pod does not run any more")?;
        let said = in_pod(cluster, "node-a", &ghost, &wget);
        ensure!(said.is_err(), "it talks in clear: {said:?}");
        Ok(())
    })();
    cluster.start_kubelet("node-a")?;
    cluster.wait_node("node-a", PATIENCE)?;
    outcome
}

fn a_control_plane_that_missed_a_deletion_goes_on(cluster: &Cluster) -> anyhow::Result<()> {
    let scale = |replicas: &str| {
        let replicas = format!("--replicas={replicas}");
        cluster.kubectl(&[
            "scale",
            "--namespace=hauberk-system",
            "deployment/hauberk-control-plane",
            &replicas,
        ])
    };
    cluster.apply(POLICY)?;
    let last = POLICY.replace("name: ledger, namespace", "name: last, namespace");
    cluster.apply(&last)?;
    cluster.wait_until("the last policy", PATIENCE, |cluster| {
        cluster.kubectl(&[
            "wait",
            "--for=condition=Programmed",
            "--timeout=1s",
            "--namespace=payments",
            "accesspolicy/last",
        ])
    })?;
    cluster.kubectl(&["delete", "accesspolicy", "--namespace=payments", "last"])?;
    thread::sleep(Duration::from_secs(1));
    scale("0")?;
    cluster.wait_until("the control plane to go", PATIENCE, |cluster| {
        let left = cluster.kubectl(&[
            "get",
            "pods",
            "--namespace=hauberk-system",
            "--selector=app.kubernetes.io/component=control-plane",
            "--output=name",
        ])?;
        ensure!(left.is_empty(), "{left}");
        Ok(())
    })?;
    // The state is another one when it comes back.
    cluster.kubectl(&["label", "namespace", "loose", "hauberk.dev/mode=audit"])?;
    scale("1")?;
    cluster
        .kubectl(&[
            "rollout",
            "status",
            "--namespace=hauberk-system",
            "--timeout=60s",
            "deployment/hauberk-control-plane",
        ])
        .with_context(|| everything(cluster))?;
    cluster.kubectl(&["label", "namespace", "loose", "hauberk.dev/mode-"])?;
    allowed(cluster)
}

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
    let service = cluster.kubectl(&[
        "get",
        "endpointslices",
        "--namespace=hauberk-system",
        "--selector=kubernetes.io/service-name=hauberk-control-plane",
        "--output=jsonpath={.items[0].endpoints[0].addresses[0]}",
    ])?;
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

fn without_the_api_server_what_was_decided_holds(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    let url = format!("http://{}:8080/", address(cluster, "payments", "ledger")?);
    let wget = format!("timeout 5 busybox wget -q -O - {url}");
    let (caller, other) = (address(cluster, "shop", "checkout")?, address(cluster, "shop", "web")?);
    cluster.stop_apiserver()?;
    let outcome = (|| {
        for _ in 0..10 {
            let text = in_pod(cluster, "node-a", &caller, &wget)?;
            ensure!(text == "the ledger\n", "{text}");
            let refused = in_pod(cluster, "node-a", &other, &wget);
            ensure!(refused.is_err(), "somebody else was let in");
            thread::sleep(Duration::from_millis(300));
        }
        Ok(())
    })();
    cluster.start_apiserver()?;
    outcome?;
    cluster.wait_node("node-a", PATIENCE)?;
    // And what comes after is taken up again.
    let wider = POLICY.replace("name: checkout}", "name: web}");
    cluster.apply(&wider)?;
    cluster.wait_until("the next policy", PATIENCE, |cluster| {
        ensure!(get(cluster, "web", LEDGER)? == "the ledger\n");
        ensure!(get(cluster, "checkout", LEDGER).is_err(), "the old policy holds");
        Ok(())
    })?;
    allowed(cluster)
}

fn a_restarted_container_runtime_is_asked_again(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.restart_containerd("node-a")?;
    cluster.wait_node("node-a", PATIENCE)?;
    cluster.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop}
spec:
  nodeName: node-a
  serviceAccountName: checkout
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
",
    )?;
    cluster.wait_pod("shop", "late", PATIENCE).with_context(|| everything(cluster))?;
    ensure!(get(cluster, "late", LEDGER)? == "the ledger\n");
    cluster.kubectl(&["delete", "pod", "--namespace=shop", "late"])?;
    Ok(())
}

fn after_a_reboot_no_pod_talks_unprotected(cluster: &Cluster) -> anyhow::Result<()> {
    let url = format!("http://{}:8080/", address(cluster, "loose", "server")?);
    cluster.apply(&eager("phoenix", "node-a", &url))?;
    cluster.wait_pod("strict", "phoenix", PATIENCE)?;
    let capture = cluster.wire().capture("node-b")?;
    cluster.reboot_node("node-a")?;
    cluster.wait_node("node-a", PATIENCE)?;
    // It runs anew from its first word on, before or after the agent of its node.
    cluster.wait_until("the pod's tries", Duration::from_secs(180), |cluster| {
        let log = cluster.kubectl(&["logs", "--namespace=strict", "phoenix"])?;
        ensure!(log.contains("done"), "{log}");
        ensure!(!log.contains("LEAKED"), "it got through");
        let restarts = cluster.kubectl(&[
            "get",
            "pod",
            "--namespace=strict",
            "phoenix",
            "--output=jsonpath={.status.containerStatuses[0].restartCount}",
        ])?;
        ensure!(restarts != "0", "it has not been started again yet");
        Ok(())
    })?;
    let captured = capture.stop()?;
    ensure!(!captured.contains(b"loose words"), "the wire shows an answer");
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "phoenix"])?;
    cluster.kubectl(&[
        "rollout",
        "status",
        "--timeout=90s",
        "--namespace=hauberk-system",
        "daemonset/hauberk-agent",
    ])?;
    // Everything that was on the node talks again, under its policy.
    for pod in ["checkout", "web"] {
        cluster.wait_pod("shop", pod, PATIENCE)?;
    }
    allowed(cluster)?;
    ensure!(get(cluster, "web", LEDGER).is_err(), "nobody allowed it");
    Ok(())
}
