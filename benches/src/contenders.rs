//! Who is measured, each between a caller's and a server's namespace of the same kind: straight, through
//! two processes of another program, or through two Hauberk agents. Every relay runs on CPU 1, the load on
//! CPU 0.

use std::{
    ffi::{OsStr, OsString},
    fs,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use hauberk_cli::lab::{Lab, Running, ipv4};
use serde::de::DeserializeOwned;

use crate::{
    AS_HAUBERK,
    apps::{App, Servers},
    load::Kind,
    load::Measured,
    processes,
    serve::Port,
};

/// Those with an agent: the caller's and the server's.
const MACHINES: [&str; 2] = ["machine-a", "machine-b"];

/// Those with one agent for both, and how it carries connections between them.
const NODES: [(&str, u8, &str); 2] =
    [("node-mtls", 4, "mtls"), ("node-local", 5, "verified-local")];

const MESHED_CLIENT: u8 = 11;
const MESHED_SERVER: u8 = 21;
/// The callers and servers of one node.
const NODE_PAIRS: [[(&str, u8); 2]; 2] =
    [[("mtls-caller", 41), ("mtls-server", 42)], [("local-caller", 51), ("local-server", 52)]];
const PLAIN_CLIENT: u8 = 31;
const PLAIN_SERVER: u8 = 32;

/// The first of the server's ports.
const SERVER: u16 = 7000;

/// Where the relays of the other contenders listen: at the caller, and at the server.
const NEAR: u16 = 7100;
const FAR: u16 = 7200;

/// Who.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contender {
    Raw,
    Plain,
    Haproxy,
    Stunnel,
    Hauberk,
    /// An earlier build of it.
    Before,
    /// Both workloads on one node.
    OneNode,
    /// The same under `verified-local`.
    VerifiedLocal,
}

impl Contender {
    pub(crate) const ALL: [Self; 8] = [
        Self::Raw,
        Self::Plain,
        Self::Haproxy,
        Self::Stunnel,
        Self::Hauberk,
        Self::Before,
        Self::OneNode,
        Self::VerifiedLocal,
    ];

    /// Whether it is a relay at each of the two ends, and not nothing or one for both.
    pub(crate) fn is_a_pair(self) -> bool {
        !matches!(self, Self::Raw | Self::OneNode | Self::VerifiedLocal)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw TCP",
            Self::Plain => "plain relays",
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
            Self::Hauberk => "hauberk",
            Self::Before => "hauberk, before",
            Self::OneNode => "hauberk, one node",
            Self::VerifiedLocal => "hauberk, one node, verified-local",
        }
    }

    /// On the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Plain => "plain",
            Self::Haproxy => "haproxy",
            Self::Stunnel => "stunnel",
            Self::Hauberk => "hauberk",
            Self::Before => "before",
            Self::OneNode => "one-node",
            Self::VerifiedLocal => "verified-local",
        }
    }
}

/// Everything that runs for the whole benchmark: the namespaces, the server in each kind, and Hauberk's
/// control plane and agents. The others are started when it is their turn.
pub(crate) struct Field {
    lab: Lab,
    program: PathBuf,
    _servers: Vec<Running>,
    before: Option<Before>,
}

/// An earlier build, in a laboratory of its own.
struct Before {
    lab: Lab,
    _server: Running,
}

/// A contender that is ready to be loaded.
pub(crate) struct Ready<'a> {
    field: &'a Field,
    lab: &'a Lab,
    client: &'static str,
    address: SocketAddr,
    /// The relays, to be measured; their owner if they were started for this.
    processes: Vec<u32>,
    _running: Vec<Running>,
}

impl Field {
    /// With so many rules in Hauberk's policy, certificates that live so long (`60s`), with these arguments
    /// to its agents, and an earlier build of it beside.
    pub(crate) fn new(
        rules: usize,
        lifetime: &str,
        agent_arguments: &[&str],
        before: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let cubic = Cubic::by_default();
        let before =
            before.map(|path| Before::start(path, &program, rules, lifetime)).transpose()?;
        let mut lab = Lab::new(on_relays_cpu([program.as_os_str(), OsStr::new(AS_HAUBERK)]))?;
        for (name, number) in [
            ("machine-a", 2),
            ("machine-b", 3),
            ("caller", MESHED_CLIENT),
            ("server", MESHED_SERVER),
            ("plain-caller", PLAIN_CLIENT),
            ("plain-server", PLAIN_SERVER),
        ] {
            lab.add(name, number)?;
        }
        for (name, number, _) in NODES {
            lab.add(name, number)?;
        }
        for (name, number) in NODE_PAIRS.into_iter().flatten() {
            lab.add(name, number)?;
            lab.namespace(name)?.run(many_ports)??;
        }
        drop(cubic);
        for name in ["caller", "server", "plain-caller", "plain-server"] {
            lab.namespace(name)?.run(many_ports)??;
        }
        let servers = [("server", MESHED_SERVER), ("plain-server", PLAIN_SERVER)]
            .into_iter()
            .chain(NODE_PAIRS.map(|[_, server]| server))
            .map(|(namespace, number)| serve(&lab, &program, namespace, number))
            .collect::<anyhow::Result<Vec<_>>>()?;
        write_manifests(&lab, rules, &NODES)?;
        lab.start_control_plane(&["--workload-certificate-lifetime", lifetime])?;
        for machine in MACHINES {
            lab.start_agent(machine, agent_arguments)?;
        }
        for (machine, _, edges) in NODES {
            lab.start_agent(machine, &["--local-edges", edges])?;
        }
        lab.wait_ready().context("the mesh")?;
        Ok(Self { lab, program, _servers: servers, before })
    }

    /// Starts a contender, if it does not run all the time, and waits until it carries something.
    pub(crate) fn ready(&self, contender: Contender) -> anyhow::Result<Ready<'_>> {
        let (client, address) = match contender {
            Contender::Hauberk | Contender::Before => {
                ("caller", SocketAddr::new(ipv4(MESHED_SERVER), SERVER))
            }
            Contender::OneNode => of_pair(NODE_PAIRS[0]),
            Contender::VerifiedLocal => of_pair(NODE_PAIRS[1]),
            Contender::Raw => ("plain-caller", SocketAddr::new(ipv4(PLAIN_SERVER), SERVER)),
            Contender::Plain | Contender::Haproxy | Contender::Stunnel => {
                ("plain-caller", SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), NEAR))
            }
        };
        let (running, processes) = match contender {
            Contender::Raw => (Vec::new(), Vec::new()),
            Contender::Hauberk => (Vec::new(), self.agents()?.to_vec()),
            Contender::Before => (Vec::new(), agents(self.lab_of(contender)?)?.to_vec()),
            Contender::OneNode => (Vec::new(), vec![self.agent(NODES[0].0)?]),
            Contender::VerifiedLocal => (Vec::new(), vec![self.agent(NODES[1].0)?]),
            Contender::Plain | Contender::Haproxy | Contender::Stunnel => {
                let running = self.start(contender)?;
                let processes = running.iter().map(Running::process).collect();
                (running, processes)
            }
        };
        let lab = self.lab_of(contender)?;
        let ready = Ready { field: self, lab, client, address, processes, _running: running };
        let carries = |_: &Lab| {
            let measured = ready.load(Kind::Connects, 1, 0.05, &[])?;
            ensure!(measured.count > 0, "no connection succeeds");
            Ok(())
        };
        self.lab
            .wait(contender.name(), Duration::from_secs(10), carries)
            .with_context(|| self.said(contender))?;
        Ok(ready)
    }

    /// Starts the programs of others that a contender is to carry.
    pub(crate) fn serve_apps(&self, contender: Contender) -> anyhow::Result<Servers> {
        let (namespace, number) = match contender {
            Contender::Raw => ("plain-server", PLAIN_SERVER),
            Contender::Hauberk | Contender::Before => ("server", MESHED_SERVER),
            Contender::Plain
            | Contender::Haproxy
            | Contender::Stunnel
            | Contender::OneNode
            | Contender::VerifiedLocal => bail!("{} carries no apps", contender.name()),
        };
        Servers::start(self.lab_of(contender)?, contender.word(), namespace, ipv4(number))
            .with_context(|| format!("the apps for {}", contender.name()))
    }

    fn lab_of(&self, contender: Contender) -> anyhow::Result<&Lab> {
        if contender != Contender::Before {
            return Ok(&self.lab);
        }
        let before = self.before.as_ref().context("--before tells which build that is")?;
        Ok(&before.lab)
    }

    /// What its two halves wrote.
    fn said(&self, contender: Contender) -> String {
        ["near", "far"]
            .map(|half| {
                let log = self.lab.log(&format!("{}-{half}", contender.word()));
                fs::read_to_string(log).unwrap_or_default()
            })
            .concat()
    }

    fn start(&self, contender: Contender) -> anyhow::Result<Vec<Running>> {
        let folder = self.lab.folder().join(contender.word());
        fs::create_dir_all(&folder)?;
        let far = SocketAddr::new(ipv4(PLAIN_SERVER), FAR);
        let halves = match contender {
            Contender::Plain => [
                self.plain(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), NEAR), far),
                self.plain(far, SocketAddr::new(ipv4(PLAIN_SERVER), SERVER)),
            ],
            Contender::Haproxy => haproxy(&folder, far)?,
            Contender::Stunnel => stunnel(&folder, far)?,
            Contender::Raw
            | Contender::Hauberk
            | Contender::Before
            | Contender::OneNode
            | Contender::VerifiedLocal => {
                bail!("{} is not started", contender.name())
            }
        };
        // The far half first: the near one may look for it.
        let [mut near, mut far] = halves;
        let log = |half: &str| format!("{}-{half}", contender.word());
        let far = self.lab.spawn("plain-server", &log("far"), &mut far)?;
        let near = self.lab.spawn("plain-caller", &log("near"), &mut near)?;
        Ok(vec![near, far])
    }

    fn plain(&self, listen: SocketAddr, to: SocketAddr) -> Command {
        let mut command = on_cpu(1, &self.program);
        command.arg("plain").arg(listen.to_string()).arg(to.to_string());
        command
    }

    /// Hauberk's agents, the caller's and the server's.
    pub(crate) fn agents(&self) -> anyhow::Result<[u32; 2]> {
        agents(&self.lab)
    }

    fn agent(&self, machine: &str) -> anyhow::Result<u32> {
        self.lab.process(machine).context("no agent")
    }

    /// Throws away what the agents have recorded, as a log rotation does: millions of connections would fill
    /// a disk.
    pub(crate) fn drop_records(&self) -> anyhow::Result<()> {
        let labs = [Some(&self.lab), self.before.as_ref().map(|before| &before.lab)];
        let records = labs.into_iter().flatten();
        for records in records.flat_map(|lab| MACHINES.map(|machine| lab.records(machine))) {
            match fs::remove_file(&records) {
                // The last one was thrown away a moment ago.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.with_context(|| format!("remove {}", records.display()))?,
            }
        }
        Ok(())
    }

    /// How many policies the control plane has, and what the kernel does.
    pub(crate) fn status(&self) -> anyhow::Result<String> {
        let status = self.lab.status()?;
        let congestion = self.lab.namespace("caller")?.run(|| fs::read_to_string(CONGESTION))??;
        Ok(format!("{} policies, congestion control {}", status.policies, congestion.trim()))
    }
}

impl Before {
    fn start(path: &Path, program: &Path, rules: usize, lifetime: &str) -> anyhow::Result<Self> {
        let mut lab = Lab::new(on_relays_cpu([path.as_os_str()]))?;
        for (name, number) in [
            ("machine-a", 2),
            ("machine-b", 3),
            ("caller", MESHED_CLIENT),
            ("server", MESHED_SERVER),
        ] {
            lab.add(name, number)?;
        }
        for name in ["caller", "server"] {
            lab.namespace(name)?.run(many_ports)??;
        }
        let server = serve(&lab, program, "server", MESHED_SERVER)?;
        write_manifests(&lab, rules, &[])?;
        lab.start_control_plane(&["--workload-certificate-lifetime", lifetime])?;
        for machine in MACHINES {
            lab.start_agent(machine, &[])?;
        }
        lab.wait_ready().context("the mesh of the build before")?;
        Ok(Self { lab, _server: server })
    }
}

/// Each agent sees one CPU from its start on, and sets itself up for one.
fn on_relays_cpu<const N: usize>(command: [&OsStr; N]) -> Vec<OsString> {
    let taskset = ["taskset", "-c", "1"].map(OsStr::new);
    taskset.into_iter().chain(command).map(OsStr::to_owned).collect()
}

fn serve(lab: &Lab, program: &Path, namespace: &str, number: u8) -> anyhow::Result<Running> {
    let mut command = on_cpu(0, program);
    command.arg("serve").arg(SocketAddr::new(ipv4(number), SERVER).to_string());
    lab.spawn(namespace, &format!("serve-{namespace}"), &mut command)
}

/// The caller's agent and the server's.
fn agents(lab: &Lab) -> anyhow::Result<[u32; 2]> {
    let [near, far] = MACHINES.map(|machine| lab.process(machine).context("no agent"));
    Ok([near?, far?])
}

/// Where a pair of workloads of one node is loaded from, and where its server is.
fn of_pair([(caller, _), (_, server)]: [(&'static str, u8); 2]) -> (&'static str, SocketAddr) {
    (caller, SocketAddr::new(ipv4(server), SERVER))
}

/// What a load cost.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cost {
    pub(crate) measured: Measured,
    /// CPU seconds of both relays together while it ran.
    pub(crate) cpu_seconds: f64,
}

impl Ready<'_> {
    /// One load, to its end.
    pub(crate) fn load(
        &self,
        kind: Kind,
        connections: usize,
        seconds: f64,
        more: &[&str],
    ) -> anyhow::Result<Measured> {
        self.finish(self.command(kind, connections, seconds, more))
    }

    /// A load of another kind: this program with other arguments, and the server's address behind them.
    pub(crate) fn load_with<T: DeserializeOwned>(&self, arguments: &[String]) -> anyhow::Result<T> {
        let mut command = on_cpu(0, &self.field.program);
        command.args(arguments).arg(self.address.to_string());
        self.finish(command)
    }

    /// Runs a load to its end, and reads its result.
    fn finish<T: DeserializeOwned>(&self, mut command: Command) -> anyhow::Result<T> {
        let namespace = self.lab.namespace(self.client)?;
        let output = namespace.run(|| command.output())?.context("start the load")?;
        if !output.status.success() {
            bail!("load: {}", String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).context("read the load's result")
    }

    fn command(&self, kind: Kind, connections: usize, seconds: f64, more: &[&str]) -> Command {
        let word = match kind {
            Kind::Up => "up",
            Kind::Down => "down",
            Kind::Rounds => "rounds",
            Kind::Connects => "connects",
            Kind::Idle => "idle",
            Kind::Fair => "fair",
        };
        let mut command = on_cpu(0, &self.field.program);
        command
            .args(["load", word])
            .arg(self.address.to_string())
            .args(["--connections", &connections.to_string()])
            .args(["--seconds", &seconds.to_string()])
            .args(more);
        command
    }

    /// The same, with what the relays used meanwhile.
    pub(crate) fn cost(
        &self,
        kind: Kind,
        connections: usize,
        seconds: f64,
    ) -> anyhow::Result<Cost> {
        let before = self.cpu()?;
        let started = std::time::Instant::now();
        let measured = self.load(kind, connections, seconds, &[])?;
        let (used, whole) = (self.cpu()? - before, started.elapsed().as_secs_f64());
        // The warm-up is as busy as the rest, and not counted in what was moved.
        Ok(Cost { cpu_seconds: used * (measured.seconds / whole), measured })
    }

    /// What a program of others makes of it.
    pub(crate) fn app(&self, app: App, seconds: f64) -> anyhow::Result<f64> {
        app.measure(self.lab, self.client, self.address.ip(), seconds)
    }

    fn cpu(&self) -> anyhow::Result<f64> {
        self.processes.iter().map(|process| processes::cpu_seconds(*process)).sum()
    }

    /// User memory now, bytes, of the caller's and the server's relay.
    pub(crate) fn memory(&self) -> anyhow::Result<[f64; 2]> {
        let [near, far] = *self.processes.as_slice() else { bail!("it has no two relays") };
        Ok([processes::memory_bytes(near)?, processes::memory_bytes(far)?])
    }

    /// The same with so many idle connections.
    pub(crate) fn memory_with(&self, connections: usize, burst: bool) -> anyhow::Result<[f64; 2]> {
        let more: &[&str] = if burst { &["--burst"] } else { &[] };
        let mut command = self.command(Kind::Idle, connections, 0.0, more);
        self.holding(&mut command, || self.memory())?
    }

    /// Does some work beside so many idle connections.
    pub(crate) fn beside<T>(
        &self,
        connections: usize,
        work: impl FnOnce() -> T,
    ) -> anyhow::Result<T> {
        self.holding(&mut self.command(Kind::Idle, connections, 0.0, &[]), work)
    }

    fn holding<T>(&self, command: &mut Command, work: impl FnOnce() -> T) -> anyhow::Result<T> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let namespace = self.lab.namespace(self.client)?;
        let mut child = namespace.run(|| command.spawn())?.context("start the load")?;
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.take().context("no output")?);
        stdout.read_line(&mut line)?;
        let done = work();
        // Its end lets the connections go.
        drop(child.stdin.take());
        stdout.read_line(&mut String::new())?;
        let status = child.wait()?;
        ensure!(line.trim() == "holding" && status.success(), "the connections were not held");
        Ok(done)
    }
}

const CONGESTION: &str = "/proc/sys/net/ipv4/tcp_congestion_control";

/// Makes new namespaces use cubic, as nearly everybody does, while this lives. Some cloud machines have BBR,
/// whose pacing makes a fast virtual wire three times slower. A namespace takes its algorithm from the
/// machine's own when it is made; only root may set that.
struct Cubic(Option<String>);

impl Cubic {
    fn by_default() -> Self {
        let before = fs::read_to_string(CONGESTION).ok();
        Self(before.filter(|_| fs::write(CONGESTION, "cubic").is_ok()))
    }
}

impl Drop for Cubic {
    fn drop(&mut self) {
        if let Some(before) = &self.0
            && let Err(error) = fs::write(CONGESTION, before)
        {
            eprintln!("error: {CONGESTION} is cubic now, it was {before}: {error}");
        }
    }
}

/// Enough for many short connections.
fn many_ports() -> anyhow::Result<()> {
    let path = "/proc/sys/net/ipv4/ip_local_port_range";
    fs::write(path, "10000 65000").with_context(|| format!("write {path}"))
}

fn on_cpu(cpu: usize, program: &Path) -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", &cpu.to_string()]).arg(program);
    command
}

/// With these of the [`NODES`] besides the two machines.
fn write_manifests(lab: &Lab, rules: usize, nodes: &[(&str, u8, &str)]) -> anyhow::Result<()> {
    let mut text = String::new();
    let machines = nodes.iter().map(|(machine, number, _)| (*machine, *number));
    for (machine, number) in [("machine-a", 2), ("machine-b", 3)].into_iter().chain(machines) {
        text += &format!(
            "---\napiVersion: hauberk.dev/v1alpha1\nkind: Machine\nmetadata: {{name: {machine}}}\n\
             spec: {{addresses: ['{}']}}\n",
            ipv4(number)
        );
    }
    let mut workloads = vec![
        ("caller", "machine-a", MESHED_CLIENT, "caller"),
        ("server", "machine-b", MESHED_SERVER, "server"),
    ];
    for ((machine, ..), [caller, server]) in nodes.iter().copied().zip(NODE_PAIRS) {
        workloads.push((caller.0, machine, caller.1, "caller"));
        workloads.push((server.0, machine, server.1, "server"));
    }
    for (name, machine, number, app) in workloads {
        let ports = if app == "server" { ports() } else { String::new() };
        text += &format!(
            "---\napiVersion: hauberk.dev/v1alpha1\nkind: Workload\n\
             metadata: {{name: {name}, namespace: bench, labels: {{app: {app}}}}}\n\
             spec: {{machine: {machine}, serviceAccount: {name}, \
             process: {{networkNamespace: {name}}}, addresses: ['{}'], ports: [{ports}]}}\n",
            ipv4(number)
        );
    }
    let callers = ["caller"].into_iter().chain(NODE_PAIRS.map(|[caller, _]| caller.0));
    let own: String = callers.map(|caller| rule(caller, "bench", caller)).collect();
    text += &policy("server", &own);
    lab.write_manifest("bench.yaml", &text)?;
    // A hundred rules each, about callers that never come.
    for number in 0..rules.div_ceil(100) {
        let rules: String = (0..100)
            .map(|rule_number| {
                rule(
                    &format!("rule-{rule_number}"),
                    &format!("other-{number}"),
                    &format!("caller-{rule_number}"),
                )
            })
            .collect();
        let name = format!("other-{number}");
        lab.write_manifest(&format!("{name}.yaml"), &policy(&name, &rules))?;
    }
    Ok(())
}

fn ports() -> String {
    let own = Port::ALL.map(|port| SERVER + port.offset());
    let all = own.into_iter().chain(App::ALL.map(App::port));
    all.map(|port| port.to_string()).collect::<Vec<_>>().join(", ")
}

fn policy(name: &str, rules: &str) -> String {
    format!(
        "---\napiVersion: hauberk.dev/v1alpha1\nkind: AccessPolicy\n\
         metadata: {{name: {name}, namespace: bench}}\n\
         spec:\n  owner: {{team: bench, contact: '#bench'}}\n  \
         target: {{selector: {{matchLabels: {{app: server}}}}}}\n  rules:\n{rules}"
    )
}

fn rule(name: &str, namespace: &str, account: &str) -> String {
    format!(
        "  - {{name: {name}, ports: [{}], from: [{{serviceAccount: {{namespace: {namespace}, \
         name: {account}}}}}]}}\n",
        ports()
    )
}

/// A certificate authority, and one certificate for both halves.
fn certificates(folder: &Path) -> anyhow::Result<()> {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let key = KeyPair::generate()?;
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&key)?;
    let issuer = Issuer::new(ca, key);
    let key = KeyPair::generate()?;
    let mut leaf = CertificateParams::new(vec!["relay.example.org".to_owned()])?;
    // Named as its issuer it would pass for self-signed.
    leaf.distinguished_name = rcgen::DistinguishedName::new();
    leaf.distinguished_name.push(rcgen::DnType::CommonName, "relay.example.org");
    let leaf = leaf.signed_by(&key, &issuer)?;
    fs::write(folder.join("ca.pem"), ca_certificate.pem())?;
    fs::write(folder.join("relay.pem"), format!("{}{}", leaf.pem(), key.serialize_pem()))?;
    Ok(())
}

fn haproxy(folder: &Path, far: SocketAddr) -> anyhow::Result<[Command; 2]> {
    certificates(folder)?;
    let path = folder.display();
    let tls = format!("crt {path}/relay.pem ca-file {path}/ca.pem");
    let global = format!(
        "global\n nbthread 1\n maxconn {}\n ssl-default-bind-options ssl-min-ver TLSv1.3\n \
         ssl-default-server-options ssl-min-ver TLSv1.3\ndefaults\n mode tcp\n timeout connect 5s\n \
         timeout client 1h\n timeout server 1h\n",
        processes::many_connections()? + 50
    );
    let (mut near_text, mut far_text) = (global.clone(), global);
    for port in Port::ALL {
        let offset = port.offset();
        near_text += &format!(
            "listen p{offset}\n bind 127.0.0.1:{}\n server far {}:{} ssl verify required \
             verifyhost relay.example.org {tls}\n",
            NEAR + offset,
            far.ip(),
            far.port() + offset
        );
        far_text += &format!(
            "listen p{offset}\n bind {}:{} ssl verify required {tls}\n server app {}:{}\n",
            far.ip(),
            far.port() + offset,
            far.ip(),
            SERVER + offset
        );
    }
    let command = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text)?;
        let mut command = on_cpu(1, Path::new("haproxy"));
        command.arg("-db").arg("-f").arg(path);
        anyhow::Ok(command)
    };
    Ok([command("near.cfg", &near_text)?, command("far.cfg", &far_text)?])
}

fn stunnel(folder: &Path, far: SocketAddr) -> anyhow::Result<[Command; 2]> {
    certificates(folder)?;
    let path = folder.display();
    let global = format!(
        "foreground = yes\npid =\nsyslog = no\ndebug = err\nsslVersion = TLSv1.3\n\
         cert = {path}/relay.pem\nCAfile = {path}/ca.pem\nverifyChain = yes\n\
         socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n"
    );
    let (mut near_text, mut far_text) = (global.clone(), global);
    for port in Port::ALL {
        let offset = port.offset();
        near_text += &format!(
            "[p{offset}]\nclient = yes\ncheckHost = relay.example.org\naccept = 127.0.0.1:{}\n\
             connect = {}:{}\n",
            NEAR + offset,
            far.ip(),
            far.port() + offset
        );
        far_text += &format!(
            "[p{offset}]\naccept = {}:{}\nconnect = {}:{}\n",
            far.ip(),
            far.port() + offset,
            far.ip(),
            SERVER + offset
        );
    }
    let command = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text)?;
        let mut command = on_cpu(1, Path::new("stunnel"));
        command.arg(path);
        anyhow::Ok(command)
    };
    Ok([command("near.conf", &near_text)?, command("far.conf", &far_text)?])
}
