//! A host's port that address translation leads into a container, as Docker and Podman publish it.

use std::{
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, ensure};
use hauberk_cli::lab::{ipv4, ipv6};
use hauberk_linux::{
    Netns, links,
    packets::{CaptureOptions, PacketCapture},
};
use hauberk_tests::mesh::{CHECKOUT, Mesh, OUTSIDE, PATIENCE, is};
use serde_json::Value;

use crate::programs::Process;

crate::trials!(
    a_published_port_is_reached_through_the_mesh_and_not_around_it,
    a_published_port_is_reached_through_its_proxy,
    an_audited_published_port_is_open_to_everybody,
    a_port_that_leads_off_the_machine_is_not_followed,
    a_port_that_is_published_for_the_network_alone_is_refused_with_the_reason,
    translation_of_the_other_iptables_is_noticed,
);

const SECRET: &[u8] = b"words-that-must-not-be-on-the-wire";

/// The number of `machine-b` in the lab's networks.
const MACHINE_B: u8 = 3;
/// What the host publishes.
const PORT: u16 = 7070;
/// Where the container serves IPv4; IPv6 at the port that is published.
const INSIDE: u16 = 80;
/// The user of the workload on whose behalf the container runs, and of another workload there.
const STORE: u32 = 4343;
const CALLER: u32 = 4444;

fn manifest(mode: &str) -> String {
    let workload = |name: &str, user: u32, ports: &str, mode: &str| {
        format!(
            "apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {{name: {name}, namespace: jobs, labels: {{app: {name}}}}}
spec:
  machine: machine-b
  serviceAccount: {name}
  process: {{user: '{user}'}}
  ports: [{ports}]
  mode: {mode}
---
"
        )
    };
    workload("store", STORE, &PORT.to_string(), mode)
        + &workload("caller", CALLER, "", "Enforce")
        + &format!(
            "apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: store, namespace: jobs}}
spec:
  owner: {{team: jobs, contact: '#jobs'}}
  target: {{selector: {{matchLabels: {{app: store}}}}}}
  rules:
  - name: callers
    ports: [{PORT}]
    from:
    - serviceAccount: {{namespace: shop, name: checkout}}
    - serviceAccount: {{namespace: jobs, name: caller}}
"
        )
}

/// What Docker writes for `-p 7070:80` (and for IPv6 `-p 7070:7070`), where the containers are.
fn docker(output: &str) -> String {
    docker_with([output, output])
}

/// The same with other rules for what the machine itself sends, one for each family.
fn docker_with([output, output_v6]: [&str; 2]) -> String {
    let family = |output: &str, family: &str, own: &str, network: &str, to: &str, port: u16| {
        let container = to.trim_matches(['[', ']']);
        format!(
            "table {family} nat {{
  chain DOCKER {{
    iifname docker0 return
    iifname != docker0 tcp dport {PORT} dnat to {to}:{port}
  }}
  chain PREROUTING {{
    type nat hook prerouting priority -100
    fib daddr type local jump DOCKER
  }}
  chain OUTPUT {{
    type nat hook output priority -100
    {family} daddr != {own} fib daddr type local {output}
  }}
  chain POSTROUTING {{
    type nat hook postrouting priority 100
    {family} saddr {network} oifname != docker0 masquerade
    {family} saddr {container} {family} daddr {container} tcp dport {port} masquerade
  }}
}}
"
        )
    };
    family(output, "ip", "127.0.0.0/8", "172.30.0.0/16", "172.30.0.2", INSIDE)
        + &family(output_v6, "ip6", "::1", "fd30::/64", "[fd30::2]", PORT)
}

/// A mesh with a container on machine-b that answers with what it is sent.
struct Published {
    mesh: Mesh,
    container: Netns,
    /// Who came to the container.
    seen: Arc<Mutex<Vec<IpAddr>>>,
}

impl Published {
    fn start(mode: &str, rules: &str) -> anyhow::Result<Self> {
        let mesh = Mesh::start()?;
        let before = mesh.wait_revision(0)?;
        let container = Netns::create()?;
        let inside = container.clone();
        mesh.namespace("machine-b")?.run(|| {
            links::create_bridge("docker0")?;
            links::create_veth("vethc", "eth0", &inside)?;
            links::attach("vethc", "docker0")?;
            links::add_address("docker0", gateways().0, 16)?;
            links::add_address("docker0", gateways().1, 64)?;
            links::set_up("vethc")?;
            links::set_up("docker0")?;
            links::sysctl("ipv6/conf/all/forwarding", "1")?;
            links::sysctl("ipv4/ip_forward", "1")
        })??;
        container.run(|| {
            links::add_address("eth0", "172.30.0.2".parse().unwrap(), 16)?;
            links::add_address("eth0", "fd30::2".parse().unwrap(), 64)?;
            links::set_up("eth0")?;
            links::add_default_route(gateways().0)?;
            links::add_default_route(gateways().1)
        })??;
        let seen = Arc::<Mutex<Vec<IpAddr>>>::default();
        for port in [INSIDE, PORT] {
            let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            echo(container.run(|| TcpListener::bind(any))??, &seen);
        }
        translate(&mesh, rules)?;
        mesh.write_manifest("store.yaml", &manifest(mode))?;
        mesh.wait_revision(before)?;
        mesh.wait_ready()?;
        Ok(Self { mesh, container, seen })
    }

    fn last_seen(&self) -> anyhow::Result<IpAddr> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.last().copied().context("nobody came to the container")
    }

    fn nobody_came(&self) -> anyhow::Result<()> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(seen.is_empty(), "{seen:?} came to the container");
        Ok(())
    }
}

fn gateways() -> (IpAddr, IpAddr) {
    (Ipv4Addr::new(172, 30, 0, 1).into(), Ipv6Addr::new(0xfd30, 0, 0, 0, 0, 0, 0, 1).into())
}

fn host() -> [SocketAddr; 2] {
    [ipv4(MACHINE_B), ipv6(MACHINE_B)].map(|address| SocketAddr::new(address, PORT))
}

fn translate(mesh: &Mesh, rules: &str) -> anyhow::Result<()> {
    let file = mesh.folder().join("translation.nft");
    std::fs::write(&file, rules)?;
    mesh.run("machine-b", Command::new("nft").arg("-f").arg(&file)).map(drop)
}

/// Sends back what it gets, and notes who came.
fn echo(listener: TcpListener, seen: &Arc<Mutex<Vec<IpAddr>>>) {
    let seen = seen.clone();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Ok(peer) = stream.peer_addr() {
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.push(peer.ip().to_canonical());
            }
            thread::spawn(move || {
                let mut back = stream.try_clone()?;
                std::io::copy(&mut stream, &mut back)
            });
        }
    });
}

fn exchange(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.write_all(SECRET)?;
    let mut back = vec![0; SECRET.len()];
    stream.read_exact(&mut back)?;
    ensure!(back == SECRET, "got {:?}", String::from_utf8_lossy(&back));
    Ok(())
}

fn reach(mesh: &Mesh, from: &str, to: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = mesh.connect(from, to)?;
    exchange(&mut stream)?;
    Ok(stream)
}

/// The same as a user of machine-b.
fn reach_as(mesh: &Mesh, user: u32, to: SocketAddr) -> anyhow::Result<()> {
    let secret = String::from_utf8_lossy(SECRET);
    let (address, port) = (to.ip(), to.port());
    let line = format!(
        "exec 3<>/dev/tcp/{address}/{port} && echo -n {secret} >&3 && head -c {} <&3",
        SECRET.len()
    );
    let mut bash = Process::User(user).command("timeout");
    bash.args(["5", "bash", "-c", &line]).stderr(Stdio::null());
    let output = mesh.output("machine-b", &mut bash)?.stdout;
    ensure!(output == SECRET, "{to}: got {:?}", String::from_utf8_lossy(&output));
    Ok(())
}

/// Runs something while the wire between the machines is listened to, and fails if the secret was on it.
fn unheard<T>(mesh: &Mesh, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let capture = mesh.wire().run(|| PacketCapture::start(&CaptureOptions::default()))??;
    let done = work()?;
    let captured = capture.stop()?;
    ensure!(captured.is_complete() && captured.lost() == 0, "the capture is not whole");
    ensure!(!captured.contains(SECRET), "the secret was on the wire in clear");
    Ok(done)
}

fn of_store(record: &Value, decision: &str) -> bool {
    is(record, "side", "destination")
        && is(record, "decision", decision)
        && is(&record["dst"], "workload", "store")
}

fn refused_in_clear(mesh: &Mesh, to: SocketAddr) -> anyhow::Result<()> {
    ensure!(reach(mesh, "outside", to).is_err(), "somebody outside was answered at {to}");
    mesh.record("machine-b", |record| {
        of_store(record, "deny")
            && is(record, "reason", "plaintext")
            && is(record, "original_dst", &to.to_string())
    })?;
    Ok(())
}

fn a_published_port_is_reached_through_the_mesh_and_not_around_it() -> anyhow::Result<()> {
    let published = Published::start("Enforce", &docker("jump DOCKER"))?;
    let mesh = &published.mesh;
    // Without its proxy, Docker holds the port by a listener that it never looks at.
    let held = mesh.listen("machine-b", SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)))?;
    for to in host() {
        let mut stream = unheard(mesh, || {
            let stream = reach(mesh, "checkout", to).with_context(|| mesh.logs())?;
            ensure!(published.last_seen()? == to.ip(), "it sees {}", published.last_seen()?);
            ensure!(reach_as(mesh, 0, to).is_err(), "a process that is no workload was answered");
            reach_as(mesh, CALLER, to)?;
            Ok(stream)
        })?;
        refused_in_clear(mesh, to)?;
        mesh.record("machine-b", |record| {
            of_store(record, "allow")
                && is(record, "path", "mtls")
                && is(&record["src"], "workload", "caller")
                && is(record, "close_reason", "complete")
        })?;
        // Whatever becomes of the kernel's entries: it goes on or ends, and nothing of it is heard.
        unheard(mesh, || {
            for _ in 0..3 {
                mesh.run("machine-b", Command::new("conntrack").arg("-F").stderr(Stdio::null()))?;
                if let Err(error) = exchange(&mut stream) {
                    println!("it ended: {error:#}");
                    break;
                }
            }
            Ok(())
        })?;
        // Where nothing translates any more, nobody else gets what was meant for the container.
        let mut stream = reach(mesh, "checkout", to)?;
        unheard(mesh, || {
            translate(mesh, "flush table ip nat; flush table ip6 nat")?;
            mesh.run("machine-b", Command::new("conntrack").arg("-F").stderr(Stdio::null()))?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            ensure!(exchange(&mut stream).is_err(), "somebody answered");
            Ok(())
        })?;
        translate(mesh, &docker("jump DOCKER"))?;
    }
    held.set_nonblocking(true)?;
    // The last of them had nowhere else to go.
    let mut came = 0;
    while let Ok((mut stream, _)) = held.accept() {
        stream.set_nonblocking(true)?;
        let mut bytes = Vec::new();
        drop(stream.read_to_end(&mut bytes));
        ensure!(bytes.is_empty(), "{:?}", String::from_utf8_lossy(&bytes));
        came += 1;
    }
    ensure!(came == 0, "{came} connections came to the program that holds the port");
    let record = mesh.record("machine-b", |record| {
        of_store(record, "allow") && is(&record["src"], "workload", "checkout")
    })?;
    let from = record["src"]["addr"].as_str().unwrap_or_default();
    ensure!(
        from.contains(&ipv4(CHECKOUT).to_string()) || from.contains(&ipv6(CHECKOUT).to_string()),
        "{record}"
    );
    Ok(())
}

/// Docker's own program, which listens on the host's port and connects to the container. What a program of the machine
/// sends to its loopback reaches the container through it alone.
fn a_published_port_is_reached_through_its_proxy() -> anyhow::Result<()> {
    let published = Published::start("Enforce", &docker("jump DOCKER"))?;
    let mesh = &published.mesh;
    let listener = mesh.listen("machine-b", SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)))?;
    let machine = mesh.namespace("machine-b")?.clone();
    let inside = SocketAddr::from((Ipv4Addr::new(172, 30, 0, 2), INSIDE));
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Ok(Ok(mut onward)) = machine.run(|| TcpStream::connect(inside)) else { continue };
            thread::spawn(move || -> std::io::Result<()> {
                let (mut from, mut to) = (stream.try_clone()?, onward.try_clone()?);
                thread::spawn(move || std::io::copy(&mut from, &mut to));
                std::io::copy(&mut onward, &mut stream).map(drop)
            });
        }
    });
    unheard(mesh, || {
        for to in host() {
            reach(mesh, "checkout", to).with_context(|| mesh.logs())?;
        }
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let to = SocketAddr::new(address, PORT);
            reach_as(mesh, CALLER, to).with_context(|| mesh.logs())?;
            ensure!(published.last_seen()? == gateways().0, "{}", published.last_seen()?);
            ensure!(reach_as(mesh, 0, to).is_err(), "a process that is no workload was answered");
        }
        Ok(())
    })?;
    host().into_iter().try_for_each(|to| refused_in_clear(mesh, to))
}

fn an_audited_published_port_is_open_to_everybody() -> anyhow::Result<()> {
    let published = Published::start("Audit", &docker("jump DOCKER"))?;
    let mesh = &published.mesh;
    for to in host() {
        let _outside = reach(mesh, "outside", to).with_context(|| mesh.logs())?;
        reach_as(mesh, 0, to)?;
        unheard(mesh, || reach(mesh, "checkout", to))?;
    }
    mesh.record("machine-b", |record| {
        of_store(record, "would_deny")
            && is(record, "path", "clear")
            && record["src"]["addr"]
                .as_str()
                .is_some_and(|from| from.starts_with(&ipv4(OUTSIDE).to_string()))
    })?;
    Ok(())
}

/// Where it leads is another machine: what was decrypted here would go there in clear.
fn a_port_that_leads_off_the_machine_is_not_followed() -> anyhow::Result<()> {
    let [v4, v6] = [ipv4(OUTSIDE), ipv6(OUTSIDE)]
        .map(|there| format!("tcp dport {PORT} dnat to {}", SocketAddr::new(there, INSIDE)));
    let elsewhere = docker_with([&v4, &v6]);
    let published = Published::start("Enforce", &elsewhere)?;
    let mesh = &published.mesh;
    let seen = Arc::default();
    echo(mesh.listen("outside", SocketAddr::from((Ipv6Addr::UNSPECIFIED, INSIDE)))?, &seen);
    for to in host() {
        unheard(mesh, || {
            ensure!(reach(mesh, "checkout", to).is_err(), "it was followed");
            Ok(())
        })?;
    }
    let seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(seen.is_empty(), "{seen:?} came to another machine");
    mesh.record("machine-b", |record| {
        is(record, "close_reason", "unreachable")
            && record["detail"].as_str().is_some_and(|text| text.contains("off this machine"))
    })?;
    Ok(())
}

fn a_port_that_is_published_for_the_network_alone_is_refused_with_the_reason() -> anyhow::Result<()>
{
    let published = Published::start("Enforce", &docker("continue"))?;
    let mesh = &published.mesh;
    for to in host() {
        ensure!(reach(mesh, "checkout", to).is_err(), "it was reached");
        refused_in_clear(mesh, to)?;
    }
    published.nobody_came()?;
    mesh.record("machine-b", |record| {
        is(record, "close_reason", "unreachable")
            && record["detail"].as_str().is_some_and(|text| text.contains("OUTPUT"))
    })?;
    mesh.wait("the finding", PATIENCE, |mesh| {
        let check = mesh.ask(&["check"])?;
        let text = String::from_utf8_lossy(&check.stdout).into_owned();
        ensure!(
            text.contains("what jobs/store serves on machine-b could not be reached"),
            "{text}"
        );
        ensure!(text.contains("OUTPUT"), "{text}");
        let status = mesh.ask(&["status"])?;
        let text = String::from_utf8_lossy(&status.stdout).into_owned();
        ensure!(text.contains("yes, but not reached"), "{text}");
        Ok(())
    })?;
    // As soon as it is published for this machine, too, it is reached, and nothing is wrong.
    translate(mesh, &format!("flush ruleset ip; flush ruleset ip6; {}", docker("jump DOCKER")))?;
    for to in host() {
        reach(mesh, "checkout", to).with_context(|| mesh.logs())?;
    }
    mesh.wait("the end of the finding", PATIENCE, |mesh| {
        let check = mesh.ask(&["check"])?;
        let text = String::from_utf8_lossy(&check.stdout).into_owned();
        ensure!(!text.contains("OUTPUT"), "{text}");
        Ok(())
    })?;
    drop(published.container);
    Ok(())
}

/// The kernel's older tables tell nobody of their changes.
fn translation_of_the_other_iptables_is_noticed() -> anyhow::Result<()> {
    let published = Published::start("Enforce", "")?;
    let mesh = &published.mesh;
    let rules = format!(
        "iptables-legacy -t nat -N DOCKER && \
         iptables-legacy -t nat -A DOCKER ! -i docker0 -p tcp --dport {PORT} -j DNAT --to 172.30.0.2:{INSIDE} && \
         iptables-legacy -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER && \
         iptables-legacy -t nat -A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER"
    );
    mesh.run("machine-b", Command::new("sh").args(["-c", &rules]))?;
    let [to, _] = host();
    mesh.wait("the container", PATIENCE, |mesh| {
        unheard(mesh, || reach(mesh, "checkout", to).map(drop))
    })?;
    refused_in_clear(mesh, to)
}
