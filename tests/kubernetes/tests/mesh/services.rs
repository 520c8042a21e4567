//! The ways in which pods find each other and run, and those who watch.

use std::{collections::BTreeSet, process::Command, time::Duration};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::{Cluster, NODE_A, NODE_B, ipv4};
use serde_json::Value;

use crate::{
    Test,
    install::{PATIENCE, everything},
    pods::address,
    policy::{POLICY, get},
    replicas::{checked, told},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("services_of_every_kind_lead_to_their_pods", services_of_every_kind_lead_to_their_pods),
    ("connections_stay_as_near_as_the_service_asks", connections_stay_as_near_as_the_service_asks),
    (
        "an_endpoint_that_ends_serves_while_no_other_is_ready",
        an_endpoint_that_ends_serves_while_no_other_is_ready,
    ),
    (
        "external_addresses_lead_to_pods_and_callers_stay_with_theirs",
        external_addresses_lead_to_pods_and_callers_stay_with_theirs,
    ),
    ("ports_of_nodes_lead_to_pods", ports_of_nodes_lead_to_pods),
    ("a_job_with_an_init_container_finishes", a_job_with_an_init_container_finishes),
    ("containers_of_a_pod_talk_to_each_other", containers_of_a_pod_talk_to_each_other),
    ("a_pod_in_its_nodes_network_is_told", a_pod_in_its_nodes_network_is_told),
    ("prometheus_sees_who_was_denied", prometheus_sees_who_was_denied),
];

const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: ledger-direct, namespace: payments}
spec: {clusterIP: None, selector: {app: ledger}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: ledger-alias, namespace: shop}
spec: {type: ExternalName, externalName: ledger.payments.svc.cluster.local}
";

/// The zones that the nodes are in for one test.
const ZONES: [(&str, &str); 2] = [("node-a", "zone-a"), ("node-b", "zone-b")];

const ZONE_LABEL: &str = "topology.kubernetes.io/zone";

/// The service, whose pods are in [`near_pod`].
const NEAR: &str = "
apiVersion: v1
kind: ServiceAccount
metadata: {name: near, namespace: payments}
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: payments}
spec: {selector: {app: near}, ports: [{port: 80, targetPort: 8080}], trafficDistribution: PreferClose}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: near, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {selector: {matchLabels: {app: near}}}
  rules:
  - name: checkout
    ports: [8080]
    from:
    - serviceAccount: {namespace: shop, name: checkout}
";

/// A server of that service, which says its own name.
fn near_pod(name: &str, node: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: payments, labels: {{app: near}}}}
spec:
  nodeName: {node}
  serviceAccountName: near
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo {name} >/www/index.html; exec httpd -f -h /www -p 8080']
    readinessProbe: {{httpGet: {{path: /, port: 8080}}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 10}}
"
    )
}

fn near_objects() -> String {
    format!("{NEAR}{}{}", near_pod("near-a", "node-a"), near_pod("near-b", "node-b"))
}

fn allowed(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        get(cluster, "checkout", "http://ledger.payments/").map(drop)
    })
}

fn services_of_every_kind_lead_to_their_pods(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    cluster.apply(SERVICES)?;
    let service = cluster.kubectl_json(&["get", "service", "--namespace=payments", "ledger"])?;
    let addresses = service["spec"]["clusterIPs"].as_array().context("no addresses")?.clone();
    ensure!(addresses.len() == 2, "not of both families: {addresses:?}");
    let mut places = vec![
        "http://ledger-direct.payments:8080/".to_owned(),
        "http://ledger-alias.shop/".to_owned(),
        format!("http://{}:8080/", address(cluster, "payments", "ledger")?),
    ];
    for ip in addresses.iter().filter_map(Value::as_str) {
        let ip = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        places.push(format!("http://{ip}/"));
    }
    for url in places {
        cluster.wait_until(&url, PATIENCE, |cluster| {
            let text = get(cluster, "checkout", &url)?;
            ensure!(text == "the ledger\n", "{text}");
            Ok(())
        })?;
        ensure!(get(cluster, "web", &url).is_err(), "{url}: nobody allowed it");
    }
    cluster.delete(SERVICES)?;
    Ok(())
}

/// What is left of a failed one would make the next tests fail, too.
fn connections_stay_as_near_as_the_service_asks(cluster: &Cluster) -> anyhow::Result<()> {
    for (node, zone) in ZONES {
        let label = format!("{ZONE_LABEL}={zone}");
        cluster.kubectl(&["label", "--overwrite", "node", node, &label])?;
    }
    let outcome = near(cluster).with_context(|| everything(cluster));
    cluster.delete(&near_objects())?;
    for (node, _) in ZONES {
        cluster.kubectl(&["label", "node", node, &format!("{ZONE_LABEL}-")])?;
    }
    outcome
}

/// A service whose only pod takes long to end, and serves until then.
const LINGERING: &str = "
apiVersion: v1
kind: Service
metadata: {name: lingering, namespace: payments}
spec: {selector: {app: lingering}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: lingering, namespace: payments, labels: {app: lingering}}
spec:
  terminationGracePeriodSeconds: 60
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo still here >/www/index.html; exec httpd -f -h /www -p 8080']
    lifecycle: {preStop: {exec: {command: ['sleep', '60']}}}
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 10}
---
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: lingering, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {selector: {matchLabels: {app: lingering}}}
  rules:
  - name: checkout
    ports: [8080]
    from:
    - serviceAccount: {namespace: shop, name: checkout}
";

fn an_endpoint_that_ends_serves_while_no_other_is_ready(cluster: &Cluster) -> anyhow::Result<()> {
    let outcome = lingering(cluster);
    let now = ["delete", "pod", "--namespace=payments", "--ignore-not-found"];
    let at_once = ["--grace-period=0", "--force", "lingering"];
    cluster.kubectl(&[&now[..], &at_once].concat())?;
    cluster.delete(LINGERING)?;
    outcome
}

fn lingering(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(LINGERING)?;
    cluster.wait_pod("payments", "lingering", PATIENCE)?;
    let ask = |cluster: &Cluster| -> anyhow::Result<()> {
        let text = get(cluster, "checkout", "http://lingering.payments/")?;
        ensure!(text == "still here\n", "{text}");
        Ok(())
    };
    cluster.wait_until("a connection", PATIENCE, ask)?;
    cluster.kubectl(&["delete", "pod", "--namespace=payments", "--wait=false", "lingering"])?;
    let slices = ["get", "endpointslices", "--namespace=payments"];
    let selected = "--selector=kubernetes.io/service-name=lingering";
    cluster.wait_until("the end of the pod", PATIENCE, |cluster| {
        let found = cluster.kubectl_json(&[&slices[..], &[selected]].concat())?;
        let conditions = &found["items"][0]["endpoints"][0]["conditions"];
        let ends = conditions["terminating"] == true && conditions["serving"] == true;
        ensure!(ends && conditions["ready"] == false, "{conditions}");
        Ok(())
    })?;
    // By then agents know of it; and it goes on.
    for _ in 0..10 {
        ask(cluster).with_context(|| everything(cluster))?;
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn near(cluster: &Cluster) -> anyhow::Result<()> {
    let place = |objects: &str| -> anyhow::Result<()> {
        cluster.apply(objects)?;
        for pod in ["near-a", "near-b"] {
            cluster.wait_pod("payments", pod, PATIENCE)?;
        }
        Ok(())
    };
    let twenty = |name: &str| {
        cluster.wait_until(&format!("connections to {name}"), PATIENCE, |cluster| {
            all_of_twenty_reach(cluster, name)
        })
    };
    place(&near_objects())?;
    cluster.wait_until("the hints", PATIENCE, hinted)?;
    twenty("near-a")?;
    // By now the agents know of the hints, and no connection goes elsewhere.
    for _ in 0..3 {
        all_of_twenty_reach(cluster, "near-a")?;
    }
    cluster.kubectl(&["delete", "pod", "--namespace=payments", "near-a"])?;
    twenty("near-b")?;
    // Without the other field, which would lead to the same pods.
    let local =
        "--patch={\"spec\": {\"internalTrafficPolicy\": \"Local\", \"trafficDistribution\": null}}";
    cluster.kubectl(&["patch", "service", "--namespace=payments", "near", local])?;
    let wanted = "has internalTrafficPolicy: Local, and no endpoint that is ready on node-a, but 1";
    cluster.wait_until("the refusal", PATIENCE, |cluster| {
        ensure!(get(cluster, "checkout", "http://near.payments/").is_err(), "not refused");
        let denied = told(cluster, &["denied"])?;
        ensure!(denied.contains(wanted), "{denied}");
        Ok(())
    })?;
    // What is applied does not speak of that field, which stays as it is.
    place(&near_objects().replace(", trafficDistribution: PreferClose", ""))?;
    twenty("near-a")
}

/// Whether the controller has said of both which zone they are for.
fn hinted(cluster: &Cluster) -> anyhow::Result<()> {
    let service = "--selector=kubernetes.io/service-name=near";
    let found =
        cluster.kubectl_json(&["get", "endpointslices", "--namespace=payments", service])?;
    let slices = found["items"].as_array().into_iter().flatten();
    let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    let zones: BTreeSet<&str> = endpoints
        .filter_map(|endpoint| endpoint["hints"]["forZones"][0]["name"].as_str())
        .collect();
    ensure!(zones == BTreeSet::from(["zone-a", "zone-b"]), "{found:#}");
    Ok(())
}

fn all_of_twenty_reach(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    let said = twenty(cluster, "http://near.payments/")?;
    ensure!(said == format!("{name}\n").repeat(20), "{said}");
    Ok(())
}

/// What so many requests of one pod are answered.
fn twenty(cluster: &Cluster, url: &str) -> anyhow::Result<String> {
    let twenty = format!(
        "i=0; while [ $i -lt 20 ]; do timeout 5 wget -q -O - {url} || echo failed; i=$((i+1)); done"
    );
    cluster.exec("shop", "checkout", &["sh", "-c", &twenty])
}

/// An address that nobody has.
const EXTERNAL: &str = "192.0.2.80";

/// A service of the same pods with an address from outside, whose callers stay; and one that claims the address of
/// another's pod.
fn given_objects(ledger: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: given, namespace: payments}}
spec:
  selector: {{app: near}}
  sessionAffinity: ClientIP
  externalIPs: [{EXTERNAL}]
  ports: [{{port: 80, targetPort: 8080}}]
---
apiVersion: v1
kind: Service
metadata: {{name: thief, namespace: payments}}
spec: {{selector: {{app: near}}, externalIPs: ['{ledger}'], ports: [{{port: 8080}}]}}
"
    )
}

fn external_addresses_lead_to_pods_and_callers_stay_with_theirs(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    allowed(cluster)?;
    let ledger = address(cluster, "payments", "ledger")?;
    let objects = format!("{}{}", near_objects(), given_objects(&ledger));
    cluster.apply(&objects)?;
    let led = given(cluster, &ledger).with_context(|| everything(cluster));
    cluster.delete(&objects)?;
    led
}

fn given(cluster: &Cluster, ledger: &str) -> anyhow::Result<()> {
    for pod in ["near-a", "near-b"] {
        cluster.wait_pod("payments", pod, PATIENCE)?;
    }
    let external = format!("http://{EXTERNAL}/");
    // Both are there: without affinity each is reached in its turn.
    cluster.wait_until("both pods", PATIENCE, |cluster| {
        let said = twenty(cluster, "http://near.payments/")?;
        ensure!(said.contains("near-a") && said.contains("near-b"), "{said}");
        get(cluster, "checkout", &external).map(drop)
    })?;
    for url in ["http://given.payments/", &external] {
        let said = twenty(cluster, url)?;
        let stays = ["near-a\n", "near-b\n"].map(|name| name.repeat(20)).contains(&said);
        ensure!(stays, "{url}: {said}");
        ensure!(get(cluster, "web", url).is_err(), "{url}: nobody allowed it");
    }
    let text = get(cluster, "checkout", &format!("http://{ledger}:8080/"))?;
    ensure!(text == "the ledger\n", "a service has taken the pod's place: {text}");
    Ok(())
}

/// The port of a node, asked for by pods: without the mesh, kube-proxy leads it there.
fn ports_of_nodes_lead_to_pods(cluster: &Cluster) -> anyhow::Result<()> {
    const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: ported, namespace: payments}
spec: {type: NodePort, selector: {app: ledger}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}
";
    allowed(cluster)?;
    cluster.apply(SERVICE)?;
    let led = led_by_nodes(cluster).with_context(|| everything(cluster));
    cluster.delete(SERVICE)?;
    led?;
    let url = format!("http://{}:30080/", ipv4(NODE_A));
    cluster.wait_until("the port to go", PATIENCE, |cluster| {
        ensure!(get(cluster, "checkout", &url).is_err(), "it still leads somewhere");
        Ok(())
    })
}

fn led_by_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    for node in [NODE_A, NODE_B] {
        let url = format!("http://{}:30080/", ipv4(node));
        cluster.wait_until("the service by its port of a node", PATIENCE, |cluster| {
            let text = get(cluster, "checkout", &url)?;
            ensure!(text == "the ledger\n", "{text}");
            Ok(())
        })?;
        ensure!(get(cluster, "web", &url).is_err(), "{url}: nobody allowed it");
        // Only by the ports of services does a node's address stand for others.
        let other = format!("http://{}:30081/", ipv4(node));
        ensure!(get(cluster, "checkout", &other).is_err(), "{other}");
    }
    Ok(())
}

fn a_job_with_an_init_container_finishes(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    let job = "
apiVersion: batch/v1
kind: Job
metadata: {name: nightly, namespace: shop}
spec:
  backoffLimit: 0
  template:
    spec:
      nodeName: node-a
      serviceAccountName: checkout
      restartPolicy: Never
      initContainers:
      - name: first
        image: hauberk.test/busybox:1
        imagePullPolicy: Never
        args: ['-c', 'timeout 20 wget -q -O - http://ledger.payments/']
      containers:
      - name: it
        image: hauberk.test/busybox:1
        imagePullPolicy: Never
        args: ['-c', 'timeout 20 wget -q -O - http://ledger.payments/']
";
    cluster.apply(job)?;
    let log = cluster
        .wait_until("the job", PATIENCE, |cluster| {
            let found = cluster.kubectl_json(&["get", "job", "--namespace=shop", "nightly"])?;
            ensure!(found["status"]["succeeded"] == 1, "{:#}", found["status"]);
            cluster.kubectl(&["logs", "--namespace=shop", "job/nightly", "--all-containers"])
        })
        .with_context(|| everything(cluster))?;
    ensure!(log == "the ledger\nthe ledger\n", "{log}");
    cluster.delete(job)?;
    Ok(())
}

fn containers_of_a_pod_talk_to_each_other(cluster: &Cluster) -> anyhow::Result<()> {
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: pair, namespace: strict}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: one
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo neighbour >/www/index.html; exec httpd -f -h /www -p 127.0.0.1:8090']
  - name: other
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'exec sleep 1000000']
";
    cluster.apply(pod)?;
    cluster.wait_pod("strict", "pair", PATIENCE)?;
    let text = cluster.wait_until("the neighbour", PATIENCE, |cluster| {
        let wget = ["wget", "-q", "-O", "-", "http://127.0.0.1:8090/"];
        let exec =
            ["exec", "--namespace=strict", "pair", "--container=other", "--", "timeout", "5"];
        cluster.kubectl(&[exec.as_slice(), &wget].concat())
    })?;
    ensure!(text == "neighbour\n", "{text}");
    cluster.delete(pod)?;
    Ok(())
}

fn a_pod_in_its_nodes_network_is_told(cluster: &Cluster) -> anyhow::Result<()> {
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: on-host, namespace: shop}
spec:
  nodeName: node-a
  hostNetwork: true
  serviceAccountName: checkout
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
";
    cluster.apply(pod)?;
    cluster.wait_pod("shop", "on-host", PATIENCE)?;
    cluster.wait_until("the note", PATIENCE, |cluster| {
        let status = told(cluster, &["status"])?;
        ensure!(status.contains("pod shop/on-host uses its node's network"), "{status}");
        Ok(())
    })?;
    let (code, text) = checked(cluster)?;
    ensure!(code == Some(1), "nothing is wrong, says check: {text}");
    ensure!(text.contains("pod shop/on-host uses its node's network"), "{text}");
    // It has its service account's name, and none of its rights.
    let url = format!("http://{}:8080/", address(cluster, "payments", "ledger")?);
    ensure!(get(cluster, "on-host", &url).is_err(), "it was taken for its service account");
    cluster.delete(pod)?;
    Ok(())
}

/// What `promtool` says to a question, or nothing yet.
fn asked(cluster: &Cluster, question: &str) -> anyhow::Result<String> {
    let mut promtool = Command::new("promtool");
    promtool.args(["query", "instant", "http://127.0.0.1:9190", question]);
    let output = cluster.in_control(&mut promtool)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn prometheus_sees_who_was_denied(cluster: &Cluster) -> anyhow::Result<()> {
    allowed(cluster)?;
    ensure!(get(cluster, "web", "http://ledger.payments/").is_err(), "nobody allowed it");
    let folder = tempfile::tempdir()?;
    let targets = ["node-a", "node-b"]
        .map(|name| cluster.node(name).map(|node| format!("'{}:9465'", ipv4(node.number()))));
    let targets = targets.into_iter().collect::<anyhow::Result<Vec<_>>>()?.join(", ");
    let configuration = folder.path().join("prometheus.yml");
    std::fs::write(
        &configuration,
        format!(
            "global: {{scrape_interval: 1s}}\nscrape_configs:\n- job_name: hauberk\n  static_configs: [{{targets: [{targets}]}}]\n"
        ),
    )?;
    let mut prometheus = Command::new("prometheus");
    prometheus
        .arg(format!("--config.file={}", configuration.display()))
        .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
        .args(["--web.listen-address=127.0.0.1:9190", "--log.level=error"]);
    let mut running = cluster.control().netns()?.run(|| prometheus.spawn())??;
    let question = "hauberk_connections_denied_total{src_namespace=\"shop\",src_workload=\"web\",\
                    dst_namespace=\"payments\",dst_workload=\"ledger\"}";
    let seen = cluster.wait_until("Prometheus", Duration::from_secs(30), |cluster| {
        let seen = asked(cluster, question)?;
        ensure!(seen.contains("reason=\"no_matching_rule\""), "{seen}");
        Ok(seen)
    });
    let ended = running.kill().and_then(|()| running.wait());
    seen?;
    ended?;
    Ok(())
}
