//! Who may connect.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::Cluster;
use hauberk_linux::packets::tls::TLS13;
use serde_json::Value;

use crate::{
    Test,
    install::{PATIENCE, everything},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    ("only_the_allowed_pod_connects", only_the_allowed_pod_connects),
    ("a_policy_tells_what_became_of_it", a_policy_tells_what_became_of_it),
    ("a_bad_policy_is_refused_with_its_field", a_bad_policy_is_refused_with_its_field),
    (
        "what_only_the_control_plane_can_judge_is_told",
        what_only_the_control_plane_can_judge_is_told,
    ),
    ("an_edited_policy_cuts_the_live_connection", an_edited_policy_cuts_the_live_connection),
    ("the_programs_may_no_more_than_is_written", the_programs_may_no_more_than_is_written),
];

/// A server and its callers, on both nodes.
const PODS: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: payments}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: checkout, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: web, namespace: shop}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: ledger, namespace: payments}
---
apiVersion: v1
kind: Pod
metadata: {name: checkout, namespace: shop, labels: {app: checkout}}
spec:
  nodeName: node-a
  serviceAccountName: checkout
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec:
  nodeName: node-a
  serviceAccountName: web
  terminationGracePeriodSeconds: 0
  containers:
  - {name: it, image: hauberk.test/busybox:1, imagePullPolicy: Never, args: ['-c', 'exec sleep 1000000']}
---
apiVersion: v1
kind: Pod
metadata: {name: ledger, namespace: payments, labels: {app: ledger}}
spec:
  nodeName: node-b
  serviceAccountName: ledger
  terminationGracePeriodSeconds: 0
  containers:
  - name: it
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo the ledger >/www/index.html; httpd -h /www -p 8080; exec nc -ll -p 9000 -e cat']
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: payments}
spec: {selector: {app: ledger}, ports: [{port: 80, targetPort: 8080}], ipFamilyPolicy: PreferDualStack}
";

pub(crate) const POLICY: &str = "
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: ledger, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {selector: {matchLabels: {app: ledger}}}
  rules:
  - name: checkout
    ports: [8080]
    from:
    - serviceAccount: {namespace: shop, name: checkout}
";

pub(crate) fn get(cluster: &Cluster, pod: &str, url: &str) -> anyhow::Result<String> {
    cluster.exec("shop", pod, &["timeout", "5", "wget", "-q", "-O", "-", url])
}

/// The pods of these tests, in the mesh.
pub(crate) fn place(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(PODS)?;
    for (namespace, pod) in [("shop", "checkout"), ("shop", "web"), ("payments", "ledger")] {
        cluster.wait_pod(namespace, pod, PATIENCE)?;
    }
    enforce(cluster)
}

fn enforce(cluster: &Cluster) -> anyhow::Result<()> {
    for namespace in ["shop", "payments"] {
        cluster.kubectl(&[
            "label",
            "--overwrite",
            "namespace",
            namespace,
            "hauberk.dev/mode=enforce",
        ])?;
    }
    Ok(())
}

fn only_the_allowed_pod_connects(cluster: &Cluster) -> anyhow::Result<()> {
    let url = "http://ledger.payments/";
    for namespace in ["shop", "payments"] {
        cluster.kubectl(&["label", "namespace", namespace, "hauberk.dev/mode-"])?;
    }
    let pods = pods(cluster)?;
    let capture = cluster.wire().capture("node-b")?;
    cluster.wait_until("pods without the mesh", PATIENCE, |cluster| {
        ensure!(get(cluster, "web", url)? == "the ledger\n", "not even without the mesh");
        Ok(())
    })?;
    // What it would show if nobody protected it.
    ensure!(capture.stop()?.contains(b"the ledger"), "the wire shows nothing of what is in clear");
    let began = Instant::now();
    enforce(cluster)?;
    let refused = cluster.wait_until("the mesh to refuse", PATIENCE, |cluster| {
        match (get(cluster, "checkout", url), get(cluster, "web", url)) {
            (Err(_), Err(error)) => Ok(format!("{error:#}")),
            (Ok(_), _) | (_, Ok(_)) => bail!("nothing is refused"),
        }
    });
    match refused {
        Ok(text) => eprintln!("refused: {text}"),
        Err(error) => bail!("{error:#}\n{}", everything(cluster)),
    }
    eprintln!("enforced {:?} after the label", began.elapsed());
    let capture = cluster.wire().capture("node-b")?;
    cluster.apply(POLICY)?;
    let allowed =
        cluster.wait_until("the policy", PATIENCE, |cluster| get(cluster, "checkout", url));
    match allowed {
        Ok(text) => ensure!(text == "the ledger\n", "{text}"),
        Err(error) => bail!("{error:#}\n{}", everything(cluster)),
    }
    // As often as it takes to meet both address families of the service.
    for round in 0..10 {
        if let Err(error) = get(cluster, "checkout", url) {
            bail!("round {round}: {error:#}\n{}", everything(cluster));
        }
    }
    let captured = capture.stop()?;
    ensure!(captured.is_complete(), "the capture has lost {} frames", captured.lost());
    ensure!(!captured.contains(b"the ledger"), "the wire shows what was said");
    // What carried it.
    let handshakes = captured.handshakes(15_008);
    let servers = handshakes.iter().filter_map(|handshake| handshake.server.as_ref());
    let versions: Vec<u16> = servers.map(|server| server.version).collect();
    let is_13 = !versions.is_empty() && versions.iter().all(|version| *version == TLS13);
    ensure!(is_13, "not TLS 1.3: {versions:x?}");
    ensure!(get(cluster, "web", url).is_err(), "nobody allowed it");
    let after = self::pods(cluster)?;
    ensure!(after == pods, "pods were replaced or restarted: {pods:?}, now {after:?}");
    Ok(())
}

/// The pods of these tests, with how often their containers were started anew.
fn pods(cluster: &Cluster) -> anyhow::Result<BTreeSet<(String, i64)>> {
    let mut found = BTreeSet::new();
    for namespace in ["shop", "payments"] {
        let pods = cluster.kubectl_json(&["get", "pods", &format!("--namespace={namespace}")])?;
        for pod in pods["items"].as_array().into_iter().flatten() {
            let uid = pod["metadata"]["uid"].as_str().context("no UID")?;
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_i64();
            found.insert((uid.to_owned(), restarts.context("no container")?));
        }
    }
    ensure!(found.len() >= 3, "{found:?}");
    Ok(found)
}

/// The status of a condition, and its message.
pub(crate) fn condition(object: &Value, kind: &str) -> anyhow::Result<(String, String)> {
    let conditions = object.pointer("/status/conditions").and_then(Value::as_array);
    let found = conditions
        .into_iter()
        .flatten()
        .find(|condition| condition.get("type").is_some_and(|known| known == kind))
        .with_context(|| format!("no condition {kind}: {:#}", object["status"]))?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("message")))
}

pub(crate) fn ledger_policy(cluster: &Cluster) -> anyhow::Result<Value> {
    cluster.kubectl_json(&["get", "accesspolicy", "--namespace=payments", "ledger"])
}

fn a_policy_tells_what_became_of_it(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(POLICY)?;
    let told = cluster.wait_until("the policy's status", PATIENCE, |cluster| {
        let policy = ledger_policy(cluster)?;
        for kind in ["Accepted", "ResolvedRefs", "Programmed"] {
            let (status, message) = condition(&policy, kind)?;
            ensure!(status == "True", "{kind}: {message}");
        }
        Ok(policy)
    });
    let told = told.with_context(|| everything(cluster))?;
    ensure!(told["status"]["matchedWorkloads"] == 1, "{:#}", told["status"]);
    let agents = serde_json::json!({"desired": 1, "programmed": 1});
    ensure!(told["status"]["agents"] == agents, "{:#}", told["status"]);
    ensure!(told["status"]["observedGeneration"] == told["metadata"]["generation"], "{told:#}");
    let table = cluster.kubectl(&["get", "hap", "--namespace=payments"])?;
    for word in ["OWNER", "payments", "ACCEPTED", "True", "PROGRAMMED", "WORKLOADS"] {
        ensure!(table.contains(word), "no {word} in\n{table}");
    }
    let explained = cluster.kubectl(&["explain", "accesspolicy.spec.rules.from.anyIn"])?;
    ensure!(explained.contains("A wildcard is always spelt out"), "{explained}");
    Ok(())
}

fn a_bad_policy_is_refused_with_its_field(cluster: &Cluster) -> anyhow::Result<()> {
    let owner = "owner: {team: t, contact: c}";
    let target = "target: {selector: {matchLabels: {app: x}}}";
    let rule = |rest: &str| format!("{owner}, {target}, rules: [{{name: r, {rest}}}]");
    let from = "from: [{machine: m}]";
    let cases = [
        (format!("{target}, rules: []"), "spec.owner: Required value"),
        (format!("{owner}, {target}"), "spec.rules: Required value"),
        (format!("{owner}, target: {{}}, rules: []"), "spec.target: Invalid value"),
        (
            format!("{owner}, target: {{machine: a, serviceAccount: b}}, rules: []"),
            "name exactly one of selector, serviceAccount and machine",
        ),
        (
            format!("{owner}, target: {{selector: {{matchLabels: {{}}}}}}, rules: []"),
            "spec.target.selector.matchLabels",
        ),
        (rule(from), "spec.rules[0].ports: Required value"),
        (rule(&format!("ports: [], {from}")), "spec.rules[0].ports"),
        (rule(&format!("ports: [0], {from}")), "spec.rules[0].ports[0]"),
        (rule(&format!("ports: [70000], {from}")), "spec.rules[0].ports[0]"),
        (rule(&format!("ports: ['80'], {from}")), "spec.rules[0].ports[0]"),
        (rule("ports: [1]"), "spec.rules[0].from: Required value"),
        (rule("ports: [1], from: []"), "spec.rules[0].from"),
        (rule("ports: [1], from: [{}]"), "spec.rules[0].from[0]"),
        (
            rule("ports: [1], from: [{machine: a, anyIn: {namespace: b}}]"),
            "name exactly one of serviceAccount, machine, spiffeId and anyIn",
        ),
        (rule("ports: [1], from: [{machine: 'A b'}]"), "spec.rules[0].from[0].machine"),
        (rule(&format!("ports: [1], {from}, notAfter: tomorrow")), "spec.rules[0].notAfter"),
        (rule(&format!("ports: [1], {from}, expectedEvery: 1w")), "spec.rules[0].expectedEvery"),
        (
            rule(&format!("ports: [1], {from}, notAfterr: x")),
            "unknown field \"spec.rules[0].notAfterr\"",
        ),
        (format!("{owner}, {target}, mode: Off, rules: []"), "spec.mode: Unsupported value"),
        (
            format!(
                "{owner}, {target}, rules: [{{name: r, ports: [1], {from}}}, {{name: r, ports: [2], {from}}}]"
            ),
            "spec.rules[1]: Duplicate value",
        ),
    ];
    for (spec, wanted) in &cases {
        let manifest = format!(
            "{{apiVersion: hauberk.dev/v1alpha1, kind: AccessPolicy, metadata: {{name: bad, namespace: shop}}, spec: {{{spec}}}}}"
        );
        match cluster.apply(&manifest) {
            Ok(_) => bail!("it was taken: {spec}"),
            Err(error) => ensure!(format!("{error:#}").contains(wanted), "{spec}: {error:#}"),
        }
    }
    Ok(())
}

fn what_only_the_control_plane_can_judge_is_told(cluster: &Cluster) -> anyhow::Result<()> {
    // Accepted once: that is what stays in force.
    a_policy_tells_what_became_of_it(cluster)?;
    // A test of the policy that does not hold: the version before stays in force.
    let with_test = format!(
        "{POLICY}  tests:\n  - {{from: {{serviceAccount: {{namespace: shop, name: web}}}}, port: 8080, expect: allow}}\n"
    );
    cluster.apply(&with_test)?;
    let message = cluster.wait_until("the refusal", PATIENCE, |cluster| {
        let (status, message) = condition(&ledger_policy(cluster)?, "Accepted")?;
        ensure!(status == "False", "{message}");
        Ok(message)
    })?;
    ensure!(message.contains("spec.tests[0]"), "{message}");
    let url = "http://ledger.payments/";
    ensure!(get(cluster, "checkout", url).is_ok(), "the version before is not in force");
    ensure!(get(cluster, "web", url).is_err(), "a refused version is in force");
    cluster.apply(POLICY)?;
    cluster.wait_until("the mended policy", PATIENCE, |cluster| {
        let (status, message) = condition(&ledger_policy(cluster)?, "Accepted")?;
        ensure!(status == "True", "{message}");
        Ok(())
    })
}

fn an_edited_policy_cuts_the_live_connection(cluster: &Cluster) -> anyhow::Result<()> {
    let wider = POLICY.replace("[8080]", "[8080, 9000]");
    cluster.apply(&wider)?;
    let live = "timeout 60 sh -c 'while sleep 0.1; do echo x; done | nc $0 9000' ";
    let found = cluster.kubectl_json(&["get", "pod", "--namespace=payments", "ledger"])?;
    let address = found["status"]["podIP"].as_str().context("no address")?.to_owned();
    cluster.wait_until("the wider policy", PATIENCE, |cluster| {
        let once = format!("echo once | timeout 3 nc {address} 9000");
        let echoed = cluster.exec("shop", "checkout", &["sh", "-c", &once])?;
        ensure!(echoed == "once\n", "{echoed:?}");
        Ok(())
    })?;
    let live = format!("{live}{address}");
    thread::scope(|scope| {
        let connection = scope.spawn(|| {
            let outcome = cluster.exec("shop", "checkout", &["sh", "-c", &live]);
            (outcome.is_ok(), Instant::now())
        });
        thread::sleep(Duration::from_secs(2));
        ensure!(!connection.is_finished(), "the connection does not live");
        cluster.apply(POLICY)?;
        let edited = Instant::now();
        let (_, ended) = connection.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        let took = ended.saturating_duration_since(edited);
        eprintln!("cut {took:?} after the edit");
        ensure!(took < Duration::from_secs(5), "cut {took:?} after the edit");
        Ok(())
    })
}

fn the_programs_may_no_more_than_is_written(cluster: &Cluster) -> anyhow::Result<()> {
    let may = |account: &str, namespace: &str| -> anyhow::Result<BTreeSet<String>> {
        let account = format!("--as=system:serviceaccount:hauberk-system:{account}");
        let listed = cluster.kubectl(&[
            "auth",
            "can-i",
            "--list",
            "--no-headers",
            &account,
            &format!("--namespace={namespace}"),
        ])?;
        Ok(listed
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect())
    };
    // What everybody may.
    let everybody = may("nobody-at-all", "hauberk-system")?;
    let own = |account: &str, namespace: &str| -> anyhow::Result<Vec<String>> {
        Ok(may(account, namespace)?.difference(&everybody).cloned().collect())
    };
    let nothing: Vec<String> = Vec::new();
    ensure!(own("hauberk-agent", "hauberk-system")? == nothing, "the agent may something");
    let everywhere = [
        "accesspolicies.hauberk.dev [] [] [get list watch]",
        "accesspolicies.hauberk.dev/status [] [] [patch]",
        "endpointslices.discovery.k8s.io [] [] [get list watch]",
        "guardrails.hauberk.dev [] [] [get list watch]",
        "guardrails.hauberk.dev/status [] [] [patch]",
        "machines.hauberk.dev [] [] [get list watch]",
        "machines.hauberk.dev/status [] [] [patch]",
        "namespaces [] [] [get list watch]",
        "namespaces/status [] [] [patch]",
        "nodes [] [] [get list watch patch]",
        "pods [] [] [get list watch]",
        "serviceaccounts [] [] [get list watch]",
        "services [] [] [get list watch]",
        "tokenreviews.authentication.k8s.io [] [] [create]",
        "validatingwebhookconfigurations.admissionregistration.k8s.io [] [hauberk-control-plane] [get patch]",
        "workloads.hauberk.dev [] [] [get list watch]",
        "workloads.hauberk.dev/status [] [] [patch]",
    ];
    let here = [
        "configmaps [] [] [get list watch create update patch]",
        "leases.coordination.k8s.io [] [] [get create patch]",
        "secrets [] [] [create]",
        "secrets [] [hauberk-ca] [get]",
        "secrets [] [hauberk-roots] [get update]",
    ];
    let mut whole: Vec<String> = everywhere.map(str::to_owned).to_vec();
    ensure!(
        own("hauberk-control-plane", "payments")? == whole,
        "{:#?}",
        own("hauberk-control-plane", "payments")?
    );
    whole.extend(here.map(str::to_owned));
    whole.sort();
    ensure!(
        own("hauberk-control-plane", "hauberk-system")? == whole,
        "{:#?}",
        own("hauberk-control-plane", "hauberk-system")?
    );
    Ok(())
}
