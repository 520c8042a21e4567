//! Who may connect.

use anyhow::{bail, ensure};
use hauberk_kubernetes_tests::Cluster;

use crate::{
    Test,
    install::{PATIENCE, everything},
};

pub(crate) const TESTS: &[(&str, Test)] =
    &[("only_the_allowed_pod_connects", only_the_allowed_pod_connects)];

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
    args: ['-c', 'mkdir /www; echo the ledger >/www/index.html; exec httpd -f -h /www -p 8080']
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: payments}
spec: {selector: {app: ledger}, ports: [{port: 80, targetPort: 8080}], ipFamilyPolicy: PreferDualStack}
";

const POLICY: &str = "
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

fn get(cluster: &Cluster, pod: &str, url: &str) -> anyhow::Result<String> {
    cluster.exec("shop", pod, &["timeout", "5", "wget", "-q", "-O", "-", url])
}

fn only_the_allowed_pod_connects(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(PODS)?;
    for (namespace, pod) in [("shop", "checkout"), ("shop", "web"), ("payments", "ledger")] {
        cluster.wait_pod(namespace, pod, PATIENCE)?;
    }
    let url = "http://ledger.payments/";
    ensure!(get(cluster, "web", url)? == "the ledger\n", "not even without the mesh");
    for namespace in ["shop", "payments"] {
        cluster.kubectl(&["label", "namespace", namespace, "hauberk.dev/mode=enforce"])?;
    }
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
    cluster.apply(POLICY)?;
    let allowed =
        cluster.wait_until("the policy", PATIENCE, |cluster| get(cluster, "checkout", url));
    match allowed {
        Ok(text) => ensure!(text == "the ledger\n", "{text}"),
        Err(error) => bail!("{error:#}\n{}", everything(cluster)),
    }
    let capture = cluster.wire().capture("node-b")?;
    get(cluster, "checkout", url)?;
    let captured = capture.stop()?;
    ensure!(!captured.contains(b"the ledger"), "the wire shows what was said");
    ensure!(get(cluster, "web", url).is_err(), "nobody allowed it");
    Ok(())
}
