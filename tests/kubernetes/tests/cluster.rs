//! Tests of the cluster that the other tests run in: real pods on both nodes, the network between
//! them, what breaks, and that nothing is left of it. All but the last two share one cluster. Run as root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::as_conversions,
    reason = "a test fails by panicking, with the place"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::{Cluster, Footprint, Image, NODE_B, Options, ipv4};
use hauberk_linux::Netns;
use libtest_mimic::{Arguments, Failed, Trial};
use serde_json::Value;

/// How long a pod may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A process that holds a cluster, to be killed by a test.
const HOLD: &str = "--hold-a-cluster";

/// Started by the first test that needs it.
type Shared = Arc<Mutex<Option<Arc<Cluster>>>>;

/// A test in that cluster.
type Test = fn(&Cluster) -> anyhow::Result<()>;

fn main() -> ExitCode {
    if std::env::args().nth(1).is_some_and(|first| first == HOLD) {
        return match hold() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let mut arguments = Arguments::from_args();
    // Each one changes the cluster that the next one finds.
    arguments.test_threads = Some(1);
    let shared: Shared = Arc::default();
    let tests: [(&str, Test); 14] = [
        ("both_nodes_are_ready", both_nodes_are_ready),
        ("pods_reach_each_other_across_nodes", pods_reach_each_other_across_nodes),
        ("a_service_is_reached_from_its_own_node", a_service_is_reached_from_its_own_node),
        ("exec_and_logs_work", exec_and_logs_work),
        ("the_wire_shows_plaintext_and_can_be_cut", the_wire_shows_plaintext_and_can_be_cut),
        ("a_token_for_an_audience_is_accepted", a_token_for_an_audience_is_accepted),
        ("a_kubelet_can_change_its_own_node_only", a_kubelet_can_change_its_own_node_only),
        ("a_privileged_pod_finds_the_usual_paths", a_privileged_pod_finds_the_usual_paths),
        ("pods_outlive_kubelet_and_the_api_server", pods_outlive_kubelet_and_the_api_server),
        ("a_reboot_brings_the_pods_back", a_reboot_brings_the_pods_back),
        ("helm_installs_a_chart", helm_installs_a_chart),
        ("a_port_is_forwarded", a_port_is_forwarded),
        ("a_limited_pod_gets_a_host_port", a_limited_pod_gets_a_host_port),
        ("an_image_carries_a_program_with_libraries", an_image_carries_a_program_with_libraries),
    ];
    let mut trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, test)| {
            let shared = Arc::clone(&shared);
            trial(name, move || test(&*cluster(&shared)?))
        })
        .collect();
    let last = Arc::clone(&shared);
    trials.push(trial("a_dropped_cluster_leaves_nothing", move || {
        drop(cluster(&last)?);
        let cluster = last.lock().unwrap().take().context("no cluster")?;
        let cluster = Arc::into_inner(cluster).context("a test still uses the cluster")?;
        let footprint = cluster.footprint()?;
        ensure!(!footprint.remains().is_empty(), "a cluster that runs has no footprint");
        drop(cluster);
        nothing_remains(&footprint)
    }));
    trials.push(trial("a_killed_cluster_leaves_nothing", a_killed_cluster_leaves_nothing));
    trials.push(trial("a_failed_start_says_why", a_failed_start_says_why));
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(shared.lock().unwrap().take());
    conclusion.exit_code()
}

fn trial(name: &str, test: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        let started = Instant::now();
        let result = test().map_err(|error| Failed::from(format!("{error:#}")));
        eprintln!("{:.1} s", started.elapsed().as_secs_f64());
        result
    })
}

fn cluster(shared: &Shared) -> anyhow::Result<Arc<Cluster>> {
    let mut shared = shared.lock().unwrap();
    if let Some(cluster) = &*shared {
        return Ok(Arc::clone(cluster));
    }
    let started = Instant::now();
    let cluster = Arc::new(Cluster::start(Options::default())?);
    eprintln!("the cluster is ready after {:.1} s", started.elapsed().as_secs_f64());
    cluster.apply(PODS)?;
    for pod in ["server-a", "server-b", "client-a"] {
        cluster.wait_pod("default", pod, PATIENCE)?;
    }
    // What translates services' addresses hears of ready pods a moment later.
    for server in ["server-a", "server-b"] {
        for (place, url) in places(&cluster, server)? {
            let what = format!("{server} by its {place}");
            cluster.wait_until(&what, PATIENCE, |cluster| get(cluster, &url))?;
        }
    }
    Ok(Arc::clone(shared.insert(cluster)))
}

/// A server on each node, and a client on `node-a`; a service for each server.
const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: server-a, labels: {app: server-a}}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: server
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo hello from server-a >/www/index.html; echo serving; exec httpd -f -h /www -p 80']
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: server-b, labels: {app: server-b}}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 0
  containers:
  - name: server
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /www; echo hello from server-b >/www/index.html; echo serving; exec httpd -f -h /www -p 80']
    readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: client-a}
spec:
  nodeName: node-a
  terminationGracePeriodSeconds: 0
  containers:
  - name: client
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'exec sleep 1000000']
---
apiVersion: v1
kind: Service
metadata: {name: server-a}
spec: {selector: {app: server-a}, ports: [{port: 80}], ipFamilyPolicy: PreferDualStack}
---
apiVersion: v1
kind: Service
metadata: {name: server-b}
spec: {selector: {app: server-b}, ports: [{port: 80}], ipFamilyPolicy: PreferDualStack}
";

fn both_nodes_are_ready(cluster: &Cluster) -> anyhow::Result<()> {
    for node in ["node-a", "node-b"] {
        cluster.wait_node(node, PATIENCE)?;
        let found = cluster.kubectl_json(&["get", "node", node])?;
        let version = found.pointer("/status/nodeInfo/kubeletVersion").context("no version")?;
        ensure!(version.as_str().is_some_and(|version| version.starts_with("v1.34.")), "{version}");
        let addresses = found.pointer("/status/addresses").context("no addresses")?;
        ensure!(addresses.to_string().contains("fd88::"), "no IPv6 address: {addresses}");
    }
    Ok(())
}

fn pods_reach_each_other_across_nodes(cluster: &Cluster) -> anyhow::Result<()> {
    for (place, url) in places(cluster, "server-b")? {
        let text = get(cluster, &url).with_context(|| format!("by its {place}"))?;
        ensure!(text == "hello from server-b\n", "{url}: {text}");
    }
    Ok(())
}

fn a_service_is_reached_from_its_own_node(cluster: &Cluster) -> anyhow::Result<()> {
    for (place, url) in places(cluster, "server-a")? {
        let text = get(cluster, &url).with_context(|| format!("by its {place}"))?;
        ensure!(text == "hello from server-a\n", "{url}: {text}");
    }
    Ok(())
}

fn exec_and_logs_work(cluster: &Cluster) -> anyhow::Result<()> {
    for pod in ["server-a", "server-b"] {
        let name = cluster.exec("default", pod, &["hostname"])?;
        ensure!(name == format!("{pod}\n"), "{name}");
        let log = cluster.kubectl(&["logs", pod])?;
        ensure!(log == "serving\n", "{log}");
    }
    Ok(())
}

fn the_wire_shows_plaintext_and_can_be_cut(cluster: &Cluster) -> anyhow::Result<()> {
    let [(_, url), ..] = places(cluster, "server-b")?;
    let capture = cluster.wire().capture("node-b")?;
    get(cluster, &url)?;
    let captured = capture.stop()?;
    ensure!(captured.contains(b"hello from server-b"), "the capture does not show the answer");

    cluster.wire().cut("node-b")?;
    let cut = get(cluster, &url);
    cluster.wire().mend("node-b")?;
    ensure!(cut.is_err(), "an answer came through a cut wire");
    cluster.wait_until("the mended wire", PATIENCE, |cluster| get(cluster, &url))?;
    cluster.wait_node("node-b", PATIENCE)
}

fn a_token_for_an_audience_is_accepted(cluster: &Cluster) -> anyhow::Result<()> {
    let create = ["create", "token", "default", "--audience=hauberk.dev/test", "--duration=10m"];
    let token = cluster.kubectl(&create)?;
    for (audience, accepted) in [("hauberk.dev/test", true), ("somebody.else", false)] {
        let review = format!(
            r#"{{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                "spec": {{"token": "{}", "audiences": ["{audience}"]}}}}"#,
            token.trim()
        );
        let file = cluster.folder().join("review.json");
        std::fs::write(&file, review)?;
        let file = file.to_string_lossy();
        let answer = cluster.kubectl_json(&["create", "--filename", &file])?;
        let is = answer.pointer("/status/authenticated").and_then(Value::as_bool).unwrap_or(false);
        ensure!(is == accepted, "{audience}: {answer:#}");
    }
    Ok(())
}

fn a_kubelet_can_change_its_own_node_only(cluster: &Cluster) -> anyhow::Result<()> {
    let label = |node: &str, label: &str| {
        let kubectl = ["kubectl", "--kubeconfig=/etc/kubernetes/kubelet.conf"];
        let command = ["label", "--overwrite", "node", node, label];
        cluster.node("node-a")?.text(&[kubectl.as_slice(), &command].concat())
    };
    label("node-a", "test=1")?;
    let refusals = [
        ("node-b", "test=1", "only its own Node object"),
        ("node-a", "node-restriction.kubernetes.io/test=1", "is not allowed to modify labels"),
    ];
    for (node, text, reason) in refusals {
        match label(node, text) {
            Ok(text) => bail!("{text}"),
            Err(error) => ensure!(error.to_string().contains(reason), "{error}"),
        }
    }
    Ok(())
}

fn a_privileged_pod_finds_the_usual_paths(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.apply(
        "
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostPID: true
      hostNetwork: true
      terminationGracePeriodSeconds: 0
      containers:
      - name: agent
        image: hauberk.test/busybox:1
        imagePullPolicy: Never
        securityContext: {privileged: true}
        args: ['-c', 'touch /cni/99-agent.conf.off && ls /plugins/ptp && exec sleep 1000000']
        volumeMounts:
        - {name: cni, mountPath: /cni}
        - {name: plugins, mountPath: /plugins}
        - {name: containerd, mountPath: /containerd}
        - {name: netns, mountPath: /netns, mountPropagation: HostToContainer}
        - {name: kubelet, mountPath: /kubelet, mountPropagation: Bidirectional}
      volumes:
      - {name: cni, hostPath: {path: /etc/cni/net.d, type: Directory}}
      - {name: plugins, hostPath: {path: /opt/cni/bin, type: Directory}}
      - {name: containerd, hostPath: {path: /run/containerd/containerd.sock, type: Socket}}
      - {name: netns, hostPath: {path: /var/run/netns, type: Directory}}
      - {name: kubelet, hostPath: {path: /var/lib/kubelet, type: Directory}}
",
    )?;
    cluster.kubectl(&["rollout", "status", "daemonset/agent", "--timeout=60s"])?;
    let pods = cluster.kubectl_json(&["get", "pods", "--selector=app=agent"])?;
    let pods = pods.get("items").and_then(Value::as_array).context("no pods")?.clone();
    ensure!(pods.len() == 2, "{} pods", pods.len());
    for pod in &pods {
        let name = pod.pointer("/metadata/name").and_then(Value::as_str).context("no name")?;
        let node = pod.pointer("/spec/nodeName").and_then(Value::as_str).context("no node")?;
        let written = cluster.node(node)?.disk("/etc/cni/net.d/99-agent.conf.off");
        ensure!(written.exists(), "{} is not there", written.display());
        // A pod's namespace that was made after this pod is seen, and can be entered.
        let server = if node == "node-a" { "server-a" } else { "server-b" };
        let names = cluster.exec("default", name, &["sh", "-c", "for n in /netns/*; do nsenter --net=$n hostname -i 2>/dev/null; nsenter --net=$n ip addr show eth0; done"])?;
        let address = address(cluster, server)?;
        ensure!(names.contains(&address), "{address} is not in\n{names}");
        let processes = cluster.exec("default", name, &["ps"])?;
        ensure!(processes.contains("kubelet --config"), "{processes}");
        ensure!(!processes.contains("etcd"), "{processes}");
    }
    cluster.kubectl(&["delete", "daemonset", "agent"]).map(|_| ())
}

fn pods_outlive_kubelet_and_the_api_server(cluster: &Cluster) -> anyhow::Result<()> {
    let [(_, url), ..] = places(cluster, "server-b")?;
    let server = cluster.kubectl_json(&["get", "pod", "server-b"])?;
    cluster.restart_kubelet("node-b")?;
    cluster.stop_apiserver()?;
    ensure!(cluster.kubectl(&["get", "nodes"]).is_err(), "a stopped API server answered");
    cluster.start_apiserver()?;
    cluster.wait_node("node-b", PATIENCE)?;
    cluster.wait_until("the server", PATIENCE, |cluster| get(cluster, &url))?;
    let after = cluster.wait_pod("default", "server-b", PATIENCE)?;
    ensure!(restarts(&server) == restarts(&after), "the container was started again: {after:#}");
    Ok(())
}

fn a_reboot_brings_the_pods_back(cluster: &Cluster) -> anyhow::Result<()> {
    let before = restarts(&cluster.wait_pod("default", "server-b", PATIENCE)?);
    let boot = || cluster.node("node-b")?.text(&["cat", "/proc/sys/kernel/random/boot_id"]);
    let first = boot()?;
    cluster.reboot_node("node-b")?;
    ensure!(first != boot()?, "the boot is the same");
    cluster.wait_until("the restart of the pod", PATIENCE, |cluster| {
        let pod = cluster.wait_pod("default", "server-b", Duration::ZERO)?;
        ensure!(restarts(&pod) > before, "not yet: {pod:#}");
        Ok(())
    })?;
    // Its address may be another one.
    for (place, url) in places(cluster, "server-b")? {
        cluster
            .wait_until("the server", PATIENCE, |cluster| get(cluster, &url))
            .with_context(|| format!("by its {place}"))?;
    }
    Ok(())
}

fn helm_installs_a_chart(cluster: &Cluster) -> anyhow::Result<()> {
    let chart = cluster.folder().join("chart");
    std::fs::create_dir_all(chart.join("templates"))?;
    std::fs::write(chart.join("Chart.yaml"), "apiVersion: v2\nname: test\nversion: 0.1.0\n")?;
    std::fs::write(
        chart.join("templates").join("map.yaml"),
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: from-helm}\ndata: {a: '{{ .Values.a }}'}\n",
    )?;
    cluster.helm(&["install", "test", &chart.to_string_lossy(), "--set", "a=b"])?;
    let map = cluster.kubectl_json(&["get", "configmap", "from-helm"])?;
    ensure!(map.pointer("/data/a").is_some_and(|value| value == "b"), "{map:#}");
    cluster.helm(&["uninstall", "test"]).map(|_| ())
}

fn a_port_is_forwarded(cluster: &Cluster) -> anyhow::Result<()> {
    let mut command = cluster.control_command("kubectl");
    command.args(["port-forward", "pod/server-b", ":80"]).stdout(Stdio::piped());
    let control = cluster.control().netns()?;
    let mut forwarding = control.run(|| command.spawn())??;
    let result = (|| {
        let mut line = String::new();
        BufReader::new(forwarding.stdout.as_mut().context("no output")?).read_line(&mut line)?;
        let port = line.split([':', ' ']).find_map(|word| word.parse::<u16>().ok());
        let port = port.with_context(|| format!("no port in {line}"))?;
        http_get(&control, SocketAddr::from(([127, 0, 0, 1], port)))
    })();
    forwarding.kill()?;
    forwarding.wait()?;
    let text = result?;
    ensure!(text.ends_with("hello from server-b\n"), "{text}");
    Ok(())
}

fn a_limited_pod_gets_a_host_port(cluster: &Cluster) -> anyhow::Result<()> {
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: limited}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 0
  securityContext: {runAsUser: 1000, runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: server
    image: hauberk.test/busybox:1
    imagePullPolicy: Never
    args: ['-c', 'mkdir /tmp/www; id -u >/tmp/www/index.html; exec httpd -f -h /tmp/www -p 8080']
    ports: [{containerPort: 8080, hostPort: 8080}]
    resources: {limits: {memory: 32Mi, cpu: 100m}}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
";
    cluster.apply(pod)?;
    cluster.wait_pod("default", "limited", PATIENCE)?;
    let text = http_get(cluster.outside(), SocketAddr::new(ipv4(NODE_B), 8080))?;
    ensure!(text.ends_with("1000\n"), "{text}");
    let group = cluster.exec("default", "limited", &["cat", "/proc/self/cgroup"])?;
    // The node's own group is the root, as on a machine of its own.
    ensure!(group.contains(":/kubepods/"), "{group}");
    cluster.delete(pod).map(|_| ())
}

fn an_image_carries_a_program_with_libraries(cluster: &Cluster) -> anyhow::Result<()> {
    let mut image = Image {
        name: "hauberk.test/openssl:1".to_owned(),
        files: Vec::new(),
        entrypoint: vec!["/openssl".to_owned()],
        environment: Vec::new(),
        user: String::new(),
    };
    image.add_program("/openssl", Path::new("/usr/bin/openssl"))?;
    cluster.import(&image)?;
    let pod = "
apiVersion: v1
kind: Pod
metadata: {name: openssl}
spec:
  restartPolicy: Never
  containers:
  - {name: openssl, image: 'hauberk.test/openssl:1', imagePullPolicy: Never, args: [version]}
";
    cluster.apply(pod)?;
    let version = cluster.wait_until("the log", PATIENCE, |cluster| {
        let log = cluster.kubectl(&["logs", "openssl"])?;
        ensure!(!log.is_empty(), "nothing yet");
        Ok(log)
    })?;
    ensure!(version.starts_with("OpenSSL "), "{version}");
    cluster.delete(pod).map(|_| ())
}

fn http_get(from: &Netns, to: SocketAddr) -> anyhow::Result<String> {
    let mut stream = from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))??;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    write!(stream, "GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

fn a_killed_cluster_leaves_nothing() -> anyhow::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(HOLD)
        .stdout(Stdio::piped())
        .spawn()
        .context("start the process to be killed")?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let marks = lines.next().context("the cluster did not start")??;
    let footprint = Footprint::parse(&marks).context("the footprint of the cluster")?;
    ensure!(!footprint.remains().is_empty(), "a cluster that runs has no footprint");
    child.kill()?;
    child.wait()?;
    nothing_remains(&footprint)
}

fn a_failed_start_says_why() -> anyhow::Result<()> {
    let api_server = vec!["--no-such-flag".to_owned()];
    match Cluster::start(Options { api_server, ..Options::default() }) {
        Ok(_) => bail!("it started"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(text.contains("api-server on control ended"), "{text}");
            ensure!(text.contains("unknown flag: --no-such-flag"), "{text}");
            Ok(())
        }
    }
}

fn hold() -> anyhow::Result<()> {
    let cluster = Cluster::start(Options::default())?;
    cluster.apply(PODS)?;
    cluster.wait_pod("default", "server-b", PATIENCE)?;
    println!("{}", cluster.footprint()?);
    std::thread::sleep(Duration::from_secs(600));
    Ok(())
}

/// What is being removed takes a moment.
fn nothing_remains(footprint: &Footprint) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let remains = footprint.remains();
        if remains.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "left behind:\n{}", remains.join("\n"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// All the ways to a server: how they are called, and their URLs.
fn places(cluster: &Cluster, server: &str) -> anyhow::Result<[(&'static str, String); 6]> {
    let pod = cluster.kubectl_json(&["get", "pod", server])?;
    let service = cluster.kubectl_json(&["get", "service", server])?;
    let text = |value: &Value, path: &str| {
        let found = value.pointer(path).and_then(Value::as_str);
        found.map(str::to_owned).with_context(|| format!("no {path} in {value:#}"))
    };
    Ok([
        ("pod's address", format!("http://{}/", text(&pod, "/status/podIPs/0/ip")?)),
        ("pod's IPv6 address", format!("http://[{}]/", text(&pod, "/status/podIPs/1/ip")?)),
        ("service's address", format!("http://{}/", text(&service, "/spec/clusterIPs/0")?)),
        ("service's IPv6 address", format!("http://[{}]/", text(&service, "/spec/clusterIPs/1")?)),
        ("name", format!("http://{server}/")),
        ("full name", format!("http://{server}.default.svc.cluster.local/")),
    ])
}

fn address(cluster: &Cluster, pod: &str) -> anyhow::Result<String> {
    cluster.kubectl(&["get", "pod", pod, "--output=jsonpath={.status.podIP}"])
}

fn get(cluster: &Cluster, url: &str) -> anyhow::Result<String> {
    cluster.exec("default", "client-a", &["timeout", "3", "wget", "-q", "-O", "-", url])
}

fn restarts(pod: &Value) -> Option<u64> {
    pod.pointer("/status/containerStatuses/0/restartCount").and_then(Value::as_u64)
}
