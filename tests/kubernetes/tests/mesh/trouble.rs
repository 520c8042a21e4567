//! What happens to the cluster, and what must hold all the same.

use std::{
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test, agents,
    control_plane::scale,
    install::{PATIENCE, everything},
    outage::{Live, network_of},
    pods::{address, callers, eager, idle, server, tries},
    policy::{POLICY, get},
    stolen,
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("a_pod_deleted_by_force_stays_captured", a_pod_deleted_by_force_stays_captured),
    (
        "a_control_plane_that_missed_a_deletion_goes_on",
        a_control_plane_that_missed_a_deletion_goes_on,
    ),
    ("a_node_port_does_not_pass_for_a_probe", a_node_port_does_not_pass_for_a_probe),
    ("a_pod_without_its_service_account_is_nobody", a_pod_without_its_service_account_is_nobody),
    ("a_restarted_container_runtime_is_asked_again", a_restarted_container_runtime_is_asked_again),
    (
        "a_pod_whose_namespace_left_while_no_agent_ran_is_free_when_one_does",
        a_pod_whose_namespace_left_while_no_agent_ran_is_free_when_one_does,
    ),
    (
        "an_agent_that_starts_finds_its_pods_among_others_with_much_to_say",
        an_agent_that_starts_finds_its_pods_among_others_with_much_to_say,
    ),
    (
        "what_changes_while_the_api_server_refuses_is_enforced_as_soon_as_it_does_not",
        what_changes_while_the_api_server_refuses_is_enforced_as_soon_as_it_does_not,
    ),
    ("after_a_reboot_no_pod_talks_unprotected", after_a_reboot_no_pod_talks_unprotected),
];

/// How long a node may take to have all of its pods again.
const BOOT_PATIENCE: Duration = Duration::from_secs(180);

/// Runs a command of a node in the network of the pod with this address; needs no API server.
pub(crate) fn in_pod(
    cluster: &Cluster,
    node: &str,
    address: &str,
    command: &str,
) -> anyhow::Result<String> {
    let script = format!(
        "for place in /run/netns/*; do \
           if nsenter --net=$place ip addr | grep -q ' {address}/'; then \
             exec nsenter --net=$place {command}; \
           fi; \
         done; echo no pod has {address} >&2; exit 9"
    );
    cluster.node(node)?.text(&["sh", "-c", &script])
}

pub(crate) const LEDGER: &str = "http://ledger.payments/";

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

fn set_mode(cluster: &Cluster, namespace: &str, mode: &str) -> anyhow::Result<()> {
    let label = format!("hauberk.dev/mode={mode}");
    cluster.kubectl(&["label", "--overwrite", "namespace", namespace, &label]).map(drop)
}

fn a_node_port_does_not_pass_for_a_probe(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(OPEN_TO_ALL)?;
    // The kubelet's probe gets through, or it would not be ready.
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
    let nodes = ["node-b", "node-a"];
    // First where nobody is refused: from then on, only the mesh can be what refuses.
    set_mode(cluster, "payments", "audit")?;
    for node in nodes {
        cluster.wait_until(&format!("the NodePort of {node}"), PATIENCE, |_| {
            ensure!(ask(node)?, "no answer");
            Ok(())
        })?;
    }
    set_mode(cluster, "payments", "enforce")?;
    for node in nodes {
        cluster.wait_until(&format!("the refusal through {node}"), PATIENCE, |_| {
            ensure!(!ask(node)?, "a caller without the mesh came in");
            Ok(())
        })?;
        ensure!(!ask(node)?, "a caller without the mesh came in through {node}'s NodePort");
    }
    agents::record(cluster, "node-b", |record| {
        record["dst"]["workload"] == "front"
            && record["decision"] == "deny"
            && record["reason"] == "plaintext"
    })?;
    cluster.delete(OPEN_TO_ALL)?;
    Ok(())
}

pub(crate) fn allowed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", LEDGER)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })
}

/// The API server does one thing at a time for the control plane, and refuses all else with 429, as if it had too much to do. What
/// it does is to wait for a webhook that says nothing.
const REFUSED: &str = "
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: PriorityLevelConfiguration
metadata: {name: closed}
spec:
  type: Limited
  limited: {nominalConcurrencyShares: 0, lendablePercent: 0, borrowingLimitPercent: 0, limitResponse: {type: Reject}}
---
apiVersion: flowcontrol.apiserver.k8s.io/v1
kind: FlowSchema
metadata: {name: closed}
spec:
  priorityLevelConfiguration: {name: closed}
  matchingPrecedence: 2
  rules:
  - subjects: [{kind: ServiceAccount, serviceAccount: {namespace: hauberk-system, name: hauberk-control-plane}}]
    resourceRules: [{verbs: ['*'], apiGroups: ['*'], resources: ['*'], namespaces: ['*'], clusterScope: true}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: silent}
webhooks:
- name: silent.hauberk.test
  admissionReviewVersions: [v1]
  clientConfig: {url: 'https://127.0.0.1:7777/'}
  rules: [{apiGroups: [''], apiVersions: [v1], resources: [configmaps], operations: [CREATE]}]
  matchConditions: [{name: held, expression: object.metadata.name == 'held'}]
  failurePolicy: Ignore
  sideEffects: None
  timeoutSeconds: 30
";

/// Less than the webhook may be silent, and longer than pauses that are doubled take to be far apart.
const REFUSING: Duration = Duration::from_secs(22);

/// Between the end of the refusals and what they held up: a client that doubles its pauses takes longer.
const TAKEN_UP: Duration = Duration::from_secs(5);

fn what_changes_while_the_api_server_refuses_is_enforced_as_soon_as_it_does_not(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    allowed(cluster)?;
    cluster.apply(REFUSED)?;
    // Nobody answers there, not even the kernel: a handshake of TLS would be waited for for 10 s only.
    let silent = "table inet silent { chain input { type filter hook input priority 0; tcp dport 7777 drop; }; }";
    cluster.in_control(Command::new("nft").arg(silent))?;
    let held = thread::scope(|scope| {
        let waits = scope.spawn(|| {
            // The API server takes a moment to sort requests anew.
            thread::sleep(Duration::from_secs(2));
            let own = "--as=system:serviceaccount:hauberk-system:hauberk-control-plane";
            let created = ["create", "configmap", "--namespace=hauberk-system", "held", own];
            cluster.kubectl(&created).map(|_| Instant::now())
        });
        let held = while_it_refuses(cluster);
        let ended = waits.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
        let outcome = held.and(ended);
        let enforced = cluster.wait_until("the policy of meanwhile", PATIENCE, |cluster| {
            let text = get(cluster, "web", LEDGER)?;
            ensure!(text == "the ledger\n", "{text}");
            Ok(Instant::now())
        });
        let took = outcome.and_then(|ended| Ok(enforced?.duration_since(ended)));
        took.with_context(|| everything(cluster))
    });
    cluster.in_control(Command::new("nft").arg("delete table inet silent"))?;
    cluster.delete(REFUSED)?;
    cluster.kubectl(&["delete", "configmap", "--namespace=hauberk-system", "held"])?;
    allowed(cluster)?;
    let took = held?;
    eprintln!("enforced {took:?} after the last refusal");
    ensure!(took < TAKEN_UP, "it took {took:?}");
    Ok(())
}

fn while_it_refuses(cluster: &Cluster) -> anyhow::Result<()> {
    thread::sleep(Duration::from_secs(5));
    cluster.apply(&POLICY.replace("name: checkout}", "name: web}"))?;
    thread::sleep(REFUSING);
    ensure!(get(cluster, "web", LEDGER).is_err(), "it is enforced already: nothing was refused");
    let text = get(cluster, "checkout", LEDGER)?;
    ensure!(text == "the ledger\n", "{text}");
    Ok(())
}

fn a_pod_without_its_service_account_is_nobody(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(&POLICY.replace("[8080]", "[8080, 9000]"))?;
    let (ledger, caller) =
        (address(cluster, "payments", "ledger")?, address(cluster, "shop", "checkout")?);
    let network = network_of(cluster, "node-a", caller.parse()?)?;
    let echo = SocketAddr::new(ledger.parse()?, 9000);
    let mut live = cluster.wait_until("the live connection", PATIENCE, |_| {
        let mut live = Live::open(&network, echo)?;
        live.echo()?;
        Ok(live)
    })?;
    let (thief, own) = (stolen::thief(cluster)?, stolen::key(cluster, "shop", "checkout")?);
    cluster.kubectl(&["delete", "serviceaccount", "--namespace=shop", "checkout"])?;
    let deleted = Instant::now();
    cluster.wait_until("the end of the live connection", PATIENCE, |_| match live.echo() {
        Ok(()) => bail!("it goes on"),
        Err(error) => {
            eprintln!("cut after {:?}: {error:#}", deleted.elapsed());
            Ok(())
        }
    })?;
    let why = cluster.wait_until("the refusal", PATIENCE, |cluster| {
        match get(cluster, "checkout", LEDGER) {
            Ok(text) => bail!("still answered: {text}"),
            Err(error) => Ok(error),
        }
    })?;
    eprintln!("{why:#}");
    // As the agent itself would ask.
    stolen::is_refused(&thief, &own, "is not a live workload")?;
    // It stays captured: nothing goes out in clear either.
    thread::sleep(Duration::from_secs(4));
    ensure!(get(cluster, "checkout", LEDGER).is_err(), "it talks without an identity");
    let account =
        "{apiVersion: v1, kind: ServiceAccount, metadata: {name: checkout, namespace: shop}}";
    cluster.apply(account)?;
    allowed(cluster)
}

fn a_pod_deleted_by_force_stays_captured(cluster: &Cluster) -> anyhow::Result<()> {
    let server = server(cluster)?;
    cluster.apply(&eager("strict", "ghost", server))?;
    cluster.wait_pod("strict", "ghost", PATIENCE)?;
    let ghost = address(cluster, "strict", "ghost")?;
    let wget = format!("timeout 3 busybox wget -q -O - http://{server}/");
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
    scale(cluster, 0)?;
    // The state is another one when it comes back.
    cluster.kubectl(&["label", "namespace", "loose", "hauberk.dev/mode=audit"])?;
    scale(cluster, 1)?;
    cluster.kubectl(&["label", "namespace", "loose", "hauberk.dev/mode-"])?;
    allowed(cluster)
}

fn a_restarted_container_runtime_is_asked_again(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.restart_containerd("node-a")?;
    cluster.wait_node("node-a", PATIENCE)?;
    cluster.apply(&idle("shop", "late", "checkout", "{}"))?;
    cluster.wait_pod("shop", "late", PATIENCE).with_context(|| everything(cluster))?;
    ensure!(get(cluster, "late", LEDGER)? == "the ledger\n");
    cluster.kubectl(&["delete", "pod", "--namespace=shop", "late"])?;
    Ok(())
}

fn a_pod_whose_namespace_left_while_no_agent_ran_is_free_when_one_does(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    let server = server(cluster)?;
    cluster.apply("{apiVersion: v1, kind: Namespace, metadata: {name: leaving, labels: {hauberk.dev/mode: enforce}}}")?;
    cluster.apply(&idle("leaving", "captured", "default", "{}"))?;
    cluster.wait_pod("leaving", "captured", PATIENCE)?;
    let url = format!("http://{server}/");
    let ask = |cluster: &Cluster| -> anyhow::Result<String> {
        let command = ["timeout", "3", "wget", "-q", "-O", "-", &url];
        cluster.exec("leaving", "captured", &command)
    };
    cluster.wait_until("the refusal", PATIENCE, |cluster| {
        ensure!(ask(cluster).is_err(), "it is not captured");
        Ok(())
    })?;
    agents::send_away(cluster)?;
    let outcome = cluster.kubectl(&["label", "namespace", "leaving", "hauberk.dev/mode-"]);
    ensure!(ask(cluster).is_err(), "it was let go by nobody");
    agents::bring_back(cluster)?;
    outcome?;
    let freed = cluster.wait_until("the pod's plain network", PATIENCE, ask);
    freed.with_context(|| everything(cluster))?;
    cluster.kubectl(&["delete", "namespace", "leaving"]).map(drop)
}

/// Pods outside the mesh on a node, and how much each has in its annotations, twice: `apply` keeps what was applied in one
/// more. Together more than the 4 MiB that a gRPC client takes by itself.
const WORDY_PODS: usize = 24;
const WORDS: usize = 100_000;

fn wordy(number: usize) -> String {
    let words = "x".repeat(WORDS);
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: wordy-{number}, namespace: loose, annotations: {{words: {words}}}}}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'exec sleep 1000000']
"
    )
}

fn an_agent_that_starts_finds_its_pods_among_others_with_much_to_say(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    let pods: String = (0..WORDY_PODS).map(wordy).collect();
    let outcome = among_wordy(cluster, &pods);
    cluster.delete(&pods)?;
    outcome
}

fn among_wordy(cluster: &Cluster, pods: &str) -> anyhow::Result<()> {
    allowed(cluster)?;
    cluster.apply(pods)?;
    for number in 0..WORDY_PODS {
        cluster.wait_pod("loose", &format!("wordy-{number}"), PATIENCE)?;
    }
    // The runtime has them with its sandboxes, and tells all of them to whom lists these.
    let annotations = "--output=jsonpath={.items[*].metadata.annotations}";
    let said = cluster.kubectl(&["get", "pods", "--namespace=loose", annotations])?;
    ensure!(said.len() > 4 << 20, "only {} bytes", said.len());
    // It is to be asked of the runtime, and of nobody else.
    let kept =
        cluster.node("node-a")?.text(&["find", "/var/lib/hauberk", "-name", "sandboxes.json"])?;
    ensure!(kept.lines().count() == 1, "kept in {kept:?}");
    let agents = [
        "pod",
        "--namespace=hauberk-system",
        "--selector=app.kubernetes.io/component=agent",
        "--field-selector=spec.nodeName=node-a",
    ];
    cluster.node("node-a")?.text(&["rm", kept.trim()])?;
    cluster.kubectl(&[&["delete"], &agents[..]].concat())?;
    cluster.wait_until("the next agent", PATIENCE, |cluster| {
        cluster.kubectl(&[&["wait", "--for=condition=Ready", "--timeout=1s"], &agents[..]].concat())
    })?;
    let asked = cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        get(cluster, "checkout", LEDGER).map(drop)
    });
    asked.with_context(|| everything(cluster))
}

fn after_a_reboot_no_pod_talks_unprotected(cluster: &Cluster) -> anyhow::Result<()> {
    let server = server(cluster)?;
    cluster.apply(&eager("strict", "phoenix", server))?;
    // The same without the mesh: what it says is there to be seen.
    cluster.apply(&eager("loose", "plain", server))?;
    for (namespace, pod) in [("strict", "phoenix"), ("loose", "plain")] {
        tries(cluster, namespace, pod)?;
    }
    let before = cluster.node("node-a")?.text(&["date", "-u", "+%Y-%m-%dT%H:%M:%S"])?;
    let capture = cluster.wire().capture("node-b")?;
    cluster.reboot_node("node-a")?;
    cluster.wait_node("node-a", PATIENCE)?;
    // They run anew from their first word on, before or after the agent of their node.
    let phoenix = tries_after_a_boot(cluster, "strict", "phoenix")?;
    let plain = tries_after_a_boot(cluster, "loose", "plain")?;
    let captured = capture.stop()?;
    ensure!(!phoenix.contains("LEAKED"), "it got through: {phoenix}");
    ensure!(plain.contains("LEAKED"), "nobody reaches the server: {plain}");
    let callers = callers(&captured, server)?;
    let seen = |namespace: &str, pod: &str| -> anyhow::Result<bool> {
        Ok(callers.contains(&address(cluster, namespace, pod)?.parse::<IpAddr>()?))
    };
    ensure!(seen("loose", "plain")?, "the wire does not show who called in clear: {callers:?}");
    ensure!(!seen("strict", "phoenix")?, "the wire shows it calling in clear: {callers:?}");
    // It may be luck that an agent is as fast as a pod. That the pod was held is none.
    agents::was_held(cluster, "node-a", "strict", "phoenix", before.trim())?;
    cluster.kubectl(&["delete", "pod", "--namespace=strict", "phoenix"])?;
    cluster.kubectl(&["delete", "pod", "--namespace=loose", "plain"])?;
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

/// What a pod has written since its node was booted. Whether it was started anew is asked first: what
/// was written before does not count.
fn tries_after_a_boot(cluster: &Cluster, namespace: &str, pod: &str) -> anyhow::Result<String> {
    let namespace = format!("--namespace={namespace}");
    cluster.wait_until(&format!("{pod}'s tries"), BOOT_PATIENCE, |cluster| {
        let restarts = cluster.kubectl(&[
            "get",
            "pod",
            &namespace,
            pod,
            "--output=jsonpath={.status.containerStatuses[0].restartCount}",
        ])?;
        ensure!(restarts != "0", "it has not been started again yet");
        let log = cluster.kubectl(&["logs", &namespace, pod])?;
        ensure!(log.contains("done"), "{log}");
        Ok(log)
    })
}
