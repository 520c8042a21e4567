//! Pods that start: none of them unprotected.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use hauberk_linux::packets::Captured;
use serde_json::Value;

use crate::{
    Test, agents,
    install::{PATIENCE, everything},
    policy::get,
    trouble::allowed,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("a_pod_never_says_its_first_word_in_clear", a_pod_never_says_its_first_word_in_clear),
    (
        "probes_reach_their_port_and_nothing_else_does",
        probes_reach_their_port_and_nothing_else_does,
    ),
    ("probes_by_commands_do_their_work", probes_by_commands_do_their_work),
    ("without_an_agent_no_pod_of_a_node_starts", without_an_agent_no_pod_of_a_node_starts),
    (
        "pods_start_protected_while_the_control_plane_restarts",
        pods_start_protected_while_the_control_plane_restarts,
    ),
];

/// How long a pod may take that waits for what the mesh must know first.
pub(crate) const LONG_PATIENCE: Duration = Duration::from_secs(120);

/// How many pods start while the control plane is replaced, at least and at most.
const HASTY_PODS: std::ops::RangeInclusive<usize> = 4..=12;

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

/// A pod of `node-a` that does nothing by itself. The labels are those of a flow mapping, such as `{app: web}`.
pub(crate) fn idle(namespace: &str, name: &str, account: &str, labels: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {labels}}}
spec:
  nodeName: node-a
  serviceAccountName: {account}
  terminationGracePeriodSeconds: 0
  containers:
  - {{name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}}
"
    )
}

/// Connects to a server of another node as soon as it runs, and as often as it can.
pub(crate) fn eager(namespace: &str, name: &str, server: SocketAddr) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'i=0; while [ $i -lt 40 ]; do timeout 2 wget -q -O - http://{server}/ && echo LEAKED; i=$((i+1)); done; echo done; exec sleep 1000000']
"
    )
}

/// The same as `shop/checkout`, which beside it asks a server that it may reach, and is ready when that has
/// answered.
pub(crate) fn hasty(name: &str, node: &str, server: SocketAddr, allowed: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: shop}}
spec:
  nodeName: {node}
  serviceAccountName: checkout
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', '(i=0; while [ $i -lt 40 ]; do timeout 2 wget -q -O - http://{server}/ && echo LEAKED; i=$((i+1)); done; echo done) & until timeout 5 wget -q -O - {allowed}; do sleep 0.2; done; touch /tmp/allowed; exec sleep 1000000']
    readinessProbe: {{exec: {{command: [test, -e, /tmp/allowed]}}, periodSeconds: 1, timeoutSeconds: 10}}
"
    )
}

/// What a pod of [`eager`] or [`hasty`] has written when it has tried often enough.
pub(crate) fn tries(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    let ready = cluster.wait_pod(namespace, pod, LONG_PATIENCE);
    ready.with_context(|| everything(cluster))?;
    cluster.wait_until("the pod's tries", PATIENCE, |cluster| {
        let log = cluster.kubectl(&["logs", &format!("--namespace={namespace}"), pod])?;
        ensure!(log.contains("done"), "{log}");
        Ok(log)
    })
}

pub(crate) fn address(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    let found = cluster.kubectl_json(&["get", "pod", "--namespace", namespace, pod])?;
    let address = found.pointer("/status/podIP").and_then(Value::as_str).context("no address")?;
    Ok(address.to_owned())
}

/// The server without the mesh, which no pod of the mesh may reach. It is on `node-b`.
pub(crate) fn server(cluster: &Cluster) -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::new(address(cluster, "loose", "server")?.parse()?, 8080))
}

/// Who has called that server over the wire, with as little as one packet. Somebody must have got an answer:
/// a capture that shows nobody proves nothing of the others.
pub(crate) fn callers(captured: &Captured, server: SocketAddr) -> anyhow::Result<BTreeSet<IpAddr>> {
    ensure!(captured.is_complete(), "the capture has lost {} frames", captured.lost());
    ensure!(captured.contains(b"loose words"), "the wire shows no answer to anybody");
    let ends = captured.flows().map(|flow| flow.ends());
    Ok(ends.filter(|ends| ends.destination == server).map(|ends| ends.source.ip()).collect())
}

fn a_pod_never_says_its_first_word_in_clear(cluster: &Cluster) -> anyhow::Result<()> {
    let server = server(cluster)?;
    let capture = cluster.wire().capture("node-b")?;
    cluster.apply(&eager("strict", "eager", server))?;
    // The same without the mesh: what it says is there to be seen.
    cluster.apply(&eager("loose", "plain", server))?;
    let (eager, plain) = (tries(cluster, "strict", "eager")?, tries(cluster, "loose", "plain")?);
    let captured = capture.stop()?;
    ensure!(!eager.contains("LEAKED"), "it was not captured at once: {eager}");
    ensure!(plain.contains("LEAKED"), "nobody reaches the server: {plain}");
    let plain: IpAddr = address(cluster, "loose", "plain")?.parse()?;
    let callers = callers(&captured, server)?;
    ensure!(callers == BTreeSet::from([plain]), "not only {plain} called in clear: {callers:?}");
    // It may be luck that an agent is as fast as a pod. That the pod was held is none.
    agents::was_held(cluster, "node-a", "strict", "eager", "")?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "eager"])?;
    cluster.kubectl(&["delete", "pod", "--namespace=loose", "plain"])?;
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
    probes_are_counted_and_not_each_recorded(cluster)?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "probed"])?;
    Ok(())
}

/// Two a second come to this pod.
fn probes_are_counted_and_not_each_recorded(cluster: &Cluster) -> anyhow::Result<()> {
    let counted = || -> anyhow::Result<f64> {
        let page = agents::page(cluster, "node-a", "http://127.0.0.1:9465/metrics")?;
        let of_pod = page.lines().filter(|line| {
            line.starts_with("hauberk_connections_total{")
                && line.contains("dst_workload=\"probed\"")
                && line.contains("dst_port=\"8080\"")
                && line.contains("decision=\"allow\"")
        });
        let values = of_pod.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    };
    cluster.wait_until("probes to be counted", PATIENCE, |_| {
        let count = counted()?;
        ensure!(count > 12.0, "{count}");
        Ok(())
    })?;
    let lines = agents::lines(cluster, "node-a")?;
    let recorded = lines
        .iter()
        .filter(|line| line.contains("a probe from the node") && line.contains("\"probed\""));
    let recorded: Vec<_> = recorded.collect();
    // The first of each kind of end, such as those while it started.
    ensure!((1..=6).contains(&recorded.len()), "{} were recorded: {recorded:#?}", recorded.len());
    Ok(())
}

/// Nothing of them goes over the network: the runtime starts the commands in the pod.
fn probes_by_commands_do_their_work(cluster: &Cluster) -> anyhow::Result<()> {
    let url = format!("http://{}/", server(cluster)?);
    cluster.apply(
        "
apiVersion: v1
kind: Pod
metadata: {name: commanded, namespace: strict}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'touch /tmp/well; exec sleep 1000000']
    readinessProbe:
      exec: {command: [sh, -c, 'echo asked >>/tmp/readiness; test -e /tmp/well']}
      periodSeconds: 1
      timeoutSeconds: 10
      failureThreshold: 1
    livenessProbe:
      exec: {command: [sh, -c, 'echo asked >>/tmp/liveness; test -d /tmp']}
      periodSeconds: 1
      timeoutSeconds: 10
      failureThreshold: 1
",
    )?;
    let ready = || cluster.wait_pod("strict", "commanded", PATIENCE);
    let first = ready().with_context(|| everything(cluster))?;
    let run = |command: &str| cluster.exec("strict", "commanded", &["sh", "-c", command]);
    // It is one of the mesh.
    match run(&format!("timeout 5 wget -q -O - {url}")) {
        Ok(text) => bail!("it talks to a server without the mesh: {text}"),
        Err(error) => ensure!(format!("{error:#}").contains("Connection refused"), "{error:#}"),
    }
    // It stays ready and alive, however often it is asked.
    for probe in ["readiness", "liveness"] {
        cluster.wait_until(&format!("{probe} to be asked for"), PATIENCE, |_| {
            let asked = run(&format!("cat /tmp/{probe}"))?.lines().count();
            ensure!(asked > 10, "{asked} times");
            Ok(())
        })?;
    }
    let since = |pod: &Value| -> Option<Value> {
        let mut conditions = pod.pointer("/status/conditions")?.as_array()?.iter();
        let ready = conditions.find(|condition| condition["type"] == "Ready")?;
        ready.get("lastTransitionTime").cloned()
    };
    let restarts = |pod: &Value| pod.pointer("/status/containerStatuses/0/restartCount").cloned();
    let last = ready()?;
    ensure!(since(&last).is_some() && since(&first) == since(&last), "it was unready: {last:#}");
    ensure!(restarts(&last) == Some(Value::from(0)), "it was started anew: {last:#}");
    // And the probe is what says so.
    run("rm /tmp/well")?;
    cluster.wait_until("the pod to be unready", PATIENCE, |cluster| {
        let pod = cluster.kubectl_json(&["get", "pod", "--namespace=strict", "commanded"])?;
        ensure!(since(&pod) != since(&last), "still ready: {pod:#}");
        Ok(())
    })?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "commanded"])?;
    Ok(())
}

fn without_an_agent_no_pod_of_a_node_starts(cluster: &Cluster) -> anyhow::Result<()> {
    agents::send_away(cluster)?;
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    cluster.apply(&eager("strict", "orphan", nobody))?;
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
    agents::bring_back(cluster)?;
    cluster.wait_pod("strict", "orphan", LONG_PATIENCE)?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "orphan"])?;
    Ok(())
}

fn pods_start_protected_while_the_control_plane_restarts(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    let server = server(cluster)?;
    let capture = cluster.wire().capture("node-b")?;
    // The same wish without the mesh, to be seen by the same capture.
    cluster.apply(&eager("loose", "plain", server))?;
    let names = start_while_the_control_plane_restarts(cluster, server)?;
    for name in &names {
        let log = tries(cluster, "shop", name)?;
        ensure!(!log.contains("LEAKED"), "{name} was not captured at once: {log}");
        agents::was_held(cluster, "node-a", "shop", name, "")?;
        let text = get(cluster, name, "http://ledger.payments/")?;
        ensure!(text == "the ledger\n", "{name}: {text}");
    }
    tries(cluster, "loose", "plain")?;
    let captured = capture.stop()?;
    ensure!(!captured.contains(b"the ledger"), "the wire shows what was said");
    let plain: IpAddr = address(cluster, "loose", "plain")?.parse()?;
    let callers = callers(&captured, server)?;
    ensure!(callers == BTreeSet::from([plain]), "not only {plain} called in clear: {callers:?}");
    cluster.kubectl(&["delete", "pod", "--namespace=loose", "plain"])?;
    let delete = ["delete", "pod", "--namespace=shop"].map(str::to_owned).into_iter();
    let delete: Vec<String> = delete.chain(names).collect();
    cluster.kubectl(&delete.iter().map(String::as_str).collect::<Vec<_>>())?;
    Ok(())
}

/// Replaces the control plane, and starts one pod after the other until that is over: their names.
fn start_while_the_control_plane_restarts(
    cluster: &Cluster,
    server: SocketAddr,
) -> anyhow::Result<Vec<String>> {
    let deployment = ["--namespace=hauberk-system", "deployment/hauberk-control-plane"];
    cluster.kubectl(&[["rollout", "restart"].as_slice(), &deployment].concat())?;
    thread::scope(|scope| {
        let rollout = scope.spawn(|| {
            let status = ["rollout", "status", "--timeout=120s"];
            cluster.kubectl(&[status.as_slice(), &deployment].concat())
        });
        let mut names = Vec::new();
        while names.len() < *HASTY_PODS.end()
            && (!rollout.is_finished() || names.len() < *HASTY_PODS.start())
        {
            let name = format!("hasty-{}", names.len());
            cluster.apply(&hasty(&name, "node-a", server, "http://ledger.payments/"))?;
            names.push(name);
            // A pace at which some of them meet each step of it.
            thread::sleep(Duration::from_secs(1));
        }
        let outcome = rollout.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        outcome.with_context(|| everything(cluster))?;
        Ok(names)
    })
}
