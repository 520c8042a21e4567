//! The demonstration: two machines, three services, one allowed and one denied connection, and the
//! proof of both.

use std::{
    ffi::OsString,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use hauberk_linux::packets::{CaptureOptions, Interface, PacketCapture, PcapFile};
use serde::Serialize;

use crate::Output;
use crate::lab::{Lab, become_root, interrupted, ipv4, listen_for_interrupts};

/// How the demonstration runs.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave it running, to play with, until Ctrl-C.
    #[arg(long)]
    keep: bool,

    /// How to tell of it: step by step, or what came of it as one value.
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

/// What came of it.
#[derive(Serialize)]
struct Outcome {
    /// What the ledger answered, and the record of its agent.
    allowed: Attempt,
    /// How the other caller was refused, and the record of its agent.
    denied: Attempt,
    /// The lines of the agents' metrics that tell of both.
    metrics: Vec<Metric>,
    wire: Wire,
}

#[derive(Serialize)]
struct Attempt {
    answer: String,
    record: serde_json::Value,
}

#[derive(Serialize)]
struct Metric {
    machine: &'static str,
    line: String,
}

/// What the wire between the machines saw.
#[derive(Serialize)]
struct Wire {
    frames: u64,
    handshakes: usize,
    offers_x25519mlkem768: bool,
    takes_x25519mlkem768: bool,
    takes_tls_13: bool,
    payload_in_clear: bool,
}

/// Tells people, step by step; programs get the outcome.
#[derive(Clone, Copy)]
struct Narrator(Output);

impl Narrator {
    fn step(self, text: &str) {
        self.say(&format!("\n▶ {text}"));
    }

    fn say(self, text: &str) {
        if self.0 == Output::Text {
            println!("{text}");
        }
    }
}

const WEB: u8 = 11;
const CHECKOUT: u8 = 12;
const LEDGER: u8 = 21;
const PORT: u16 = 8080;

/// What travels through the mesh, and must not be seen on the wire.
const PAYLOAD: &str = "balance-of-account-4711-is-1000000-credits";

const MACHINES: &str = "\
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-a}
spec: {addresses: [10.77.0.2]}
---
apiVersion: hauberk.dev/v1alpha1
kind: Machine
metadata: {name: machine-b}
spec: {addresses: [10.77.0.3]}
";

const WORKLOADS: &str = "\
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: web, namespace: shop}
spec:
  machine: machine-a
  serviceAccount: web
  process: {networkNamespace: web}
  addresses: [10.77.0.11]
  ports: []
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: checkout, namespace: shop}
spec:
  machine: machine-a
  serviceAccount: checkout
  process: {networkNamespace: checkout}
  addresses: [10.77.0.12]
  ports: []
---
apiVersion: hauberk.dev/v1alpha1
kind: Workload
metadata: {name: ledger, namespace: payments, labels: {app: ledger}}
spec:
  machine: machine-b
  serviceAccount: ledger
  process: {networkNamespace: ledger}
  addresses: [10.77.0.21]
  ports: [8080]
";

const POLICY: &str = "\
apiVersion: hauberk.dev/v1alpha1
kind: AccessPolicy
metadata: {name: ledger, namespace: payments}
spec:
  owner: {team: payments, contact: '#payments-oncall'}
  target: {selector: {matchLabels: {app: ledger}}}
  mode: Enforce
  rules:
  - name: checkout
    reason: order capture
    ports: [8080]
    from:
    - serviceAccount: {namespace: shop, name: checkout}
  tests:
  - {from: {serviceAccount: {namespace: shop, name: checkout}}, port: 8080, expect: allow}
  - {from: {serviceAccount: {namespace: shop, name: web}}, port: 8080, expect: deny}
";

pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let own_users = become_root()?;
    listen_for_interrupts()?;
    let narrator = Narrator(args.output);
    narrator.step("making two machines and three services: network namespaces on a bridge");
    let program = std::env::current_exe().context("find this program")?;
    let mut lab = Lab::new(vec![OsString::from(program)])?;
    lab.add("machine-a", 2)?;
    lab.add("machine-b", 3)?;
    lab.add("web", WEB)?;
    lab.add("checkout", CHECKOUT)?;
    lab.add("ledger", LEDGER)?;
    for (name, text) in
        [("machines.yaml", MACHINES), ("workloads.yaml", WORKLOADS), ("ledger.yaml", POLICY)]
    {
        lab.write_manifest(name, text)?;
    }
    narrator.step("starting the control plane, with a certificate authority of its own");
    lab.start_control_plane(&[])?;
    narrator.step("joining two agents with one-use tokens; they capture the services");
    for machine in ["machine-a", "machine-b"] {
        lab.start_agent(machine, &["--remove-rules-on-stop"])?;
    }
    lab.wait_ready().with_context(|| logs(&lab))?;
    let ledger = SocketAddr::new(ipv4(LEDGER), PORT);
    serve_ledger(&lab, ledger)?;
    let pcap = lab.folder().join("wire.pcap");
    let capture = lab.wire().run(|| {
        PacketCapture::start(&CaptureOptions {
            interface: Interface::All,
            file: PcapFile::At(pcap.clone()),
            payload_limit: 4 * 1024 * 1024,
        })
    })??;

    narrator.step("checkout asks the ledger, which the ledger's owner allows");
    let answer = lab.get("checkout", ledger, "/").with_context(|| logs(&lab))?;
    narrator.say(&format!("    GET http://{ledger}/ -> {}", answer.trim()));
    interrupted()?;
    narrator.step("web asks the ledger, which nobody allows");
    let refusal = match lab.get("web", ledger, "/") {
        Ok(answer) => bail!("web got an answer, and should not have: {answer}"),
        Err(error) => error.to_string(),
    };
    narrator.say(&format!("    GET http://{ledger}/ -> {refusal}"));
    let allowed = record(&lab, "machine-b", "\"decision\":\"allow\"")?;
    let denied = record(&lab, "machine-a", "\"decision\":\"deny\"")?;
    narrator.step("the record of the allowed connection, from the ledger's agent");
    narrator.say(&pretty(&allowed)?);
    narrator.step("the record of the denied one, from web's agent: reason, owner and mend");
    narrator.say(&pretty(&denied)?);
    narrator.step("the metrics that tell of them");
    let metrics = SocketAddr::from(([127, 0, 0, 1], 9465));
    let mut told = Vec::new();
    for machine in ["machine-a", "machine-b"] {
        let page = lab.get(machine, metrics, "/metrics")?;
        for line in page.lines().filter(|line| {
            line.starts_with("hauberk_connections_total")
                || line.starts_with("hauberk_connections_denied_total")
        }) {
            narrator.say(&format!("    {machine}  {line}"));
            told.push(Metric { machine, line: line.to_owned() });
        }
    }
    let wire = prove_wire(capture, narrator)?;
    if args.output == Output::Json {
        let outcome = Outcome {
            allowed: Attempt { answer: answer.trim().to_owned(), record: allowed },
            denied: Attempt { answer: refusal, record: denied },
            metrics: told,
            wire,
        };
        println!("{}", serde_json::to_string(&outcome)?);
    }
    if args.keep {
        keep(&lab, ledger, own_users)?;
    }
    narrator.step("stopping; nothing is left behind");
    Ok(ExitCode::SUCCESS)
}

/// The service that others want: it answers with what must stay secret.
fn serve_ledger(lab: &Lab, address: SocketAddr) -> anyhow::Result<()> {
    let listener = lab.namespace("ledger")?.run(|| TcpListener::bind(address))??;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut reader = BufReader::new(&stream);
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                    line.clear();
                }
                let peer =
                    stream.peer_addr().map_or_else(|_| "?".to_owned(), |p| p.ip().to_string());
                let body = format!("{PAYLOAD} (the ledger sees you as {peer})\n");
                // The caller may have gone.
                drop(write!(
                    &stream,
                    "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                    body.len()
                ));
            });
        }
    });
    Ok(())
}

fn record(lab: &Lab, machine: &str, part: &str) -> anyhow::Result<serde_json::Value> {
    let mut found = None;
    lab.wait("the record", Duration::from_secs(5), |lab| {
        let text = std::fs::read_to_string(lab.records(machine))?;
        found = text.lines().find(|line| line.contains(part)).map(str::to_owned);
        if found.is_some() { Ok(()) } else { bail!("{machine} has no record with {part}") }
    })?;
    Ok(serde_json::from_str(&found.context("no record")?)?)
}

fn pretty(record: &serde_json::Value) -> anyhow::Result<String> {
    let text = serde_json::to_string_pretty(record)?;
    Ok(text.lines().map(|line| format!("    {line}\n")).collect::<String>().trim_end().to_owned())
}

/// What the wire between the machines saw.
fn prove_wire(capture: PacketCapture, narrator: Narrator) -> anyhow::Result<Wire> {
    const TLS13: u16 = 0x0304;
    const X25519MLKEM768: u16 = 0x11ec;
    narrator.step("the wire between the machines, captured meanwhile");
    // The last packets of the connections are on their way.
    std::thread::sleep(Duration::from_millis(200));
    let captured = capture.stop()?;
    let handshakes = captured.handshakes(15_008);
    let first = handshakes.first().context("the wire saw no TLS handshake between the agents")?;
    let client = first.client.as_ref().context("the wire saw no ClientHello")?;
    let server = first.server.as_ref().context("the wire saw no ServerHello")?;
    let wire = Wire {
        frames: captured.frames(),
        handshakes: handshakes.len(),
        offers_x25519mlkem768: client.groups.contains(&X25519MLKEM768),
        takes_x25519mlkem768: server.group == Some(X25519MLKEM768),
        takes_tls_13: server.version == TLS13,
        payload_in_clear: captured.contains(PAYLOAD.as_bytes()),
    };
    narrator.say(&format!(
        "    {} frames, {} TLS handshakes between agents",
        wire.frames, wire.handshakes
    ));
    narrator.say(&format!(
        "    ClientHello offers X25519MLKEM768: {}; ServerHello takes TLS 1.3: {}, X25519MLKEM768: {}",
        yes(wire.offers_x25519mlkem768),
        yes(wire.takes_tls_13),
        yes(wire.takes_x25519mlkem768),
    ));
    narrator.say(&format!("    the payload {PAYLOAD:?} in clear: {}", yes(wire.payload_in_clear)));
    if wire.payload_in_clear || !wire.takes_tls_13 {
        bail!("the wire was not protected");
    }
    Ok(wire)
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}

/// The ends of the programs' logs, for the message of a failure: their files go with the lab.
fn logs(lab: &Lab) -> String {
    const LINES: usize = 12;
    ["control-plane", "machine-a", "machine-b"]
        .map(|name| {
            let text = std::fs::read_to_string(lab.log(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let end = lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default();
            format!("--- the end of {name}'s log\n{}\n", end.join("\n"))
        })
        .concat()
}

fn keep(lab: &Lab, ledger: SocketAddr, own_users: bool) -> anyhow::Result<()> {
    // A user namespace of its own is only there for those who are not root, and root cannot enter the
    // one it is in.
    let user = if own_users {
        format!(" --user=/proc/{}/ns/user --preserve-credentials", std::process::id())
    } else {
        String::new()
    };
    let enter = |namespace: &str| -> anyhow::Result<String> {
        let path = lab.namespace(namespace)?.proc_path();
        Ok(format!("nsenter{user} --net={}", path.display()))
    };
    let program = std::env::current_exe().context("find this program")?;
    let hauberk = program.display();
    println!("\n▶ it goes on running until Ctrl-C; from another terminal:");
    println!("    allowed:  {} curl -s http://{ledger}/", enter("checkout")?);
    println!("    denied:   {} curl -s http://{ledger}/", enter("web")?);
    println!("    metrics:  {} curl -s http://127.0.0.1:9465/metrics", enter("machine-b")?);
    println!("    policy:   edit {}/ledger.yaml", lab.manifests().display());
    println!("    ask:      export HAUBERK_SOCKET={}", lab.socket().display());
    println!("              {hauberk} status");
    println!("              {hauberk} why shop/web payments/ledger:8080");
    println!("              {hauberk} denied -f");
    while interrupted().is_ok() {
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
