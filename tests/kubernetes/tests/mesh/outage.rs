//! The API server is away: what was decided goes on for as long as that takes, and what comes after is
//! taken up.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use hauberk_kubernetes_tests::{Cluster, NODE_A, ipv4};
use hauberk_linux::Netns;
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use crate::{
    Test, agents,
    install::{PATIENCE, WORKLOAD_LIFETIME, everything},
    pods::{address, callers, eager, hasty, server, tries},
    policy::{POLICY, condition, get},
    replicas::a_replica,
    trouble::{LEDGER, allowed, in_pod},
};

pub(crate) const TESTS: &[(&str, Test)] = &[(
    "without_the_api_server_what_was_decided_holds",
    without_the_api_server_what_was_decided_holds,
)];

/// How long it is away, in seconds, if that is to be another time than [`OUTAGE`].
const SECONDS: &str = "HAUBERK_TEST_OUTAGE";

/// How long it is away. Longer than what depends on it by the clock: leases, and a node's grace.
const OUTAGE: Duration = Duration::from_secs(180);

// Certificates that are in use at its end were issued while it was away.
const _: () = assert!(WORKLOAD_LIFETIME.as_secs() < OUTAGE.as_secs());

fn how_long() -> anyhow::Result<Duration> {
    match std::env::var(SECONDS) {
        Ok(text) => {
            let seconds = text.parse().with_context(|| format!("{SECONDS}={text}: no number"))?;
            Ok(OUTAGE.max(Duration::from_secs(seconds)))
        }
        Err(_) => Ok(OUTAGE),
    }
}

/// How often a workload's certificate is renewed in this time, at least: each time after half of its life, and
/// a tenth of that later at the latest.
fn renewals(time: Duration) -> u64 {
    time.as_secs() / (WORKLOAD_LIFETIME.as_secs() * 11 / 20)
}

/// Between two looks at all that must hold.
const PACE: Duration = Duration::from_secs(5);

/// How long a word may be on its way.
const ANSWER: Duration = Duration::from_secs(10);

/// How long everybody may take to be back: a watch that has failed for minutes is tried again within one,
/// those of nodes and controllers as those of the control plane, and one waits for the other.
const RECOVERY: Duration = Duration::from_secs(180);

/// For how long all must be as it was: the controller that still takes the nodes for lost looks every five
/// seconds.
const STEADY: Duration = Duration::from_secs(15);

fn without_the_api_server_what_was_decided_holds(cluster: &Cluster) -> anyhow::Result<()> {
    let before = ready_pods(cluster)?;
    let mut outage = Outage::prepare(cluster)?;
    let server = outage.server;
    let capture = cluster.wire().capture("node-b")?;
    let late = outage.late()?;
    cluster.stop_apiserver()?;
    let held = outage.endure(&late);
    if held.is_err() {
        drop(fs::remove_file(cluster.node("node-a")?.disk(STATIC)));
    }
    // Before everybody asks the API server for everything at once; and the connection through the outage ends
    // with the policy below.
    let captured = capture.stop();
    drop(outage);
    cluster.start_apiserver()?;
    held.with_context(|| everything(cluster))?;
    let callers = callers(&captured?, server)?;
    let node = BTreeSet::from([ipv4(NODE_A)]);
    ensure!(callers == node, "not only the node called in clear: {callers:?}");

    all_is_as_before(cluster, &before)?;
    the_static_pod_starts(cluster)?;
    what_comes_after_is_taken_up(cluster, server)?;
    cluster.kubectl(&["delete", "pod", "--namespace=shop", "again", "anew", "late"])?;
    allowed(cluster)
}

/// The pods that are ready, as `namespace/name`.
fn ready_pods(cluster: &Cluster) -> anyhow::Result<BTreeSet<String>> {
    let found = cluster.kubectl_json(&["get", "pods", "--all-namespaces"])?;
    let pods = found["items"].as_array().into_iter().flatten();
    let ready =
        pods.filter(|pod| condition(pod, "Ready").is_ok_and(|(status, _)| status == "True"));
    Ok(ready.map(shown).collect())
}

fn shown(pod: &Value) -> String {
    let text = |key: &str| pod["metadata"][key].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}

/// Whoever was away is back, for good: for a while the controllers know the nodes' last signs of life only
/// from before, and take them for lost.
fn all_is_as_before(cluster: &Cluster, before: &BTreeSet<String>) -> anyhow::Result<()> {
    let mut since = None;
    let look = |cluster: &Cluster| -> anyhow::Result<()> {
        for node in cluster.nodes() {
            cluster.check_node(node.name())?;
        }
        let ready = ready_pods(cluster)?;
        let missing: Vec<&String> = before.difference(&ready).collect();
        ensure!(missing.is_empty(), "not ready: {missing:?}");
        Ok(())
    };
    let began = Instant::now();
    cluster.wait_until("all to be as before", RECOVERY, |cluster| {
        if let Err(error) = look(cluster) {
            since = None;
            return Err(error);
        }
        let steady = since.get_or_insert_with(Instant::now).elapsed();
        ensure!(steady > STEADY, "all is as before, since {steady:?}");
        Ok(())
    })?;
    eprintln!("all was as before {:?} after the API server", began.elapsed());
    Ok(())
}

/// A pod of a file on its node, which nobody but the node knew of.
const STATIC: &str = "/etc/kubernetes/manifests/fixed.yaml";

/// The API server knows it now, and so it starts; as nobody, as ever.
fn the_static_pod_starts(cluster: &Cluster) -> anyhow::Result<()> {
    let log = tries(cluster, "shop", "fixed-node-a")?;
    ensure!(!log.contains("LEAKED"), "the static pod is not in the mesh: {log}");
    fs::remove_file(cluster.node("node-a")?.disk(STATIC))?;
    cluster.wait_until("the static pod's end", PATIENCE, |cluster| {
        let pods = cluster.kubectl(&["get", "pods", "--namespace=shop", "--output=name"])?;
        ensure!(!pods.contains("fixed"), "{pods}");
        Ok(())
    })
}

/// Pods that start, on both nodes, and an edited policy.
fn what_comes_after_is_taken_up(cluster: &Cluster, server: SocketAddr) -> anyhow::Result<()> {
    for node in ["node-a", "node-b"] {
        let name = format!("after-on-{node}");
        cluster.apply(&hasty(&name, node, server, LEDGER))?;
        let log = tries(cluster, "shop", &name)?;
        ensure!(!log.contains("LEAKED"), "{name} is not in the mesh: {log}");
        cluster.kubectl(&["delete", "pod", "--namespace=shop", &name])?;
    }
    cluster.apply(&POLICY.replace("name: checkout}", "name: web}"))?;
    cluster.wait_until("the next policy", PATIENCE, |cluster| {
        ensure!(get(cluster, "web", LEDGER)? == "the ledger\n");
        ensure!(get(cluster, "checkout", LEDGER).is_err(), "the old policy holds");
        Ok(())
    })
}

/// What is looked at while the API server is away, with nothing that would ask it.
struct Outage<'a> {
    cluster: &'a Cluster,
    server: SocketAddr,
    /// The addresses of the pod that may reach the ledger, and of one that may not.
    caller: String,
    other: String,
    /// The ledger.
    url: String,
    live: Live,
    control_plane: String,
    /// The containers of control plane and agents, with their nodes.
    programs: Vec<(String, String)>,
    /// Of a pod each: whose container dies, and whose sandbox does.
    again: Mortal,
    anew: Mortal,
    /// The ends of the certificates of the caller that were seen in use.
    expiries: BTreeSet<String>,
}

impl<'a> Outage<'a> {
    fn prepare(cluster: &'a Cluster) -> anyhow::Result<Self> {
        cluster.apply(&POLICY.replace("[8080]", "[8080, 9000]"))?;
        let ledger = address(cluster, "payments", "ledger")?;
        let url = format!("http://{ledger}:8080/");
        let caller = address(cluster, "shop", "checkout")?;
        let network = network_of(cluster, "node-a", caller.parse()?)?;
        let echo = SocketAddr::new(ledger.parse()?, 9000);
        let live = cluster.wait_until("the live connection", PATIENCE, |_| {
            let mut live = Live::open(&network, echo)?;
            live.echo()?;
            Ok(live)
        })?;
        let server = server(cluster)?;
        for name in ["again", "anew"] {
            cluster.apply(&hasty(name, "node-a", server, &url))?;
        }
        Ok(Self {
            cluster,
            server,
            caller,
            other: address(cluster, "shop", "web")?,
            url,
            live,
            control_plane: a_replica(cluster)?,
            programs: programs(cluster)?,
            again: Mortal::of(cluster, "again")?,
            anew: Mortal::of(cluster, "anew")?,
            expiries: BTreeSet::new(),
        })
    }

    /// A pod that its node has been given and has not started yet: it starts while the API server is away. Its UID.
    fn late(&self) -> anyhow::Result<String> {
        let cluster = self.cluster;
        cluster.stop_containerd("node-a")?;
        // A token of a service account is the API server's to make: a pod that wants one waits for it.
        let pod = hasty("late", "node-a", self.server, &self.url);
        let pod = pod.replace("spec:\n", "spec:\n  automountServiceAccountToken: false\n");
        let given = cluster.apply(&pod).and_then(|_| {
            cluster.wait_until("the node's first try", PATIENCE, |cluster| {
                let of_it = "involvedObject.name=late,reason=FailedCreatePodSandBox";
                let of_it = format!("--field-selector={of_it}");
                let events = cluster.kubectl(&["get", "events", "--namespace=shop", &of_it])?;
                ensure!(events.contains("late"), "{events}");
                agents::uid(cluster, "shop", "late")
            })
        });
        if given.is_err() {
            cluster.start_containerd("node-a")?;
        }
        given
    }

    fn endure(&mut self, late: &str) -> anyhow::Result<()> {
        let (began, time) = (Instant::now(), how_long()?);
        self.cluster.start_containerd("node-a")?;
        self.api_server_is_away()?;
        self.expiries.insert(self.expiry()?);
        has_tried(self.cluster, "late", late, 0)?;
        self.look()?;
        self.a_static_pod_waits()?;
        self.look()?;
        // What the kernel does for want of memory: the node starts both again, without being told to.
        self.again.dies(self.cluster, &self.again.container)?;
        self.anew.dies(self.cluster, &self.anew.sandbox)?;
        while began.elapsed() < time {
            thread::sleep(PACE);
            self.look().with_context(|| format!("{:?} without it", began.elapsed()))?;
        }
        self.api_server_is_away()?;
        self.programs_run_on()?;
        let renewed = self.expiries.len().saturating_sub(1);
        eprintln!("{renewed} renewals of a certificate in {time:?} without the API server");
        let least = usize::try_from(renewals(time))?;
        ensure!(least > 0 && renewed >= least, "only {renewed}: {:?}", self.expiries);
        Ok(())
    }

    /// The node starts it, and the mesh has never heard of it.
    fn a_static_pod_waits(&self) -> anyhow::Result<()> {
        let manifest = eager("shop", "fixed", self.server);
        let node = self.cluster.node("node-a")?;
        // Whole at once: the node looks there whenever something changes.
        fs::write(node.disk("/etc/kubernetes/fixed.yaml"), manifest)?;
        fs::rename(node.disk("/etc/kubernetes/fixed.yaml"), node.disk(STATIC))?;
        self.cluster.wait_until("the refusal of the static pod", PATIENCE, |cluster| {
            let lines = agents::lines(cluster, "node-a")?;
            let refused = "the control plane has not told it of this pod yet";
            let is_it = |line: &String| line.contains("fixed-node-a") && line.contains(refused);
            ensure!(lines.iter().any(is_it), "no refusal among {} lines", lines.len());
            Ok(())
        })
    }

    fn api_server_is_away(&self) -> anyhow::Result<()> {
        let asked = self.cluster.kubectl(&["get", "--raw", "/livez"]);
        ensure!(asked.is_err(), "it answers: {asked:?}");
        Ok(())
    }

    /// Everything that must hold, once.
    fn look(&mut self) -> anyhow::Result<()> {
        let cluster = self.cluster;
        let wget = format!("timeout 5 busybox wget -q -O - {}", self.url);
        let text = in_pod(cluster, "node-a", &self.caller, &wget)?;
        ensure!(text == "the ledger\n", "{text}");
        match in_pod(cluster, "node-a", &self.other, &wget) {
            Ok(text) => bail!("somebody else was let in: {text}"),
            Err(error) => ensure!(format!("{error:#}").contains("Connection refused"), "{error:#}"),
        }
        self.live.echo().context("the connection that was open before")?;
        for node in ["node-a", "node-b"] {
            agents::page(cluster, node, "http://127.0.0.1:9465/readyz").context("an agent")?;
        }
        let ready = format!("http://{}:9464/readyz", self.control_plane);
        agents::page(cluster, "node-a", &ready).context("the control plane")?;
        // Somebody without the mesh, to be seen on the wire by what looks for others there.
        let words = agents::page(cluster, "node-a", &format!("http://{}/", self.server))?;
        ensure!(words == "loose words\n", "{words}");
        self.expiries.insert(self.expiry()?);
        Ok(())
    }

    /// When the caller's certificate ends.
    fn expiry(&self) -> anyhow::Result<String> {
        let page = agents::page(self.cluster, "node-a", "http://127.0.0.1:9465/metrics")?;
        let parts = ["workload=\"checkout\"", "workload_namespace=\"shop\""];
        let is_it = |line: &&str| {
            line.starts_with("hauberk_certificate_expiry_timestamp_seconds{")
                && parts.iter().all(|part| line.contains(part))
        };
        let line = page.lines().find(is_it).context("no certificate of the caller")?;
        Ok(line.rsplit(' ').next().unwrap_or_default().to_owned())
    }

    fn programs_run_on(&self) -> anyhow::Result<()> {
        for (node, container) in &self.programs {
            let tasks = ctr(self.cluster, node, &["tasks", "list"])?;
            let runs = |line: &str| line.contains(container) && line.contains("RUNNING");
            ensure!(tasks.lines().any(runs), "{container} on {node} ended:\n{tasks}");
        }
        Ok(())
    }
}

/// The containers of Hauberk itself, each with its node.
fn programs(cluster: &Cluster) -> anyhow::Result<Vec<(String, String)>> {
    let found = cluster.kubectl_json(&["get", "pods", "--namespace=hauberk-system"])?;
    let pods = found["items"].as_array().context("no pods")?;
    let programs: Vec<(String, String)> = pods
        .iter()
        .map(|pod| {
            let node = pod["spec"]["nodeName"].as_str().context("no node")?;
            Ok((node.to_owned(), container(pod)?))
        })
        .collect::<anyhow::Result<_>>()?;
    ensure!(programs.len() >= 3, "{programs:?}");
    Ok(programs)
}

/// What the runtime knows a pod's only container by.
pub(crate) fn container(pod: &Value) -> anyhow::Result<String> {
    let id = pod.pointer("/status/containerStatuses/0/containerID").and_then(Value::as_str);
    let id = id.and_then(|id| id.strip_prefix("containerd://"));
    Ok(id.with_context(|| format!("no container in {:#}", pod["status"]))?.to_owned())
}

pub(crate) fn ctr(cluster: &Cluster, node: &str, arguments: &[&str]) -> anyhow::Result<String> {
    cluster.node(node)?.text(&[["ctr", "--namespace=k8s.io"].as_slice(), arguments].concat())
}

/// A pod of `shop` on `node-a`, of which something dies.
struct Mortal {
    name: String,
    uid: String,
    container: String,
    sandbox: String,
}

impl Mortal {
    /// When it has tried what it may and may not do, for the first time.
    fn of(cluster: &Cluster, name: &str) -> anyhow::Result<Self> {
        let log = tries(cluster, "shop", name)?;
        ensure!(log.contains("the ledger\n") && !log.contains("LEAKED"), "{name}: {log}");
        let container =
            container(&cluster.kubectl_json(&["get", "pod", "--namespace=shop", name])?)?;
        let told: Value =
            serde_json::from_str(&ctr(cluster, "node-a", &["containers", "info", &container])?)?;
        let sandbox = told["Spec"]["annotations"]["io.kubernetes.cri.sandbox-id"].as_str();
        let sandbox = sandbox.with_context(|| format!("no sandbox of {name}"))?.to_owned();
        let uid = agents::uid(cluster, "shop", name)?;
        Ok(Self { name: name.to_owned(), uid, container, sandbox })
    }

    /// Kills a process of the pod, and waits until it has tried everything again.
    fn dies(&self, cluster: &Cluster, process: &str) -> anyhow::Result<()> {
        ctr(cluster, "node-a", &["tasks", "kill", "--signal=SIGKILL", process])?;
        has_tried(cluster, &self.name, &self.uid, 1)
    }
}

/// Waits until a pod of [`hasty`] on `node-a` has tried everything, and fails unless it is in the mesh. Reads the
/// log of its container that was started so many times before.
fn has_tried(cluster: &Cluster, name: &str, uid: &str, starts: u32) -> anyhow::Result<()> {
    let log = format!("/var/log/pods/shop_{name}_{uid}/it/{starts}.log");
    let log = cluster.node("node-a")?.disk(&log);
    let text = cluster.wait_until(&format!("{name} to run"), PATIENCE, |_| {
        let text = fs::read_to_string(&log).with_context(|| log.display().to_string())?;
        let over = |word: &str| text.lines().any(|line| line.ends_with(word));
        ensure!(over(" done") && over(" the ledger"), "{text}");
        Ok(text)
    })?;
    ensure!(!text.contains("LEAKED"), "{name} runs without the mesh: {text}");
    Ok(())
}

/// The network of the pod of a node that has this address.
pub(crate) fn network_of(cluster: &Cluster, node: &str, address: IpAddr) -> anyhow::Result<Netns> {
    // Only opened there: a thread that has entered another process namespace can start no other.
    let places = cluster.node(node)?.run(|| -> std::io::Result<Vec<File>> {
        let places = fs::read_dir("/run/netns")?.filter_map(|place| place.ok());
        Ok(places.filter_map(|place| File::open(place.path()).ok()).collect())
    })??;
    for place in places {
        let path = format!("/proc/self/fd/{}", place.as_raw_fd());
        // One that is being taken down is none any more.
        let Ok(network) = Netns::open(Path::new(&path)) else { continue };
        // Only the owner of an address can bind to it.
        if network.run(|| UdpSocket::bind((address, 0)))?.is_ok() {
            return Ok(network);
        }
    }
    bail!("no pod of {node} has {address}")
}

/// A connection that stays open, to a server that says everything again.
pub(crate) struct Live {
    stream: TcpStream,
    said: u64,
}

impl Live {
    pub(crate) fn open(network: &Netns, server: SocketAddr) -> anyhow::Result<Self> {
        let stream = network.run(|| TcpStream::connect_timeout(&server, ANSWER))??;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Self { stream, said: 0 })
    }

    /// The same from this port of the network.
    pub(crate) fn open_from(
        network: &Netns,
        port: u16,
        server: SocketAddr,
    ) -> anyhow::Result<Self> {
        let connect = || -> std::io::Result<TcpStream> {
            let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
            socket.connect_timeout(&server.into(), ANSWER)?;
            Ok(socket.into())
        };
        let stream = network.run(connect)??;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        Ok(Self { stream, said: 0 })
    }

    /// Its own port.
    pub(crate) fn port(&self) -> anyhow::Result<u16> {
        Ok(self.stream.local_addr()?.port())
    }

    pub(crate) fn echo(&mut self) -> anyhow::Result<()> {
        self.said += 1;
        let line = format!("word {}\n", self.said);
        self.stream.write_all(line.as_bytes())?;
        let mut back = vec![0; line.len()];
        self.stream.read_exact(&mut back)?;
        ensure!(back == line.as_bytes(), "another word came back: {back:?}");
        Ok(())
    }
}
