//! Namespaces come into the mesh and leave it while their pods talk, and nobody notices.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use hauberk_kubernetes_tests::Cluster;
use hauberk_linux::Netns;

use crate::{
    Test, agents,
    install::{PATIENCE, everything},
    outage::{Live, network_of},
    pods::{address, server},
    policy::{POLICY, get},
    trouble::{LEDGER, in_pod},
};

pub(crate) const TESTS: &[(&str, Test)] = &[
    (
        "namespaces_come_and_go_without_a_failed_request",
        namespaces_come_and_go_without_a_failed_request,
    ),
    (
        "a_pod_that_is_back_is_captured_before_the_runtime_answers",
        a_pod_that_is_back_is_captured_before_the_runtime_answers,
    ),
];

/// How long requests go on after each change.
const SETTLING: Duration = Duration::from_secs(5);

/// Between two requests of a caller.
const PAUSE: Duration = Duration::from_millis(2);

/// How many rounds, if that is to be more than [`ROUNDS`].
const MORE_ROUNDS: &str = "HAUBERK_TEST_ROUNDS";

/// From off to enforce and back. The second one finds what the first has left.
const ROUNDS: usize = 2;

/// How long a request may take.
const ANSWER: Duration = Duration::from_secs(10);

/// Requests from one pod to servers, without an end, each over a connection of its own.
pub(crate) struct Load<'a> {
    network: &'a Netns,
    done: AtomicUsize,
    over: AtomicBool,
    failures: Mutex<Vec<String>>,
    /// What is going on.
    phase: Mutex<(&'static str, Instant)>,
}

impl<'a> Load<'a> {
    fn new(network: &'a Netns) -> Self {
        Self {
            network,
            done: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            failures: Mutex::default(),
            phase: Mutex::new(("before", Instant::now())),
        }
    }

    /// Requests to these servers while `work` goes on, none of which may fail. How many there were.
    pub(crate) fn during(
        network: &Netns,
        servers: &[(IpAddr, u16)],
        work: impl FnOnce(&Load<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<usize> {
        let own = Load::new(network);
        let load = &own;
        let worked = thread::scope(|scope| {
            for server in servers.iter().copied().map(SocketAddr::from) {
                scope.spawn(move || load.go_on(server));
                scope.spawn(move || load.go_on(server));
            }
            let worked = work(load);
            load.over.store(true, Ordering::Relaxed);
            worked
        });
        worked?;
        let failures = own.failures.into_inner().unwrap();
        ensure!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
        Ok(own.done.into_inner())
    }

    fn request(&self, server: SocketAddr) -> anyhow::Result<()> {
        let mut stream =
            self.network.run(|| TcpStream::connect_timeout(&server, ANSWER))?.context("connect")?;
        stream.set_read_timeout(Some(ANSWER))?;
        // By its port the agents' records tell what became of it.
        let own = stream.local_addr()?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n").with_context(|| format!("ask, from {own}"))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).with_context(|| format!("the answer, from {own}"))?;
        ensure!(answer.ends_with("the ledger\n"), "the answer is {answer:?}");
        Ok(())
    }

    fn go_on(&self, server: SocketAddr) {
        while !self.over.load(Ordering::Relaxed) {
            let began = Instant::now();
            if let Err(error) = self.request(server) {
                let (phase, since) = *self.phase.lock().unwrap();
                let (at, took) = (since.elapsed(), began.elapsed());
                let text = format!("{phase}, {at:?} after: {server} after {took:?}: {error:#}");
                self.failures.lock().unwrap().push(text);
            }
            self.done.fetch_add(1, Ordering::Relaxed);
            thread::sleep(PAUSE);
        }
    }

    /// Changes something, and gives it time.
    pub(crate) fn phase(
        &self,
        name: &'static str,
        change: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let before = (self.done.load(Ordering::Relaxed), self.failures.lock().unwrap().len());
        *self.phase.lock().unwrap() = (name, Instant::now());
        change().context(name)?;
        thread::sleep(SETTLING);
        let done = self.done.load(Ordering::Relaxed) - before.0;
        let failed = self.failures.lock().unwrap().len() - before.1;
        eprintln!("{name}: {failed} of {done} requests failed");
        // While the agents' logs still tell of it.
        ensure!(failed == 0, "{}", self.failures.lock().unwrap().join("\n"));
        Ok(())
    }
}

pub(crate) fn label(cluster: &Cluster, label: &str) -> anyhow::Result<()> {
    let change = ["label", "--overwrite", "namespace", "shop", "payments", label];
    cluster.kubectl(&change).map(drop)
}

fn namespaces_come_and_go_without_a_failed_request(cluster: &Cluster) -> anyhow::Result<()> {
    let caller: IpAddr = address(cluster, "shop", "checkout")?.parse()?;
    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let network = network_of(cluster, "node-a", caller)?;
    let found = cluster.kubectl_json(&["get", "service", "--namespace=payments", "ledger"])?;
    let service: IpAddr = found["spec"]["clusterIP"].as_str().context("no address")?.parse()?;
    cluster.apply(&POLICY.replace("[8080]", "[8080, 9000]"))?;
    label(cluster, "hauberk.dev/mode-")?;
    cluster.wait_until("pods without the mesh", PATIENCE, |cluster| {
        ensure!(get(cluster, "web", LEDGER)? == "the ledger\n", "not even without the mesh");
        free(cluster, caller)
    })?;
    let walked = Load::during(&network, &[(ledger, 8080), (service, 80)], |load| {
        walk(cluster, load, caller, SocketAddr::new(ledger, 9000))
    });
    let restored = label(cluster, "hauberk.dev/mode=enforce");
    let done = walked.map_err(|error| {
        let records = records_of(cluster, &format!("{error:#}"), caller);
        error.context(records).context(everything(cluster))
    })?;
    restored?;
    ensure!(done > 10_000, "only {done} requests were made");
    cluster.wait_until("the mesh to refuse", PATIENCE, |cluster| {
        ensure!(get(cluster, "web", LEDGER).is_err(), "nobody allowed it");
        Ok(())
    })
}

/// What the agents have written of the connections that this text has the ports of.
fn records_of(cluster: &Cluster, text: &str, caller: IpAddr) -> String {
    let lead = format!("from {caller}:");
    let mut found = String::new();
    for port in text.split(&lead).skip(1).filter_map(|rest| rest.split(':').next()) {
        let end = format!("{caller}:{port}\"");
        for node in ["node-a", "node-b"] {
            let lines = agents::lines(cluster, node).unwrap_or_default();
            for line in lines.iter().filter(|line| line.contains(&end)) {
                found.push_str(&format!("{node}: {line}\n"));
            }
        }
    }
    found
}

/// It was let go, and something of it is carried still: its rules are there, and leave new connections alone.
fn a_pod_that_is_back_is_captured_before_the_runtime_answers(
    cluster: &Cluster,
) -> anyhow::Result<()> {
    let caller: IpAddr = address(cluster, "shop", "checkout")?.parse()?;
    let ledger: IpAddr = address(cluster, "payments", "ledger")?.parse()?;
    let outside = server(cluster)?;
    let network = network_of(cluster, "node-a", caller)?;
    let reaches = || -> anyhow::Result<bool> {
        Ok(network.run(|| TcpStream::connect_timeout(&outside, ANSWER))?.is_ok())
    };
    cluster.apply(&POLICY.replace("[8080]", "[8080, 9000]"))?;
    let mut live = cluster.wait_until("the policy", PATIENCE, |_| {
        let mut live = Live::open(&network, SocketAddr::new(ledger, 9000))?;
        live.echo()?;
        Ok(live)
    })?;
    ensure!(!reaches()?, "it reaches what is outside");
    label(cluster, "hauberk.dev/mode-")?;
    cluster.wait_until("the pod to be let go", PATIENCE, |_| {
        ensure!(reaches()?, "it does not reach what is outside");
        Ok(())
    })?;
    live.echo().context("the connection that was open")?;
    // Longer than a pod is remembered that has nothing open.
    thread::sleep(SETTLING);
    ensure!(free(cluster, caller).is_err(), "its rules are gone");
    cluster.stop_containerd("node-a")?;
    let back = label(cluster, "hauberk.dev/mode=enforce").and_then(|()| {
        let began = Instant::now();
        cluster.wait_until("the pod to be captured", ANSWER, |_| {
            ensure!(!reaches()?, "it reaches what is outside");
            Ok(())
        })?;
        eprintln!("captured {:?} after the label", began.elapsed());
        Ok(())
    });
    cluster.start_containerd("node-a")?;
    back.with_context(|| everything(cluster))?;
    live.echo().context("the connection, after all")?;
    cluster.wait_until("the allowed connection", PATIENCE, |cluster| {
        let text = get(cluster, "checkout", LEDGER)?;
        ensure!(text == "the ledger\n", "{text}");
        Ok(())
    })
}

fn rounds() -> anyhow::Result<usize> {
    match std::env::var(MORE_ROUNDS) {
        Ok(text) => {
            let rounds =
                text.parse().with_context(|| format!("{MORE_ROUNDS}={text}: no number"))?;
            Ok(ROUNDS.max(rounds))
        }
        Err(_) => Ok(ROUNDS),
    }
}

fn walk(
    cluster: &Cluster,
    load: &Load<'_>,
    caller: IpAddr,
    echo: SocketAddr,
) -> anyhow::Result<()> {
    load.phase("nothing", || Ok(()))?;
    for round in 1..=rounds()? {
        eprintln!("round {round}");
        load.phase("off to audit", || label(cluster, "hauberk.dev/mode=audit"))?;
        load.phase("audit to enforce", || label(cluster, "hauberk.dev/mode=enforce"))?;
        ensure!(get(cluster, "web", LEDGER).is_err(), "nobody allowed it");
        let mut live = Live::open(load.network, echo)?;
        live.echo()?;
        load.phase("enforce to off", || label(cluster, "hauberk.dev/mode-"))?;
        live.echo().context("the connection that was open")?;
        // What it needs stays for as long as it lives, and no longer.
        ensure!(free(cluster, caller).is_err(), "its rules are gone");
        drop(live);
        let closed = Instant::now();
        cluster.wait_until("the rules to be gone", PATIENCE, |cluster| free(cluster, caller))?;
        eprintln!("its rules were gone {:?} after its end", closed.elapsed());
    }
    load.phase("off to audit", || label(cluster, "hauberk.dev/mode=audit"))?;
    load.phase("audit to off", || label(cluster, "hauberk.dev/mode-"))
}

/// Whether a pod of `node-a` has nothing of the mesh.
pub(crate) fn free(cluster: &Cluster, pod: IpAddr) -> anyhow::Result<()> {
    let tables = in_pod(cluster, "node-a", &pod.to_string(), "nft list tables")?;
    ensure!(!tables.contains("hauberk"), "{tables}");
    Ok(())
}
